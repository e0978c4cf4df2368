"""LoRA and rsLoRA: trainable low-rank factors beside weights that stay as they are."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from jaxweights.core import Context, Params, Path, Transform, leafwise
from jaxweights.core._transform import State
from jaxweights.weights import LowRank, View, Weight

Init = Literal["peft", "he_uniform", "gaussian"]
_INITS: tuple[Init, ...] = ("peft", "he_uniform", "gaussian")


def lora(
    *,
    rank: int,
    alpha: float | None = None,
    init: Init = "peft",
    dtype: DTypeLike | Literal["param"] = jnp.float32,
    clip_rank: bool = False,
) -> Transform:
    r"""Adds trainable low-rank factors to every matrix, without changing what the model computes.

    Each weight :math:`W` becomes a `LowRank` that stands for :math:`W + (\alpha / r) A B`, with
    `down` :math:`A` `(in, rank)` random and `up` :math:`B` `(rank, out)` zero. Stacked layers and
    experts get factors of their own. The base is kept as it is, be it dense, masked or
    quantized. Train only the factors: `split(params, adapt.factors)`.

    `apply(..., key=...)` sets the random draw. Without a key each leaf draws from a fixed key
    and its own path, so a chain that ends in `lora` needs none: the model computes the same
    function whatever `down` is, and its distribution does not depend on the key.

    Args:
      rank: Width of the factors, at least 1.
      alpha: Scale: the product is multiplied by `alpha / rank`. None means `rank`.
      init: Distribution of `down`: `"peft"`, uniform within ±1/√in (and for a table of embeddings
        normal with deviation 1); `"he_uniform"`, within ±√(6/in); `"gaussian"`, normal with
        deviation 1/rank.
      dtype: Dtype of the factors, or `"param"` for that of each weight.
      clip_rank: Whether a matrix with fewer than `rank` rows or columns gets factors as wide
        as it can have, instead of being refused.

    Returns:
      The transform.

    Raises:
      ValueError: If a setting is out of range; on a tree, if `rank` exceeds what a matrix can
        have, or a leaf has factors already.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxweights.core import apply
      >>> params = apply(lora(rank=4), {"mlp": {"kernel": jnp.ones((16, 8))}})
      >>> params["mlp"]["kernel"].down.shape, params["mlp"]["kernel"].up.shape
      ((16, 4), (4, 8))

    Source: Hu et al. 2021, arXiv:2106.09685, section 4.1; the default draw is that of peft
      (kaiming-uniform with a = √5, which is uniform within ±1/√in).
    Differs: (1) no dropout, which belongs to activations; (2) `alpha` defaults to `rank`;
      (3) `rank` above min(in, out) is refused, where peft accepts it.
    """
    return _adapter("adapt.lora", rank, alpha, init, dtype, clip_rank, power=1.0)


def rslora(
    *,
    rank: int,
    alpha: float | None = None,
    init: Init = "peft",
    dtype: DTypeLike | Literal["param"] = jnp.float32,
    clip_rank: bool = False,
) -> Transform:
    r"""LoRA whose product is multiplied by `alpha / √rank`, so that high ranks still learn.

    With `alpha / rank` the update of each step shrinks as the rank grows; with the square root its
    size does not depend on the rank.

    Args:
      rank: As in `lora`.
      alpha: Scale: the product is multiplied by `alpha / sqrt(rank)`. None means `rank`.
      init: As in `lora`.
      dtype: As in `lora`.
      clip_rank: As in `lora`.

    Returns:
      The transform.

    Raises:
      ValueError: As in `lora`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxweights.core import apply
      >>> params = apply(rslora(rank=4, alpha=8), {"kernel": jnp.ones((16, 8))})
      >>> float(params["kernel"].scaling)
      4.0

    Source: Kalajdzievski 2023, arXiv:2312.03732, equation 4.
    """
    return _adapter("adapt.rslora", rank, alpha, init, dtype, clip_rank, power=0.5)


def factors(path: Path, leaf: Any) -> tuple[str, ...]:
    """Names the factors of a `LowRank` leaf: the filter for `split` that trains only them.

    Args:
      path: Path of the leaf; not read.
      leaf: Leaf of a tree.

    Returns:
      Names of fields, `("down", "up")` for a `LowRank` and none for anything else; fields of a
      `LowRank` inside another representation come with the path to them, such as `base/down`.

    Example:
      >>> import jax.numpy as jnp
      >>> from jaxweights.core import apply, split
      >>> params = apply(lora(rank=2), {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)})
      >>> trainable, frozen = split(params, factors)
      >>> sorted(trainable)
      ['kernel/down', 'kernel/up']
    """
    own = ("down", "up") if isinstance(leaf, LowRank) else ()
    base = getattr(leaf, "base", None)
    inner = factors(path, base) if isinstance(base, Weight) else ()
    return (*own, *(f"base/{name}" for name in inner))


def _adapter(
    name: str,
    rank: int,
    alpha: float | None,
    init: Init,
    dtype: DTypeLike | Literal["param"],
    clip_rank: bool,
    *,
    power: float,
) -> Transform:
    _check_settings(name, rank, alpha, init, dtype)

    def width(in_dim: int, out_dim: int) -> int:
        return min(rank, in_dim, out_dim) if clip_rank else rank

    def draw(weight: jax.Array, *, key: jax.Array) -> jax.Array:
        in_dim, out_dim = weight.shape
        # The open interval of jax.random.normal, whose inverse error function is finite.
        lowest = np.nextafter(np.float32(-1), np.float32(0))
        return jax.random.uniform(
            key, (in_dim, width(in_dim, out_dim)), jnp.float32, minval=lowest, maxval=1.0
        )

    def wrap(leaf: Any, uniform: jax.Array, view: View) -> LowRank:
        *stack, _, r = uniform.shape
        stored = leaf.dtype if dtype == "param" else dtype
        scale = (r if alpha is None else alpha) / r**power
        weight = LowRank(
            base=leaf,
            down=_to_distribution(uniform, init, view, rank=r).astype(stored),
            up=jnp.zeros((*stack, r, view.out_dim), stored),
            scaling=jnp.full(tuple(stack), scale, jnp.float32),
            view=view,
        )
        return _placed_like_base(weight)

    def check(path: Path, leaf: Any, view: View) -> str | None:
        if isinstance(leaf, LowRank):
            return (
                f"{path!r}: has low-rank factors of rank {leaf.rank} already. Merge them first, "
                "with adapt.merge_adapters, or leave this weight out with `partition`."
            )
        if 0 in leaf.shape:
            return f"{path!r}: has shape {tuple(leaf.shape)}, no entries. Leave it out."
        most = min(view.in_dim, view.out_dim)
        if rank > most and not clip_rank:
            return (
                f"{path!r}: rank={rank} exceeds min(in={view.in_dim}, out={view.out_dim})={most}. "
                "Choose a lower rank, pass clip_rank=True to use the highest possible one here, or "
                "leave this weight out with `partition`."
            )
        return None

    inner = leafwise(
        draw,
        name=name,
        wrap=wrap,
        accepts=(Weight,),
        randomized=True,
        check=check,
    )

    def update(params: Params, state: State, context: Context) -> tuple[Params, State]:
        if context.key is None:
            # Not a default seed of a result: at the start the factors' product is zero for any key.
            context = dataclasses.replace(context, key=jax.random.key(0))
        return inner.update(params, state, context)

    return dataclasses.replace(inner, update=update)


def _check_settings(name: str, rank: int, alpha: float | None, init: str, dtype: Any) -> None:
    if isinstance(rank, bool) or not isinstance(rank, int | np.integer):
        raise TypeError(f"{name}: rank={rank!r} must be an integer.")
    if rank < 1:
        raise ValueError(f"{name}: rank={rank} must be at least 1.")
    if alpha is not None and not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"{name}: alpha={alpha} must be positive. None means alpha = rank.")
    if init not in _INITS:
        raise ValueError(f"{name}: init={init!r} is unknown. Choose one of {', '.join(_INITS)}.")
    if dtype != "param" and not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{name}: dtype={dtype} cannot hold trainable factors. Choose a floating dtype, or "
            "'param' for that of each weight."
        )


def _to_distribution(uniform: jax.Array, init: Init, view: View, *, rank: int) -> jax.Array:
    """Turns draws from U(-1, 1) into draws of `down`, by the inverse distribution function."""
    if view.axes.kind == "embedding":
        return _normal(uniform)
    if init == "gaussian":
        return _normal(uniform) / rank
    bound = math.sqrt((6.0 if init == "he_uniform" else 1.0) / view.in_dim)
    return uniform * bound


def _normal(uniform: jax.Array) -> jax.Array:
    return math.sqrt(2.0) * jax.lax.erf_inv(uniform)


def _placed_like_base(weight: LowRank) -> LowRank:
    """Spreads the factors over devices as the base is spread; nothing to do under tracing."""
    base = weight.base
    if isinstance(base, Tracer) or not isinstance(base, jax.Array):
        return weight
    if not isinstance(base.sharding, NamedSharding):
        return weight
    mesh = base.sharding.mesh
    specs = weight.partition(base.sharding.spec, mesh)
    if specs is None:
        return weight
    place = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    return dataclasses.replace(
        weight,
        down=place(weight.down, specs.down),
        up=place(weight.up, specs.up),
        scaling=place(weight.scaling, specs.scaling),
    )
