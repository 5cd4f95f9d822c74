"""A FastAPI app on a port of its own that a login at the service opens: ASGI within a WSGI server, by a2wsgi.
Run it: `ISSUER=http://localhost:5000 python examples/fastapi_guarded.py` (README: One login, many services).
"""

import os
from typing import Any

from a2wsgi import ASGIMiddleware
from fastapi import FastAPI, Request
from werkzeug.serving import run_simple

import service

ISSUER = os.environ.get("ISSUER", "http://localhost:5000")
AUDIENCE = os.environ.get("AUDIENCE", "http://localhost:8000")  # one of the issuer's SERVICE_AUDIENCE

api = FastAPI()


@api.get("/")
async def who(request: Request) -> dict[str, Any]:
    environ = request.scope["wsgi_environ"]
    return {"user": environ["REMOTE_USER"], "session": environ["service.claims"]["sid"]}


@api.get("/health")
async def health(request: Request) -> dict[str, Any]:
    return {"status": "ok", "user": request.scope["wsgi_environ"].get("REMOTE_USER")}


app = service.guard(
    ASGIMiddleware(api), issuer=ISSUER, audience=AUDIENCE, jwks_url=f"{ISSUER}/.well-known/jwks.json",
    open_paths=["/health"],
)  # fmt: skip

if __name__ == "__main__":
    run_simple("127.0.0.1", int(os.environ.get("PORT", "8000")), app, threaded=True)
