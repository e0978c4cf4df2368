"""rotate: QuaRot, a model turned so that no feature has outliers."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxweights.core._context import Context
from jaxweights.core._paths import Flat, Params, Path, fail, flatten, nearest, path_key, unflatten
from jaxweights.core._transform import Transform, stateless
from jaxweights.quantize._folds import Fold, check_folds
from jaxweights.quantize._norms import fuse_flat, norm_sites
from jaxweights.quantize._rotation import (
    Rotation,
    RotationKind,
    check_kind,
    check_rotations,
    check_spec,
    random_rotation,
    rotate_flat,
)
from jaxweights.quantize._settings import check_flags, check_names
from jaxweights.weights._axes import View
from jaxweights.weights._input_changes import Rotated
from jaxweights.weights._weight import is_weight

if TYPE_CHECKING:
    from jaxweights.align import PermutationSpec

_NAME = "quantize.rotate"
_BIASES = ("bias", "beta")


def rotate(
    spec: PermutationSpec,
    *,
    folds: Fold | Sequence[Fold] = (),
    widths: Collection[str] = ("residual", "values"),
    online: Collection[str] = (),
    kind: RotationKind = "hadamard",
    rotations: Mapping[str, Rotation] | None = None,
    inverse: bool = False,
) -> Transform:
    """Turns widths of a model by orthogonal matrices, which spreads outliers over all features.

    Norms' gains first move into their readers; then every leaf that writes or reads a width is
    turned alike. The function stays what it was, to rounding; the model has the same shapes and
    runs as it did. With `online`, the inputs of some weights go through a Hadamard transform when
    the model runs under `lift`, where no turn of another weight can do it.

    Args:
      spec: Names the axes: `align.llama_permutations(config)`, `align.bert_permutations(config)`,
        or your own. Its vectors scale a width, unless they are called `bias` or `beta`. Leaves that
        the tree lacks are no error, so that parts can be turned apart: the function stays what it
        was only when all leaves of a width have been turned.
      folds: Where norms' gains move, such as `llama_folds(config)`; needed for widths that norms
        scale. A tied head has no leaf that could take the final norm's gain: `untie_head` first.
      widths: Names in `spec` to turn. One matrix serves all layers and heads.
      online: Names whose readers get a Hadamard transform before them, as `Rotated`: "mlp" for the
        input of `down`.
      kind: As in `random_rotation`. Where norms subtract the mean, only "centred" keeps the
        function.
      rotations: Rotations by width, such as `learn_rotations` finds; others are drawn.
      inverse: Whether to turn back what the same settings and key turned. Gains stay one.

    Returns:
      A transform; it draws random numbers, one key for each width.

    Raises:
      ValueError: If a setting is out of range; when it sees a tree, if a name or leaf is missing,
        or a gain scales a width entry by entry and no fold moves it away.

    Example:
      >>> from jaxweights.align import PermutationSpec
      >>> params = {"up": jnp.ones((3, 8)), "down": jax.random.normal(jax.random.key(0), (8, 2))}
      >>> axes = {"up": (None, "hidden"), "down": ("hidden", None)}
      >>> tx = rotate(PermutationSpec.of(params, axes), widths=["hidden"])
      >>> model = lambda params, x: x @ params["up"] @ params["down"]
      >>> turned = jw.apply(tx, params, key=jax.random.key(1))
      >>> jw.quantize.check_same_function(model, params, turned, [jnp.ones((2, 3))]) < 1e-5
      True

    Source: Ashkboos et al. 2024, arXiv:2404.00456, stages 1a to 1c.
    Differs: (1) The transform on queries and keys behind the rotary embedding, for their cache, is
      the model's to do. (2) Widths without a Hadamard matrix are turned in blocks of the largest
      power of two, see `weights.hadamard_order`; `kind="orthogonal"` mixes all of them. (3) Models
      with LayerNorm keep it, turned by matrices that keep the mean, instead of becoming RMSNorm.
    """
    folds = check_folds(_NAME, folds)
    check_spec(_NAME, spec)
    check_names(_NAME, widths=widths, online=online)
    check_flags(_NAME, inverse=inverse)
    widths, online = tuple(widths), tuple(online)
    given = check_rotations(_NAME, "rotations", rotations)
    _check_settings(spec, widths, online, kind, given)

    def update(params: Params, context: Context) -> Params:
        flat, structure = flatten(params)
        chosen = {path: leaf for path, leaf in flat.items() if path in spec.axes}
        fail(_NAME, _unfit(spec, chosen, (*widths, *online), inverse))
        if inverse:
            flat = _unwrap(flat, spec, online)
        elif folds:
            flat = fuse_flat(_NAME, folds, flat, context.layout)
        fused = _fused(folds, flat, context) if folds and not inverse else set()
        if not inverse:
            fail(_NAME, _gains(spec, flat, widths, fused, kind, folds, context))
        turns = dict(given)
        drawn = [name for name in widths if name not in given]
        if drawn:
            key: Any = context.require("key", _NAME)
            turns |= {
                name: random_rotation(path_key(key, name), spec.sizes[name], kind) for name in drawn
            }
        still = gains_of(spec, widths)  # ones by now
        turned = {path: leaf for path, leaf in flat.items() if path not in still}
        flat = flat | rotate_flat(spec, turned, turns, transposed=inverse)
        return unflatten(structure, flat if inverse else _wrap(flat, spec, online, context))

    return stateless(update, name=_NAME, moves_inputs=True)


def _check_settings(
    spec: PermutationSpec,
    widths: tuple[str, ...],
    online: tuple[str, ...],
    kind: RotationKind,
    given: dict[str, Rotation],
) -> None:
    check_kind(_NAME, kind)
    problems = [
        f"{name!r} is no width of the spec. Its widths are {nearest(name, spec.sizes)}."
        for name in (*widths, *online, *given)
        if name not in spec.sizes
    ]
    problems += [
        f"rotations[{name!r}] has size {turn.size}, but the width has {spec.sizes[name]}."
        for name, turn in given.items()
        if name in spec.sizes and turn.size != spec.sizes[name]
    ]
    problems += [
        f"rotations[{name!r}]: {name!r} is not among widths={list(widths)}. Add it there."
        for name in given
        if name in spec.sizes and name not in widths
    ]
    both = [name for name in widths if name in online]
    problems += [f"{name!r} is both in widths and in online. Leave it in one." for name in both]
    fail(_NAME, problems)


def _unfit(spec: PermutationSpec, chosen: Flat, names: tuple[str, ...], inverse: bool) -> list[str]:
    problems = [
        f"the tree has none of the leaves that carry {name!r}: {list(spec.leaves_of(name))[:5]}. "
        "Use the spec of this model."
        for name in names
        if not any(path in chosen for path in spec.leaves_of(name))
    ]
    for path, leaf in chosen.items():
        if is_weight(leaf) and not (inverse and isinstance(leaf, Rotated)):
            problems.append(
                f"{path!r}: is a {type(leaf).__name__}, and only dense weights are turned. Rotate "
                "before you quantize, or pass jaxweights.materialize(params)."
            )
        elif len(leaf.shape) != len(spec.axes[path]):
            problems.append(
                f"{path!r}: has shape {tuple(leaf.shape)}, but the spec describes "
                f"{len(spec.axes[path])} axes: {spec.axes[path]}."
            )
    return problems


def _fused(folds: Sequence[Fold], flat: Flat, context: Context) -> set[Path]:
    sites = norm_sites(_NAME, folds, flat, context.layout)
    return {path for site in sites for path in (*site.writers, *site.shifts)}


def _gains(
    spec: PermutationSpec,
    flat: Flat,
    widths: tuple[str, ...],
    fused: set[Path],
    kind: RotationKind,
    folds: Sequence[Fold],
    context: Context,
) -> list[str]:
    """Complaints about gains that would have to scale a turned width entry by entry."""
    problems = [
        f"cannot turn {name!r}: {path!r} scales it entry by entry, and no fold moves it into its "
        "readers. Add a Fold with it as the writer; where its reader is a tied head, give the head "
        "a kernel with untie_head(params, config); where the scaled stream itself goes on, as "
        "behind post-norms, leave the width out."
        for path, name in gains_of(spec, widths).items()
        if path in flat and path not in fused
    ]
    if folds and kind != "centred":
        sites = norm_sites(_NAME, folds, flat, context.layout)
        problems += [
            f"{path!r}: belongs to a LayerNorm, which subtracts the mean. kind={kind!r} would not "
            "keep it; choose kind='centred'."
            for site in sites
            for path in site.shifts
            if set(widths) & set(spec.axes.get(path) or ())
        ]
    return problems


def gains_of(spec: PermutationSpec, widths: Sequence[str]) -> dict[Path, str]:
    """Vectors that scale one of the widths, and that width: all but those called a bias."""
    gains = {}
    for path, entry in spec.axes.items():
        own = [axis for axis in entry if axis not in spec.stacks]
        parts = own[0] if len(own) == 1 and isinstance(own[0], tuple) else tuple(own)
        turned = [name for name in widths if name in parts]
        if len(own) == 1 and turned and path.rpartition("/")[2] not in _BIASES:
            gains[path] = turned[0]
    return gains


def _readers(spec: PermutationSpec, names: tuple[str, ...], path: Path, view: View) -> bool:
    entry = spec.axes.get(path, ())
    inputs = [entry[axis] for axis in view.axes.inputs] if entry else []
    parts = [p for axis in inputs for p in (axis if isinstance(axis, tuple) else (axis,))]
    return any(name in parts for name in names)


def _wrap(flat: Flat, spec: PermutationSpec, online: tuple[str, ...], context: Context) -> Flat:
    if not online:
        return flat
    new, found = dict(flat), 0
    for path, axes in context.layout.items():
        if path in flat:
            view = View.of(flat[path].shape, axes)
            if _readers(spec, online, path, view):
                new[path] = Rotated.of(flat[path], view)
                found += 1
    if not found:
        fail(
            _NAME,
            [
                f"online={list(online)}: no weight of the layout has such inputs. Pass "
                "layout=infer_layout(fn, params, *inputs)."
            ],
        )
    return new


def _unwrap(flat: Flat, spec: PermutationSpec, online: tuple[str, ...]) -> Flat:
    wrapped = lambda path, leaf: isinstance(leaf, Rotated) and path in spec.axes  # noqa: E731
    if not online:
        return flat
    return {p: leaf.materialize() if wrapped(p, leaf) else leaf for p, leaf in flat.items()}
