"""The operator's terminal: lines that stay, and one live line about the running loop."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TextIO

from deploy.scrape import Scrape

AWAY = Scrape()
EVERY_S = 1.0
EVERY_QUIET_S = 10.0


@dataclass(frozen=True)
class Pulse:
    """What the live line says; None where nobody knows.

    Attributes:
        at_s: Monotonic time of the reading.
        events: Positions of the clicks topic taken up since the stream's start.
        events_per_s: Their growth since the pulse before.
        lag: Positions not yet read.
        version: Version that answers use.
        epoch: Its epoch.
        features_s: Age of the newest click in the histories that answers use.
        weights_s: Age of the newest click trained into that version.
        log_loss: The trainer's, scored before learning.
        notes: Words about what is not as usual.
    """

    at_s: float
    events: float | None = None
    events_per_s: float | None = None
    lag: float | None = None
    version: float | None = None
    epoch: float | None = None
    features_s: float | None = None
    weights_s: float | None = None
    log_loss: float | None = None
    notes: tuple[str, ...] = ()


def take_pulse(scrapes: Mapping[str, Scrape], before: Pulse | None, now_s: float) -> Pulse:
    """One reading of the loop.

    Args:
        scrapes: Process -> its metrics.
        before: The reading before, for the rate.
        now_s: Monotonic time.
    """
    stream, trainer, applier = (scrapes.get(name, AWAY) for name in ("stream", "trainer", "applier"))
    events = stream.total("springtide_stream_events_total")
    rate = None
    # A stream that restarted counts from 0 again: no rate across that.
    if (
        before is not None
        and events is not None
        and before.events is not None
        and events >= before.events
        and now_s > before.at_s
    ):
        rate = (events - before.events) / (now_s - before.at_s)
    notes = [f"{name} away" for name, one in scrapes.items() if one.problem]
    if trainer.value("springtide_trainer_held"):
        notes.append("training held by the guard")
    if applier.value("springtide_serving_pinned"):
        notes.append("pinned")
    return Pulse(
        at_s=now_s,
        events=events,
        events_per_s=rate,
        lag=stream.value("springtide_stream_lag_events"),
        version=applier.value("springtide_serving_version"),
        epoch=applier.value("springtide_serving_epoch"),
        # A gauge that is exactly 0 was never set.
        features_s=applier.value("springtide_serving_feature_freshness_seconds") or None,
        weights_s=applier.value("springtide_serving_weight_freshness_seconds") or None,
        # Before the first step the gauge has its first value, which is no loss.
        log_loss=trainer.value("springtide_trainer_log_loss")
        if trainer.value("springtide_trainer_steps_total")
        else None,
        notes=tuple(notes),
    )


def live_line(pulse: Pulse) -> str:
    """A reading in one line.

    >>> live_line(Pulse(0.0, events_per_s=200.0, lag=3.0, version=17.0, epoch=1.0, features_s=0.21, weights_s=0.4))
    '200 events/s, lag 3 | version 17, epoch 1 | features 0.2 s, weights 0.4 s old | log loss -'
    """
    # A terminal cuts the end off: what is not as usual comes first.
    parts = [
        *pulse.notes,
        f"{shown(pulse.events_per_s)} events/s, lag {shown(pulse.lag)}",
        f"version {shown(pulse.version, '')}, epoch {shown(pulse.epoch)}",
        f"features {seconds(pulse.features_s)}, weights {seconds(pulse.weights_s)} old",
        f"log loss {'-' if pulse.log_loss is None else f'{pulse.log_loss:.2f}'}",
    ]
    return " | ".join(parts)


def shown(value: float | None, group: str = ",") -> str:
    """A whole number, or a dash.

    >>> shown(12345.0), shown(None)
    ('12,345', '-')
    """
    return "-" if value is None else f"{value:{group}.0f}"


def seconds(value: float | None) -> str:
    """A time span, or a dash.

    >>> seconds(0.234), seconds(75.0), seconds(9000.0), seconds(None)
    ('0.2 s', '75 s', '2.5 h', '-')
    """
    if value is None:
        return "-"
    return (
        f"{value:.1f} s"
        if value < 10
        else f"{value:.0f} s"
        if value < 600
        else f"{value / 60:.0f} min"
        if value < 7200
        else f"{value / 3600:.1f} h"
    )


class Screen:
    """Writes lines that stay and, on a terminal, rewrites one line below them.

    Args:
        out: Where to write.
        width: Columns of the terminal, asked anew for each live line.
    """

    def __init__(
        self, out: TextIO = sys.stdout, width: Callable[[], int] = lambda: shutil.get_terminal_size().columns
    ) -> None:
        self._out = out
        self._width = width
        self._open = False
        self.terminal = out.isatty()

    @property
    def every_s(self) -> float:
        """Time between live lines: each line stays where this is no terminal, so that they are fewer."""
        return EVERY_S if self.terminal else EVERY_QUIET_S

    def say(self, text: str) -> None:
        """Writes a line that stays."""
        self._write(("\r\x1b[K" if self._open else "") + text + "\n")
        self._open = False

    def live(self, text: str) -> None:
        """Rewrites the live line; where this is no terminal, writes a line."""
        if not self.terminal:
            self.say(text)
            return
        self._write("\r\x1b[K" + text[: max(1, self._width() - 1)])
        self._open = True

    def _write(self, text: str) -> None:
        # A terminal that went away must not keep the loop from stopping in order.
        with contextlib.suppress(OSError):
            self._out.write(text)
            self._out.flush()
