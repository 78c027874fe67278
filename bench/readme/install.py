"""What pages say of installing and of asking: from a checkout, and without an address while the repository has none."""

import sys

from bench.readme.results import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["asking_text", "checkout_text", "install_command", "repository_address"]

EXTRAS = {"package": "", "demo": "[demo]"}


def repository_address() -> str:
    """Return the address of the repository, as [project.urls] of pyproject.toml has it; "" while there is none."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return project.get("urls", {}).get("Repository", "")


def checkout_text(name: str) -> str:
    """Return where the checkout comes from in which the commands of a page begin; it is the same on every page."""
    address = repository_address()
    source = (
        f"`git clone {address}`."
        if address
        else "The repository has no public address yet: whoever gave you these pages has one."
    )
    return f"There is no release yet, so commands begin in a checkout of the repository.\n{source}"


def install_command(name: str) -> str:
    """Return how the package, or the package with an extra, is installed; for a notebook relative to its folder."""
    if name == "notebook":
        return "%pip install -q ../..  # the checkout that this notebook lies in"
    demo = "\ntritonmoe demo" if name == "demo" else ""
    target = f"'.{EXTRAS[name]}'" if EXTRAS[name] else "."
    return f"```console\npip install {target}{demo}\n```"


def asking_text(name: str) -> str:
    """Return whom to ask where something is wrong or slow; it is the same on every page."""
    address = repository_address()
    where = f"Open an issue at <{address}>" if address else "Write to whoever gave you the package"
    return (
        f"Something is wrong, or slower than it should be? {where},\nwith what `tritonmoe env` prints and the shortest "
        "code that shows it; of several ranks, the message of every rank."
    )
