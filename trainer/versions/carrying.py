"""What a trainer continues from: its version bit for bit, or what another model carries over from it."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from state import layout
from state.config.sections import Model as ModelSettings
from state.config.settings import Settings
from state.errors import UnknownVersion
from state.features.spec import FeatureSpec
from state.registry.control import RESTORE, Control
from state.registry.manifest import LogRange, Manifest
from state.registry.model_fit import differences, pending, require_fit, version_to_go_on_from
from state.registry.registry import Registry
from state.rows.tables import OPTIONAL, tables_in
from trainer.engine.build import EMBEDDINGS
from trainer.engine.step import Trainer
from trainer.model.model import Model
from trainer.versions import checkpoint, content
from trainer.versions.content import COLUMNS, PENDING, QUALITY, Array, Tensors

_POWERS = "slots.powers"
_MOVING = "slots.moving."
_GUARD = "state.guard."


@dataclass(frozen=True, slots=True)
class CarriedPart:
    """A table or a dense weight, before and after.

    Attributes:
        was: Width of the table's rows, or shape of the weight, in the version; None if the version has none.
        now: Likewise in the model; None if it reads no such table or has no such weight.
    """

    kind: Literal["table", "weight"]
    name: str
    was: tuple[int, ...] | None
    now: tuple[int, ...] | None
    rows: int = 0

    @property
    def goes_on(self) -> bool:
        """Whether its numbers are kept."""
        return self.was == self.now

    def __str__(self) -> str:
        """The outcome as text.

        >>> str(CarriedPart("table", "user", (32,), (32,), 1200)), str(CarriedPart("table", "user", (32,), None, 7))
        ('user: 1,200 rows of width 32', 'user: 7 rows of width 32, no longer read')
        >>> str(CarriedPart("weight", "query", None, (8, 4))), str(CarriedPart("weight", "query", (8,), (8, 4)))
        ('query: the version has none', 'query: 8, the shape is now 8x4')
        """
        if self.was is None:
            return f"{self.name}: the version has none"
        was, now = (
            None if shape is None else "x".join(map(str, shape)) or "a number" for shape in (self.was, self.now)
        )
        is_table = self.kind == "table"
        text = f"{self.name}: {self.rows:,} rows of width {was}" if is_table else f"{self.name}: {was}"
        if self.goes_on:
            return text
        change = "no longer read" if now is None else f"the {'width' if is_table else 'shape'} is now {now}"
        return f"{text}, {change}"


@dataclass(frozen=True, slots=True)
class Carrying:
    """What is carried over, and what starts from scratch.

    Attributes:
        tables: Of the version and of the model, in the order of the model's, then by name.
    """

    tables: tuple[CarriedPart, ...]
    weights: tuple[CarriedPart, ...]
    steps: int = 0
    trained: int = 0
    popular: int = 0

    @property
    def anew(self) -> tuple[CarriedPart, ...]:
        """The tables and weights that start from scratch."""
        return tuple(part for part in (*self.tables, *self.weights) if not part.goes_on)

    def wanting(self, optional: Collection[str] = ()) -> tuple[CarriedPart, ...]:
        """What keeps a trainer from loading the version as is: all that starts from scratch but `optional` tables."""
        return tuple(part for part in self.anew if not (part.kind == "table" and part.name in optional))

    def lines(self) -> list[str]:
        """The plan as text: each table, a summary of the weights, each weight that starts from scratch."""
        weights = [weight for weight in self.weights if weight.goes_on]
        numbers = sum(int(np.prod(weight.was or ())) for weight in weights)
        lines = ["carried over:", *(f"  table {table}" for table in self.tables if table.goes_on)]
        now = sum(weight.now is not None for weight in self.weights)
        lines += [
            f"  {len(weights)} of {now} dense weights, {numbers:,} numbers, with their optimizer's slots",
            f"  the counts of {self.steps:,} steps and {self.trained:,} rows, {self.popular:,} popular categories, "
            "and all measures",
        ]
        if not self.anew:
            return [*lines, "starts from scratch: nothing"]
        lines.append("starts from scratch:")
        lines += [f"  {part.kind} {part}" for part in self.anew]
        if any(part.kind == "weight" for part in self.anew):
            lines.append("  the guard's running loss, with the weights")
        return lines

    def document(self) -> dict[str, Any]:
        """As JSON values, for control."""
        return {
            "tables": {table.name: table.rows for table in self.tables if table.goes_on},
            "weights": sum(weight.goes_on for weight in self.weights),
            "anew": [str(part) for part in self.anew],
        }


def plan(old: Tensors, fresh: Tensors) -> Carrying:
    """Plans what a model carries over from the full state `old`, as a base holds it.

    `fresh` is the full state of the untrained model; of its tables and weights only names and shapes count.
    """
    tables = tuple(
        CarriedPart("table", name, _width(name, old), _width(name, fresh), len(old.get(f"{name}.ids", ())))
        for name in _united(tables_in(fresh), tables_in(old))
        if _width(name, old) is not None or _width(name, fresh) is not None
    )
    weights = tuple(
        CarriedPart("weight", name, _shape(f"dense.{name}", old), _shape(f"dense.{name}", fresh))
        for name in _united(_under("dense.", fresh), _under("dense.", old))
    )
    steps, trained = (int(old.get(f"state.counters.{name}", np.int64(0))) for name in ("steps", "trained"))
    return Carrying(tables, weights, steps, trained, len(old.get("state.popular.ids", ())))


def carried(old: Tensors, fresh: Tensors, planned: Carrying, fast: Collection[str] = ()) -> dict[str, Array]:
    """The full state with which a trainer continues: `planned` applied to the states that it was planned for.

    `fast` are the names of the weights whose slots are kept together, as `moving.`.
    """
    kept_weights = {weight.name for weight in planned.weights if weight.goes_on}
    all_kept = all(weight.goes_on for weight in planned.weights if weight.now is not None)
    state: dict[str, Array] = {}
    # 1. Tables.
    for table in planned.tables:
        if table.now is not None:
            source = old if table.goes_on else fresh
            state |= {f"{table.name}.{column}": source[f"{table.name}.{column}"] for column in COLUMNS}
    # 2. Dense weights, and the slots that belong to them.
    for name in _under("dense.", fresh):
        source = old if name in kept_weights else fresh
        state[f"dense.{name}"] = source[f"dense.{name}"]
    moving = [name for name in fresh if name.startswith(_MOVING)]
    moves_on = set(fast) <= kept_weights and all(_shape(name, old) == _shape(name, fresh) for name in moving)
    for name in _under("slots.", fresh):
        slot = f"slots.{name}"
        if slot == _POWERS:
            # A new weight has no warm-up: with the old powers its first steps would be three times too long.
            goes_on = all_kept
        elif slot.startswith(_MOVING):
            goes_on = moves_on
        else:
            goes_on = name.rpartition(".")[0] in kept_weights
        state[slot] = old[slot] if goes_on and _shape(slot, old) == _shape(slot, fresh) else fresh[slot]
    # 3. Facts of the log. The guard's running loss is a property of the weights.
    for name, tensor in old.items():
        if name.startswith(("state.", QUALITY)):
            state[name] = tensor if all_kept or not name.startswith(_GUARD) else fresh[name]
    return state


def removals(old: Tensors, fresh: Tensors, planned: Carrying) -> dict[str, Array]:
    """The first version's entries for tables that start from scratch: the removed ids, which serving must not find.

    When `content.merge` applies them to `old`, nothing of such a table is left. A table that is no longer read stays as
    a table of width 0.
    """
    entries: dict[str, Array] = {}
    for table in planned.tables:
        if table.goes_on or table.was is None:
            continue
        if table.now is None:
            empty = {name: old[f"{table.name}.{name}"][:0] for name in COLUMNS}
            nothing = np.zeros((0, 0), np.float32)
            entries |= {f"{table.name}.{name}": column for name, column in (empty | {"rows": nothing}).items()}
        else:
            entries |= {f"{table.name}.{name}": fresh[f"{table.name}.{name}"] for name in COLUMNS}
        entries[f"{table.name}.removed"] = np.sort(old[f"{table.name}.ids"])
    return entries


def _width(table: str, tensors: Tensors) -> tuple[int, ...] | None:
    """The width of a table's rows; None if there is no such table, or an upgrade dropped it."""
    if f"{table}.ids" not in tensors:
        return None
    width = tensors[f"{table}.rows"].shape[1:]
    return width if width[0] else None


