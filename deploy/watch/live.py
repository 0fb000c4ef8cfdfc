"""The operator's terminal: permanent lines, and below them a view of the running loop that is redrawn.

The view is a screen of figures if the terminal has room, and one line if it is small. If the output is not a terminal,
the view is an occasional line.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import TextIO

from deploy.watch.figures import Figures
from deploy.watch.messages import decimal, rate, seconds, shown
from deploy.watch.panel import old_clicks, troubles

EVERY_S = 1.0
EVERY_QUIET_S = 10.0
LEAST_COLUMNS = 80
BESIDE_LINES = 2


def live_line(figures: Figures) -> str:
    """Formats figures as one line.

    >>> live_line(Figures(events_per_s=200.0, lag_events=3.0, version=17.0, epoch=1.0, features_s=0.21, weights_s=0.4))
    '200 events/s, lag 3 | version 17, epoch 1 | features 0.2 s, weights 0.4 s old | log loss -'
    """
    # A terminal cuts off the end, so problems come first.
    parts = [
        *troubles(figures),
        f"{rate(figures.events_per_s, 'events')}, lag {shown(figures.lag_events)}",
        f"version {shown(figures.version, '')}, epoch {shown(figures.epoch)}",
        f"features {seconds(figures.features_s)}, weights {seconds(figures.weights_s)} old"
        + " (old clicks)" * old_clicks(figures),
        f"log loss {decimal(figures.log_loss, 2)}",
    ]
    return " | ".join(parts)


class Screen:
    """Writes permanent lines and, on a terminal, redraws the view below them.

    Args:
        out: Where to write.
        size: Returns columns and lines of the terminal; called for each view.
    """

    def __init__(
        self, out: TextIO | None = None, size: Callable[[], os.terminal_size] = shutil.get_terminal_size
    ) -> None:
        self._out = sys.stdout if out is None else out
        self._size = size
        self._open = 0
        self.terminal = self._out.isatty()

    @property
    def every_s(self) -> float:
        """Time between views; longer without a terminal, because each view is then a permanent line."""
        return EVERY_S if self.terminal else EVERY_QUIET_S

    def say(self, text: str) -> None:
        """Writes a permanent line."""
        self._write(self._erase() + text + "\n")
        self._open = 0

    def live(self, line: str, panel: Sequence[str] = ()) -> None:
        """Redraws the view: the panel if it fits, otherwise the line; without a terminal, writes the line."""
        if not self.terminal:
            self.say(line)
            return
        columns, lines = self._size()
        fits = bool(panel) and columns >= LEAST_COLUMNS and lines >= len(panel) + BESIDE_LINES
        wanted = ["", *panel] if fits else [line]
        # A line as wide as the terminal would wrap, and the next view would start at the wrong line.
        text = "\n".join(one[: max(1, columns - 1)] for one in wanted)
        self._write(self._erase() + text)
        self._open = len(wanted)

    def _erase(self) -> str:
        """Returns the control sequence that moves to the view's first line and clears everything from there."""
        if not self._open:
            return ""
        up = f"\x1b[{self._open - 1}A" if self._open > 1 else ""
        return f"\r{up}\x1b[J"

    def _write(self, text: str) -> None:
        # A closed terminal must not prevent the loop from stopping in order.
        with contextlib.suppress(OSError):
            self._out.write(text)
            self._out.flush()
