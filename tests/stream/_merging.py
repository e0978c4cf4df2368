"""Checkpoints of stacked, convolved and flat tensors, merged by slices and in memory."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxweights as jw
from jaxweights.checkpoint import open_checkpoint, write_safetensors
from jaxweights.stream import transform_checkpoint
from jaxweights.stream._jobs import Operand
from jaxweights.stream._transform import transform_job

# Rows and columns of the matrices, layers of the stacks, and a vector.
SHAPES = {
    "a.kernel": (60, 50),
    "b.kernel": (3, 40, 30),
    "c.kernel": (2, 5, 8, 30),
    "d.bias": (33,),
}
LAYOUT = {
    "a.kernel": jw.Axes(inputs=(-1,), outputs=(-2,)),
    "b.kernel": jw.Axes(),
    "c.kernel": jw.Axes(inputs=(-3, -2), outputs=(-1,)),
}


def trees(count, dtype=np.float32, size=0.02):
    """A base and fine-tunes of it."""
    draws = [np.random.default_rng(i) for i in range(count + 1)]
    base = {n: draws[0].normal(size=s).astype(np.float32) for n, s in SHAPES.items()}
    tuned = [{n: x + size * d.normal(size=x.shape) for n, x in base.items()} for d in draws[1:]]
    return [{n: x.astype(dtype) for n, x in tree.items()} for tree in (base, *tuned)]


def streamed(folder, tx, given, **options):
    """What a stream makes of checkpoints of them."""
    for i, tree in enumerate(given):
        write_safetensors(folder / str(i), tree)
    models = [folder / str(i) for i in range(1, len(given))]
    options = {"layout": LAYOUT} | options
    transform_checkpoint(tx, folder / "0", folder / "out", models=models, **options)
    return dict(open_checkpoint(folder / "out").items())


def in_memory(tx, given, key=0, layout=None):
    """What `apply` makes of them."""
    base, *models = [jax.tree.map(jnp.asarray, tree) for tree in given]
    layout = LAYOUT if layout is None else layout
    merged = jw.apply(tx, base, models=models, layout=layout, key=jax.random.key(key))
    return {name: np.asarray(x) for name, x in merged.items()}


class Shape:
    """Reads like a checkpoint whose only tensor nobody needs to read."""

    def __init__(self, shape, dtype):
        self._shape, self._dtype = shape, np.dtype(dtype)

    def shape(self, name):
        return self._shape

    def dtype(self, name):
        return self._dtype


def job_of(tx, shape, models, dtype, axes):
    """The job that merges a tensor of some shape."""
    operands = [Operand(Shape(shape, dtype), "w", str(i)) for i in range(models + 1)]
    layout = None if axes is None else {"w": axes}
    return transform_job("w", operands, tx, dtype=np.dtype(dtype), layout=layout)
