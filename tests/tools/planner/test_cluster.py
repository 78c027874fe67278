"""Descriptions of clusters: what is written is what is read, and what is wrong is said with file, line and key."""

from dataclasses import replace

import pytest

from tritonmoe.tools.planner.cluster import Estimate, spread_of
from tritonmoe.tools.planner.cluster_file import parse_cluster, read_cluster, to_toml
from tritonmoe.tools.planner.cluster_presets import CLUSTERS, REMARKS
from tritonmoe.tools.planner.draws import draw
from tritonmoe.tools.planner.job import Job
from tritonmoe.tools.planner.model_config import MODELS

TEXT = to_toml(CLUSTERS["H100"])


@pytest.mark.parametrize("name", CLUSTERS)
def test_what_is_written_is_what_is_read(name, tmp_path):
    path = tmp_path / "cluster.toml"
    path.write_text(to_toml(CLUSTERS[name], REMARKS))
    assert read_cluster(path) == CLUSTERS[name]


def test_every_remark_stands_at_its_key():
    for key, remark in REMARKS.items():
        assert f"({remark})\n{key.split('.')[-1]} = " in to_toml(CLUSTERS["H100"], REMARKS)


def line_of(text: str, start: str) -> int:
    return next(n for n, line in enumerate(text.splitlines(), 1) if line.startswith(start))


@pytest.mark.parametrize(
    ("old", "new", "at", "says"),
    [
        ("nodes = 8", "nodes = 0", "nodes", "nodes must be a number of 1 to 1e\\+06"),
        ("nodes = 8", "nodes = 2.5", "nodes", "nodes must be a whole number"),
        ("nodes = 8", "nodes = true", "nodes", "nodes must be a whole number"),
        ("nodes = 8", "nodes = 8\nnods = 8", "nods", "nods is not a key of a cluster"),
        ("usd_per_gpu_hour = 2.5", "usd_per_gpu_hour = nan", "usd_per", "usd_per_gpu_hour must be a number"),
        ("usd_per_gpu_hour = 2.5", 'usd_per_gpu_hour = "2"', "usd_per", "usd_per_gpu_hour must be a number"),
        ("memory_gib = 80", "", "\\[gpu\\]", "gpu lacks 'gpu.memory_gib': memory"),
        ("memory_gib = 80", "memory_gib = -1", "memory_gib", "gpu.memory_gib must be a number"),
        (
            'gemm_efficiency = { value = 0.7, source = "assumed" }',
            'gemm_efficiency = { value = 1.7, source = "assumed" }',
            "gemm_efficiency",
            "gpu.gemm_efficiency must be a number of 0.001 to 1",
        ),
        (
            'gemm_efficiency = { value = 0.7, source = "assumed" }',
            'gemm_efficiency = { value = 0.7, source = "guess" }',
            "gemm_efficiency",
            "gpu.gemm_efficiency must be \\{ value",
        ),
        (
            'gemm_efficiency = { value = 0.7, source = "assumed" }',
            "gemm_efficiency = 0.7",
            "gemm_efficiency",
            "gpu.gemm_efficiency must be \\{ value",
        ),
        ("tflops = { bf16 = 989.4", "tflops = { bf17 = 989.4", "tflops", "gpu.tflops must give numbers for bf16"),
        ("[host]", "[hosts]", "\\[hosts\\]", "hosts is not a key"),
        (
            'decay = { value = 0.03, source = "assumed" }',
            "curve = [[2, 3], [1, 4]]",
            "curve",
            "between.curve must ascend",
        ),
        ('decay = { value = 0.03, source = "assumed" }', "curve = [[2, 3]]", "curve", "at least two"),
    ],
)
def test_what_is_wrong_is_said_with_file_line_and_key(old, new, at, says):
    assert old in TEXT
    text = TEXT.replace(old, new, 1)
    with pytest.raises(ValueError, match=says) as raised:
        parse_cluster(text, "some.toml")
    line = line_of(text, at.replace("\\", ""))
    assert str(raised.value).startswith(f"some.toml, line {line}: ")


def test_no_toml_at_all(tmp_path):
    with pytest.raises(ValueError, match=r"some\.toml: .*line 1"):
        parse_cluster("nodes = = 3", "some.toml")
    with pytest.raises(ValueError, match="must be a file"):
        read_cluster(tmp_path)
    (tmp_path / "latin").write_bytes(b"name = '\xff'")
    with pytest.raises(ValueError, match="UTF-8"):
        read_cluster(tmp_path / "latin")
    with pytest.raises(OSError, match="No such file"):
        read_cluster(tmp_path / "missing")


def test_an_empty_file_says_what_is_missing():
    with pytest.raises(ValueError, match=r"some\.toml: the file lacks 'name'"):
        parse_cluster("", "some.toml")


@pytest.mark.parametrize(
    ("estimate", "spread"),
    [
        (Estimate(1000.0, "assumed"), 1.5),
        (Estimate(1000.0, "probe"), 0.08),
        (Estimate(1000.0, "measured"), 0.03),
        (Estimate(1000.0, "probe", 0.5), 0.5),
    ],
    ids=str,
)
def test_four_of_five_draws_lie_within_the_spread(estimate, spread):
    cluster = replace(CLUSTERS["H100"], host=replace(CLUSTERS["H100"].host, us_per_layer=estimate))
    assert spread_of("host.us_per_layer", estimate) == spread
    draws = draw(Job(MODELS["OLMoE-1B-7B"]), cluster, 2000)
    drawn = [cluster.scaled(one.factors).host.us_per_layer.value for one in draws]
    assert 0.76 < sum(1000 / (1 + spread) < one < 1000 * (1 + spread) for one in drawn) / 2000 < 0.84


def test_a_spread_of_its_own_is_written_and_read():
    gpu = replace(CLUSTERS["H100"].gpu, gemm_efficiency=Estimate(0.6, "probe", 0.4))
    cluster = replace(CLUSTERS["H100"], gpu=gpu)
    text = to_toml(cluster)
    assert 'gemm_efficiency = { value = 0.6, source = "probe", spread = 0.4 }' in text
    assert parse_cluster(text, "some.toml") == cluster
    with pytest.raises(ValueError, match=r"line \d+: gpu.gemm_efficiency must be a number of 0 to 100 \(spread"):
        parse_cluster(text.replace("spread = 0.4", "spread = -1"), "some.toml")


def test_the_file_says_how_wide_an_assumption_is():
    assert "(spread 1.5)\nus_per_layer = " in TEXT
    assert "over TCP may reach a 25th (spread 1)\nefficiency = " in TEXT


def test_a_share_never_exceeds_one():
    cluster = CLUSTERS["H100"].scaled({"gpu.gemm_efficiency": 5.0, "between.latency_us": 2.0})
    assert cluster.gpu.gemm_efficiency.value == 1.0
    assert cluster.between.latency_us.value == 2 * CLUSTERS["H100"].between.latency_us.value


def test_a_curve_is_read_piece_by_piece():
    curve = ((1e6, 50.0), (2e6, 60.0), (4e6, 100.0))
    link = replace(CLUSTERS["H100"].between, curve=curve, efficiency=Estimate(1.0, "measured"))
    cluster = replace(CLUSTERS["H100"], between=link)
    assert parse_cluster(to_toml(cluster), "some.toml") == cluster
    for num_bytes, us in [(5e5, 45.0), (1e6, 50.0), (1.5e6, 55.0), (3e6, 80.0), (8e6, 180.0)]:
        fixed, byte_s = link.line(num_bytes)
        assert fixed + num_bytes * byte_s == pytest.approx(us * 1e-6)
