"""What ranks of a benchmark tell each other is data, never code."""

import ast
import io
import json
import os
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import tritonmoe as tm
from tritonmoe.tools.benchmarks import ranks
from tritonmoe.tools.report.timeline import PassTimeline, Span, Timeline

PACKAGE = Path(tm.__file__).parent
SPAN = Span("dispatch 1", "dispatch", 1, "comm", 0.1, 1 / 3, 1e-300)
TIMELINE = Timeline("serial", 1, PassTimeline((SPAN, SPAN.shifted(1.0)), 2.5), PassTimeline((), 0.0))


def test_every_rank_gets_every_value() -> None:
    def value(rank: int) -> dict:
        return {"rank": rank, "text": "ä" * rank, "none": None, "many": [0.1] * rank, "inside": {"third": 1 / 3}}

    results = tm.run_on_emulated_ranks(lambda transport: ranks.gather(transport, value(transport.rank)), 3)
    assert results == [[value(rank) for rank in range(3)]] * 3


def test_a_timeline_arrives_as_it_was() -> None:
    assert Timeline.of_plain(json.loads(json.dumps(asdict(TIMELINE)))) == TIMELINE


class Harmful:
    """Makes a folder where it is unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.path,)


def test_what_a_peer_sends_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "made")
    sent = io.BytesIO()
    torch.save(Harmful(path), sent)
    with pytest.raises(TypeError, match="Harmful is not JSON serializable"):
        ranks.gather(tm.transports.LocalTransport(), Harmful(path))

    class Bytes:
        def encode(self) -> bytes:
            return sent.getvalue()

    monkeypatch.setattr(ranks.json, "dumps", lambda value: Bytes())
    with pytest.raises(ValueError, match="rank 0 sent a text that is not JSON"):
        ranks.gather(tm.transports.LocalTransport(), None)
    assert not os.path.exists(path)


UNPICKLERS = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.load", "marshal.loads", "shelve.open"),
    *("cloudpickle.loads", "dill.loads", "joblib.load"),
    # mpi4py's in small letters; torch.distributed's of objects
    *("comm.recv", "comm.bcast", "comm.gather", "comm.allgather", "comm.scatter", "comm.alltoall", "comm.sendrecv"),
    *("broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list", "recv_object_list"),
}


def calls_of(path: Path) -> list[tuple[str, ast.Call]]:
    nodes = ast.walk(ast.parse(path.read_text()))
    return [(ast.unparse(node.func), node) for node in nodes if isinstance(node, ast.Call)]


def test_nothing_in_the_package_unpickles() -> None:
    """Ids, a scheduler, a routing: read by torch.load with weights_only=True, or by NumPy's with allow_pickle=False."""
    loads = []
    for path in PACKAGE.rglob("*.py"):
        for name, call in calls_of(path):
            where = f"{path.relative_to(PACKAGE).as_posix()}:{call.lineno} {name}"
            unpickles = any(name == one or name.endswith(("." + one, "_" + one)) for one in UNPICKLERS)
            assert not unpickles, where
            if name in ("numpy.load", "np.load"):
                (argument,) = (keyword.value for keyword in call.keywords if keyword.arg == "allow_pickle")
                assert ast.literal_eval(argument) is False, where
            if name == "torch.load":
                loads.append(where.partition(":")[0])
                (argument,) = (keyword.value for keyword in call.keywords if keyword.arg == "weights_only")
                assert ast.literal_eval(argument) is True, where
    assert sorted(loads) == [
        "integrations/transformers/trainer_checkpoints.py",
        "runtime/plain_pickle.py",
    ]
