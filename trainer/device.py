"""Chooses the trainer's device and makes TensorFlow deterministic on it.

TensorFlow is loaded only to prepare it, and where it may find a GPU.
"""

from __future__ import annotations

import ctypes
import logging
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from state.errors import SettingsError
from state.metrics import TrainerMetrics

LOG = logging.getLogger(__name__)

CUDA = "libcuda.so.1"
"""The driver's library, without which TensorFlow finds no GPU of NVIDIA's."""

PLUGINS = "tensorflow-plugins"
"""The directory, next to TensorFlow's, from which it loads drivers of other devices."""


def device_of(device: str) -> str:
    """The name, for `tf.device`, of the device that the setting `trainer.device` chooses.

    Raises:
        SettingsError: `device` is `gpu` and there is none.
    """
    return pick(device, gpus() if device != "cpu" else [])


def gpus() -> list[str]:
    """The names of the GPUs that TensorFlow finds."""
    if not may_have_gpu():
        return []
    import tensorflow as tf

    return [gpu.name for gpu in tf.config.list_physical_devices("GPU")]


def may_have_gpu() -> bool:
    """Whether TensorFlow may find a GPU: there is a driver that it could load."""
    try:
        ctypes.CDLL(CUDA)
    except OSError:
        tensorflow = find_spec("tensorflow")
        places = [] if tensorflow is None else tensorflow.submodule_search_locations or []
        return any((Path(place).parent / PLUGINS).is_dir() for place in places)
    return True


def pick(device: str, gpus: list[str]) -> str:
    """The device to use, given the GPUs that exist.

    >>> pick("auto", []), pick("auto", ["/physical_device:GPU:0"]), pick("cpu", ["/physical_device:GPU:0"])
    ('/CPU:0', '/GPU:0', '/CPU:0')

    Raises:
        SettingsError: `device` is `gpu` and there is none.
    """
    if device == "gpu" and not gpus:
        raise SettingsError(
            "trainer.device is gpu, but TensorFlow finds no GPU here", "set it to auto or cpu, or check the driver"
        )
    return "/GPU:0" if gpus and device in ("auto", "gpu") else "/CPU:0"


def prepare(device: str = "auto", threads: int = 1) -> str:
    """Fixes threads and determinism for the process; returns the name of the chosen device for `tf.device`.

    Call it before anything else of TensorFlow: threads cannot be changed once an operation has run. A second call with the
    same values does nothing.
    """
    chosen = device_of(device)
    import tensorflow as tf

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
    import tensorflow as tf

    def held_bytes(kind: str) -> float:
        return float(tf.config.experimental.get_memory_info(device.lstrip("/"))[kind])

    for kind in ("current", "peak"):
        metrics.device_memory_bytes.labels(kind).set_function(partial(held_bytes, kind))
