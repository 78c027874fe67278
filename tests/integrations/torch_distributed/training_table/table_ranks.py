"""Runs the training table on gloo processes: `python table_ranks.py FOLDER` writes FOLDER/results.json.

The processes of a size are forks of one that has imported everything. A cell that fails ends them, since what it left
under way would meet the next one's, and the cells after it run in new ones. Without FOLDER the table is printed.
"""

import gc
import json
import os
import re
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import transformers
from table_cells import cells_of
from table_forms import FORMS, Ranks
from torch.distributed.device_mesh import init_device_mesh

TIMEOUT_S = 20.0
"""Of a collective."""
GRACE_S = 3.0
"""For the other ranks to say something too, once one has failed."""
LIMIT_S = 150.0
"""Without a cell that ends: a collective's timeout comes before, unless something else hangs."""
REFUSED = {
    "FSDP2 without ignored_params": r"expert_parameters",
    "experts over fewer ranks": r"replica",
    "replicate()": r"DistributedDataParallel",
}
"""Rows in which an error is what must happen, and what it names."""
Cell = tuple[str, str, str]
"""Row, form, ranks."""


FORM_OF_ALL_ROWS = "module inside a wrapper"
ROWS_OF_ALL_FORMS = ("DDP", "FSDP2", "clip_grad_norm_", "AdamW foreach", "one-device weights, load_state_dict")
ROWS_OF_FOUR = (
    "DDP",
    "replicate()",
    "clip_grad_norm_",
    "DCP, same ranks",
    "DCP from 1",
    "DCP from 2x2",
    "experts over fewer ranks",
)
ROWS_OF_REPLICAS = (
    *ROWS_OF_ALL_FORMS,
    "DCP, same ranks",
    "HSDP",
    "FSDP2 of experts over replicas",
    "GradScaler",
    "deepcopy",
)
ROWS_OF_REPLICAS += ("accumulated gradients", "DCP from 1", "DCP from 4")


def tier(cell: Cell) -> str:
    """Say which test run has this cell: the second ("thorough"), or only one that somebody asks for ("slow")."""
    return "thorough" if is_quick(cell) else "slow"


def run_of(cell: Cell) -> str:
    """Name the run (RUNS) in which a test looks for this cell."""
    if tier(cell) == "slow":
        return "all"
    return "all rows" if cell[1] == FORM_OF_ALL_ROWS else "other forms"


def is_quick(cell: Cell) -> bool:
    """Say whether .ci/run has this cell; the others are much the same, and take minutes."""
    row, form, ranks = cell
    if row == "torch.compile":
        return ranks == "2" and form == "module parallelized"
    if ranks in ("4", "2x2"):
        return form == FORM_OF_ALL_ROWS and row in (ROWS_OF_FOUR if ranks == "4" else ROWS_OF_REPLICAS)
    if row.startswith("DCP"):  # the others must have written it
        return form == FORM_OF_ALL_ROWS
    return form == FORM_OF_ALL_ROWS or row in ROWS_OF_ALL_FORMS


RUNS: dict[str, Callable[[Cell], bool]] = {
    "all rows": lambda cell: is_quick(cell) and cell[1] == FORM_OF_ALL_ROWS,
    "other forms": lambda cell: run_of(cell) == "other forms",
    "all": lambda cell: True,
}
"""Cells that run together, because some write checkpoints that others read, and starting the ranks takes seconds."""


def passes() -> list[tuple[int, list[Cell]]]:
    """Return what runs in which order, by number of processes: a checkpoint must be written before it is read."""
    rows = cells_of(Path())

    def cells(ranks: tuple[str, ...], kinds: tuple[str, ...], but: tuple[str, ...] = ()) -> list[Cell]:
        return [
            (row, form.name, r)
            for r in ranks
            for row, (where, _) in rows.items()
            if r in where and (row.startswith(kinds) if kinds else not row.startswith(but))
            for form in FORMS
        ]

    return [
        (1, cells(("1",), (), but=("DCP from",))),
        (2, cells(("2",), (), but=("DCP from",))),
        (4, cells(("4", "2x2"), (), but=("DCP from",))),
        (4, cells(("4", "2x2"), ("DCP from",))),
        (2, cells(("2",), ("DCP from",))),
        (1, cells(("1",), ("DCP from",))),
    ]


def make_ranks(name: str, rank: int, size: int) -> Ranks:
    spread_over: Any = None
    if name == "2":
        spread_over = dist.group.WORLD
    elif name == "4":
        spread_over = init_device_mesh("cpu", (4,))
    elif name == "2x2":
        spread_over = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "expert"))
    return Ranks(name, rank, size, spread_over)


def outcome_of(cell: Cell, ranks: Ranks, folder: Path) -> str:
    row, form_name, _ = cell
    form = next(form for form in FORMS if form.name == form_name)
    try:
        cells_of(folder)[row][1](form, ranks)
    except AssertionError as error:
        return f"DIFFERENT: {error}" if str(error) else f"error: {traceback.format_exc()[-800:]}"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"raised: {type(error).__name__}: {error} ({last.filename}:{last.lineno})"
    return "equal"


