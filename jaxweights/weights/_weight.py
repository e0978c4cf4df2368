"""The contract of a represented weight."""

from __future__ import annotations

import abc
import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jaxweights.weights._axes import View
from jaxweights.weights._show import show_weight

W = TypeVar("W", bound=type)

_USE_LIFT = (
    "Call the model through jaxweights.lift(fn)(params, ...), which lets any function take "
    "represented weights, or make the tree dense with jaxweights.materialize(params)."
)


class Weight(abc.ABC):
    """A weight that is not a dense array: a small frozen pytree that stands for one.

    Subclasses are frozen dataclasses registered with `jax.tree_util.register_dataclass`, whose
    array fields all carry the stack axes first, so that slicing every field along axis 0 slices
    the weight. Methods that return None say "there is no cheap way": the caller materialises.
    """

    # Dtype of the dense weight: a static field in some classes, a property in others.
    dtype: Any

    # `x @ weight` on an array must never silently densify, nor numpy wrap the weight in an object.
    __array_ufunc__ = None

    def __repr__(self) -> str:
        return show_weight(self)

    def _refuse_use_as_array(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError(f"{self!r} was used as an array. {_USE_LIFT}")

    if not TYPE_CHECKING:  # for those who forgot `lift`; a checker finds them by itself
        __array__ = __jax_array__ = __getitem__ = __neg__ = _refuse_use_as_array
        __matmul__ = __rmatmul__ = __mul__ = __rmul__ = _refuse_use_as_array
        __add__ = __radd__ = __sub__ = __rsub__ = _refuse_use_as_array
        __truediv__ = __rtruediv__ = __pow__ = _refuse_use_as_array

        def __getattr__(self, name: str) -> NoReturn:
            words = f"{type(self).__name__!r} object has no attribute {name!r}"
            if not name.startswith("_") and hasattr(jax.Array, name):
                words += f", which arrays have. {_USE_LIFT}"
            raise AttributeError(words, name=name, obj=self)

    @property
    @abc.abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""

    @abc.abstractmethod
    def materialize(self) -> jax.Array:
        """The dense weight, of `shape` and `dtype`."""

    @property
    def ndim(self) -> int:
        """Rank of the dense weight."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of entries of the dense weight."""
        return math.prod(self.shape)

    @property
    def stack_shape(self) -> tuple[int, ...]:
        """Lengths of the leading axes that may be sliced away together with every field."""
        return ()

    @property
    def is_part(self) -> bool:
        """Whether what is recorded of its products is told of a larger weight."""
        return False

    def tracked(self) -> Weight:
        """The same weight, whose parts will know where in it they lie, if it keeps records."""
        return self

    def astype(self, dtype: DTypeLike) -> Weight | None:
        """The weight that materialises to another dtype."""
        del dtype
        return None

    def dot(
        self,
        x: jax.Array,
        dimension_numbers: tuple[Any, Any],
        *,
        precision: Any = None,
        preferred_element_type: DTypeLike | None = None,
    ) -> jax.Array | None:
        """`jax.lax.dot_general(x, weight, dimension_numbers)` without the dense weight."""
        del x, dimension_numbers, precision, preferred_element_type
        return None

    def conv(self, x: jax.Array, **params: Any) -> jax.Array | None:
        """`jax.lax.conv_general_dilated(x, weight, **params)` without the dense weight."""
        del x, params
        return None

    def take(self, indices: jax.Array) -> jax.Array | None:
        """Entries `indices` of axis 0, as `jnp.take(weight, indices, axis=0)` gives them."""
        del indices
        return None

    def transpose(self, permutation: Sequence[int]) -> Weight | None:
        """The weight with its axes permuted."""
        del permutation
        return None

    def reshape(self, shape: Sequence[int]) -> Weight | None:
        """The weight in another shape."""
        del shape
        return None

    def ragged_dot(self, x: jax.Array, group_sizes: jax.Array, **options: Any) -> jax.Array | None:
        """`jax.lax.ragged_dot(x, weight, group_sizes)` for a weight `(groups, in, out)`."""
        del x, group_sizes, options
        return None

    def partition(self, spec: Any, mesh: Any) -> Any:
        """Partition specs of the fields, as a pytree like the weight, for a spec of the weight."""
        del spec, mesh
        return None

    def as_part(self, shape: tuple[int, ...]) -> Weight:
        """Called once on one device's part, whose dense shape is `shape`, after `partition`.

        A `view` takes over its lengths, and a represented `base`, which has the same shape.
        """
        base, view = getattr(self, "base", None), getattr(self, "view", None)
        changes: dict[str, Any] = {} if view is None else {"view": View.of(shape, view.axes)}
        if isinstance(base, Weight):
            changes["base"] = base.as_part(shape)
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]

    def slice_stack(self, start: Any, size: int, stride: int = 1) -> Weight | None:
        """Matrices `start, start + stride, ...` of the leading stack axis; maybe traced."""
        if not self.stack_shape:
            return None
        if isinstance(start, int):
            return jax.tree.map(lambda field: field[start : start + size * stride : stride], self)
        return jax.tree.map(
            lambda field: jax.lax.dynamic_slice_in_dim(field, start, size, axis=0), self
        )

    def take_stack(self, indices: jax.Array) -> Weight | None:
        """Matrices `indices` `(n,)` of the leading stack axis; none of them out of range."""
        if not self.stack_shape:
            return None
        return jax.tree.map(lambda field: jnp.take(field, indices, axis=0, mode="clip"), self)

    def reshape_stack(self, shape: Sequence[int]) -> Weight | None:
        """The weight with other leading stack axes of the same size; None where more changes."""
        leading = len(self.stack_shape)
        rest = self.shape[leading:]
        split = len(shape) - len(rest)
        if not leading or split < 0 or tuple(shape[split:]) != rest:
            return None
        stack = tuple(shape[:split])
        return jax.tree.map(lambda field: field.reshape(*stack, *field.shape[leading:]), self)

    def squeeze_stack(self) -> Weight | None:
        """The only matrix of a leading stack axis of length 1."""
        return jax.tree.map(lambda field: field[0], self).unstacked() if self.stack_shape else None

    def unstacked(self) -> Weight:
        """Called once on every slice after axis 0 was taken away from all fields, base included."""
        base = getattr(self, "base", None)
        if not isinstance(base, Weight):
            return self
        return dataclasses.replace(self, base=base.unstacked())  # type: ignore[type-var]


