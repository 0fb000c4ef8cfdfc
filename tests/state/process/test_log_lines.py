"""Lines of logs: one an event in both forms, with their place, and no more of them a minute than wanted."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from state.config.sections import LogSettings
from state.process.log_lines import Lines, event_of


class Said:
    """A logger of a process, on a clock that one sets."""

    def __init__(self, most: int = 20) -> None:
        self.stream, self.now_s = io.StringIO(), 0.0
        self.lines = Lines("trainer", self.stream, lambda: self.now_s, most)
        self.log = logging.Logger("trainer.learner")
        self.log.addHandler(self.lines)

    def text(self) -> list[str]:
        """The lines without their times."""
        return [line.split(" ", 2)[2] for line in self.stream.getvalue().splitlines()]

    def objects(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]


@pytest.fixture
def said() -> Iterator[Said]:
    made = Said()
    yield made
    made.lines.close()


def fail() -> None:
    raise RuntimeError("first line\nsecond line")


def test_a_line_names_its_place_behind_what_it_says(said: Said) -> None:
    said.log.info("epoch %d: at version %d, reading from offset %d", 2, 7, 99)
    assert said.text() == ["trainer INFO epoch 2: at version 7, reading from offset 99 epoch=2 version=7 offset=99"]


def test_an_object_has_the_same_as_fields(said: Said) -> None:
    said.lines.use(LogSettings(format="json"))
    said.log.error("record %d of partition %d is left out: %s", 5, 3, ValueError("version 8 is damaged"))
    (found,) = said.objects()
    assert found.pop("time").endswith("Z")
    assert found == {
        "part": "trainer",
        "level": "ERROR",
        "logger": "trainer.learner",
        "event": "record %d of partition %d is left out: %s",
        "message": "record 5 of partition 3 is left out: version 8 is damaged",
        "partition": 3,
        "version": 8,
    }


def test_what_an_operator_wrote_is_no_place(said: Said) -> None:
    said.lines.use(LogSettings(format="json"))
    said.log.info("control %d: %s by %s (%s)", 4, "rollback", "ann", "version 3 is bad, offset 9 too")
    (found,) = said.objects()
    assert not {"version", "offset"} & found.keys()


@pytest.mark.parametrize("form", ["text", "json"])
def test_a_traceback_is_part_of_its_line(said: Said, form: str) -> None:
    said.lines.use(LogSettings(format=form))
    try:
        fail()
    except RuntimeError:
        said.log.exception("a request failed")
    (line,) = said.stream.getvalue().splitlines()
    assert "a request failed" in line and "second line" in line and "Traceback" in line


def test_what_is_said_too_often_is_counted() -> None:
    said = Said(most=2)
    for number in range(10):
        said.log.warning("the broker is away: %s", number)
    said.log.warning("something else")
    assert len(said.text()) == 3
    said.now_s = 60.0
    said.log.warning("the broker is away: %s", 10)
    assert said.text()[3:] == [
        "trainer WARNING repeated 8 more times within a minute: the broker is away: %s",
        "trainer WARNING the broker is away: 10",
    ]


def test_what_was_left_out_is_told_at_the_end() -> None:
    said = Said(most=1)
    for _ in range(3):
        said.log.warning("again")
    said.lines.close()
    assert said.text()[-1] == "trainer WARNING repeated 2 more times within a minute: again"


def test_lines_that_differ_in_numbers_alone_are_one_event() -> None:
    """A line that was put together before it came to the log."""
    first, second = (
        logging.LogRecord("", 20, "", 0, "%s", (f"version {number} is rebuilt",), None) for number in (7, 8)
    )
    assert event_of(first) == event_of(second)
