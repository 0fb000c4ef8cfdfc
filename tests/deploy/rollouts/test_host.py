"""The host of a trial is wanted while a rollout of a trial of this machine is not over, and leaves nothing behind."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from deploy.rollouts.host import remove
from deploy.rollouts.process_plan import plans
from state import layout
from state.config.loading import load
from state.disk.memory_place import home, own
from state.rollouts import rollout
from state.rollouts.rollouts import Rollouts

WHO: dict[str, Any] = {"actor": "ann", "reason": "try it", "now_ms": 5}


def test_it_is_wanted_from_the_start_of_a_rollout_until_it_is_over(tmp_path: Path) -> None:
    settings = load([f"--paths.state={tmp_path}", "--rollout.address=http://127.0.0.1:8601"], {}, "/dev/null")
    (plan,) = plans(settings)
    assert plan.wanted is not None and not plan.wanted()
    rollouts = Rollouts(settings.registry_dir)
    rollouts.propose(rollout.start(None, "wider", (50.0,), 60.0, (0, 0), **WHO))
    assert not plan.wanted(), "its trial is elsewhere"
    layout.trial_registry(tmp_path, "wider").mkdir(parents=True)
    for decided, wanted in ((rollout.begin, True), (rollout.halt, True), (rollout.back, False), (rollout.end, False)):
        rollouts.change(partial(decided, **WHO))
        assert plan.wanted() == wanted, decided.__name__


def test_at_an_address_of_another_machine_nothing_is_run(tmp_path: Path) -> None:
    for address in ("http://trial-host:8501", "https://127.0.0.1:8601", ""):
        assert plans(load([f"--paths.state={tmp_path}", f"--rollout.address={address}"], {}, "/dev/null")) == []


def test_what_it_kept_goes_also_what_lies_in_memory(tmp_path: Path) -> None:
    folder, memory = tmp_path / "host", tmp_path / "memory"
    link = folder / layout.SERVING / layout.ROWS
    link.parent.mkdir(parents=True)
    memory.mkdir()
    store = own(home(memory, link))
    store.mkdir()
    link.symlink_to(store)
    remove(folder)
    assert not folder.exists() and list(memory.iterdir()) == []
    remove(folder)
