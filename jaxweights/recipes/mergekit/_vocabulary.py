"""One vocabulary for models whose tokenizers differ: every row finds its token."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping

import numpy as np

from jaxweights.checkpoint._mapped import MappedTensor, mapped_tensor
from jaxweights.checkpoint._tensor_table import fill_from
from jaxweights.recipes._yaml import RecipeError
from jaxweights.recipes.mergekit._config import MergeConfig
from jaxweights.recipes.mergekit._model_ref import ModelRef
from jaxweights.recipes.mergekit._models import Model
from jaxweights.recipes.mergekit._tokenizer_json import (
    only_tokens,
    tokenizer_of,
    tokens_of,
    with_tokens,
)
from jaxweights.recipes.mergekit._tokenizer_rules import TokenizerRules

# Tensors with a row for every token, where their first axis is as long as the vocabulary.
_ROWS = re.compile(r".*(emb|wte|lm_head|output|score|decoder).*")

Row = tuple[ModelRef, int]  # a model and a row of its embedding


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of the result.

    Args:
      ids: Index of every token.
      rows: Number of rows of its embeddings, which may be more than there are tokens.
      tokenizer: Its `tokenizer.json`.
      owner: The model whose other tokenizer files go with it.
    """

    ids: Mapping[str, int]
    rows: int
    tokenizer: str
    owner: Model


def align_vocabularies(
    config: MergeConfig, models: Mapping[ModelRef, Model]
) -> tuple[dict[ModelRef, Model], Vocabulary | None]:
    """Gives every model the rows of one vocabulary.

    A token that a model lacks gets, in its embedding, the base's row; where the base lacks it too,
    that of its only owner; where it has several, their mean.

    Args:
      config: Says which vocabulary.
      models: The opened models.

    Returns:
      The models with aligned tensors, and the vocabulary; the models as they are, and None, where
      the configuration leaves vocabularies alone.

    Raises:
      RecipeError: If a tokenizer cannot be read, or a rule names a token that is not there.
    """
    rules = config.tokenizer
    if rules is None:
        return dict(models), None
    rows = {ref: _row_count(model) for ref, model in models.items()}
    # A tokenizer may know tokens beyond the embedding, which the model cannot have learned.
    known = {
        ref: {token: i for token, i in tokens_of(model).items() if i < rows[ref]}
        for ref, model in models.items()
    }
    base = config.base_model if config.base_model is not None else next(iter(models))
    vocabulary = _choose(config, rules, models, known, base)
    sources = _row_sources(config, rules, vocabulary, known, base)
    aligned = {
        ref: dataclasses.replace(
            model,
            tensors=_Aligned(model, ref, models, known[ref], vocabulary, sources, rows, base),
        )
        for ref, model in models.items()
    }
    return aligned, vocabulary


def _row_count(model: Model) -> int:
    for level in (model.config, model.config.get("text_config") or {}):
        if isinstance(level.get("vocab_size"), int):
            return level["vocab_size"]
    raise RecipeError(f"model {model.label!r}: its config.json has no 'vocab_size'.")


