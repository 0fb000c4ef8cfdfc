"""Quality in one pass over real logs: each row is scored, then learned from, by the core of `springtide evaluate`.

    python -m tests.bench.quality [--steps N] [--only taobao|kuairand|shoppers] [--trainer.engine tensorflow]
    python -m tests.bench.quality --ranker din|two_tower

Flags with a dot are settings; with some the figures are no goals.

Taobao's clicks: the next category, and whose item it was (`tests/bench/recorded.py`
makes micro-batches of 1,024 rows of them), with the features' means and
variances of its beginning, as the bootstrap finds them. KuaiRand's
impressions: whether the video was clicked, over the rows of the last three days.
Synthetic shoppers, whose tastes drift: against the same model frozen at half time.
"""

from __future__ import annotations

import argparse
import dataclasses
from itertools import islice
from pathlib import Path

import numpy as np

from evaluation.measures import OURS, Table, area_under_curve
from evaluation.progressive import Plan, ProgressiveValidation
from evaluation.report import engagement_tables, interests_tables
from evaluation.run import preprocessing_for
from state.config.loading import load
from state.config.settings import Settings
from state.features.spec import FeatureSpec
from streaming.preprocessing import SAMPLE_ROWS
from tests.bench.recorded import (
    KUAIRAND_SETTINGS,
    STEP_ROWS,
    Recorded,
    kuairand_settings,
    made_clicks,
    micro_batches,
    read_clicks,
    read_impressions,
)
from tests.bench.report import Figure, report
from trainer.engine.report import Report
from trainer.engine.step import Trainer
from trainer.model.model import Preprocessing
from trainer.versions import checkpoint

EXAMPLES = Path(__file__).resolve().parents[2] / "deploy" / "examples"
SHOPPERS_CLICKS = 240 * STEP_ROWS
"""Some twenty minutes of them at their default rate."""


