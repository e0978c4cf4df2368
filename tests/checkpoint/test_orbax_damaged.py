"""Saved trees that were changed, cut short, or made by an earlier version."""

import copy
import json
import re
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from jaxweights.checkpoint import load_tree, save_tree
from jaxweights.checkpoint._manifest import digest_of
from jaxweights.checkpoint._saved_tree import MANIFEST
from jaxweights.weights import NarrowFloat
from tests.checkpoint._helpers import everything
from tests.checkpoint._orbax import assert_same, quantized

# Where Orbax fails, TensorStore's threads still report to an event loop that is closed already.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def edit(folder: Path, change, *, rehash: bool = True) -> None:
    """Changes the manifest, and its hash too, as somebody would who means it."""
    manifest = json.loads((folder / MANIFEST).read_text())
    before = copy.deepcopy(manifest)
    change(manifest)
    assert manifest != before, "the case must change something"
    if rehash:
        manifest["sha256"] = digest_of(manifest["tree"])
    (folder / MANIFEST).write_text(json.dumps(manifest))


def items(manifest) -> dict:
    return dict(manifest["tree"]["items"])


def test_settings_that_an_earlier_version_did_not_have_are_as_they_were_then(saved):
    edit(saved, lambda m: items(m)["q"]["static"].pop("full_group"))
    loaded = load_tree(saved).tree["q"]
    assert loaded.full_group == 0
    np.testing.assert_array_equal(loaded.materialize(), quantized().materialize())


NONE = {"kind": "none"}


TAMPERED = {
    "bits": (
        lambda m: items(m)["q"]["static"].update(bits="four"),
        "'q' has fields that Quantized does not allow: 'bits' is 'four', not int",
    ),
    "bits as a boolean": (
        lambda m: items(m)["q"]["static"].update(bits=True),
        "'bits' is True, not int",
    ),
    "view": (
        lambda m: items(m)["q"]["static"].update(view="plain"),
        "'view' is 'plain', not View",
    ),
    "axes": (
        lambda m: items(m)["q"]["static"]["view"]["$object"]["fields"].update(axes=3),
        "'q' has the field 'view': View refuses its fields: 'axes' is 3, not Axes",
    ),
    "codes_per_byte": (
        lambda m: items(m)["q"]["static"].update(codes_per_byte=4),
        "'q': the Quantized stood for .* but now for",
    ),
    "dense": (
        lambda m: items(m)["q"]["dense"].update(shape=[9, 6]),
        "'q': the Quantized stood for",
    ),
    "class": (
        lambda m: items(m)["q"].update({"class": "os.system"}),
        "'q' names the class 'os.system', which is not one of",
    ),
    "other class": (
        lambda m: items(m)["q"].update({"class": "Masked"}),
        r"'q' is a Masked with fields missing: \['base', 'mask'\], unknown: \['codes'",
    ),
    "field gone": (
        lambda m: items(m)["q"]["fields"].pop("scale"),
        r"fields missing: \['scale'\].*the array 'q/scale' is there|fields missing: \['scale'\]",
    ),
    "setting gone": (
        lambda m: items(m)["q"]["static"].pop("bits"),
        r"fields missing: \['bits'\], unknown: \[\]",
    ),
    "field emptied": (
        lambda m: items(m)["q"]["fields"].update(codes={"kind": "none"}),
        "the array 'q/codes' is there, but not in the manifest",
    ),
    "field without an array": (
        lambda m: m["tree"]["items"].append(
            ["z", {**items(m)["q"], "fields": dict.fromkeys(items(m)["q"]["fields"], NONE)}]
        ),
        "'z': the Quantized stood for .* but now for nothing",
    ),
    "setting more": (
        lambda m: items(m)["q"]["static"].update(evil=1),
        r"unknown: \['evil'\]",
    ),
    "setting tag": (
        lambda m: items(m)["q"]["static"].update(dtype={"$import": "os"}),
        r"'q' has the field 'dtype': .* is no setting",
    ),
    "dtype": (
        lambda m: items(m)["w"].update(dtype="int32"),
        r"'w' is int32 \(600,\) in the manifest, but the array is float32 \(600,\)",
    ),
    "shape": (
        lambda m: items(m)["w"].update(shape=[20, 30]),
        r"'w' is float32 \(20, 30\) in the manifest, but the array is float32 \(600,\)",
    ),
    "absurd shape": (
        lambda m: items(m)["w"].update(shape=[2**40, 2**40]),
        r"'w' has shape .* larger than any memory",
    ),
    "negative shape": (
        lambda m: items(m)["w"].update(shape=[-1]),
        "'w' has shape .* not a list of natural numbers",
    ),
    "unknown dtype": (
        lambda m: items(m)["w"].update(dtype="object"),
        "'w' has the unknown dtype 'object'",
    ),
    "wide dtype": (
        lambda m: items(m)["w"].update(dtype="float64"),
        "'w' is float64, which JAX holds only with jax_enable_x64",
    ),
    "hash": (
        lambda m: items(m)["w"].update(checksum="xxh3:" + "0" * 32),
        r"the values of \['w'\] \(1 of \d arrays\) are not those that were saved",
    ),
    "kind": (lambda m: items(m)["w"].update(kind="pickle"), "'w' has the unknown kind 'pickle'"),
    "more keys": (lambda m: items(m)["w"].update(more=1), "'w' is a array with"),
    "array gone": (
        lambda m: m["tree"]["items"].pop(),
        "the array 'w' is there, but not in the manifest",
    ),
    "array more": (
        lambda m: m["tree"]["items"].append(["x", items(m)["w"]]),
        "'x' is in the manifest, but its array is missing",
    ),
    "key twice": (
        lambda m: m["tree"]["items"].append(["w", items(m)["w"]]),
        "has keys that are not distinct",
    ),
    "no pairs": (lambda m: m["tree"].update(items=[1]), "'' "),
    "format": (lambda m: m.update(format=3), "has format 3 .* this library reads format 2"),
    "no tree": (lambda m: m.update(more=1), "the keys .*'more'"),
}


