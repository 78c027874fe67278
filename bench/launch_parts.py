"""Where the host's part of a call goes: the functions of which it consists, each counted alone, in instructions too.

A call is watched once. Every function of PARTS that it runs is kept with its arguments, and then run again alone. What
a function takes beside those inside it is its own, and what no function of the table explains is the rest: autograd,
the lists of tensors, and Python's calls between them. Instructions are counted by callgrind: they are the same whatever
else the machine does.
"""

import contextlib
import ctypes
import gc
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = [
    "NOTHING",
    "Part",
    "add_up",
    "answer_here",
    "count_here",
    "count_instructions",
    "nothing",
    "thread_times",
    "times_of_trees",
    "watched",
]

CALLS = 20
"""Calls that are timed together."""
COUNTED_CALLS = 5
"""Calls whose instructions are counted together."""
WARM_CALLS = 30
"""Calls before any is counted: Python specialises code that ran often."""
NOTHING = "nothing"
REST = "autograd and the rest"
LAUNCH, KEY = "launch", "key of a launch"
REQUESTS = """
#include <valgrind/callgrind.h>
void start(void) { CALLGRIND_START_INSTRUMENTATION; }
void begin(void) { CALLGRIND_ZERO_STATS; }
void end(const char *what) { CALLGRIND_DUMP_STATS_AT(what); }
"""


@dataclass
class Part:
    """One call of a function of PARTS; calling it makes the same call again."""

    what: str
    function: Callable[..., object]
    args: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)
    inner: "list[Part]" = field(default_factory=list)
    """The calls that were made inside it."""

    def __call__(self) -> object:
        return self.function(*self.args, **self.keywords)

    def walk(self, path: str = "") -> "Iterator[tuple[str, Part]]":
        """Return this call and all inside it, by names that are unique."""
        path = f"{path}/{self.what}"
        yield path, self
        for number, part in enumerate(self.inner):
            yield from part.walk(f"{path}.{number}")


def _places() -> list[tuple[Any, str, str]]:
    """Return (owner, attribute, what) of every function that is watched: an owner is a module or a class."""
    from tritonmoe.experts import backward_run, moe_mlp
    from tritonmoe.experts.spec import ExpertSettings
    from tritonmoe.ops.backends import triton as ops
    from tritonmoe.ops.kernels.compiled import CompiledKernels

    operations = ("group", "up", "down", "gather_sum", "down_grad", "up_grad", "weight_grad")
    return [
        (moe_mlp, "expert_spec", "settings of the call"),
        (moe_mlp, "given_weights", "weights"),
        (moe_mlp, "with_adapters", "weights"),
        (moe_mlp, "checked_tensors", "checks of tensors"),
        (moe_mlp, "with_row_seeds", "checks of tensors"),
        (moe_mlp, "find_main_grads", "search for main_grad"),
        (moe_mlp, "choose_backend", "choice of the backend"),
        (moe_mlp, "warn_of_one_based_ids", "ids from 1"),
        (ExpertSettings, "projections", "projections"),
        (backward_run, "weight_gradients", "weight_grad"),
        *((ops, operation, operation) for operation in operations),
        (CompiledKernels, "launch", LAUNCH),
        (CompiledKernels, "key", KEY),
    ]


def nothing() -> Part:
    """Return an empty call, whose cost every other one has too."""
    return Part(NOTHING, lambda: None)


@contextlib.contextmanager
def _watching(top: Part) -> Iterator[None]:
    """Keep all calls of the functions of PARTS, in this thread, inside `top`."""
    stack = [top]

    def watch(what: str, function: Callable[..., object]) -> Callable[..., object]:
        def watching(*args: Any, **keywords: Any) -> object:
            part = Part(what, function, args, keywords)
            stack[-1].inner.append(part)
            stack.append(part)
            try:
                return function(*args, **keywords)
            finally:
                stack.pop()

        return watching

    with contextlib.ExitStack() as undo:
        for owner, attribute, what in _places():
            function = getattr(owner, attribute)
            undo.callback(setattr, owner, attribute, function)
            setattr(owner, attribute, watch(what, function))
        yield


def watched(what: str, run: Callable[[], object]) -> Part:
    """Return a call with the functions of PARTS that it runs; they are those of the call after some others."""
    top = Part(what, run)
    run()
    with _watching(top):
        run()
    return top


