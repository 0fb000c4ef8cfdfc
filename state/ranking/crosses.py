"""Crosses: single values and pairs of values of a row, hashed to ids in the table of cross weights.

A cross is a value, such as the item or the user's age band, or a pair, such as the user and the category. So the
preference of one user for one category has its own learned number, and does not depend on the product of two embedding
rows. The trainer and serving compute ids with the same function, so a row has the same ids in both. It uses integers
only, so the bits are the same on every machine.

Each cross has two learned numbers, both logits:

- The weight is a term of the sum of all weights of a row. The weights are learned jointly, so each explains only what
  the others do not.
- The marginal logit is the difference between the labels of the cross's own rows and those of all rows. It ignores
  other properties that those rows share. It is known after few rows, and does not depend on other crosses.

Their errors differ, so a mixture of both is more accurate than either. The crosses' part of a row's engagement logit is

    sum over its crosses c of  weight share of c * weight + marginal share of c * marginal logit

The shares are also learned, one pair for each name of a cross. One more share, at first 1, multiplies the rest of the
logit, which is the network's part: how much a log with labels needs of it differs from log to log.

    alone       user, item, category, each context field, each attribute of user and item, each answer, each latest item
    with user   item, category, each context field, each attribute of the item
    in context  each context field with category and with each attribute of the item

An answer is a banded summary of the user's labels and events so far. Examples are the number of positive impressions
among all impressions, or that this event is the third of a session. A missing value (id 0) removes its crosses.

The latest items are the items of the user's latest events, if examples contain them (`features.sequence`). Most users have
few labels, so these items tell more about them. An item has the same two numbers at each position of the latest items, and
each position has its own shares.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from state.attributes.values import tables_of
from state.compiled import compiled, inlined, mix, read_only
from state.config.settings import Settings
from state.features.spec import FeatureSpec

U64 = NDArray[np.uint64]
U16 = NDArray[np.uint16]
I32 = NDArray[np.int32]
F32 = NDArray[np.float32]

ANSWERS = ("share", "share by weight", "positive of labelled", "labelled", "pause", "pause before", "session", "days")
"""Names of the answers, the banded summaries of a user's history.

