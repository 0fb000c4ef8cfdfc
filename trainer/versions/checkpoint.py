"""Copies a trainer's state for a version, and restores a trainer from a version with the same bits."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from state.churn import CODE as CHURN_CODE
from state.config.settings import Settings
from state.errors import SettingsError, SpecMismatch
from state.process import private_files
from state.ranking.item_lists import NEXT_CATEGORY
from state.registry.manifest import Manifest
from state.registry.registry import SERVING, TRAINING, Registry
from state.rows.tables import ITEM_LISTS, OPTIONAL, UNSERVED, tables_in
from trainer.engine.build import labelled
from trainer.engine.step import Taking, Trainer
from trainer.model.hyperparameters import HYPERPARAMETERS, MODEL_CODE
from trainer.privacy import own_key
from trainer.tables.id_table import Changes
from trainer.tables.lists import HOUR_MS, ONE
from trainer.versions import content

# Settings of [trainer] in addition to all of [model].
_DECIDING = (
    "admit_after", "max_rows", "expire_s", "rows_per_update",
)  # fmt: skip
# CPU features that affect the order of floating-point sums.
_INSTRUCTIONS = ("sse4_2", "avx", "avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_tile", "asimd", "sve")


def served(trainer: Trainer, item_lists: bool = True) -> dict[str, content.Array]:
    """Copies the content of a recent version and resets its list of changes. Only the step thread may call it.

    Without `item_lists`, the changes of lists of items and of categories wait for the next version that has them; a version
    that is durable must have them.
    """
    without = UNSERVED if item_lists else UNSERVED.union(ITEM_LISTS, [NEXT_CATEGORY])
    rows = _rows(trainer, "take_served", without)
    return rows | _dense(trainer) | _beside(trainer) | {"popular": trainer.popular.top()}


def changes(trainer: Trainer) -> dict[str, content.Array]:
    """Copies the content of a durable version and resets both lists of changes. Only the step thread may call it."""
    tensors = _tensors(trainer, "take_changes")
    quality = trainer.measures.progressive.state() | trainer.measures.breakdown.state()
    return tensors | {f"{content.QUALITY}{name}": value for name, value in quality.items()}


def full(trainer: Trainer) -> dict[str, content.Array]:
    """Copies the whole state, as a base holds it, without metrics that affect nothing. Keeps the list of changes."""
    return _tensors(trainer, "state")


def digest(trainer: Trainer) -> str:
    """SHA-256 over everything: rows ordered by id, dense weights, slots, counters, guard, metrics."""
    return content.digest(full(trainer))


def restore(versions: Registry, version: int, trainer: Trainer, spec: str) -> Manifest:
    """Restores `trainer` to the state that published `version`, whatever its state was before; returns the version's manifest.

    Raises:
        UnknownVersion: A part of its chain is not kept.
        CorruptVersion: A file of its chain fails its digest.
        SpecMismatch: It was trained on other features than those of digest `spec`.
        SettingsError: It is of another model.
    """
    newest, tensors = full_state(versions, version)
    if newest.spec != spec:
        raise SpecMismatch(
            f"version {version} was trained on feature spec {newest.spec[:12]}, the settings make {spec[:12]}",
            "put [features] and events.actions back, or continue from it: `springtide upgrade --reason TEXT`",
        )
    load(trainer, tensors)
    return newest


def full_state(versions: Registry, version: int) -> tuple[Manifest, dict[str, content.Array]]:
    """The manifest of a version, and its full state as a base holds it.

    Raises:
        UnknownVersion: A part of its chain is not kept.
        CorruptVersion: A file of its chain fails its digest.
    """
    base, deltas = versions.chain(version)
    return (deltas[-1] if deltas else base), content.merge(tensors_of(versions, part) for part in (base, *deltas))


def tensors_of(versions: Registry, part: Manifest) -> dict[str, content.Array]:
    """The tensors of one delta or base; every file's digest is checked."""
    return content.decode(versions.read(part, name) for name in (SERVING, TRAINING))


def load(trainer: Trainer, tensors: content.Tensors) -> None:
    """Replaces the whole state of `trainer` by a full state.

    Crosses and counts stay empty if the state is of a release without them, or with other ones.

    Raises:
        SettingsError: Tables or dense weights are of another model.
    """
    trainer.clear()
    widths = {name: tensors[f"{name}.rows"].shape[1] for name in tables_in(tensors) if f"{name}.ids" in tensors}
    # An upgrade leaves rows of width 0 of a table that is no longer read.
    widths = {name: width for name, width in widths.items() if width}
    dims = {name: table.dim for name, table in trainer.tables.items()}
    for name in sorted((widths.keys() | dims.keys()) - OPTIONAL):
        if widths.get(name) != dims.get(name):
            raise SettingsError(
                f"rows of {name}: expected width {dims.get(name, 'none')}, the version has {widths.get(name, 'none')}",
                "put the [model] settings back, or continue from it: `springtide upgrade --reason TEXT`",
            )
    for name, table in trainer.tables.items():
        if name in OPTIONAL and widths.get(name) != table.dim:
            continue
        rows = Changes(**{field: tensors[f"{name}.{field}"] for field in Changes.FIELDS})
        table.load(trainer.own_rows(name, rows))
    trainer.model.set_weights(_under("dense.", tensors))
    trainer.optimizer.set_slots(_under("slots.", tensors))
    trainer.load(_under("state.", tensors))
    trainer.guarded = _under(content.GUARDED, tensors)
    for measures in (trainer.measures.progressive, trainer.measures.breakdown):
        measures.load(_under(content.QUALITY, tensors))


