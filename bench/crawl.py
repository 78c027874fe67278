"""`python -m bench.crawl SITE`: open every page of the built site in a browser, and name what is broken or cut off.

It needs chromium or chrome, and playwright, which drives the browser that is installed.
"""

import argparse
import contextlib
import functools
import itertools
import shutil
import sys
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal, TypedDict
from urllib.parse import unquote, urldefrag, urlsplit

from playwright.sync_api import Browser, ConsoleMessage, Page, sync_playwright

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
DESKTOP, PHONE = (1280, 900), (390, 844)
LOOKED_AT = ("index", "tutorials/first-layer", "diagnosis", "planning", "results", "reference/layers", "which")
"""Pages of which screenshots are taken, where they exist."""
QUERIES = {
    "gradient clipping": ("tutorials/torchrun", "how-to/frameworks"),
    "load balance loss": ("how-to/", "tutorials/"),
    "install": ("start",),
    "resume training": ("how-to/checkpoint", "how-to/trainer"),
    "number of chunks": ("how-to/overlap-config", "tutorials/torchrun"),
    "lora": ("how-to/adapters",),
    "out of memory": ("symptoms",),
    "nan loss": ("symptoms",),
    "hang": ("symptoms",),
    "torch.compile": ("how-to/compile",),
    "fsdp2": ("how-to/frameworks",),
    "slurm": ("how-to/launch",),
    "pipeline parallelism": ("how-to/pipeline",),
    "save a checkpoint": ("how-to/checkpoint",),
    "upcycle": ("transformers", "tutorials/transformers"),
    "shakespeare": ("tutorials/dense-or-moe", "reference/commands"),
}
"""What a user would type, and which pages may be the first that the site's search finds."""
FOUND = """
async queries => {
  const config = JSON.parse(document.getElementById('__config').textContent);
  const base = new URL(config.base + '/', location);
  const index = await (await fetch(new URL('search/search_index.json', base))).json();
  const worker = new Worker(new URL(config.search, base));
  const ask = message => new Promise(done => {
    worker.onmessage = event => done(event.data);
    worker.postMessage(message);
  });
  await ask({type: 0, data: {config: index.config, docs: index.docs, options: {suggest: false}}});
  const found = {};
  for (const words of queries)
    found[words] = (await ask({type: 2, data: words})).data.items.slice(0, 3).map(item => item[0].location);
  return found;
}
"""
"""The site's own search, asked without its box."""
SEEN = """
(() => {
  const shown = element => element.getClientRects().length > 0;
  const start = element => element.textContent.trim().slice(0, 60);
  return {
    links: [...document.querySelectorAll('a[href], img[src], source[srcset], link[href]')]
      .map(one => new URL(one.getAttribute('href') || one.getAttribute('src') || one.srcset, document.baseURI).href),
    ids: [...document.querySelectorAll('[id], a[name]')].map(one => one.id || one.name),
    broken: [...document.images].filter(one => shown(one) && one.complete && !one.naturalWidth).map(one => one.src),
    cut: [...document.querySelectorAll('article pre > code')]
      .filter(one => shown(one) && one.scrollWidth > one.clientWidth).map(start),
    width: document.documentElement.scrollWidth,
    beyond: [...document.querySelectorAll('article *')]
      .filter(one => shown(one) && one.getBoundingClientRect().right > innerWidth + 1).slice(0, 3).map(start),
  };
})()
"""


class Seen(TypedDict):
    """What SEEN gives of a page, and the errors in its console."""

    errors: list[str]

    links: list[str]
    ids: list[str]
    broken: list[str]
    cut: list[str]
    width: int
    beyond: list[str]


