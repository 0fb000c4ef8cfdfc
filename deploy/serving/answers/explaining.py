"""Explains a predicted probability: splits its difference from an unknown user's probability into parts that add up."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import permutations
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from deploy.serving.answers.interests import Correction
from deploy.serving.answers.predictor import KINDS, Predictor, Prepared
from deploy.serving.answers.program import PAIRS, batch_of
from deploy.serving.answers.query import NOBODY, STEEPEST_LOGIT, Query, about_same, iso
from springtide_client.answers import BehindIt, Explanation, ReasonFor
from state.errors import BadRequest, ProgramError
from state.events.identity import public_id
from state.features.spec import LABELLED, POSITIVE, Events, FeatureSpec
from state.history.appends import exchanged
from state.ranking.interest_scores import MASKED
from state.rows.reader import RowReader
from state.rows.tables import own_rows_of

_KINDS = {
    "user_row": "user",
    "context_row": "context",
    "cross": "crosses",
    "popular_next": "succession",
    "successor_next": "succession",
    "successor_rows": "succession",
    "successor_mask": "succession",
}
_OWN = {"user": "user", "context": "context", "successor": "succession"}
_BY_CATEGORY = ("category_windows", "recent_next", "recent_rows", "recent_mask")
_FEATURES = {"labelled": "outcomes", "positive": "outcomes", "labels": "variety", "items": "variety"}
EVENTS_SHOWN = 3
NAMES_SHOWN = 3
DAY_MS = 86_400_000
UNITS = ((DAY_MS, "day"), (3_600_000, "h"), (60_000, "min"), (1000, "s"))
VERBS = {
    "view": "viewed {}",
    "click": "clicked {}",
    "favorite": "marked {} as favourite",
    "cart": "put {} into the cart",
    "purchase": "bought {}",
    "buy": "bought {}",
    "like": "liked {}",
    "play": "played {}",
}
"""Wording of an action, by its name; other actions are shown by their name."""
EXACT = 4
"""Maximum of groups for which all orders are evaluated."""
ORDERS = 16
"""Orders evaluated for more groups; even. They are always the same, so explanations are reproducible."""
TOLERANCE = 0.01
"""Largest fraction of the difference by which the sum of the parts may deviate."""
NEGLIGIBLE = 1e-6
"""Differences of probabilities up to this are rounding errors."""

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32 = NDArray[np.int32]


class Group(NamedTuple):
    """Inputs that describe the same thing; `place` is the slot of a category or the number of an action, else 0.

    Attributes:
        kind: What the inputs describe:
            category    one of the user's categories: its windows, and its slot as the user's own category
            action      one action: its counts
            outcomes    which events with a label were engagements
            variety     how many categories and items
            rhythm      gaps, sessions, days
            succession  what all users clicked next after the newest category and item, what they click now, and the
                        slots of successors
            sequence    the latest events in their order
            user        the user's row
            context     the user's attributes
            crosses     the pair's crosses
            pair        the item and its category, the same in both answers
    """

    kind: str
    place: int = 0


def groups_of(
    spec: FeatureSpec, shapes: Mapping[str, tuple[int, ...]], own_popular: Sequence[int]
) -> tuple[list[Group], dict[str, I32]]:
    """Returns the groups, and for each input with a row per query the group numbers of its values, as they broadcast.

    A popular category that is also the user's own belongs to the group of the user's own, because it is scored once.

    >>> shapes = {"user_row": (-1, 2), "recent_next": (-1, 2, 1), "popular_mask": (-1, 3), "popular_rows": (3, 2)}
    >>> groups, numbers = groups_of(FeatureSpec(), shapes, [-1, 1, -1])
    >>> [group.kind for group in groups], numbers["recent_next"].tolist(), numbers["popular_mask"].tolist()
    (['user', 'category', 'category', 'pair'], [[1], [2]], [3, 2, 3])
    >>> numbers["user_row"].tolist()
    [0]

    Args:
        spec: Names the features.
        shapes: Of the program's inputs.
        own_popular: For each popular category its slot among the user's own, or -1.
    """
    numbers = dict[Group, int]()

    def number(group: Group) -> int:
        return numbers.setdefault(group, len(numbers))

    by_input = {}
    for name, (rows, *shape) in shapes.items():
        input_ = own_rows_of(name)
        if rows >= 0:
            continue
        if name == "features":
            owners = [number(group) for group in _of_features(spec)]
        elif name in _BY_CATEGORY or (input_ is not None and input_[1] == "recent"):
            owners = [number(Group("category", slot)) for slot in range(shape[0])]
        elif name == "popular_mask":
            owners = [number(Group("category", slot) if slot >= 0 else Group("pair")) for slot in own_popular]
        else:
            owners = [number(Group(_kind(name)))]
        by_input[name] = np.array(owners, np.int32).reshape([-1, *[1] * (len(shape) - 1)] if shape else [])
    return list(numbers), by_input


def _of_features(spec: FeatureSpec) -> list[Group]:
    of_action = len(spec.windows_s) + len(spec.half_lives_s) + 1
    groups = [Group("action", action) for action in range(len(spec.actions)) for _ in range(of_action)]
    for name in spec.names[len(groups) :]:
        head, _, remainder = name.partition(".")
        slot = int(remainder.partition(".")[0]) - 1 if head == "label" else 0
        groups.append(Group("category", slot) if head == "label" else Group(_FEATURES.get(head, "rhythm")))
    return groups


def _kind(name: str) -> str:
    input_ = own_rows_of(name)
    if input_ is not None:
        return "sequence" if input_[1].startswith("sequence") else _OWN.get(input_[1], "pair")
    return "sequence" if name.startswith("sequence") else _KINDS.get(name, "pair")


def duration(ms: int) -> str:
    """A length of time in its largest whole unit.

    >>> [duration(ms) for ms in (604_800_000, 86_400_000, 200_000, 400)]
    ['7 days', '1 day', '3 min', '0 s']
    """
    size, unit = next((unit for unit in UNITS if ms >= unit[0]), UNITS[-1])
    count = ms // size
    return f"{count} {unit}{'s' if unit == 'day' and count != 1 else ''}"


def listed(names: Sequence[str]) -> str:
    """Some names, and how many others there are.

    >>> listed(["a", "b", "c", "d"]), listed(["a", "b"]), listed([])
    ('a, b, c and 1 more', 'a, b', 'none')
    """
    more = len(names) - NAMES_SHOWN
    return (", ".join(names[:NAMES_SHOWN]) or "none") + f" and {more} more" * (more > 0)


@dataclass(frozen=True)
class Words:
    """Describes one user's events: `[m]` EVENT, newest first, the ones that windows count."""

    events: Events
    at_ms: int
    spec: FeatureSpec
    name_of: Callable[[int], str]
    recent_categories: Sequence[int]
    attributes: Mapping[str, str | None]

    @property
    def _span(self) -> str:
        return duration(self.spec.windows_s[-1] * 1000)

    def of(self, group: Group, share: float) -> ReasonFor:
        """Describes the part `share` of the difference, which a group of inputs contributes."""
        about, words, events = self._behind(group)
        return ReasonFor(group.kind, about, share, words, self._shown(events))

    def _behind(self, group: Group) -> tuple[str | None, str, Events]:
        """Returns the category or action that a group describes, the evidence in words, and its events."""
        events = self.events
        names = [self.name_of(category) for category in self.recent_categories]
        if group.kind == "category":
            name = names[group.place] if group.place < len(names) else "none"
            of_category = events[np.isin(events["category"], self.recent_categories[group.place : group.place + 1])]
            return name, self._done(of_category, name), of_category
        if group.kind == "action":
            of_action = events[events["action"] == group.place]
            return self.spec.actions[group.place], self._done(of_action, ""), of_action
        positive, shown = events["flags"] & POSITIVE != 0, events[:0]
        if group.kind == "outcomes":
            labelled, shown = events["flags"] & LABELLED != 0, events[positive]
            count = f"{int(positive.sum())} of {int(labelled.sum())}"
            words = f"engaged with {count} items whose outcome is known in {self._span}"
        elif group.kind == "variety":
            categories, items = (len(set(events[name].tolist()) - {0}) for name in ("category", "item"))
            words = f"{categories} categories and {items} items in {self._span}"
        elif group.kind == "rhythm":
            days, shown = len(set((events["at_ms"] // DAY_MS).tolist())), events
            on = f"{days} {'day' if days == 1 else 'days'}"
            words = f"{len(events)} events on {on} of the last {self._span}{self._last(events)}"
        elif group.kind == "succession":
            newest = names[0] if names else "none"
            words = f"what users click next after {newest}, the latest category"
        elif group.kind == "sequence":
            words, shown = f"the order of the latest {self.spec.sequence} events", events
        elif group.kind == "user":
            words = "the weights learned from this user's clicks"
        elif group.kind == "context":
            attributes = [f"{name}={text}" for name, text in self.attributes.items() if text is not None]
            words = "attributes: " + listed(attributes)
        elif group.kind == "crosses":
            words = "the weights of the crosses of this user and this item"
        else:
            words = "the item and its category"
        return None, words, shown

    def _done(self, events: Events, object_: str) -> str:
        """Describes one category's or one action's events: how often, and the last time."""
        counts = np.bincount(events["action"], minlength=len(self.spec.actions)).tolist()
        actions = []
        for action, count in zip(self.spec.actions, counts, strict=False):
            if count:
                verb = VERBS.get(action, f"did {action} with {{}}" if object_ else f"did {action}").format(object_)
                actions.append(f"{' '.join(verb.split())} {'once' if count == 1 else f'{count} times'}")
        return f"{' and '.join(actions) or 'nothing'} in {self._span}{self._last(events)}"

    def _last(self, events: Events) -> str:
        return f", last {duration(self.at_ms - int(events['at_ms'][0]))} ago" if len(events) else ""

    def _shown(self, events: Events) -> list[BehindIt]:
        actions = self.spec.actions
        return [
            BehindIt(
                at=iso(int(event["at_ms"])),
                action=actions[int(event["action"])] if event["action"] < len(actions) else None,
                category=self.name_of(int(event["category"])) if event["category"] else None,
                item=f"{int(event['item']):016x}" if event["item"] else None,
            )
            for event in events[:EVENTS_SHOWN]
        ]


_FACTOR, _OFFSET = "correction.factor", "correction.offset"
"""The parts of a `Correction`, which are varied like inputs of the program."""


def _inputs_of(prepared: Prepared) -> dict[str, F32]:
    """The inputs of the program, and the correction if there is one."""
    correction = prepared.correction
    if correction is None:
        return prepared.inputs
    # A slot that is a candidate in only one of the two answers has no offset in the other.
    offset = np.where(correction.offset > MASKED / 2, correction.offset, np.float32(0.0))
    return prepared.inputs | {_FACTOR: correction.factor, _OFFSET: offset}


def _values(slots: Sequence[int], inputs: Mapping[str, F32], outputs: Mapping[str, F32]) -> F64:
    """Returns the explained probability in each row, `[n]` float64; 0 where the category is in none of the slots.

    `slots` are those in which the category may be scored; none for an engagement.
    """
    if not slots:
        engagement = outputs["engagement_logit"].reshape(-1).astype(np.float64)
        return np.asarray(1.0 / (1.0 + np.exp(-np.clip(engagement, -STEEPEST_LOGIT, STEEPEST_LOGIT))))
    kinds = [kind for kind in KINDS if f"{kind}_logits" in outputs]
    logits = np.concatenate([outputs[f"{kind}_logits"] for kind in kinds], axis=1)
    if _FACTOR in inputs:
        rows = len(inputs[_FACTOR])
        logits[:rows] = Correction(inputs[_FACTOR], inputs[_OFFSET]).apply(logits[:rows])
    is_candidate = np.concatenate([inputs[f"{kind}_mask"] for kind in kinds], axis=1) > 0
    grown = np.exp(logits.astype(np.float64) - logits.max(1, keepdims=True))
    return np.asarray((grown * is_candidate)[:, list(slots)].sum(1) / grown.sum(1))


def candidate(prepared: Prepared, row: int, label: str) -> int | None:
    """Returns the slot of a category in query number `row`; None if it is no candidate there.

    `label` is the category's raw id, or the hexadecimal id that an answer shows if no name is known.
    """
    inputs, recent = prepared.inputs, prepared.vectors.recent_categories[row]
    by_kind = {"recent": recent, "popular": prepared.version.popular, "successor": prepared.successors[row]}
    kinds = [kind for kind in KINDS if f"{kind}_mask" in inputs]
    ids = np.concatenate([by_kind[kind] for kind in kinds])
    is_candidate = np.concatenate([inputs[f"{kind}_mask"][row] for kind in kinds]) > 0
    try:
        written = int(label, 16) if len(label) == 16 else 0
    except ValueError:
        written = 0
    for identity in (public_id(label), written):
        slots = np.flatnonzero(is_candidate & (ids == np.uint64(identity)))
        if identity and len(slots):
            return int(slots[0])
    return None


class Coalitions:
    """The sets of groups whose inputs are switched to the user's, to compute Shapley values (Shapley 1953).

    With more than `EXACT` groups, `ORDERS` random orders of the groups are a sample: half of them are drawn, the others
    are the same ones reversed. They are stratified (Castro, Gomez, Molina and Tejada 2017): over the orders, each group
    comes at places spread evenly from first to last, as in a Latin hypercube.

    >>> coalitions = Coalitions(2)
    >>> coalitions.members.tolist()
    [[False, False], [False, True], [True, False], [True, True]]
    >>> coalitions.shares(np.array([0.0, 0.0, 3.0, 4.0])).tolist()
    [3.5, 0.5]

    Attributes:
        members: `[n, groups]` bool, the groups that are the user's; none in the first row, all in the last.
    """

    def __init__(self, groups: int) -> None:
        if groups <= EXACT:
            self._orders = np.array(list(permutations(range(groups))))
        else:
            rng = np.random.default_rng(groups)
            strata = np.stack([rng.permutation(ORDERS // 2) for _ in range(groups)], axis=1)
            places = (strata + rng.random(strata.shape)) / ORDERS
            # The reversed order has the group in the mirrored half.
            half = np.argsort(np.where(rng.random(strata.shape) < 0.5, places, 1 - places), axis=1)
            self._orders = np.concatenate([half, half[:, ::-1]])
        turns = np.argsort(self._orders, axis=1)
        joined = turns[:, None, :] < np.arange(groups + 1)[:, None]
        self.members, at = np.unique(joined.reshape(-1, groups), axis=0, return_inverse=True)
        self._at = at.reshape(len(self._orders), groups + 1)

    def shares(self, values: F64) -> F64:
        """Returns the value of each group, `[groups]` float64, from the function at `members`, `[n]` float64.

        They add up to the last of `values` less the first.
        """
        group_values = np.zeros(self._orders.shape[1])
        np.add.at(group_values, self._orders, np.diff(values[self._at], axis=1))
        return group_values / len(self._orders)


coalitions_of = lru_cache(64)(Coalitions)
"""The coalitions of so many groups; they depend on nothing else, and take longer to find than to use."""


def explain(predictor: Predictor, query: Query, label: str | None) -> Generator[None, None, Explanation]:
    """Explains an answer; yields after each batch, so that other requests are answered in between.

    `label` is the category to explain; None for the query's item.

    Raises:
        BadRequest: Not exactly one of item and label is given, or the category is no candidate.
        NotReady, SaltMismatch, SpecMismatch, ProgramError, CorruptVersion: As `Predictor.profiles`.
    """
    if (label is None) == (query.item is None):
        raise BadRequest("an explanation is about one category or one item", "give either label or item")
    with predictor.reading() as reader:
        # 1.
        prepared = predictor.prepare([query, query._replace(user=NOBODY)], reader)
        outputs = prepared.version.predict(prepared.inputs)
        answer, _ = predictor.answered(prepared, outputs)
        slots: tuple[int, ...] = ()
        if label is not None:
            slot, nobodys_slot = (candidate(prepared, row, label) for row in (0, 1))
            if slot is None:
                others = ", ".join(interest.label for interest in answer.interests[:10]) or "none"
                raise BadRequest(f"label={label[:100]!r} is not a candidate of this user", f"ask for one of {others}")
            slots = tuple({slot, slot if nobodys_slot is None else nobodys_slot})
        probability, cold_start_probability = _values(slots, _inputs_of(prepared), outputs)[:2].tolist()
        # 2.
        parts = yield from _parts(predictor, prepared, reader, slots)
        words = _words(predictor, prepared)
    # 3.
    difference, total = probability - cold_start_probability, sum(share for _, share in parts)
    if abs(total - difference) > TOLERANCE * abs(difference) + NEGLIGIBLE:
        raise ProgramError(
            f"the parts of the explanation add up to {total:.6g} and not to {difference:.6g}",
            "the ranker gives a row another answer in a larger batch: `springtide check-model`",
        )
    parts = sorted((part for part in parts if part[1]), key=lambda part: -abs(part[1]))[: query.top]
    return about_same(
        Explanation,
        answer,
        label=label,
        item=query.item,
        probability=probability,
        cold_start_probability=cold_start_probability,
        reasons=[words.of(group, share) for group, share in parts],
        rest=difference - sum(share for _, share in parts),
    )


def _parts(
    predictor: Predictor, prepared: Prepared, reader: RowReader, slots: Sequence[int]
) -> Generator[None, None, list[tuple[Group, float]]]:
    version = prepared.version
    categories = prepared.vectors.recent_categories[0]
    own_popular = [
        int(np.flatnonzero(categories == category)[0]) if category and category in categories else -1
        for category in version.popular
    ]
    groups, numbers = groups_of(version.features.spec, version.program.shapes, own_popular)
    given = _inputs_of(prepared)
    if _FACTOR in given:
        # The correction uses counts of what came next over all users.
        group = Group("succession")
        if group not in groups:
            groups.append(group)
        for name in (_FACTOR, _OFFSET):
            numbers[name] = np.array(groups.index(group), np.int32).reshape([1] * (given[name].ndim - 1))
    changed = [
        np.broadcast_to(owners, given[name].shape[1:])[given[name][0] != given[name][1]]
        for name, owners in numbers.items()
    ]
    moving = np.unique(np.concatenate(changed))
    # The columns in `members` of each input's groups; any column for a group that does not change.
    last = max(len(moving) - 1, 0)
    columns = {name: np.searchsorted(moving, owners).clip(max=last) for name, owners in numbers.items()}
    coalitions = coalitions_of(max(len(moving), 1))
    fixed = {name: value for name, value in prepared.inputs.items() if name not in numbers}
    values = []
    for first in range(0, len(coalitions.members), PAIRS):
        piece = coalitions.members[first : first + PAIRS]
        padded = np.zeros((batch_of(len(piece)), piece.shape[1]), bool)
        padded[: len(piece)] = piece
        # Other requests may have loaded a newer version in between.
        predictor.load_version(reader)
        points = {name: np.where(padded[:, column], given[name][0], given[name][1]) for name, column in columns.items()}
        fed = {name: value for name, value in points.items() if name not in (_FACTOR, _OFFSET)}
        values.append(_values(slots, points, version.predict(fixed | fed))[: len(piece)])
        yield
    all_values: F64 = np.concatenate(values)
    shares = coalitions.shares(all_values)[: len(moving)].tolist()
    return [(groups[number], share) for number, share in zip(moving.tolist(), shares, strict=True)]


def _words(predictor: Predictor, prepared: Prepared) -> Words:
    question, features = prepared.asked[0], prepared.version.features
    events = exchanged(predictor.events_by(question, prepared.mask), features.actions)
    return Words(
        events[events["at_ms"] > question.at_ms - features.spec.windows_s[-1] * 1000],
        question.at_ms,
        features.spec,
        lambda category: predictor.catalogue.name_of(category).name,
        question.recent_categories,
        question.user_attributes.texts,
    )
