"""The specification of service.py, to be read beside it: the same rooms, in order.

All of it runs in this process, over the memory store, and needs pytest alone; tests/
has the rest. A request goes through wsgiref's validator to an app mounted under /api.
"""

from __future__ import annotations

import base64
import copy
import datetime
import gc
import gzip
import hashlib
import hmac
import io
import itertools
import json
import logging
import re
import runpy
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import FrozenInstanceError, dataclass, fields
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import Any, NamedTuple
from urllib.parse import quote, unquote_to_bytes, urlencode
from uuid import UUID
from wsgiref.validate import validator

import pytest
import werkzeug
from werkzeug import Response
from werkzeug.datastructures import FileStorage, Headers
from werkzeug.exceptions import BadRequest, Conflict, HTTPException, abort
from werkzeug.security import generate_password_hash
from werkzeug.test import EnvironBuilder, create_environ, encode_multipart, run_wsgi_app

import service

# ---- Harness -----------------------------------------------------------------------
# A World is one app and its clock; a User has logged in there. Both are called alike.

MOUNT = "/api"
ISSUER = "https://todo.example"
SECRET = "0123456789abcdef0123456789abcdef"
PASSWORD = "correct horse battery"
CHEAP_HASH = generate_password_hash(PASSWORD, "pbkdf2:sha256:1")  # scrypt takes 0.1 s
LOGIN = {"grant_type": "password", "username": "alice", "password": PASSWORD}

JSON = "application/json"
FORM = "application/x-www-form-urlencoded"
MULTIPART = "multipart/form-data"
MERGE_PATCH = "application/merge-patch+json"


@dataclass
class Clock:
    """The time in seconds, which only a test moves."""

    now: float = 1_800_000_000.0

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

    def __init__(self, store: Any = None, clock: Any = None, **options: Any) -> None:
        names = options.keys() & {"resources", "routes", "title"}
        parts = {name: options.pop(name) for name in names}
        given = {"secret_key": SECRET, "issuer": ISSUER} | options
        self.settings, self.clock = service.Settings(**given), clock or Clock()
        self.store = service.MemoryStore() if store is None else store
        parts |= {"store": self.store, "clock": self.clock}
        self.app = service.create_app(self.settings, **parts)

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
            body, content_type = urlencode(form, doseq=True).encode(), FORM
        elif body is not None and not isinstance(body, bytes):
            body, content_type = json.dumps(body).encode(), JSON
        given = create_environ(base_url=f"http://localhost{MOUNT}/") | {
            "REQUEST_METHOD": method,
            "PATH_INFO": unquote_to_bytes(path).decode("latin-1"),
            "QUERY_STRING": query,
            "REMOTE_ADDR": address,
            "CONTENT_TYPE": content_type,
            "CONTENT_LENGTH": None if body is None else str(len(body)),
            "wsgi.input": io.BytesIO(body or b""),
        }
        given |= {f"HTTP_{name.upper()}": value for name, value in headers.items()}
        given |= environ or {}
        present = {name: value for name, value in given.items() if value is not None}
        parts, status, back = run_wsgi_app(validator(self.app), present, buffered=True)
        return Answer(int(status.split()[0]), back, b"".join(parts))

    def user(self, name: str = "alice", roles: Iterable[str] = ()) -> User:
        """A new account with PASSWORD, logged in."""
        service.add_account(self.app, name, CHEAP_HASH, roles=roles)
        return self.log_in(name)

    def log_in(self, name: str = "alice", password: str = PASSWORD) -> User:
        """A new session of somebody who has an account."""
        login = LOGIN | {"username": name, "password": password}
        answer = self("POST /token", form=login)
        assert answer.status == 200, answer.text
        return User(self, name, answer.json)

    def refresh(self, token: str) -> Answer:
        grant = {"grant_type": "refresh_token", "refresh_token": token}
        return self("POST /token", form=grant)

    def owned(self, name: str) -> dict[str, Any]:
        """All that the store keeps for somebody, without what is empty."""
        with self.store.read(name) as data:
            kept = {part: dict(data[part]) for part in data if data[part]}
        return copy.deepcopy(kept)


class User:
    """Somebody with a token pair: one session of one account."""

    def __init__(self, world: World, name: str, pair: dict[str, Any]) -> None:
        self.world, self.name, self.pair = world, name, pair
        self.access_token = str(pair["access_token"])
        self.refresh_token = str(pair["refresh_token"])

    def __call__(self, request: str, body: Any = None, **options: Any) -> Answer:
        """Send a request with the access token, as World does without one."""
        bearer = f"Bearer {self.access_token}"
        return self.world(request, body, **{"authorization": bearer} | options)

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


def cases(names: str, rows: dict[str, Any]) -> pytest.MarkDecorator:
    """A table of named rows: one test for each."""
    return pytest.mark.parametrize(names, rows.values(), ids=rows)


def each(name: str, values: Iterable[Any]) -> pytest.MarkDecorator:
    """One test for each value; of a text, for each of its words."""
    values = values.split() if isinstance(values, str) else list(values)
    return pytest.mark.parametrize(name, values)


def together(count: int, work: Callable[[int], Any]) -> list[Any]:
    """What work(0) to work(count - 1) return, when they all run at the same time."""
    start = threading.Barrier(count)

    def run(number: int) -> Any:
        start.wait()
        return work(number)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


@pytest.fixture
def world():
    return World()


@pytest.fixture
def alice(world):
    return world.user()


# ---- Settings ----------------------------------------------------------------------
# One frozen value, read from SERVICE_…; a bad variable is a line with a better value.

DEFAULTS = {
    "secret_key": "",
    "store_url": "memory:",
    "access_ttl": 900,
    "refresh_ttl": 86_400,
    "refresh_grace": 30,
    "signup": "open",
    "issuer": "http://localhost:5000",
    "audience": "",
    "signing_key_file": "",
    "cors_origins": "",
    "max_body": 65_536,
    "max_items": 10_000,
    "proxies": 0,
}
REFUSED_SETTINGS: dict[str, list[str]] = {
    "access_ttl": [
        "soon",
        "9\n00",
        "0",
        "-1",
        "1.5",
        "1_000",
        "٩٠٠",
        "9" * 5_000,
        "9" * 9,
    ],
    "refresh_ttl": ["1 day", "0", "9" * 9],
    "refresh_grace": ["10s", "-1", "1000"],
    "max_body": ["64k", "0", "99"],
    "max_items": ["many", "0", "9" * 9],
    "proxies": ["yes", "-1", "10"],
    "signup": ["Open", "no"],
    "issuer": ["a.example", "ftp://a", "https:///a", "https://a?b", "https://a b"],
    "audience": ['a"b', " , ", "a\tb"],
    "signing_key_file": [" ", ",", "a\udcff"],
    "cors_origins": ["app.example", "https://*.a", "https://a/b", "https://a, b", ","]
    + ["http://a:99999", "http://[::::]"],
}
LONG, LATE = "hunter2" + "x" * 24, f"{SECRET},hunter2"
SPLIT = [f"hunter2\n{SECRET}", f"hunter2,{SECRET}"]
REFUSED_UNSEEN = {  # what may hold a secret is not repeated
    "secret_key": ["hunter2", LONG, "hunter2" + "é" * 12, LATE, *SPLIT],
    "store_url": "mysql://a:hunter2@db/x sqlite://hunter2.db sqlite://///hunter2"
    " memory hunter2 sqlite:///hunter2/ sqlite:///hunter2\r".split(" "),
}


def settings_of(name: str, value: str) -> service.Settings:
    """What the environment gives when one variable holds this value."""
    environ = {"SERVICE_SECRET_KEY": SECRET, f"SERVICE_{name.upper()}": value}
    return service.Settings.from_environ(environ)


def is_taken(name: str, value: str) -> bool:
    with suppress(ValueError):
        return bool(settings_of(name, value))
    return False


def refusal_of(name: str, value: str) -> str:
    with pytest.raises(ValueError, match=rf"\ASERVICE_{name.upper()}.*\Z") as caught:
        settings_of(name, value)
    return str(caught.value)


def test_every_setting_has_its_default():
    assert {each.name: each.default for each in fields(service.Settings)} == DEFAULTS
    empty = {f"SERVICE_{name.upper()}": "" for name in DEFAULTS}
    assert service.Settings.from_environ(empty) == service.Settings()


@each("name", REFUSED_SETTINGS)
def test_a_bad_value_is_refused_in_one_line_with_its_variable_and_a_right_one(name):
    for value in REFUSED_SETTINGS[name]:
        line = refusal_of(name, value)
        assert any(is_taken(name, word.strip(",")) for word in line.split()), line


@each("name", REFUSED_UNSEEN)
def test_a_bad_secret_or_store_url_is_refused_without_being_shown(name):
    for value in REFUSED_UNSEEN[name]:
        assert "hunter2" not in refusal_of(name, value)


@cases(
    "name, value",
    {
        "two bytes a letter, blanks around": ("secret_key", f" {'é' * 16} , {SECRET} "),
        "a database with a password": ("store_url", "postgresql://a:b%40c@db:5432/x"),
        "several hosts": ("store_url", "postgresql://u@h1:5432,h2/db?x=read-write"),
    },
)
def test_a_good_value_is_taken(name, value):
    assert is_taken(name, value)


def test_settings_are_checked_when_made_cannot_be_changed_and_show_no_secret():
    settings = service.Settings(secret_key=SECRET, store_url="postgresql://a:pw@db/x")
    with pytest.raises(FrozenInstanceError):
        settings.signup = "open"
    assert (SECRET in f"{settings}", "pw" in repr(settings)) == (False, False)
    for wrong in ({"access_ttl": 0}, {"signup": "perhaps"}, {"max_items": -1}):
        with pytest.raises(ValueError, match=f"SERVICE_{next(iter(wrong)).upper()}"):
            service.Settings(**wrong)


def test_a_store_that_lasts_needs_a_secret_that_lasts(tmp_path):
    for url in ("sqlite:///todo.db", "postgresql://db/x"):
        with pytest.raises(ValueError, match="SERVICE_SECRET_KEY"):
            service.Settings(store_url=url)
    store = service.open_store(f"sqlite:///{tmp_path}/todo.db")
    with pytest.raises(ValueError, match="SERVICE_SECRET_KEY"):
        service.create_app(service.Settings(), store=store)


def test_the_environment_is_read_when_an_app_needs_it_and_by_no_import(monkeypatch):
    for name in DEFAULTS:
        monkeypatch.setenv(f"SERVICE_{name.upper()}", "nonsense")
    for extra in ("psycopg", "gunicorn", "gevent", "flask_swagger_ui"):
        monkeypatch.setitem(sys.modules, extra, None)  # as if it were not installed
    threads, names = threading.active_count(), runpy.run_path(service.__file__)
    kinds = (names["MemoryStore"], names["Settings"], names["App"])
    assert [thing for thing in gc.get_objects() if type(thing) in kinds] == []
    assert threading.active_count() == threads
    assert service.create_app(service.Settings())
    with pytest.raises(ValueError, match="SERVICE_"):
        service.create_app()


def test_a_missing_package_is_named_as_it_is_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)  # as if it were not installed
    with pytest.raises(ValueError, match="psycopg") as caught:
        service.open_store("postgresql://127.0.0.1:1/x").read("alice")
    assert "todo-service" not in str(caught.value)  # anybody could register that name


# ---- Arguments ----------------------------------------------------------------------
# Of plain Werkzeug requests. A row: what argument n is, what is sent, what comes out.


def n(**options: Any) -> Any:
    return service.Argument("n", **options)


def body(data: bytes, content_type: str = JSON, query: str = "") -> dict[str, Any]:
    url = {"method": "POST", "query_string": query}
    return {**url, "data": data, "content_type": content_type}


def in_json(value: Any, query: str = "") -> dict[str, Any]:
    return body(json.dumps({"n": value}).encode(), JSON, query)


def form(text: str, query: str = "") -> dict[str, Any]:
    return body(text.encode(), FORM, query)


def part(name: str, more: str = "", text: bytes = b"x") -> bytes:
    """A multipart form of one part."""
    head = f'--b\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'
    return head.encode("latin-1") + text + b"\r\n--b--\r\n"


def parser_of(*arguments: Any, **options: Any) -> Any:
    parser = service.RequestParser(**options)
    for argument in arguments:
        parser.add_argument(argument)
    return parser


def parsed(parser: Any, sent: dict[str, Any], **options: Any) -> dict[str, Any]:
    """The values, or {"message": …} of the 400."""
    with werkzeug.Request(EnvironBuilder(**sent).get_environ()) as request:
        try:
            values = parser.parse_args(request, **options)
        except BadRequest as error:
            assert error.data.keys() == {"message"}
            return dict(error.data)
        uploads = {k: v.read() for k, v in values.items() if isinstance(v, FileStorage)}
        return values | uploads


def even(value: Any) -> int:
    if int(value) % 2:
        raise ValueError(f"{value} is odd")
    return int(value)


def silent(value: Any) -> None:
    raise ValueError


def recursive(value: Any) -> None:
    recursive(value)


