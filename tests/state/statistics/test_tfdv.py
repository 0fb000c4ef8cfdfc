"""TensorFlow Data Validation itself, where it can be imported, reads what we write and finds what we find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from state.statistics.anomalies import validate
from state.statistics.baselines import SCHEMA, STATISTICS, baseline_files, infer_schema
from state.statistics.collecting import as_list, dataset
from tests.state.statistics.made_rows import columns, statistics


@pytest.fixture(scope="module")
def tfdv() -> Any:
    return pytest.importorskip(
        "tensorflow_data_validation",
        reason="tensorflow-data-validation (requirements-tfdv.txt) cannot be imported here: it needs glibc 2.38",
        exc_type=ImportError,
    )


def test_it_reads_schema_and_statistics_and_agrees_about_anomalies(tfdv: Any, tmp_path: Path) -> None:
    before = dataset(statistics(columns(4000)), "baseline")
    schema = infer_schema(before, warm=True)
    for name, data in baseline_files(schema, before).items():
        (tmp_path / name).write_bytes(data)
    read = tfdv.load_schema_text(str(tmp_path / SCHEMA))
    assert read == schema
    kept = tfdv.load_stats_binary(str(tmp_path / STATISTICS))
    assert kept == as_list(before)
    for changes in ({}, {"hot": 0.4}, {"known": 0.0}, {"known": 0.8}, {"scale": 3.0}):
        now = dataset(statistics(columns(4000, seed=1, **changes)), "window")
        theirs = tfdv.validate_statistics(as_list(now), read, previous_statistics=kept, serving_statistics=kept)
        ours = validate(now, schema, before, before)
        assert {*theirs.anomaly_info} == {*ours.anomaly_info}, changes
        assert {one.path.step[0] for one in theirs.drift_skew_info} == {
            one.path.step[0] for one in ours.drift_skew_info
        }
        for one in ours.drift_skew_info:
            (other,) = (found for found in theirs.drift_skew_info if found.path.step == one.path.step)
            assert other.drift_measurements[0].value == pytest.approx(one.drift_measurements[0].value, abs=1e-6)
