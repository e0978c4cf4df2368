"""int8_dynamic and int8_static: activations are rounded, too, and integers are multiplied."""

from __future__ import annotations

from typing import Any

import jax

from jaxweights.core._leafwise import leafwise
from jaxweights.core._paths import Path
from jaxweights.core._transform import Transform
from jaxweights.quantize._fixed_step import describe_bad_step, fixed_step
from jaxweights.quantize._grid import Codes, Grid, GridKind, GroupSize, Pad, make_grid, round_matrix
from jaxweights.quantize._leaves import (
    REFUSAL,
    describe_bad_scales,
    pack,
    replace_leaf,
    unfit_leaf,
)
from jaxweights.quantize._settings import check_between
from jaxweights.weights._axes import View
from jaxweights.weights._masked import Masked
from jaxweights.weights._quantized import Quantized
from jaxweights.weights._quantized_product import (
    QuantizedProduct,
    unfit_for_product,
    unfit_length,
)
from jaxweights.weights._weight import is_weight


def int8_dynamic(
    *,
    bits: int = 8,
    input_bits: int = 8,
    group_size: GroupSize = None,
    pad: Pad | None = None,
    grid: GridKind | None = None,
) -> Transform:
    """Multiplies integers by integers, with a step of its own for every token of activations.

    Matrices become `QuantizedProduct`: under `lift`, products and convolutions with them round the
    activations and run on the integer units of the machine, which on CPUs is the one quantized
    product that is faster than the float one. Weights are rounded to the nearest level; those that
    are `Quantized` already (by `gptq`, or trained) keep their integers, pruned ones their zeros.
    Needs no data. Inside `fake_quant` the forward pass is the integer product itself.

    Sums of integers are exact, over all inputs or over a group of them. They are rounded to float32
    where they exceed 2**24, and so are the scaled sums of groups as they are added. In a
    convolution all of an example shares a step, as its windows share their inputs.

    Written as compressed-tensors, vLLM multiplies the same integers; transformers rounds inputs as
    well, to levels of its own, of which 127.5 reach the largest magnitude.

    Args:
      bits: Bits of the weights, 2 to 8. Each takes a byte all the same.
      input_bits: Bits of the activations, 2 to 8.
      group_size: None gives one scale per output, "tensor" one per matrix, an integer one for so
        many inputs, each group of which is a product by itself; not so in convolutions. Weights
        that are `Quantized` keep theirs.
      pad: "zero" where the last group may have fewer inputs; zeros fill it up in products. None
        refuses such a matrix.
      grid: A symmetric grid, see `Grid`; None gives "narrow" at 8 bits and "signed_max" below.

    Returns:
      A transform from dense, `Masked` or `Quantized` matrices to `QuantizedProduct` ones.

    Raises:
      TypeError: If a setting is of the wrong kind.
      ValueError: If a setting is out of range; when it sees a tree, if groups do not divide a leaf
        or it has zero points of 8 bits, is a convolution's with several scales an output, its sums
        could overflow 32 bits, or it is represented otherwise.

    Example:
      >>> params = {"kernel": jax.random.normal(jax.random.key(0), (64, 8))}
      >>> model = lambda params, x: x @ params["kernel"]
      >>> quantized = jw.apply(jw.quantize.int8_dynamic(), params)
      >>> y = jax.jit(jw.lift(model))(quantized, jnp.ones((2, 64)))
      >>> bool(jnp.allclose(y, model(params, jnp.ones((2, 64))), atol=0.1))
      True

    Source: Zafrir et al. 2019, arXiv:1910.06188, section 2; Yao et al. 2022, arXiv:2206.01861,
      section 4.1, token-wise activations.
    """
    return _transform(
        "quantize.int8_dynamic", bits, input_bits, group_size, pad, grid, static=False
    )


