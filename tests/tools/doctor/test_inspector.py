"""The NCCL Inspector's files: what its own writer wrote, which end of a link is slow, and format 4.3."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tritonmoe.tools.doctor.attribution import Finding, attribute
from tritonmoe.tools.doctor.joining import SlowLinks
from tritonmoe.tools.doctor.reading import read_traces

WRITTEN = Path(__file__).parent / "data" / "inspector_slow_link"
BYTES = 4_000_000


def finding(folder: Path) -> Finding:
    (one,) = attribute(read_traces(folder).graph).findings
    return one


def test_what_its_own_writer_wrote() -> None:
    run = read_traces(WRITTEN)
    assert run.kinds == {"NCCL Inspector": 4}
    graph = run.graph
    assert {len(members) for members in graph.exchanges} == {4}
    sent = {graph.members[0].sent for members in graph.exchanges}
    assert sent == {(0, 4_001_000, 4_002_000, 4_003_000)}
    one = finding(WRITTEN)
    assert (one.kind, one.culprits.links, set(one.culprits.ranks)) == ("slow link", ((1, 2),), {1, 2})
    assert one.culprits.words.startswith("need 6.0 times as long as usual for data from 1 to 2, ")
    assert one.cost.seconds == pytest.approx(2 * 5 * 400e-6, rel=0.05)


def write(folder: Path, slow: set[tuple[int, int]], late: int | None, timed: bool, new: bool, size: int = 4) -> None:
    """Write 8 steps of two all-to-alls and an all-reduce, in which slow links take 6 times as long."""
    folder.mkdir()
    records: list[list[dict[str, Any]]] = [[] for _ in range(size)]
    now = [1e15 for _ in range(size)]
    counts = [0] * size
    for step in range(8):
        for layer in range(2):
            begin = [t + (5000 if rank == late and layer == 0 else 0) for rank, t in enumerate(now)]
            ends = {
                (s, r): max(begin[s], begin[r]) + 400 * (6 if (s, r) in slow else 1)
                for s in range(size) for r in range(size) if s != r
            }  # fmt: skip
            for rank in range(size):
                for (s, r), end in ends.items():
                    if rank in (s, r):
                        counts[rank] += 1
                        pair = {
                            "p2p": "Send" if rank == s else "Recv",
                            "p2p_sn": counts[rank],
                            "p2p_msg_size_bytes": BYTES,
                        }
                        pair |= {"p2p_peer": r if rank == s else s, "p2p_exec_time_us": end - begin[rank]}
                        if timed:
                            pair["event_trace_ts"] = {"kernel_events": [{"kernel_start_ts": begin[rank]}]}
                        records[rank].append({"p2p_perf": pair})
                now[rank] = max(end for link, end in ends.items() if rank in link) + 3000
        last = max(now)
        for rank in range(size):
            sum_ = {"coll": "AllReduce", "coll_sn": step + 1, "coll_msg_size_bytes": 8000}
            sum_ |= {"coll_exec_time_us": last - now[rank] + 900}
            if timed:
                sum_["event_trace_ts"] = {"kernel_events": [{"kernel_start_ts": now[rank]}]}
            records[rank].append({"coll_perf": sum_})
            now[rank] = last + 900
    for rank, own in enumerate(records):
        head = {"header": {"id": "0xabc", "rank": rank, "n_ranks": size}, "metadata": {}}
        if new:
            stats = {f"{kind}_records": sum(f"{kind}_perf" in one for one in own) for kind in ("coll", "p2p")}
            lines = [{**head, "dump_stats": stats}, *own]
        else:
            lines = [{**head, **one} for one in own]
        (folder / f"{rank}.log").write_text("\n".join(json.dumps(line) for line in lines))


ENDS = {
    "link": ({(1, 2)}, {1, 2}, "the fault lies between the ranks"),
    "sender": ({(1, 0), (1, 2), (1, 3)}, {1}, "needs 6.0 times as long as usual for all data that it sends, so"),
    "receiver": ({(0, 2), (1, 2), (3, 2)}, {2}, "needs 6.0 times as long as usual for all data that it receives, so"),
    "port": (
        {(1, 0), (1, 2), (1, 3), (0, 1), (2, 1), (3, 1)}, {1},
        "needs 6.0 times as long as usual for all data that it sends and receives, so",
    ),
}  # fmt: skip


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize("name", ENDS)
def test_which_end_of_a_link_is_slow(name: str, new: bool, tmp_path: Path) -> None:
    slow, ranks, words = ENDS[name]
    write(tmp_path / "run", slow, None, timed=True, new=new)
    one = finding(tmp_path / "run")
    assert (one.kind, set(one.culprits.links), set(one.culprits.ranks)) == ("slow link", slow, ranks)
    assert words in one.culprits.words
    assert one.cost.seconds == pytest.approx(2 * 5 * 400e-6, rel=0.02)


@pytest.mark.parametrize("timed", [True, False])
def test_late_and_healthy_ranks_have_no_slow_links(timed: bool, tmp_path: Path) -> None:
    write(tmp_path / "late", set(), 3, timed, new=False)
    one = finding(tmp_path / "late")
    assert (one.kind, one.culprits.ranks) == ("late rank", (3,))
    assert one.cost.seconds == pytest.approx(0.005, rel=0.02)
    write(tmp_path / "healthy", set(), None, timed, new=True)
    assert attribute(read_traces(tmp_path / "healthy").graph).findings == ()


def test_without_times_a_send_and_its_receive_tell_who_came_late(tmp_path: Path) -> None:
    write(tmp_path / "run", {(1, 2)}, None, timed=False, new=False)
    run = read_traces(tmp_path / "run")
    assert any("wrote how long exchanges took, not when" in words for words in run.limits)
    found = attribute(run.graph)
    assert (found.findings[0].kind, found.findings[0].culprits.links) == ("slow link", ((1, 2),))
    assert run.graph.linked_s is not None
    assert run.graph.linked_s[run.graph.exchanges[0]].tolist() == pytest.approx([0.0, 0.002, 0.002, 0.0])


def test_the_wire_tells_more_than_times_in_which_ranks_wait(tmp_path: Path) -> None:
    """Proxy records: rank 1's sends take long on the wire, whoever waits for whom."""
    write(tmp_path / "run", set(), None, timed=True, new=True)
    for rank in range(4):
        file = tmp_path / "run" / f"{rank}.log"
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        proxies = [
            {"proxy_trace": {"record_type": "proxy_op", "direction": "send", "peer": peer, "steps": [
                {"trans_size_bytes": 1000, "wire_us": 60 if rank == 1 else 10}] * 3}}
            for peer in range(4) if peer != rank
        ]  # fmt: skip
        lines[0]["dump_stats"]["proxy_records"] = len(proxies)
        file.write_text("\n".join(json.dumps(line) for line in [*lines, *proxies]))
    slow = read_traces(tmp_path / "run").graph.fault
    assert isinstance(slow, SlowLinks)
    assert (set(slow.links), slow.ranks) == ({(1, 0), (1, 2), (1, 3)}, (1,))
    assert slow.of_byte_s[1, 0] == pytest.approx(6 * slow.usual_s[1, 0])


