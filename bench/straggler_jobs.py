"""`python -m bench.straggler_jobs FOLDER...`: what the doctor says of jobs that StragglerAnalysis has published.

A folder has the job's timeline as a Chrome trace, and may have its published figures: mw.json (tori, tideal, Mw) and
ms.json (Ms).
"""

import argparse
import json
from pathlib import Path

from tritonmoe.tools.doctor.attribution import attribute
from tritonmoe.tools.doctor.chrome_timeline import slowdown_of
from tritonmoe.tools.doctor.reading import read_traces
from tritonmoe.tools.doctor.verdict import as_text

__all__ = ["main"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="+", type=Path)
    for folder in parser.parse_args().folders:
        try:
            run = read_traces(folder)
        except (ValueError, OSError) as error:
            parser.error(str(error))
        if run.lanes != "timeline":
            parser.error(f"{folder} has no pipeline's timeline: give the folder of one job")
        print(as_text(run, attribute(run.graph)))
        found = slowdown_of(run.graph)
        print(f"S {found.S:.4f}, M_W {found.M_W:.4f} of {run.graph.named(found.slowest)}, M_S {found.M_S:.4f}")
        if (folder / "mw.json").is_file():
            of_workers, of_stage = (json.loads((folder / name).read_text()) for name in ("mw.json", "ms.json"))
            S, M_W, M_S = of_workers["tori"] / of_workers["tideal"], of_workers["Mw"], of_stage["Ms"]
            print(f"published: S {S:.4f}, M_W {M_W:.4f}, M_S {M_S:.4f}; off by {found.S / S - 1:+.1%}, "
                  f"{found.M_W - M_W:+.4f} and {found.M_S - M_S:+.4f}")  # fmt: skip


if __name__ == "__main__":
    main()
