"""What the real processes say of themselves: one line an event, and nobody's id."""

from __future__ import annotations

import re

import pytest

from tests.e2e.running import Loop

LINE = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (\w+) (DEBUG|INFO|WARNING|ERROR|CRITICAL) \S")
USER = "ada-who-is-in-no-log"


@pytest.mark.parametrize("part", ["stream", "trainer", "applier", "worker", "console"])
def test_a_line_says_when_who_and_how_bad(loop: Loop, part: str) -> None:
    lines = (loop.settings.logs_dir / f"{part}.log").read_text().splitlines()
    assert [line for line in lines if not LINE.match(line)] == []


def test_no_log_names_a_user_as_it_was_sent(loop: Loop) -> None:
    """Neither one who clicks and is answered, nor one in a click that is refused, nor one in a question that is."""
    loop.answer_trained_on(
        USER, loop.click([(USER, "kettle", "kitchen", "view"), (USER, "kettle", "kitchen", "stare")])
    )
    assert loop.get(f"/v1/profiles/{USER}?at=never")[0] == 400
    said = {
        path.name: path.read_text() for path in loop.settings.logs_dir.glob("*.log*") if "shoppers" not in path.name
    }
    assert said
    assert [name for name, text in said.items() if USER in text or re.search(r"shopper-\d", text)] == []