def test_a_cut_dump_says_how_many_records_are_missing(tmp_path: Path) -> None:
    write(tmp_path / "run", set(), None, timed=True, new=True)
    file = tmp_path / "run" / "2.log"
    lines = file.read_text().splitlines()
    file.write_text("\n".join(lines[:-7]))
    assert any(words.startswith("7 records are missing") for words in read_traces(tmp_path / "run").limits)


def test_ranks_of_a_communicator_are_those_whose_files_have_its_id(tmp_path: Path) -> None:
    """Two communicators of two ranks each beside one of all: ranks in them are not ranks of the job."""
    write(tmp_path / "run", set(), None, timed=True, new=False)
    for rank in range(4):
        file = tmp_path / "run" / f"{rank}.log"
        head = {"header": {"id": f"0x{rank % 2}", "rank": rank // 2, "n_ranks": 2}, "metadata": {}}
        sums = []
        for step in range(8):
            start = 1e15 + 100 + 8900 * step
            sum_ = {"coll": "AllGather", "coll_sn": step + 1, "coll_exec_time_us": 50.0, "coll_msg_size_bytes": 8}
            sum_["event_trace_ts"] = {"kernel_events": [{"kernel_start_ts": start}]}
            sums.append(json.dumps({**head, "coll_perf": sum_}))
        file.write_text(file.read_text() + "\n" + "\n".join(sums))
    graph = read_traces(tmp_path / "run").graph
    gathers = [
        {graph.ranks[graph.members[one].rank] for one in members}
        for members in graph.exchanges
        if graph.members[members[0]].key[1].startswith("all_gather")
    ]
    assert {frozenset(one) for one in gathers} == {frozenset({0, 2}), frozenset({1, 3})}


def test_a_packed_file_is_read(tmp_path: Path) -> None:
    write(tmp_path / "run", set(), 1, timed=True, new=False)
    for file in list((tmp_path / "run").iterdir()):
        file.with_suffix(".json.gz").write_bytes(gzip.compress(file.read_bytes()))
        file.unlink()
    assert finding(tmp_path / "run").culprits.ranks == (1,)
