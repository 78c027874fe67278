"""Sends and receives without the other rank: labels tell those of this package, others are said to be alone."""

import json
from pathlib import Path

import pytest
import torch
from gpu_traces import event
from processes import run_torchrun

from tritonmoe.tools.doctor.attribution import attribute
from tritonmoe.tools.doctor.kineto_events import from_label
from tritonmoe.tools.doctor.reading import read_traces
from tritonmoe.tools.doctor.trace import Part
from tritonmoe.tools.doctor.verdict import as_text
from tritonmoe.transports.gloo import GlooExchange

WORKER = Path(__file__).parent / "own_layers_worker.py"

SIZE, STEPS, LATE_US = 3, 6, 50_000.0


def write(folder: Path, late: int) -> Path:
    """Write traces of ranks that post receives and sends at once, twice a step, on one thread; `late` sleeps first."""
    folder.mkdir()
    for rank in range(SIZE):
        events = []
        for step in range(STEPS):
            base = 1e6 + 200_000.0 * step
            came = [base + (LATE_US if one == late else 0.0) for one in range(SIZE)]
            events.append(event("user_annotation", f"ProfilerStep#{step}", base, 199_000.0, 1))
            for _ in range(2):
                events.append(event("cpu_op", "aten::mm", came[rank], 10_000.0, 1))
                posted, ended = came[rank] + 10_100.0, max(came) + 15_000.0
                for place, kind in enumerate(["recv"] * (SIZE - 1) + ["send"] * (SIZE - 1)):
                    start = posted + 10.0 * place
                    events.append(event("user_annotation", f"gloo:{kind}", start, ended - start, 1))
                came = [ended] * SIZE
            events.append(event("cpu_op", "aten::mm", came[rank], 10_000.0, 1))
        about = {"backend": "gloo", "rank": rank, "world_size": SIZE}
        (folder / f"{rank}.json").write_text(json.dumps({"distributedInfo": about, "traceEvents": events}))
    return folder


def test_each_is_said_to_be_alone(tmp_path: Path) -> None:
    run = read_traces(write(tmp_path / "run", late=1))
    assert any(
        "the files don't name the other rank of sends and receives: each counts alone" in words for words in run.limits
    )
    found = attribute(run.graph)
    assert found.error == pytest.approx(0, abs=0.05)  # what one thread has under way at once does not take turns
    assert "what these files can't tell" in as_text(run, found)
    assert not found.is_healthy
    assert "NOT CERTAIN: for" in as_text(run, found)


def test_a_label_tells_an_exchange() -> None:
    exchange = GlooExchange(Links(), None, torch.zeros(3, 4), torch.zeros(5, 4), "", 1.0)  # type: ignore[arg-type]
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        exchange.post_rows(1, 7, torch.zeros(3, 4), [1, 2], [3, 2], torch.zeros(5, 4))
    (label,) = (of.name for of in profile.events() if of.name.startswith("tritonmoe"))
    part = Part("all_to_all", 0.0, 0.0, None)
    from_label(part, label)
    assert (part.group_ranks, part.sequence, part.rows, part.element_bytes) == ((4, 6), 7, 5, 4)
    assert (part.sent, part.received) == ((16, 32), (48, 32))


class Links:
    """Stands in for the connections of ranks 4 and 6 of a job."""

    group = "0/0", (4, 6)

    def receive(self, part: torch.Tensor, peer: int, tag: int) -> object:
        return object()

    send = receive


@pytest.mark.thorough
@pytest.mark.alone
@pytest.mark.parametrize(("size", "wrapper", "late"), [(2, "ddp", 1), (4, "fsdp2", 2)])
def test_layers_of_this_package_under_the_profiler(size: int, wrapper: str, late: int, tmp_path: Path) -> None:
    run_torchrun(size, WORKER, str(tmp_path / "run"), wrapper, str(late), "0.5", cases=[wrapper])
    run = read_traces(tmp_path / "run")
    (first, *_) = attribute(run.graph).findings
    assert (first.kind, first.culprits.ranks) == ("late rank", (late,))
