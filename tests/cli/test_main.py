"""The command line: help with examples, clean errors, exit codes, JSON on standard output."""

import errno
import gc
import importlib
import json
import os
import re
import subprocess
import sys

import pytest

from jaxweights.cli import main
from jaxweights.cli._main import COMMANDS
from tests._tiny_models import LLAMA, write_tiny
from tests.stream.conftest import file_limit as file_limit

# Orbax's own threads meet the limit of a full disk, too, and what they leave half done complains
# when it is collected, some of it a test later.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture
def invoke(capsys):
    """Runs a command; gives exit code, standard output, standard error."""

    def run(*arguments):
        try:
            code = main([str(a) for a in arguments])
        except SystemExit as end:
            code = end.code
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_an_example_and_its_options(invoke, command):
    code, out, _ = invoke(command, "--help")
    assert code == 0
    assert re.search(rf"examples?:\n  jaxweights {command} ", out)
    assert "--json" in out and "--debug" in out


def test_the_examples_are_valid_command_lines():
    from jaxweights.cli._main import build_parser

    parser = build_parser()
    for command in COMMANDS:
        epilog = importlib.import_module(f"jaxweights.cli._{command}").EXAMPLES
        lines = [line.split() for line in epilog.splitlines() if line.startswith("  jaxweights ")]
        assert lines
        for line in lines:
            assert parser.parse_args(line[1:]).command == command


def test_the_main_help_lists_every_command_and_the_exit_codes(invoke):
    code, out, _ = invoke("--help")
    assert code == 0
    for command in COMMANDS:
        assert f"    {command} " in out
    assert "exit codes:" in out and "example:" in out


def test_no_command_shows_the_help_and_fails(invoke):
    code, out, err = invoke()
    assert (code, out) == (2, "")
    assert "example:" in err


def test_a_misspelt_command_is_named_with_the_nearest(invoke):
    code, _, err = invoke("insect", "x")
    assert code == 2
    assert "there is no command 'insect'. Did you mean 'inspect'?" in err


def test_a_missing_argument_is_a_usage_error(invoke):
    code, _, err = invoke("convert", "a", "b")
    assert code == 2
    assert "--to" in err


def test_an_error_is_one_clean_message_without_a_traceback(invoke, tmp_path):
    code, out, err = invoke("inspect", tmp_path / "absent")
    assert (code, out) == (1, "")
    assert err.startswith("jaxweights inspect: open_checkpoint:")
    assert "does not exist" in err and "Traceback" not in err


def test_with_json_an_error_is_json_too(invoke, tmp_path):
    code, out, err = invoke("inspect", tmp_path / "absent", "--json")
    assert code == 1
    assert "does not exist" in json.loads(out)["error"]
    assert "does not exist" in err


@pytest.fixture(scope="module")
def two_models(tmp_path_factory):
    """Two models that no file of 16 KiB holds, and a configuration that merges them."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("one", "two")):
        write_tiny(folder / name, LLAMA, seed=seed)
    models = "models: [{model: one}, {model: two}], parameters: {weight: 1}"
    (folder / "merge.yml").write_text(f"{{merge_method: linear, {models}, dtype: float32}}")
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ("merge", "merge.yml", "out"),
        ("convert", "one", "out", "--to", "safetensors"),
        ("convert", "one", "out", "--to", "orbax"),
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_a_full_disk_is_said_in_words_with_the_path_and_a_remedy(
    invoke, two_models, monkeypatch, file_limit, arguments
):
    monkeypatch.chdir(two_models)
    code, out, err = invoke(*arguments, "--quiet")
    assert (code, out) == (1, "")
    assert "Errno" not in err
    assert re.search(r": the disk is full while writing 'out'.*Free some space or choose", err)
    assert not (two_models / "out").exists()
    gc.collect()  # here, not in another file's test


def test_what_the_system_refuses_is_said_with_its_path_and_a_remedy(invoke, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), "secret.bin")

    monkeypatch.setattr("jaxweights.cli._inspect.execute", refuse)
    _, _, err = invoke("inspect", tmp_path)
    words = "'secret.bin': permission denied. Change its permissions or choose another path."
    assert err == f"jaxweights inspect: {words}\n"


def test_a_recipe_that_a_weight_must_be_left_out_of_is_told_how(invoke, two_models, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {{path: {two_models}/one}}\ntransforms:\n  - method: quantize.round_to_nearest\n"
        f"    bits: 4\n    group_size: 48\noutput: {{directory: {tmp_path}/out}}\n"
    )
    code, _, err = invoke("plan", recipe)
    assert code == 1 and "leave this weight out with `partition`" in err
    assert err.endswith("(what stays as it is is named by `except` in the step)\n")


def test_debug_lets_the_error_through(tmp_path):
    with pytest.raises(FileNotFoundError):
        main(["inspect", str(tmp_path / "absent"), "--debug"])


def test_an_unexpected_error_names_its_kind_and_debug(invoke, monkeypatch):
    def fail(options):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr("jaxweights.cli._inspect.execute", fail)
    code, _, err = invoke("inspect", "x")
    assert code == 1
    assert "ZeroDivisionError: division by zero (--debug shows where)" in err


def test_interruption_has_the_code_that_shells_expect(invoke, monkeypatch):
    def interrupt(options):
        raise KeyboardInterrupt

    for command in ("inspect", "merge"):
        monkeypatch.setattr(f"jaxweights.cli._{command}.execute", interrupt)
    code, _, err = invoke("inspect", "x")
    assert code == 130
    assert "interrupted; nothing was written" in err
    code, _, err = invoke("merge", "x", "y")
    assert code == 130
    assert "interrupted; the destination is as it was; say --resume" in err


def test_version_names_the_programs_that_decide_about_results(invoke):
    code, out, _ = invoke("--version")
    assert code == 0
    assert "jaxweights " in out and "jax " in out


def test_help_loads_no_model_code():
    program = (
        "import sys\n"
        "from jaxweights.cli import main\n"
        "try:\n    main(['run', '--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'flax', 'orbax', 'matplotlib', 'yaml', 'tokenizers', 'optax', 'rich'}\n"
        "found = heavy & set(sys.modules)\n"
        "assert not found, found\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
