"""The rows of `quality_quantize.py`: each makes the parameters of a quantized model."""

from __future__ import annotations

import dataclasses
import re
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxweights as jw
from jaxweights.align import bert_permutations, llama_permutations
from jaxweights.core import flatten, unflatten
from jaxweights.models import sentence_embedding

FIXED_CODES = {"code_rate": 0.0, "scale_rate": 3e-3, "float_rate": 3e-3}

Maker = Callable[["Bench"], Any]  # parameters of the quantized model


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table."""

    make: Maker
    reads_data: bool = True


@dataclasses.dataclass
class Bench:
    """A model, its measure, and the calibration data of one draw."""

    model: Any
    measure: Any
    batches: list[tuple[np.ndarray]]
    bits: int
    group: int
    steps: int = 256
    _stats: Any = None
    _refined: Any = None

    def stats(self) -> Any:
        """Statistics of the float model, collected once a draw for all rows."""
        if self._stats is None:
            wanted: dict[str, frozenset[str]] = {}
            for tx in (jw.quantize.gptq(bits=4), jw.quantize.awq()):
                for path, names in tx.needs(self.model.params).items():
                    wanted[path] = wanted.get(path, frozenset()) | names
            self._stats = jw.calibrate(
                self.model.forward, self.model.params, self.batches, needs=wanted
            )
        return self._stats

    def folds(self) -> Any:
        """Who may take over the scales of whom."""
        config = self.model.pretrained.config
        q = jw.quantize
        return q.llama_folds(config) if self.model.is_decoder else q.bert_folds(config)

    def apply(self, tx: jw.Transform) -> Any:
        """One transform, with the statistics of the float model."""
        return jw.apply(tx, self.model.params, stats=self.stats())

    def refined(self) -> Any:
        """GPTQ in order of activity, searched and refined, made once a draw."""
        if self._refined is None:
            self._refined = self.apply(refined_gptq(self.bits, self.group))
        return self._refined

    def matrices(self) -> list[Any]:
        """What is quantized, `(*stack, in, out)`."""
        flat, _ = flatten(self.model.params)
        return [leaf for path, leaf in flat.items() if path.endswith("/kernel")]

    def in_blocks(self, *stages: jw.Transform) -> Any:
        """Stages, each layer calibrated on what the layers before it, already done, give."""
        return jw.pipeline(
            self.model.forward, self.model.params, self.batches, stages, block_by_block=True
        )


def rows(bits: int, group: int) -> dict[str, Row]:
    """The table, a line a row."""
    q = jw.quantize
    at: dict[str, Any] = {"bits": bits, "group_size": group, "scale_dtype": "float16"}
    at |= {"pad": "zero"}  # SmolLM2's 576 inputs are 4.5 groups of 128
    rtn, gptq = q.round_to_nearest, q.gptq
    ordered = {"act_order": True, "static_groups": True}
    searched = ordered | {"search": "mse"}
    best = refined_gptq(bits, group)
    return {
        "rounded": Row(lambda b: b.apply(rtn(grid="affine", **at)), False),
        "rounded, symmetric": Row(lambda b: b.apply(rtn(**at)), False),
        "rounded, mse": Row(lambda b: b.apply(rtn(grid="affine", search="mse", **at)), False),
        "gptq, its authors' code": Row(_authors_gptq),
        "gptq, as its authors' code": Row(lambda b: b.apply(gptq(compat=True, **at))),
        "gptq": Row(lambda b: b.apply(gptq(**at))),
        "gptq, ordered": Row(lambda b: b.apply(gptq(**ordered, **at))),
        "gptq, ordered, mse": Row(lambda b: b.apply(gptq(**searched, **at))),
        "gptq, blocks": Row(lambda b: b.in_blocks(gptq(**at))),
        "awq, its authors' code": Row(_authors_awq),
        "awq": Row(lambda b: b.apply(q.awq(**at))),
        "awq, folded": Row(lambda b: b.apply(q.awq(folds=b.folds(), **at))),
        "rounded, refined": Row(
            lambda b: b.apply(q.refine(rtn(grid="affine", search="mse", **at), sweeps=8))
        ),
        "hqq": Row(lambda b: b.apply(q.hqq(**at)), False),
        "adaround": Row(lambda b: b.apply(q.adaround(**at))),
        "adaround, 250 steps": Row(
            lambda b: b.apply(q.adaround(steps=250, learning_rate=0.1, **at))
        ),
        "auto_round": Row(lambda b: b.apply(q.auto_round(**at))),
        "learned_clip": Row(lambda b: b.apply(q.learned_clip(**at))),
        "nupes": Row(lambda b: b.apply(q.nupes(**at))),
        "nupes, mse, 250 steps": Row(lambda b: b.apply(q.nupes(steps=250, search="mse", **at))),
        "adadim": Row(lambda b: b.apply(q.adadim(**at))),
        "adadim, gptq": Row(lambda b: b.apply(q.adadim(method="gptq", **at))),
        "rotated, gptq": Row(lambda b: _rotated(b).apply(gptq(**at))),
        "rotated, gptq, refined": Row(lambda b: _rotated(b).apply(best)),
        "gptq, refined": Row(Bench.refined),
        "gptq, refined, blocks": Row(lambda b: b.in_blocks(best)),
        "gptq + rank 4": Row(lambda b: b.apply(q.low_rank_residual(gptq(**at), rank=4))),
        "gptq + 0.5 % outliers + rank 4": Row(
            lambda b: b.apply(q.joint(gptq(**at), rank=4, outliers=0.005, sweeps=2))
        ),
        "allocated, refined": Row(_allocated),
        "gptq, refined, scales distilled": Row(lambda b: _distilled(b, b.refined(), **FIXED_CODES)),
        "gptq, refined, distilled": Row(lambda b: _distilled(b, b.refined())),
        "allocated, refined, distilled": Row(lambda b: _distilled(b, _allocated(b))),
    }


def refined_gptq(bits: int, group: int) -> jw.Transform:
    """The best of one pass over the layers, in the bytes of plain GPTQ."""
    settings: dict[str, Any] = {"act_order": True, "static_groups": True, "search": "mse"}
    settings |= {"group_size": group, "pad": "zero", "scale_dtype": "float16"}
    return jw.quantize.refine(jw.quantize.gptq(bits=bits, **settings))


def _rotated(bench: Bench) -> Bench:
    """The same function with values turned and, as it runs, the inputs of `down`.

    Residual streams stay: an encoder's norms stand in the way of turning them, and a decoder whose
    head is its embedding would need a head of its own for it.
    """
    pretrained = bench.model.pretrained
    names = llama_permutations if bench.model.is_decoder else bert_permutations
    tx = jw.quantize.rotate(names(pretrained.config), widths=["values"], online=["mlp"])
    layout = jw.infer_layout(bench.model.forward, pretrained.params, bench.batches[0][0])
    turned = jw.apply(tx, pretrained.params, key=jax.random.key(0), layout=layout)
    pretrained = dataclasses.replace(pretrained, params=turned)
    model = dataclasses.replace(bench.model, pretrained=pretrained)
    return Bench(model, bench.measure, bench.batches, bench.bits, bench.group)


def _allocated(bench: Bench) -> Any:
    """Refined GPTQ, a bit less or more for each kind of matrix, in the bytes of plain GPTQ."""
    q, group = jw.quantize, bench.group
    candidates = {
        f"{bits} bits": refined_gptq(bits, group)
        for bits in range(max(bench.bits - 1, 2), bench.bits + 2)
    }
    # Codes, and for each group a scale of 16 bits and a zero point as wide as a code.
    matrices = bench.matrices()
    scales = sum(leaf.size // leaf.shape[-2] * -(-leaf.shape[-2] // group) for leaf in matrices)
    each = bench.bits + (16 + bench.bits) * scales / sum(leaf.size for leaf in matrices)
    found = q.allocate(
        bench.model.params,
        candidates,
        bits_per_weight=each,
        size="packed",
        stats=bench.stats(),
    )
    print(found, file=sys.stderr)
    return bench.apply(found.transform)


def _distilled(bench: Bench, params: Any, **rates: float) -> Any:
    """Trained on the calibration batches to give the float model's outputs, in the same bytes."""
    return jw.quantize.distill(
        bench.model.forward,
        bench.model.params,
        params,
        bench.batches,
        loss="divergence" if bench.model.is_decoder else _encoder_loss,
        steps=bench.steps,
        **rates,
    ).params