share                 decayed share of positive among labelled, in sixteenths, shrunk towards a half when there are few
share by weight       the same in eighths, for each half octave of labelled
positive of labelled  counts of positive and of labelled events in the longest window
labelled              the count of labelled events in the longest window
pause                 octaves since the last event
pause before          octaves between the last two events
session               events of the session so far
days                  days with an event
"""

LATEST_ITEMS = 3
"""At most so many latest items are crosses; `features.sequence` may be less."""

WIDTH = 2
"""Learned numbers of a cross: weight and marginal logit."""

FIRST_SHARES = (0.5, 0.0)
"""Initial shares of weight and marginal logit. With the other terms, about half of the sum of weights is right."""


class Values(NamedTuple):
    """The values of n rows that are crossed: ids, 0 where a value is missing.

    Attributes:
        user: `[n]` uint64.
        item: `[n]` uint64.
        category: `[n]` uint64.
        context: `[n, K]` uint64.
        user_attributes: `[n, Au]` uint64.
        item_attributes: `[n, Ai]` uint64.
        features: `[n, D]` uint16, as the feature spec names them.
        latest_items: `[n, T]` uint64, items of the user's latest events, newest first; T is `sequence` of the spec.
    """

    user: U64
    item: U64
    category: U64
    context: U64
    user_attributes: U64
    item_attributes: U64
    features: U16
    latest_items: U64


@inlined
def _band(count: int) -> int:
    """The band of a count: counts below 16 unchanged, then four bands per octave."""
    shift = 0
    while (count >> shift) >= 16:
        shift += 1
    return count if shift == 0 else 16 + 8 * shift + ((count >> shift) - 8)


@inlined
def _half_octave(weight: int) -> int:
    """The band of a weight: two bands per octave."""
    shift = 0
    while (weight >> shift) >= 4:
        shift += 1
    return 2 * shift + (weight >> shift)


@compiled("const(u2[:, ::1]), i4[::1], i8, u8[:, ::1]")
def _answers(features: U16, places: I32, first: int, values: U64) -> None:
    """Writes the answers into the columns of `values` from `first` on; `places` are the feature columns to read."""
    for i in range(features.shape[0]):
        labelled, positive = int(features[i, places[0]]), int(features[i, places[1]])
        counted, taken = int(features[i, places[2]]), int(features[i, places[3]])
        pause = 255
        for place in places[7:]:
            pause = min(pause, int(features[i, place]))
        # Decayed counts are in 1/256 events; a new user has 0.45 of one event.
        values[i, first] = np.uint64(1 + (positive + 115) * 16 // (labelled + 256))
        values[i, first + 1] = np.uint64(1 + _half_octave(labelled) * 16 + positive * 8 // max(labelled, 1))
        values[i, first + 2] = np.uint64(1 + _band(counted) * 256 + _band(taken))
        values[i, first + 3] = np.uint64(1 + _band(counted))
        values[i, first + 4] = np.uint64(1 + pause // 8)
        values[i, first + 5] = np.uint64(1 + int(features[i, places[4]]) // 8)
        values[i, first + 6] = np.uint64(1 + _band(int(features[i, places[5]])))
        values[i, first + 7] = np.uint64(1 + _band(int(features[i, places[6]])))


@compiled("u8[:, ::1], i4[:, ::1], u8[::1], u8[:, ::1]")
def _cross(values: U64, pairs: I32, salts: U64, found: U64) -> None:
    for i in range(values.shape[0]):
        for c in range(pairs.shape[0]):
            one, other = values[i, pairs[c, 0]], values[i, pairs[c, 1]]
            found[i, c] = np.uint64(0)
            if one != np.uint64(0) and other != np.uint64(0):
                found[i, c] = max(mix(mix(one ^ salts[c]) + other), np.uint64(1))


def _hashed(kind: str, names: Sequence[str]) -> U64:
    """`[n]` uint64."""
    digests = [hashlib.sha256(f"{kind}:{name}".encode()).digest() for name in names]
    return np.array([int.from_bytes(digest[:8], "big") for digest in digests], np.uint64)


def with_network_share(outputs: dict[str, Any], inputs: Mapping[str, Any], share: float) -> dict[str, Any]:
    """A ranker's outputs with its part of the engagement multiplied by `share`.

    Args:
        outputs: Arrays or tensors by name: `engagement_logit` `[n]`, in which crosses count in full, and maybe `item_query`.
        inputs: Those of the ranker: `cross` `[n]` float32, the logits of the crosses, unless it does not read them.
        share: 1 changes nothing.
    """
    if share == 1.0 or "cross" not in inputs:
        return outputs
    factor, crossed = np.float32(share), inputs["cross"]
    shared = {"engagement_logit": crossed + factor * (outputs["engagement_logit"] - crossed)}
    if "item_query" in outputs:
        shared["item_query"] = factor * outputs["item_query"]
    return {**outputs, **shared}


def logits_of(rows: F32, shares: F32) -> F32:
    """The logit that a row's crosses contribute, `[n]` float32.

    `rows` has the weights and marginal logits, `[n, C, 2]` float32, 0 where there is no cross; `shares`, `[C, 2]`
    float32, the learned offsets to the initial shares.
    """
    found: F32 = ((shares + np.array(FIRST_SHARES, np.float32)) * rows).sum((1, 2))
    return found


class Crosses:
    """The crosses of rows with given columns.

    Args:
        spec: Feature spec, which names the features and sets how many latest items there are.
        context: Names of the context fields.
        users: Names of the users' attributes.
        items: Names of the items' attributes.

    Attributes:
        names: Names of the C crosses, such as `user*category`.
        kinds: Kinds of the C crosses, such as `user*context`. Crosses of one kind start from the same state.
        shares: `[C + 1]` uint64, the row ids under which the learned offsets to each name's initial shares are stored,
            and last the offset to the share of the network.

    >>> crosses = Crosses(FeatureSpec(), ("tab",), (), ("author",))
    >>> crosses.names[1:9]
    ('user', 'item', 'category', 'context.tab', 'item.author', 'answer.share', 'answer.share by weight', 'answer.positive of labelled')
    >>> crosses.names[14:]
    ('user*item', 'user*category', 'user*context.tab', 'user*item.author', 'context.tab*category', 'context.tab*item.author')
    """

    def __init__(
        self, spec: FeatureSpec, context: Sequence[str] = (), users: Sequence[str] = (), items: Sequence[str] = ()
    ) -> None:
        kinds = {"every": "every", "user": "user", "item": "item", "category": "category"}
        kinds |= {f"context.{name}": "context" for name in context}
        kinds |= {f"user.{name}": "user attribute" for name in users}
        kinds |= {f"item.{name}": "item attribute" for name in items}
        kinds |= {f"answer.{name}": name for name in ANSWERS}
        self._latest_items = min(spec.sequence, LATEST_ITEMS)
        kinds |= {f"latest item.{place}": "latest item" for place in range(1, self._latest_items + 1)}
        things = [name for name, kind in kinds.items() if kind in ("category", "item attribute")]
        contexts = [name for name, kind in kinds.items() if kind == "context"]
        paired = [("user", name) for name in ("item", "category", *contexts, *things[1:])]
        paired += [(one, other) for one in contexts for other in things]
        alone = [(name, "every") for name in kinds]
        place = {name: number for number, name in enumerate(kinds)}
        self.names = (*kinds, *("*".join(pair) for pair in paired))
        self.kinds = (*kinds.values(), *(f"{kinds[one]}*{kinds[other]}" for one, other in paired))
        self._width = len(kinds)
        self._pairs: I32 = np.array([[place[one], place[other]] for one, other in alone + paired], np.int32)
        salted = [
            "latest item" if kind == "latest item" else name for name, kind in zip(self.names, self.kinds, strict=True)
        ]
        self._salts = _hashed("cross", salted)
        # No name of a cross is empty.
        self.shares = _hashed("cross share", (*self.names, ""))
        counted, decayed = len(spec.windows_s) - 1, len(spec.windows_s) + len(spec.half_lives_s) - 1
        read = [f"{kind}.{spec.window_names[name]}" for name in (decayed, counted) for kind in ("labelled", "positive")]
        read += ["gap.1", "session.events", "events.days"]
        read += [f"{action}.recency" for action in spec.actions]
        self._places: I32 = np.array([spec.names.index(name) for name in read], np.int32)

    def __len__(self) -> int:
        """The number of crosses, C."""
        return len(self.names)

    def ids(self, rows: Values) -> U64:
        """The crosses of rows, `[n, C]` uint64; 0 where one of the values is missing.

        Args:
            rows: Values with the columns that this object was built for.
        """
        count = len(rows.user)
        values = np.empty((count, self._width), np.uint64)
        values[:, 0] = 1
        for place, column in enumerate((rows.user, rows.item, rows.category), 1):
            values[:, place] = column
        at = 4
        for columns in (rows.context, rows.user_attributes, rows.item_attributes):
            values[:, at : at + columns.shape[1]] = columns
            at += columns.shape[1]
        _answers(read_only(rows.features), self._places, at, values)
        at += len(ANSWERS)
        values[:, at:] = rows.latest_items[:, : self._latest_items]
        found = np.empty((count, len(self)), np.uint64)
        _cross(values, self._pairs, self._salts, found)
        return found

    def of_user(self, user: int, items: U64, categories: U64, contexts: U64) -> U64:
        """The ids of all crosses of one user with the given values, `[n]` uint64. Only these may have a row.

        `contexts` are the known values of context fields and of attributes.

        >>> crosses, values = Crosses(FeatureSpec(), ("tab",)), np.arange(2, 9, dtype=np.uint64)
        >>> found = crosses.of_user(1, values[:2], values[2:3], values[3:5])
        >>> one = Values(*(np.full(1, value, np.uint64) for value in (1, 3, 4)), np.full((1, 1), 6, np.uint64),
        ...     *(np.zeros((1, 0), np.uint64),) * 2, np.zeros((1, len(FeatureSpec().names)), np.uint16),
        ...     np.zeros((1, 0), np.uint64))
        >>> mine = [place for place, name in enumerate(crosses.names) if name.startswith("user")]
        >>> len(found), set(crosses.ids(one)[0, mine].tolist()) <= set(found.tolist())
        (6, True)
        """
        others = {"every": np.ones(1, np.uint64), "item": items, "category": categories}
        found = [np.empty(0, np.uint64)]
        for place, (name, kind) in enumerate(zip(self.names, self.kinds, strict=True)):
            if name != "user" and not name.startswith("user*"):
                continue
            values = others.get("every" if name == "user" else kind.removeprefix("user*"), contexts)
            pairs = np.stack([np.full(len(values), user, np.uint64), values], 1)
            made = np.empty((len(values), 1), np.uint64)
            _cross(pairs, np.array([[0, 1]], np.int32), self._salts[place : place + 1], made)
            found.append(made[:, 0])
        return np.concatenate(found)


def crosses_of(settings: Settings, spec: FeatureSpec | None = None) -> Crosses:
    """The crosses of a model with these settings; `spec` is the version's feature spec, by default that of the settings."""
    tables = tables_of(settings.attributes)
    users, items = (tables[side].names if side in tables else () for side in ("user", "item"))
    return Crosses(spec or FeatureSpec.from_settings(settings), settings.events.context, users, items)
