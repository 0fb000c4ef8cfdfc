"""Explains a predicted probability: splits its difference from an unknown user's probability into parts that add up.

The explained probability is that of one candidate, or of engagement with an item.

1. Two questions, one about the user and one about an unknown user, are prepared at one moment and
   answered by one version.
2. Inputs that differ are put into groups, by what they describe. The program is evaluated with some
   groups from the user's question and the others from the unknown user's. A group's part is its
   Shapley value: how much the probability changes when the group becomes the user's, on average
   over orders.
3. The parts are returned with the events behind them, in words: "viewed phones 14 times in 7 days,
   last 3 min ago". A check confirms that the parts add up to the difference of the two answers.

Only outputs of the program are needed. So this works for any ranker and preprocessing, and serving
needs neither TensorFlow nor a second program.

A group's Shapley value (Shapley 1953, "A Value for n-Person Games") is a mean over all orders in
which the groups become the user's. It averages the change that the group's own step makes. The
changes of each order add up to the whole difference, so the values do too. With more than `EXACT`
groups, `ORDERS` random orders stand for all: half of them, and the same ones reversed (Castro,
Gomez and Tejada 2009).

The fields of the explanation are those of the JSON that the API returns.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import NamedTuple, TypedDict

import numpy as np
from numpy.typing import NDArray

from deploy.serving.answer import About, Query, iso
from deploy.serving.answering import STEEPEST_LOGIT
from deploy.serving.candidates import KINDS
from deploy.serving.inputs import Inputs
from deploy.serving.predictor import Predictor, Prepared
from deploy.serving.program import PAIRS, batch_of
from state.errors import BadRequest, ProgramError
from state.events.identity import public_id
from state.features.spec import LABELLED, POSITIVE, Events, FeatureSpec
from state.history.actions import exchanged
from state.rows.reader import RowReader
from state.rows.tables import own_rows_of

I32 = NDArray[np.int32]
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
F64 = NDArray[np.float64]
EXACT = 4
"""Maximum of groups for which all orders are evaluated."""
ORDERS = 32
"""Orders evaluated for more groups; even. They are always the same, so explanations are reproducible."""
NOBODY = "\0"
"""A user id that no user has: the unknown user."""
TOLERANCE = 0.01
"""Largest fraction of the difference by which the sum of the parts may deviate."""
NEGLIGIBLE = 1e-6
"""Differences of probabilities up to this are rounding errors."""
F32 = NDArray[np.float32]


class Group(NamedTuple):
    """Inputs that speak of the same thing.

    Attributes:
        kind: What that is:
            category    one of the user's categories: that it is scored as the user's own, with its windows
            action      one action: its counts
            outcomes    what was engaged with, of what has a label
            variety     how many categories and items
            rhythm      gaps, sessions, days
            succession  what over all users came next after the newest category, and that it is scored for that
            sequence    the latest events in their order
            user        the user's row
            context     the user's attributes
            crosses     the pair's crosses
            pair        the item and its category, the same in both answers
        place: The slot of a category, the number of an action; else 0.
    """

    kind: str
    place: int = 0


def groups_of(
    spec: FeatureSpec, shapes: Mapping[str, tuple[int, ...]], own_popular: Sequence[int]
) -> tuple[list[Group], dict[str, I32]]:
    """The groups, and for each input with a row per question the group number of each of its values.

    A popular category that is also the user's own is scored once, as the user's own.
    So its slot among the popular ones belongs to the group of the category.

    >>> shapes = {"user_row": (-1, 2), "recent_next": (-1, 2, 1), "popular_mask": (-1, 3), "popular_rows": (3, 2)}
    >>> groups, numbers = groups_of(FeatureSpec(), shapes, [-1, 1, -1])
    >>> [group.kind for group in groups], numbers["recent_next"].tolist(), numbers["popular_mask"].tolist()
    (['user', 'category', 'category', 'pair'], [[1], [2]], [3, 2, 3])

    Args:
        spec: Names the features.
        shapes: Of the program's inputs.
        own_popular: For each popular category its slot among the user's own, or -1.
    """
    numbers = dict[Group, int]()

    def number(group: Group) -> int:
        return numbers.setdefault(group, len(numbers))

    found = {}
    for name, (rows, *shape) in shapes.items():
        own = own_rows_of(name)
        if rows >= 0:
            continue
        if name == "features":
            of = [number(one) for one in _of_features(spec)]
        elif name in _BY_CATEGORY or (own is not None and own[1] == "recent"):
            of = [number(Group("category", slot)) for slot in range(shape[0])]
        elif name == "popular_mask":
            of = [number(Group("category", slot) if slot >= 0 else Group("pair")) for slot in own_popular]
        else:
            of = [number(Group(_kind(name)))] * (shape[0] if shape else 1)
        found[name] = np.broadcast_to(np.array(of, np.int32).reshape(-1, *[1] * (len(shape) - 1)), shape or (1,))
    return list(numbers), found


def _of_features(spec: FeatureSpec) -> list[Group]:
    """The group of each feature, in the order of the names."""
    of_action = len(spec.windows_s) + len(spec.half_lives_s) + 1
    groups = [Group("action", place) for place in range(len(spec.actions)) for _ in range(of_action)]
    for name in spec.names[len(groups) :]:
        head, _, rest = name.partition(".")
        slot = int(rest.partition(".")[0]) - 1 if head == "label" else 0
        groups.append(Group("category", slot) if head == "label" else Group(_FEATURES.get(head, "rhythm")))
    return groups


def _kind(name: str) -> str:
    """The kind of an input whose values all describe the same thing."""
    own = own_rows_of(name)
    if own is not None:
        return "sequence" if own[1].startswith("sequence") else _OWN.get(own[1], "pair")
    return "sequence" if name.startswith("sequence") else _KINDS.get(name, "pair")


class Behind(NamedTuple):
    """What explains a part.

    Attributes:
        words: In words.
        about: The category or the action that it is about; None where it is about neither.
        events: The newest of the events behind it, each with `at`, `action`, `category` and `item`.
    """

    words: str
    about: str | None
    events: Sequence[dict[str, str | None]]


class ExplainedPart(TypedDict):
    """A part of the difference.

    Attributes:
        kind: Of `Group`.
        about: The category or the action that it is about; None where it is about neither.
        share: What it adds to the probability; may be negative.
        words: The events behind it, in words.
        events: The newest events behind it.
    """

    kind: str
    about: str | None
    share: float
    words: str
    events: Sequence[dict[str, str | None]]


@dataclass(slots=True)
class Explanation(About):
    """Why a probability differs from that of an unknown user.

    Attributes:
        label: The category whose interest is explained; None for an item.
        item: The item whose engagement is explained; None for a category.
        probability: For this user.
        cold_start_probability: The probability for an unknown user, computed at the same moment.
        reasons: The largest parts of the difference, the largest first.
        rest: The sum of all smaller parts: reasons and rest add up to the difference of the probabilities.
    """

    label: str | None
    item: str | None
    probability: float
    cold_start_probability: float
    reasons: list[ExplainedPart]
    rest: float


def duration(ms: int) -> str:
    """A length of time in its largest whole unit.

    >>> [duration(ms) for ms in (604_800_000, 86_400_000, 200_000, 400)]
    ['7 days', '1 day', '3 min', '0 s']
    """
    size, unit = next((one for one in UNITS if ms >= one[0]), UNITS[-1])
    count = ms // size
    return f"{count} {unit}{'s' if unit == 'day' and count != 1 else ''}"


def times(count: int) -> str:
    """How often.

    >>> times(1), times(14)
    ('once', '14 times')
    """
    return "once" if count == 1 else f"{count} times"


def listed(names: Sequence[str]) -> str:
    """Some names, and how many others there are.

    >>> listed(["a", "b", "c", "d"]), listed(["a", "b"]), listed([])
    ('a, b, c and 1 more', 'a, b', 'none')
    """
    more = len(names) - NAMES_SHOWN
    return (", ".join(names[:NAMES_SHOWN]) or "none") + f" and {more} more" * (more > 0)


class Words:
    """Tells of one user's events.

    Args:
        events: `[m]` EVENT, newest first, the ones that windows count.
        at_ms: The time that is answered for.
        spec: Names actions and windows.
        name_of: The name of a category.
        recent_categories: The user's, newest first.
        attributes: Of the user, as names and texts.
    """

    def __init__(
        self,
        events: Events,
        at_ms: int,
        spec: FeatureSpec,
        name_of: Callable[[int], str],
        recent_categories: Sequence[int],
        attributes: Sequence[tuple[str, str | None]],
    ) -> None:
        self._events, self._at_ms, self._spec, self._name_of = events, at_ms, spec, name_of
        self._recent, self._attributes = recent_categories, attributes
        self._span = duration(spec.windows_s[-1] * 1000)

    def of(self, group: Group) -> Behind:
        """Describes the events behind a group of inputs."""
        events = self._events
        names = [self._name_of(one) for one in self._recent]
        newest = names[0] if names else "none"
        if group.kind == "category":
            name = names[group.place] if group.place < len(names) else "none"
            of_category = events[np.isin(events["category"], self._recent[group.place : group.place + 1])]
            return self._told(of_category, name, name)
        if group.kind == "action":
            return self._told(events[events["action"] == group.place], "", self._spec.actions[group.place])
        labelled, positive = ((events["flags"] & bit != 0) for bit in (LABELLED, POSITIVE))
        items, days = len(set(events["item"].tolist()) - {0}), len(set((events["at_ms"] // DAY_MS).tolist()))
        words = {
            "outcomes": f"engaged with {int(positive.sum())} of {int(labelled.sum())} items whose outcome is known in {self._span}",
            "variety": f"{len(set(events['category'].tolist()) - {0})} categories and {items} items in {self._span}",
            "rhythm": f"{len(events)} events on {days} {'day' if days == 1 else 'days'} of the last {self._span}{self._last(events)}",
            "succession": f"what over all users comes next after {newest}, the latest category",
            "sequence": f"the order of the latest {self._spec.sequence} events",
            "user": "what was learned from this user's clicks so far",
            "context": "attributes: " + listed([f"{name}={text}" for name, text in self._attributes if text is not None]),
            "crosses": "what was learned of this user and such users with this item and such items",
        }  # fmt: skip
        shown = {"outcomes": events[positive], "rhythm": events, "sequence": events}.get(group.kind, events[:0])
        return Behind(words.get(group.kind, "the item and its category"), None, self._shown(shown))

    def _told(self, events: Events, what: str, about: str) -> Behind:
        """What was done, how often and when last: with one category, or one action with all."""
        counts = np.bincount(events["action"], minlength=len(self._spec.actions)).tolist()
        done = [
            f"{' '.join(VERBS.get(name, f'did {name} with {{}}' if what else f'did {name}').format(what).split())} {times(count)}"
            for name, count in zip(self._spec.actions, counts, strict=False)
            if count
        ]
        words = f"{' and '.join(done) or 'nothing'} in {self._span}{self._last(events)}"
        return Behind(words, about, self._shown(events))

    def _last(self, events: Events) -> str:
        if not len(events):
            return ""
        return f", last {duration(self._at_ms - int(events['at_ms'][0]))} ago"

    def _shown(self, events: Events) -> list[dict[str, str | None]]:
        """The newest of them."""
        return [
            {
                "at": iso(int(one["at_ms"])),
                "action": self._spec.actions[int(one["action"])] if one["action"] < len(self._spec.actions) else None,
                "category": self._name_of(int(one["category"])) if one["category"] else None,
                "item": f"{int(one['item']):016x}" if one["item"] else None,
            }
            for one in events[:EVENTS_SHOWN]
        ]


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
        place: Index of the input.
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
    """The id written in hexadecimal; 0 if it is not one.

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


