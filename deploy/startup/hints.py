"""Hints for the operator while the loop runs: commands to type and addresses to open."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from deploy.serving.requests.access import OPERATE, READ
from deploy.startup import prometheus
from deploy.watch import scrape
from deploy.watch.scrape import address
from state.config.loading import FILE
from state.config.settings import Settings, as_text


def question(settings: Settings, shoppers: bool) -> str:
    """Returns a command that queries a profile: of a synthetic user, or of a placeholder id.

    >>> question(Settings(), shoppers=True)
    'curl -s http://127.0.0.1:8501/v1/profiles/shopper-1'
    >>> question(Settings(), shoppers=False)
    'curl -s http://127.0.0.1:8501/v1/profiles/USER (USER: an id of your clicks)'
    """
    url = scrape.profile_url(settings, scrape.SAMPLE_USER if shoppers else scrape.ANY_USER)
    trusted = "" if url.certificate is None else f"--cacert {url.certificate} "
    token = f' -H "authorization: Bearer $(head -1 {settings.tokens_dir / READ})"' if url.token_file else ""
    command = f"curl -s {trusted}{url}{token}"
    return command if shoppers else f"{command} ({scrape.ANY_USER}: an id of your clicks)"


def addresses(settings: Settings, shoppers: bool) -> list[tuple[str, str]]:
    """Returns a query, the metrics address of each process and the logs, each with a keyword."""
    metrics = [f"{url} ({name})" for name, url in scrape.urls(settings).items()]
    return [
        ("try", question(settings, shoppers)),
        *zip(("metrics", *[""] * (len(metrics) - 1)), metrics, strict=True),
        ("logs", f"{settings.logs_dir}, where `springtide up` runs"),
    ]


def commands(settings: Settings, shoppers: bool, watched: bool = False) -> list[str]:
    """Returns the lines that `up` prints once everything runs, with or without synthetic shoppers and Prometheus."""
    command = _springtide_command()
    lines = [
        question(settings, shoppers),
        f"{command} status        {command} status --watch",
        f"{command} versions",
        f"{command} pin VERSION        {command} follow",
        f"{command} rollback --to VERSION --skip-time A..B --reason TEXT",
        *console(settings),
        "metrics: " + "  ".join(f"{name} {url}" for name, url in scrape.urls(settings).items()),
        *([f"alerts: {prometheus.address(settings)}/alerts"] if watched else []),
    ]
    flags = repeated_flags(settings)
    return [*lines, *([f"springtide needs the flags of this run:{flags}"] if flags else [])]


def console(settings: Settings) -> list[str]:
    """Returns the address of the page and the token that it needs to control the loop; empty if the page is off."""
    if not settings.console.port:
        return []
    url = address(settings, settings.console.host, settings.console.port)
    return [f"page: {url}, to steer with the token in {settings.tokens_dir / OPERATE}"]


def _springtide_command() -> str:
    script = Path(sys.executable).with_name("springtide")
    if not script.exists():
        return f"{sys.executable} -m deploy.cli"
    return str(script.relative_to(Path.cwd())) if script.is_relative_to(Path.cwd()) else str(script)


def repeated_flags(settings: Settings) -> str:
    """Returns the flags of this run that other commands need too, including a configuration file.

    >>> repeated_flags(Settings(origins={"kafka.port": "flag --kafka.port", "stream.cut_ms": "my shop.toml:3"}))
    " --config 'my shop.toml' --kafka.port 9092"
    """
    files = {
        origin.rpartition(":")[0]
        for origin in settings.origins.values()
        if not origin.startswith(("flag ", "variable "))
    }
    flags = [("config", file) for file in sorted(files - {FILE})]
    flags += [
        (name, as_text(settings.value(name))) for name, origin in settings.origins.items() if origin.startswith("flag ")
    ]
    return "".join(f" --{name} {shlex.quote(value)}" for name, value in flags)
