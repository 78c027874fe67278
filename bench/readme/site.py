"""A hook of MkDocs: links from docs/ to files of the repository, which the site doesn't have, become their names."""

import logging
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
logger = logging.getLogger("mkdocs.hooks.site")  # its warnings end a strict build

OUTSIDE = re.compile(
    r"\[([^]]*)\]\((?:\.\./)+((?:tritonmoe|tests|bench|examples|virtual_gpu|CONTRIBUTING)[^)#]*)(?:#[^)]*)?\)"
)


def on_page_markdown(markdown: str, *, page: object, **_: object) -> str:
    """Turn [name](../tritonmoe/layer.py) into `name`; warn where there is no such file."""

    def as_name(match: re.Match) -> str:
        name, path = match.groups()
        if not (ROOT / path).exists():
            logger.warning("%s names %s, which is no file of the repository", page, path)
        return name if name.startswith("`") else f"`{name}`"

    return OUTSIDE.sub(as_name, markdown)
