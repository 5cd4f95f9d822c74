"""A to-do service with tokens: a complete REST service in one file.

People sign up, log in, and keep a to-do list over plain HTTP. A login gives two
tokens: the access token opens the service for 15 minutes, the refresh token buys
the next pair, for 24 hours. `gunicorn` deploys it; `python service.py` is for
development. Then:

    curl localhost:5000/users -d username=alice -d 'password=correct horse battery'
    curl localhost:5000/token -d grant_type=password -d username=alice -d 'password=…'

Read it from top to bottom; each room uses only what stands above it:

    Settings · Errors · Arguments · Stores · Tokens · Sessions · Passwords
    Requests and answers · Views · Routes · OpenAPI · Application · Guard · Main
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import hmac
import ipaddress
import json
import logging
import math
import os
import re
import secrets
import sqlite3
import sys
import threading
import time
import unicodedata
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from datetime import date as Date
from datetime import time as Time
from decimal import Decimal
from functools import cache, lru_cache, partial
from getpass import getpass
from html import escape
from importlib.util import find_spec
from io import BytesIO
from itertools import accumulate, chain, islice
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import parse_qsl, quote
from uuid import UUID

import jwt
import werkzeug
from jwt.utils import base64url_encode
from werkzeug import Response
from werkzeug import exceptions as http
from werkzeug.datastructures import FileStorage, Headers, MultiDict
from werkzeug.formparser import FormDataParser
from werkzeug.http import HTTP_STATUS_CODES
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.routing import Map, RequestRedirect, Rule
from werkzeug.security import check_password_hash, generate_password_hash
from werkzeug.serving import run_simple
from werkzeug.utils import cached_property, send_from_directory

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

log = logging.getLogger("service")
Clock = Callable[[], float]  # the time in seconds since 1970; tests pass their own


# ---- Settings ----------------------------------------------------------------------
# One frozen value holds every setting. It is checked as it is made, so whoever holds
# one holds a good one. Nothing else looks at the environment.


STORE_URL = r"sqlite:///(?!:|//)[^\x00-\x1f]*[^\x00-\x1f/]|postgresql://[^\x00-\x1f]+"


@dataclass(frozen=True)
class Settings:
    """What an operator chooses. ValueError, in one line, names what cannot be."""

    secret_key: str = field(default="", repr=False)  # of several, the first signs
    store_url: str = field(default="memory:", repr=False)
    access_ttl: int = 900  # seconds
    refresh_ttl: int = 86_400  # seconds from login to login, whatever is refreshed
    refresh_grace: int = 30  # seconds for which a superseded refresh token is forgiven
    signup: str = "open"
    issuer: str = "http://localhost:5000"
    audience: str = ""  # the issuer unless given
    signing_key_file: str = ""  # of several, the first signs access tokens
    cors_origins: str = ""
    max_body: int = 65_536  # bytes
    max_items: int = 10_000  # of one resource, a user
    proxies: int = 0

    def __post_init__(self) -> None:
        keys, in_memory = comma_list(self.secret_key), self.store_url == "memory:"
        # Each begins with its setting's name; what is truthy is good.
        rules: dict[str, Any] = {
            "SECRET_KEY must be set to 32 bytes or more: openssl rand -hex 32": (
                (keys or (in_memory and not self.secret_key))
                and all(len(key.encode()) >= 32 for key in keys)
            ),
            "STORE_URL must be memory:, sqlite:///todo.db"
            " or postgresql://user:password@host/name": (
                in_memory or re.fullmatch(STORE_URL, self.store_url)
            ),
            "ACCESS_TTL must be seconds such as 900": 0 < self.access_ttl < 10**6,
            "REFRESH_TTL must be seconds such as 86400": 0 < self.refresh_ttl < 10**8,
            "REFRESH_GRACE must be seconds such as 30": 0 <= self.refresh_grace < 1000,
            "SIGNUP must be open or closed": self.signup in ("open", "closed"),
            "ISSUER must be the URL that clients use, such as https://todo.example": (
                re.fullmatch(r'https?://[^\s/?#,"\\][^\s?#,"\\]{0,200}', self.issuer)
            ),
            "AUDIENCE must be a name such as https://todo.example, or several": (
                re.fullmatch(r"[ !#-\[\]-~]{0,1000}", self.audience)
            ),
            "SIGNING_KEY_FILE must name PEM files such as key.pem": True,
            "CORS_ORIGINS must be * or origins such as https://app.example:8443": (
                self.origins == ["*"] or all(map(normal_origin, self.origins))
            ),
            "MAX_BODY must be bytes such as 65536": 100 <= self.max_body < 10**9,
            "MAX_ITEMS must be a number such as 10000": 0 < self.max_items < 10**7,
            "PROXIES must be how many are in front, such as 1": 0 <= self.proxies < 10,
        }
        for rule, is_good in rules.items():
            text = str(getattr(self, rule.partition(" ")[0].lower()))
            parts = comma_list(text)
            # Bytes that are not UTF-8 came as surrogates: not printable.
            is_text = "".join(parts).isprintable() and (parts or not text)
            if not (is_good and is_text):
                raise ValueError(f"SERVICE_{rule}")

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """SERVICE_ACCESS_TTL=60 sets access_ttl; an empty variable counts as none."""
        given: dict[str, Any] = {}
        for setting in fields(cls):
            name, example = f"SERVICE_{setting.name.upper()}", setting.default
            text = environ.get(name, "")
            if text:
                is_number = isinstance(example, int)
                given[setting.name] = number(name, text, example) if is_number else text
        return cls(**given)

    @property
    def origins(self) -> list[str]:
        """The origins whose pages may use the service, or ["*"]."""
        return [normal_origin(text) or text for text in comma_list(self.cors_origins)]


def port(environ: Mapping[str, str] = os.environ) -> int:
    """PORT, by which hosts say where to listen; 5000 without it."""
    return number("PORT", environ.get("PORT") or "5000", 5000, most=65535)


def number(variable: str, text: str, example: Any, most: int = 999_999_999) -> int:
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) > most:
        raise ValueError(f"{variable} must be a number such as {example}, not {text!r}")
    return int(text)


def normal_origin(text: str) -> str:
    """An origin as browsers send it (RFC 6454 §6.2); "" for what none can send.

    >>> normal_origin("https://App.Example:443")
    'https://app.example'
    """
    hosts = r"[a-z0-9_-]+(?:\.[a-z0-9_-]+)*|\[[0-9a-f:]+\]"
    form = re.fullmatch(f"(https?)://({hosts})(:[1-9][0-9]{{0,4}})?/?", text.lower())
    if not form:
        return ""
    scheme, host, after_colon = form.groups("")
    try:
        if host.startswith("["):
            host = f"[{ipaddress.IPv6Address(host[1:-1])}]"
        if int(after_colon[1:] or 0) > 65535:
            raise ValueError
    except ValueError:
        return ""
    is_default = (scheme, after_colon) in (("http", ":80"), ("https", ":443"))
    return f"{scheme}://{host}{'' if is_default else after_colon}"


def comma_list(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


# ---- Errors ------------------------------------------------------------------------
# Whatever goes wrong is an exception that knows its status. Werkzeug has most of them;
# these say what it has no word for. Only the application turns them into answers.


class Refusal(http.BadRequest):
    """400 with a body of its own, such as {"message": {"task": "Must be text"}}."""

    def __init__(self, **data: Any) -> None:
        message = data.get("message", "")
        if isinstance(message, dict):
            message = "; ".join(f"{name}: {text}" for name, text in message.items())
        super().__init__(message)
        self.data = data


class InvalidToken(http.Unauthorized):
    """A token that proves nothing."""

    oauth_error = "invalid_grant"


class WrongPassword(Refusal):
    """400 for somebody who is logged in, invalid_grant for somebody who logs in."""

    oauth_error = "invalid_grant"


# ---- Arguments ---------------------------------------------------------------------
# A RequestParser holds Arguments. Each looks for its name in parts of the request,
# converts what it finds, and gives a clean value or says what would be right; the
# names are those that flask-restful users know. A Resource is a data model: a name,
# and the arguments that make up one item.

PLACES = {  # a part of the request, and what an error calls it
    "json": "the JSON body",
    "form": "the post body",
    "args": "the query string",
    "headers": "the HTTP headers",
    "cookies": "the request's cookies",
    "files": "an uploaded file",
}
JSON_OR_FORM = ("json", "form")
URLENCODED, MULTIPART = "application/x-www-form-urlencoded", "multipart/form-data"
FORM_TYPES = (URLENCODED, MULTIPART)
MISSING: Any = object()
REMOVED: Any = object()  # by null, from an item that does not store what is missing


class Namespace(dict[str, Any]):
    """Parsed arguments: a dict whose keys are attributes too."""

    __setattr__ = dict.__setitem__

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]


@dataclass(eq=False)
class RequestParser:
    """Takes arguments out of any Werkzeug request, as flask-restful's reqparse does.

    >>> from werkzeug.test import EnvironBuilder
    >>> parser = RequestParser().add_argument("task").add_argument("rank", type=int)
    >>> form = EnvironBuilder(data={"task": "x", "rank": "2"})
    >>> parser.parse_args(werkzeug.Request(form.get_environ()))
    {'task': 'x', 'rank': 2}

    trim strips blanks around text; bundle_errors reports all errors at once. Parsers do
    not nest: for an object inside the body, give the argument a type that takes a dict.
    """

    trim: bool = False
    bundle_errors: bool = False
    args: list[Argument] = field(default_factory=list)

    def add_argument(self, name: str | Argument, **options: Any) -> RequestParser:
        """Add an Argument, or the one that Argument(name, **options) makes."""
        made = name if isinstance(name, Argument) else Argument(name)
        self.args.append(replace(made, **options))
        return self

    def replace_argument(self, name: str, **options: Any) -> RequestParser:
        """Put a new argument in the place of the one of that name."""
        new = Argument(name, **options)
        self.args = [new if each.name == name else each for each in self.args]
        return self

    def remove_argument(self, name: str) -> RequestParser:
        """Take out the argument of that name."""
        self.args = [each for each in self.args if each.name != name]
        return self

    def copy(self) -> RequestParser:
        """An independent parser with the same arguments and options."""
        return replace(self, args=[replace(each) for each in self.args])

    def parse_args(
        self, request: werkzeug.Request, strict: bool = False, partial: bool = False
    ) -> Namespace:
        """The clean values.

        strict refuses every name in the body and the query string that no argument
        reads; partial gives only what was sent, and requires nothing.

        Raises BadRequest with data {"message": {name: text}}, or {"message": text} for
        a body that cannot be read.
        """
        return self.clean(Parts(request), strict, partial)

    def clean(
        self, parts: Mapping[str, Any], strict: bool = False, partial: bool = False
    ) -> Namespace:
        """What parse_args gives, of the parts of a request by place."""
        values, errors = Namespace(), dict[str, str]()
        if strict:
            known = {(place, each.name) for each in self.args for place in each.places}
            for place in ("json", "form", "files", "args"):
                unknown = [name for name in parts[place] if (place, name) not in known]
                errors |= dict.fromkeys(unknown, "Unknown argument")
        for each in self.args:
            try:
                value = each.find(parts, self.trim, partial)
            except ValueError as error:
                text = each.help or "{error_msg}"
                errors[each.name] = text.replace("{error_msg}", str(error))
                if not self.bundle_errors:
                    break
            else:
                name = each.dest or each.name
                if value is not MISSING:
                    values[name] = value
                elif each.store_missing and not partial:
                    values.setdefault(name, each.make_default())
        if errors:
            raise Refusal(message=errors)
        return values


@dataclass
class Argument:
    """One argument: where it is looked for, how it is converted, its default.

    >>> Argument("done", type=bool).convert("False")
    False
    >>> Argument("price", type=Decimal).convert(0.1)
    Decimal('0.1')

    type is called once, with the value; ValueError, TypeError, ArithmeticError, failed
    look-ups and endless recursion become the argument's error. The types in STRICT are
    read strictly. What a type has as __schema__ describes it, as JSON Schema.
    """

    name: str
    type: Callable[[Any], Any] = str
    required: bool = False
    default: Any = None  # a value, never converted, or a function that makes one
    choices: Collection[Any] = ()
    location: str | Iterable[str] = ("json", "form", "args")  # the first with the name
    action: str = "store"  # the first value; append: all, in a list; split: at commas
    dest: str | None = None
    help: str | None = None  # in place of the error; {error_msg} in it is the error
    nullable: bool | None = None  # None: null is not given, or an error if required
    trim: bool | None = None  # None: what the parser says
    store_missing: bool = True
    case_sensitive: bool = True  # if not, values and choices are lowered
    is_kept: bool = False  # in an item, so what JSON cannot hold is refused

    def __post_init__(self) -> None:
        if not isinstance(self.location, str):
            self.location = " ".join(self.location)
        self.places = self.location.replace("values", "args form").split()
        are_places = set(self.places) <= PLACES.keys()
        is_action = self.action in ("store", "append", "split")
        if not (are_places and is_action and callable(self.type)):
            raise ValueError(
                f"{self.name}: locations are {', '.join(PLACES)} and values,"
                " actions are store, append and split, and a type is a function"
            )
        self.kind = self.type
        if isinstance(self.type, type):
            self.kind = STRICT.get(self.type, self.type)
        if not isinstance(self.choices, range):
            self.choices = [self.lowered(each) for each in self.choices]

    def find(self, parts: Mapping[str, Any], trim: bool, partial: bool) -> Any:
        """The value, or the list of values, or MISSING; ValueError for the sender."""
        place = self.place_in(parts)
        if place is None:
            if self.required and not partial:
                places = [words for key, words in PLACES.items() if key in self.places]
                raise ValueError(f"Missing required parameter in {' or '.join(places)}")
            return MISSING
        part = parts[place]
        values = [part[self.name]] if place == "json" else part.getlist(self.name)
        # Null is not given: missing in a whole body; in a PATCH the default, or gone.
        if values == [None] and self.nullable is None and not self.required:
            if not partial:
                return MISSING
            is_removed = self.is_kept and not self.store_missing
            return REMOVED if is_removed else self.make_default()
        trim = trim if self.trim is None else self.trim
        if self.action == "store" or values == [None]:
            return self.convert(values[0], trim)
        if isinstance(values[0], list):
            values = values[0]
        elif self.action == "split" and isinstance(values[0], str):
            values = [word for text in values if text for word in text.split(",")]
        return [self.convert(value, trim) for value in values]

    def place_in(self, parts: Mapping[str, Any]) -> str | None:
        """The first place that holds the name."""
        return next((place for place in self.places if self.name in parts[place]), None)

    def make_default(self) -> Any:
        """The default, never the same list twice."""
        return self.default() if callable(self.default) else copy.deepcopy(self.default)

    def convert(self, value: Any, trim: bool = False) -> Any:
        """One clean value; ValueError with the text for the sender."""
        if value is None:
            if not self.nullable:
                raise ValueError("Must not be null!")
            return None
        value = value.strip() if trim and isinstance(value, str) else value
        try:
            value = self.kind(self.lowered(value))
            if self.is_kept:
                to_json(value).encode()  # ValueError for half of a surrogate pair
                refuse_absurd_depth(value)
        except BAD_VALUE as error:
            text = str(error) if isinstance(error, ValueError) else ""
            raise ValueError(text or "Invalid value") from None
        if self.choices and value not in self.choices:
            known: Iterable[Any] = self.choices
            if isinstance(known, range) and known[100:]:
                known = [known[0], known[1], "...", known[-1]]
            right = ", ".join(map(str, known))
            raise ValueError(f"{value} is not a valid choice: use {right}")
        return value

    def lowered(self, value: Any) -> Any:
        is_text = isinstance(value, str) and not self.case_sensitive
        return value.lower() if is_text else value

    @property
    def schema(self) -> dict[str, Any]:
        """What one value must be, or a list of them, as JSON Schema."""
        schema = dict(getattr(self.kind, "__schema__", {}))
        if isinstance(self.choices, range) and self.choices[100:]:
            ends = sorted([self.choices[0], self.choices[-1]])
            schema |= {"minimum": ends[0], "maximum": ends[1]}
        elif self.choices:
            schema["enum"] = list(self.choices)
        if self.action != "store":
            schema = {"type": "array", "items": schema}
        return schema | ({"description": self.help} if self.help else {})


BAD_VALUE = (
    ValueError,
    TypeError,
    ArithmeticError,
    AttributeError,
    LookupError,
    StopIteration,
    RecursionError,
    re.error,
)
TRUE, FALSE = ("true", "1", "on"), ("false", "0", "off")
DIGITS = re.compile(r"[+-]?[0-9]{1,4300}")
DECIMAL = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]{1,3})?")


@dataclass(frozen=True)
class Strict:
    """A built-in type without the surprises of calling it, such as bool("False")."""

    type: Any
    words: str  # for an error
    __schema__: dict[str, Any]

    def __call__(self, value: Any) -> Any:
        kind, text = self.type, str(value).strip()
        if kind in (str, FileStorage) and isinstance(value, FileStorage):
            return value  # an upload is itself, unless another type is given
        if kind is str and not isinstance(value, bool | list | dict):
            str(value).encode()  # ValueError for half of a surrogate pair
            return str(value)
        if kind is int and DIGITS.fullmatch(text):
            return int(text)
        if kind is Decimal and DECIMAL.fullmatch(text):
            return Decimal(text)
        if kind is float and DECIMAL.fullmatch(text) and math.isfinite(float(text)):
            return float(text)
        if kind is bool and text.lower() in TRUE + FALSE:
            return text.lower() in TRUE
        if kind in (list, dict) and isinstance(value, kind):
            return value
        raise ValueError(f"Must be {self.words}")


STRICT = {
    each.type: each
    for each in (
        Strict(str, "text", {"type": "string"}),
        Strict(int, "an integer", {"type": "integer"}),
        Strict(float, "a number", {"type": "number"}),
        Strict(bool, "true or false", {"type": "boolean"}),
        Strict(list, "a list", {"type": "array", "items": {}}),
        Strict(dict, "an object", {"type": "object"}),
        Strict(Decimal, "a decimal number", {"type": "string", "format": "decimal"}),
        Strict(FileStorage, "a file", {"type": "string", "format": "binary"}),
    )
}


class Parts(dict[str, Any]):
    """The parts of a request by their place, each read when it is asked for.

    Raises BadRequest for what is not whole, not in UTF-8, or not strict JSON.
    """

    def __init__(self, request: werkzeug.Request) -> None:
        self._request = request
        # What was read stays with the request: its body is read once.
        self._read: dict[str, Any] = vars(request).setdefault("_parts", {})

    def __missing__(self, place: str) -> Any:
        if place not in self._read:
            try:
                self._read |= read_part(self._request, place)
            except ValueError:
                text = f"Could not read {PLACES[place]}: send it whole, in UTF-8"
                raise Refusal(message=text) from None
        self[place] = part = self._read[place]
        return part


def read_part(request: werkzeug.Request, place: str) -> dict[str, Any]:
    """One part, or form and files together, by place."""
    if place == "json":
        return {place: read_json(request.get_data()) if request.is_json else {}}
    if place == "args":
        return {place: read_pairs(request.query_string)}
    if place in ("form", "files"):
        form, files = read_form(request)
        return {"form": form, "files": files}
    return {place: getattr(request, place)}


def read_pairs(text: bytes) -> MultiDict[str, str]:
    """Werkzeug would decode any byte to something, and forget what it was."""
    return MultiDict(parse_qsl(text.decode(), keep_blank_values=True, errors="strict"))


def read_form(request: werkzeug.Request) -> tuple[Any, Any]:
    """Texts and files. Of a form that is cut off or undecodable, nothing is taken."""
    body = request.get_data()
    if request.mimetype == URLENCODED and body:
        return read_pairs(body), MultiDict()
    if request.mimetype == MULTIPART and body:
        return read_multipart(request, body)
    if request.mimetype in FORM_TYPES:
        return request.form, request.files  # which somebody has read before
    return MultiDict(), MultiDict()


def read_multipart(request: werkzeug.Request, body: bytes) -> tuple[Any, Any]:
    most, parts = request.max_form_memory_size, request.max_form_parts
    parser = FormDataParser(upload_buffer, most, silent=False, max_form_parts=parts)
    options, sent = request.mimetype_params, "\ufffd".encode()
    _, form, files = parser.parse(BytesIO(body), MULTIPART, len(body), options)
    # U+FFFD stands for what could not be decoded, or was sent; without what was sent,
    # none may be left.
    if "\ufffd" in "".join(filter(None, chain(*form.items(multi=True)))):
        if sent not in body:
            raise ValueError
        read_multipart(request, body.replace(sent, b"?"))
    return form, files


def upload_buffer(*_: Any, **__: Any) -> BytesIO:
    return BytesIO()  # for an upload, as the whole body is; nothing has to be closed


def read_json(body: bytes) -> dict[str, Any]:
    """The object that a body holds, {} if it is empty; a BOM is read over.

    Raises BadRequest for what is not strict JSON (RFC 8259, RFC 7493): NaN, 1e999, a
    member that stands twice, half of a surrogate pair, absurd nesting.
    """
    try:
        value = from_json(body.decode("utf-8-sig") or "{}")
        if b"\\u" in body:
            to_json(value).encode()  # half of a surrogate pair cannot be
        refuse_absurd_depth(value)
    except (ValueError, RecursionError) as error:
        raise Refusal(message=f"The JSON body could not be read: {error}") from None
    if not isinstance(value, dict):
        raise Refusal(message="The JSON body must be an object")
    return value


DEEPEST = 100  # levels of nesting: far from what Python itself cannot read again


def refuse_absurd_depth(value: Any, left: int = DEEPEST) -> None:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        if not left:
            raise ValueError(f"It nests deeper than {DEEPEST} levels")
        for each in value:
            refuse_absurd_depth(each, left - 1)


def unique_members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) < len(pairs):
        raise ValueError("a member stands twice in an object")
    return members


def finite(text: str) -> float:
    if not math.isfinite(float(text)):
        raise ValueError(f"{text} is no number that JSON knows")
    return float(text)


class JSONNumber(float):
    """A number in a JSON body that remembers how it was written, for Decimal."""

    def __init__(self, text: str) -> None:
        finite(text)
        self.text = text

    def __str__(self) -> str:
        return self.text


def as_text(value: Any) -> str:
    """What stands in JSON for a value that JSON has no type for."""
    if isinstance(value, Date | Time):  # a datetime is a date too
        return value.isoformat()
    if isinstance(value, UUID | Decimal):
        return str(value)
    raise ValueError(f"JSON can hold no {type(value).__name__}")


# All are made once: json.dumps and json.loads would make new ones for each call.
to_json = json.JSONEncoder(ensure_ascii=False, allow_nan=False, default=as_text).encode
from_json = json.JSONDecoder(
    parse_float=JSONNumber, parse_constant=JSONNumber, object_pairs_hook=unique_members
).decode
from_row = json.JSONDecoder(parse_float=finite, parse_constant=finite).decode


@dataclass(frozen=True)
class Text:
    """A type: so many characters of text, without NUL.

    >>> Text(1, 3)("abc")
    'abc'
    """

    shortest: int
    longest: int
    pattern: str = r"[^\x00]*"
    hint: str = "free of NUL characters"

    def __call__(self, value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError("Must be text")
        if not self.shortest <= len(value) <= self.longest:
            limits = f"{self.shortest:,} to {self.longest:,} characters"
            raise ValueError(f"Must have {limits}, not {len(value):,}")
        if not re.fullmatch(self.pattern, value):
            raise ValueError(f"Must be {self.hint}")
        value.encode()  # ValueError for half of a surrogate pair
        return value

    @property
    def __schema__(self) -> dict[str, Any]:
        limits = {"minLength": self.shortest, "maxLength": self.longest}
        return {"type": "string", **limits, "pattern": f"^(?:{self.pattern})$"}


def date(value: Any) -> Date:
    """A type: a day of the calendar, as RFC 3339 writes it.

    >>> date("2030-01-31")
    datetime.date(2030, 1, 31)
    """
    if not re.fullmatch("[0-9]{4}-[0-9]{2}-[0-9]{2}", str(value)):
        raise ValueError("Must be a date such as 2030-01-31")
    return Date.fromisoformat(value)


date.__schema__ = {"type": "string", "format": "date"}  # type: ignore[attr-defined]


def parser_of(*arguments: Argument) -> RequestParser:
    """A parser that reports all errors at once."""
    return RequestParser(bundle_errors=True, args=list(arguments))


def in_json(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The parts of a request whose JSON body this is."""
    return defaultdict(dict, json=values)


