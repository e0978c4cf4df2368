"""A stream into an Orbax checkpoint."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jaxweights as jw
from jaxweights.checkpoint import (
    load_tree,
    open_checkpoint,
    open_safetensors,
    save_tree,
    write_safetensors,
)
from jaxweights.checkpoint._raw_arrays import RawArray
from jaxweights.stream import _jobs, transform_checkpoint
from jaxweights.stream._run import PROVENANCE

HALF = jw.merge.task_arithmetic(weights=[0.5])


def _tensors(seed):
    draw = np.random.default_rng(seed)
    tensors = {
        "model.embed.weight": draw.normal(size=(40, 32)),
        "model.layers.0.up.weight": draw.normal(size=(3, 5, 7)),
        "model.layers.0.norm.weight": draw.normal(size=32),
        "model.scale": draw.normal(size=()),
        "model.none": draw.normal(size=(0, 4)),
    }
    narrow = {name: x.astype(ml_dtypes.bfloat16) for name, x in tensors.items()}
    return narrow | {"ids": np.arange(5), "mask": np.array([True, False])}


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(("base", "tuned")):
        write_safetensors(tmp_path / name, _tensors(i), files={"config.json": '{"a": 1}'})
    return tmp_path


@pytest.mark.parametrize("limit", [64, 1 << 26])
def test_the_tensors_are_those_of_safetensors(folder, monkeypatch, limit):
    monkeypatch.setattr(RawArray.__init__, "__defaults__", (limit,))
    monkeypatch.setattr(_jobs, "PIECE_ENTRIES", 1 << 10)
    sources = (folder / "base", folder / "plain"), {"models": [folder / "tuned"]}
    plain = transform_checkpoint(HALF, *sources[0], **sources[1])
    done = transform_checkpoint(
        HALF, folder / "base", folder / "out", models=[folder / "tuned"], format="orbax"
    )
    assert done.checksums == plain.checksums
    got, want = open_checkpoint(folder / "out"), open_safetensors(folder / "plain")
    assert got.format == "orbax" and got.config == {"a": 1}
    assert set(got.names) == set(want)
    for name in want:
        read = got.read(name)
        assert read.dtype == want.read(name).dtype
        np.testing.assert_array_equal(read, want.read(name))
    said = json.loads(got.files[PROVENANCE].read_text())
    assert said["outputs"] == plain.checksums


def test_slices_of_what_was_written_are_read_without_the_rest(folder, monkeypatch):
    monkeypatch.setattr(RawArray.__init__, "__defaults__", (64,))
    transform_checkpoint(HALF, folder / "base", folder / "out", models=[folder / "tuned"],
                         format="orbax")  # fmt: skip
    got = open_checkpoint(folder / "out")
    whole = {name: got.read(name) for name in got.names}
    monkeypatch.setattr(got._saved, "read", None)
    for name, start in [("model.embed.weight", 1000), ("model.layers.0.up.weight", 34)]:
        out = np.empty(7, ml_dtypes.bfloat16)
        got.reader(name)(start, out)
        np.testing.assert_array_equal(out, whole[name].reshape(-1)[start : start + 7])


def test_orbax_itself_reads_the_arrays(folder):
    transform_checkpoint(HALF, folder / "base", folder / "out", models=[folder / "tuned"],
                         format="orbax")  # fmt: skip
    restored = ocp.StandardCheckpointer().restore((folder / "out" / "arrays").resolve())
    want = load_tree(folder / "out").tree
    assert len(restored["tree"]) == len(want) - 1  # Orbax holds no empty arrays
    for name, array in restored["tree"].items():
        np.testing.assert_array_equal(array, want[name.replace("%2E", ".")])


def test_a_tree_keeps_its_structure(tmp_path):
    layers = [{"kernel": jax.random.normal(jax.random.key(i), (8, 4))} for i in range(2)]
    tree = {"layers": layers, "step": 3, "none": None}
    quantized = jw.apply(jw.quantize.round_to_nearest(bits=8), {"kernel": layers[0]["kernel"]})
    save_tree(tmp_path / "tree", tree | {"head": quantized})
    tx = jw.quantize.round_to_nearest(bits=4)
    transform_checkpoint(tx, tmp_path / "tree", tmp_path / "out", match="layers.*", format="orbax")
    got = load_tree(tmp_path / "out").tree
    want = jw.apply(tx, {"layers": layers})
    np.testing.assert_array_equal(
        got["layers"][1]["kernel"], np.asarray(want["layers"][1]["kernel"].materialize())
    )
    assert isinstance(got["layers"], list) and got["step"] == 3 and got["none"] is None
    dense = quantized["kernel"].materialize()
    np.testing.assert_array_equal(got["head"]["kernel"], np.asarray(dense))
    assert isinstance(got["head"]["kernel"], jax.Array)


def test_torch_matrices_stay_torch_matrices_when_orbax_holds_them(folder):
    draw = np.random.default_rng(0).normal(size=(16, 32)).astype(np.float32)
    write_safetensors(folder / "model", {"a.up.weight": draw})
    tx = jw.quantize.round_to_nearest(bits=4, group_size=32)
    model = folder / "model"
    transform_checkpoint(HALF, model, folder / "copy", models=[model], format="orbax")
    for source in ("model", "copy"):
        transform_checkpoint(tx, folder / source, folder / f"{source}-out")
    want = jw.apply(tx, {"kernel": jnp.asarray(draw.T)})["kernel"].materialize().T
    for source in ("model", "copy"):
        np.testing.assert_array_equal(
            open_checkpoint(folder / f"{source}-out").read("a.up.weight"), np.asarray(want)
        )


def test_damage_is_noticed(folder):
    transform_checkpoint(HALF, folder / "base", folder / "out", models=[folder / "tuned"],
                         format="orbax")  # fmt: skip
    chunk = folder / "out" / "arrays" / "tree.model%2Eembed%2Eweight" / "0.0"
    content = bytearray(chunk.read_bytes())
    content[7] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(ValueError, match=r"'model.embed.weight': the values are not those that"):
        transform_checkpoint(HALF, folder / "out", folder / "again", models=[folder / "tuned"])
    assert not (folder / "again").exists()
    with pytest.raises(ValueError, match=r"values of \['model.embed.weight'\] .* are not those"):
        load_tree(folder / "out")


def test_a_full_disk_is_an_error_and_leaves_nothing_behind(tmp_path, file_limit):
    tree = tmp_path / "tree"
    save_tree(tree, {"w": np.ones((100, 100), np.float32)})
    with pytest.raises(OSError, match="the disk is full while writing"):
        transform_checkpoint(HALF, tree, tmp_path / "out", models=[tree], format="orbax")
    assert [p.name for p in tmp_path.iterdir()] == ["tree"]


@pytest.mark.parametrize(
    "shape", [(), (1,), (9,), (7, 6), (3, 5, 8), (2, 1, 4, 5), (1, 1), (4, 100)]
)
@pytest.mark.parametrize("limit", [4, 40, 1 << 20])
def test_chunks_hold_every_byte_of_an_array_once(tmp_path, shape, limit):
    array = RawArray(tmp_path, shape, np.dtype(np.float32), limit)
    entries = np.arange(array.nbytes // 4, dtype=np.float32)
    position, chunks = 0, {}
    while position < array.nbytes:
        file, where, room = array.locate(position)
        assert file not in chunks and where == 0 and room > 0
        assert array.locate(position + room - 1) == (file, room - 1, 1)
        chunks[file.name] = entries[position // 4 : (position + room) // 4]
        position += room
    assert position == array.nbytes
    found = np.full(shape, -1.0, np.float32)
    for name, part in chunks.items():
        if not shape:
            found[()] = part[0]
            continue
        index = tuple(
            slice(int(i) * n, int(i) * n + n) for i, n in zip(name.split("."), array.chunk)
        )
        found[index] = part.reshape(found[index].shape)
    np.testing.assert_array_equal(found.reshape(-1), entries)
    assert np.prod(array.chunk, dtype=int) * 4 <= max(limit, 4)
