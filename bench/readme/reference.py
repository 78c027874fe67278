"""What is made from the code: lists of files and of commands, what commands print, the notebook."""

import argparse
import ast
import importlib
import inspect
import json
import re
import shlex
import subprocess
import sys
from itertools import zip_longest

from bench.readme.install import install_command
from bench.readme.results import DOCS, ROOT, table_head
from tritonmoe.tools.benchmarks import BENCHMARKS
from tritonmoe.tools.cli import command_parser

__all__ = ["api_index", "command_output", "commands_reference", "files_table", "notebook_of"]

QWEN3 = "--nodes 16 --micro-batches 16"
COMMANDS = {
    "doctor": "tritonmoe doctor bench/results/recordings/slow_link",
    "straggler": "tritonmoe doctor tests/tools/doctor/data/straggler_ar_two_steps.json.gz",
    "plan": f"tritonmoe plan Qwen3-235B-A22B H100 {QWEN3}",
    "compare": f"tritonmoe plan Qwen3-235B-A22B --compare H100 H200 H100-100G {QWEN3}",
}


def files_table(package: str) -> str:
    """Return every file of a package with the first line of its docstring, a room's own line before its files."""
    lines = [*table_head("file", "what it is")]
    for path in sorted(
        (ROOT / package).rglob("*.py"), key=lambda path: (path.parent.parts, path.name != "__init__.py", path.name)
    ):
        name = path.relative_to(ROOT / package)
        docstring = ast.get_docstring(ast.parse(path.read_text()))
        assert docstring, f"{path} has no docstring"
        is_room = name.name == "__init__.py"
        shown = f"**{name.parent}/**" if is_room and name.parent.parts else name.as_posix()
        first_line = docstring.partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")
        lines.append(f"| {shown} | {first_line} |")
    return "\n".join(lines)


def api_index(_: str) -> str:
    """Return every public name of the reference's pages with the first sentence of its docstring."""
    (names,) = re.findall(r"^  - Reference:\n((?: +- .*\n)+)", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    lines: list[str] = []
    for file in re.findall(r"reference/(\w+)\.md", names):
        page = (DOCS / "reference" / f"{file}.md").read_text()
        described = re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE)
        if not described:
            continue
        lines += ["", f"## {page.splitlines()[0].removeprefix('# ')}", "", *table_head("name", "")]
        for name in described:
            module, _, public = name.rpartition(".")
            docstring = inspect.getdoc(getattr(importlib.import_module(module), public)) or ""
            sentence = re.split(r"(?<=[.:])\s", " ".join(docstring.partition("\n\n")[0].split()))[0].rstrip(":.")
            short = name.removeprefix("tritonmoe.integrations.transformers.")
            short = f"tmt.{short}" if short != name else name.replace("tritonmoe.", "tm.", 1)
            lines.append(f"| [`{short}`]({file}.md#{name}) | {_cell(sentence)} |")
    return "\n".join(lines).strip()


def command_output(name: str) -> str:
    """Return a command of COMMANDS and what it prints here."""
    command = COMMANDS[name]
    ended = subprocess.run(
        [sys.executable, "-m", *shlex.split(command)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if ended.returncode > 1:
        raise RuntimeError(f"{command} ended with {ended.returncode}: {ended.stderr}")
    return f"```console\n$ {command}\n{ended.stdout.rstrip()}\n```"


def commands_reference(program: str) -> str:
    """Return every command of the program with its options, from its parser, and under bench every benchmark."""
    (commands,) = (action for action in command_parser()._actions if isinstance(action, argparse._SubParsersAction))
    lines: list[str] = []
    for name, parser in commands.choices.items():
        lines += ["", f"## `{program} {name}`", "", *_body(parser)]
        for benchmark in BENCHMARKS if name == "bench" else ():
            make_parser = importlib.import_module(f"tritonmoe.tools.benchmarks.{benchmark}").make_parser
            lines += ["", f"### `{program} bench {benchmark}`", "", *_body(make_parser())]
    return "\n".join(lines).strip()


def _body(parser: argparse.ArgumentParser) -> list[str]:
    lines = [" ".join((parser.description or "").split())]
    rows = []
    for action in parser._actions:
        if action.help == argparse.SUPPRESS or isinstance(
            action, (argparse._HelpAction, argparse._SubParsersAction, argparse._VersionAction)
        ):
            continue
        metavar = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else None)
        if isinstance(metavar, tuple):
            metavar = " ".join(metavar)
        takes_value = action.nargs != 0
        value = (metavar or action.dest.upper()) if takes_value else ""
        if action.nargs in ("+", "*"):
            value += " ..."
        names = " ".join([action.option_strings[-1], value]).strip() if action.option_strings else value
        words = (action.help or "") % {**vars(action), "prog": parser.prog}
        rows.append(f"| `{_cell(names)}` | {_cell(words + _unsaid(action, words))} |")
    return [*lines, "", *table_head("argument", ""), *rows] if rows else lines


def _unsaid(action: argparse.Action, words: str) -> str:
    """Return what an argument's help leaves to the usage line: that it must be given, or its default."""
    if action.required and action.option_strings:
        return " (required)" if words else "required"
    value = " ".join(map(str, action.default)) if isinstance(action.default, list) else action.default
    if action.nargs == 0 or value in (None, "", argparse.SUPPRESS) or "default" in words:
        return ""
    return f" (default {value})" if words else f"default {value}"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def notebook_of(page: str) -> str:
    """Return a tutorial as a notebook: a cell for each block of Python, and one for the words between two of them."""
    cells = [_code_cell(install_command("notebook"))]
    blocks = re.compile(r"(?:<!-- varies -->\n)?```python\n(.*?)```\n(?:\n```output\n(.*?)```\n)?", re.DOTALL)
    words, codes, outputs = (blocks.split(page)[first::3] for first in range(3))
    for text, code, output in zip_longest(words, codes, outputs):
        if text.strip():
            # A notebook stands alone: links to other pages lead nowhere there.
            cells.append(_cell_of("markdown", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", text.strip())))
        if code is not None:
            cells.append(_code_cell(code.strip(), output))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    notebook = {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def _code_cell(text: str, output: str | None = None) -> dict:
    printed = {"name": "stdout", "output_type": "stream", "text": (output or "").splitlines(keepends=True)}
    return {**_cell_of("code", text), "execution_count": None, "outputs": [printed] if output else []}


def _cell_of(kind: str, text: str) -> dict:
    return {"cell_type": kind, "metadata": {}, "source": text.splitlines(keepends=True)}
