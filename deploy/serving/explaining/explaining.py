"""Explains a probability: its difference from that of a user of whom nothing is known, in parts that add up.

1. Both questions, about the user and about nobody, are prepared and answered at one moment by one version.
2. The inputs that differ are put into groups. The program is asked with some groups from the user's question and the
   others from nobody's. A group's part is its Shapley value (`shapley.py`): how much the probability changes when the
   group becomes the user's, on average over orders. Values of the program alone are needed, so this holds for any
   ranker and preprocessing, and serving needs neither TensorFlow nor a second program.
3. The parts are told with the events behind them; that they add up to the difference of the two answers is checked.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deploy.serving.answer import Query
from deploy.serving.explaining.explanation import ExplainedPart, Explanation
from deploy.serving.explaining.groups import Group, groups_of
from deploy.serving.explaining.shapley import F64, Coalitions
from deploy.serving.explaining.target import ExplainedValue, candidate, no_candidate
from deploy.serving.explaining.words import Words
from deploy.serving.inputs import Inputs
from deploy.serving.predictor import Predictor, Prepared
from deploy.serving.program import PAIRS, batch_of
from state.errors import BadRequest, ProgramError
from state.history.actions import exchanged
from state.rows.reader import RowReader

NOBODY = "\0"
"""A user id that nobody has."""

TOLERANCE = 0.01
"""How much of the difference the parts may miss."""

NEGLIGIBLE = 1e-6
"""A difference of probabilities that is rounding."""

F32 = NDArray[np.float32]


class Part(NamedTuple):
    """A group of inputs and what it adds."""

    group: Group
    share: float


def explain(predictor: Predictor, query: Query, label: str | None) -> Generator[None, None, Explanation]:
    """Explains an answer; stops after each batch, so that others are answered meanwhile, and returns the explanation.

    Args:
        predictor: What answers.
        query: About the user, and about the item where one is explained.
        label: The category that is explained; None for the item.

    Raises:
        BadRequest: Not one of item and label is given, or the category is no candidate.
        NotReady, SaltMismatch, SpecMismatch, ProgramError, CorruptVersion: As `Predictor.profiles`.
    """
    if (label is None) == (query.item is None):
        raise BadRequest("an explanation is of one category or of one item", "give label or item, and one of them only")
    with predictor.reading() as reader:
        # 1.
        prepared = predictor.prepare([query, query._replace(user=NOBODY)], reader)
        outputs = prepared.version.program.predict(prepared.inputs)
        about, _ = predictor.answered(prepared, outputs)
        target = ExplainedValue(())
        if label is not None:
            ours_in, theirs_in = (candidate(prepared, place, label) for place in (0, 1))
            if ours_in is None:
                raise no_candidate(label, [one["label"] for one in about.interests[:10]])
            target = ExplainedValue(tuple({ours_in, ours_in if theirs_in is None else theirs_in}))
        ours, theirs = target.of(prepared.inputs, outputs)[:2].tolist()
        # 2.
        parts = yield from _parts(predictor, prepared, reader, target)
        words = _words(predictor, prepared)
    # 3.
    difference = ours - theirs
    if abs(sum(one.share for one in parts) - difference) > TOLERANCE * abs(difference) + NEGLIGIBLE:
        raise ProgramError(
            f"the parts of the explanation add up to {sum(one.share for one in parts):.6g} and not to {difference:.6g}",
            "the ranker gives a row another answer in a larger batch: `springtide check-model`",
        )
    parts = sorted((one for one in parts if one.share), key=lambda one: -abs(one.share))[: query.top]
    told = [(one, words.of(one.group)) for one in parts]
    return Explanation(
        about.user_id, about.known, about.cold_start, about.version, about.at, about.at_ms, about.clock,
        label=label,
        item=query.item,
        probability=ours,
        cold_start_probability=theirs,
        reasons=[ExplainedPart(kind=one.group.kind, about=behind.about, share=one.share, words=behind.words, events=behind.events) for one, behind in told],
        rest=difference - sum(one.share for one in parts),
    )  # fmt: skip


def _parts(
    predictor: Predictor, prepared: Prepared, reader: RowReader, target: ExplainedValue
) -> Generator[None, None, list[Part]]:
    """Each group of inputs that differs, with its share."""
    version = prepared.version
    own = prepared.vectors.recent_categories[0]
    own_popular = [int(np.flatnonzero(own == one)[0]) if one and one in own else -1 for one in version.popular]
    groups, numbers = groups_of(version.features.spec, version.program.shapes, own_popular)
    names = sorted(numbers)
    of = np.concatenate([numbers[name].reshape(-1) for name in names])
    end, begin = (np.concatenate([prepared.inputs[name][row].reshape(-1) for name in names]) for row in (0, 1))
    moving = np.unique(of[begin != end])
    # The columns of a coalition's members: that of each group that moves, and any for what stays as it is.
    column = np.searchsorted(moving, of).clip(max=max(len(moving) - 1, 0))
    coalitions = Coalitions(max(len(moving), 1))
    fixed = {name: value for name, value in prepared.inputs.items() if name not in numbers}
    sizes = {name: prepared.inputs[name].shape[1:] for name in names}
    values = []
    for first in range(0, len(coalitions.members), PAIRS):
        piece = coalitions.members[first : first + PAIRS]
        points = np.zeros((batch_of(len(piece)), len(of)), np.float32)
        points[: len(piece)] = np.where(piece[:, column], end, begin)
        # Others may have been answered by a version that came meanwhile.
        predictor.take_up(reader)
        inputs = _split(points, sizes)
        values.append(target.of(inputs, version.program.predict(fixed | inputs))[: len(piece)])
        yield
    found: F64 = np.concatenate(values)
    of_groups = coalitions.shares(found)[: len(moving)].tolist()
    return [Part(groups[number], share) for number, share in zip(moving.tolist(), of_groups, strict=True)]


def _split(points: F32, sizes: Mapping[str, tuple[int, ...]]) -> Inputs:
    """The inputs of points, `[n, ...]` each, out of all their values side by side."""
    found, first = {}, 0
    for name, shape in sizes.items():
        count = int(np.prod(shape))
        found[name] = np.ascontiguousarray(points[:, first : first + count]).reshape(len(points), *shape)
        first += count
    return found


def _words(predictor: Predictor, prepared: Prepared) -> Words:
    """Tells of the events that the windows of the first question count."""
    asked, features = prepared.asked[0], prepared.version.features
    events = exchanged(predictor.events_by(asked, prepared.seen[1]), features.actions)
    events = events[events["at_ms"] > asked.at_ms - features.spec.windows_s[-1] * 1000]
    return Words(
        events,
        asked.at_ms,
        features.spec,
        lambda category: predictor.catalogue.name_of(category).name,
        asked.recent_categories,
        list(asked.user_attributes.texts.items()),
    )
