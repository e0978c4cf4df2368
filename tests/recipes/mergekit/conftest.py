"""Fixtures that the tests of merging configurations share."""

from tests.stream.conftest import file_limit as file_limit
