"""Who leaves, learned online, beside recency alone and beside a logistic regression that is fitted anew each day.

    python -m tests.bench.churn [--only shoppers|taobao|step]

Synthetic shoppers (`tests/trainer/churn/leavers.py`), of whom it is known when
they left, with a span of 7 days, and Taobao's recorded clicks with 2. All are
scored progressively: an example before anybody learns it, and once its label
was known in time for that. The regression is scikit-learn's where it is
installed, else Newton's method with the same penalty: each day of log time it
is fitted to all examples known by then, with the same inputs. What recency alone
says ranks users by the time since their latest event.

The cost is that of a trainer's step with `churn.days = 7` and with 0, in turns.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import time
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from state.churn import ChurnInputs, Horizon
from state.config.settings import Settings
from state.features.spec import FeatureSpec
from tests.bench.quality import area_under_curve
from tests.bench.recorded import Recorded, plain, read_clicks
from tests.bench.report import Figure, Stages, report
from tests.trainer.churn.leavers import DAY_MS, batches, leavers, taken
from trainer.churn.learning import TENTHS, ChurnLearner, KnownExamples

F64 = npt.NDArray[np.float64]
SPEC = FeatureSpec()
PENALTY = 1.0
NEWTON_STEPS = 25
STEPS, ROWS = 120, 1024
NINE_DAYS_S = 1_511_539_200, 1_512_316_800

progress = Stages("churn", every_s=5.0)


def fitted(inputs: F64, left: npt.NDArray[np.bool_]) -> tuple[F64, str]:
    """`[I]` float64 weights of a logistic regression with a penalty on their squares, and by whom; the first input is 1."""
    try:
        linear = importlib.import_module("sklearn.linear_model")
    except ImportError:
        return _newton(inputs, left), "Newton's method"
    made = linear.LogisticRegression(C=1.0 / PENALTY, fit_intercept=False, max_iter=1000).fit(inputs, left)
    return np.asarray(made.coef_[0]), "scikit-learn"


def _newton(inputs: F64, left: npt.NDArray[np.bool_]) -> F64:
    weights = np.zeros(inputs.shape[1])
    for _ in range(NEWTON_STEPS):
        share = 1.0 / (1.0 + np.exp(-inputs @ weights))
        curve = (inputs * (share * (1.0 - share))[:, None]).T @ inputs + PENALTY * np.eye(weights.size)
        step = np.linalg.solve(curve, inputs.T @ (left - share) - PENALTY * weights)
        weights += step
        if np.abs(step).max() < 1e-6:
            break
    return weights


def nine_days(clicks: Recorded) -> Recorded:
    """Taobao's clicks of 25 November to 3 December 2017 in Beijing, without the few that tell another time."""
    seconds = clicks.events["at_ms"] // 1000
    kept = (seconds >= NINE_DAYS_S[0]) & (seconds < NINE_DAYS_S[1])
    return plain(clicks.users[kept], clicks.events[kept])


class Daily:
    """A regression that is fitted anew each day of log time to all examples known by then.

    Args:
        inputs: Of the examples.
    """

    def __init__(self, inputs: ChurnInputs) -> None:
        self._inputs, self._day, self._weights = inputs, 0, np.zeros(inputs.width)
        self._known: list[tuple[F64, npt.NDArray[np.bool_]]] = []
        self.by = ""

    def score(self, known: KnownExamples, log_ms: int) -> F64:
        """The logits of examples, `[m]` float64; then they are known."""
        if log_ms // DAY_MS > self._day:
            self._day = log_ms // DAY_MS
            left = np.concatenate([part for _, part in self._known]) if self._known else np.zeros(0, np.bool_)
            if left.any() and not left.all():
                self._weights, self.by = fitted(np.concatenate([part for part, _ in self._known]), left)
        inputs = self._inputs.of(known.windows, known.action, known.age_ms)
        self._known.append((inputs, known.left))
        return inputs @ self._weights


def compare(name: str, clicks: Recorded, days: int, warm_up_days: int) -> dict[str, Figure]:
    """The figures of one log, of examples whose moments lie at least so many days after its first one's."""
    horizon = Horizon.of(days * DAY_MS, SPEC)
    learner, daily = ChurnLearner(SPEC, days * DAY_MS, 0, Settings().churn.examples), Daily(ChurnInputs(SPEC, horizon))
    log_ms, done, parts, cpu_s = 0, 0, [], 0.0
    made = list(batches(clicks, SPEC, ROWS))
    for batch in made:
        log_ms, done = max(log_ms, int(batch.at_ms.max())), done + len(batch)
        progress.say(name, f"{done:,} of {clicks.users.size:,} clicks")
        began_s = time.process_time()
        learner.observe(batch)
        known = learner.waiting.known(log_ms)
        told = learner.learn(known)
        cpu_s += time.process_time() - began_s
        parts.append((told, daily.score(known, log_ms), known.age_ms, known.left, known.moment_ms))
    told, refitted, age_ms, left, moment_ms = (np.concatenate([part[n] for part in parts]) for n in range(5))
    begun = moment_ms >= moment_ms.min() + warm_up_days * DAY_MS
    told, refitted, age_ms, left = (one[begun] for one in (told, refitted, age_ms, left))
    tenth = np.minimum((told * TENTHS).astype(int), TENTHS - 1)
    off = sum(abs(float((told - left)[tenth == place].sum())) for place in range(TENTHS)) / left.size
    ours, recency = area_under_curve(told, left), area_under_curve(age_ms.astype(np.float64), left)
    print_tenths(name, told, left, tenth)
    return {
        f"{name}, examples scored": Figure(float(left.size), "examples"),
        f"{name}, share that left": Figure(100 * float(left.mean()), "%"),
        f"{name}, AUC": Figure(ours, ""),
        f"{name}, AUC of recency alone": Figure(recency, ""),
        f"{name}, AUC above recency": Figure(ours - recency, "", ">= 0.02"),
        f"{name}, AUC of the regression of the day ({daily.by})": Figure(area_under_curve(refitted, left), ""),
        f"{name}, AUC above that": Figure(ours - area_under_curve(refitted, left), "", ">= -0.005"),
        f"{name}, log loss": Figure(float(-np.log(np.where(left, told, 1 - told)).mean()), "nats"),
        f"{name}, predicted over observed": Figure(float(told.sum() / left.sum()), "ratio"),
        f"{name}, tenths apart, mean": Figure(100 * off, "points", "<= 3"),
        f"{name}, cpu a row": Figure(1e6 * cpu_s / clicks.users.size, "us"),
    }


