"""The page of all metrics is the one that the code makes."""

from __future__ import annotations

from pathlib import Path

from deploy.watch.metrics_table import OFFERED, as_markdown
from state import metrics

PAGE = Path(__file__).parents[3] / "deploy" / "prometheus" / "METRICS.md"


def test_the_page_is_what_the_code_makes() -> None:
    assert PAGE.read_text() == as_markdown(), "python -m deploy.watch.metrics_table > deploy/prometheus/METRICS.md"


def test_each_process_and_each_metric_is_on_it() -> None:
    assert set(OFFERED) == {*metrics.PROCESSES, *metrics.OF_EACH_PROCESS}
    page = as_markdown()
    suffixes = ("_total", "_bucket", "_count", "_sum")
    families = {
        next((name.removesuffix(one) for one in suffixes if name.endswith(one)), name)
        for name in metrics.names() - metrics.OF_ANY_PROCESS.keys()
    } | metrics.OF_ANY_PROCESS.keys()
    # A gauge may end as a counter's series does.
    missing = {name for name in families if not any(f"| `{name}{end}` |" in page for end in ("", "_total"))}
    assert missing == set()
