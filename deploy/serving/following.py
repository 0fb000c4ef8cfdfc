"""Brings the version that control wants into the row store, and moves the pointer to it.

    control says       pin V: exactly V;  follow: the newest version of control's epoch, durable or recent
    none of it yet     the epoch's base where it has one; else the pointer stays
    V is not here      recent versions from an ancestor that is; else deltas from one that
                       is, and recent versions from there on; else base and deltas in a
                       lane of their own, while the old version goes on answering
    V is older         a recent version answers on that its epoch has no more: the trainer
                       was killed, and makes it again from the log
    V has a label      it is brought too, while answers are where control wants them
    V is corrupt       the last good version goes on answering; another base is tried
    V fails its probe  likewise; its rows are here, for the versions after it build on them

Each version is one transaction; while following, the pointer moves in it.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path

from deploy.serving.fit_versions import FitVersions
from deploy.serving.gauges import show_control
from deploy.serving.labelled import Labelled
from deploy.serving.newest_version import NewestVersion
from deploy.serving.notes import CONTROL_NOTE, MASK_NOTE
from deploy.serving.program_files import ProgramFiles
from deploy.serving.refusals import Refusals
from deploy.serving.retention import applied_ms, too_old
from deploy.serving.route import Route, route_to
from deploy.serving.version_features import SpecFiles
from state.errors import CorruptVersion, UnknownVersion
from state.features.erased import Erased
from state.history.forgetting import PAGES_MS
from state.metrics import ApplierMetrics
from state.process import killpoints
from state.process.said_once import SaidOnce
from state.ranking.crosses import Crosses
from state.registry.control import Control
from state.registry.labels import named
from state.registry.manifest import Manifest
from state.registry.registry import SERVING, Registry
from state.registry.tensor_files import unpack
from state.rows.served import Served
from state.rows.store import RowStore

ROUND_MS = 200
SWEEP_MS = 10_000
_log = logging.getLogger(__name__)


class VersionFollower:
    """Keeps the row store at what control wants; used by one thread, the store's only writer.

    Args:
        registry: Where versions and control are.
        rows: The host's row store.
        programs: Directory for copies of programs and feature specs.
        metrics: Of the applier.
        keep_s: How long versions stay after they were applied.
        now_ms: The wall clock.
        crosses: With the columns of the settings, so that those of erased users can be found; None where none are.

    Attributes:
        erased: The last erasure of whose users the store has nothing any more.
    """

    def __init__(
        self,
        registry: Registry,
        rows: RowStore,
        programs: Path,
        metrics: ApplierMetrics,
        keep_s: float,
        now_ms: Callable[[], int],
        crosses: Crosses | None = None,
    ) -> None:
        self._crosses, self._erased, self.erased = crosses, Erased.NOBODY, rows.erased()
        self._anew_ms: int | None = None
        self._registry, self._rows = registry, rows
        self._programs, self._specs = ProgramFiles(programs, registry), SpecFiles(programs, registry)
        self._fit = FitVersions(rows, programs, metrics, self._refuse)
        self._metrics = metrics
        self._keep_ms = round(keep_s * 1000)
        self._now_ms = now_ms
        self.served: Served | None = None
        self._read_served()
        self._here = applied_ms(rows)
        with rows.reader() as reader:
            note = reader.note(CONTROL_NOTE)
        self._generation = 0 if note is None else int(json.loads(note)["generation"])
        self._refusals = Refusals(metrics, now_ms)
        self._newest = NewestVersion(registry, self._refusals, self._refuse)
        apply = partial(self._apply, follow=False)
        self._labelled = Labelled(registry, rows, self._refusals, self._refuse, apply)
        self._route: Route | None = None
        self._looked_again: Manifest | None = None
        self._say = SaidOnce(_log.info)
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
            self._say("waiting for the first control generation; the trainer makes it")
            return False
        # 1.
        if control.generation != self._generation:
            self._take_up(control)
        self._erased = control.erased
        if self.erased < control.erased.last and self._crosses is not None:
            # Answers leave them out already, by the mask.
            self._rows.erase(control.erased.after(self.erased), self._crosses)
            self.erased = control.erased.last
            # What says that rows went leaves with its version: only then is nothing of them in the file.
            self._anew_ms = self._now_ms() + max(PAGES_MS, 3 * (self._keep_ms + SWEEP_MS))
        show_control(control, self._metrics)
        # 2.
        wanted = self._wanted(control)
        if wanted is None:
            return False
        if (self.served is not None and self.served.version == wanted) or (
            wanted in self._here and wanted not in self._fit
        ):
            self._route = None
            return self._labelled.step(control.labels, self._here)
        # 3.
        if wanted not in self._here or self._route is not None:
            return self._approach(wanted, control)
        # 4.
        self._serve(wanted)
        return False

    def sweep(self) -> None:
        """Forgets versions that are too old and that nobody needs, every few seconds; deletes what they leave a little at a time.

        Those that are not durable are forgotten after some seconds, the others after `keep_s`.

        Raises:
            StoreFull: There is no room for that; nothing was changed.
            RegistryError: It cannot be said which are durable.
        """
        self._rows.tidy()
        now_ms = self._now_ms()
        if self._anew_ms is not None and now_ms >= self._anew_ms and self._route is None:
            self._anew_ms = now_ms + PAGES_MS
            self._rows.compact()
            self._anew_ms = None
        if 0 <= now_ms - self._swept_ms < SWEEP_MS or self._route is not None:
            return
        control, durable = self._registry.control(), {*self._registry.versions()}
        with self._rows.reader() as reader:
            needed = {max(self._here, default=0), reader.before() or 0}
        if control is not None:
            needed |= named(control)
        old = too_old(self._here, now_ms, self._keep_ms, durable, needed)
        self._metrics.swept_versions.inc(self._rows.forget(old))
        self._swept_ms = now_ms
        self._here = applied_ms(self._rows)
        self._fit.keep(self._here)

    def _take_up(self, control: Control) -> None:
        """Stores control and mask where answers look, with the pointer where the pinned version is here."""
        pin = control.serving.version if control.serving.mode == "pin" else None
        at_once = pin if pin in self._here and pin in self._fit else None
        told = {"generation": control.generation, "epoch": control.epoch, "pin": pin, "labels": dict(control.labels)}
        notes = {CONTROL_NOTE: json.dumps(told).encode(), MASK_NOTE: control.mask.to_bytes()}
        self._rows.steer(notes, at_once)
        killpoints.reach("apply.steered")
        self._generation = control.generation
        self._route = None
        self._refusals.clear()
        _log.info(
            "control generation %d: %s by %s (%s); epoch %d, %s", control.generation, control.action, control.actor,
            control.reason, control.epoch, "following" if pin is None else f"pinned to version {pin}",
        )  # fmt: skip
        if at_once is not None:
            self._read_served()

    def _wanted(self, control: Control) -> int | None:
        if control.serving.mode == "pin":
            return control.serving.version
        newest, served = self._newest.of(control.epoch), self.served
        if served is not None and served.epoch == control.epoch and served.version > (newest or 0):
            return served.version
        return control.base if newest is None else newest

    def _approach(self, wanted: int, control: Control) -> bool:
        # A rebuild is not begun again because the epoch has moved on by a version.
        if self._route is None or (self._route.target != wanted and not self._route.rebuild):
            recents = self._newest.recents()
            self._route = route_to(
                wanted, self._registry, self._rows, self._here, recents, self._refusals, self._refuse
            )
            if self._route is None:
                return False
            if not self._route.steps:
                return self._settle_for(self._route.target, control)
        route = self._route
        if route.rebuild and self.served is not None:
            self._say(
                f"version {route.target} is rebuilt from the registry ({len(route.steps)} to go); "
                f"version {self.served.version} answers meanwhile"
            )
        until_ms = self._now_ms() + ROUND_MS
        while route.steps:
            manifest = route.steps[0]
            try:
                self._apply(manifest, route.rebuild, self._may_follow(manifest, control))
            except (CorruptVersion, UnknownVersion) as error:
                self._route = None
                return self._give_up(manifest, error)
            route.steps.pop(0)
            if not until_ms - ROUND_MS <= self._now_ms() < until_ms:
                break
        if route.steps:
            return True
        self._route = None
        if route.target == wanted and (self.served is None or self.served.version != wanted):
            self._serve(wanted)
        return True

    def _give_up(self, step: Manifest, error: Exception) -> bool:
        """A step cannot be had; says whether to look at once for another way."""
        if step.kind == "recent":
            self._newest.lose(step.version)
            return True
        # The compactor may have merged what was being read: look again first.
        if isinstance(error, UnknownVersion) and self._looked_again != step:
            self._looked_again = step
            return True
        self._refuse(step.kind, step.version, error)
        return False

    def _settle_for(self, version: int, control: Control) -> bool:
        """Nothing leads on from `version`, which is here; answers use it where it is newer than what they use."""
        self._route = None
        with self._rows.reader() as reader:
            here = reader.version(version)
        if here is not None and self._may_follow(here, control):
            self._serve(version)
        return False

    def _may_follow(self, manifest: Manifest | Served, control: Control) -> bool:
        """Whether answers may use this version on the way to the one that is wanted."""
        if control.serving.mode == "pin":
            return manifest.version == control.serving.version
        if manifest.epoch != control.epoch and manifest.version != control.base:
            return False
        served = self.served
        return served is None or served.epoch != control.epoch or manifest.version > served.version

    def _apply(self, manifest: Manifest, rebuild: bool, follow: bool) -> None:
        self._programs.bring(manifest.program)
        self._specs.bring(manifest.spec)
        tensors = unpack(self._registry.read(manifest, SERVING))
        killpoints.reach("apply.read")
        now_ms = self._now_ms()
        follow = self._fit.admit(manifest, tensors) and follow
        with self._metrics.apply_seconds.time():
            self._rows.apply(manifest, tensors, now_ms, follow=follow, replace=rebuild)
        killpoints.reach("apply.applied")
        if manifest.erased < self._erased.last and self._crosses is not None:
            self._rows.erase(self._erased.after(manifest.erased), self._crosses, manifest.version)
        self._here[manifest.version] = now_ms
        self._metrics.applied_versions.inc()
        if follow or (self.served is not None and self.served.version == manifest.version):
            self._read_served()
        self._fit.show(self.served)

    def _serve(self, version: int) -> None:
        if version not in self._fit:
            return
        self._rows.serve(version)
        killpoints.reach("apply.served")
        self._read_served()
        _log.info("version %d answers", version)

    def _read_served(self) -> None:
        with self._rows.reader() as reader:
            self.served = reader.served()
        if self.served is not None:
            # Workers answer with the version's own features, whatever release applied it.
            self._specs.bring(self.served.spec)
            self._metrics.version.set(self.served.version)
            self._metrics.epoch.set(self.served.epoch)
        self._fit.show(self.served)

    def _refuse(self, kind: str, version: int, error: Exception) -> None:
        answering = "no version" if self.served is None else f"version {self.served.version}"
        self._refusals.add(kind, version, error, answering)
