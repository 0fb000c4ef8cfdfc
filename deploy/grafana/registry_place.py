"""The registry that hosts share: whether it is reached, whether what is published is there, and what is asked of it."""

from __future__ import annotations

from deploy.grafana.panel import Panel, PanelQuery, rate

ALONE = "the registry is shared with nobody"

SHARED = (
    Panel(
        "Age of what a host saw there",
        (PanelQuery("instance:springtide_shared_looked_seconds:age", "{{instance}}", empty=ALONE),),
        "s",
        "Time since each host last saw what is new in the shared registry.",
        "below a second; nothing where `paths.shared_registry` is empty.",
        "all hosts: the store is away, or the rights to it. One: its link, or its clock.",
        "the-shared-registry-is-away",
        alarm=60,
        alerts=("SpringtideSharedAway",),
        width=6,
    ),
    Panel(
        "Age of what is there",
        (PanelQuery("instance:springtide_shared_sent_seconds:age", "{{instance}}", empty=ALONE),),
        "s",
        "Time since all durable versions of the trainer lay in the shared registry.",
        "below a second, and some seconds while a base is sent.",
        "the trainer's log names what the store refuses; else its link carries less than is published.",
        "the-shared-registry-is-away",
        alarm=300,
        alerts=("SpringtideSharedUnsent",),
        width=6,
    ),
    Panel(
        "Requests to it",
        (
            PanelQuery(rate("springtide_shared_requests_total", "operation"), "{{operation}}", empty=ALONE),
            PanelQuery(
                rate("springtide_shared_failures_total", "operation"),
                "{{operation}}",
                empty="no request was refused",
                dashed=True,
            ),
        ),
        "reqps",
        "Requests a second of all hosts together, by operation; dashed: those that were not answered, or refused.",
        "eight `get` a second for each host, three `put` for the trainer; none dashed.",
        "a line of failures: the log of that host names what is refused.",
        "the-shared-registry-is-away",
        width=6,
    ),
    Panel(
        "Bytes to and from it",
        (PanelQuery(rate("springtide_shared_bytes_total", "direction"), "{{direction}}", empty=ALONE),),
        "Bps",
        "Bytes a second that all hosts send and receive.",
        "as many for each host as the trainer sends; more while a new host begins.",
        "level below that: a link is full, and versions are left out; a longer trainer.publish_s makes it less.",
        "the-shared-registry-is-away",
        width=6,
    ),
)
