"""What is learned of who leaves is part of a version: restart, rollback, verification, erasure and a change of the setting."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt

from state.features.erased import MaskedUsers
from state.microbatch.codec import decode
from state.registry.registry import SERVING
from tests.trainer.clicks import microbatch, small_settings
from tests.trainer.logs import (
    append,
    fresh,
    learner,
    run_to_end,
    started,
    trainer_of,
    with_weight,
    written,
)
from tests.trainer.test_verify import started_with_spec
from trainer import verify
from trainer.churn.learning import ChurnLearner
from trainer.engine.guard import Verdict
from trainer.learner import Learner
from trainer.versions import checkpoint, content
from trainer.versions.content import CrossedIds
from trainer.versions.content import without as without_users

RECORDS = [microbatch(number) for number in range(24)]
ON = ("--churn.days", "0.002")
"""Some 173 s: a record in this log is 150 s after the one before."""


def churn_of(running: Learner) -> ChurnLearner:
    found = trainer_of(running).churn
    assert found is not None
    return found


def bits(held: dict[str, npt.NDArray[np.generic]]) -> dict[str, bytes]:
    return {name: one.tobytes() for name, one in held.items()}


def test_a_version_has_measures_weights_and_code_and_is_recomputed(tmp_path: Path) -> None:
    registry, log = started_with_spec(tmp_path), written(RECORDS)
    running = learner(registry, log, *ON)
    run_to_end(running)
    running.close()
    newest = registry.newest(1) or 0
    made = registry.manifest(newest)
    assert made.environment["churn.days"] == "0.002" and int(made.environment["churn.code"]) >= 1
    assert made.metrics["churn.total.rows"] > 200
    assert 0 < made.metrics["churn.log_loss"] < 2 and 0 < made.metrics["churn.auc"] < 1
    assert "churn.weights" in content.decode([registry.read(newest, SERVING)])

    def asked(*flags: str) -> verify.Comparison:
        return verify.verify(
            small_settings(*flags), registry, newest, 1, lambda: fresh(*flags),
            log,
        )  # fmt: skip

    found = asked(*ON)
    assert found.outcome == "equal", found.text()
    assert asked().environment == (
        *(f"churn.{name} was {made.environment[f'churn.{name}']} and is off" for name in ("code", "days")),
    )


def test_a_skipped_step_counts_as_one_that_was_learned() -> None:
    found = []
    for weight in (1.0, float("nan")):
        trainer = fresh(*ON)
        for value in RECORDS[:8]:
            trainer.step(decode(value))
        report = trainer.step(decode(with_weight(RECORDS[8], weight)))
        assert trainer.churn is not None
        found.append((report.verdict, bits(trainer.churn.state())))
    assert [verdict for verdict, _ in found] == [Verdict.ACCEPT, Verdict.SKIP]
    assert found[0][1] == found[1][1]


def test_an_erased_user_waits_neither_in_the_trainer_nor_in_earlier_versions() -> None:
    trainer = fresh(*ON)
    for value in RECORDS[:8]:
        trainer.step(decode(value))
    assert trainer.churn is not None
    before = checkpoint.full(trainer)
    user = before["state.churn.waiting.user"][:1].copy()
    rewritten = without_users(before, MaskedUsers.of(user.tolist()), CrossedIds(trainer.crosses).see(before))
    trainer.forget(user)
    held = checkpoint.full(trainer)
    for kept in (rewritten, held):
        assert user[0] not in kept["state.churn.waiting.user"]
        assert 0 < len(kept["state.churn.waiting.user"]) < len(before["state.churn.waiting.user"])
        assert {
            len(one) for name, one in kept.items() if name.startswith("state.churn.waiting.") and name[-6:] != "counts"
        } == {len(kept["state.churn.waiting.user"])}


def test_churn_is_switched_on_off_and_to_another_span(tmp_path: Path) -> None:
    registry, log, spans = started(tmp_path), written([]), ((), ON, ("--churn.days", "0.004"), ())
    for number, flags in enumerate(spans):
        append(log, RECORDS[6 * number : 6 * number + 6])
        running = learner(registry, log, *flags)
        if flags:
            assert churn_of(running).values()["churn.total.rows"] == 0, "it begins anew"
        run_to_end(running)
        running.close()
        names = content.decode(
            registry.read(registry.newest(1) or 0, name) for name in registry.manifest(registry.newest(1) or 0).files
        )
        assert any(name.startswith("state.churn.") for name in names) == bool(flags)
        if flags:
            assert len(churn_of(running).waiting) > 0


def test_without_churn_days_a_version_has_nothing_of_churn() -> None:
    trainer = fresh()
    trainer.step(decode(RECORDS[0]))
    assert trainer.churn is None
    tensors = checkpoint.full(trainer).keys() | checkpoint.served(trainer).keys()
    assert not [name for name in (*tensors, *checkpoint.deciding(trainer.settings)) if "churn" in name]
