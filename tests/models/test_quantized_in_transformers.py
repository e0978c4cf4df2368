"""transformers loads the compressed-tensors folders that are written here, and agrees."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.models import LlamaConfig, build, export_checkpoint

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


@pytest.mark.parametrize("case", RULES)
def test_logits_are_those_of_the_lifted_model(tmp_path, case):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("compressed_tensors")
    params = build(CONFIG).init(jax.random.key(0), TOKENS)["params"]
    layout = jw.infer_layout(run, params, TOKENS)
    tx = jw.partition(*RULES[case], (".*", jw.identity()))
    params = jw.apply(tx, params, layout=layout)
    export_checkpoint(tmp_path / "m", params, CONFIG, form="compressed-tensors")
    # Before it unpacks them, transformers 5.24 expects zero points to have their unpacked shape.
    dense = transformers.CompressedTensorsConfig(dequantize=True)
    options = {"quantization_config": dense} if case == "zero points" else {}
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "m", dtype=torch.float32, **options
    )
    with torch.no_grad():
        theirs = model(torch.from_numpy(np.array(TOKENS)).long()).logits.numpy()
    ours = jw.lift(run)(params, TOKENS)
    assert float(jnp.std(ours)) > 0.1
    # Measured 7e-7.
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)
