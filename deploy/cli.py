"""Entry point of the command line: `springtide COMMAND [options] [--section.name VALUE ...]`.

A command of a process replaces the interpreter, so that signals reach the process directly. An operator's command runs
here. Settings may appear anywhere in the arguments. Exit codes: 0 done, 1 failed, 2 wrong use.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from deploy.command_line import OWN_HELP, PROCESSES, READERS, operation, parser, with_times
from state.config.loading import load
from state.config.settings import SECTIONS, KnownSetting, Settings, as_text, known_settings, variable
from state.config.sources import MASK, nearest, nearest_setting, split_settings
from state.errors import SettingsError
from state.process.environment import wall_ms
from state.process.part import run_command
from state.process.private_files import keep_private
from state.process.user_code import for_children

SERVERS = "kafka.bootstrap_servers"


def chosen(names: Sequence[str]) -> list[KnownSetting]:
    """Returns the settings of these names and sections, in the order of their declaration; all if no name is given.

    >>> [one.name for one in chosen(["registry", "kafka.port"])][:2]
    ['kafka.port', 'registry.durable_s']

    Raises:
        SettingsError: There is no such section or setting.
    """
    declared = list(known_settings())
    known = {setting.name: setting for setting in declared}
    for name in names:
        if "." not in name and name not in SECTIONS:
            raise SettingsError(f"argument {name}: no such section", f"the nearest is {nearest(name, SECTIONS)}")
        if "." in name and name not in known:
            raise SettingsError(f"argument {name}: no such setting", f"the nearest is {nearest_setting(name, known)}")
    return [setting for setting in declared if not names or {setting.name, setting.name.partition(".")[0]} & {*names}]


def _changed(settings: Settings, settings_listed: Sequence[KnownSetting]) -> list[KnownSetting]:
    return [setting for setting in settings_listed if setting.name in settings.origins]


def origin(settings: Settings, setting: KnownSetting) -> str:
    """Returns where a setting's value came from.

    >>> from state.config.loading import load
    >>> servers = next(known for known in known_settings() if known.name == SERVERS)
    >>> origin(load(["--kafka.port", "9192"], env={}, path="/dev/null"), servers)
    'the local Kafka of kafka.port'
    """
    local = setting.name == SERVERS and SERVERS not in settings.origins
    return "the local Kafka of kafka.port" if local else settings.origins.get(setting.name, "default")


def as_lines(settings: Settings, listed: Sequence[KnownSetting]) -> str:
    """Formats the effective settings as springtide.toml would write them, each with its origin.

    Values that must not be read back are comments: a masked secret, and the address of the local Kafka.
    """
    lines: list[str] = []
    section = ""
    for setting in listed:
        part, _, name = setting.name.partition(".")
        if part != section:
            lines += [*([""] if lines else []), f"[{part}]"]
            section = part
        value, came_from = shown(settings, setting), origin(settings, setting)
        aside = value == MASK or came_from not in (settings.origins.get(setting.name), "default")
        written = f"{'# ' if aside else ''}{name} = {as_toml(value)}"
        lines.append(f"{written:<60}  # {came_from}")
    return "\n".join(lines)


def _as_pages(settings: Settings, listed: Sequence[KnownSetting]) -> str:
    pages = [
        "\n".join(
            [
                f"{setting.name} = {as_toml(shown(settings, setting))}{f' {setting.unit}' if setting.unit else ''}",
                f"    {setting.help}",
                f"    from      {origin(settings, setting)}",
                f"    default   {as_toml(setting.default)}",
                *(f"    allowed   {bounds}" for bounds in [allowed(setting)] if bounds),
                f"    write     [{setting.name.partition('.')[0]}] {setting.name.partition('.')[2]} = ..., "
                f"{variable(setting.name)}=...{'' if setting.secret else f', or --{setting.name} ...'}",
            ]
        )
        for setting in listed
    ]
    return "\n\n".join(pages)


def _as_json(settings: Settings, listed: Sequence[KnownSetting]) -> str:
    entries = [
        {
            "name": setting.name,
            "value": shown(settings, setting),
            "default": setting.default,
            "unit": setting.unit,
            "allowed": allowed(setting),
            "origin": origin(settings, setting),
            "secret": setting.secret,
            "help": setting.help,
        }
        for setting in listed
    ]
    return json.dumps(entries, indent=2)


def as_markdown() -> str:
    """Documents every setting, one table per section, from their declarations."""
    lines = [
        "# Settings",
        "",
        "Generated by `springtide config --markdown`. Set a setting in `springtide.toml` under its section, as a variable "
        f"(`{variable('kafka.port')}`), or as a flag (`--kafka.port`; not for secrets). A flag overrides a variable, "
        "and a variable overrides the file. In a variable or a flag, separate the elements of a list with commas. An "
        "invalid value or combination is refused at startup, with its file and line, variable or flag.",
    ]
    for section, kind in SECTIONS.items():
        lines += [
            "",
            f"## {section}",
            "",
            str(kind.__doc__),
            "",
            "| name | default | unit | allowed | description |",
            "|---|---|---|---|---|",
            *_rows(section),
        ]
    return "\n".join(lines)


def _rows(section: str) -> Iterator[str]:
    for setting in chosen([section]):
        secret = " Secret." if setting.secret else ""
        default = f"`{as_text(setting.default)}`" if as_text(setting.default) else ""
        name = setting.name.partition(".")[2]
        yield f"| `{name}` | {default} | {setting.unit} | {allowed(setting)} | {setting.help}{secret} |"


def allowed(setting: KnownSetting) -> str:
    """Describes the values that a setting may have; empty if its type is the only restriction.

    >>> by_name = {known.name: known for known in known_settings()}
    >>> [allowed(by_name[name]) for name in ("kafka.port", "trainer.device", "paths.state", "events.max_age_s")]
    ['1 to 65535', 'auto, cpu or gpu', 'not empty', 'above 0, at most 3153600000']
    """
    if setting.choices:
        *others, last = filter(None, setting.choices)
        return f"{', '.join(others)} or {last}" if others else last
    if setting.filled:
        return "not empty"
    least, most = (None if bound is None else as_number(bound) for bound in (setting.least, setting.most))
    if setting.above is not None:
        return f"above {as_number(setting.above)}" + (f", at most {most}" if most else "")
    if least is None or most is None:
        return f"at least {least}" if least is not None else f"at most {most}" if most is not None else ""
    return f"{least} to {most}"


def as_number(bound: float) -> str:
    """Formats a bound without a needless point or exponent."""
    return str(int(bound)) if float(bound).is_integer() else f"{bound:g}"


def shown(settings: Settings, setting: KnownSetting) -> Any:
    """Returns a setting's value as it may be shown: a secret is masked."""
    value = settings.value(setting.name)
    return MASK if setting.secret and value else value


