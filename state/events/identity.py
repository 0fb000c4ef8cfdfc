"""Ids of 64 bits: pseudonyms of users under a secret salt, and plain hashes of everything else.

Two of 1e8 ids collide with probability below 3e-4. 0 means "none"; a hash of 0 becomes 1. An id may be text or an
integer: 7 and "7" are the same.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from state import layout
from state.config.settings import Settings
from state.errors import MissingSalt, SettingsError
from state.process import private_files

_BLOCK_BYTES = 64  # block size of SHA-256
_STDIN = Path("-")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Salt:
    """The secret key of the pseudonyms; it is never printed."""

    key: bytes = field(repr=False)

    @property
    def fingerprint(self) -> str:
        """The first 16 hexadecimal digits of the key's SHA-256, which may be stored and shown."""
        return private_files.fingerprint(self.key)


def _first_64(digest: bytes) -> int:
    return int.from_bytes(digest[:8], "big") or 1


def user_id(salt: Salt, user: str | int) -> int:
    """The pseudonym of a user."""
    return _first_64(hmac.digest(salt.key, str(user).encode(), "sha256"))


def pseudonyms(salt: Salt) -> Callable[[str | int], int]:
    """`user_id` with one salt, for many users: the key is hashed once (HMAC, RFC 2104)."""
    key = salt.key if len(salt.key) <= _BLOCK_BYTES else hashlib.sha256(salt.key).digest()
    padded = key.ljust(_BLOCK_BYTES, b"\0")
    inner, outer = (hashlib.sha256(bytes(byte ^ pad for byte in padded)) for pad in (0x36, 0x5C))

    def pseudonym(user: str | int) -> int:
        inside, outside = inner.copy(), outer.copy()
        inside.update(str(user).encode())
        outside.update(inside.digest())
        return _first_64(outside.digest())

    return pseudonym


def public_id(text: str | int) -> int:
    """The id of an item or a category."""
    return _first_64(hashlib.sha256(str(text).encode()).digest())


def context_text(value: str | int | float | bool) -> str:
    """The text of a context value, as JSON writes it without quotes."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def context_id(name: str, text: str) -> int:
    """The id of one value of a context field."""
    return public_id(f"{name}={text}")


def own_salt(settings: Settings) -> Salt:
    """The salt of a state directory, see `load_salt`; created at the first start, but not if users are stored there."""
    return load_salt(settings.salt_path, create=not layout.has_users(settings.state_dir, settings.registry_dir))


def fingerprint_at(path: Path) -> str | None:
    """The fingerprint of the salt in a file; None if the file is missing or cannot be read."""
    try:
        return load_salt(path, create=False).fingerprint
    except (MissingSalt, SettingsError):
        return None


def load_salt(path: Path, create: bool = True) -> Salt:
    """Reads or creates the salt; safe for several processes at once.

    The file holds the key in hexadecimal; any other content is the key itself.

    Raises:
        MissingSalt: The file is missing and may not be created.
        SettingsError: The file cannot be read, or the key is too short.
    """
    if not path.exists():
        if not create:
            raise MissingSalt.at(path)
        if private_files.make_key(path):
            logger.warning(
                "made a new salt at %s: keep a copy, for without it stored users cannot be found again", path
            )
    return Salt(private_files.read_key(path, "the salt"))


def ids_in(file: Path, option: str) -> list[str]:
    """The ids in a file with one a line, each once; `-` reads standard input.

    Raises:
        SettingsError: The file cannot be read. The message names `option` and never quotes the file.
    """
    try:
        text = sys.stdin.read() if file == _STDIN else file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problem = error.strerror if isinstance(error, OSError) else "it is no UTF-8 text"
        raise SettingsError(
            f"{option} {file}: not readable ({problem})", "give a UTF-8 file with one id a line"
        ) from None
    return list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))


PREFIX = "springtide-probe-"
SLOTS = 512
"""The number of probe users: large enough that each is reused rarely, and small enough for a store."""


def probe_user(number: int) -> str:
    """The raw id of a probe user."""
    return f"{PREFIX}{number % SLOTS}"


def is_probe_user(user: object) -> bool:
    """Whether a raw id belongs to a probe user."""
    return type(user) is str and user.startswith(PREFIX)
