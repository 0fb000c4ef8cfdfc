"""Ownership of a shared registry's versions: the trainer with the newest claim owns them, even if others still run.

A claim is a file `trainers/<number>.json`, created exclusively. Before a trainer
sends anything, it checks for a claim newer than its own. A trainer that was
presumed dead stops there, like a fenced producer of Kafka. The version numbers
of a new owner begin far beyond any that the previous one may have used.
"""

from __future__ import annotations

import json

from state.disk.files import HOST
from state.errors import LockHeld
from state.places.place import FilePlace

FOLDER = "trainers"


def take(place: FilePlace, now_ms: int) -> int:
    """Claims the versions; returns the claim's number.

    Raises:
        UnusablePlace: The object store cannot be reached.
    """
    number = newest(place) + 1
    while not place.create(_name(number), json.dumps({"host": HOST, "at_ms": now_ms}).encode()):
        number += 1
    return number


def newest(place: FilePlace) -> int:
    """The number of the newest claim; 0 if there is none.

    Raises:
        UnusablePlace: The object store cannot be reached.
    """
    return max((int(name.partition(".")[0]) for name in place.names(FOLDER)), default=0)


def require_newest(place: FilePlace, own: int) -> None:
    """Checks with one request that the claim is still the newest one.

    Raises:
        LockHeld: Another trainer has claimed the versions since.
        UnusablePlace: The object store cannot be reached.
    """
    try:
        by = json.loads(place.read(_name(own + 1)))["host"]
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError):
        by = "another host"
    raise LockHeld(
        f"the registry at {place.told} has another trainer, on {by}",
        "stop one of the two; to train here again remove this host's registry directory: it is brought anew",
    )


def _name(number: int) -> str:
    return f"{FOLDER}/{number:08d}.json"
