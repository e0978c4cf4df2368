"""Any checkpoint opens in one way, whatever its format."""

import json
import os
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.checkpoint import (
    Provenance,
    open_checkpoint,
    save_tree,
    write_safetensors,
)
from jaxweights.checkpoint import write_gguf as write
from jaxweights.weights import Masked

TREE = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array([1, 2], np.int8)}
CONFIG = {"model_type": "llama", "layers": 2}


def write_gguf(path, tree) -> None:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_token_list(["x"])
    for name, value in tree.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make(tmp_path, kind):
    out = tmp_path / "out"
    if kind == "gguf":
        out.mkdir()
        write_gguf(out / "model.gguf", TREE)
        (out / "config.json").write_text("{}")
    elif kind == "orbax":
        save_tree(out, TREE, config=CONFIG, files={"tokenizer.json": "{}"})
    else:
        files = {"config.json": json.dumps(CONFIG), "tokenizer.json": "{}", "notes.txt": "no"}
        write_safetensors(out, TREE, files=files)
    return out


@pytest.mark.parametrize("kind", ["safetensors", "orbax", "gguf"])
def test_every_format_gives_the_same_tensors_config_and_files(tmp_path, kind):
    checkpoint = open_checkpoint(make(tmp_path, kind))
    assert checkpoint.format == kind and sorted(checkpoint.names) == ["a", "b"]
    for name, want in TREE.items():
        got = checkpoint.read(name)
        assert checkpoint.shape(name) == want.shape and checkpoint.dtype(name) == want.dtype
        assert got.dtype == want.dtype
        np.testing.assert_array_equal(got, want)
    assert dict(checkpoint.items()).keys() == TREE.keys()
    if kind == "gguf":
        assert checkpoint.config["general.architecture"] == "llama"
        assert checkpoint.config["llama.block_count"] == 2
        assert not any(key.startswith("tokenizer.") for key in checkpoint.config)
        assert checkpoint.metadata["tokenizer.ggml.tokens"] == ["x"]
    else:
        assert checkpoint.config == CONFIG
        assert sorted(checkpoint.files) == ["config.json", "tokenizer.json"]
        assert checkpoint.files["tokenizer.json"].read_text() == "{}"
    with pytest.raises(KeyError, match="holds no tensor 'zzz'"):
        checkpoint.read("zzz")


def test_single_files_open_with_what_lies_beside_them(tmp_path):
    out = make(tmp_path, "safetensors")
    assert open_checkpoint(out / "model.safetensors").config == CONFIG
    write_gguf(tmp_path / "no-suffix", TREE)
    assert open_checkpoint(tmp_path / "no-suffix").format == "gguf"


def test_represented_weights_are_read_as_what_they_stand_for(tmp_path):
    weight = Masked(jnp.arange(4.0).astype(jnp.bfloat16), jnp.array([True, False, True, True]))
    made = Provenance(recipe={"a": 1})
    save_tree(tmp_path / "out", {"x": {"w": weight}, "n": 3, "l": [jnp.ones(2)]}, provenance=made)
    checkpoint = open_checkpoint(tmp_path / "out")
    assert checkpoint.names == ("x/w", "l/0")
    assert checkpoint.shape("x/w") == (4,) and checkpoint.dtype("x/w") == jnp.bfloat16
    assert checkpoint.read("x/w").tolist() == [0.0, 0.0, 2.0, 3.0]
    assert checkpoint.metadata["provenance"] == made


@pytest.mark.parametrize("sampled", [False, True])
def test_a_fingerprint_is_of_the_tensors_not_of_their_files(tmp_path, sampled):
    rng = np.random.default_rng(0)
    tree = {"a": rng.normal(size=9000), "b": rng.normal(size=10), "c": np.ones((0, 2))}

    def fingerprint(name, tree, **kwargs):
        write_safetensors(tmp_path / name, tree, **kwargs)
        return open_checkpoint(tmp_path / name).fingerprint(sampled=sampled)

    first = fingerprint("one", tree)
    assert first.startswith("sampled-sha256:" if sampled else "sha256:")
    backwards = dict(reversed(tree.items()))
    assert fingerprint("two", backwards, max_shard_bytes=100, metadata={"x": "y"}) == first
    others = {
        "value": tree | {"a": tree["a"] + (np.arange(9000) == 8999)},
        "name": {"A": tree["a"], "b": tree["b"], "c": tree["c"]},
        "swapped": tree | {"b": tree["a"], "a": tree["b"]},
        "shape": tree | {"b": tree["b"].reshape(2, 5)},
        "empty shape": tree | {"c": np.ones((0, 3))},
        "dtype": tree | {"b": tree["b"].view(np.int64)},
        "fewer": {"a": tree["a"], "b": tree["b"]},
    }
    found = {name: fingerprint(f"other {name}", other) for name, other in others.items()}
    assert len({first, *found.values()}) == len(others) + 1
    middle = tree | {"a": tree["a"] + (np.arange(9000) == 4500)}
    assert (fingerprint("middle", middle) == first) is sampled


