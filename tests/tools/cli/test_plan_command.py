"""`tritonmoe plan`: tables, files and exit codes."""

import json
import shlex
from pathlib import Path

import pytest

from tritonmoe.tools.cli import main
from tritonmoe.tools.planner.break_even import tokens_to_hide


def test_a_plan_is_printed_and_written(capsys, tmp_path):
    path = tmp_path / "plan.json"
    arguments = ["plan", "OLMoE-1B-7B", "H100", "--nodes", "1", "--ep", "4", "8", "--json", str(path)]
    assert main(arguments) == 0
    output = capsys.readouterr().out
    assert "OLMoE-1B-7B on 8 GPUs of H100" in output
    assert "Measure next: " in output
    written = json.loads(path.read_text())
    assert {one["ep"] for one in written["choices"]} == {4, 8}


def test_memory_by_routing(capsys, tmp_path):
    """A budget bounds the worst routing; a recorded one lies between the two others."""
    routing, path = tmp_path / "pairs.json", tmp_path / "memory.json"
    routing.write_text(json.dumps([4] * 8 + [1] * 56))
    arguments = ["plan", "OLMoE-1B-7B", "--memory", "--ep", "8", "--routing", str(routing), "--json", str(path)]
    peaks = []
    for others in ([], ["--memory-budget-gb", "12"]):
        assert main([*arguments, *others]) == 0
        rows = {row["routing"]: row for row in json.loads(path.read_text())["memory"]}
        assert list(rows) == ["uniform", "recorded", "all on one rank"]
        peaks.append([row["peak_gb"] for row in rows.values()])
        output = capsys.readouterr().out
        assert all(f"{name:<16} {row['peak_gb']:>8.2f}" in output for name, row in rows.items())
    free, bounded = peaks
    assert free[0] < free[1] < free[2]
    assert bounded[:1] == free[:1]
    assert bounded[2] <= 12 < free[2]
    assert rows["all on one rank"]["keeps"] != {"hidden": 16}
    assert main([*arguments, "--memory-budget-gb", "0.01"]) == 0
    assert "not enough" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (["OLMoE-1B-7B", "H100", "--memory", "--ep", "8"], "no cluster"),
        (["OLMoE-1B-7B", "--memory"], "one --ep"),
        (["OLMoE-1B-7B", "H100", "--memory-budget-gb", "3"], "give both"),
        (["OLMoE-1B-7B", "--memory", "--ep", "8", "--wire-dtype", "fp8"], "layer.peak_bytes"),
        (
            ["OLMoE-1B-7B", "--memory", "--ep", "8", "--expert-precision", "mxfp8", "--memory-budget-gb", "9"],
            "leave the budget out",
        ),
        (["OLMoE-1B-7B", "H100", "--offload", "12", "--expert-precision", "mxfp8"], "experts that train"),
    ],
)
def test_memory_is_refused(capsys, given, words):
    assert main(["plan", *given]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.thorough
@pytest.mark.parametrize("others", [[], ["--micro-batch", "2", "--two-batches", "--recompute", "none"]])
def test_the_printed_command_finds_the_best_choice_again(capsys, tmp_path, monkeypatch, others):
    """Choices of other stages have other numbers of micro-batches: the command has that of the choice."""
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "H100-TCP", "--new-cluster", "my cluster.toml"]) == 0
    capsys.readouterr()
    arguments = ["--nodes", "2", "--micro-batches", "1", "--tp", "1", "--ep", "4", *others]
    assert main(["plan", "OLMoE-1B-7B", "my cluster.toml", *arguments]) == 0
    table, _, command = capsys.readouterr().out.partition("\nThe best choice alone:\n")
    assert max(map(len, command.splitlines())) <= 88
    words = shlex.split(command.replace("\\\n", ""))
    assert words[:2] == ["tritonmoe", "plan"]
    assert main(words[1:]) == 0
    again = capsys.readouterr().out.partition("\nThe best choice alone:\n")
    assert again[2] == command
    for number in (0, 1, 4):  # the job, and the best choice with its interval
        assert again[0].splitlines()[number].split() == table.splitlines()[number].split()


@pytest.mark.thorough
def test_a_new_cluster_can_be_planned_with(capsys, tmp_path):
    path = tmp_path / "mine.toml"
    assert main(["plan", "B200", "--new-cluster", str(path)]) == 0
    assert "with the numbers of B200" in capsys.readouterr().out
    path.write_text(path.read_text().replace('name = "B200"', 'name = "mine"').replace("nodes = 8", "nodes = 1"))
    assert main(["plan", "OLMoE-1B-7B", str(path), "--ep", "8"]) == 0
    assert "on 8 GPUs of mine" in capsys.readouterr().out


@pytest.mark.thorough
def test_clusters_are_compared(capsys):
    arguments = ["plan", "OLMoE-1B-7B", "--compare", "H100", "H100-100G", "--nodes", "2", "--ep", "16"]
    assert main(arguments) == 0
    assert "$ per million tokens, by the model's widths" in capsys.readouterr().out


@pytest.mark.thorough
def test_two_files_of_one_name_are_told_apart(capsys, tmp_path):
    for name in ("a.toml", "b.toml"):
        assert main(["plan", "H100", "--new-cluster", str(tmp_path / name)]) == 0
    files = [str(tmp_path / name) for name in ("a.toml", "b.toml")]
    capsys.readouterr()
    assert main(["plan", "OLMoE-1B-7B", "--compare", *files, "--nodes", "1", "--ep", "8"]) == 0
    assert f"{files[0]} is the cheapest in " in " ".join(capsys.readouterr().out.split())