def is_weight(x: object) -> bool:
    """Tells whether `x` is a represented weight, such as for the `is_leaf` of `jax.tree.map`.

    Args:
      x: Anything.

    Returns:
      Whether it is a `Weight`.

    Example:
      >>> is_weight(jnp.ones(2))
      False
    """
    return isinstance(x, Weight)


def materialize(tree: Any) -> Any:
    """Replaces every represented weight of a tree by its dense array.

    Args:
      tree: Any pytree.

    Returns:
      The tree with arrays in place of represented weights; other leaves as they are.

    Example:
      >>> materialize({"kernel": jnp.ones((2, 2))})["kernel"].shape
      (2, 2)
    """
    return jax.tree.map(lambda x: x.materialize() if is_weight(x) else x, tree, is_leaf=is_weight)


def static(default: Any = dataclasses.MISSING) -> Any:
    """Declares a field of a `weight_dataclass` that is metadata of the pytree, not an array.

    Args:
      default: Its default value; without one it has to be given. Hashable, as `jit` compares it.

    Returns:
      The field.

    Example:
      >>> @weight_dataclass
      ... class Zeros(Weight):
      ...     lengths: tuple[int, ...] = static()
      ...     dtype: Any = static(jnp.dtype(jnp.float32))
      ...     @property
      ...     def shape(self):
      ...         return self.lengths
      ...     def materialize(self):
      ...         return jnp.zeros(self.lengths, self.dtype)
      >>> jax.tree.leaves(Zeros((2, 3)))
      []
    """
    return dataclasses.field(default=default, metadata={"static": True})


@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, static))
def weight_dataclass(cls: W) -> W:
    """Makes a class a frozen dataclass that is a pytree: a representation of your own.

    Args:
      cls: A subclass of `Weight` that defines `shape` and `materialize`, and may define `dot`.
        Its fields are arrays or trees of them, or metadata where they are declared by `static`.

    Returns:
      The class, registered with JAX.

    Example:
      >>> import jaxweights as jw
      >>> @weight_dataclass
      ... class Diagonal(Weight):
      ...     entries: jax.Array
      ...     dtype: Any = static(jnp.dtype(jnp.float32))
      ...     @property
      ...     def shape(self):
      ...         return 2 * self.entries.shape
      ...     def materialize(self):
      ...         return jnp.diag(self.entries).astype(self.dtype)
      >>> model = lambda params, x: x @ params["kernel"]
      >>> jw.lift(model)({"kernel": Diagonal(jnp.array([1.0, 2.0]))}, jnp.ones((1, 2)))
      Array([[1., 2.]], dtype=float32)
    """
    cls = dataclasses.dataclass(frozen=True, repr=False)(cls)
    return jax.tree_util.register_dataclass(cls)
