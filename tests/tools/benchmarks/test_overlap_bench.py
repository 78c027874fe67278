"""`tritonmoe bench overlap`: its routings, its controls, what it writes, and that nothing of it stays behind."""

import html
import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from html_pages import check_page
from namespace_processes import processes_in, start_of

import tritonmoe as tm
from tritonmoe.overlap.simulation.cost_model import LayerWork, LinkCosts
from tritonmoe.tools.benchmarks import BENCHMARKS, load, overlap
from tritonmoe.tools.benchmarks.measured_layer import MeasuredLayer, work_of_one
from tritonmoe.tools.benchmarks.namespaces import parse_rate, unusable_reason
from tritonmoe.tools.benchmarks.overlap import main
from tritonmoe.tools.benchmarks.overlap_report import verdict
from tritonmoe.tools.benchmarks.overlap_variants import variants_of
from tritonmoe.tools.benchmarks.workload import MODELS, Workload, draw_ids
from tritonmoe.tools.cli import main as tritonmoe_main
from tritonmoe.transports import Transport

ROOT = Path(tm.__file__).parents[1]
REASON = unusable_reason()
NEEDS_NAMESPACES = pytest.mark.skipif(REASON is not None, reason=str(REASON))
QUICK = ["--model", "tiny", "--rounds", "2", "--chunks", "1", "3"]
MERITS = ("hidden_share", "exposed_ms", "bound_ratio", "pass_bound_ratio", "speed_up")

RECORDING = ROOT / "bench" / "results" / "recordings" / "slow_link"


