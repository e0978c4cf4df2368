"""What a configuration says of the result's vocabulary."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxweights.recipes._check import MISSING, Problems, read_keys, without_nulls
from jaxweights.recipes._yaml import Located
from jaxweights.recipes.mergekit._model_ref import ModelRef, read_model


@dataclasses.dataclass(frozen=True)
class TokenRule:
    """Where the rows of one token come from.

    Args:
      source: A model, `"zero"`, or None for the usual way.
      token: Text of the token in the source, where it is another one.
      token_id: Its index there instead.
      force: Whether models that have the token get the row, too.
    """

    source: ModelRef | str | None
    token: str | None = None
    token_id: int | None = None
    force: bool = False


@dataclasses.dataclass(frozen=True)
class TokenizerRules:
    """Which vocabulary the result has.

    Args:
      source: `"union"`, `"base"`, or a model.
      tokens: Rules by token.
      pad_to_multiple_of: What the number of rows is rounded up to a multiple of.
    """

    source: ModelRef | str
    tokens: dict[str, TokenRule]
    pad_to_multiple_of: int | None = None


def read_tokenizer(keys: dict[str, Located], problems: Problems) -> TokenizerRules | None:
    if "tokenizer_source" in keys:
        source = _vocabulary(keys["tokenizer_source"], "tokenizer_source", problems)
        return None if source is None else TokenizerRules(source, {})
    if "tokenizer" not in keys:
        return None
    kinds = {"source": Any, "tokens": Any, "pad_to_multiple_of": int}
    node = without_nulls(keys["tokenizer"], kinds)
    values = read_keys(node, kinds, [], "tokenizer", problems)
    if values is MISSING:
        return None
    source: Any = "union"
    if "source" in node.value:
        source = _vocabulary(node.value["source"], "tokenizer.source", problems)
    rules = {}
    tokens = node.value.get("tokens")
    if tokens is not None and isinstance(tokens.value, dict):
        for token, rule in tokens.value.items():
            read_rule = _token_rule(rule, f"tokenizer.tokens[{token!r}]", problems)
            if read_rule is not None:
                rules[token] = read_rule
    pad = values.get("pad_to_multiple_of")
    if isinstance(pad, int) and pad < 1:
        problems.add(node.line, f"tokenizer.pad_to_multiple_of: is {pad}. It must be positive.")
    return None if source is None else TokenizerRules(source, rules, pad)


def _vocabulary(node: Located, where: str, problems: Problems) -> ModelRef | str | None:
    if node.value in ("union", "base"):
        return node.value
    return read_model(node, where, problems)


def _token_rule(node: Located, where: str, problems: Problems) -> TokenRule | None:
    if read_keys(node, {"source": Any, "force": bool}, [], where, problems) is MISSING:
        return None
    force = bool(node.value["force"].value) if "force" in node.value else False
    source = node.value.get("source")
    if source is None or source.value is None:
        return TokenRule(None, force=force)
    if isinstance(source.value, dict) and "kind" in source.value:
        kind = source.value["kind"].value
        if kind == "zero":
            return TokenRule("zero", force=force)
        if kind == "model_token":
            keys = {"kind": str, "model": Any, "token": str, "token_id": int}
            values = read_keys(source, keys, ["kind", "model"], f"{where}.source", problems)
            given = source.value.get("model")
            model = None if given is None else read_model(given, where, problems)
            if values is MISSING or model is None:
                return None
            token, index = values.get("token"), values.get("token_id")
            if (token is None) == (index is None):
                problems.add(source.line, f"{where}.source: give one of 'token' and 'token_id'.")
            return TokenRule(model, token, index, force)
        problems.add(source.line, f"{where}.source: kind {kind!r} is not 'zero' or 'model_token'.")
        return None
    if source.value == "zero":
        return TokenRule("zero", force=force)
    model = read_model(source, f"{where}.source", problems)
    return None if model is None else TokenRule(model, force=force)
