import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.checkpoint import open_checkpoint
from jaxweights.checkpoint.exchange import write_quantized
from jaxweights.checkpoint.exchange._compressed_writer import compressed_settings
from jaxweights.checkpoint.exchange._microscaled import E2M1, E2M3, mx_form, pack_mx, unpack_mx
from jaxweights.checkpoint.exchange._module import Part
from jaxweights.checkpoint.exchange._narrow_floats import (
    pack_float_quantized,
    pack_nvfp4,
    unfit_floats,
    unpack_float_quantized,
    unpack_fp8,
    unpack_nvfp4,
)
from jaxweights.quantize._fp8 import fp8_matrix
from jaxweights.quantize._mx import mx_matrix, nvfp4_matrix


def parts(arrays):
    return {name: Part.of(array) for name, array in arrays.items()}


def made(tensors):
    return {name: tensor() for name, tensor in tensors.items()}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, array in want.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape, name
        assert got[name].tobytes() == array.tobytes(), name


@pytest.mark.parametrize("scales", [(1,), (8, 1), (8, 4), (2, 2)])
def test_fp8_stands_for_the_numbers_and_comes_back(scales):
    rng = np.random.default_rng(0)
    values = rng.normal(size=(8, 64)).astype(ml_dtypes.float8_e4m3fn)
    scale = rng.uniform(0.5, 1, scales).astype(np.float32)
    weight = unpack_float_quantized(parts({"weight": values, "weight_scale": scale}))
    grid = scale.reshape(1, 1) if scales == (1,) else scale
    spread = np.kron(grid, np.ones((8 // grid.shape[0], 64 // grid.shape[1]), np.float32))
    np.testing.assert_array_equal(weight.materialize(), values.astype(np.float32) * spread)
    assert not unfit_floats(weight)
    ours = made(pack_float_quantized(weight))
    assert_same(
        {n: np.ascontiguousarray(a) for n, a in ours.items()},
        {"weight": values, "weight_scale": scale},
    )


def test_mxfp4_stands_for_the_numbers_and_comes_back():
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 16, (4, 64)).astype(np.uint8)
    exponents = rng.integers(120, 134, (4, 2)).astype(np.uint8)
    stored = {"weight_packed": codes[:, ::2] | codes[:, 1::2] << 4, "weight_scale": exponents}
    weight = unpack_mx(parts(stored), form="mxfp4-pack-quantized")
    want = E2M1[codes] * np.repeat(2.0 ** (exponents.astype(np.float32) - 127), 32, axis=1)
    np.testing.assert_array_equal(weight.materialize(), want)
    assert not unfit_floats(weight)
    assert_same(made(pack_mx(weight)), stored)


def test_mxfp6_stands_for_the_numbers_and_comes_back():
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 64, (4, 64)).astype(np.uint8)
    exponents = rng.integers(120, 134, (4, 2)).astype(np.uint8)
    fours = codes.reshape(4, 16, 4).astype(np.uint32)
    word = fours[..., 0] | fours[..., 1] << 6 | fours[..., 2] << 12 | fours[..., 3] << 18
    three = np.stack([word, word >> 8, word >> 16], -1).astype(np.uint8).reshape(4, 48)
    stored = {"weight_packed": three, "weight_scale": exponents}
    weight = unpack_mx(parts(stored), form="mxfp6-pack-quantized")
    sign, power, fraction = codes >> 5, codes >> 3 & 3, codes & 7
    size = np.where(power > 0, (8 + fraction) * 2.0 ** (power - 4.0), fraction / 8)
    want = np.where(sign, -size, size) * np.repeat(2.0 ** (exponents - 127.0), 32, axis=1)
    np.testing.assert_array_equal(weight.materialize(), want)
    assert not unfit_floats(weight)
    assert_same(made(pack_mx(weight)), stored)


def test_mxfp8_stands_for_the_numbers_and_comes_back():
    rng = np.random.default_rng(1)
    values = rng.normal(size=(4, 64)).astype(ml_dtypes.float8_e4m3fn)
    exponents = rng.integers(120, 134, (4, 2)).astype(np.uint8)
    stored = {"weight": values, "weight_scale": exponents}
    weight = unpack_mx(parts(stored), form="mxfp8-quantized")
    want = values.astype(np.float32) * np.repeat(2.0 ** (exponents - 127.0), 32, axis=1)
    np.testing.assert_array_equal(weight.materialize(), want)
    assert not unfit_floats(weight)
    got = {name: np.ascontiguousarray(x) for name, x in made(pack_mx(weight)).items()}
    assert_same(got, stored)


@pytest.mark.parametrize(
    "element, form, module",
    [
        ("e2m1", "mxfp4-pack-quantized", "mxfp4"),
        ("e2m3", "mxfp6-pack-quantized", "mxfp6"),
        ("e4m3", "mxfp8-quantized", "mxfp8"),
    ],
)
def test_the_package_reads_what_is_written(element, form, module):
    torch = pytest.importorskip("torch")
    pytest.importorskip(f"compressed_tensors.compressors.{module}")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

    dense = jax.random.normal(jax.random.key(0), (64, 8)) * jnp.linspace(0.01, 30, 8)[None]
    weight = mx_matrix(dense, element=element)
    assert mx_form(weight) == form
    said = dict(compressed_settings({"m": weight}, [])["config_groups"]["group_0"]["weights"])
    scheme = QuantizationScheme(targets=["Linear"], weights=QuantizationArgs(**said))
    state = {}
    for name, array in made(pack_mx(weight)).items():
        narrow = array.dtype == ml_dtypes.float8_e4m3fn
        tensor = torch.from_numpy(np.ascontiguousarray(array).view(np.uint8))
        state[name] = tensor.view(torch.float8_e4m3fn) if narrow else tensor
    read = BaseCompressor.get_value_from_registry(form).decompress(state, scheme)["weight"]
    mine = weight.astype(jnp.bfloat16).materialize()
    np.testing.assert_array_equal(read.float().numpy().T, np.asarray(mine, np.float32))


def test_every_form_is_read_by_its_name(tmp_path):
    draw = lambda i: jax.random.normal(jax.random.key(i), (8, 64))  # noqa: E731
    elements = {"a": "e2m1", "b": "e2m3", "c": "e4m3"}
    params = {f"{name}.weight": draw(i) for i, name in enumerate(elements)}
    rules = [(f"{name}.weight", jw.quantize.mx(element=e)) for name, e in elements.items()]
    new = jw.apply(jw.partition(*rules), params)
    write_quantized(tmp_path / "m", new, form="compressed-tensors", config={})
    again = open_checkpoint(tmp_path / "m")
    for name, weight in new.items():
        read = again.represented(name)
        assert type(read) is type(weight) and read.shape == weight.shape
        np.testing.assert_array_equal(read.materialize(), weight.materialize())
    np.testing.assert_array_equal(np.signbit(E2M3[[0, 32]]), [False, True])


@pytest.mark.parametrize("overall", [1.0, 1.7, 2691.3, 3e-5])
def test_nvfp4_stands_for_the_numbers_and_comes_back(overall):
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 16, (4, 64)).astype(np.uint8)
    scales = rng.uniform(0, 448, (4, 4)).astype(ml_dtypes.float8_e4m3fn)
    stored = {
        "weight_packed": codes[:, ::2] | codes[:, 1::2] << 4,
        "weight_scale": scales,
        "weight_global_scale": np.float32([overall]),
    }
    weight = unpack_nvfp4(parts(stored))
    steps = scales.astype(np.float32) / np.float32(overall)
    want = E2M1[codes] * np.repeat(steps, 16, axis=1)
    np.testing.assert_array_equal(weight.materialize(), want)
    np.testing.assert_array_equal(jax.jit(lambda w: w.materialize())(weight), want)
    assert not unfit_floats(weight)
    assert_same(made(pack_nvfp4(weight)), stored)


