"""Perplexities of the models of a merge and of its result, and on the lines between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxweights.recipes._packages import TEXTS
from jaxweights.recipes._perplexity import perplexity
from jaxweights.recipes._texts import load_text, read_text_file
from jaxweights.recipes._tokens import windows
from jaxweights.recipes._yaml import RecipeError
from jaxweights.recipes.mergekit._config import MergeConfig
from jaxweights.recipes.mergekit._model_ref import ModelRef
from jaxweights.recipes.mergekit._models import Model
from jaxweights.stream._meter import Progress

_NAME = "jaxweights merge"
MERGED = "the merged model"


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What to measure the models of a merge with.

    Args:
      text: A UTF-8 file, or a text of recipes: `pydoc-topics`, `moby-dick`, `brown`.
      windows: Windows of the text, from its beginning; they do not overlap.
      length: Tokens each.
      curve: Points on the line from the base to every other model, its ends included; 0 for none.
    """

    text: str
    windows: int = 8
    length: int = 512
    curve: int = 0

    def __post_init__(self) -> None:
        """Refuses settings that nothing can be measured with."""
        for name, least in (("windows", 1), ("length", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{_NAME}: {name}={getattr(self, name)} must be at least {least}.")
        if self.curve and self.curve < 3:
            raise ValueError(f"{_NAME}: curve={self.curve} must be at least 3, or 0 for none.")


@dataclasses.dataclass(frozen=True)
class Scores:
    """Perplexities.

    Attributes:
      definition: What was measured, in a sentence.
      perplexity: By model; the merged one stands last.
      alphas: Shares of the other model on the lines.
      curves: Perplexities on the line from the first model to each other of its shape.
    """

    definition: str
    perplexity: dict[str, float]
    alphas: tuple[float, ...]
    curves: dict[str, tuple[float, ...]]


class Evaluator:
    """Reads the text and looks at the models before the merge, and measures them after it.

    Args:
      evaluation: What to measure.
      config: The document that is merged.
      models: Its models, the base or else the first model first.
      files: The result's config and tokenizer, by name.
    """

    def __init__(
        self,
        evaluation: Evaluation,
        config: MergeConfig,
        models: Mapping[ModelRef, Model],
        files: Mapping[str, Any],
    ):
        """Refuses a text that is too short, and models that cannot be run."""
        from jaxweights.models import load_tokenizer

        self._evaluation = evaluation
        self._models = {str(ref): model for ref, model in models.items()}
        for model in self._models.values():
            _decoder_of(model)  # fails for an architecture that is not known
        tokenizer = files.get("tokenizer.json")
        if tokenizer is None:
            raise RecipeError(
                f"{config.file}: the merged model has no tokenizer.json, so no text can be scored. "
                "Put one beside the base's weights, or leave --evaluate out."
            )
        named = evaluation.text in TEXTS
        text = (load_text if named else read_text_file)(evaluation.text)
        made = (
            load_tokenizer(Path(tokenizer)) if isinstance(tokenizer, Path) else _parsed(tokenizer)
        )
        self._tokens = windows(text.whole, made, count=evaluation.windows, length=evaluation.length)
        self._definition = (
            f"Perplexity over {evaluation.windows} windows of {evaluation.length} tokens from the "
            f"beginning of {text.name}, its paragraphs joined into lines."
        )

    def scores(self, destination: Any, progress: Progress | None) -> Scores:
        """Measures every model and the merged one.

        Two of them are in memory at a time, and with lines what lies between them is a third.

        Args:
          destination: The merged checkpoint.
          progress: Called with (task, windows done, windows in all).

        Returns:
          The perplexities.
        """
        points = self._evaluation.curve
        alphas = np.linspace(0.0, 1.0, points) if points else np.empty(0)
        first, *others = self._models
        forward, origin = self._model(first)
        found = {first: self._score(forward, origin, first, progress)}
        curves = {}
        params = None
        for label in (*others, MERGED):
            del params  # before the next one is read
            own, params = self._merged(destination) if label == MERGED else self._model(label)
            found[label] = self._score(own, params, label, progress)
            if points and _shapes(params) == _shapes(origin):
                inner = (
                    self._score(forward, between, f"{label} at {alpha:.2f}", progress)
                    for alpha, between in _between(origin, params, alphas)
                )
                curves[label] = (found[first], *inner, found[label])
        return Scores(self._definition, found, tuple(alphas.tolist()), curves)

    def _score(self, fn: Any, params: Any, label: str, progress: Progress | None) -> float:
        task = f"Perplexity of {label}"
        return perplexity(fn, params, self._tokens, progress=progress, task=task).perplexity

    def _model(self, label: str) -> tuple[_Forward, Any]:
        import jax
        import jax.numpy as jnp

        from jaxweights.models import build, params_from_checkpoint

        model = self._models[label]
        config = _decoder_of(model)
        found = params_from_checkpoint(_Tensors(model), config)
        return _Forward(build(config)), jax.tree.map(jnp.asarray, found)

    def _merged(self, destination: Any) -> tuple[_Forward, Any]:
        from jaxweights.models import load_pretrained

        made = load_pretrained(destination)
        return _Forward(made.model), made.params


@dataclasses.dataclass(frozen=True)
class _Forward:
    """`fn(params, tokens)` of a module; two of one config are equal, so that they compile once."""

    model: Any

    def __call__(self, params: Any, tokens: Any) -> Any:
        return self.model.apply({"params": params}, tokens)


@dataclasses.dataclass(frozen=True)
class _Tensor:
    """A tensor that is read when it is asked for."""

    tensors: Any
    name: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.tensors.shape(self.name)

    def read(self) -> np.ndarray:
        return self.tensors.read(self.name)


class _Tensors(Mapping[str, _Tensor]):
    """What a model of a configuration holds, as a mapping."""

    def __init__(self, model: Model):
        self._model = model

    def __getitem__(self, name: str) -> _Tensor:
        if name not in self._model.known:
            raise KeyError(name)
        return _Tensor(self._model.tensors, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._model.names)

    def __len__(self) -> int:
        return len(self._model.names)


def _decoder_of(model: Model) -> Any:
    """The config of a model that predicts tokens, with as many rows as its embedding has here."""
    from jaxweights.models import LlamaConfig, config_from_dict

    try:
        config = config_from_dict(model.config)
    except ValueError as error:
        raise RecipeError(
            f"{_NAME}: {model.label}: {error} Leave --evaluate out to merge without scores."
        ) from None
    if not isinstance(config, LlamaConfig):
        raise RecipeError(
            f"{_NAME}: {model.label} is a {type(config).__name__.removesuffix('Config')}, which "
            "has no perplexity. Leave --evaluate out to merge without scores."
        )
    tables = [name for name in model.names if name.endswith("embed_tokens.weight")]
    rows = model.tensors.shape(tables[0])[0] if tables else config.vocab_size
    return dataclasses.replace(config, vocab_size=rows)


def _parsed(tokenizer: Any) -> Any:
    from tokenizers import Tokenizer

    made = Tokenizer.from_str(tokenizer.decode() if isinstance(tokenizer, bytes) else tokenizer)
    made.no_padding()
    made.no_truncation()
    return made


def _between(origin: Any, params: Any, alphas: np.ndarray) -> Iterator[tuple[float, Any]]:
    from jaxweights.merge import iterate_path

    return iterate_path(origin, params, alphas[1:-1])


def _shapes(params: Any) -> Any:
    import jax

    return jax.tree.map(np.shape, params)
