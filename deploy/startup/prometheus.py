"""The Prometheus of `springtide up --prometheus`: its program, its scrape targets, its rules and its retention."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from deploy.supervisor import ProcessPlan
from deploy.watch import scrape
from deploy.watch.scrape import Address
from state.config.settings import Settings
from state.errors import SettingsError

NAME = "prometheus"
RULES = Path(__file__).parents[1] / "prometheus" / "rules"
STOP_S = 15.0
INTERVAL_S = 5.0  # between scrapes, and between evaluations of the rules
STORED_MB = 512  # not part of `storage.budget_gb`; the oldest data is removed first


def require_program() -> str:
    """Returns the path of the program, from the directory of this Python or from PATH.

    Raises:
        SettingsError: It is not installed.
    """
    own = Path(sys.executable).with_name(NAME)
    path = str(own) if own.exists() else shutil.which(NAME)
    if path is None:
        raise SettingsError(
            "--prometheus: there is no program `prometheus` here",
            "install it (Debian: `make debian`, or `apt-get install prometheus`), or start without --prometheus",
        )
    return path


def address(settings: Settings) -> str:
    """Returns the URL of this Prometheus."""
    return f"http://127.0.0.1:{settings.up.prometheus_port}"


def configuration(settings: Settings) -> dict[str, Any]:
    """Returns the content of `prometheus.yml`: scrape targets for the ports of this loop, and rule files.

    >>> configuration(Settings())["scrape_configs"][1]["static_configs"]
    [{'targets': ['127.0.0.1:9102']}]
    """
    every = f"{round(1000 * INTERVAL_S)}ms"
    return {
        "global": {"scrape_interval": every, "scrape_timeout": every, "evaluation_interval": every},
        "rule_files": [str(RULES / "*.yml")],
        "scrape_configs": [_job(name, url) for name, url in scrape.targets(settings).items()],
    }


def _job(name: str, url: str) -> dict[str, Any]:
    scheme, _, rest = url.partition("://")
    job: dict[str, Any] = {
        "job_name": f"springtide-{name}",
        "scheme": scheme,
        "static_configs": [{"targets": [rest.partition("/")[0]]}],
    }
    if isinstance(url, Address) and url.token_file is not None:
        job["authorization"] = {"credentials_file": str(url.token_file.absolute())}
    if scheme == "https":
        # On this machine only the loop uses the port; its certificate is for another name.
        job["tls_config"] = {"insecure_skip_verify": True}
    return job


def write_configuration(settings: Settings) -> None:
    """Writes the configuration to the state directory, as JSON, which is valid YAML."""
    folder = settings.prometheus_dir
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prometheus.yml").write_text(json.dumps(configuration(settings), indent=2) + "\n")


def plan(settings: Settings, program: str) -> ProcessPlan:
    """Returns the process of Prometheus; `program` is its path."""
    folder = settings.prometheus_dir
    return ProcessPlan(
        NAME,
        (
            program,
            f"--config.file={folder / 'prometheus.yml'}",
            f"--storage.tsdb.path={folder / 'data'}",
            f"--storage.tsdb.retention.size={STORED_MB}MB",
            f"--web.listen-address={address(settings).partition('://')[2]}",
            "--log.level=warn",
        ),
        STOP_S,
    )
