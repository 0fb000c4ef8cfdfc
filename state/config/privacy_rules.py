"""What differential privacy rules out: what lets one user's rows reach another user without a clipping bound and noise."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from state.config.conflict import Conflict
from state.config.sections import Model, TrainerSettings

if TYPE_CHECKING:
    from state.config.settings import Settings


def privacy(settings: Settings) -> Iterator[Conflict]:
    """Gradients are clipped by row, of the default ranker and tower, by the TensorFlow engine; nothing is learned beside them."""
    if not settings.privacy.epsilon:
        return
    wanted = {"model.ranker": Model().ranker, "model.tower": Model().tower}
    for name, only in wanted.items():
        if settings.value(name) != only:
            yield Conflict(
                (name, "privacy.epsilon"),
                f"{name} {settings.value(name)!r} cannot be learned with privacy.epsilon {settings.privacy.epsilon:g}: of "
                "code of one's own nobody knows whether a row's loss reads other rows",
                "take it out, or set privacy.epsilon to 0",
            )
    if settings.trainer.engine not in (TrainerSettings().engine, "tensorflow"):
        yield Conflict(
            ("trainer.engine", "privacy.epsilon"),
            f"trainer.engine {settings.trainer.engine} cannot clip gradients by row, which privacy.epsilon needs",
            "set trainer.engine to auto or tensorflow",
        )
    if settings.churn.days:
        yield Conflict(
            ("churn.days", "privacy.epsilon"),
            "churn.days is set: who leaves is learned of each user's rows, neither clipped nor with noise, which privacy.epsilon rules out",
            "set churn.days or privacy.epsilon to 0",
        )
    if settings.segments.lookalikes:
        yield Conflict(
            ("segments.lookalikes", "privacy.epsilon"),
            f"segments.lookalikes is {settings.segments.lookalikes}: lookalikes compare the exact rows of different users, "
            "so that the list of one user tells of others, which privacy.epsilon rules out",
            "set segments.lookalikes or privacy.epsilon to 0",
        )
