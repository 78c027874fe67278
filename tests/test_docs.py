"""README and docs: what is generated is current, what is code runs, what is public is described."""

import argparse
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from processes import run_forks
from run_page import is_alike

import tritonmoe
from tritonmoe import errors
from tritonmoe.tools.cli import command_parser, main

if TYPE_CHECKING:
    from transformers import TrainerCallback

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()
FIRST = "first-layer"
DOCTORS = DOCS / "diagnosis.md"
"""Its Python goes around a trainer of the reader's: a test of its own gives it stand-ins."""
PAGES = [
    page
    for page in (ROOT / "README.md", *sorted(DOCS.rglob("*.md")))
    if page != DOCTORS and re.search("^```python", page.read_text(), re.MULTILINE)
]
SOON = {"index", FIRST}
"""Pages of the first tier: what a reader meets first."""


@pytest.mark.thorough
@pytest.mark.parametrize("quick", [["--quick"], pytest.param([], marks=pytest.mark.slow)])
def test_what_is_generated_is_current(quick: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "bench.readme", "--check", *quick], cwd=ROOT, check=True)


def test_commands() -> None:
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert [command.split()[-1] for command in commands] == ["demo", "pytest"]


def test_the_readme_is_one_screen() -> None:
    assert len(README.encode()) <= 7000


def test_nothing_is_installed_from_where_it_is_not() -> None:
    """Until there is a release, only what is installed already may be named to pip, to add an extra."""
    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")):
        assert not re.search(r"pip install (?:-\S+ )*tritonmoe", page.read_text()), page


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, id=page.stem, marks=() if page.stem in SOON else pytest.mark.thorough) for page in PAGES],
)
def test_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    script = [str(ROOT / "tests" / "support" / "run_page.py"), str(page)]
    _, ended = run_forks([script], 300.0, is_group=False)
    assert not any(ended.statuses), ended.output


