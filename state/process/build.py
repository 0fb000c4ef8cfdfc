"""The versions of the running software: the release, Python, and the packages that answers depend on."""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata

PACKAGES = {"version": "springtide", "tensorflow": "tensorflow", "beam": "apache-beam", "kafka": "kafka-python"}
"""Label of `springtide_build_info` -> package; none of them is imported to find its version."""


@cache
def build() -> dict[str, str]:
    """The labels of the build info and their values.

    >>> sorted(build())
    ['beam', 'kafka', 'python', 'tensorflow', 'version']
    """
    return {"python": platform.python_version(), **{label: _version(name) for label, name in PACKAGES.items()}}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
