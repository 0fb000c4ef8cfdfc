"""Sends one HTTP request; returns the response, or the reason why there is none."""

from __future__ import annotations

import ssl
import urllib.error
import urllib.request
from http.client import HTTPException


def ask(
    request: str | urllib.request.Request, timeout_s: float, context: ssl.SSLContext | None = None
) -> tuple[int, str]:
    """Status and body of a GET, or of the given request; status 0 and the reason if there is no response in time."""
    try:
        with urllib.request.urlopen(request, timeout=timeout_s, context=context) as answer:
            return int(answer.status), answer.read().decode()
    except urllib.error.HTTPError as refused:
        return refused.code, refused.read().decode("utf-8", "replace")
    # HTTPException: the process died while it sent the response.
    except (OSError, ValueError, HTTPException) as problem:
        return 0, str(getattr(problem, "reason", problem))
