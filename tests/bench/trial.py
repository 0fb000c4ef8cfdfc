"""What the live trainer pays while a trial runs: a step with and without the losses of rows that it writes for it.

    python -m tests.bench.trial

One process, the default model, records of 1,024 rows, one record after another with and without:
processor seconds of the step and of what is written, so that neighbours on the machine disturb them little.
What the trial's own trainer takes beside it, on cores of its own and behind everybody else, is none of this.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from pathlib import Path

import numpy as np

from tests.bench.report import Figure, Stages, report

USERS, ROWS, STEPS, WARM_UP = 100_000, 1024, 200, 20


def main() -> None:
    """Measures, prints and writes the figures."""
    from state.config.settings import Settings
    from state.experiments.comparison import want
    from tests.trainer.batches import SPEC, START_MS, micro_batch, spread
    from trainer.engine.step import Trainer
    from trainer.learner import LossRecorder

    progress, base = Stages("trial"), Settings()
    own = dataclasses.replace(base.trainer, device="cpu", capacity=USERS + 2, max_rows=2 * USERS)
    trainer = Trainer(dataclasses.replace(base, trainer=own), SPEC)
    trainer.tables["user"].observe(spread(np.arange(1, USERS + 1)), np.full(USERS, START_MS))
    seconds: dict[bool, list[float]] = {False: [], True: []}
    with tempfile.TemporaryDirectory() as folder:
        read, unread = Path(folder, "read"), Path(folder, "unread")
        for path in (read, unread):
            path.mkdir()
        want(read, "bench")
        recorders = {True: LossRecorder(read), False: LossRecorder(unread)}
        for number in range(WARM_UP + 2 * STEPS):
            progress.say("steps", f"{number} of {WARM_UP + 2 * STEPS}")
            batch = micro_batch(ROWS, first=number * ROWS, users=USERS, items=50_000, categories=3000)
            records = number % 2 == 1
            began = time.process_time()
            recorded = trainer.step(batch)
            recorders[records].take(number, batch.user, recorded)
            if number >= WARM_UP:
                seconds[records].append(time.process_time() - began)
        written = sum(path.stat().st_size for path in (read / "losses").glob("*.losses"))
        assert not (unread / "losses").exists()
    without, with_losses = (float(np.median(seconds[records])) for records in (False, True))
    figures = {
        "step without a trial": Figure(without * 1e3, "cpu-ms"),
        "step while one runs": Figure(with_losses * 1e3, "cpu-ms"),
        "with over without": Figure(with_losses / without, "ratio", "<= 1.05"),
        "written a row": Figure(written / ((WARM_UP / 2 + STEPS) * ROWS), "bytes"),
    }
    report("trial", figures, {"rows": ROWS, "steps": STEPS})


if __name__ == "__main__":
    main()
