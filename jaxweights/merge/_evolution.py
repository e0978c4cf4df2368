"""Searching settings by an evolution strategy: ask for candidates, tell their scores."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

Settings = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Genome:
    """Named settings as one vector, and back; the two undo each other exactly.

    Built by `genome`.

    Args:
      names: Names of the settings.
      shapes: Their shapes.
      bounds: Smallest and largest value of each.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    bounds: tuple[tuple[float, float], ...]

    @property
    def size(self) -> int:
        """Length of the vector."""
        return sum(self._sizes)

    @property
    def _sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes]

    def limits(self) -> np.ndarray:
        """Bounds of every entry of the vector, `(size, 2)`."""
        return np.repeat(np.asarray(self.bounds, np.float64), self._sizes, axis=0)

    def encode(self, settings: Mapping[str, Any]) -> np.ndarray:
        """The vector of some settings, float64.

        Raises:
          ValueError: If a setting is missing, unknown, of another shape or out of bounds.
        """
        if set(settings) != set(self.names):
            raise ValueError(
                f"merge.genome: settings {sorted(settings)} differ from {sorted(self.names)}."
            )
        parts = []
        for name, shape, (low, high) in zip(self.names, self.shapes, self.bounds, strict=True):
            values = np.asarray(settings[name], np.float64)
            if values.shape != shape:
                raise ValueError(
                    f"merge.genome: {name!r} has shape {values.shape}, but {shape} is expected."
                )
            if not ((values >= low) & (values <= high)).all():
                raise ValueError(
                    f"merge.genome: {name!r}={values.tolist()} must lie in [{low}, {high}]."
                )
            parts.append(values.ravel())
        return np.concatenate(parts) if parts else np.zeros(0)

    def decode(self, vector: Any) -> Settings:
        """The settings that a vector stands for.

        Raises:
          ValueError: If its length is another.
        """
        vector = np.asarray(vector, np.float64)
        if vector.shape != (self.size,):
            raise ValueError(
                f"merge.genome: a vector of shape {vector.shape} was given, but the settings have "
                f"{self.size} entries."
            )
        parts = np.split(vector, np.cumsum(self._sizes)[:-1])
        return {
            name: part.reshape(shape)
            for name, shape, part in zip(self.names, self.shapes, parts, strict=True)
        }


def genome(
    settings: Mapping[str, Any], *, bounds: Mapping[str, tuple[float, float]] | None = None
) -> Genome:
    """Describes which settings are searched, from an example of them.

    Args:
      settings: Numbers or arrays by name, such as `{"weights": (models,), "density": (models,)}`
        or the coefficients of a `mixture`.
      bounds: Smallest and largest value by name; [0, 1] where nothing is said.

    Returns:
      The genome.

    Raises:
      ValueError: If bounds are not in order, or of unknown settings.

    Example:
      >>> g = genome({"weights": [0.5, 0.5], "density": 1.0}, bounds={"weights": (-1, 2)})
      >>> g.decode([0.1, 0.2, 0.3])
      {'weights': array([0.1, 0.2]), 'density': array(0.3)}
    """
    bounds = dict(bounds or {})
    if unknown := sorted(set(bounds) - set(settings)):
        raise ValueError(f"merge.genome: bounds of {unknown}, which are not among the settings.")
    pairs = tuple((float(a), float(b)) for a, b in (bounds.get(n, (0, 1)) for n in settings))
    for name, (low, high) in zip(settings, pairs, strict=True):
        if not low < high:
            raise ValueError(f"merge.genome: bounds {low, high} of {name!r} must be in order.")
    shapes = tuple(np.shape(value) for value in settings.values())
    return Genome(tuple(settings), shapes, pairs)


