"""Folders of every format with drawn shapes, groups and dtypes: there and back, and damaged."""

import json

import ml_dtypes
import numpy as np
import pytest

from jaxweights.checkpoint import open_checkpoint, open_safetensors, write_safetensors
from jaxweights.checkpoint.exchange import write_quantized
from jaxweights.checkpoint.exchange._module import LazyWeight, host_weight
from jaxweights.weights import is_weight, materialize

SCALES = (np.float16, ml_dtypes.bfloat16, np.float32)


def drawn(rng, *, bits, lengths, zero, index, scales, groups=None):
    """A weight of drawn codes, scales and perhaps zero points and moved groups."""
    in_dim, out_dim = (int(rng.choice(lengths)) for _ in range(2))
    counts = [n for n in range(1, in_dim) if in_dim % n == 0] or [1]
    rows = int(rng.choice(counts)) if groups is None else in_dim // groups
    dtype = scales[rng.integers(len(scales))]
    scale = rng.uniform(0.01, 1, (rows, out_dim)).astype(dtype)
    codes = rng.integers(0, 2**bits, (in_dim, out_dim))
    moved = rng.permutation(np.arange(in_dim, dtype=np.int32) // (in_dim // rows))
    options = {"bits": bits, "dtype": dtype, "group_index": moved if index and rows > 1 else None}
    if zero:
        points = rng.integers(1, 2**bits, (rows, out_dim))
        return host_weight(codes.astype(np.uint8), scale, zero_point=points, **options)
    return host_weight((codes - 2 ** (bits - 1)).astype(np.int8), scale, **options)


# Bits, lengths of axes, whether there may be zero points and moved groups, and dtypes of scales.
FORMS = {
    "gptq": ((2, 3, 4, 8), (32, 64, 96), True, True, (np.float16,)),
    "gptq_v2": ((2, 3, 4, 8), (32, 64, 160), True, True, (np.float16,)),
    "awq": ((4,), (8, 24, 40, 64), True, False, (np.float16,)),
    "compressed-tensors": (range(2, 9), (1, 6, 10, 31, 33, 64, 100), True, True, SCALES),
}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("form", FORMS)
def test_a_folder_comes_back_bit_for_bit(tmp_path, form, seed):
    bits, lengths, zeros, moves, scales = FORMS[form]
    rng = np.random.default_rng(seed)
    uniform = form != "compressed-tensors"
    all_bits, group = int(rng.choice(list(bits))), int(rng.choice([8, 16, 32]))
    if form == "awq":
        group = 8
    weights = {}
    for i in range(3):
        options = {"bits": all_bits if uniform else int(rng.choice(list(bits)))}
        options |= {"zero": zeros and bool(rng.integers(2)), "index": moves and rng.integers(2)}
        options |= {"lengths": lengths, "scales": scales, "groups": group if uniform else None}
        weights[f"model.layers.{i}.proj.weight"] = drawn(rng, **options)
    plain = {"norm.weight": rng.normal(size=7).astype(np.float32)}
    write_quantized(tmp_path / "m", weights | plain, form=form, config={"model_type": "none"})
    checkpoint = open_checkpoint(tmp_path / "m")
    assert set(checkpoint.names) == weights.keys() | plain.keys()
    for name, weight in weights.items():
        again = checkpoint.represented(name)
        assert is_weight(again) and again.shape == weight.shape == checkpoint.shape(name)
        want = np.asarray(materialize({"w": weight})["w"])
        assert np.asarray(materialize({"w": again})["w"]).tobytes() == want.tobytes(), name
        assert checkpoint.dtype(name) == want.dtype == weight.dtype
    lazy = {name: LazyWeight(lambda w=w: w) for name, w in (weights | plain).items()}
    write_quantized(tmp_path / "lazy", lazy, form=form, config={"model_type": "none"})
    once = {n: checkpoint.represented(n) for n in weights | plain}
    settings = json.loads((tmp_path / "m" / "config.json").read_text())["quantization_config"]
    write_quantized(
        tmp_path / "again", once, form=form, config={"model_type": "none"}, settings=settings
    )
    for folder in ("lazy", "again"):
        for file in ("model.safetensors", "config.json"):
            same = (tmp_path / folder / file).read_bytes() == (tmp_path / "m" / file).read_bytes()
            assert same, (folder, file)


def module_of(form):
    rng = np.random.default_rng(0)
    _, lengths, _, _, scales = FORMS[form]
    options = {"bits": 4, "lengths": lengths[-1:], "scales": scales[-1:], "groups": 8}
    return drawn(rng, zero=True, index=False, **options)


@pytest.mark.parametrize("harm", ["missing", "cut", "other dtype"])
@pytest.mark.parametrize("form", FORMS)
def test_damage_names_the_folder_and_the_module_and_nothing_is_written(tmp_path, form, harm):
    write_quantized(tmp_path / "m", {"a.weight": module_of(form)}, form=form, config={})
    reader = open_safetensors(tmp_path / "m")
    tensors = {name: reader.read(name) for name in reader}
    needed = [n for n in tensors if not n.endswith(("g_idx", "weight_shape"))]
    assert len(needed) == 3
    for i, victim in enumerate(needed):
        harmed = dict(tensors)
        if harm == "missing":
            if victim.endswith(("qweight", "weight_scale")):
                continue  # then there is no such module, and the model misses its weight
            del harmed[victim]
        elif harm == "cut":
            harmed[victim] = tensors[victim][:, :-1]
        else:
            harmed[victim] = tensors[victim].astype(np.int16)
        folder = tmp_path / f"{i}"
        write_safetensors(folder, harmed, files={"config.json": tmp_path / "m" / "config.json"})
        checkpoint = open_checkpoint(folder)
        lazy = {"a.weight": LazyWeight(lambda c=checkpoint: c.represented("a.weight"))}
        with pytest.raises(ValueError) as error:
            write_quantized(tmp_path / "out", lazy, form=form, config={})
        assert f"open_checkpoint: '{folder}': 'a.weight': " in str(error.value)
        # One that was cut may be taken for the one whose shape is right.
        named = needed if harm == "cut" else [victim]
        assert any(repr(name.removeprefix("a.")) in str(error.value) for name in named)
        assert not (tmp_path / "out").exists()
