"""URLs of the operator's own serving processes, with the token and the certificate that a request needs."""

from __future__ import annotations

import ssl
import urllib.request
from pathlib import Path
from typing import Self

from deploy.serving.requests.access import OPERATE, are_wanted, tokens_in
from state.config.settings import Settings


class Address(str):
    """A URL with its credentials; their files are read at each request, because they can change.

    Args:
        token_file: File with the token to send; None if none is needed.
        certificate: File with the server's certificate; None without TLS.
    """

    token_file: Path | None
    certificate: Path | None

    def __new__(cls, url: str, token_file: Path | None = None, certificate: Path | None = None) -> Self:
        """Creates the string with its attributes."""
        address = super().__new__(cls, url)
        address.token_file, address.certificate = token_file, certificate
        return address

    def request(self) -> urllib.request.Request:
        """Returns a GET request with the token.

        Raises:
            SettingsError: The token cannot be read.
        """
        headers = {} if self.token_file is None else {"authorization": f"Bearer {tokens_in(self.token_file)[0]}"}
        return urllib.request.Request(self, headers=headers)

    def context(self) -> ssl.SSLContext | None:
        """Returns a context that trusts the server's own certificate, with any issuer and name; None without TLS.

        Raises:
            OSError: The certificate cannot be read.
        """
        if self.certificate is None:
            return None
        context = ssl.create_default_context(cafile=self.certificate)
        context.check_hostname = False
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
        return context


def reached(host: str) -> str:
    """Returns the form of a listening host in a client's URL; wildcard addresses become loopback.

    >>> reached("0.0.0.0"), reached("::1"), reached("stream")
    ('127.0.0.1', '[::1]', 'stream')
    """
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)


def address(settings: Settings, host: str, port: int, path: str = "") -> Address:
    """Returns the address of a Springtide port on this machine; all ports share the tokens and the certificate.

    >>> address(Settings(), "0.0.0.0", 8502)
    'http://127.0.0.1:8502'
    """
    serving = settings.serving
    scheme, certificate = ("https", Path(serving.tls_cert)) if serving.tls_cert else ("http", None)
    token_file = settings.tokens_dir / OPERATE if are_wanted(settings, host) else None
    return Address(f"{scheme}://{reached(host)}:{port}{path}", token_file, certificate)


def serving_address(settings: Settings, path: str = "") -> Address:
    """Returns the address of serving on this machine."""
    return address(settings, settings.serving.host, settings.serving.port, path)


def console_address(settings: Settings, path: str = "") -> Address:
    """Returns the address of the page on this machine."""
    page = address(settings, settings.console.host, settings.console.port, path)
    # The page shows serving's answers too, so it requires a token if either of them does.
    token_file = settings.tokens_dir / OPERATE if are_wanted(settings) else page.token_file
    return Address(page, token_file, page.certificate)
