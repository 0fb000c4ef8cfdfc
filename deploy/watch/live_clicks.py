"""Result of the validation for the newest window of live clicks, for `springtide status`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deploy.watch import scrape
from state.config.settings import Settings

PREFIX = "springtide_validation_"


def look(settings: Settings) -> dict[str, Any] | None:
    """Returns the window's rows, the number of its baseline, and by anomaly type the number of features.

    Returns None before the first window has ended, or if the validation does not run.
    """
    urls = scrape.urls_beside(settings)
    if "validation" not in urls:
        return None
    found = scrape.scrape({"validation": urls["validation"]})["validation"]
    rows, baseline = (found.value(f"{PREFIX}{name}") for name in ("window_rows", "baseline"))
    if not rows or baseline is None:
        return None
    anomalies = {name: int(count) for name, count in found.by(f"{PREFIX}anomalies", "type").items() if count}
    return {"rows": int(rows), "baseline": int(baseline), "anomalies": anomalies}


def as_text(found: Mapping[str, Any]) -> tuple[str, str]:
    """Formats the result for `springtide status`: a keyword and a description.

    >>> as_text({"rows": 12000, "baseline": 0, "anomalies": {}})
    ('as ever', 'the newest window, of 12,000 rows, is like the baseline of the bootstrap')
    >>> word, text = as_text({"rows": 500, "baseline": 2, "anomalies": {"ENUM_TYPE_UNEXPECTED_STRING_VALUES": 1}})
    >>> word
    'CHANGED'
    >>> for sentence in text.split("; "):
    ...     print(sentence)
    the newest window, of 500 rows, differs from baseline 2 in 1 feature
    ENUM_TYPE_UNEXPECTED_STRING_VALUES (1)
    `springtide schema diff` says in what
    """
    baseline = f"baseline {found['baseline']}" if found["baseline"] else "the baseline of the bootstrap"
    window, anomalies = f"the newest window, of {found['rows']:,} rows,", found["anomalies"]
    if not anomalies:
        return "as ever", f"{window} is like {baseline}"
    count = sum(anomalies.values())
    told = [
        f"{window} differs from {baseline} in {count} feature{'s' * (count > 1)}",
        ", ".join(f"{name} ({features})" for name, features in sorted(anomalies.items())),
        "`springtide schema diff` says in what",
    ]
    return "CHANGED", "; ".join(told)
