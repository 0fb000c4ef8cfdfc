"""Reports how large a deployment must be: `springtide capacity`, `python -m deploy.capacity.command [options]`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace

from deploy.capacity.sizes import CONSTANTS, VALUES, Load, Sizing
from deploy.command_line import RefusingParser
from deploy.watch.messages import seconds
from state.config.loading import load
from state.config.settings import Settings
from state.config.sources import split_settings
from state.errors import SettingsError, SpringtideError
from state.process.closed_output import while_read

DESCRIPTION = "Reports what a deployment takes (cores, memory, disk, partitions) and which limit it meets first."
EPILOG = (
    "Settings, written --section.name VALUE, count too: features.history, stream.max_users, serving.max_users, "
    "trainer.max_rows, model.dim, [registry], serving.keep_s. Exit codes: 0 done, 1 the load is beyond a limit, 2 wrong use."
)
EXAMPLES = (
    Load(clicks=200, users=2_000, items=4_000, answers=100),
    Load(clicks=2_000, answers=2_000),
    Load(clicks=10_000, answers=20_000),
    Load(clicks=10_000, users=1e7, items=1e6, answers=20_000),
    Load(clicks=100_000, users=1e8, items=1e7, answers=200_000),
    Load(clicks=1e6, users=1e9, items=1e8, answers=1e6),
)
PAGE = """# Capacity

Written by `springtide capacity --markdown > deploy/CAPACITY.md`. It says what a deployment takes and where the design ends. The measured constants below are from two shared cores. Beyond them the sizes are arithmetic: nobody has run more than 20,000 clicks/s here.

## One load

`springtide capacity --clicks 10000 --users 1e6 --answers 20000` prints the following; settings in force count. `--measured NAME=VALUE` replaces a constant by one of your machine. `-o json` prints the same for a program.

{shown}

Cores are planned for a utilisation of 60 %, memory and disk with a reserve of 25 %. One machine has at most 1 TB of memory and 10 Gbit/s, and a new host answers within an hour. Each limit is on something that there is one of; it "ends at" about the click rate at which it is reached, all else equal.

## Other loads

`max_users` and `max_rows` are at least as large as the load here. Where limits are passed, the sizes are what the work takes, not what one part can do.

{loads}

## Formulas

Sizes are linear in clicks, which is more than it takes: larger micro-batches cost less a row. U users of whom each is equally active change U (1 - exp(-clicks / U)) rows; items likewise.

{formulas}

## Measured constants

CPU time depends on the machine more than anything else here. A GPU, several machines, an object store under load and Kafka on disks of its own were not measured.

{constants}"""


def amount(text: str) -> float:
    """A number above 0, also written as 1e6.

    Raises:
        argparse.ArgumentTypeError: It is not.
    """
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e15:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


def constant(text: str) -> tuple[str, float]:
    """`NAME=VALUE`.

    Raises:
        argparse.ArgumentTypeError: There is no constant of this name, or the value is not a number above 0.
    """
    name, _, value = text.partition("=")
    if name not in CONSTANTS:
        raise argparse.ArgumentTypeError(f"there is no constant {name}; they are {', '.join(CONSTANTS)}")
    return name, amount(value)


def parser(settings: Settings) -> argparse.ArgumentParser:
    """The options: the fields of `Load`, and how to print."""
    found = RefusingParser(prog="springtide capacity", description=DESCRIPTION, epilog=EPILOG, allow_abbrev=False)
    defaults = {"versions": 1 / settings.trainer.publish_s, "retention_h": settings.kafka.retention_h}
    for option in fields(Load):
        default, choices = defaults.get(option.name, option.default), option.metadata["choices"]
        flag, meaning = f"--{option.name.replace('_', '-')}", f"{option.metadata['help']} ({default})"
        convert = str if choices else amount
        found.add_argument(flag, type=convert, choices=choices, default=default, help=meaning)
    found.add_argument(
        "--measured",
        type=constant,
        action="append",
        default=[],
        help="NAME=VALUE, a constant of your machine; repeatable",
    )
    found.add_argument("-o", "--output", choices=("text", "json"), default="text", help="how to print (text)")
    found.add_argument("--markdown", action="store_true", help="print deploy/CAPACITY.md instead")
    return found


def sizing_of(asked: argparse.Namespace, settings: Settings) -> Sizing:
    """The sizing that a command line asks for.

    Raises:
        SettingsError: An option is out of range.
    """
    if asked.use > 1 or asked.host_cores % 1 or asked.replication % 1:
        raise SettingsError("--use is at most 1, --host-cores and --replication are whole numbers", "correct them")
    load_asked = Load(**{option.name: getattr(asked, option.name) for option in fields(Load)})
    return Sizing(load_asked, settings, {**VALUES, **dict(asked.measured)})


def number(value: float) -> str:
    """Three digits.

    >>> [number(value) for value in (0.284, 12.0, 2_345.0)]
    ['0.28', '12', '2,340']
    """
    return f"{value:.2g}" if value < 10 else f"{round(value, min(0, 3 - len(f'{value:.0f}'))):,.0f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = ["| " + " | ".join(row) + " |" for row in (head, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def as_text(sizing: Sizing) -> str:
    """The answer in Markdown: the order of each part, and the limits."""
    parts = [
        [
            part,
            f"{need.instances:g}",
            f"{need.cores:,g}",
            number(need.memory_bytes / 1e9),
            number(need.disk_bytes / 1e9),
        ]
        for part, need in sizing.orders().items()
    ]
    limits = [
        [
            "BEYOND" if limit.share > 1 else "within",
            limit.name,
            f"{limit.share:.0%} of {number(limit.most)} {limit.unit}",
            f"{number(sizing.load.clicks / limit.share)} clicks/s" if limit.by_clicks else "-",
            limit.remedy,
        ]
        for limit in sizing.limits()
    ]
    return f"""{table(["part", "instances", "cores", "memory, GB", "disk, GB"], parts)}

