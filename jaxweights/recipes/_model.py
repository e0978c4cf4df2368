"""The model of a recipe: loaded, with its tokenizer, as functions of its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxweights.recipes._download import Progress
from jaxweights.recipes._fetch import fetch
from jaxweights.recipes._packages import MODELS, Package
from jaxweights.recipes._recipe import Recipe
from jaxweights.recipes._sections import ModelSource
from jaxweights.recipes._yaml import RecipeError


@dataclasses.dataclass(frozen=True)
class Model:
    """A loaded model.

    Attributes:
      name: What reports call it.
      source: Where it came from, in words.
      pretrained: Module, parameters, config.
      tokenizer: Its tokenizer, or None where the checkpoint has none.
    """

    name: str
    source: str
    pretrained: Any
    tokenizer: Any

    @property
    def is_decoder(self) -> bool:
        """Whether it predicts tokens; else it embeds sentences."""
        from jaxweights.models import Llama

        return isinstance(self.pretrained.model, Llama)

    @property
    def params(self) -> Any:
        """Its parameters."""
        return self.pretrained.params

    def forward(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Logits of a decoder, hidden states of an encoder."""
        return self.pretrained.model.apply({"params": params}, tokens)

    def loss(self, params: Any, tokens: jax.Array) -> jax.Array:
        """Mean negative log-likelihood of a decoder's tokens."""
        logits = self.forward(params, tokens)[:, :-1].astype(jnp.float32)
        picked = jnp.take_along_axis(logits, tokens[:, 1:, None], axis=-1)[..., 0]
        return jnp.mean(jax.nn.logsumexp(logits, axis=-1) - picked)

    def embed(self, params: Any, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        """Sentence embeddings of an encoder, `(batch, hidden)`."""
        from jaxweights.models import sentence_embedding

        hidden = self.pretrained.model.apply({"params": params}, tokens, attention_mask=mask)
        return sentence_embedding(hidden, mask)


def load_model(
    source: ModelSource, *, progress: Progress, load: Callable[..., Any] | None = None
) -> Model:
    """Loads the model that a recipe names, downloading a package if need be.

    Args:
      source: The recipe's `model`.
      progress: Called with (task, done, total).
      load: Stands in for `load_pretrained` in tests.

    Returns:
      The model.
    """
    from jaxweights.models import load_pretrained, load_tokenizer

    path, name, words = locate(source, progress=progress)
    progress(f"Loading {name}", 0, 1)
    options: dict[str, Any] = {} if source.dequantize is None else {"dequantize": source.dequantize}
    pretrained = (load or load_pretrained)(path, **options)
    has_tokenizer = pretrained.tokenizer_path is not None
    tokenizer = load_tokenizer(pretrained) if has_tokenizer else None
    progress(f"Loading {name}", 1, 1)
    return Model(name, words, pretrained, tokenizer)


def locate(source: ModelSource, *, progress: Progress) -> tuple[Path, str, str]:
    """Path of a checkpoint, its name, and where it is from in words."""
    if source.path is not None:
        path = Path(source.path).expanduser()
        return path, path.name, str(path)
    known = MODELS.get(source.package or "")
    package = Package(
        name=source.package or "",
        version=source.version or (known.version if known else ""),
        sha256=source.sha256 or (known.sha256 if known else ""),
        inside=source.inside or (known.inside if known else ""),
        licence=known.licence if known else "",
        megabytes=known.megabytes if known else 0.0,
    )
    words = f"{package.name} {package.version} from PyPI, {package.inside}"
    return fetch(package, progress=progress), f"{package.name} {package.version}", words


def check_fit(recipe: Recipe, model: Model) -> None:
    """Refuses sections that do not suit the model, before any long work.

    Raises:
      RecipeError: If a measure is for another kind of model, or there is no tokenizer.
    """
    problems = []
    kind = "language model" if model.is_decoder else "sentence encoder"
    unfit = "retrieval" if model.is_decoder else "perplexity"
    fit = "perplexity" if model.is_decoder else "retrieval"
    if getattr(recipe.evaluate, unfit) is not None:
        problems.append(
            f"{_place(recipe, f'evaluate.{unfit}')}: {model.name} is a {kind}, which has no "
            f"{unfit}. Measure its {fit}."
        )
    reads_text = [
        section
        for section, value in (
            ("calibrate", recipe.calibrate),
            ("evaluate.perplexity", recipe.evaluate.perplexity),
            ("evaluate.retrieval", recipe.evaluate.retrieval),
        )
        if value is not None
    ]
    if reads_text and model.tokenizer is None:
        problems.append(
            f"{_place(recipe, reads_text[0])}: {model.name} came without a tokenizer, so it cannot "
            "read text. Put its tokenizer.json beside the weights, or remove this section."
        )
    if problems:
        raise RecipeError("\n".join(problems))


def _place(recipe: Recipe, section: str) -> str:
    line = recipe.lines.get(section)
    return f"{recipe.name}:{line}" if line else recipe.name
