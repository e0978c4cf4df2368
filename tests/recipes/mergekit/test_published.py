"""Configurations as people publish them run, or are refused with what to change."""

import json

import numpy as np
import pytest

from jaxweights.recipes.mergekit import explain_merge, load_merge_config, run_merge
from jaxweights.recipes.mergekit._chat_templates import CHAT_TEMPLATES, with_chat_template
from tests.recipes.mergekit._checkpoints import arrays, read, write_config, write_models
from tests.recipes.mergekit.test_vocabulary import BASE, CHAT, EMBED, _write


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_models(tmp_path_factory.mktemp("models"))


# The forms of mergekit's own examples and of its manual.
PUBLISHED = {
    "gradient": """\
slices:
  - sources:
      - model: base
        layer_range: [0, 2]
      - model: ft1
        layer_range: [0, 2]
merge_method: slerp
base_model: base
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5 # fallback for the rest
dtype: float16
""",
    "stacked": """\
slices:
  - sources:
    - model: ft1
      layer_range: [0, 2]
  - sources:
    - model: ft2
      layer_range: [1, 2]
merge_method: passthrough
dtype: float16
""",
    "densities": """\
models:
  - model: ft1
    parameters:
      density: [1, 0.7, 0.1] # density gradient
      weight: 1.0
  - model: ft2
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1] # weight gradient
  - model: ft3
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: base
parameters:
  normalize: true
  int8_mask: true
dtype: float16
""",
    "int8_mask": """\
models:
  - model: ft1
  - model: ft2
merge_method: model_stock
base_model: base
parameters:
  int8_mask: true
dtype: bfloat16
tokenizer_source: null
chat_template: null
""",
    "documents": """\
name: first
merge_method: linear
models:
  - model: ft1
  - model: ft2
parameters:
  weight: 0.5
---
name: second
merge_method: slerp
base_model: first  # an earlier result
models:
  - model: ft3
parameters:
  t: 0.5
---
merge_method: dare_ties
base_model: base
models:
  - model: second
    parameters: {density: 0.6, weight: 0.5}
  - model: ft1
    parameters: {density: 0.8, weight: 0.5}
""",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_configuration_resolves(folder, name):
    tensors = explain_merge(write_config(folder, PUBLISHED[name], f"{name}.yml")).tensors
    depth = 3 if name == "stacked" else 2
    assert len(tensors) == len(arrays("base")) + (depth - 2) * sum(
        ".layers.0." in tensor for tensor in arrays("base")
    )


UNUSED = """\
merge_method: {method}
base_model: base
models:
  - model: ft1
    parameters: {{weight: 0.6}}
  - model: base
{more}
"""


@pytest.mark.parametrize(
    "method, more",
    [("slerp", "parameters: {t: 0.3}"), ("nearswap", "parameters: {t: 0.1}"), ("arcee_fusion", "")],
)
def test_a_parameter_of_another_method_is_refused_unless_mergekit_is_followed(folder, method, more):
    text = UNUSED.format(method=method, more=more)
    path = write_config(folder, text, f"unused_{method}.yml")
    words = rf"unused_{method}.yml:5: {method} has no parameter 'weight'.*--compat mergekit"
    with pytest.raises(ValueError, match=words):
        explain_merge(path)
    with_it = explain_merge(path, compat="mergekit")
    assert "Ignored, as mergekit does: weight." in with_it.differs
    plain = write_config(folder, text.replace("weight: 0.6", ""), f"plain_{method}.yml")
    without = explain_merge(plain, compat="mergekit")
    assert [t.parameters for t in with_it.tensors] == [t.parameters for t in without.tensors]


def test_what_mergekit_reads_of_a_slice_and_does_not_use_is_refused(folder):
    text = PUBLISHED["stacked"].replace(
        "  - sources:\n", "  - residual_weight: 0.5\n    sources:\n"
    )
    with pytest.raises(ValueError, match=r"passthrough has no parameter 'residual_weight'"):
        load_merge_config(write_config(folder, text, "residual.yml"))


@pytest.mark.parametrize(
    "text, words",
    [
        ("base_model: x\nexperts:\n  - source_model: y\n", "x.yml:2: experts: .*mergekit-moe"),
        ("genome:\n  models: [x]\ntasks: []\n", "x.yml:1: genome: .*mergekit-evolve.*evolution"),
        (PUBLISHED["int8_mask"].replace("chat_template: null", "chat_template: chatlm"),
         "x.yml:10: chat_template: .*'auto', one of 'chatml', .*Jinja"),
    ],
)  # fmt: skip
def test_what_is_no_merge_is_refused_with_what_there_is(tmp_path, text, words):
    with pytest.raises(ValueError, match=words):
        load_merge_config(write_config(tmp_path, text, "x.yml"))


def test_a_base_that_a_method_does_not_use_is_merged_only_where_mergekit_is_followed(folder):
    config = {"merge_method": "linear", "base_model": "base", "parameters": {"weight": 1.0},
              "models": [{"model": "ft1"}, {"model": "ft2"}], "dtype": "float32"}  # fmt: skip
    path = write_config(folder, config, "unlisted.yml")
    assert any("base is not among the models" in line for line in explain_merge(path).differs)
    own = [arrays(name) for name in ("ft1", "ft2", "base")]
    for compat, used in (("fixed", own[:2]), ("mergekit", own)):
        run_merge(path, folder / f"unlisted_{compat}", compat=compat)
        for name, got in read(folder / f"unlisted_{compat}").items():
            want = np.mean([model[name] for model in used], axis=0)
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-6, err_msg=name)


