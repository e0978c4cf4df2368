"""Every public transform, by one line: the contract suite runs over this list."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

import jaxweights as jw


@dataclasses.dataclass(frozen=True)
class Case:
    """One transform under contract.

    Args:
      name: Family and factory, such as `sparsify.wanda`; a suffix tells variants apart.
      make: Builds the transform.
      models: Other models that it reads.
      keyed: Whether it draws random numbers.
      elementwise: Whether it promises to compile to no collective on a tree whose outputs are
        sharded. Methods that rank whole columns search until every column is done, which the
        devices have to tell each other.
      per_slice: Whether a stack is transformed as its slices are (not so for global thresholds
        and for random draws, which differ between slices).
      traceable: Whether it may be traced. A method that chooses shapes by the data may not.
      noise: Multiplies the tolerances for rounding, where it is magnified: singular vectors of
        neighbouring singular values turn into each other by far more than the rounding of their
        matrix; and a delta as large as its base may cancel it.
    """

    name: str
    make: Callable[[], jw.Transform]
    models: int = 0
    keyed: bool = False
    elementwise: bool = False
    per_slice: bool = True
    traceable: bool = True
    noise: float = 1


_Q, _S, _A, _M = jw.quantize, jw.sparsify, jw.adapt, jw.merge


def _permute() -> jw.Transform:
    """Reverses the inputs of two kernels, which are nobody's outputs here."""
    axes = {"dense/kernel": ("units", None), "stack/kernel": (None, "units", None)}
    spec = jw.align.PermutationSpec(axes, sizes={"units": 32})
    return jw.align.permute(spec, {"units": jnp.arange(32)[::-1]})


def _rotate() -> jw.Transform:
    """Turns the inputs of two kernels, which are nobody's outputs here."""
    axes = {"dense/kernel": ("units", None), "stack/kernel": (None, "units", None)}
    return _Q.rotate(jw.align.PermutationSpec(axes, sizes={"units": 32}), widths=["units"])


def _regmean() -> jw.Transform:
    """With Gram matrices of its own, one per model; all layers of the stack see the same inputs."""
    stats = []
    for i in range(2):
        x = jax.random.normal(jax.random.key(i), (64, 32)).at[:, 0].mul(4.0)
        one = {"gram": x.T @ x, "count": jnp.asarray(64, jnp.int32)}
        three = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), one)
        stats.append(
            jw.Stats({"attention/kernel": one, "dense/kernel": one, "stack/kernel": three})
        )
    return _M.regmean(stats=stats)


def _fisher() -> jw.Transform:
    """With Fisher information of its own, one tree per model."""
    sizes = {"attention/kernel": (32, 4, 8), "dense/kernel": (32, 16), "dense/bias": (16,)}
    trees = []
    for i in range(2):
        one = {p: jnp.square(jax.random.normal(jax.random.key(i), n)) for p, n in sizes.items()}
        trees.append(one | {"stack/kernel": jnp.stack([one["dense/kernel"]] * 3)})
    return _M.fisher(fishers=trees)


# What they need, a norm before the matrices, the tree of the contract lacks; they keep the promises
# in their own tests.
TESTED_APART = {"quantize.fuse_norms", "quantize.outlier_tune"}

