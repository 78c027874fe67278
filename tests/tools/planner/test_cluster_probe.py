"""What `probe` measures is a cluster that can be planned with, on one process and on ranks with a known link."""

from dataclasses import replace

import pytest
import torch

import tritonmoe as tm
from tritonmoe.tools.cli import main
from tritonmoe.tools.planner.cluster import Cluster, Estimate
from tritonmoe.tools.planner.cluster_file import parse_cluster, read_cluster, to_toml
from tritonmoe.tools.planner.cluster_presets import CLUSTERS
from tritonmoe.tools.planner.cluster_probe import _probed, _share, probe_cluster, say_scatter, scatter
from tritonmoe.tools.planner.job import Job
from tritonmoe.tools.planner.training_plan import plan
from tritonmoe.tools.planner.transformer_model import Attention, Model
from tritonmoe.transports import Transport

TINY = Model("tiny", 64, 2, 0, Attention(2, 1, 32), 8, 2, 32, 0, 64, 128)
JOB = Job(TINY, sequence=128, dtype="fp32")


def silent(text: str) -> None:
    pass


def test_one_process_is_measured_and_planned_with():
    lines: list[str] = []
    base = replace(CLUSTERS["H100"], nodes=1, gpus_per_node=1)
    found = probe_cluster(JOB, base, None, torch.device("cpu"), lines.append)
    assert parse_cluster(to_toml(found), "probed.toml").host.us_per_layer.source == "probe"
    sources = {key: estimate.source for key, estimate in found.estimates()}
    assert {sources[f"gpu.{name}_efficiency"] for name in ("gemm", "grouped", "attention", "memory")} == {"probe"}
    assert sources["inside.latency_us"] == "assumed"
    assert 1e-4 < found.gpu.tflops["bf16"] < 100  # a CPU's
    assert found.inside == base.inside
    assert "links: not measured" in lines[-1]
    best = plan(JOB, found).best
    # At least the host's time is there, and no more than some hundred times that.
    assert best.time.layer_s >= found.host.us_per_layer.value * 1e-6


@pytest.mark.thorough
def test_ranks_measure_their_link():
    def on_rank(transport: Transport) -> Cluster:
        base = CLUSTERS["H100"]
        return probe_cluster(JOB, base, transport, torch.device("cpu"), silent, 1)

    found = tm.run_on_emulated_ranks(on_rank, 2, link=tm.LinkModel(0.02, latency_us=2000), timeout_s=120)
    assert found[0] == found[1]
    cluster = found[0]
    assert (cluster.nodes, cluster.gpus_per_node) == (2, 1)
    assert cluster.between.latency_us.source == "probe"
    assert 0 < cluster.between.gb_per_s * cluster.between.efficiency.value < 0.04
    assert cluster.inside == CLUSTERS["H100"].inside


def test_the_command_writes_a_cluster(tmp_path, capsys):
    (tmp_path / "config.json").write_text(
        '{"model_type": "some_moe", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, '
        '"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "vocab_size": 100}'
    )
    path = tmp_path / "mine.toml"
    assert main(["probe", str(path), str(tmp_path), "--tokens", "64", "--dtype", "fp32"]) == 0
    assert "products " in capsys.readouterr().out
    cluster = read_cluster(path)
    assert (cluster.name, cluster.num_gpus) == ("H100, probed", 1)
    assert main(["plan", str(tmp_path), str(path), "--dtype", "fp32"]) == 0


def test_a_command_for_no_model_is_2(tmp_path, capsys):
    assert main(["probe", str(tmp_path / "mine.toml"), "nothing"]) == 2
    assert "tritonmoe probe: 'nothing' is no model" in capsys.readouterr().err
    assert main(["probe", str(tmp_path / "mine.toml"), "OLMoE-1B-7B", "--cluster", "nowhere.toml"]) == 2


def test_samples_that_scatter_widen_the_interval():
    assert scatter([1.0] * 20) == 0
    assert scatter([1.0, 2.0]) == 0  # too few to tell
    samples = [1.0] * 8 + [2.0] * 4
    assert scatter(samples) == pytest.approx(1.0)
    steady, wide = (_probed(0.5, scatter(times)) for times in ([1.0] * 20, samples))
    assert (steady.spread, wide.spread) == (None, 1.0)
    cluster = replace(CLUSTERS["H100"], gpu=replace(CLUSTERS["H100"].gpu, gemm_efficiency=wide))
    lines: list[str] = []
    say_scatter(cluster, lines.append)
    assert lines == ["gpu.gemm_efficiency: samples scattered, so its interval is wider: times and over 2.00"]


def test_what_a_loaded_machine_measures_can_be_read_again() -> None:
    """Shares of a peak that are next to nothing, and samples that scatter by far more than a file may say."""
    measured = _share(1e-6, 380.0)
    assert measured == Estimate(1e-3, "probe", 100.0)
    base = CLUSTERS["H100"]
    written = replace(base, gpu=replace(base.gpu, attention_efficiency=measured))
    assert parse_cluster(to_toml(written), "mine.toml").gpu.attention_efficiency == measured
