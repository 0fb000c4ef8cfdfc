"""Tensors as TensorFlow's messages, both ways; strings are bytes in arrays of objects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from deploy.serving.grpc_api.messages import POOL, message
from deploy.serving.signatures import Signature, Tensor, TensorSpec
from state.errors import BadRequest

TensorProto, TensorInfo = message("tensorflow.TensorProto"), message("tensorflow.TensorInfo")
SignatureDef = message("tensorflow.SignatureDef")
METHOD = "tensorflow/serving/predict"
NUMBER_OF = {name: one.number for name, one in POOL.FindEnumTypeByName("tensorflow.DataType").values_by_name.items()}
NAME_OF = {number: name for name, number in NUMBER_OF.items()}

_FIELDS = {
    "DT_FLOAT": ("<f4", "float_val"),
    "DT_DOUBLE": ("<f8", "double_val"),
    "DT_INT32": ("<i4", "int_val"),
    "DT_INT64": ("<i8", "int64_val"),
    "DT_BOOL": ("|b1", "bool_val"),
    "DT_UINT32": ("<u4", "uint32_val"),
    "DT_UINT64": ("<u8", "uint64_val"),
    "DT_STRING": ("O", "string_val"),
}
"""NumPy's type, and where the values stand that are not in `tensor_content`."""
_TYPES = {dtype: NUMBER_OF[name] for name, (dtype, _) in _FIELDS.items()}
MOST_VALUES = 1 << 20


def to_array(name: str, proto: Any) -> Tensor:
    """The tensor of a message.

    Args:
        name: For errors.
        proto: A `tensorflow.TensorProto`.

    Raises:
        BadRequest: Type, shape and values do not belong together.
    """
    kind = NAME_OF.get(proto.dtype, str(proto.dtype))
    if kind not in _FIELDS:
        raise BadRequest(f"the input {name!r} is of type {kind}", f"send one of {', '.join(_FIELDS)}")
    dtype, field = _FIELDS[kind]
    shape = [dim.size for dim in proto.tensor_shape.dim]
    count = 1
    for size in shape:
        # Sizes come from outside: a product of them must not grow without bound.
        if size < 0 or count * max(size, 1) > MOST_VALUES or len(shape) > 8:
            raise BadRequest(f"the input {name!r} has the shape {shape[:9]}", "send fewer values")
        count *= size
    if proto.tensor_content and dtype != "O":
        if len(proto.tensor_content) != count * np.dtype(dtype).itemsize:
            raise BadRequest(
                f"tensor_content of the input {name!r} has another length than its shape says", "correct it"
            )
        return np.frombuffer(proto.tensor_content, dtype).reshape(shape)
    given = getattr(proto, field)
    if not (len(given) == count or 0 < len(given) < count):
        raise BadRequest(f"the input {name!r} has {len(given)} values for the shape {shape}", f"send {count}")
    values = np.empty(count, dtype)
    values[: len(given)] = list(given)
    # As in TensorFlow the last value stands for all that follow.
    values[len(given) :] = given[-1] if count else 0
    return values.reshape(shape)


def to_proto(values: Tensor) -> Any:
    """The `tensorflow.TensorProto` of a tensor."""
    dtype = "O" if values.dtype == np.object_ else values.dtype.newbyteorder("<").str
    made = TensorProto(dtype=_TYPES[dtype])
    for size in values.shape:
        made.tensor_shape.dim.add(size=size)
    if dtype == "O":
        made.string_val.extend(values.reshape(-1).tolist())
    else:
        made.tensor_content = np.ascontiguousarray(values, dtype).tobytes()
    return made


def signature_def(signature: Signature) -> Any:
    """The `tensorflow.SignatureDef` of a signature."""
    made = SignatureDef(method_name=METHOD)
    for of, specs in ((made.inputs, signature.inputs), (made.outputs, signature.outputs)):
        for name, spec in specs.items():
            of[name].CopyFrom(_info(name, spec))
    for name, value in _defaults(signature).items():
        made.defaults[name].CopyFrom(to_proto(value))
    return made


def _info(name: str, spec: TensorSpec) -> Any:
    made = TensorInfo(name=name, dtype=_TYPES[spec.dtype])
    for size in spec.shape:
        made.tensor_shape.dim.add(size=size)
    return made


def _defaults(signature: Signature) -> Mapping[str, Tensor]:
    """What stands for each input that is left out; of those of a row's own one row."""
    own = {
        name: np.array([one.default], one.dtype) for name, one in signature.inputs.items() if one.default is not None
    }
    return own | dict(signature.kept)
