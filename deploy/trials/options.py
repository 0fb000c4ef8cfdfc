"""What may be written behind `springtide trial`."""

from __future__ import annotations

import argparse

from deploy.operate.options import Add

VERBS = ("start", "list", "stop", "promote", "report")


def trial(add: Add) -> argparse.ArgumentParser:
    """The command about trials."""
    command = add(
        "trial",
        "Let a second trainer with other settings learn from the same rows, and compare it with the live one, row by row.",
        "`springtide up` runs its trainer, on trials.cores at most. Both score each row before they learn it; what their losses "
        "differ by is told with an interval that holds however often one looks. promote lets the live trainer go on from what "
        "the trial learned, in a new epoch; `springtide rollback` takes that back.",
    )
    command.add_argument(
        "what",
        choices=VERBS,
        help="start one; list all; stop one, which removes what it learned; promote one; report how the arms of its rollout compare",
    )
    command.add_argument("name", nargs="?", default="", metavar="NAME", help="the trial's name")
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.NAME=VALUE",
        help="start: a setting of [model], [trainer] or [guard] in which it differs; repeatable",
    )
    command.add_argument(
        "--from",
        dest="origin",
        choices=("live", "nothing", "clicks"),
        default="live",
        help="start: from the newest durable version (the default), from nothing and the training log's beginning, or from the clicks "
        "of the last retrain.days and the training log behind them",
    )
    command.add_argument("--reason", default="", metavar="TEXT", help="why; kept with your name")
    return command
