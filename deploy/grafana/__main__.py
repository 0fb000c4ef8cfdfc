"""Writes the dashboards: `python -m deploy.grafana`."""

from __future__ import annotations

from pathlib import Path

from deploy.grafana.boards import BOARDS
from deploy.grafana.building import as_json

if __name__ == "__main__":
    for board in BOARDS:
        (Path(__file__).parent / "dashboards" / board.file).write_text(as_json(board))
