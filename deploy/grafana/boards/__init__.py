"""One module for each dashboard: what somebody who was woken asks of one part, as panels."""

from __future__ import annotations

from deploy.grafana.boards import fairness, overview, quality, serving, stream, trainer
from deploy.grafana.panel import Board

BOARDS: tuple[Board, ...] = (
    overview.BOARD,
    stream.BOARD,
    trainer.BOARD,
    serving.BOARD,
    quality.BOARD,
    fairness.BOARD,
)
"""In the order in which one looks at them."""
