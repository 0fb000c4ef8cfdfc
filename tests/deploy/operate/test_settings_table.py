"""`springtide config`: values with their origin, secrets masked, a file that reads back."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from state.config.loading import load
from state.errors import SettingsError
from tests.deploy.operating import Operator

PASSWORD = "SPRINGTIDE_KAFKA_SASL_PASSWORD"


def test_config_shows_values_with_their_origin_and_masks_secrets(
    operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(PASSWORD, "hunter2")
    text = operator("config", "--kafka.port", "1234")
    assert "hunter2" not in text and 'sasl_password = "********"' in text
    assert re.search(r"port = 1234 +# flag --kafka.port", text)
    entries = json.loads(operator("config", "-o", "json"))
    assert next(one for one in entries if one["name"] == "kafka.sasl_password")["value"] == "********"


def test_config_shows_a_part_of_the_settings_and_one_in_full(operator: Operator) -> None:
    part = operator("config", "registry")
    assert part.splitlines()[0] == "[registry]" and "[kafka]" not in part
    (line,) = [line for line in operator("config", "--changed").splitlines() if " = " in line]
    assert line.startswith("state = ") and line.endswith("# flag --paths.state")
    page = operator("config", "kafka.port", "--kafka.port", "1234")
    for part in ("kafka.port = 1234", "from      flag --kafka.port", "default   9092", "allowed   1 to 65535"):
        assert part in page
    assert "SPRINGTIDE_KAFKA_PORT=..., or --kafka.port ..." in page
    (entry,) = json.loads(operator("config", "serving.clock", "-o", "json"))
    assert (entry["value"], entry["allowed"], entry["origin"]) == ("event", "event or wall", "default")


@pytest.mark.parametrize(("name", "hint"), [("kafak", "kafka"), ("kafka.prot", "kafka.port")])
def test_config_of_an_unknown_name_says_the_nearest(operator: Operator, name: str, hint: str) -> None:
    with pytest.raises(SettingsError, match=f"nearest is {hint}$"):
        operator("config", name)


def test_a_printed_file_neither_names_a_cluster_nor_a_masked_password(
    operator: Operator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "springtide.toml"
    monkeypatch.setenv(PASSWORD, "hunter2")
    path.write_text(operator("config", "--kafka.port", "1234"))
    again = load([], env={}, path=path)
    assert "kafka.bootstrap_servers" not in again.origins
    assert again.kafka.bootstrap_servers == "127.0.0.1:1234"
    assert again.kafka.sasl_password == ""


def test_config_prints_a_file_that_reads_back(operator: Operator, tmp_path: Path) -> None:
    path = tmp_path / "springtide.toml"
    path.write_text(operator("config", "--stream.cut_ms", "50"))
    assert load([], env={}, path=path).stream.cut_ms == 50
