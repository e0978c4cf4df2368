"""Small models as folders, for the tests of recipes."""

import pytest

from tests._tiny_models import BERT, LLAMA, write_tiny
from tests.recipes._onload import FAMILIES


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("models") / "llama", LLAMA)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("models") / "bert", BERT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, config in FAMILIES.items():
        write_tiny(folder / name, config)
    return folder
