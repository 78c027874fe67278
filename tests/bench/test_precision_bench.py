"""The bars for the noise of experts in an ExpertPrecision, on the inputs that bench.expert_precision has."""

import pytest

from bench.expert_precision import PRECISIONS, layer_noise, product_noise

SINGLE = {"normal": {"out": 28, "dx": 28, "dweight": 28}, "outliers": {"out": 27, "dx": 26, "dweight": 26}}
LAYER = {"normal": 23, "outliers": 21.5}


@pytest.mark.sweep(1)
@pytest.mark.parametrize("kind", LAYER)
@pytest.mark.parametrize("name", PRECISIONS)
def test_noise(name, kind):
    found = product_noise(PRECISIONS[name], kind)
    assert {key: value for key, value in found.items() if value < SINGLE[kind][key]} == {}
    assert min(layer_noise(PRECISIONS[name], kind).values()) >= LAYER[kind]
