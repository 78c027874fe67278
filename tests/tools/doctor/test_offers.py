"""What would help runs of others: gains are those of cases with a known answer; what can't be known is not offered."""

import statistics
from functools import partial
from pathlib import Path

import pytest
import torch

from bench.faults import Fault
from bench.foreign_scenarios import Scenario
from bench.synthetic_traces import ROW_S, WIDTH, write_traces
from tritonmoe.config.overlap import OverlapPlan
from tritonmoe.tools.benchmarks.stand_ins import FixedExperts, run_passes
from tritonmoe.tools.doctor.advice import setting_of
from tritonmoe.tools.doctor.graph import Graph, Kind, Member, Run
from tritonmoe.tools.doctor.offers import Offers, layers_of, offers_of
from tritonmoe.tools.doctor.reading import read_traces
from tritonmoe.transports import LinkModel, Transport
from tritonmoe.transports.emulated.emulated_ranks import run_on_emulated_ranks

NUM_STEPS = 4


@pytest.mark.parametrize(
    "plan",
    [OverlapPlan(), OverlapPlan((1, 2, 1), local_start=16), OverlapPlan((1,) * 4, False, wire_dtype=torch.bfloat16)],
)
def test_advice_names_a_setting(plan: OverlapPlan) -> None:
    """What is said can be given to a layer, and is the plan whose gain was predicted."""
    assert eval(setting_of(plan).removeprefix("overlap="), {"OverlapPlan": OverlapPlan, "torch": torch}) == plan


def graph_of(
    there_s: float,
    compute_s: list[float],
    back_s: float,
    *,
    sent: list[list[int]] | None = None,
    element_bytes: int | None = 4,
    beside_s: float = 0.0,
) -> Graph:
    """Return a graph whose ranks send rows, compute for so long each, and send them back, in every step."""
    size = len(compute_s)
    rows = sent or [[0 if i == k else 1000 for k in range(size)] for i in range(size)]
    home = [list(column) for column in zip(*rows, strict=True)]
    graph = Graph(list(range(size)), list(range(NUM_STEPS)), [[] for _ in range(size)], begin_s=[0.0] * size)
    for step in range(NUM_STEPS):
        graph.measured_s.append(beside_s + there_s + max(compute_s) + back_s)
        for number, (seconds, splits) in enumerate(((there_s, rows), (back_s, home))):
            exchange = []
            for rank in range(size):
                program = graph.programs[rank]
                key = ("forward", "all_to_all", number)
                gone, came = tuple(splits[rank]), tuple(of[rank] for of in splits)
                member = Member(rank, step, 2 * step + number, key, 0, 0.0, seconds, None, gone, came)
                member.element_bytes = element_bytes
                exchange.append(len(graph.members))
                graph.members.append(member)
                program.append((Kind.POST, exchange[-1]))
                if number == 0 and beside_s:
                    graph.runs.append(Run(rank, step, ("forward", "beside"), beside_s))
                    program.append((Kind.RUN, len(graph.runs) - 1))
                program.append((Kind.WAIT, exchange[-1]))
                if number == 0:
                    graph.runs.append(Run(rank, step, ("forward", "before", "all_to_all", 1), compute_s[rank]))
                    program.append((Kind.RUN, len(graph.runs) - 1))
                else:
                    program.append((Kind.STEP, step))
            graph.exchanges.append(exchange)
    return graph


def gains(graph: Graph) -> dict[str, float]:
    return {one.words: one.gain.seconds for one in offers_of(graph)}


def test_layers_of_a_trace(tmp_path: Path) -> None:
    write_traces(Scenario("", 1, num_layers=3, num_steps=5), tmp_path)
    layers = layers_of(read_traces(tmp_path).graph)
    assert len(layers) == 5 * 3 * 2
    assert [layer.phase for layer in layers if layer.step == 2] == ["forward"] * 3 + ["backward"] * 3
    for layer in layers:
        assert not layer.is_overlapped
        for place, seconds in enumerate(layer.compute_s):
            assert layer.sent[place][place] == 0  # what stays on its rank does not travel
            rows = sum(one[place] for one in layer.sent) / (4 * WIDTH)
            times = 2 if layer.phase == "backward" else 1
            assert seconds > times * ROW_S * rows


def test_two_chunks_by_hand() -> None:
    """Rows travel for 10 s, experts take 20 s, rows come home for 10 s: 40 s.

    In two chunks: dispatches end at 5 and 10, experts at 15 and 25, combines at 20 and 30.
    """
    offers = Offers(graph_of(10.0, [20.0, 20.0], 10.0))
    offers.latency_s = 0.0
    (layer, *_) = offers.layers
    assert offers.saved(layer, OverlapPlan((1, 1), local_first=False), 0.0) == pytest.approx(10.0, abs=1e-6)
    with_cost = offers.saved(layer, OverlapPlan((1, 1), local_first=False), 1.0)
    assert with_cost == pytest.approx(9.0, abs=1e-6)


