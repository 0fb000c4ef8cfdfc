"""Outcomes of rollbacks, one file for each epoch and part next to control. Each is written once and never changes."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from state import layout
from state.disk import files as durable
from state.errors import CorruptVersion
from state.registry import sealed
from state.registry.directory import Directory, file_bytes, usable

Part = Literal["planned", "answered", "learned"]
"""Part of an outcome.

planned   what the command counted
answered  what the command saw once serving had switched
learned   what the trainer saw once it had caught up
"""


class Outcomes(Directory):
    """The outcomes stored in one registry directory."""

    def __init__(self, path: Path, *folders: str) -> None:
        super().__init__(path, *folders, layout.OUTCOMES)

    def add_outcome(self, epoch: int, part: Part, document: Mapping[str, Any]) -> bool:
        """Stores a part of the outcome of the rollback that began `epoch`, durably; False if it exists already.

        Raises:
            UnusableRegistry: The disk refused.
        """
        final = self._outcome_path(epoch, part)
        with usable(f"keep the outcome of epoch {epoch}"):
            if final.exists():
                return False
            temporary = self.temporary(f"outcome-{epoch}-{part}-{os.urandom(4).hex()}")
            durable.write(temporary, sealed.seal(json.dumps(document, sort_keys=True).encode()))
            try:
                os.link(temporary, final)
            except FileExistsError:
                return False
            finally:
                temporary.unlink()
            durable.sync_directory(final.parent)
        return True

    def outcome(self, epoch: int, part: Part) -> dict[str, Any] | None:
        """A part of the outcome of the rollback that began `epoch`; None if it is not written yet.

        Raises:
            CorruptVersion: Its file fails its digest.
        """
        path = self._outcome_path(epoch, part)
        try:
            found: dict[str, Any] = json.loads(sealed.unseal(file_bytes(path)))
        except FileNotFoundError:
            return None
        except ValueError as error:
            raise CorruptVersion(
                f"{path} is damaged: {error}", "remove it: nothing but the history needs it"
            ) from error
        return found

    def _outcome_path(self, epoch: int, part: Part) -> Path:
        return self.path / layout.OUTCOMES / f"{epoch:08d}-{part}.json"
