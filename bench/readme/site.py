"""A hook of MkDocs: links from docs/ to files of the repository, which the site doesn't have, become their names."""

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.structure.pages import Page

DOCS = Path(__file__).parents[2] / "docs"
FOLDERS = "tritonmoe|tests|bench|examples|virtual_gpu|CONTRIBUTING"
OUTSIDE = re.compile(rf"\[([^]]*)\]\(((?:\.\./)+(?:{FOLDERS})[^)#]*)(?:#[^)]*)?\)")
logger = logging.getLogger("mkdocs.hooks.site")  # its warnings end a strict build


def on_page_markdown(markdown: str, *, page: "Page", **_: object) -> str:
    """Turn [name](../tritonmoe/layer.py) into `name`; warn where there is no such file."""

    def as_name(match: re.Match) -> str:
        name, path = match.groups()
        if not (DOCS / page.file.src_path).parent.joinpath(path).exists():
            logger.warning("%s names %s, which is no file of the repository", page, path)
        return name if name.startswith("`") else f"`{name}`"

    return OUTSIDE.sub(as_name, markdown)
