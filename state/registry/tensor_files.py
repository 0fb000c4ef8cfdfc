"""Tensor files of versions: safetensors, in durable versions with lossless compression of tensors.

A packed tensor is stored as uint8: one zstd frame of its bytes, with the first bytes of all elements before the second
bytes. `packed` in the file's metadata has the type and shape of each packed tensor, as JSON. Files of 0.1.0 have no
packed tensors.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import zstandard
from safetensors import safe_open

from state.disk import documents

Array = npt.NDArray[Any]

LEVEL = 1
LEAST_BYTES = 256
"""Tensors with fewer bytes are not packed, because packing would gain nothing."""
HEAD_BYTES = 8  # the length of a file's JSON header, little endian
_METADATA, _PACKED = "__metadata__", "packed"
_TYPES = {
    "<u8": "U64", "<i8": "I64", "<f8": "F64", "<f4": "F32", "<u4": "U32", "<i4": "I32", "<f2": "F16", "<u2": "U16",
    "<i2": "I16", "|i1": "I8", "|u1": "U8", "|b1": "BOOL",
}  # fmt: skip
"""The file's names of NumPy's types, in the order of tensors in a file: the largest elements first, so that all are aligned."""
_RANKS = {name: rank for rank, name in enumerate(_TYPES)}
_NUMPY_TYPES = {name: np.dtype(dtype) for dtype, name in _TYPES.items()}


def save(tensors: Mapping[str, Array], metadata: Mapping[str, str] | None = None) -> bytes:
    """Encodes `tensors` as a file without compression, with the same bytes as safetensors.

    It copies each tensor once. The library copies each tensor three times, and its tensors cost 10 µs more each.
    """
    arrays = [(name, np.asarray(tensor, order="C")) for name, tensor in tensors.items()]
    arrays.sort(key=lambda entry: (_RANKS[entry[1].dtype.str], entry[0]))
    head: dict[str, Any] = {_METADATA: metadata} if metadata else {}
    end = 0
    for name, array in arrays:
        begin, end = end, end + array.nbytes
        head[name] = {"dtype": _TYPES[array.dtype.str], "shape": array.shape, "data_offsets": (begin, end)}
    text = msgspec.json.encode(head)
    text += b" " * (-len(text) % HEAD_BYTES)
    return b"".join([len(text).to_bytes(HEAD_BYTES, "little"), text, *(array.data for _, array in arrays)])


def load(data: bytes) -> dict[str, Array]:
    """Decodes a file without compression; the tensors share one copy of `data`.

    Raises:
        ValueError: The data is not such a file.
    """
    head, content = _head(data), bytearray(data)
    head.pop(_METADATA, None)
    first = HEAD_BYTES + int.from_bytes(data[:HEAD_BYTES], "little")
    try:
        return {
            name: np.ndarray(entry["shape"], _NUMPY_TYPES[entry["dtype"]], content, first + entry["data_offsets"][0])
            for name, entry in head.items()
        }
    except (KeyError, TypeError) as error:
        raise ValueError(f"no tensor file: {error}") from error


def pack(tensors: Mapping[str, Array]) -> bytes:
    """Encodes `tensors` as a file; equal tensors give equal bytes.

    >>> unpack(pack({"a": np.arange(1000, dtype=np.uint64)}))["a"][-1]
    np.uint64(999)
    """
    arrays: dict[str, Array] = {}
    packed: dict[str, tuple[str, tuple[int, ...]]] = {}
    compressor = zstandard.ZstdCompressor(level=LEVEL)
    for name, tensor in sorted(tensors.items()):
        array = np.asarray(tensor, order="C")
        arrays[name] = array
        if array.nbytes < LEAST_BYTES:
            continue
        planes = np.ascontiguousarray(array.reshape(-1).view(np.uint8).reshape(array.size, -1).T)
        frame = compressor.compress(planes.data)
        if len(frame) < array.nbytes:
            arrays[name], packed[name] = np.frombuffer(frame, np.uint8), (array.dtype.str, array.shape)
    return save(arrays, {_PACKED: json.dumps(packed)} if packed else None)


def unpack(data: bytes) -> dict[str, Array]:
    """Decodes the tensors in a file, packed or not.

    Raises:
        ValueError: The data is not such a file. This cannot happen after a digest check.
    """
    packed = json.loads(_head(data).get(_METADATA, {}).get(_PACKED, "{}"))
    return {name: _whole(tensor, packed.get(name)) for name, tensor in load(data).items()}


def shapes_in(path: Path) -> dict[str, tuple[int, ...]]:
    """Reads the shape of each tensor from a file's header.

    Raises:
        OSError: The file cannot be read.
        ValueError, KeyError, TypeError, AttributeError: Its header is damaged.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(HEAD_BYTES), "little")
        head = json.loads(file.read(min(length, path.stat().st_size)))
    packed = json.loads(head.get(_METADATA, {}).get(_PACKED, "{}"))
    shapes = {name: entry["shape"] for name, entry in head.items() if name != _METADATA}
    return {name: tuple(packed[name][1] if name in packed else shape) for name, shape in shapes.items()}


def tensor_in(path: Path, name: str) -> Array | None:
    """Reads one tensor of a file, without the rest; None if the file has none of that name.

    Raises:
        OSError: The file cannot be read.
        SafetensorError: It is damaged.
    """
    with safe_open(path, "np") as file:
        if name not in file.keys():  # noqa: SIM118 - it is no mapping
            return None
        packed = json.loads((file.metadata() or {}).get(_PACKED, "{}"))
        return _whole(file.get_tensor(name), packed.get(name))


def _head(data: bytes) -> dict[str, Any]:
    length = int.from_bytes(data[:HEAD_BYTES], "little")
    try:
        return documents.decode(data[HEAD_BYTES : HEAD_BYTES + length], dict[str, Any])
    except msgspec.MsgspecError as error:
        raise ValueError(f"no tensor file: {error}") from error


def _whole(tensor: Array, packed: tuple[str, list[int]] | None) -> Array:
    if packed is None:
        return tensor
    dtype, shape = np.dtype(packed[0]), packed[1]
    size = int(np.prod(shape))
    planes = zstandard.ZstdDecompressor().decompress(tensor.tobytes(), max_output_size=size * dtype.itemsize)
    elements = np.frombuffer(planes, np.uint8).reshape(dtype.itemsize, size).T
    return np.ascontiguousarray(elements).reshape(-1).view(dtype).reshape(shape)
