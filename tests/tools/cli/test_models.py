"""`tritonmoe models` lists every experts class that the sweep tests, and names what is not covered."""

import importlib.util
import json

import pytest

from tritonmoe.integrations.transformers.discovery import experts_classes
from tritonmoe.tools.cli import main


def test_the_table_names_every_class(capsys):
    assert main(["models"]) == 0
    table = capsys.readouterr().out
    lines = table.splitlines()
    for found in experts_classes():
        assert any(line.split()[:2] == [found.model_type, found.name] for line in lines), found
    line = next(line for line in lines if line.startswith("gpt_oss "))
    assert line.split()[2:] == ["(E,", "D,", "2F),", "interleaved,", "biases", "clamped", "SwiGLU,", "fused"]
    assert "- llama4: Llama4TextExperts" in table
    assert "llama to mixtral, mistral to mixtral, qwen2 to qwen2_moe, qwen3 to qwen3_moe, " in table
    assert f"{len(experts_classes())} experts classes in" in table


@pytest.mark.thorough
def test_markdown_and_json(capsys):
    assert main(["models", "--markdown"]) == 0
    assert "| mixtral | MixtralExperts | (E, 2F, D) | act(gate) * up, fused |" in capsys.readouterr().out
    assert main(["models", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert len(found["supported"]) == len(experts_classes())
    reached = {found.model_type for found in experts_classes()}
    assert found["upcycled"].items() >= {"llama": "mixtral", "hunyuan_v1_dense": "hunyuan_v1_moe"}.items()
    assert reached.issuperset(found["upcycled"].values())
    assert {"model_type": "llama4", "name": "Llama4TextExperts"} in found["unsupported"]


def test_without_transformers_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(["models"]) == 2
    assert "pip install 'tritonmoe[hf]'" in capsys.readouterr().err
