"""Control transition for an upgrade, the plan that it records, and the feature specs that upgrades replaced.

The generation that begins the epoch of an upgrade has this plan:

    spec        digest of the feature spec that training continues with
    was         digest of the feature spec of the base version; none if training starts from scratch
    model       the settings of `SETTINGS` that training continues with, by name, as text
    carried     what is carried over from the version; `trainer.versions.carrying` defines how
    anew        what starts from scratch, in words

Until the epoch has a version of its own, the trainer may carry its base over.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from state.config.settings import Settings
from state.registry.control import Control, ServingChoice, following
from state.registry.manifest import Manifest, sees
from state.registry.registry import Registry

SETTINGS = ("ranker", "tower", "dim", "hidden", "options", "preprocessing")
"""Settings of `[model]` that may change the weights of a version, or their meaning."""


def going_on_to(settings: Settings, spec: str) -> dict[str, Any]:
    """The part of a plan that describes the settings and the digest of their feature spec.

    >>> going_on_to(Settings(), "ab")["model"]["dim"]
    '32'
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
    """Begins an epoch in which another model, feature spec or release continues from version `base`.

    Args:
        control: The control to start from.
        base: The version to continue from; None to train from scratch.
        plan: What is carried over to which settings; see the module.
        actor: Who decided.
        reason: Why.
        now_ms: Wall clock.
        answers: The version to pin serving to until the trainer has caught up; None to leave serving as it is.
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
    """The generation that began control's epoch, if it is an upgrade without a version so far; otherwise None.

    Raises:
        CorruptVersion: A manifest or a generation fails its digest.
    """
    began = registry.generations.beginning_of(control.epoch)
    if began is None or began.action != "upgrade" or registry.newest(control.epoch) is not None:
        return None
    return began


def is_accepted(registry: Registry, control: Control, settings: Settings, spec: str) -> bool:
    """Whether an operator accepted that these settings continue from what others learned.

    Raises:
        CorruptVersion: A manifest or a generation fails its digest.
    """
    began = pending(registry, control)
    if began is None or began.plan is None:
        return False
    return all(began.plan.get(name) == value for name, value in going_on_to(settings, spec).items())


def former_specs(beginnings: Iterable[Control]) -> frozenset[str]:
    """The digests of all feature specs that upgrades went from and to; `beginnings` are the generations that began epochs."""
    plans = [began.plan for began in beginnings if began.action == "upgrade" and began.plan is not None]
    return frozenset(str(spec) for plan in plans for spec in (plan.get("spec"), plan.get("was")) if spec)


def first_after(
    registry: Registry, beginnings: Sequence[Control], base: Manifest | None, target: Manifest
) -> Manifest | None:
    """The oldest kept version of `target`'s descent after the last upgrade since `base`; None if there is no upgrade.

    Raises:
        UnknownVersion: A version that an epoch began from is no longer kept.
    """
    began = {control.epoch: control for control in beginnings}
    epoch = target.epoch
    while (base is None or epoch > base.epoch) and epoch in began:
        control = began[epoch]
        if control.base is None:
            return None
        if control.action == "upgrade":
            numbers = (number for number in registry.versions() if sees(target.visible, number))
            return next(found for number in numbers if (found := registry.manifest(number)).epoch == epoch)
        epoch = registry.manifest(control.base).epoch
    return None
