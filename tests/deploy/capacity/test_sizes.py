"""Sizes follow from the load: more of it never takes less, units hold, and the deployment that was measured comes out as measured."""

from __future__ import annotations

from dataclasses import astuple, fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.capacity.limits import limits, most_clicks_s
from deploy.capacity.load import DAY_S, HOUR_S, Load, kept_versions
from deploy.capacity.measured import MeasuredCosts
from deploy.capacity.prices import GB, RESERVE, Prices, bills, total
from deploy.capacity.sizes import BESIDE, FLINK, KAFKA, LOCAL, REGISTRY, SERVING, STREAM, TRAINER, WORKERS, Sizing
from state.config.sections import Paths
from state.config.settings import RegistrySettings, Settings

SOAK = Load(clicks_s=10_000, users=20_000, items=4_000, versions_s=4.65, answers_s=2, retention_h=1)
"""What `python -m tests.e2e.soak` runs, on two cores."""
SETTINGS, MEASURED = Settings(), MeasuredCosts()
amounts = st.floats(1, 1e9)
loads = st.builds(
    Load,
    clicks_s=st.floats(1, 1e6),
    users=st.floats(100, 1e9),
    versions_s=st.floats(0.1, 20),
    answers_s=st.floats(1, 1e6),
    retention_h=st.floats(1, 1000),
    items=st.floats(100, 1e8),
    click_bytes=st.floats(10, 1000),
)
GROWING = ("clicks_s", "users", "answers_s", "retention_h", "items", "click_bytes")


def sized(load: Load) -> Sizing:
    return Sizing(load, SETTINGS, MEASURED)


def near(value: float, measured: float, share: float = 0.2) -> bool:
    return abs(value / measured - 1) <= share


def test_the_deployment_that_was_measured_comes_out_as_measured() -> None:
    """Processor time out of /proc/PID/stat, sizes of files, in the soak at 10,000 clicks/s on two cores."""
    found = sized(SOAK)
    assert near(found.stream_cores, 0.332, 0.1) and near(found.trainer_cores, 0.281, 0.1)
    assert near(found.applier_cores, 0.451, 0.1)
    # So long the soak had run; rows of durable versions stay for 15 min.
    young = replace(found, settings=replace(SETTINGS, serving=replace(SETTINGS.serving, keep_s=580.0)))
    assert near(found.host_histories_bytes, 3.23e8) and near(young.served_bytes, 9.97e8)
    assert near(found.log_bytes_s, 2.88e6) and near(found.version_bytes_s, 4.65 * 0.9e6)
    durable = MEASURED.durable_bytes + found.changed_rows(10) * MEASURED.durable_row_bytes
    assert near(durable, 5.9e6)
    needs = found.needs()
    cores = sum(needs[part].cores for part in (STREAM, TRAINER, SERVING, WORKERS, BESIDE))
    cores += needs[KAFKA].cores
    assert 1.0 < cores < 2.0, "it ran on two, with some to spare"
    assert [one.name for one in limits(found) if one.share > 1 and one.unit in ("cores", "clicks/s")] == []


def test_the_loop_that_was_measured_at_twenty_thousand_clicks_is_near_its_end() -> None:
    """`python -m tests.bench.loop`: 20,011 clicks/s on the same two cores, and no more was asked of it."""
    at = sized(replace(SOAK, clicks_s=20_000))
    needs = at.needs()
    cores = sum(needs[part].cores for part in (STREAM, TRAINER, SERVING, WORKERS)) + needs[KAFKA].cores
    assert 1.6 < cores < 3.0