class Evolution:
    """CMA-ES over a genome, maximising a score; made by `evolution`.

    Every generation, `ask` for candidates, score each, and `tell` the scores. It can be pickled
    between generations.

    Args:
      genome: The settings searched.
      optimizer: A `cmaes.CMA`.
      seed: Of the random numbers; every generation draws its own from it, so that a search
        that was pickled goes on as it would have.
    """

    def __init__(self, genome: Genome, optimizer: Any, seed: int) -> None:
        self.genome = genome
        self._seed = seed
        self.best_score = -math.inf
        self.best: Settings | None = None
        self._optimizer = optimizer
        self._asked: np.ndarray | None = None

    def ask(self) -> np.ndarray:
        """Candidates of the next generation, `(candidates, genome.size)`; `decode` each."""
        sequence = np.random.SeedSequence([self._seed, self._optimizer.generation])
        self._optimizer.reseed_rng(int(sequence.generate_state(1)[0]))
        draws = [self._optimizer.ask() for _ in range(self._optimizer.population_size)]
        self._asked = np.stack(draws)
        return self._asked.copy()

    def tell(self, scores: Any) -> None:
        """Takes one score per candidate that `ask` gave last, the higher the better.

        Raises:
          ValueError: If nothing was asked, or the scores are not one number each.
        """
        if self._asked is None:
            raise ValueError("merge.evolution: tell without ask. Ask for candidates first.")
        values = np.asarray(scores, np.float64)
        if values.shape != (len(self._asked),) or np.isnan(values).any():
            raise ValueError(
                f"merge.evolution: scores={values.tolist()} must be one number for each of the "
                f"{len(self._asked)} candidates."
            )
        # A candidate that failed altogether ranks last.
        worst = np.finfo(np.float64).max
        costs = np.nan_to_num(-values, posinf=worst, neginf=-worst)
        self._optimizer.tell([(x, float(c)) for x, c in zip(self._asked, costs, strict=True)])
        top = int(np.argmax(values))
        if values[top] > self.best_score:
            self.best_score = float(values[top])
            self.best = self.genome.decode(self._asked[top])
        self._asked = None


def evolution(
    genome: Genome,
    start: Mapping[str, Any],
    *,
    key: jax.Array,
    sigma: float = 0.2,
    population: int | None = None,
) -> Evolution:
    """Starts a CMA-ES search for the settings of a merge; needs the package `cmaes`.

    Args:
      genome: The settings and their bounds.
      start: Settings in the middle of the first generation.
      key: Randomness; the same key and scores give the same search.
      sigma: Step size at the start, in the units of the settings.
      population: Candidates a generation; None takes 4 + 3 ln(size).

    Returns:
      The search.

    Raises:
      ImportError: If `cmaes` is not installed.
      ValueError: If a setting is out of range.

    Example:
      >>> import jax
      >>> g = genome({"weights": [0.5, 0.5]})
      >>> search = evolution(g, {"weights": [0.5, 0.5]}, key=jax.random.key(0))
      >>> for _ in range(30):
      ...     weights = [g.decode(x)["weights"] for x in search.ask()]
      ...     search.tell([-((w[0] - 0.8) ** 2) - (w[1] - 0.1) ** 2 for w in weights])
      >>> search.best["weights"].round(1).tolist()
      [0.8, 0.1]

    Source: Akiba et al. 2024, Evolutionary model merging, arXiv:2403.13187.
    """
    try:
        import cmaes
    except ImportError as error:
        raise ImportError(
            "merge.evolution: the package cmaes is not installed. Install it with "
            "`pip install jaxweights[search]`."
        ) from error
    if not sigma > 0:
        raise ValueError(f"merge.evolution: sigma={sigma} must be positive.")
    if population is not None and (not isinstance(population, int) or population < 3):
        raise ValueError(f"merge.evolution: population={population} must be 3 or more.")
    if genome.size < 2:
        raise ValueError(
            f"merge.evolution: the genome has {genome.size} entries, and covariances need two. Try "
            "a grid instead."
        )
    optimizer = cmaes.CMA(
        mean=genome.encode(start),
        sigma=sigma,
        bounds=genome.limits(),
        population_size=population,
    )
    return Evolution(genome, optimizer, int(jax.random.bits(key, dtype="uint32")))
