"""Safetensors are read exactly, and whatever is wrong with a file is said before it is read."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from jaxweights.checkpoint import open_safetensors, write_safetensors
from tests._fixtures import fixture_path


def save(path: Path, header: dict | str | bytes, data: bytes = b"", length: int | None = None):
    """Writes a safetensors file whose header says what it likes."""
    text = header if isinstance(header, bytes) else None
    if text is None:
        text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes((len(text) if length is None else length).to_bytes(8, "little") + text + data)


def tensor(begin, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


BAD_HEADERS = {
    "unknown dtype": ({"x": tensor(0, 8, [2], "Q9")}, "tensor 'x'.*unknown dtype 'Q9'.*BF16"),
    "dtype no text": ({"x": tensor(0, 8, [2], 7)}, "unknown dtype 7"),
    "dtype and size": ({"x": tensor(0, 8, [2], "F64")}, "need 16 bytes, but.*hold 8"),
    "shape and size": ({"x": tensor(0, 8, [3])}, r"shape \[3\] need 12 bytes, but.*hold 8"),
    "beyond the end": ({"x": tensor(0, 12, [3])}, "only 8 bytes of data. It is truncated"),
    "backwards": ({"x": tensor(8, 0, [2])}, r"data_offsets=\[8, 0\] hold -8"),
    "negative offset": ({"x": tensor(-8, 0, [2])}, "must be two natural numbers"),
    "three offsets": (
        {"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}},
        "must be two natural numbers",
    ),
    "negative axis": ({"x": tensor(0, 8, [-2])}, "must be a list of natural numbers"),
    "bool axis": ({"x": tensor(0, 8, [True, 2])}, "must be a list of natural numbers"),
    "float axis": ({"x": tensor(0, 8, [2.0])}, "must be a list of natural numbers"),
    "overflow": ({"x": tensor(0, 8, [2**32, 2**32])}, "larger than any memory"),
    "overflow to size": ({"x": tensor(0, 8, [2**62, 4, 1])}, "larger than any memory"),
    "empty overflow": ({"x": tensor(0, 0, [0, 2**62, 2**62])}, "larger than any memory"),
    "many axes": ({"x": tensor(0, 8, [1] * 40 + [2])}, "larger than any memory"),
    "overlap": (
        {"x": tensor(0, 8, [2]), "y": tensor(4, 8, [1])},
        "'y' starts at byte 4 .* 8 was expected: it overlaps",
    ),
    "same bytes": (
        {"x": tensor(0, 8, [2]), "y": tensor(0, 8, [2])},
        "it overlaps the tensor before it",
    ),
    "hole at the start": ({"x": tensor(4, 8, [1])}, "'x' starts at byte 4.*leaves a hole"),
    "hole at the end": ({"x": tensor(0, 4, [1])}, "4 bytes follow the last tensor"),
    "no tensors": ({}, "8 bytes follow the last tensor"),
    "more keys": ({"x": {**tensor(0, 8, [2]), "pickle": 1}}, "and nothing else"),
    "fewer keys": ({"x": {"dtype": "F32", "shape": [2]}}, "must have dtype, shape and data_off"),
    "not an object": ({"x": [1]}, "must have dtype, shape and data_offsets"),
    "metadata": ({"__metadata__": {"a": 1}, "x": tensor(0, 8, [2])}, "must map text to text"),
    "duplicate": (
        '{"x":' + json.dumps(tensor(0, 8, [2])) + ',"x":' + json.dumps(tensor(0, 8, [2])) + "}",
        "the key 'x' appears more than once",
    ),
    "duplicate inside": (
        '{"x":{"dtype":"F32","shape":[2],"shape":[2],"data_offsets":[0,8]}}',
        "the key 'shape' appears more than once",
    ),
    "not JSON": ("{oops", "not valid UTF-8 JSON"),
    "no brace": ("[1]", "does not start with"),
    "a space first": (" {}", "does not start with"),
    "empty header": ("", "does not start with"),
    "not UTF-8": (b'{"\xff":1}', "not valid UTF-8 JSON"),
    "half a character": ('{"\\ud800":' + json.dumps(tensor(0, 8, [2])) + "}", "not valid UTF-8"),
    "NaN": ('{"x":NaN}', "NaN is not JSON"),
    "deep": ('{"x":' + "[" * 200_000 + "]" * 200_000 + "}", "nested too deeply"),
    "huge number": ('{"x":' + "9" * 10_000 + "}", "not valid UTF-8 JSON"),
}


@pytest.mark.parametrize("case", BAD_HEADERS)
def test_a_header_that_lies_is_refused_by_file_and_tensor(tmp_path, case):
    header, words = BAD_HEADERS[case]
    path = tmp_path / "bad.safetensors"
    save(path, header, data=bytes(8))
    with pytest.raises(ValueError, match=r"open_safetensors: '.*bad\.safetensors'") as error:
        open_safetensors(path)
    assert re.search(words, str(error.value)), error.value


@pytest.mark.parametrize("length", [9, 100_000_001, 2**63, 2**64 - 1])
def test_a_header_longer_than_the_file_is_refused_without_reading_it(tmp_path, length):
    save(tmp_path / "a.safetensors", "{}", length=length)
    with pytest.raises(ValueError, match=rf"claims a header of {length} bytes.*truncated"):
        open_safetensors(tmp_path / "a.safetensors")


def test_every_truncation_of_a_file_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"x": np.ones(3, np.float32), "y": np.ones((2, 2), np.int8)})
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"truncated|fetch it again"):
            open_safetensors(path)


def test_every_single_bit_flip_of_a_header_is_refused_or_read_within_the_file(tmp_path):
    path = tmp_path / "a.safetensors"
    save(path, {"x": tensor(0, 8, [2]), "yy": tensor(8, 12, [4], "I8")}, bytes(12))
    whole = path.read_bytes()
    refused = 0
    for position in range(len(whole) - 12):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                tensors = open_safetensors(path)
                assert sum(tensors.read(name).nbytes for name in tensors) == 12
            except ValueError:
                refused += 1
    assert refused > 500  # most flips break the header; a few only rename a tensor


def test_a_boolean_that_is_neither_is_refused_when_it_is_read(tmp_path):
    save(tmp_path / "a.safetensors", {"x": tensor(0, 2, [2], "BOOL")}, b"\1\2")
    with pytest.raises(ValueError, match="tensor 'x' is BOOL but holds the byte 2"):
        open_safetensors(tmp_path / "a.safetensors").read("x")


def test_a_packed_dtype_is_listed_but_not_guessed(tmp_path):
    save(tmp_path / "a.safetensors", {"x": tensor(0, 2, [4], "F4")}, b"\1\2")
    tensors = open_safetensors(tmp_path / "a.safetensors")
    assert tensors["x"].shape == (4,) and tensors.raw("x").tolist() == [1, 2]
    with pytest.raises(ValueError, match="'x' has the packed dtype F4, which NumPy cannot hold"):
        tensors.read("x")


def test_aligned_tensors_share_memory_with_the_file_and_cannot_be_written(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {"x": np.arange(6, dtype=np.float32).reshape(2, 3)})
    tensors = open_safetensors(path)
    first, second = tensors.read("x"), tensors.read("x")
    assert np.shares_memory(first, second)
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0] = 1
    del tensors
    assert second.sum() == 15  # the mapping lives as long as an array does


def test_unaligned_tensors_are_copied_and_equal(tmp_path):
    value = np.array([1.5, -2.0], np.float64)
    save(tmp_path / "a.safetensors", {"x": tensor(0, 16, [2], "F64")}, value.tobytes(), None)
    shift = open_safetensors(tmp_path / "a.safetensors")["x"].start % 8
    assert shift != 0, "the case must be unaligned"
    read = open_safetensors(tmp_path / "a.safetensors").read("x")
    assert read.flags.aligned and read.tolist() == [1.5, -2.0]


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "model.pth", "model.ckpt", "a.pkl"])
def test_pickles_are_refused_by_name_with_the_remedy(tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x02}q\x00.")
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match=rf"{name}' is a pickle.*weights_only=True"):
            open_safetensors(path)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere' does not exist"):
        open_safetensors(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"holds no \*\.safetensors file"):
        open_safetensors(tmp_path)
    with pytest.raises(ValueError, match="0 bytes are no safetensors file"):
        (tmp_path / "empty.safetensors").touch()
        open_safetensors(tmp_path)
    with pytest.raises(KeyError, match="holds no tensor 'y'"):
        save(tmp_path / "empty.safetensors", {})
        open_safetensors(tmp_path)["y"]


def test_a_public_adapter_is_read_as_by_its_own_library():
    reference = pytest.importorskip("safetensors.numpy")
    path = fixture_path("adapt/llama_lora_adapter_model.safetensors")
    tensors, want = open_safetensors(path), reference.load_file(path)
    assert tensors.keys() == want.keys() and len(want) > 0
    for name in want:
        np.testing.assert_array_equal(tensors.read(name), want[name])


@pytest.fixture
def sharded(tmp_path):
    """A folder of two shards: 'a' in the first, 'b' in the second."""
    tensors = {"a": np.arange(4.0), "b": np.arange(4.0) + 10}
    write_safetensors(tmp_path / "model", tensors, max_shard_bytes=32)
    return tmp_path / "model"


FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def reindex(folder: Path, weight_map) -> None:
    text = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)


def test_shards_are_read_as_one(sharded):
    tensors = open_safetensors(sharded)
    assert list(tensors) == ["a", "b"]
    assert tensors["b"].file.name == SECOND and tensors.read("b").tolist() == [10, 11, 12, 13]
    (sharded / "model.safetensors.index.json").unlink()
    assert open_safetensors(sharded).read("b").tolist() == [10, 11, 12, 13]


@pytest.mark.parametrize("with_index", [True, False])
def test_a_missing_shard_is_an_incomplete_download(sharded, with_index):
    (sharded / SECOND).unlink()
    if not with_index:
        (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"00002\.safetensors.*download is incomplete"):
        open_safetensors(sharded)


@pytest.mark.parametrize(
    "name",
    [
        "../outside.safetensors",
        "sub/../../outside.safetensors",
        "/etc/passwd",
        "C:\\secret.safetensors",
        "..\\outside.safetensors",
        "",
        "a\0b.safetensors",
    ],
)
def test_a_shard_outside_the_folder_is_refused(sharded, name):
    write_safetensors(sharded.parent / "outside.safetensors", {"b": np.ones(4)})
    reindex(sharded, {"a": FIRST, "b": name})
    with pytest.raises(ValueError, match="is not a path inside it"):
        open_safetensors(sharded)


@pytest.mark.parametrize("with_index", [True, False])
def test_a_link_out_of_the_folder_is_refused(sharded, with_index):
    (sharded / SECOND).rename(sharded.parent / "outside.safetensors")
    (sharded / SECOND).symlink_to("../outside.safetensors")
    if not with_index:
        (sharded / "model.safetensors.index.json").unlink()
    with pytest.raises(ValueError, match=r"is a link to '.*outside\.safetensors', outside the ch"):
        open_safetensors(sharded)


def test_a_hugging_face_cache_is_read_through_its_links(sharded):
    cache = sharded.parent / "models--x--y"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots" / "abc").mkdir(parents=True)
    for file in sharded.iterdir():
        file.rename(cache / "blobs" / file.name)
        (cache / "snapshots" / "abc" / file.name).symlink_to(f"../../blobs/{file.name}")
    assert len(open_safetensors(cache / "snapshots" / "abc")) == 2


@pytest.mark.parametrize(
    "weight_map, words",
    [
        ({"a": SECOND, "b": SECOND}, f"'a' should be in '{SECOND}', but no shard holds it"),
        ({"a": SECOND, "b": FIRST}, f"'a' should be in '{SECOND}', but is in '{FIRST}'"),
        ({"a": FIRST, "b": SECOND, "c": FIRST}, "'c' should be in .*, but no shard holds it"),
        ({"a": FIRST, "d": SECOND}, f"'b' is in '{SECOND}', but not in the index"),
        ({"a": FIRST, "b": 3}, "'weight_map' must name files"),
        ({"a": FIRST, "b": "model.safetensors.index.json"}, "not .safetensors"),
        ([], "has no 'weight_map'"),
    ],
)
def test_an_index_that_lies_is_refused(sharded, weight_map, words):
    reindex(sharded, weight_map)
    with pytest.raises(ValueError, match=words):
        open_safetensors(sharded)


def test_an_index_that_is_not_json_or_repeats_a_key_is_refused(sharded):
    index = sharded / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "x", "a": "y"}}')
    with pytest.raises(ValueError, match="the key 'a' appears more than once"):
        open_safetensors(sharded)
    index.write_text(index.read_text()[:10])
    with pytest.raises(ValueError, match=r"index\.json': not valid UTF-8 JSON"):
        open_safetensors(sharded)
    index.write_text("[]")
    with pytest.raises(ValueError, match="holds an array; a JSON object was expected"):
        open_safetensors(sharded)


def test_two_files_with_the_same_tensor_are_refused(tmp_path):
    for name in ("one", "two"):
        write_safetensors(tmp_path / f"{name}.safetensors", {"x": np.ones(2)})
    with pytest.raises(ValueError, match=r"1 tensors are in 'two.safetensors' and in 'one"):
        open_safetensors(tmp_path)
