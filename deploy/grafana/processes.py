"""What each process takes of its machine, and which release it runs."""

from __future__ import annotations

from deploy.grafana.panel import RATE_INTERVAL, Panel, PanelKind, PanelQuery

PROCESSES = (
    Panel(
        "Processor time",
        (PanelQuery(f"sum by (job) (rate(process_cpu_seconds_total[{RATE_INTERVAL}]))", "{{job}}"),),
        "none",
        "Cores that each part keeps busy, user and system time of all its processes.",
        "well below the cores of the machine, all parts together.",
        "a part at a whole core is its own limit: add workers (serving.workers), or take a faster machine.",
        "clicks-wait",
    ),
    Panel(
        "Memory",
        (PanelQuery("sum by (job) (process_resident_memory_bytes)", "{{job}}"),),
        "bytes",
        "Memory that each part has in use, what it shares with others included.",
        "rising in the first hours, then level.",
        "growing without end is a defect: report it. The kernel ends the largest one where none is left.",
        "a-part-cannot-run",
    ),
    Panel(
        "Open files, of the limit",
        (PanelQuery("max by (job) (process_open_fds / process_max_fds)", "{{job}}"),),
        "percentunit",
        "Files and sockets that are open, of those that may be.",
        "a few percent, and level.",
        "near 100 % nobody can connect: raise the limit (`ulimit -n`), and see who keeps connections open.",
        "answers-fail",
        alarm=0.9,
    ),
    Panel(
        "Running since",
        (PanelQuery("min by (job) (process_start_time_seconds) * 1000", "{{job}}"),),
        "dateTimeFromNow",
        "When the oldest process of each part started.",
        "as long ago as your last start.",
        "moments ago, again and again: the part dies; see the deaths above.",
        "a-part-cannot-run",
        kind=PanelKind.STAT,
        width=12,
    ),
    Panel(
        "Releases",
        (PanelQuery("count by (version, python) (springtide_build_info)", "{{version}}, Python {{python}}"),),
        "none",
        "How many processes run which release, on which Python.",
        "one release; two while an upgrade goes from host to host.",
        "compare the hosts: versions may be refused where packages differ.",
        "a-new-release",
        kind=PanelKind.STAT,
        width=12,
    ),
)
