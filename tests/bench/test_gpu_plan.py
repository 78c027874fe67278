"""python -m bench.gpu: its plan, and how it goes on after a stop, a failure and a change."""

import json

import pytest

from bench.gpu import __main__ as gpu
from bench.gpu import calls, plan
from bench.gpu.compilation import Kernel
from bench.gpu.setting import DAY, HEADLINE, REHEARSAL
from tritonmoe.ops.aot import Variant
from tritonmoe.tools.benchmarks.kept_results import open_results, read_results
from tritonmoe.tools.benchmarks.tile_candidates import Candidate

GAINS = (1.3, 1.0)


def test_the_day_in_its_order():
    cases = plan.cases(DAY, "sm_90")
    assert len({case.name for case in cases}) == len(cases)
    stages = [case.name[0] for case in cases]
    assert stages == sorted(stages)
    assert set(stages) == set("ABCDEF")
    checked = [case.arguments for case in cases if case.name.startswith("A check Qwen")]
    assert {arguments["num_tokens"] for arguments in checked} == {32768}
    assert {json.dumps(arguments["tiles"]) for arguments in checked} >= {"{}", '{"persistent": false}'}
    assert {arguments["routing"] for arguments in checked} == {"uniform", "hot"}
    assert DAY.reruns == 50
    measures = [case.measure for case in cases]
    peers = [number for number, case in enumerate(cases) if case.name[0] == "D"]
    assert measures.index("run_tests") > peers[-1] > peers[0] > measures.index("try_tile")
    assert measures.index("profile_step") > len(measures) - measures[::-1].index("measure_host") - 1
    assert all(
        (case.measure in ("remeasure_tile", "profile_step") or "tuned" in case.name)
        for case in cases
        if case.needs_tuned
    )


def test_the_rehearsal_calls_all_that_the_day_does():
    of_day, of_rehearsal = ({case.measure for case in plan.cases(s, "sm_90")} for s in (DAY, REHEARSAL))
    assert of_day == of_rehearsal


@pytest.fixture
def ran(monkeypatch):
    """Cases that do nothing, two kernels that are not compiled; give the names and entries of what ran, in order."""
    ran = []

    class Worker:
        def __init__(self, setting):
            pass

        def run(self, measure, arguments, limit_s):
            ran.append((measure, arguments))
            if measure in ("try_tile", "remeasure_tile"):
                gain = GAINS[0] if measure == "remeasure_tile" or "up" in arguments["key"] else GAINS[1]
                return {"gain": gain, "agrees": True}
            return {"passed": True}

        def stop(self):
            ran.append(("stop", {}))

    def compile_missing(kernels, target, results, deadline, say):
        for kernel in kernels:
            if kernel.name not in results.by_case:
                results.add(kernel.name, {"problem": "", "binary": kernel.name, "cache": "x"})
                ran.append(("compile", {"name": kernel.name}))
        return True

    names = ["A compile one", "F compile two"]
    monkeypatch.setattr(gpu, "kernels_of", lambda *arguments: [Kernel(name, Variant()) for name in names])
    monkeypatch.setattr(gpu, "compile_missing", compile_missing)
    monkeypatch.setattr(gpu, "Worker", Worker)
    monkeypatch.setattr(gpu.launch, "INTERPRETED", False)
    monkeypatch.setattr(gpu, "identity", lambda: {"device": "a card"})
    return ran


def run(folder, *arguments):
    return gpu.main(["--rehearse", "--out", str(folder / "gpu.jsonl"), *arguments])


def test_every_case_stands_in_the_file_once(ran, tmp_path, capsys):
    assert run(tmp_path) == 0
    names = [line["case"] for line in read_results(tmp_path / "gpu.jsonl")]
    planned = [case.name for case in plan.cases(REHEARSAL, "sm_90")]
    assert sorted(names) == sorted(["identity", "A compile one", "F compile two", *planned])
    assert [measure for measure, _ in ran][:3] == ["describe_machine", "measure_dense", "compile"]
    assert names[names.index("F compile two") + 1][0] == "F", "what only the last stage needs is compiled before it"
    assert names[names.index("F compile two") - 1][0] != "F"
    assert "0 of them wrong" in capsys.readouterr().out
    ran.clear()
    assert run(tmp_path) == 0
    assert ran == [("stop", {})]


def test_a_peer_that_is_not_there_is_said():
    times = {"tritonmoe": {"us": 200.0, "tflops": 400.4}, "grouped_mm": {"us": 300.0}}
    found = {"times": times, "left_out": {"liger": "the package liger-kernel is not installed"}}
    assert gpu._headline(found) == (
        "tritonmoe 200.0 us (400 TFLOP/s), grouped_mm 300.0 us, "
        "liger left out: the package liger-kernel is not installed"
    )


def test_tiles_are_measured_again_and_then_used(ran, tmp_path, capsys):
    run(tmp_path)
    (used,) = (arguments for measure, arguments in ran if measure == "profile_step" and arguments["entries"])
    (key,) = used["entries"]
    assert " up " in key
    assert used["shape"] == HEADLINE
    (again,) = (a for measure, a in ran if measure == "remeasure_tile" and a["key"] == key)
    assert again["entries"] == used["entries"]
    assert f"tiles that were faster, twice: {json.dumps(used['entries'])}" in capsys.readouterr().out


