"""The view is rewritten where there is room for it, and the terminal keeps its other lines."""

from __future__ import annotations

import io
import os
import re
import socket
import threading

import pytest

from deploy.watch.panel import Screen
from deploy.watch.scrape import fetch


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def screen(columns: int, lines: int) -> tuple[Screen, Terminal]:
    out = Terminal()
    return Screen(out, size=lambda: os.terminal_size((columns, lines))), out


def visible(written: str, columns: int) -> list[str]:
    """What a terminal shows after `written`, with the few codes that a screen uses."""
    shown, row, column = [""], 0, 0
    for code in re.findall(r"\x1b\[\d*[AJ]|[\r\n]|[^\x1b\r\n]+", written):
        if code == "\r":
            column = 0
        elif code == "\n":
            row, column = row + 1, 0
            shown += [""] * (row + 1 - len(shown))
        elif code.endswith("A") and code.startswith("\x1b"):
            row -= int(code[2:-1])
        elif code == "\x1b[J":
            shown = [*shown[:row], shown[row][:column]]
        else:
            assert len(code) < columns, "the line would take two"
            shown[row], column = shown[row][:column] + code, column + len(code)
    return shown


def test_a_small_terminal_sees_one_line_rewritten_and_other_lines_stay() -> None:
    small, out = screen(10, 50)
    small.live("first live line", ["panel"])
    small.live("second")
    small.say("stream died")
    small.live("third")
    assert out.getvalue() == "first liv\r\x1b[Jsecond\r\x1b[Jstream died\nthird"
    assert small.every_s == 1.0


def test_a_terminal_with_room_sees_the_panel_rewritten_and_other_lines_stay() -> None:
    large, out = screen(80, 24)
    large.say("started")
    large.live("line", ["one", "two", "x" * 200])
    large.live("line", ["uno", "due"])
    assert visible(out.getvalue(), 80) == ["started", "", "uno", "due"]
    large.say("stream died")
    large.live("line", ["ein"])
    assert visible(out.getvalue(), 80) == ["started", "stream died", "", "ein"]


@pytest.mark.parametrize(("columns", "lines"), [(79, 24), (80, 4)])
def test_a_panel_that_does_not_fit_gives_way_to_the_line(columns: int, lines: int) -> None:
    narrow, out = screen(columns, lines)
    narrow.live("line", ["one", "two", "three"])
    assert out.getvalue() == "line"


def test_a_file_sees_whole_lines_and_fewer_of_them() -> None:
    out = io.StringIO()
    quiet = Screen(out)
    quiet.live("one", ["panel"])
    quiet.live("two", ["panel"])
    assert out.getvalue() == "one\ntwo\n"
    assert quiet.every_s == 10.0


def test_a_process_that_dies_in_the_middle_of_its_answer_is_one_that_does_not_answer() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer_half() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(4096)
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nhalf")

        half = threading.Thread(target=answer_half)
        half.start()
        status, reason = fetch(f"http://127.0.0.1:{server.getsockname()[1]}/metrics")
        half.join()
    assert status == 0
    assert "IncompleteRead" in reason
