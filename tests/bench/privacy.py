"""What privacy costs, and what an attacker learns without and with it, in one pass over real logs.

    python -m tests.bench.privacy [--rows N] [--only taobao|kuairand] [--epsilons 8 4 1] [--units user example]

Flags with a dot are settings. Each run learns the first rows of a log: without
privacy as the defaults say, and with it in records of 2,048 rows that are taken
whole, of which a user is in `privacy.updates` at most, one period long.
"No noise, no bound" is what a private trainer does not learn, alone.

Quality: top-1 and log loss of the next category on Taobao, with the AUC of pairs
with the item of another row, scored on the second half whoever learns; AUC and
log loss of the label on KuaiRand. Speed: rows a second of the step.

Attack: half of the users, by a hash, are never learned from. The attacker has the
shared weights and rows, and each user's rows with all windows, and says who was
learned from by the mean loss of the user's rows (Yeom et al. 2018): the AUC over
users, 0.5 is a guess. The user's own row is not used: nobody else gets it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import NamedTuple
from unittest import mock

import numpy as np
import numpy.typing as npt

from evaluation.measures import area_under_curve
from state.compiled import mixed
from state.config.loading import load
from state.config.settings import Settings
from state.features.mask import Mask
from state.features.spec import FeatureSpec
from state.microbatch.batch import MicroBatch
from state.registry.log_line import WHOLE
from tests.bench.quality import analysis
from tests.bench.recorded import KUAIRAND_SETTINGS, Recorded, micro_batches, read_clicks, read_impressions
from tests.bench.report import Figure, Stages, report
from trainer.engine import private_step
from trainer.engine.adam import EPSILON
from trainer.engine.private_step import PrivateTrainer
from trainer.engine.record import Recorder
from trainer.engine.step import Trainer
from trainer.engine.tensorflow_engine import Adam
from trainer.model.model import Preprocessing
from trainer.privacy import NoisePlace
from trainer.versions.starting import trainer_of

F32 = npt.NDArray[np.float32]

ROWS = 128 * 1024
STEP_ROWS, PRIVATE_ROWS = 1024, 2048
SILENT = "no noise, no bound"
LATE_ROWS_OF_A_USER = 3
"""Rows of a user that an attack needs: fewer say next to nothing."""


class Scored(NamedTuple):
    """What a model says of rows.

    Attributes:
        user: `[n]` uint64.
        interest: `[n]` float32 losses of the next category, NaN without one.
        logits: `[n]` float32, of the row's own pair.
        losses: `[n]` float32, of the same; NaN where it has none.
        others: `[n]` float32, of the pair with the item of another row.
    """

    user: npt.NDArray[np.uint64]
    interest: F32
    logits: F32
    losses: F32
    others: F32


class Run:
    """One log, learned once.

    Args:
        settings: All settings.
        recorded: The log.
        preprocessing: Of its features.
        rows: Of it.
        stages: Says how far it is.
        name: Of this run.
        silent: What is learned privately is learned without noise and without a bound: what it costs then is what is
            not learned.
    """

    def __init__(
        self,
        settings: Settings,
        recorded: Recorded,
        preprocessing: Preprocessing | None,
        rows: int,
        stages: Stages,
        name: str,
        silent: bool = False,
    ) -> None:
        self._settings, self._recorded, self._rows = settings, recorded, rows
        self._spec, self._stages, self._name = FeatureSpec.from_settings(settings), stages, name
        self._labelled = not np.isnan(recorded.label).all()
        self._trainer: Trainer = trainer_of(settings, self._spec, preprocessing)
        if silent:
            silence(self._trainer)
        plain = replace(settings, privacy=replace(settings.privacy, epsilon=0.0))
        trainer = self._trainer
        self._recorder = Recorder(plain, trainer.crosses, trainer._columns, 0)

    def quality(self) -> dict[str, float]:
        """Learns each row, and scores it before."""
        trainer, seconds, scores, positive = self._trainer, 0.0, [], []
        own, others, learned = [], [], 0
        for number, batch in enumerate(self._batches()):
            if not self._labelled and learned >= self._rows // 2 and number % 4 == 0:
                scored = self._score(batch, batch.user)
                own.append(scored.logits)
                others.append(scored.others)
            began = time.perf_counter()
            done = trainer.step(batch, place=_place(number))
            seconds += time.perf_counter() - began
            scores += [judged.pairs.logits for judged in done.judged]
            positive += [judged.pairs.positive for judged in done.judged]
            learned += len(batch)
            self._stages.say(self._name, f"{learned:,} of {self._rows:,} rows")
        measures = trainer.measures.evaluation.values() | trainer.measures.progressive.values()
        found = {"rows/s": learned / seconds}
        if self._labelled:
            logits, hits = np.concatenate(scores), np.concatenate(positive)
            late = np.arange(logits.size) >= logits.size // 2
            losses = np.logaddexp(0.0, np.where(hits, -logits, logits).astype(np.float64))
            return found | {
                "auc": area_under_curve(logits[late], hits[late]).value,
                "log_loss": float(losses[late].mean()),
            }
        pairs = np.concatenate([*own, *others])
        of_own = np.arange(pairs.size) < pairs.size // 2
        names = {"top1": "total.known.top1", "log_loss": "total.log_loss"}
        return (
            found
            | {name: measures[one] for name, one in names.items()}
            | {"auc": area_under_curve(pairs, of_own).value}
        )

    def attack(self) -> dict[str, float]:
        """Learns half of the users, and tells them from the others by their losses."""
        self._trainer.clear()
        learned = 0
        for number, batch in enumerate(self._batches()):
            members = batch.take(_is_member(batch.user))
            self._trainer.step(members, place=_place(number))
            learned += len(batch)
            self._stages.say(f"{self._name}, attack", f"{learned:,} of {self._rows:,} rows learned by half")
        scored = [self._score(batch, np.zeros_like(batch.user)) for batch in self._batches()]
        users, losses = (
            np.concatenate([one.user for one in scored]),
            np.concatenate([one.losses if self._labelled else one.interest for one in scored]).astype(np.float64),
        )
        users, losses = users[~np.isnan(losses)], losses[~np.isnan(losses)]
        each, of = np.unique(users, return_inverse=True)
        rows = np.bincount(of)
        mean = np.bincount(of, losses) / rows
        enough = rows >= LATE_ROWS_OF_A_USER
        found = area_under_curve(-mean[enough], _is_member(each[enough])).value
        return {"attack auc": found, "attacked users": float(enough.sum())}

    def _batches(self) -> Iterator[MicroBatch]:
        step = PRIVATE_ROWS if self._settings.privacy.epsilon else STEP_ROWS
        weights = self._settings.events.action_weights
        return islice(micro_batches(self._recorded, self._spec, weights, step), self._rows // step)

    def _score(self, batch: MicroBatch, users: npt.NDArray[np.uint64]) -> Scored:
        """What the model says of rows as users `users`; changes nothing."""
        trainer, known = self._trainer, batch.user
        batch = replace(batch, user=users)
        crosses = trainer._recorder.crosses_of(batch)
        record = self._recorder.record(batch, crosses, trainer.popular.top(), trainer.transitions, (0, 0))
        scores, targets = trainer.engine.measure(record, move=False).scores, record.targets
        rows = len(batch)
        interest = np.where(targets.slot >= 0, scores.interest_loss, np.float32(np.nan))
        losses = np.where(np.isnan(batch.label), np.float32(np.nan), scores.engagement_loss[:rows])
        return Scored(known, interest, scores.engagement[:rows], losses, scores.engagement[rows:])


def silence(trainer: Trainer) -> None:
    """Takes noise and bound off a private trainer that has not learned yet."""
    assert isinstance(trainer, PrivateTrainer)
    trainer.private.noise = trainer.private.deviation = 0.0
    trainer.private._clip = 1e9
    assert isinstance(trainer.optimizer, Adam)
    trainer.optimizer.epsilon = EPSILON


def _is_member(users: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    is_member: npt.NDArray[np.bool_] = (mixed(users ^ np.uint64(0x5EED)) & np.uint64(1)) == 0
    return is_member


def _place(number: int) -> NoisePlace:
    return NoisePlace("7a" * 16, 0, number, 1, WHOLE, Mask.NONE, "")


def measured(data: str, flags: Sequence[str], asked: argparse.Namespace, stages: Stages) -> dict[str, Figure]:
    """The figures of one log."""
    base = ["--config", str(KUAIRAND_SETTINGS)] if data == "kuairand" else []
    off = load([*base, *flags], {})
    recorded = read_clicks() if data == "taobao" else read_impressions(off)
    rows = min(asked.rows, recorded.users.size // PRIVATE_ROWS * PRIVATE_ROWS)
    preprocessing = analysis(recorded, FeatureSpec.from_settings(off), off, 16) if data == "taobao" else None
    private = ["--trainer.rows_per_update", "0", "--privacy.periods", "1"]
    runs = {
        "off": off,
        "off, tensorflow, whole records": load([*base, "--trainer.engine", "tensorflow", *private, *flags], {}),
    }
    figures: dict[str, Figure] = {}
    one_period = mock.patch.object(private_step, "PERIOD_MS", 10**12)
    with one_period, tempfile.TemporaryDirectory(prefix="springtide-privacy-") as folder:
        for unit in asked.units:
            for epsilon in asked.epsilons:
                own = ["--paths.state", folder, "--privacy.unit", unit, "--privacy.epsilon", str(epsilon)]
                runs[f"epsilon {epsilon:g}, {unit}"] = load([*base, *private, *own, *flags], {})
            if asked.epsilons:
                runs[f"{SILENT}, {unit}"] = runs[f"epsilon {asked.epsilons[0]:g}, {unit}"]
        for name, settings in runs.items():
            run = Run(settings, recorded, preprocessing, rows, stages, f"{data} {name}", name.startswith(SILENT))
            found = run.quality() | run.attack()
            figures |= {f"{data}: {name}: {what}": Figure(value, "") for what, value in found.items()}
            for what, value in found.items():
                print(f"{data}: {name}: {what} {value:.4f}", flush=True)
    return figures


def main() -> None:
    """Prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=ROWS, help="of each log, from its beginning")
    parser.add_argument("--only", choices=("taobao", "kuairand"), help="one of the two logs")
    parser.add_argument("--epsilons", type=float, nargs="*", default=[8.0, 4.0, 1.0], help="budgets")
    parser.add_argument("--units", nargs="*", default=["user", "example"], choices=("user", "example"), help="units")
    asked, flags = parser.parse_known_args()
    stages = Stages("privacy")
    figures: dict[str, Figure] = {}
    for data in ("taobao", "kuairand"):
        if asked.only in (None, data):
            figures |= measured(data, flags, asked, stages)
    about = {"rows": asked.rows, "flags": flags, "data": "Taobao UserBehavior and KuaiRand-Pure, from their beginning"}
    report("privacy" + (f"-{asked.only}" if asked.only else ""), figures, about)


if __name__ == "__main__":
    main()
