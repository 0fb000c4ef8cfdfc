"""The page's own files, read once; nothing of it comes from elsewhere.

GET / and each file of `static`
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from deploy.serving.edge.tokens import OPEN
from deploy.serving.http_api.endpoints import METHODS, Endpoint, Request, Response, header

STATIC = Path(__file__).with_name("static")
KINDS = {
    ".html": b"text/html; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
}


def endpoints(folder: Path = STATIC) -> list[Endpoint]:
    """One for each file; `index.html` is the page itself.

    >>> [one.path for one in endpoints()][0]
    '/'
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix in KINDS)
    files.sort(key=lambda path: path.name != "index.html")
    return [
        _endpoint("/" if path.name == "index.html" else f"/{path.relative_to(folder).as_posix()}", path)
        for path in files
    ]


def _endpoint(name: str, path: Path) -> Endpoint:
    content = path.read_bytes()
    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    # Asked for each time, and sent only where it is another one than before.
    headers = [(b"content-type", KINDS[path.suffix]), (b"etag", tag.encode()), (b"cache-control", b"no-cache")]

    async def answer(request: Request) -> Response:
        if header(request.scope, b"if-none-match") == tag:
            return Response(304, b"", headers)
        return Response(200, b"" if request.scope["method"] == "HEAD" else content, headers)

    return Endpoint("page", METHODS, name, answer, role=OPEN)
