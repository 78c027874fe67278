"""Who may import whom, and the four fences: triton, torch.distributed, CUDA streams and events, transformers."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "tritonmoe"
FILES = sorted(ROOT.rglob("*.py"))
LAYERS = (
    *(
        "errors",
        "files",
        "handles",
        "cpu_memory",
        "cpu_threads",
        "config",
        "overlap_config",
        "grouping",
        "kernels",
        "backends",
        "autograd",
        "transforms",
        "routing",
        "arguments",
        "flops",
        "callable_activation",
        "weight_gradients",
        "experts_run",
        "custom_ops",
        "experts",
        "placement",
        "transports",
        "wire",
        "expert_chunks",
        "call_header",
        "header_check",
        "count_exchange",
        "token_plan",
        "capacity",
        "dispatch",
        "two_level",
        "overlap",
        "transport_state",
    ),
    *(
        "expert_parallel_call",
        "expert_parallel_run",
        "expert_parallel_operator",
        "expert_parallel",
        "shared_expert",
        "nonfinite",
        "layer",
        "spread",
        "gradient_clipping",
        "probe",
        "emulation",
        "integrations",
        "report",
        "benchmarks",
        "cli",
    ),
)
"""A file imports from its own layer and from those that stand before it."""
FENCES = {
    "triton": ("kernels/",),
    "torch.distributed": ("transports/", "integrations/"),
    "transformers": ("integrations/",),
    "torch.cuda.Stream": ("emulation.py", "transports/"),
    "torch.cuda.Event": ("overlap/layer_report.py", "emulation.py", "transports/"),
    "torch.cuda.stream": ("emulation.py", "transports/"),
    "torch.cuda.current_stream": ("overlap/layer_report.py", "emulation.py", "transports/"),
}
EXCEPTIONS = {
    # what it uses beyond its fence or layer, and why
    ("kernels/aot/launches.py", "tritonmoe.backends"): "compiles the operations as they are launched",
    ("__init__.py", "*"): "gives out the public names of every layer",
    ("__main__.py", "*"): "starts the command line",
}


def names_used(path: Path) -> Iterator[str]:
    """Absolute dotted names that a file imports or reaches through an imported torch."""
    package = ("tritonmoe", *path.relative_to(ROOT).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(filter(None, (base, node.module)))
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Store):
            dotted = ast.unparse(node)
            if dotted.startswith("torch."):
                yield dotted


def is_within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def tolerated(relative: str, name: str) -> bool:
    return any(file == relative and (used == "*" or is_within(name, used)) for file, used in EXCEPTIONS)


@pytest.mark.parametrize("fence", FENCES)
def test_fences(fence: str) -> None:
    outside = {
        (relative, name)
        for path in FILES
        for relative in (path.relative_to(ROOT).as_posix(),)
        for name in names_used(path)
        if is_within(name, fence) and not relative.startswith(FENCES[fence]) and not tolerated(relative, name)
    }
    assert not outside


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_a_file_imports_only_what_stands_above_it(path: Path) -> None:
    relative = path.relative_to(ROOT)
    if tolerated(relative.as_posix(), "*"):
        return
    own = relative.parts[0].removesuffix(".py")
    assert own in LAYERS, f"{own} has no place in the order of layers"
    allowed = LAYERS[: LAYERS.index(own) + 1]
    for name in names_used(path):
        if is_within(name, "tritonmoe") and not tolerated(relative.as_posix(), name):
            layer = f"{name}.".split(".")[1]
            assert layer in allowed or layer == "__version__", f"{relative} imports {name}"


def test_every_exception_is_needed() -> None:
    for file, used in EXCEPTIONS:
        path = ROOT / file
        assert path.exists(), file
        assert used == "*" or any(is_within(name, used) for name in names_used(path)), (file, used)
