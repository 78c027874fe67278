"""What each test file costs in CPU seconds, with all processes that its tests start: `pytest --cpu-seconds FILE`.

FILE keeps what it has of files that didn't run and are still there, so that one can be measured by itself. Wall time
says little on a machine that does other things too; CPU time is what a run of all tests is bound by.
"""

import json
import os
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import pytest


class CpuSeconds:
    """Sums what tests cost, and writes the sum of each file at the end of the run.

    Importing and collecting, which every worker does once, belong to no file.
    """

    def __init__(self, table: Path) -> None:
        self.table = table
        self.by_test: Counter[str] = Counter()
        self.before_s = 0.0

    def pytest_collection_finish(self) -> None:
        self.before_s = used_s()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Add what this process and its children have used since the last report."""
        report = yield
        now_s = used_s()
        report.user_properties.append(("cpu_s", now_s - self.before_s))
        self.before_s = now_s
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.by_test[report.nodeid] += dict(report.user_properties)["cpu_s"]

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if hasattr(session.config, "workerinput"):
            return
        by_file: Counter[str] = Counter()
        for test, seconds in self.by_test.items():
            by_file[test.partition("::")[0]] += seconds
        known: dict[str, float] = json.loads(self.table.read_text()) if self.table.exists() else {}
        known |= {name: round(seconds, 1) for name, seconds in by_file.items()}
        there = {name: known[name] for name in sorted(known) if (session.config.rootpath / name).exists()}
        self.table.write_text(json.dumps(there, indent=0) + "\n")


def used_s(process: str = "self") -> float:
    """Return the CPU seconds of a process and its children: those that have ended, and those still there."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        threads = Path(f"/proc/{process}/task").glob("*/children")
        children = [child for thread in threads for child in thread.read_text().split()]
    except OSError:  # it has ended meanwhile, and is among its parent's that have ended
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") + sum(map(used_s, children))