@pytest.mark.thorough
def test_what_does_not_fit_is_1(capsys):
    assert main(["plan", "DeepSeek-V3", "H100", "--nodes", "1", "--ep", "8"]) == 1
    assert "Nothing fits. A job can fill 73.6 of a GPU's 80 GiB" in capsys.readouterr().out


@pytest.mark.thorough
def test_recorded_routing(capsys, tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([9] + [1] * 63))
    arguments = ["plan", "OLMoE-1B-7B", "H100", "--nodes", "1", "--ep", "8"]
    assert main(arguments) == 0
    uniform = capsys.readouterr().out
    assert main([*arguments, "--routing", str(path)]) == 0
    assert capsys.readouterr().out != uniform
    path.write_text("[1, 2]")
    assert main([*arguments, "--routing", str(path)]) == 2
    assert "must be a list of 64 numbers of pairs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "give a model and a cluster"),
        (["OLMoE-1B-7B"], "give a model and a cluster"),
        (["OLMoE-1B-7B", "H100", "--compare", "H100", "H200"], "give a model and a cluster"),
        (["OLMoE-1B-7B", "--compare", "H100"], "at least two clusters"),
        (["OLMoE-2", "H100"], "'OLMoE-2' is no model"),
        (["OLMoE-1B-7B", "H101"], "'H101' is no cluster"),
        (["OLMoE-1B-7B", "H100", "--ep", "7"], "64 experts can't be shared evenly by ep=7"),
        (["OLMoE-1B-7B", "H100", "--pp", "3"], "64 GPUs can't be shared by tp=1 x pp=3"),
        (["OLMoE-1B-7B", "H100", "--dtype", "fp32"], "H100 has no rate of products in fp32"),
        (["OLMoE-1B-7B", "H100", "--pp", "17"], "pp=17 stages are more than 16 layers"),
        (["OLMoE-1B-7B", "H100", "--equal", "gpus"], "--equal makes the clusters of --compare equal"),
        (["OLMoE-1B-7B", "H100", "--sends", "pairs"], "leave sends='pairs' out"),
        (["OLMoE-1B-7B", "H100", "--two-batches"], "micro_batch must be at least 2, got 1 (--micro-batch 2)"),
        (["OLMoE-1B-7B", "H100", "--adapter-rank", "4"], "say how its experts are stored (--frozen bf16)"),
        (["gpt-oss-20b", "H100", "--frozen", "fp8"], "F = 2880, which is not a multiple of 128"),
        (["OLMoE-1B-7B", "H100", "--frozen", "nf4", "--trainer", "megatron"], "as this package trains its adapters"),
    ],
)
def test_bad_arguments_are_2(capsys, arguments, says):
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tritonmoe plan: ")
    assert says in error


def test_a_bad_cluster_is_2_with_line_and_key(capsys, tmp_path):
    path = tmp_path / "mine.toml"
    assert main(["plan", "--new-cluster", str(path)]) == 0
    path.write_text(path.read_text().replace("gpus_per_node = 8", "gpus_per_node = -8"))
    capsys.readouterr()
    assert main(["plan", "OLMoE-1B-7B", str(path)]) == 2
    assert "mine.toml, line 10: gpus_per_node must be a number" in capsys.readouterr().err


def test_how_many_tokens_hide_the_loading_of_experts(capsys):
    assert main(["plan", "Mixtral-8x7B", "H100", "--offload", "55", "--micro-batch", "4"]) == 0
    rows = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert rows["bf16"][1:3] == ["16.00", "17,989"]  # 2 bytes * 989.4e12 / (2 * 55e9)
    assert rows["mxfp4"][1:3] == ["4.25", "4,778"]
    assert rows["bf16"][4] == "waits"  # with 4,096 tokens for each expert
    assert rows["mxfp4"][4] == "hides"
    assert main(["plan", "Mixtral-8x7B", "--compare", "H100", "B200", "--offload", "55"]) == 2
    assert "--offload prints a table for one cluster" in capsys.readouterr().err


def test_examples_of_a_smaller_gpu():
    numbers = [tokens_to_hide(bits / 8, 25e9, 165e12) for bits in (16, 4.25)]
    assert [round(number) for number in numbers] == [6600, 1753]


def test_a_network_and_a_measured_run(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Both narrow the interval of a step; what they need is said where it isn't given."""
    given = ["plan", "Qwen3-30B-A3B", "H100", "--nodes", "4", "--tp", "1", "--pp", "1", "--trainer", "megatron"]
    log = tmp_path / "nccl.log"
    log.write_text("gpu1:1:1 [0] NCCL INFO Using network Socket")
    assert main([*given, "--ep", "8", "--network", str(log)]) == 0
    assert "12% of 50 GB/s are assumed" in capsys.readouterr().out
    assert main([*given, "--ep", "8", "--measured", "50000", "--of", "--nodes 2"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Narrowed by a run of 16 GPUs with 50000 tokens/s" in said
    assert "--measured 50000.0" in said
    log.write_text("nothing")
    for more, refusal in (
        (["--ep", "8", "--network", str(log)], "doesn't say over what NCCL runs"),
        (["--ep", "8", "--network", "wifi"], "--network is rdma or sockets, or a file"),
        (["--measured", "50000"], "give --tp, --pp and one --ep"),
        (["--ep", "8", "--measured", "50000", "--of", "--speed 2"], "got --speed 2"),
    ):
        assert main([*given, *more]) == 2
        assert refusal in capsys.readouterr().err
