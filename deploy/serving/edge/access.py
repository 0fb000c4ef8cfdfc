"""How a host lets clients in: with which certificate, and with which tokens."""

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
    """What a worker checks at its door.

    Attributes:
        certificate: None without TLS.
        tokens: None where requests need none.
    """

    certificate: Certificate | None = None
    tokens: Tokens | None = None
    _say: SaidOnce = field(default_factory=lambda: SaidOnce(_log.error), repr=False)

    @classmethod
    def of(cls, settings: Settings) -> Access:
        """As the settings have it.

        Raises:
            SettingsError: The files that they name cannot be used.
        """
        serving = settings.serving
        certificate = Certificate(Path(serving.tls_cert), Path(serving.tls_key)) if serving.tls_cert else None
        return cls(certificate, Tokens(settings.tokens_dir) if are_wanted(settings) else None)

    def look(self) -> None:
        """Takes up files that have changed; those of before go on where the new ones cannot be used."""
        for one in (self.certificate, self.tokens):
            if one is not None:
                try:
                    one.look()
                except SettingsError as error:
                    self._say(f"{error}; what was there before goes on")
