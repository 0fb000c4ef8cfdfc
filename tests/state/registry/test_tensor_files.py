"""Files of tensors: packed without loss, read packed or not, and in part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from safetensors.numpy import load, save

from state.registry import tensor_files

TYPES = (np.float32, np.float64, np.uint64, np.int64, np.int32, np.uint8, np.uint16, np.bool_)
SHAPES = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=40)


@given(st.dictionaries(st.text("abc.", min_size=1), st.sampled_from(TYPES).flatmap(lambda t: arrays.arrays(t, SHAPES))))
def test_what_is_packed_comes_back_bit_for_bit(tensors: dict[str, npt.NDArray[Any]]) -> None:
    data = tensor_files.pack(tensors)
    found = tensor_files.unpack(data)
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert found[name].tobytes() == tensor.tobytes()
    assert tensor_files.pack(dict(reversed(tensors.items()))) == data


@given(
    st.dictionaries(st.text("abc.", min_size=1), st.sampled_from(TYPES).flatmap(lambda t: arrays.arrays(t, SHAPES))),
    st.sampled_from([None, {"packed": '{"a": 1}'}]),
)
def test_a_file_has_the_bytes_of_the_library_and_both_read_it(
    tensors: dict[str, npt.NDArray[Any]], metadata: dict[str, str] | None
) -> None:
    data = save(tensors, metadata)
    assert tensor_files.save(dict(reversed(tensors.items())), metadata) == data
    for found in (load(data), tensor_files.load(data)):
        assert found.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
            assert found[name].tobytes() == tensor.tobytes()
            assert found[name].flags.aligned and found[name].flags.writeable


@pytest.mark.parametrize("data", [b"", bytes(16), b"\x02\0\0\0\0\0\0\0[]", save({"a": np.arange(9)})[:-1]])
def test_other_data_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        tensor_files.unpack(data)


@pytest.fixture
def weights() -> dict[str, npt.NDArray[Any]]:
    drawn = np.random.default_rng(1)
    rows = drawn.normal(0, 0.05, (5000, 16)).astype(np.float32)
    return {"user.ids": np.arange(5000, dtype=np.uint64), "user.rows": rows, "user.removed": np.zeros(0, np.uint64)}


def test_weights_take_a_tenth_less_and_sightings_much_less(weights: dict[str, npt.NDArray[Any]]) -> None:
    assert len(tensor_files.pack({"rows": weights["user.rows"]})) < 0.9 * weights["user.rows"].nbytes
    assert len(tensor_files.pack({"ids": weights["user.ids"]})) < 0.1 * weights["user.ids"].nbytes


@pytest.mark.parametrize("write", [save, tensor_files.pack])
def test_a_file_is_read_in_part_packed_or_not(tmp_path: Path, weights: dict[str, npt.NDArray[Any]], write: Any) -> None:
    path = tmp_path / "serving.safetensors"
    path.write_bytes(write(weights))
    assert tensor_files.shapes_in(path) == {name: tensor.shape for name, tensor in weights.items()}
    found = tensor_files.tensor_in(path, "user.ids")
    assert found is not None and found.tolist() == weights["user.ids"].tolist()
    assert tensor_files.tensor_in(path, "item.ids") is None