@pytest.mark.parametrize(
    ("shown", "printed", "alike"),
    [
        ("rank 0: loss 4.857\nrank 1: loss 4.876\n", "rank 1: loss 4.870\nrank 0: loss 4.861\n", True),
        ("waits 9.7 ms of 11.5 ms, 84%\n", "waits 103 ms of 121.0 ms, 85%\n", True),
        ("4 passed in 8.31s\n", "4 passed in 0.12s\n", True),
        ("4 passed in 8.31s\n", "4 passed in 68.31s (0:01:08)\n", True),
        ("4 passed in 8.31s\n", "3 passed in 8.31s\n", False),
        ("loss 4.857\n", "loss 3.857\n", False),
        ("a gradient\n", "no gradient\n", False),
        ("", "a line that the page does not show\n", False),
    ],
)
def test_what_a_page_shows_is_what_is_printed(shown: str, printed: str, alike: bool) -> None:
    assert is_alike(shown, printed) is alike


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))], ids=lambda page: page.stem)
def test_code_is_as_wide_as_a_block_of_the_site(page: Path) -> None:
    """What commands and code print may be longer: the site breaks it."""
    blocks = re.findall(r"^```(\w*)[^\n]*\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for kind, block in blocks if kind not in ("output", "console") for line in block.splitlines()]
    assert [line for line in lines if len(line) > 88 and not line.startswith("python3 -m venv")] == []


def test_every_name_and_command_of_a_page_exists() -> None:
    modules = {"tm": tritonmoe, "tmt": importlib.import_module(TRANSFORMERS)}
    (commands,) = (action for action in command_parser()._actions if isinstance(action, argparse._SubParsersAction))
    for page in (ROOT / "README.md", *DOCS.rglob("*.md")):
        text = page.read_text()
        for module, name in re.findall(r"\b(tmt?)\.([a-zA-Z]\w*)", text):
            assert hasattr(modules[module], name), f"{page}: {module}.{name}"
        for command in re.findall(r"[`$] ?tritonmoe ([a-z-]+)\b", text):
            assert command in commands.choices, f"{page}: tritonmoe {command}"


class _Trainer:
    """What the doctor's page asks of transformers' Trainer."""

    def __init__(self, steps: Callable[[], Iterator[None]]) -> None:
        self.steps = steps
        self.callbacks: list[TrainerCallback] = []

    def add_callback(self, callback: "TrainerCallback") -> None:
        self.callbacks.append(callback)

    def train(self) -> None:
        for _ in self.steps():
            for callback in self.callbacks:
                callback.on_step_end(None, None, None)  # type: ignore[arg-type]


class _Engine(torch.nn.Linear):
    """What it asks of DeepSpeed's engine."""

    def backward(self, y: torch.Tensor) -> None:
        y.sum().backward()

    def step(self) -> None:
        self.zero_grad()


@pytest.mark.thorough
def test_the_doctors_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Each of its blocks of Python writes what the doctor reads; the transformers block needs its package."""
    pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    layer = tritonmoe.MoELayer(tritonmoe.MoEConfig(8, 4, 4, 2))
    batches = [torch.randn(6, 8) for _ in range(19)]

    def step(model: torch.nn.Module, batch: torch.Tensor) -> None:
        model(batch).sum().backward()

    def steps() -> Iterator[None]:
        for batch in batches:
            yield step(layer, batch)

    namespace = {"model": layer, "step": step, "batches": batches, "engine": _Engine(8, 8), "trainer": _Trainer(steps)}
    blocks = re.findall(r"^```python\n(.*?)^```$", DOCTORS.read_text(), re.DOTALL | re.MULTILINE)
    assert len(blocks) == 4
    for block in blocks:
        exec(compile(block, "diagnosis.md", "exec"), namespace)
    for run in ("run-plain", "run-deepspeed", "run-trainer"):
        assert [file.name for file in Path(run).iterdir()] == ["rank-0000.trace.json.gz"]
        assert main(["doctor", run]) in (0, 1)
        assert "1 rank, 12 steps" in capsys.readouterr().out


@pytest.mark.thorough
def test_the_notebook_runs() -> None:
    notebook = json.loads((DOCS / "tutorials" / f"{FIRST}.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    install, *code = cells
    assert install.startswith("%pip install")
    namespace: dict[str, object] = {}
    for cell in code:
        exec(compile(cell, "a cell", "exec"), namespace)
    assert len(code) >= 5


PUBLIC = ("tritonmoe", "tritonmoe.transports", "tritonmoe.routing", "tritonmoe.tools.recording", "tritonmoe.tools.demo")
TRANSFORMERS = "tritonmoe.integrations.transformers"
ELSEWHERE = {
    # Results, constants and modules: described by what gives them, or by their own module.
    "tritonmoe": {*errors.__all__, "transports"},
    "tritonmoe.transports": {"EXPERT", "EmulatedWorld", "HostCopy", "LinkModel", "Ranks", "as_transport", "is_mesh"}
    | {"fail_peers_on_error"},
    "tritonmoe.routing": {"TopKRouter"},
    TRANSFORMERS: {"EXPERTS_IMPLEMENTATION", "MINIMUM_TRANSFORMERS", "HalvedForward", "ModelStatistics"}
    | {"PatchReport", "UpcycleReport"},
}


@pytest.mark.parametrize("name", [*PUBLIC, TRANSFORMERS])
def test_every_public_name_is_in_the_api_reference(name: str) -> None:
    module = importlib.import_module(name)
    reference = "\n".join(page.read_text() for page in (DOCS / "reference").glob("*.md"))
    listed = set(re.findall(rf"^::: {re.escape(name)}\.(\w+)$", reference, re.MULTILINE))
    elsewhere = ELSEWHERE.get(name, set())
    assert elsewhere <= set(module.__all__)
    assert listed == set(module.__all__) - elsewhere
    for public in listed:
        described = getattr(module, public)
        own = vars(described).get("__doc__") if isinstance(described, type) else described.__doc__
        assert own, f"{name}.{public} has no docstring"
        assert not own.startswith(f"{public}("), f"{name}.{public} has the docstring of a dataclass or tuple"


def test_every_error_has_its_cause_and_way_out() -> None:
    page = (DOCS / "reference" / "errors.md").read_text()
    assert set(re.findall(r"^\| `tm\.(\w+)` \|", page, re.MULTILINE)) == set(errors.__all__)
    assert all(hasattr(tritonmoe, name) for name in errors.__all__)


def test_every_environment_variable_of_ours_is_described() -> None:
    sources = "".join(path.read_text() for folder in ("tritonmoe", "tests") for path in (ROOT / folder).rglob("*.py"))
    read = set(re.findall(r"\"(TRITONMOE_[A-Z_]+)\"", sources))
    page = (DOCS / "reference" / "environment.md").read_text()
    assert read == set(re.findall(r"`(TRITONMOE_\w+)`", page))
