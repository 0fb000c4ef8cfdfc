"""Settings: who wins, what is refused and where the refusal points."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from state.config.loading import load
from state.config.sections import Kafka
from state.config.settings import Settings, as_text, known_settings, variable
from state.config.sources import line_numbers
from state.errors import SettingsError


def write(folder: Path, text: str) -> Path:
    path = folder / "springtide.toml"
    path.write_text(text)
    return path


def test_without_a_source_every_setting_has_its_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load([], env={}) == Settings()
    assert load([], env={}).origins == {}


def test_flags_win_over_variables_and_variables_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "[stream]\ncut_ms = 1\ncut_rows = 1\npoll_ms = 1\n")
    env = {"SPRINGTIDE_STREAM_CUT_ROWS": "2", "SPRINGTIDE_STREAM_POLL_MS": "2"}
    settings = load(["--stream.poll_ms", "3"], env=env, path=path)
    assert (settings.stream.cut_ms, settings.stream.cut_rows, settings.stream.poll_ms) == (1, 2, 3)
    assert settings.origins == {
        "stream.cut_ms": f"{path}:2",
        "stream.cut_rows": "variable SPRINGTIDE_STREAM_CUT_ROWS",
        "stream.poll_ms": "flag --stream.poll_ms",
    }


@pytest.mark.parametrize(
    ("text", "line", "hint"),
    [
        ("[kafka]\n\n# port\nprot = 1\n", 4, "kafka.port"),
        ("[paths]\nstate = 'x'\n[kafak]\nport = 1\n", 3, "[kafka]"),
        ("[kafka]\nport = 'many'\n", 2, "whole number"),
        ("[kafka]\nport = 70_000\n", 2, "at most 65535"),
        ("[kafka]\nport = 1.5\n", 2, "whole number"),
        ("[kafka]\nport = true\n", 2, "whole number"),
        ("[trainer]\npublish_s = nan\n", 2, "finite"),
        ("[features]\nwindows_s = [3600, 60]\n", 2, "ascending"),
        ("[events]\nactions = ['view']\naction_weights = [1, 2]\n", 3, "give each action one weight"),
        ("[serving]\nclock = 'moon'\n", 2, "event, wall"),
        ("stream.cut_ms = 0\n", 1, "at least 1"),
        ("kafka = 7\n", 1, "[kafka]"),
    ],
)
def test_a_refusal_names_file_line_and_what_to_do(tmp_path: Path, text: str, line: int, hint: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(SettingsError) as caught:
        load([], env={}, path=path)
    assert hint in str(caught.value)
    if line:
        assert str(caught.value).startswith(f"{path}:{line}: ")


@pytest.mark.parametrize("actions", [["impression"], ["view", "buy"], ["a", "b", "c", "d", "e"]])
def test_actions_that_nobody_weighs_weigh_1_each_here_and_in_child_processes(actions: list[str]) -> None:
    field = ["--events.action="] if len(actions) == 1 else []
    settings = load([f"--events.actions={','.join(actions)}", *field], env={}, path="/dev/null")
    assert settings.events.action_weights == (1.0,) * len(actions)
    assert load([], env=settings.environment(), path="/dev/null") == settings


def test_a_file_that_is_not_toml_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="line 2"):
        load([], env={}, path=write(tmp_path, "[kafka]\nport =\n"))


def test_a_named_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such settings file"):
        load(["--config", str(tmp_path / "absent.toml")], env={})


def test_the_file_may_be_named_by_flag_or_variable(tmp_path: Path) -> None:
    path = write(tmp_path, "[kafka]\nport = 7\n")
    assert load([f"--config={path}"], env={}).kafka.port == 7
    assert load([], env={"SPRINGTIDE_CONFIG": str(path)}).kafka.port == 7


def test_an_unknown_variable_is_refused_with_the_nearest() -> None:
    with pytest.raises(SettingsError, match=r"nearest is SPRINGTIDE_KAFKA_PORT$"):
        load([], env={"SPRINGTIDE_KAFKA_PROT": "1"}, path="/dev/null")


def test_an_unknown_flag_is_refused_with_the_nearest() -> None:
    with pytest.raises(SettingsError, match=r"nearest is --stream.cut_rows$"):
        load(["--stream.cut_row", "1"], env={}, path="/dev/null")


@pytest.mark.parametrize(
    ("name", "value"),
    [("stream.sync_s", "5"), ("stream.shards", "1"), ("bootstrap.compression", "none")],
)
def test_a_removed_setting_is_ignored_with_a_warning(
    tmp_path: Path, name: str, value: str, caplog: pytest.LogCaptureFixture
) -> None:
    section, _, key = name.partition(".")
    written: list[tuple[list[str], dict[str, str], str]] = [
        ([f"--{name}", value, "--kafka.port", "7"], {}, "/dev/null"),
        ([f"--{name}={value}", "--kafka.port=7"], {}, "/dev/null"),
        (["--kafka.port", "7"], {f"SPRINGTIDE_{name.replace('.', '_').upper()}": value}, "/dev/null"),
        (["--kafka.port", "7"], {}, str(write(tmp_path, f"[{section}]\n{key} = '{value}'\n"))),
    ]
    for argv, env, path in written:
        caplog.clear()
        found = load(argv, env=env, path=path)
        assert found.kafka.port == 7 and name not in found.origins
        (said,) = caplog.messages
        assert f"{name} was removed and is ignored" in said and said.endswith("leave it out")


@pytest.mark.parametrize("argv", [["--kafka.port"], ["kafka.port", "1"], ["7"]])
def test_a_line_that_is_no_flag_and_value_is_refused(argv: list[str]) -> None:
    with pytest.raises(SettingsError):
        load(argv, env={}, path="/dev/null")


def test_flags_are_written_in_three_ways() -> None:
    for argv in (["--stream.cut_ms", "5"], ["--stream.cut_ms=5"], ["--stream.cut-ms", "5"]):
        assert load(argv, env={}, path="/dev/null").stream.cut_ms == 5
    assert load(["--bootstrap-servers", "k:1"], env={}, path="/dev/null").kafka.bootstrap_servers == "k:1"


def test_lists_come_from_text_and_from_toml(tmp_path: Path) -> None:
    path = write(tmp_path, "[features]\nwindows_s = [60, 120]\n[events]\naction_weights = [1, 2, 3, 4]\n")
    settings = load(["--events.context", "device,country"], env={}, path=path)
    assert settings.features.windows_s == (60, 120)
    assert settings.events.action_weights == (1.0, 2.0, 3.0, 4.0)
    assert settings.events.context == ("device", "country")


def test_the_local_port_is_the_broker_unless_one_is_named() -> None:
    assert load(["--kafka.port", "1234"], env={}, path="/dev/null").kafka.bootstrap_servers == "127.0.0.1:1234"
    named = load(["--kafka.port", "1234", "--kafka.bootstrap_servers", "k:1"], env={}, path="/dev/null")
    assert named.kafka.bootstrap_servers == "k:1"


@pytest.mark.parametrize("servers", ["localhost", "a:1,b", ""])
def test_brokers_without_a_port_are_refused(servers: str) -> None:
    with pytest.raises(SettingsError, match="HOST:PORT"):
        load([f"--kafka.bootstrap_servers={servers}"], env={}, path="/dev/null")


def test_a_secret_is_never_shown() -> None:
    secret = "correct-horse"
    settings = load([], env={"SPRINGTIDE_KAFKA_SASL_PASSWORD": secret}, path="/dev/null")
    assert settings.kafka.sasl_password == secret
    assert secret not in repr(settings)


def test_a_secret_of_the_wrong_type_is_not_quoted(tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        load([], env={}, path=write(tmp_path, "[kafka]\nsasl_password = 271828\n"))
    assert "271828" not in str(caught.value)


def test_a_child_process_gets_the_same_settings_through_its_environment(tmp_path: Path) -> None:
    path = write(tmp_path, "[features]\nwindows_s = [60, 120]\n[kafka]\nsasl_password = 'x y'\n")
    settings = load(["--trainer.publish_s", "0.5"], env={}, path=path)
    assert load([], env=settings.environment(), path="/dev/null") == settings


@given(st.sampled_from(list(known_settings())))
def test_every_default_can_be_written_as_a_variable(known: object) -> None:
    name, default = known.name, known.default  # type: ignore[attr-defined]
    settings = load([], env={variable(name): as_text(default)}, path="/dev/null")
    assert settings.value(name) == default


def test_paths_follow_the_state_directory() -> None:
    settings = load(["--state", "here"], env={}, path="/dev/null")
    assert settings.registry_dir == Path("here/registry")
    assert settings.salt_path == Path("here/salt")
    assert settings.stream_dir == Path("here/stream-0")
    assert settings.serving_dir == Path("here/serving")
    assert load(["--paths.registry", "there"], env={}, path="/dev/null").registry_dir == Path("there")


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Kafka().port = 1  # type: ignore[misc]


def test_dotted_keys_and_quotes_keep_their_line() -> None:
    text = '# one\nkafka.port = 1\n["stream"]\n"cut_ms" = 2\nactions = [\n  "a",\n]\n'
    assert line_numbers(text) == {"kafka.port": 2, "kafka": 2, "stream": 3, "stream.cut_ms": 4, "stream.actions": 5}


@pytest.mark.parametrize("words", [["--kafka.sasl_password", "hush"], ["--kafka.ssl_key_password=hush"]])
def test_a_secret_is_not_taken_from_a_command_line(words: list[str]) -> None:
    with pytest.raises(SettingsError, match=r"every user of this machine.*SPRINGTIDE_KAFKA_S\w+_PASSWORD") as raised:
        load(words, env={})
    assert "hush" not in str(raised.value)