def analysis(recorded: Recorded, spec: FeatureSpec, settings: Settings, steps: int | None = None) -> Preprocessing:
    """What the bootstrap makes of a log before anything is trained: the preprocessing, analysed over its beginning."""
    rows = SAMPLE_ROWS if steps is None else min(SAMPLE_ROWS, steps * STEP_ROWS)
    batches = islice(micro_batches(recorded, spec, settings.events.action_weights), -(-rows // STEP_ROWS))
    return preprocessing_for((batch.features for batch in batches), settings)


def validated(
    recorded: Recorded, settings: Settings, trainer: Trainer, steps: int | None, begin: int = 0
) -> ProgressiveValidation:
    """Predicts and learns the first steps of a log; the rows from offset `begin` on are evaluated."""
    validation = ProgressiveValidation(settings, trainer, None, Plan(begin, every=0))
    spec = FeatureSpec.from_settings(settings)
    for batch in islice(micro_batches(recorded, spec, settings.events.action_weights), steps):
        validation.take(batch)
    return validation


def figures_of(table: Table) -> dict[str, float]:
    """The figures of a table: those of a baseline begin with its name, and Springtide's advantage over it is `above`."""
    found: dict[str, float] = {}
    for score in table.scores:
        where = "" if score.name == OURS else f"{score.name}."
        found |= {f"{where}{name}": figure.value for name, figure in score.figures.items() if figure.value is not None}
        for name, apart in score.difference.items():
            if apart.value is not None and apart.interval is not None:
                found |= {f"above {where}{name}": apart.value, f"above {where}{name}.interval": apart.interval}
    return found | {"rows": float(table.rows)}


def train(steps: int | None = None, settings: Settings | None = None) -> dict[str, float]:
    """Trains in one pass over Taobao's clicks; the measures over all rows, and over those of users with earlier clicks."""
    settings = settings or Settings()
    spec, recorded = FeatureSpec.from_settings(settings), read_clicks()
    trainer = Trainer(settings, spec, analysis(recorded, spec, settings, steps))
    validation = validated(recorded, settings, trainer, steps)
    every, known = interests_tables(validation.interests)
    measures = trainer.measures.evaluation.values() | trainer.measures.progressive.values()
    names = ("known.top1", "known.top5", "known.rows", "auc", "log_loss", "lift.top1", "lift.log_loss")
    found = {f"total.{name}": measures[f"total.{name}"] for name in names}
    found |= {f"with earlier clicks, {name}": value for name, value in figures_of(known).items()}
    return found | figures_of(every)


def train_impressions(steps: int | None = None, settings: Settings | None = None) -> dict[str, float]:
    """Trains in one pass over KuaiRand; the engagement over the measured rows, which are its last."""
    settings = settings or kuairand_settings()
    recorded = read_impressions(settings)
    trainer = Trainer(settings, FeatureSpec.from_settings(settings))
    begin = int(np.argmax(recorded.measured)) if steps is None else 0
    validation = validated(recorded, settings, trainer, steps, begin)
    clicked = np.concatenate([part.flag for part in validation.engagements])[begin:]
    return figures_of(engagement_tables(validation.engagements)[0]) | {"clicked": float(clicked.mean())}


def train_shoppers(clicks: int = SHOPPERS_CLICKS, settings: Settings | None = None) -> dict[str, float]:
    """Trains in one pass over drifting tastes, and scores the second half with what was known at half time too.

    frozen: the whole profile of half time, weights and windows, as a model has it that is rebuilt in batches.
    still: its weights of half time with windows that move on with every click.
    """
    settings = settings or Settings()
    spec = FeatureSpec.from_settings(settings)
    live = Trainer(settings, spec)
    unmoved = dataclasses.replace(settings.model, learning_rate=0.0, dense_learning_rate=0.0)
    frozen, still = (Trainer(dataclasses.replace(settings, model=unmoved), spec) for _ in range(2))
    half = clicks // 2 // STEP_ROWS * STEP_ROWS
    recorded, weights = made_clicks(settings, clicks), settings.events.action_weights
    done: dict[str, list[Report]] = {"live": [], "frozen": [], "still": []}
    batches = micro_batches(recorded, spec, weights), micro_batches(recorded, spec, weights, known=half)
    for batch, old in zip(*batches, strict=True):
        if batch.offset[0] == half:
            for copy in (frozen, still):
                checkpoint.load(copy, checkpoint.full(live))
        report = live.step(batch)
        if batch.offset[0] >= half:
            done["live"].append(report)
            done["frozen"].append(frozen.step(old))
            done["still"].append(still.step(batch))
    found = {"rows": float(sum(report.rows for report in done["live"]))}
    for name, reports in done.items():
        pairs = [judged.pairs for one in reports for judged in one.judged]
        scores, positive = (np.concatenate([getattr(one, part) for one in pairs]) for part in ("logits", "positive"))
        found[f"{name}.auc"] = area_under_curve(scores, positive).value
        hits, rows = (sum(one.quality.total(part) for one in reports) for part in ("top1", "rows"))
        found[f"{name}.top1"] = hits / rows
    found["above frozen.auc"] = found["live.auc"] - found["frozen.auc"]
    return found | {"above still.auc": found["live.auc"] - found["still.auc"]}


def main() -> None:
    """Prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=None, help="stop after so many steps of 1,024 rows")
    parser.add_argument("--only", choices=("taobao", "kuairand", "shoppers"), help="one of the three logs")
    parser.add_argument(
        "--ranker", choices=("din", "two_tower"), help="a ranker of deploy/examples, over Taobao's clicks"
    )
    asked, flags = parser.parse_known_args()
    named = "".join(flags).replace("--", "-").replace(".", "-").replace("/", "-")
    if asked.ranker:
        asked.only, named = "taobao", f"-{asked.ranker}{named}"
        flags = ["--config", str(EXAMPLES / asked.ranker / "springtide.toml"), *flags]
    settings = load(flags, env={}) if flags else None
    if asked.only in (None, "taobao"):
        goals = {"total.known.top1": ">= 0.435", "total.known.top5": ">= 0.663", "total.auc": ">= 0.8"}
        _report(
            f"quality{named}",
            train(asked.steps, settings),
            {} if flags else goals,
            "Taobao UserBehavior, one pass, steps of 1,024 rows",
        )
    if asked.only in (None, "kuairand"):
        goals = {"auc": ">= 0.736", "log_loss": "<= 0.594"}
        about = "KuaiRand-Pure, one pass over 25 to 30 April 2022, measured over 28 to 30 April, steps of 1,024 rows"
        wanted = load(["--config", str(KUAIRAND_SETTINGS), *flags], env={})
        _report(f"quality-kuairand{named}", train_impressions(asked.steps, wanted), {} if flags else goals, about)
    if asked.only in (None, "shoppers"):
        clicks = SHOPPERS_CLICKS if asked.steps is None else asked.steps * STEP_ROWS
        about = "synthetic shoppers with the default settings, measured over the second half, steps of 1,024 rows"
        goals = {} if flags else {"above frozen.auc": ">= 0.03"}
        _report(f"quality-shoppers{named}", train_shoppers(clicks, settings), goals, about)


def _report(name: str, found: dict[str, float], goals: dict[str, str], data: str) -> None:
    figures = {key: Figure(value, "rows" if key == "rows" else "", goals.get(key, "")) for key, value in found.items()}
    report(name, figures, {"data": data})


if __name__ == "__main__":
    main()
