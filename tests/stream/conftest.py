"""Fixtures that the tests of checkpoints share."""

import resource

import pytest


@pytest.fixture
def file_limit():
    """Makes the system refuse to write files longer than 16 KiB, as a full disk would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16384, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
