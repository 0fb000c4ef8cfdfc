"""`springtide history` and `springtide masks`: who decided what, with what outcome, and which clicks are masked."""

from __future__ import annotations

import argparse
import json
from typing import Any

from deploy.operate.control import Say, control_document, current
from deploy.operate.masking import describe
from deploy.operate.times import age, iso
from deploy.operate.versions import open_registry, table
from state.config.settings import Settings
from state.registry.control import Control, MaskEntry
from state.registry.controls import Part
from state.registry.registry import Registry

PARTS: tuple[Part, ...] = ("planned", "answered", "learned")


def history(settings: Settings, args: argparse.Namespace, now_ms: int, say: Say) -> None:
    """Lists control generations: who decided what, when and why, and the outcome of each rollback."""
    registry = open_registry(settings)
    # One generation more, because an outcome is computed from a generation and the one before it.
    stored = registry.controls(None if args.all else args.last + 1)
    controls = stored if args.all else stored[-args.last :]
    befores = [None, *stored][-1 - len(controls) : -1]
    outcomes = {
        control.generation: outcome(registry, control, before)
        for before, control in zip(befores, controls, strict=True)
    }
    if args.output == "json":
        say(json.dumps([control_document(control) | outcomes[control.generation] for control in controls], indent=2))
        return
    head = ["generation", "at", "actor", "action", "epoch", "from", "answers", "left out", "reason"]
    lines = [
        [
            str(control.generation),
            iso(control.created_at_ms),
            control.actor,
            control.action,
            str(control.epoch),
            "nothing" if control.base is None else str(control.base),
            "newest" if control.serving.version is None else f"version {control.serving.version}",
            describe(control.mask),
            control.reason,
        ]
        for control in controls
    ]
    say(table([head, *lines]) if lines else "no control yet; the trainer writes the first")
    for control in controls:
        if recorded := outcomes[control.generation]:
            say(f"generation {control.generation}: {compared(recorded['outcome'])}")
    if controls and (older := controls[0].generation - 1):
        say(f"{older:,} older {'generation is' if older == 1 else 'generations are'} stored too; --all lists them")


def outcome(registry: Registry, control: Control, before: Control | None) -> dict[str, Any]:
    """Returns plan and result of a rollback that began an epoch; empty for other generations."""
    if control.action != "rollback" or (before is not None and before.epoch == control.epoch):
        return {}
    return {"outcome": {part: registry.generations.outcome(control.epoch, part) for part in PARTS}}


def compared(outcome: dict[str, Any]) -> str:
    """Compares an outcome with its plan, in words.

    >>> planned = {"mode": "fast", "rows": 5000, "masked": 120, "replay_s": 2.4, "answers": {"serves": True, "seconds": 0.0}}
    >>> learned = {"seconds": 3.1, "again": {"rows": 5000, "masked": 120}}
    >>> compared({"planned": planned, "answered": {"seconds": 0.31}, "learned": learned})
    'answers after 0.3 s (planned 0.0 s); caught up after 3.1 s (2.4 s); 5,000 examples read again (5,000), 120 left out by the trainer (120)'
    >>> compared({"planned": {"exact": {"clicks": 700}}, "answered": None, "learned": {"seconds": 3.1, "again": {"clicks": 700}}})
    'the time at which answers switched is unknown; caught up after 3.1 s; 700 clicks read again (700)'
    >>> compared({"planned": None, "answered": None, "learned": None})
    'the time at which answers switched is unknown; not caught up yet'
    """
    planned, answered, learned = (outcome[part] for part in ("planned", "answered", "learned"))
    parts = ["the time at which answers switched is unknown"]
    if answered is not None:
        expected = f" (planned {planned['answers']['seconds']:.1f} s)" if planned else ""
        parts = [f"answers after {answered['seconds']:.1f} s{expected}"]
    if learned is None:
        return "; ".join([*parts, "not caught up yet"])
    expected_s = planned.get("replay_s") if planned else None
    parts.append(f"caught up after {age(learned['seconds'])}{'' if expected_s is None else f' ({age(expected_s)})'}")
    if (again := learned.get("again")) is not None:
        if "clicks" in again:
            # The stream rewrites different rows: without the newly masked ones, with those of lifted masks.
            clicks = f" ({planned['exact']['clicks']:,})" if planned else ""
            parts.append(f"{again['clicks']:,} clicks read again{clicks}")
            return "; ".join(parts)
        is_counted = planned is not None and "rows" in planned
        rows, masked = (f" ({planned[name]:,})" if is_counted else "" for name in ("rows", "masked"))
        parts.append(
            f"{again['rows']:,} examples read again{rows}, {again['masked']:,} left out by the trainer{masked}"
        )
    return "; ".join(parts)


def masks(settings: Settings, args: argparse.Namespace, now_ms: int, say: Say) -> None:
    """Lists all masks, lifted ones included: who set each, when and why, with its examples and users."""
    registry = open_registry(settings)
    control = current(registry)
    all_masks = (*control.masks, *control.lifted)
    entries = [
        _entry(registry, mask, registry.generations.generation(mask.generation) if mask.generation else None)
        for mask in all_masks
    ]
    if args.output == "json":
        say(json.dumps(entries, indent=2))
        return
    if not entries:
        say("nothing is left out")
        return
    head = ["mask", "leaves out", "examples", "users", "set", "by", "reason", ""]
    lines = [
        [
            str(entry["id"]),
            entry["what"],
            "?" if entry["rows"] is None else f"{entry['rows']:,}",
            "?" if entry["users"] is None else f"{entry['users']:,}",
            iso(entry["at_ms"]) if entry["at_ms"] is not None else "?",
            entry["actor"] or "?",
            entry["reason"] or "?",
            f"lifted by generation {entry['lifted']}" if entry["lifted"] else "",
        ]
        for entry in entries
    ]
    say(table([head, *lines]))


def _entry(registry: Registry, entry: MaskEntry, set_by: Control | None) -> dict[str, Any]:
    planned = None if set_by is None else registry.generations.outcome(set_by.epoch, "planned")
    hit = ((planned or {}).get("masks") or {}).get(str(entry.id), {})
    return {
        "id": entry.id,
        "generation": entry.generation,
        "what": describe(entry.mask),
        "rows": hit.get("rows"),
        "users": hit.get("users"),
        "at_ms": None if set_by is None else set_by.created_at_ms,
        "actor": None if set_by is None else set_by.actor,
        "reason": None if set_by is None else set_by.reason,
        "lifted": entry.lifted or None,
    }
