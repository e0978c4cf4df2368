"""Safetensors are written exactly, in the order of a stream, whole or not at all."""

import json

import hypothesis
import hypothesis.extra.numpy
import hypothesis.strategies as st
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxweights.checkpoint import LazyTensor, open_safetensors, write_safetensors
from jaxweights.checkpoint._safetensors_header import DTYPES
from tests.checkpoint._helpers import everything, kill, start


def bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def assert_same(got: np.ndarray, want: np.ndarray) -> None:
    assert got.dtype == want.dtype and got.shape == want.shape and bits(got) == bits(want)


@st.composite
def tensors(draw):
    """A tree of arrays of any dtype, shape and bytes."""
    names = draw(st.lists(st.text(min_size=1).filter(_is_name), unique=True, max_size=5))
    shapes = hypothesis.extra.numpy.array_shapes(min_dims=0, min_side=0, max_dims=4, max_side=4)
    out = {}
    for name in names:
        dtype = DTYPES[draw(st.sampled_from(sorted(DTYPES)))]
        shape = draw(shapes)
        count = int(np.prod(shape, dtype=int)) * dtype.itemsize
        raw = np.frombuffer(draw(st.binary(min_size=count, max_size=count)), np.uint8)
        raw = raw & 1 if dtype == np.bool_ else raw
        out[name] = raw.view(dtype).reshape(shape)
    return out


