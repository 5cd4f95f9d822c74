"""A limit: a WSGI app that answers every request with the same bytes, and does nothing
else."""

from collections.abc import Iterable
from typing import Any

BODY = b'{"task": "profit!"}\n'
HEADERS = [("Content-Type", "application/json"), ("Content-Length", str(len(BODY)))]


def create_app() -> Any:
    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        start_response("200 OK", HEADERS)
        return [BODY]

    return app
