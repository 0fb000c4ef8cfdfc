"""The registry: versions, the control generations that say which should be used, and what versions refer to.

    versions/<number>/         a durable version, what changed since the one before: manifest.json and its files
    merged/<number>-<parent>/  likewise since an older one: several deltas in one, made by the compactor
    bases/<number>/            the full state at that version: the first one, and those of the compactor
    recent/<number>/           for some seconds each version, for those who follow: what changed since the one before
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

from collections.abc import Mapping, Sequence
from pathlib import Path

from state.errors import WrongEpoch
from state.registry import manifest
from state.registry.controls import Controls
from state.registry.manifest import Draft, Manifest
from state.registry.outcomes import Outcomes
from state.registry.recent import Recents
from state.registry.specs import Specs

SERVING = "serving.safetensors"
TRAINING = "training.safetensors"


class Registry(Recents, Controls, Outcomes, Specs):
    """One registry directory. One object per thread, except that `read` may run in any."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)

    def publish(self, draft: Draft, files: Mapping[str, bytes], recent: Manifest | None = None) -> Manifest:
        """Adds a version; it is complete and visible to every reader when this returns, and durable unless it is recent.

        Args:
            draft: What it says of itself; its kind says whether it is recent.
            files: Its files by name.
            recent: The same version in `recent/`, for one that lies there already.

        Raises:
            WrongEpoch: Control is at another epoch; nothing was added.
            UnknownVersion: The parent is not kept.
            UnusableRegistry: The disk refused.
        """
        self._check_epoch(draft.epoch)
        ancestors = () if draft.parent is None else self.either(draft.parent).visible
        while True:
            if recent is None:
                made = manifest.complete(draft, self.next_number(), ancestors, files)
            else:
                made = manifest.complete_twin(draft, recent, files)
            add = self.add if made.durable else self.add_recent
            if add(made, files, last_check=lambda: self._check_epoch(draft.epoch)):
                return made
            if recent is not None:
                raise RuntimeError(f"version {made.version} was published before")

    def add_base(self, of: Manifest, files: Mapping[str, bytes]) -> Manifest:
        """Keeps the full state at the version `of`; nothing is added where there is one."""
        made = manifest.complete_base(of, files)
        self.add(made, files)
        return made

    def add_merged(self, parts: Sequence[Manifest], files: Mapping[str, bytes]) -> Manifest:
        """Keeps what changed in `parts`, deltas of which each continues the one before, as one delta of the last."""
        made = manifest.complete_merged(parts, files)
        self.add(made, files)
        return made

    def _check_epoch(self, epoch: int) -> None:
        control = self.control()
        if control is None or control.epoch != epoch:
            now = "there is no control yet" if control is None else f"control is at epoch {control.epoch}"
            raise WrongEpoch(f"a version of epoch {epoch} was refused: {now}")
