"""The tiers of a sweep: few of its cases, in which every value, or every pair of values, still occurs.

`@pytest.mark.sweep(2)` on a test with several parameters leaves the cases in the first tier in which each pair of
values of two parameters occurs for the first time; `sweep(1)` those with each value. The second tier has the cases,
marked `thorough`, in which each combination of one parameter more occurs: triples, or pairs. The others are `slow`.
"""

import itertools
from collections import defaultdict
from collections.abc import Iterator

import pytest

LONGEST_FILES = {
    "test_ahead_of_time.py",
    "test_compiled.py",
    "test_contract.py",
    "test_docs.py",
    "test_examples.py",
    "test_expert_parallel_compile.py",
    "test_launched_steps.py",
    "test_training_table.py",
    "test_transformers_expert_parallel.py",
    "test_transformers_two_batches.py",
}
"""They come early: the tests of a file run in one process, which would end long after the other."""
MOST_CPU_SECONDS = 8.0
"""A test file may cost so much in the first tier without a reason; tests/cpu_seconds.json has what each one costs."""
COSTLY_FILES = {
    "tests/dispatch/test_capacity.py": "whole layers by 1 to 4 ranks, with and without room, and interpreted kernels",
    "tests/dispatch/test_expert_chunks.py": "whole layers in chunks of experts, by 1 to 4 ranks and as one device",
    "tests/expert_parallel/test_copies.py": "whole layers with copies of experts, by 2 to 8 ranks and as one device",
    "tests/expert_parallel/test_expert_parallel.py": "whole layers by 1 to 4 ranks and as one device",
    "tests/expert_parallel/test_expert_parallel_compile.py": "each test traces graphs on every rank",
    "tests/expert_parallel/test_two_batches.py": "models of several layers on two ranks, whole and in halves",
    "tests/expert_parallel/test_two_batches_refused.py": "two batches in everything that users put around layers",
    "tests/experts/test_experts.py": "every layout, activation, dtype and routing by every backend",
    "tests/integrations/transformers/test_transformers_expert_parallel.py": "two processes that import transformers",
    "tests/integrations/transformers/test_upcycle.py": "a small model of every architecture",
    "tests/layer/test_offloading.py": "whole layers in every format, on one device and by 1 to 4 ranks, and compiled",
    "tests/ops/kernels/test_packed_tiles.py": "kernels in the interpreter, which decode every weight",
    "tests/ops/kernels/test_triton_backend.py": "kernels in the interpreter: each operation and its gradients",
    "tests/test_import.py": "each test starts a process that imports the package",
    "tests/test_pytorch.py": "what PyTorch has around layers, compiled graphs among them",
    "tests/transports/test_agreement.py": "starts processes, in which ranks disagree in every way",
    "tests/transports/test_contract.py": "the whole contract on every transport, in processes of gloo and MPI too",
    "tests/transports/test_two_level_faults.py": "layers on two levels of which a rank dies at each exchange in turn",
}
"""Why a file costs more, and is in the first tier all the same."""
ALONE_FILES = {"test_process_faults.py", "test_rebuild.py", "test_two_level_faults.py"}
"""Their tests run alone, and come first: each would wait, with all workers, until the others' long tests have ended."""


def place(item: pytest.Item) -> tuple[bool, bool]:
    """Return what a test is sorted by."""
    return item.path.name not in ALONE_FILES, item.path.name not in LONGEST_FILES


def left_out(items: list[pytest.Item]) -> Iterator[tuple[pytest.Item, str]]:
    """Return the cases of all sweeps that the first tier leaves out, each with the mark of its own tier."""
    cases: dict[object, list[pytest.Item]] = defaultdict(list)
    for item in items:
        if item.get_closest_marker("sweep"):
            cases[item.nodeid.partition("[")[0]].append(item)
    for of_test in cases.values():
        (strength,) = of_test[0].get_closest_marker("sweep").args
        # All cases of a test have the same objects as values.
        values = [tuple((name, id(value)) for name, value in item.callspec.params.items()) for item in of_test]
        first = covering(values, strength)
        faster = [number for number, item in enumerate(of_test) if not item.get_closest_marker("slow")]
        second = {faster[number] for number in covering([values[number] for number in faster], strength + 1)}
        for number, item in enumerate(of_test):
            if number not in first:
                yield item, "thorough" if number in second else "slow"


def covering(cases: list[tuple[tuple[str, int], ...]], strength: int) -> set[int]:
    """Choose cases, each time the one with most new combinations, until every combination has occurred."""
    shown = [set(itertools.combinations(case, min(strength, len(case)))) for case in cases]
    missing, chosen = set().union(*shown), set()
    while missing:
        best = max(range(len(cases)), key=lambda number: len(shown[number] & missing))
        chosen.add(best)
        missing -= shown[best]
    return chosen