def test_routings() -> None:
    num_experts, top_k, _, _ = MODELS["fine"]
    for routing in ("uniform", "zipf:1.2", "remote"):
        ids = draw_ids(Workload("fine", 300, routing), rank=1, size=4)
        assert ids.shape == (300, top_k)
        assert all(len(set(row)) == top_k for row in ids.tolist())
        assert ids.min() >= 0
        assert ids.max() < num_experts
        counts = torch.bincount(ids.flatten(), minlength=num_experts).sort(descending=True).values
        share = float(counts[: num_experts // 8].sum() / counts.sum())
        # zipf:1.2 gives the first 8 of 64 experts 64 % of the first choices, and less of 8 choices without return.
        assert (0.3 < share < 0.65) if routing == "zipf:1.2" else share < 0.25
        if routing == "remote":
            assert not ((ids >= 16) & (ids < 32)).any()
    assert not torch.equal(draw_ids(Workload("fine", 9), 0, 2), draw_ids(Workload("fine", 9), 1, 2))


def test_routing_files(tmp_path: Path) -> None:
    ids = torch.arange(12).view(6, 2) % 8
    (tmp_path / "ids.json").write_text(json.dumps(ids.tolist()))
    torch.save(ids.to(torch.int32), tmp_path / "ids.pt")
    for name in ("ids.json", "ids.pt"):
        drawn = draw_ids(Workload("tiny", 3, str(tmp_path / name)), rank=1, size=2)
        assert drawn.dtype == torch.int64
        assert drawn.tolist() == ids[3:].tolist()
    with pytest.raises(ValueError, match=r"at least W \* T = 2 \* 4 rows of K = 2 ids, got \(6, 2\)"):
        draw_ids(Workload("tiny", 4, str(tmp_path / "ids.json")), 0, 2)
    for routing, words in (
        ("none", "uniform, remote, zipf:S or a file"),
        ("zipf:x", "exponent S"),
        ("zipf:nan", "exponent S"),
    ):
        with pytest.raises(ValueError, match=words):
            draw_ids(Workload("tiny", 4, routing), 0, 2)
    with pytest.raises(ValueError, match=r"needs top_k \(2\) experts on other ranks, and there are 0"):
        draw_ids(Workload("tiny", 4, "remote"), 0, 1)


def test_files_of_no_ids(tmp_path: Path) -> None:
    def refused(path: Path, words: str) -> None:
        with pytest.raises(ValueError, match=words):
            draw_ids(Workload("tiny", 1, str(path)), 0, 2)

    for text in (
        "",
        "{}",
        "[[1, 2], [3]]",
        '[["a", "b"]]',
        "[[NaN, 1]]",
        "[[1e999, 1]]",
        "[" * 9999,
        f"[[{10**30}, 1]]",
    ):
        (tmp_path / "ids.json").write_text(text)
        refused(tmp_path / "ids.json", "holds no ids|must hold a tensor of integers")
    for value in (torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool), [1, 2]):
        torch.save(value, tmp_path / "ids.pt")
        refused(tmp_path / "ids.pt", "must hold a tensor of integers")
    (tmp_path / "ids.pt").write_bytes(pickle.dumps(Path, 2))
    refused(tmp_path / "ids.pt", "holds no ids")
    (tmp_path / "ids.pt").write_bytes(b"")
    refused(tmp_path / "ids.pt", "holds no ids")


@pytest.mark.parametrize(("text", "bits"), [("1gbit", 1e9), ("2.5mbit", 2.5e6), ("7kbit", 7e3), ("8bit", 8.0)])
def test_rates(text: str, bits: float) -> None:
    assert parse_rate(text) == bits


@pytest.mark.parametrize("text", ["", "1", "gbit", "-1gbit", "0bit", "1gb", "nanbit"])
def test_bad_rates(text: str) -> None:
    with pytest.raises(ValueError, match="a rate is a positive number with bit, kbit, mbit or gbit"):
        parse_rate(text)


def test_every_kind_is_measured_for_every_number_of_chunks() -> None:
    names = [str(variant) for variant in variants_of([1, 4], 4)]
    assert len(set(names)) == len(names)
    for kind in ("communication", "serial", "overlapped", "free transport"):
        assert {f"{kind} C=1", f"{kind} C=4"} <= set(names)
    assert {"compute", "auto", "overlapped C=4 ramp x2", "overlapped C=4 ramp x4", "overlapped C=4 of experts"} <= set(
        names
    )
    assert not any("experts" in str(variant) for variant in variants_of([1, 4], 1))
    assert not any(name.startswith("two levels") for name in names)


def check_results(path: Path, num_ranks: int) -> dict:
    written = json.loads(path.read_text())
    assert written["benchmark"] == "overlap"
    results = written["results"]
    assert results["ranks"] == num_ranks
    assert set(results["variants"]) == {str(variant) for variant in variants_of([1, 3], MODELS["tiny"][0] // num_ranks)}
    assert {point["name"] for point in results["sweep"]} <= set(results["variants"])
    for times in results["variants"].values():
        assert times["samples"] == 2
        assert times["median_ms"] > 0
    schedules = {name for name in results["variants"] if name.startswith(("serial", "overlapped"))}
    assert set(results["predicted_ms"]) == schedules
    assert all(predicted > 0 for predicted in results["predicted_ms"].values())
    summary = results["summary"]
    for kind in ("compute", "communication", "serial", "overlapped"):
        fastest = min(t["median_ms"] for name, t in results["variants"].items() if name.startswith(kind))
        assert summary[f"T_{kind}"]["median_ms"] == fastest
    for kind in ("overlapped", "auto"):
        assert all(math.isfinite(summary[kind][merit]) for merit in (*MERITS, "contention"))
        assert summary[kind]["speed_up"] == round(summary["T_serial"]["median_ms"] / summary[kind]["median_ms"], 4)
        assert summary[kind]["contention"] > 0
    assert results["verdict"] == verdict(results)
    assert results["verdict"]["case"] in ("few rounds", "no bound", "series too long")  # of two rounds
    return results


@pytest.mark.thorough
def test_emulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [str(tmp_path / name) for name in ("r.json", "r.png", "r.trace")]
    arguments = ["--emulate", "2", "--tokens", "40", *QUICK, "--compute-ratio", "1"]
    files.append(str(tmp_path / "r.html"))
    assert main([*arguments, "--json", files[0], "--png", files[1], "--trace", files[2], "--html", files[3]]) == 0
    results = check_results(tmp_path / "r.json", 2)
    page = (tmp_path / "r.html").read_text()
    _, shown = check_page(page)
    assert shown == results
    assert results["verdict"]["text"] in html.unescape(page)
    assert results["emulated"] is True
    assert results["rate_bits_per_s"] != 1e9
    assert results["sent_bytes"] is None
    assert sum(map(sum, results["traffic_rows"])) > 80
    assert (tmp_path / "r.png").read_bytes()[:4] == b"\x89PNG"
    events = json.loads((tmp_path / "r.trace").read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1}
    lanes = {event["args"]["name"] for event in events if event["name"] == "thread_name"}
    best = results["summary"]["T_overlapped"]["variant"]
    assert {f"{best}: comm", f"{best}: compute", f"{best}, planned: comm", f"{best}, planned: compute"} <= lanes
    said = capsys.readouterr()
    assert "emulated link" in said.out
    assert "measuring" not in said.out  # but on stderr, where ranks other than the first say nothing
    words = [line.split(":")[0] for line in said.err.splitlines()]
    assert words[0].startswith("choosing the link's rate")
    assert words.count(f"measuring {len(results['variants'])} schedules in 2 rounds") == len(words) - 1
    check_words(results, said.out)


def check_words(results: dict, text: str) -> None:
    """Every figure of the JSON stands in the text under its name and with its value, and in the legend."""
    *table, legend, last = text.split("\n\n")
    assert " ".join(last.split()) == results["verdict"]["text"]
    rows: dict[str, str] = {}
    for line in "\n".join(table).splitlines():
        if line.strip():
            rows.setdefault(line.split()[0], line)  # a warning below the table may begin with a row's name
    of_kinds = [results["summary"][kind] for kind in ("overlapped", "auto")]
    for name in ("contention", "over_best", *MERITS):
        assert all(f"{kind[name]:.3f}" in rows[name] for kind in of_kinds if name in kind)
        assert f"\n{name} " in legend
    for kind in ("compute", "communication", "serial", "overlapped"):
        assert f"{results['summary'][f'T_{kind}']['median_ms']:.2f} ms" in rows[f"T_{kind}"]
        assert f"T_{kind} " in legend


@pytest.mark.thorough
def test_one_rank_computes_and_the_others_are_replayed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # What --emulate does on a GPU, here on a CPU.
    monkeypatch.setattr(overlap, "_emulate_all", lambda *given: overlap._emulate_one(*given, "cpu"))
    plans: dict[int, list] = {rank: [] for rank in range(4)}
    run_layer = MeasuredLayer._run_layer

    def counted(self: MeasuredLayer, transport: Transport, config: tm.OverlapConfig) -> object:
        report = run_layer(self, transport, config)
        plans[transport.rank].append(report.overlap)
        return report

    monkeypatch.setattr(MeasuredLayer, "_run_layer", counted)
    files = [str(tmp_path / name) for name in ("r.json", "r.png", "r.trace")]
    arguments = ["--emulate", "4", "--tokens", "40", *QUICK, "--compute-ratio", "1"]
    assert main([*arguments, "--json", files[0], "--png", files[1], "--trace", files[2]]) == 0
    # The peers ran every plan once, in the order in which rank 0 first met them.
    assert plans[1] == plans[2] == plans[3] == list(dict.fromkeys(plans[0]))
    assert len(plans[0]) > 2 * len(plans[1])
    results = check_results(tmp_path / "r.json", 4)
    assert results["emulated"] is True
    assert results["computing_ranks"] == 1
    assert results["rate_bits_per_s"] != 1e9
    assert sum(map(sum, results["traffic_rows"])) > 160
    assert results["summary"]["auto"]["num_chunks"] in {plan.num_chunks for plan in plans[1]}
    events = json.loads((tmp_path / "r.trace").read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0}
    words = "one of 4 ranks computes, the others are replayed; emulated link"
    assert words in results["link"]
    assert words in capsys.readouterr().out


def test_a_peer_that_fails_ends_the_measurement(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overlap, "_emulate_all", lambda *given: overlap._emulate_one(*given, "cpu"))
    record = MeasuredLayer.record

    def fails(self: MeasuredLayer, plan: tm.OverlapPlan) -> object:
        if self.transport.rank == 2 and plan.num_chunks == 3:
            raise ValueError("no memory for this plan")
        return record(self, plan)

    monkeypatch.setattr(MeasuredLayer, "record", fails)
    assert main(["--emulate", "4", "--tokens", "9", *QUICK]) == 2
    assert "no memory for this plan" in capsys.readouterr().err


def test_a_rank_whose_peers_are_replayed_has_the_work_of_its_own_port() -> None:
    rows = torch.tensor([[5, 1, 2], [4, 7, 90], [6, 80, 9]], dtype=torch.float64)
    one = work_of_one(LayerWork(rows, 2 * rows, row_bytes=8, top_k=2), 0)
    out_s, in_s = one.ports(LinkCosts(0.0, 1.0))
    assert (float(out_s[0]), float(in_s[0])) == (3, 10)
    assert float(out_s[1:].max()) <= 10
    assert float(in_s[1:].max()) <= 3
    assert one.pairs.sum(0)[0] == 30
    assert float(one.pairs.sum(0)[1:].max()) < 30


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "choose one of --emulate N, --netns N and --mpi"),
        (["--emulate", "2", "--netns", "2"], "choose one of"),
        (["--emulate", "0"], "argument --emulate: must be a whole number of at least 1, got '0'"),
        (["--emulate", "3"], "divide the 8 experts of coarse, got 3"),
        (["--emulate", "2", "--rate", "fast"], "a rate is a positive number"),
        (["--emulate", "2", "--rate", "2gbit", "--compute-ratio", "1"], "not allowed with argument --rate"),
        (["--mpi", "--compute-ratio", "1"], "needs --emulate or --netns"),
        (["--netns", "4", "--node-size", "2"], "belong together"),
        (["--netns", "4", "--node-size", "3", "--inter-rate", "1mbit"], "must divide the 4 ranks"),
        (["--emulate", "2", "--chunks", "33"], "argument --chunks: must be a whole number from 1 to 32, got '33'"),
        (["--emulate", "2", "--tokens", "-3"], "argument --tokens: must be a whole number of at least 1, got '-3'"),
        (["--emulate", "2", "--dtype", "bfloat16", "--wire-dtype", "bfloat16"], "can carry rows of torch.float32, got"),
        (["--emulate", "2", "--routing", __file__], "test_overlap_bench.py holds no ids: a file of ids is a tensor"),
        (
            ["--emulate", "2", "--png", "x.txt"],
            "argument --png: a picture is written as PNG: call it 'x.png', got 'x.txt'",
        ),
        (["--emulate", "2", "--png", f"{__file__}/x.png"], "test_overlap_bench.py is no directory"),
        (["--emulate", "2", "--json", "a", "--png", "a"], "must be different files, got a a"),
        (["--emulate", "2", "--json", "."], "argument --json: must be a file, and '.' is a directory"),
        (["--emulate", "2", "--trace", f"{__file__}/x"], "test_overlap_bench.py is no directory"),
        (["--emulate", "2", "--timeout-s", "nan"], "argument --timeout-s: must be a positive number, got 'nan'"),
        (["--emulate", "2", "--seed", str(2**32)], "argument --seed: must be a whole number from 0 to 4294967295, got"),
        (["--emulate", "2", "--routing", "uniform:2"], "uniform, remote, zipf:S or a file of ids, got 'uniform:2'"),
        (["--emulate", "2", "--routing", "somewhere"], "uniform, remote, zipf:S or a file"),
        (["--emulate", "2", "--chunks", "2", "1", "2"], "--chunks must be different numbers, got 2 1 2"),
        (["--emulate", "2", "--record", str(RECORDING)], "slow_link holds a recording already"),
    ],
)
def test_bad_arguments(arguments: list[str], words: str, complaint_of) -> None:
    assert words in complaint_of(main, arguments)


