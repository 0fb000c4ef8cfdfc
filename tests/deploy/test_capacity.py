"""`springtide capacity`: sizes match the measured deployment, grow with the load, and count the settings."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.capacity import CONSTANTS, VALUES, Load, Sizing, main, page
from state.config.settings import Settings

SOAK = Load(clicks=10_000, users=20_000, items=4_000, versions=4.65, answers=2, retention_h=1)
"""What `python -m tests.e2e.soak` runs, on two cores."""
SETTINGS = Settings()
STREAM, TRAINER, APPLIER, WORKERS = "stream", "trainer", "applier", "workers"
REST, KAFKA = "validation and console", "kafka"
loads = st.builds(
    Load,
    clicks=st.floats(1, 1e6),
    users=st.floats(100, 1e9),
    versions=st.floats(0.1, 20),
    answers=st.floats(1, 1e6),
    retention_h=st.floats(1, 1000),
    items=st.floats(100, 1e8),
    click_bytes=st.floats(10, 1000),
)
GROWING = ("clicks", "users", "answers", "retention_h", "items", "click_bytes")


def sized(load: Load, settings: Settings = SETTINGS) -> Sizing:
    return Sizing(load, settings)


def beyond(sizing: Sizing) -> set[str]:
    return {limit.name for limit in sizing.limits() if limit.share > 1}


def test_the_deployment_that_was_measured_comes_out_as_measured() -> None:
    """CPU time from /proc/PID/stat and sizes of files, in the soak at 10,000 clicks/s on two cores."""
    found = sized(SOAK)
    assert found["stream_cores"] == pytest.approx(0.332, rel=0.1) and found["trainer_cores"] == pytest.approx(
        0.281, rel=0.1
    )
    assert found["applier_cores"] == pytest.approx(0.451, rel=0.1)
    assert found["host_histories_bytes"] == pytest.approx(3.23e8, rel=0.2) and found["log_bytes_s"] == pytest.approx(
        2.88e6
    )
    # The soak was 580 s old; rows of durable versions stay for 15 min.
    young = replace(SETTINGS, serving=replace(SETTINGS.serving, keep_s=580.0))
    assert sized(SOAK, young)["served_bytes"] == pytest.approx(9.97e8, rel=0.2)
    parts = found.parts()
    assert 1.0 < sum(parts[part].cores for part in (STREAM, TRAINER, APPLIER, WORKERS, REST, KAFKA)) < 2.0
    # The whole loop reached 20,011 clicks/s on the same two cores.
    parts = sized(replace(SOAK, clicks=20_000)).parts()
    assert 1.6 < sum(parts[part].cores for part in (STREAM, TRAINER, APPLIER, WORKERS, KAFKA)) < 3.0


@given(loads, st.sampled_from(GROWING), st.floats(1, 100))
def test_more_load_takes_nothing_less(load: Load, name: str, factor: float) -> None:
    before, after = sized(load), sized(replace(load, **{name: getattr(load, name) * factor}))
    then = after.parts()
    for part, need in before.parts().items():
        # Whole worker processes: on more hosts there may be one less a host.
        slack = {"memory_bytes": then[part].instances * VALUES["worker_bytes"]} if part == WORKERS else {}
        for field in ("cores", "memory_bytes", "disk_bytes"):
            old, new = (getattr(one, field) * one.instances for one in (need, then[part]))
            assert new >= old * (1 - 1e-9) - slack.get(field, 0.0), (part, field)
    assert after["partitions"] >= before["partitions"] and after["hosts"] >= before["hosts"]
    assert all(0 < amount < float("inf") for amount in after.orders()["all"])
    assert all(0 < limit.share < float("inf") for limit in after.limits())


def test_one_click_a_second_of_one_user_is_sized_as_by_hand() -> None:
    load = Load(clicks=1, users=1, items=1, versions=1, answers=1000, retention_h=1, click_bytes=100)
    found = sized(load)
    assert found["stream_cores"] == pytest.approx(VALUES["stream_us"] / 1e6)
    assert found["worker_cores"] == pytest.approx(1000 * VALUES["lean_us"] / 1e6)
    assert found["stream_histories_bytes"] == VALUES["user_bytes"] + 256 * VALUES["event_bytes"]
    kafka = found.parts()[KAFKA]
    assert kafka.disk_bytes == pytest.approx((100 + VALUES["log_row_bytes"]) * 3600) and kafka.instances == 3
    read, load_s = VALUES["history_us"] / 1e6, 256 * VALUES["load_us"] / 1e6
    rest_s = SETTINGS.history.snapshot_every_s + load_s
    assert found["catch_up_s"] == pytest.approx(load_s + rest_s * read / (1 - read))
    without = replace(SETTINGS, history=replace(SETTINGS.history, snapshot_every_s=0.0))
    assert sized(load, without)["catch_up_s"] == pytest.approx(3600 * read)
    assert found["base_bytes"] == VALUES["durable_bytes"] + 2 * VALUES["base_row_bytes"]
    order = found.orders()[STREAM]
    assert order.cores == 1 and order.disk_bytes == 1.25 * found["stream_histories_bytes"]


def test_no_more_users_and_rows_are_counted_than_the_settings_keep() -> None:
    few = Settings(
        history=replace(SETTINGS.history, max_users=500_000),
        trainer=replace(SETTINGS.trainer, max_rows=1_000_000),
    )
    capped = sized(Load(clicks=10_000, users=1e7, items=1e5), few)
    a_user = VALUES["user_bytes"] + SETTINGS.features.history * VALUES["event_bytes"]
    assert capped["rows"] == 1_100_000
    assert capped["stream_histories_bytes"] == pytest.approx(500_000 * a_user)
    assert capped["host_histories_bytes"] == pytest.approx(500_000 * a_user)
    shares = {limit.name: limit.share for limit in capped.limits()}
    assert (shares["`history.max_users`, the stream"], shares["`history.max_users`, a host"]) == (20, 20)
    assert shares["embedding rows of one trainer, `trainer.max_rows`"] == 10


def test_shares_divide_the_users_of_a_host_and_workers_the_rows_of_a_trainer() -> None:
    load = Load(clicks=10_000, users=1e6, items=1e5)
    whole = sized(load)
    half = sized(load, replace(SETTINGS, serving=replace(SETTINGS.serving, shares="0-31")))
    assert half["host_histories_bytes"] == pytest.approx(whole["host_histories_bytes"] / 2)
    assert (whole["hosts"], half["hosts"]) == (2, 4), "two for each half"
    # Each host reads the whole log, and applies half of it.
    rest_us = VALUES["read_us"] + (VALUES["history_us"] - VALUES["read_us"]) / 2
    assert half["read_share"] == pytest.approx(1e4 * rest_us / 1e6)
    assert whole["applier_cores"] / 2 < half["applier_cores"] < whole["applier_cores"]
    assert half["snapshot_bytes"] == pytest.approx(whole["snapshot_bytes"])
    four = sized(load, replace(SETTINGS, trainer=replace(SETTINGS.trainer, workers=4)))
    assert four["table_bytes"] == pytest.approx(whole["table_bytes"] * (1e6 / 4 + 1e5) / 1.1e6)
    assert four["trainer_cores"] > whole["trainer_cores"], "workers need more processor time, not less"
    assert (four.parts()[TRAINER].instances, sized(replace(load, standbys=1)).parts()[TRAINER].instances) == (4, 2)


def test_a_stream_beyond_one_process_is_sized_for_flink() -> None:
    small, large = sized(SOAK), sized(replace(SOAK, clicks=100_000))
    assert (small["on_flink"], large["on_flink"]) == (False, True)
    assert 3 <= large["stream_cores"] / (10 * small["stream_cores"]) <= 4
    need = large.parts()[STREAM]
    assert need.instances > 1 and need.cores * need.instances == pytest.approx(large["stream_cores"])
    assert "one process of the local stream" in beyond(sized(replace(SOAK, clicks=100_000, stream="local")))


def test_the_leader_of_the_training_log_sends_it_to_every_reader() -> None:
    far = sized(Load(clicks=1e6, users=1e6, answers=1e6))
    assert far["hosts"] == 100
    assert far["log_leader_bytes_s"] == pytest.approx(1e6 * VALUES["log_row_bytes"] * (1 + 2 + 2 + 100))
    assert "leader of the training log" in beyond(far)


def test_the_page_has_every_constant() -> None:
    text = page()
    assert all(f"| `{name}` |" in text for name in CONSTANTS)


def test_each_constant_names_a_bench_that_exists() -> None:
    benches = {constant.bench.removeprefix(".venv/bin/python -m ") for constant in CONSTANTS.values()}
    assert [bench for bench in benches if importlib.util.find_spec(bench) is None] == []


def test_a_load_is_printed_with_its_limits_and_one_beyond_them_exits_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--clicks", "200", "--users", "2000", "--items", "4000", "--answers", "100", "--retention-h", "24"]
    assert main(words) == 0
    text = capsys.readouterr().out
    assert "| stream | 1 |" in text and "| all |" in text and "4 partitions" in text
    assert "BEYOND" not in text and len(re.findall(r"^\| within", text, re.M)) == 11
    assert main(["--clicks", "1e6", "--users", "1e9", "-o", "json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert "one trainer" in {limit["name"] for limit in found["limits"] if limit["share"] > 1}
    assert found["total"]["cores"] == sum(part["cores"] for part in found["parts"].values())


def test_settings_and_constants_of_the_command_line_count(capsys: pytest.CaptureFixture[str]) -> None:
    def part(name: str, *words: str) -> dict[str, float]:
        main(["--clicks", "30000", "--users", "1e7", "-o", "json", *words])
        found: dict[str, float] = json.loads(capsys.readouterr().out)["parts"][name]
        return found

    assert part(TRAINER, "--trainer.max_rows", "20000000")["memory_bytes"] > part(TRAINER)["memory_bytes"]
    assert part(TRAINER, "--measured", "trainer_us=100")["cores"] > part(TRAINER)["cores"]
    assert part(STREAM, "--stream", "flink")["cores"] > part(STREAM)["cores"]
    assert part(KAFKA, "--kafka.retention_h", "24")["disk_bytes"] < part(KAFKA)["disk_bytes"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--clicks", "many"], "'many' is not a number above 0"),
        (["--clicks", "-1"], "not a number above 0"),
        (["--measured", "speed=1"], "there is no constant speed"),
        (["--measured", "stream_us=fast"], "not a number above 0"),
        (["--use", "1.5"], "--use is at most 1"),
        (["--stream", "spark"], "'spark' is unknown"),
        (["--cliks", "1"], "unrecognized arguments"),
    ],
)
def test_what_cannot_be_is_refused(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    assert message in capsys.readouterr().err
