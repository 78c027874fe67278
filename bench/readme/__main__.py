"""`python -m bench.readme [--check]`: write what is generated in README and docs, or check that it is current."""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.readme import (
    balance_tables,
    diagnosis_tables,
    figures,
    gpu_tables,
    install,
    kernel_tables,
    model_tables,
    overlap_tables,
    pictures,
    reference,
)
from bench.readme.results import DOCS, ROOT

TABLES = {
    "api": reference.api_index,
    "asking": install.asking_text,
    "checkout": install.checkout_text,
    "install": install.install_command,
    "files": reference.files_table,
    "commands": reference.commands_reference,
    "output": reference.command_output,
    "mended_recording": diagnosis_tables.mended_recording,
    "adapters": model_tables.adapters_table,
    "headline": model_tables.headline_table,
    "auto": overlap_tables.auto_table,
    "balance": balance_tables.balance_table,
    "dense_or_moe": pictures.dense_or_moe_figure,
    "doctor": diagnosis_tables.doctor_table,
    "foreign": diagnosis_tables.foreign_table,
    "one_rank_in_halves": overlap_tables.one_rank_in_halves,
    "overlap": overlap_tables.overlap_table,
    "quantized": model_tables.quantized_table,
    "quantized_model": model_tables.quantized_model_table,
    "overlap_picture": pictures.overlap_figure,
    "routing_replay": model_tables.routing_replay_table,
    "recording": diagnosis_tables.recording_table,
    "plan": diagnosis_tables.plan_table,
    "plan_ourselves": diagnosis_tables.plan_ourselves_table,
    "plan_rows": diagnosis_tables.plan_rows_table,
    "plan_steps": diagnosis_tables.plan_steps_table,
    "two_batches": overlap_tables.two_batches_table,
    "two_levels": overlap_tables.two_levels_table,
    "torchtitan": model_tables.torchtitan_table,
    "upcycle": model_tables.upcycle_table,
    "expert_parallel": overlap_tables.expert_parallel_table,
    "transformers": model_tables.transformers_table,
    "bounds": kernel_tables.bounds_table,
    "decoding": kernel_tables.decoding_table,
    "moe_mlp": kernel_tables.moe_mlp_table,
    "offload": model_tables.offload_table,
    "memory_budget": overlap_tables.memory_budget_table,
    "expert_precision": model_tables.expert_precision_table,
    "expert_precision_cost": model_tables.expert_precision_cost_table,
    "figures": figures.figures_that_matter,
    "rebalance": overlap_tables.rebalance_table,
    "codegen": kernel_tables.codegen_table,
    "codegen_epilogues": kernel_tables.codegen_epilogues_table,
    "codegen_packed": kernel_tables.codegen_packed_table,
    "codegen_steps": kernel_tables.codegen_steps_table,
    "conformance": kernel_tables.conformance_table,
    "gpu": gpu_tables.gpu_table,
    "gpu_memory": gpu_tables.gpu_memory_table,
    "gpu_training": gpu_tables.gpu_training_table,
    "tile_runs": kernel_tables.tile_runs_table,
    "tile_runs_code": kernel_tables.tile_runs_code_table,
    "launch": kernel_tables.launch_table,
    "launch_parts": kernel_tables.launch_parts_table,
}
SLOW = ("output",)
PAGES = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md")))
NOTEBOOK = DOCS / "tutorials" / "first-layer.ipynb"


def render(text: str, left_alone: Sequence[str] = ()) -> str:
    """Return a page with everything between `<!-- table KIND NAME -->` and `<!-- end -->` made anew, but some kinds."""

    def table(match: re.Match) -> str:
        kind, name = match.group(1), match.group(2)
        if kind in left_alone:
            return match.group(0)
        return f"<!-- table {kind} {name} -->\n{TABLES[kind](name)}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) ([\w.-]+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


def generated(left_alone: Sequence[str] = ()) -> dict[Path, str]:
    """Return what every page, and the notebook, must be."""
    pages = {page: render(page.read_text(), left_alone) for page in PAGES}
    return {**pages, **pictures.pictures(), NOTEBOOK: reference.notebook_of(NOTEBOOK.with_suffix(".md").read_text())}


def main() -> None:
    """Write what is stale, or say what is."""
    parser = argparse.ArgumentParser(prog="python -m bench.readme", description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 where a page is not what would be written")
    parser.add_argument("--quick", action="store_true", help="leave alone what commands print, which takes a while")
    arguments = parser.parse_args()
    files = generated(SLOW if arguments.quick else ())
    stale = [file for file, text in files.items() if not file.exists() or file.read_text() != text]
    if arguments.check:
        names = ", ".join(str(file.relative_to(ROOT)) for file in stale)
        sys.exit(f"{names}: stale, run python -m bench.readme" if stale else None)
    for file in stale:
        file.write_text(files[file])


if __name__ == "__main__":
    main()
