"""GPTQ and AWQ as their authors run them, in plain torch, for the quality benchmark.

Both take the weights and the Gram matrices that our own methods take, so that only the algorithm
differs, and return the dequantized weights, `(in, out)` as ours.
"""

from __future__ import annotations

import numpy as np
import torch

# Columns are small work: threads would wait for each other more than they work.
torch.set_num_threads(1)


def affine(rows: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point of groups along the last axis, as both codes find them."""
    low = torch.minimum(rows.amin(-1, keepdim=True), torch.zeros(()))
    high = torch.maximum(rows.amax(-1, keepdim=True), torch.zeros(()))
    scale = ((high - low) / (2**bits - 1)).clamp_min(1e-9).half().float()
    return scale, torch.round(-low / scale).clamp(0, 2**bits - 1)


def rounded(rows: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int) -> torch.Tensor:
    """Nearest levels."""
    return scale * ((torch.round(rows / scale) + zero).clamp(0, 2**bits - 1) - zero)


def gptq(weight: np.ndarray, gram: np.ndarray, *, bits: int, group: int) -> np.ndarray:
    """IST-DASLab/gptq `fasterquant`: percdamp 0.01, blocks of 128, moving groups, no order."""
    weight, hessian = torch.tensor(weight.T), torch.tensor(gram)
    columns = weight.shape[1]
    dead = torch.diag(hessian) == 0
    hessian[dead, dead] = 1
    weight[:, dead] = 0
    hessian += 0.01 * torch.mean(torch.diag(hessian)) * torch.eye(columns)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    inverse = torch.linalg.cholesky(inverse, upper=True)
    result = torch.zeros_like(weight)
    for start in range(0, columns, 128):
        stop = min(start + 128, columns)
        block = weight[:, start:stop].clone()
        errors = torch.zeros_like(block)
        within = inverse[start:stop, start:stop]
        for i in range(stop - start):
            if (start + i) % group == 0:
                scale, zero = affine(weight[:, start + i : start + i + group], bits)
            column = block[:, i]
            level = rounded(column[:, None], scale, zero, bits)[:, 0]
            result[:, start + i] = level
            error = (column - level) / within[i, i]
            block[:, i:] -= error[:, None] * within[i, i:][None]
            errors[:, i] = error
        weight[:, stop:] -= errors @ inverse[start:stop, stop:]
    return result.T.numpy()


def awq(
    weights: list[np.ndarray],
    gram: np.ndarray,
    mean_abs: np.ndarray,
    *,
    bits: int,
    group: int,
    clip: list[bool],
) -> list[np.ndarray]:
    """llm-awq's `auto_scale_block` and `auto_clip_layer` for weights that read one input.

    Candidates are judged by the change of the weights' own outputs, from the Gram matrix. A last
    group that is shorter, which the authors' code refuses, is filled up with zeros.
    """
    hessian = torch.tensor(gram)
    rows = [torch.tensor(weight.T) for weight in weights]
    importance = torch.tensor(mean_abs)

    def round_groups(weight: torch.Tensor) -> torch.Tensor:
        groups = _groups(weight, group)
        levels = rounded(groups, *affine(groups, bits), bits)
        return levels.reshape(len(weight), -1)[:, : weight.shape[1]]

    best, scale = np.inf, torch.ones_like(importance)
    for step in range(20):
        trial = importance.pow(step / 20).clamp(min=1e-4)
        trial = trial / (trial.max() * trial.min()).sqrt()
        loss = 0.0
        for weight in rows:
            change = round_groups(weight * trial) / trial - weight
            loss += float(((change @ hessian) * change).sum())
        if loss < best:
            best, scale = loss, trial
    hessian = hessian / scale[:, None] / scale[None]
    result = []
    for weight, clipped in zip(rows, clip, strict=True):
        scaled = weight * scale
        if clipped:
            scaled = _clip(scaled, hessian, bits, group)
        result.append((round_groups(scaled) / scale).T.numpy())
    return result


def _clip(weight: torch.Tensor, hessian: torch.Tensor, bits: int, group: int) -> torch.Tensor:
    """Groups clamped to the range, of ten down to half, whose own output changes least."""
    groups, columns = _groups(weight, group), weight.shape[1]
    missing = -columns % group
    hessian = torch.nn.functional.pad(hessian, (0, missing, 0, missing))
    blocks = torch.stack(
        [hessian[i : i + group, i : i + group] for i in range(0, len(hessian), group)]
    )
    limit = groups.abs().amax(-1, keepdim=True)
    best, least = limit.clone(), torch.full_like(limit, np.inf)
    for step in range(10):
        trial = limit * (1 - step / 20)
        clamped = groups.clamp(-trial, trial)
        change = rounded(clamped, *affine(clamped, bits), bits) - groups
        error = (torch.einsum("ogi,gij->ogj", change, blocks) * change).sum(-1, keepdim=True)
        better = error < least
        best, least = torch.where(better, trial, best), torch.where(better, error, least)
    return groups.clamp(-best, best).reshape(len(weight), -1)[:, :columns]


def _groups(weight: torch.Tensor, group: int) -> torch.Tensor:
    """`(out, groups, group)`, with zeros in the last group where it is shorter."""
    filled = torch.nn.functional.pad(weight, (0, -weight.shape[1] % group))
    return filled.reshape(len(weight), -1, group)
