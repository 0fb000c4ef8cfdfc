"""`springtide versions` on a real registry: the newest first, what answers use, what is corrupt."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from state.errors import RegistryError
from state.rows.store import RowStore
from tests.deploy.operating import NOW_MS, Operator


def test_versions_lists_the_newest_first_with_age_log_and_metrics(operator: Operator) -> None:
    lines = operator("versions").splitlines()
    assert lines[0].split()[:5] == ["version", "epoch", "age", "kind", "log"]
    assert [line.split()[0] for line in lines[1:]] == ["5", "4", "3", "2", "1"]
    assert "40-50" in lines[1] and "2.5000" in lines[1] and "5 min 0 s" in lines[1]
    assert "nan" not in lines[-1]


def test_versions_as_json_is_json_even_where_a_metric_is_not_a_number(operator: Operator) -> None:
    entries = json.loads(operator("versions", "-o", "json"), parse_constant=lambda text: pytest.fail(text))
    assert (entries[0]["metrics"]["log_loss"], entries[0]["metrics"].get("auc")) == (2.9, None)
    assert entries[-1]["log"] == {"topic": "microbatches", "partition": 0, "first": 40, "next": 50}


def test_versions_says_how_many_more_there_are(operator: Operator) -> None:
    assert "3 older ones" in operator("versions", "--last", "2")
    assert "older ones" not in operator("versions", "--all")


def test_versions_marks_what_answers_use(operator: Operator) -> None:
    store = RowStore(operator.state / "serving" / "rows", 1 << 26)
    tensors = {"dense.w": np.ones(1, np.float32), "popular": np.array([5], np.uint64)}
    store.apply(operator.registry.manifest(1), tensors, now_ms=NOW_MS)
    store.serve(1)
    store.close()
    marked = next(line for line in operator("versions", "--last", "1").splitlines() if "served" in line)
    assert marked.startswith("1 "), "also where it is older than those asked for"


def test_a_host_that_has_not_served_yet_marks_nothing(operator: Operator) -> None:
    (operator.state / "serving" / "rows").mkdir(parents=True)
    assert "served" not in operator("versions")


def test_a_corrupt_version_is_listed_as_such_and_passed_over(operator: Operator) -> None:
    (operator.state / "registry" / "versions" / f"{3:012d}" / "manifest.json").write_text("{")
    assert "corrupt" in next(line for line in operator("versions").splitlines() if line.startswith("3"))
    assert "version 2," in operator("rollback", "--before", "6m", "--reason", "older", "--dry-run")


def test_looking_does_not_make_a_registry(tmp_path: Path) -> None:
    operator = Operator(tmp_path / "absent")
    for command in ("versions", "history"):
        with pytest.raises(RegistryError, match="no registry here"):
            operator(command)
    assert not operator.state.exists()
