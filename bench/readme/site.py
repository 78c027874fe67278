"""A hook of MkDocs: the repository's address, which pages a search shows first, and names for links out of the site."""

import logging
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.pages import Page

DOCS = Path(__file__).parents[2] / "docs"
FOLDERS = "tritonmoe|tests|bench|examples|virtual_gpu|CONTRIBUTING"
OUTSIDE = re.compile(rf"\[([^]]*)\]\(((?:\.\./)+(?:{FOLDERS})[^)#]*)(?:#[^)]*)?\)")
BOOSTS = {"Design": 0.01, "Results": 0.1, "Reference": 0.5}
"""How much a word counts in the search, by the part of the navigation. A page may have a boost of its own."""
logger = logging.getLogger("mkdocs.hooks.site")  # its warnings end a strict build


def on_config(config: "MkDocsConfig") -> "MkDocsConfig":
    """Link the repository from every page, once it has an address."""
    sys.path.insert(0, str(DOCS.parent))  # MkDocs runs this file by its path
    from bench.readme.install import repository_address

    config.repo_url = repository_address()
    return config


def on_page_markdown(markdown: str, *, page: "Page", **_: object) -> str:
    """Turn [name](../tritonmoe/layer.py) into `name`, warn where there is no such file, and set the page's boost."""

    def as_name(match: re.Match) -> str:
        name, path = match.groups()
        if not (DOCS / page.file.src_path).parent.joinpath(path).exists():
            logger.warning("%s names %s, which is no file of the repository", page, path)
        return name if name.startswith("`") else f"`{name}`"

    part = page.parent.title if page.parent is not None else page.title
    page.meta.setdefault("search", {"boost": BOOSTS.get(str(part), 1.0)})
    return OUTSIDE.sub(as_name, markdown)
