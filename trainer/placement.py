"""Chooses the trainer's device. TensorFlow is loaded only where it may find a GPU."""

from __future__ import annotations

import ctypes
from importlib.util import find_spec
from pathlib import Path

from state.errors import SettingsError

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
