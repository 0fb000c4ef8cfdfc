"""The secret key of the noise. It is created at first use, and never again once versions were learned with it."""

from __future__ import annotations

import logging

from state.config.settings import Settings
from state.errors import SettingsError
from state.process import private_files

logger = logging.getLogger(__name__)


def own_key(settings: Settings) -> bytes:
    """The key of a state directory. Only its fingerprint may be shown.

    Raises:
        SettingsError: It is missing, cannot be read, or is too short.
    """
    path = settings.privacy_key_path
    if not path.exists():
        if settings.privacy_ledger_path.exists():
            raise SettingsError(
                f"there is no key of the noise at {path}, and versions were learned with one",
                "restore the file, or set privacy.key_file to where it is",
            )
        if private_files.make_key(path):
            logger.warning(
                "made a new key of the noise at %s: keep a copy, for without it no version can be verified", path
            )
    return private_files.read_key(path, "the key of the noise", "privacy.key_file")
