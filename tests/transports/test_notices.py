"""What a rank is told of another one that leaves no notice where it is waited for."""

import pytest
import torch.distributed as dist

from tritonmoe.transports import notices
from tritonmoe.transports.notices import Breakdown, Notice, Notices


@pytest.mark.parametrize(
    ("is_earlier", "words"),
    [(True, "rank 1 gave no sign: it is late"), (False, "rank 1 closed its transport in transport 0 of this group")],
)
def test_a_late_rank_is_not_blamed_for_an_earlier_transport(
    is_earlier: bool, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it left of one is told where it had made this transport before: then it makes the calls of the other."""
    monkeypatch.setattr(notices, "GRACE_S", 0.1)
    store = dist.HashStore()
    waiting, first = Notices(store, 0, 2, 1), Notices(store, 1, 2, 0)
    if not is_earlier:
        Notices(store, 1, 2, 1)
    first.put_up(Notice(0, 0, "closed its transport"))
    if is_earlier:
        Notices(store, 1, 2, 1)
    breakdown = Breakdown(waiting, 0, 0)
    assert breakdown.claim()
    breakdown.note("has not heard from ranks [1]", [1])
    assert breakdown.explain().startswith(f"rank 0 has not heard from ranks [1]; {words}")
