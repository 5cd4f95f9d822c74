"""A Flask app that a login at the service opens: all it knows of it is its keys.

Run it: ISSUER=http://localhost:5000 python examples/flask_guarded.py
"""

import os

from flask import Flask, request
from werkzeug.serving import run_simple

import service

ISSUER = os.environ.get("ISSUER", "http://localhost:5000")
# One of those that the service names in its SERVICE_AUDIENCE.
AUDIENCE = os.environ.get("AUDIENCE", "http://localhost:8000")

app = Flask(__name__)


@app.get("/")
def who() -> dict[str, str]:
    return {
        "user": request.environ["REMOTE_USER"],
        "session": request.environ["service.claims"]["sid"],
    }


@app.get("/health")
def health() -> dict[str, str | None]:
    return {"status": "ok", "user": request.remote_user}


app.wsgi_app = service.guard(  # type: ignore[method-assign]
    app.wsgi_app,
    issuer=ISSUER,
    audience=AUDIENCE,
    jwks_url=f"{ISSUER}/.well-known/jwks.json",
    open_paths=["/health"],
)

if __name__ == "__main__":
    run_simple("127.0.0.1", int(os.environ.get("PORT", "8000")), app, threaded=True)
