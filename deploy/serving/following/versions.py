"""Applies the version that control wants to the host's row store, and moves the pointer to it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Collection, Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from deploy.serving.host_files import (
    CONTROL_NOTE,
    MASK_NOTE,
    REFUSED_NOTE,
    VersionFiles,
    read_program,
    refused_versions,
)
from state import probe
from state.config.settings import Settings
from state.disk.lmdb_store import PAGES_MS
from state.errors import CorruptVersion, ProgramError, UnknownVersion
from state.features.erased import Erased
from state.layout import PROGRAMS
from state.metrics import ApplierMetrics
from state.process import killpoints
from state.process.log_lines import SaidOnce
from state.ranking.crosses import crosses_of
from state.registry.control import Control, named
from state.registry.manifest import Manifest, sees
from state.registry.registry import SERVING, Registry
from state.registry.tensor_files import unpack
from state.rows.reader import Served
from state.rows.store import RowStore

if TYPE_CHECKING:
    from deploy.serving.answers.program import LoadedProgram

_AT_ONCE = 16
_DENSE = "dense."
RETRY_MS = 1000
REMEMBERED = 1000
RECENT_MS = 10_000
"""How long versions that are not durable are kept."""
ROUND_MS = 200
SWEEP_MS = 10_000
_log = logging.getLogger(__name__)


class Refusals:
    """Remembers versions that cannot be read or used.

    Attributes:
        answering: The version that answers, for messages.
    """

    def __init__(self, metrics: ApplierMetrics, now_ms: Callable[[], int]) -> None:
        self._metrics, self._now_ms = metrics, now_ms
        self._again_ms: dict[tuple[str, int], int] = {}
        self.answering = "no version"

    def add(self, kind: str, version: int, error: Exception) -> None:
        """Remembers for a second that a version cannot be read, and logs it once.

        `kind` is `manifest`, `delta`, `base`, or `probe`, which is not tried again.
        """
        if (kind, version) not in self._again_ms:
            if isinstance(error, CorruptVersion):
                self._metrics.corrupt_versions.inc()
            _log.warning("%s; %s continues to answer", error, self.answering)
        self._again_ms[kind, version] = self._now_ms() + RETRY_MS
        if len(self._again_ms) > REMEMBERED:
            # The version that was refused first.
            del self._again_ms[next(iter(self._again_ms))]

    def blocks(self, steps: Iterable[Manifest]) -> bool:
        """Whether one of these versions was refused a moment ago."""
        now_ms = self._now_ms()
        # The upper bound handles a wall clock that was set back.
        return any(now_ms < self._again_ms.get((step.kind, step.version), 0) <= now_ms + RETRY_MS for step in steps)

    def of_manifests(self) -> bool:
        """Whether a manifest could not be read since the last `clear`."""
        return any(kind == "manifest" for kind, _ in self._again_ms)

    def clear(self) -> None:
        """Forgets all refusals."""
        self._again_ms.clear()


def check_probe(version: int, program: LoadedProgram, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Compares a program's answers with a version's weights to the probe in its tensors; answers in batches, as workers do.

    Raises:
        ProgramError: It cannot be run with these weights, or its answers differ from the trainer's.
    """
    program.load({name.removeprefix(_DENSE): tensor for name, tensor in tensors.items() if name.startswith(_DENSE)})
    inputs = probe.inputs(program.shapes)
    by_row = {name for name, shape in program.shapes.items() if shape[0] < 0}
    outputs: dict[str, list[NDArray[np.float32]]] = {}
    for first in range(0, probe.ROWS, _AT_ONCE):
        part = {name: value[first : first + _AT_ONCE] if name in by_row else value for name, value in inputs.items()}
        for name, values in program.predict(part).items():
            outputs.setdefault(name, []).append(values)
    answers = {name: np.concatenate(parts) for name, parts in outputs.items()}
    probe.check(version, probe.answers_in(tensors), answers)