NOTHING, NULL, TWO = body(b"{}"), in_json(None), form("n=1&n=2")
EVERYWHERE = in_json("body", "n=query")
PARTS = f"{MULTIPART}; boundary=b"
UPLOAD = body(part("n", '; filename="a.txt"'), PARTS)
NOT_THERE = object()
VALUES: dict[str, tuple[Any, dict[str, Any], Any]] = {
    "a JSON member is read": (n(), in_json("x"), "x"),
    "a form field is read": (n(), form("n=x"), "x"),
    "a multipart field is read": (n(), body(part("n"), PARTS), "x"),
    "the query string is read": (n(), {"query_string": "n=x"}, "x"),
    "args is the query string": (n(location="args"), EVERYWHERE, "query"),
    "form is not JSON": (n(location="form"), in_json("100%de"), None),
    "headers, in any case": (n(location="headers"), {"headers": {"N": "1"}}, "1"),
    "values begin with the query": (n(location="values"), form("n=f", "n=q"), "q"),
    "the first place with it": (n(location=("args", "json")), EVERYWHERE, "query"),
    "+json is JSON": (n(), body(b'{"n": 1}', "application/vnd.x+json"), "1"),
    "bad JSON that nobody reads": (n(location="args"), body(b"{", query="n=1"), "1"),
    "a byte order mark is read over": (n(), body(b'\xef\xbb\xbf{"n": "x"}'), "x"),
    "a pair of surrogates is a letter": (n(), body(rb'{"n": "\ud83d\ude42"}'), "🙂"),
    "what is missing is None": (n(), NOTHING, None),
    "a default stands for what is missing": (n(default=5), NOTHING, 5),
    "a default is not converted": (n(type=int, default="5"), NOTHING, "5"),
    "a default may be a function": (n(default=list), NOTHING, []),
    "store_missing=False": (n(store_missing=False, default=1), NOTHING, NOT_THERE),
    "null is not given": (n(type=int), NULL, None),
    "null is the default": (n(default=5), NULL, 5),
    "null is left out": (n(store_missing=False, default=1), NULL, NOT_THERE),
    "null for a list": (n(action="append", nullable=True), NULL, None),
    "nullable is null": (n(nullable=True, default=5), NULL, None),
    "store takes the first": (n(type=int), form("n=1&n=x"), 1),
    "append takes all": (n(action="append", type=int), TWO, [1, 2]),
    "append keeps lists": (n(action="append", type=list), in_json([["a"]]), [["a"]]),
    "split at commas": (n(action="split", type=int), form("n=1,2&n=3"), [1, 2, 3]),
    "split makes [] of nothing": (n(action="split", required=True), form("n="), []),
    "split keeps gaps": (n(action="split"), form("n=a,,b"), ["a", "", "b"]),
    "lowered choices": (n(case_sensitive=False, choices=["AB"]), form("n=Ab"), "ab"),
    "each item is trimmed": (n(trim=True, action="split"), form("n=a,+b"), ["a", "b"]),
    "trimmed before it is chosen": (n(trim=True, choices="ab"), form("n=+a"), "a"),
    "an upload": (n(location="files"), UPLOAD, b"x"),
}


@cases("argument, sent, value", VALUES)
def test_the_parser_gives_a_clean_value(argument, sent, value):
    expected = {} if value is NOT_THERE else {"n": value}
    assert parsed(parser_of(argument), sent) == expected