ROLE = Text(1, 30, "[a-z][a-z0-9-]*", "a role such as operator")
ID = re.compile(r"(?!\.\.?$)[^/\x00-\x1f\x7f-\x9f\ufffd]{1,64}")
RESERVED = (  # in the document, by our own routes, and as a schema
    "account",
    "sessions",
    "counters",
    "users",
    "token",
    "revoke",
    "docs",
    "health",
    "error",
)


class Resource:
    """A data model. Registering it gives it the routes /<name> and /<name>/<id>.

    Ids are made of the word for one item: todo1, todo2, … arguments say what an item
    holds, and are read from the body. starter, {id: item}, is what a new account begins
    with. Items belong to users; but with shared, which names a role, there is one list
    for all: every bearer reads it, and bearers with that role write it.

    Raises ValueError for names that cannot be, and a starter that arguments refuse.
    """

    def __init__(
        self,
        name: str,
        item: str,
        arguments: Iterable[Argument],
        starter: Mapping[str, Mapping[str, Any]] | None = None,
        shared: str | None = None,
    ) -> None:
        for word in (name, item):
            if not re.fullmatch("(?!.{22})[a-z]+(-[a-z]+)*", word) or word in RESERVED:
                raise ValueError(
                    f"{word!r} cannot name a resource or item;"
                    " words such as notes and note can"
                )
        if shared is not None:
            ROLE(shared)
            if starter:
                raise ValueError(f"{name} is shared, so no account begins with some")
        self.name, self.item, self.shared = name, item, shared
        # Kept under its name, so that what was read can be sent again.
        kept = [
            replace(each, location=JSON_OR_FORM, is_kept=True, dest=None)
            for each in arguments
        ]
        self.parser, self.starter = parser_of(*kept), dict[str, Namespace]()
        for each in kept:
            if not callable(each.default):
                to_json(each.default)  # ValueError for what JSON cannot hold
        for id, given in (starter or {}).items():
            if not ID.fullmatch(id):
                raise ValueError(f"starter {id!r} of {name} must be an id like note1")
            try:
                self.starter[id] = self.parser.clean(in_json(given), strict=True)
            except Refusal as error:
                raise ValueError(f"starter {id!r} of {name}: {error}") from None


