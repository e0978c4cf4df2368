"""Chat templates that configurations call by name, and the one that most models have."""

from __future__ import annotations

import collections
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from jaxweights.recipes._yaml import RecipeError

AUTO = "auto"

_TEMPLATE, _CONFIG = "chat_template.jinja", "tokenizer_config.json"

CHAT_TEMPLATES = {
    "chatml": (
        "{% for message in messages %}"
        "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
        "{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "llama3": (
        "{{ bos_token }}{% for message in messages %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' }}"
        "{{ message['content'] | trim }}{{ '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}"
        "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% set ns = namespace(system='') %}{% for message in messages %}"
        "{% if message['role'] == 'system' %}"
        "{% set ns.system = message['content'] + '\\n\\n' %}"
        "{% elif message['role'] == 'user' %}"
        "{{ ' [INST] ' + ns.system + message['content'] + ' [/INST]' }}{% set ns.system = '' %}"
        "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
    ),
    "alpaca": (
        "{% for message in messages %}"
        "{% if message['role'] == 'system' %}{{ message['content'] | trim }}{{ '\\n\\n' }}"
        "{% elif message['role'] == 'user' %}"
        "{{ '### Instruction:\\n' + message['content'] | trim + '\\n\\n' }}"
        "{% else %}{{ '### Response:\\n' + message['content'] | trim + '\\n\\n' }}"
        "{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
    ),
}


def with_chat_template(
    files: Mapping[str, Any], template: str, models: Iterable[Mapping[str, Any]]
) -> dict[str, Any]:
    """A checkpoint's files with another chat template.

    Args:
      files: Files by name: paths or texts.
      template: Its text, a key of `CHAT_TEMPLATES`, or `"auto"`: the one that most models have; if
        none has any, nothing changes.
      models: The files of every model.

    Returns:
      The files.
    """
    if template == AUTO:
        found = [text for text in map(_template_of, models) if text is not None]
        if not found:
            return dict(files)
        [(text, _)] = collections.Counter(found).most_common(1)
    else:
        text = CHAT_TEMPLATES.get(template, template)
    changed = dict(files) | {_TEMPLATE: text}
    if _CONFIG in files:  # which would hold another one for programs that read only it
        settings = _settings(files)
        if "chat_template" in settings:
            changed[_CONFIG] = json.dumps(settings | {"chat_template": text}, indent=2)
    return changed


def _template_of(files: Mapping[str, Any]) -> str | None:
    if _TEMPLATE in files:
        return _text(files[_TEMPLATE]).strip()
    template = _settings(files).get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template.strip() if isinstance(template, str) else None


def _settings(files: Mapping[str, Any]) -> dict[str, Any]:
    file = files.get(_CONFIG, "{}")
    where = file if isinstance(file, Path) else _CONFIG
    try:
        found = json.loads(_text(file))
    except ValueError as error:
        raise RecipeError(f"{where}: is damaged: {error}. Fetch it again.") from None
    if not isinstance(found, dict):
        raise RecipeError(f"{where}: is no JSON object. Fetch it again.")
    return found


def _text(file: Any) -> str:
    if isinstance(file, Path):
        return file.read_text(encoding="utf-8")
    return file.decode() if isinstance(file, bytes) else str(file)
