"""Greedy soup: models join the average as long as held-out data likes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from jaxweights.core._paths import Params
from jaxweights.merge._models import check_choice, check_names, label, per_model
from jaxweights.merge._running import check_like, running_mean

Source = Params | Callable[[], Params]

_NAME = "merge.greedy_soup"


class SoupStep(NamedTuple):
    """One candidate of a greedy soup, in the order in which they were tried."""

    model: int
    """Its index among the models."""
    name: str
    """What errors call it."""
    own_score: float
    """Score of the model alone."""
    soup_score: float
    """Score of the soup with it."""
    kept: bool
    """Whether it stayed in."""


def greedy_soup(
    models: Sequence[Source],
    score: Callable[[Params], float],
    *,
    scores: Sequence[float] | None = None,
    accept: Literal["ge", "gt"] = "ge",
    names: Sequence[str] | None = None,
) -> tuple[Params, list[SoupStep]]:
    """Averages the models that, added best first, do not make the average worse.

    Starts with the model of the highest score, tries the others in falling order (equal ones in
    the order given), and keeps each with which the mean of all kept ones scores as least as well
    as before. Two models and the soup are in memory at a time, where models are functions that
    load them.

    Args:
      models: Trees of one structure, or functions that load one each.
      score: Score of a model on held-out data, the higher the better; jitted by the caller.
      scores: Scores of the single models, where they are known; None computes them.
      accept: `"ge"` keeps a model that leaves the score as it was, `"gt"` only what raises it.
      names: What the history and errors call the models.

    Returns:
      The soup, in the dtypes of the best model, and one `SoupStep` per model.

    Raises:
      ValueError: If there is no model, one does not fit, or a score is not a number.

    Example:
      >>> import jax.numpy as jnp
      >>> models = [{"bias": jnp.array([x])} for x in (1.0, 4.0, -1.5)]
      >>> soup, history = greedy_soup(models, lambda params: -abs(float(params["bias"][0])))
      >>> float(soup["bias"][0]), [step.model for step in history if step.kept]
      (-0.25, [0, 2])

    Source: Wortsman et al. 2022, Model soups, arXiv:2203.05482, recipe 1.
    Differs: (1) as in the paper, equal scores are accepted; the authors' code wants better ones,
    which is `accept="gt"`.
    """
    check_choice(_NAME, "accept", accept, ("ge", "gt"))
    check_names(_NAME, names)
    if not len(models):
        raise ValueError(f"{_NAME}: models is empty. Pass at least one.")
    if names is not None:
        per_model(_NAME, "names", names, len(models))
    titles = [label(names, i) for i in range(len(models))]
    if scores is None:
        scores = [_number(score(_load(m)), title) for m, title in zip(models, titles, strict=True)]
    per_model(_NAME, "scores", scores, len(models))
    own = [_number(value, title) for value, title in zip(scores, titles, strict=True)]
    order = sorted(range(len(models)), key=lambda i: -own[i])

    running, best = running_mean(), order[0]
    first = _load(models[best])
    state = running.update(running.init(first), first)
    reached = own[best]
    history = [SoupStep(best, titles[best], reached, reached, True)]
    for i in order[1:]:
        model = _load(models[i])
        check_like(_NAME, titles[i], model, first)
        candidate = running.update(state, model)
        found = _number(score(running.value(candidate, first)), f"the soup with {titles[i]}")
        kept = found >= reached if accept == "ge" else found > reached
        if kept:
            state, reached = candidate, found
        history.append(SoupStep(i, titles[i], own[i], found, kept))
    return running.value(state, first), history


def _load(model: Source) -> Params:
    return model() if callable(model) else model


def _number(value: float, title: str) -> float:
    value = float(value)
    if np.isnan(value):
        raise ValueError(
            f"{_NAME}: the score of {title} is NaN. Mend the model or the score; a soup cannot "
            "compare it."
        )
    return value
