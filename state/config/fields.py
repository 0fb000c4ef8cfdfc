"""Parses attributes as `[attributes]` declares them: NAME, NAME=FIELD, NAME:log or NAME:10|50|100."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

LOG_EDGES = tuple(float(f"{digit}e{power}") for power in range(-3, 10) for digit in (1, 2, 5))
"""The edges of `:log`: 1, 2, 5, 10, 20, 50 and so on, from a thousandth to 5e9."""


@dataclass(frozen=True, slots=True)
class Field:
    """One attribute.

    Attributes:
        name: Its name in answers, metrics and settings.
        path: The field of the JSON object.
        edges: Ascending edges of a number's bands; empty if values are used as they are.
    """

    name: str
    path: str
    edges: tuple[float, ...] = ()


def field_of(written: str) -> Field:
    """Parses one attribute; another form raises ValueError.

    >>> field_of("age=ageBand")
    Field(name='age', path='ageBand', edges=())
    >>> field_of("price:10|50").edges
    (10.0, 50.0)
    """
    head, colon, edges = written.partition(":")
    name, equals, path = head.partition("=")
    if not re.fullmatch(r"\w+", name) or (equals and not path):
        raise ValueError(f"has {written!r}: write NAME, NAME=FIELD, NAME:log or NAME:10|50|100")
    if edges == "log":
        return Field(name, path or name, LOG_EDGES)
    try:
        bounds = tuple(float(edge) for edge in edges.split("|")) if colon else ()
    except ValueError:
        bounds = (math.nan,)
    if not all(map(math.isfinite, bounds)) or list(bounds) != sorted(set(bounds)):
        raise ValueError(f"has {written!r}: edges are ascending numbers, as in NAME:10|50|100, or NAME:log")
    return Field(name, path or name, bounds)


def fields_of(written: Sequence[str]) -> tuple[Field, ...]:
    """Parses the attributes of one side, in order."""
    return tuple(field_of(text) for text in written)