LOST, NOT_NULL = "Missing required parameter in", "Must not be null!"
NO_CHOICE = "is not a valid choice"
PLACES = "the JSON body or the post body or the query string"
ERRORS: dict[str, tuple[Any, dict[str, Any], str]] = {  # * stands for any text
    "missing, and where": (n(required=True), NOTHING, f"{LOST} {PLACES}"),
    "null when required": (n(required=True), NULL, NOT_NULL),
    "null in a list": (n(action="append"), in_json(["a", None]), NOT_NULL),
    "no choice": (n(choices=["red", "blue"]), form("n=z"), f"z {NO_CHOICE}*red*blue*"),
    "without a hash": (n(choices={"a"}, type=list), in_json([]), f"*{NO_CHOICE}*"),
    "split of an object": (n(action="split"), in_json({"a": 1, "b": 2}), "*text*"),
    "a type's ValueError": (n(type=even), form("n=3"), "3 is odd"),
    "a silent ValueError": (n(type=silent), form("n=3"), "?*"),
    "an ArithmeticError": (n(type=lambda value: 1 // int(value)), form("n=0"), "?*"),
    "a TypeError": (n(type=iter), in_json(5), "?*"),
    "a KeyError": (n(type={"a": 1}.__getitem__), form("n=z"), "?*"),
    "a RecursionError": (n(type=recursive), form("n=z"), "?*"),
    "a StopIteration": (n(type=lambda value: next(iter(()))), form("n=z"), "?*"),
    "a pattern's error": (n(type=re.compile), form("n=("), "?*"),
    "no choice of many": (
        n(type=int, choices=range(10**6)),
        form("n=-1"),
        "*0, 1, ..., 999999",
    ),
    "help around": (n(type=even, help="<{error_msg}>"), form("n=3"), "<3 is odd>"),
    "braces in a value": (n(choices="a", help="{error_msg}"), form("n={0}"), "{0} *"),
}


@cases("argument, sent, text", ERRORS)
def test_the_parser_refuses_under_the_name_of_the_argument(argument, sent, text):
    message = parsed(parser_of(argument), sent)["message"]
    assert message.keys() == {"n"}
    assert fnmatchcase(message["n"], text), message["n"]


INTEGERS = [("12", 12), (" +5 ", 5), (-7, -7)]
NO_INTEGERS = [1.5, True, [1], "1_000", "٣", "9" * 5_000, "", "1e3", "0x1"]
FLOATS = [("-1.5e3", -1500.0), (2, 2.0), (0.5, 0.5), (".5", 0.5)]
NO_FLOATS = [True, "nan", "-inf", "1e999", "1_0.5", 10**400, "1e-", "٣", [1.5]]
FLAGS = [(True, True), (1, True), ("1", True), ("TRUE", True), ("on", True)]
FLAGS += [(False, False), (0, False), ("0", False), ("False", False), ("Off", False)]
DECIMALS = [(0.1, Decimal("0.1")), (7, Decimal(7)), ("1.10", Decimal("1.10"))]
NO_DATES = ["2030-02-29", "31.1.2030", "20300131", "2030-W05-4", "2030-1-1", "", 5]
TYPES: dict[str, tuple[Any, str, list[tuple[Any, Any]], list[Any]]] = {
    # the type, a word of its error, what is sent and what it becomes, what is refused
    "str": (str, "text", [("ñ漢🙂", "ñ漢🙂"), (5, "5")], [True, ["a"], {"a": 1}]),
    "int": (int, "integer", INTEGERS, NO_INTEGERS),
    "float": (float, "number", FLOATS, NO_FLOATS),
    "bool": (bool, "true", FLAGS, ["", "maybe", 2, [True]]),
    "list": (list, "list", [(["a", 1], ["a", 1]), ([], [])], ["ab", 5, {"a": 1}]),
    "dict": (dict, "object", [({"a": [1]}, {"a": [1]})], [[["a", 1]], "ab"]),
    "FileStorage": (FileStorage, "file", [], ["x", 5]),
    "Decimal": (Decimal, "", DECIMALS, ["x", [1]]),
    "Text": (service.Text(2, 5), "5", [("ab", "ab"), ("ñ" * 5,) * 2], ["a", "abcdef"]),
    "Text is text": (service.Text(1, 9), "", [("5", "5")], [5, True, ["a"], "a\0b"]),
    "date": (service.date, "", [("2028-02-29", datetime.date(2028, 2, 29))], NO_DATES),
}


@cases("kind, word, good, bad", TYPES)
def test_a_type_takes_what_it_says_and_no_look_alike(kind, word, good, bad):
    parser = parser_of(n(type=kind))
    for sent, value in good:
        found = parsed(parser, in_json(sent))["n"]
        assert (type(found), found) == (type(value), value)
    for sent in bad:
        message = parsed(parser, in_json(sent))["message"]
        assert message.keys() == {"n"}
        assert word in message["n"]


def test_a_decimal_has_the_text_of_its_number_and_types_describe_themselves():
    exact = parsed(parser_of(n(type=Decimal)), body(b'{"n": 12345678901234567.89}'))
    assert exact == {"n": Decimal("12345678901234567.89")}
    limits = {"type": "string", "minLength": 2, "maxLength": 5}
    assert limits.items() <= service.Text(2, 5).__schema__.items()
    assert service.date.__schema__ == {"type": "string", "format": "date"}
    assert service.Text(1, 3, "a|b").__schema__["pattern"] == "^(?:a|b)$"


MALFORMED_JSON = {
    "Latin-1": b'{"n": "\xe9"}',
    "UTF-16": '{"n": "x"}'.encode("utf-16"),
    "half of a surrogate pair": rb'{"n": "\ud800"}',
    "NaN": b'{"n": NaN}',
    "a number past all numbers": b'{"n": 1e999}',
    "a member twice": b'{"n": "1", "n": "2"}',
    "objects 10,000 deep": b'{"n":' * 10_000 + b"1" + b"}" * 10_000,
}


@cases("data", MALFORMED_JSON)
def test_json_that_cannot_be_read_is_refused_as_a_whole(data):
    parser = parser_of(n(help="no"), service.Argument("m"), bundle_errors=True)
    message = parsed(parser, body(data))["message"]
    assert message.startswith("The JSON body could not be read")


def test_the_error_says_where_the_json_is_wrong_or_that_it_is_no_object():
    message = parsed(parser_of(n()), body(b'{"n": "x",\n  y}'))["message"]
    assert re.search("line 2.*column 3", message)
    assert "UTF-8" in parsed(parser_of(n()), {"query_string": "n=%FF"})["message"]
    for data in (b"[]", b'"n"', b"5", b"null"):
        refusal = {"message": "The JSON body must be an object"}
        assert parsed(parser_of(n()), body(data)) == refusal


STRICT: dict[str, tuple[Any, dict[str, Any], set[str]]] = {
    "in JSON": (n(), body(b'{"n": 1, "m": 2, "o": 3}'), {"m", "o"}),
    "in a form": (n(), form("n=1&m=2"), {"m"}),
    "among files": (n(location="args"), UPLOAD, {"n"}),
    "in the query string": (n(), in_json("1", "m=2"), {"m"}),
    "where it is not read": (n(location="args"), in_json(1), {"n"}),
    "no place of values": (n(location="values"), form("n=1", "n=2"), set()),
}


@cases("argument, sent, names", STRICT)
def test_strict_refuses_what_no_argument_reads(argument, sent, names):
    found = parsed(parser_of(argument), sent, strict=True)
    unknown = {"message": dict.fromkeys(names, "Unknown argument")}
    assert found == unknown if names else "message" not in found


def test_the_first_error_ends_a_parse_unless_they_are_bundled():
    arguments = [service.Argument(name, even) for name in "abc"]
    sent = body(b'{"a": 1, "b": 2, "c": 3, "d": 4}')
    assert parsed(parser_of(*arguments), sent) == {"message": {"a": "1 is odd"}}
    errors = {"a": "1 is odd", "c": "3 is odd"}
    bundled = parser_of(*arguments, bundle_errors=True)
    assert parsed(bundled, sent) == {"message": errors}
    errors["d"] = "Unknown argument"
    assert parsed(bundled, sent, strict=True) == {"message": errors}


def test_dest_names_the_value_and_the_senders_name_the_error():
    parser = parser_of(
        service.Argument("a", even, dest="x"),
        service.Argument("b", dest="x"),  # missing, it does not erase a
        service.Argument("a", location="args", dest="query"),
        service.Argument("c", dest="y", default=7),
    )
    values = {"x": 2, "query": "q", "y": 7}
    assert parsed(parser, body(b'{"a": 2}', query="a=q")) == values
    assert parsed(parser, body(b'{"a": 1}')) == {"message": {"a": "1 is odd"}}


@each("kind", ["int", 5, service.RequestParser()])  # parsers do not nest
def test_a_wrong_declaration_fails_where_it_is_written(kind):
    for wrong in ({"type": kind}, {"location": ["args", "url"]}, {"action": "add"}):
        with pytest.raises((ValueError, TypeError)):
            n(**wrong)


def test_a_parser_is_built_copied_and_changed():
    parser = service.RequestParser(trim=True)
    assert parser.add_argument("a").add_argument(service.Argument("b")) is parser
    other = parser.copy().replace_argument("a", type=int).remove_argument("b")
    assert parsed(parser, form("a=+x&b=+y")) == {"a": "x", "b": "y"}
    parser.add_argument("c", trim=False)  # an argument knows better than its parser
    assert parsed(parser, form("c=+z"))["c"] == " z"
    assert parsed(other, form("a=+7&b=+y")) == {"a": 7}
    parser.replace_argument("a", dest="d")
    parser.copy().args[0].required = True
    assert list(parsed(parser, NOTHING)) == ["d", "b", "c"]


@each("default", [[], {}, {"a": []}, list])
def test_a_default_is_not_shared_between_requests(default):
    parser = parser_of(n(default=default))
    first = parsed(parser, NOTHING)["n"]
    expected = copy.deepcopy(first)
    (first.setdefault("a", []) if isinstance(first, dict) else first).append("leak")
    assert parsed(parser, NOTHING)["n"] == expected


def test_a_parse_gives_a_dict_with_attributes_or_a_400_in_words():
    parser = parser_of(n(required=True, help="Say n"))
    found = parser.parse_args(werkzeug.Request(EnvironBuilder(**TWO).get_environ()))
    found.more = 3
    assert (found, found.n, found.more) == ({"n": "1", "more": 3}, "1", 3)
    assert not hasattr(found, "missing")
    with pytest.raises(BadRequest, match="Say n"):
        parser.parse_args(werkzeug.Request(EnvironBuilder().get_environ()))


# A Resource is a data model: it is registered, and has its routes.


def world_of(kind: Any) -> World:
    """A world of things that hold one value, made by such a type."""
    value = service.Argument("value", kind)
    return World(resources=[service.Resource("things", "thing", [value])], max_items=3)


KEPT = {
    "a date": (datetime.date.fromisoformat, "2030-01-31", "2030-01-31"),
    "a UUID": (UUID, "{" + "5" * 32 + "}", "55555555-5555-5555-5555-555555555555"),
    "a Decimal": (Decimal, 0.1, "0.1"),
    "an object": (dict, {"a": {"b": [1, 2.5, None]}}, {"a": {"b": [1, 2.5, None]}}),
}


@cases("kind, sent, kept", KEPT)
def test_an_item_keeps_json_or_the_text_of_what_is_none(kind, sent, kept):
    alice = world_of(kind).user()
    created = alice("POST /things", {"value": sent})
    assert (created.status, created.json) == (201, {"value": kept})
    assert alice("GET /things/thing1").json == created.json
    assert alice("PUT /things/thing1", created.json).json == created.json


@each("value", [float("nan"), b"", "\ud800", json.loads("[" * 200 + "]" * 200)])
def test_what_json_cannot_hold_is_the_arguments_400_and_is_not_counted(value):
    alice = world_of(lambda _: value).user()
    for request in ["POST /things"] * 4 + ["PUT /things/mine"]:
        refused = alice(request, form={"value": "nan"})
        assert (refused.status, list(refused.json["message"])) == (400, ["value"])
    assert alice("GET /things").json == {}


NOTE = {"text": "x", "rank": 0, "done": False, "colour": None}
ARGUMENTS = [
    service.Argument("text", service.Text(1, 20), required=True),
    service.Argument("rank", int, default=0),
    service.Argument("done", bool, default=False),
    service.Argument("colour", choices=("red", "green")),
]
NOTES = service.Resource("notes", "note", ARGUMENTS, {"note1": NOTE | {"rank": 1}})
OURS = " users token revoke health docs account sessions counters error"


@each("name", "Notes notes/ <id> 1notes -notes notes- a--b ñotes" + OURS)
def test_a_name_that_is_no_plain_word_or_the_services_own_is_refused(name):
    for wrong in (name, f"{name} x", f"{name}\n"):
        for names in ((wrong, "note"), ("notes", wrong)):
            with pytest.raises(ValueError, match=re.escape(repr(wrong))):
                service.Resource(*names, [])


def test_a_starter_item_that_its_own_arguments_refuse_is_refused():
    wrong = ({"text": None}, {"text": "x" * 21}, {"rank": "x"}, {"colour": "x"})
    starters = [{"note1": NOTE | each} for each in wrong]
    for starter in (*starters, {"note1": {"rank": 1}}, {"note1/": NOTE}):
        with pytest.raises(ValueError, match="note1"):
            service.Resource("notes", "note", ARGUMENTS, starter)


def test_resources_take_the_place_of_the_todos_and_keep_apart():
    pages = service.Resource("pages", "page", [service.Argument("text")])
    alice = World(resources=iter([NOTES, pages])).user()
    assert alice("GET /notes").json == dict(NOTES.starter)
    for place in ("notes/note2", "pages/page1", "notes/note3", "pages/page2"):
        created = alice(f"POST /{place.split('/')[0]}", {"text": place})
        assert created.headers["Location"] == f"/api/{place}"
    assert list(alice("GET /pages").json) == ["page1", "page2"]
    assert alice("GET /todos").status == 404
    assert alice("DELETE /notes/note9").json == {"message": "Note note9 doesn't exist"}
    for words in (("notes", "page"), ("pages", "note")):
        with pytest.raises(ValueError, match="note"):
            World(resources=[NOTES, service.Resource(*words, [])])


@each("request_line", ["POST /notes", "PUT /notes/mine"])
def test_an_item_is_made_of_the_arguments_of_its_resource(request_line):
    alice = World(resources=[NOTES]).user()
    for more in ({}, {"rank": 7}, {"unknown": 1}, {"rank": None}):  # null: not given
        item = {name: value for name, value in more.items() if name == "rank" and value}
        assert alice(request_line, {"text": "x"} | more).json == NOTE | item
    refused = alice(request_line, {"text": None, "rank": 1.5})
    assert (refused.status, set(refused.json["message"])) == (400, {"text", "rank"})


def test_an_item_that_was_read_can_be_put_back():
    alice = World(resources=[NOTES]).user()
    alice("POST /notes", {"text": "Emma"})
    read = alice("GET /notes/note2").json
    assert alice("PUT /notes/note2", read).json == read
    form = {"text": "Emma", "done": "on", "rank": "3"}  # as a browser's form is sent
    ticked = {"text": "Emma", "done": True, "rank": 3, "colour": None}
    assert alice("PUT /notes/note2", form=form).json == ticked
    assert alice("PUT /notes/note2", {"text": "x"}).json == NOTE  # defaults come back


CHANGES: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "nothing": ({}, 200, {}),
    "one, though another is required": ({"done": True}, 200, {"done": True}),
    "none when one of them is bad": ({"rank": "x", "done": True}, 400, {}),
    "to its default by null": ({"rank": None}, 200, {"rank": 0}),
    "away by null": ({"colour": None}, 200, {"colour": None}),
    "not by null what is required": ({"text": None}, 400, {}),
}


@cases("sent, status, changed", CHANGES)
def test_a_merge_patch_changes_what_is_sent(sent, status, changed):
    alice = World(resources=[NOTES]).user()
    before = {"text": "x", "rank": 7, "done": False, "colour": "red"}
    alice("PUT /notes/mine", before)
    patch = json.dumps(sent).encode()
    answer = alice("PATCH /notes/mine", patch, content_type=MERGE_PATCH)
    assert answer.status == status
    assert alice("GET /notes/mine").json == before | changed


# ---- Stores ------------------------------------------------------------------------
# What the views rely on; tests/test_stores.py asks the same, and more, of every store.


def put(store: Any, id: str, task: str, user: str = "alice") -> None:
    with store.write(user) as data:
        data["todos"][id] = {"task": task}


def items_of(store: Any, user: str = "alice") -> list[tuple[str, str]]:
    with store.read(user) as data:
        return [(id, value["task"]) for id, value in data["todos"].items()]


def test_items_come_in_the_order_of_their_creation_and_each_user_has_his_own():
    store = service.MemoryStore()
    for id in ("b", "c", "a"):
        put(store, id, "old")
    put(store, "c", "new")  # an overwritten item keeps its place
    with store.read("alice") as before, store.write("alice") as data:
        del data["todos"]["b"]
    assert list(before["todos"]) == ["b", "c", "a"]  # a snapshot
    put(store, "b", "again")  # one that was deleted goes to the end
    put(store, "a", "his", "bob")
    assert items_of(store) == [("c", "new"), ("a", "old"), ("b", "again")]
    assert (items_of(store, "bob"), items_of(store, "ann")) == ([("a", "his")], [])


@each("error", [LookupError, KeyboardInterrupt])
def test_a_block_that_raises_changes_nothing(alice, error):
    before = alice.world.owned("alice")
    with pytest.raises(error), alice.world.store.write("alice") as data:
        data["account"]["hash"] = "y"
        data["sessions"].clear()
        data["counters"]["todos"]["count"] = 9
        data["todos"]["todo1"]["task"] = "y"
        data["todos"]["new"] = {"task": "y"}
        raise error
    assert alice.world.owned("alice") == before


# ---- Tokens -------------------------------------------------------------------------
# Forgeries are made with hmac and base64 alone: a library would mend what is to break.

OTHER_SECRET = "fedcba9876543210fedcba9876543210"
NO_TOKEN, BAD_TOKEN, NO_GRANT = "401", "401 invalid_token", "400 invalid_grant"
FILES, OTHER = "https://files.example", "https://other.example"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"


def encoded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def opened(token: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The header and the claims of a token, unchecked."""
    parts = [part + "=" * (-len(part) % 4) for part in token.split(".")[:2]]
    header, claims = (json.loads(base64.urlsafe_b64decode(part)) for part in parts)
    return header, claims


def sid_of(user: User) -> str:
    return str(opened(user.access_token)[1]["sid"])


def mac(text: str, key: str = SECRET, digest: str = "sha256") -> str:
    return encoded(hmac.digest(key.encode(), text.encode(), digest))


def signed(header: Any, claims: Any, key: str = SECRET, digest: str = "sha256") -> str:
    """A token; header and claims are JSON, or bytes that stand for themselves."""
    parts = (json.dumps(x) if not isinstance(x, bytes) else x for x in (header, claims))
    text = ".".join(encoded(x.encode() if isinstance(x, str) else x) for x in parts)
    return f"{text}.{mac(text, key, digest)}"


def altered(token: str, **claims: Any) -> str:
    """The token with other claims, signed with the right key."""
    header, old = opened(token)
    return signed(header, old | claims)


def answer_to(world: World, credentials: str | None) -> str:
    """How an Authorization header is answered: 200, or 401 and the error code."""
    answer = world("GET /users/me", environ={"HTTP_AUTHORIZATION": credentials})
    if answer.status == 200:
        return "200"
    challenge = answer.headers["WWW-Authenticate"]
    shape = r'Bearer realm="[^"\\]+"(, error="(\w+)"(, error_description="[^"\\]*")?)?'
    found = re.fullmatch(shape, challenge)
    assert found and list(answer.json) == ["message"], challenge
    return f"{answer.status} {found[2] or ''}".strip()


def answer_to_bearer(world: World, token: str) -> str:
    sent = f"Bearer {token}".encode("utf-8", "replace")
    return answer_to(world, sent.decode("latin-1"))  # as PEP 3333 has it


def answer_to_grant(world: World, token: str) -> str:
    answer = world.refresh(token)
    assert answer.headers["Cache-Control"] == "no-store"
    return f"{answer.status} {answer.json.get('error', '')}".strip()


def without(mapping: dict[str, Any], name: str) -> dict[str, Any]:
    return {other: mapping[other] for other in mapping if other != name}


def forged_signatures(token: str) -> Iterator[str]:
    header, claims = opened(token)
    text, _, mark = token.rpartition(".")
    raw = base64.urlsafe_b64decode(mark + "=")
    for key in (OTHER_SECRET, "", header["kid"], SECRET + "\n", SECRET.upper()):
        yield signed(header, claims, key)
    yield signed(header, claims, SECRET, "sha512")
    for bad in (b"", raw[:16], raw + b"\0", raw * 2, bytes(32), raw.hex().encode()):
        yield f"{text}.{encoded(bad)}"
    yield f"{altered(token, sub='bob').rpartition('.')[0]}.{mark}"
    for other in LETTERS.replace(mark[-1], ""):  # the last two of its bits are spare
        yield f"{text}.{mark[:-1]}{other}"


def forged_headers(token: str) -> Iterator[str]:
    header, claims = opened(token)
    kid, typ, plain = header["kid"], header["typ"], json.dumps(header)[:-1].encode()
    algorithms = ["none", "NONE", "", None, [], {}, True, 0, "HS512", "hs256", "RS256"]
    for text in (signed(header | {"alg": alg}, claims) for alg in algorithms):
        yield from (text, text[: text.rindex(".") + 1])
    other_kind = "rt+jwt" if typ == "at+jwt" else "at+jwt"
    for wrong in ("JWT", other_kind, typ.upper(), f" {typ}", "", None, [typ], {}, 1):
        yield signed(header | {"typ": wrong}, claims)
    kids = ["", "unknown", "/dev/null", "' OR 1=1 --", "\0", kid + "A", 0, True, None]
    for wrong in [*kids, [], [kid], {}, {kid: 1}, 1.5, "k" * 2_000, "\ud800"]:
        yield signed(header | {"kid": wrong}, claims)
    jwk = {"kty": "oct", "k": encoded(OTHER_SECRET.encode()), "alg": "HS256"}
    more = {"crit": ["exp"], "b64": True, "jku": OTHER, "x5u": OTHER, "jwk": jwk}
    yield from (signed(header | {name: more[name]}, claims) for name in more)
    yield signed(header | {"jwk": jwk}, claims, OTHER_SECRET)
    yield from (signed(without(header, name), claims) for name in header)
    yield signed(plain + b',"alg":"none"}', claims)
    yield signed(plain + b',"typ":"%s"}' % other_kind.encode(), claims)
    yield signed(plain + b',"x":' + b"[" * 1_000 + b"]" * 1_000 + b"}", claims)
    for odd in ([header], "HS256", None, 1, {}, b"", b"{alg:HS256}", b'{"alg":"\xff"}'):
        yield signed(odd, claims)


WRONG_CLAIMS: dict[str, list[Any]] = {
    "iss": [ISSUER + "/", ISSUER.upper(), ISSUER + ".evil.example"],
    "sub": ["bob", "ALICE", "nobody", "alice\0", "\ud800", "a" * 2_000],
    "sid": ["unknown", "\0", "\udfff", "../x"],
    "aud": ["*", ["*"], [ISSUER + "/"], [ISSUER.upper()], [None], [[ISSUER]], ISSUER],
    "exp": [1, 0, -1, -(10**400), float("nan"), float("inf")],
    "gen": [float("nan"), "1"],
    "more": ["x" * 4_096],  # longer than 4 KB
}


def forged_claims(token: str) -> Iterator[str]:
    """Every claim missing, of every wrong type, and wrong; all rightly signed."""
    header, claims = opened(token)
    for name, value in claims.items():
        yield signed(header, without(claims, name))
        others = [None, True, 5, 1.5, "text", [], {}, ["text"], str(value), [value]]
        for other in [*others, "" if name != "jti" else None]:
            if type(other) is not type(value) or other in ("", []):
                yield signed(header, claims | {name: other})
    for name, values in WRONG_CLAIMS.items():
        if name in claims or name == "more":
            yield from (altered(token, **{name: value}) for value in values)
    plain = json.dumps(claims)[:-1].encode()
    yield signed(header, plain.replace(b'"exp": ', b'"exp": 1e999, "y": ') + b"}")
    yield signed(header, plain + b',"x":' + b"[" * 1_000 + b"]" * 1_000 + b"}")
    for odd in (None, "alice", 1, [claims], list(claims), {}, b"", b"sub=alice"):
        yield signed(header, odd)


def damaged(token: str) -> Iterator[str]:
    head, body, mark = token.split(".")
    yield from ("token", ".", "..", "....", head, f"{head}.{body}", f"{token}.{mark}")
    yield from (f".{token}", f"{token}.", f".{body}.{mark}", f"{head}..{mark}")
    yield from (token[:-1], token[:-4], token + "A", token.upper(), f'"{token}"')
    yield from ("\U0001f511", token[:-1] + "\u0410", "\xa0" + token, token + "\xa0")
    yield from ("A" * 60_000, "." * 60_000, f"{head}.{'A' * 50_000}.{mark}")
    yield from (f"{token}=", f"{token}==", f"{head}=.{body}.{mark}", f"{head}.{body}=.")
    for sign in " \n\t=+/":
        for at in (10, len(head), len(head) + 1, len(token) - 10):
            yield token[:at] + sign + token[at:]


def test_each_token_says_what_it_is_and_nothing_more_than_it_must(world):
    world.clock.step(0.75)  # times are whole seconds, and promise nothing beyond
    alice, now = world.user(), int(world.clock())
    sid, lives = sid_of(alice), {"expires_in": 900, "refresh_expires_in": 86_400}
    tokens = {"access_token": alice.access_token, "refresh_token": alice.refresh_token}
    assert alice.pair == {"token_type": "Bearer", **lives, **tokens}
    header, access = opened(alice.access_token)
    kid, common = header["kid"], {"iss": ISSUER, "sub": "alice", "sid": sid}
    assert header == {"alg": "HS256", "typ": "at+jwt", "kid": kid}
    own = {"iat": now, "exp": now + 900, "aud": [ISSUER], "jti": access["jti"]}
    assert access == common | own
    assert len(sid) >= 16 <= len(access["jti"])  # 96 bits or more
    header, refresh = opened(alice.refresh_token)
    assert header == {"alg": "HS256", "typ": "rt+jwt", "kid": kid}
    assert refresh == {**common, "gen": 1, "exp": now + 86_400}
    for token in (alice.access_token, alice.refresh_token):  # plain HMAC
        text, _, mark = token.rpartition(".")
        assert mark == mac(text)


def test_access_tokens_differ_and_a_generation_is_always_the_same_text(alice):
    first, second, other = alice.refresh(), alice.refresh(), alice.world.log_in()
    assert first.refresh_token == second.refresh_token != alice.refresh_token
    header, claims = opened(alice.refresh_token)
    assert opened(first.refresh_token) == (header, claims | {"gen": 2})
    users = [alice, first, second, other]
    assert len({opened(user.access_token)[1]["jti"] for user in users}) == 4
    assert len({sid_of(user) for user in users}) == 2
    assert all(user.is_in for user in users)  # an access token has its time


@cases(
    "settings, answer",
    {
        "the issuer": ({"audience": ISSUER}, "200"),
        "one of several": ({"audience": f"x, {FILES}"}, "200"),
        "none of them": ({"audience": OTHER}, BAD_TOKEN),
        "another issuer": ({"issuer": OTHER, "audience": ISSUER}, BAD_TOKEN),
    },
)
def test_a_token_opens_every_service_in_its_audience(settings, answer):
    alice = World(audience=f"{ISSUER}, {FILES}").user()
    there = World(alice.world.store, alice.world.clock, **settings)
    assert opened(alice.access_token)[1]["aud"] == [ISSUER, FILES]
    assert answer_to_bearer(there, alice.access_token) == answer
    grant = NO_GRANT if "issuer" in settings else "200"
    assert answer_to_grant(there, alice.refresh_token) == grant


def test_secrets_are_rotated_by_a_list_whose_first_signs_and_whose_all_verify():
    old = World()
    keys = (f" {OTHER_SECRET} , {SECRET} ,", OTHER_SECRET)
    both, new = (World(old.store, old.clock, secret_key=key) for key in keys)
    before = old.user()
    assert answer_to_bearer(new, before.access_token) == BAD_TOKEN
    assert answer_to_grant(new, before.refresh_token) == NO_GRANT
    after = User(both, "alice", before.pair).refresh()
    for token in (after.access_token, after.refresh_token):
        text, _, mark = token.rpartition(".")
        assert mark == mac(text, OTHER_SECRET)
    assert answer_to_bearer(both, before.access_token) == "200"
    assert answer_to_bearer(old, after.access_token) == BAD_TOKEN
    assert answer_to_grant(old, after.refresh_token) == NO_GRANT
    assert answer_to_bearer(new, after.access_token) == "200"
    assert answer_to_grant(new, after.refresh_token) == "200"


def test_a_key_verifies_only_what_names_it_and_its_id_reveals_nothing_of_it():
    world = World(secret_key=f"{SECRET},{OTHER_SECRET}")
    header, claims = opened(world.user().access_token)
    other = opened(World(secret_key=OTHER_SECRET).user().access_token)[0]["kid"]
    keys = itertools.product((header["kid"], other), (SECRET, OTHER_SECRET))
    forged = [signed(header | {"kid": kid}, claims, key) for kid, key in keys]
    answers = [answer_to_bearer(world, token) for token in forged]
    assert answers == ["200", BAD_TOKEN, BAD_TOKEN, "200"]
    assert not any(SECRET[at : at + 6] in header["kid"] for at in range(27))
    digest = hashlib.sha256(SECRET.encode())
    assert header["kid"] not in digest.hexdigest() + encoded(digest.digest())


@each("forgeries", [forged_signatures, forged_headers, forged_claims, damaged])
def test_a_forged_or_damaged_token_opens_buys_and_ends_nothing(alice, forgeries):
    world, before = alice.world, alice.world.owned("alice")
    access, refresh = alice.access_token, alice.refresh_token
    for token in forgeries(access):
        assert answer_to_bearer(world, token) == BAD_TOKEN, token[:500]
        if forgeries is not forged_claims:  # an expired token logs out all the same
            assert world("POST /revoke", {"token": token}).status == 200
        assert world("POST /revoke", {"token": "\0"}).status == 200
    assert world.owned("alice") == before
    for token in forgeries(refresh):
        assert answer_to_grant(world, token) == NO_GRANT, token[:500]
    assert world.owned("alice") == before
    assert answer_to_bearer(world, altered(access)) == "200"  # a faithful copy is good
    assert answer_to_grant(world, altered(refresh)) == "200"


def test_credentials_are_one_token_after_the_scheme_in_any_case(alice):
    token = alice.access_token
    for scheme in ("Bearer ", "bearer ", "BEARER ", "bEaReR   "):
        assert answer_to(alice.world, f"{scheme}{token} ") == "200"
    others = [None, "", " ", "Basic YTpi", f"Token {token}"]
    for credentials in [*others, token, f"Bearer{token}", f"DPoP {token}", "\xff", ":"]:
        assert answer_to(alice.world, credentials) == NO_TOKEN, credentials
    bad = ["Bearer", "Bearer ", "Bearer ,", "Bearer a=b", f"Bearer {token}, Bearer x"]
    bad += [f"Bearer {token} {token}", f"Bearer token={token}", f'Bearer "{token}"']
    bad += [f"Bearer {blank}{token}" for blank in "\t\v\f\x1c\x1f\x85\xa0"]
    for credentials in [*bad, f"Bearer {alice.refresh_token}"]:
        assert answer_to(alice.world, credentials) == BAD_TOKEN, credentials
    assert answer_to_grant(alice.world, token) == NO_GRANT


def test_a_token_is_taken_from_the_authorization_header_and_nowhere_else(alice):
    world, given = alice.world, {"access_token": alice.access_token}
    url = f"/todos?{urlencode(given)}"
    assert (world(f"GET {url}").status, world(f"POST {url}", TASK).status) == (401, 401)
    assert world(f"GET {url}", authorization="Bearer x").status == 401
    assert world("POST /todos", form=given | TASK).status == 401
    assert world("GET /todos", cookie=urlencode(given)).status == 401


def test_a_token_that_was_remembered_still_expires_and_is_still_revoked(alice):
    other = alice.world.log_in()
    assert (alice.is_in, other.is_in) == (True, True)
    twin = World(alice.world.store, alice.world.clock)
    log_out(User(twin, "alice", other.pair))
    assert (alice.is_in, other.is_in) == (True, False)
    alice.world.clock.step(899.999)
    assert alice.is_in
    alice.world.clock.step(0.001)
    assert not alice.is_in


# ---- Sessions -----------------------------------------------------------------------
# However a session ends, all of its tokens are dead at once.

DAY = 86_400
NEW_PASSWORD = "another horse battery"
TASK = {"task": "x"}


def is_dead(*users: User) -> bool:
    """Is every token of them refused, and does asking bring nothing back?"""
    answers = set()
    for user in users + users:
        answers.add((user.is_in, answer_to_grant(user.world, user.refresh_token)))
    return answers == {(False, NO_GRANT)}


def refreshed(user: User) -> Answer:
    return user.world.refresh(user.refresh_token)


def logged_in(user: User) -> Answer:
    return user.world("POST /token", LOGIN)


def log_out(user: User, token: str = "") -> None:
    answer = user.world("POST /revoke", form={"token": token or user.access_token})
    assert (answer.status, answer.json) == (200, {})


def change_password(user: User, old: str = PASSWORD, new: str = NEW_PASSWORD) -> Answer:
    return user("PATCH /users/me", {"password": old, "new_password": new})


def delete_account(user: User) -> Answer:
    return user("DELETE /users/me", {"password": PASSWORD})


def sessions_of(user: User) -> dict[str, Any]:
    return dict(user.world.owned(user.name).get("sessions", {}))


def events(caplog: pytest.LogCaptureFixture, event: str) -> list[str]:
    return [line for line in caplog.messages if event in line]


def test_who_refreshes_every_ten_minutes_is_asked_for_no_password_for_24_hours(alice):
    clock = alice.world.clock
    end = clock() + DAY  # to the second
    while clock() < end - 600:
        clock.step(600)
        assert alice.is_in
        alice = alice.refresh()
        lives = alice.pair["expires_in"], alice.pair["refresh_expires_in"]
        assert lives == (min(900, end - clock()), end - clock())
    clock.now = end - 1
    alice = alice.refresh()
    assert (alice.pair["expires_in"], alice.is_in) == (1, True)
    clock.now = end
    assert is_dead(alice)
    assert alice.world.log_in().is_in


@each("wait", [0, 29.999, 30])
def test_in_the_grace_an_old_token_gives_the_same_successor_again(alice, wait):
    alice.world.clock.step(3600)
    second = alice.refresh()
    before = alice.world.owned("alice")
    alice.world.clock.step(wait)
    again = [alice.refresh(), alice.refresh()]
    assert {user.refresh_token for user in again} == {second.refresh_token}
    assert alice.world.owned("alice") == before
    assert all(user.is_in for user in (second, *again, second.refresh()))


def test_the_grace_runs_from_the_first_use_however_often_it_is_taken(alice):
    second = alice.refresh()
    for _ in range(2):
        alice.world.clock.step(14.999)
        alice.refresh()
    alice.world.clock.step(0.003)
    assert answer_to_grant(alice.world, alice.refresh_token) == NO_GRANT
    assert is_dead(alice, second)


@each("wait", [30.001, 600, DAY - 1])
def test_past_the_grace_an_old_token_ends_the_session_for_good(alice, caplog, wait):
    caplog.set_level(logging.INFO, "service")
    other, bob, second = alice.world.log_in(), alice.world.user("bob"), alice.refresh()
    alice.world.clock.step(wait)
    assert answer_to_grant(alice.world, alice.refresh_token) == NO_GRANT
    assert is_dead(second, alice)
    (line,) = events(caplog, "reuse detected")  # once: later there is nothing to reuse
    assert "alice" in line
    assert (other.refresh().is_in, bob.refresh().is_in) == (True, True)


@each("age", [0, 2, 5])  # 0: one that does not exist yet
def test_an_older_token_ends_the_session_even_within_the_grace(alice, age):
    generations = [alice]
    for _ in range(age):
        generations.append(generations[-1].refresh())
    token = altered(alice.refresh_token, gen=1 if age > 0 else 2)
    assert answer_to_grant(alice.world, token) == NO_GRANT
    assert sessions_of(alice) == {}
    assert is_dead(*generations)


def test_a_session_that_is_over_is_not_renewed_by_a_token_that_was_good_just_now():
    over = {"sessions": {"x": {"gen": 1, "rotated_at": 0, "expires_at": 60}}}
    assert service.renew_session(over, "x", 1, 60, 30) == "ended"


def test_without_a_grace_a_refresh_token_is_good_for_one_use():
    alice = World(refresh_grace=0).user()
    second = alice.refresh()
    assert answer_to_grant(alice.world, alice.refresh_token) == NO_GRANT
    assert is_dead(second)


def test_a_clock_that_is_set_back_lengthens_no_grace(alice):
    alice.refresh()
    for step, answer in ((-20, "200"), (-3600, NO_GRANT)):
        alice.world.clock.step(step)
        assert answer_to_grant(alice.world, alice.refresh_token) == answer


def test_a_login_past_the_twentieth_ends_what_was_not_refreshed_for_longest(world):
    bob = world.user("bob")
    oldest, second, third = world.user(), world.log_in(), world.log_in()
    world.clock.step(1)
    rest = [world.log_in() for _ in range(17)]
    world.clock.step(1)
    oldest, third = oldest.refresh(), third.refresh()
    assert second.is_in  # twenty are not too many
    newest = world.log_in()
    assert is_dead(second)
    assert all(user.is_in for user in (oldest, third, newest, bob, *rest))
    assert len(sessions_of(newest)) == 20


def test_a_login_drops_dead_sessions_before_it_ends_a_living_one(world):
    dead = [world.user(), *(world.log_in() for _ in range(9))]
    world.clock.step(DAY - 60)
    alive = [world.log_in() for _ in range(10)]
    world.clock.step(60)
    alive.append(world.log_in())
    assert all(user.is_in for user in alive)
    assert (len(sessions_of(alive[0])), is_dead(*dead)) == (11, True)


@each("kind", ["access", "refresh", "late access", "old", "very old", "successor"])
def test_any_token_of_a_session_logs_out_of_it(alice, kind):
    other, bob, second = alice.world.log_in(), alice.world.user("bob"), alice.refresh()
    alice.world.clock.step({"late access": 900, "very old": 3600}.get(kind, 0))
    user = second if kind == "successor" else alice
    log_out(user, user.access_token if "access" in kind else user.refresh_token)
    assert list(sessions_of(alice)) == [sid_of(other)]
    assert is_dead(alice, second)
    log_out(alice)  # once more is no error
    assert (other.refresh().is_in, bob.refresh().is_in) == (True, True)


def test_a_change_of_password_ends_every_other_session_of_the_user(alice):
    other, bob = alice.world.log_in(), alice.world.user("bob")
    answer = change_password(alice)
    assert (answer.status, answer.body) == (204, b"")
    assert is_dead(other)
    assert (alice.refresh().is_in, bob.is_in) == (True, True)
    assert logged_in(alice).json["error"] == "invalid_grant"
    assert alice.world.log_in("alice", NEW_PASSWORD).is_in


def test_a_refused_change_of_password_changes_nothing(world):
    user = world.user("a-rather-long-name")
    before = world.owned(user.name)
    for old, new in (("wrong", PASSWORD), (PASSWORD, "short"), (PASSWORD, user.name)):
        answer = change_password(user, old, new)
        named = "password" if old == "wrong" else "new_password"
        assert (answer.status, list(answer.json["message"])) == (400, [named])
    assert world.owned(user.name) == before


def test_a_deleted_account_is_gone_and_its_name_is_not_given_again(alice):
    world, other, bob = alice.world, alice.world.log_in(), alice.world.user("bob")
    refused = alice("DELETE /users/me", {"password": "wrong"})
    assert (refused.status, list(refused.json["message"])) == (400, ["password"])
    assert (other.is_in, delete_account(alice).status) == (True, 204)
    assert is_dead(alice, other)
    assert world.owned("alice") == {"account": {"hash": None}}
    again = {"username": "alice", "password": NEW_PASSWORD}
    assert world("POST /users", again).status == 409
    with pytest.raises(Conflict):
        world.user("alice")
    assert logged_in(alice).json["error"] == "invalid_grant"
    assert bob.is_in


# ---- Passwords ----------------------------------------------------------------------
# Names and passwords that are taken, what is the same, and how guessing is slowed.

HERE, THERE = "192.0.2.1", "192.0.2.2"


def sign_up(world: World, name: Any, password: Any = PASSWORD, **more: Any) -> Answer:
    text = json.dumps({"username": name, "password": password}, ensure_ascii=False)
    return world("POST /users", text.encode(), content_type=JSON, **more)


def guess(world, name="alice", address=HERE, password="wrong") -> Answer:
    form = {"grant_type": "password", "username": name, "password": password}
    return world("POST /token", form=form, address=address)


def fail(world: World, times: int, name: str = "alice", address: str = HERE) -> None:
    for _ in range(times):
        assert guess(world, name, address).json["error"] == "invalid_grant"


@cases(
    "name, taken_as",
    {
        "all that may be in it": ("0a.b_c@d-e+f", "0a.b_c@d-e+f"),
        "an address": ("Alice+Todo@Example.com", "alice+todo@example.com"),
    },
)
def test_a_name_is_lowered_and_finds_its_account_however_typed(world, name, taken_as):
    assert sign_up(world, name).json == {"username": taken_as}
    user = world.log_in(name)
    assert user("GET /users/me").json == {"username": taken_as, "roles": []}
    assert opened(user.access_token)[1]["sub"] == taken_as


@each("name", ["", "é", ".a", " a", "a/b", "a\n", "x" * 65, "ß", "İ", None, True, []])
def test_any_other_name_is_refused(world, name):
    answer = sign_up(world, name)
    assert (answer.status, list(answer.json["message"])) == (400, ["username"])


GREEK = "\u1f82" * 1_024  # each letter decomposes into four
DECOMPOSED = unicodedata.normalize("NFD", "éèàùôîçñ")  # 16, and 8 when composed
SHORT = ["", "x" * 14, "😀" * 14, "é" * 14, DECOMPOSED, None, True, [], {}]


@each("password", [*SHORT, "x" * 1_025, "😀" * 1_025, "A-Name-That-Is-Long"])
def test_a_password_too_short_too_long_or_the_name_itself_is_refused(world, password):
    answer = sign_up(world, "a-name-that-is-long", password)
    assert (answer.status, list(answer.json["message"])) == (400, ["password"])
    assert "4,096" not in answer.text


@cases(
    "password, typed",
    {
        "1,024 of any script": ("😀" * 1_024, "😀" * 1_024),
        "15 with a blank before": (" kept as typed.", " kept as typed."),
        "spaces of all kinds": ("five\u00a0words and\u3000two", "five words and two"),
        "composed or not": (GREEK, unicodedata.normalize("NFD", GREEK)),
    },
)
def test_a_password_is_the_same_however_it_is_typed(world, password, typed):
    assert sign_up(world, "ann", password).status == 201
    assert world.log_in("ann", typed).is_in
    assert guess(world, "ann", password=password[:-1]).json["error"] == "invalid_grant"
    assert world.owned("ann")["account"]["hash"].startswith("scrypt:32768:8:1$")


def test_closed_sign_up_is_403_whatever_is_sent_and_open_tells_every_fault(world):
    faults = world("POST /users", {"username": "é"}).json["message"]
    assert faults.keys() == {"username", "password"}
    world = World(signup="closed")
    for body in ({"username": "ann", "password": PASSWORD}, {}, {"username": "é"}):
        assert world("POST /users", body).status == 403
    assert world.user("bob").is_in


def test_an_unknown_user_costs_and_tells_as_much_as_a_wrong_one(world, monkeypatch):
    hashings, scrypt = [], hashlib.scrypt

    def count(*given, **options):
        hashings.append(1)
        return scrypt(*given, **options)

    monkeypatch.setattr(hashlib, "scrypt", count)
    sign_up(world, "alice")
    hashings.clear()
    wrong = guess(world, "alice")
    assert (wrong.json["error"], len(hashings)) == ("invalid_grant", 1)
    for name in ("nobody", "é", "x" * 500):
        hashings.clear()
        answer = guess(world, name)
        assert (answer, len(hashings)) == (wrong, 1)
    fail(world, 9, "nobody")
    hashings.clear()
    assert (guess(world, "nobody").status, hashings) == (429, [])


def test_after_ten_wrong_passwords_the_wait_doubles_from_a_second_to_15_minutes(alice):
    world, waits = alice.world, []
    fail(world, 10)
    for _ in range(13):
        refused = guess(world, password=PASSWORD)  # the right one waits too
        waits.append(int(refused.headers["Retry-After"]))
        assert refused.status == 429
        assert f"{waits[-1]} s" in refused.json["error_description"]
        world.clock.step(waits[-1] - 0.5)
        assert guess(world).headers["Retry-After"] == "1"  # trying prolongs nothing
        world.clock.step(0.5)
        fail(world, 1)
    assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 900, 900, 900]
    world.clock.step(-3_600)  # a clock set back lengthens no wait, nor makes one
    assert int(guess(world).headers.get("Retry-After", 0)) <= 900
    world.clock.step(7_200)
    fail(world, 9)
    world.clock.step(-600)
    assert guess(world, password=PASSWORD).status == 200


def test_other_names_and_other_addresses_are_not_throttled(alice):
    world = alice.world
    world.user("bob")
    fail(world, 9)
    assert guess(world, password=PASSWORD).status == 200  # and the count begins anew
    fail(world, 10)
    assert guess(world, password=PASSWORD).status == 429
    assert guess(world, "bob", password=PASSWORD).status == 200
    assert guess(world, "alice", THERE, PASSWORD).status == 200
    assert guess(world, password=PASSWORD).status == 429  # that lifted nothing here
    world.clock.step(900 + 1)  # a quarter of an hour is forgiven
    fail(world, 9)
    assert guess(world, password=PASSWORD).status == 200


def test_a_wrong_password_of_somebody_logged_in_counts_like_a_failed_login(alice):
    fail(alice.world, 2)
    change = {"password": "wrong", "new_password": NEW_PASSWORD}
    for request in ["PATCH /users/me"] * 4 + ["DELETE /users/me"] * 4:
        assert alice(request, change, address=HERE).status == 400
    assert guess(alice.world, password=PASSWORD).status == 429
    for request in ("PATCH /users/me", "DELETE /users/me"):
        answer = alice(request, change | {"password": PASSWORD}, address=HERE)
        assert (answer.status, answer.headers["Retry-After"]) == (429, "1")
    assert alice("GET /users/me", address=HERE).status == 200  # tokens work


def test_guesses_at_once_are_not_more_guesses(alice):
    statuses = [each.status for each in together(18, lambda _: guess(alice.world))]
    assert {400} < set(statuses) <= {400, 429, 503}
    assert statuses.count(400) <= 11  # one may be on its way beside the tenth


def test_an_address_that_goes_through_many_names_is_throttled_for_all(world):
    for number in range(50):
        world.user(f"user{number}")
    statuses = []
    for number in range(450):
        if number % 8 == 0:  # one's own login is no licence to guess others' passwords
            guess(world, "user49", password=PASSWORD)
        statuses.append(guess(world, f"user{number // 9}").status)
    assert statuses.index(429) >= 30
    assert guess(world, "user49", password=PASSWORD).status == 429
    assert guess(world, "user49", THERE, PASSWORD).status == 200


@cases(
    "addresses, same, other",
    {
        "IPv4 with ports": ("192.0.2.1:80 192.0.2.1:81", "192.0.2.1", "192.0.2.3"),
        "a /64 of IPv6": ("2001:db8::1 2001:db8::2", "2001:DB8::f:0", "2001:db8:0:1::"),
        "IPv4 at an IPv6 socket": ("::ffff:192.0.2.1", "192.0.2.1", "::ffff:192.0.2.3"),
    },
)
def test_what_counts_as_one_client(alice, addresses, same, other):
    clients = itertools.cycle(addresses.split())
    for _ in range(10):
        fail(alice.world, 1, address=next(clients))
    assert guess(alice.world, "alice", same, PASSWORD).status == 429
    assert guess(alice.world, "alice", other, PASSWORD).status == 200


def test_the_log_names_event_user_and_address_and_no_secret(alice, caplog):
    caplog.set_level(logging.INFO, "service")
    world, seen, at = alice.world, [], {"address": HERE}

    def logged(event, answer, name="alice"):
        (line,) = events(caplog, event)
        assert (name in line, HERE in line) == (True, True)
        seen.extend(caplog.messages)
        caplog.clear()
        return answer

    logged("sign-up", sign_up(world, "ann", address=HERE), "ann")
    alice = User(world, "alice", logged("login", guess(world, password=PASSWORD)).json)
    body = {"password": "a wrong secret", "new_password": NEW_PASSWORD}
    logged("failed login", alice("PATCH /users/me", body, **at))
    body["password"] = PASSWORD
    logged("password changed", alice("PATCH /users/me", body, **at))
    alice.refresh().refresh()
    grant = {"grant_type": "refresh_token", "refresh_token": alice.refresh_token}
    logged("reuse detected", world("POST /token", grant, **at))
    pairs = [guess(world, password=NEW_PASSWORD).json for _ in range(2)]
    caplog.clear()
    logged("logout", world("POST /revoke", {"token": pairs[0]["refresh_token"]}, **at))
    last, body = User(world, "alice", pairs[1]), {"password": NEW_PASSWORD}
    logged("account deleted", last("DELETE /users/me", body, **at))
    fail(world, 10)
    caplog.clear()
    logged("throttled", guess(world, password="a wrong secret"))
    tokens = [alice.access_token, alice.refresh_token, last.refresh_token]
    for secret in (PASSWORD, NEW_PASSWORD, "a wrong secret", *tokens):
        assert secret not in "".join(seen)


@each("name", ["x\nsign-up", "x\x1b[2J", "\x85\u2028", "%s {x}", "\U000e0001" * 5_000])
def test_a_name_writes_no_log_line_of_its_own_and_no_long_one(world, caplog, name):
    caplog.set_level(logging.INFO, "service")
    guess(world, name)
    (line,) = caplog.messages
    assert line.isprintable()
    assert len(line) < 1_000


# ---- Requests and answers -----------------------------------------------------------

STARTERS = ["build an API", "?????", "profit!"]
STARTER = {f"todo{number}": {"task": task} for number, task in enumerate(STARTERS, 1)}
GREETING = {"task": "Grüße, 世界 😀"}
TRANSCRIPT: list[tuple[str, dict[str, str] | None, int, Any]] = [
    ("GET /health", None, 200, {"status": "ok"}),
    ("GET /users/me", None, 200, {"username": "alice", "roles": []}),
    ("GET /todos", None, 200, STARTER),
    ("POST /todos", {"task": "something new"}, 201, {"task": "something new"}),
    ("PUT /todos/todo3", {"task": "another"}, 201, {"task": "another"}),
    ("PUT /todos/errand", {"task": "milk"}, 201, {"task": "milk"}),
    ("PATCH /todos/errand", GREETING, 200, GREETING),
    ("DELETE /todos/todo2", None, 204, None),
    ("DELETE /todos/todo2", None, 404, {"message": "Todo todo2 doesn't exist"}),
    ("GET /todos/errand", None, 200, GREETING),
]


@each("kind", [JSON, FORM, MULTIPART])
def test_the_transcript_is_answered_the_same_for_json_and_forms(alice, kind):
    for request, sent, status, expected in TRANSCRIPT:
        is_json = sent is None or kind == JSON
        given = {"body": sent} if is_json else {"form": sent, "content_type": kind}
        answer = alice(request, **given)
        found = answer.json if answer.body else None
        assert (request, answer.status, found) == (request, status, expected)
        assert answer.headers.get("Content-Type") == (JSON if answer.body else None)
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert list(alice("GET /todos").json) == ["todo1", "todo3", "todo4", "errand"]


ITEM = b'{"task": "x"}'
HIDING = part("f", '; filename="f"', "\ufffd".encode() * 9)
NAMELESS = part("task").replace(b'; name="task"', b"")


@cases(
    "content_type, data, status",
    {
        "JSON": (JSON, ITEM, 200),
        "a merge patch": (MERGE_PATCH, ITEM, 200),
        "no arguments at all": (JSON, b"{}", 200),
        "nothing": (None, b"", 200),
        "a JSON patch that is an object": ("application/json-patch+json", ITEM, 415),
        "no type": (None, ITEM, 415),
        "a type that takes long to read": (f"{JSON}; a={'b' * 500}", ITEM, 431),
        "JSON under the type of a form": (FORM, ITEM, 400),
        "Latin-1 in a form": (FORM, b"task=caf%E9", 400),
        "a byte beside an escape": (FORM, b"task=\xc3%A9", 400),
        "a part that is cut off": (PARTS, part("task")[:-6], 400),
        "no parts": (PARTS, b"--b--\r\n", 200),
        "what hides that": (PARTS, part("task", text=b"caf\xe9")[:-7] + HIDING, 400),
        "Latin-1 in a part": (PARTS, part("task", text=b"caf\xe9"), 400),
        "Latin-1 in a part's name": (PARTS, part("caf\xe9")[:-7] + part("task"), 400),
        "no boundary": (MULTIPART, part("task"), 400),
        "another boundary": (f"{MULTIPART}; boundary=a", part("task"), 400),
        "a part without a name": (PARTS, NAMELESS, 400),
        "an upload for text": (PARTS, part("task", '; filename="a"'), 400),
        "only unknown names": (FORM, b"tusk=x", 400),
        "only unknown members": (JSON, b'{"tusk": "x"}', 400),
    },
)
def test_a_body_is_read_as_its_type_says_or_refused(alice, content_type, data, status):
    answer = alice("PATCH /todos/todo1", data, content_type=content_type)
    assert answer.status == status
    assert (MERGE_PATCH in words(answer, "Accept-Patch")) == (status == 415)
    is_changed = alice("GET /todos/todo1").json != STARTER["todo1"]
    assert is_changed == (status == 200 and data == ITEM)
    if data == ITEM and content_type == FORM:
        assert "looks like JSON" in answer.text
        assert "Content-Type: application/json" in answer.text
    if status != 200:
        for request in ("PUT /todos/todo1", "POST /todos"):
            assert alice(request, data, content_type=content_type).status == status
    elif data == ITEM:
        given = {"content_type": content_type, "content_encoding": "gzip"}
        assert alice("PATCH /todos/todo1", gzip.compress(data), **given).status == 415


class Broken(io.BytesIO):
    """A body that breaks; each server has errors of its own for that."""

    def read(self, size: int | None = -1) -> bytes:
        raise Exception("a bad chunk")

    readline = read


def chunked(data: Any) -> dict[str, Any]:
    """What a server passes on of a body whose length nobody knows before its end."""
    known = {"CONTENT_LENGTH": None, "HTTP_TRANSFER_ENCODING": "chunked"}
    return {**known, "wsgi.input": data, "wsgi.input_terminated": True}


@each("is_chunked", [False, True])
def test_a_body_over_the_limit_is_413_and_never_cut_short(is_chunked):
    alice = World(max_body=2_000).user()
    for size, status in ((2_000, 201), (2_001, 413), (4_000, 413), (100_000, 413)):
        data = b"task=x&y=" + b"z" * (size - 9)
        environ = chunked(io.BytesIO(data)) if is_chunked else None
        answer = alice("POST /todos", data, content_type=FORM, environ=environ)
        assert (size, answer.status) == (size, status)
    assert list(alice("GET /todos").json) == [*STARTER, "todo4"]


ENDLESS = chunked(io.BytesIO(b"task=x")) | {"wsgi.input_terminated": None}
WRONG_LENGTHS: dict[str, tuple[dict[str, Any], int]] = {
    "shorter than it says": ({"CONTENT_LENGTH": "14"}, 400),
    "and ended": ({"CONTENT_LENGTH": "14", "wsgi.input_terminated": True}, 400),
    "too long, by its header alone": ({"CONTENT_LENGTH": "200000"}, 413),
    "longer than any number": ({"CONTENT_LENGTH": "9" * 30}, 413),
    "without a length or an end": (ENDLESS, 411),
    "broken": ({"wsgi.input": Broken()}, 400),
    "broken on its way": (chunked(Broken()), 400),
}


@cases("environ, status", WRONG_LENGTHS)
def test_a_body_that_ends_too_soon_too_late_or_not_at_all(alice, environ, status):
    answer = alice("POST /todos", b"task=pay 10", content_type=FORM, environ=environ)
    assert (answer.status, list(answer.json)) == (status, ["message"])
    assert alice("GET /todos").json == STARTER


ALLOW = {
    "/": "GET HEAD OPTIONS",
    "/users": "OPTIONS POST",
    "/users/me": "DELETE GET HEAD OPTIONS PATCH",
    "/users/me/sessions": "DELETE GET HEAD OPTIONS",
    "/users/me/sessions/x": "DELETE OPTIONS",
    "/token": "OPTIONS POST",
    "/todos": "GET HEAD OPTIONS POST",
    "/todos/todo1": "DELETE GET HEAD OPTIONS PATCH PUT",
    "/.well-known/jwks.json": "GET HEAD OPTIONS",
}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "TRACE")


def words(answer: Answer, name: str) -> set[str]:
    """The words of a list header."""
    text = ",".join(answer.headers.getlist(name))
    return {word.strip() for word in text.split(",") if word.strip()}


@each("path", ALLOW)
def test_options_tells_anybody_what_may_be_done_and_all_else_is_405(world, path):
    allowed, options = set(ALLOW[path].split()), world(f"OPTIONS {path}")
    assert (options.status, options.body) == (204, b"")
    assert words(options, "Allow") == allowed
    patches = words(options, "Accept-Patch")
    assert ({JSON, MERGE_PATCH} <= patches) == ("PATCH" in allowed)
    for method in set(METHODS) - allowed:
        answer = world(f"{method} {path}")
        assert (answer.status, words(answer, "Allow")) == (405, allowed)
        assert answer.headers["Content-Type"] == JSON


@each("path", "/ /health /users/me /todos?limit=1 /todos/todo1 /todos/x")
def test_head_is_get_without_the_body(alice, path):
    got, head = alice(f"GET {path}"), alice(f"HEAD {path}")
    assert (head.status, head.body, head.headers) == (got.status, b"", got.headers)
    assert int(head.headers["Content-Length"]) == len(got.body) > 0


NO_PATHS = "/todos/ //todos // /todos//todo1 /todos/todo1/ /users/ /todo /Todos "
GONE = "/users/alice /%FF /./todos /todos/a/b /.well-known/oauth-authorization-server"


@each("path", NO_PATHS + GONE)
def test_every_other_path_is_404_and_nothing_is_redirected(alice, path):
    for method in ("GET", "POST", "PUT", "DELETE", "OPTIONS"):
        answer = alice(f"{method} {path}", {})
        assert (answer.status, answer.headers["Content-Type"]) == (404, JSON)


@each("path", [path for path in ALLOW if path.startswith(("/users/me", "/todos"))])
def test_401_comes_before_all_else_where_a_bearer_is_needed(alice, path):
    log_out(alice)
    for method in set(ALLOW[path].split()) - {"OPTIONS"}:
        for data, kind in ((b"{bad", JSON), (b"x" * 70_000, "a/b"), (b"", "a" * 600)):
            for credentials in (None, "Bearer junk", f"Bearer {alice.access_token}"):
                given = {"HTTP_AUTHORIZATION": credentials, "HTTP_IF_MATCH": '"stale"'}
                request = f"{method} {path}?limit=0"
                answer = alice.world(request, data, content_type=kind, environ=given)
                assert answer.status == 401
                is_told = "invalid_token" in answer.headers["WWW-Authenticate"]
                assert is_told == (credentials is not None)
    assert alice("PUT /todos/%00", TASK).status == 401


def test_all_that_a_bearer_sees_is_private_and_tokens_are_not_stored(alice):
    tag = alice("GET /todos").headers["ETag"]
    for request in ("GET /todos", "HEAD /todos", "GET /todos/x", "GET /users/me"):
        answer = alice(request, if_none_match=tag)
        assert answer.headers["Cache-Control"] == "private, no-cache"
    for path in ("/token", "/revoke"):
        answer = alice.world(f"POST {path}", form=LOGIN | {"token": "x"})
        assert (answer.status, answer.headers["Cache-Control"]) == (200, "no-store")


@pytest.mark.filterwarnings("ignore:QUERY_STRING")
def test_an_environ_may_leave_out_what_is_empty_but_http_1_1_no_host(alice):
    bare = dict.fromkeys(("QUERY_STRING", "REMOTE_ADDR"))  # as on a Unix socket
    assert alice.world("GET ", environ=bare).status == 200
    assert alice.world("POST /token", LOGIN, environ=bare).status == 200
    assert alice("GET /todos", environ={"HTTP_HOST": None}).status == 400


@cases(
    "mount, prefix",
    {
        "none": ("", ""),
        "with a blank": ("/my tools", "/my%20tools"),
        "like a host": ("//evil.example", "/evil.example"),
        "like a header": ('/a\r\nX: "<>', "/a%0D%0AX%3A%20%22%3C%3E"),
    },
)
def test_urls_in_answers_keep_the_mount_and_never_name_a_host(alice, mount, prefix):
    hosts = dict.fromkeys(("HTTP_HOST", "HTTP_X_FORWARDED_HOST"), "evil.example")
    environ = {"SCRIPT_NAME": mount, "HTTP_X_FORWARDED_PREFIX": "/evil", **hosts}
    created = alice("POST /todos", TASK, environ=environ)
    assert created.headers["Location"] == f"{prefix}/todos/todo4"
    page = alice("GET /todos?limit=2", environ=environ).headers["Link"]
    assert page.startswith(f"<{prefix}/todos?")
    index = {"openapi": f"{prefix}/openapi.json", "docs": f"{prefix}/docs"}
    assert alice.world("GET /", environ=environ).json == index
    proxied = World(proxies=1)(
        "GET /", x_forwarded_prefix="/x," * 9_000 + "//evil/"
    ).json
    assert proxied["docs"] == "/evil/docs"  # a trusted proxy says where it stands


def of(data: bytes, content_type: str = FORM) -> dict[str, Any]:
    return {"body": data, "content_type": content_type}


NASTY: dict[str, tuple[str, dict[str, Any]]] = {
    "a NUL in a path": ("GET /%00", {}),
    "an id of 8,000 letters": ("PUT /todos/" + "x" * 8_000, {"body": TASK}),
    "a query of raw bytes": ("GET /todos?x=\xff", {}),
    "a byte beside an escape": ("POST /token?x=\xc3%A9", {"form": LOGIN}),
    "8,001 quotes": ("GET /todos/todo1", {"if_none_match": '"' * 8_001}),
    "odd headers": ("GET /", {"accept": "\xff;q=nan,;;", "cookie": "a=\xff; =;;"}),
    "1,100 parts": ("POST /todos", of(part("a")[:-6] * 1_100, PARTS)),
    "a file called NUL": ("POST /todos", of(part("task", '; filename="\0"'), PARTS)),
    "another method": ("PROPFIND /todos", {}),
}


@pytest.mark.filterwarnings("ignore:Unknown REQUEST_METHOD")
@cases("request_line, options", NASTY)
def test_nothing_anyone_sends_gives_a_500(alice, request_line, options):
    answer = alice(request_line, **options)
    assert answer.status < 500
    assert answer.body == b"" or isinstance(answer.json, dict)


# Conditional requests (RFC 9110 §13): E stands for the tag of what is there.


def test_a_tag_is_strong_and_stands_for_what_is_there(alice):
    created = alice("POST /todos", TASK).headers["ETag"]
    assert re.fullmatch('"[!#-~]+"', created)
    for request, body in (("GET", None), ("HEAD", None), ("PATCH", {}), ("PUT", TASK)):
        assert alice(f"{request} /todos/todo4", body).headers["ETag"] == created
    tags = [created, alice("GET /todos?limit=1").headers["ETag"]]
    for request in ("PATCH /todos/todo1", "PUT /todos/x", "POST /todos"):
        alice(request, {"task": request})
        tags.append(alice("GET /todos").headers["ETag"])
    assert len(set(tags)) == len(tags)


READS: dict[str, tuple[str, str, set[int]]] = {
    "the tag": ("if_none_match", "E", {304}),
    "the tag, weakly": ("if_none_match", "W/E", {304}),
    "anything": ("if_none_match", "*", {304}),
    "one of several": ("if_none_match", '"a,b" ,E,W/"c"', {304}),
    "with gaps and a tab": ("if_none_match", ',"\xe9",,\t"x" , E,', {304}),
    "an empty header": ("if_none_match", "", {200}),
    "no tag": ("if_none_match", "other", {400}),
    "if it is the tag, weakly": ("if_match", "W/E", {412}),
    "if it is another": ("if_match", '"other"', {412}),
    "if it is broken": ("if_match", '"', {400, 412}),
}


@each("path", "/todos?limit=2 /todos/todo1")
@cases("header, value, statuses", READS)
def test_what_is_read_under_conditions(alice, path, header, value, statuses):
    tag = alice(f"GET {path}").headers["ETag"]
    for method in ("GET", "HEAD"):
        answer = alice(f"{method} {path}", **{header: value.replace("E", tag)})
        assert answer.status in statuses
        if answer.status in (200, 304):
            assert answer.headers["ETag"] == tag
            assert (answer.body == b"") == (answer.status == 304 or method == "HEAD")


TAGS: dict[str, tuple[str, str, bool]] = {
    "the tag": ("if_match", "E", True),
    "one of several": ("if_match", '"a,b",E ,"x"', True),
    "an empty header": ("if_match", "", True),
    "the tag, weakly": ("if_match", "W/E", False),
    "another": ("if_match", '"stale"', False),
    "half a tag": ("if_match", '"a', False),
    "not another": ("if_none_match", '"stale"', True),
    "not this one": ("if_none_match", "E", False),
    "not this one, weakly": ("if_none_match", '"a", W/E', False),
    "nothing yet": ("if_none_match", "*", False),
}


@each("method", "PUT PATCH DELETE POST")
@cases("header, value, is_good", TAGS)
def test_a_write_needs_its_condition(alice, method, header, value, is_good):
    path = "/todos" if method == "POST" else "/todos/todo1"
    tag = alice(f"GET {path}").headers["ETag"]
    answer = alice(f"{method} {path}", TASK, **{header: value.replace("E", tag)})
    assert answer.status in ((200, 201, 204) if is_good else (400, 412))
    assert is_good or alice(f"GET {path}").headers["ETag"] == tag


LAST: dict[str, tuple[str, Any, str, str | None, int]] = {
    "404 for what is not there": ("PATCH /todos/x", TASK, "*", None, 404),
    "400 for a bad body": ("PUT /todos/todo1", {}, '"x"', None, 400),
    "a new id has no tag": ("PUT /todos/x", TASK, "*", None, 412),
    "a new id": ("PUT /todos/x", TASK, "", "*", 201),
    "both must hold": ("PUT /todos/todo1", TASK, "*", "*", 412),
    "what has no tag": ("DELETE /users/me/sessions", None, '"x"', None, 412),
    "an account": ("DELETE /users/me", {"password": PASSWORD}, '"x"', None, 412),
    "both do": ("PUT /todos/todo1", TASK, "*", '"x"', 201),
}


@cases("request_line, body, match, none_match, status", LAST)
def test_conditions_come_last(alice, request_line, body, match, none_match, status):
    given = {"HTTP_IF_MATCH": match, "HTTP_IF_NONE_MATCH": none_match}
    assert alice(request_line, body, environ=given).status == status


# ---- Views --------------------------------------------------------------------------
# Tokens and sessions first, then the items of a resource, their pages, and roles.


def oauth_error(answer: Answer, status: int = 400) -> str:
    """The code of an error as RFC 6749 §5.2 has them."""
    assert (answer.status, answer.headers["Content-Type"]) == (status, JSON)
    assert answer.headers["Cache-Control"] == "no-store"
    assert answer.json.keys() == {"error", "error_description"}
    assert re.fullmatch(r"[ !#-\[\]-~]+", answer.json["error_description"])
    return str(answer.json["error"])


PARAMETERS = urlencode(LOGIN).split("&")  # grant_type, username, password
GRANT = "grant_type=refresh_token"
BAD_FORMS = ["&".join(without(dict.fromkeys(PARAMETERS), each)) for each in PARAMETERS]
BAD_FORMS += [f"{'&'.join(PARAMETERS)}&{each}" for each in PARAMETERS]
BAD_FORMS += [GRANT, f"{GRANT}&refresh_token=", f"{GRANT}{2 * '&refresh_token=a'}"]


@each("form", ["", "grant_type=", f"{PARAMETERS[0]}&username=&password=x", *BAD_FORMS])
def test_a_missing_empty_or_repeated_parameter_is_an_invalid_request(alice, form):
    answer = alice.world("POST /token", form.encode(), content_type=FORM)
    assert oauth_error(answer) == "invalid_request"
    assert len(sessions_of(alice)) == 1


def test_credentials_in_the_url_and_all_other_refusals_have_the_shape_of_oauth(world):
    for data in (b"{", b"[]", b"\xff", b"{}", b'{"grant_type": ["password"]}'):
        answer = world("POST /token", data, content_type=JSON)
        assert oauth_error(answer) == "invalid_request"
    for name in ("grant_type", "username", "password", "refresh_token"):
        answer = world(f"POST /token?{name}=x", LOGIN | {"refresh_token": "x"})
        assert oauth_error(answer) == "invalid_request"
    for form in ({}, {"token": ""}, [("token", "a"), ("token", "b")]):
        assert oauth_error(world("POST /revoke", form=form)) == "invalid_request"
    assert oauth_error(world("POST /revoke?token=a", {"token": "a"}))
    for path in ("/token", "/revoke"):
        assert oauth_error(world(f"GET {path}"), 405)
        assert oauth_error(world(f"POST {path}", b"x", content_type="text/plain"), 415)
        assert oauth_error(world(f"POST {path}", {"token": "x" * 70_000}), 413)


def test_another_grant_or_a_scope_is_refused_and_what_is_unknown_is_ignored(alice):
    for grant in ("client_credentials", "Password", " password", "é\\\n"):
        answer = alice.world("POST /token", form=LOGIN | {"grant_type": grant})
        assert oauth_error(answer) == "unsupported_grant_type"
    refresh = {"grant_type": "refresh_token", "refresh_token": alice.refresh_token}
    for grant in (LOGIN, refresh):
        answer = alice.world("POST /token", form=grant | {"scope": "admin"})
        assert oauth_error(answer) == "invalid_scope"
        more = grant | {"scope": "", "client_id": "x", "new": "1"}
        assert alice.world("POST /token?utm=1", form=more).status == 200


def test_a_user_lists_and_ends_sessions(alice):
    clock, over = alice.world.clock, sid_of(alice)
    clock.step(DAY - 60)
    bob, started = alice.world.user("bob"), int(clock())
    alice, phone, laptop = (alice.world.log_in() for _ in range(3))
    clock.step(60)  # the first is over, and not listed any more
    phone = phone.refresh()
    listed = alice("GET /users/me/sessions").json
    assert listed.keys() == {sid_of(alice), sid_of(phone), sid_of(laptop)}
    times = {"started_at": started, "renewed_at": started + 60}
    known = {**times, "expires_at": started + DAY, "is_current": False}
    assert listed[sid_of(phone)] == known
    assert listed[sid_of(alice)] == known | {"renewed_at": started, "is_current": True}
    assert alice(f"DELETE /users/me/sessions/{over}").status == 404
    assert bob(f"DELETE /users/me/sessions/{sid_of(phone)}").status == 404
    ended = alice(f"DELETE /users/me/sessions/{sid_of(phone)}")
    assert (ended.status, ended.body, is_dead(phone)) == (204, b"", True)
    assert alice(f"DELETE /users/me/sessions/{sid_of(phone)}").status == 404
    assert alice("DELETE /users/me/sessions").status == 204
    assert (is_dead(laptop), list(sessions_of(alice))) == (True, [sid_of(alice)])
    assert alice(f"DELETE /users/me/sessions/{sid_of(alice)}").status == 204
    assert (is_dead(alice), bob.is_in) == (True, True)


def post(user: User, task: str = "x") -> str:
    """The id of a new item."""
    answer = user("POST /todos", {"task": task})
    assert (answer.status, answer.json) == (201, {"task": task})
    return answer.headers["Location"].removeprefix(f"{MOUNT}/todos/")


@each("task", ["x", " ", "\n", "😀" * 10_000, "\u05e9", "\ufeff\x7f", "e\u0301"])
def test_a_task_is_1_to_10_000_characters_of_any_script(alice, task):
    data = json.dumps({"task": task}, ensure_ascii=False).encode()
    answer = alice("PUT /todos/x", data, content_type=JSON)
    assert (answer.status, answer.json) == (201, {"task": task})
    assert alice("GET /todos/x").json == {"task": task}


@each("task", ["", "y" * 10_001, "a\0b", None, True, [], {}, ["x"], 5])
def test_any_other_task_is_refused_under_its_name(alice, task):
    for request in ("POST /todos", "PUT /todos/todo1"):
        answer = alice(request, {"task": task})
        assert (answer.status, list(answer.json["message"])) == (400, ["task"])
    assert alice("GET /todos").json == STARTER
    lost = "Missing required parameter in the JSON body or the post body"
    assert alice("POST /todos?task=x").json == {"message": {"task": lost}}


def test_ids_count_up_and_are_never_given_again(alice):
    assert [post(alice) for _ in range(8)] == [f"todo{n}" for n in range(4, 12)]
    for id in ("todo11", "todo5"):
        assert alice(f"DELETE /todos/{id}").status == 204
    assert post(alice) == "todo12"
    assert alice("DELETE /todos/todo12").status == 204
    assert post(alice) == "todo13"


def test_twenty_creations_overwrite_nothing_that_a_put_chose(alice):
    chosen = [f"todo{x}" for x in ("", 4, 6, 7, 10, "016", 0, -20, "1e2", "٣", "²")]
    assert {alice(f"PUT /todos/{id}", {"task": id}).status for id in chosen} == {201}
    made = {post(alice, str(number)): {"task": str(number)} for number in range(20)}
    assert len(made) == 20
    items = {id: {"task": id} for id in chosen} | made
    assert alice("GET /todos").json == STARTER | items


@each("number", [50, 2**31 - 1, 2**53 + 1, 2**63 - 1, 10**20, 10**40 - 1])
def test_the_counter_rises_above_a_number_that_a_put_chose(alice, number):
    for id in (f"todo{number}", "todo9", f"todo{'9' * 60}"):  # but for the last
        assert alice(f"PUT /todos/{id}", TASK).status == 201
    assert alice(f"DELETE /todos/todo{number}").status == 204
    assert post(alice) == f"todo{number + 1}" != post(alice)


@each("id", ["A", "é", "😀" * 64, "x" * 64, " a", "%41", "a?b", "...", "\\", '"', "<>"])
def test_a_chosen_id_is_1_to_64_characters(alice, id):
    path = f"/todos/{quote(id)}"
    assert alice(f"PUT {path}", TASK).status == 201
    assert alice(f"GET {path}").json == TASK
    assert list(alice("GET /todos").json) == [*STARTER, id]


@each("id", [".", "..", "x" * 65, "😀" * 65, "\n", "a\tb", "\x1b", "\x7f", "\x80"])
def test_any_other_id_is_400_when_it_is_chosen_and_else_404(alice, id):
    path = f"/todos/{quote(id, safe='')}"
    assert alice(f"PUT {path}", TASK).status == 400
    assert alice(f"PUT {path}%FF", TASK).status == 400  # two would become one
    for method in ("GET", "PATCH", "DELETE"):
        answer = alice(f"{method} {path}")
        missing = {"message": f"Todo {id} doesn't exist"}
        assert (answer.status, answer.json) == (404, missing)


def test_items_of_another_user_do_not_exist(alice):
    bob = alice.world.user("bob")
    assert alice("PUT /todos/hers", {"task": "secret"}).status == 201
    for method in ("GET", "PATCH", "DELETE"):
        assert bob(f"{method} /todos/hers").status == 404
    assert bob("PUT /todos/hers", {"task": "his"}).status == 201
    assert bob("DELETE /todos/todo1").status == 204
    assert post(bob) == "todo4"
    assert alice("GET /todos").json == STARTER | {"hers": {"task": "secret"}}


def test_more_than_max_items_are_403_until_one_is_deleted():
    alice = World(max_items=4).user()
    assert alice("PUT /todos/mine", TASK).status == 201
    for request in ("POST /todos", "PUT /todos/another"):
        assert alice(request, TASK).status == 403
    assert alice("PUT /todos/mine", TASK).status == 201  # makes no more items
    for id in ("todo1", "mine"):
        assert alice(f"DELETE /todos/{id}").status == 204
        assert alice(f"DELETE /todos/{id}").status == 404
        assert [alice("POST /todos", TASK).status for _ in "12"] == [201, 403]


def next_page(link: str) -> str:
    """Where a Link leads, under the mount."""
    found = re.fullmatch(r'</api(/\w+\?[!-;=?-~]+)>; rel="next"', link)
    assert found, link
    return found[1]


def pages(user: User, path: str, meanwhile: Callable[..., Any] = id) -> list[list[str]]:
    """The ids of each page, following the links; meanwhile(ids) happens after each."""
    found = []
    while path:
        answer = user(f"GET {path}")
        assert answer.status == 200
        path = next_page(answer.headers["Link"]) if "Link" in answer.headers else ""
        found.append(list(answer.json))
        meanwhile(found[-1])
    return found


@pytest.fixture
def seven(alice):
    """A user with todo1 to todo7."""
    for _ in range(4):
        post(alice)
    return alice


@each("limit", [1, 2, 3, 6, 7, 8, 1_000])
def test_walking_the_links_brings_everything_once_in_order(seven, limit):
    ids = [f"todo{number}" for number in range(1, 8)]
    expected = [ids[at : at + limit] for at in range(0, 7, limit)]
    assert pages(seven, f"/todos?limit={limit}") == expected


def test_items_may_be_deleted_replaced_and_created_during_a_walk(seven):
    late = iter("abc")

    def meddle(ids):
        assert seven(f"PUT /todos/{ids[0]}", TASK).status == 201
        assert seven(f"DELETE /todos/{ids[-1]}").status == 204
        assert seven(f"PUT /todos/{next(late)}", TASK).status == 201

    walk = pages(seven, "/todos?limit=3", meddle)
    assert walk[0] + walk[1] == [f"todo{number}" for number in range(1, 7)]
    assert walk[2] == ["todo7", "a", "b"]


def test_the_cursor_of_a_deleted_last_item_hides_nothing_that_comes_later(seven):
    ahead = next_page(seven("GET /todos?limit=6").headers["Link"])
    for number in (6, 7):
        seven(f"DELETE /todos/todo{number}")
    assert (seven(f"GET {ahead}").json, post(seven)) == ({}, "todo8")
    assert list(seven(f"GET {ahead}").json) == ["todo8"]


@each("task", ["x" * 10_000, "😀" * 2_500])
def test_without_a_limit_all_comes_up_to_a_megabyte_and_then_the_rest(seven, task):
    answer = seven("GET /todos?unknown=1")
    assert (len(answer.json), "Link" in answer.headers) == (7, False)
    for _ in range(120):
        post(seven, task)
    assert 900_000 < len(seven("GET /todos").body) < 1_100_000
    walk = [id for page in pages(seven, "/todos") for id in page]
    assert walk == [f"todo{number}" for number in range(1, 128)]


@each("query", [f"limit={x}" for x in ("", 0, 1001, -1, 1.5, "x", "%D9%A3", "1_0")])
@each("cursor", [f"after={x}" for x in ("zz!", "%00", "%D9%A3", "1%0A")])
def test_a_limit_is_1_to_1000_and_a_cursor_one_that_a_link_gave(alice, query, cursor):
    for text in (query, cursor, query + "9" * 5_000, cursor + "9" * 5_000):
        answer = alice(f"GET /todos?{text}")
        assert (answer.status, list(answer.json["message"])) == (400, [text[:5]])


EMMA, BOOK = {"title": "Emma"}, {"title": "Ulysses"}
TITLE = service.Argument("title", required=True, help="What it is")
BOOKS = service.Resource("books", "book", [TITLE], shared="operator")


@pytest.fixture
def library():
    """Where ann, an operator, has put the first of the books that belong to all."""
    world = World(resources=[BOOKS, NOTES], max_items=3)
    assert world.user("ann", roles=["operator"])("POST /books", EMMA).status == 201
    return world


def test_roles_stand_in_the_account_and_in_access_tokens_only(world):
    plain, ann = world.user("bob"), world.user("ann", roles=["clerk", "operator"])
    assert "roles" not in opened(plain.access_token)[1]
    assert opened(ann.access_token)[1]["roles"] == ["clerk", "operator"]
    assert opened(ann.refresh().access_token)[1]["roles"] == ["clerk", "operator"]
    assert "roles" not in opened(ann.refresh_token)[1]
    assert ann("GET /users/me").json["roles"] == ["clerk", "operator"]
    eve = {"username": "eve", "password": PASSWORD, "roles": ["operator"]}
    assert world("POST /users", eve).status == 201
    assert world.log_in("eve")("GET /users/me").json["roles"] == []


def test_a_shared_list_is_one_for_all_that_only_its_role_writes(library):
    ann, bob = library.log_in("ann"), library.user("bob")
    clerk = library.user("clerk", roles=["clerk", "operators", "Operator"])
    assert ann("POST /books", BOOK).headers["Location"] == "/api/books/book2"
    assert library("GET /books").status == library("POST /books", BOOK).status == 401
    for user in (bob, clerk):
        assert user("GET /books").json == {"book1": EMMA, "book2": BOOK}
        for method in ("PUT", "PATCH", "DELETE"):
            assert user(f"{method} /books/book1", BOOK).status == 403
            answer = user("POST /books", BOOK)
            assert (answer.status, list(answer.json)) == (403, ["message"])
    assert ann("PATCH /books/book2", {"title": "Ulysses!"}).status == 200
    assert bob("GET /books/book2").json == {"title": "Ulysses!"}
    assert ann("DELETE /books/book1").status == 204
    assert list(bob("GET /books").json) == ["book2"]
    assert ann("PUT /books/book2", BOOK, if_match='"stale"').status == 412
    assert [ann("POST /books", BOOK).status for _ in range(3)] == [201, 201, 403]
    assert delete_account(ann).status == 204
    assert ann("DELETE /books/book2").status == 401
    assert pages(bob, "/books?limit=2") == [["book2", "book3"], ["book4"]]
    assert bob("GET /notes").json == NOTES.starter  # each has his own of these


# ---- Routes -------------------------------------------------------------------------
# An embedder's views are served like ours.


SUNDAYS, APP = "closed on Sundays", "https://app.example"


def read_count(request):
    """How many to-dos the bearer has"""
    with request.read() as data:
        return {"user": request.user, "count": len(data["todos"])}


def keep_first(request):
    given = parser_of(TITLE).parse_args(request)
    with request.write() as data:
        data["todos"]["todo1"] = {"task": given.title}
    return {"title": given.title}, 201


def refuse(request):
    raise Conflict("Somebody else is at it")


def break_down(request):
    return {}["missing"]


def add_claim(request):
    request.claims["aud"].append("mine")
    return request.claims["aud"]


def shut(request):
    raise HTTPException(response=Response(SUNDAYS, 403))


def reply(*value: Any) -> Callable[[Any], Any]:
    return lambda request: value[0] if len(value) == 1 else value


def an_open(rule: str, view: Callable[..., Any], status: int = 200) -> service.Route:
    return service.Route(rule, view, status, is_open=True)


ROUTES = [
    service.Route("GET /count", read_count, example={"user": "alice", "count": 3}),
    service.Route("POST /first", keep_first, 201, parser_of(TITLE), EMMA),
    service.Route("GET /claims", add_claim),
    an_open("GET /busy", refuse),
    an_open("GET /bug", break_down),
    an_open("GET /view/<int:number>/<path:rest>", lambda request, **found: found),
    an_open("GET /file", lambda request: Response("1,x", 203, mimetype="text/csv")),
    an_open("GET /shop", shut),
    an_open("GET /list", reply([1, "two", None])),
    an_open("GET /none", reply(None)),
    an_open("GET /tea", reply({"short": "stout"}, 418, {"X-Kind": "pot"})),
    an_open("DELETE /shelf/", reply(None, 204), 204),
]


@pytest.fixture
def host():
    return World(routes=ROUTES, cors_origins=APP)


@cases(
    "request_line, status, content_type, text",
    {
        "a tuple with headers": ("GET /tea", 418, JSON, '{"short": "stout"}\n'),
        "a list": ("GET /list", 200, JSON, '[1, "two", null]\n'),
        "None": ("GET /none", 200, JSON, "null\n"),
        "no body": ("DELETE /shelf/", 204, None, ""),
        "a Response": ("GET /file", 203, "text/csv; charset=utf-8", "1,x"),
        "an error with one": ("GET /shop", 403, "text/plain; charset=utf-8", SUNDAYS),
        "an error": ("GET /busy", 409, JSON, '{"message": "Somebody else is at it"}\n'),
        "arguments": ("GET /view/7/a/b", 200, JSON, '{"number": 7, "rest": "a/b"}\n'),
        "a slash too many": ("GET /tea/", 404, JSON, "*"),
    },
)
def test_a_view_answers_in_many_ways(host, request_line, status, content_type, text):
    answer = host(request_line)
    assert (answer.status, answer.headers.get("Content-Type")) == (status, content_type)
    assert text in ("*", answer.text)
    if request_line == "GET /tea":
        head = host("HEAD /tea")
        assert (head.status, head.body, head.headers) == (status, b"", answer.headers)
        assert answer.headers["X-Kind"] == "pot"


def test_a_view_that_is_not_open_sees_its_user_and_the_users_data(host):
    alice, bob = host.user("alice"), host.user("bob")
    assert alice("GET /count").json == {"user": "alice", "count": 3}
    assert alice("POST /first", EMMA).json == EMMA
    assert alice("GET /todos/todo1").json == {"task": "Emma"}
    assert bob("GET /todos/todo1").json == STARTER["todo1"]
    assert list(alice("POST /first", {"titel": "Emma"}).json["message"]) == ["title"]
    assert alice("GET /claims").json == alice("GET /claims").json == [ISSUER, "mine"]
    for data, kind, code in ((b"x", "a", 415), (b"{}", FORM, 400), (b"t", PARTS, 400)):
        assert alice("POST /first", data, content_type=kind).status == code
    for request in ("GET /count", "POST /first"):
        assert host(request, b"{bad", content_type=JSON).status == 401
    log_out(alice)
    assert (alice("GET /count").status, alice("POST /first", EMMA).status) == (401, 401)


BUGS = [break_down, lambda request: abort(409, [5]), reply({1}), reply({}, 99)]
BUGS += [reply({}, 200, {name: value}) for name, value in (("X", "Ł"), ("X Y", "a"))]


@each("view", BUGS)
def test_a_bug_in_a_view_is_a_json_500_with_a_traceback_in_the_log(view, caplog):
    bug = an_open("GET /bug/<rest>", lambda request, rest: view(request))
    answer = World(routes=[bug], cors_origins=APP)("GET /bug/a%0Alogin", origin=APP)
    assert (answer.status, list(answer.json)) == (500, ["message"])
    assert answer.headers["Content-Type"] == JSON
    assert answer.headers["Access-Control-Allow-Origin"] == APP
    assert ("Error" in answer.text, "Error" in caplog.text) == (False, True)
    assert "\n" not in caplog.messages[0]


def test_a_rule_of_ours_is_replaced_by_an_open_view_that_reads_what_is_shared(library):
    def read_titles(request):
        with request.app.store.read(service.SHARED) as data:
            return [book["title"] for book in data["books"].values()]

    routes = [*ROUTES, an_open("GET /", read_titles)]
    for _ in range(2):  # the same routes serve two apps
        world = World(library.store, resources=[BOOKS], routes=routes)
        assert world("GET /").json == ["Emma"]


# ---- OpenAPI ------------------------------------------------------------------------
# The basics; tests/test_contract.py asks the programs that read such documents.


def test_every_route_is_described_and_says_whether_it_needs_a_bearer(host):
    document = host("GET /openapi.json", environ={"SCRIPT_NAME": "/a b"}).json
    assert document["servers"] == [{"url": "/a%20b"}]
    found = {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }
    for path, allowed in ALLOW.items():
        path = path.replace("todo1", "{id}").replace("/x", "/{sid}")
        for method in set(allowed.split()) - {"HEAD", "OPTIONS"}:
            assert path == "/openapi.json" or f"{method} {path}" in found
    ids = [operation["operationId"] for operation in found.values()]
    assert len(set(ids)) == len(ids)
    for name, operation in found.items():
        answer = host(name.replace("{number}", "1").replace("{", "").replace("}", ""))
        assert bool(operation["security"]) == (answer.status == 401), name
    count, first = found["GET /count"], found["POST /first"]
    assert (count["summary"], "201" in first["responses"]) == (read_count.__doc__, True)
    view = found["GET /view/{number}/{rest}"]["parameters"]
    assert [each["name"] for each in view] == ["number", "rest"]


def test_without_its_package_the_page_is_404_and_names_it(world, monkeypatch):
    monkeypatch.setitem(sys.modules, "flask_swagger_ui", None)
    answer = world("GET /docs")
    assert answer.status == 404
    assert "flask-swagger-ui" in answer.json["message"]
    assert "todo-service" not in answer.text
    assert world("GET /", accept="text/html").status == 200


# ---- Application --------------------------------------------------------------------
# What holds for every answer, and for the pages of other origins.

EXPOSED = {"ETag", "Link", "Location", "Retry-After", "WWW-Authenticate"}
PORT, LOCAL = "http://a.example:81", "http://[::1]:5173"
REFUSED_ORIGINS = [None, "null", "", "https://other.example", f"{APP}.evil.example"]
REFUSED_ORIGINS += ["https://evil-app.example", "http://app.example", f"{APP}:8443"]


@cases(
    "setting, origin, allowed",
    {
        "none is listed": ("", APP, None),
        "all are": ("*", APP, "*"),
        "this one is": (APP, APP, APP),
        "the second of a list": (f"{APP}, {PORT}", PORT, PORT),
        "written with capitals and port": ("https://App.Example:443/", APP, APP),
        "an IPv6 address": (f"{APP},{LOCAL}", LOCAL, LOCAL),
    }
    | {f"not {origin}": (APP, origin, None) for origin in REFUSED_ORIGINS},
)
def test_every_answer_tells_a_listed_origin_so(setting, origin, allowed):
    world = World(cors_origins=setting, routes=ROUTES)
    for request in ("GET /", "GET /todos", "POST /token", "GET /x", "GET /bug"):
        answer = world(request, environ={"HTTP_ORIGIN": origin})
        assert answer.headers.get("Access-Control-Allow-Origin") == allowed
        assert ("Origin" in words(answer, "Vary")) == (setting not in ("", "*"))
        assert "Access-Control-Allow-Credentials" not in answer.headers
        exposed = words(answer, "Access-Control-Expose-Headers")
        assert exposed == (EXPOSED if allowed else set())


@each("setting", ["*", APP])
def test_a_preflight_allows_all_methods_and_the_headers_it_asks_for(setting):
    world, method = World(cors_origins=setting), "access_control_request_method"
    headers = {"access_control_request_headers": "authorization,if-match,traceparent"}
    asked = {method: "PATCH", **headers}
    answer = world("OPTIONS /todos", origin=APP, **asked)
    assert (answer.status, answer.body) == (204, b"")
    assert answer.headers["Access-Control-Allow-Origin"] == setting
    assert words(answer, "Access-Control-Allow-Methods") == set(METHODS) - {"TRACE"}
    allowed = words(answer, "Access-Control-Allow-Headers")
    assert {"authorization", "if-match", "traceparent"} <= allowed
    assert answer.headers["Access-Control-Max-Age"] == "600"
    stranger = world("OPTIONS /todos", origin="https://other.example", **asked)
    assert ("Access-Control-Allow-Methods" in stranger.headers) == (setting == "*")
    assert world("OPTIONS /nothing", origin=APP, **asked).status == 404


# ---- Guard --------------------------------------------------------------------------
# What another service mounts in front of itself; here both share the secret.


def who(environ: dict[str, Any], start_response: Any) -> list[bytes]:
    """An app that says whom it sees."""
    start_response("200 OK", [("Content-Type", JSON)])
    names = ("REMOTE_USER", "AUTH_TYPE", "HTTP_REMOTE_USER", "service.claims")
    seen = json.dumps([environ.get(name) for name in names]).encode()
    environ.get("service.claims", {"aud": []})["aud"].append("what the app adds")
    return [seen] if environ["REQUEST_METHOD"] != "HEAD" else []


NOBODY = [None, None, None, None]


class Guarded(World):
    """The same harness around another app behind a guard."""

    def __init__(self, clock: Clock, **options: Any) -> None:
        given = {"issuer": ISSUER, "audience": ISSUER, "secret": SECRET, "clock": clock}
        self.app = service.guard(
            who, **{"open_paths": ["/health", "/é"], **given, **options}
        )


@pytest.fixture
def guarded(world):
    return Guarded(world.clock)


def seen_by(guarded: World, user: User, request: str = "GET /", **more: Any) -> Answer:
    return guarded(request, authorization=f"Bearer {user.access_token}", **more)


def test_without_a_good_token_the_guard_answers_401(alice, guarded):
    for credentials in (None, "Basic YTpi", "token x"):
        given = {"HTTP_AUTHORIZATION": credentials, "HTTP_ORIGIN": APP}
        answer = guarded("GET /", environ=given)
        assert (answer.status, list(answer.json)) == (401, ["message"])
        assert re.fullmatch('Bearer realm="[^"]+"', answer.headers["WWW-Authenticate"])
        assert answer.headers["Access-Control-Allow-Origin"] in ("*", APP)
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "WWW-Authenticate" in words(answer, "Access-Control-Expose-Headers")
    token = alice.access_token
    odd = [altered(token, sub=name) for name in ("", "a\nb")]
    for bad in ("", *odd, token[:-4], alice.refresh_token):
        bearer = f"Bearer {bad}".encode().decode("latin-1")
        answer = guarded("GET /", authorization=bearer)
        assert (answer.status, list(answer.json)) == (401, ["message"])
        assert 'error="invalid_token"' in answer.headers["WWW-Authenticate"]
    assert (guarded("HEAD /").status, guarded("HEAD /").body) == (401, b"")
    for wrong in ({"issuer": OTHER}, {"audience": OTHER}, {"secret": OTHER_SECRET}):
        assert seen_by(Guarded(alice.world.clock, **wrong), alice).status == 401


def test_nobody_can_say_himself_who_he_is(alice, guarded):
    forged = {"REMOTE_USER": "root", "AUTH_TYPE": "Basic", "HTTP_REMOTE_USER": "root"}
    forged["service.claims"] = {"sub": "root"}
    preflight = {"HTTP_ORIGIN": APP, "HTTP_ACCESS_CONTROL_REQUEST_METHOD": "PUT"}
    assert guarded("GET /", environ=forged).status == 401
    assert guarded("GET /health", environ=forged).json == NOBODY
    assert guarded("OPTIONS /", environ=forged | preflight).json == NOBODY
    assert guarded("OPTIONS /", environ=forged).status == 401
    assert {guarded(f"{each} /", environ=preflight).status for each in METHODS} == {401}
    for _ in range(2):  # what the app does to the claims is forgotten
        seen = ["alice", "Bearer", None, opened(alice.access_token)[1]]
        assert seen_by(guarded, alice, environ=forged).json == seen
    assert seen_by(guarded, alice, "GET /health", environ=forged).json == NOBODY


@each("path", "/health/ //health /healthz /Health /health/x /x/health /health%00 /")
def test_only_the_very_paths_that_are_named_are_open(guarded, path):
    assert guarded(f"GET {path}").status == 401
    assert guarded("GET /health?x=1").status == guarded("GET /%68ealth").status == 200
    assert guarded("GET /%C3%A9").status == 200


BAD_KEYS = [{"secret": None}, {"secret": ""}, {"secret": "short"}, {"jwks_url": ISSUER}]


BAD_KEYS += [{"issuer": "todo.example"}, {"open_paths": "/health"}, {"audience": ""}]


@each("options", BAD_KEYS)
def test_a_guard_that_could_not_guard_is_not_made(options):
    with pytest.raises((ValueError, TypeError)):
        Guarded(Clock(), **options)


# ---- Main ---------------------------------------------------------------------------
# python service.py adduser, passwd and deluser, for closed sign-up and lost passwords.


@pytest.fixture
def operate(tmp_path, monkeypatch):
    """operate("adduser bob", "a password", **app options): the world after that."""
    clock, url = Clock(), f"sqlite:///{tmp_path}/todo.db"

    def run(command: str, password: str = "", **options: Any) -> World:
        store = options.pop("store", None) or service.open_store(url)
        world = World(store=store, clock=clock, signup="closed", **options)
        monkeypatch.setattr(sys, "argv", ["service.py", *command.split()])
        monkeypatch.setattr(sys, "stdin", io.StringIO(password + "\n"))
        service.main(world.app)
        return world

    return run


def test_accounts_are_made_mended_and_deleted_by_hand(operate):
    with pytest.raises(SystemExit, match="SERVICE_STORE_URL"):  # nothing would be left
        operate("adduser ann", PASSWORD, store=service.MemoryStore())
    world = operate("adduser --role b Ann --role a", PASSWORD, resources=[NOTES])
    ann = world.log_in("ann")
    assert ann("GET /users/me").json["roles"] == ["a", "b"]
    assert ann("GET /notes").json == NOTES.starter
    world = operate("passwd ann", NEW_PASSWORD)
    assert is_dead(ann)
    ann = world.log_in("ann", NEW_PASSWORD)
    world = operate("deluser ann")
    assert is_dead(ann)
    assert world.owned("ann") == {"account": {"hash": None}}
