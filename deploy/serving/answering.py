"""Builds answers from the outputs of the model program: probabilities, feature names and the version."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from deploy.serving.answer import Answer, Engagement, Interest, Version, iso
from deploy.serving.inputs import Asked
from deploy.serving.loaded_version import LoadedVersion
from state.features.arrays import Vector
from state.features.mask import Mask
from state.rows.reader import Served

STEEPEST_LOGIT = 60.0
"""Logits are clipped to this magnitude; beyond it a float64 probability is 0 or 1, and `exp` may overflow."""

F32 = NDArray[np.float32]


def answers(
    asked: Sequence[Asked],
    has_row: Sequence[bool],
    clock: str,
    version: LoadedVersion,
    seen: tuple[int, Mask],
    interests: Sequence[list[Interest]],
    outputs: Mapping[str, F32],
    vectors: Vector,
) -> list[Answer]:
    """Builds the answers to n queries, each with the fields that the query requests.

    Args:
        asked: The prepared queries.
        has_row: Whether each user has a row in the version.
        clock: The clock that gives the time of queries without a time.
        version: The loaded version.
        seen: The wall clock in milliseconds, and the mask.
        interests: The interests for each query.
        outputs: The program's outputs.
        vectors: The windows.
    """
    lean = version_of(version.served, *seen)
    full: Version = {**lean, "sources": version.served.sources}
    times = {at_ms: iso(at_ms) for at_ms in {one.at_ms for one in asked}}
    made = []
    for place, one in enumerate(asked):
        query, known = one.query, has_row[place] or bool(one.recent_categories)
        fields = query.fields
        engagement: Engagement | None = None
        if query.item is not None:
            engagement = {
                "item": query.item,
                "probability": probability(float(outputs["engagement_logit"][place])),
                "attributes": one.item_attributes.texts,
            }
        features = None
        if "features" in fields:
            features = dict(zip(version.features.spec.names, vectors.features[place].tolist(), strict=True))
        made.append(
            Answer(
                user_id=query.user,
                known=known,
                cold_start=not known,
                version=full if "sources" in fields else lean,
                at=times[one.at_ms],
                at_ms=one.at_ms,
                clock=clock if query.at_ms is None else "request",
                interests=interests[place],
                engagement=engagement,
                vector=outputs["vector"][place] if "vector" in fields else None,
                features=features,
                attributes=one.user_attributes.texts if "attributes" in fields else None,
                churn=one.churn,
            )
        )
    return made


def version_of(served: Served, now_ms: int, mask: Mask) -> Version:
    """Describes the version as answers do, without its sources."""
    return {
        "number": served.version,
        "epoch": served.epoch,
        "age_s": (now_ms - served.created_at_ms) / 1000,
        "mask_generation": mask.generation,
    }


def probability(logit: float) -> float:
    """The logistic function.

    >>> probability(0.0), probability(-1e9) < 1e-25
    (0.5, True)
    """
    return 1.0 / (1.0 + math.exp(-min(max(logit, -STEEPEST_LOGIT), STEEPEST_LOGIT)))
