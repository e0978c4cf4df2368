"""Every test runs under strict promotion, so that no dtype or rank changes unasked."""

import jax
import pytest


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "promotion(dtypes, ranks): 'standard' or 'strict' dtypes and 'allow' or 'raise' ranks, for "
        "code of others, such as models and optimizers, that cannot stand the strict rules",
    )


@pytest.fixture(autouse=True)
def _strict_promotion(request):
    marker = request.node.get_closest_marker("promotion")
    rules = {"dtypes": "strict", "ranks": "raise"} | (marker.kwargs if marker else {})
    with (
        jax.numpy_dtype_promotion(rules["dtypes"]),
        jax.numpy_rank_promotion(rules["ranks"]),
    ):
        yield


@pytest.fixture(scope="session")
def mesh():
    """Eight virtual devices in a 2 by 4 grid with axes `data` and `model`."""
    auto = jax.sharding.AxisType.Auto
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(auto, auto))
