"""The decoder against transformers, against itself, and under bfloat16 and padding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from jaxweights.models import (
    build,
    config_from_dict,
    params_from_checkpoint,
)
from jaxweights.models._convert import name_map
from tests.models._cases import CASES, draw_tensors, inputs
from tests.models.make_logits import reference_outputs

STORED = Path(__file__).with_name("logits.npz")
# Float32 with sums of up to 40 terms and logits of order 10: 1e-4 is about ten roundings, and a
# wrong rotation, norm or window moves logits by 0.1 and more.
TOLERANCE = dict(rtol=1e-4, atol=1e-4)


def drawn_params(name, config):
    expected = name_map(config, "huggingface").expected()
    names = name_map(config, "huggingface")
    shapes = {names.written_name(n): rule.checkpoint_shape for n, (rule, _) in expected.items()}
    return params_from_checkpoint(draw_tensors(shapes), config)


def case(name):
    config = config_from_dict(CASES[name])
    return build(config), drawn_params(name, config)


def our_outputs(name):
    model, params = case(name)
    given = inputs()
    extra = {"token_types": given["token_types"]} if name == "bert" else {}
    return model.apply(
        {"params": params}, given["tokens"], attention_mask=given["attention_mask"], **extra
    )


def real(outputs):
    return np.asarray(outputs)[inputs()["attention_mask"] == 1]


@pytest.mark.parametrize("name", CASES)
def test_outputs_agree_with_those_that_transformers_gave(name):
    with np.load(STORED) as stored:
        np.testing.assert_allclose(real(our_outputs(name)), real(stored[name]), **TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_outputs_agree_with_the_transformers_that_is_installed(name):
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    theirs = reference_outputs(CASES[name])
    np.testing.assert_allclose(real(our_outputs(name)), real(theirs), **TOLERANCE)
