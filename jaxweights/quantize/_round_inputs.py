"""round_inputs: microscaling formats on the other side of a product."""

from __future__ import annotations

from typing import Any, get_args

import jax
import jax.numpy as jnp

from jaxweights.core._leafwise import leafwise
from jaxweights.core._paths import Path
from jaxweights.core._transform import Transform
from jaxweights.quantize._fixed_step import describe_bad_step
from jaxweights.quantize._leaves import REFUSAL, unfit_values
from jaxweights.quantize._settings import is_word
from jaxweights.weights._axes import View
from jaxweights.weights._masked import Masked
from jaxweights.weights._microscaling import InputForm, ScaleRule, overall_scale
from jaxweights.weights._rounded_inputs import RoundedInputs, unfit_form
from jaxweights.weights._scaled import Scaled
from jaxweights.weights._weight import is_weight

_NAME = "quantize.round_inputs"


def round_inputs(*, form: InputForm, scale_rule: ScaleRule = "floor") -> Transform:
    r"""Rounds the inputs of weights, as the model runs, to a microscaling format.

    Matrices become `RoundedInputs`: under `lift`, products with them round every block of a token's
    inputs to narrow floats with a scale of their own. Weights keep their numbers, so that this
    follows what quantized them: after `nvfp4` it makes NVFP4's W4A4, after `mx` that of MX. Inside
    `fake_quant` inputs are rounded, too. On a CPU the product takes longer than one of floats.

    Args:
      form: "mxfp4" (e2m1), "mxfp6" (e2m3) and "mxfp8" (e4m3) have blocks of 32 inputs and powers of
        two as scales; they need no data. "nvfp4" has blocks of 16 with e4m3 scales over a number G
        of all inputs, :math:`448 \cdot 6 / \max |x|` of the calibration data; beyond it blocks
        saturate.
      scale_rule: How powers of two are found, as in `mx`. "even" for "mxfp4" is what
        compressed-tensors does, and "rceil" for "mxfp8" but where the largest is just 448 times a
        power.

    Returns:
      A transform from dense, `Masked` or quantized matrices to `RoundedInputs` ones. For "nvfp4" it
      needs the statistics "min" and "max".

    Raises:
      ValueError: If a setting is unknown; when it sees a tree, if a block does not divide the
        inputs of a leaf, a statistic is missing, or no token reached a matrix.

    Example:
      >>> import jaxweights as jw
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 8))}
      >>> model = lambda params, x: x @ params["kernel"]
      >>> x = jax.random.normal(jax.random.key(1), (16, 64))
      >>> tx = jw.chain(jw.quantize.nvfp4(), jw.quantize.round_inputs(form="nvfp4"))
      >>> stats = jw.calibrate(model, params, [x], needs=tx.needs(params))
      >>> small = jw.apply(tx, params, stats=stats)
      >>> y = jw.lift(model)(small, x)
      >>> error = jnp.linalg.norm(y - model(params, x)) / jnp.linalg.norm(model(params, x))
      >>> 0.05 < float(error) < 0.2
      True

    Source: OCP Microscaling Formats (MX) 1.0; compressed-tensors 0.20, whose schemes NVFP4 and
      MXFP4 these inputs are.
    Differs: (1) Scales are found in float32, whatever the dtype of the inputs. (2) Convolutions
      round no inputs, as their windows share none of the blocks.
    """
    if not is_word(form, get_args(InputForm)):
        raise ValueError(
            f"{_NAME}: form={form!r} is unknown. Choose one of {get_args(InputForm)}; tokens with "
            "one scale are rounded by fp8_dynamic and int8_dynamic."
        )
    if not is_word(scale_rule, get_args(ScaleRule)):
        raise ValueError(
            f"{_NAME}: scale_rule={scale_rule!r} is unknown. Choose one of {get_args(ScaleRule)}."
        )
    calibrated = form == "nvfp4"

    def quantize(weight: jax.Array, **seen: jax.Array) -> jax.Array | None:
        del weight  # keeps its numbers
        if not calibrated:
            return None
        largest = jnp.maximum(jnp.abs(seen["min"]), jnp.abs(seen["max"])).astype(jnp.float32)
        return jnp.max(largest, initial=0.0).reshape(1, 1)

    def wrap(leaf: Any, largest: jax.Array | None, view: View) -> RoundedInputs:
        overall = None if largest is None else overall_scale(largest)
        return RoundedInputs.of(leaf, overall, form=form, scale_rule=scale_rule, view=view)

    def check(path: Path, leaf: Any, view: View) -> str | None:
        problem = unfit_form(form, view.in_dim) or _unfit(leaf)
        return problem and f"{path!r}: {problem}"

    def verify(path: Path, largest: jax.Array | None) -> str | None:
        return describe_bad_step(path, largest, "an MX form, which needs no data")

    return leafwise(
        quantize,
        name=_NAME,
        needs=("max", "min") if calibrated else (),
        wrap=wrap,
        accepts=(Masked, Scaled),
        refusal=REFUSAL,
        check=check,
        verify=verify,
        checks_finite=False,
        grouped="pool",
    )


def _unfit(leaf: Any) -> str | None:
    inner = leaf.base if isinstance(leaf, Masked) else leaf
    if not is_weight(inner):
        return unfit_values(leaf)
    if isinstance(leaf, Masked) and not isinstance(inner, Scaled):
        return f"is already a Masked {type(inner).__name__}. {REFUSAL}"
    return None