The stream is {"a job on Flink" if sizing.on_flink else "one local process"}. The clicks topic has {sizing.partitions} partitions, the training log 1 with {number(sizing.log_bytes_s / 1e6)} MB/s. A new host answers after {seconds(sizing.catch_up_s)}.

{table(["", "limit", "share", "ends at", "what helps"], limits)}"""


def as_document(sizing: Sizing) -> dict[str, object]:
    """The answer for a program."""
    orders = {part: need._asdict() for part, need in sizing.orders().items()}
    return {
        "total": orders.pop("all"),
        "parts": orders,
        "stream": "flink" if sizing.on_flink else "local",
        "partitions": {"clicks": sizing.partitions, "training_log": 1},
        "hosts": sizing.hosts,
        "catch_up_s": sizing.catch_up_s,
        "limits": [limit._asdict() | {"share": limit.share} for limit in sizing.limits()],
    }


def page(settings: Settings) -> str:
    """The text of `deploy/CAPACITY.md`."""
    roomy = replace(
        settings,
        stream=replace(settings.stream, max_users=10**9),
        serving=replace(settings.serving, max_users=10**9),
        trainer=replace(settings.trainer, max_rows=10**9),
    )
    loads = []
    for sizing in (Sizing(example, roomy) for example in EXAMPLES):
        _, cores, memory_bytes, disk_bytes = sizing.orders()["all"]
        beyond = sum(limit.share > 1 for limit in sizing.limits())
        loads.append(
            [number(value) for value in (sizing.load.clicks, sizing.load.users, sizing.load.answers)]
            + [
                "Flink" if sizing.on_flink else "local",
                f"{cores:,g}",
                number(memory_bytes / 1e9),
                number(disk_bytes / 1e9),
            ]
            + [str(sizing.partitions), str(sizing.hosts), str(beyond)]
        )
    head = ["clicks/s", "users", "answers/s", "stream", "cores", "memory, GB", "disk, GB"]
    head += ["partitions", "hosts", "limits passed"]
    documented = {name: found.__doc__ for name, found in vars(Sizing).items() if isinstance(found, property)}
    formulas = [[f"`{name}`", formula] for name, formula in documented.items() if formula]
    constants = [
        [f"`{name}`", f"{number(one.value)} {one.unit}", one.meaning, f"`{one.bench}`"]
        for name, one in CONSTANTS.items()
    ]
    return PAGE.format(
        shown=as_text(Sizing(EXAMPLES[2], settings)),
        loads=table(head, loads),
        formulas=table(["answer", "formula"], formulas),
        constants=table(["constant", "value", "meaning", "measured by"], constants),
    )


def run(argv: Sequence[str]) -> int:
    """Prints the answer; returns the exit code."""
    try:
        flags, words = split_settings(argv)
        settings = load(flags)
        asked = parser(settings).parse_args(words)
        sizing = sizing_of(asked, settings)
    except SpringtideError as error:
        print(f"springtide capacity: {error}", file=sys.stderr)
        return error.exit_code
    if asked.markdown:
        # The page uses the defaults, whatever is set here.
        print(page(Settings()))
        return 0
    print(json.dumps(as_document(sizing)) if asked.output == "json" else as_text(sizing))
    return int(sizing.limits()[0].share > 1)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    return while_read(lambda: run(sys.argv[1:] if argv is None else argv))


if __name__ == "__main__":
    sys.exit(main())
