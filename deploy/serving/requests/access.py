"""Authenticates clients of a worker: its TLS certificate, and bearer tokens; both are reloaded when their files change.

Each role has a file of tokens, one per line, readable only by its owner and created at the first start.
"""

from __future__ import annotations

import hashlib
import ipaddress
import logging
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from state.config.settings import Settings
from state.errors import Forbidden, SettingsError, Unauthorized
from state.process.log_lines import SaidOnce
from state.process.private_files import make_key, others_may

OPEN, READ, OPERATE = "", "read", "operate"
"""The level that needs no token, and the two roles; `operate` includes `read`."""

_LEAST_LENGTH = 16
_SCHEME = "bearer "
_log = logging.getLogger(__name__)


class _WatchedFiles:
    """Files that are loaded again when they are replaced or modified."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._seen = self._states()
        self._load()

    def reload(self) -> None:
        """Reloads the files if they have changed.

        If they cannot be used, raises SettingsError, and the previous content stays in effect.
        """
        before, self._seen = self._seen, self._states()
        if before != self._seen:
            self._load()

    def _load(self) -> None:
        raise NotImplementedError

    def _states(self) -> list[tuple[int, int, int] | None]:
        states: list[tuple[int, int, int] | None] = []
        for path in self._paths:
            try:
                status = path.stat()
                states.append((status.st_ino, status.st_mtime_ns, status.st_size))
            except OSError:
                states.append(None)
        return states


class Certificate(_WatchedFiles):
    """A certificate with its private key.

    Args:
        cert: PEM file of the certificate and its intermediate certificates.
        key: PEM file of the key.

    Attributes:
        context: For HTTP; new connections use the certificate that was loaded last.
        pem: The key and certificate that were loaded last.

    Raises:
        SettingsError: The files cannot be read, or do not match.
    """

    def __init__(self, cert: Path, key: Path) -> None:
        self._cert, self._key = cert, key
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.set_alpn_protocols(["http/1.1"])
        super().__init__((cert, key))

    def _load(self) -> None:
        try:
            cert, key = self._cert.read_bytes(), self._key.read_bytes()
            # Try a separate context first: a load that fails halfway would leave a certificate without its key.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self._cert, self._key)
        except (OSError, ssl.SSLError) as error:
            raise SettingsError(
                f"serving.tls_cert {self._cert} and serving.tls_key {self._key} cannot be used: {error}",
                "give a PEM certificate and the PEM key that it was made with",
            ) from None
        self.context.load_cert_chain(self._cert, self._key)
        self.pem = key, cert


def trusting(certificate: Path | str) -> ssl.SSLContext:
    """Returns a client's context that trusts a server's own certificate, with any issuer and name.

    Raises:
        OSError: The certificate cannot be read.
    """
    context = ssl.create_default_context(cafile=certificate)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


class Tokens(_WatchedFiles):
    """The tokens of a host, from a directory with one file per role.

    Raises:
        SettingsError: A file is missing, other users can read it, or it has no valid tokens.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        super().__init__([folder / role for role in (READ, OPERATE)])

    def require(self, authorization: str | None, role: str) -> None:
        """Checks that the `Authorization` header, if any, has the given role (`OPEN`, `READ` or `OPERATE`).

        Raises:
            Unauthorized: The token is missing or unknown.
            Forbidden: The token has the role `read`, but the request needs `operate`.
        """
        if role == OPEN:
            return
        if authorization is None or authorization[: len(_SCHEME)].lower() != _SCHEME:
            raise Unauthorized("this needs a token", "send `Authorization: Bearer TOKEN`")
        # Look up digests, so that the time of the lookup reveals nothing about the tokens.
        granted = self._roles.get(_digest(authorization[len(_SCHEME) :].strip()))
        if granted is None:
            raise Unauthorized("this host does not know this token", "send a token of this host")
        if role == OPERATE and granted != OPERATE:
            raise Forbidden("this token may read only", "send one of the role operate")

    def _load(self) -> None:
        # If a token is in both files, the last role wins: `operate`.
        self._roles = {_digest(token): role for role in (READ, OPERATE) for token in tokens_in(self._folder / role)}


def _digest(token: str) -> bytes:
    return hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()


@dataclass
class Access:
    """The access control of a worker; `certificate` is None without TLS, `tokens` if requests need none."""

    certificate: Certificate | None = None
    tokens: Tokens | None = None
    _log_once: SaidOnce = field(default_factory=lambda: SaidOnce(_log.error), repr=False)

    @classmethod
    def of(cls, settings: Settings, always: bool = False) -> Access:
        """Builds the access control from the settings; `always`: requests need tokens, whatever the settings want.

        Raises:
            SettingsError: The files that the settings name cannot be used.
        """
        serving = settings.serving
        certificate = Certificate(Path(serving.tls_cert), Path(serving.tls_key)) if serving.tls_cert else None
        return cls(certificate, Tokens(settings.tokens_dir) if always or are_wanted(settings) else None)

    def reload(self) -> None:
        """Reloads files that have changed; if the new ones cannot be used, the previous ones stay in effect."""
        for files in (self.certificate, self.tokens):
            if files is not None:
                try:
                    files.reload()
                except SettingsError as error:
                    self._log_once(f"{error}; the previous content stays in effect")


def are_wanted(settings: Settings, host: str | None = None) -> bool:
    """Whether requests need tokens: `serving.tokens` decides; `auto` requires them unless the address is loopback.

    `host` is the address that the port listens on; None for `serving.host`.

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
        tokens = path.read_text("ascii").split()
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "no text"
        raise SettingsError(f"the tokens at {path} cannot be read ({why})", "correct serving.tokens_dir") from None
    if readable:
        raise SettingsError(f"others can read the tokens at {path}", f"chmod 600 {path}")
    if not tokens or any(len(token) < _LEAST_LENGTH for token in tokens):
        raise SettingsError(
            f"{path} has no token, or one of less than {_LEAST_LENGTH} characters",
            "write one a line, or remove the file: a start makes a new one",
        )
    return tokens


def make_missing(folder: Path) -> list[Path]:
    """Creates the missing files, each with a new token, and returns them; safe for several processes at once."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    paths = [folder / role for role in (READ, OPERATE)]
    created = [path for path in paths if not path.exists() and make_key(path)]
    for path in created:
        _log.warning("created a token, which clients need: %s", path)
    return created
