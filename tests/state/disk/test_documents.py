"""Documents are decoded by any number of threads of a process."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from state.disk import documents

ROOT = Path(documents.__file__).parents[2]

# The types are new to each of eight processes, and threads are switched as often as possible.
FIRST_USE = """
import os, sys, threading
from contextlib import suppress
from {module} import {kind}
{imports}
sys.setswitchinterval(1e-6)
barrier = threading.Barrier(8)
def first_use():
    barrier.wait()
    with suppress(msgspec.MsgspecError):
        {decode}
for _ in range(8):
    if os.fork() == 0:
        threads = [threading.Thread(target=first_use) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        os._exit(0)
sys.exit(any(os.wait()[1] for _ in range(8)))
"""
CONTROL = {"generation": 1, "mask": {}, "log": [], "serving": {}}


@pytest.mark.parametrize(
    ("module", "kind", "imports", "decode"),
    [
        ("state.registry.control", "Control", "import msgspec\nfrom state.disk import documents", "documents.convert({values}, Control)"),
        ("state.registry.manifest", "Manifest", "import msgspec\nfrom state.disk import documents", 'documents.decode(b"{{}}", Manifest)'),
        ("springtide_client.answers", "Profiles", "import msgspec", 'msgspec.json.decode(b"{{}}", type=Profiles)'),
    ],
)  # fmt: skip
def test_threads_may_use_a_type_for_the_first_time_at_once(module: str, kind: str, imports: str, decode: str) -> None:
    decode = decode.format(values=CONTROL)
    program = FIRST_USE.format(module=module, kind=kind, imports=imports, decode=decode)
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0


def test_the_product_has_no_other_way_to_decode_a_type() -> None:
    packages = ("state", "streaming", "trainer", "deploy", "evaluation")
    others = [
        str(path.relative_to(ROOT))
        for package in packages
        for path in (ROOT / package).rglob("*.py")
        if path != Path(documents.__file__)
        and re.search(r"msgspec\.convert\(|msgspec\.json\.decode\([^\n]*type=", path.read_text())
    ]
    assert others == []
