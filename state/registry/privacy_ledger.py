"""The privacy ledger: which periods were charged, and how much of the log may have been learned."""

from __future__ import annotations

from pathlib import Path

import msgspec

from state.disk import documents
from state.errors import RegistryError
from state.registry.directory import Directory

FORMAT = 2

MOST_LINES = 64
"""Number of lines that a period remembers; a forgotten line is charged again when it returns."""


class PrivacyPeriod(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A charge for one period, in which one unit takes part in a bounded number of updates.

    Attributes:
        epoch: Control's epoch.
        number: For unit user, log time divided by the length of a period; else 0.
        updates: Maximum number of updates in which one unit takes part.
        noise: Standard deviation of the noise divided by the clipping bound.
        lines: The lines that the charge covers, oldest first; see `trainer/privacy.py`.
    """

    epoch: int
    number: int
    updates: int
    noise: float
    lines: tuple[str, ...] = ()


class PrivacyLedger(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """All charges, and the state of the budget.

    Attributes:
        key: Fingerprint of the noise key.
        epsilon: The budget in the trainer's settings, at `delta`.
        spent: Epsilon of all charges together, at `delta`.
        held: Whether training is held, because the next charge exceeds the budget.
        source: Topic id and partition of the training log to which `through` belongs.
        through: Records before this offset may have been learned; records from this offset on were not.
    """

    key: str
    unit: str
    periods: tuple[PrivacyPeriod, ...] = ()
    epsilon: float = 0.0
    delta: float = 0.0
    spent: float = 0.0
    held: bool = False
    source: str = ""
    through: int = 0
    format: int = FORMAT


def is_charged(ledger: PrivacyLedger, period: PrivacyPeriod) -> bool:
    """Whether a charge covers the line of `period`."""
    return any(_same_terms(charge, period) and set(period.lines) <= set(charge.lines) for charge in ledger.periods)


def charged(ledger: PrivacyLedger, period: PrivacyPeriod, again: bool) -> PrivacyLedger:
    """Adds a charge that covers the line of `period`.

    A line may extend the newest charge at no cost if none of the following records was learned before.

    >>> first = charged(PrivacyLedger("1f", "user"), PrivacyPeriod(1, 7, 8, 2.5, ("a",)), again=False)
    >>> onward = charged(first, PrivacyPeriod(1, 7, 8, 2.5, ("b",)), again=False)
    >>> [one.lines for one in onward.periods]
    [('a', 'b')]
    >>> [one.lines for one in charged(onward, PrivacyPeriod(1, 7, 8, 2.5, ("c",)), again=True).periods]
    [('a', 'b'), ('c',)]

    Args:
        ledger: A ledger that does not cover it.
        period: A period with one line.
        again: Whether the following records may have been learned before.
    """
    *before, last = ledger.periods or (None,)
    if last is None or again or not _same_terms(last, period):
        return msgspec.structs.replace(ledger, periods=(*ledger.periods, period))
    longer = msgspec.structs.replace(last, lines=(*last.lines, *period.lines)[-MOST_LINES:])
    return msgspec.structs.replace(ledger, periods=(*before, longer))


def read(path: Path) -> PrivacyLedger | None:
    """Reads a ledger; None if the file does not exist.

    Raises:
        RegistryError: It is damaged, or a later release wrote it.
        OSError: The disk refused.
    """
    try:
        ledger = documents.decode(path.read_bytes(), PrivacyLedger)
        if ledger.format != FORMAT:
            raise ValueError(f"its format is {ledger.format}, this release reads {FORMAT}")
        return ledger
    except FileNotFoundError:
        return None
    except (msgspec.DecodeError, ValueError) as error:
        raise RegistryError(
            f"the ledger of the privacy budget at {path} cannot be read ({error})", "restore it from a backup"
        ) from None


def write(directory: Directory, path: Path, ledger: PrivacyLedger) -> None:
    """Replaces the ledger; durable when it returns. One writer: the trainer, under its lock.

    Raises:
        OSError: The disk refused.
    """
    path.parent.mkdir(exist_ok=True)
    directory.replace(path, msgspec.json.format(msgspec.json.encode(ledger, order="sorted"), indent=1) + b"\n")


def _same_terms(period: PrivacyPeriod, other: PrivacyPeriod) -> bool:
    return msgspec.structs.replace(period, lines=()) == msgspec.structs.replace(other, lines=())