@pytest.mark.parametrize("case", TAMPERED)
def test_a_changed_manifest_is_refused_by_path_and_field(saved, case):
    change, words = TAMPERED[case]
    edit(saved, change)
    with pytest.raises(ValueError, match=r"load_tree: '.*out'") as error:
        load_tree(saved)
    assert re.search(words, str(error.value)), error.value


def test_a_tree_saved_before_a_class_had_a_part_that_may_be_none_still_loads(saved):
    before = load_tree(saved).tree["q"]
    edit(saved, lambda m: items(m)["q"]["fields"].pop("offset"))
    assert_same(load_tree(saved).tree["q"], before)


def test_eight_bit_floats_saved_before_they_could_divide_still_load(tmp_path):
    values = jnp.arange(12.0).reshape(3, 4).astype(jnp.float8_e4m3fn)
    tree = {"q": NarrowFloat.from_values(values, jnp.full((1, 4), 0.5))}
    save_tree(tmp_path / "m", tree)
    edit(tmp_path / "m", lambda m: items(m)["q"]["static"].pop("divides"))
    loaded = load_tree(tmp_path / "m").tree["q"]
    assert loaded.divides is False
    assert_same(loaded, tree["q"])


def test_an_edit_that_breaks_nothing_is_still_noticed(saved):
    edit(saved, lambda m: items(m)["q"]["static"].update(bits=5), rehash=False)
    with pytest.raises(ValueError, match=r"jaxweights.json was changed after it was written"):
        load_tree(saved)


def test_all_changed_places_are_one_message(saved):
    def change(manifest):
        items(manifest)["w"].update(dtype="int32")
        items(manifest)["q"]["fields"]["scale"].update(shape=[1])

    edit(saved, change)
    with pytest.raises(ValueError, match=r"'q/scale' is float32 \(1,\).*'w' is int32"):
        load_tree(saved)


def test_a_manifest_nested_beyond_reason_is_refused(saved):
    def change(manifest):
        node = {"kind": "none"}
        for _ in range(400):
            node = {"kind": "list", "items": [node]}
        manifest["tree"] = node

    edit(saved, change)
    with pytest.raises(ValueError, match=r"nested too deeply|is there, but not in the manifest"):
        load_tree(saved)


def test_a_flipped_bit_in_the_values_is_noticed(saved):
    whole = everything(saved)
    name = max((n for n in whole if n.startswith("arrays/")), key=lambda n: len(whole[n]))
    data = bytearray(whole[name])
    data[len(data) // 2] ^= 1
    (saved / name).write_bytes(data)
    with pytest.raises(ValueError, match=r"are damaged|is damaged|cannot read its arrays"):
        load_tree(saved)


@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt", "d", "all"])
def test_an_incomplete_copy_is_refused(saved, name):
    victim = saved / "arrays" / name if name != "all" else saved / "arrays"
    shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
    with pytest.raises(ValueError, match=r"load_tree: .*(incomplete|missing|cannot read)"):
        load_tree(saved)


def test_other_folders_and_broken_side_files_are_refused(saved, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"holds no jaxweights.json.*save_tree made"):
        load_tree(tmp_path)
    (saved / "provenance.json").write_text("{}")
    with pytest.raises(ValueError, match=r"provenance.json: has format None"):
        load_tree(saved)
    (saved / "provenance.json").unlink()
    (saved / "config.json").write_text("[]")
    with pytest.raises(ValueError, match=r"config.json: holds an array"):
        load_tree(saved)
    (saved / MANIFEST).write_text('{"format": 2, "format": 2}')
    with pytest.raises(ValueError, match="the key 'format' appears more than once"):
        load_tree(saved)
