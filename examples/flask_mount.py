"""The service under /api of a Flask app: its pages and the API share one address.

Run it: python examples/flask_mount.py
Then: curl localhost:8000/api/health
"""

import os

from flask import Flask
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.serving import run_simple

import service

app = Flask(__name__)


@app.get("/")
def home() -> str:
    return "A page of Flask's; the to-dos are under /api.\n"


app.wsgi_app = DispatcherMiddleware(app.wsgi_app, {"/api": service.create_app()})  # type: ignore[method-assign]

if __name__ == "__main__":
    run_simple("127.0.0.1", int(os.environ.get("PORT", "8000")), app, threaded=True)
