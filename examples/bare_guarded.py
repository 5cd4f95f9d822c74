"""A plain WSGI app on a port of its own that a login at the service opens; public keys are all it knows of it.
Run it: `ISSUER=http://localhost:5000 python examples/bare_guarded.py` (README: One login, many services).
"""

import json
import os
from typing import Any

from werkzeug.serving import run_simple

import service

ISSUER = os.environ.get("ISSUER", "http://localhost:5000")
AUDIENCE = os.environ.get("AUDIENCE", "http://localhost:8000")  # one of the issuer's SERVICE_AUDIENCE


def hello(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    start_response("200 OK", [("Content-Type", "application/json")])
    if environ["PATH_INFO"] == "/health":
        return [json.dumps({"status": "ok", "user": environ.get("REMOTE_USER")}).encode()]
    return [json.dumps({"user": environ["REMOTE_USER"], "session": environ["service.claims"]["sid"]}).encode()]


app = service.guard(
    hello, issuer=ISSUER, audience=AUDIENCE, jwks_url=f"{ISSUER}/.well-known/jwks.json", open_paths=["/health"]
)

if __name__ == "__main__":
    run_simple("127.0.0.1", int(os.environ.get("PORT", "8000")), app, threaded=True)
