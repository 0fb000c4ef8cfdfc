"""Makes TensorFlow deterministic on the trainer's device."""

from __future__ import annotations

import logging
from functools import partial

import tensorflow as tf

from state.metrics import TrainerMetrics
from trainer.placement import device_of

LOG = logging.getLogger(__name__)


def prepare(device: str = "auto", threads: int = 1) -> str:
    """Fixes threads and determinism for the process; returns the name of the chosen device for `tf.device`.

    Call it before anything else of TensorFlow: threads cannot be changed once an operation has run. A second call with the
    same values does nothing.
    """
    chosen = device_of(device)
    try:
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
    except RuntimeError:
        running = tf.config.threading.get_intra_op_parallelism_threads()
        if running != threads:
            LOG.warning(
                "trainer.threads is %d, but TensorFlow already runs in this process with %s; bits may differ from other runs",
                threads,
                running or "its own choice",
            )
    tf.config.experimental.enable_op_determinism()
    if "CPU" in chosen:
        # oneDNN prepares a matrix product that is fused with its bias once for each number of rows. It caches each
        # result: 160 kB. It does not do so for an unfused product, which has the same speed and the same bits.
        tf.config.optimizer.set_experimental_options({"remapping": False})
    return chosen


def show(device: str, metrics: TrainerMetrics) -> None:
    """Exports TensorFlow's GPU memory use as metrics, read at each scrape. Does nothing on a CPU."""
    if "GPU" not in device:
        return

    def held_bytes(kind: str) -> float:
        return float(tf.config.experimental.get_memory_info(device.lstrip("/"))[kind])

    for kind in ("current", "peak"):
        metrics.device_memory_bytes.labels(kind).set_function(partial(held_bytes, kind))
