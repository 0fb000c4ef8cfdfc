"""Settings: which source wins, what is refused, and that the refusal says where it was written and what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from deploy.cli import as_toml
from state.config.loading import load
from state.config.settings import KnownSetting, Settings, as_text, known_settings, variable
from state.config.sources import line_numbers, split_settings
from state.errors import SettingsError

SETTINGS = list(known_settings())


def write(folder: Path, text: str) -> Path:
    path = folder / "springtide.toml"
    path.write_text(text)
    return path


def test_without_a_source_every_setting_has_its_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load([], env={}) == Settings()
    assert load([], env={}).origins == {}


def test_flags_win_over_variables_and_variables_over_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "[stream]\ncut_ms = 1\ncut_rows = 1\ncache_users = 1\n")
    env = {"SPRINGTIDE_STREAM_CUT_ROWS": "2", "SPRINGTIDE_STREAM_CACHE_USERS": "2"}
    settings = load(["--stream.cache_users", "3"], env=env, path=path)
    assert (settings.stream.cut_ms, settings.stream.cut_rows, settings.stream.cache_users) == (1, 2, 3)
    assert settings.origins == {
        "stream.cut_ms": f"{path}:2",
        "stream.cut_rows": "variable SPRINGTIDE_STREAM_CUT_ROWS",
        "stream.cache_users": "flag --stream.cache_users",
    }


@pytest.mark.parametrize("actions", [["impression"], ["view", "buy"], ["a", "b", "c", "d", "e"]])
def test_actions_that_nobody_weighs_weigh_1_each_here_and_in_child_processes(actions: list[str]) -> None:
    field = ["--events.action="] if len(actions) == 1 else []
    settings = load([f"--events.actions={','.join(actions)}", *field], env={}, path="/dev/null")
    assert settings.events.action_weights == (1.0,) * len(actions)
    assert load([], env=settings.environment(), path="/dev/null") == settings


def test_the_file_may_be_named_by_flag_or_variable(tmp_path: Path) -> None:
    path = write(tmp_path, "[kafka]\nport = 7\n")
    assert load([f"--config={path}"], env={}).kafka.port == 7
    assert load([], env={"SPRINGTIDE_CONFIG": str(path)}).kafka.port == 7


def test_an_unknown_variable_is_refused_with_the_nearest() -> None:
    with pytest.raises(SettingsError, match=r"nearest is SPRINGTIDE_KAFKA_PORT$"):
        load([], env={"SPRINGTIDE_KAFKA_PROT": "1"}, path="/dev/null")


@pytest.mark.parametrize(
    ("name", "value"),
    [("stream.sync_s", "5"), ("stream.shards", "1"), ("stream.map_gb", "32"), ("trainer.partition", "0")],
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
        assert f"{name} was removed in 0.2.0 and is ignored" in said and said.endswith("leave it out")


@pytest.mark.parametrize("flags", [["--stream.sync_s", "5"], ["--stream.sync-s=5"]])
def test_a_command_line_reports_a_removed_setting_once_however_often_it_is_loaded(
    flags: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    kept, words = split_settings(["status", *flags, "--kafka.port", "7"])
    assert (kept, words) == (["--kafka.port", "7"], ["status"])
    for _ in range(2):
        load(kept, env={}, path="/dev/null")
    (reported,) = caplog.messages
    assert "stream.sync_s was removed in 0.2.0 and is ignored" in reported


def test_flags_are_written_in_three_ways() -> None:
    for argv in (["--stream.cut_ms", "5"], ["--stream.cut_ms=5"], ["--stream.cut-ms", "5"]):
        assert load(argv, env={}, path="/dev/null").stream.cut_ms == 5
    assert load(["--bootstrap-servers", "k:1"], env={}, path="/dev/null").kafka.bootstrap_servers == "k:1"


def test_the_local_port_is_the_broker_unless_one_is_named() -> None:
    assert load(["--kafka.port", "1234"], env={}, path="/dev/null").kafka.bootstrap_servers == "127.0.0.1:1234"
    named = load(["--kafka.port", "1234", "--kafka.bootstrap_servers", "k:1"], env={}, path="/dev/null")
    assert named.kafka.bootstrap_servers == "k:1"


def test_a_secret_is_never_shown(tmp_path: Path) -> None:
    secret = "correct-horse"
    settings = load([], env={"SPRINGTIDE_KAFKA_SASL_PASSWORD": secret}, path="/dev/null")
    assert settings.kafka.sasl_password == secret
    assert secret not in repr(settings)
    assert "271828" not in refusal([], {}, write(tmp_path, "[kafka]\nsasl_password = 271828\n"))


def test_a_child_process_gets_the_same_settings_through_its_environment(tmp_path: Path) -> None:
    path = write(tmp_path, "[features]\nwindows_s = [60, 120]\n[kafka]\nsasl_password = 'x y'\n")
    settings = load(["--trainer.publish_s", "0.5"], env={}, path=path)
    assert load([], env=settings.environment(), path="/dev/null") == settings


def test_paths_follow_the_state_directory() -> None:
    settings = load(["--state", "here"], env={}, path="/dev/null")
    assert settings.registry_dir == Path("here/registry")
    assert settings.salt_path == Path("here/salt")
    assert settings.stream_dir == Path("here/stream-0")
    assert settings.serving_dir == Path("here/serving")
    assert load(["--paths.registry", "there"], env={}, path="/dev/null").registry_dir == Path("there")


def test_dotted_keys_and_quotes_keep_their_line() -> None:
    text = '# one\nkafka.port = 1\n["stream"]\n"cut_ms" = 2\nactions = [\n  "a",\n]\n'
    assert line_numbers(text) == {"kafka.port": 2, "kafka": 2, "stream": 3, "stream.cut_ms": 4, "stream.actions": 5}


@pytest.mark.parametrize("words", [["--kafka.sasl_password", "hush"], ["--kafka.ssl_key_password=hush"]])
def test_a_secret_is_not_taken_from_a_command_line(words: list[str]) -> None:
    with pytest.raises(SettingsError, match=r"every user of this machine.*SPRINGTIDE_KAFKA_S\w+_PASSWORD") as raised:
        load(words, env={})
    assert "hush" not in str(raised.value)


def test_lists_come_from_text_and_from_toml(tmp_path: Path) -> None:
    path = write(tmp_path, "[features]\nwindows_s = [60, 120]\n[events]\naction_weights = [1, 2, 3, 4]\n")
    settings = load(["--events.context", "device,country"], env={}, path=path)
    assert settings.features.windows_s == (60, 120)
    assert settings.events.action_weights == (1.0, 2.0, 3.0, 4.0)
    assert settings.events.context == ("device", "country")


def test_every_default_can_be_written_as_toml_and_as_a_variable(tmp_path: Path) -> None:
    written = [known for known in SETTINGS if known.name != "kafka.bootstrap_servers"]
    path = write(tmp_path, "\n".join(f"{known.name} = {as_toml(known.default)}" for known in written))
    assert load([], env={}, path=path) == Settings()
    variables = {variable(known.name): as_text(known.default) for known in written}
    assert load([], env=variables, path="/dev/null") == Settings()


def refusal(argv: list[str], env: dict[str, str], path: str | Path = "/dev/null") -> str:
    with pytest.raises(SettingsError) as caught:
        load(argv, env=env, path=path)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def out_of_bounds(known: KnownSetting) -> list[Any]:
    """Values of the right type that the declaration refuses."""
    one = known.default[0] if isinstance(known.default, tuple) and known.default else known.default
    found: list[Any] = []
    if known.least is not None:
        found += [type(one)(known.least - 1), -(10**9)]
    if known.most is not None:
        found += [type(one)(known.most + 1)]
    if known.above is not None:
        found += [type(one)(known.above), -1.0]
    if known.choices:
        found += ["no such choice"]
    if known.filled:
        found += ["", "  "]
    if isinstance(one, float):
        found += [float("nan"), float("inf")]
    return [[value] if isinstance(known.default, tuple) else value for value in found]


def wrong_types(known: KnownSetting) -> list[str]:
    """TOML of values that are of another type."""
    if isinstance(known.default, tuple):
        return ["7", "true", "{}", "[[1]]", "[true]"]
    if isinstance(known.default, str):
        return ["7", "1.5", "true", "[]", "{}", "2026-01-01"]
    return ["'many'", "''", "true", "[]", "{}", *(["1.5", "nan"] if isinstance(known.default, int) else [])]


def toml(value: Any) -> str:
    return json.dumps(value).replace("NaN", "nan").replace("Infinity", "inf")


@pytest.mark.parametrize("known", SETTINGS, ids=lambda known: known.name)
def test_a_value_out_of_bounds_is_refused_where_it_was_written(known: KnownSetting, tmp_path: Path) -> None:
    section, _, key = known.name.partition(".")
    path = tmp_path / "springtide.toml"
    for value in out_of_bounds(known):
        path.write_text(f"# one\n\n[{section}]\n{key} = {toml(value)}\n")
        assert refusal([], {}, path).startswith(f"{path}:4: {known.name} must ")
        # An empty element of a list is left out of its text.
        text = as_text(tuple(value) if isinstance(value, list) else value)
        if text.strip():
            assert refusal([f"--{known.name}={text}"], {}).startswith(f"flag --{known.name}: {known.name} must ")
            shown = refusal([], {variable(known.name): text})
            assert shown.startswith(f"variable {variable(known.name)}: {known.name} must ")


@pytest.mark.parametrize("known", SETTINGS, ids=lambda known: known.name)
def test_a_value_of_another_type_is_refused_where_it_was_written(known: KnownSetting, tmp_path: Path) -> None:
    section, _, key = known.name.partition(".")
    path = tmp_path / "springtide.toml"
    for text in wrong_types(known):
        path.write_text(f"[{section}]\n{key} = {text}\n")
        assert refusal([], {}, path).startswith(f"{path}:2: {known.name} must be ")


BOUNDED_BY_OTHERS = {"features.sequence"}


@pytest.mark.parametrize("known", SETTINGS, ids=lambda known: known.name)
def test_the_bounds_themselves_are_possible(known: KnownSetting, tmp_path: Path) -> None:
    if isinstance(known.default, (int, float)) and known.name not in BOUNDED_BY_OTHERS:
        for bound in (known.least, known.most):
            if bound is not None:
                value = type(known.default)(bound)
                assert load([f"--{known.name}={value}"], env={}, path="/dev/null").value(known.name) == value


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("[events]\nactions = ['view', 'cart', 'view']\n", 2, "'view' twice"),
        ("[events]\nactions = []\n", 2, "1 to 255 actions, not 0"),
        ("[events]\nactions = ['view', '']\n", 2, "must not be empty"),
        ("[events]\naction_weights = [1, 1]\nactions = ['view']\n", 2, "has 2 weights for 1 actions (view)"),
        ("[events]\naction_weights = [1.0, 2.0]\n", 2, "has 2 weights for 4 actions (view, favorite, cart, purchase)"),
        ("[events]\nactions = ['a']\naction_weights = [1, 2]\n", 3, "events.actions from {path}:2"),
        ("[events]\naction_weights = [0, 0, 0, 0]\n", 2, "nothing would be learned"),
        ("[events]\naction_weights = [1, 1, 1, -1]\n", 2, "at least 0"),
        ("[events]\naction = ''\n", 2, "names no field"),
        ("[events]\nuser = ''\n", 2, "must not be empty"),
        ("[events]\ncontext = ['tab', 'tab']\n", 2, "'tab' twice"),
        ("[events]\ncolumns = ['user', '-', '-', 'user']\n", 2, "'user' twice"),
        ("[events]\nconstants = ['action']\n", 2, "FIELD=VALUE"),
        ("[events]\nconstants = ['colour=red']\n", 2, "names no field 'colour'"),
        ("[events]\nconstants = ['item=a', 'item=b']\n", 2, "'item' twice"),
        ("[events]\nlabel = 'like'\ncontext = ['like']\n", 3, "it would leak the label"),
        ("[events]\noutcomes = ['item']\n", 2, "it would leak the label"),
        ("[events]\nmax_age_s = 0\n", 2, "more than 0"),
        ("[labels]\nimpressions = ['shown']\n", 2, "'shown', which events.actions does not"),
        ("[labels]\nimpressions = ['view']\n", 2, "labels.outcomes must name an action too"),
        ("[labels]\noutcomes = ['cart']\n", 2, "labels.impressions must name an action too"),
        ("[labels]\nimpressions = ['view']\noutcomes = ['view']\n", 3, "an impression already"),
        ("[features]\nwindows_s = []\n", 2, "not empty"),
        ("[features]\nwindows_s = [0]\n", 2, "at least 1"),
        ("[features]\nwindows_s = [60, 60]\n", 2, "ascending"),
        ("[features]\nhalf_lives_s = [0, 60]\n", 2, "at least 1"),
        ("[features]\nhalf_lives_s = [60, -60]\n", 2, "at least 1"),
        (f"[features]\nwindows_s = {list(range(60, 77))}\n", 2, "16 values, not 17"),
        (
            "[privacy]\nepsilon = 4\n[segments]\nlookalikes = 10\n",
            4,
            "lookalikes compare the exact rows of different users",
        ),
        ("[model]\ndropout = 1.0\n", 2, "at most 0.99"),
        ("[model]\nhidden = []\n", 2, "at least one layer"),
        ("[model]\nhidden = [128, 0]\n", 2, "at least 1"),
        ("[model]\ntower = 'mine'\n", 2, "module:name"),
        ("[model]\ntower = 'my tower:build'\n", 2, "module:name"),
        ("[stream]\nshard = 1\n", 2, "stream.shard was removed in 0.2.0: one stream reads all partitions"),
        ("[trainer]\npartition = 3\n", 2, "trainer.partition was removed in 0.2.0: the training log has one partition"),
        ("[stream]\nshards = 4\n", 2, "stream.shards was removed in 0.2.0: one stream reads all partitions"),
        ("[stream]\ncut_rows = 100_000_000\n", 2, "at most"),
        ("[kafka]\nclicks_topic = ''\n", 2, "no name of a topic"),
        ("[kafka]\nclicks_topic = 'my clicks'\n", 2, "no name of a topic"),
        ("[kafka]\nmicrobatches_topic = '..'\n", 2, "no name of a topic"),
        ("[kafka]\ndead_letters_topic = 'springtide.clicks.v1'\n", 2, "kafka.clicks_topic are both"),
        ("[kafka]\nclicks_topic = 'springtide.microbatches.v1'\n", 2, "two different names"),
        ("[kafka]\nexposures_topic = 'springtide.clicks.v1'\n", 2, "kafka.clicks_topic are both"),
        ("[kafka]\nbootstrap_servers = 'localhost'\n", 2, "HOST:PORT"),
        ("[kafka]\nbootstrap_servers = 'localhost:99999'\n", 2, "HOST:PORT"),
        ("[kafka]\nbootstrap_servers = 'http://localhost:9092'\n", 2, "HOST:PORT"),
        ("[kafka]\nport = 0\n", 2, "at least 1"),
        ("[kafka]\nsecurity_protocol = 'SASL_SSL'\n", 2, "needs kafka.sasl_mechanism"),
        ("[kafka]\nsasl_mechanism = 'PLAIN'\n", 2, "PLAINTEXT does not use it"),
        ("[kafka]\nsecurity_protocol = 'SASL_SSL'\nsasl_mechanism = 'PLAIN'\n", 3, "needs kafka.sasl_username"),
        ("[kafka]\nsasl_mechanism = 'SCRAM'\n", 2, "one of PLAIN, SCRAM-SHA-256"),
        ("[kafka]\nsecurity_protocol = 'SSL'\nssl_cafile = 'no/ca.pem'\n", 3, "no such file"),
        ("[kafka]\nssl_cafile = 'ca.pem'\n", 2, "does not use it"),
        ("[kafka]\nsecurity_protocol = 'SASL_SSL'\nsasl_mechanism = 'OAUTHBEARER'\n", 3, "need each other"),
        ("[kafka]\nreplication = 2\nmin_insync_replicas = 3\n", 3, "3 is more than kafka.replication 2"),
        ("[serving]\nhost = ''\n", 2, "must not be empty"),
        ("[rollout]\naddress = 'localhost:8601'\n", 2, "must be http://HOST:PORT"),
        ("[kafka]\nport = 1\nport = 2\n", 3, "TOML"),
        ("[kafka]\n[kafka]\n", 2, "TOML"),
        ("x\n", 1, "TOML"),
        ("[[kafka]]\nport = 1\n", 1, "write [kafka] once"),
        ("port = 1\n", 1, "nearest setting is kafka.port: write it below [kafka]"),
        ("[stream]\npublish_s = 1\n", 2, "the nearest is trainer.publish_s"),
        ("[kafka]\n\n# port\nprot = 1\n", 4, "kafka.port"),
        ("[paths]\nstate = 'x'\n[kafak]\nport = 1\n", 3, "[kafka]"),
        ("kafka = 7\n", 1, "[kafka]"),
        ("[kafka.ssl]\ncafile = 'x'\n", 1, "unknown setting kafka.ssl; the nearest is kafka.ssl_"),
    ],
)
def test_settings_that_cannot_be_are_refused_with_their_line(tmp_path: Path, text: str, line: int, words: str) -> None:
    path = tmp_path / "springtide.toml"
    path.write_text(text)
    said = refusal([], {}, path)
    assert said.startswith(f"{path}:{line}: ")
    assert words.format(path=path) in said


def test_a_conflict_points_at_what_was_set_and_not_at_a_default() -> None:
    unnamed = "events.action names no field, and events.actions has 2 actions"
    assert refusal(["--events.actions", "view,cart", "--events.action="], {}).startswith(
        f"flag --events.action: {unnamed}"
    )
    assert refusal([], {"SPRINGTIDE_EVENTS_ACTIONS": ","}).startswith("variable SPRINGTIDE_EVENTS_ACTIONS: ")
    assert refusal(["--kafka.clicks_topic", "a", "--kafka.dead_letters_topic=a"], {}).startswith(
        "flag --kafka.dead_letters_topic: kafka.dead_letters_topic and kafka.clicks_topic are both 'a'"
    )


@pytest.mark.parametrize("servers", ["k:1", "a:1, b:65535", "[::1]:9092", "broker-1.example.com:9093"])
def test_brokers_are_named_in_every_usual_way(servers: str) -> None:
    assert load([f"--bootstrap-servers={servers}"], env={}, path="/dev/null").kafka.bootstrap_servers == servers


def test_credentials_that_are_used_and_complete_are_taken(tmp_path: Path) -> None:
    trusted = tmp_path / "ca.pem"
    trusted.write_text("")
    flags = {"security_protocol": "SASL_SSL", "sasl_mechanism": "SCRAM-SHA-512", "sasl_username": "ada"}
    flags |= {"ssl_cafile": str(trusted)}
    words = [f"--kafka.{name}={value}" for name, value in flags.items()]
    secret = {"SPRINGTIDE_KAFKA_SASL_PASSWORD": "secret"}
    assert load(words, secret, path="/dev/null").kafka.ssl_cafile == str(trusted)


def test_elements_with_commas_reach_a_child_process_whole(tmp_path: Path) -> None:
    path = tmp_path / "springtide.toml"
    path.write_text("[events]\nconstants = ['category=a,b', 'item= [x] ']\ncolumns = ['user', 'time']\n")
    settings = load([], env={}, path=path)
    assert settings.events.constants == ("category=a,b", "item= [x] ")
    assert load([], env=settings.environment(), path="/dev/null") == settings


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--port", "1"], "no such option; settings are written --section.name VALUE (the nearest is --kafka.port)"),
        (["--kafka.port", "--stream.cut_ms", "5"], "flag --kafka.port: its value is missing"),
        (["--config", "--kafka.port"], "flag --config: its value is missing"),
        (["--config", "absent.toml"], "flag --config: absent.toml: no such settings file"),
        (["--stream.publish_s", "1"], "the nearest is --trainer.publish_s"),
        (["--stream.cut_row", "1"], "nearest is --stream.cut_rows"),
        (["kafka.port", "1"], "kafka.port"),
    ],
)
def test_a_flag_that_cannot_be_says_what_to_write(argv: list[str], words: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(argv, env={})
    assert words in str(caught.value)


def test_a_variable_that_names_no_file_is_named() -> None:
    with pytest.raises(SettingsError, match=r"^variable SPRINGTIDE_CONFIG: absent.toml: no such"):
        load([], env={"SPRINGTIDE_CONFIG": "absent.toml"})


def test_a_folder_or_another_encoding_is_no_settings_file(tmp_path: Path) -> None:
    assert "Is a directory" in refusal([], {}, tmp_path)
    path = tmp_path / "springtide.toml"
    path.write_bytes(b"# one\n# \xff\n")
    assert refusal([], {}, path).startswith(f"{path}:2: not readable as TOML: no UTF-8")


def test_a_line_of_a_list_is_not_taken_for_a_setting(tmp_path: Path) -> None:
    path = tmp_path / "springtide.toml"
    path.write_text("[events]\nconstants = [\n  'action = view',\n]\naction = 7\n")
    assert refusal([], {}, path).startswith(f"{path}:5: events.action must be a text")
