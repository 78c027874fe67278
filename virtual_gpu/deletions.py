"""Where a kernel's assembly waits, orders or fences, and what the assembly is without one of these."""

import re
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

__all__ = ["Site", "sites_of", "without"]

_NVIDIA = {
    "barrier": r"(?:bar|barrier)\.sync\b[^;]*;",
    "barrier of a warp": r"bar\.warp\.sync\b[^;]*;",
    "wait for copies": r"cp\.async\.wait_group\b[^;]*;",
    "wait for bulk stores": r"cp\.async\.bulk\.wait_group\b[^;]*;",
    "wait for an mbarrier": r"mbarrier\.try_wait[^;]*;\s*(?:\.loc[^\n]*\n\s*)*@!complete bra[^;]*;",
    "wait for wgmma": r"wgmma\.wait_group\b[^;]*;",
    "fence of registers": r"wgmma\.fence\b[^;]*;",
    "proxy fence": r"fence\.proxy\.async\b[^;]*;",
    "wait for tensor memory": r"tcgen05\.wait::(?:ld|st)\b[^;]*;",
}
_AMD = {
    "barrier": r"s_barrier\b",
    "wait for global memory": r"(?<=s_waitcnt )vmcnt\(\d+\)|(?<=\) )vmcnt\(\d+\)",
    "wait for shared memory": r"(?<=s_waitcnt )lgkmcnt\(\d+\)|(?<=\) )lgkmcnt\(\d+\)",
}


@dataclass(frozen=True)
class Site:
    """A place in an assembly where something waits: what it is, its line (from 1), and where its text is."""

    kind: str
    line: int
    begin: int
    end: int

    def text(self, assembly: str) -> str:
        """Return the instruction, in one line."""
        return " ".join(assembly[self.begin : self.end].split())

    def deleted(self, assembly: str) -> str:
        """Return the assembly without it; all else stays on its line."""
        lines = re.sub(r"[^\n]", "", assembly[self.begin : self.end])
        return assembly[: self.begin] + lines + assembly[self.end :]

    def behind_a_fault(self, assembly: str) -> str:
        """Return the assembly with an access of no memory before it, which raises if the program comes there."""
        fault = _FAULTS[".reqntid" in assembly]
        begin = assembly.rfind("\n", 0, self.begin) + 1
        return f"{assembly[:begin]}{fault}\n{assembly[begin:]}"


_FAULTS = ("ds_read_b32 v0, v0 offset:65535", "ld.shared.b32 %r999999, [%r999998];")


def without(sites: Collection[Site]) -> Callable[[str], str]:
    """Return what deletes several sites from an assembly."""

    def delete(assembly: str) -> str:
        for site in sorted(sites, key=lambda site: -site.begin):
            assembly = site.deleted(assembly)
        return re.sub(r"s_waitcnt[ \t]*$", "s_nop 0", assembly, flags=re.MULTILINE)

    return delete


def sites_of(assembly: str) -> Iterator[Site]:
    """Return every barrier, wait and fence of a kernel's PTX or AMDGCN, by line; an s_waitcnt may have two."""
    kinds = _NVIDIA if ".reqntid" in assembly else _AMD
    found = [(match, kind) for kind, pattern in kinds.items() for match in re.finditer(pattern, assembly)]
    for match, kind in sorted(found, key=lambda item: item[0].start()):
        yield Site(kind, assembly.count("\n", 0, match.start()) + 1, match.start(), match.end())
