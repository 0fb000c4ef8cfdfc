"""The registry: versions, control generations that say which to use, and the files that versions refer to.

    versions/<number>/         a durable version, what changed since the one before: manifest.json and its files
    merged/<number>-<parent>/  likewise since an older one: several deltas in one, made by the compactor
    bases/<number>/            the full state at that version: the first one, and those of the compactor
    recent/<number>/           each version for some seconds, for followers: what changed since the one before
    control/<generation>.json  the desired state; never changed, never deleted
    masks/<sha256>.users       users that masks of control name, 8 bytes each in order
    outcomes/<epoch>-*.json    the outcome of the rollback that began an epoch
    programs/<sha256>.tflite   programs that serving runs
    specs/<digest>/            spec.json and transform/ of the bootstrap
    tmp/                       files being written; names carry their writer

Any number of processes may read. Only the trainer, under its lock, publishes
versions. Every process that may write the directory may propose control.
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
    """One registry directory. Use one object per thread; only `read` may run in any thread."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)

    def publish(self, draft: Draft, files: Mapping[str, bytes], recent: Manifest | None = None) -> Manifest:
        """Publishes a version: complete and visible to all readers when this returns, and durable unless recent.

        Args:
            draft: The author's part of the manifest; its kind says whether the version is recent.
            files: Its files by name.
            recent: The manifest of the same version in `recent/`, if it is there already.

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
        """Stores the full state at the version `of`; does nothing if it exists."""
        made = manifest.complete_base(of, files)
        self.add(made, files)
        return made

    def add_merged(self, parts: Sequence[Manifest], files: Mapping[str, bytes]) -> Manifest:
        """Stores `parts`, consecutive deltas, merged into one delta of the last one."""
        made = manifest.complete_merged(parts, files)
        self.add(made, files)
        return made

    def _check_epoch(self, epoch: int) -> None:
        control = self.control()
        if control is None or control.epoch != epoch:
            now = "there is no control yet" if control is None else f"control is at epoch {control.epoch}"
            raise WrongEpoch(f"a version of epoch {epoch} was refused: {now}")
