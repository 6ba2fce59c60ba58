"""The routes of a page that a server serves with its model."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import FastAPI, Request, Response
from fastapi.responses import FileResponse

from cipherlm.serving.page import INDEX_NAME, Page, compressed_file, media_type

_HASHED = "assets/"
"""Files whose names change with what is in them."""
_FOR_GOOD = "public, max-age=31536000, immutable"
_ASK_AGAIN = "no-cache"


def add_page(app: FastAPI, page: Page) -> None:
    """Add a route for each of a page's files, and one for the page itself."""
    for name, content in page.files.items():
        app.get(f"/{name}")(_route(page, name, content))
    app.get("/")(_route(page, INDEX_NAME, page.files[INDEX_NAME]))


def _route(page: Page, name: str, content: bytes | Path) -> Callable[[Request], Awaitable[Response]]:
    caching = _FOR_GOOD if name.startswith(_HASHED) else _ASK_AGAIN
    headers = {**page.headers, "Cache-Control": caching, "Vary": "Accept-Encoding"}
    kind = media_type(name)
    compressed = None if isinstance(content, bytes) else compressed_file(content)

    async def route(request: Request) -> Response:
        if isinstance(content, bytes):
            return Response(content, media_type=kind, headers=headers)
        if compressed is not None and "gzip" in request.headers.get("accept-encoding", ""):
            return FileResponse(compressed, media_type=kind, headers={**headers, "Content-Encoding": "gzip"})
        return FileResponse(content, media_type=kind, headers=headers)

    return route
