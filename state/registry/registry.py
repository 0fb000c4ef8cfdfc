"""The registry: versions, the control generations that say which should be used, and what versions refer to.

    versions/<number>/         a delta: manifest.json and its files
    bases/<number>/            the full state at that version: the first one, and those of the compactor
    control/<generation>.json  what should be; never changed, never deleted
    masks/<sha256>.users       users that masks of control name, 8 bytes each in order
    outcomes/<epoch>-*.json    what became of the rollback that began an epoch
    programs/<sha256>.tflite   programs that answers run
    specs/<digest>/            spec.json and transform/ of the bootstrap
    tmp/                       what is being written; names carry their writer

Any number of processes may read. The trainer, under its lock, is the only one
to publish versions; whoever may write the directory may propose control.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from state.errors import WrongEpoch
from state.registry import manifest
from state.registry.controls import Controls
from state.registry.manifest import Draft, Manifest
from state.registry.outcomes import Outcomes
from state.registry.specs import Specs
from state.registry.versions import Versions

SERVING = "serving.safetensors"
TRAINING = "training.safetensors"


class Registry(Versions, Controls, Outcomes, Specs):
    """One registry directory. One object per thread, except that `read` may run in any."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)

    def publish(self, draft: Draft, files: Mapping[str, bytes]) -> Manifest:
        """Adds a version; it is complete, durable and visible to every reader when this returns.

        Raises:
            WrongEpoch: Control is at another epoch; nothing was added.
            UnknownVersion: The parent is not kept.
        """
        self._check_epoch(draft.epoch)
        ancestors = () if draft.parent is None else self.manifest(draft.parent).visible
        while True:
            made = manifest.complete(draft, self.next_number(), ancestors, files)
            if self.add(made, files, last_check=lambda: self._check_epoch(draft.epoch)):
                return made

    def add_base(self, of: Manifest, files: Mapping[str, bytes]) -> Manifest:
        """Keeps the full state at the version `of`; nothing is added where there is one."""
        made = manifest.complete_base(of, files)
        self.add(made, files)
        return made

    def _check_epoch(self, epoch: int) -> None:
        control = self.control()
        if control is None or control.epoch != epoch:
            now = "there is no control yet" if control is None else f"control is at epoch {control.epoch}"
            raise WrongEpoch(f"a version of epoch {epoch} was refused: {now}")