def _encoder_loss(hidden: jax.Array, target: jax.Array) -> jax.Array:
    """Relative squared error of the encodings, and what the sentences' cosines lack to 1."""
    error = jnp.mean(jnp.square(hidden - target)) / jnp.mean(jnp.square(target))
    cosine = jnp.sum(sentence_embedding(hidden) * sentence_embedding(target), axis=-1)
    return error + jnp.mean(1 - cosine)


def _authors_gptq(bench: Bench) -> Any:
    from authors_quantizers import gptq

    def one(path: str, weight: np.ndarray, place: tuple[int, ...]) -> np.ndarray:
        gram = np.asarray(bench.stats().get(path, "gram"))[place]
        return gptq(weight, gram, bits=bench.bits, group=bench.group)

    return _by_matrix(bench, one)


def _authors_awq(bench: Bench) -> Any:
    """Each matrix with a scale of its own, as our `awq` without folds."""
    from authors_quantizers import awq

    def one(path: str, weight: np.ndarray, place: tuple[int, ...]) -> np.ndarray:
        gram, total, count = (
            np.asarray(bench.stats().get(path, name))[place]
            for name in ("gram", "abs_sum", "count")
        )
        clip = [not re.search("/[qk]/", path)]
        mean = (total / count).astype(np.float32)
        return awq([weight], gram, mean, bits=bench.bits, group=bench.group, clip=clip)[0]

    return _by_matrix(bench, one)


def _by_matrix(bench: Bench, fn: Callable[..., np.ndarray]) -> Any:
    """Dense weights, each matrix of each stack by a function of path, weight and place."""
    flat, structure = flatten(bench.model.params)
    for path in [path for path in flat if path.endswith("/kernel")]:
        stack = np.array(flat[path])
        for i in range(len(stack)):
            stack[i] = fn(path, stack[i], (i,))
        flat[path] = jnp.asarray(stack)
    return unflatten(structure, flat)