def int8_static(
    *,
    bits: int = 8,
    input_bits: int = 8,
    group_size: GroupSize = None,
    pad: Pad | None = None,
    grid: GridKind | None = None,
) -> Transform:
    """Multiplies integers by integers, with one step for all activations of a matrix.

    As `int8_dynamic`, with a step that calibration fixed: the largest magnitude that was seen, over
    `2**(input_bits-1) - 1`. What exceeds it is clipped. Saves looking for each token's largest
    magnitude; one channel of outliers makes the step coarse for all others, which smoothing the
    activations beforehand mends. All feature groups of a convolution share its step.

    Args:
      bits: As in `int8_dynamic`.
      input_bits: As in `int8_dynamic`.
      group_size: As in `int8_dynamic`.
      pad: As in `int8_dynamic`.
      grid: As in `int8_dynamic`.

    Returns:
      A transform as that of `int8_dynamic`, which needs the statistics "min" and "max".

    Raises:
      TypeError: If a setting is of the wrong kind.
      ValueError: As `int8_dynamic`, and where a statistic is missing or no token reached a matrix.

    Example:
      >>> params, x = {"kernel": jnp.array([[1.0], [0.5]])}, jnp.array([[2.0, -4.0]])
      >>> tx, model = jw.quantize.int8_static(), lambda params, x: x @ params["kernel"]
      >>> stats = jw.calibrate(model, params, [x], needs=tx.needs(params))
      >>> float(127 * jw.apply(tx, params, stats=stats)["kernel"].input_scale[0, 0])
      4.0

    Source: Jacob et al. 2018, arXiv:1712.05877, section 3.
    Differs: activations are symmetric, so that no zero point enters the product.
    """
    return _transform("quantize.int8_static", bits, input_bits, group_size, pad, grid, static=True)


def _transform(
    name: str,
    bits: int,
    input_bits: int,
    group_size: GroupSize,
    pad: Pad | None,
    grid: GridKind | None,
    *,
    static: bool,
) -> Transform:
    settings = make_grid(name, bits=bits, group_size=group_size, pad=pad, grid=grid)
    if settings.unsigned:
        raise ValueError(
            f"{name}: grid={grid!r} has zero points, which products of integers leave out. Choose "
            "'narrow', 'full', 'half' or 'signed_max'."
        )
    input_bits = check_between(name, "input_bits", input_bits, 2, 8)

    def quantize(weight: jax.Array, **seen: jax.Array) -> tuple[Codes, jax.Array | None]:
        found = round_matrix(weight, settings)
        top = 2 ** (input_bits - 1) - 1
        step = fixed_step(seen["min"], seen["max"], top) if static else None
        return pack(found, settings), step

    def wrap(leaf: Any, result: tuple[Codes, jax.Array | None], view: View) -> QuantizedProduct:
        codes, step = result
        base, mask = (leaf.base, leaf.mask) if isinstance(leaf, Masked) else (leaf, None)
        if not isinstance(base, Quantized):
            # Zeros have code 0: the mask has no more to do.
            base, mask = replace_leaf(base, codes, view, settings), None
        assert isinstance(base, Quantized)
        product = QuantizedProduct.of(base, step, input_bits=input_bits)
        if mask is None:
            return product
        return product.masked(view.to_matrix(mask))

    def check(path: Path, leaf: Any, view: View) -> str | None:
        problem = _unfit(leaf, view, settings, input_bits)
        return problem and f"{path!r}: {problem}"

    def verify(path: Path, result: tuple[Codes, jax.Array | None]) -> str | None:
        codes, step = result
        return describe_bad_scales(path, codes) or describe_bad_step(path, step, "int8_dynamic")

    return leafwise(
        quantize,
        name=name,
        needs=("max", "min") if static else (),
        wrap=wrap,
        accepts=(Quantized, Masked),
        refusal=REFUSAL,
        check=check,
        verify=verify,
        checks_finite=False,
        grouped="pool",
    )


def _unfit(leaf: Any, view: View, grid: Grid, input_bits: int) -> str | None:
    if isinstance(leaf, Masked):
        leaf = leaf.base
        if is_weight(leaf) and not isinstance(leaf, Quantized):
            return f"is already a Masked {type(leaf).__name__}. {REFUSAL}"
    if isinstance(leaf, Quantized):
        if isinstance(grid.group_size, int) and grid.group_size != leaf.group_size:
            return (
                f"is a Quantized with group_size={leaf.group_size}, whose integers are kept, but "
                f"group_size={grid.group_size} is asked for. Leave group_size out, or start from "
                "the dense weight."
            )
        return unfit_for_product(leaf, input_bits)
    if view.axes.kind == "conv" and isinstance(grid.group_size, int):
        return (
            f"group_size={grid.group_size}: the sums of a convolution's window can only be scaled "
            "as a whole. Give convolutions group_size=None, with `partition`."
        )
    length = grid.group_size if isinstance(grid.group_size, int) else view.in_dim
    return unfit_leaf(leaf, view, grid) or unfit_length(length, grid.bits, input_bits)