@given(loads, st.sampled_from(GROWING), st.floats(1, 100))
def test_more_load_takes_nothing_less(load: Load, name: str, factor: float) -> None:
    more = replace(load, **{name: getattr(load, name) * factor})
    before, after = sized(load), sized(more)
    for part, need in before.needs().items():
        then = after.needs()[part]
        whole, whole_then = ([one * got.count for one in astuple(got)[:4]] for got in (need, then))
        # Whole workers: on more hosts there may be one less in all.
        rounded = [0.0, then.count * MEASURED.worker_bytes if part == WORKERS else 0.0, 0.0, 0.0]
        pairs = zip(whole, whole_then, rounded, strict=True)
        assert all(b >= a * (1 - 1e-9) - least for a, b, least in pairs), (part, whole, whole_then)
    assert after.partitions >= before.partitions and after.hosts >= before.hosts
    prices, free = Prices(), Prices(core=0, memory_gb=0)
    assert total(bills(after, free)).cost >= total(bills(before, free)).cost * (1 - 1e-9)
    whole_ones = after.hosts * (prices.core + RESERVE * MEASURED.worker_bytes / GB * prices.memory_gb)
    assert total(bills(after, prices)).cost >= total(bills(before, prices)).cost - whole_ones


@given(loads)
def test_all_is_a_number_above_nothing(load: Load) -> None:
    found = total(bills(sized(load), Prices()))
    assert all(0 < one < float("inf") for one in astuple(found))
    assert all(0 < one.share < float("inf") for one in limits(sized(load)))


@given(loads)
def test_a_limit_ends_where_it_says(load: Load) -> None:
    found = sized(load)
    for limit in limits(found):
        most = most_clicks_s(found, limit.name)
        if 1e-3 < most < 1e8:
            beyond = replace(found, load=replace(load, clicks_s=most * 1.05))
            within = replace(found, load=replace(load, clicks_s=most * 0.95))
            share = {one.name: one.share for one in limits(beyond)}[limit.name]
            assert share >= 1 and {one.name: one.share for one in limits(within)}[limit.name] <= 1


def test_units() -> None:
    """Of one click a second, and one user, by hand."""
    load = Load(clicks_s=1, users=1, versions_s=1, answers_s=1000, retention_h=1, items=1, click_bytes=100)
    found = sized(load)
    assert found.stream_cores == pytest.approx(MEASURED.stream_us / 1e6)
    assert found.worker_cores == pytest.approx(1000 * MEASURED.lean_us / 1e6)
    assert (
        found.stream_histories_bytes == found.host_histories_bytes == MEASURED.user_bytes + 256 * MEASURED.event_bytes
    )
    assert found.log_bytes_s == MEASURED.log_row_bytes
    kafka = found.needs()[KAFKA]
    assert kafka.disk_bytes == pytest.approx((100 + MEASURED.log_row_bytes) * 3600) and kafka.count == 3
    assert found.catch_up_s == pytest.approx(3600 * MEASURED.history_us / 1e6)
    assert found.base_bytes == MEASURED.durable_bytes + 2 * MEASURED.base_row_bytes


def test_a_shared_registry_is_asked_by_each_host() -> None:
    load, asks = Load(clicks_s=1, users=1), Settings(paths=Paths(shared_registry="s3://bucket/shop"))
    alone, sharing = sized(load), Sizing(load, asks, MEASURED)
    more = sharing.applier_cores - alone.applier_cores
    assert more == pytest.approx(2000 / SETTINGS.registry.look_ms * MEASURED.shared_request_us / 1e6)


def test_a_price_is_of_a_month() -> None:
    free = Prices(0, 0, 0, 0)
    found = sized(SOAK)
    assert total(bills(found, free)).cost == 0
    whole = total(bills(found, Prices(core=1, memory_gb=0, disk_gb=0, network_gb=0)))
    assert whole.cost == whole.cores
    sent = total(bills(found, Prices(0, 0, 0, network_gb=1)))
    assert sent.cost == pytest.approx(sent.network_mb_s * 1e6 * 30 * DAY_S / 1e9)


