"""Who may import whom: the order of folders, no circles between files, and the four fences; how docstrings begin."""

import ast
import functools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "tritonmoe"
FILES = sorted(ROOT.rglob("*.py"))
FOLDERS = (
    *("errors", "config", "runtime"),
    *("ops", "ops/kernels", "ops/backends", "ops/aot"),
    *("routing", "experts", "transports", "dispatch", "overlap", "overlap/simulation", "overlap/tuning"),
    *("expert_parallel", "placement", "layer", "layer/rebalancing", "integrations"),
    *("tools", "tools/report", "tools/recording", "tools/doctor", "tools/planner", "tools/benchmarks", "tools/demo"),
    "tools/cli",
)
"""A file imports from its own folder and from those that stand before it."""
FENCES = {
    "triton": ("ops/kernels/", "ops/aot/"),
    "torch.distributed": ("transports/", "placement/", "integrations/"),
    "transformers": ("integrations/",),
    "torch.cuda.Stream": ("runtime/expert_blocks.py", "runtime/pinned_memory.py", "transports/"),
    "torch.cuda.Event": (
        "overlap/report.py",
        "runtime/expert_blocks.py",
        "runtime/host_device.py",
        "transports/",
        "tools/benchmarks/device_time.py",
    ),
    "torch.cuda.stream": ("runtime/expert_blocks.py", "transports/"),
    "torch.cuda.current_stream": (
        *("overlap/report.py", "runtime/expert_blocks.py", "runtime/host_device.py", "transports/"),
        "tools/benchmarks/device_time.py",
    ),
}
EXCEPTIONS = {
    # what it uses beyond its fence or folder, and why
    ("__init__.py", "*"): "gives out the public names of every folder",
    ("__main__.py", "*"): "starts the command line",
    ("runtime/other_ranks.py", "torch.distributed"): "asks whether there are other ranks, and sends them nothing",
}


def module_of(path: Path) -> str:
    """Return the dotted name of a file's module."""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in FILES}


@functools.cache
def nodes_of(path: Path) -> tuple[ast.AST, ...]:
    """Return every node of a file."""
    return tuple(ast.walk(ast.parse(path.read_text())))


@functools.cache
def names_used(path: Path) -> frozenset[str]:
    """Absolute dotted names that a file imports, or reaches through an imported torch.

    Imports inside functions count, and those under `if TYPE_CHECKING`, which never run.
    """
    names = set()
    for node in nodes_of(path):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import: write the whole name"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Store):
            dotted = ast.unparse(node)
            if dotted.startswith("torch."):
                names.add(dotted)
    return frozenset(names)


def is_within(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def folder_of(name: str) -> str:
    """Return the innermost folder of FOLDERS in which a dotted name of the package is."""
    inside = [folder for folder in FOLDERS if is_within(name, f"tritonmoe.{folder.replace('/', '.')}")]
    assert inside, f"{name} has no place in the order of folders"
    return max(inside, key=len)


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
def test_a_file_imports_only_from_its_folder_and_those_before(path: Path) -> None:
    relative = path.relative_to(ROOT)
    if tolerated(relative.as_posix(), "*"):
        return
    own = folder_of(module_of(path))
    allowed = FOLDERS[: FOLDERS.index(own) + 1]
    for name in names_used(path):
        if is_within(name, "tritonmoe") and not tolerated(relative.as_posix(), name):
            assert folder_of(name) in allowed, f"{relative} imports {name}"


def imported_modules(path: Path) -> set[str]:
    """Return the package's modules that a file imports: of `from a.b import c` a.b.c if it is one, else a.b."""
    used = set()
    for name in names_used(path):
        while name and name not in MODULES:
            name = name.rpartition(".")[0]
        if name and name != module_of(path):
            used.add(name)
    return used


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return every set of modules that reach each other."""
    reached: dict[str, set[str]] = {}
    for start in graph:
        seen, todo = set(), [start]
        while todo:
            for name in graph[todo.pop()] - seen:
                seen.add(name)
                todo.append(name)
        reached[start] = seen
    found = {frozenset({a} | {b for b in reached[a] if a in reached[b]}) for a in graph if a in reached[a]}
    return sorted(sorted(circle) for circle in found)


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"e"}, "e": set(), "f": {"f"}}
    assert circles(graph) == [["a", "b", "c"], ["f"]]


def test_files_import_each_other_in_no_circle() -> None:
    assert circles({name: imported_modules(path) for name, path in MODULES.items()}) == []


def test_every_exception_is_needed() -> None:
    for file, used in EXCEPTIONS:
        path = ROOT / file
        assert path.exists(), file
        assert used == "*" or any(is_within(name, used) for name in names_used(path)), (file, used)


RIDDLES = ("Say", "Let", "Do", "Hear", "Tell", "Give", "Leave")


def test_no_docstring_begins_with_a_riddle() -> None:
    begins = re.compile(rf"({'|'.join(RIDDLES)})s?\b", re.ASCII)
    wrong = [
        f"{path}: {docstring}"
        for folder in ("tritonmoe", "bench", "virtual_gpu")
        for path in sorted((ROOT.parent / folder).rglob("*.py"))
        for node in nodes_of(path)
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef))
        and begins.match(docstring := ast.get_docstring(node) or "")
    ]
    assert not wrong, "write Return, or a verb of what is done: " + "; ".join(wrong)
