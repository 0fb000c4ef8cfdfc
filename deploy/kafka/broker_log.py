"""Reads the broker's own log: whether it takes requests, and its last words."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from deploy.kafka.java import QUOTED_LINES
from state.errors import KafkaFailed

FULL_BYTES = 1 << 20


def text_from(path: Path, start: int) -> str:
    """A file's text from byte `start` on; negative counts from its end."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            # A log shorter than before was rolled: all of it is new.
            file.seek(max(0, size + start) if start < 0 else start if start <= size else 0)
            return file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return ""


def last_words(what: str, directory: Path, port: int, logs: Sequence[Path]) -> KafkaFailed:
    """Why a broker ended, and what to do.

    Args:
        what: What happened, such as `ended with status 1`.
        directory: Of the broker.
        port: Of the broker.
        logs: Its logs, the one that has all of it last.
    """
    lines = [line for path in logs for line in text_from(path, -20_000).splitlines()]
    text = "\n".join(lines)
    if "No space left on device" in text or shutil.disk_usage(directory).free < FULL_BYTES:
        advice = f"the disk of {directory} is full, free some space"
    elif "Address already in use" in text:
        advice = f"port {port} was taken meanwhile, set kafka.port to a free one"
    else:
        advice = "the whole log has more"
    telling = [line for line in lines if "ERROR" in line or "FATAL" in line or "Exception" in line]
    quoted = " | ".join((telling or lines)[-QUOTED_LINES:])
    return KafkaFailed(f"Kafka {what}", f"{advice} ({logs[-1]}): {quoted}")
