"""Says how large a deployment must be: `springtide capacity`, `python -m deploy.capacity.command [options]`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields

from deploy.capacity import tables
from deploy.capacity.limits import limits, most_clicks_s
from deploy.capacity.load import Load
from deploy.capacity.measured import MeasuredCosts, with_own
from deploy.capacity.page import page
from deploy.capacity.prices import Prices, bills, total
from deploy.capacity.sizes import ANSWERS, AUTO, FORMS, Sizing
from deploy.command_line import RefusingParser
from state.config.loading import load
from state.config.settings import Settings
from state.config.sources import split_settings
from state.errors import SettingsError, SpringtideError
from state.process.closed_output import while_read

DESCRIPTION = "Says what a deployment takes (cores, memory, disk, network, partitions, cost a month) and which limit it meets first."
EPILOG = (
    "Settings are written --section.name VALUE and count too: features.history, stream.max_users, serving.max_users, "
    "trainer.max_rows, model.dim, [registry], serving.keep_s. "
    "Exit codes: 0 done, 1 the load is beyond a limit, 2 wrong use."
)
PRICES = {one.name: f"--price-{one.name.replace('_', '-')}" for one in fields(Prices)}


def amount(text: str) -> float:
    """A number above 0, also written as 1e6.

    >>> amount("1e6")
    1000000.0

    Raises:
        argparse.ArgumentTypeError: It is none.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e15:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def parser() -> argparse.ArgumentParser:
    """What may be asked."""
    found = RefusingParser(prog="springtide capacity", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False)
    found.add_argument("--clicks", type=amount, default=10_000.0, metavar="N", help="clicks a second (default 10000)")
    found.add_argument(
        "--users", type=amount, default=1e6, metavar="N", help="users who click within the longest window (1e6)"
    )
    found.add_argument("--items", type=amount, default=Load.items, metavar="N", help="items that have a row (100000)")
    found.add_argument("--versions", type=amount, metavar="N", help="versions a second (1 / trainer.publish_s)")
    found.add_argument(
        "--answers", type=amount, default=1000.0, metavar="N", help="answers a second, over all hosts (1000)"
    )
    found.add_argument("--answer", choices=tuple(ANSWERS), default="lean", help="kind of the answers (lean)")
    found.add_argument("--retention-h", type=amount, metavar="H", help="hours that Kafka keeps (kafka.retention_h)")
    found.add_argument(
        "--click-bytes", type=amount, default=Load.click_bytes, metavar="N", help="a click in Kafka (100)"
    )
    found.add_argument(
        "--use", type=amount, default=Sizing.use, metavar="SHARE", help="of a core that is planned to be used (0.6)"
    )
    found.add_argument(
        "--host-cores", type=int, default=Sizing.host_cores, metavar="N", help="cores of a serving host (16)"
    )
    found.add_argument(
        "--stream", choices=FORMS, default=AUTO, help="form of the stream; auto: flink where one process is not enough"
    )
    found.add_argument("--replication", type=int, default=Sizing.replication, metavar="N", help="copies in Kafka (3)")
    found.add_argument(
        "--measured", action="append", default=[], metavar="NAME=VALUE", help="a figure of your machine; repeatable"
    )
    for name, flag in PRICES.items():
        found.add_argument(flag, type=float, default=getattr(Prices, name), metavar="P", help="price of a month")
    found.add_argument("-o", "--output", choices=("text", "json"), default="text", help="how to print (text)")
    found.add_argument("--markdown", action="store_true", help="print deploy/CAPACITY.md instead")
    return found


def sizing_of(asked: argparse.Namespace, settings: Settings) -> Sizing:
    """The sizing that a command line asks for.

    Raises:
        SettingsError: Something of it cannot be.
    """
    if asked.use > 1 or asked.host_cores < 1 or asked.replication < 1:
        raise SettingsError("--use is at most 1, --host-cores and --replication at least 1", "correct them")
    wanted = Load(
        clicks_s=asked.clicks,
        users=asked.users,
        versions_s=asked.versions or 1 / settings.trainer.publish_s,
        answers_s=asked.answers,
        retention_h=asked.retention_h or settings.kafka.retention_h,
        items=asked.items,
        click_bytes=asked.click_bytes,
        answer=asked.answer,
    )
    figures = with_own(MeasuredCosts(), asked.measured)
    return Sizing(wanted, settings, figures, asked.use, asked.host_cores, asked.replication, asked.stream)


def as_text(sizing: Sizing, prices: Prices) -> str:
    """What it takes, in lines."""
    one = sizing
    lines = [
        *tables.parts(one, prices),
        "",
        f"stream        {'a job on Flink' if one.on_flink else 'one local process'}",
        f"partitions    clicks {one.partitions}, training log 1 ({tables.size(one.log_bytes_s)}/s)",
        f"a new host    answers after {tables.duration(one.catch_up_s)}: it reads all of the training log that is kept",
        f"a base        {tables.size(one.base_bytes)}",
        "",
    ]
    for limit in limits(one):
        most = most_clicks_s(one, limit.name)
        ends = f"; ends at {tables.short(most)} clicks/s" if 0 < most < math.inf else ""
        lines.append(f"{'BEYOND' if limit.share > 1 else 'within':<13} {limit.name}: {tables.told(limit)}{ends}")
    return "\n".join(lines)


def as_document(sizing: Sizing, prices: Prices) -> dict[str, object]:
    """The same for a machine."""
    found = bills(sizing, prices)
    return {
        "parts": {part: asdict(one) for part, one in found.items()},
        "total": asdict(total(found)),
        "stream": "flink" if sizing.on_flink else "local",
        "partitions": {"clicks": sizing.partitions, "training_log": 1},
        "hosts": sizing.hosts,
        "catch_up_s": sizing.catch_up_s,
        "limits": [
            {"name": one.name, "asked": one.asked, "most": one.most, "unit": one.unit, "share": one.share}
            for one in limits(sizing)
        ],
    }


def run(argv: Sequence[str]) -> int:
    """Prints what was asked for; returns the exit code.

    Raises:
        SettingsError: The line is wrong.
    """
    flags, words = split_settings(argv)
    asked = parser().parse_args(words)
    if asked.markdown:
        # The page is of the defaults, whatever is set here.
        print(page(Settings()))
        return 0
    sizing = sizing_of(asked, load(flags))
    prices = Prices(**{name: getattr(asked, flag[2:].replace("-", "_")) for name, flag in PRICES.items()})
    print(json.dumps(as_document(sizing, prices)) if asked.output == "json" else as_text(sizing, prices))
    return 1 if tables.broken(sizing) else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return while_read(lambda: _status(words))


def _status(words: Sequence[str]) -> int:
    try:
        return run(words)
    except SpringtideError as error:
        print(f"springtide capacity: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
