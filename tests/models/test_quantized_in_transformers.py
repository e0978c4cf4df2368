"""transformers loads the compressed-tensors folders that are written here, and agrees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.models import LlamaConfig, build, export_checkpoint
from jaxweights.weights import is_weight
from jaxweights.weights._divide import divide

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
CONFIG = LlamaConfig(
    vocab_size=96,
    hidden_size=128,
    intermediate_size=256,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    tie_embeddings=True,
)
TOKENS = jnp.arange(10).reshape(2, 5)


BATCHES = [TOKENS, TOKENS + 40]


def run(params, tokens):
    return build(CONFIG).apply({"params": params}, tokens)


rtn = jw.quantize.round_to_nearest
RULES = {
    "4 bits": [("layers/.*/kernel", rtn(bits=4, group_size=32))],
    "8 bits": [("layers/.*/kernel", rtn(bits=8))],
    "8-bit floats": [("layers/.*/kernel", jw.quantize.fp8())],
    "zero points": [("layers/.*/kernel", rtn(bits=4, group_size=32, grid="affine"))],
    "three grids": [
        ("layers/mlp/up/kernel", rtn(bits=3, group_size=32)),
        ("layers/mlp/down/kernel", rtn(bits=8)),
        ("layers/attn/.*/kernel", rtn(bits=6)),
    ],
}


def in_transformers(folder, *, seen=None, **options):
    """Logits there; `seen` gets what goes into each Linear and comes out of it."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, **options
    )
    for name, module in model.named_modules() if seen is not None else ():
        if isinstance(module, torch.nn.Linear):
            watch = lambda module, x, y, name=name: seen.update({name: (x[0].numpy(), y.numpy())})  # noqa: E731
            module.register_forward_hook(watch)
    with torch.no_grad():
        return model(torch.from_numpy(np.array(TOKENS)).long()).logits.numpy()


def transformed(*rules, pre=None):
    """The model's parameters with rules applied to the kernels inside its layers."""
    params = build(CONFIG).init(jax.random.key(0), TOKENS)["params"]
    return jw.pipeline(
        run, params, BATCHES, [*([pre] if pre else []), jw.partition(*rules, (".*", jw.identity()))]
    )


@pytest.mark.parametrize("case", RULES)
def test_logits_are_those_of_the_lifted_model(tmp_path, case):
    params = transformed(*RULES[case])
    export_checkpoint(tmp_path / "m", params, CONFIG, form="compressed-tensors")
    options = {}
    if case == "zero points":
        # Before it unpacks them, transformers 5.24 expects zero points in their unpacked shape.
        dense = pytest.importorskip("transformers").CompressedTensorsConfig(dequantize=True)
        options = {"quantization_config": dense}
    theirs = in_transformers(tmp_path / "m", **options)
    ours = jw.lift(run)(params, TOKENS)
    assert float(jnp.std(ours)) > 0.1
    # Measured 7e-7.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


SMOOTH = jw.quantize.smooth(folds=jw.quantize.llama_folds(CONFIG), unfolded="leave")
PRODUCTS = {
    "dynamic": (None, jw.quantize.int8_dynamic()),
    "smoothed": (SMOOTH, jw.quantize.int8_dynamic()),
    "fixed steps": (None, jw.quantize.int8_static()),
    "8-bit floats": (None, jw.quantize.fp8_dynamic()),
    "8-bit floats, fixed": (None, jw.quantize.fp8_static()),
    "8-bit floats, tiles": (
        None,
        jw.quantize.fp8_dynamic(group_size=(32, 64), input_group_size=32),
    ),
    "4 bits and 8-bit floats": (
        None,
        jw.chain(rtn(bits=4, group_size=32, grid="half"), jw.quantize.fp8_dynamic()),
    ),
}


def their_inputs(x, bits, scale=None):
    """Inputs as compressed-tensors rounds them: from -128 to 127, by 127.5 steps where dynamic."""
    x = x.astype(jnp.float32)
    if scale is None:
        # The largest input lies between two levels: the quotients have to be exact.
        scale = divide(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 2.0 ** (bits - 1) - 0.5)
    steps = jnp.clip(jnp.round(divide(x, scale)), -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    return steps.astype(jnp.int8), scale


@pytest.mark.parametrize("case", PRODUCTS)
def test_inputs_are_rounded_there_as_under_lift(tmp_path, case, monkeypatch):
    """But for the grid of the inputs, which is the only difference.

    vLLM's kernels have the grid of `int8_dynamic`, of 127 steps either side.
    """
    pre, product = PRODUCTS[case]
    params = transformed(("layers/.*/kernel", product), pre=pre)
    export_checkpoint(tmp_path / "m", params, CONFIG, form="compressed-tensors")
    seen = {}
    theirs = in_transformers(tmp_path / "m", seen=seen)
    ours = jw.lift(run)(params, TOKENS)
    only = lambda w: w.weight_only() if is_weight(w) else w  # noqa: E731
    floats = jw.lift(run)(jax.tree.map(only, params, is_leaf=is_weight), TOKENS)
    rounding = np.linalg.norm(ours - floats)
    assert rounding > 0.005 * np.linalg.norm(floats)  # inputs are rounded indeed
    assert np.linalg.norm(ours - theirs) < 2 * rounding

    # Differences of one unit in the last place grow where one of them moves an input by a step,
    # so that only products of the same inputs can be equal to the last digits.
    monkeypatch.setattr("jaxweights.weights._integer_product.round_inputs", their_inputs)
    product = jax.jit(jw.lift(lambda weight, x: x @ weight, on_materialize="error"))
    layers = params["layers"]
    places = {f"self_attn.{n}_proj": layers["attn"][n] for n in "qkvo"}
    places |= {f"mlp.{n}_proj": layers["mlp"][n] for n in ("gate", "up", "down")}
    for layer in range(CONFIG.num_layers):
        for name, leaf in places.items():
            x, y = seen[f"model.layers.{layer}.{name}"]
            weight = jax.tree.map(lambda field, layer=layer: field[layer], leaf["kernel"])
            assert np.abs(x @ weight.materialize() - y).max() > 1e-3
            # Measured 6e-7.
            np.testing.assert_allclose(product(weight, x), y, rtol=0, atol=1e-5)
