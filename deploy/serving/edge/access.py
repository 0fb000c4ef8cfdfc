"""The TLS certificate and the tokens with which a worker authenticates clients."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from deploy.serving.edge.tls import Certificate
from deploy.serving.edge.tokens import Tokens, are_wanted
from state.config.settings import Settings
from state.errors import SettingsError
from state.process.said_once import SaidOnce

_log = logging.getLogger(__name__)


@dataclass
class Access:
    """The access control of a worker.

    Attributes:
        certificate: None without TLS.
        tokens: None if requests need no token.
    """

    certificate: Certificate | None = None
    tokens: Tokens | None = None
    _say: SaidOnce = field(default_factory=lambda: SaidOnce(_log.error), repr=False)

    @classmethod
    def of(cls, settings: Settings) -> Access:
        """Builds the access control from the settings.

        Raises:
            SettingsError: The files that the settings name cannot be used.
        """
        serving = settings.serving
        certificate = Certificate(Path(serving.tls_cert), Path(serving.tls_key)) if serving.tls_cert else None
        return cls(certificate, Tokens(settings.tokens_dir) if are_wanted(settings) else None)

    def look(self) -> None:
        """Reloads files that have changed; if the new ones cannot be used, the previous ones stay in effect."""
        for one in (self.certificate, self.tokens):
            if one is not None:
                try:
                    one.look()
                except SettingsError as error:
                    self._say(f"{error}; what was there before goes on")
