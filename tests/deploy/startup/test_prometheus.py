"""`up --prometheus` scrapes what runs where it runs, with what lets it in, keeps little, and says where there is none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from deploy import up
from deploy.startup import prometheus
from deploy.startup.steps import ports
from deploy.watch import scrape
from state.config.loading import load
from state.config.settings import Settings
from tests import rules


def settings_of(tmp_path: Path, *flags: str) -> Settings:
    return load(["--paths.state", str(tmp_path / "state"), *flags], env={})


def test_it_scrapes_each_process_at_the_port_that_it_has(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "--trainer.metrics_port", "9992", "--serving.port", "9951")
    jobs = {one["job_name"]: one for one in prometheus.configuration(settings)["scrape_configs"]}
    addresses = scrape.targets(settings)
    assert scrape.urls(settings).items() < addresses.items()
    assert {name: f"http://{one['static_configs'][0]['targets'][0]}/metrics" for name, one in jobs.items()} == {
        f"springtide-{name}": url for name, url in addresses.items()
    }
    assert jobs["springtide-trainer"]["static_configs"] == [{"targets": ["127.0.0.1:9992"]}]
    # The jobs of the file for those who run their own, which the rules name.
    own = yaml.safe_load((rules.PROMETHEUS / "prometheus.yml").read_text())["scrape_configs"]
    assert set(jobs) == {one["job_name"] for one in own}


def test_it_has_the_token_and_the_scheme_that_a_worker_asks_for(tmp_path: Path) -> None:
    certificate, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    for file in (certificate, key):
        file.touch(0o600)
    flags = ("--serving.tls_cert", str(certificate), "--serving.tls_key", str(key), "--serving.tokens", "on")
    settings = settings_of(tmp_path, *flags)
    (worker,) = [
        one for one in prometheus.configuration(settings)["scrape_configs"] if one["job_name"] == "springtide-worker"
    ]
    assert worker["scheme"] == "https"
    assert worker["authorization"] == {"credentials_file": str(settings.tokens_dir / "operate")}


@pytest.mark.parametrize("flags", [(), ("--serving.tokens", "on")])
def test_prometheus_takes_what_is_written(tmp_path: Path, flags: tuple[str, ...]) -> None:
    settings = settings_of(tmp_path, *flags)
    settings.tokens_dir.mkdir(parents=True)
    (settings.tokens_dir / "operate").write_text("a token of some length\n")
    prometheus.write_configuration(settings)
    said = subprocess.run(
        [rules.program("promtool"), "check", "config", settings.prometheus_dir / "prometheus.yml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert said.returncode == 0, said.stdout + said.stderr
    assert f"{len(rules.FILES)} rule files found" in said.stdout


def test_it_listens_on_this_machine_and_keeps_no_more_than_it_may(tmp_path: Path) -> None:
    settings = settings_of(tmp_path, "--up.prometheus_port", "9999")
    command = prometheus.plan(settings, "prometheus").command
    assert {"--web.listen-address=127.0.0.1:9999", "--storage.tsdb.retention.size=512MB"} <= set(command)
    assert ("up.prometheus_port", "127.0.0.1", 9999) in ports(settings, local_kafka=False, watched=True)
    assert all(port.setting != "up.prometheus_port" for port in ports(settings, local_kafka=False))


def test_where_there_is_none_one_line_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert up.main(["--prometheus", "--paths.state", str(tmp_path / "state")]) != 0
    (line,) = capsys.readouterr().err.splitlines()
    assert "apt-get install prometheus" in line
    assert not (tmp_path / "state").exists()
