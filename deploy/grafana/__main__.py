"""Writes the dashboards: `python -m deploy.grafana`. Needs the packages of requirements-dev.txt."""

from __future__ import annotations

from deploy.grafana.writer import FOLDER, load, render

if __name__ == "__main__":
    source = load()
    for dashboard in source.dashboards:
        (FOLDER / dashboard.file).write_text(render(dashboard, source.annotations))