TODOS = {
    "todo1": {"task": "build an API"},
    "todo2": {"task": "?????"},
    "todo3": {"task": "profit!"},
}
TASK = Argument("task", Text(1, 10_000), required=True)
TODO_RESOURCE = Resource("todos", "todo", [TASK], TODOS)


# ---- Stores ------------------------------------------------------------------------
# All that one user owns is one nested dict, reached through one transaction:
#
#     with store.write("alice") as data:
#         data["todos"]["todo4"] = {"task": "something new"}
#
# A store keeps a user as one small document (account, sessions, counters) and a row for
# each item. A block changes all or nothing, and holds its user's row meanwhile, so one
# user's writes come one after the other. Nothing crosses users: any machine can hold
# any of them. A Query says which items are read, and may be written; without one, all.

IN_DOCUMENT = ("account", "sessions", "counters")
PAGE_SIZE = 1_000_000  # bytes; a page ends with the item that goes past it
SHARED = "/"  # owns what belongs to no user: no user name has a slash


class Query(NamedTuple):
    """Which items to read beside the document: one, a page of a resource, or all."""

    resource: str = ""  # of every resource
    id: str = ""  # every item
    after: int = 0  # the position before the page
    limit: int = 10**9


NO_ITEMS, EVERYTHING = Query(limit=0), Query()


class Row(NamedTuple):
    """What stores keep: an item, or the document as a row of no resource."""

    resource: str
    position: int  # in the order of creation; given once
    id: str
    text: str  # JSON; "" to take it away


NO_DOCUMENT = Row("", 0, "", '{"account": {}, "sessions": {}, "counters": {}}')
Select = Callable[[Query], list[Row]]  # the document, the items, and one more if cut


class Page(dict[str, Any]):
    """Items by id, in the order of their creation."""

    next: int | None = None  # where it was cut: the position after which to go on


class Data(dict[str, Any]):
    """What one user owns: account, sessions, counters, and the items of each resource.

    A snapshot may stand in a with statement, as a write must.
    """

    def __init__(self, query: Query, select: Select) -> None:
        self._select, self._rows, self.is_cleared = select, list[Row](), False
        self.fetch(query)

    def __missing__(self, name: str) -> Page:
        self[name] = page = Page()
        return page

    def fetch(self, query: Query) -> None:
        """Read more of the items."""
        if self.is_cleared:
            return  # there is no more
        document, *items = self._select(query) or [NO_DOCUMENT]
        sizes = [*accumulate(len(row.text.encode()) for row in items)]
        # One item more than the limit, or than a page holds, shows that it was cut.
        most = min(query.limit, 1 + bisect_left(sizes, PAGE_SIZE))
        kept = items[:most] if query.resource else items
        values = load([document, *kept])
        if not self:  # the first time; the block may have changed it since
            self.update(values[0])
            self._document = document
        self._rows += kept
        for (resource, _, id, _), item in zip(kept, values[1:], strict=True):
            self[resource][id] = item
        if len(kept) < len(items):
            self[query.resource].next = kept[-1].position

    def counter(self, resource: str) -> dict[str, int]:
        """How many items there are; the last position given, and number in an id."""
        zero = {"count": 0, "position": 0, "number": 0}
        counter: dict[str, int] = self["counters"].setdefault(resource, zero)
        return counter

    def clear(self) -> None:
        """Take away all that the user owns, read or not."""
        super().clear()
        self._rows.clear()
        self._document = NO_DOCUMENT._replace(text="")  # whatever comes is a change
        self.is_cleared = True

    def changes(self) -> list[Row]:
        """The rows that the block changed; those without text are gone."""
        changed, before = [], {(row.resource, row.id): row for row in self._rows}
        for resource in [name for name in self if name not in IN_DOCUMENT]:
            for id, item in self[resource].items():
                row = before.pop((resource, id), None)
                if row is None:
                    counter = self.counter(resource)
                    counter["count"] += 1
                    counter["position"] += 1
                    row = Row(resource, counter["position"], id, "")
                if not isinstance(item, dict):
                    raise TypeError(f"{resource} holds dicts, not {item!r}")
                text = to_json(item)
                (id + text).encode()  # ValueError for half of a surrogate pair
                if text != row.text:
                    changed.append(row._replace(text=text))
        for row in before.values():
            self.counter(row.resource)["count"] -= 1
            changed.append(row._replace(text=""))
        text = to_json({name: self[name] for name in IN_DOCUMENT})
        if text != self._document.text:
            changed.append(NO_DOCUMENT._replace(text=text))
        return changed

    def __enter__(self) -> Data:
        return self

    def __exit__(self, *error: object) -> None:
        pass


def load(rows: list[Row]) -> list[dict[str, Any]]:
    """The objects in rows, read at once; 503 if somebody else has spoilt one."""
    try:
        text = f"[{','.join([row.text for row in rows])}]"
        values = from_row(text)
        if "\\u" in text:
            to_json(values).encode()  # half of a surrogate pair cannot be
    except (ValueError, RecursionError):
        values = [None]
    if len(values) != len(rows) or not {type(value) for value in values} <= {dict}:
        raise store_down("a row holds no JSON object")
    return list(values)


def store_down(reason: object) -> http.ServiceUnavailable:
    """Log why; the 503 to raise."""
    log.error("store: %s", str(reason).partition("\n")[0])  # the rest may quote users
    return http.ServiceUnavailable("The store does not answer", retry_after=1)


class MemoryStore:
    """Dicts under a lock: one process, and all is gone when it ends."""

    def __init__(self) -> None:
        # Rows by owner, resource and id, in the order of their creation.
        self._owners: dict[str, dict[str, dict[str, Row]]] = {}
        self._lock = threading.RLock()

    def read(self, owner: str, query: Query = EVERYTHING) -> Data:
        """A snapshot of what the owner has."""
        return Data(query, partial(self._select, owner))

    @contextmanager
    def write(self, owner: str, query: Query = EVERYTHING) -> Iterator[Data]:
        """What the owner has, to be changed: all of it, or nothing if the block raises.

        No block is opened inside of a block.
        """
        with self._lock:
            data = self.read(owner, query)
            yield data
            changed = data.changes()
            resources = self._owners.get(owner, {})
            if data.is_cleared:
                resources.clear()
            for row in changed:
                rows = resources.setdefault(row.resource, {})
                rows[row.id] = row
                if not row.text:
                    del rows[row.id]
            if changed:
                self._owners[owner] = resources

    def _select(self, owner: str, query: Query) -> list[Row]:
        with self._lock:
            resources, (resource, id, after, limit) = self._owners.get(owner, {}), query
            rows = resources.get(resource, {})
            found: Iterable[Row] = rows.values()
            if id:
                found = [rows[id]] if id in rows else []
            elif not resource:
                found = chain(*map(dict.values, resources.values()))
            # The document, which is no item, has the position 0.
            items = (row for row in found if row.position > after)
            # One more than the limit shows that there are more.
            most = limit + 1 if limit else 0
            document = resources.get("", {}).get("", NO_DOCUMENT)
            return [document, *islice(items, most)]


SELECT_DOCUMENT = (
    "SELECT '', 0, '', CAST(document AS TEXT) FROM users WHERE name = :owner"
)
SELECT_ITEMS = (
    "SELECT resource, position, id, CAST(value AS TEXT) FROM items WHERE owner = :owner"
)
SELECT_ITEM = f"{SELECT_ITEMS} AND resource = :resource AND id = :id"
SELECT_PAGE = (  # with one item more than Data keeps, if there is one
    "SELECT resource, position, id, CAST(value AS TEXT)"
    " FROM (SELECT *, sum(octet_length(value)) OVER"
    " (ORDER BY position ROWS BETWEEN UNBOUNDED PRECEDING AND 2 PRECEDING) AS size"
    " FROM items WHERE owner = :owner AND resource = :resource AND position > :after"
    " ORDER BY position LIMIT :limit + 1) AS page"
    f" WHERE coalesce(size, 0) < {PAGE_SIZE}"
)
TABLES = (
    "CREATE TABLE IF NOT EXISTS users (name TEXT PRIMARY KEY, document TEXT NOT NULL)",
    "CREATE TABLE IF NOT EXISTS items (owner TEXT, resource TEXT, position BIGINT,"
    " id TEXT NOT NULL, value TEXT NOT NULL,"
    " PRIMARY KEY (owner, resource, position), UNIQUE (owner, resource, id))",
)
CLAIM = (
    "INSERT INTO users (name, document) VALUES (:owner, :text) ON CONFLICT DO NOTHING"
)
KEEP_DOCUMENT = "UPDATE users SET document = :text WHERE name = :owner"
PUT_ITEM = (
    "INSERT INTO items (owner, resource, position, id, value)"
    " VALUES (:owner, :resource, :position, :id, :text)"
    " ON CONFLICT (owner, resource, id) DO UPDATE SET value = excluded.value"
)
DELETE_ITEM = (
    "DELETE FROM items WHERE owner = :owner AND resource = :resource AND id = :id"
)
DELETE_ITEMS = "DELETE FROM items WHERE owner = :owner"
CONNECTIONS = 15  # of a process

Statement = tuple[str, Mapping[str, Any]]


def select_rows(owner: str, query: Query) -> Statement:
    """One statement, so that all it finds is of one moment."""
    values = {"owner": owner, **query._asdict()}
    if not query.limit:
        return SELECT_DOCUMENT, values
    items = SELECT_ITEMS
    if query.id:
        items = SELECT_ITEM
    elif query.resource:
        items = SELECT_PAGE
    return f"{SELECT_DOCUMENT} UNION ALL {items} ORDER BY 1, 2", values


class SQLStore:
    """The same in two tables of a database; connections are kept for their next use."""

    begin: tuple[str, ...]  # a transaction that holds the owner's row
    errors: type[Exception]
    connect: Callable[[], Any]

    def __init__(self) -> None:
        self._pools: dict[Any, tuple[list[Any], threading.Semaphore]] = {}

    def read(self, owner: str, query: Query = EVERYTHING) -> Data:
        """A snapshot of what the owner has."""

        def select(query: Query) -> list[Row]:
            with self._connection() as connection:
                return self._ask(connection, [select_rows(owner, query)])

        return Data(query, select)

    @contextmanager
    def write(self, owner: str, query: Query = EVERYTHING) -> Iterator[Data]:
        """What the owner has, to be changed: all of it, or nothing if the block raises.

        No block is opened inside of a block.
        """
        new = NO_DOCUMENT._asdict() | {"owner": owner}
        begin: list[Statement] = [(sql, new) for sql in self.begin]
        with self._connection() as connection:

            def select(query: Query) -> list[Row]:
                statements = [*begin, select_rows(owner, query)]
                begin.clear()  # which was for the first time
                return self._ask(connection, statements)

            data = Data(query, select)
            yield data
            end: list[Statement] = [(DELETE_ITEMS, new)] if data.is_cleared else []
            for row in data.changes():
                sql = PUT_ITEM if row.text else DELETE_ITEM
                if not row.resource:
                    sql = KEEP_DOCUMENT
                end.append((sql, new | row._asdict()))
            end.append(("COMMIT" if end else "ROLLBACK", {}))
            self._ask(connection, end)

    def _ask(self, connection: Any, statements: list[Statement]) -> list[Row]:
        """503 for these alone: a block may use a database of its own."""
        try:
            return self.run(connection, statements)
        except self.errors as error:
            raise store_down(error) from error

    @contextmanager
    def _connection(self) -> Iterator[Any]:
        empty = (list[Any](), threading.Semaphore(CONNECTIONS))
        idle, room = self._pools.setdefault(self.pool(), empty)
        if not room.acquire(timeout=2):
            raise store_down("all connections are in use")
        try:
            connection = self._take(idle)
            try:
                yield connection
            except http.ServiceUnavailable:
                connection.close()  # as it may be broken
                raise
            except BaseException:
                try:
                    connection.rollback()
                    idle.append(connection)
                except self.errors:
                    connection.close()
                raise
            idle.append(connection)
        finally:
            room.release()

    def _take(self, idle: list[Any]) -> Any:
        with suppress(IndexError):  # another thread may take the last one
            while True:
                connection = idle.pop()
                if self.is_alive(connection):
                    return connection
                connection.close()
        try:
            return self.connect()
        except self.errors as error:
            raise store_down(error) from error

    def pool(self) -> Any:
        """What a connection is good for: it never crosses a fork."""
        return os.getpid()

    def is_alive(self, connection: Any) -> bool:
        return True

    def run(self, connection: Any, statements: list[Statement]) -> list[Row]:
        """Run the statements; the rows that the last one finds."""
        cursors = [connection.execute(*each) for each in statements]
        return [Row(*row) for row in cursors[-1]]


