"""The package's names: what is misspelt is told the nearest."""

import pytest

import jaxweights as jw


def test_a_misspelt_family_carries_what_python_needs_to_tell_the_nearest_name():
    with pytest.raises(AttributeError, match="'jaxweights' has no attribute 'quantise'") as caught:
        _ = jw.quantise
    assert (caught.value.name, caught.value.obj) == ("quantise", jw)
    assert "quantize" in dir(jw)
