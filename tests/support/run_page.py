"""Run a page of the docs as a reader would: its blocks of Python in order, its files written, its commands called.

    python tests/support/run_page.py docs/tutorials/torchrun.md

Blocks of ```python run in one namespace; ```python title="train.py" is a file in the current folder; lines of
```console that begin with "$ " are commands. Blocks of other kinds are only shown.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

BLOCK = re.compile(r'^```(python|console)(?: title="([\w.]+)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)


def main(page: Path) -> None:
    namespace: dict[str, object] = {"__name__": "__main__"}
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "OMP_NUM_THREADS": "1",
    }
    for match in BLOCK.finditer(page.read_text()):
        kind, title, text = match.groups()
        if title is not None:
            Path(title).write_text(text)
        elif kind == "python":
            exec(compile(text, f"{page.name}, {text.splitlines()[0]}", "exec"), namespace)
        else:
            for line in text.splitlines():
                if line.startswith("$ "):
                    print(line, flush=True)
                    subprocess.run(line[2:], shell=True, check=True, env=environment)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