def as_toml(value: Any) -> str:
    """Formats a value as TOML writes it.

    >>> as_toml(("view", "cart")), as_toml(0.2), as_toml(7)
    ('["view", "cart"]', '0.2', '7')
    """
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


def config(settings: Settings, args: argparse.Namespace, now_ms: int, say: Callable[[str], None]) -> None:
    """Shows the settings."""
    if args.markdown:
        say(as_markdown())
        return
    listed = chosen(args.names)
    if args.changed:
        listed = _changed(settings, listed)
    # A single setting is explained in full.
    explain = args.explain or any("." in name for name in args.names)
    show = _as_json if args.output == "json" else _as_pages if explain else as_lines
    say(show(settings, listed) or "every setting has its default")


def check_model(settings: Settings, args: argparse.Namespace, now_ms: int, say: Callable[[str], None]) -> None:
    """Checks the custom functions, and that the newest version fits the model."""
    from deploy.startup import model_checks
    from state.registry.model_fit import require_same_model

    require_same_model(settings)
    if not model_checks.is_own(settings) and not settings.model.options:
        say("model.ranker, model.tower and model.preprocessing are the default ones: there is nothing to check")
    model_checks.check(settings, say)


def run(argv: Sequence[str], become: Callable[[str, list[str]], None], now_ms: int, say: Callable[[str], None]) -> None:
    """Runs one command line, the words after `springtide`; `become` replaces this process by a module's main.

    Raises:
        SpringtideError: The command failed; the message is for the operator.
    """
    flags, words = split_settings(argv)
    args, unknown = parser().parse_known_args(with_times(words))
    if unknown and args.command not in OWN_HELP and not getattr(args, "runner", None):
        raise SettingsError(f"unknown argument {unknown[0]}", f"see `springtide {args.command} --help`")
    if args.command in PROCESSES:
        # Report a mistake here, with exit code 2, before anything starts.
        settings = load(flags)
        if args.command == "bootstrap" and not {"--help", "-h"} & {*words}:
            from deploy.startup import model_checks

            # The preprocessing is checked by the bootstrap itself.
            model_checks.check_tower(settings)
        runner = getattr(args, "runner", None)
        chosen_runner = [] if runner is None else ["--runner", runner]
        become(PROCESSES[args.command], [*_accepted(args), *chosen_runner, *unknown, *flags])
        return
    operation(args.command)(load(flags), args, now_ms, say)


def _accepted(args: argparse.Namespace) -> list[str]:
    """Returns the options for accepted gaps; mistakes in them are reported here too."""
    if args.command not in READERS:
        return []
    from state.log import accepted_gaps

    accepted_gaps.consent_of(args, actor="")
    return accepted_gaps.as_options(args)


def become(module: str, flags: list[str]) -> None:
    """Replaces this process by a module's main; the process id and the terminal stay."""
    sys.stdout.flush()
    os.execve(sys.executable, [sys.executable, "-m", module, *flags], for_children(os.environ))


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `springtide`; returns the exit status."""
    keep_private()
    return run_command("springtide", lambda words: run(words, become, wall_ms(), print), argv)


if __name__ == "__main__":
    sys.exit(main())