class SQLiteStore(SQLStore):
    """In a file: several processes, one machine.

    Raises ValueError for what is no file, or in a folder that is not there. One that
    cannot be written now is 503 until it can be.
    """

    begin, errors = ("BEGIN IMMEDIATE", CLAIM), sqlite3.Error

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path, self._was_there = path, False
        file, is_good = Path(path), False
        with suppress(OSError):  # as for a name that is too long
            is_new = file.parent.is_dir() and not file.exists()
            is_good = is_new or file.is_file()
        if not is_good:
            raise ValueError(
                "SERVICE_STORE_URL must name a file in a folder that is there,"
                f" not {path}"
            )

    def pool(self) -> Any:
        """A connection is good for this process, and the file that is there now."""
        try:
            # A file that was there is not made anew: it would look as if all were well.
            if not self._was_there:
                # Where its log is, it was, if not for this process.
                is_new = not Path(f"{Path(self._path).resolve()}-wal").exists()
                flags = os.O_RDWR | os.O_CREAT if is_new else os.O_RDWR
                os.close(os.open(self._path, flags, 0o600))
                self._was_there = True
            # Connections to a file that was deleted or replaced stay open: closing the
            # last one would delete the -wal file by its name.
            return os.getpid(), os.stat(self._path).st_ino
        except OSError as error:
            raise store_down(error) from error

    def connect(self) -> Any:
        connection = sqlite3.connect(
            f"file:{quote(self._path)}?mode=rw",
            uri=True,
            timeout=0,
            isolation_level=None,
            check_same_thread=False,
        )
        # While another process turns the file to WAL, SQLite does not heed a timeout.
        for _ in range(100):
            with suppress(sqlite3.OperationalError):
                connection.execute("PRAGMA journal_mode = WAL")
                break
            time.sleep(0.02)
        patience = "PRAGMA busy_timeout = 10000"  # milliseconds
        for sql in (patience, "PRAGMA synchronous = FULL", *TABLES):
            connection.execute(sql)
        # SQLite has it only since 3.43.
        connection.create_function("octet_length", 1, lambda text: len(text.encode()))
        return connection


class PostgresStore(SQLStore):
    """In PostgreSQL, by psycopg 3: several machines.

    Raises ValueError for a URL or a database that cannot be used; one that is down now
    may come up.
    """

    begin = (
        "BEGIN ISOLATION LEVEL READ COMMITTED",
        CLAIM,
        f"{SELECT_DOCUMENT} FOR UPDATE",
    )

    def __init__(self, url: str) -> None:
        super().__init__()
        try:
            import psycopg
        except ImportError:
            raise ValueError(
                "SERVICE_STORE_URL needs psycopg: pip install 'psycopg[binary]'"
            ) from None
        self.errors = psycopg.Error
        try:
            given = psycopg.conninfo.conninfo_to_dict(url)
            self._options = PATIENCE | given | {"client_encoding": "utf8"}
            if "@" in str(self._options.get("host")):  # left there by a password
                raise psycopg.ProgrammingError
            self.connect().close()
        except psycopg.OperationalError as error:
            store_down(error)  # is logged
        except psycopg.Error:  # which may quote the password
            raise ValueError(
                "SERVICE_STORE_URL must name a PostgreSQL database in UTF8"
                " that has the tables, or may get them"
            ) from None

    def connect(self) -> Any:
        import psycopg

        connection: Any = psycopg.connect(**self._options, autocommit=True)
        try:
            pid, encoding, has_tables = connection.execute(SET_UP).fetchone()[:3]
            if encoding != "UTF8":
                raise psycopg.NotSupportedError(f"the database is in {encoding}")
            if pid != connection.info.backend_pid:  # behind a transaction pooler
                connection.prepare_threshold = None
            for sql in () if has_tables else TABLES:
                with suppress(
                    psycopg.errors.UniqueViolation,  # somebody else makes it now
                    psycopg.errors.DuplicateTable,
                    psycopg.errors.DuplicateObject,
                ):
                    connection.execute(sql)
        except psycopg.Error:
            connection.close()
            raise
        return connection

    def is_alive(self, connection: Any) -> bool:
        """What the server sends unasked is that it closes the connection."""
        with DefaultSelector() as selector:
            selector.register(connection, EVENT_READ)
            return not selector.select(timeout=0)

    def run(self, connection: Any, statements: list[Statement]) -> list[Row]:
        """The same in one round trip."""
        with connection.pipeline() if statements[1:] else nullcontext():
            cursors = [connection.execute(named(sql), each) for sql, each in statements]
        return [Row(*row) for row in cursors[-1]] if cursors[-1].description else []


PATIENCE: dict[str, Any] = {
    "connect_timeout": 2,
    "tcp_user_timeout": 10_000,
    "keepalives_idle": 10,
}
SET_UP = (
    "SELECT pg_backend_pid(), current_setting('server_encoding'),"
    " num_nulls(to_regclass('users'), to_regclass('items')) = 0,"
    " set_config('lock_timeout', '10s', false),"
    " set_config('idle_in_transaction_session_timeout', '30s', false)"
)


@cache
def named(sql: str) -> str:
    """A statement with its parameters as psycopg writes them."""
    return re.sub(r":(\w+)", r"%(\1)s", sql)


def open_store(url: str) -> MemoryStore | SQLStore:
    """The store that a URL names: memory:, sqlite:///FILE or postgresql://…."""
    if url == "memory:":
        return MemoryStore()
    if url.startswith("sqlite:///"):
        return SQLiteStore(url.removeprefix("sqlite:///"))
    return PostgresStore(url)


# ---- Tokens ------------------------------------------------------------------------
# Two kinds of JWT. The access token (at+jwt) opens the service for minutes; the refresh
# token (rt+jwt) lives as long as its session and buys the next pair. The key that kid
# names fixes the algorithm: the token has no say in it. Signing and verifying are
# PyJWT's business; time is checked here, by the one clock.

ACCESS, REFRESH = "at+jwt", "rt+jwt"
COMMON = {"iss": str, "sub": str, "sid": str, "exp": int}
REQUIRED = {
    ACCESS: COMMON | {"aud": list, "iat": int, "jti": str},
    REFRESH: COMMON | {"gen": int},
}
JWT = jwt.PyJWT(
    {
        "verify_exp": False,
        "verify_iat": False,
        "verify_nbf": False,
        "enforce_minimum_key_length": True,
    }
)
THUMBPRINT = {  # of a key of each public algorithm: the members that RFC 7638 takes
    "EdDSA": ("crv", "kty", "x"),
    "ES256": ("crv", "kty", "x", "y"),
    "RS256": ("e", "kty", "n"),
}

Claims = Mapping[str, Any]
FindKey = Callable[[str], jwt.PyJWK]  # by its kid; LookupError if there is none


def secret_key(text: str) -> jwt.PyJWK:
    """An HS256 key. Its kid is a MAC made with the key, which tells nothing of it."""
    secret = text.encode()
    kid = hmac.digest(secret, b"kid", "sha256")[:9].hex()
    return jwt.PyJWK({"kty": "oct", "k": base64url_encode(secret).decode(), "kid": kid})


def signing_key(path: str) -> tuple[jwt.PyJWK, dict[str, str]]:
    """The private key in a PEM file, and its public side as a JWK (RFC 7517).

    Ed25519, P-256, or RSA of 2048 bits or more, unencrypted; else ValueError.
    """
    if not jwt.algorithms.has_crypto:
        raise ValueError(
            "SERVICE_SIGNING_KEY_FILE needs cryptography: pip install cryptography"
        )
    from cryptography.exceptions import UnsupportedAlgorithm

    bad = (jwt.PyJWTError, OSError, TypeError, ValueError, UnsupportedAlgorithm)
    for name, members in THUMBPRINT.items():
        with suppress(*bad):
            algorithm = jwt.get_algorithm_by_name(name)
            private = algorithm.prepare_key(Path(path).read_bytes())
            jwk = algorithm.to_jwk(private, as_dict=True)
            public = {member: jwk[member] for member in members}
            is_weak = algorithm.check_key_length(private) or jwk.get("crv") == "Ed448"
            if "d" in jwk and not is_weak:
                text = json.dumps(public, separators=(",", ":")).encode()
                kid = base64url_encode(hashlib.sha256(text).digest()).decode()
                names = {"kid": kid, "alg": name, "use": "sig"}
                return jwt.PyJWK(jwk | names), public | names
    raise ValueError(
        "SERVICE_SIGNING_KEY_FILE must be PEM files of private keys:"
        f" Ed25519, P-256 or RSA of 2048 bits, not {path!r}"
    )


