"""`springtide versions` on a real registry: the newest first, what answers use, what is corrupt."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from state.config.sections import Kafka
from state.errors import RegistryError
from state.rows.store import RowStore
from tests.deploy.operating import NOW_MS, Operator
from tests.memory_log import MemoryLog


def test_versions_lists_the_newest_first_with_age_log_and_metrics(operator: Operator) -> None:
    assert "3 older versions" in operator("versions", "--last", "2")
    lines = operator("versions").splitlines()
    assert lines[0].split()[:5] == ["version", "epoch", "age", "kind", "log"]
    assert [line.split()[0] for line in lines[1:6]] == ["5", "4", "3", "2", "1"]
    assert "40-50" in lines[1] and "2.5000" in lines[1] and "5 min 0 s" in lines[1]
    assert "nan" not in lines[5]
    assert "0.6250" in lines[1] and "known top 5" in lines[0]
    # Version 1 is as 0.1.0 wrote it: what it calls log loss is another measure, and is not shown beside the others.
    assert "2.9000" not in lines[5]


def test_versions_as_json_is_json_even_where_a_metric_is_not_a_number(operator: Operator) -> None:
    entries = json.loads(operator("versions", "-o", "json"), parse_constant=lambda text: pytest.fail(text))
    assert (entries[0]["metrics"]["log_loss"], entries[0]["metrics"].get("auc")) == (2.9, None)
    assert entries[-1]["log"] == {"topic": "microbatches", "partition": 0, "first": 40, "next": 50}


def test_versions_marks_what_answers_use(operator: Operator) -> None:
    store = RowStore(operator.state / "serving" / "rows", 1 << 26)
    tensors: dict[str, np.ndarray] = {"dense.w": np.ones(1, np.float32), "popular": np.array([5], np.uint64)}
    store.apply(operator.registry.manifest(1), tensors, now_ms=NOW_MS)
    store.serve(1)
    store.close()
    marked = next(line for line in operator("versions", "--last", "1").splitlines() if "served" in line)
    assert marked.startswith("1 "), "also where it is older than those asked for"


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


def test_versions_says_how_far_back_a_rollback_reaches(operator: Operator, log: MemoryLog) -> None:
    """As far as the training log leads on from what is kept: the retention of both decides."""
    assert "a rollback reaches back 9 min 0 s, to version 1" in operator("versions")
    topic = Kafka().microbatches_topic
    log.topics().delete_before(topic, {0: operator.registry.manifest(3).log.next})
    assert "a rollback reaches back 7 min 0 s, to version 3" in operator("versions", "--last", "1")
    log.topics().delete_before(topic, {0: operator.registry.manifest(5).log.next + 1})
    assert "rollback reaches" not in operator("versions")
