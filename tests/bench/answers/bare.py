"""The least that an answer costs: an ASGI application on uvicorn's own server that sends one canned answer.

python -m tests.bench.answers.bare PORT
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tests.bench.answers.stores import until_answers

BODY = b'{"user_id":"user-1","interests":[' + b",".join([b'{"label":"category-1","probability":0.1}'] * 20) + b"]}"


async def answer(scope: Any, receive: Any, send: Any) -> None:
    """Answers anything."""
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(BODY))]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": BODY})


@contextmanager
def bare(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Its process, once it answers.

    Raises:
        AssertionError: It ended, or did not answer in time.
    """
    process = subprocess.Popen([sys.executable, "-m", "tests.bench.answers.bare", str(port)])
    try:
        until_answers(f"http://127.0.0.1:{port}/", process)
        yield process
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    import uvicorn

    options: dict[str, Any] = {"loop": "uvloop", "http": "httptools", "lifespan": "off", "access_log": False}
    uvicorn.run(answer, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning", **options)
