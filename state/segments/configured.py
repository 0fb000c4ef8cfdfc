"""The segments that the settings name, read and checked."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from state.config.fields import fields_of
from state.config.settings import Settings
from state.errors import SettingsError
from state.features.spec import FeatureSpec
from state.segments.expression import Expression
from state.segments.grammar import Vocabulary, parse

MOST_SEGMENTS = 64
"""Each is a value of a metric's label, and is asked of each user who clicked."""
NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
SETTING = "segments.expressions"


class Segment(NamedTuple):
    """One segment: its name, its expression as the settings write it, and what that says."""

    name: str
    text: str
    expression: Expression


def texts_of(settings: Settings) -> dict[str, str]:
    """The expression of each segment by name, as they are written; nothing is checked.

    >>> from state.config.sections import SegmentSettings
    >>> texts_of(Settings(segments=SegmentSettings(expressions=("busy=view.count_1d >= 20",))))
    {'busy': 'view.count_1d >= 20'}
    """
    return {
        name.strip(): text.strip() for name, _, text in (one.partition("=") for one in settings.segments.expressions)
    }


def vocabulary(settings: Settings) -> Vocabulary:
    """What an expression may ask of a profile of this deployment."""
    wanted = settings.attributes
    return Vocabulary(
        features=FeatureSpec.from_settings(settings).names,
        attributes=tuple(one.name for one in fields_of(wanted.user_fields)) if wanted.user_topic else (),
        churn=bool(settings.churn.days),
    )


def segments_of(settings: Settings) -> Mapping[str, Segment]:
    """The segments by name, in their order; empty where none are wanted.

    Raises:
        SettingsError: One has no name, a name that another has, or an expression that is none; says the column.
    """
    written = settings.segments.expressions
    origin = settings.origins.get(SETTING, SETTING)
    if len(written) > MOST_SEGMENTS:
        raise SettingsError(f"{origin}: {len(written)} segments", f"name {MOST_SEGMENTS} at most")
    if not written:
        return {}
    known, found = vocabulary(settings), dict[str, Segment]()
    for one in written:
        name, equals, text = (part.strip() for part in one.partition("="))
        if not equals or NAME.fullmatch(name) is None:
            raise SettingsError(
                f"{origin}: segment {one[:80]!r} has no name",
                "write NAME = EXPRESSION; a name has 1 to 64 letters, digits, dashes and underscores",
            )
        if name in found:
            raise SettingsError(f"{origin}: two segments are called {name}", "give each a name of its own")
        try:
            found[name] = Segment(name, text, parse(text, known))
        except ValueError as error:
            raise SettingsError(f"{origin}: segment {name}, {error}", f"correct it: {text}") from None
    return found