def _choose(
    config: MergeConfig,
    rules: TokenizerRules,
    models: Mapping[ModelRef, Model],
    known: Mapping[ModelRef, dict[str, int]],
    base: ModelRef,
) -> Vocabulary:
    ref = rules.source if isinstance(rules.source, ModelRef) else base
    owner, ids = models[ref], dict(known[ref])
    tokenizer = only_tokens(tokenizer_of(owner), ids)
    new: list[str] = []
    if rules.source == "union":
        for other in models:
            new += [t for t in sorted(known[other], key=known[other].__getitem__) if t not in ids]
            ids |= {token: -1 for token in new}
    new += [token for token in rules.tokens if token not in ids and token not in new]
    first = max(known[ref].values(), default=-1) + 1
    numbered = {token: first + i for i, token in enumerate(dict.fromkeys(new))}
    ids |= numbered
    rows = max(_row_count(owner), first + len(numbered))
    if rules.pad_to_multiple_of:
        rows = -(-rows // rules.pad_to_multiple_of) * rules.pad_to_multiple_of
    if numbered:
        tokenizer = with_tokens(tokenizer, numbered, [tokenizer_of(m) for m in models.values()])
    return Vocabulary(ids, rows, json.dumps(tokenizer, ensure_ascii=False, indent=2), owner)


def _row_sources(
    config: MergeConfig,
    rules: TokenizerRules,
    vocabulary: Vocabulary,
    known: Mapping[ModelRef, dict[str, int]],
    base: ModelRef,
) -> dict[int, tuple[list[Row], bool]]:
    """Rows whose mean fills a token's row, and whether also in models that have the token."""
    found: dict[int, tuple[list[Row], bool]] = {}
    problems = []
    for token, i in vocabulary.ids.items():
        rule = rules.tokens.get(token)
        owners = [(ref, known[ref][token]) for ref in known if token in known[ref]]
        own = [row for row in owners if row[0] == base] or owners
        if rule is None or rule.source is None:
            found[i] = (own, rule is not None and rule.force)
        elif rule.source == "zero":
            found[i] = ([], rule.force)
        elif isinstance(rule.source, ModelRef):
            index = rule.token_id
            if index is None:
                index = known.get(rule.source, {}).get(rule.token or token)
            if index is None:
                problems.append(
                    f"{config.file}: tokenizer.tokens[{token!r}]: {rule.source} has no token "
                    f"{rule.token or token!r}. Name one that it has, or 'zero'."
                )
                continue
            found[i] = ([(rule.source, index)], rule.force)
    if problems:
        raise RecipeError("\n".join(problems))
    return found


class _Aligned:
    """A model's tensors, of which those with a row for each token are put in the new order."""

    def __init__(
        self,
        model: Model,
        ref: ModelRef,
        models: Mapping[ModelRef, Model],
        own: Mapping[str, int],
        vocabulary: Vocabulary,
        sources: Mapping[int, tuple[list[Row], bool]],
        rows: Mapping[ModelRef, int],
        base: ModelRef,
    ):
        self._model, self._ref, self._models = model, ref, models
        self._own, self._vocabulary, self._sources = own, vocabulary, sources
        self._rows, self._base = rows, base

    def shape(self, name: str) -> tuple[int, ...]:
        shape = self._model.tensors.shape(name)
        return (self._vocabulary.rows, *shape[1:]) if self._has_rows(name) else shape

    def dtype(self, name: str) -> np.dtype:
        return self._model.tensors.dtype(name)

    def read(self, name: str) -> np.ndarray:
        if not self._has_rows(name):
            return self._model.tensors.read(name)
        tables: dict[ModelRef, np.ndarray] = {self._ref: self._model.tensors.read(name)}

        def table(ref: ModelRef) -> np.ndarray:
            if ref not in tables:
                tables[ref] = self._models[ref].tensors.read(name)
            return tables[ref]

        here = tables[self._ref]
        result = np.zeros(self.shape(name), here.dtype)
        taken = {i: self._own[t] for t, i in self._vocabulary.ids.items() if t in self._own}
        forced = {i for i, (_, force) in self._sources.items() if force}
        plain = {i: row for i, row in taken.items() if i not in forced}
        result[list(plain)] = here[list(plain.values())]
        for i, (rows, _) in self._sources.items():
            if i in plain:
                continue
            held = [table(ref)[row] for ref, row in rows if name in self._models[ref].known]
            if held:
                result[i] = np.mean(np.asarray(held, np.float32), axis=0).astype(here.dtype)
        # Rows without a token, which pad an embedding, stay those of the base; more are the mean.
        padding = np.setdiff1d(np.arange(len(result)), list(self._vocabulary.ids.values()))
        if padding.size and name in self._models[self._base].known:
            spare = table(self._base)
            inside, beyond = padding[padding < len(spare)], padding[padding >= len(spare)]
            result[inside] = spare[inside].astype(here.dtype)
            if beyond.size:  # zero would be a large logit beside negative ones
                tokens = result[list(self._vocabulary.ids.values())]
                result[beyond] = np.mean(tokens, axis=0, dtype=np.float32).astype(here.dtype)
        return result

    def reader(self, name: str) -> Callable[[int, np.ndarray], None]:
        if not self._has_rows(name):
            return self._model.tensors.reader(name)
        return fill_from(self.read(name))

    def mapped(self, name: str) -> MappedTensor | None:
        return None if self._has_rows(name) else mapped_tensor(self._model.tensors, name)

    def _has_rows(self, name: str) -> bool:
        shape = self._model.tensors.shape(name)
        return (
            bool(shape) and shape[0] == self._rows[self._ref] and _ROWS.fullmatch(name) is not None
        )
