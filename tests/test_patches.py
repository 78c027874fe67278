"""docs/patches.md: every private name of PyTorch and Triton that the package uses stands there, and still exists."""

import ast
import functools
import importlib
import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "patches.md").read_text()
ON_PAGE = sorted(set(re.findall(r"`((?:torch|triton|transformers|peft)\.[\w.]+)`", PAGE)))


def is_private(name: str) -> bool:
    return any(part.startswith("_") and not part.endswith("__") for part in name.split("."))


@functools.cache
def private_names() -> frozenset[str]:
    """Return the dotted names of torch and triton with a private part, by which the package uses them."""
    names: set[str] = set()
    for path in (ROOT / "tritonmoe").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                names.update(f"{node.module}.{alias.name}" for alias in node.names)
            elif isinstance(node, ast.Attribute):
                names.add(ast.unparse(node))
    return frozenset(name for name in names if re.match(r"(torch|triton)\.[\w.]+$", name) and is_private(name))


def test_every_private_name_is_on_the_page() -> None:
    missing = {name for name in private_names() if not any(f"{name}.".startswith(f"{one}.") for one in ON_PAGE)}
    parents = {name for name in missing if any(one.startswith(f"{name}.") for one in ON_PAGE)}
    assert sorted(missing - parents) == []


@pytest.mark.parametrize("name", ON_PAGE)
def test_a_name_exists_in_the_installed_release(name: str) -> None:
    parts = name.split(".")
    pytest.importorskip(parts[0])
    if "_cuda_" in name and not torch.backends.cuda.is_built():
        pytest.skip("this build of PyTorch has no CUDA")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            found = getattr(found, part)
        return
    pytest.fail(f"{name} is no name of a module")


@pytest.mark.parametrize(
    ("owner", "methods"),
    [
        ("transformers.Trainer", r"`transformers\.Trainer`: ([^|]*)"),
        ("peft.tuners.lora.layer.ParamWrapper", r"`peft\.tuners\.lora\.layer\.ParamWrapper`: ([^|]*)"),
        ("peft.tuners.tuners_utils.BaseTuner", r"`peft\.tuners\.tuners_utils\.BaseTuner`: ([^|]*)"),
    ],
)
def test_methods_that_are_replaced_exist(owner: str, methods: str) -> None:
    module, _, kind = owner.rpartition(".")
    owning = getattr(pytest.importorskip(module), kind)
    names = [name for row in re.findall(methods, PAGE) for name in re.findall(r"`(\w+)`", row)]
    assert names
    assert [name for name in names if not hasattr(owning, name)] == []
