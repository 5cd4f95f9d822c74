"""A plain WSGI app that a login at the service opens: all it knows of it is its keys.

Run it: ISSUER=http://localhost:5000 python examples/bare_guarded.py
"""

import json
import os
from typing import Any

from werkzeug.serving import run_simple

import service

ISSUER = os.environ.get("ISSUER", "http://localhost:5000")
# One of those that the service names in its SERVICE_AUDIENCE.
AUDIENCE = os.environ.get("AUDIENCE", "http://localhost:8000")


def hello(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "application/json")])
    if environ["PATH_INFO"] == "/health":
        body = {"status": "ok", "user": environ.get("REMOTE_USER")}
    else:
        session = environ["service.claims"]["sid"]
        body = {"user": environ["REMOTE_USER"], "session": session}
    return [json.dumps(body).encode()]


app = service.guard(
    hello,
    issuer=ISSUER,
    audience=AUDIENCE,
    jwks_url=f"{ISSUER}/.well-known/jwks.json",
    open_paths=["/health"],
)

if __name__ == "__main__":
    run_simple("127.0.0.1", int(os.environ.get("PORT", "8000")), app, threaded=True)
