"""Small models and the command, for the tests of the command line."""

import pytest

from jaxweights.cli import main
from tests._tiny_models import BERT, write_tiny
from tests.cli._quantize import WIDE


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
