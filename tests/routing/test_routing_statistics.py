"""Counts of pairs and the numbers made of them, by hand."""

import math

import pytest
import torch

from tritonmoe.routing import expert_load, routing_statistics


def test_hand_written_statistics():
    statistics = routing_statistics(torch.tensor([[0, 1], [0, 2], [0, -1]]), 4)
    assert statistics.load.tolist() == [3, 1, 1, 0]
    assert statistics.mean_load == 1.25
    assert statistics.max_violation == pytest.approx(1.4)
    assert statistics.coefficient_of_variation == pytest.approx(math.sqrt(1.1875) / 1.25)
    assert statistics.entropy == pytest.approx(-(0.6 * math.log(0.6) + 2 * 0.2 * math.log(0.2)))
    assert statistics.normalized_entropy == pytest.approx(statistics.entropy / math.log(4))
    assert statistics.num_dead_experts == 1
    assert statistics.num_skipped_pairs == 1
    assert statistics.num_routed_pairs == 5


def test_statistics_of_one_expert_and_of_ids_out_of_range():
    alone = routing_statistics(torch.zeros(3, 1, dtype=torch.int32), 1)
    assert (alone.normalized_entropy, alone.max_violation, alone.num_dead_experts) == (1.0, 0.0, 0)
    assert expert_load(torch.tensor([[4, 3], [-7, 0]], dtype=torch.int32), 4).tolist() == [1, 0, 0, 1]
