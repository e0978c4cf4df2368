"""What a recipe measures, prepared once and scored before and after."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jaxweights.merge import iterate_path
from jaxweights.recipes._download import Progress
from jaxweights.recipes._model import Model
from jaxweights.recipes._perplexity import perplexity
from jaxweights.recipes._recipe import Recipe
from jaxweights.recipes._retrieval import embed, passages, retrieval
from jaxweights.recipes._sections import Calibrate, Perplexity, Retrieval
from jaxweights.recipes._texts import Text, load_text, read_text_file
from jaxweights.recipes._tokens import sequences, windows

Score = Callable[[Any, str], dict[str, Any]]  # (params, "before" | "after") -> numbers


@dataclasses.dataclass(frozen=True)
class Measure:
    """One measure: what it is in words, and how to take it."""

    name: str
    definition: str
    score: Score


@dataclasses.dataclass(frozen=True)
class CalibrationData:
    """Tokens to calibrate on, and what they are in words."""

    definition: str
    batches: list[tuple[np.ndarray]]


def read_text(section: Any, progress: Progress) -> Text:
    """The text that a section names."""
    if section.file is not None:
        return read_text_file(section.file, reflow=section.reflow)
    return load_text(section.text, reflow=section.reflow, progress=progress)


def prepare_measures(recipe: Recipe, model: Model, progress: Progress) -> list[Measure]:
    """Reads all texts and cuts them, so that a text that is too short fails before any work.

    Args:
      recipe: What to measure.
      model: On what.
      progress: Called with (task, done, total).

    Returns:
      The measures.
    """
    measures = []
    if (section := recipe.evaluate.perplexity) is not None:
        measures.append(_perplexity(section, recipe, model, progress))
    if (section := recipe.evaluate.retrieval) is not None:
        measures.append(_retrieval(section, model, progress))
    return measures


def prepare_calibration(recipe: Recipe, model: Model, progress: Progress) -> CalibrationData | None:
    """Cuts the calibration sequences out of the second half of their text.

    An encoder's come from the second half of every document, a decoder's from the second half of
    the whole text: what the same text is measured on lies in the first halves.
    """
    section = recipe.calibrate
    if section is None:
        return None
    text = read_text(section, progress)
    if model.is_decoder:
        half = text.whole[len(text.whole) // 2 :]
    else:
        half = "\n\n".join(document[len(document) // 2 :] for document in text.documents)
    tokens = sequences(
        half,
        model.tokenizer,
        count=section.sequences,
        length=section.length,
        close=not model.is_decoder,
    )
    batch = min(section.batch, len(tokens))
    # Equal batches compile once; a smaller last one would compile again.
    cuts = [tokens[i : i + batch] for i in range(0, len(tokens), batch)]
    where = "the text" if model.is_decoder else "every document"
    definition = (
        f"Calibrated on {section.sequences} sequences of {section.length} tokens from the second "
        f"half of {where} ({_words(section, text)})."
    )
    return CalibrationData(definition, [(cut,) for cut in cuts])


def perplexity_windows(
    section: Perplexity, recipe: Recipe, model: Model, progress: Progress
) -> tuple[np.ndarray, str]:
    """Tokens `(windows, time)` to measure a language model's perplexity on, and what it is."""
    text = read_text(section, progress)
    shared = recipe.calibrate is not None and _same_text(section, recipe.calibrate)
    # The second half is calibrated on.
    whole = text.whole[: len(text.whole) // 2] if shared else text.whole
    tokens = windows(whole, model.tokenizer, count=section.windows, length=section.length)
    definition = (
        f"Perplexity is exp of the mean negative log-likelihood a token over {section.windows} "
        f"windows of {section.length} tokens that do not overlap, from the beginning of "
        f"{_words(section, text)}; the first token of a window is not predicted."
    )
    return tokens, definition


def _perplexity(section: Perplexity, recipe: Recipe, model: Model, progress: Progress) -> Measure:
    from jaxweights.lift import lift

    tokens, definition = perplexity_windows(section, recipe, model, progress)
    forward = lift(model.forward)

    def score(params: Any, when: str) -> dict[str, Any]:
        found = perplexity(
            forward,
            params,
            tokens,
            batch=section.batch,
            progress=progress,
            task=f"Perplexity {when}",
        )
        return dataclasses.asdict(found)

    return Measure("perplexity", definition, score)


def _retrieval(section: Retrieval, model: Model, progress: Progress) -> Measure:
    from jaxweights.lift import lift

    text = read_text(section, progress)
    queries, targets = passages(text.documents, count=section.documents)
    definition = (
        "Retrieval is an inverse cloze: words 200 to 240 of a document must find its words 240 to "
        f"280 by cosine, among {section.documents} documents of {_words(section, text)}."
    )
    dense: list[np.ndarray] = []

    def score(params: Any, when: str) -> dict[str, Any]:
        rows = embed(
            lift(model.embed),
            params,
            [*queries, *targets],
            model.tokenizer,
            batch=section.batch,
            progress=progress,
            task=f"Retrieval {when}",
        )
        reference = dense[0] if dense else None
        dense.append(rows)
        found = retrieval(rows[: len(queries)], rows[len(queries) :], reference=reference)
        return dataclasses.asdict(found)

    return Measure("retrieval", definition, score)


def measure_curves(
    measure: Measure, base: Any, others: Sequence[Any], points: int
) -> dict[str, Any]:
    """Perplexities on the straight lines from a model to others.

    Args:
      measure: Perplexity.
      base: Parameters at 0.
      others: Parameters at 1, one line each.
      points: Points on each line, ends included.

    Returns:
      Shares of the other model, and perplexities by line.
    """
    alphas = np.linspace(0.0, 1.0, points)
    curves = {}
    for i, other in enumerate(others):
        path = iterate_path(base, other, alphas)
        scores = [measure.score(params, f"at {alpha:.2f} of models[{i}]") for alpha, params in path]
        curves[f"models[{i}]"] = [score["perplexity"] for score in scores]
    return {"alphas": alphas.tolist(), "perplexity": curves}


def _same_text(first: Any, second: Calibrate) -> bool:
    return (first.text, first.file) == (second.text, second.file)


def _words(section: Any, text: Text) -> str:
    breaks = "re-flowed" if section.reflow else "with its hard line breaks"
    return f"{text.name}, {breaks}"
