"""The page's files: what is shipped of others is what they released, and nothing is loaded from elsewhere."""

from __future__ import annotations

import hashlib
import re

from deploy.console import server as pages
from deploy.console.server import STATIC
from deploy.serving.requests.access import OPEN
from tests.deploy.console.conftest import Reached

UPLOT = "1.6.32"
RELEASED = {
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
}
"""SHA-256 of what npm's package uplot of that version has."""
OURS = [path for path in STATIC.rglob("*") if path.suffix in pages.KINDS and path.parent.name != "uplot"]


def test_uplot_is_the_one_that_was_released() -> None:
    folder = STATIC / "uplot"
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    assert found == RELEASED
    assert f"(v{UPLOT})" in (folder / "uPlot.iife.min.js").read_text()[:100]
    assert "MIT" in (folder / "LICENSE").read_text()


def test_the_page_loads_its_own_files_alone_and_has_nothing_inline() -> None:
    assert len(OURS) > 8
    for path in OURS:
        text = re.sub(r'xmlns="[^"]*"|const SVG = "[^"]*"', "", path.read_text())
        assert not re.search(r"https?://|//cdn|@import|url\(", text), path.name
    html = (STATIC / "index.html").read_text()
    assert not re.search(r"<style|<script(?![^>]* src=)|\sstyle=|\son\w+=", html)
    named = re.findall(r'(?:src|href)="([^"#]+)"', html)
    assert named and all((STATIC / name).is_file() for name in named)
    # What is shown is text: a name that a click brought is never taken for markup.
    assert not any("innerHTML" in path.read_text() or "insertAdjacentHTML" in path.read_text() for path in OURS)


def test_each_file_is_had_without_a_token_and_sent_once(closed_console: Reached) -> None:
    offered = [one for one in closed_console.app.endpoints if one.name == "page"]
    assert len(offered) == len(OURS) + 2 and {one.role for one in offered} == {OPEN}
    with closed_console.client() as client:
        for one in offered:
            answer = client.get(one.path)
            assert answer.status_code == 200 and answer.content
            again = client.get(one.path, headers={"if-none-match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
            assert client.head(one.path).status_code == 200
        assert client.get("/").headers["content-type"] == "text/html; charset=utf-8"
        for path in ("/index.html", "/../app.py", "/%2e%2e/app.py", "/uplot/LICENSE"):
            assert client.get(path).status_code in (401, 404)
