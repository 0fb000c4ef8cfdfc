"""The TLS certificate of a serving host, reloaded from its files without a restart when they change."""

from __future__ import annotations

import ssl
from pathlib import Path

from deploy.serving.edge.watched_files import WatchedFiles
from state.errors import SettingsError


class Certificate:
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
        self._files = WatchedFiles((cert, key))
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.minimum_version = ssl.TLSVersion.TLSv1_2
        self.context.set_alpn_protocols(["http/1.1"])
        self._load()

    def look(self) -> None:
        """Reloads the files if they have changed.

        Raises:
            SettingsError: They cannot be used; the previous certificate stays in effect.
        """
        if self._files.changed():
            self._load()

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