def test_the_package_makes_and_reads_the_same_nvfp4():
    """Codes, scales and the number for all, and what they stand for, of compressed-tensors."""
    torch = pytest.importorskip("torch")
    nvfp4 = pytest.importorskip("compressed_tensors.compressors.nvfp4")
    quantization = pytest.importorskip("compressed_tensors.quantization")
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers")
    scheme = quantization.QuantizationScheme(
        targets=["Linear"], **quantization.quant_scheme.PRESET_SCHEMES["NVFP4A16"]
    )
    rng = np.random.default_rng(3)
    dense = rng.normal(size=(8, 64)).astype(np.float32) * rng.uniform(0.01, 3, (8, 1)).astype("f")
    theirs = torch.from_numpy(dense)
    overall = helpers.generate_gparam(theirs.min(), theirs.max())
    groups = theirs.reshape(8, 4, 16)
    scale, _ = helpers.calculate_qparams(
        groups.amin(-1), groups.amax(-1), scheme.weights, global_scale=overall
    )
    state = {"weight": theirs, "weight_scale": scale, "weight_global_scale": overall}
    state = nvfp4.NVFP4PackedCompressor.compress(state, scheme)
    ours = made(pack_nvfp4(nvfp4_matrix(jnp.asarray(dense.T))))
    numpy = lambda t: t.view(torch.uint8).numpy()  # noqa: E731
    assert ours["weight_packed"].tobytes() == numpy(state["weight_packed"]).tobytes()
    assert ours["weight_scale"].tobytes() == numpy(state["weight_scale"]).tobytes()
    assert ours["weight_global_scale"].tobytes() == numpy(state["weight_global_scale"]).tobytes()
    back = {
        "weight_packed": torch.from_numpy(ours["weight_packed"]),
        "weight_scale": torch.from_numpy(ours["weight_scale"].view(np.uint8)).view(
            torch.float8_e4m3fn
        ),
        "weight_global_scale": torch.from_numpy(np.array(ours["weight_global_scale"])),
    }
    read = nvfp4.NVFP4PackedCompressor.decompress(back, scheme)["weight"]
    mine = unpack_nvfp4(parts(ours), dtype=ml_dtypes.bfloat16).materialize()
    np.testing.assert_array_equal(read.float().numpy(), np.asarray(mine, np.float32))