def test_a_tile_that_was_fast_by_chance_is_not_used(ran, tmp_path, monkeypatch):
    tried = plan.cases(REHEARSAL, "sm_90")
    key = next(case.arguments["key"] for case in tried if case.measure == "try_tile")
    line = {"arguments": {"key": key, "fields": {"block_n": 16}}, "gain": 1.2, "agrees": True}
    by_case = {f"C tile {key}: x": line}
    assert gpu.tuned_entries(by_case) == {key: {"block_n": 16}}
    assert gpu.tuned_entries(by_case | {f"C again {key}": {"gain": 1.01, "agrees": True}}) == {}
    assert gpu.tuned_entries(by_case | {f"C again {key}": {"gain": 1.5, "agrees": False}}) == {}
    assert gpu.tuned_entries(by_case | {f"C again {key}": {"gain": 1.5, "agrees": True}}) != {}
    assert gpu.tuned_entries(by_case | {f"C again {key}": {"failed": "x"}}) == {}


def test_a_tile_with_spills_is_not_measured(ran, tmp_path, monkeypatch):
    case = next(case for case in plan.cases(REHEARSAL, "sm_90") if case.measure == "try_tile")
    tile = Candidate(case.arguments["key"], case.arguments["fields"])
    compiled = Kernel(f"A compile tile {tile.name}", Variant(), candidate=tile)
    monkeypatch.setattr(gpu, "kernels_of", lambda *arguments: [compiled])

    def compile_missing(kernels, target, results, deadline, say):
        results.add(kernels[0].name, {"problem": "spills 8 bytes", "binary": "", "cache": "x"})
        return True

    monkeypatch.setattr(gpu, "compile_missing", compile_missing)
    assert run(tmp_path) == 0
    lines = {line["case"]: line for line in read_results(tmp_path / "gpu.jsonl")}
    assert lines[case.name]["left_out"] == "spills 8 bytes"
    assert case.arguments not in [arguments for measure, arguments in ran if measure == "try_tile"]


def test_a_kernel_that_does_not_compile_is_wrong(ran, tmp_path, monkeypatch, capsys):
    def compile_missing(kernels, target, results, deadline, say):
        for kernel in kernels:
            results.add(kernel.name, {"problem": "CompilationError: no", "binary": "", "cache": "x"})
        return True

    monkeypatch.setattr(gpu, "compile_missing", compile_missing)
    assert run(tmp_path) == 1
    assert "WRONG: A compile one: CompilationError: no" in capsys.readouterr().err


def test_the_next_case_that_fits_is_taken(ran, tmp_path, monkeypatch, capsys):
    """What a case lasts is known of others that measured the same; what needs tuned tiles waits for all of them."""
    clock = [0.0]
    monkeypatch.setattr(gpu.time, "monotonic", lambda: clock[0])
    right = gpu.Worker.run

    def timed(self, measure, arguments, limit_s):
        clock[0] += {"describe_machine": 1.0, "try_tile": 4.0}.get(measure, 0.1)
        return right(self, measure, arguments, limit_s)

    monkeypatch.setattr(gpu.Worker, "run", timed)
    planned = plan.cases(REHEARSAL, "sm_90")
    assert gpu.expected_s(planned[0], planned, {}) == planned[0].usual_s
    assert gpu.expected_s(planned[0], planned, {planned[0].name: {"seconds": 4.0}}) == 5.0
    longest = max(case.usual_s for case in planned)
    assert run(tmp_path, "--budget-s", str(longest - 1)) == 3
    finished = {line["case"] for line in read_results(tmp_path / "gpu.jsonl")}
    left = [case for case in planned if case.name not in finished]
    assert {"run_tests"} <= {case.measure for case in left}
    assert any(case.name in finished for case in planned[planned.index(left[0]) :])
    tiles = [case for case in planned if case.measure == "try_tile"]
    if any(case.name not in finished for case in tiles):
        assert not any(case.name in finished for case in planned if case.needs_tuned)
    assert f"{len(left)} cases are left, of about" in capsys.readouterr().out


