"""What every rank runs of TRL with spread experts: `torchrun replayed_routing_worker.py DIRECTORY CASE...`."""

import os
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from test_replayed_routing import Rollout, expected_log_probs, make_model, make_trainer
from torch import Tensor
from worker_cases import run_cases

from tritonmoe.integrations import transformers as tmt

rank = int(os.environ["RANK"])


def make_spread_trainer(directory: Path, rollout: Rollout | None) -> Any:
    model = make_model()
    tmt.parallelize(model, dist.group.WORLD)
    return make_trainer(model, directory, rollout_func=rollout, max_steps=1)


def run_spread(directory: Path) -> None:
    """Each rank replays its own sequences, through experts of both."""
    make_spread_trainer(directory, None).train()
    rollout = Rollout()
    trainer = make_spread_trainer(directory, rollout)
    whole = make_model()
    tmt.patch(whole)
    seen = []
    compute = trainer._get_per_token_logps_and_entropies

    def method(model: Any, ids: Tensor, mask: Tensor, keep: int, *rest: Any, **named: Any) -> Any:
        result = compute(model, ids, mask, keep, *rest, **named)
        seen.append((ids, mask.bool(), keep, result[0].detach()))
        return result

    trainer._get_per_token_logps_and_entropies = method
    trainer.train()
    assert seen
    logs = next(entry for entry in trainer.state.log_history if "reward" in entry)
    shares = {key: value for key, value in logs.items() if key.startswith("routing_replay/")}
    of_first = [shares]
    dist.broadcast_object_list(of_first, src=0)
    assert shares == of_first[0]  # of all ranks, whose sequences differ
    assert shares["routing_replay/replayed_tokens_ratio"] == 1
    assert 0 < shares["routing_replay/changed_pairs_ratio"] < 1
    for ids, mask, keep, log_probs in seen:  # one step, whose weights are the first ones
        for row, real, found in zip(ids, mask, log_probs, strict=True):
            number, sequence = int(real[-keep:].sum()), row[real].tolist()
            expected = expected_log_probs(whole, sequence, number, rollout.rows[tuple(sequence)])
            torch.testing.assert_close(found[:number], expected.detach(), rtol=2e-4, atol=2e-5)


class Forgetful(Rollout):
    """An engine that hands over no routing on the second rank."""

    def __call__(self, *arguments: Any) -> dict[str, Any]:
        found = super().__call__(*arguments)
        return {key: value for key, value in found.items() if rank == 0 or key != "routed_experts"}


def run_refused(directory: Path) -> None:
    """One rank's rollout is shifted, or has no routing: both raise, and none waits."""
    trainer = make_spread_trainer(directory, Forgetful(noise=0.01))
    with pytest.raises(ValueError, match="got none" if rank else "another rank's rollout can't be replayed"):
        trainer.train()
    trainer = make_spread_trainer(directory, Rollout(lambda rows: rows.roll(-rank, 0), noise=0.01))
    with pytest.raises(ValueError, match="shifted by one" if rank else "another rank's rollout can't be replayed"):
        trainer.train()


if __name__ == "__main__":
    kinds = {"spread:": run_spread, "refused:": run_refused}
    run_cases(lambda case: kinds[case](Path(sys.argv[1])), sys.argv[2:], timedelta(seconds=60))