class FitVersions:
    """All versions except those that failed their probe; used by the thread that writes the rows."""

    def __init__(self, rows: RowStore, programs: Path, metrics: ApplierMetrics, refusals: Refusals) -> None:
        self._rows, self._programs, self._metrics, self._refusals = rows, programs, metrics, refusals
        self._loaded: tuple[str, LoadedProgram] | None = None
        with rows.reader() as reader:
            self._refused = refused_versions(reader.note(REFUSED_NOTE))

    def __contains__(self, version: int | None) -> bool:
        return version not in self._refused

    def admit(self, manifest: Manifest, tensors: Mapping[str, NDArray[Any]]) -> bool:
        """Whether a version that is about to be applied may serve; if not, that is recorded when this returns.

        Its program must be on this host, and `tensors` has all of it. A version of a release without probes is as its
        parent. Raises CorruptVersion if the program's file is missing or damaged.
        """
        version, has_probe = manifest.version, bool(probe.answers_in(tensors))
        if version in self and not has_probe and manifest.parent in self._refused:
            self._note({**self._refused, version: self._refused[manifest.parent]})
        elif version in self and has_probe:
            try:
                check_probe(version, self._program(manifest.program), tensors)
            except ProgramError as error:
                self._metrics.failed_probes.inc()
                self._note({**self._refused, version: str(error)})
                self._refusals.add("probe", version, error)
        return version in self

    def _program(self, digest: str) -> LoadedProgram:
        if self._loaded is None or self._loaded[0] != digest:
            from deploy.serving.answers.program import LoadedProgram

            self._loaded = (digest, LoadedProgram(read_program(self._programs, digest)))
        return self._loaded[1]

    def keep(self, present: Container[int]) -> None:
        """Removes versions that are no longer in the rows."""
        remaining = {version: why for version, why in self._refused.items() if version in present}
        if remaining != self._refused:
            self._note(remaining)

    def show(self, served: Served | None) -> None:
        """Shows in the metrics which version would serve now if it had not failed."""
        newer = [version for version in self._refused if served is None or version > served.version]
        self._metrics.refused_version.set(max(newer, default=0))

    def _note(self, refused: dict[int, str]) -> None:
        self._rows.steer({REFUSED_NOTE: json.dumps(refused).encode()})
        self._refused = refused


@dataclass
class Route:
    """The steps that apply a version on this host.

    Attributes:
        steps: Remaining steps, in order; empty if the version is on this host.
        rebuild: Whether the steps go into a separate lane; else onto a version on this host.
    """

    target: int
    steps: list[Manifest]
    rebuild: bool


def route_to(
    wanted: int,
    registry: Registry,
    rows: RowStore,
    present: Collection[int],
    recents: Collection[int],
    refusals: Refusals,
) -> Route | None:
    """The route to `wanted` without a recently refused version; None while there is none.

    1. Recent versions, from one on this host.
    2. Durable ones up to the last durable one before `wanted`, then recent ones. If nothing leads to a recent
       `wanted`, the route ends at that durable one.

    `present` are the versions in `rows`, and `recents` the recent ones that can be read.
    """
    # 1.
    steps = recent_steps(wanted, registry, present, recents)
    first = steps[0].parent if steps else wanted
    if steps and first in present and rows.accepts(steps[0]) and not refusals.blocks(steps):
        return Route(wanted, steps, rebuild=False)
    # 2.
    durable = _last_durable(steps[-1], registry) if steps and wanted not in registry.versions() else wanted
    if durable is None or (not steps and wanted in recents and wanted not in registry.versions()):
        return None
    tail = [step for step in steps if step.version > durable] if durable >= (first or 0) else []
    if durable in present and not tail:
        return Route(durable, [], rebuild=False)
    route = durable_route(durable, registry, rows, present, refusals)
    return route and Route(tail[-1].version if tail else durable, [*route.steps, *tail], route.rebuild)


def durable_route(
    wanted: int, registry: Registry, rows: RowStore, present: Collection[int], refusals: Refusals
) -> Route | None:
    """The route to a durable version: deltas onto an ancestor in `present`, or a base and its deltas."""
    try:
        steps = deltas_onto_present(wanted, registry, rows, present)
        if steps is not None and not refusals.blocks(steps):
            return Route(wanted, steps, rebuild=False)
    except (CorruptVersion, UnknownVersion) as error:
        refusals.add("delta", wanted, error)
    try:
        base, deltas = registry.chain(wanted)
    except (CorruptVersion, UnknownVersion) as error:
        refusals.add("base", wanted, error)
        return None
    steps = [base, *deltas]
    return None if refusals.blocks(steps) else Route(wanted, steps, rebuild=True)