def _shape(name: str, tensors: Tensors) -> tuple[int, ...] | None:
    return tensors[name].shape if name in tensors else None


def _under(prefix: str, tensors: Mapping[str, Any]) -> Iterator[str]:
    return (name.removeprefix(prefix) for name in tensors if name.startswith(prefix))


def _united(first_names: Collection[str] | Iterator[str], second_names: Collection[str] | Iterator[str]) -> list[str]:
    first = list(first_names)
    return [*first, *sorted(set(second_names) - set(first))]


EXPERIMENT = "experiment"
"""Key in the plan of a control generation: the name of the experiment that the epoch continues from."""

logger = logging.getLogger(__name__)


def _take_over(
    live: Registry, recorded: Mapping[str, Any], version: int, trainer: Trainer, spec: str
) -> tuple[Manifest, dict[str, Array]]:
    """Restores `trainer` to the experiment's version, as the start of an epoch that begins from the live `version`."""
    path = layout.experiment_registry(trainer.settings.state_dir, str(recorded[EXPERIMENT]))
    if not path.is_dir():
        raise UnknownVersion(
            f"the epoch continues from experiment {recorded[EXPERIMENT]}, and {path} is gone",
            f"roll back: `springtide rollback --to {version} --reason TEXT`",
        )
    manifest = checkpoint.restore(Registry(path), int(recorded["version"]), trainer, spec)
    part, old = checkpoint.full_state(live, version)
    state = checkpoint.full(trainer)
    changes = checkpoint.changes(trainer) | state | ends(old, state) | removals(old, state, plan(old, state))
    return replace(
        manifest, version=part.version, kind=part.kind, epoch=part.epoch, parent=part.parent, visible=part.visible
    ), changes


