"""The files of tensors of durable versions: safetensors, in which tensors may be packed without loss.

A packed tensor lies in the file as uint8: its bytes, the first of each element
before the second of each (neighbouring weights share their exponents), as one
zstd frame. `packed` in the file's metadata names each with type and shape, JSON.
A file of an earlier release has none, and is read all the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import zstandard
from safetensors import safe_open
from safetensors.numpy import load, save

Array = npt.NDArray[Any]

LEVEL = 3
LEAST_BYTES = 256
"""Smaller tensors gain nothing."""
HEAD_BYTES = 8  # the length of a file's JSON head, little endian
_METADATA, _PACKED = "__metadata__", "packed"


def pack(tensors: Mapping[str, Array]) -> bytes:
    """A file of `tensors`; equal tensors give equal bytes.

    >>> unpack(pack({"a": np.arange(1000, dtype=np.uint64)}))["a"][-1]
    np.uint64(999)
    """
    held: dict[str, Array] = {}
    packed: dict[str, tuple[str, tuple[int, ...]]] = {}
    compressor = zstandard.ZstdCompressor(level=LEVEL)
    for name, tensor in sorted(tensors.items()):
        array = np.asarray(tensor, order="C")
        held[name] = array
        if array.nbytes < LEAST_BYTES:
            continue
        planes = np.ascontiguousarray(array.reshape(-1).view(np.uint8).reshape(array.size, -1).T)
        frame = compressor.compress(planes.data)
        if len(frame) < array.nbytes:
            held[name], packed[name] = np.frombuffer(frame, np.uint8), (array.dtype.str, array.shape)
    return save(held, {_PACKED: json.dumps(packed)} if packed else None)


def unpack(data: bytes) -> dict[str, Array]:
    """The tensors in a file, packed or not.

    Raises:
        ValueError: It is no such file; whoever compared its digest meets none.
    """
    packed = json.loads(_head(data).get(_METADATA, {}).get(_PACKED, "{}"))
    return {name: _whole(tensor, packed.get(name)) for name, tensor in load(data).items()}


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in a file, out of its head.

    Raises:
        OSError: It cannot be read.
        ValueError, KeyError, TypeError, AttributeError: Its head is damaged.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(HEAD_BYTES), "little")
        head = json.loads(file.read(min(length, path.stat().st_size)))
    packed = json.loads(head.get(_METADATA, {}).get(_PACKED, "{}"))
    shapes = {name: one["shape"] for name, one in head.items() if name != _METADATA}
    return {name: tuple(packed[name][1] if name in packed else shape) for name, shape in shapes.items()}


def tensor_in(path: Path, name: str) -> Array | None:
    """One tensor of a file, without the rest of it; None where it has none of that name.

    Raises:
        OSError: It cannot be read.
        SafetensorError: It is damaged.
    """
    with safe_open(path, "np") as file:
        if name not in file.keys():  # noqa: SIM118 - it is no mapping
            return None
        packed = json.loads((file.metadata() or {}).get(_PACKED, "{}"))
        return _whole(file.get_tensor(name), packed.get(name))


def _head(data: bytes) -> dict[str, Any]:
    head: dict[str, Any] = json.loads(data[HEAD_BYTES : HEAD_BYTES + int.from_bytes(data[:HEAD_BYTES], "little")])
    return head


def _whole(tensor: Array, packed: tuple[str, list[int]] | None) -> Array:
    if packed is None:
        return tensor
    dtype, shape = np.dtype(packed[0]), packed[1]
    size = int(np.prod(shape))
    planes = zstandard.ZstdDecompressor().decompress(tensor.tobytes(), max_output_size=size * dtype.itemsize)
    elements = np.frombuffer(planes, np.uint8).reshape(dtype.itemsize, size).T
    return np.ascontiguousarray(elements).reshape(-1).view(dtype).reshape(shape)