def test_registry() -> None:
    for name in BENCHMARKS:
        assert callable(load(name))


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_says_what_it_takes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (["--help"], "bench ["), ([name, "--help"], f"bench {name} ["):
        with pytest.raises(SystemExit) as ended:
            tritonmoe_main(["bench", *arguments])
        assert ended.value.code == 0
        assert f"usage: tritonmoe {words}" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        tritonmoe_main(["bench", name, "--rounds", "0"])
    assert "argument --rounds: must be a whole number of at least 1, got '0'" in capsys.readouterr().err


# Network namespaces


def python(*arguments: str, **options) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, *arguments], env=environment, text=True, **options)


@pytest.mark.parametrize(
    "wire",
    [
        pytest.param([], marks=pytest.mark.thorough, id="fp32 rows"),
        pytest.param(["--wire-dtype", "float8_e4m3fn"], marks=pytest.mark.slow, id="fp8 rows"),
    ],
)
@NEEDS_NAMESPACES
def test_two_namespaces(wire: list[str], tmp_path: Path) -> None:
    arguments = ["--netns", "2", "--rate", "500mbit", "--tokens", "512", *QUICK, "--json", str(tmp_path / "r.json")]
    arguments += wire
    process = python(
        "-m", "tritonmoe", "bench", "overlap", *arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said, _ = process.communicate(timeout=120)
    assert process.returncode == 0, said
    results = check_results(tmp_path / "r.json", 2)
    assert results["link"] == "2 network namespaces, gloo, 500mbit a link"
    width = results["E_K_D_F"][2]
    assert (results["row_bytes"], results["other_row_bytes"]) == (width + 4 if wire else 4 * width, 4 * width)
    for sent in results["sent_bytes"]:
        computed = sent["rows"] + sent["metadata"]
        assert 0 <= sent["measured"] / computed - 1 < 0.03


@pytest.mark.slow
@NEEDS_NAMESPACES
def test_two_nodes_of_two(tmp_path: Path) -> None:
    arguments = ["--netns", "4", "--node-size", "2", "--inter-rate", "200mbit", "--model", "fine", "--tokens", "128"]
    arguments += ["--rounds", "2", "--chunks", "2", "--json", str(tmp_path / "r.json")]
    arguments += ["--trace", str(tmp_path / "r.trace"), "--png", str(tmp_path / "r.png")]
    process = python(
        "-m", "tritonmoe", "bench", "overlap", *arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0, said
    results = json.loads((tmp_path / "r.json").read_text())["results"]
    one, two = (sum(results["uplink_bytes"][levels]) for levels in ("one level", "two levels"))
    assert two < 0.8 * one
    assert 0 <= two / results["two_levels_computed_bytes"] - 1 < 0.03
    assert results["predicted_ms"]["two levels C=2"] > 0
    assert "auto on two levels" in results["variants"]
    assert results["summary"]["two_levels_auto_over_best"] > 0
    events = json.loads((tmp_path / "r.trace").read_text())["traceEvents"]
    for run in ("two levels C=2", "two levels C=2, planned"):
        inside = [e for e in events if e.get("cat") == "node" and e["args"]["run"] == run]
        assert {event["pid"] for event in inside} == {0, 1, 2, 3}
        assert {"node_dispatch 0", "experts 1", "node_combine local", "node_dispatch_backward 1"} <= {
            event["name"] for event in inside
        }
    assert {e["args"]["run"] for e in events if e.get("cat") == "node"} == {run, run.removesuffix(", planned")}


STARTS_SLEEPERS = """if True:
    import sys
    from tritonmoe.tools.benchmarks.namespaces import Namespaces
    with Namespaces(["sh", "-c", sys.argv[1]], 4, 1e9, node_size=2, inter_rate=1e8) as namespaces:
        pids = [process.pid for process in [*namespaces._processes, namespaces._hub]]
        print(*pids, flush=True)
        sys.exit(namespaces.run(timeout_s=0.2))
"""


@NEEDS_NAMESPACES
@pytest.mark.thorough
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda end: end.name)
def test_nothing_is_left_of_a_run_that_was_ended(end: signal.Signals) -> None:
    process = python("-c", STARTS_SLEEPERS, "exec sleep 60", stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout is not None
    pids = process.stdout.readline().split()
    namespaces = {os.readlink(f"/proc/{pid}/ns/net") for pid in pids}
    assert len(namespaces) == 5
    assert os.readlink("/proc/self/ns/net") not in namespaces
    inside = processes_in(namespaces)
    process.send_signal(end)
    process.wait(timeout=10)
    process.stdout.close()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < deadline, "a process is left"
        time.sleep(0.02)
    assert not {pid for pid, started in inside if start_of(pid) == started}


@pytest.mark.thorough
@NEEDS_NAMESPACES
def test_a_rank_that_fails_ends_the_run() -> None:
    fails = 'test "$RANK" = 2 && exit 3; exec sleep 60'
    process = python("-c", STARTS_SLEEPERS, fails, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.communicate(timeout=20)
    assert process.returncode == 3