def begin(trainer: Trainer, description: Mapping[str, Any]) -> None:
    """Resets `trainer` to an untrained one with the popular labels of the bootstrap, whose document is `description`."""
    trainer.clear()
    popular = sorted((int(label, 16), int(clicks)) for label, clicks in description["popular"])
    # The bootstrap's counts have no noise, so they are not used with a privacy budget.
    if popular and not trainer.settings.privacy.epsilon:
        hour = np.int64(int(description["newest_ms"]) // HOUR_MS)
        ids = np.array([label for label, _ in popular], np.uint64)
        counts = np.array([clicks * ONE for _, clicks in popular], np.int64)
        trainer.popular.load({"ids": ids, "counts": counts, "hour": hour})


def environment(settings: Settings, device: str, engine: str = "compiled") -> dict[str, str]:
    """What the bits of a step depend on besides the log. Versions with different environments are not comparable.

    `device` has the variables.
    """
    graph = tensorflow_environment()
    return {
        "tensorflow": graph["tensorflow"],
        "numpy": np.__version__,
        "python": platform.python_version(),
        "machine": graph["machine"],
        "instructions": graph["instructions"],
        "device": device,
        # The compiled engine has the same bits for any number of threads.
        "threads": "any" if engine == "compiled" else str(settings.trainer.threads),
        "onednn": graph["onednn"],
        "scipy": metadata.version("scipy"),
        "numba": metadata.version("numba"),
        "llvmlite": metadata.version("llvmlite"),
        "engine": engine,
        **({"workers": str(settings.trainer.workers)} if settings.trainer.workers > 1 else {}),
        "model_code": str(MODEL_CODE),
        **{f"hyperparameters.{name}": text for name, text in HYPERPARAMETERS.texts().items()},
        **deciding(settings),
    }


def tensorflow_environment() -> dict[str, str]:
    """What the bits of a TensorFlow operation on a CPU depend on besides its inputs and threads."""
    flags: set[str] = set()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() in ("flags", "Features"):
                flags.update(value.split())
                break
    return {
        "tensorflow": metadata.version("tensorflow"),
        "machine": platform.machine(),
        "instructions": " ".join(name for name in _INSTRUCTIONS if name in flags),
        "onednn": os.environ.get("TF_ENABLE_ONEDNN_OPTS", "default"),
    }


def deciding(settings: Settings) -> dict[str, str]:
    """The settings that affect a step, by name, and no others."""
    model = {f"model.{name}": str(value) for name, value in dataclasses.asdict(settings.model).items()}
    wanted, parameters = (
        settings.attributes,
        {f"trainer.{name}": str(getattr(settings.trainer, name)) for name in _DECIDING},
    )
    for side in ("user", "item"):
        fields = getattr(wanted, f"{side}_fields") if getattr(wanted, f"{side}_topic") else ()
        parameters[f"attributes.{side}_fields"] = str(fields)
    parameters |= {"events.context": str(settings.events.context), "labelled": str(labelled(settings))} | private(
        settings
    )
    if settings.churn.days:
        parameters |= {
            "churn.days": str(settings.churn.days),
            "churn.code": str(CHURN_CODE),
        }
    return (
        model | parameters | {f"attributes.{name}": str(getattr(wanted, name)) for name in ("slices", "slice_values")}
    )


def private(settings: Settings) -> dict[str, str]:
    """What determines the noise, by name: the mechanism's parameters and key fingerprint; empty without a budget."""
    if not settings.privacy.epsilon:
        return {}
    numbers = dataclasses.asdict(settings.privacy)
    parameters = {f"privacy.{name}": str(value) for name, value in numbers.items()}
    return parameters | {"privacy.key": private_files.fingerprint(own_key(settings))}


def _rows(trainer: Trainer, how: Taking, without: Collection[str] = ()) -> dict[str, content.Array]:
    tables = trainer.take_rows(how, without)
    return {f"{name}.{field}": column for name, rows in tables.items() for field, column in rows.items()}


def _tensors(trainer: Trainer, how: Taking) -> dict[str, content.Array]:
    tensors = _rows(trainer, how)
    tensors |= _dense(trainer) | _beside(trainer)
    tensors |= {f"slots.{name}": slot for name, slot in trainer.optimizer.slots().items()}
    tensors |= {f"state.{name}": value for name, value in trainer.state().items()}
    return tensors | {"popular": trainer.popular.top()}


def _dense(trainer: Trainer) -> dict[str, content.Array]:
    return {f"dense.{name}": weight for name, weight in trainer.model.weights().items()}


def _beside(trainer: Trainer) -> dict[str, content.Array]:
    churn = {} if trainer.churn is None else trainer.churn.served()
    score_tensors = [part.served() for part in (trainer.item_ranking, trainer.interest_counts) if part is not None]
    return {name: value for values in (churn, *score_tensors) for name, value in values.items()}


def _under(prefix: str, tensors: content.Tensors) -> dict[str, Any]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
