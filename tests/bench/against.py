"""Compares benches of this working tree with those of another revision, in alternating runs.

    python -m tests.bench.against REVISION [BENCH ...] [--rounds N] [-- ARGUMENT ...]

The other revision is checked out in a temporary git worktree and runs with this
Python. The runs alternate, so that both revisions share slow and fast moments
of the machine: other, this, other, this. What follows `--` is passed to every
bench. The output has the median of each figure for both revisions, their ratio
(this / other) and the calibration of `tests.bench.report`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.bench.report import FOLDER, calibration_s

BENCHES = ("step", "stream", "windows", "serving")
ROOT = Path(__file__).parents[2]


@contextlib.contextmanager
def worktree(revision: str) -> Iterator[Path]:
    """A temporary git worktree of `revision`; it is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="springtide-against-") as parent:
        folder = Path(parent, "tree")
        subprocess.run(
            ["git", "-C", ROOT, "worktree", "add", "--quiet", "--detach", folder, revision],
            check=True,
        )
        try:
            yield folder
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", folder], check=True)


def run(folder: Path, bench: str, arguments: Sequence[str]) -> dict[str, tuple[float, str]]:
    """Runs one bench in `folder`; returns value and unit of each figure by label.

    Raises:
        SystemExit: The bench failed or wrote no report.
    """
    path = folder / FOLDER / f"{bench}.json"
    path.unlink(missing_ok=True)
    process = subprocess.Popen(
        [sys.executable, "-m", f"tests.bench.{bench}", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )
    try:
        output, _ = process.communicate()
    except BaseException:
        # An interrupt lets the bench stop the processes that it started.
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
        raise
    if process.returncode or not path.exists():
        print(output[-4000:], file=sys.stderr)
        raise SystemExit(
            f"bench {bench} in {folder} ended with code {process.returncode}{'' if path.exists() else ' and no report'}"
        )
    figures = json.loads(path.read_text())["figures"]
    return {label: (figure["value"], figure["unit"]) for label, figure in figures.items()}


def table(other: Sequence[dict[str, tuple[float, str]]], this: Sequence[dict[str, tuple[float, str]]]) -> list[str]:
    """Lines with the medians of each figure and their ratio; a figure of one revision alone has no ratio.

    >>> print(*table([{"rate": (2.0, "rows/s")}], [{"rate": (3.0, "rows/s")}]), sep="\\n")
    rate                                                          2.000          3.000  1.500 rows/s
    """
    lines = []
    for label in dict.fromkeys(label for figures in (*other, *this) for label in figures):
        found = [[figures[label] for figures in runs if label in figures] for runs in (other, this)]
        medians = [statistics.median(value for value, _ in runs) if runs else None for runs in found]
        shown = ["-" if median is None else f"{median:,.3f}" for median in medians]
        before, after = medians
        ratio = f"{after / before:.3f}" if before and after is not None else "-"
        unit = (found[0] or found[1])[0][1]
        lines.append(f"{label:<52} {shown[0]:>14} {shown[1]:>14} {ratio:>6} {unit}")
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the comparison."""
    words = list(sys.argv[1:] if argv is None else argv)
    split = words.index("--") if "--" in words else len(words)
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("revision", help="a git revision, such as 21e0a5d")
    flags.add_argument("benches", nargs="*", metavar="BENCH", help=f"default: {' '.join(BENCHES)}")
    flags.add_argument("--rounds", type=int, default=3, help="runs of each bench in each revision")
    wanted = flags.parse_args(words[:split])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with worktree(wanted.revision) as folder:
        for bench in wanted.benches or BENCHES:
            other: list[dict[str, tuple[float, str]]] = []
            this: list[dict[str, tuple[float, str]]] = []
            loops_s: list[float] = []
            for number in range(1, wanted.rounds + 1):
                for name, where, runs in ((wanted.revision, folder, other), ("this", ROOT, this)):
                    loops_s.append(calibration_s())
                    print(f"{bench}, round {number} of {wanted.rounds}: {name}", file=sys.stderr, flush=True)
                    runs.append(run(where, bench, words[split + 1 :]))
            print(
                f"\n{bench}, medians of {wanted.rounds} alternating rounds; "
                f"5 million additions in {statistics.median(loops_s):.3f} s "
                f"({min(loops_s):.3f} to {max(loops_s):.3f})"
            )
            print(f"{'':<52} {wanted.revision[:14]:>14} {'this':>14} {'ratio':>6}")
            print(*table(other, this), sep="\n")


if __name__ == "__main__":
    main()
