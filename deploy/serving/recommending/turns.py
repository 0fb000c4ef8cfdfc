"""Interleaves work in a worker's event loop: runs long answers in steps, and updates item sources between requests."""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from contextlib import suppress
from typing import TypeVar

from deploy.serving.host import Host
from deploy.serving.line import Line
from deploy.serving.recommending.sources import ItemSources
from state.errors import SpringtideError

TURN_S = 0.1
"""The interval between updates of the item sources, after the first request for items."""
MORE_S = 0.005
"""The interval while there is more to read."""

Found = TypeVar("Found")


class ItemTurns:
    """Keeps a host's item sources up to date after the first request for items. Used by one event loop.

    Args:
        host: The host whose stores are read.
    """

    def __init__(self, host: Host) -> None:
        self._host = host
        self._timer: asyncio.TimerHandle | None = None

    def sources(self) -> ItemSources:
        """Returns the sources of candidate items, nearly up to date.

        Raises:
            NotReady: A store does not exist yet.
        """
        sources = self._host.sources()
        sources.turn()
        loop = asyncio.get_running_loop()
        if self._timer is None or self._timer.when() < loop.time() - TURN_S:
            self._timer = loop.call_later(TURN_S, self._turn)
        return sources

    def _turn(self) -> None:
        more = False
        with suppress(SpringtideError):
            more = self._host.sources().turn()
        self._timer = asyncio.get_running_loop().call_later(MORE_S if more else TURN_S, self._turn)


async def in_turns(steps: Generator[None, None, Found], line: Line) -> Found:
    """Runs a generator and returns its result; other requests are answered between its steps.

    Args:
        steps: The generator.
        line: The queue that admits it, as one piece.

    Raises:
        Overloaded: The expected wait is too long.
        TookTooLong: The actual wait was too long.
    """
    spent_s = 0.0
    try:
        with line.admit() as since_s:
            while True:
                began_s = line.clock_s()
                try:
                    next(steps)
                except StopIteration as end:
                    line.measure(spent_s + line.clock_s() - began_s)
                    found: Found = end.value
                    return found
                spent_s += line.clock_s() - began_s
                await asyncio.sleep(0)
                line.look(since_s)
    finally:
        steps.close()
