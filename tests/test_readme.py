"""The README's figures are those of bench/results, and its code runs."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_tables_are_current() -> None:
    subprocess.run([sys.executable, "-m", "bench.readme", "--check"], cwd=ROOT, check=True)


def test_commands() -> None:
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert [command.split()[-1] for command in commands] == ["demo", "pytest"]


def test_python_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    layer, spread, transformers = blocks
    exec(compile(layer, "README.md", "exec"), {})
    assert "tm.parallelize(" in spread
    assert 'experts_implementation="tritonmoe"' in transformers
