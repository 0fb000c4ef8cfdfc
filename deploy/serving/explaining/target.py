"""What is explained of a question: the probability of one of the candidates, or of engagement with an item."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deploy.serving.answering import STEEPEST_LOGIT
from deploy.serving.candidates import KINDS
from deploy.serving.predictor import Prepared
from state.errors import BadRequest
from state.events.identity import public_id

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]


class ExplainedValue(NamedTuple):
    """A number out of the program's outputs.

    Attributes:
        slots: Those in which the category may be scored, as the user's own or a popular one; none: engagement is meant.
    """

    slots: tuple[int, ...]

    def of(self, inputs: Mapping[str, F32], outputs: Mapping[str, F32]) -> F64:
        """Its value in each of n rows, `[n]` float64; 0 where the category is no candidate.

        Args:
            inputs: Of the program, with the masks of the candidates.
            outputs: What it answers.
        """
        if not self.slots:
            logits = outputs["engagement_logit"].reshape(-1).astype(np.float64)
            return np.asarray(1.0 / (1.0 + np.exp(-np.clip(logits, -STEEPEST_LOGIT, STEEPEST_LOGIT))))
        kinds = [kind for kind in KINDS if f"{kind}_logits" in outputs]
        logits = np.concatenate([outputs[f"{kind}_logits"] for kind in kinds], axis=1)
        there = np.concatenate([inputs[f"{kind}_mask"] for kind in kinds], axis=1) > 0
        grown = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
        slots = list(self.slots)
        return np.asarray((grown * there)[:, slots].sum(1) / grown.sum(1))


def candidate(prepared: Prepared, place: int, label: str) -> int | None:
    """The slot of a category in one of the questions; None where it is no candidate there.

    Args:
        prepared: Some questions.
        place: Which of them.
        label: The category's raw id, or the hexadecimal id that an answer shows where no name is known.
    """
    inputs, recent = prepared.inputs, prepared.vectors.recent_categories[place]
    by_kind = {"recent": recent, "popular": prepared.version.popular, "successor": prepared.successors[place]}
    kinds = [kind for kind in KINDS if f"{kind}_mask" in inputs]
    ids = np.concatenate([by_kind[kind] for kind in kinds])
    there = np.concatenate([inputs[f"{kind}_mask"][place] for kind in kinds]) > 0
    for identity in (public_id(label), _written(label)):
        found = np.flatnonzero(there & (ids == np.uint64(identity)))
        if identity and len(found):
            return int(found[0])
    return None


def _written(label: str) -> int:
    """The id that is written in hexadecimal; 0 where it is none.

    >>> _written("00000000000000ff"), _written("shoes")
    (255, 0)
    """
    try:
        return int(label, 16) if len(label) == 16 else 0
    except ValueError:
        return 0


def no_candidate(label: str, others: list[str]) -> BadRequest:
    """The refusal of a category that is not scored for the user."""
    return BadRequest(
        f"label={label[:100]!r} is none of this user's candidates", f"ask for one of {', '.join(others) or 'none'}"
    )
