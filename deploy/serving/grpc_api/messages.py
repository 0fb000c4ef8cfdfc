"""The messages of the gRPC answers: those of `protos/*.proto`, in a descriptor pool of their own.

TensorFlow's messages are of the same names in protobuf's default pool, and one
pool cannot have both. `protos/descriptors.pb` is made of the `.proto` files by

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
    """The messages and services that are offered, those of others included: reflection tells of all."""
    pool = DescriptorPool()
    for file in FileDescriptorSet.FromString((PROTOS / "descriptors.pb").read_bytes()).file:
        pool.AddSerializedFile(file.SerializeToString())
    for descriptor in (health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR):
        pool.AddSerializedFile(descriptor.serialized_pb)
    return pool


POOL = _pool()


def message(name: str) -> Any:
    """The class of a message of our pool.

    Args:
        name: With its package.

    >>> message("tensorflow.serving.ModelSpec")(name="profile").name
    'profile'
    """
    return message_factory.GetMessageClass(POOL.FindMessageTypeByName(name))
