"""`springtide versions`: lists the versions of a registry, and which one this host serves."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deploy.formats import age
from state import layout
from state.config.settings import Settings
from state.errors import CorruptVersion, RegistryError, StoreError, UnknownVersion
from state.registry.control import Control
from state.registry.manifest import Manifest
from state.registry.registry import Registry
from state.registry.sharing import visit
from state.rows.reader import RowReader
from state.rows.store import RowStore

if TYPE_CHECKING:
    from deploy.operate.log_view import LogView

ASK_KAFKA_S = 1.0

FIGURES = {
    "log loss": "log_loss", "AUC": "auc", "top 1": "top1", "top 5": "top5", "known top 1": "known.top1",
    "known top 5": "known.top5", "lift": "lift.top1",
}  # fmt: skip
"""Column titles and their metrics; the metrics are recent and measured before learning."""


def versions(settings: Settings, args: argparse.Namespace, now_ms: int, say: Callable[[str], None]) -> None:
    """Lists the versions with age, log range, metrics, which one is served, and which ones can only be served."""
    registry = open_registry(settings)
    control = registry.control()
    served = served_version(settings.serving_dir)
    numbers = registry.versions()
    shown = numbers if args.all else numbers[max(0, len(numbers) - args.last) :]
    if served is not None and served in numbers and served not in shown:
        shown = [served, *shown]
    # Imported here, because other commands that open a registry need no log.
    from deploy.operate.log_view import horizon, horizon_text, view_of

    view = view_of(settings, ASK_KAFKA_S)
    found_entries = (_entry(registry, number, control, served, now_ms, view) for number in shown)
    entries = [entry for entry in found_entries if entry is not None]
    if args.output == "json":
        say(json.dumps(entries, indent=2))
        return
    if not entries:
        say("no version yet; the trainer publishes the first after the bootstrap")
        return
    head = ["version", "epoch", "age", "kind", "log", *FIGURES, ""]
    lines = [
        [
            str(entry["version"]),
            str(entry.get("epoch", "?")),
            age(entry["age_s"]) if "age_s" in entry else "?",
            entry.get("kind", "?"),
            f"{entry['log']['first']}-{entry['log']['next']}" if "log" in entry else "?",
            *(_figure(entry, name) for name in FIGURES.values()),
            ", ".join(entry["marks"]),
        ]
        for entry in reversed(entries)
    ]
    say(table([head, *lines]))
    if view is not None and (back := horizon(registry, view, now_ms)) is not None:
        say(f"a rollback reaches {horizon_text(back)[1]}")
    if len(shown) < len(numbers):
        say(f"{len(numbers) - len(shown):,} older versions are kept too; --all lists them")


def open_registry(settings: Settings) -> Registry:
    """Opens the registry of these settings, which must exist; a shared one is synced from its object store first.

    Raises:
        RegistryError: There is no registry, and a read-only command must not create one; or its store is unreachable.
    """
    visit(settings)
    if not settings.registry_dir.is_dir():
        raise RegistryError(
            f"{settings.registry_dir}: no registry here",
            "start with `springtide up`, or name the state directory with --paths.state",
        )
    return Registry(settings.registry_dir)


def readable(registry: Registry) -> Iterator[Manifest]:
    """Yields the manifests of all versions, newest first, without those that are corrupt or were removed meanwhile."""
    for number in reversed(registry.versions()):
        with suppress(CorruptVersion, UnknownVersion):
            yield registry.manifest(number)


@contextmanager
def rows_here(serving_dir: Path) -> Iterator[RowReader | None]:
    """Opens this host's row store for reading; yields None if there is none, or none that can be read."""
    path = serving_dir / layout.ROWS
    store = None
    if path.is_dir():
        with suppress(StoreError, OSError):
            store = RowStore(path, readonly=True)
    if store is None:
        yield None
        return
    try:
        with store.reader() as reader:
            yield reader
    finally:
        store.close()


def versions_here(serving_dir: Path) -> set[int] | None:
    """Returns the versions in this host's row store; None if there is no row store."""
    with rows_here(serving_dir) as reader:
        return None if reader is None else {version.version for version in reader.versions()}


def served_version(serving_dir: Path) -> int | None:
    """Returns the version that this host serves; None if nothing serves here."""
    with rows_here(serving_dir) as reader:
        served = None if reader is None else reader.served()
        return None if served is None else served.version


def table(rows: Sequence[Sequence[str]]) -> str:
    """Formats rows in aligned columns.

    >>> print(table([["version", "age"], ["7", "2 s"]]))
    version  age
    7        2 s
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _entry(
    registry: Registry, number: int, control: Control | None, served: int | None, now_ms: int, view: LogView | None
) -> dict[str, Any] | None:
    """Describes a version as JSON values; None if retention has removed it in the meantime."""
    marks = ["served"] if number == served else []
    if control is not None and control.serving.version == number:
        marks.append("pinned")
    if control is not None and control.base == number:
        marks.append(f"start of epoch {control.epoch}")
    marks += [] if control is None else [name for name, version in control.labels if version == number]
    try:
        manifest = registry.manifest(number)
    except UnknownVersion:
        return None
    except CorruptVersion:
        return {"version": number, "marks": [*marks, "corrupt"]}
    if view is not None and not view.reaches(registry, manifest):
        marks.append("serve only")
    return {
        "version": number,
        "epoch": manifest.epoch,
        # A version can be newer than `now_ms`, the start of the command.
        "age_s": max(0, now_ms - manifest.created_at_ms) / 1000,
        "created_at_ms": manifest.created_at_ms,
        "kind": "base" if number in registry.bases() else manifest.kind,
        "log": {
            "topic": manifest.log.topic,
            "partition": manifest.log.partition,
            "first": manifest.log.first,
            "next": manifest.log.next,
        },
        "rows": manifest.rows,
        "metrics": {name: value if math.isfinite(value) else None for name, value in manifest.metrics.items()},
        "marks": marks,
    }


def _figure(entry: dict[str, Any], name: str) -> str:
    measured = entry.get("metrics", {})
    # Release 0.1.0 used the name `log_loss` for a value that is not comparable, see `trainer/measures/evaluation.py`.
    value = None if name == "log_loss" and "training_loss" not in measured else measured.get(name)
    return "-" if value is None else f"{value:.4f}"
