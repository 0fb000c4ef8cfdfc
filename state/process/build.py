"""Which software runs: the release, Python, and the packages that answers depend on."""

from __future__ import annotations

import platform
from functools import cache
from importlib import metadata

PACKAGES = {"version": "springtide", "tensorflow": "tensorflow", "beam": "apache-beam", "kafka": "kafka-python"}
"""By label of `springtide_build_info`; none of them is imported for it."""


@cache
def build() -> dict[str, str]:
    """The labels and their values.

    >>> sorted(build())
    ['beam', 'kafka', 'python', 'tensorflow', 'version']
    """
    return {"python": platform.python_version(), **{label: _version(name) for label, name in PACKAGES.items()}}


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""