def ends(old: Tensors, new: Tensors) -> dict[str, Array]:
    """The removals in a delta from full state `old` to `new`: rows and sightings that only `old` has, in tables of both.

    >>> ids = np.array([3, 5], np.uint64)
    >>> zeros = {"pending_counts": np.zeros(0, np.int32), "pending_seen_ms": np.zeros(0, np.int64)}
    >>> def of(ids):
    ...     table = {"ids": ids, "rows": np.zeros((len(ids), 2)), "pending_ids": ids[:0], **zeros}
    ...     return {f"user.{name}": column for name, column in table.items()}
    >>> ends(of(ids), of(ids[1:]))["user.removed"].tolist()
    [3]
    """
    removed: dict[str, Array] = {}
    shared = new.keys() & old.keys()
    for table in (name for name in tables_in(shared) if f"{name}.ids" in shared):
        removed[f"{table}.removed"] = np.setdiff1d(old[f"{table}.ids"], new[f"{table}.ids"])
        waits, new_waits = old[f"{table}.{PENDING[0]}"], new[f"{table}.{PENDING[0]}"]
        over = np.setdiff1d(waits, new_waits)
        ended = {PENDING[0]: over, PENDING[1]: np.zeros(len(over), np.int32), PENDING[2]: np.zeros(len(over), np.int64)}
        order = np.argsort(np.concatenate([new_waits, over]), kind="stable")
        removed |= {
            f"{table}.{name}": np.concatenate([new[f"{table}.{name}"], column])[order] for name, column in ended.items()
        }
    return removed


