"""Trees come back bit for bit without a target, and changed ones do not come back at all."""

import dataclasses
import os
import re
import socket
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxweights.checkpoint import Provenance, _saved_tree, load_tree, register_saved, save_tree
from jaxweights.checkpoint._saved import SAVED_DTYPES
from jaxweights.core._layout import Layout
from jaxweights.core._stats import Stats
from jaxweights.weights import Axes, LowRank, Masked, View
from tests.checkpoint._helpers import everything, kill, start
from tests.checkpoint._orbax import assert_same, quantized

# Where Orbax fails, TensorStore's threads still report to an event loop that is closed already.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@register_saved
class StepState(NamedTuple):
    count: jax.Array
    inner: Any


@register_saved
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Setting:
    part: Any
    setting: Any = dataclasses.field(metadata={"static": True})


def round_trip(tmp_path, tree, **kwargs):
    save_tree(tmp_path / "out", tree, overwrite=True)
    return load_tree(tmp_path / "out", **kwargs).tree


JAX_DTYPES = sorted(
    name for name, dtype in SAVED_DTYPES.items() if jax.dtypes.canonicalize_dtype(dtype) == dtype
)


@pytest.mark.parametrize("host", [False, True], ids=["jax", "numpy"])
def test_every_dtype_comes_back_bit_for_bit(tmp_path, host):
    rng = np.random.default_rng(0)
    tree = {}
    for name in sorted(SAVED_DTYPES) if host else JAX_DTYPES:
        dtype = SAVED_DTYPES[name]
        if name in ("bool", "int2", "uint2", "int4", "uint4"):
            tree[name] = rng.integers(0, 2, (3, 5)).astype(dtype)
        else:  # any bytes, NaNs among them
            high = 16 if name == "float4_e2m1fn" else 256
            raw = rng.integers(0, high, (3, 5 * dtype.itemsize), np.uint8)
            tree[name] = raw.view(dtype)
    # Scalars, transposes and reversed arrays are stored as they look.
    tree |= {f"{name} scalar": value[0, 0][...] for name, value in tree.items()}
    tree |= {f"{name} strided": tree[name].T[::-1] for name in ("float32", "uint4", "bfloat16")}
    if not host:
        tree = jax.device_put(tree)
    assert len(tree) >= 40
    assert_same(round_trip(tmp_path, tree), tree)


WEIGHTS = {
    "quantized": lambda: quantized(dtype=jnp.bfloat16),
    "stacked": lambda: quantized(stack=(3,)),
    "three bits": lambda: quantized(bits=3),
    "with offsets": lambda: dataclasses.replace(
        quantized(), zero_point=None, offset=jnp.linspace(-1, 1, 12).reshape(2, 6)
    ),
    "with a view": lambda: quantized(view=View.of((8, 2, 3), Axes((-3,), (-2, -1)))),
    "masked": lambda: Masked(jnp.arange(6.0), jnp.arange(6) % 2 == 0),
    "low rank": lambda: LowRank.over(jnp.eye(4), jnp.ones((4, 2)), jnp.zeros((2, 4)), scaling=0.5),
    "sparse 4-bit with factors": lambda: LowRank.over(
        Masked(quantized(), jnp.ones((8, 6), bool)), jnp.ones((8, 2)), jnp.ones((2, 6))
    ),
}


@pytest.mark.parametrize("case", WEIGHTS)
def test_represented_weights_come_back_without_a_target(tmp_path, case):
    weight = WEIGHTS[case]()
    tree = {"layers": {"kernel": weight, "bias": jnp.ones(3)}}
    got = round_trip(tmp_path, tree)
    assert_same(got, tree)
    assert type(got["layers"]["kernel"]) is type(weight)


def test_a_loaded_weight_works_like_the_saved_one(tmp_path):
    weight = WEIGHTS["sparse 4-bit with factors"]()
    got = round_trip(tmp_path, weight)
    np.testing.assert_array_equal(got.materialize(), weight.materialize())


def test_statistics_come_back_with_their_layout(tmp_path):
    layout = Layout.of({"mlp/kernel": Axes(), "head": Axes((-1,), (-2,), "embedding")})
    stats = Stats({"mlp/kernel": {"gram": jnp.eye(3)}}, (("up/kernel", "mlp/kernel"),), layout)
    assert_same(round_trip(tmp_path, stats), stats)


CONTAINERS = {
    "nested": {"a": [1, (2.5, "text", None)], "b": {}, "c": [], "d": ()},
    "scalars": {"inf": float("inf"), "tiny": 5e-324, "big": 2**70, "yes": True, "zero": -0.0},
    "integer keys": {3: np.ones(1), 10: {0: np.zeros(2)}},
    "awkward keys": {
        name: np.full(1, i)
        for i, name in enumerate(["", "a.b", "a/b", "%2E", "..", "ü", "\n", "%"])
    },
    "look-alikes": {"a.b": np.ones(1), "a": {"b": np.zeros(1)}},
    "empty arrays": {"e": np.ones((0, 3), np.int8), "j": jnp.ones((2, 0))},
    "one array": np.arange(3),
    "nothing": {},
    "named tuple": StepState(jnp.zeros((), jnp.int32), [StepState(jnp.ones(()), None)]),
}


