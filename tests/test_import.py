"""Importing tritonmoe is cheap, touches no device, and needs no optional package."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python(code: str) -> str:
    """Run code in a fresh interpreter and give what it printed."""
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


BLOCK = """
    import sys

    class NotInstalled:
        def __init__(self, finder):
            self.finder = finder

        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] in {blocked!r}:
                return None
            return self.finder.find_spec(name, path, target)

        def __getattr__(self, name):
            return getattr(self.finder, name)

    sys.meta_path[:] = [NotInstalled(finder) for finder in sys.meta_path]
"""


def test_nothing_is_initialised_or_imported_early() -> None:
    out = python(
        """
        import sys
        import torch
        patched = torch.nn.Module.forward, torch.autograd.Function.apply
        threads = torch.get_num_threads()
        import tritonmoe
        early = [name for name in ("triton", "transformers", "matplotlib", "numba", "mpi4py") if name in sys.modules]
        assert not early, early
        assert not torch.cuda.is_initialized()
        assert not torch.distributed.is_initialized()
        assert patched == (torch.nn.Module.forward, torch.autograd.Function.apply)
        assert torch.get_num_threads() == threads
        assert torch.get_default_dtype() == torch.float32
        print("fine")
        """
    )
    assert out == "fine"


def test_every_public_name_is_there() -> None:
    out = python(
        "import tritonmoe; print(all(hasattr(tritonmoe, n) for n in tritonmoe.__all__), tritonmoe.__version__)"
    )
    assert out.split()[0] == "True"
    assert out.split()[1][0].isdigit()


@pytest.mark.parametrize(
    "blocked", [("triton",), ("triton", "transformers", "matplotlib", "numpy", "mpi4py")], ids=["triton", "all"]
)
def test_works_without_optional_packages(blocked: tuple[str, ...]) -> None:
    code = textwrap.dedent(BLOCK.format(blocked=blocked)) + textwrap.dedent(
        """
        import torch
        import tritonmoe as tm

        layer = tm.MoELayer(tm.MoEConfig(8, 4, 4, 2))
        layer(torch.ones(3, 8)).sum().backward()
        assert layer.experts.gate_up_proj.grad is not None
        tm.run_on_emulated_ranks(lambda t: tm.MoELayer(layer.config, t)(torch.ones(3, 8)), 2)
        try:
            tm.MoELayer(layer.config, backend="triton")(torch.ones(3, 8))
        except ValueError as error:
            print(error)
        """
    )
    out = python(code)
    assert "backend='triton' can't run here: " in out
    assert "not installed" in out


def test_import_brings_no_package_but_torch_and_einops() -> None:
    out = python(
        """
        import sys
        import torch
        before = set(sys.modules)
        import tritonmoe
        new = {name.split(".")[0] for name in set(sys.modules) - before}
        print(sorted(new - set(sys.stdlib_module_names)))
        """
    )
    assert out == "['einops', 'tritonmoe']"


@pytest.mark.thorough
def test_generic_named_tuples_are_those_of_typing_extensions() -> None:
    """Python 3.10 doesn't import a file with one of typing's, and a type checker for 3.10 doesn't mind."""
    found = 0
    for path in [path for folder in ("tritonmoe", "bench", "examples") for path in (ROOT / folder).rglob("*.py")]:
        nodes = list(ast.walk(ast.parse(path.read_text())))
        classes = [node for node in nodes if isinstance(node, ast.ClassDef) and len(node.bases) > 1]
        if any(ast.unparse(base).endswith("NamedTuple") for one in classes for base in one.bases):
            sources = [
                node.module
                for node in nodes
                if isinstance(node, ast.ImportFrom) and "NamedTuple" in [alias.name for alias in node.names]
            ]
            assert sources == ["typing_extensions"], path
            found += 1
    assert found == 3