def test_a_slow_rank_is_waited_for_by_chunks_too() -> None:
    """One rank computes 40 s: in two chunks its experts end at 25 and 45, and rows are home at 50 instead of 60."""
    offers = Offers(graph_of(10.0, [20.0, 40.0], 10.0))
    offers.latency_s = 0.0
    assert offers.saved(offers.layers[0], OverlapPlan((1, 1), local_first=False), 0.0) == pytest.approx(10.0, abs=1e-6)


def test_narrower_rows_by_hand() -> None:
    """The shorter exchange takes 6 s, which is taken for the latency: of 10 s half of the 4 beyond it is saved."""
    found = gains(graph_of(10.0, [0.001] * 4, 6.0))
    assert found["rows sent as bfloat16"] == pytest.approx(2.0)
    fp8 = "dispatched rows sent as fp8, in forward"
    assert found[fp8] == pytest.approx(4.0 * (1 - (1 + 4 / 128) / 4))
    two, unknown = (gains(graph_of(10.0, [0.001] * 4, 6.0, element_bytes=width)) for width in (2, None))
    assert (fp8 in two, "rows sent as bfloat16" in two) == (True, False)
    assert not any("sent as" in words for words in unknown)


def test_what_cannot_be_known_is_not_offered() -> None:
    graph = graph_of(10.0, [20.0, 20.0], 10.0)
    for member in graph.members:
        member.sent = member.received = None
    assert offers_of(graph) == []
    alone = graph_of(10.0, [20.0, 20.0], 10.0, sent=[[0, 1000], [500, 0]])
    for number, member in enumerate(alone.members):
        if number % 4 >= 2:  # what comes home is not what was sent
            member.sent = (7, 7)
    assert layers_of(alone) == []


def test_what_is_overlapped_already_gets_no_chunks() -> None:
    found = gains(graph_of(10.0, [20.0, 20.0], 10.0, beside_s=8.0))
    assert not any("chunks" in words for words in found)


@pytest.mark.thorough
def test_balance_gains_what_imbalance_costs(tmp_path: Path) -> None:
    share = write_traces(Scenario("", 11, faults=(Fault("imbalance", (0,), 0.7),)), tmp_path)
    graph = read_traces(tmp_path).graph
    balance = next(gain for words, gain in gains(graph).items() if words.startswith("rows spread evenly"))
    assert balance / statistics.fmean(graph.measured_s) == pytest.approx(share, rel=0.1)


SIZE, TOKENS, MODEL_WIDTH = 4, 1024, 128
EXPERTS_S, EXCHANGE_S = 0.3, 0.15


def _forward(transport: Transport, plan: OverlapPlan) -> tuple[float, list[tuple[str, float]]]:
    """Run one forward whose tokens all leave their rank; give its seconds, and those of its steps."""
    generator = torch.Generator().manual_seed(transport.rank)
    others = [rank for rank in range(SIZE) if rank != transport.rank]
    ids = torch.tensor(others)[torch.randint(SIZE - 1, (TOKENS, 1), generator=generator)]
    transport.barrier()
    x = torch.randn(TOKENS, MODEL_WIDTH)
    (report,) = run_passes(
        transport, plan, x, ids, torch.ones(TOKENS, 1), SIZE,
        lambda rows, of: FixedExperts(EXPERTS_S, of.receive_offsets, rows, top_k=1),
    ).reports  # fmt: skip
    return report.total_s, [(step.step.kind.value, step.end_s - step.start_s) for step in report.steps]


@pytest.mark.alone
@pytest.mark.thorough
def test_chunks_gain_on_emulated_ranks_what_is_promised() -> None:
    """A serial call is all that the offer knows; what it promises is what a call with these chunks gains."""
    link = LinkModel(bandwidth_gb_per_s=TOKENS * MODEL_WIDTH * 4 / EXCHANGE_S / 1e9)
    serial = OverlapPlan((1,), local_first=False, serial=True)

    def run(plan: OverlapPlan) -> tuple[float, list[dict[str, float]]]:
        """Return the seconds of a call, and those of each step by rank."""
        found = run_on_emulated_ranks(partial(_forward, plan=plan), SIZE, link=link)
        return max(seconds for seconds, _ in found), [dict(steps) for _, steps in found]

    runs = [run(serial)[1] for _ in range(3)]
    # An exchange takes what it does on the rank that comes last: on the others waiting for that one is in it.
    there_s, back_s = (
        statistics.median(min(rank[kind] for rank in of) for of in runs) for kind in ("dispatch", "combine")
    )
    experts_s = [statistics.median(of[rank]["experts"] for of in runs) for rank in range(SIZE)]
    offers = Offers(graph_of(there_s, experts_s, back_s))
    offers.latency_s = 0.0
    (offer,) = [one for one in offers.all() if "chunks" in one.words]
    plan = offers.best_plan(offers.layers[:1], offers.fixed_of(offers.layers))
    gained = statistics.median(run(serial)[0] - run(plan)[0] for _ in range(5))
    assert 0.85 * offer.gain.low_s <= gained <= 1.15 * offer.gain.high_s
    assert offer.gain.high_s == pytest.approx(gained, rel=0.2)  # experts that sleep cost no more in chunks
