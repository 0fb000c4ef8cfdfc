"""What a process writes to its log and its terminal."""

from __future__ import annotations

import io
import json
import logging
import os
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

from state.config.sections import LogSettings
from state.process.log_lines import CLEAR, TERMINAL_EVERY_S, Lines, Pace, ProgressLine, event_of
from state.process.part import own_stderr, quiet_stderr, quiet_tensorflow


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
    first, second = (
        logging.LogRecord("", 20, "", 0, "%s", (f"version {number} is rebuilt",), None) for number in (7, 8)
    )
    assert event_of(first) == event_of(second)


def test_talk_is_held_back_and_the_rest_gets_through(capfd: pytest.CaptureFixture[str]) -> None:
    with quiet_stderr():
        os.write(2, b"I0000 00:00:1795578140.261666    6784 port.cc:153] oneDNN custom operations are on.\n")
        os.write(2, b"something is wrong\n")
    os.write(2, b"afterwards\n")
    assert capfd.readouterr().err == "something is wrong\nafterwards\n"


def test_an_error_loses_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="x"), quiet_stderr():
        os.write(2, b"why\n")
        raise ValueError("x")
    assert capfd.readouterr().err == "why\n"


def test_the_processs_own_log_is_not_held_back(capfd: pytest.CaptureFixture[str]) -> None:
    with own_stderr() as stream, quiet_stderr():
        stream.write("progress\n")
        stream.flush()
        assert capfd.readouterr().err == "progress\n"


def test_what_the_operator_set_stays() -> None:
    environment = {"TF_CPP_MIN_LOG_LEVEL": "0", "CUDA_VISIBLE_DEVICES": "1"}
    quiet_tensorflow(environment)
    assert environment == {"TF_CPP_MIN_LOG_LEVEL": "0", "CUDA_VISIBLE_DEVICES": "1"}


class Terminal(io.StringIO):
    """A terminal that keeps what it is sent."""

    def isatty(self) -> bool:
        return True


class Clock:
    """Seconds that a test moves."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.mark.parametrize(("out", "every_s"), [(Terminal(), TERMINAL_EVERY_S), (io.StringIO(), 5.0)])
def test_lines_come_no_more_often_than_is_readable(out: io.StringIO, every_s: float) -> None:
    clock, made = Clock(), list[int]()
    line = ProgressLine(out, 5.0, clock)

    def text(step: int) -> str:
        made.append(step)
        return f"step {step}"

    for step in range(5):
        clock.now_s = step * every_s / 2
        line.show(partial(text, step))
    assert made == [2, 4]


def test_the_last_line_is_always_shown_and_stays() -> None:
    out, clock = Terminal(), Clock()
    line = ProgressLine(out, 5.0, clock, at_once=True)
    line.show(lambda: "half")
    line.say("a word")
    line.show(lambda: "all", last=True)
    line.say("done")
    assert out.getvalue() == f"{CLEAR}half{CLEAR}a word\n{CLEAR}all\ndone\n"


def test_a_file_gets_whole_lines() -> None:
    out, clock = io.StringIO(), Clock()
    line = ProgressLine(out, 5.0, clock, at_once=True)
    line.show(lambda: "too early")
    clock.now_s = 6.0
    line.show(lambda: "half")
    line.say("a word")
    assert out.getvalue() == "half\na word\n"
    assert line.took_s == 6.0


@pytest.mark.parametrize("start_s", [0.0, 70.0, 1000.0])
def test_a_rate_comes_after_a_few_per_cent_and_a_slow_start_is_no_part_of_it(start_s: float) -> None:
    """A thousand events take a second; before the second record of twelve events, programs are compiled."""
    pace, total, rates = Pace(total=150_000), 150_000, dict[int, float | None]()
    for done in range(0, total + 1, 12):
        pace.add(done, done / 1000 + (start_s if done > 12 else 0.0))
        rates[done] = pace.rate()
    assert {rate for done, rate in rates.items() if done < 3_000} == {None}
    known = {done: rate for done, rate in rates.items() if rate is not None}
    assert 5_000 < min(known) < 11_000
    assert {*known} == {done for done in rates if done >= min(known)}
    assert [*known.values()] == pytest.approx([1000.0] * len(known))


def test_a_rate_follows_a_change() -> None:
    pace = Pace(total=None)
    for second in range(100):
        pace.add(1000 * second, second)
    for second in range(1, 201):
        pace.add(99_000 + 500 * second, 99 + second)
    assert pace.rate() == pytest.approx(500.0, rel=0.01)


def test_work_of_which_nothing_is_done_has_no_rate() -> None:
    pace = Pace(total=0)
    assert pace.rate() is None
    pace.add(0, 100.0)
    pace.add(0, 200.0)
    assert pace.rate() is None
