"""Next-category quality in one pass over real clicks: each row is scored, then learned from.

    python -m tests.bench.quality [--steps N]

Reads Taobao's UserBehavior.csv (user, item, category, behaviour, seconds) from
`../shared/data/taobao`, sorts the clicks by time, computes the windows each
click saw, and trains in steps of 1,024 rows. Baselines see the same rows
in the same run: the biggest category so far, and the user's previous one.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from state.config import Settings
from state.features import EVENT, FeatureSpec, vectorise
from state.mask import Mask
from state.microbatch import Header, MicroBatch
from state.positions import Range, Source
from tests.bench.report import Figure, report
from trainer.step import Trainer

CLICKS = Path(__file__).resolve().parents[2] / "../shared/data/taobao/UserBehavior.csv"
ACTIONS = {"pv": 0, "fav": 1, "cart": 2, "buy": 3}
STEP_ROWS = 1024
SOURCE = Source("7a" * 16, 0)


def hashed(text: str) -> int:
    """An id of 64 bits, never 0."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") or 1


def read_clicks(path: Path = CLICKS) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.void]]:
    """Users `[n]` uint64 and events `[n]` EVENT in order of time; a cut-off last line is left out."""
    with path.open(newline="") as lines:
        rows = [row for row in csv.reader(lines) if len(row) == 5 and row[3] in ACTIONS]
    rows.sort(key=lambda row: int(row[4]))
    ids = {text: hashed(text) for row in rows for text in row[:3]}
    events = np.zeros(len(rows), EVENT)
    events["at_ms"] = [int(row[4]) * 1000 for row in rows]
    events["item"] = [ids[row[1]] for row in rows]
    events["category"] = [ids[row[2]] for row in rows]
    events["action"] = [ACTIONS[row[3]] for row in rows]
    events["offset"] = np.arange(len(rows))
    events["topic"] = SOURCE.topic
    return np.array([ids[row[0]] for row in rows], np.uint64), events


def micro_batches(
    users: npt.NDArray[np.uint64],
    events: npt.NDArray[np.void],
    spec: FeatureSpec,
    weights: tuple[float, ...],
    step_rows: int = STEP_ROWS,
) -> Iterator[MicroBatch]:
    """Micro-batches of 1,024 rows with the windows that each click saw."""
    histories = {user: events[users == user] for user in np.unique(users).tolist()}
    seen: Counter[int] = Counter()
    for first in range(0, users.size, step_rows):
        part = slice(first, min(first + step_rows, users.size))
        rows = part.stop - first
        features = np.empty((rows, len(spec.names)), np.uint16)
        labels = np.empty((rows, spec.labels), np.uint64)
        windows = np.empty((rows, spec.labels, len(spec.label_names)), np.uint16)
        for row, (user, at_ms) in enumerate(zip(users[part].tolist(), events["at_ms"][part].tolist(), strict=True)):
            features[row], labels[row], windows[row] = vectorise(histories[user], at_ms, seen[user], Mask.NONE, spec)
            seen[user] += 1
        header = Header(spec.digest, "0" * 16, (Range(SOURCE, first, part.stop, rows=rows),), 0)
        yield MicroBatch(
            header,
            user=users[part],
            item=events["item"][part].copy(),
            category=events["category"][part].copy(),
            action=events["action"][part].copy(),
            at_ms=events["at_ms"][part].copy(),
            label=np.full(rows, np.nan, np.float32),
            weight=np.array(weights, np.float32)[events["action"][part]],
            source=np.zeros(rows, np.uint16),
            offset=np.arange(first, part.stop),
            context=np.zeros((rows, 0), np.uint64),
            features=features,
            labels=labels,
            label_windows=windows,
        )


def baselines(users: npt.NDArray[np.uint64], categories: npt.NDArray[np.uint64], since: int = 0) -> tuple[float, float]:
    """Top-1, over the rows from `since` on, of the biggest category so far and of the user's previous one."""
    last: dict[int, int] = {}
    sizes: Counter[int] = Counter()
    biggest, biggest_hits, last_hits = 0, 0, 0
    for row, (user, category) in enumerate(zip(users.tolist(), categories.tolist(), strict=True)):
        if row >= since:
            biggest_hits += biggest == category
            last_hits += last.get(user) == category
        last[user] = category
        sizes[category] += 1
        if sizes[category] > sizes[biggest]:
            biggest = category
    return biggest_hits / (users.size - since), last_hits / (users.size - since)


def train(steps: int | None = None, settings: Settings | None = None) -> dict[str, float]:
    """Trains in one pass; the measures over all rows and over the second half."""
    settings = settings or Settings()
    spec = FeatureSpec.from_settings(settings)
    users, events = read_clicks()
    trainer = Trainer(settings, spec)
    late_from = users.size // 2 // STEP_ROWS * STEP_ROWS
    hits = targets = late_hits = late_targets = 0
    for number, batch in enumerate(micro_batches(users, events, spec, settings.events.action_weights)):
        if steps is not None and number >= steps:
            break
        done = trainer.step(batch)
        hits, targets = hits + done.top1, targets + done.targets
        if batch.offset[0] >= late_from:
            late_hits, late_targets = late_hits + done.top1, late_targets + done.targets
    measures = trainer.evaluation.values()
    biggest, last = baselines(users[:targets], events["category"][:targets])
    found = {f"total.{name}": measures[f"total.{name}"] for name in ("top1", "top5", "log_loss", "auc")}
    # Those of whom something is known; the baselines of a user's first click are no prediction.
    found |= {f"total.known.{name}": measures[f"total.known.{name}"] for name in ("top1", "top5", "rows")}
    found |= {"baseline.biggest": biggest, "baseline.previous": last, "rows": float(targets)}
    if late_targets:
        found["second_half.top1"] = late_hits / late_targets
        found["second_half.baseline.previous"] = baselines(users, events["category"], late_from)[1]
    return found


def main() -> None:
    """Prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=None, help="stop after so many steps of 1,024 rows")
    found = train(parser.parse_args().steps)
    goals = {"total.known.top1": ">= 0.435", "total.known.top5": ">= 0.663", "total.auc": ">= 0.8"}
    report(
        "quality",
        {name: Figure(value, "rows" if name == "rows" else "", goals.get(name, "")) for name, value in found.items()},
        {"data": "Taobao UserBehavior, one pass, steps of 1,024 rows"},
    )


if __name__ == "__main__":
    main()
