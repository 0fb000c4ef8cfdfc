"""The documentation builds without network access, its examples work as written, and its English is plain."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from docs.generate import PAGES
from springtide_client import __version__
from state.config.loading import load
from state.events.identity import Salt
from state.events.parser import Parser
from state.log import PartitionBatch
from tests.laws.sources import ROOT, files, name, nodes

DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
MOST_WORDS = 30
BANNED = (
    "told", "said", "telling", "anew", "from nothing", "beside", "room", "going back", "goes back", "goes on", "whoever",
    "what of it", "of whom", "nobody", "witnesses", "shelves", "stands for", "stands there", "lies in", "takes back",
    "turns back", "turned back", "a look", "is away", "are away", "for ever",
)  # fmt: skip
"""Words of an earlier private English; the field has a term for each."""


def fenced(text: str, language: str = "") -> list[str]:
    """The contents of a document's fenced blocks of one language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def sentences(text: str) -> Iterator[str]:
    """The sentences of a document: of paragraphs and list items, and the parts of table cells. Code counts as one word.

    >>> list(sentences("# Head\\nOne `a b` is\\nhere. Two.\\n- three\\n\\n| four | five |\\n|---|---|\\n"))
    ['One CODE is here.', 'Two.', 'three', 'four', 'five']
    """
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"(`+).+?\1", "CODE", text, flags=re.DOTALL)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", text)
    text = re.sub(r"^#.*$|^\|[-|]+$", "", text, flags=re.MULTILINE)
    text = re.sub(r"^\|.*$", lambda row: re.sub(r" \| ?|; |^\| ?", "\n\n", row[0]), text, flags=re.MULTILINE)
    text = re.sub(r"^ *(?:[-*]|\d+\.) ", "\n\n", text, flags=re.MULTILINE)
    for paragraph in re.split(r"\n\s*\n", text):
        yield from filter(None, re.split(r"(?<=[.!?])\s+(?=[A-Z*(\"])", " ".join(paragraph.split())))


@pytest.mark.parametrize("page", PAGES)
def test_a_generated_page_is_what_the_code_makes(page: str) -> None:
    assert (ROOT / page).read_text() == PAGES[page](), "run: .venv/bin/python -m docs.generate"


def test_the_site_builds_strictly_and_its_pages_load_nothing_from_elsewhere(tmp_path: Path) -> None:
    program = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(program, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (built.returncode, built.stdout + built.stderr) == (0, "")
    pages = list(tmp_path.rglob("*.html"))
    loaded = {
        address
        for page in pages
        for tag in re.findall(r"<(?:script|link|img|iframe)\b[^>]*>", page.read_text())
        for address in re.findall(r'(?:src|href)="?((?:https?:)?//[^"\s>]+)', tag)
    }
    assert len(pages) > 40 and loaded == set()


@pytest.mark.parametrize("document", DOCUMENTS, ids=name)
def test_sentences_are_short_and_their_words_are_plain(document: Path) -> None:
    found = list(sentences(document.read_text()))
    banned = re.compile(rf"\b(?:{'|'.join(BANNED)})\b", re.IGNORECASE)
    assert [sentence for sentence in found if banned.search(sentence)] == []
    assert [sentence for sentence in found if len(sentence.split()) > MOST_WORDS] == []


def test_words_of_messages_are_plain() -> None:
    banned, found = re.compile(rf"\b(?:{'|'.join(BANNED)})\b"), []
    for path in files():
        docstrings = {id(node.value) for node in nodes(path) if isinstance(node, ast.Expr)}
        texts = (node for node in nodes(path) if isinstance(node, ast.Constant) and id(node) not in docstrings)
        # `--from nothing` is an option.
        words = ((node.lineno, str(node.value).replace("--from nothing", "")) for node in texts)
        found += [(name(path), line, text) for line, text in words if " " in text and banned.search(text)]
    assert found == []


@pytest.mark.parametrize("document", [ROOT / "README.md", ROOT / "docs" / "your-clicks.md"], ids=name)
def test_the_settings_of_an_own_topic_read_its_record_as_written(document: Path, tmp_path: Path) -> None:
    (settings,), (record,) = fenced(document.read_text(), "toml"), fenced(document.read_text(), "json")
    assert len(settings.splitlines()) <= 10
    (tmp_path / "springtide.toml").write_text(settings)
    events = load(["--config", str(tmp_path / "springtide.toml")], env={}).events
    no_timestamp = np.array([-1])
    batch = PartitionBatch("ab" * 16, 0, 0, 1, np.array([0]), no_timestamp, [b"key"], [record.encode()])
    parsed = Parser(events, Salt(b"s" * 32)).parse([batch])
    assert (len(parsed), parsed.dead) == (1, ())
    assert set(json.loads(record)) == {events.user, events.item, events.category, events.action, events.time}


@pytest.mark.parametrize("document", [path for path in DOCUMENTS if fenced(path.read_text(), "toml")], ids=name)
def test_settings_that_a_page_shows_are_accepted(document: Path, tmp_path: Path) -> None:
    for block in fenced(document.read_text(), "toml"):
        (tmp_path / "springtide.toml").write_text(block)
        load(["--config", str(tmp_path / "springtide.toml")], env={})


def test_commands_name_the_program_where_make_installs_it() -> None:
    """Except in a container or a pod, where it is on the path."""
    bare = [
        (name(document), line)
        for document in DOCUMENTS
        for block in fenced(document.read_text())
        for line in re.findall(r"^(?:\$ )?(?:springtide|python -m) .*", re.sub(r"\\\n\s*", " ", block), re.MULTILINE)
        if not re.match(r"springtide(?: \w+)?: ", line)
    ]
    assert bare == []


def test_the_changes_of_a_release_fit_two_pages() -> None:
    (changes,) = re.findall(
        rf"^## {re.escape(__version__)} .*?(?=^## )", (ROOT / "CHANGELOG.md").read_text(), re.M | re.S
    )
    lines = changes.splitlines()
    assert len(lines) <= 100 and [line for line in lines if len(line) > 160] == []


def test_an_image_is_named_with_the_version_of_the_release() -> None:
    files = [*DOCUMENTS, *(ROOT / "deploy" / "container").glob("Dockerfile*"), *(ROOT / "deploy").rglob("*.yaml")]
    named = [
        (name(file), found)
        for file in files
        for found in re.findall(r"\bspringtide:(\d[\w.]*)|newTag: \"(\d[\w.]*)\"", file.read_text())
    ]
    assert named and [(file, found) for file, found in named if __version__ not in found] == []


def test_each_file_that_the_readme_links_to_exists() -> None:
    for document in (ROOT / "README.md", ROOT / "CONTRIBUTING.md"):
        targets = re.findall(r"\]\((?!https?:)([^)#]+)", document.read_text())
        assert [target for target in targets if not (ROOT / target).exists()] == []
    assert len((ROOT / "README.md").read_text().splitlines()) <= 100
