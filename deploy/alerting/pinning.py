"""Pins answers to the newest version from before an alert began; what an operator decided is left as it is."""

from __future__ import annotations

from deploy.alerting.notification import Notification
from deploy.operate.commands import current
from deploy.operate.line import ServingLine, told
from deploy.operate.times import iso
from state.errors import UnknownVersion
from state.registry import control as transitions
from state.registry.registry import Registry

ACTOR = "alertmanager"


def pin_before(registry: Registry, notification: Notification, before_s: float, now_ms: int) -> str:
    """Pins, and says what was done; asked again it changes nothing. Durable when it returns.

    Args:
        registry: Where versions and control are.
        notification: The alert.
        before_s: How long before the alert began a version must have been made: the trouble is older than its alert.
        now_ms: Wall clock.

    Raises:
        UnknownVersion: No such version is kept.
        ControlConflict: Somebody else changed control meanwhile; Alertmanager asks again by itself.
        RegistryError: There is no control yet.
    """
    control = current(registry)
    if control.serving.mode == "pin":
        return f"answers stay at version {control.serving.version} already; nothing was changed"
    limit_ms = notification.began_ms - round(1000 * before_s)
    line = ServingLine(registry, control)
    found = line.last(lambda version: version.created_at_ms < limit_ms)
    if found is None:
        raise UnknownVersion(
            f"no version of the serving line was made before {iso(limit_ms)}", "lower webhook.before_s, or pin by hand"
        )
    version = line.loadable(found)
    actor = f"{ACTOR}: {notification.alert}"
    reason = notification.summary or f"{notification.alert} fires"
    registry.propose(transitions.pin(control, version.version, actor=actor, reason=reason, now_ms=now_ms))
    return f"answers stay at {told(version)}; `springtide follow` undoes it"