def test_fingerprints_of_the_other_formats_see_a_changed_value(tmp_path):
    changed = TREE | {"b": np.array([1, 3], np.int8)}
    prints = []
    for i, tree in enumerate((TREE, changed, TREE)):
        write_gguf(tmp_path / f"{i}.gguf", tree)
        save_tree(tmp_path / f"{i}", tree)
        prints.append([open_checkpoint(tmp_path / p).fingerprint() for p in (f"{i}.gguf", f"{i}")])
    assert prints[0] == prints[2]
    assert prints[0][0] != prints[1][0] and prints[0][1] != prints[1][1]


def test_what_cannot_be_opened_is_said_with_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
        open_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds no safetensors, no GGUF file and no jaxw"):
        open_checkpoint(tmp_path)
    (tmp_path / "weights.npz").write_bytes(b"PK\3\4")
    with pytest.raises(ValueError, match=r"starts with b'PK.*neither .safetensors nor .gguf"):
        open_checkpoint(tmp_path / "weights.npz")
    (tmp_path / "pytorch_model.bin").write_bytes(b"PK")
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(ValueError, match=r"pytorch_model.bin' is a pickle.*weights_only=True"):
            open_checkpoint(path)
    (tmp_path / "pytorch_model.bin").unlink()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"holds 2 GGUF files that are not the parts of one model"):
        open_checkpoint(tmp_path)


PARTS = {"a": {"x": np.arange(6.0, dtype=np.float32)}, "b": {"y": np.ones((2, 3), np.float32)}}


def _split(folder, tensors=2, numbers=(0, 1)):
    """A model of two parts, as llama-gguf-split writes them."""
    folder.mkdir()
    for i, (number, part) in enumerate(zip(numbers, PARTS.values(), strict=True)):
        metadata = {"split.no": number, "split.count": 2, "split.tensors.count": tensors}
        metadata |= {"general.architecture": "llama"} if not i else {}
        write(folder / f"m-{i + 1:05}-of-00002.gguf", part, metadata)
    return folder


@pytest.mark.parametrize("given", ["", "m-00001-of-00002.gguf", "m-00002-of-00002.gguf"])
def test_the_parts_of_a_model_are_read_as_one(tmp_path, given):
    opened = open_checkpoint(_split(tmp_path / "split") / given)
    assert opened.names == ("x", "y")
    # A file that is written with these is whole.
    assert opened.metadata == {"general.architecture": "llama"} == opened.config
    for part in PARTS.values():
        for name, want in part.items():
            assert opened.shape(name) == want.shape and opened.dtype(name) == want.dtype
            np.testing.assert_array_equal(opened.read(name), want)
            got = np.empty(2, np.float32)
            opened.reader(name)(1, got)
            np.testing.assert_array_equal(got, want.reshape(-1)[1:3])
    write_gguf(tmp_path / "whole.gguf", PARTS["a"] | PARTS["b"])
    assert opened.fingerprint() == open_checkpoint(tmp_path / "whole.gguf").fingerprint()
    with pytest.raises(KeyError, match="holds no tensor 'z'"):
        opened.read("z")


def test_the_parts_that_llama_cpps_own_package_writes_are_read(tmp_path):
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama", split_max_tensors=1)
    writer.add_block_count(2)
    for part in PARTS.values():
        for name, value in part.items():
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    opened = open_checkpoint(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2 and opened.names == ("x", "y")
    assert opened.metadata["llama.block_count"] == 2
    np.testing.assert_array_equal(opened.read("y"), PARTS["b"]["y"])


def test_parts_that_do_not_fit_are_refused(tmp_path):
    lonely = _split(tmp_path / "lonely")
    (lonely / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(FileNotFoundError, match=r"\['m-00002-of-00002.gguf'\] is not beside it"):
        open_checkpoint(lonely)
    (lonely / "m-00001-of-00002.gguf").rename(lonely / "renamed.gguf")
    with pytest.raises(ValueError, match=r"its name does not end in -00001-of-00002.gguf"):
        open_checkpoint(lonely)
    with pytest.raises(ValueError, match="has 3 tensors, but its 2 parts hold 2"):
        open_checkpoint(_split(tmp_path / "fewer", tensors=3))
    with pytest.raises(
        ValueError, match=r"says that it is part 1 of 2, .*but its name says 0 of 2"
    ):
        open_checkpoint(_split(tmp_path / "swapped", numbers=(1, 0)))


def test_a_config_that_is_no_object_is_refused(tmp_path):
    out = make(tmp_path, "safetensors")
    (out / "config.json").write_text('{"a": 1, "a": 2}')
    with pytest.raises(ValueError, match=r"config.json': the key 'a' appears more than once"):
        open_checkpoint(out)
    (out / "config.json").unlink()
    (out / "config.json").symlink_to("/etc/hostname")
    with pytest.raises(ValueError, match=r"is a link to .* outside the checkpoint's folder"):
        open_checkpoint(out)


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="the system does not tell")
def test_a_fingerprint_leaves_nothing_of_a_mapped_file_in_memory(tmp_path):
    write_safetensors(tmp_path / "model", {"w": np.ones(1 << 24, np.uint8)})
    checkpoint = open_checkpoint(tmp_path / "model")

    def mapped():
        return int(Path("/proc/self/statm").read_text().split()[2]) * os.sysconf("SC_PAGE_SIZE")

    before = mapped()
    assert checkpoint.read("w").sum() == 1 << 24
    assert mapped() - before > 1 << 23
    assert checkpoint.fingerprint()
    assert mapped() - before < 1 << 22
