"""The kinds of integer grids, and what codes on them stand for."""

import numpy as np

KINDS = ("narrow", "full", "half", "signed_max", "affine", "gptq_sym")


def dequantized(codes, shape):
    """The dense matrix that codes stand for, in NumPy."""
    rows, cols = codes.scale.shape
    spread = lambda x: np.repeat(np.repeat(x, shape[0] // rows, 0), shape[1] // cols, 1)  # noqa: E731
    zero = 0 if codes.zero_point is None else spread(np.asarray(codes.zero_point)).astype(int)
    steps = np.asarray(codes.codes).astype(int) - zero
    return steps.astype(np.float32) * spread(np.asarray(codes.scale).astype(np.float32))
