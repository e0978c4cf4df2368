"""The package's names: what is misspelt is told the nearest."""

import traceback

import jaxweights as jw


def test_a_misspelt_family_is_told_the_nearest_name():
    try:
        _ = jw.quantise
    except AttributeError as error:
        words = "".join(traceback.format_exception(error))
    assert "has no attribute 'quantise'. Did you mean: 'quantize'?" in words
