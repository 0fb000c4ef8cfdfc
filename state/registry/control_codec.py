"""Encodes control generations as canonical JSON; users of masks are in files of their own. Pure."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from state.features.erased import Erased
from state.features.mask import Mask
from state.features.masked_users import MaskedUsers
from state.registry import held_update, log_line, mask_entries
from state.registry.control import Control, ServingChoice
from state.registry.log_line import WHOLE
from state.registry.mask_entries import UsersOf

FORMAT, EXTENDED = 1, 2
"""FORMAT holds what 0.1.0 knew. EXTENDED holds what a release that reads only format 1 would get wrong."""


def encode(control: Control) -> bytes:
    """Encodes `control` as canonical JSON: equal controls give equal bytes."""
    document: dict[str, Any] = {
        "generation": control.generation,
        "created_at_ms": control.created_at_ms,
        "actor": control.actor,
        "reason": control.reason,
        "action": control.action,
        "epoch": control.epoch,
        "base": control.base,
        "serving": {"mode": control.serving.mode, "version": control.serving.version},
    }
    more: dict[str, Any] = {}
    if control.log != WHOLE:
        more |= {"mode": control.mode, "log": log_line.to_json(control.log)}
    if control.last_mask:
        more |= {
            "masks": [mask_entries.to_json(one) for one in control.masks],
            "lifted": [mask_entries.to_json(one) for one in control.lifted],
            "mask_generation": control.mask_generation,
            "last_mask": control.last_mask,
        }
    if control.erased:
        more |= {"erased": {"last": control.erased.last, "sha256": control.erased.digest}}
        more["mask_generation"] = control.mask_generation
    more |= {name: False for name in ("publishing", "training") if not getattr(control, name)}
    if control.labels:
        more["labels"] = dict(control.labels)
    if control.upgraded:
        more["upgraded"] = True
    if control.serving.then_follow:
        more["then_follow"] = True
    if control.held is not None:
        more["held"] = held_update.to_json(control.held)
    if control.released:
        more["released"] = list(control.released)
    if control.plan is not None:
        more["plan"] = dict(control.plan)
    if more:
        document |= {"format": EXTENDED, **more}
    else:
        document |= {"format": FORMAT, "mask": Mask.NONE.to_json()}
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def no_files(digest: str) -> MaskedUsers:
    """Default `users_of` of `decode`: finds no file.

    Raises:
        ValueError: Always.
    """
    raise ValueError(f"no file of users {digest}")


ErasedOf = Callable[[str], Erased]
"""Reads the erasures up to and including the file with this SHA-256."""


def no_erasures(digest: str) -> Erased:
    """Default `erased_of` of `decode`: finds no file.

    Raises:
        ValueError: Always.
    """
    raise ValueError(f"no file of erasures {digest}")


def decode(document: Mapping[str, Any], users_of: UsersOf = no_files, erased_of: ErasedOf = no_erasures) -> Control:
    """Decodes the control that `encode` wrote, after JSON parsing; fields of later releases are ignored.

    Args:
        document: The parsed JSON document.
        users_of: Reads the users of a mask.
        erased_of: Reads the erasures.

    >>> from state.registry.control import start
    >>> first = start(actor="trainer", reason="first start", now_ms=0)
    >>> decode(json.loads(encode(first))) == first
    True

    Raises:
        ValueError: This release does not read its format, or a field is missing.
    """
    if document.get("format") not in (FORMAT, EXTENDED):
        raise ValueError(f"control of format {document.get('format')!r}; this release reads {FORMAT} and {EXTENDED}")
    try:
        serving = document["serving"]
        return Control(
            generation=int(document["generation"]),
            created_at_ms=int(document["created_at_ms"]),
            actor=str(document["actor"]),
            reason=str(document["reason"]),
            action=document["action"],
            epoch=int(document["epoch"]),
            base=document["base"],
            serving=ServingChoice(serving["mode"], serving["version"], bool(document.get("then_follow"))),
            **_masks(document, users_of),
            mode=document.get("mode", "fast"),
            log=log_line.from_json(document["log"]) if "log" in document else WHOLE,
            upgraded=bool(document.get("upgraded")),
            publishing=bool(document.get("publishing", True)),
            training=bool(document.get("training", True)),
            labels=tuple((str(name), int(version)) for name, version in sorted(document.get("labels", {}).items())),
            erased=erased_of(str(document["erased"]["sha256"])) if "erased" in document else Erased.NOBODY,
            held=held_update.from_json(document["held"]) if "held" in document else None,
            released=tuple(int(one) for one in document.get("released", ())),
            plan=document.get("plan"),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"control without the field {error}") from error


def _masks(document: Mapping[str, Any], users_of: UsersOf) -> dict[str, Any]:
    """The fields of control about masks; the single mask of format 1 is split into entries."""
    if document["format"] == FORMAT:
        mask = Mask.from_json(document["mask"])
        held = tuple(mask_entries.entries(mask))
        return {"masks": held, "mask_generation": mask.generation, "last_mask": len(held)}
    return {
        name: tuple(mask_entries.from_json(one, users_of) for one in document.get(name, ()))
        for name in ("masks", "lifted")
    } | {name: int(document.get(name, 0)) for name in ("mask_generation", "last_mask")}