class _Handler(SimpleHTTPRequestHandler):
    """Serve files, without a line for each."""

    def log_message(self, format: str, *args: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    """A server that is silent where a page is closed before all of it has arrived."""

    def handle_error(self, request: object, client_address: object) -> None:
        pass


def serve(folder: Path) -> tuple[ThreadingHTTPServer, str]:
    """Return a server of a folder's files on a free port, and its address."""
    server = _Server(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}/"


@contextlib.contextmanager
def open_at(
    browser: Browser, address: str, size: tuple[int, int] = DESKTOP, scheme: Literal["light", "dark"] = "light"
) -> Iterator[tuple[Page, Seen]]:
    """Open a page for a new reader in a window of so many pixels; give the page and its contents."""
    errors: list[str] = []

    def note(message: ConsoleMessage) -> None:
        if message.type in ("error", "assert"):
            errors.append(f"{message.text} {message.location.get('url', '')}".strip())

    width, height = size
    context = browser.new_context(
        viewport={"width": width, "height": height}, color_scheme=scheme, is_mobile=size == PHONE
    )
    try:
        page = context.new_page()
        page.on("console", note)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(address)
        for _ in range(2):  # a frame in which what scripts changed is laid out
            page.evaluate("new Promise(done => requestAnimationFrame(() => setTimeout(done, 50)))")
        yield page, Seen(errors=errors, **page.evaluate(SEEN))  # type: ignore[typeddict-item]
    finally:
        context.close()


def crawl(browser: Browser, site: Path, address: str) -> Iterator[str]:
    """Yield every fault of every page: broken links and anchors, console errors, code that is cut off, page scroll."""
    pages: dict[str, Seen] = {}
    for file in sorted(site.rglob("*.html")):
        name = file.relative_to(site).as_posix()
        with open_at(browser, address + name) as (_, pages[name]):
            pass
        if name != "404.html":
            yield from (f"{name}: in the console: {error}" for error in pages[name]["errors"])
        yield from (f"{name}: picture {picture} is broken" for picture in pages[name]["broken"])
        yield from (f"{name}: wider than its box at {DESKTOP[0]} px: {text!r}" for text in pages[name]["cut"])
        with open_at(browser, address + name, PHONE) as (_, on_phone):
            pass
        for size, seen in ((DESKTOP, pages[name]), (PHONE, on_phone)):
            if seen["width"] > size[0]:
                yield f"{name}: scrolls sideways at {size[0]} px, {seen['width']} px wide: {seen['beyond']}"
    for name, seen in pages.items():
        yield from (f"{name}: {fault}" for fault in broken_links(seen["links"], site, address, pages))


def broken_links(links: list[str], site: Path, address: str, pages: dict[str, Seen]) -> Iterator[str]:
    """Yield the links into the site that lead to no file, or to no place of a page."""
    for link in sorted(set(links)):
        if not link.startswith(address):
            if urlsplit(link).scheme not in ("http", "https", "mailto", "data"):
                yield f"{link} leads nowhere"
            continue
        target, anchor = urldefrag(link.removeprefix(address))
        target = unquote(urlsplit(target).path)
        if not target or target.endswith("/"):
            target += "index.html"
        if not (site / target).is_file():
            yield f"links to {target}, which is no file"
        elif anchor and target in pages and unquote(anchor) not in pages[target]["ids"]:
            yield f"links to {target}#{anchor}, which is no place of it"


def unlike_searches(browser: Browser, address: str) -> Iterator[str]:
    """Yield the words of QUERIES for which the site's search shows another page first."""
    with open_at(browser, f"{address}index.html") as (page, _):
        found = page.evaluate(FOUND, list(QUERIES))
    for words, pages in QUERIES.items():
        if not "".join(found[words][:1]).startswith(pages):
            yield f"a search for {words!r} shows {found[words]} first, not {' or '.join(pages)}"


def take_screenshots(browser: Browser, site: Path, address: str, folder: Path) -> None:
    """Write each page of LOOKED_AT at both widths, light and dark: its first screens."""
    schemes: tuple[Literal["light", "dark"], ...] = ("light", "dark")
    for name, size, scheme in itertools.product(LOOKED_AT, (DESKTOP, PHONE), schemes):
        if (site / f"{name}.html").is_file():
            picture = folder / f"{name.replace('/', '-')}-{size[0]}-{scheme}.png"
            with open_at(browser, f"{address}{name}.html", size, scheme) as (page, _):
                page.screenshot(
                    path=picture, full_page=True, clip={"x": 0, "y": 0, "width": size[0], "height": 2 * size[1]}
                )


def main() -> None:
    """Print every fault, and end with 1 where there is one."""
    parser = argparse.ArgumentParser(prog="python -m bench.crawl", description=__doc__)
    parser.add_argument("site", type=Path, help="the folder that `mkdocs build` has written: build/site")
    parser.add_argument("--screenshots", type=Path, metavar="DIR", help="write pictures of the main pages here too")
    parser.add_argument("--browser", help=f"the program (default: the first of {', '.join(PROGRAMS)})")
    arguments = parser.parse_args()
    program = arguments.browser or next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        sys.exit("no browser: install chromium, or name one by --browser")
    if not (arguments.site / "index.html").is_file():
        sys.exit(f"{arguments.site} has no index.html: run `mkdocs build` first")
    server, address = serve(arguments.site)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        faults = [*crawl(browser, arguments.site, address), *unlike_searches(browser, address)]
        if arguments.screenshots is not None:
            take_screenshots(browser, arguments.site, address, arguments.screenshots)
        browser.close()
    server.shutdown()
    print("\n".join(faults))
    num_pages = len(list(arguments.site.rglob("*.html")))
    sys.exit(f"{len(faults)} faults in {num_pages} pages" if faults else None)


if __name__ == "__main__":
    main()