def recent_steps(wanted: int, registry: Registry, present: Collection[int], recents: Collection[int]) -> list[Manifest]:
    """The recent versions that lead to `wanted`, oldest first, back to a version on this host or the oldest readable one."""
    steps: list[Manifest] = []
    version: int | None = wanted
    while version is not None and version not in present and version in recents:
        try:
            manifest = registry.manifest(version, "recent")
        except (CorruptVersion, UnknownVersion):
            break
        steps.append(manifest)
        version = manifest.parent
    return steps[::-1]


def _last_durable(version: Manifest, registry: Registry) -> int | None:
    """The newest durable version that a recent one descends from."""
    return max((number for number in registry.versions() if sees(version.visible, number)), default=None)


def deltas_onto_present(
    wanted: int, registry: Registry, rows: RowStore, present: Collection[int]
) -> list[Manifest] | None:
    """Deltas from the nearest ancestor in `present`; None if a base is needed.

    Raises:
        CorruptVersion, UnknownVersion: One of them cannot be read.
    """
    steps: list[Manifest] = []
    version = wanted
    deltas = set(registry.deltas())
    while version not in present:
        if version not in deltas:
            return None
        manifest = registry.manifest(version, "delta")
        if manifest.parent is None:
            return None
        steps.append(manifest)
        version = manifest.parent
    steps.reverse()
    return steps if steps and rows.accepts(steps[0]) else None


class NewestVersion:
    """The newest version of an epoch; lists the registry again only when there is another version."""

    def __init__(self, registry: Registry, refusals: Refusals) -> None:
        self._registry, self._refusals = registry, refusals
        self._last_found: tuple[object, int | None] = (None, None)
        self._lost: frozenset[int] = frozenset()

    def of(self, epoch: int) -> int | None:
        """The newest version of `epoch`; None without one."""
        registry = self._registry
        state = (epoch, registry.recents()[-1:], registry.deltas()[-1:], registry.bases()[-1:], self._lost)
        if self._last_found[0] != state:
            self._last_found = (None, self._find(epoch))
            if not self._refusals.of_manifests():
                self._last_found = (state, self._last_found[1])
        return self._last_found[1]

    def recents(self) -> frozenset[int]:
        """The recent versions that can be read, as far as known."""
        return frozenset(self._registry.recents()) - self._lost

    def lose(self, version: int) -> None:
        """Leaves out a recent version that cannot be read: it was removed, or a power loss damaged it."""
        self._lost = self._lost.intersection(self._registry.recents()) | {version}

    def _find(self, epoch: int) -> int | None:
        recents = self.recents()
        for version in sorted({*self._registry.versions(), *recents}, reverse=True):
            manifest = self._recent(version) if version in recents else self._durable(version)
            if manifest is None:
                continue
            if manifest.epoch == epoch:
                return version
            if manifest.epoch < epoch:
                return None
        return None

    def _durable(self, version: int) -> Manifest | None:
        try:
            return self._registry.manifest(version)
        except (CorruptVersion, UnknownVersion) as error:
            self._refusals.add("manifest", version, error)
            return None

    def _recent(self, version: int) -> Manifest | None:
        try:
            return self._registry.manifest(version, "recent")
        except (CorruptVersion, UnknownVersion):
            self.lose(version)
            return self._durable(version) if version in self._registry.versions() else None


def applied_ms(rows: RowStore) -> dict[int, int]:
    """When each version in the store was applied, by its number."""
    with rows.reader() as reader:
        return {record.version: record.applied_at_ms for record in reader.versions()}


def too_old(
    present: Mapping[int, int], now_ms: int, keep_ms: int, durable: Collection[int], needed: Collection[int]
) -> list[int]:
    """The versions to remove, out of `present`, which has the time when each was applied.

    They are not in `needed`, and older than `keep_ms` if durable, otherwise older than the lesser of `keep_ms` and
    `RECENT_MS`.

    >>> too_old({1: 0, 2: 0, 3: 0, 4: 15_000}, 20_000, 60_000, durable={1}, needed={3})
    [2]
    """
    recent_ms = min(RECENT_MS, keep_ms)
    return [
        version
        for version, applied_ms in present.items()
        if now_ms - applied_ms > (keep_ms if version in durable else recent_ms) and version not in needed
    ]


