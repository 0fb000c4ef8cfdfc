"""Brings the version that control wants into the row store, and moves the pointer to it.

    control says       pin V: exactly V;  follow: the newest version of control's epoch
    none of it yet     the epoch's base where it has one; else the pointer stays
    V is not here      deltas from the nearest ancestor that is; else base and deltas
                       in a lane of their own, while the old version goes on answering
    V is corrupt       the last good version goes on answering; another base is tried

Each version is one transaction; while following, the pointer moves in it.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from safetensors.numpy import load as load_tensors

from deploy.serving.predictor import CONTROL_NOTE, MASK_NOTE
from state.disk import files as durable
from state.errors import CorruptVersion, UnknownVersion
from state.metrics import ApplierMetrics
from state.process import killpoints
from state.registry.control import Control
from state.registry.manifest import Manifest
from state.registry.registry import SERVING, Registry
from state.rows.served import Served
from state.rows.store import RowStore

ROUND_MS = 200
RETRY_MS = 1000
SWEEP_MS = 10_000
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """How to get to a version: these versions in this order.

    Attributes:
        rebuild: Into a lane of their own; else onto what is here.
    """

    steps: tuple[Manifest, ...]
    rebuild: bool


class VersionFollower:
    """Keeps the row store at what control wants; used by one thread, the store's only writer.

    Args:
        registry: Where versions and control are.
        rows: The host's row store.
        programs: Directory for copies of programs.
        metrics: Of the applier.
        keep_s: How long versions stay after they were applied.
        now_ms: The wall clock.
    """

    def __init__(
        self,
        registry: Registry,
        rows: RowStore,
        programs: Path,
        metrics: ApplierMetrics,
        keep_s: float,
        now_ms: Callable[[], int],
    ) -> None:
        self._registry = registry
        self._rows = rows
        self._programs = programs
        self._metrics = metrics
        self._keep_ms = round(keep_s * 1000)
        self._now_ms = now_ms
        programs.mkdir(parents=True, exist_ok=True)
        self.served: Served | None = None
        self._read_served()
        with rows.reader() as reader:
            self._here = {record.version for record in reader.versions()}
            note = reader.note(CONTROL_NOTE)
        self._generation = 0 if note is None else int(json.loads(note)["generation"])
        self._bad: dict[tuple[str, int], int] = {}
        self._brought: set[str] = set()
        self._plan: tuple[int, list[Manifest], bool] | None = None
        self._newest_of: tuple[object, int | None] = (None, None)
        self._told = ""
        self._swept_ms = 0

    def step(self) -> bool:
        """One round of at most some `ROUND_MS`; says whether there may be more to do at once.

        1. Control; its mask counts from here on.
        2. The version it wants.
        3. What is missing of it.
        4. The pointer.
        """
        control = self._registry.control()
        if control is None:
            self._tell("waiting for the first control generation; the trainer makes it")
            return False
        # 1.
        if control.generation != self._generation:
            self._take_up(control)
        self._metrics.control_generation.set(control.generation)
        self._metrics.pinned.set(control.serving.mode == "pin")
        # 2.
        wanted = self._wanted(control)
        if wanted is None:
            return False
        if self.served is not None and self.served.version == wanted:
            self._plan = None
            return False
        # 3.
        if wanted not in self._here or self._plan is not None:
            return self._approach(wanted, control)
        # 4.
        self._serve(wanted)
        return False

    def sweep(self) -> None:
        """Forgets versions that are older than `keep_s` and that nobody needs; every few seconds at most."""
        now_ms = self._now_ms()
        if 0 <= now_ms - self._swept_ms < SWEEP_MS or self._plan is not None:
            return
        self._swept_ms = now_ms
        keep = [max(self._here, default=0)]
        control = self._registry.control()
        if control is not None:
            keep += [version for version in (control.base, control.serving.version) if version is not None]
        swept = self._rows.sweep(now_ms - self._keep_ms, keep)
        self._metrics.swept_versions.inc(swept)
        if swept:
            with self._rows.reader() as reader:
                self._here = {record.version for record in reader.versions()}

    def _take_up(self, control: Control) -> None:
        """Stores control and mask where answers look, with the pointer where the pinned version is here."""
        pin = control.serving.version if control.serving.mode == "pin" else None
        at_once = pin if pin in self._here else None
        notes = {
            CONTROL_NOTE: json.dumps({"generation": control.generation, "epoch": control.epoch, "pin": pin}).encode(),
            MASK_NOTE: json.dumps(control.mask.to_json()).encode(),
        }
        self._rows.steer(notes, at_once)
        killpoints.reach("apply.steered")
        self._generation = control.generation
        self._plan = None
        self._bad.clear()
        _log.info(
            "control generation %d: %s by %s (%s); epoch %d, %s", control.generation, control.action, control.actor,
            control.reason, control.epoch, "following" if pin is None else f"pinned to version {pin}",
        )  # fmt: skip
        if at_once is not None:
            self._read_served()

    def _wanted(self, control: Control) -> int | None:
        if control.serving.mode == "pin":
            return control.serving.version
        newest = self._newest(control.epoch)
        return control.base if newest is None else newest

    def _newest(self, epoch: int) -> int | None:
        """The newest version of `epoch` whose manifest can be read; listed again only when there is another version."""
        seen = (epoch, self._registry.deltas()[-1:], self._registry.bases()[-1:])
        if self._newest_of[0] != seen:
            self._newest_of = (None, self._find_newest(epoch))
            if not any(kind == "manifest" for kind, _ in self._bad):
                self._newest_of = (seen, self._newest_of[1])
        return self._newest_of[1]

    def _find_newest(self, epoch: int) -> int | None:
        for version in reversed(self._registry.versions()):
            try:
                found = self._registry.manifest(version)
            except (CorruptVersion, UnknownVersion) as error:
                self._refuse("manifest", version, error)
                continue
            if found.epoch == epoch:
                return version
            if found.epoch < epoch:
                return None
        return None

    def _approach(self, wanted: int, control: Control) -> bool:
        # A rebuild is not begun again because the epoch has moved on by a version.
        if self._plan is None or (self._plan[0] != wanted and not self._plan[2]):
            plan = self._make_plan(wanted)
            if plan is None:
                return False
            self._plan = (wanted, list(plan.steps), plan.rebuild)
        target, steps, rebuild = self._plan
        if rebuild and self.served is not None:
            self._tell(
                f"version {target} is rebuilt from the registry ({len(steps)} to go); version {self.served.version} answers meanwhile"
            )
        until_ms = self._now_ms() + ROUND_MS
        while steps:
            manifest = steps[0]
            try:
                self._apply(manifest, rebuild, self._may_follow(manifest, control))
            except (CorruptVersion, UnknownVersion) as error:
                self._refuse(manifest.kind, manifest.version, error)
                self._plan = None
                return False
            steps.pop(0)
            if not until_ms - ROUND_MS <= self._now_ms() < until_ms:
                break
        if steps:
            return True
        self._plan = None
        if target == wanted and (self.served is None or self.served.version != wanted):
            self._serve(wanted)
        return True

    def _make_plan(self, wanted: int) -> Plan | None:
        """The way to `wanted` without a version that was just found corrupt; None while there is none."""
        try:
            steps = self._onto_what_is_here(wanted)
            if steps is not None and not self._is_blocked(steps):
                return Plan(tuple(steps), rebuild=False)
        except (CorruptVersion, UnknownVersion) as error:
            self._refuse("delta", wanted, error)
        try:
            base, deltas = self._registry.chain(wanted)
        except (CorruptVersion, UnknownVersion) as error:
            self._refuse("base", wanted, error)
            return None
        steps = [base, *deltas]
        if self._is_blocked(steps):
            return None
        return Plan(tuple(steps), rebuild=True)

    def _onto_what_is_here(self, wanted: int) -> list[Manifest] | None:
        """Deltas from the nearest ancestor that is here; None where a base is needed."""
        steps: list[Manifest] = []
        version = wanted
        deltas = set(self._registry.deltas())
        while version not in self._here:
            if version not in deltas:
                return None
            manifest = self._registry.manifest(version, "delta")
            if manifest.parent is None:
                return None
            steps.append(manifest)
            version = manifest.parent
        steps.reverse()
        return steps if steps and self._rows.accepts(steps[0]) else None

    def _is_blocked(self, steps: list[Manifest]) -> bool:
        now_ms = self._now_ms()
        # The upper bound is for a wall clock that was set back.
        return any(now_ms < self._bad.get((step.kind, step.version), 0) <= now_ms + RETRY_MS for step in steps)

    def _may_follow(self, manifest: Manifest, control: Control) -> bool:
        """Whether answers may use this version on the way to the one that is wanted."""
        if control.serving.mode == "pin":
            return manifest.version == control.serving.version
        if manifest.epoch != control.epoch and manifest.version != control.base:
            return False
        served = self.served
        return served is None or served.epoch != control.epoch or manifest.version > served.version

    def _apply(self, manifest: Manifest, rebuild: bool, follow: bool) -> None:
        self._bring_program(manifest.program)
        data = self._registry.read(manifest, SERVING)
        killpoints.reach("apply.read")
        with self._metrics.apply_seconds.time():
            self._rows.apply(manifest, load_tensors(data), self._now_ms(), follow=follow, replace=rebuild)
        killpoints.reach("apply.applied")
        self._here.add(manifest.version)
        self._metrics.applied_versions.inc()
        if follow or (self.served is not None and self.served.version == manifest.version):
            self._read_served()

    def _bring_program(self, digest: str) -> None:
        """Copies a program from the registry, so that workers read only this host's disk; a damaged copy is replaced."""
        if digest in self._brought:
            return
        final = self._programs / f"{digest}.tflite"
        if not final.exists() or hashlib.sha256(final.read_bytes()).hexdigest() != digest:
            program = self._registry.program(digest)
            temporary = final.with_suffix(".tmp")
            temporary.unlink(missing_ok=True)
            durable.write(temporary, program)
            temporary.replace(final)
            durable.sync_directory(final.parent)
        self._brought.add(digest)

    def _serve(self, version: int) -> None:
        self._rows.serve(version)
        killpoints.reach("apply.served")
        self._read_served()
        _log.info("version %d answers", version)

    def _read_served(self) -> None:
        with self._rows.reader() as reader:
            self.served = reader.served()
        if self.served is not None:
            self._metrics.version.set(self.served.version)
            self._metrics.epoch.set(self.served.epoch)

    def _refuse(self, kind: str, version: int, error: Exception) -> None:
        """Remembers for a second that a version cannot be had, and says so once."""
        if (kind, version) not in self._bad:
            if isinstance(error, CorruptVersion):
                self._metrics.corrupt_versions.inc()
            answering = "no version" if self.served is None else f"version {self.served.version}"
            _log.warning("%s; %s goes on answering", error, answering)
        self._bad[kind, version] = self._now_ms() + RETRY_MS

    def _tell(self, what: str) -> None:
        if what != self._told:
            self._told = what
            _log.info("%s", what)
