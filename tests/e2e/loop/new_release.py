"""The drill of a new release with other features and other layers: the loop goes on with them from what was learned."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from tests.e2e.loop.test_restart import balanced
from tests.e2e.running import Loop, until

USER = "one-of-before-the-release"
OTHER = ("--features.windows_s", "3600,86400,604800,1209600", "--model.hidden", "128,64")
ADDED = "purchase.count_14d"


def stopped(loop: Loop) -> int:
    """Stops the loop, which has learned three clicks of a user; it has other settings from then on. Returns its epoch."""
    before = loop.answer_trained_on(USER, loop.click([(USER, "book", "reading", "purchase")] * 3))
    assert loop.stop() == 0
    loop.flags = [*loop.flags, *OTHER]
    return int(before["version"]["epoch"])


@contextlib.contextmanager
def asking(loop: Loop) -> Iterator[list[tuple[int, bool]]]:
    """Asks for the user all the time; keeps of each answer its epoch, and whether it has the feature that is new."""
    seen, finished = list[tuple[int, bool]](), threading.Event()

    def ask() -> None:
        while not finished.wait(0.05):
            if answer := loop.profile(USER):
                seen.append((answer["version"]["epoch"], ADDED in answer["features"]))

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield seen
    finally:
        finished.set()
        thread.join()


def goes_on(loop: Loop, seen: list[tuple[int, bool]], epoch: int) -> None:
    """Answers came from the version of before, then from the new epoch; all clicks are in the new windows, none is lost."""
    # Each with its own features, and nothing in between.
    assert list(dict.fromkeys(seen)) == [(epoch, False), (epoch + 1, True)], seen
    after = loop.answer_trained_on(USER, loop.click([(USER, "book", "reading", "purchase")]))
    until(lambda: (loop.profile(USER) or after)["features"][ADDED] == 4, "windows are not those of all clicks")
    until(lambda: balanced(loop), "the accounts do not balance")
    assert loop.springtide("history")[-1]["action"] == "upgrade"
