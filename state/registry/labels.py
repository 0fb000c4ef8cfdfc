"""Labels: names that the operator gives to versions, so that clients can ask for a name. Pure."""

from __future__ import annotations

import re

from state.errors import UnfitVersion
from state.registry.control import Control, following

FORM = re.compile(r"[a-z][a-z0-9_-]{0,31}")
MOST = 16


def label(control: Control, name: str, version: int | None, *, actor: str, reason: str, now_ms: int) -> Control:
    """Gives a label to a version, or removes it. Returns the same control if nothing changes.

    Args:
        control: The control to start from.
        name: The label.
        version: The version that gets the label; None to remove the label.
        actor: Who decided.
        reason: Why.
        now_ms: Wall clock.

    Raises:
        UnfitVersion: The label is malformed, or there would be too many.

    >>> from state.registry.control import start
    >>> first = start(actor="trainer", reason="first start", now_ms=0)
    >>> named = label(first, "canary", 7, actor="ann", reason="try it", now_ms=5)
    >>> named.generation, named.labels
    (2, (('canary', 7),))
    >>> label(named, "canary", 7, actor="bob", reason="again", now_ms=6) is named
    True
    >>> label(named, "canary", None, actor="ann", reason="done", now_ms=7).labels
    ()
    """
    if not FORM.fullmatch(name):
        raise UnfitVersion(
            f"{name[:100]!r} is no label", "use up to 32 of a-z, 0-9, - and _, a letter first, such as stable or canary"
        )
    labels = {one: number for one, number in control.labels if one != name}
    if version is not None:
        labels[name] = version
    if len(labels) > MOST:
        raise UnfitVersion(f"there are {MOST} labels already", "take one away with `springtide label NAME --remove`")
    if dict(control.labels) == labels:
        return control
    return following(control, "label", actor, reason, now_ms, labels=tuple(sorted(labels.items())))


def named(control: Control) -> frozenset[int]:
    """The versions that control names: the epoch's base, the pinned one, labelled ones. They are kept at any age."""
    versions = {control.base, control.serving.version, *(version for _, version in control.labels)}
    return frozenset(version for version in versions if version is not None)