def test_the_package_reads_four_bit_floats_in_the_same_order():
    torch = pytest.importorskip("torch")
    helpers = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    weight = mx_matrix(jnp.linspace(-6, 6, 128).reshape(32, 4), element="e2m1")
    packed = made(pack_mx(weight))["weight_packed"]
    theirs = helpers.unpack_fp4_from_uint8(torch.from_numpy(packed), 4, 32)
    np.testing.assert_array_equal(theirs.float().numpy().T, weight.units())


def test_what_these_formats_cannot_hold_is_said():
    values = jnp.linspace(-1, 1, 256).reshape(64, 4)
    cases = {
        "holds float8_e5m2, but this format has e4m3": fp8_matrix(values, element="e5m2"),
        "MXFP8 powers of two for every 32 inputs": mx_matrix(values, element="e4m3", block=16),
        "has levels that this format does not know": mx_matrix(values, element="e3m2"),
        "MXFP4 and MXFP6 have powers of two for every 32": mx_matrix(
            values, element="e2m1", block=16
        ),
    }
    for words, weight in cases.items():
        assert [words in problem for problem in unfit_floats(weight)] == [True], words


def test_zero_points_of_fp8_are_read_where_they_are_zero_and_refused_where_not():
    values = np.ones((8, 64), ml_dtypes.float8_e4m3fn)
    stored = {"weight": values, "weight_scale": np.ones((8, 1), np.float32)}
    zero = np.zeros((8, 1), ml_dtypes.float8_e4m3fn)
    weight = unpack_float_quantized(parts(stored | {"weight_zero_point": zero}))
    np.testing.assert_array_equal(weight.materialize(), np.ones((8, 64), np.float32))
    with pytest.raises(ValueError, match="'weight_zero_point' is not 0, which 8-bit floats"):
        unpack_float_quantized(parts(stored | {"weight_zero_point": zero + zero.dtype.type(1)}))


