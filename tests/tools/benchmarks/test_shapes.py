"""The routings that layers are measured with."""

import pytest
import torch

from tritonmoe.tools.benchmarks.shapes import draw_routing


@pytest.mark.parametrize("routing", ["uniform", "zipf"])
def test_routing(routing):
    ids, weights = draw_routing(2000, 60, 6, routing, torch.Generator().manual_seed(0))
    assert ids.shape == weights.shape == (2000, 6)
    assert all(len(set(row)) == 6 for row in ids.tolist())
    torch.testing.assert_close(weights.sum(1), torch.ones(2000))
    load = torch.bincount(ids.flatten(), minlength=60).sort(descending=True).values
    assert (load[0] > 10 * load[30]) == (routing == "zipf")


def test_a_hot_expert_has_more_than_half_of_the_pairs():
    ids, _ = draw_routing(2000, 60, 6, "hot", torch.Generator().manual_seed(0))
    load = torch.bincount(ids.flatten(), minlength=60)
    assert load[0] > 0.5 * load.sum()
    assert load.min() > 0


def test_routing_has_no_other_name():
    with pytest.raises(ValueError, match="uniform, zipf or hot, got 'even'"):
        draw_routing(1, 2, 1, "even", torch.Generator())
