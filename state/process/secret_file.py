"""A file with a secret key. It is created once with mode 0600, safely when several processes start at once."""

from __future__ import annotations

import hashlib
import logging
import secrets
from pathlib import Path

from state.disk import files as durable
from state.errors import SettingsError
from state.process.private_files import others_may

KEY_BYTES = 32
LEAST_KEY_BYTES = 16

logger = logging.getLogger(__name__)


def fingerprint(key: bytes) -> str:
    """The first 16 hexadecimal digits of a key's SHA-256, which may be stored and shown.

    >>> fingerprint(b"not a secret")
    '8f260a0b09492f08'
    """
    return hashlib.sha256(key).hexdigest()[:16]


def read(path: Path, what: str, setting: str) -> bytes:
    """Reads the key in a file. The content is hexadecimal; any other content is the key itself.

    Args:
        path: The file, which exists.
        what: What the key is called, for messages.
        setting: The setting that names the file.

    Raises:
        SettingsError: The file cannot be read, or the key is too short.
    """
    try:
        content = path.read_bytes().strip()
    except OSError as error:
        raise SettingsError(f"{what} at {path} cannot be read ({error.strerror})", f"correct {setting}") from None
    try:
        key = bytes.fromhex(content.decode())
    except ValueError:
        key = content
    if len(key) < LEAST_KEY_BYTES:
        raise SettingsError(f"{what} at {path} has {len(key)} bytes", f"it needs at least {LEAST_KEY_BYTES}")
    if others_may(path):
        logger.warning("%s at %s can be read by others; run chmod 600 on it", what, path)
    return key


def make(path: Path) -> bool:
    """Creates a file with a new key. Returns False if another process created it first; then that key counts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return durable.create(path, secrets.token_bytes(KEY_BYTES).hex().encode() + b"\n", durable.unique(path))