def add_up(top: Part, costs: Mapping[str, float]) -> list[dict[str, Any]]:
    """Return a row for each kind of function in a call: how often it ran, what it took itself and in its launches.

    costs: what each call takes with all that is inside it, by the names of walk(), and an empty one by NOTHING.
    """
    rows: dict[str, dict[str, Any]] = {}

    def whole(path: str) -> float:
        return costs[path] - costs[NOTHING]

    def add(path: str, part: Part, outer: str) -> float:
        paths = [f"{path}.{number}/{inner.what}" for number, inner in enumerate(part.inner)]
        what = REST if part is top else part.what
        if what in (LAUNCH, KEY) or what == outer:  # a launch belongs to what launches
            what = outer
        row = rows.setdefault(what, {"what": what, "calls": 0, "own": 0.0, "launches": 0.0})
        inside = sum(map(whole, paths))
        if part.what == LAUNCH:
            row["launches"] += whole(path)
        elif part.what != KEY:
            row["own"] += whole(path) - inside
            row["calls"] += what not in (outer, REST)
            for name, inner in zip(paths, part.inner, strict=True):
                add(name, inner, what)
        return whole(path)

    add(f"/{top.what}", top, "")
    rest = rows.pop(REST)
    return [*rows.values(), rest]


def thread_times(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of this thread that a call takes, of every one of `runs` in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(1 + rounds):
        for name, run in runs.items():
            run()
            started = time.thread_time()
            for _ in range(CALLS):
                run()
            if number > 0:
                seconds[name].append((time.thread_time() - started) / CALLS)
    return seconds


def _python(call: str) -> list[str]:
    """Return a command that calls a function of this file, whatever tree's packages it finds."""
    return [sys.executable, "-c", f"import runpy; runpy.run_path({__file__!r}, {{}}, 'parts')['_call']({call!r})"]


def _call(call: str) -> None:
    eval(call)


def _environment(tree: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(tree)}


def times_of_trees(trees: Mapping[str, Path], names: Sequence[str], rounds: int) -> dict[str, dict[str, list[float]]]:
    """Return the seconds of the thread that each source tree takes for the calls of these names, in every round.

    Each tree has a process, and the processes take turns, call by call, in an order that changes from round to round.
    """
    seconds: dict[str, dict[str, list[float]]] = {name: {label: [] for label in trees} for name in names}
    with contextlib.ExitStack() as stack:
        children = {}
        for label, tree in trees.items():
            command, environment = _python("answer_here()"), _environment(tree)
            child = subprocess.Popen(
                command, cwd=tree, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
            children[label] = stack.enter_context(child)
        order = list(trees)
        for _ in range(rounds):
            for name in names:
                order.append(order.pop(0))
                for label in order:
                    to_child, from_child = children[label].stdin, children[label].stdout
                    assert to_child is not None
                    assert from_child is not None
                    print(name, file=to_child, flush=True)
                    seconds[name][label].append(float(from_child.readline()))
    return seconds


def answer_here() -> None:
    """Run in a process of a tree: for each name that is read, write the seconds of a call."""
    from bench.launch import operations, take_launches

    with tempfile.TemporaryDirectory() as folder:
        take_launches(Path(folder))
        runs = operations()
        for run in runs.values():
            run()
        gc.freeze()
        for line in sys.stdin:
            run = runs[line.rstrip("\n")]
            (times,) = thread_times({"": run}, 1).values()
            print(times[0], flush=True)


def count_instructions(tree: Path, parts: bool) -> dict[str, float]:
    """Return the instructions of the calls that bench.launch of a source tree times, and of their parts where asked.

    Raises:
        FileNotFoundError: there is no valgrind or no C compiler.
    """
    for program in ("valgrind", "cc"):
        if shutil.which(program) is None:
            raise FileNotFoundError(f"instructions are counted by valgrind, and {program} is not installed")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "requests.c"
        source.write_text(REQUESTS)
        library = Path(folder) / "requests.so"
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, source], check=True)
        command = ["valgrind", "-q", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={folder}/counts"]
        command += _python(f"count_here({folder!r}, {parts})")
        subprocess.run(command, cwd=tree, env=_environment(tree), check=True)
        counts: dict[str, float] = {}
        for path in Path(folder).glob("counts*"):
            text = path.read_text()
            name = re.search(r"^desc: Trigger: Client Request: (.*)$", text, re.MULTILINE)
            total = re.search(r"^(?:summary|totals): (\d+)$", text, re.MULTILINE)
            if name is not None and total is not None:
                counts[name[1]] = int(total[1]) / COUNTED_CALLS
    return counts


def count_here(folder: str, parts: bool) -> None:
    """Run in a process under callgrind: dump the instructions of every call, by its name."""
    from bench.launch import operations, take_launches

    requests = ctypes.CDLL(f"{folder}/requests.so")
    take_launches(Path(folder))
    runs: dict[str, Callable[[], object]] = {"the first count": nothing(), NOTHING: nothing()}
    for name, run in operations().items():
        for _ in range(WARM_CALLS):
            run()
        runs[name] = run
        if parts and name.startswith("moe_mlp"):
            runs |= watched(name, run).walk()
    import torch

    gc.collect()
    gc.disable()
    requests.start()
    for name, run in runs.items():
        with torch.set_grad_enabled(not name.startswith("/") or "." not in name):
            run()
            requests.begin()
            for _ in range(COUNTED_CALLS):
                run()
            requests.end(name.encode())