class Coalitions:
    """The sets of groups at which the function is wanted.

    >>> coalitions = Coalitions(2)
    >>> coalitions.members.tolist()
    [[False, False], [False, True], [True, False], [True, True]]
    >>> coalitions.shares(np.array([0.0, 0.0, 3.0, 4.0])).tolist()
    [3.5, 0.5]

    Args:
        groups: One or more.

    Attributes:
        members: `[n, groups]` bool, the groups that are the user's; none in the first row, all in the last.
    """

    def __init__(self, groups: int) -> None:
        if groups <= EXACT:
            self._orders = np.array(list(permutations(range(groups))))
        else:
            rng = np.random.default_rng(groups)
            half = np.array([rng.permutation(groups) for _ in range(ORDERS // 2)])
            self._orders = np.concatenate([half, half[:, ::-1]])
        turns = np.argsort(self._orders, axis=1)
        joined = turns[:, None, :] < np.arange(groups + 1)[:, None]
        self.members, at = np.unique(joined.reshape(-1, groups), axis=0, return_inverse=True)
        self._at = at.reshape(len(self._orders), groups + 1)

    def shares(self, values: F64) -> F64:
        """The value of each group, `[groups]` float64; they add up to the last of `values` less the first.

        Args:
            values: `[n]` float64, the function at `members`.
        """
        found = np.zeros(self._orders.shape[1])
        np.add.at(found, self._orders, np.diff(values[self._at], axis=1))
        return found / len(self._orders)


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
