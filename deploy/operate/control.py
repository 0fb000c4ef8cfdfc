"""The operator's commands on control: pin and follow, label, hold and release, pause and resume, unmask."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from typing import Any

from deploy.formats import age, iso
from deploy.operate.masking import describe, mask_document
from deploy.operate.versions import open_registry, table
from state.config.settings import Settings
from state.errors import ControlConflict, RegistryError, SettingsError
from state.process.environment import actor
from state.registry import control as transitions
from state.registry.control import Control, MaskEntry, encode
from state.registry.controls import Part
from state.registry.registry import Registry

Say = Callable[[str], None]
Who = dict[str, Any]
"""Actor, reason and time of a change."""
Changed = tuple[Control, str]


def current(registry: Registry, if_generation: int | None = None) -> Control:
    """Returns the newest control generation.

    Raises:
        RegistryError: There is no control yet.
        ControlConflict: It is not `if_generation`, because control has changed since the caller read it.
    """
    control = registry.control()
    if control is None:
        raise RegistryError(f"{registry.path}: no control yet", "start the trainer first, it writes generation 1")
    if if_generation is not None and control.generation != if_generation:
        raise ControlConflict(
            f"control is at generation {control.generation} and no longer at {if_generation}: {control.action} by "
            f"{control.actor}, {control.reason}",
            "check it, then repeat the command if it still applies",
        )
    return control


def control_document(control: Control) -> dict[str, Any]:
    """Returns a control generation as JSON values; a mask's users are counted, not listed."""
    document: dict[str, Any] = json.loads(encode(control))
    return {**document, "mask": mask_document(control.mask)}


def change(settings: Settings, args: argparse.Namespace, now_ms: int, say: Say) -> None:
    """Changes control by one of `CHANGES`: creates a generation if something changes, and reports the result.

    Raises:
        ControlConflict: Another client changed control in the meantime.
    """
    registry = open_registry(settings)
    old = current(registry, args.if_generation)
    who = {"actor": actor(), "reason": args.reason, "now_ms": now_ms}
    new, result = CHANGES[args.command](registry, old, args, who)
    changed = new is not old
    if changed:
        registry.propose(new)
    if args.output == "json":
        say(json.dumps({"changed": changed, "control": control_document(new)}, indent=2))
    elif changed:
        say(f"generation {new.generation}: {result}")
    else:
        say(f"generation {old.generation}: already in this state; nothing was changed")


def _pin(registry: Registry, old: Control, args: argparse.Namespace, who: Who) -> Changed:
    registry.chain(args.version)
    return transitions.pin(old, args.version, **who), f"answers stay at version {args.version}"


def _label(registry: Registry, old: Control, args: argparse.Namespace, who: Who) -> Changed:
    if (args.version is None) != args.remove:
        raise SettingsError("a label needs either a version or --remove", "see `springtide label --help`")
    if args.version is not None:
        registry.chain(args.version)
    result = f"the label {args.name} is removed" if args.remove else f"{args.name} is version {args.version}"
    return transitions.label(old, args.name, args.version, **who), result


def _follow(registry: Registry, old: Control, args: argparse.Namespace, who: Who) -> Changed:
    return transitions.follow(old, **who), f"answers follow the newest version of epoch {old.epoch}"


def _switch(registry: Registry, old: Control, args: argparse.Namespace, who: Who) -> Changed:
    """Holds or releases publishing, pauses or resumes training; release and resume also clear a hold of the guard."""
    transition, on, result = SWITCHES[args.command]
    if old.held is None or args.command not in ("release", "resume"):
        return transition(old, on, **who), result
    result = f"the update held for {old.held.rule} is accepted: {result}, and these records are not held again"
    return transitions.release(old, action=args.command, **who), result


def _unmask(registry: Registry, old: Control, args: argparse.Namespace, who: Who) -> Changed:
    """Lifts masks, and describes how the masked clicks come back."""
    new = transitions.unmask(old, args.masks, **who)
    base = "V" if new.base is None else new.base
    return new, (
        f"{', '.join(map(str, args.masks))} lifted; new clicks count again; excluded clicks are learned at the next exact "
        f"rollback: `springtide rollback --to {base} --mode exact --reason TEXT`"
    )


SWITCHES = {
    "hold": (
        transitions.publish,
        False,
        "the trainer continues to learn and publishes no version until `springtide release`",
    ),
    "release": (transitions.publish, True, "the trainer publishes versions again"),
    "pause": (transitions.train, False, "the trainer reads no records until `springtide resume`; answers continue"),
    "resume": (transitions.train, True, "the trainer reads records again"),
}
CHANGES: Mapping[str, Callable[[Registry, Control, argparse.Namespace, Who], Changed]] = {
    "pin": _pin,
    "label": _label,
    "follow": _follow,
    "unmask": _unmask,
    **dict.fromkeys(SWITCHES, _switch),
}
"""By command, what returns the next generation, the same one if nothing changes, and the result in words."""


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
