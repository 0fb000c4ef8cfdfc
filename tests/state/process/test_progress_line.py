"""Progress: a line that moves on a terminal, lines now and then in a file, and nothing that is torn."""

from __future__ import annotations

import io

import pytest

from state.process.progress_line import CLEAR, TERMINAL_EVERY_S, ProgressLine


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
    """A line that is not shown is not even made."""
    clock, made = Clock(), []
    line = ProgressLine(out, 5.0, clock)
    for step in range(5):
        clock.now_s = step * every_s / 2
        line.show(lambda step=step: made.append(step) or f"step {step}")
    assert made == [2, 4]


def test_the_last_line_is_always_shown_and_stays() -> None:
    """What is said after it begins on a line of its own."""
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
