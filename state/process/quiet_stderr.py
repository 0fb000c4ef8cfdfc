"""Filters the startup chatter of native libraries out of standard error."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

_TALK = re.compile(
    rb"WARNING: All log messages before absl::InitializeLog"
    rb"|[IWE]\d{4} \d\d:\d\d:\d\d\.\d+ |[IWE]0000 00:00:\d+\.\d+ "
    rb"|INFO: Created TensorFlow Lite"
    rb"|To enable the following instructions:"
    # The LiteRT converter prints these in addition to its exception, which contains all of it.
    rb"|loc\(.*error: |error: failed while converting|Some ops |(Custom|TF Select) ops: |Details:|\ttf\.\w+\(|\s*$"
)
_TURN = threading.Lock()


def is_talk(line: bytes) -> bool:
    """Whether a line is chatter."""
    return _TALK.match(line) is not None


def quiet_tensorflow(environment: MutableMapping[str, str]) -> None:
    """Lowers TensorFlow's log level and hides a missing GPU driver. Call it before TensorFlow is loaded."""
    environment.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        environment.setdefault("CUDA_VISIBLE_DEVICES", "-1")


def own_stderr() -> TextIO:
    """The current standard error as a stream that `quiet_stderr` does not hold back, for the process's own log."""
    return os.fdopen(os.dup(2), "w", buffering=1)


@contextmanager
def quiet_stderr() -> Iterator[None]:
    """Buffers the process's output to standard error inside the block, then writes all of it except the chatter."""
    sys.stderr.flush()
    # The descriptor belongs to the whole process, so threads take turns. A memory file works even on a full disk.
    with _TURN, os.fdopen(os.memfd_create("stderr"), "w+b") as buffer:
        descriptor = os.dup(2)
        os.dup2(buffer.fileno(), 2)
        try:
            yield
        finally:
            sys.stderr.flush()
            os.dup2(descriptor, 2)
            buffer.seek(0)
            for line in buffer:
                if not is_talk(line):
                    os.write(descriptor, line)
            os.close(descriptor)
