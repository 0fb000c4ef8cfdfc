"""Training/serving parity: whether serving computes the features that were trained on, from the applier's metrics."""

from __future__ import annotations

from collections.abc import Mapping

from deploy.watch.scrape import Scrape

SERIES = "springtide_serving_parity_rows_total"


def look(applier: Scrape) -> dict[str, int] | None:
    """Returns rows by outcome since the applier's start; None if it does not answer, or has compared no row."""
    found = {outcome: int(count) for outcome, count in applier.by(SERIES, "outcome").items()}
    return found if any(found.values()) else None


def as_text(rows: Mapping[str, int]) -> tuple[str, str]:
    """Formats the comparison for `springtide status`: a keyword and a description.

    >>> as_text({"equal": 1200, "differs": 0, "unknown": 3})
    ('holds', '1,200 rows of the training log have the same features here; 3 cannot be compared')
    >>> as_text({"equal": 0, "differs": 0, "unknown": 3})[0], as_text({"equal": 5, "differs": 1, "unknown": 0})[0]
    ('unknown', 'BROKEN')
    """
    equal, differs, unknown = (rows.get(outcome, 0) for outcome in ("equal", "differs", "unknown"))
    word = "BROKEN" if differs else "holds" if equal else "unknown"
    said = [
        *([f"{differs:,} rows of the training log have other features here"] * bool(differs)),
        f"{equal:,} rows of the training log have the same features here",
        *([f"{unknown:,} cannot be compared"] * bool(unknown)),
    ]
    return word, "; ".join(said)
