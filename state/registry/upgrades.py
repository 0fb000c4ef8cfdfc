"""What an upgrade is in control: the settings that an epoch goes on to, and the feature specs that it left.

The generation that begins such an epoch carries, as its plan:

    spec        digest of the feature spec that training goes on with
    was         digest of that of the version it goes on from; none where it learns anew
    model       the settings of `SETTINGS` that it goes on with, by name, as text
    carried     of the version, what goes on; `trainer.versions.carrying` says how
    anew        what begins anew, in words

Until the epoch has a version of its own, what trains in it may carry its base over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from state.config.settings import Settings
from state.registry.control import Control, ServingChoice, following
from state.registry.manifest import Manifest, sees
from state.registry.registry import Registry

SETTINGS = ("ranker", "tower", "dim", "hidden", "options", "preprocessing")
"""Settings of `[model]` that may change the weights of a version, or what they mean."""


def going_on_to(settings: Settings, spec: str) -> dict[str, Any]:
    """What a plan says of the settings.

    >>> going_on_to(Settings(), "ab")["model"]["dim"]
    '32'

    Args:
        settings: Those to go on with.
        spec: Digest of their feature spec.
    """
    return {"spec": spec, "model": {name: str(getattr(settings.model, name)) for name in SETTINGS}}


def upgrade(
    control: Control,
    base: int | None,
    plan: Mapping[str, Any],
    *,
    actor: str,
    reason: str,
    now_ms: int,
    answers: int | None = None,
) -> Control:
    """A new epoch in which another model, feature spec or release goes on from version `base`.

    Args:
        control: The control to start from.
        base: The version to go on from; None to learn anew, from nothing.
        plan: What is carried over, and what for; see the module.
        actor: Who decided.
        reason: Why.
        now_ms: Wall clock.
        answers: The version that answers come from until the trainer has caught up; None to leave answers as they are.

    >>> from state.registry.control import start
    >>> first = start(actor="trainer", reason="first start", now_ms=0)
    >>> on = upgrade(first, 40, {"spec": "ab"}, actor="ann", reason="wider rows", now_ms=9)
    >>> on.epoch, on.base, on.serving.mode
    (2, 40, 'follow')
    """
    serving = control.serving if answers is None else ServingChoice("pin", answers, then_follow=True)
    return following(
        control,
        "upgrade",
        actor,
        reason,
        now_ms,
        epoch=control.epoch + 1,
        base=base,
        serving=serving,
        lifted=(),
        mode="fast",
        upgraded=True,
        plan=dict(plan),
    )


def pending(registry: Registry, control: Control) -> Control | None:
    """The generation that began control's epoch, where that is an upgrade of which there is no version yet.

    Raises:
        CorruptVersion: A manifest or a generation fails its digest.
    """
    began = registry.beginning_of(control.epoch)
    if began is None or began.action != "upgrade" or registry.newest(control.epoch) is not None:
        return None
    return began


def is_accepted(registry: Registry, control: Control, settings: Settings, spec: str) -> bool:
    """Whether an operator said that these settings go on from what other ones learned.

    Raises:
        CorruptVersion: As `pending`.
    """
    began = pending(registry, control)
    if began is None or began.plan is None:
        return False
    return all(began.plan.get(name) == value for name, value in going_on_to(settings, spec).items())


def former_specs(beginnings: Iterable[Control]) -> frozenset[str]:
    """The digests of all feature specs that upgrades went from and to.

    Args:
        beginnings: The generations that began epochs, at least: an upgrade begins one.
    """
    plans = [one.plan for one in beginnings if one.action == "upgrade" and one.plan is not None]
    return frozenset(str(spec) for plan in plans for spec in (plan.get("spec"), plan.get("was")) if spec)


def first_after(
    registry: Registry, beginnings: Sequence[Control], base: Manifest | None, target: Manifest
) -> Manifest | None:
    """The oldest version kept on the line of `target` behind the last upgrade after `base`; None where there is no upgrade.

    Raises:
        UnknownVersion: A version that an epoch began from is not kept any more.
    """
    began = {one.epoch: one for one in beginnings}
    epoch = target.epoch
    while (base is None or epoch > base.epoch) and epoch in began:
        one = began[epoch]
        if one.base is None:
            return None
        if one.action == "upgrade":
            numbers = (number for number in registry.versions() if sees(target.visible, number))
            return next(found for number in numbers if (found := registry.manifest(number)).epoch == epoch)
        epoch = registry.manifest(one.base).epoch
    return None
