"""Merges jars into one: the first of several files of a name counts, lists of services are joined, signatures left out."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path

SERVICES = "META-INF/services/"
MANIFEST = "META-INF/MANIFEST.MF"
# One that is not of the merged jar would be refused.
SIGNATURES = (".SF", ".DSA", ".RSA", ".EC")
# Native libraries that Linux does not load, and those of processors that few have.
FOREIGN = re.compile(r"\.(dll|jnilib|dylib)$|(ppc64|s390|riscv|loongarch|linux32).*\.so$")


def merge(jars: Sequence[Path], target: Path) -> None:
    """Writes the merged jar.

    Args:
        jars: In the order of a class path.
        target: What is written.

    Raises:
        OSError: A jar cannot be read, or the disk takes no more.
    """
    services: dict[str, dict[str, None]] = {}
    seen = {MANIFEST}
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as merged:
        # Newer Javas find their own classes of a library in it.
        merged.writestr(MANIFEST, "Manifest-Version: 1.0\nMulti-Release: true\n")
        for path in jars:
            with zipfile.ZipFile(path) as jar:
                for entry in jar.infolist():
                    name = entry.filename
                    if name.startswith(SERVICES) and not entry.is_dir():
                        services.setdefault(name, {}).update(dict.fromkeys(providers(jar.read(entry).decode())))
                    elif name not in seen and is_kept(name):
                        seen.add(name)
                        merged.writestr(name, jar.read(entry), compress_type=zipfile.ZIP_DEFLATED)
        for name, found in services.items():
            merged.writestr(name, "".join(f"{one}\n" for one in found))


def is_kept(name: str) -> bool:
    """Whether a file of a jar means something in a merged one.

    >>> [is_kept(one) for one in ("org/a/B.class", "org/a/", "META-INF/A.RSA", "module-info.class", "META-INF/LICENSE", "a-win64.dll")]
    [True, False, False, False, True, False]
    """
    if name.endswith("/") or name.rpartition("/")[2] == "module-info.class":
        return False
    return not (name.startswith("META-INF/") and name.endswith(SIGNATURES)) and not FOREIGN.search(name)


def providers(text: str) -> list[str]:
    r"""The classes that a list of services names.

    >>> providers("# those of this jar\na.B # the first\n\na.C\n")
    ['a.B', 'a.C']
    """
    words = (line.partition("#")[0].strip() for line in text.splitlines())
    return [word for word in words if word]