def show_control(control: Control, metrics: ApplierMetrics) -> None:
    """Sets the gauges for control's settings of serving."""
    metrics.control_generation.set(control.generation)
    metrics.pinned.set(control.serving.mode == "pin")
    metrics.masks.set(len(control.masks))


class VersionFollower:
    """Keeps the row store at the version that control wants; used by one thread, the store's only writer.

    Control pins a version, or follows the newest of its epoch, durable or recent; before the epoch has one, its base. Each
    version is one transaction. While control follows, that transaction also moves the pointer. Without an ancestor on this
    host, base and deltas are applied in a separate lane, while the old version answers. A version that cannot be read is
    tried again after a while. One that fails its probe does not answer. Labelled versions are applied too.

    Attributes:
        erased: The last erasure whose users no longer have data in the store.
    """

    def __init__(self, rows: RowStore, settings: Settings, metrics: ApplierMetrics, now_ms: Callable[[], int]) -> None:
        registry, programs = Registry(settings.registry_dir), settings.serving_dir / PROGRAMS
        self._crosses, self._erased, self.erased = crosses_of(settings), Erased.NOBODY, rows.erased()
        self._compact_ms: int | None = None
        self._registry, self._rows = registry, rows
        self._files = VersionFiles(programs, registry)
        self._refusals = Refusals(metrics, now_ms)
        self._fit = FitVersions(rows, programs, metrics, self._refusals)
        self._metrics = metrics
        self._keep_ms = round(settings.serving.keep_s * 1000)
        self._now_ms = now_ms
        self.served: Served | None = None
        self._read_served()
        self._present = applied_ms(rows)
        with rows.reader() as reader:
            note = reader.note(CONTROL_NOTE)
        self._generation = 0 if note is None else int(json.loads(note)["generation"])
        self._newest = NewestVersion(registry, self._refusals)
        self._route: Route | None = None
        self._labelled: Route | None = None
        self._retried: Manifest | None = None
        self._log_once = SaidOnce(_log.info)
        self._swept_ms = 0

    def step(self) -> bool:
        """One round of at most about `ROUND_MS`; returns whether there may be more to do at once.

        1. Read control; its mask applies from here on.
        2. Determine the version it wants.
        3. Apply the missing part of it.
        4. Move the pointer.
        """
        control = self._registry.control()
        if self._generation and (control is None or control.generation == self._generation):
            # Without it, a directory that is not mounted would look like a registry without anything new.
            self._registry.generations.require(self._generation)
        if control is None:
            self._log_once("waiting for the first control generation; the trainer makes it")
            return False
        # 1.
        if control.generation != self._generation:
            self._adopt(control)
        self._erased = control.erased
        if self.erased < control.erased.last:
            # The mask already excludes them from answers.
            self._rows.forget(control.erased.after(self.erased), self._crosses)
            self.erased = control.erased.last
            # The list of removed rows is removed with its version. Only then has the file no data of the erased users.
            self._compact_ms = self._now_ms() + max(PAGES_MS, 3 * (self._keep_ms + SWEEP_MS))
        show_control(control, self._metrics)
        # 2.
        wanted = self._wanted(control)
        if wanted is None:
            return False
        if (self.served is not None and self.served.version == wanted) or (
            wanted in self._present and wanted not in self._fit
        ):
            self._route = None
            return self._apply_labelled(control)
        # 3.
        if wanted not in self._present or self._route is not None:
            return self._approach(wanted, control)
        # 4.
        self._serve(wanted)
        return False

    def sweep(self) -> None:
        """Removes versions that are too old and unused, every few seconds; deletes their data in small pieces.

        Versions that are not durable are removed after some seconds, the others after `keep_s`.

        Raises:
            StoreFull: There is not enough space. Nothing was changed.
            RegistryError: It is unknown which versions are durable.
        """
        self._rows.tidy()
        now_ms = self._now_ms()
        if self._compact_ms is not None and now_ms >= self._compact_ms and self._route is None:
            self._compact_ms = now_ms + PAGES_MS
            self._rows.compact()
            self._compact_ms = None
        if 0 <= now_ms - self._swept_ms < SWEEP_MS or self._route is not None:
            return
        control, durable = self._registry.control(), {*self._registry.versions()}
        with self._rows.reader() as reader:
            needed = {max(self._present, default=0), reader.before() or 0}
        if control is not None:
            needed |= named(control)
        old = too_old(self._present, now_ms, self._keep_ms, durable, needed)
        self._rows.drop(old)
        self._swept_ms = now_ms
        self._present = applied_ms(self._rows)
        self._fit.keep(self._present)

    def _adopt(self, control: Control) -> None:
        """Stores control and mask where workers read them, with the pointer if the pinned version is on this host."""
        pin = control.serving.version if control.serving.mode == "pin" else None
        at_once = pin if pin in self._present and pin in self._fit else None
        note = {"generation": control.generation, "epoch": control.epoch, "pin": pin, "labels": dict(control.labels)}
        notes = {CONTROL_NOTE: json.dumps(note).encode(), MASK_NOTE: control.mask.to_bytes()}
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
        # A rebuild does not restart because the epoch has a newer version.
        if self._route is None or (self._route.target != wanted and not self._route.rebuild):
            recents = self._newest.recents()
            self._route = route_to(wanted, self._registry, self._rows, self._present, recents, self._refusals)
            if self._route is None:
                return False
            if not self._route.steps:
                return self._settle_for(self._route.target, control)
        route = self._route
        if route.rebuild and self.served is not None:
            self._log_once(
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
        """Handles a step that cannot be read; returns whether to look for another route at once."""
        if step.kind == "recent":
            self._newest.lose(step.version)
            return True
        # The compactor may have merged the version that was being read: look it up again first.
        if isinstance(error, UnknownVersion) and self._retried != step:
            self._retried = step
            return True
        self._refusals.add(step.kind, step.version, error)
        return False

    def _settle_for(self, version: int, control: Control) -> bool:
        """Ends the route at `version`, which is on this host; answers use it if it is newer than the served one."""
        self._route = None
        with self._rows.reader() as reader:
            stored_version = reader.version(version)
        if stored_version is not None and self._may_follow(stored_version, control):
            self._serve(version)
        return False

    def _apply_labelled(self, control: Control) -> bool:
        """Applies one step towards the first labelled version that is not on this host; returns whether there was one."""
        missing = [version for _, version in control.labels if version not in self._present]
        if self._labelled is None or self._labelled.target not in missing:
            routes = (
                durable_route(version, self._registry, self._rows, self._present, self._refusals) for version in missing
            )
            self._labelled = next(filter(None, routes), None)
        if self._labelled is None:
            return False
        step = self._labelled.steps[0]
        try:
            self._apply(step, self._labelled.rebuild, follow=False)
            self._labelled.steps.pop(0)
        except (CorruptVersion, UnknownVersion) as error:
            self._refusals.add(step.kind, step.version, error)
            self._labelled = None
        return True

    def _may_follow(self, manifest: Manifest | Served, control: Control) -> bool:
        """Whether workers may serve this version on the route to the wanted one."""
        if control.serving.mode == "pin":
            return manifest.version == control.serving.version
        if manifest.epoch != control.epoch and manifest.version != control.base:
            return False
        served = self.served
        return served is None or served.epoch != control.epoch or manifest.version > served.version

    def _apply(self, manifest: Manifest, rebuild: bool, follow: bool) -> None:
        self._files.fetch_program(manifest.program)
        self._files.fetch_spec(manifest.spec)
        tensors = unpack(self._registry.read(manifest, SERVING))
        killpoints.reach("apply.read")
        now_ms = self._now_ms()
        follow = self._fit.admit(manifest, tensors) and follow
        with self._metrics.apply_seconds.time():
            self._rows.apply(manifest, tensors, now_ms, follow=follow, replace=rebuild)
        killpoints.reach("apply.applied")
        if manifest.erased < self._erased.last:
            self._rows.forget(self._erased.after(manifest.erased), self._crosses, manifest.version)
        self._present[manifest.version] = now_ms
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
            self._refusals.answering = f"version {self.served.version}"
            # Workers answer with the version's own features, regardless of the release that applied it.
            self._files.fetch_spec(self.served.spec)
            self._metrics.version.set(self.served.version)
            self._metrics.epoch.set(self.served.epoch)
        self._fit.show(self.served)