class CarriedOver(NamedTuple):
    """A version that a trainer of another model continues from, and what the first version holds besides the carried parts."""

    manifest: Manifest
    planned: Carrying
    changes: dict[str, content.Array]


def carry_over(versions: Registry, version: int, trainer: Trainer) -> CarriedOver:
    """Loads the fitting parts of `version` into `trainer`; the rest is initialised."""
    manifest, old = checkpoint.full_state(versions, version)
    trainer.clear()
    fresh = checkpoint.full(trainer)
    planned = plan(old, fresh)
    checkpoint.load(trainer, carried(old, fresh, planned, trainer.model.fast_weights))
    # The base contains the carried rows, so the version need not repeat them.
    changes = checkpoint.changes(trainer) | removals(old, fresh, planned)
    return CarriedOver(manifest, planned, changes)


def restore_or_carry(
    registry: Registry, control: Control, version: int, trainer: Trainer, spec: str
) -> tuple[Manifest, dict[str, content.Array] | None]:
    """Restores the trainer that published `version`, or carries it over if an upgrade begins.

    Returns the manifest, and what the first version of an upgrade holds; None without one.

    Raises:
        UnknownVersion, CorruptVersion: The version cannot be read.
        SpecMismatch, SettingsError: It has other features or another model, and no upgrade was requested.
    """
    began = pending(registry, control)
    if began is not None and began.plan is not None and EXPERIMENT in began.plan:
        logger.info("epoch %d continues from experiment %s", control.epoch, began.plan[EXPERIMENT])
        with trainer.alone():
            return _take_over(registry, began.plan, version, trainer, spec)
    if began is None:
        return _without_lost_log(registry, control, checkpoint.restore(registry, version, trainer, spec)), None
    with trainer.alone():
        carried = carry_over(registry, version, trainer)
    logger.info("epoch %d continues from version %d: %s", control.epoch, version, "; ".join(carried.planned.lines()))
    return carried.manifest, carried.changes


def _without_lost_log(registry: Registry, control: Control, version: Manifest) -> Manifest:
    """A version as control's epoch continues from it. If its log was lost, it has no log position and counts the loss."""
    began = registry.generations.beginning_of(control.epoch)
    if began is None or began.action != RESTORE or began.plan is None or version.epoch == control.epoch:
        return version
    gap = version.metrics.get("account.gap", 0.0) + int(began.plan["lost"])
    log = LogRange(version.log.topic, partition=version.log.partition)
    return replace(version, log=log, metrics={**version.metrics, "account.gap": gap})


def nothing_learned(trainer: Trainer, description: Mapping[str, Any]) -> dict[str, content.Array]:
    """Clears everything that `trainer` has learned; returns what the first base holds."""
    with trainer.alone():
        checkpoint.begin(trainer, description)
        return checkpoint.full(trainer)


def require_ranker_fits(registry: Registry, settings: Settings, spec: FeatureSpec, model: Model) -> None:
    """Refuses a ranker whose weights or rows differ from the current version, unless an upgrade was requested.

    Raises:
        ModelMismatch: It names what differs and the command to run.
    """
    widths = dict.fromkeys(EMBEDDINGS, settings.model.dim) | dict(model.tables)
    dense = {name: tuple(variable.shape) for name, variable in model.dense.items()}
    require_fit(registry, settings, spec, dense, widths, OPTIONAL)


def is_of_release(registry: Registry, settings: Settings, spec: FeatureSpec) -> bool:
    """Whether only this release's own code can differ from the current version: no custom code, same settings."""
    model, default = settings.model, ModelSettings()
    if (model.ranker, model.tower, model.preprocessing) != (default.ranker, default.tower, default.preprocessing):
        return False
    version = version_to_go_on_from(registry)
    return version is not None and not differences(registry, version, settings, spec)
