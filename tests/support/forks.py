"""Starts scripts as forks of a process that has imported what they need: `python forks.py`, told by lines of JSON.

A rank that is started by itself spends more on imports than on most cases. A fork has them, and nothing else: no
thread, no group, no generator that was used. Everything that a script imports anywhere is imported before its first
fork, once for all tests of a pytest process.
"""

import ast
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import sys
import time
import types
from pathlib import Path
from typing import Any

GRACE_S = 3.0
"""For the other ranks to say something too, once one has failed."""


def import_what_is_imported(path: Path) -> None:
    """Import what a script imports, at its top or in a function; what isn't there is for the script to find out."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module]
        else:
            continue
        for name in names:
            with contextlib.suppress(Exception):
                module = importlib.import_module(name)
                if isinstance(node, ast.ImportFrom):  # transformers imports a name's file where the name is asked for
                    for alias in node.names:
                        getattr(module, alias.name, None)


def become(script: list[str], output: Path, errors: Path, environment: dict[str, str]) -> None:
    """Turn this fork into the script, up to its last line."""
    os.environ.update(environment)
    for stream, path in enumerate((os.devnull, output, errors)):
        file = os.open(path, os.O_WRONLY | os.O_CREAT if stream else os.O_RDONLY, 0o600)
        os.dup2(file, stream)
        os.close(file)
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    if script[0] == "-c":
        sys.path[0], sys.argv, code = "", ["-c", *script[2:]], compile(script[1], "<string>", "exec")
    else:
        sys.path[0], sys.argv = str(Path(script[0]).parent), script
        main.__file__ = script[0]
        code = compile(Path(script[0]).read_text(), script[0], "exec")
    exec(code, main.__dict__)


def wait(pids: list[int], timeout_s: float, grace_s: float | None) -> list[int | None]:
    """Return the exit statuses of forks, None for those that had to be killed at the end of their time.

    grace_s: how long the others have once one has failed; None as long as all.
    """
    statuses: dict[int, int | None] = {}
    deadline = time.monotonic() + timeout_s
    while len(statuses) < len(pids):
        for pid in pids:
            if pid not in statuses and (ended := os.waitpid(pid, os.WNOHANG))[0]:
                statuses[pid] = os.waitstatus_to_exitcode(ended[1])
        if grace_s is not None and any(statuses.values()):
            deadline, grace_s = min(deadline, time.monotonic() + grace_s), None
        # nobody asks for anything meanwhile: what can be read is the end of pytest
        if time.monotonic() > deadline or select.select([0], [], [], 0.01)[0]:
            for pid in set(pids) - statuses.keys():
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                statuses[pid] = None
    return [statuses[pid] for pid in pids]


def start_store(size: int) -> tuple[int, dict[str, str]]:
    """Start a process with the store of a group, which outlives the ranks, and return what leads them to it."""
    read, write = os.pipe()
    host = os.fork()
    if host == 0:
        import torch.distributed as dist

        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        os.write(write, str(store.port).encode())
        while True:
            signal.pause()
    port = os.read(read, 16).decode()
    os.close(read)
    os.close(write)
    return host, {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "WORLD_SIZE": str(size),
        "LOCAL_WORLD_SIZE": str(size),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_RUN_ID": "none",
    }


def serve() -> None:
    """Answer requests until there are no more."""
    import torch
    import torch._dynamo
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import torch.distributed.tensor

    import tritonmoe  # noqa: F401

    torch.set_num_threads(1)
    known: set[str] = set()
    while line := sys.stdin.readline():
        request: dict[str, Any] = json.loads(line)
        for path in {script[0] for script in request["scripts"]} - known - {"-c"}:
            sys.path[0] = str(Path(path).parent)
            import_what_is_imported(Path(path))
            known.add(path)
        gc.collect()
        gc.freeze()
        if not run(**request):
            return  # this is a fork, whose script has ended


def run(scripts: list[list[str]], folder: str, cwd: str, timeout_s: float, is_group: bool) -> bool:
    """Run a script on every rank, and print their statuses; False in the ranks themselves."""
    host, common = start_store(len(scripts)) if is_group else (None, {})
    pids = []
    for rank, script in enumerate(scripts):
        pid = os.fork()
        if pid == 0:
            os.chdir(cwd)
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if is_group else {}
            become(script, Path(folder) / f"{rank}.output", Path(folder) / f"{rank}.errors", common | own)
            return False
        pids.append(pid)
    statuses = wait(pids, timeout_s, GRACE_S if is_group else None)
    if host is not None:
        os.kill(host, signal.SIGKILL)
        os.waitpid(host, 0)
    print(json.dumps(statuses), flush=True)
    return True


if __name__ == "__main__":
    serve()
