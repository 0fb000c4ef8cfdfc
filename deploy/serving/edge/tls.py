"""The certificate of a serving host: read from its files, and again when they change, without a restart."""

from __future__ import annotations

import ssl
from pathlib import Path

from deploy.serving.edge.watched_files import WatchedFiles
from state.errors import SettingsError


class Certificate:
    """A certificate with its key.

    Args:
        cert: PEM file of the certificate and those between it and its authority.
        key: PEM file of the key.

    Attributes:
        context: For HTTP; connections from now on use what was loaded last.
        pem: Key and certificate, loaded last.

    Raises:
        SettingsError: They cannot be read, or do not belong together.
    """

    def __init__(self, cert: Path, key: Path) -> None:
        self._cert, self._key = cert, key
        self._files = WatchedFiles((cert, key))
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.set_alpn_protocols(["http/1.1"])
        self._load()

    def look(self) -> None:
        """Loads the files again where they are others than before.

        Raises:
            SettingsError: They cannot be used; the certificate of before goes on.
        """
        if self._files.changed():
            self._load()

    def _load(self) -> None:
        try:
            cert, key = self._cert.read_bytes(), self._key.read_bytes()
            # Tried apart first: a context that failed halfway would have the one without the other.
            ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(self._cert, self._key)
        except (OSError, ssl.SSLError) as error:
            raise SettingsError(
                f"serving.tls_cert {self._cert} and serving.tls_key {self._key} cannot be used: {error}",
                "give a PEM certificate and the PEM key that it was made with",
            ) from None
        self.context.load_cert_chain(self._cert, self._key)
        self.pem = key, cert