@pytest.mark.parametrize("case", CONTAINERS)
def test_containers_and_numbers_come_back_as_they_were(tmp_path, case):
    assert_same(round_trip(tmp_path, CONTAINERS[case]), CONTAINERS[case])


@pytest.mark.parametrize(
    "setting",
    [
        (1, (2, "x"), None),
        {"a": [1.5, float("-inf")], "b": frozenset({"p", "q"})},
        jnp.bfloat16,
        np.float32,
        np.dtype("int8"),
        np.dtype(jnp.float8_e4m3fn),
        View.of((4, 2, 3), Axes((-3,), (-2, -1))),
    ],
    ids=["tuple", "dict", "bfloat16", "float32 type", "int8", "float8", "View"],
)
def test_settings_come_back_equal_and_of_the_same_type(tmp_path, setting):
    got = round_trip(tmp_path, Setting(jnp.ones(1), setting)).setting
    assert got == setting and type(got) is type(setting)


def test_random_keys_come_back_and_draw_the_same(tmp_path):
    keys = {"a": jax.random.key(3), "b": jax.random.split(jax.random.key(1, impl="rbg"), 4)}
    got = round_trip(tmp_path, keys)
    assert got["b"].dtype == keys["b"].dtype and got["b"].shape == (4,)
    np.testing.assert_array_equal(jax.random.normal(got["a"]), jax.random.normal(keys["a"]))
    np.testing.assert_array_equal(jax.random.key_data(got["b"]), jax.random.key_data(keys["b"]))


def test_an_abstract_load_reads_no_array_and_has_the_same_structure(tmp_path, monkeypatch):
    tree = {"q": quantized(), "k": jax.random.key(0), "e": jnp.zeros((0, 2)), "n": 3}
    save_tree(tmp_path / "out", tree)
    monkeypatch.setattr(_saved_tree.SavedTree, "read", None)
    got = load_tree(tmp_path / "out", abstract=True).tree
    assert jax.tree.structure(got) == jax.tree.structure(tree) and got["n"] == 3
    assert got["q"].shape == (8, 6) and got["k"].dtype == tree["k"].dtype
    assert all(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(got) if x != 3)
    assert jax.eval_shape(lambda tree: tree["q"].materialize(), got).shape == (8, 6)


