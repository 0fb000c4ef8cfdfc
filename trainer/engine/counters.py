"""What a trainer counts over its steps."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Counters:
    """What a trainer did since its epoch began from nothing; part of each version.

    Attributes:
        steps: Steps taken, skipped ones included.
        trained: Rows learned from.
        skipped: Rows of skipped steps.
        log_ms: Newest log time seen, ms.
        event_time_ms: Newest event time learned from, ms.
        expired_hour: Hour of log time of the last expiry.
    """

    steps: int = 0
    trained: int = 0
    skipped: int = 0
    log_ms: int = 0
    event_time_ms: int = 0
    expired_hour: int = 0
