"""The runs that a disturbed one is compared with: the same stream and the same trainer, left alone.

Both have from their beginning what the disturbed ones left out at the end.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from msgspec import structs

from state.config.settings import Settings
from state.history.store import HistoryStore
from state.registry.control import Control, start
from state.registry.log_line import WHOLE, LogLine
from state.registry.registry import Registry
from tests.e2e.evidence import (
    Histories,
    LogContent,
    TrainerState,
    covers,
    newest_state,
    read_log,
    stream_histories,
)
from tests.e2e.parts import Part
from tests.e2e.running import until

DEADLINE_S = 180.0


def stream_settings(settings: Settings, folder: Path) -> Settings:
    """Settings of a second stream: the same clicks and salt, other topics and another directory."""
    kafka = replace(
        settings.kafka,
        microbatches_topic=f"{settings.kafka.microbatches_topic}.undisturbed",
        dead_letters_topic=f"{settings.kafka.dead_letters_topic}.undisturbed",
        group=f"{settings.kafka.group}-undisturbed",
    )
    return replace(
        settings,
        kafka=kafka,
        paths=replace(settings.paths, state=str(folder), salt_file=str(settings.salt_path)),
        # Other cuts and a smaller cache must not matter.
        stream=replace(settings.stream, cut_ms=350, cache_users=50, metrics_port=0),
    )


def trainer_settings(settings: Settings, folder: Path) -> Settings:
    """Settings of a second trainer: the same log, a registry of its own, another pace."""
    return replace(
        settings,
        paths=replace(settings.paths, state=str(folder), registry="", salt_file=str(settings.salt_path)),
        trainer=replace(settings.trainer, publish_s=2.0, base_every_s=3600.0, metrics_port=0),
    )


def _decided(control: Control, line: LogLine) -> Control:
    """The first generation of a run that leaves out from its beginning what `control` does."""
    first = start(actor="test", reason="undisturbed", now_ms=0)
    masks = {name: getattr(control, name) for name in ("masks", "mask_generation", "last_mask")}
    return structs.replace(first, log=line, **masks)


def begin_stream(settings: Settings, folder: Path, control: Control) -> tuple[Settings, Part]:
    """Starts the second stream; the first one must have ended, for Kafka fences it."""
    own = stream_settings(settings, folder)
    Registry(own.registry_dir).propose(_decided(control, WHOLE))
    return own, Part("stream", own, folder / "stream.log")


def begin_trainer(settings: Settings, folder: Path, control: Control) -> tuple[Settings, Part]:
    """Starts the second trainer with the same bootstrap, along control's line; its base is what it begins with."""
    own = trainer_settings(settings, folder)
    registry = Registry(own.registry_dir)
    shutil.copytree(settings.registry_dir / "specs", registry.path / "specs", dirs_exist_ok=True)
    registry.propose(_decided(control, control.log))
    return own, Part("trainer", own, folder / "trainer.log")


def finish_stream(own: Settings, part: Part, topic_id: str, ends: Mapping[int, int]) -> tuple[LogContent, Histories]:
    """Waits until the second stream has committed everything, ends it, and reads what it wrote."""

    def done() -> bool:
        assert part.end() is None, f"the undisturbed stream ended:\n{part.said()}"
        path = own.stream_dir / "histories"
        if "reading" not in part.said() or not (path / "data.mdb").exists():
            return False
        store = HistoryStore(path, own.features.history, readonly=True)
        try:
            return covers(store.positions(), ends, topic_id)
        finally:
            store.close()

    until(done, "the undisturbed stream has not read everything", DEADLINE_S)
    assert part.stop() == 0, part.said()
    return read_log(own.kafka, own.kafka.microbatches_topic), stream_histories(own)


def finish_trainer(own: Settings, part: Part, log: LogContent) -> TrainerState:
    """Waits until the second trainer has published everything, ends it, and reads its state."""
    registry = Registry(own.registry_dir)

    def done() -> bool:
        assert part.end() is None, f"the undisturbed trainer ended:\n{part.said()}"
        newest = registry.newest(1)
        return newest is not None and registry.manifest(newest).log.next >= log.seen

    until(done, "the undisturbed trainer has not learned everything", DEADLINE_S)
    assert part.stop() == 0, part.said()
    return newest_state(registry)
