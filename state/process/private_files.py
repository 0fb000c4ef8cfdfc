"""Keeps files with user data private to their owner, and files with a secret key."""

from __future__ import annotations

import hashlib
import logging
import os
import secrets
from pathlib import Path

from state.errors import SettingsError

OTHERS = 0o007
KEY_BYTES = 32
LEAST_KEY_BYTES = 16

logger = logging.getLogger(__name__)


def keep_private() -> None:
    """Sets the umask so that no other user can read new files of this process or its children.

    Each `main` calls it first.
    """
    os.umask(0o077)


def close_to_others(directory: Path) -> None:
    """Removes the permissions of other users from a directory that an earlier release made world-readable.

    A directory that its owner opened to a group keeps its mode, and so does a directory of another owner.
    """
    mode = directory.stat().st_mode & 0o777
    if mode & OTHERS and directory.stat().st_uid == os.getuid():
        directory.chmod(0o700)


def others_may(path: Path) -> bool:
    """Whether users other than this process's user may read or write a file that holds a secret.

    A file of root may be readable by its group if this process is in that group. Kubernetes mounts a secret this way
    for a user other than root, and no other user is in that group.
    """
    status = path.stat()
    mounted = status.st_uid == 0 and os.geteuid() != 0 and status.st_gid in {os.getegid(), *os.getgroups()}
    return bool(status.st_mode & (0o037 if mounted else 0o077))


def fingerprint(key: bytes) -> str:
    """The first 16 hexadecimal digits of a key's SHA-256, which may be stored and shown."""
    return hashlib.sha256(key).hexdigest()[:16]


def read_key(path: Path, subject: str) -> bytes:
    """Reads the key in a file. The content is hexadecimal; any other content is the key itself.

    Raises:
        SettingsError: The file cannot be read, or the key is too short.
    """
    try:
        content = path.read_bytes().strip()
    except OSError as error:
        raise SettingsError(
            f"{subject} at {path} cannot be read ({error.strerror})", "correct its access rights"
        ) from None
    try:
        key = bytes.fromhex(content.decode())
    except ValueError:
        key = content
    if len(key) < LEAST_KEY_BYTES:
        raise SettingsError(f"{subject} at {path} has {len(key)} bytes", f"it needs at least {LEAST_KEY_BYTES}")
    if others_may(path):
        logger.warning("%s at %s can be read by others; run chmod 600 on it", subject, path)
    return key


def make_key(path: Path) -> bool:
    """Creates a file with a new key. Returns False if another process created it first, whose key then counts."""
    path.parent.mkdir(parents=True, exist_ok=True)
    return create_secret(path, secrets.token_bytes(KEY_BYTES).hex())


def create_secret(path: Path, text: str) -> bool:
    """Creates a file of one line that only its owner can read, durably; False if another process created it first."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    # Does not use `state.disk.files`, because locks in that package use this module to keep directories private.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(handle, text.encode() + b"\n")
        os.fsync(handle)
    finally:
        os.close(handle)
    try:
        # Creating the link fails if another process created the file first.
        os.link(temporary, path)
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    return True
