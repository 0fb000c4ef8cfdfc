"""Settings that are possible alone and impossible together, as a rule names them."""

from __future__ import annotations

from typing import NamedTuple


class Conflict(NamedTuple):
    """Settings that cannot be so, why, and what to do where `why` does not say it."""

    names: tuple[str, ...]
    why: str
    do: str = ""