def test_a_folder_that_is_no_checkpoint_is_not_overwritten(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("years")
    with pytest.raises(FileExistsError, match=r"holds no checkpoint but \['chapter'\], which"):
        save_tree(tmp_path / "thesis", {}, overwrite=True)
    assert everything(tmp_path) == {"thesis/chapter": b"years"}


def test_config_provenance_and_files_travel_along(tmp_path):
    made = Provenance.collect(recipe={"chain": ["gptq"]}, source="sha256:1")
    files = {"tokenizer.json": "{}", "1_Pooling/config.json": b"{}"}
    save_tree(tmp_path / "out", {}, config={"layers": 2}, provenance=made, files=files)
    loaded = load_tree(tmp_path / "out")
    assert loaded.config == {"layers": 2} and loaded.provenance == made
    assert {name: path.read_text() for name, path in loaded.files.items()} == {
        "tokenizer.json": "{}",
        "1_Pooling/config.json": "{}",
    }
    for name in ("config.json", "jaxweights.json", "arrays/x"):
        with pytest.raises(ValueError, match=r"names that the checkpoint itself uses"):
            save_tree(tmp_path / "bad", {}, files={name: ""})


def test_arrays_land_where_they_are_asked_for(tmp_path):
    devices = jax.devices()
    if len(devices) < 2:
        pytest.skip("needs two devices")
    mesh = Mesh(np.array(devices[:2]), ("x",))
    split = NamedSharding(mesh, PartitionSpec("x"))
    second = SingleDeviceSharding(devices[1])
    tree = {"a": jax.device_put(jnp.arange(8, dtype=jnp.int4), split), "b": jnp.ones(2)}
    tree["u"] = jax.device_put(jnp.arange(8).astype(jnp.uint4), split)
    got = round_trip(tmp_path, tree)
    assert_same(got, tree)
    assert got["a"].sharding == SingleDeviceSharding(devices[0])
    assert round_trip(tmp_path, tree, shardings=second)["b"].sharding == second
    got = round_trip(tmp_path, tree, shardings={"a": split, "u": split})
    assert_same(got, tree)
    assert got["a"].sharding == split == got["u"].sharding and got["b"].devices() == {devices[0]}
    got = round_trip(
        tmp_path, tree, shardings=lambda path, like: second if like.shape == (2,) else split
    )
    assert got["b"].sharding == second and got["a"].sharding == split
    with pytest.raises(ValueError, match=r"shardings names \['typo'\], but the saved arrays are"):
        load_tree(tmp_path / "out", shardings={"typo": split})


def test_all_places_that_cannot_be_saved_are_named_at_once(tmp_path):
    class Unknown:
        pass

    tree = {
        "f": {"x": Unknown()},
        "s": jax.ShapeDtypeStruct((2,), jnp.float32),
        "k": {(1, 2): np.ones(1)},
        "same": {1: np.ones(1), "1": np.ones(1)},
        "o": np.array([None]),
        "set": Setting(None, print),
    }
    with pytest.raises(TypeError) as error:
        save_tree(tmp_path / "out", tree)
    for words in (
        r"save_tree: 'f/x' is a .*Unknown",
        r"'s' is a jax.*ShapeDtypeStruct",
        r"'k' has keys that are not distinct text or integers",
        r"'same' has keys that are not distinct",
        r"'o' has dtype object",
        r"'set/setting': .* of type builtin_function_or_method cannot be saved as a setting",
        r"register_saved",
    ):
        assert re.search(words, str(error.value)), words
    assert everything(tmp_path) == {}
    with pytest.raises(TypeError, match="'x' is traced; save outside of jit"):
        jax.jit(lambda x: save_tree(tmp_path / "out", {"x": x}))(jnp.ones(1))


def test_only_fitting_classes_can_be_registered():
    with pytest.raises(TypeError, match="neither a dataclass nor a NamedTuple"):
        register_saved(int)
    taken = dataclasses.make_dataclass("Masked", [])
    with pytest.raises(ValueError, match=r"the name 'Masked' of .* is taken by"):
        register_saved(taken)


def test_an_existing_destination_is_kept_unless_overwriting_is_asked_for(saved):
    before = everything(saved)
    with pytest.raises(FileExistsError, match=r"save_tree: .*out' exists and nothing was written"):
        save_tree(saved, {"new": jnp.ones(2)})
    assert everything(saved) == before
    save_tree(saved, {"new": jnp.ones(2)}, overwrite=True)
    assert list(load_tree(saved).tree) == ["new"]


def test_a_full_disk_is_an_error_and_the_old_tree_stays(saved, file_limit):
    before = everything(saved.parent)
    noise = jax.random.normal(jax.random.key(0), (100_000,))
    with pytest.raises(OSError, match=r"save_tree: the disk is full.*untouched"):
        save_tree(saved, {"x": noise}, overwrite=True)
    assert everything(saved.parent) == before


@pytest.mark.slow
def test_two_processes_save_one_tree_and_each_loads_its_part(tmp_path):
    program = textwrap.dedent(f"""
        import sys
        import jax, jax.numpy as jnp, numpy as np
        jax.distributed.initialize(sys.argv[2], 2, int(sys.argv[1]))
        from jax.sharding import Mesh, NamedSharding, PartitionSpec
        from jaxweights.checkpoint import load_tree, save_tree
        split = NamedSharding(Mesh(np.array(jax.devices()), ("x",)), PartitionSpec("x"))
        whole = np.arange(8.0, dtype=np.float32)
        x = jax.make_array_from_callback((8,), split, lambda index: whole[index])
        assert not x.is_fully_addressable
        out = {str(tmp_path / "out")!r}
        save_tree(out, {{"x": x, "n": whole}}, config={{"a": 1}})
        got = load_tree(out, shardings=split)
        assert got.config == {{"a": 1}} and got.tree["n"].tolist() == whole.tolist()
        for mine, theirs in zip(x.addressable_shards, got.tree["x"].addressable_shards):
            np.testing.assert_array_equal(mine.data, theirs.data)
    """)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    root = Path(__file__).resolve().parents[2]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(root)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(i), address], cwd=root, env=environment
        )
        for i in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    np.testing.assert_array_equal(load_tree(tmp_path / "out").tree["x"], np.arange(8.0))


def test_a_killed_save_leaves_the_old_tree(saved):
    before = everything(saved)
    child = start(f"""
        import time
        import jax.numpy as jnp
        from jaxweights.checkpoint import _orbax

        def save_arrays(*args, real=_orbax.save_arrays):
            real(*args)
            print("ready", flush=True)
            time.sleep(60)

        _orbax.save_arrays = save_arrays
        _orbax.save_tree({str(saved)!r}, {{"x": jnp.ones(1000)}}, overwrite=True)
    """)
    kill(child)
    assert everything(saved) == before and len(list(saved.parent.iterdir())) == 2
    assert load_tree(saved).config == {"a": 1}
    save_tree(saved, {}, overwrite=True)
    assert list(saved.parent.iterdir()) == [saved]
