"""What the machines run, as the README lists it: python -m virtual_gpu.support writes the lists there."""

import itertools
import re
from collections.abc import Iterable
from pathlib import Path

from virtual_gpu.amd import instructions as amd
from virtual_gpu.nvidia.instruction_set import ARITHMETIC, BARRIERS, CALLS, FENCES, MEMORY, NOTHING, SPECIAL_FORMS

__all__ = ["README", "render"]

README = Path(__file__).parent / "README.md"


def render(text: str) -> str:
    """Return the README with the lists between its marks made anew."""
    for name, lines in (("PTX", _ptx()), ("AMD", _amd())):
        begin = text.index(f"<!-- list {name} -->\n") + len(f"<!-- list {name} -->\n")
        text = "\n".join([text[:begin] + lines[0], *lines[1:], text[text.index("<!-- end -->", begin) :]])
    return text


def _ptx() -> list[str]:
    """Return a row for each operation: what may follow its name."""
    forms: dict[str, list[str]] = {}
    others = map(sorted, (SPECIAL_FORMS, MEMORY, CALLS, BARRIERS, FENCES, NOTHING))
    for name in (*ARITHMETIC, *itertools.chain.from_iterable(others)):
        operation, _, form = name.partition(".")
        forms.setdefault(operation, []).append(form)
    rows = [f"| `{operation}` | {len(found)} | {_examples(found)} |" for operation, found in forms.items()]
    return ["| operation | names | the names' parts |", "| --- | --- | --- |", *rows]


def _examples(forms: Iterable[str]) -> str:
    """Return every part that stands in some of the names, once."""
    parts = dict.fromkeys(re.sub(r"^m64n\d+k", "m64nNk", part) for form in forms for part in form.split(".") if part)
    return ", ".join(f"`{part}`" for part in parts)


def _amd() -> list[str]:
    """Return the names of the instructions on registers, by the first of their parts."""
    rows = []
    for kind, names in (("vector", amd.VECTOR), ("scalar", amd.SCALAR)):
        rows.append(f"| {kind} | {', '.join(f'`{name[2:]}`' for name in names)} |")
    comparisons = ", ".join(f"`{name}`" for name in amd.COMPARISONS)
    rows.append(f"| comparisons (`v_cmp_`, `s_cmp_`) | {comparisons} |")
    return ["| kind | instructions |", "| --- | --- |", *rows]


if __name__ == "__main__":
    README.write_text(render(README.read_text()))