def is_expected(cell: Cell, outcome: str) -> bool:
    words = REFUSED.get(cell[0])
    if words is None:
        return outcome == "equal"
    return bool(re.match(f"raised: (ValueError|TypeError): .*{words}", outcome, re.DOTALL))


def run_rank(cells: list[Cell], rank: int, size: int, folder: Path, number: int) -> None:
    torch.set_num_threads(1)
    if size > 1:
        store = f"file://{folder}/store.{number}"
        dist.init_process_group("gloo", store, timedelta(seconds=TIMEOUT_S), size, rank)
    made: dict[str, Ranks] = {}
    with open(folder / f"{number}.{rank}", "w") as file:
        for cell in cells:
            if cell[2] not in made:
                made[cell[2]] = make_ranks(cell[2], rank, size)
            started = time.process_time()
            outcome = outcome_of(cell, made[cell[2]], folder)
            print(json.dumps([outcome, time.process_time() - started]), file=file, flush=True)
            if not is_expected(cell, outcome):
                return


def run_processes(cells: list[Cell], size: int, folder: Path, number: int) -> list[list[str]]:
    """Return for every rank the outcomes that it came to."""
    gc.collect()
    gc.freeze()  # each look for what else holds a tensor goes through all objects but those that are frozen
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            try:
                run_rank(cells, rank, size, folder, number)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(0)  # with exchanges under way, gloo's own threads abort an ordinary exit
        pids.append(pid)
    files = [folder / f"{number}.{rank}" for rank in range(size)]
    running, written, deadline = set(pids), 0, time.monotonic() + LIMIT_S
    while running and time.monotonic() < deadline:
        running -= {pid for pid in running if os.waitpid(pid, os.WNOHANG)[0]}
        now_written = sum(file.stat().st_size for file in files if file.exists())
        if now_written > written and len(running) == size:
            written, deadline = now_written, time.monotonic() + LIMIT_S
        elif len(running) < size:
            deadline = min(deadline, time.monotonic() + GRACE_S)
        time.sleep(0.02)
    for pid in running:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return [[json.loads(line) for line in file.read_text().splitlines()] for file in files]


def run_cells(cells: list[Cell], size: int, folder: Path) -> dict[str, Any]:
    """Return by cell what it came to on the ranks, each outcome once, and its seconds of a core."""
    results: dict[str, Any] = {}
    while cells:
        number = len(list(folder.glob("store.*"))) + 1
        (folder / f"store.{number}").touch()
        lines = run_processes(cells, size, folder, number)
        for index, cell in enumerate(cells):
            heard = [own[index] if index < len(own) else ["no answer", 0.0] for own in lines]
            outcomes = list(dict.fromkeys(outcome for outcome, _ in heard))
            results["|".join(cell)] = outcomes, max(seconds for _, seconds in heard)
            if not all(is_expected(cell, outcome) for outcome in outcomes):
                break
        cells = cells[index + 1 :]
    return results


def run_table(folder: Path, only: str = "all") -> dict[str, Any]:
    """Run the cells of one of RUNS, or those that a regular expression finds."""
    transformers.logging.set_verbosity_error()
    is_wanted = RUNS.get(only, lambda cell: bool(re.search(only, "|".join(cell))))
    results: dict[str, Any] = {}
    for size, cells in passes():
        started = time.perf_counter()
        results |= run_cells(list(filter(is_wanted, cells)), size, folder)
        print(f"{size} processes: {time.perf_counter() - started:.1f} s", file=sys.stderr)
    return results


def markdown(results: dict[str, Any]) -> str:
    """Return the tables, one for each set of ranks."""
    lines = []
    for ranks, title in (("2", "2 ranks"), ("4", "4 ranks"), ("2x2", "2 replicas x 2 ranks"), ("1", "one device")):
        lines += [
            f"### {title}",
            "",
            "| | " + " | ".join(form.name for form in FORMS) + " |",
            "| --- " * (len(FORMS) + 1) + "|",
        ]
        for row in cells_of(Path()):
            found = [results.get(f"{row}|{form.name}|{ranks}") for form in FORMS]
            if any(found):
                words = [re.split(r"[: ]", result[0][0])[0] if result else "" for result in found]
                words = ["refused" if w == "raised" and row in REFUSED else w for w in words]
                lines.append(f"| {row} | " + " | ".join(words) + " |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    torch.set_num_threads(1)
    # what the compiler imports takes longer than many cells: once, before the forks
    torch.compile(torch.nn.Identity(), backend="aot_eager")(torch.ones(1))
    torch._dynamo.reset()
    if len(sys.argv) > 1:
        folder = Path(sys.argv[1]).resolve()
        (folder / "results.json").write_text(json.dumps(run_table(folder, *sys.argv[2:])))
    else:
        with tempfile.TemporaryDirectory() as own_folder:
            print(markdown(run_table(Path(own_folder))))
