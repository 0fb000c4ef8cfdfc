"""Hands the counting job in: `python -m tests.e2e.flink.submit DIRECTORY RATE BEGUN_S BEAM_OPTION...`; ends when the job does."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from tests.e2e.flink import counting


def main(argv: Sequence[str] | None = None) -> int:
    directory, rate, begun_s, *options = sys.argv[1:] if argv is None else argv
    pipeline = beam.Pipeline(options=PipelineOptions(options))
    counting.pipeline(pipeline, directory, float(rate), float(begun_s))
    result = pipeline.run()
    print("handed in", flush=True)
    print(result.wait_until_finish(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
