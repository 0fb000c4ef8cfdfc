"""The messages of the gRPC API: those of `protos/*.proto`, in a separate descriptor pool.

TensorFlow's messages have the same names in protobuf's default pool, and one pool
cannot contain both. These commands build `protos/descriptors.pb` from the `.proto` files:

    cd deploy/serving/grpc_api/protos
    python -m grpc_tools.protoc -I. --include_imports --descriptor_set_out=descriptors.pb *.proto
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from google.protobuf import message_factory
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

PROTOS = Path(__file__).with_name("protos")


def _pool() -> DescriptorPool:
    """Returns the pool of all messages and services, including health and reflection, so that reflection lists all."""
    pool = DescriptorPool()
    for file in FileDescriptorSet.FromString((PROTOS / "descriptors.pb").read_bytes()).file:
        pool.AddSerializedFile(file.SerializeToString())
    for descriptor in (health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR):
        pool.AddSerializedFile(descriptor.serialized_pb)
    return pool


POOL = _pool()


def message(name: str) -> Any:
    """Returns the class of a message in this module's pool.

    Args:
        name: The full name, with the package.

    >>> message("tensorflow.serving.ModelSpec")(name="profile").name
    'profile'
    """
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(name))
