"""The feature spec and `vectorise_many`: a user's recent events as named integers. The rules:

- A history is the last N events in append order. The bound applies before the mask; masked events are then left out as
  if they had never happened.
- The window of w seconds is `(at - w, at]`. Events later than `at`, and those older than the longest window, affect no
  output.
- "Last" is by (time, offset), then by partition. The windows `of_latest_5`, `of_latest_20` and `follows` of a category
  use the same order. The first two count the category's events among the user's latest 5 and 20. `follows` counts how
  often the category came next after the category of the user's latest event. An event without a category counts among
  the latest events, but no category counts as coming next after it.
- Every output is a uint16 that saturates. A decayed count is in 1/256 events; recency is the age in steps of an eighth
  of an octave, 255 for never.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from state.config.sections import Events as EventSettings
from state.config.sections import Features
from state.errors import SettingsError
from state.features.arrays import (
    FEW,
    GAPS,
    MANY,
    OF_ORDER,
    SLOTS,
    SWITCHES,
    Tables,
    Vector,
    ages_of_steps,
    decay_column,
    recency_step,
    words,
)
from state.features.mask import Mask as Mask

if TYPE_CHECKING:
    from state.config.settings import Settings

KERNELS = "state.features.kernel"
"""The module that `vectorise_many` imports late. A process that computes windows prepares its kernels."""

EVENT = np.dtype(
    [
        ("at_ms", "<i8"),
        ("category", "<u8"),
        ("item", "<u8"),
        ("offset", "<i8"),
        ("topic", "<u4"),
        ("partition", "<u2"),
        ("action", "u1"),
        ("flags", "u1"),
    ]
)
LABELLED = 1  # bit of `flags`: the label is known
POSITIVE = 2  # bit of `flags`: the label is at least 0.5
CODE = 2  # increment it when the same events give other integers

Events = NDArray[Any]
# As instances, because NumPy takes them in half the time of a class.
_I64, _U64, _U16 = np.dtype(np.int64), np.dtype(np.uint64), np.dtype(np.uint16)


def _span(seconds: int) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds % size == 0:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


@dataclass(frozen=True)
class FeatureSpec:
    """Defines the integers of a row. All data derived from them carries the spec's digest.

    Attributes:
        actions: Names of the actions; an event carries the index.
        windows_s: Lengths of the windows, ascending, seconds.
        half_lives_s: Half-lives of the decayed counts, seconds.
        history: N, the events kept per user.
        recent_categories: L, the number of a user's latest categories that have their own windows.
        sequence: T, the latest events of a user that a row contains; 0 for none.
    """

    actions: tuple[str, ...] = EventSettings().actions
    windows_s: tuple[int, ...] = Features().windows_s
    half_lives_s: tuple[int, ...] = Features().half_lives_s
    history: int = Features().history
    recent_categories: int = Features().recent_categories
    sequence: int = Features().sequence

    def __post_init__(self) -> None:
        if not self.actions or len(self.actions) > 255 or len(set(self.actions)) != len(self.actions):
            raise ValueError(f"actions {self.actions} must be 1 to 255 different names")
        if not self.windows_s or list(self.windows_s) != sorted(set(self.windows_s)) or self.windows_s[0] < 1:
            raise ValueError(f"windows_s {self.windows_s} must be positive and ascending")
        if not self.half_lives_s or min(self.half_lives_s) < 1:
            raise ValueError(f"half_lives_s {self.half_lives_s} must be positive")
        if not 16 <= self.history <= 4096:
            raise ValueError(f"history {self.history} must be between 16 and 4096")
        if not SLOTS <= self.recent_categories <= self.history:
            raise ValueError(
                f"recent_categories {self.recent_categories} must be between {SLOTS} and history ({self.history})"
            )
        if not 0 <= self.sequence <= self.history:
            raise ValueError(f"sequence {self.sequence} must be between 0 and history ({self.history})")

    def reach_ms(self, events: EventSettings) -> int:
        """The maximum age, relative to the newest event, of an event that a later row may still see, ms.

        It is the longest window, plus the allowed lateness of a click, plus how far ahead the newest event's time may
        be.
        """
        return 1000 * round(self.windows_s[-1] + events.max_age_s + events.max_future_s)

    @classmethod
    def from_settings(cls, settings: Settings) -> FeatureSpec:
        """Builds the spec from the sections `events` and `features` of the settings; SettingsError if it is invalid."""
        features = settings.features
        try:
            return cls(
                actions=tuple(settings.events.actions),
                windows_s=tuple(features.windows_s),
                half_lives_s=tuple(features.half_lives_s),
                history=features.history,
                recent_categories=features.recent_categories,
                sequence=features.sequence,
            )
        except ValueError as error:
            raise SettingsError(f"[features] or events.actions: {error}", "correct the setting") from None

    @cached_property
    def window_names(self) -> tuple[str, ...]:
        """Names of the F windows of one category."""
        return (
            *(f"count_{_span(window)}" for window in self.windows_s),
            *(f"decayed_{_span(life)}" for life in self.half_lives_s),
            "recency",
            "is_last",
            *(f"{action}_{_span(self.windows_s[-1])}" for action in self.actions),
            *(f"of_latest_{events}" for events in (FEW, MANY)),
            "follows",
        )

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the D features, in the order in which the kernel writes them."""
        windows = [_span(window) for window in self.windows_s]
        sums = [f"count_{window}" for window in windows]
        sums += [f"decayed_{_span(life)}" for life in self.half_lives_s]
        return (
            *(f"{action}.{name}" for action in self.actions for name in [*sums, "recency"]),
            *(f"{kind}.{name}" for kind in ("labelled", "positive") for name in sums),
            *(f"{kind}.distinct_{window}" for kind in ("labels", "items") for window in windows),
            *(f"labels.top_share_{window}" for window in windows),
            *(f"gap.{k + 1}" for k in range(GAPS)),
            *(f"session.{name}" for name in ("events", "age", "labels", "items")),
            "sessions.count",
            "last.same_label",
            f"last.switches_{SWITCHES}",
            "events.visible",
            "truncated",
            "events.oldest",
            "events.days",
            *(f"clock.{name}" for name in ("hour_sin", "hour_cos", "weekday_sin", "weekday_cos")),
            *(f"label.{slot + 1}.{name}" for slot in range(SLOTS) for name in self.window_names[:-OF_ORDER]),
        )

    @cached_property
    def tables(self) -> Tables:
        """The constants that the kernel reads."""
        ages = ages_of_steps(self.windows_s[-1] * 1000)

        def circle(points: int) -> NDArray[np.int64]:
            angles = [2 * math.pi * point / points for point in range(points)]
            pairs = [(1000 + round(1000 * math.sin(a)), 1000 + round(1000 * math.cos(a))) for a in angles]
            return np.array(pairs, np.int64)

        return Tables(
            windows_ms=np.array(self.windows_s, np.int64) * 1000,
            decay=np.ascontiguousarray(np.array([decay_column(life, ages) for life in self.half_lives_s], np.int64).T),
            recency=np.array([recency_step(age) for age in ages], np.int64),
            hour=circle(24),
            weekday=circle(7),
            actions=len(self.actions),
            history=self.history,
        )

    def empty(self, rows: int) -> Vector:
        """Empty arrays for `rows` rows, for a kernel to fill."""
        features, recent, windows, events = self._sizes
        return Vector(
            np.empty((rows, features), _U16),
            np.empty((rows, recent), _U64),
            np.empty((rows, recent, windows), _U16),
            np.empty((rows, events), _U64),
            np.empty((rows, events), _U64),
            np.empty((rows, events), _U16),
            np.empty((rows, events), _U16),
        )

    @cached_property
    def _sizes(self) -> tuple[int, int, int, int]:
        return len(self.names), self.recent_categories, len(self.window_names), self.sequence

    def to_json(self) -> dict[str, Any]:
        """The spec as JSON values, including the code version."""
        values = {name: _plain(value) for name, value in asdict(self).items()}
        # The name in the document is `labels`, so that digests written earlier stay the same.
        values["labels"] = values.pop("recent_categories")
        if not self.sequence:
            del values["sequence"]
        return {**values, "code": CODE}

    @classmethod
    def from_json(cls, values: dict[str, Any] | str) -> FeatureSpec:
        """Decodes the output of `to_json`, as values or as text.

        It raises ValueError if another code version wrote it, because its integers have another meaning.
        """
        document: dict[str, Any] = json.loads(values) if isinstance(values, str) else values
        if document["code"] != CODE:
            raise ValueError(
                f"feature spec of code version {document['code']}; this program computes version {CODE}; "
                "read it with the release that wrote it, or compute it again with this one"
            )
        return cls(
            actions=tuple(document["actions"]),
            windows_s=tuple(document["windows_s"]),
            half_lives_s=tuple(document["half_lives_s"]),
            history=document["history"],
            recent_categories=document["labels"],
            sequence=document.get("sequence", 0),
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 (hex) of the canonical JSON and of the names."""
        document = {**self.to_json(), "names": list(self.names)}
        return hashlib.sha256(json.dumps(document, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def vectorise_many(
    histories: Sequence[Events], at_ms: Sequence[int], mask: Mask, spec: FeatureSpec, users: Sequence[int]
) -> Vector:
    """Computes the rows of n users, each as of its own time in milliseconds: `[n, ...]` of each array.

    Each history is `[m]` EVENT in append order, of which only the last N events count. `users` are for masks that name some.
    """
    visible = [events[-spec.history :] for events in histories]
    if mask.users or mask.erased:
        visible = [_seen(events, user, mask, spec.history) for events, user in zip(histories, users, strict=True)]
    if len(visible) == 1:
        joined = words(visible[0])
        # A history from a store is read-only, for which the kernel would be compiled once more.
        if not joined.flags.writeable:
            joined = joined.copy()
        starts = np.array([0, len(joined)], _I64)
    else:
        # As words, because concatenating structured arrays is slow.
        joined = np.concatenate([words(events) for events in visible] or [words(np.empty(0, EVENT))])
        starts = np.array([0, *accumulate(map(len, visible))], _I64)
    rows = spec.empty(len(visible))
    _many_rows()(joined, starts, np.array(at_ms, _I64), tuple(spec.tables), tuple(mask.hidden), tuple(rows))
    return rows


@cache
def _many_rows() -> Callable[..., None]:
    # Imported late: using only a spec, its digest or names needs no compiler, which takes a second to load. Cached,
    # because an import statement takes as long as computing ten events.
    from state.features.kernel import many_rows

    return many_rows


def _seen(events: Events, user: int, mask: Mask, history: int) -> Events:
    if user in mask.users:
        return events[:0]
    visible: Events = events[~mask.erased.events(events, user)] if mask.erased else events
    return visible[-history:]