def test_three_calls_of_ten_minutes_bring_what_matters(tmp_path, capsys):
    """All checks, the headline, its tiles, training and overlap, and all peers but those that compile for minutes."""
    file = str(tmp_path / "gpu.jsonl")
    assert gpu.main(["--out", file, "--plan", "sm_90"]) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    planned = plan.cases(DAY, "sm_90")
    assert last == f"{len(planned)} of {len(planned)} cases are to be run, beside the compilation of their kernels"
    assert [line.partition(" s: ")[0].partition(", ")[0] for line in lines] == [
        f"call {number}" for number in range(1, len(lines) + 1)
    ]
    first = list(calls.calls(planned, planned, {}, 570.0))[:3]
    assert all(call.seconds <= 570.0 for call in first)
    ran = [case for call in first for case in call.cases]
    wanted = [case for case in planned if case.name[0] in "ABCD" and case.measure != "measure_compiling_peers"]
    assert all(case in ran for case in wanted)
    assert [str(call) in line for call, line in zip(first, lines, strict=False)] == [True] * 3
    assert gpu.main(["--out", file, "--plan", "sm_90", "--only", "memory", "--budget-s", "50"]) == 0
    assert capsys.readouterr().out.splitlines()[:2] == [
        "call 1, 30 s: B measure_memory",
        "call 2, 45 s: D measure_memory",
    ]
    with open_results(tmp_path / "gpu.jsonl", {}) as results:
        results.add("B memory", {"seconds": 10.0, "harness": "any"})
    assert gpu.main(["--out", file, "--plan", "sm_90", "--only", "memory", "--budget-s", "50"]) == 0
    assert capsys.readouterr().out.splitlines()[0] == "call 1, 12 s: D measure_memory", "as long as B's, and a quarter"
    assert gpu.main(["--out", file, "--plan", "sm_90", "--only", "memory", "--budget-s", "5"]) == 0
    assert "call 1" not in capsys.readouterr().out, "what no call has room for would be tried for ever"
    assert gpu.main(["--out", file, "--plan", "a card"]) == 2
    assert "python -m bench.gpu: " in capsys.readouterr().err


def test_some_cases_alone(ran, tmp_path, capsys):
    planned = plan.cases(REHEARSAL, "sm_90")
    assert run(tmp_path, "--only", "D,memory") == 0
    finished = {line["case"] for line in read_results(tmp_path / "gpu.jsonl")}
    assert finished & {case.name for case in planned} == {
        case.name for case in planned if case.name[0] == "D" or "memory" in case.name
    }
    assert "cases chosen are finished" in capsys.readouterr().out
    assert run(tmp_path, "--skip", "F,tests") == 0
    finished = {line["case"] for line in read_results(tmp_path / "gpu.jsonl")}
    left = [case for case in planned if case.name not in finished]
    assert left
    assert all(case.name[0] == "F" or "tests" in case.name for case in left)
    assert run(tmp_path) == 0


@pytest.mark.parametrize("of_a_case", [-0.1, 0.9])
def test_no_case_begins_that_the_budget_may_cut(of_a_case, ran, tmp_path, capsys):
    shortest = min(plan.cases(REHEARSAL, "sm_90"), key=lambda case: case.usual_s)
    assert run(tmp_path, "--budget-s", str(of_a_case * shortest.usual_s)) == 3
    assert [measure for measure, _ in ran] == ["stop"]
    assert "s: run the same command again" in capsys.readouterr().out


def test_no_case_begins_where_the_deadline_came_while_compiling(ran, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "compile_missing", lambda *arguments: False)
    assert run(tmp_path) == 3
    assert [measure for measure, _ in ran] == ["describe_machine", "measure_dense", "stop"]


def test_a_case_usually_takes_less_than_its_limit():
    assert all(0 < case.usual_s < case.limit_s for case in plan.cases(DAY, "sm_90"))


def test_what_went_wrong_runs_again_only_after_a_change(ran, tmp_path, monkeypatch, capsys):
    right = gpu.Worker.run

    def wrong(self, measure, arguments, limit_s):
        found = right(self, measure, arguments, limit_s)
        if measure == "measure_router":
            return {"failed": "RuntimeError: no such instruction"}
        return {"passed": False, "errors": {"dx": 1}} if measure == "rerun" else found

    monkeypatch.setattr(gpu.Worker, "run", wrong)
    assert run(tmp_path) == 1
    assert "WRONG: B router: RuntimeError: no such instruction" in capsys.readouterr().err
    ran.clear()
    assert run(tmp_path) == 1
    assert [measure for measure, _ in ran] == ["stop"]
    monkeypatch.setattr(gpu, "HARNESS", "changed")
    monkeypatch.setattr(gpu.Worker, "run", right)
    ran.clear()
    assert run(tmp_path) == 0
    assert {measure for measure, _ in ran} == {"measure_router", "rerun", "stop"}


def test_other_sources_are_another_run(ran, tmp_path, monkeypatch):
    assert run(tmp_path) == 0
    count = len(ran)
    monkeypatch.setattr(gpu, "identity", lambda: {"device": "a card", "sources": "changed"})
    assert run(tmp_path) == 0
    assert len(ran) == 2 * count


def test_what_can_not_run_says_why(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu.launch, "INTERPRETED", True)
    assert run(tmp_path) == 2
    assert "unset TRITON_INTERPRET" in capsys.readouterr().err
    monkeypatch.setattr(gpu.launch, "INTERPRETED", False)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "gpu.jsonl")]) == 2
    assert "there is no GPU: --rehearse" in capsys.readouterr().err
    (tmp_path / "gpu.jsonl").write_text("{}\n")
    monkeypatch.setattr(gpu, "identity", dict)
    assert run(tmp_path) == 2
    assert "is no file of results" in capsys.readouterr().err