def print_tenths(name: str, told: F64, left: npt.NDArray[np.bool_], tenth: npt.NDArray[np.int64]) -> None:
    """Predicted and observed shares of each tenth of the probability."""
    print(f"\n{name}: examples, predicted and observed by tenths of the probability")
    for place in range(TENTHS):
        mine = tenth == place
        if mine.any():
            print(f"  {place / TENTHS:.1f}  {mine.sum():>7,}  {told[mine].mean():.3f}  {left[mine].mean():.3f}")


def who_has_left(count: int, days: int) -> dict[str, Figure]:
    """Synthetic shoppers: also how well it is known who has left for good already."""
    made = leavers(count, days)
    figures = compare("shoppers, 7 days", made.clicks, 7, 14)
    progress.say("shoppers, who has left for good")
    learner = ChurnLearner(SPEC, 7 * DAY_MS, 0, Settings().churn.examples)
    parts = list(taken(learner, batches(made.clicks, SPEC, ROWS)))
    told, age_ms, user, moment_ms = (
        np.concatenate([told for _, told in parts]),
        *(np.concatenate([getattr(known, name) for known, _ in parts]) for name in ("age_ms", "user", "moment_ms")),
    )
    begun = moment_ms >= moment_ms.min() + 14 * DAY_MS
    gone = np.array([made.left_ms[one] for one in user.tolist()]) <= moment_ms
    for name, scores in (("AUC", told), ("AUC of recency alone", age_ms.astype(np.float64))):
        figures[f"shoppers, who has left for good, {name}"] = Figure(area_under_curve(scores[begun], gone[begun]), "")
    return figures


def cost() -> dict[str, Figure]:
    """A step of the trainer with and without, in the same run and in turns."""
    from tests.trainer.batches import micro_batch
    from trainer.engine.step import Trainer

    base, trainers = Settings(), []
    for days in (0.0, 7.0):
        wanted = dataclasses.replace(
            base,
            trainer=dataclasses.replace(base.trainer, device="cpu"),
            churn=dataclasses.replace(base.churn, days=days),
        )
        trainers.append(Trainer(wanted, SPEC))
    # Two hours a step: ten days of a small shop, so that examples come due as they do day after day.
    log = [
        dataclasses.replace(one, at_ms=one.at_ms + number * 7_200_000)
        for number in range(STEPS)
        for one in [micro_batch(ROWS, first=number * ROWS, users=20_000, items=50_000, categories=3000)]
    ]
    times: tuple[list[float], list[float]] = ([], [])
    for number, batch in enumerate(log):
        progress.say("step", f"{number} of {STEPS}")
        for trainer, spent in zip(trainers, times, strict=True):
            began_s = time.process_time()
            trainer.step(batch)
            spent.append(time.process_time() - began_s)
    late = slice(STEPS // 2, None)
    off_ms, on_ms = (1e3 * float(np.mean(spent[late])) for spent in times)
    churn = trainers[1].churn
    assert churn is not None
    held = sum(one.nbytes for one in churn.state().values())
    return {
        "step of 1,024 rows without": Figure(off_ms, "cpu-ms"),
        "step with": Figure(on_ms, "cpu-ms"),
        "with over without": Figure(on_ms / off_ms, "ratio", "<= 1.1"),
        "examples learned a step": Figure(churn.values()["churn.total.rows"] / STEPS, "examples"),
        "state in a durable version, not packed": Figure(held / 1e6, "MB"),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Takes and reports the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("shoppers", "taobao", "step"), help="one of the parts")
    parser.add_argument("--shoppers", type=int, default=2000)
    parser.add_argument("--days", type=int, default=60)
    asked = parser.parse_args(arguments)
    figures: dict[str, Figure] = {}
    if asked.only in (None, "shoppers"):
        progress.say("shoppers", "are made")
        figures |= who_has_left(asked.shoppers, asked.days)
    if asked.only in (None, "taobao"):
        figures |= compare("taobao, 2 days", nine_days(read_clicks()), 2, 1)
    if asked.only in (None, "step"):
        figures |= cost()
    report("churn", figures, {"shoppers": asked.shoppers, "days": asked.days})


if __name__ == "__main__":
    main()
