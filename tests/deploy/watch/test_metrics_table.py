"""The page of all metrics is the one that the code makes."""

from __future__ import annotations

from pathlib import Path

from deploy.watch.metrics_table import as_markdown

PAGE = Path(__file__).parents[3] / "docs" / "reference" / "metrics.md"


def test_the_page_is_what_the_code_makes() -> None:
    assert PAGE.read_text() == as_markdown(), "python -m deploy.watch.metrics_table > docs/reference/metrics.md"
