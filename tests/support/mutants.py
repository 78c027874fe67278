"""Does the first tier find errors in the layer? `python tests/support/mutants.py RESULTS [FIRST LAST STEP]` puts 60 in.

Each one is put into a copy of the tree, where the tests of its folder run up to the first that fails: RESULTS (JSON)
says which. Where RESULTS is there already, the test that it names runs first: so a second run is short, and one after
tests were moved or thinned says whether the first tier still finds all that it found.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 400
"""A mutant under which the tests take longer counts as found: a rank waits for ever."""

EXPERT_PARALLEL = "tests/expert_parallel/test_expert_parallel.py tests/expert_parallel"
TESTS = {
    "experts": f"tests/experts tests/test_layer.py tests/expert_parallel/test_parallel_adapters.py {EXPERT_PARALLEL}",
    "dispatch": f"tests/dispatch {EXPERT_PARALLEL} tests/transports/test_two_level_faults.py",
    "overlap": f"tests/overlap/test_schedule.py tests/overlap/test_executor.py {EXPERT_PARALLEL}",
    "expert_parallel": f"{EXPERT_PARALLEL} tests/test_pytorch.py tests/transports/test_two_level_faults.py",
    "transports": "tests/transports tests/expert_parallel/test_wire_parallel.py",
    "placement": "tests/layer tests/integrations/torch_distributed tests/test_layer.py tests/test_pytorch.py",
    "routing": "tests/routing tests/test_layer.py tests/integrations/transformers/test_routing_replay.py",
    "layer": "tests/test_layer.py tests/layer tests/experts tests/expert_parallel/test_expert_parallel.py",
    "ops/backends": "tests/ops/backends tests/experts tests/test_layer.py tests/test_grouping.py tests/ops/kernels",
    "ops/kernels": "tests/ops/kernels tests/routing/test_fused_router.py",
}
"""By folder of the package: where its errors are to be found, the nearest first."""

MUTANTS = [
    # experts: an addend, a mask, a scale, another scale, an offset, an order, a bound, a sum, a factor
    ("experts/adapted_projection.py", "_replace(addend=out_h)", "_replace(addend=None)"),
    ("experts/adapted_projection.py", "rows.dropped.copy_(scaled_a).masked_fill_(is_dropped, 0)", "scaled_a"),
    ("experts/adapters.py", "adapters.gate_up_scale / kept", "adapters.gate_up_scale"),
    ("experts/adapters.py", "adapters.down_scale / kept", "adapters.gate_up_scale / kept"),
    ("experts/forward_run.py", "chunk_row_offsets[chunk : chunk + 2]", "chunk_row_offsets[chunk - 1 : chunk + 1]"),
    ("experts/backward_run.py", "dweights[block.positions] = part", "dweights[: part.shape[0]] = part"),
    ("experts/backward_run.py", "first is None or chunk < first", "first is None or chunk <= first"),
    ("experts/weight_gradients.py", "(main if mine is None else mine for mine, main", "(main for mine, main"),
    ("experts/adapted_projection.py", "outer(pairs, of_down.outward,", "outer(pairs, of_down.inward,"),
    # dispatch
    ("dispatch/send_plan.py", "starts, right=True) + overlap", "starts, right=False) + overlap"),
    ("dispatch/send_plan.py", "num_slots >= num_slots - num_copies", "num_slots > num_slots - num_copies"),
    ("dispatch/send_plan.py", "(topk_ids >= num_experts)", "(topk_ids > num_experts)"),
    ("dispatch/plan.py", "return offsets(self.tokens.return_rows)", "return offsets(self.tokens.rows)"),
    ("dispatch/plan.py", 'return_rows if overlap.chunk_by == "experts" else receive_rows,', "receive_rows,"),
    (
        "dispatch/plan.py",
        "h.needs_topk_weights for h in self.headers",
        "h.needs_topk_weights for h in self.headers[:1]",
    ),
    ("expert_parallel/plans/two_level.py", ".view(-1, size).T  # (place, node)", ".view(size, -1)"),
    (
        "expert_parallel/plans/two_level.py",
        "bucketize(rows, starts, right=True)",
        "bucketize(rows, starts, right=False)",
    ),
    ("dispatch/capacity.py", "return tokens, ~fits.all()", "return tokens, ~fits.any()"),
    ("dispatch/expert_chunks.py", "(local_ids < 0) | (local_ids >= num_local_experts)", "local_ids < 0"),
    ("dispatch/copies.py", "key=lambda copy: (copy.rank != rank, copy.rank)", "key=lambda copy: -copy.rank"),
    ("dispatch/placement.py", "total = terms[0].to(accumulation_dtype(own.dtype))", "total = terms[0]"),
    # overlap: waits, an order, a copy, a clamp
    ("overlap/schedule.py", "builder.add(StepKind.DISPATCH, c + window, dispatches[c])", "dispatches[c]"),
    ("overlap/schedule.py", "EXPERTS_BACKWARD, c, sends[c])", "EXPERTS_BACKWARD, c)"),
    ("overlap/schedule.py", "WEIGHT_GRAD, None, *computed)\n    replicas", "WEIGHT_GRAD, None)\n    replicas"),
    ("overlap/schedule.py", "builder.add(StepKind.REDUCE, c, combine, *local)", "builder.add(StepKind.REDUCE, c)"),
    ("overlap/executor.py", "            pending.wait()", "            pass"),
    ("overlap/row_exchanges.py", "stored[: plan.num_local] = pairs[: plan.num_local]", "stored.zero_()"),
    ("overlap/row_exchanges.py", "splits = splits[1], splits[0]", "splits = splits[0], splits[1]"),
    ("overlap/row_exchanges.py", "tensors.topk_ids.clamp(-1, 2**31 - 1)", "tensors.topk_ids"),
    # expert_parallel
    ("expert_parallel/layer_pass.py", "            self._agreement.wait()", "            pass"),
    (
        "expert_parallel/layer_pass.py",
        "self.dweights_home[self.plan.home_order()]",
        "self.dweights_home[self.plan.num_local :]",
    ),
    ("expert_parallel/layer_pass.py", "if not self.dispatch_wire.is_exact:", "if self.dispatch_wire.is_exact:"),
    ("expert_parallel/layer_pass.py", "self._state.note_backward(call.header.sequence)", "pass"),
    (
        "expert_parallel/plans/capacity.py",
        "again.first_run = entered_at, planned.report",
        "_ = entered_at, planned.report",
    ),
    ("expert_parallel/plans/halves.py", "            self.nodes.check(number)\n", ""),
    ("expert_parallel/plans/copies/copied_experts.py", "dx.add_(copies_dx)", "dx.copy_(copies_dx)"),
    ("expert_parallel/whole_call.py", "grads.topk_weights.to(topk_weights_dtype)", "grads.topk_weights"),
    ("expert_parallel/run_call.py", "needs_topk_weights=int(needs.topk_weights)", "needs_topk_weights=int(needs.x)"),
    # transports
    ("transports/gloo.py", "zlib.crc32(kind.encode()) >> 1 | 1", "1"),
    ("transports/gloo.py", "                    _wait(message.request)\n", "                    pass\n"),
    ("transports/wire.py", "result = wide * each", "result = wide"),
    ("transports/wire.py", "(largest / LARGEST_FINITE).clamp(min=SMALLEST_SCALE)", "largest / LARGEST_FINITE"),
    ("transports/two_level_transport.py", "tuple(arrivals[rank] for rank in self._ranks)", "tuple(arrivals)"),
    ("transports/mpi.py", "tag = exchange.number % NUM_TAGS", "tag = 0"),
    (
        "transports/process_group.py",
        "wire_rows, input_splits, output_splits, wire_out)",
        "wire_rows, output_splits, input_splits, wire_out)",
    ),
    ("transports/emulated/world.py", "        exchange.finish_if_complete()", "        pass"),
    # placement
    ("placement/expert_shards.py", "1 / size if self.calls", "1.0 if self.calls"),
    ("placement/expert_shards.py", "grad * (ctx.scale / ctx.replicas.size())", "grad * ctx.scale"),
    ("placement/placed_rows.py", "!= held[slot] - 1", "!= held[slot] + 1"),
    ("placement/grad_scaling.py", 'transport.all_reduce(anywhere, "max")', "anywhere.max()"),
    # routing
    ("routing/plain.py", "topk_weights = topk_weights * config.routed_scaling_factor", "pass"),
    ("routing/plain.py", "grouped.topk(min(2, grouped.shape[2]), dim=2)", "grouped.topk(1, dim=2)"),
    ("routing/plain.py", "dlogits = torch.where(is_finite, dlogits, 0.0)", "pass"),
    (
        "routing/losses.py",
        "(num_tokens.clamp(min=1).to(scores.dtype) / num_ranks)",
        "num_tokens.clamp(min=1).to(scores.dtype)",
    ),
    ("routing/router.py", "(load.sum() - load.numel() * load).sign()", "(load.numel() * load - load.sum()).sign()"),
    # layer, backends, kernels
    ("layer/moe_layer.py", "y = y + halves[-1]", "y = y + halves[0].sum()"),
    ("ops/backends/torch.py", "weights_of.masked_fill(index_of < 0, 0)", "weights_of"),
    ("ops/backends/torch_products.py", "out[first:last] = product[-count:]", "out[first:last] = product[:count]"),
    ("ops/backends/torch_products.py", "masked_fill_(~places.used.unsqueeze(1), 0)", "view(-1, 1)"),
    ("ops/kernels/gather_sum.py", "present = source >= 0", "present = source > 0"),
]
"""(file of the package, text that stands in it once, text in its place)."""


def first_failure(tree: Path, tests: list[str]) -> str | None:
    """Return the first of these tests that fails, as `-x` finds it; None where all of the first tier pass."""
    command = [sys.executable, "-m", "pytest", "-n", "0", "-x", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    pytest = subprocess.Popen(
        command,
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output = pytest.communicate(timeout=SECONDS)[0]
    except subprocess.TimeoutExpired:
        os.killpg(pytest.pid, signal.SIGKILL)
        pytest.communicate()
        return f"took longer than {SECONDS} s"
    found = re.search(r"^(?:FAILED|ERROR) (\S.*?)(?: - .*)?$", output, re.MULTILINE)
    if found is None and pytest.returncode not in (0, 5):  # 5: none of them is in the first tier
        return f"pytest ended with {pytest.returncode}: {output[-300:]}"
    return None if found is None else found[1]


def main(results: Path, first: int = 0, last: int = len(MUTANTS), step: int = 1) -> None:
    """Write to `results` which test finds each mutant of a range, None for none of them, or why nobody can tell."""
    known: dict[str, str | None] = json.loads(results.read_text()) if results.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in ("tritonmoe", "tests", "bench", "virtual_gpu", "docs", "examples"):
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        for path in ROOT.glob("*.*"):
            if path.is_file():
                shutil.copy(path, tree)
        for file, old, new in MUTANTS[first:last:step]:
            name, path = f"{file}: {old.strip()} -> {new.strip()}", tree / "tritonmoe" / file
            text = path.read_text() if path.exists() else ""
            if text.count(old) != 1:
                print("NO LONGER THERE", name, flush=True)
                continue
            path.write_text(text.replace(old, new))
            area = next(area for area in TESTS if file.startswith(f"{area}/"))
            before = known.get(name)
            test = first_failure(tree, [before]) if before and before.startswith("tests/") else None
            known[name] = test or first_failure(tree, TESTS[area].split())
            path.write_text(text)
            is_found = (known[name] or "").startswith("tests/")
            print("found" if is_found else "UNDECIDED" if known[name] else "NOT FOUND", name, known[name], flush=True)
            results.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), *map(int, sys.argv[2:]))
