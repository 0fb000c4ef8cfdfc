"""What is marked in every graph: that the whole system was turned back, pinned, or answers with another version."""

from __future__ import annotations

from typing import NamedTuple

from deploy.grafana.panel import RATE_INTERVAL


class Mark(NamedTuple):
    """One kind of annotation.

    Attributes:
        name: Of its switch at the top of the board.
        expr: Above 0 while it lasts.
        title: Said at the mark; `{{label}}` is a label's value.
        colour: Of the mark.
        shown: Whether it is switched on when the board is opened.
    """

    name: str
    expr: str
    title: str
    colour: str
    shown: bool = True


MARKS = (
    Mark(
        "Rollbacks",
        f"changes(springtide_serving_epoch[{RATE_INTERVAL}]) > 0",
        "another epoch answers at {{instance}}: a rollback or an upgrade",
        "red",
    ),
    Mark(
        "Versions turned back",
        f"resets(springtide_serving_version[{RATE_INTERVAL}]) > 0",
        "an older version answers at {{instance}}",
        "orange",
    ),
    Mark(
        "Pins",
        f"changes(springtide_serving_pinned[{RATE_INTERVAL}]) > 0",
        "pinned, or following again, at {{instance}}",
        "purple",
    ),
    # Five a second as a rule, so that the mark would cover the graph: for a board that shows a standstill.
    Mark(
        "Versions",
        f"changes(springtide_serving_version[{RATE_INTERVAL}]) > 0",
        "new versions answer at {{instance}}",
        "blue",
        shown=False,
    ),
)
"""Those of every board."""