def test_damaged_modules_are_refused():
    values = np.ones((8, 64), ml_dtypes.float8_e4m3fn)
    scale = np.ones((3, 1), np.float32)
    with pytest.raises(ValueError, match=r"is \(3, 1\), which does not tile \(8, 64\)"):
        unpack_float_quantized(parts({"weight": values, "weight_scale": scale}))
    with pytest.raises(ValueError, match=r"'weight' is uint8 \(8, 64\), expected float8_e4m3fn"):
        unpack_float_quantized(parts({"weight": values.view(np.uint8), "weight_scale": scale}))
    packed = {
        "weight_packed": np.ones((2, 32), np.uint8),
        "weight_scale": np.ones((2, 3), np.uint8),
    }
    with pytest.raises(
        ValueError, match=r"'weight_scale' is uint8 \(2, 3\), expected uint8 \(2, 2\)"
    ):
        unpack_mx(parts(packed), form="mxfp4-pack-quantized")
    packed = {
        "weight_packed": np.ones((2, 16), np.uint8),
        "weight_scale": np.ones((2, 2), ml_dtypes.float8_e4m3fn),
        "weight_global_scale": np.zeros(1, np.float32),
    }
    with pytest.raises(ValueError, match=r"'weight_global_scale' is 0\.0, by which nothing can be"):
        unpack_nvfp4(parts(packed))
    del packed["weight_global_scale"]
    with pytest.raises(ValueError, match="'weight_global_scale' is missing"):
        unpack_nvfp4(parts(packed))
    packed["weight_packed"] = np.ones((2, 12), np.uint8)
    with pytest.raises(ValueError, match="24 inputs are no blocks of 16"):
        unpack_nvfp4(parts(packed))


def test_damaged_modules_of_other_mx_formats_are_refused():
    values, scale = np.ones((2, 48), ml_dtypes.float8_e4m3fn), np.ones((2, 2), np.uint8)
    read = lambda form, **arrays: unpack_mx(parts(arrays), form=form)  # noqa: E731
    with pytest.raises(ValueError, match="48 inputs are no blocks of 32"):
        read("mxfp8-quantized", weight=values, weight_scale=scale)
    with pytest.raises(
        ValueError, match=r"'weight_scale' is uint8 \(2, 2\), expected uint8 .*2, 1"
    ):
        read("mxfp8-quantized", weight=values[:, :32], weight_scale=scale)
    with pytest.raises(ValueError, match="48 inputs are no blocks of 32"):
        read("mxfp6-pack-quantized", weight_packed=np.ones((2, 36), np.uint8), weight_scale=scale)


def test_modules_that_vllm_multiplies_at_once_have_one_global_scale(tmp_path):
    names = ["m.q_proj", "m.k_proj", "m.v_proj", "m.o_proj", "n.gate_proj", "n.up_proj"]
    draw = lambda i: (1.0 + i) * jax.random.normal(jax.random.key(i), (8, 32))  # noqa: E731
    params = {f"{name}.weight": draw(i) for i, name in enumerate(names)}
    options = {"form": "compressed-tensors", "config": {}, "target": "vllm"}
    with pytest.raises(ValueError) as error:
        write_quantized(tmp_path / "m", jw.apply(jw.quantize.nvfp4(), params), **options)
    first, second = str(error.value).splitlines()
    assert "'m.k_proj.weight', 'm.q_proj.weight', 'm.v_proj.weight' have different global" in first
    assert "'n.gate_proj.weight', 'n.up_proj.weight' have different global scales" in second
    assert "Use quantize.nvfp4(scope='layer')" in second
    new = jw.apply(jw.quantize.nvfp4(scope="layer"), params)
    write_quantized(tmp_path / "m", new, **options)
    again = open_checkpoint(tmp_path / "m")
    for name, weight in new.items():
        np.testing.assert_array_equal(again.represented(name).materialize(), weight.materialize())


def test_tiles_of_another_number_and_missing_scales_are_refused():
    weight = np.ones((100, 64), ml_dtypes.float8_e4m3fn)
    stored = {"weight": weight, "weight_scale_inv": np.ones((3, 1), np.float32)}
    held = unpack_fp8(parts(stored), block=(48, 64))
    assert held.scale.shape == (1, 25)  # of 4 outputs each, which divide 48 and 100
    stored["weight_scale_inv"] = np.ones((2, 1), np.float32)
    with pytest.raises(
        ValueError, match=r"'weight_scale_inv' is float32 \(2, 1\), expected .*3, 1"
    ):
        unpack_fp8(parts(stored), block=(48, 64))
    stored["weight"] = weight.astype(np.float32)
    with pytest.raises(ValueError, match="'weight' is float32"):
        unpack_fp8(parts(stored), block=(48, 64))
