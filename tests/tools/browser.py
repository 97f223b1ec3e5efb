"""The built site in a browser, for the tests and for the eye.

    python tests/tools/browser.py FOLDER

takes a screenshot of every page: on a desktop, light and dark, and on a phone; and of what the home
page shows before it is scrolled.
"""

import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SITE = ROOT / "site"
CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
QUIET = (
    "--disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
DESKTOP = {"width": 1280, "height": 800}
PHONE = {"width": 360, "height": 740}

# The windows in which the home page has to show what minilora is.
FIRST_SCREEN = {
    "laptop": {"width": 1440, "height": 900},
    "phone": {"width": 390, "height": 844},
}


def pages() -> list[str]:
    """Paths of the site's pages, as their addresses end."""
    return sorted(
        p.relative_to(SITE).as_posix().removesuffix("index.html") for p in SITE.rglob("*.html")
    )


@contextmanager
def served() -> Iterator[str]:
    """Serves the built site on this machine; yields its address."""

    class Silent(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(SITE))) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def chromium() -> Iterator[Any]:
    """The system's Chromium, driven by playwright. Nothing is downloaded."""
    from playwright.sync_api import sync_playwright

    root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=[*QUIET.split(), *root])
        yield browser
        browser.close()


def settle(page: Any) -> None:
    """Waits until the formulas of a page are rendered."""
    rendered = "every(e => e.querySelector('mjx-container'))"
    page.wait_for_function(
        f"() => [...document.querySelectorAll('.arithmatex')].{rendered}", timeout=20000
    )


def main(folder: Path, only: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with served() as address, chromium() as browser:
        for kind, size, scheme in (
            ("light", DESKTOP, "light"),
            ("dark", DESKTOP, "dark"),
            ("phone", PHONE, "light"),
        ):
            page = browser.new_page(viewport=size, color_scheme=scheme)
            for path in (p for p in pages() if only in p):
                page.goto(address + path)
                settle(page)
                name = path.strip("/").replace("/", "-") or "home"
                page.screenshot(path=folder / f"{name}-{kind}.png", full_page=True)
            page.close()
        for window, size in FIRST_SCREEN.items():
            for scheme in ("light", "dark"):
                page = browser.new_page(viewport=size, color_scheme=scheme)
                page.goto(address)
                page.screenshot(path=folder / f"first-screen-{window}-{scheme}.png")
                page.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
