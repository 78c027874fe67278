"""python -m bench.gpu.killed, with a process of six cases in the rehearsal's place."""

import random
import subprocess
import sys

import pytest

from bench.gpu import killed

SCRIPT = """
import json, pathlib, sys, time
path, kind = pathlib.Path(sys.argv[1]), sys.argv[2]
lines = path.read_text().splitlines() if path.exists() else []
done = [json.loads(line)["case"] for line in lines] if kind != "forgetful" else []
for name in "abcdef":
    if name in done or (kind == "loses" and name == "c"):
        continue
    time.sleep(0.1)
    with path.open("a") as file:
        file.write(json.dumps({"run": "r", "case": name, **({"failed": "x"} if kind == "fails" else {})}) + "\\n")
"""


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [("right", {}), ("loses", {"lost": ["c"]}), ("forgetful", {"repeated": True}), ("fails", {"failed": True})],
)
def test_verdict(kind, wrong, tmp_path, monkeypatch):
    def start(folder, file):
        (folder / killed.OUTPUT).touch()
        return subprocess.Popen([sys.executable, "-S", "-c", SCRIPT, str(file), kind])

    monkeypatch.setattr(killed, "_start", start)
    monkeypatch.setattr(killed, "LATER_S", 0.01)
    monkeypatch.setattr(random.Random, "randint", lambda draw, least, most: most)
    outcome = killed._killed_run(tmp_path, tmp_path / "results.jsonl", random.Random(7), set("abcdef"))
    assert len(outcome["kills"]) >= 1
    assert all(0 <= kill["lines"] <= 18 for kill in outcome["kills"])
    assert outcome["status"] == 0
    assert outcome["is_right"] == (not wrong)
    for name in ("lost", "repeated", "failed"):
        assert bool(outcome[name]) == bool(wrong.get(name)), outcome
    if kind == "loses":
        assert outcome["lost"] == wrong["lost"]
