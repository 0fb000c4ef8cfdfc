"""Who may ask what: a file of tokens for each role, which only its owner reads, made at the first start.

`read` may ask for answers; `operate` for those, for metrics, and for whatever
changes something. A request carries its token as `Authorization: Bearer TOKEN`,
over HTTP and gRPC alike. A file has a token a line, so that a new one can be
given out before the old one is taken away; what changed counts within a second.
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
"""What everybody may ask, and the two roles: `operate` may do what `read` may."""

_BYTES = 32
_LEAST_LENGTH = 16
_SCHEME = "bearer "


class Tokens:
    """The tokens of a host.

    Args:
        folder: With a file a role.

    Raises:
        SettingsError: A file is not there, others can read it, or it has no token.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = WatchedFiles([folder / role for role in (READ, OPERATE)])
        self._roles = self._load()

    def look(self) -> None:
        """Loads the files again where they are others than before.

        Raises:
            SettingsError: They cannot be used; the tokens of before go on.
        """
        if self._files.changed():
            self._roles = self._load()

    def require(self, authorization: str | None, role: str) -> None:
        """Lets through who may ask for what this role may.

        Args:
            authorization: The header, if there is one.
            role: `OPEN`, `READ` or `OPERATE`.

        Raises:
            Unauthorized: There is no token, or none of ours.
            Forbidden: It is one of `read`, and this needs `operate`.
        """
        if role == OPEN:
            return
        if authorization is None or authorization[: len(_SCHEME)].lower() != _SCHEME:
            raise Unauthorized("this needs a token", "send `Authorization: Bearer TOKEN`")
        # Digests are looked up, so that how long it takes says nothing of the tokens.
        found = self._roles.get(_digest(authorization[len(_SCHEME) :].strip()))
        if found is None:
            raise Unauthorized("this token is none of this host's", "send one of its tokens")
        if role == OPERATE and found != OPERATE:
            raise Forbidden("this token may read only", "send one of the role operate")

    def _load(self) -> dict[bytes, str]:
        # The last one counts where a token has both roles.
        return {_digest(token): role for role in (READ, OPERATE) for token in tokens_in(self._folder / role)}


def are_wanted(settings: Settings, host: str | None = None) -> bool:
    """Whether requests need tokens: by `serving.tokens`, and with `auto` where others than this machine reach the port.

    Args:
        settings: Of the system.
        host: The address that the port listens on; None: that of the answers.

    >>> are_wanted(Settings()), are_wanted(Settings(), "0.0.0.0")
    (False, True)
    """
    serving = settings.serving
    if serving.tokens != "auto":
        return serving.tokens == "on"
    return not is_loopback(serving.host if host is None else host)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a port at that address.

    >>> is_loopback("127.0.0.1"), is_loopback("localhost"), is_loopback("0.0.0.0")
    (True, True, False)
    """
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def tokens_in(path: Path) -> list[str]:
    """The tokens of a file.

    Raises:
        SettingsError: It is not there, others can read it, or one is too short or there is none.
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
    """Makes the files that are not there yet, each with a token of its own; several processes may do so at once.

    Returns:
        Those that were made.
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
            # A link fails where another process was first; its token counts.
            os.link(temporary, path)
            made.append(path)
        except FileExistsError:
            pass
        finally:
            temporary.unlink()
    return made


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
