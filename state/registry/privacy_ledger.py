"""What of the privacy budget is spent: the periods that training began, beside the versions and older than none of them.

It is no part of a version. A version that is gone back to knows nothing of what
was told since, and whoever saw that does not forget it: so the ledger only grows.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec

from state.disk import files as durable
from state.errors import RegistryError


@dataclass(frozen=True, slots=True)
class PrivacyPeriod:
    """A period in which training took part in the budget.

    Attributes:
        epoch: Of control: what is learned again in another one is told again.
        number: Of unit user the log time over the length of a period; else 0.
        updates: In how many updates one unit may be, at most.
        noise: Standard deviation of the noise over the clipping bound.
    """

    epoch: int
    number: int
    updates: int
    noise: float


@dataclass(frozen=True, slots=True)
class PrivacyLedger:
    """All of it.

    Attributes:
        key: Fingerprint of the key of the noise.
        unit: What is hidden: user or example.
        periods: That were begun, in their order.
        epsilon: The budget, as the trainer's settings say.
        delta: Likewise.
        spent: Epsilon of all periods together, at that delta.
        held: Whether training holds, for the next period would take more than is left.
    """

    key: str
    unit: str
    periods: tuple[PrivacyPeriod, ...] = ()
    epsilon: float = 0.0
    delta: float = 0.0
    spent: float = 0.0
    held: bool = False


def encode(ledger: PrivacyLedger) -> bytes:
    """As JSON.

    >>> decode(encode(PrivacyLedger("1f", "user", (PrivacyPeriod(1, 7, 8, 2.5),))), "there").periods[0].noise
    2.5
    """
    return json.dumps(asdict(ledger), indent=1, sort_keys=True).encode() + b"\n"


def decode(data: bytes, where: str) -> PrivacyLedger:
    """What `encode` made.

    Args:
        data: The bytes.
        where: Names them, for messages.

    Raises:
        RegistryError: They are damaged.
    """
    try:
        return msgspec.json.decode(data, type=PrivacyLedger)
    except msgspec.DecodeError as error:
        raise RegistryError(
            f"the ledger of the privacy budget at {where} cannot be read ({error})", "restore it from a backup"
        ) from None


def read(path: Path) -> PrivacyLedger | None:
    """The ledger in a file; None where there is none.

    Raises:
        RegistryError: It is damaged.
        OSError: The disk refused.
    """
    try:
        return decode(path.read_bytes(), str(path))
    except FileNotFoundError:
        return None


def write(path: Path, ledger: PrivacyLedger) -> None:
    """Replaces the ledger; durable when it returns. One writer: the trainer, under its lock.

    Raises:
        OSError: The disk refused.
    """
    path.parent.mkdir(exist_ok=True)
    durable.replace(path, encode(ledger))
