"""What Alertmanager's webhook sends: which alert fires, and since when. Pure.

https://prometheus.io/docs/alerting/latest/configuration/#webhook_config, version 4 of its JSON.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import orjson

from deploy.operate.times import parse_time
from state.errors import BadRequest, SettingsError

VERSION = "4"
MOST_TEXT = 300


@dataclass(frozen=True)
class Notification:
    """The alert of a notification that began first.

    Attributes:
        alert: Its name.
        began_ms: When it began to fire.
        summary: What it says.
    """

    alert: str
    began_ms: int
    summary: str


def firing(body: bytes) -> Notification | None:
    """The first of the alerts that fire; None where all are resolved.

    >>> one = {"status": "firing", "labels": {"alertname": "A"}, "annotations": {}, "startsAt": "2026-05-01T00:00:00Z"}
    >>> firing(orjson.dumps({"version": "4", "alerts": [one]}))
    Notification(alert='A', began_ms=1777593600000, summary='')
    >>> firing(orjson.dumps({"version": "4", "alerts": [one | {"status": "resolved"}]}))

    Raises:
        BadRequest: The body is no notification of version 4.
    """
    try:
        document = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise BadRequest(f"the body is no JSON ({error})", "send what Alertmanager's webhook sends") from None
    if not isinstance(document, dict) or document.get("version") != VERSION:
        raise BadRequest("the body is no notification of version 4", "send what Alertmanager's webhook sends")
    alerts = document.get("alerts")
    if not isinstance(alerts, list) or not alerts:
        raise BadRequest("it has no alerts", "send what Alertmanager's webhook sends", "/alerts")
    found = [_alert(one, number) for number, one in enumerate(alerts)]
    return min((one for one in found if one is not None), key=lambda one: one.began_ms, default=None)


def _alert(found: Any, number: int) -> Notification | None:
    where = f"/alerts/{number}"
    if not isinstance(found, dict) or found.get("status") not in ("firing", "resolved"):
        raise BadRequest("an alert has the status firing or resolved", where=f"{where}/status")
    labels, annotations = found.get("labels"), found.get("annotations", {})
    name = labels.get("alertname") if isinstance(labels, dict) else None
    # It becomes a name in the audit log, and no line of somebody else's making.
    if not isinstance(name, str) or not re.fullmatch(r"[\w:-]{1,100}", name, re.ASCII):
        raise BadRequest("an alert has a name of letters, digits and _:-", where=f"{where}/labels/alertname")
    summary = annotations.get("summary", "") if isinstance(annotations, dict) else ""
    try:
        began_ms = parse_time(str(found["startsAt"]), 0)
    except (KeyError, SettingsError):
        raise BadRequest("an alert has a time at which it began", where=f"{where}/startsAt") from None
    if found["status"] == "resolved":
        return None
    words = "".join(one if one.isprintable() else " " for one in str(summary)).split()
    return Notification(name, began_ms, " ".join(words)[:MOST_TEXT])