def test_versions_are_kept_as_the_registry_s_tiers_say() -> None:
    settings = replace(SETTINGS, registry=RegistrySettings(durable_s=60, delta_keep_s=600, thin_s=1200, base_keep_h=1))
    assert kept_versions(settings) == [(10, 60), (2.5, 1200), ((7 * DAY_S - HOUR_S) / 3600, 3600)]
    fewer = replace(sized(SOAK), settings=settings)
    assert fewer.needs()[REGISTRY].disk_bytes < sized(SOAK).needs()[REGISTRY].disk_bytes


def test_settings_count() -> None:
    """A longer history takes more memory, a wider row more of the trainer's."""
    deep = replace(sized(SOAK), settings=replace(SETTINGS, features=replace(SETTINGS.features, history=512)))
    assert deep.host_histories_bytes > 1.9 * sized(SOAK).host_histories_bytes
    wide = replace(sized(SOAK), settings=replace(SETTINGS, model=replace(SETTINGS.model, dim=64)))
    assert wide.table_bytes > 1.5 * sized(SOAK).table_bytes


def test_no_more_users_and_rows_are_counted_than_the_settings_keep() -> None:
    load = Load(clicks_s=10_000, users=1e7, items=1e5)
    few = Settings(
        stream=replace(SETTINGS.stream, max_users=1_000_000),
        serving=replace(SETTINGS.serving, max_users=500_000),
        trainer=replace(SETTINGS.trainer, max_rows=1_000_000),
    )
    capped, kept = Sizing(load, few, MEASURED), sized(replace(load, users=1e6))
    assert capped.rows == 1_100_000 and capped.table_bytes == kept.table_bytes
    a_user = MEASURED.user_bytes + SETTINGS.features.history * MEASURED.event_bytes
    assert capped.stream_histories_bytes == pytest.approx(1_000_000 * a_user)
    assert capped.host_histories_bytes == pytest.approx(500_000 * a_user)
    shares = {limit.name: limit.share for limit in limits(capped)}
    assert shares["users beyond `max_users` have no history"] == 20
    assert shares["users or items beyond `max_rows` have no row"] == 10


def test_a_stream_that_one_process_does_not_bear_costs_what_it_takes_on_flink() -> None:
    """Measured by `tests.bench.flink` and `tests.bench.stream`: a click takes 3 to 4 times as much there."""
    small, large = sized(SOAK), sized(replace(SOAK, clicks_s=100_000))
    assert (small.on_flink, large.on_flink) == (False, True)
    assert 3 <= large.stream_cores / (10 * small.stream_cores) <= 4
    assert replace(large, form=LOCAL).stream_cores == pytest.approx(10 * small.stream_cores)
    asked = replace(small, form=FLINK).needs()[STREAM]
    assert asked.cores == pytest.approx(10_000 * MEASURED.flink_us / 1e6)
    need = large.needs()[STREAM]
    assert need.cores * need.count == pytest.approx(100_000 * MEASURED.flink_us / 1e6)
    assert need.count > 1 and need.cores <= large.host_cores * large.use
    names = {limit.name for limit in limits(replace(large, form=LOCAL)) if limit.share > 1}
    assert "the local stream is one process" in names


def test_the_leader_of_the_training_log_sends_it_to_every_reader() -> None:
    """30 GB a second at a million clicks a second: followers, trainer, validation and a hundred hosts read from it."""
    far = sized(Load(clicks_s=1e6, users=1e6, answers_s=1e6))
    assert far.hosts == 100
    assert far.log_leader_bytes_s == pytest.approx(1e6 * MEASURED.log_row_bytes * (1 + 2 + 2 + 100))
    (leader,) = (limit for limit in limits(far) if "leads the training log" in limit.name)
    assert leader.asked == far.log_leader_bytes_s and leader.share > 20


def test_each_figure_names_its_command() -> None:
    for one in fields(MeasuredCosts):
        assert one.metadata["bench"].startswith("python -m tests."), one.name
        assert one.metadata["unit"] and one.metadata["means"]
