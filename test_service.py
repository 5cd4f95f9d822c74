"""The specification of service.py, to be read beside it: the same rooms in the same order.

Everything here runs in this process, over the memory store, and needs pytest alone. A request
goes through wsgiref's validator to an app that is mounted under /api; the time is a clock that
the test steps. What needs a server, a database, a browser or other people's clients is in tests/.
"""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple
from urllib.parse import unquote_to_bytes, urlencode
from wsgiref.validate import validator

import pytest
from werkzeug.datastructures import Headers
from werkzeug.security import generate_password_hash
from werkzeug.test import encode_multipart, run_wsgi_app

import service

# ---- Harness ------------------------------------------------------------------------
# A World is one app and its clock; it is called like the network calls it, by nobody in
# particular. A User is somebody who has logged in there, and is called the same way.

MOUNT = "/api"
ISSUER = "https://todo.example"
SECRET = "0123456789abcdef0123456789abcdef"
PASSWORD = "correct horse battery"
CHEAP_HASH = generate_password_hash(PASSWORD, "pbkdf2:sha256:1")  # scrypt takes 0.1 s

JSON = "application/json"
FORM = "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data"


class Clock:
    """The time in seconds, which only a test moves."""

    def __init__(self, now: float = 1_800_000_000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def step(self, seconds: float) -> None:
        self.now += seconds


class Answer(NamedTuple):
    """What came back."""

    status: int
    headers: Headers
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def text(self) -> str:
        return self.body.decode()


class World:
    """An app, mounted under /api, and the clock that it goes by.

    resources, routes and title are create_app's; any other option is a setting.
    """

    def __init__(self, *, store: Any = None, clock: Clock | None = None, **options: Any) -> None:
        names = options.keys() & {"resources", "routes", "title"}
        parts = {name: options.pop(name) for name in names}
        given = {"secret_key": SECRET, "issuer": ISSUER} | options
        self.clock = clock or Clock()
        self.settings = service.Settings(**given)
        self.store = service.MemoryStore() if store is None else store
        self.app = service.create_app(self.settings, store=self.store, clock=self.clock, **parts)

    def __call__(
        self,
        request: str,
        body: Any = None,
        *,
        form: Any = None,
        content_type: str | None = None,
        address: str = "127.0.0.1",
        environ: dict[str, Any] | None = None,
        **headers: str,
    ) -> Answer:
        """Send a request such as "GET /todos?limit=2"; if_match="…" becomes If-Match.

        A body of bytes is sent as it is, any other as JSON; form is a dict or a list of
        pairs. environ replaces what is in the WSGI environment, None takes it out.
        """
        method, _, url = request.partition(" ")
        path, _, query = url.partition("?")
        if form is not None and content_type == MULTIPART:
            boundary, body = encode_multipart(form)
            content_type = f"{MULTIPART}; boundary={boundary}"
        elif form is not None:
            body = urlencode(form, doseq=True).encode()
            content_type = content_type or FORM
        elif body is not None and not isinstance(body, bytes):
            body = json.dumps(body).encode()
            content_type = content_type or JSON
        given = {
            "REQUEST_METHOD": method,
            "SCRIPT_NAME": MOUNT,
            "PATH_INFO": unquote_to_bytes(path).decode("latin-1"),
            "QUERY_STRING": query,
            "SERVER_NAME": "localhost",
            "SERVER_PORT": "80",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "REMOTE_ADDR": address,
            "CONTENT_TYPE": content_type,
            "CONTENT_LENGTH": None if body is None else str(len(body)),
            "HTTP_HOST": "localhost",
            "wsgi.version": (1, 0),
            "wsgi.url_scheme": "http",
            "wsgi.input": io.BytesIO(body or b""),
            "wsgi.errors": io.StringIO(),
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }
        for name, value in headers.items():
            given[f"HTTP_{name.upper()}"] = value
        given |= environ or {}
        present = {name: value for name, value in given.items() if value is not None}
        parts, status, answered = run_wsgi_app(validator(self.app), present, buffered=True)
        return Answer(int(status.split()[0]), answered, b"".join(parts))

    def user(self, name: str = "alice", roles: Iterable[str] = ()) -> User:
        """A new account with PASSWORD, logged in."""
        service.add_account(self.app, name, CHEAP_HASH, roles=roles)
        return self.log_in(name)

    def log_in(self, name: str = "alice", password: str = PASSWORD) -> User:
        """A new session of somebody who has an account."""
        form = {"grant_type": "password", "username": name, "password": password}
        answer = self("POST /token", form=form)
        assert answer.status == 200, answer.text
        return User(self, name, answer.json)

    def refresh(self, token: str) -> Answer:
        form = {"grant_type": "refresh_token", "refresh_token": token}
        return self("POST /token", form=form)


class User:
    """Somebody with a token pair: one session of one account."""

    def __init__(self, world: World, name: str, pair: dict[str, Any]) -> None:
        self.world, self.name, self.pair = world, name, pair

    def __call__(self, request: str, body: Any = None, **options: Any) -> Answer:
        """Send a request with the access token, as World does without one."""
        bearer = f"Bearer {self.access_token}"
        return self.world(request, body, **{"authorization": bearer} | options)

    @property
    def access_token(self) -> str:
        return str(self.pair["access_token"])

    @property
    def refresh_token(self) -> str:
        return str(self.pair["refresh_token"])

    @property
    def is_in(self) -> bool:
        """Does the access token still open the service?"""
        answer = self("GET /users/me")
        assert answer.status in (200, 401), answer.text
        return answer.status == 200

    def refresh(self) -> User:
        """The same session, one generation on; this User keeps the superseded pair."""
        answer = self.world.refresh(self.refresh_token)
        assert answer.status == 200, answer.text
        return User(self.world, self.name, answer.json)


def together(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What work(0) to work(count - 1) return, when they all run at the same time."""
    results: list[Any] = [None] * count
    errors: list[BaseException] = []
    start = threading.Barrier(count)

    def run(number: int) -> None:
        start.wait()
        try:
            results[number] = work(number)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(each,)) for each in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for error in errors:
        raise error
    return results


@pytest.fixture
def world() -> World:
    return World()


@pytest.fixture
def alice(world: World) -> User:
    return world.user("alice")


def test_a_user_acts_in_one_line(alice: User) -> None:
    assert alice("PUT /todos/x", {"task": "y"}).status == 201
    assert alice("GET /todos/x").json == {"task": "y"}
