"""What is kept in the repository names no machine it was written on and no host it was installed from."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]
# Written in parts, so that this file does not name them itself.
PLACES = [r"(?<![\w.])/" + folder + r"(?:/|\b)" for folder in ("work", "root", "home")]
HOSTS = [re.escape(host) for host in ("pypi" + ".org", "files.python" + "hosted", "index" + "-url", "artifact" + "ory")]
FORBIDDEN = re.compile("|".join([*PLACES, *HOSTS]))


def kept_files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return sorted(ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file())


def test_no_file_names_a_machine() -> None:
    texts = {path.relative_to(ROOT).as_posix(): path.read_bytes().decode("utf-8", "replace") for path in kept_files()}
    assert {file: found[0] for file, text in texts.items() if (found := FORBIDDEN.search(text))} == {}
