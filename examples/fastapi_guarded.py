"""A FastAPI app that a login at the service opens: a2wsgi makes a WSGI app of it.

Run it: ISSUER=http://localhost:5000 python examples/fastapi_guarded.py
"""

import os
from typing import Any

from a2wsgi import ASGIMiddleware
from fastapi import FastAPI, Request
from werkzeug.serving import run_simple

import service

ISSUER = os.environ.get("ISSUER", "http://localhost:5000")
# One of those that the service names in its SERVICE_AUDIENCE.
AUDIENCE = os.environ.get("AUDIENCE", "http://localhost:8000")

api = FastAPI()


@api.get("/")
async def who(request: Request) -> dict[str, Any]:
    environ = request.scope["wsgi_environ"]
    return {"user": environ["REMOTE_USER"], "session": environ["service.claims"]["sid"]}


@api.get("/health")
async def health(request: Request) -> dict[str, Any]:
    return {"status": "ok", "user": request.scope["wsgi_environ"].get("REMOTE_USER")}


app = service.guard(
    ASGIMiddleware(api),
    issuer=ISSUER,
    audience=AUDIENCE,
    jwks_url=f"{ISSUER}/.well-known/jwks.json",
    open_paths=["/health"],
)

if __name__ == "__main__":
    run_simple("127.0.0.1", int(os.environ.get("PORT", "8000")), app, threaded=True)
