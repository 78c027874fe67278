"""Run a page of the docs as a reader would: its blocks of Python in order, its files written, its commands called.

    python tests/support/run_page.py docs/tutorials/torchrun.md [--write]

Blocks of ```python run in one namespace; ```python title="train.py" is a file in the current folder; lines of
```console that begin with "$ " are commands. Blocks of other kinds are only shown.

What a block of Python prints stands in a block of ```output behind it, what a command prints to stdout below its line:
it must be what is printed now, or with --write becomes that. Lines may come in another order, as those of ranks do, a
time or a share may be any, and another number with a point may differ by a tenth. Behind <!-- varies --> what is shown
is an example, and nothing is compared. Behind <!-- 600 is 60 in tests --> a block of Python has the second number
in the place of the first, except with --write.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import forks

BLOCK = re.compile(
    r"^(?P<shorter><!-- (?P<shown_number>\d+) is (?P<number>\d+) in tests -->\n)?"
    r'(?P<varies><!-- varies -->\n)?```(?P<kind>python|console)(?: title="(?P<title>[\w.]+)")?\n(?P<text>.*?)^```$'
    r"(?:\n\n```output\n(?P<shown>.*?)^```$)?",
    re.DOTALL | re.MULTILINE,
)
TORCHRUN = re.compile(r"torchrun --standalone --nproc-per-node (\d+) (.*)")
NUMBER = re.compile(r"(\d+(?:\.\d+)?(?:e[+-]?\d+)?)")
MINUTES = re.compile(r" \(\d+:\d\d:\d\d\)")
"""pytest adds it to seconds where these are more than a minute's."""
UNIT = re.compile(r" ?(?:ms|us|s|%|MB|GB)\b| ?%")


def is_alike(shown: str, printed: str) -> bool:
    """Return whether the same words are printed, with numbers that are as near as a page promises."""
    lines = [sorted(" ".join(line.split()) for line in text.splitlines() if line.strip()) for text in (shown, printed)]
    if len(lines[0]) != len(lines[1]):
        return False
    return all(map(_lines_are_alike, *[sorted(one, key=lambda line: NUMBER.sub("", line)) for one in lines]))


def _lines_are_alike(shown: str, printed: str) -> bool:
    shown_parts, printed_parts = (NUMBER.split(MINUTES.sub("", line)) for line in (shown, printed))
    if shown_parts[::2] != printed_parts[::2]:
        return False
    behind = shown_parts[2::2]
    for one, other, rest in zip(shown_parts[1::2], printed_parts[1::2], behind, strict=True):
        if UNIT.match(rest) or one == other:
            continue
        if one.isdigit() and other.isdigit():
            return False
        if abs(float(one) - float(other)) > 0.1 * abs(float(one)) + 0.02:
            return False
    return True


class Torchrun:
    """Starts what torchrun starts as forks of a process that has imported what they need, and has run nothing."""

    def __init__(self) -> None:
        (asked, ask), (answer, answered) = os.pipe(), os.pipe()
        sys.stdout.flush()
        self.forks = os.fork()
        if self.forks == 0:
            os.dup2(asked, 0)
            os.dup2(answered, 1)
            os.closerange(min(asked, ask, answer, answered), max(asked, ask, answer, answered) + 1)
            forks.serve()
            sys.exit()
        os.close(asked)
        os.close(answered)
        self.ask, self.answer = os.fdopen(ask, "w"), os.fdopen(answer)

    def end(self) -> None:
        self.ask.close()
        os.waitpid(self.forks, 0)

    def run(self, size: int, script: list[str]) -> tuple[int, str]:
        """Return whether a rank failed, and what they print, one after the other: else their lines mix."""
        with tempfile.TemporaryDirectory() as folder:
            request = {"scripts": [script] * size, "folder": folder, "cwd": os.getcwd()}
            print(json.dumps(request | {"timeout_s": 200.0, "is_group": True}), file=self.ask, flush=True)
            failed = any(json.loads(self.answer.readline()))
            kinds = ("output", "errors") if failed else ("output",)
            return int(failed), "".join(
                (Path(folder) / f"{rank}.{kind}").read_text() for rank in range(size) for kind in kinds
            )


class Page:
    """A page that runs, what it says is printed, and what is."""

    def __init__(self, path: Path, is_shortened: bool) -> None:
        self.path, self.is_shortened = path, is_shortened
        self.torchrun = Torchrun()
        self.namespace: dict[str, object] = {"__name__": "__main__"}
        self.differences: list[str] = []
        self.environment = {
            **os.environ,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "88",
        }

    def run(self) -> str:
        """Run every block, and return the page with what was printed."""
        text = BLOCK.sub(self._run_block, self.path.read_text())
        self.torchrun.end()
        return text

    def _run_block(self, match: re.Match) -> str:
        kind, title, text = match["kind"], match["title"], match["text"]
        if title is not None:
            Path(title).write_text(text)
            return match[0]
        opening = f"{match['shorter'] or ''}{match['varies'] or ''}```{kind}\n"
        if kind == "console":
            return f"{opening}{self._run_commands(text, bool(match['varies']))}```"
        where = f"{self.path.name}, {text.splitlines()[0]}"
        code = text
        if match["shorter"] and self.is_shortened:
            code = re.sub(rf"\b{match['shown_number']}\b", match["number"], text)
            assert code != text, f"{where} doesn't have {match['shown_number']}"
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, where, "exec"), self.namespace)
        output = self._compare(where, match["shown"] or "", printed.getvalue(), bool(match["varies"]))
        return f"{opening}{text}```" + (f"\n\n```output\n{output}```" if output else "")

    def _run_commands(self, text: str, varies: bool) -> str:
        lines = text.splitlines(keepends=True)
        starts = [number for number, line in enumerate(lines) if line.startswith("$ ")]
        pieces = lines[: starts[0]] if starts else lines
        for start, end in itertools.pairwise([*starts, len(lines)]):
            command = lines[start][2:].rstrip("\n")
            code, printed = self._run_command(command)
            if code:
                sys.exit(f"{printed}\n{self.path.name}: `{command}` ended with {code}")
            shown = "".join(lines[start + 1 : end])
            pieces += [lines[start], self._compare(command, shown, printed, varies)]
        return "".join(pieces)

    def _run_command(self, command: str) -> tuple[int, str]:
        """Return a command's status and what it prints."""
        if by_torchrun := TORCHRUN.fullmatch(command):
            return self.torchrun.run(int(by_torchrun[1]), shlex.split(by_torchrun[2]))
        ended = subprocess.run(command, shell=True, stdout=subprocess.PIPE, text=True, env=self.environment)
        return ended.returncode, ended.stdout

    def _compare(self, where: str, shown: str, printed: str, varies: bool) -> str:
        printed = "".join(f"{line.rstrip()}\n" for line in printed.strip("\n").splitlines())
        if varies:
            return printed
        if is_alike(shown, printed):
            return shown
        self.differences.append(f"{where} prints\n{printed}where the page has\n{shown}")
        return printed


def main() -> None:
    """Run a page, and write what it prints or end with what differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=lambda name: Path(name).resolve())
    parser.add_argument("--write", action="store_true", help="put what is printed into the page")
    arguments = parser.parse_args()
    page = Page(arguments.page, is_shortened=not arguments.write)
    text = page.run()
    if arguments.write:
        arguments.page.write_text(text)
    elif page.differences:
        sys.exit(
            "\n".join([*page.differences, f"python tests/support/run_page.py {arguments.page} --write mends this"])
        )


if __name__ == "__main__":
    main()
