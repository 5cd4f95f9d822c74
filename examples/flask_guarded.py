"""A Flask app on a port of its own that a login at the service opens; public keys are all it knows of it.
Run it: `ISSUER=http://localhost:5000 python examples/flask_guarded.py` (README: One login, many services).
"""

import os

from flask import Flask, request
from werkzeug.serving import run_simple

import service

ISSUER = os.environ.get("ISSUER", "http://localhost:5000")
AUDIENCE = os.environ.get("AUDIENCE", "http://localhost:8000")  # one of the issuer's SERVICE_AUDIENCE

app = Flask(__name__)


@app.get("/")
def who() -> dict[str, str]:
    return {"user": request.environ["REMOTE_USER"], "session": request.environ["service.claims"]["sid"]}


@app.get("/health")
def health() -> dict[str, str | None]:
    return {"status": "ok", "user": request.remote_user}


app.wsgi_app = service.guard(  # type: ignore[method-assign]
    app.wsgi_app, issuer=ISSUER, audience=AUDIENCE, jwks_url=f"{ISSUER}/.well-known/jwks.json", open_paths=["/health"]
)

if __name__ == "__main__":
    run_simple("127.0.0.1", int(os.environ.get("PORT", "8000")), app, threaded=True)
