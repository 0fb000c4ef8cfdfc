"""Bearer tokens of serving: one file of tokens per role, readable only by its owner, created at the first start.

The role `read` may request answers. The role `operate` may also request metrics
and every operation that changes something. A request carries its token as
`Authorization: Bearer TOKEN`, over HTTP and gRPC alike. A file has one token per
line, so a new token can be issued before the old one is revoked. A change takes
effect within a second.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import secrets
from pathlib import Path

from deploy.serving.edge.watched_files import WatchedFiles
from state.config.settings import Settings
from state.errors import Forbidden, SettingsError, Unauthorized
from state.process.private_files import others_may

OPEN, READ, OPERATE = "", "read", "operate"
"""The level that needs no token, and the two roles; `operate` includes `read`."""

_BYTES = 32
_LEAST_LENGTH = 16
_SCHEME = "bearer "


class Tokens:
    """The tokens of a host.

    Args:
        folder: The directory with one file per role.

    Raises:
        SettingsError: A file is missing, other users can read it, or it has no valid tokens.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = WatchedFiles([folder / role for role in (READ, OPERATE)])
        self._roles = self._load()

    def look(self) -> None:
        """Reloads the files if they have changed.

        Raises:
            SettingsError: They cannot be used; the previous tokens stay in effect.
        """
        if self._files.changed():
            self._roles = self._load()

    def require(self, authorization: str | None, role: str) -> None:
        """Checks that a request has the given role.

        Args:
            authorization: The `Authorization` header, if there is one.
            role: `OPEN`, `READ` or `OPERATE`.

        Raises:
            Unauthorized: The token is missing or unknown.
            Forbidden: The token has the role `read`, but the request needs `operate`.
        """
        if role == OPEN:
            return
        if authorization is None or authorization[: len(_SCHEME)].lower() != _SCHEME:
            raise Unauthorized("this needs a token", "send `Authorization: Bearer TOKEN`")
        # Look up digests, so that the time of the lookup reveals nothing about the tokens.
        found = self._roles.get(_digest(authorization[len(_SCHEME) :].strip()))
        if found is None:
            raise Unauthorized("this token is none of this host's", "send one of its tokens")
        if role == OPERATE and found != OPERATE:
            raise Forbidden("this token may read only", "send one of the role operate")

    def _load(self) -> dict[bytes, str]:
        # If a token is in both files, the last role wins: `operate`.
        return {_digest(token): role for role in (READ, OPERATE) for token in tokens_in(self._folder / role)}


def are_wanted(settings: Settings, host: str | None = None) -> bool:
    """Whether requests need tokens: `serving.tokens` decides; `auto` requires them unless the address is loopback.

    Args:
        settings: The system's settings.
        host: The address that the port listens on; None for `serving.host`.

    >>> are_wanted(Settings()), are_wanted(Settings(), "0.0.0.0")
    (False, True)
    """
    serving = settings.serving
    if serving.tokens != "auto":
        return serving.tokens == "on"
    return not is_loopback(serving.host if host is None else host)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a port at this address.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def tokens_in(path: Path) -> list[str]:
    """Reads the tokens of a file.

    Raises:
        SettingsError: The file is missing, other users can read it, it is empty, or a token is too short.
    """
    try:
        readable = others_may(path)
        found = path.read_text("ascii").split()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "no text"
        raise SettingsError(f"the tokens at {path} cannot be read ({why})", "correct serving.tokens_dir") from None
    if readable:
        raise SettingsError(f"others can read the tokens at {path}", f"chmod 600 {path}")
    if not found or any(len(one) < _LEAST_LENGTH for one in found):
        raise SettingsError(
            f"{path} has no token, or one of less than {_LEAST_LENGTH} characters",
            "write one a line, or remove the file: a start makes a new one",
        )
    return found


def make_missing(folder: Path) -> list[Path]:
    """Creates the missing files, each with a new token; safe for several processes at once.

    Returns:
        The files that were created.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    made = []
    for role in (READ, OPERATE):
        path = folder / role
        if path.exists():
            continue
        temporary = path.with_name(f".{role}.{secrets.token_hex(8)}")
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(handle, secrets.token_urlsafe(_BYTES).encode() + b"\n")
            os.fsync(handle)
        finally:
            os.close(handle)
        try:
            # The link fails if another process was first; then its token is valid.
            os.link(temporary, path)
            made.append(path)
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    return made


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