CASES = [
    Case("align.permute", _permute, elementwise=True),
    Case(
        "quantize.round_to_nearest",
        lambda: _Q.round_to_nearest(bits=4, group_size=8),
        elementwise=True,
    ),
    Case(
        "quantize.round_to_nearest short",
        lambda: _Q.round_to_nearest(bits=4, group_size=12, pad="zero"),
    ),
    Case("quantize.round_to_nearest int8", lambda: _Q.round_to_nearest(bits=8), elementwise=True),
    Case("quantize.round_to_nearest affine", lambda: _Q.round_to_nearest(bits=3, grid="affine")),
    Case("quantize.nf4", lambda: _Q.nf4(group_size=16), elementwise=True),
    Case("quantize.nf4 double", lambda: _Q.nf4(group_size=8, double_quantization=True)),
    Case("quantize.fp4", lambda: _Q.fp4(group_size=None), elementwise=True),
    Case("quantize.fp8", _Q.fp8, elementwise=True),
    Case("quantize.fp8 tiles", lambda: _Q.fp8(element="e5m2", group_size=(16, 4))),
    Case("quantize.mx", lambda: _Q.mx(element="e4m3"), elementwise=True),
    Case("quantize.mx e2m1", lambda: _Q.mx(element="e2m1"), elementwise=True),
    Case("quantize.mx e3m2", lambda: _Q.mx(element="e3m2", scale_rule="oas"), elementwise=True),
    Case("quantize.nvfp4", _Q.nvfp4),
    Case("quantize.nvfp4 layer", lambda: _Q.nvfp4(scope="layer"), per_slice=False),
    Case("quantize.hqq", lambda: _Q.hqq(bits=3, group_size=8, steps=5), noise=5),
    Case("quantize.hqq short", lambda: _Q.hqq(bits=3, group_size=12, pad="zero"), noise=5),
    Case("quantize.power", lambda: _Q.power(bits=4), per_slice=False),
    Case("quantize.power fixed", lambda: _Q.power(bits=3, exponents=[0.7]), elementwise=True),
    Case("quantize.power leaf", lambda: _Q.power(bits=4, group_size=8, scope="leaf")),
    Case(
        "quantize.round_to_nearest rms",
        lambda: _Q.round_to_nearest(bits=4, group_size=8, search=("rms", 2.5)),
        elementwise=True,
    ),
    Case("quantize.gptq", lambda: _Q.gptq(bits=4, group_size=8)),
    Case("quantize.gptq short", lambda: _Q.gptq(bits=4, group_size=12, pad="zero")),
    Case("quantize.gptq ordered", lambda: _Q.gptq(bits=3, act_order=True, static_groups=True)),
    Case("quantize.gptq errors", lambda: _Q.gptq(bits=4, error_propagation=0.5)),
    Case("quantize.gptq asymmetric", lambda: _Q.gptq(bits=4, asymmetric_calibration=0.25)),
    Case("quantize.gptq groups", lambda: _Q.gptq(bits=4, group_size=8, act_order="groups")),
    Case("quantize.gptq nf4", lambda: _Q.gptq(bits=4, grid="nf4", group_size=8)),
    Case("quantize.gptq columns", lambda: _Q.gptq(bits=4, group_size=4, group_axis="output")),
    Case(
        "quantize.adadim",
        lambda: _Q.adadim(bits=3, group_size=8),
        per_slice=False,
        traceable=False,
    ),
    Case("quantize.adaround", lambda: _Q.adaround(bits=3, steps=20, learning_rate=0.1)),
    Case("quantize.auto_round", lambda: _Q.auto_round(bits=3, group_size=16, steps=5)),
    Case(
        "quantize.auto_round short",
        lambda: _Q.auto_round(bits=3, group_size=12, pad="zero", steps=5),
    ),
    Case("quantize.learned_clip", lambda: _Q.learned_clip(bits=3, group_size=16, steps=5)),
    Case("quantize.nupes", lambda: _Q.nupes(bits=3, steps=5, learning_rate=0.1)),
    Case("quantize.ternary", _Q.ternary),
    Case("quantize.ternary trits", lambda: _Q.ternary(share="output", per_byte=5)),
    Case("quantize.ternary output", lambda: _Q.ternary(share="output", scale="least_squares")),
    Case("quantize.binary", _Q.binary),
    Case(
        "quantize.stochastic_rounding",
        lambda: _Q.stochastic_rounding(bits=4),
        keyed=True,
        per_slice=False,
    ),
    Case("quantize.int8_dynamic", _Q.int8_dynamic),
    Case("quantize.int8_dynamic groups", lambda: _Q.int8_dynamic(bits=4, group_size=8)),
    Case("quantize.int8_static", lambda: _Q.int8_static(bits=4)),
    Case("quantize.fp8_dynamic", _Q.fp8_dynamic),
    Case(
        "quantize.fp8_dynamic tiles", lambda: _Q.fp8_dynamic(group_size=(16, 4), input_group_size=8)
    ),
    Case("quantize.fp8_static", _Q.fp8_static),
    Case(
        "quantize.round_inputs nvfp4",
        lambda: jw.chain(_Q.nvfp4(), _Q.round_inputs(form="nvfp4")),
    ),
    Case(
        "quantize.round_inputs mxfp8",
        lambda: jw.chain(_Q.mx(element="e2m1"), _Q.round_inputs(form="mxfp8")),
    ),
    Case("quantize.statsq", lambda: _Q.statsq(bits=2)),
    Case("quantize.lsq", lambda: _Q.lsq(bits=3)),
    Case("quantize.lsq groups", lambda: _Q.lsq(bits=2, group_size=8)),
    Case("quantize.lsq short", lambda: _Q.lsq(bits=2, group_size=12, pad="zero")),
    Case("quantize.smooth", _Q.smooth),
    Case("quantize.refine", lambda: _Q.refine(_Q.gptq(bits=3, group_size=8), sweeps=2), noise=5),
    Case("quantize.rotate", _rotate, keyed=True, noise=5),
    Case("quantize.loftq", lambda: _Q.loftq(_Q.round_to_nearest(bits=4), rank=2, iterations=2)),
    Case(
        "quantize.low_rank_residual",
        lambda: _Q.low_rank_residual(_Q.gptq(bits=3, group_size=8), rank=2),
    ),
    Case(
        "quantize.joint",
        lambda: _Q.joint(
            _Q.round_to_nearest(bits=3), rank=2, outliers=0.02, sweeps=2, dtype=jnp.float32
        ),
        noise=5,
    ),
    Case("quantize.awq", lambda: _Q.awq(bits=4, group_size=8)),
    Case(
        "quantize.awq diagonal",
        lambda: _Q.awq(bits=3, group_size=16, moments="second_moment", duo="both"),
    ),
    Case("sparsify.magnitude", lambda: _S.magnitude(sparsity=0.5)),
    Case("sparsify.magnitude output", lambda: _S.magnitude(sparsity=0.5, group="output")),
    Case("sparsify.magnitude 2:4", lambda: _S.magnitude(keep=2, of=4), elementwise=True),
    Case(
        "sparsify.magnitude global",
        lambda: _S.magnitude(sparsity=0.5, group="global"),
        per_slice=False,
    ),
    Case("sparsify.magnitude dense", lambda: _S.magnitude(sparsity=0.5, form="dense")),
    Case("sparsify.wanda", lambda: _S.wanda(sparsity=0.5)),
    Case("sparsify.wanda 2:4", lambda: _S.wanda(keep=2, of=4), elementwise=True),
    Case("adapt.lora", lambda: _A.lora(rank=3), keyed=True, per_slice=False),
    Case("adapt.truncate", lambda: _A.truncate(rank=3), noise=50),
    Case("adapt.truncate dense", lambda: _A.truncate(energy=0.9, form="dense"), noise=50),
    Case("adapt.rslora", lambda: _A.rslora(rank=3), keyed=True, per_slice=False),
    Case("merge.mean", _M.mean, models=2, elementwise=True),
    Case("merge.task_arithmetic", _M.task_arithmetic, models=2, elementwise=True),
    Case("merge.delta_merge", _M.delta_merge, models=2, elementwise=True),
    Case("merge.ties", lambda: _M.ties(density=0.5, scope="leaf"), models=2, per_slice=False),
    Case("merge.ties tree", lambda: _M.ties(density=0.5, scope="tree"), models=2, per_slice=False),
    Case(
        "merge.dare_linear",
        lambda: _M.dare_linear(density=0.5),
        models=2,
        keyed=True,
        per_slice=False,
    ),
    Case(
        "merge.dare_ties", lambda: _M.dare_ties(density=0.5), models=2, keyed=True, per_slice=False
    ),
    Case(
        "merge.breadcrumbs",
        lambda: _M.breadcrumbs(density=0.7, outliers=0.05),
        models=2,
        per_slice=False,
    ),
    Case(
        "merge.breadcrumbs_ties",
        lambda: _M.breadcrumbs_ties(density=0.7, outliers=0.05),
        models=2,
        per_slice=False,
    ),
    Case("merge.regmean", _regmean, models=2),
    Case("merge.fisher", _fisher, models=2),
    Case("merge.ema", lambda: _M.ema(decay=0.5), models=2, elementwise=True),
    Case("merge.lawa", lambda: _M.lawa(last=2), models=2, elementwise=True),
    Case("merge.interpolate", lambda: _M.interpolate(alpha=0.3), models=1, elementwise=True),
    Case("merge.tsv", _M.tsv, models=2),
    Case("merge.iso_c", _M.iso_c, models=2),
    Case("merge.iso_cts", _M.iso_cts, models=2, noise=50),
    Case("merge.slerp", lambda: _M.slerp(t=0.3), models=1),
    Case("merge.nuslerp", lambda: _M.nuslerp(weights=[1, 2]), models=2),
    Case("merge.nuslerp deltas", lambda: _M.nuslerp(deltas=True, group="output"), models=2),
    Case("merge.karcher", _M.karcher, models=2),
    Case("merge.multislerp", _M.multislerp, models=2),
    Case("merge.model_stock", _M.model_stock, models=2, noise=5),
    Case("merge.nearswap", lambda: _M.nearswap(t=0.5), models=1, elementwise=True),
    Case("merge.arcee_fusion", _M.arcee_fusion, models=1),
    Case("merge.ram", _M.ram, models=2, elementwise=True),
    Case("merge.ram_plus", _M.ram_plus, models=2),
    Case("merge.sce", lambda: _M.sce(density=0.5), models=2, noise=5),
    Case("merge.della", lambda: _M.della(density=0.5), models=2, keyed=True, per_slice=False),
    Case("merge.della_linear", _M.della_linear, models=2, keyed=True, per_slice=False),
    Case("merge.breadcrumbs row", lambda: _M.breadcrumbs(density=0.5, scope="row"), models=2),
    Case("merge.pcb", _M.pcb, models=2, per_slice=False, noise=5),
    Case("merge.pcb leaf", lambda: _M.pcb(scope="leaf"), models=2, noise=5),
]