# Vocabularies.


@pytest.fixture(scope="module")
def talkers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("talkers")
    _write(folder, "base", BASE, 0)
    # Its tokenizer knows two tokens that its embedding has no rows for.
    _write(folder, "padded", [*BASE, "<unused_0>", "<unused_1>"], 1, rows=4)
    _write(folder, "chat", CHAT, 2)
    return folder


def _linear(folder, models, **settings):
    config = {"merge_method": "linear", "base_model": models[0], "dtype": "float32",
              "models": [{"model": m, "parameters": {"weight": 1}} for m in models]}  # fmt: skip
    run_merge(write_config(folder, config | settings, "x.yml"), folder / "out", overwrite=True)
    return read(folder / "out")


@pytest.mark.parametrize("source", ["union", "base"])
def test_tokens_beyond_an_embedding_are_left_out(talkers, source):
    models = ["padded", "base", "chat"]
    merged = _linear(talkers, models, tokenizer_source=source)
    tokens = json.loads((talkers / "out" / "tokenizer.json").read_text())
    names = {*tokens["model"]["vocab"], *(entry["content"] for entry in tokens["added_tokens"])}
    assert names == ({*CHAT} if source == "union" else {*BASE})
    assert len(merged[EMBED]) == len(names)
    want = np.mean([read(talkers / m)[EMBED][:4] for m in models], axis=0)
    np.testing.assert_allclose(merged[EMBED][:4], want, rtol=1e-6, atol=1e-6)


def test_rows_that_pad_an_embedding_are_its_mean(talkers):
    tokenizer = {"source": "base", "pad_to_multiple_of": 16}
    merged = _linear(talkers, ["chat"], tokenizer=tokenizer)["lm_head.weight"]
    assert len(merged) == 16
    np.testing.assert_allclose(merged[6:], np.tile(merged[:6].mean(0), (10, 1)), atol=1e-6)


# Chat templates.

TALK = [
    {"role": "system", "content": "Be brief. "},
    {"role": "user", "content": " Hi"},
    {"role": "assistant", "content": "Hello."},
]
WANTED = {
    "chatml": "<|im_start|>system\nBe brief. <|im_end|>\n<|im_start|>user\n Hi<|im_end|>\n"
    "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] Be brief. \n\n Hi [/INST] Hello.</s>",
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello.\n\n### Response:\n",
}


@pytest.mark.parametrize("name", CHAT_TEMPLATES)
def test_named_templates_format_a_conversation(name):
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Environment().from_string(CHAT_TEMPLATES[name])
    given = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    assert template.render(messages=TALK, **given) == WANTED[name]


def test_the_template_of_the_result_is_the_one_that_was_asked_for(talkers):
    settings = talkers / "base" / "tokenizer_config.json"
    settings.write_text(json.dumps({"chat_template": "{{ old }}", "eos_token": "<eos>"}))
    try:
        _linear(talkers, ["base"], chat_template="chatml")
        made = json.loads((talkers / "out" / "tokenizer_config.json").read_text())
        assert made == {"chat_template": CHAT_TEMPLATES["chatml"], "eos_token": "<eos>"}
        assert (talkers / "out" / "chat_template.jinja").read_text() == CHAT_TEMPLATES["chatml"]
        _linear(talkers, ["chat", "base"], chat_template="auto", tokenizer_source="union")
        assert (talkers / "out" / "chat_template.jinja").read_text() == "{{ old }}"
    finally:
        settings.unlink()


@pytest.mark.parametrize("text, words", [("{", "is damaged"), ("[]", "is no JSON object")])
def test_tokenizer_settings_that_cannot_be_read_are_refused_by_their_path(tmp_path, text, words):
    file = tmp_path / "tokenizer_config.json"
    file.write_text(text)
    with pytest.raises(ValueError, match=rf"tokenizer_config\.json: {words}.* Fetch it again"):
        with_chat_template({file.name: file}, "auto", [{file.name: file}])
