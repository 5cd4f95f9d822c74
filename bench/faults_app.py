"""The service as bench/faults.py serves it, under the project's gunicorn.conf.py.

Its users' passwords are quickly checked, and a file moves its clock.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from werkzeug.exceptions import HTTPException
from werkzeug.security import generate_password_hash

import service

PASSWORD = "correct horse battery"
QUICK_HASH = generate_password_hash(PASSWORD, "pbkdf2:sha256:1", 1)


def now() -> float:
    """The time, and as many seconds more as a file says."""
    file = os.environ.get("FAULTS_CLOCK")
    return time.time() + (float(Path(file).read_text() or 0) if file else 0)


def create_app() -> Any:
    """The service, with the users that FAULTS_USERS names."""
    app = service.create_app(clock=now)
    for name in os.environ.get("FAULTS_USERS", "").split():
        with suppress(HTTPException):  # another worker was first, or the store is away
            service.add_account(app, name, QUICK_HASH)
    return app
