"""Reads docs/operate/runbook.md: its tables, the commands of its sections, and example values for its placeholders."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

DOCUMENT = Path(__file__).parents[1] / "docs" / "operate" / "runbook.md"
TEXT = DOCUMENT.read_text()

# What stands for something that the reader fills in; the longer ones first. Any document may use them.
EXAMPLES: Mapping[str, str] = {
    "TOPIC_ID:PARTITION:A-B": "abababab:0:5-9",
    "PARTITION:A-B": "0:5-9",
    "A..B": "20m..10m",
    "OFFSET": "7",
    "TEXT": "'the reason'",
    "TO": "/mnt/backups",
    "ID": "20261126T190112.345Z",
    "V": "176",
    "N": "20",
}


@dataclass(frozen=True)
class Section:
    """A section that a table leads to.

    Attributes:
        title: Its heading.
        lines: Its lines that are not empty, fences left out.
        commands: What is typed, in order, without the folder `.venv/bin`.
    """

    title: str
    lines: tuple[str, ...]
    commands: tuple[str, ...]

    @property
    def severity(self) -> str:
        """What the section begins with: critical, warning, info or task."""
        found = re.match(r"\*\*(\w+)\.\*\* ", self.lines[0])
        return found[1].lower() if found else ""

    @property
    def anchor(self) -> str:
        """How GitHub names the heading in an address."""
        return anchor(self.title)


def anchor(title: str) -> str:
    """The address of a heading within its page.

    >>> anchor("A gap: clicks deleted unread")
    'a-gap-clicks-deleted-unread'
    """
    return re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-")


def read(text: str) -> tuple[Section, ...]:
    r"""The sections in the order of the page.

    >>> read("# Runbook\n## Look first\nLook.\n\n```\nspringtide status\n```\nAll is well.\n")
    (Section(title='Look first', lines=('Look.', 'springtide status', 'All is well.'), commands=('springtide status',)),)
    """
    found = []
    for part in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        title, _, body = part.replace(".venv/bin/", "").partition("\n")
        commands = [
            line
            for block in re.findall(r"^```\n(.*?)^```$", body, re.MULTILINE | re.DOTALL)
            for line in block.splitlines()
        ]
        lines = [line for line in body.splitlines() if line and not line.startswith("```")]
        found.append(Section(title, tuple(lines), tuple(commands)))
    return tuple(found)


def rows(section: Section) -> list[list[str]]:
    """The cells of a section's table, without its head."""
    lines = [line for line in section.lines if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def links(text: str) -> list[str]:
    """The anchors that a text leads to on its own page."""
    return re.findall(r"\]\(#([\w-]+)\)", text)


def filled(command: str, values: Mapping[str, str] = EXAMPLES) -> str:
    """A command with its capitals filled in.

    >>> filled("springtide rollback --to V --skip PARTITION:A-B --reason TEXT")
    "springtide rollback --to 176 --skip 0:5-9 --reason 'the reason'"
    """
    pattern = "|".join(re.escape(one) for one in sorted({*EXAMPLES, *values}, key=len, reverse=True))
    return re.sub(rf"(?<![\w:.-])({pattern})(?![\w:.-])", lambda match: values[match[1]], command)


SECTIONS: Mapping[str, Section] = {one.title: one for one in read(TEXT)}
STATUS, ERRORS = SECTIONS["What you see"], SECTIONS["Errors"]
"""The tables."""

ADVICE = tuple(one for one in SECTIONS.values() if one not in (STATUS, ERRORS))
"""What the tables lead to."""
