"""jaxweights quantize refuses what does not fit, before anything is computed."""

import shutil

import pytest

from jaxweights.cli import main
from tests.cli._quantize import DATA


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
            ["there is no method 'gptqq'. The nearest: gptq"],
        ),
        (("--method", "rtnn"), ["there is no method 'rtnn'. The nearest: rtn"]),
        (("--method", "nf4", "--bits", 4), ["quantize.nf4 has no setting 'bits'. It takes"]),
        (("--method", "rtn", "--act-order"), ["has no setting 'act_order'"]),
        (("--method", "rtn", "--bits", 1), ["bits=1", "(bits is --bits)"]),
        (
            ("--method", "rtn", "--group-size", 48),
            ["group_size=48 does not divide", "64", "group_size is --group-size", "is --pad"],
        ),
        (("--method", "nvfp4", "--pad"), ["quantize.nvfp4 has no setting 'pad'"]),
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
            [
                "is a Codebook, and gptq holds only integers",
                "bitsandbytes (which holds NF4 and FP4)",
                "compressed-tensors (FP8, NVFP4, MXFP4, MXFP6 and MXFP8)",
            ],
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