class Tokens:
    """Signs and verifies for one issuer. A class, since keys are loaded once.

    find_key gives the key of an access token; by default it is one of our own.
    """

    def __init__(
        self, settings: Settings, clock: Clock, find_key: FindKey | None = None
    ) -> None:
        self._settings, self._clock = settings, clock
        self._audience = comma_list(settings.audience) or [settings.issuer]
        secret = [secret_key(text) for text in comma_list(settings.secret_key)]
        pairs = [signing_key(path) for path in comma_list(settings.signing_key_file)]
        public = {jwk["kid"]: jwk for _, jwk in pairs}
        self.jwks = {"keys": list(public.values())}
        self._signing = {ACCESS: [key for key, _ in pairs] or secret, REFRESH: secret}
        access = [jwt.PyJWK(jwk) for jwk in public.values()] or secret
        self._find_key = {ACCESS: find_key or by_kid(access), REFRESH: by_kid(secret)}
        self._remembered = lru_cache(maxsize=10_000)(self._verify)  # takes 50 to 160 µs

    def pair(self, user: str, sid: str, data: Data) -> dict[str, Any]:
        """The answer of RFC 6749 §5.1: a new access token, the session's refresh token.

        The refresh token holds nothing random: one generation is always the same text.
        """
        session, roles = data["sessions"][sid], roles_of(data)
        now, ends = int(self._clock()), session["expires_at"]
        exp = min(now + self._settings.access_ttl, ends)
        common = {"iss": self._settings.issuer, "sub": user, "sid": sid}
        access: dict[str, Any] = common | {"aud": self._audience, "exp": exp}
        access |= {"iat": now, "jti": secrets.token_urlsafe(12)}
        if roles:
            access["roles"] = roles
        renewing = common | {"gen": session["gen"], "exp": ends}
        return {
            "access_token": self._sign(ACCESS, access),
            "token_type": "Bearer",
            "expires_in": exp - now,
            "refresh_token": self._sign(REFRESH, renewing),
            "refresh_expires_in": ends - now,
        }

    def _sign(self, typ: str, claims: dict[str, Any]) -> str:
        key = self._signing[typ][0]
        header = {"typ": typ, "kid": key.key_id}
        return JWT.encode(claims, key, key.algorithm_name, header)

    def verify(self, typ: str, token: str, even_expired: bool = False) -> Claims:
        """The claims of a token of ours. Raises InvalidToken."""
        # Padding would be a second text of one token.
        if len(token) > 4096 or "=" in token:
            raise InvalidToken("The token is longer than 4096 characters, or padded")
        now = self._clock()
        # Anew every 300 s, for a guard whose issuer has withdrawn a key. A refresh
        # token is hardly seen twice.
        check = self._remembered if typ == ACCESS else self._verify
        claims = check(typ, token, now // 300)
        if claims["exp"] <= now and not even_expired:
            raise InvalidToken("The token has expired")
        copies = {name: [*each] for name, each in claims.items() if type(each) is list}
        return {**claims, **copies}  # what is remembered is nobody's to change

    def _verify(self, typ: str, token: str, period: float) -> Claims:
        """period is a part of what is remembered, no more."""
        try:
            header = jwt.get_unverified_header(token)
            # What else may stand in it (crit, jwk, jku) would choose how to verify.
            if header.keys() != {"alg", "typ", "kid"} or header["typ"] != typ:
                raise InvalidToken("The token is of another kind than belongs here")
            claims = JWT.decode(  # by the algorithm of the key, and no other
                token,
                self._find_key[typ](header["kid"]),
                issuer=self._settings.issuer,
                audience=self._audience if typ == ACCESS else None,
            )
        except (jwt.PyJWTError, ValueError, TypeError, LookupError, RecursionError):
            why = "The token is malformed or was not signed here"
            raise InvalidToken(why) from None
        for name, kind in REQUIRED[typ].items():
            if type(claims.get(name)) is not kind or claims[name] == "":
                raise InvalidToken(f"The token has no {name} as it must be")
        if not claims["sub"].isprintable():  # it becomes a part of headers and logs
            raise InvalidToken("The token names nobody")
        return claims


def roles_of(data: Data) -> list[str]:
    """As the account has them now: those in the token may be older."""
    return list(data["account"].get("roles", []))


def by_kid(keys: Iterable[jwt.PyJWK]) -> FindKey:
    return {str(key.key_id): key for key in keys}.__getitem__


# ---- Sessions ----------------------------------------------------------------------
# A login opens a session in the user's document; its tokens are good while it is there.
# A refresh steps its generation. A refresh token of an older generation, seen again,
# means that two parties hold it, so the session ends for both (RFC 9700 §4.14.2).

SESSIONS_A_USER = 20


def open_session(data: Data, now: float, ttl: int) -> str:
    """A new session's id. Dead ones go; of too many, the longest not renewed."""
    alive = [pair for pair in data["sessions"].items() if pair[1]["expires_at"] > now]
    alive.sort(key=lambda pair: pair[1]["rotated_at"])
    sid = secrets.token_urlsafe(12)
    data["sessions"] = dict(alive[1 - SESSIONS_A_USER :])  # with room for this one
    data["sessions"][sid] = {
        "gen": 1,
        "started_at": int(now),
        "rotated_at": now,
        "expires_at": int(now) + ttl,
    }
    return sid


def renew_session(data: Data, sid: str, gen: int, now: float, grace: int) -> str:
    """Step the generation, and say what it was: renewed, repeated, reused or ended."""
    session = data["sessions"].get(sid)
    if session is None or session["expires_at"] <= now:
        return "ended"
    if gen == session["gen"]:
        session.update(gen=gen + 1, rotated_at=now)
        return "renewed"
    # Without a grace, not even at the same moment.
    is_recent = grace and abs(now - session["rotated_at"]) <= grace
    if gen == session["gen"] - 1 and is_recent:
        return "repeated"  # two tabs, or a lost answer: the same successor again
    del data["sessions"][sid]
    return "reused"


# ---- Passwords ---------------------------------------------------------------------
# Hashing is slow on purpose (scrypt: 0.1 s and 32 MB), so two run at a time, and few
# wait. Guessing is slowed down too: from the tenth wrong password on, a name waits,
# longer each time, for the client that guesses.

NO_HASH = "scrypt:32768:8:1$none$" + "0" * 128  # takes as long to check as any
AT_ONCE = 18  # two that are hashed, 16 that wait; half of them for one client
LONGEST_WAIT = 900  # seconds; a quiet time as long forgives what was wrong
MOST_COUNTED = 20_000  # names and clients whose wrong passwords are remembered


@dataclass(frozen=True)
class Password(Text):
    """Text as RFC 8265 §4.2 (OpaqueString) prepares it, however it was typed."""

    def __call__(self, value: Any) -> str:
        if isinstance(value, str) and len(value) <= 4096:  # composing more takes long
            spaces = {ord(c): " " for c in value if unicodedata.category(c) == "Zs"}
            value = unicodedata.normalize("NFC", value.translate(spaces))
        return super().__call__(value)


class Passwords:
    """Hashes and checks passwords. A class, since it counts the wrong ones.

    It counts in this process only: n workers let n times as many guesses through.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._turns, self._inside = threading.Semaphore(2), Counter[str]()
        # By client and name: how many in a row, since when, and how long it waits.
        self._wrong: dict[tuple[str, str], tuple[int, float, int]] = {}

    @contextmanager
    def _turn(self, client: str) -> Iterator[None]:
        """503 at once if too many wait, in all or from there, or after 5 s."""
        busy = http.ServiceUnavailable("Too many passwords to check", retry_after=5)
        with self._lock:
            is_full = self._inside.total() >= AT_ONCE
            if is_full or self._inside[client] >= AT_ONCE // 2:
                raise busy
            self._inside[client] += 1
        try:
            if not self._turns.acquire(timeout=5):
                raise busy
            try:
                yield
            finally:
                self._turns.release()
        finally:
            with self._lock:
                self._inside -= Counter([client])  # which forgets who has none

    def hash(self, password: str, address: str = "") -> str:
        """A salted scrypt hash."""
        with self._turn(network(address)):
            return generate_password_hash(password)

    def match(self, hash: str | None, password: str, name: str, address: str) -> bool:
        """Is it the password? Without a hash (no such user) it takes as long to tell.

        Raises 429 after 10 wrong ones in a row for a name from an address, or 100 for
        any names from there.
        """
        client = network(address)
        limits = {(client, name[:65]): 10, (client, ""): 100}
        self._refuse_guesses(limits, name, address)  # before any waiting
        with self._turn(client):
            self._refuse_guesses(limits, name, address)  # meanwhile others were wrong
            is_right = check_password_hash(hash or NO_HASH, password) and bool(hash)
            with self._lock:
                if is_right:
                    self._wrong.pop((client, name[:65]), None)
                else:
                    self._count(limits)
        if not is_right:
            log_event("failed login", name, address)
        return is_right

    def _refuse_guesses(
        self, keys: Iterable[tuple[str, str]], name: str, address: str
    ) -> None:
        for key in keys:
            _, since, wait = self._wrong.get(key, (0, 0, 0))
            left = math.ceil(since + wait - self._clock())
            if 0 < left <= wait:  # if more, the clock was put back
                log_event("throttled", name, address)
                text = f"Too many wrong passwords: try again in {left} s"
                raise http.TooManyRequests(text, retry_after=left)

    def _count(self, limits: dict[tuple[str, str], int]) -> None:
        """From the limit on, each wrong password doubles the wait, from 1 s."""
        now = self._clock()
        for key, limit in limits.items():
            count, since, wait = self._wrong.pop(key, (0, now, 0))
            count = count + 1 if now < since + wait + LONGEST_WAIT else 1
            wait = min(int(2 ** min(count - limit, 10)), LONGEST_WAIT)
            self._wrong[key] = (count, now, wait)  # which puts it last
        while len(self._wrong) > MOST_COUNTED:
            del self._wrong[next(iter(self._wrong))]


def network(address: str) -> str:
    """What one client owns: an IPv4 address, or the /64 around an IPv6 address."""
    # Some proxies add a port.
    address = re.sub(r"^\[(.*)\].*|^(\d+\.[\d.]+):.*", r"\1\2", address)
    with suppress(ValueError):
        ip = ipaddress.IPv6Address(address)
        return str(ip.ipv4_mapped or ipaddress.ip_network((ip, 64), strict=False))
    return address


def log_event(event: str, user: str, address: str | None) -> None:
    log.info("%s: user %r, address %r", event, user[:65], address)


# ---- Requests and answers ----------------------------------------------------------
# What stands between the wire and the views: a request that knows its bearer and opens
# the data; answers in JSON; and the preconditions of RFC 9110 §13.

BODY_TYPES = ("application/json", *FORM_TYPES)
BODY_PLACES = {"json", "form", "files"}
PATCH_TYPES = ("application/merge-patch+json", *BODY_TYPES)


class Request(werkzeug.Request):
    """Werkzeug's request, with the app, its bearer and the data."""

    max_form_memory_size = None  # stream bounds the whole body
    _get_file_stream = staticmethod(upload_buffer)
    is_in = False  # has its session been found?

    def __init__(self, environ: WSGIEnvironment, app: Any) -> None:
        super().__init__(environ, populate_request=False)
        self.app = app

    @cached_property
    def stream(self) -> BytesIO:
        """The body in memory: all of it, or 413, chunked or not."""
        limit, length = self.app.settings.max_body, self.content_length or 0
        too_large = http.RequestEntityTooLarge(f"A body may have {limit:,} bytes")
        if length > limit:
            raise too_large  # without waiting for it
        if self.headers.get("Content-Encoding", "").lower() not in ("", "identity"):
            raise http.UnsupportedMediaType("Send the body without Content-Encoding")
        if not self.environ.get("wsgi.input_terminated"):
            self.environ.pop("wsgi.input_terminated", None)  # False is none to Werkzeug
            if "Transfer-Encoding" in self.headers:
                raise http.LengthRequired("Send the body with a Content-Length")
        self.max_content_length = limit + 1  # Werkzeug ends there, and says nothing
        try:
            body = super().stream.read()
        except Exception as error:  # every server has its own for a broken body
            raise http.BadRequest("The body could not be read to its end") from error
        if len(body) > limit:
            raise too_large
        if len(body) < length:
            raise http.BadRequest("The body ends before its Content-Length")
        return BytesIO(body)

    def check_body(self, parser: RequestParser) -> None:
        """Refuse a body in which the parser cannot find what it asks for."""
        asked = [each for each in parser.args if BODY_PLACES.intersection(each.places)]
        body, kind, parts = self.get_data(), self.mimetype, Parts(self)
        if not asked or not body:
            return
        is_json = self.is_json and kind != "application/json-patch+json"
        if not is_json and kind not in FORM_TYPES:
            kinds = PATCH_TYPES if self.method == "PATCH" else BODY_TYPES
            raise http.UnsupportedMediaType(f"Send {' or '.join(kinds)}")
        hint = "The body looks like JSON: send Content-Type: application/json"
        looks_like_json = not is_json and body.lstrip().startswith((b"{", b"["))
        if looks_like_json and kind == MULTIPART:  # of which no part could be read
            raise http.BadRequest(hint)
        places = ["json"] if is_json else ["form", "files"]
        sent = defaultdict(dict, {place: parts[place] for place in places})
        if not any(sent.values()) or any(each.place_in(sent) for each in asked):
            return
        if looks_like_json:
            raise http.BadRequest(hint)
        # What is required and missing says so itself; a PATCH requires nothing.
        missing = [each for each in parser.args if each.place_in(parts) is None]
        is_told = self.method != "PATCH" and any(each.required for each in missing)
        if not is_told:
            names = ", ".join(each.name for each in asked)
            raise http.BadRequest(f"The body holds none of {names}")

    @cached_property
    def claims(self) -> Claims:
        """The claims of the bearer's access token (RFC 6750 §2.1); 401 without one."""
        tokens: Tokens = self.app.tokens
        return tokens.verify(ACCESS, bearer_token(self.environ))

    def authenticate(self) -> Claims:
        """401 at once without a good token; its session is looked up with the data."""
        return self.claims

    @property
    def user(self) -> str:
        """The bearer's name; 401 without a good token."""
        return str(self.claims["sub"])

    def read(self, query: Query = EVERYTHING, shared: str | None = None) -> Data:
        """The bearer's data, or what is shared; 401 if the session has ended."""
        data: Data = self.app.store.read(self.user, NO_ITEMS if shared else query)
        self.check_session(data)
        if shared:
            data = self.app.store.read(SHARED, query)
        return data

    @contextmanager
    def write(
        self, query: Query = EVERYTHING, shared: str | None = None
    ) -> Iterator[Data]:
        """The same, to be changed; what is shared asks for that role, else 403."""
        if shared and shared not in roles_of(self.read(NO_ITEMS)):
            raise http.Forbidden(f"Only the role {shared} may change this")
        with self.app.store.write(SHARED if shared else self.user, query) as data:
            if not shared:
                self.check_session(data)
            yield data

    def check_session(self, data: Data) -> None:
        if self.claims["sid"] not in data["sessions"]:
            raise InvalidToken("The session has ended")
        self.is_in = True

    @property
    def prefix(self) -> str:
        """Where the app is mounted, as the start of a URL."""
        mount = quote(self.root_path.strip("/"))
        return f"/{mount}" if mount else ""

    def log(self, event: str, user: str) -> None:
        log_event(event, user, self.remote_addr)


def bearer_token(environ: WSGIEnvironment) -> str:
    scheme, _, token = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    if scheme.lower() != "bearer":
        raise http.Unauthorized("Log in at /token, then send Authorization: Bearer …")
    return str(token.strip(" "))


class Answer(Response):
    """A response that sends its headers as they are: Werkzeug looks them all over."""

    default_mimetype = None

    def get_wsgi_headers(self, environ: WSGIEnvironment) -> Headers:
        """As they are."""
        return self.headers

    def __call__(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        start_response(self.status, list(self.get_wsgi_headers(environ)))
        return [] if environ["REQUEST_METHOD"] == "HEAD" else [self.get_data()]


def answer(body: Any = None, status: int = 200, **headers: str) -> Response:
    """A line of JSON, without it for 204 and 304."""
    if status in (204, 304):
        return Answer(None, status, headers)
    return Answer(line(body), status, {"Content-Type": "application/json"} | headers)


HEADER = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t -~\x80-\xff]*"  # RFC 9110 §5


def response_of(result: Any, status: int, environ: WSGIEnvironment) -> Response:
    """What a view returned, as a Response; what is ours needs no look."""
    if isinstance(result, Answer):
        return result
    headers: Mapping[str, str] = {}
    if isinstance(result, tuple):
        result, status, headers = (*result, {})[:3]
    response = result if isinstance(result, Response) else answer(result, status)
    response.headers.update(headers)
    return sendable(response, environ)


def sendable(response: Response, environ: WSGIEnvironment) -> Response:
    """The same; ValueError for what no server would send."""
    if not 200 <= response.status_code <= 999:
        raise ValueError(f"no answer has the status {response.status}")
    sent = [("Status", response.status), *response.get_wsgi_headers(environ)]
    for name, value in sent:
        if not re.fullmatch(HEADER, f"{name}:{value}"):
            raise ValueError(f"no header is {name!r}: {value!r}")
    return response


def line(body: Any) -> bytes:
    return (to_json(body) + "\n").encode()


def tag_of(data: bytes) -> str:
    """The strong entity tag of a representation."""
    return f'"{hashlib.sha256(data).hexdigest()[:32]}"'


def tagged(body: Any, status: int = 200, **headers: str) -> Response:
    """An answer with its ETag."""
    response = answer(body, status, **headers)
    response.headers["ETag"] = tag_of(response.get_data())
    return response


def conditional(request: Request, body: Any, **headers: str) -> Response:
    """An answer with its ETag; 304 if the client has it already."""
    response = tagged(body, 200, **headers)
    tag = response.headers["ETag"]
    if check_preconditions(request, body, tag):
        return answer(None, 304, ETag=tag, **headers)
    return response


TAG = r'(W/)?"[!#-~\x80-\xff]*"'
NO_TAG = "no tag"  # of an account: no header can name it, so only * means it
ENTITY_TAGS = rf"(\*|[ \t,]*{TAG}([ \t]*,[ \t,]*{TAG})*[ \t,]*)?"


def check_preconditions(request: Request, there: Any, tag: str = "") -> bool:
    """Does the client have what is there (304)? 412 if the request means another thing.

    there is None where nothing is (RFC 9110 §13.2.2); its tag is made if need be.
    """
    match = request.environ.get("HTTP_IF_MATCH", "")
    none_match = request.environ.get("HTTP_IF_NONE_MATCH", "")
    if not (match or none_match):
        return False
    for header in (match, none_match):
        if len(header) > 4096:  # which takes long to read
            raise http.RequestHeaderFieldsTooLarge(
                "If-Match and If-None-Match may have 4,096 characters"
            )
        if not re.fullmatch(ENTITY_TAGS, header):
            raise http.BadRequest(
                "If-Match and If-None-Match take * or quoted entity tags, with commas"
            )
    tag = tag or tag_of(line(there))
    is_there = there is not None
    if match and not (is_there and (match == "*" or re.search(f"(?<!W/){tag}", match))):
        raise http.PreconditionFailed("If-Match does not name what is there now")
    is_known = is_there and (none_match == "*" or tag in none_match)
    if is_known and request.method not in ("GET", "HEAD"):
        raise http.PreconditionFailed("If-None-Match names what is there now")
    return is_known


def error_answer(error: http.HTTPException, is_oauth: bool = False) -> Response:
    """What an error is answered with; if is_oauth, as RFC 6749 §5.2 says it."""
    if isinstance(error.response, Response):  # an embedder's abort(Response(…))
        return error.response
    status, text = error.code or 500, error.description or ""
    body = getattr(error, "data", {"message": text})
    text = re.sub(r"[^ !#-\[\]-~]", "?", text)  # as error_description must be
    headers = dict(error.get_headers())
    headers.pop("Content-Type", None)
    if isinstance(error, http.MethodNotAllowed):
        headers["Allow"] = ", ".join(sorted(error.valid_methods or ()))
    if is_oauth:
        if "error" not in body:
            is_busy = status in (429, 503)
            common = "temporarily_unavailable" if is_busy else "invalid_request"
            code = getattr(error, "oauth_error", common)
            body = {"error": code, "error_description": text}
        headers["Cache-Control"] = "no-store"
        status = 400 if status == 401 else status
    elif status == 401:
        headers["WWW-Authenticate"] = 'Bearer realm="service"'
        if isinstance(error, InvalidToken):  # RFC 6750 §3.1
            why = f', error="invalid_token", error_description="{text}"'
            headers["WWW-Authenticate"] += why
    response = answer(body, status)
    response.headers.update(headers)
    return response


def add_headers(
    response: Response, environ: WSGIEnvironment, origins: list[str]
) -> None:
    """What caches and browsers must know; pages of these origins may use the service.

    Never with credentials (cookies): a page sends the token itself.
    """
    response.headers["X-Content-Type-Options"] = "nosniff"
    if "HTTP_AUTHORIZATION" in environ:  # no cache may give it to anybody else
        response.headers.setdefault("Cache-Control", "private, no-cache")
    origin = "*" if "*" in origins else environ.get("HTTP_ORIGIN", "")
    if origins and "*" not in origins:
        response.vary.add("Origin")
    if origin not in origins:
        return
    response.headers["Access-Control-Allow-Origin"] = origin
    response.headers["Access-Control-Expose-Headers"] = EXPOSED
    if is_preflight(environ):
        asked = environ.get("HTTP_ACCESS_CONTROL_REQUEST_HEADERS", "")
        response.headers["Access-Control-Allow-Headers"] = asked
        response.headers["Access-Control-Allow-Methods"] = METHODS
        response.headers["Access-Control-Max-Age"] = "600"


EXPOSED = "ETag, Link, Location, Retry-After, WWW-Authenticate"
METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE"


def is_preflight(environ: WSGIEnvironment) -> bool:
    method = "HTTP_ACCESS_CONTROL_REQUEST_METHOD"
    return environ["REQUEST_METHOD"] == "OPTIONS" and method in environ


# ---- Views -------------------------------------------------------------------------
# Plain functions: parse, act, answer. A view takes the request and its URL arguments,
# raises early and catches nothing; its route knows the status of plain JSON. Slow work,
# such as hashing, stays outside of blocks.

NAME = Text(
    1, 64, "[a-z0-9][a-z0-9._@+-]*", "of a-z, 0-9 and ._@+-, letter or digit first"
)
PASSWORD = Password(15, 1024)  # NIST SP 800-63B-4 asks for length, not for composition
TYPED = Password(1, 4096, r"[\s\S]*")
ANY = Text(1, 100_000, r"[\s\S]*")  # also what is nobody's

NO_STORE = {"Cache-Control": "no-store"}

in_body = partial(Argument, required=True, location=JSON_OR_FORM)
in_query = partial(Argument, location="args")
USERNAME = in_body("username", NAME, case_sensitive=False)
SIGN_UP = parser_of(USERNAME, in_body("password", PASSWORD))
CHANGE = parser_of(in_body("password", TYPED), in_body("new_password", PASSWORD))
CONFIRM = parser_of(in_body("password", TYPED))
GRANT = parser_of(
    in_body("grant_type", ANY),
    in_body("username", ANY, required=False, case_sensitive=False),
    in_body("password", TYPED, required=False),
    in_body("refresh_token", ANY, required=False),
    in_body("scope", required=False),
)
TOKEN = parser_of(in_body("token", ANY))
LIMIT_HELP = "Must be a whole number from 1 to 1,000"
AFTER_HELP = "Must come from a Link header"
PAGE = parser_of(
    in_query("limit", int, choices=range(1, 1001), help=LIMIT_HELP),
    in_query("after", Text(1, 15, "[0-9a-f]+"), default="0", help=AFTER_HELP),
)


INDEX = {"openapi": "/openapi.json", "docs": "/docs"}


def read_index(request: Request) -> Response:
    """Where the description is; a browser is sent to the page"""
    accept = request.headers.get("Accept", "")
    is_browser = "text/html" in accept and "json" not in accept
    if is_browser and find_spec("flask_swagger_ui"):
        return answer(None, 303, Location=f"{request.prefix}/docs", Vary="Accept")
    urls = {name: request.prefix + path for name, path in INDEX.items()}
    return answer(urls, Vary="Accept")


def read_health(request: Request) -> Any:
    """Whether the service and its store answer, and can be written"""
    with request.app.store.write("", NO_ITEMS) as data:
        # What changes is committed, and a full disk shows; once in 5 s is enough.
        data["counters"]["health"] = {"checked": request.app.clock() // 5}
    return {"status": "ok"}


def create_user(request: Request) -> Any:
    """Sign up"""
    if request.app.settings.signup == "closed":
        raise http.Forbidden("Sign-up is closed: ask the operator for an account")
    given = SIGN_UP.parse_args(request)
    refuse_name_as_password(given.username, given.password)
    hash = request.app.passwords.hash(given.password, request.remote_addr or "")
    add_account(request.app, given.username, hash)
    request.log("sign-up", given.username)
    return {"username": given.username}


def refuse_name_as_password(
    username: str, password: str, argument: str = "password"
) -> None:
    if password.casefold() == username:
        raise Refusal(message={argument: "Must not be the name itself"})


def add_account(app: Any, name: str, hash: str, roles: Iterable[str] = ()) -> None:
    """A new account with its starter items; 409 if the name is or was taken."""
    with app.store.write(name, NO_ITEMS) as data:
        if data["account"]:
            raise http.Conflict(f"The name {name} is taken")
        data["account"] = {"hash": hash, "roles": sorted(set(roles))}
        for resource in app.resources:
            for id, item in resource.starter.items():
                add_item(data, resource, item, id)


def read_user(request: Request) -> Any:
    """Who is logged in"""
    return {"username": request.user, "roles": roles_of(request.read(NO_ITEMS))}


def change_password(request: Request) -> None:
    """Change the password; all other sessions end"""
    given = CHANGE.parse_args(request)
    account = check_password(request, request.user, given.password)
    refuse_name_as_password(request.user, given.new_password, "new_password")
    hash = request.app.passwords.hash(given.new_password, request.remote_addr or "")
    with request.write(NO_ITEMS) as data:
        refuse_if_changed(data, account)
        check_preconditions(request, data, NO_TAG)
        data["account"]["hash"] = hash
        end_other_sessions(request, data)
    request.log("password changed", request.user)


def delete_user(request: Request) -> None:
    """Delete the account and all that it holds; the name stays taken"""
    given = CONFIRM.parse_args(request)
    account = check_password(request, request.user, given.password)
    with request.write(NO_ITEMS) as data:
        refuse_if_changed(data, account)
        check_preconditions(request, data, NO_TAG)
        delete_account(data)
    request.log("account deleted", request.user)


def delete_account(data: Data) -> None:
    data.clear()
    data["account"] = {"hash": None}  # nobody inherits what others keep under the name


def check_password(request: Request, name: str, password: str) -> dict[str, Any]:
    """The account of whoever knows its password; WrongPassword for others, or 429.

    It is checked outside of any block, so inside one refuse_if_changed must follow.
    """
    account: dict[str, Any] = {}
    if re.fullmatch(NAME.pattern, name):
        account = request.app.store.read(name, NO_ITEMS)["account"]
    address, match = request.remote_addr or "", request.app.passwords.match
    if not match(account.get("hash"), password, name, address):
        raise WrongPassword(message={"password": "Wrong, or there is no such user"})
    return account


def refuse_if_changed(data: Data, account: dict[str, Any]) -> None:
    if data["account"] != account:
        raise WrongPassword(message={"password": "Was changed at this moment"})


def list_sessions(request: Request) -> Any:
    """Where the user is logged in; times in seconds since 1970"""
    data, now = request.read(NO_ITEMS), request.app.clock()
    return {
        sid: {
            "started_at": session["started_at"],
            "renewed_at": int(session["rotated_at"]),
            "expires_at": session["expires_at"],
            "is_current": sid == request.claims["sid"],
        }
        for sid, session in data["sessions"].items()
        if session["expires_at"] > now
    }


def end_session(request: Request, sid: str) -> None:
    """End one session"""
    with request.write(NO_ITEMS) as data:
        session = data["sessions"].pop(sid, None)
        if not session or session["expires_at"] <= request.app.clock():
            raise http.NotFound(f"Session {sid} doesn't exist")
        check_preconditions(request, data, NO_TAG)
    request.log("logout", request.user)


def end_sessions(request: Request) -> None:
    """End all sessions but this one"""
    with request.write(NO_ITEMS) as data:
        check_preconditions(request, data, NO_TAG)
        end_other_sessions(request, data)
    request.log("logout", request.user)


def end_other_sessions(request: Request, data: Data) -> None:
    sid = request.claims["sid"]
    data["sessions"] = {sid: data["sessions"][sid]}


def issue_token(request: Request) -> Any:
    """Log in, or refresh a session"""
    given = parse_once(request, GRANT)
    grants = {"password": log_in, "refresh_token": refresh}
    grant = grants.get(given.grant_type)
    if grant is None:
        right = f"The grants are {' and '.join(grants)}"
        raise Refusal(error="unsupported_grant_type", error_description=right)
    if given.scope:
        raise Refusal(error="invalid_scope", error_description="There are no scopes")
    return grant(request, given), 200, NO_STORE


def parse_once(request: Request, parser: RequestParser) -> Namespace:
    """Arguments that stand once each, in the body: URLs are logged (RFC 6749 §3.2)."""
    parts = Parts(request)
    for each in parser.args:
        if each.name in parts["args"]:
            raise Refusal(message=f"{each.name} must be in the body, not in the URL")
    for name, values in parts["form"].lists():
        if len(values) > 1:
            raise Refusal(message=f"{name} must be sent once")
    return parser.parse_args(request)


def needed(given: Namespace, name: str) -> str:
    if given[name] is None:
        raise Refusal(message={name: "Missing required parameter"})
    return str(given[name])


def log_in(request: Request, given: Namespace) -> Any:
    """A new session's tokens. First-party login: RFC 9700 retires it for others."""
    app, name = request.app, needed(given, "username")
    account = check_password(request, name, needed(given, "password"))
    with app.store.write(name, NO_ITEMS) as data:
        refuse_if_changed(data, account)
        sid = open_session(data, app.clock(), app.settings.refresh_ttl)
    request.log("login", name)
    return app.tokens.pair(name, sid, data)


def refresh(request: Request, given: Namespace) -> Any:
    """The next generation's tokens; a replayed token ends its session."""
    app = request.app
    claims = app.tokens.verify(REFRESH, needed(given, "refresh_token"))
    name, sid, grace = claims["sub"], claims["sid"], app.settings.refresh_grace
    with app.store.write(name, NO_ITEMS) as data:
        outcome = renew_session(data, sid, claims["gen"], app.clock(), grace)
    # Outside of the block, which keeps that the session has ended.
    if outcome == "reused":
        request.log("reuse detected", name)
    if outcome in ("reused", "ended"):
        raise InvalidToken("The session has ended: log in again")
    return app.tokens.pair(name, sid, data)


def revoke_token(request: Request) -> Any:
    """Log out: end the session of an access or a refresh token (RFC 7009)"""
    token = parse_once(request, TOKEN).token
    for typ in (ACCESS, REFRESH):
        # Junk is no error here (§2.2), nor is a late logout.
        with suppress(InvalidToken):
            claims = request.app.tokens.verify(typ, token, even_expired=True)
            with request.app.store.write(claims["sub"], NO_ITEMS) as data:
                if data["sessions"].pop(claims["sid"], None):
                    request.log("logout", claims["sub"])
    return {}, 200, NO_STORE


def read_jwks(request: Request) -> Any:
    """The public keys that verify access tokens (RFC 7517)"""
    return request.app.tokens.jwks, 200, {"Cache-Control": "max-age=300"}


def list_items(request: Request, resource: Resource) -> Response:
    """List the items in the order of their creation"""
    given = PAGE.parse_args(request)
    after, limit = int(given.after, 16), given.limit or Query().limit
    query = Query(resource.name, "", after, limit)
    page = request.read(query, resource.shared)[resource.name]
    if page.next is None:
        return conditional(request, page)
    limited = f"limit={limit}&" if given.limit else ""
    url = f"{request.prefix}/{resource.name}?{limited}after={page.next:x}"
    return conditional(request, page, Link=f'<{url}>; rel="next"')


def create_item(request: Request, resource: Resource) -> Response:
    """Create an item under the next id"""
    item = resource.parser.parse_args(request)
    with request.write(NO_ITEMS, resource.shared) as data:
        if "If-Match" in request.headers or "If-None-Match" in request.headers:
            data.fetch(Query(resource.name))
            check_preconditions(request, data[resource.name])
        id = next_id(data, resource)
        add_item(data, resource, item, id, request.app.settings.max_items)
    return tagged(item, 201, Location=f"{request.prefix}/{resource.name}/{id}")


def read_item(request: Request, resource: Resource, id: str) -> Response:
    """Read one item"""
    data = request.read(Query(resource.name, id), resource.shared)
    return conditional(request, existing_item(data, resource, id))


def put_item(request: Request, resource: Resource, id: str) -> Response:
    """Create or replace the item under an id of one's own choice"""
    item = resource.parser.parse_args(request)
    with request.write(Query(resource.name, id), resource.shared) as data:
        if not ID.fullmatch(id):  # here, since 401 and 403 come first
            raise http.BadRequest(
                "An id has 1 to 64 characters, no slash, control character or U+FFFD,"
                " and is not . or .."
            )
        current = data[resource.name].get(id)
        check_preconditions(request, current)
        if current is None:
            add_item(data, resource, item, id, request.app.settings.max_items)
        else:
            data[resource.name][id] = item
    return tagged(item, 201)  # for one that was there too: clients rely on it


def update_item(request: Request, resource: Resource, id: str) -> Response:
    """Change the arguments that are sent, and leave the others"""
    changes = resource.parser.parse_args(request, partial=True)
    with request.write(Query(resource.name, id), resource.shared) as data:
        item = existing_item(data, resource, id)
        check_preconditions(request, item)
        merge_patch(item, changes)
    return tagged(item)


def merge_patch(item: dict[str, Any], changes: dict[str, Any]) -> None:
    """As RFC 7396 §2 does it, for one level: an argument is changed as a whole."""
    for name, value in changes.items():
        if value is REMOVED:
            item.pop(name, None)
        else:
            item[name] = value


def delete_item(request: Request, resource: Resource, id: str) -> None:
    """Delete an item; its id is not given again"""
    with request.write(Query(resource.name, id), resource.shared) as data:
        check_preconditions(request, existing_item(data, resource, id))
        del data[resource.name][id]


def existing_item(data: Data, resource: Resource, id: str) -> dict[str, Any]:
    if id not in data[resource.name]:
        raise http.NotFound(f"{resource.item.capitalize()} {id} doesn't exist")
    item: dict[str, Any] = data[resource.name][id]
    return item


def next_id(data: Data, resource: Resource) -> str:
    """The first number above all that ids have had, also those that a PUT chose."""
    counter = data.counter(resource.name)
    while True:
        counter["number"] += 1
        id = f"{resource.item}{counter['number']}"
        data.fetch(Query(resource.name, id))
        if id not in data[resource.name]:  # a block may have put it there by hand
            return id


def add_item(
    data: Data,
    resource: Resource,
    item: Mapping[str, Any],
    id: str,
    limit: float = math.inf,
) -> None:
    """Put an item where none is; 403 if there is no room. Uses the id's number up."""
    counter = data.counter(resource.name)
    if counter["count"] >= limit:
        raise http.Forbidden(f"There is room for {limit:,} items: delete one first")
    if match := re.fullmatch(f"{resource.item}([1-9][0-9]{{0,39}})", id):
        counter["number"] = max(counter["number"], int(match[1]))
    data[resource.name][id] = dict(item)


# ---- Routes ------------------------------------------------------------------------
# Which request goes to which view, and what the description tells of it.


@dataclass(frozen=True, eq=False)
class Route:
    """A view, the requests that it answers, and what a description tells of it.

    The view takes the request and its URL arguments, and returns JSON (None is null), a
    tuple (JSON, status[, headers]), or a Response.
    """

    rule: str  # "PUT /todos/<id>": method and Werkzeug rule
    view: Callable[..., Any]
    status: int = 200  # of success
    takes: RequestParser | None = None
    example: Any = None  # of an answer
    is_open: bool = False  # without an access token
    resource: Resource | None = None  # that the view is for, as a second argument


def routes_of(resource: Resource) -> list[Route]:
    """The six routes that every resource gets."""
    items, item, parser = f"/{resource.name}", f"/{resource.name}/<id>", resource.parser
    routes = [
        Route(f"GET {items}", list_items, 200, PAGE),
        Route(f"POST {items}", create_item, 201, parser),
        Route(f"GET {item}", read_item),
        Route(f"PUT {item}", put_item, 201, parser),
        Route(f"PATCH {item}", update_item, 200, parser),
        Route(f"DELETE {item}", delete_item, 204),
    ]
    return [replace(route, resource=resource) for route in routes]


USER = {"username": "alice"}
SESSION = {"started_at": 1, "renewed_at": 1, "expires_at": 86401, "is_current": True}
PAIR = {
    "access_token": "eyJ0…",
    "token_type": "Bearer",
    "expires_in": 900,
    "refresh_token": "eyJ0…",
    "refresh_expires_in": 86400,
}
OUR_ROUTES = [
    Route("GET /", read_index, 200, None, INDEX, True),
    Route("GET /health", read_health, 200, None, {"status": "ok"}, True),
    Route("POST /users", create_user, 201, SIGN_UP, USER, is_open=True),
    Route("GET /users/me", read_user, 200, None, USER | {"roles": ["operator"]}),
    Route("PATCH /users/me", change_password, 204, CHANGE),
    Route("DELETE /users/me", delete_user, 204, CONFIRM),
    Route("GET /users/me/sessions", list_sessions, 200, None, {"k3J…": SESSION}),
    Route("DELETE /users/me/sessions", end_sessions, 204),
    Route("DELETE /users/me/sessions/<sid>", end_session, 204),
    Route("POST /token", issue_token, 200, GRANT, PAIR, True),
    Route("POST /revoke", revoke_token, 200, TOKEN, {}, True),
    Route("GET /.well-known/jwks.json", read_jwks, 200, None, {"keys": [{}]}, True),
]


# ---- OpenAPI -----------------------------------------------------------------------
# The service as programs read it (OpenAPI 3.1), made from its routes, parsers and
# resources, so that it cannot drift; and a page that shows it to people.

VARIABLE = re.compile(r"<(?:[^<>:]+:)?([^<>]+)>")
IN_OPENAPI = {"args": "query", "headers": "header", "cookies": "cookie"}
TEXT = {"type": "string"}
ETAGS = TEXT | {"pattern": f"^{ENTITY_TAGS}$"}
MESSAGE = {"message": {"type": ["string", "object"]}}
OAUTH = {"error": TEXT, "error_description": TEXT}
ERROR = {"type": "object", "properties": MESSAGE | OAUTH}
DOCS = """<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="icon" href="docs/favicon-32x32.png">
<link rel="stylesheet" href="docs/swagger-ui.css"><div id="swagger-ui"></div>
<script src="docs/swagger-ui-bundle.js"></script><script src="docs/start.js"></script>
"""
START = 'SwaggerUIBundle({url: "openapi.json", dom_id: "#swagger-ui"})'
POLICY = (
    "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
)


def read_openapi(request: Request) -> Response:
    """This description"""
    app, prefix = request.app, request.prefix
    paths = defaultdict[str, dict[str, Any]](dict)
    for route in app.routes:
        method, path = VARIABLE.sub(r"{\1}", route.rule).split()
        if route.view not in (read_openapi, read_docs):
            paths[path][method.lower()] = operation(route)
    schemas = {
        camel(each.item): body_schema(each.parser.args) for each in app.resources
    }
    login = {"password": {"tokenUrl": f"{prefix}/token", "scopes": {}}}
    document = {
        "openapi": "3.1.0",
        "info": {"title": app.title, "version": "1.0.0"},
        "servers": [{"url": prefix or "/"}],
        "paths": paths,
        "components": {
            "schemas": {"Error": ERROR} | schemas,
            "securitySchemes": {"login": {"type": "oauth2", "flows": login}},
        },
    }
    return Response(json.dumps(document, default=str), content_type="application/json")


def camel(text: str) -> str:
    return re.sub(r"\W", "", text.title())


def operation(route: Route) -> dict[str, Any]:
    """What OpenAPI says of one route."""
    is_get, members = route.rule.startswith("GET "), []
    parameters = [
        parameter("path", name, TEXT, True) for name in VARIABLE.findall(route.rule)
    ]
    for each in route.takes.args if route.takes else ():
        places = [name for name in each.places if name in IN_OPENAPI or not is_get]
        place = IN_OPENAPI.get(places[0]) if places else None
        if place:
            parameters.append(parameter(place, each.name, each.schema, each.required))
        else:
            members.append(each)
    if route.resource:
        for name in ("If-Match", "If-None-Match"):
            parameters.append(parameter("header", name, ETAGS))
    described = {
        "operationId": re.sub(r"\W+", "_", route.rule).strip("_").lower(),
        "summary": (route.view.__doc__ or route.rule).strip().split("\n")[0],
        "tags": [route.resource.name if route.resource else "service"],
        "security": [] if route.is_open else [{"login": []}],
        "parameters": parameters,
        "responses": responses(route),
    }
    if members:
        # Not "required": the clients of openapi-python-client would not import then.
        schema = body_schema(members, is_partial=route.view is update_item)
        described["requestBody"] = content(schema, BODY_TYPES)
    return described


def parameter(
    place: str, name: str, schema: dict[str, Any], is_required: bool = False
) -> dict[str, Any]:
    return {"in": place, "name": name, "required": is_required, "schema": schema}


def responses(route: Route) -> dict[str, Any]:
    schema = schema_of(route.example)
    if route.resource:
        schema = {"$ref": f"#/components/schemas/{camel(route.resource.item)}"}
    if route.view is list_items:
        schema = {"type": "object", "additionalProperties": schema}
    success = {"description": HTTP_STATUS_CODES.get(route.status, "Success")}
    if route.status != 204:
        success |= content(schema)
    failure = content({"$ref": "#/components/schemas/Error"})
    error = {"description": "An error"} | failure
    found = {str(route.status): success, "default": error}
    if route.view in (list_items, read_item):
        found["304"] = {"description": HTTP_STATUS_CODES[304]}
    return found


def content(schema: Any, kinds: Iterable[str] = BODY_TYPES[:1]) -> dict[str, Any]:
    return {"content": {kind: {"schema": schema} for kind in kinds}}


def schema_of(example: Any) -> dict[str, Any]:
    """The JSON Schema of what looks like this example."""
    if isinstance(example, dict):
        properties = {name: schema_of(value) for name, value in example.items()}
        return {"type": "object", "properties": properties, "examples": [example]}
    if isinstance(example, list):
        kinds = [schema_of(each) for each in example]
        is_one = kinds and all(each == kinds[0] for each in kinds)
        return {"type": "array", "items": kinds[0] if is_one else {}}
    return STRICT[type(example)].__schema__ if type(example) in STRICT else {}


def body_schema(arguments: list[Argument], is_partial: bool = False) -> dict[str, Any]:
    """What a body holds."""
    properties, required = {}, []
    for each in arguments:
        properties[each.name] = each.schema
        if each.nullable or (each.nullable is None and not each.required):
            properties[each.name] = {"anyOf": [each.schema, {"type": "null"}]}
        if each.required and not is_partial:
            required.append(each.name)
    return {"type": "object", "properties": properties, "required": required}


def read_docs(request: Request, file: str = "") -> Response:
    """The page on which people read this description and try the service"""
    package = find_spec("flask_swagger_ui")
    if package is None:
        raise http.NotFound("The page needs: pip install flask-swagger-ui")
    if not file:
        html = DOCS.format(title=escape(request.app.title))
        page = Response(html, mimetype="text/html")
        page.headers["Content-Security-Policy"] = POLICY
        return page
    if file == "start.js":
        return Response(START, mimetype="text/javascript")
    folder = Path(str(package.origin)).parent / "dist"
    return send_from_directory(folder, file, request.environ)


DOCS_ROUTES = [
    Route("GET /openapi.json", read_openapi, is_open=True),
    Route("GET /docs", read_docs, is_open=True),
    Route("GET /docs/<file>", read_docs, is_open=True),
]


# ---- Application -------------------------------------------------------------------
# An App puts the rooms together. Here, and only here, errors become answers.


FORWARDED = [f"HTTP_X_FORWARDED_{name}" for name in ("FOR", "PROTO", "HOST", "PREFIX")]


class App:
    """The service as a WSGI callable (PEP 3333).

    settings come from the environment unless given, the store from their URL; resources
    replace the to-dos; routes are more Routes, or replace ours of the same rule; clock
    gives the time in seconds. Raises ValueError for what cannot work.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        store: Any = None,
        resources: Iterable[Resource] | None = None,
        routes: Iterable[Route] = (),
        clock: Clock = time.time,
        title: str = "To-do service",
    ) -> None:
        settings = settings or Settings.from_environ()
        self.store = open_store(settings.store_url) if store is None else store
        if not settings.secret_key:
            if not isinstance(self.store, MemoryStore):
                raise ValueError(
                    "SERVICE_SECRET_KEY must be set for a store that lasts:"
                    " openssl rand -hex 32"
                )
            # It forgets as much at exit as the store does.
            settings = replace(settings, secret_key=secrets.token_hex(32))
        self.settings, self.clock, self.title = settings, clock, title
        self.tokens, self.passwords = Tokens(settings, clock), Passwords(clock)
        self.resources = [TODO_RESOURCE] if resources is None else list(resources)
        refuse_twins([each.name for each in self.resources])
        refuse_twins([each.item for each in self.resources])
        ours = chain(OUR_ROUTES, DOCS_ROUTES, *map(routes_of, self.resources))
        by_rule = {route.rule: route for route in chain(ours, routes)}
        self.routes = list(by_rule.values())
        rules = []
        for route in self.routes:
            method, path = route.rule.split()
            rules.append(Rule(path, methods=[method, "OPTIONS"], endpoint=route))
        # No redirects: /todos/ and //todos are other paths than /todos.
        self._urls = Map(rules, merge_slashes=False, redirect_defaults=False).bind("")
        self._match = lru_cache(maxsize=1000)(self._urls.match)
        self._origins, hops = settings.origins, settings.proxies
        self._forwarded = FORWARDED if hops else ()
        self._wsgi: WSGIApplication = self._respond
        if hops:
            self._wsgi = ProxyFix(self._respond, hops, hops, hops, 0, hops)

    def __call__(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        for name in self._forwarded:  # of which ProxyFix takes the end
            if name in environ:
                environ[name] = environ[name][-1000:]
        return self._wsgi(environ, start_response)

    def _respond(
        self, environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        request = Request(environ, self)
        try:
            response = self._answer_or_refuse(request)
        except Exception:
            log.exception("a bug: %s %r", request.method, request.path)
            response = error_answer(http.InternalServerError())
        add_headers(response, environ, self._origins)
        return response(environ, start_response)

    def _answer_or_refuse(self, request: Request) -> Response:
        try:
            return self._answer(request)
        except RequestRedirect:
            return error_answer(http.NotFound())
        except http.HTTPException as error:
            is_oauth = request.path in ("/token", "/revoke")
            response = sendable(error_answer(error, is_oauth), request.environ)
            if error.code == 415 and request.method == "PATCH":  # RFC 5789 §2.2
                response.headers["Accept-Patch"] = ", ".join(PATCH_TYPES)
            return response

    def _answer(self, request: Request) -> Response:
        environ, path = request.environ, request.path
        if environ.get("SERVER_PROTOCOL") == "HTTP/1.1" and "HTTP_HOST" not in environ:
            raise http.BadRequest("HTTP/1.1 asks for a Host header (RFC 9112 §3.2)")
        if environ.get("PATH_INFO", "").startswith("//"):  # Werkzeug drops a slash
            raise http.NotFound()
        if request.method == "OPTIONS":
            methods = sorted(self._urls.allowed_methods(path))
            if methods:
                response = answer(None, 204, Allow=", ".join(methods))
                if "PATCH" in methods:
                    response.headers["Accept-Patch"] = ", ".join(PATCH_TYPES)
                return response
        route, found = self._match(path, request.method)
        arguments = dict(found)
        if not route.is_open:  # 401 comes before all else
            request.authenticate()
            # A resource's view looks at the session with its data; others need not.
            if not route.resource:
                request.read(NO_ITEMS)
        if route.resource:
            arguments["resource"] = route.resource
        try:
            if "\0" in path:
                raise http.BadRequest("A path holds no NUL")
            if len(environ.get("CONTENT_TYPE", "")) > 512:  # which takes long to read
                raise http.RequestHeaderFieldsTooLarge(
                    "Content-Type may have 512 characters"
                )
            if route.takes:
                request.check_body(route.takes)
            result = route.view(request, **arguments)
            return response_of(result, route.status, environ)
        except http.HTTPException as error:
            # 401 before all else, unless the session is known, or cannot be.
            if not (route.is_open or request.is_in or error.code == 503):
                request.read(NO_ITEMS)
            raise


def refuse_twins(words: list[str]) -> None:
    if len(set(words)) < len(words):
        raise ValueError(f"two resources have one word: {', '.join(words)}")


create_app = App  # gunicorn's name for it: wsgi_app = "service:create_app()"


# ---- Guard -------------------------------------------------------------------------
# What other services mount in front of themselves, so that one login opens them too. It
# knows keys, but no sessions: a logout reaches them when the access token expires.


def guard(
    wsgi_app: WSGIApplication,
    *,
    issuer: str,
    audience: str,
    secret: str | None = None,
    jwks_url: str | None = None,
    open_paths: Iterable[str] = (),
    clock: Clock = time.time,
) -> WSGIApplication:
    """WSGI middleware that lets only valid access tokens through.

    The app finds REMOTE_USER, the name, and service.claims. It verifies with the keys
    at the issuer's jwks_url, or with its secret (which can forge tokens as well). No
    good token: 401 (RFC 6750 §3); no keys: 503. CORS preflights and open_paths pass.
    """
    is_named = comma_list(audience)  # or tokens for the issuer alone would do
    if not is_named or bool(secret) == bool(jwks_url) or isinstance(open_paths, str):
        raise ValueError("guard needs audience, secret or jwks_url, a list of paths")
    settings = Settings(secret or "", issuer=issuer, audience=audience)
    paths = {path.encode().decode("latin-1") for path in open_paths}  # PEP 3333
    tokens = Tokens(settings, clock, remote_keys(jwks_url) if jwks_url else None)

    def guarded(
        environ: WSGIEnvironment, start_response: StartResponse
    ) -> Iterable[bytes]:
        for name in ("REMOTE_USER", "HTTP_REMOTE_USER", "AUTH_TYPE", "service.claims"):
            environ.pop(name, None)  # no client says who it is
        if environ.get("PATH_INFO") not in paths and not is_preflight(environ):
            try:
                claims = tokens.verify(ACCESS, bearer_token(environ))
            except http.HTTPException as error:
                response = error_answer(error)
                add_headers(response, environ, ["*"])
                return response(environ, start_response)
            environ["REMOTE_USER"], environ["AUTH_TYPE"] = claims["sub"], "Bearer"
            environ["service.claims"] = claims
        return wsgi_app(environ, start_response)

    return guarded


NO_KEYS = (jwt.PyJWTError, ValueError, TypeError, RuntimeError, OSError)


def patiently(ask: Callable[..., Any]) -> Callable[..., Any]:
    """To ask one at a time, and not within a second after it failed: nobody queues."""
    lock, failed_at = threading.Lock(), -math.inf

    def asked(*given: Any) -> Any:
        nonlocal failed_at
        with lock:
            if time.monotonic() < failed_at + 1:
                raise jwt.PyJWKClientConnectionError("it did not answer a moment ago")
            try:
                return ask(*given)
            except NO_KEYS as error:
                if type(error) is not jwt.PyJWKClientError:  # which is: no such key
                    failed_at = time.monotonic()
                raise

    return asked


def remote_keys(url: str) -> FindKey:
    """A function that finds a public key by its kid in the JWK set at a URL."""
    agent = {"User-Agent": "todo-service"}  # firewalls refuse Python's
    client = jwt.PyJWKClient(url, timeout=5, cooldown_duration=10, headers=agent)
    get_keys = patiently(client.get_signing_keys)
    get_key = patiently(client.get_signing_key)

    def find(kid: str) -> jwt.PyJWK:
        keys = None
        try:
            keys = get_keys()
            key = client.match_kid(keys, kid) or get_key(kid)
        except NO_KEYS as error:
            if keys and type(error) is jwt.PyJWKClientError:
                raise LookupError(kid) from None
            log.warning("no keys from %s: %r", url, error)
            text = "The issuer's keys cannot be had"
            raise http.ServiceUnavailable(text, retry_after=10) from None
        if key.algorithm_name not in THUMBPRINT:  # a secret that was published is none
            raise LookupError(kid)
        return key

    return find


# ---- Main --------------------------------------------------------------------------
# python service.py is the development server, which starts anew when a file changes;
# and three commands, for closed sign-up and lost passwords.


def main(app: App | None = None) -> None:
    """Run the development server or a command, for this app or our own."""
    parser = argparse.ArgumentParser(description="The development server; accounts")
    parser.add_argument("command", nargs="?", choices=("adduser", "passwd", "deluser"))
    parser.add_argument("name", nargs="?", default="")
    parser.add_argument("--role", action="append", default=[], help="of adduser")
    options = parser.parse_intermixed_args()
    if options.role and options.command != "adduser":
        parser.error("--role is of adduser")
    logging.basicConfig(level=logging.INFO)
    try:
        app = app or App()
        if options.command:
            run_command(app, options.command, options.name.lower(), options.role)
        else:
            run_simple("127.0.0.1", port(), app, use_reloader=True, threaded=True)
    except (ValueError, OSError, http.HTTPException) as error:
        sys.exit(getattr(error, "description", str(error)))


def run_command(app: App, command: str, name: str, roles: list[str]) -> None:
    if isinstance(app.store, MemoryStore):
        raise ValueError("Set SERVICE_STORE_URL: the memory store is gone at the end")
    hash = "" if command == "deluser" else app.passwords.hash(typed_password(name))
    if command == "adduser":
        add_account(app, name, hash, [ROLE(role) for role in roles])
        return
    with app.store.write(name, NO_ITEMS) as data:
        if not data["account"].get("hash"):
            raise ValueError(f"There is no account {name}")
        data["account"]["hash"], data["sessions"] = hash, {}
        if command == "deluser":
            delete_account(data)


def typed_password(name: str) -> str:
    typed = getpass() if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
    given = SIGN_UP.clean(in_json({"username": name, "password": typed}))
    refuse_name_as_password(**given)
    return str(given.password)


if __name__ == "__main__":
    main()
