"""The peer of a worker: a plain FastAPI server around a SavedModel, as one would write it in an hour.

It looks nothing up: the inputs of some users are in its memory, made before it
begins. What it does for an answer is one call of the model and one document.

    python -m tests.bench.answers.peer FOLDER PORT
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from tests.bench.answers.stores import until_answers

INPUTS = "inputs.npz"
VERSION = "1"
KNOWN = 500  # users whose inputs it has
TOP = 10


def export(folder: Path, model: Any) -> None:
    """Writes what the peer begins with.

    Args:
        folder: A new directory.
        model: The ranker, with its weights.
    """
    from trainer.exporting import saved_model
    from trainer.versions.program import sample

    inputs: dict[str, Any] = {**sample(model, KNOWN)}
    kept = {name: value for name, value in inputs.items() if model.specs()[name].shape[0] is not None}
    saved_model.publish(saved_model.write(folder, int(VERSION), model, kept), int(VERSION))
    np.savez(folder / INPUTS, **inputs)


@contextmanager
def peer(folder: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """The peer's process, once it answers.

    Raises:
        AssertionError: It ended, or did not answer within `READY_S`.
    """
    process = subprocess.Popen([sys.executable, "-m", "tests.bench.answers.peer", str(folder), str(port)])
    try:
        until_answers(f"http://127.0.0.1:{port}/v1/profiles/user-1", process)
        yield process
    finally:
        process.terminate()
        process.wait()


def _serve(folder: Path, port: int) -> None:
    os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
    import tensorflow as tf
    import uvicorn
    from fastapi import FastAPI

    tf.config.threading.set_inter_op_parallelism_threads(1)
    tf.config.threading.set_intra_op_parallelism_threads(1)
    model = tf.saved_model.load(str(folder / VERSION))
    raw = model.signatures["raw"]
    with np.load(folder / INPUTS) as stored:
        values = dict(stored)
    # What is no user's own, the popular categories' rows, is the same for all.
    own = [
        {name: value[one : one + 1] if len(value) == KNOWN else value for name, value in values.items()}
        for one in range(KNOWN)
    ]
    inputs = [{name: tf.constant(value) for name, value in one.items()} for one in own]
    app = FastAPI()

    @app.get("/v1/profiles/{user}")
    async def profile(user: str) -> dict[str, Any]:
        outputs = raw(**inputs[int(user.rpartition("-")[2]) % KNOWN])
        logits = outputs["recent_logits"].numpy()[0]
        shares = np.exp(logits - logits.max())
        shares /= shares.sum()
        best = np.argsort(-shares)[:TOP]
        interests = [{"id": int(one), "probability": float(shares[one])} for one in best]
        return {"user_id": user, "version": VERSION, "interests": interests}

    uvicorn.run(
        app, host="127.0.0.1", port=port, loop="uvloop", http="httptools", access_log=False, log_level="warning"
    )


if __name__ == "__main__":
    _serve(Path(sys.argv[1]), int(sys.argv[2]))
