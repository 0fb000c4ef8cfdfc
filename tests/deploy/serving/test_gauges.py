"""What the applier shows of control and of ages."""

from __future__ import annotations

from dataclasses import replace

import pytest
from prometheus_client import CollectorRegistry

from deploy.serving.applier import show_ages
from deploy.serving.following.versions import show_control
from state.features.mask import Mask
from state.metrics import ApplierMetrics
from state.registry.control import roll_back, start
from state.rows.reader import Served

SERVED = Served(
    version=7, epoch=1, parent=6, serial=1, lane=0, visible=((1, 7),), dims={}, created_at_ms=4_000,
    event_time_ms=2_000, applied_at_ms=5_000, spec="", program="", salt="", mask_generation=0, sources={},
)  # fmt: skip


@pytest.fixture
def collected() -> CollectorRegistry:
    return CollectorRegistry()


def test_the_masks_of_control_are_counted(collected: CollectorRegistry) -> None:
    control = start(actor="ann", reason="test", now_ms=0)
    masked = roll_back(control, 1, Mask(times=((0, 9), (20, 30))), actor="ann", reason="test", now_ms=1)
    metrics = ApplierMetrics(collected)
    show_control(control, metrics)
    assert collected.get_sample_value("springtide_serving_masks") == 0
    show_control(masked, metrics)
    assert collected.get_sample_value("springtide_serving_masks") == 2
    assert collected.get_sample_value("springtide_serving_control_generation") == masked.generation


def test_ages_are_from_the_version_its_newest_click_and_the_newest_click_here(collected: CollectorRegistry) -> None:
    show_ages(SERVED, 9_500, 10_000, ApplierMetrics(collected))
    assert collected.get_sample_value("springtide_serving_version_age_seconds") == 6.0
    assert collected.get_sample_value("springtide_serving_weight_freshness_seconds") == 8.0
    assert collected.get_sample_value("springtide_serving_feature_freshness_seconds") == 0.5


def test_nothing_is_sampled_of_what_is_not_there(collected: CollectorRegistry) -> None:
    metrics = ApplierMetrics(collected)
    show_ages(None, 0, 10_000, metrics)
    show_ages(replace(SERVED, event_time_ms=0), 0, 10_000, metrics)
    assert collected.get_sample_value("springtide_serving_weight_age_seconds_count") == 0
    assert collected.get_sample_value("springtide_serving_feature_age_seconds_count") == 0


def test_a_weight_age_names_its_version(collected: CollectorRegistry) -> None:
    show_ages(SERVED, 0, 10_000, ApplierMetrics(collected))
    found = [
        sample.exemplar
        for family in collected.collect()
        for sample in family.samples
        if family.name == "springtide_serving_weight_age_seconds" and sample.exemplar
    ]
    assert [(one.labels, one.value) for one in found] == [({"version": "7"}, 8.0)]