def _is_name(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return text != "__metadata__"


@hypothesis.settings(max_examples=40, deadline=None)
@hypothesis.given(tensors(), st.integers(1, 200))
def test_any_tensors_come_back_bit_for_bit_however_they_are_sharded(tmp_path_factory, tree, limit):
    out = tmp_path_factory.mktemp("out") / "model"
    write_safetensors(out, tree, max_shard_bytes=limit, metadata={"note": "ü"})
    read = open_safetensors(out)
    assert read.keys() == tree.keys() and read.metadata == {"format": "pt", "note": "ü"}
    for name, want in tree.items():
        assert_same(read.read(name), want)


@pytest.mark.parametrize("name", sorted(set(DTYPES) - {"F8_E4M3FNUZ", "F8_E5M2FNUZ"}))
def test_the_reference_reader_and_writer_agree(tmp_path, name):
    safetensors = pytest.importorskip("safetensors")
    pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(0)
    dtype = DTYPES[name]
    raw = rng.integers(0, 2 if name == "BOOL" else 256, 6 * dtype.itemsize, np.uint8)
    array = raw.view(dtype).reshape(2, 3)
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    write_safetensors(ours, {"x": array, "b": np.ones(3, np.int8)}, metadata={"k": "v"})
    named = dict(safetensors.deserialize(ours.read_bytes()))
    assert named["x"]["dtype"] == name and named["x"]["shape"] == [2, 3]
    assert bytes(named["x"]["data"]) == bits(array)

    if array.dtype.kind != "V":  # their NumPy writer knows NumPy's own dtypes
        theirs.write_bytes(safetensors.numpy.save({"x": array}))
        assert_same(open_safetensors(theirs).read("x"), array)


def test_a_folder_is_read_by_the_reference_with_its_index(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    tree = {f"layer.{i}": np.full((4,), i, np.float32) for i in range(5)}
    write_safetensors(tmp_path / "out", tree, max_shard_bytes=40)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 80 and set(index["weight_map"]) == set(tree)
    assert len(set(index["weight_map"].values())) == 3  # two tensors of 16 bytes a shard
    for name, shard in index["weight_map"].items():
        assert_same(safetensors.load_file(tmp_path / "out" / shard)[name], tree[name])


def test_jax_arrays_transposes_and_scalars_are_written_as_they_look(tmp_path):
    wide = np.arange(6, dtype=np.float32).reshape(2, 3)
    tree = {"j": jnp.ones((2,), jnp.bfloat16), "t": wide.T, "s": np.float16(2), "r": wide[::-1]}
    write_safetensors(tmp_path / "a.safetensors", tree)
    read = open_safetensors(tmp_path / "a.safetensors")
    for name, want in tree.items():
        assert_same(read.read(name), np.asarray(want))


def test_every_tensor_is_aligned_whatever_the_order(tmp_path):
    write_safetensors(
        tmp_path / "a.safetensors",
        {"odd": np.ones(3, np.int8), "half": np.ones(3, np.float16), "wide": np.ones(3)},
    )
    for info in open_safetensors(tmp_path / "a.safetensors").values():
        assert info.start % DTYPES[info.dtype].itemsize == 0


def test_one_lazy_tensor_at_a_time_is_read_once_and_in_order(tmp_path):
    read = []

    def lazy(i):
        return LazyTensor((8,), np.float32, lambda: read.append(i) or np.full(8, i, np.float32))

    tree = {str(i): lazy(i) for i in range(6)}
    write_safetensors(tmp_path / "out", tree, max_shard_bytes=64)
    assert read == list(range(6))
    assert open_safetensors(tmp_path / "out").read("4").tolist() == [4] * 8


@pytest.mark.parametrize("value", [np.ones(3, np.float32), np.ones(4), "no array"])
def test_a_lazy_tensor_that_breaks_its_word_leaves_nothing(tmp_path, value):
    lie = LazyTensor((4,), np.float32, lambda: value)
    with pytest.raises(ValueError, match=r"'x' is .*, but was declared as float32 \(4,\)"):
        write_safetensors(tmp_path / "out", {"a": np.ones(3), "x": lie})
    assert everything(tmp_path) == {}


def test_all_tensors_that_cannot_be_written_are_named_at_once(tmp_path):
    tree = {
        "q": np.zeros(2, ml_dtypes.int4),
        "l": [1, 2],
        "o": np.array([None]),
        "c": np.zeros(2, np.complex128),
    }
    with pytest.raises(TypeError, match=r"'q' is int4.*'l' is list.*'o' is object.*'c' is complex"):
        write_safetensors(tmp_path / "out", tree)
    with pytest.raises(ValueError, match=r"'__metadata__' cannot be the name.*'' cannot be"):
        write_safetensors(tmp_path / "out", {"__metadata__": np.ones(1), "": np.ones(1)})
    with pytest.raises(TypeError, match="metadata must map text to text"):
        write_safetensors(tmp_path / "out", {}, metadata={"a": 1})
    with pytest.raises(ValueError, match="max_shard_bytes=0 must be positive"):
        write_safetensors(tmp_path / "out", {}, max_shard_bytes=0)
    with pytest.raises(ValueError, match=r"take 64 bytes, more than max_shard_bytes=32"):
        write_safetensors(tmp_path / "a.safetensors", {"x": np.ones(8)}, max_shard_bytes=32)
    assert everything(tmp_path) == {}


def test_files_travel_along_but_never_over_the_tensors(tmp_path):
    (tmp_path / "tok").write_text("T")
    files = {"config.json": "{}", "sub/b": b"B", "tokenizer.json": tmp_path / "tok"}
    write_safetensors(tmp_path / "out", {"x": np.ones(1)}, files=files)
    got = everything(tmp_path / "out")
    assert got.pop("model.safetensors") and got == {
        "config.json": b"{}",
        "sub/b": b"B",
        "tokenizer.json": b"T",
    }
    for name in ("model.safetensors", "../escape"):
        with pytest.raises(ValueError, match=r"the checkpoint itself has|is not a path inside"):
            write_safetensors(tmp_path / "bad", {"x": np.ones(1)}, files={name: "{}"})
        assert not (tmp_path / "bad").exists() and not (tmp_path / "escape").exists()


def test_an_existing_checkpoint_is_kept_unless_overwriting_is_asked_for(tmp_path):
    write_safetensors(tmp_path / "out", {"x": np.ones(1)})
    before = everything(tmp_path)
    with pytest.raises(FileExistsError, match=r"write_safetensors: .*out' exists"):
        write_safetensors(tmp_path / "out", {"y": np.ones(1)})
    assert everything(tmp_path) == before
    write_safetensors(tmp_path / "out", {"y": np.ones(1)}, overwrite=True)
    assert list(open_safetensors(tmp_path / "out")) == ["y"]


def test_a_folder_that_is_no_checkpoint_is_not_overwritten(tmp_path):
    (tmp_path / "thesis").mkdir()
    write_safetensors(tmp_path / "thesis", {"x": np.ones(1)}, overwrite=True)
    write_safetensors(tmp_path / "thesis", {"x": np.ones(1)}, overwrite=True)
    (tmp_path / "thesis" / "model.safetensors").rename(tmp_path / "thesis" / "chapter")
    before = everything(tmp_path)
    with pytest.raises(FileExistsError, match=r"holds no checkpoint but \['chapter'\], which"):
        write_safetensors(tmp_path / "thesis", {"x": np.ones(1)}, overwrite=True)
    assert everything(tmp_path) == before


def test_arrays_read_before_an_overwrite_keep_their_values(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"x": np.ones(1000)})
    x = open_safetensors(path).read("x")
    # Reading from what is being replaced is how a checkpoint is changed in place.
    doubled = LazyTensor(x.shape, x.dtype, lambda: x * 2)
    write_safetensors(path, {"x": doubled}, overwrite=True)
    assert x.sum() == 1000 and open_safetensors(path).read("x").sum() == 2000


def test_a_full_disk_is_an_error_and_the_old_checkpoint_stays(tmp_path, file_limit):
    write_safetensors(tmp_path / "out", {"x": np.ones(10)})
    before = everything(tmp_path)
    with pytest.raises(OSError, match=r"write_safetensors: the disk is full.*untouched"):
        write_safetensors(tmp_path / "out", {"x": np.ones(100_000)}, overwrite=True)
    assert everything(tmp_path) == before


def test_a_killed_writer_leaves_no_destination(tmp_path):
    child = start(f"""
        import time
        import numpy as np
        from jaxweights.checkpoint import LazyTensor, write_safetensors
        wait = LazyTensor((4,), np.float64, lambda: print("ready", flush=True) or time.sleep(60))
        write_safetensors({str(tmp_path / "out")!r}, {{"a": np.ones(1000), "b": wait}})
    """)
    kill(child)
    assert not (tmp_path / "out").exists() and everything(tmp_path), "killed while writing"
    write_safetensors(tmp_path / "out", {"a": np.ones(1000)})
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
