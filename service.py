"""A to-do service with tokens: a complete REST service in one file.

People sign up, log in, get an access and a refresh token, and keep their to-do list with plain HTTP; for 24 hours no
password is asked for again. `gunicorn` deploys it, `python service.py` is for development. Then:

    curl localhost:5000/users -d username=alice -d 'password=correct horse battery'
    curl localhost:5000/token -d grant_type=password -d username=alice -d 'password=correct horse battery'

The rooms, in reading order; each uses only what stands above it: Settings, Errors, Arguments, Stores, Tokens,
Sessions and passwords, HTTP edge, Views, OpenAPI, Routes, Application, Guard, Main.
"""

from __future__ import annotations

import argparse
import hashlib
import hmac
import ipaddress
import json
import logging
import math
import os
import random
import re
import secrets
import sys
import threading
import time
import unicodedata
from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from getpass import getpass
from importlib.util import find_spec
from io import BytesIO
from itertools import count, islice
from pathlib import Path
from types import MappingProxyType
from typing import IO, TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlsplit

import jwt
import werkzeug
from jwt.algorithms import has_crypto
from jwt.utils import base64url_decode, base64url_encode
from werkzeug import exceptions as http
from werkzeug.datastructures import FileStorage
from werkzeug.http import HTTP_STATUS_CODES
from werkzeug.middleware.proxy_fix import ProxyFix
from werkzeug.routing import Map, RequestRedirect, Rule
from werkzeug.security import check_password_hash, generate_password_hash
from werkzeug.serving import run_simple
from werkzeug.utils import cached_property, send_from_directory

if TYPE_CHECKING:
    from _typeshed.wsgi import StartResponse, WSGIApplication, WSGIEnvironment

log = logging.getLogger("service")

def log_event(event: str, user: str, address: str | None) -> None:
    log.info("%s: user %r, address %r", event, user[:65], address)  # %r: a name that is none may be any text

# ---- Settings -------------------------------------------------------------------------------------------------------
# One frozen value holds every setting. It is checked when it is made, so whoever holds one holds a good one.

_RULES = {  # setting: (pattern of its UTF-8 bytes, what that means, an example)
    "secret_key": (r"(\s*[^\s,][^,]{30,}[^\s,]\s*(,|$))*", "32 bytes or more, or several such with commas", ""),
    "store_url": (
        r"memory:|sqlite:///(?!:).+|postgresql://([^\s@/]*@)?(\[[^\s\]]+\]|[^\s@:/?\[]*)(:[0-9]+)?([/?]\S*)?",
        "memory:, sqlite:///FILE or postgresql://USER:PASSWORD@HOST/NAME, with %40 %3A %2F for @ : / in a password",
        "memory:",
    ),
    "access_ttl": (r"[1-9][0-9]{0,5}", "seconds, 1 to 999999", "900"),
    "refresh_ttl": (r"[1-9][0-9]{0,7}", "seconds, 1 to 99999999", "86400"),
    "refresh_grace": (r"[0-9]{1,3}", "seconds, 0 to 999", "10"),
    "signup": (r"open|closed", "open or closed", "closed"),
    "issuer": (r"https?://[^\s/?#,\"\\]+[^\s?#,\"\\]*", "the URL that clients use", "https://todo.example"),
    "audience": (r"(\s*[^\s\",\\]{1,200}\s*(,|$)){0,10}", "names with commas between", "https://todo.example"),
    "cors_origins": (r"\*|(\s*https?://[^\s/?#,]+\s*(,|$))*", "* or origins with commas", "https://app.example"),
    "signing_key_file": (r"[^\0]*", "PEM files with commas between", "/etc/todo/ed25519.pem"),
    "max_body": (r"[1-9][0-9]{2,8}", "bytes, 100 to 999999999", "65536"),
    "max_items": (r"[1-9][0-9]{0,6}", "items, 1 to 9999999", "10000"),
    "proxies": (r"[0-9]", "trusted hops, 0 to 9", "1"),
}

MISSING_SECRET = "SERVICE_SECRET_KEY is missing: a lasting store needs one, for example that of openssl rand -hex 32"

@dataclass(frozen=True)
class Settings:
    """What an operator chooses; ValueError, in one line, names a bad variable, its fault and a right example."""

    secret_key: str = field(default="", repr=False)  # of several, the first signs, all verify
    store_url: str = field(default="memory:", repr=False)
    access_ttl: int = 900
    refresh_ttl: int = 86_400  # from one login to the next, whatever is refreshed
    refresh_grace: int = 10  # for which a superseded refresh token is forgiven
    signup: str = "open"
    issuer: str = "http://localhost:5000"
    audience: str = ""  # the issuer unless given
    signing_key_file: str = ""  # of several, the first signs access tokens, all verify and are published
    cors_origins: str = ""
    max_body: int = 65_536
    max_items: int = 10_000  # of one resource, a user
    proxies: int = 0

    def __post_init__(self) -> None:
        for name, (pattern, right, example) in _RULES.items():
            value = getattr(self, name)
            if isinstance(value, list | tuple):
                object.__setattr__(self, name, value := ",".join(value))
            text = str(value).encode("utf-8", "surrogateescape").decode("latin-1")
            if not re.fullmatch(pattern, text, re.ASCII):
                found = "" if name in ("secret_key", "store_url") else f" {value!r}"
                right += ", for example " + (example or secrets.token_hex(32))
                raise ValueError(f"SERVICE_{name.upper()}{found} cannot be: it must be {right}")
            if isinstance(getattr(Settings, name), int):
                object.__setattr__(self, name, int(text))
        if not self.secret_key and self.store_url != "memory:":
            raise ValueError(MISSING_SECRET)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] = os.environ) -> Settings:
        """Settings from the variables SERVICE_<NAME>; an empty one counts as not set."""
        given = {name: environ.get(f"SERVICE_{name.upper()}") for name in _RULES}
        return cls(**{name: text for name, text in given.items() if text})  # type: ignore[arg-type]

def comma_list(text: str) -> list[str]:
    return [part for part in re.split(r"(?a:\s*,\s*)", text.strip(" \t\n\r\f\v")) if part]

# ---- Errors ---------------------------------------------------------------------------------------------------------
# Whatever goes wrong is an exception that knows its status. Werkzeug has most of them; these add a body of one's own,
# as flask-restful and OAuth have them, and what tokens and stores have to say. Only create_app answers with them.

class Refusal(http.BadRequest):
    """A 400 and its body: message, a text or {argument: text}; or error and error_description (RFC 6749 §5.2)."""

    def __init__(self, **data: Any) -> None:
        message = data.get("message", "")
        super().__init__("; ".join(map(": ".join, message.items())) if isinstance(message, dict) else message)
        self.data = data

class InvalidToken(http.HTTPException):
    """What proves nothing: invalid_token from a bearer (RFC 6750 §3.1), invalid_grant as a grant (RFC 6749 §5.2)."""

    code = 401

class StoreError(http.ServiceUnavailable):
    """The store does not answer now; after a conflict, the whole transaction may simply be run again."""

    def __init__(self, conflict: bool = False) -> None:
        super().__init__("The store does not answer", retry_after=1)
        self.conflict = conflict

# ---- Arguments ------------------------------------------------------------------------------------------------------
# A RequestParser holds Arguments. Each looks for its name in parts of the request, converts what it finds, and gives a
# clean value or says what would be right; the names are those that flask-restful users know. A Resource is a data
# model: a name, and the arguments that make up one item.

_WORDS = {  # a part of the request, and what an error calls it
    "json": "the JSON body", "form": "the post body", "args": "the query string", "headers": "the HTTP headers",
    "cookies": "the request's cookies", "files": "an uploaded file",
}
_MISSING: Any = object()

class Namespace(dict[str, Any]):
    """Parsed arguments: a dict whose keys are attributes too."""

    __setattr__ = dict.__setitem__

    def __getattr__(self, name: str) -> Any:
        if name not in self:
            raise AttributeError(name)
        return self[name]

class RequestParser:
    """Takes arguments out of any Werkzeug request, in place of flask-restful's reqparse.

    >>> from werkzeug.test import EnvironBuilder
    >>> parser = RequestParser().add_argument("task", required=True).add_argument("rank", type=int)
    >>> parser.parse_args(werkzeug.Request(EnvironBuilder(data={"task": "x", "rank": "2"}).get_environ()))
    {'task': 'x', 'rank': 2}

    trim strips blanks around text; bundle_errors reports all errors at once. Parsers do not nest: for an object inside
    the body, give the argument a type that takes a dict.
    """

    def __init__(self, trim: bool = False, bundle_errors: bool = False) -> None:
        self.trim, self.bundle_errors = trim, bundle_errors
        self.args: list[Argument] = []

    def add_argument(self, name: str | Argument, **options: Any) -> RequestParser:
        """Add an Argument, or the one that Argument(name, **options) makes; returns the parser."""
        self.args.append(replace(name, **options) if isinstance(name, Argument) else Argument(name, **options))
        return self

    def replace_argument(self, name: str, **options: Any) -> RequestParser:
        """Put a new argument in the place of the one of that name, else KeyError; returns the parser."""
        self.args[self._index(name)] = Argument(name, **options)
        return self

    def remove_argument(self, name: str) -> RequestParser:
        """Take out the argument of that name, else KeyError; returns the parser."""
        del self.args[self._index(name)]
        return self

    def _index(self, name: str) -> int:
        return {argument.name: index for index, argument in enumerate(self.args)}[name]

    def copy(self) -> RequestParser:
        """An independent parser with the same arguments and options."""
        parser = RequestParser(self.trim, self.bundle_errors)
        parser.args = list(self.args)
        return parser

    def parse_args(self, request: werkzeug.Request, strict: bool = False) -> Namespace:
        """The clean values; strict refuses every name in the body and the query string that no argument reads.

        Raises BadRequest with data {"message": {name: text}}, or {"message": text} for JSON that cannot be read.
        """
        part = cache(partial(_part, request))
        values, errors = Namespace(), {}
        for argument in self.args:
            dest, default = argument.dest or argument.name, argument.default
            try:
                value = argument.parse(part, self.trim)
            except ValueError as error:
                errors[argument.name] = (argument.help or "{error_msg}").replace("{error_msg}", str(error))
                if not self.bundle_errors:
                    raise Refusal(message=errors) from None
            else:
                if value is not _MISSING:
                    values[dest] = value
                elif argument.store_missing and dest not in values:
                    values[dest] = default() if callable(default) else default
        if strict:
            known = {(place, argument.name) for argument in self.args for place in argument.places}
            names = [(place, str(name)) for place in ("json", "form", "files", "args") for name in part(place)]
            errors = {name: "Unknown argument" for place, name in names if (place, name) not in known} | errors
        if errors:
            raise Refusal(message=errors)
        return values

@dataclass(frozen=True)
class Argument:
    """One argument: where it is looked for, how it is converted, what is done without it.

    >>> Argument("done", type=bool).convert("False")
    False

    type is called once, with the value; ValueError, TypeError, ArithmeticError and failed look-ups become the
    argument's error. str, int, float, bool, list and dict are read strictly.
    """

    name: str
    type: Callable[[Any], Any] = str
    required: bool = False
    default: Any = None  # a value, never converted, or a function that makes one
    choices: Iterable[Any] = ()
    location: str | Iterable[str] = ("json", "form")  # the first one that holds the name wins
    action: str = "store"  # the first value; append: all, in a list; split: the same, cut at commas
    dest: str | None = None
    help: str | None = None  # in place of the error, which {error_msg} in it stands for
    nullable: bool = False
    trim: bool | None = None  # None: what the parser says
    store_missing: bool = True
    case_sensitive: bool = True  # if not, values and choices are lowered
    places: list[str] = field(init=False)  # the parts of the request that location means

    def __post_init__(self) -> None:
        locations = [self.location] if isinstance(self.location, str) else self.location
        places = [place for name in locations for place in (("args", "form") if name == "values" else (name,))]
        if not set(places) <= _WORDS.keys():
            raise ValueError(f"{self.name}: a location is one of {', '.join(_WORDS)}, values, not {self.location!r}")
        if self.action not in ("store", "append", "split"):
            raise ValueError(f"{self.name}: an action is store, append or split, not {self.action!r}")
        if not callable(self.type):
            raise TypeError(f"{self.name}: a type is a function of one value, not {self.type!r}")
        object.__setattr__(self, "places", places)
        if not isinstance(self.choices, range):
            object.__setattr__(self, "choices", [self._folded(choice) for choice in self.choices])

    def parse(self, part: Callable[[str], Any], trim: bool = False) -> Any:
        """The value, or the list of values, or _MISSING; ValueError with the text for the client."""
        place = next((place for place in self.places if self.name in part(place)), None)
        if place is None:
            if self.required:
                where = [words for place, words in _WORDS.items() if place in self.places]
                raise ValueError(f"Missing required parameter in {' or '.join(where)}")
            return _MISSING
        values = [part(place)[self.name]] if place == "json" else part(place).getlist(self.name)
        trim = trim if self.trim is None else self.trim
        if self.action == "store" or values == [None]:
            return self.convert(values[0], trim)
        if isinstance(values[0], list):
            values = values[0]
        elif self.action == "split" and isinstance(values[0], str):
            values = [item for text in values if text for item in text.split(",")]
        return [self.convert(value, trim) for value in values]

    def convert(self, value: Any, trim: bool = False) -> Any:
        """One clean value; ValueError with the text for the client."""
        if value is None:
            if not self.nullable:
                raise ValueError("Must not be null!")
            return None
        if trim and isinstance(value, str):
            value = value.strip()
        if not (isinstance(value, FileStorage) and self.type is str):  # an upload is itself, unless told otherwise
            try:
                value = _strict(self.type, value) if any(self.type is kind for kind in _STRICT) else self.type(value)
            except ValueError as error:
                raise ValueError(str(error) or "Invalid value") from None
            except (TypeError, ArithmeticError, AttributeError, LookupError):
                raise ValueError("Invalid value") from None
        value = self._folded(value)
        if self.choices and value not in self.choices:
            raise ValueError(f"{value} is not a valid choice")
        return value

    def schema(self, example: Any = None, kept: bool = False) -> dict[str, Any]:
        """What it takes, or what is kept of it, as JSON Schema, with an example."""
        kind: Any = self.type
        choices: Any = self.choices
        schema: dict[str, Any] = {"type": _JSON_TYPES[kind]} if any(kind is each for each in _JSON_TYPES) else {}
        value = kind() if schema else "text"
        if isinstance(kind, Text):
            limits = {"minLength": kind.shortest, "maxLength": kind.longest, "pattern": f"^(?:{kind.pattern})$"}
            schema, value = {"type": "string", **limits}, ("text" * kind.shortest)[: kind.longest]
        if choices:
            value = choices[0]
            schema |= {"minimum": value, "maximum": choices[-1]} if isinstance(choices, range) else {"enum": choices}
        if self.action != "store":
            schema, value = {"type": "array", "items": schema}, [value]
        if self.nullable or (kept and not self.required and self.default is None):
            schema = {"anyOf": [schema, {"type": "null"}]}
        return {**schema, "examples": [value if example is None else example]}

    def _folded(self, value: Any) -> Any:
        return value.lower() if isinstance(value, str) and not self.case_sensitive else value

def object_schema(arguments: Iterable[Argument], examples: Mapping[str, Any], kept: bool = False) -> dict[str, Any]:
    """These arguments as the JSON Schema of a body, or of what is kept of all of them, with an example."""
    arguments = [each for each in arguments if kept or {"json", "form"} & {*each.places}]
    names = {(each.dest or each.name) if kept else each.name: each for each in arguments}
    properties = {name: each.schema(examples.get(each.dest or each.name), kept) for name, each in names.items()}
    return {
        "type": "object", "properties": properties, "required": [name for name, each in names.items() if each.required],
        "examples": [{name: schema["examples"][0] for name, schema in properties.items()}],
    }  # fmt: skip

_FLOAT = re.compile(r"\s*[+-]?([0-9]+(\.[0-9]+)?|\.[0-9]+)([eE][+-]?[0-9]+)?\s*")
_JSON_TYPES: dict[Any, str] = {
    str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object",
}  # fmt: skip
_STRICT: dict[Any, str] = {
    str: "text", int: "an integer", float: "a number", bool: "true or false", list: "a list", dict: "an object",
    FileStorage: "a file",
}  # fmt: skip

def _strict(kind: Any, value: Any) -> Any:
    """A value of one of the built-in types, without the surprises of calling them: bool("False"), int(1.5)."""
    text = str(value)
    if kind is str and not isinstance(value, bool | list | dict) and not re.search("[\ud800-\udfff]", text):
        return text
    if kind is int and (match := re.fullmatch(r"\s*([+-]?[0-9]{1,4300})(\.0)?\s*", text)):
        return int(match[1])
    if kind is float and _FLOAT.fullmatch(text) and math.isfinite(float(text)):
        return float(text)
    if kind is bool and text.lower() in ("true", "1", "false", "0"):
        return text.lower() in ("true", "1")
    if kind in (list, dict, FileStorage) and isinstance(value, kind):
        return value
    raise ValueError(f"Must be {_STRICT[kind]}")

def _part(request: werkzeug.Request, place: str) -> Any:
    """One part of the request: for json the object in the body, {} if there is no body or its type is not JSON.

    Raises BadRequest for what is not strict JSON (RFC 8259): other encodings than UTF-8, NaN, 1e999, a member that
    stands twice (RFC 7493), half of a surrogate pair, absurd nesting.
    """
    number = partial(_strict, float)
    try:
        if place != "json":
            return getattr(request, place)
        body = request.get_data() if request.is_json else b""
        value = json.loads(body.decode() or "{}", parse_constant=number, parse_float=number, object_pairs_hook=_members)
        json.dumps(value, ensure_ascii=False).encode()  # what could not be written out again is not let in
    except (ValueError, RecursionError):
        raise Refusal(message=f"T{_WORDS[place][1:]} could not be read") from None
    if not isinstance(value, dict):
        raise Refusal(message="The JSON body must be an object")
    return value

def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(members := dict(pairs)) < len(pairs):
        raise ValueError("a member stands twice")
    return members

@dataclass(frozen=True)
class Text:
    """A type: so many characters of text, without NUL. A class, so that its limits can be read elsewhere."""

    shortest: int
    longest: int
    pattern: str = r"[^\x00]*"
    hint: str = "free of NUL characters"

    def __call__(self, value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError("Must be text")
        text = str(_strict(str, value))
        if not self.shortest <= len(text) <= self.longest:
            raise ValueError(f"Must have {self.shortest:,} to {self.longest:,} characters, not {len(text):,}")
        if not re.fullmatch(self.pattern, text):
            raise ValueError(f"Must be {self.hint}")
        return text

def parser_of(*arguments: Argument) -> RequestParser:
    parser = RequestParser(bundle_errors=True)
    parser.args.extend(arguments)
    return parser

@dataclass(frozen=True, eq=False)
class Resource:
    """A data model. Registering it gives it the routes /<name> and /<name>/<id>, with ids like todo1 for the item todo.

    arguments say what an item holds; starter, {id: item}, is what a new account begins with.
    """

    name: str
    item: str
    arguments: Iterable[Argument]
    starter: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    parser: RequestParser = field(init=False)
    changes: RequestParser = field(init=False)  # takes some of the arguments: what is not sent stays as it is

    @property
    def example(self) -> Mapping[str, Any]:
        return next(iter(self.starter.values()), {})

    def __post_init__(self) -> None:
        reserved = ("account", "sessions", "counters", "users", "token", "revoke", "health", "docs")
        for word in (self.name, self.item):
            if not re.fullmatch("[a-z][a-z-]{0,20}", word) or word in reserved:
                raise ValueError(f"{word!r} cannot name a resource or its items; words like notes and note can")
        arguments = tuple(self.arguments)
        changes = [replace(argument, required=False, store_missing=False) for argument in arguments]
        self.__dict__.update(arguments=arguments, parser=parser_of(*arguments), changes=parser_of(*changes))

TODOS = {"todo1": {"task": "build an API"}, "todo2": {"task": "?????"}, "todo3": {"task": "profit!"}}
TODO_RESOURCE = Resource("todos", "todo", [Argument("task", type=Text(1, 10_000), required=True)], TODOS)

# ---- Stores ---------------------------------------------------------------------------------------------------------
# All that one user owns is a nested mapping {collection: {key: plain JSON dict}}, reached through one transaction,
# store.read(user) or store.write(user). Nothing crosses users, so nothing is contended, and any machine can hold any
# user. Values are replaced, never edited in place; check first, then write, for the memory store cannot roll back.

Data = MutableMapping[str, Any]  # {collection: Collection}; a collection that was never written is empty

class Collection(UserDict[str, dict[str, Any]]):
    """A collection in memory: a new key goes to the end, an overwritten one keeps its place."""

    def __init__(self) -> None:
        super().__init__()
        self._positions: dict[str, int] = {}
        self._next = count(1)  # no position is given twice, so a page's cursor outlives the item it stands on

    def __setitem__(self, key: str, value: dict[str, Any]) -> None:
        to_text(value)
        if key not in self.data:
            self._positions[key] = next(self._next)
        self.data[key] = value

    def __delitem__(self, key: str) -> None:
        del self.data[key], self._positions[key]

    def __iter__(self) -> Iterator[str]:
        return iter([*self.data])  # a copy, so that a loop may delete

    def page(self, after: int = 0, limit: int | None = None) -> list[tuple[int, str, dict[str, Any]]]:
        """The first (position, key, value) past a position, in the order of creation."""
        return list(islice(((n, key, self.data[key]) for key, n in self._positions.items() if n > after), limit))

def to_text(value: dict[str, Any]) -> str:
    """A value as the text that stores keep; TypeError or ValueError if it is not a JSON object."""
    text = json.dumps(value, allow_nan=False)
    if not isinstance(value, dict) or json.loads(text) != value:
        raise TypeError(f"a value is a dict that JSON can hold, not {value!r}")
    return text

class MemoryStore:
    """Dicts under a lock: one process, and all is gone when it ends."""

    def __init__(self) -> None:
        self._users: dict[str, Data] = {}
        self._lock = threading.RLock()

    @contextmanager
    def read(self, user: str) -> Iterator[Data]:
        """What the user owns at this moment; writers wait until the block ends."""
        with self._lock:
            yield self._users.get(user) or defaultdict(Collection)

    @contextmanager
    def write(self, user: str) -> Iterator[Data]:
        """What the user owns, to be changed; everybody else waits until the block ends."""
        with self._lock:
            data = self._users.setdefault(user, defaultdict(Collection))
            try:
                yield data
            finally:
                self._users[user] = data
                if not any(data.values()):
                    del self._users[user]

_SCHEMA_VERSION = 1
_SCHEMA = (  # the primary key is the order of a page; with key before position, PostgreSQL would scan the collection
    "CREATE TABLE IF NOT EXISTS user_data (owner TEXT, collection TEXT, position BIGINT, key TEXT NOT NULL,"
    " value TEXT NOT NULL, PRIMARY KEY (owner, collection, position), UNIQUE (owner, collection, key))",
    "CREATE TABLE IF NOT EXISTS schema_version (version INTEGER PRIMARY KEY)",
)
_ALL = "owner = :owner AND collection = :collection"
_ONE = f"{_ALL} AND key = :key"
_SQL = {
    "lock": "SELECT pg_advisory_xact_lock(hashtextextended(:owner, 0))",
    "get": f"SELECT value FROM user_data WHERE {_ONE}",
    "page": f"SELECT position, key, value FROM user_data WHERE {_ALL} AND position > :after"
    " ORDER BY position LIMIT :limit",
    "count": f"SELECT count(*) FROM user_data WHERE {_ALL}",
    # The time, since max + 1 alone would give the place of a deleted last item again, where a cursor may stand.
    "set": "INSERT INTO user_data (owner, collection, position, key, value) SELECT CAST(:owner AS TEXT),"
    " CAST(:collection AS TEXT), CASE WHEN max(position) >= :now THEN max(position) + 1 ELSE CAST(:now AS BIGINT) END,"
    f" CAST(:key AS TEXT), CAST(:value AS TEXT) FROM user_data WHERE {_ALL}"
    " ON CONFLICT (owner, collection, key) DO UPDATE SET value = excluded.value",
    "delete": f"DELETE FROM user_data WHERE {_ONE}",
    "empty": f"DELETE FROM user_data WHERE {_ALL}",
    "clear": "DELETE FROM user_data WHERE owner = :owner",
}

# The options of an engine, of a reader's transaction and of a writer's. With AUTOCOMMIT SQLite's driver begins nothing
# by itself, so that a writer can take the lock as it begins.
_SQLITE: list[dict[str, Any]] = [{"isolation_level": "AUTOCOMMIT"}, {"begin": "BEGIN"}, {"begin": "BEGIN IMMEDIATE"}]
_PATIENCE = {
    "connect_timeout": 5, "tcp_user_timeout": 10_000, "keepalives_idle": 10,
    "options": "-c lock_timeout=10s -c idle_in_transaction_session_timeout=30s",
}  # fmt: skip
_POSTGRES: list[dict[str, Any]] = [
    {"isolation_level": "READ COMMITTED", "pool_pre_ping": True, "connect_args": _PATIENCE},
    {"isolation_level": "REPEATABLE READ", "postgresql_readonly": True}, {},
]  # fmt: skip

class SQLCollection(MutableMapping[str, dict[str, Any]]):
    """A collection in a table; nothing is loaded but what is asked for."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run

    def __getitem__(self, key: str) -> dict[str, Any]:
        if (row := self._run("get", key=key).first()) is None:
            raise KeyError(key)
        return dict(json.loads(row[0]))

    def __setitem__(self, key: str, value: dict[str, Any]) -> None:
        self._run("set", key=key, value=to_text(value), now=time.time_ns() // 1000)

    def __delitem__(self, key: str) -> None:
        if not self._run("delete", key=key).rowcount:
            raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter([key for _, key, _ in self.page()])

    def __len__(self) -> int:
        return int(self._run("count").scalar())

    def clear(self) -> None:
        self._run("empty")

    def page(self, after: int = 0, limit: int | None = None) -> list[tuple[int, str, dict[str, Any]]]:
        rows = self._run("page", after=after, limit=2**60 if limit is None else limit)
        return [(position, key, json.loads(text)) for position, key, text in rows]

class SQLData(dict[str, SQLCollection]):
    """One user's collections, made when they are asked for."""

    def __init__(self, run: Callable[..., Any]) -> None:
        self._run = run

    def __missing__(self, collection: str) -> SQLCollection:
        return SQLCollection(partial(self._run, collection=collection))

    def clear(self) -> None:
        self._run("clear")

class SQLStore:
    """The same mapping in one table: in SQLite for one machine, in PostgreSQL for several.

    A writer holds its user's lock (in SQLite: the file's), so one user's writes come one after the other and do not
    conflict; a reader sees a snapshot. Raises StoreError, and ValueError for a URL or a schema that cannot be used.
    """

    def __init__(self, url: str) -> None:
        self._is_sqlite, self._is_ready, self._later = url.startswith("sqlite:"), False, 0
        options, self._reader, self._writer = _SQLITE if self._is_sqlite else _POSTGRES
        try:
            import sqlalchemy as sa

            self._engine = sa.create_engine(url, pool_timeout=5, **options)
        except ImportError as error:
            extra = "sql" if error.name == "sqlalchemy" else "postgres"
            raise ValueError(f"SERVICE_STORE_URL needs: pip install 'todo-service[{extra}]'") from None
        self._errors = (sa.exc.DBAPIError, sa.exc.TimeoutError)
        self._statements = {name: sa.text(sql) for name, sql in _SQL.items()}
        if self._is_sqlite:
            sa.event.listen(self._engine, "connect", _set_up_sqlite)
            sa.event.listen(self._engine, "begin", lambda c: c.exec_driver_sql(c.get_execution_options()["begin"]))
        with suppress(StoreError):  # a database that is down now may come up
            self._make_ready()
        self.close()  # so that no connection is carried over a fork
        if self._later:
            raise ValueError(f"SERVICE_STORE_URL: a later version made this store, with schema {self._later}")

    def _make_ready(self) -> None:
        """Make the tables, once for all the workers that start together; refuse those of a later version."""
        for attempts_left in reversed(range(10 if self._is_sqlite else 1)):  # SQLite may be locked as it turns to WAL
            patience = suppress(StoreError) if attempts_left else nullcontext()
            with patience, self._transaction(self._writer) as connection:
                if not self._is_sqlite:
                    connection.execute(self._statements["lock"], {"owner": ""})
                for statement in _SCHEMA:
                    connection.exec_driver_sql(statement)
                version = connection.exec_driver_sql("SELECT max(version) FROM schema_version").scalar()
                if version is None:
                    connection.exec_driver_sql(f"INSERT INTO schema_version VALUES ({_SCHEMA_VERSION})")
                break
            time.sleep(random.random() / 20)
        self._later = version if version and version > _SCHEMA_VERSION else 0
        self._is_ready = not self._later

    @contextmanager
    def _transaction(self, options: dict[str, Any]) -> Iterator[Any]:
        try:
            with self._engine.connect().execution_options(**options) as connection, connection.begin():
                yield connection
        except self._errors as error:
            cause = getattr(error, "orig", None) or error
            log.error("store: %s", str(cause).partition("\n")[0])  # the rest would quote what users wrote
            raise StoreError(conflict=getattr(cause, "sqlstate", None) in ("40001", "40P01")) from error

    @contextmanager
    def _user_data(self, user: str, options: dict[str, Any], *, lock: bool) -> Iterator[Data]:
        if not self._is_ready:
            self._make_ready()
        if self._later:
            raise StoreError()
        with self._transaction(options) as connection:

            def run(statement: str, **values: Any) -> Any:
                return connection.execute(self._statements[statement], {"owner": user, **values})

            if lock:
                run("lock")
            yield SQLData(run)

    def close(self) -> None:
        """Close the connections that wait in the pool."""
        self._engine.dispose()

    def read(self, user: str) -> AbstractContextManager[Data]:
        """A snapshot of what the user owns."""
        return self._user_data(user, self._reader, lock=False)

    def write(self, user: str) -> AbstractContextManager[Data]:
        """What the user owns, to be changed; all of it, or nothing if the block raises."""
        return self._user_data(user, self._writer, lock=not self._is_sqlite)

def _set_up_sqlite(connection: Any, record: Any) -> None:
    for pragma in ("busy_timeout = 10000", "journal_mode = WAL", "synchronous = FULL"):
        connection.execute(f"PRAGMA {pragma}").close()

def open_store(url: str) -> MemoryStore | SQLStore:
    """The store that a URL names: memory:, sqlite:///FILE or postgresql://USER@HOST/DATABASE."""
    return MemoryStore() if url == "memory:" else SQLStore(url)

# ---- Tokens ---------------------------------------------------------------------------------------------------------
# Two kinds of JWT. The access token (at+jwt, minutes) opens the API; the refresh token (rt+jwt, as long as its session)
# buys the next pair. It holds nothing random, so one generation of a session is always the same text. The key that kid
# names fixes the algorithm, the token has no say in it. Keys are PyJWT's business; time is checked here, by one clock.

ACCESS, REFRESH = "at+jwt", "rt+jwt"
_CLAIMS: dict[str, dict[str, type]] = {  # of each kind: the claims that it must have, and their types
    ACCESS: {"iss": str, "sub": str, "aud": list, "exp": int, "iat": int, "jti": str, "sid": str},
    REFRESH: {"iss": str, "sub": str, "sid": str, "gen": int, "exp": int},
}
_JWT = jwt.PyJWT({  # times and the audience are checked below
    "enforce_minimum_key_length": True, "verify_exp": False, "verify_nbf": False, "verify_iat": False,
    "verify_aud": False,
})  # fmt: skip
Claims = Mapping[str, Any]
Clock = Callable[[], float]  # the time in seconds

_MEMBERS = {"EdDSA": ("crv", "kty", "x"), "ES256": ("crv", "kty", "x", "y"), "RS256": ("e", "kty", "n")}  # RFC 7638

class Key(NamedTuple):
    """A key, the one algorithm that it is for, and its public side as a JWK (RFC 7517)."""

    kid: str
    algorithm: str
    verifying: Any
    signing: Any = None
    jwk: Mapping[str, str] = MappingProxyType({})

def secret_key(text: str) -> Key:
    """An HS256 key; its kid is a MAC under the key, which tells nothing of it."""
    secret = text.encode("utf-8", "surrogateescape")
    return Key(hmac.digest(secret, b"kid", "sha256")[:9].hex(), "HS256", secret, secret)

def signing_key(path: str) -> Key:
    """The private key in a PEM file: Ed25519, P-256, or RSA of 2048 bits; its kid is the thumbprint of RFC 7638."""
    if not has_crypto:
        raise ValueError("SERVICE_SIGNING_KEY_FILE needs: pip install 'todo-service[crypto]'")
    for name, members in _MEMBERS.items():
        with suppress(jwt.PyJWTError, OSError, TypeError, ValueError, AttributeError):
            algorithm = jwt.get_algorithm_by_name(name)
            private = algorithm.prepare_key(Path(path).read_bytes())
            public = private.public_key()  # AttributeError: it is a public key already
            found = algorithm.to_jwk(public, as_dict=True)
            if found.get("crv") != "Ed448" and not algorithm.check_key_length(private):
                jwk = {member: str(found[member]) for member in members}
                digest = hashlib.sha256(json.dumps(jwk, separators=(",", ":")).encode()).digest()
                kid = base64url_encode(digest).decode()
                return Key(kid, name, public, private, {**jwk, "kid": kid, "use": "sig", "alg": name})
    right = "an unencrypted private key in PEM, Ed25519, P-256 or RSA of 2048 bits, for example that of genkey"
    raise ValueError(f"SERVICE_SIGNING_KEY_FILE {path!r} cannot be: it must be {right}")

def remote_keys(url: str, clock: Clock) -> Callable[[str], Key]:
    """A function that finds a key by its kid in the JWK set at a URL, which is kept for 300 s.

    Whatever kids are asked for, the set is fetched at most once in 10 s. Raises 503 while it cannot be had.
    """
    client, lock = jwt.PyJWKClient(url, cache_jwk_set=False, timeout=5), threading.Lock()
    keys: dict[str, Key] = {}
    fetched = tried = -math.inf

    def find(kid: str) -> Key:
        nonlocal keys, fetched, tried
        now = clock()
        if kid not in keys or abs(now - fetched) >= 300:
            with lock:
                if abs(now - tried) >= 10:
                    tried = now
                    try:
                        jwks = client.get_signing_keys()
                        found = [Key(str(key.key_id), key.algorithm_name, key.key) for key in jwks]
                        found = [key for key in found if key.algorithm in _MEMBERS]
                        keys = {key.kid: key for key in found if not hasattr(key.verifying, "sign")}
                        fetched = now
                    except (jwt.PyJWTError, ValueError, TypeError, RuntimeError, OSError) as error:
                        log.warning("no keys from %s: %s", url, error)
            if abs(now - fetched) >= 300:
                raise http.ServiceUnavailable("The issuer's keys cannot be had", retry_after=10)
        return keys[kid]

    return find

class Tokens:
    """Signs and verifies for one issuer. A class, since keys are loaded once and verified tokens are remembered."""

    def __init__(self, settings: Settings, clock: Clock, find: Callable[[str], Key] | None = None) -> None:
        self._settings, self._clock = settings, clock
        self._audience = comma_list(settings.audience) or [settings.issuer]
        secret = {key.kid: key for key in map(secret_key, comma_list(settings.secret_key))}
        public = {key.kid: key for key in map(signing_key, comma_list(settings.signing_key_file))}
        self._signers = {ACCESS: [*public.values(), *secret.values()][:1], REFRESH: [*secret.values()][:1]}
        self._find = {ACCESS: find or (public or secret).__getitem__, REFRESH: secret.__getitem__}
        self.jwks = {"keys": [key.jwk for key in public.values()]}
        self._remembered = lru_cache(maxsize=10_000)(self._verify)  # 50 µs each; a refusal is not remembered

    def pair(self, user: str, sid: str, session: Mapping[str, Any], time: float) -> dict[str, Any]:
        """The answer of RFC 6749 §5.1: a new access token, and the refresh token of the session's generation."""
        now, expires_at = int(time), session["expires_at"]
        exp = min(now + self._settings.access_ttl, expires_at)
        common = {"iss": self._settings.issuer, "sub": user, "sid": sid}
        access = {**common, "aud": self._audience, "exp": exp, "iat": now, "jti": secrets.token_urlsafe(12)}
        refresh = {**common, "gen": session["gen"], "exp": expires_at}
        return {
            "access_token": self._sign(ACCESS, access), "token_type": "Bearer", "expires_in": exp - now,
            "refresh_token": self._sign(REFRESH, refresh),
        }  # fmt: skip

    def _sign(self, typ: str, claims: dict[str, Any]) -> str:
        (key,) = self._signers[typ]
        return _JWT.encode(claims, key.signing, key.algorithm, {"typ": typ, "kid": key.kid})

    def verify(self, typ: str, token: str, expired: bool = False) -> Claims:
        """The claims of a token of ours; expired accepts one after its time too. Raises InvalidToken."""
        if len(token) > 4096:
            raise InvalidToken("The token is longer than 4096 characters")
        now = self._clock()
        claims = self._remembered(typ, token, now // 300)  # for so long: a key that is withdrawn must go
        if claims["exp"] <= now and not expired:
            raise InvalidToken("The token has expired")
        return claims

    def _verify(self, typ: str, token: str, period: float) -> Claims:
        try:
            header = json.loads(base64url_decode(token.partition(".")[0]))  # PyJWT decodes it all, again below
            # Whatever else stands in a header (crit, jwk, jku, x5u) is a wish about how to verify.
            if {*header} != {"alg", "typ", "kid"} or header["typ"] != typ or "=" in token:
                raise InvalidToken("The token is of another kind than the one that belongs here")
            key = self._find[typ](header["kid"])
            claims = _JWT.decode(token, key.verifying, [key.algorithm])
            if b"\\u0000" in json.dumps(claims, ensure_ascii=False).encode():  # nor half of a surrogate pair
                raise ValueError("no store can look that up")
        except (jwt.PyJWTError, ValueError, TypeError, LookupError, RecursionError):
            raise InvalidToken("The token is malformed or was not signed here") from None
        if any(type(claims.get(name)) is not kind or not claims[name] for name, kind in _CLAIMS[typ].items()):
            raise InvalidToken("The token lacks a claim, or has one of the wrong type")
        if claims["iss"] != self._settings.issuer:
            raise InvalidToken("The token comes from another issuer")
        if typ == ACCESS and not any(name in self._audience for name in claims["aud"]):
            raise InvalidToken("The token is meant for another audience")
        return MappingProxyType(claims)

# ---- Sessions and passwords -----------------------------------------------------------------------------------------
# A login opens a session, a row {gen, rotated_at, expires_at} in the user's data; tokens are good while it is there.
# A refresh steps gen. A token of an older generation, seen again, means that two parties hold it, so the session ends
# for both (RFC 9700 §4.14.2). These functions work on one user's data; hashing is slow and stays outside of that.

SESSIONS_A_USER = 20

def open_session(data: Data, now: float, ttl: int) -> tuple[str, dict[str, Any]]:
    """A new session, its id first. Dead sessions go, and the oldest beyond the limit."""
    sessions = data["sessions"]
    rows = sessions.page()
    live = [sid for _, sid, session in rows if session["expires_at"] > now][1 - SESSIONS_A_USER :]
    for _, sid, _ in rows:
        if sid not in live:
            del sessions[sid]
    sid = secrets.token_urlsafe(12)
    sessions[sid] = session = {"gen": 1, "rotated_at": now, "expires_at": int(now) + ttl}
    return sid, session

def renew_session(data: Data, sid: str, gen: int, now: float, grace: int) -> dict[str, Any] | None:
    """The session, one generation on; or None, and no session any more."""
    session = data["sessions"].get(sid)
    if session is None or session["expires_at"] <= now:
        return None
    if gen == session["gen"]:
        data["sessions"][sid] = session = {**session, "gen": gen + 1, "rotated_at": now}
    elif gen != session["gen"] - 1 or not grace or abs(now - session["rotated_at"]) > grace:
        del data["sessions"][sid]
        return None
    return dict(session)  # within the grace, two tabs or a lost answer get the same successor

class Passwords:
    """Hashes and checks passwords, two at a time, and makes guessing slow.

    A class, since it counts; it counts in this process only, so n workers let n times as many guesses through.
    """

    def __init__(self, clock: Clock) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._two = threading.BoundedSemaphore(2)  # scrypt takes 32 MB and 0.1 s
        self._wrong: OrderedDict[tuple[str, str], tuple[int, float]] = OrderedDict()  # key: (count, wait until)

    @contextmanager
    def _turn(self) -> Iterator[None]:
        if not self._two.acquire(timeout=5):
            raise http.ServiceUnavailable("Too many passwords are being checked", retry_after=5)
        try:
            yield
        finally:
            self._two.release()

    def hash(self, password: str) -> str:
        """A salted scrypt hash; 503 if no turn comes within 5 s."""
        with self._turn():
            return generate_password_hash(unicodedata.normalize("NFC", password))  # RFC 8265 §4.2: however typed

    def match(self, hash: str | None, password: str, name: str, address: str) -> bool:
        """Is it the password? Never without a hash (there is no such user), after the same time.

        Raises 429 before any hashing after 10 wrong ones in a row for a name from an address, or 100 for any names.
        """
        limits = {(client := _network(address), name[:65]): 10, (client, ""): 100}
        self._refuse_guesses(limits, name, address)
        with self._turn():
            self._refuse_guesses(limits, name, address)  # who waited beside a wrong guess is held to it
            typed = unicodedata.normalize("NFC", password[:4097])  # slow if long; 1,024 decompose to 4,096 at most
            if check_password_hash(hash or _NO_HASH, typed) and hash:
                self._wrong.pop((client, name[:65]), None)  # one's own login is no licence to guess other names
                return True
            self._count(limits)
        log_event("failed login", name, address)
        return False

    def _refuse_guesses(self, keys: Iterable[tuple[str, str]], name: str, address: str) -> None:
        wait = max(self._wrong.get(key, (0, 0.0))[1] for key in keys) - self._clock()
        if wait > 0:
            log_event("throttled", name, address)
            raise http.TooManyRequests("Too many wrong passwords", retry_after=math.ceil(wait))

    def _count(self, limits: dict[tuple[str, str], int]) -> None:
        """From the limit on, a wrong password doubles the wait, 1 s to 15 min; 15 quiet minutes are forgiven."""
        now = self._clock()
        with self._lock:
            for key, limit in limits.items():
                count, until = self._wrong.pop(key, (0, now))
                count = count + 1 if now < until + 900 else 1
                self._wrong[key] = (count, now + min(2 ** min(count - limit, 10), 900) if count >= limit else now)
            while len(self._wrong) > 20_000:
                self._wrong.popitem(last=False)

_NO_HASH = "scrypt:32768:8:1$none$" + "0" * 128  # of no password, as slow to check as any

def _network(address: str) -> str:
    """What one client owns: an IPv4 address, or the /64 around an IPv6 address."""
    if match := re.fullmatch(r"\[(.*)\](?::\d+)?|([\d.]+):\d+", address):  # some proxies add the port
        address = match[1] or match[2]
    with suppress(ValueError):
        ip = ipaddress.IPv6Address(address)
        return str(ip.ipv4_mapped or ipaddress.ip_network((ip, 64), strict=False))
    return address

# ---- HTTP edge ------------------------------------------------------------------------------------------------------
# What stands between the wire and the views: a request that reads its body once and bounded, knows its bearer and
# opens that user's data; JSON out; and the preconditions of RFC 9110 §13.

FORMS = ("application/x-www-form-urlencoded", "multipart/form-data")

View = Callable[..., Any]
Answers = tuple[str, str, Any]  # status, schema, headers of success; other statuses; parsers, or a resource's

class Service(NamedTuple):
    """What one app is made of; views find it at request.service."""

    settings: Settings
    store: Any
    tokens: Tokens
    passwords: Passwords
    resources: list[Resource]
    routes: Map
    answers: Mapping[View, Answers]  # what OpenAPI says of our own views
    clock: Clock

class Request(werkzeug.Request):
    """Werkzeug's request, with the service, its bearer and the bearer's data."""

    max_form_memory_size = None  # stream bounds the whole body

    def __init__(self, environ: WSGIEnvironment, service: Service) -> None:
        super().__init__(environ, populate_request=False)
        self.service = service

    @cached_property
    def stream(self) -> IO[bytes]:
        """The body in memory: all of it, or 413, chunked or not."""
        limit, body, source = self.service.settings.max_body, b"", super().stream
        try:
            while len(body) <= limit and (chunk := source.read(limit + 1 - len(body))):
                body += chunk
        except Exception as error:  # every server has exceptions of its own for a broken body
            raise http.BadRequest("The body could not be read to its end") from error
        if len(body) > limit:
            raise http.RequestEntityTooLarge(f"A body may have {limit} bytes")
        if len(body) < (self.content_length or 0):
            raise http.BadRequest("The body ends before its Content-Length")
        return BytesIO(body)

    def parse(self, parser: RequestParser, public: bool = False) -> Namespace:
        """What the parser finds, for a bearer unless public; 415 for a body that is neither JSON nor a form."""
        if (public or self.user) and not self.is_json and self.mimetype not in FORMS and self.get_data():
            raise http.UnsupportedMediaType(f"Send application/json or {FORMS[0]}")
        return parser.parse_args(self)

    @cached_property
    def claims(self) -> Claims:
        """The claims of the bearer's access token (RFC 6750 §2.1); 401 without a good one."""
        return self.service.tokens.verify(ACCESS, bearer_token(self.environ))

    @property
    def user(self) -> str:
        """The bearer's name; 401 without one."""
        return str(self.claims["sub"])

    @contextmanager
    def _data(self, transaction: Callable[[str], AbstractContextManager[Data]]) -> Iterator[Data]:
        claims = self.claims
        with transaction(claims["sub"]) as data:
            if claims["sid"] not in data["sessions"]:
                raise InvalidToken("The session has ended")
            yield data

    def read(self) -> AbstractContextManager[Data]:
        """The bearer's data, to be read; 401 if the session has ended."""
        return self._data(self.service.store.read)

    def write(self) -> AbstractContextManager[Data]:
        """The bearer's data, to be changed; 401 if the session has ended."""
        return self._data(self.service.store.write)

    @property
    def prefix(self) -> str:
        """Where the app is mounted, as the start of a URL; a path, whatever SCRIPT_NAME says."""
        mount = quote(self.root_path.strip("/"))
        return mount and "/" + mount

    def log(self, event: str, user: str) -> None:
        log_event(event, user, self.remote_addr)

def bearer_token(environ: WSGIEnvironment) -> str:
    scheme, _, token = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
    if scheme.lower() != "bearer":
        raise http.Unauthorized("Log in with POST /token, then send Authorization: Bearer <access_token>")
    return str(token.strip(" "))

Reply = tuple[Any, int, dict[str, str]]  # body (JSON, or the bytes of it), status, headers
_encode = json.JSONEncoder(ensure_ascii=False).encode

def to_json(value: Any) -> bytes:
    """A line of JSON; bytes are taken for JSON already."""
    return value if isinstance(value, bytes) else (_encode(value) + "\n").encode()

def etag(value: Any) -> str:
    """The strong entity tag of a representation."""
    return f'"{hashlib.sha256(to_json(value)).hexdigest()[:32]}"'

def conditional(request: Request, value: Any, **headers: str) -> Reply:
    """A representation with its ETag; 304 if the client has it."""
    body = to_json(value)
    headers["ETag"] = etag(body)
    return (None, 304, headers) if check_preconditions(request, headers["ETag"]) else (body, 200, headers)

def check_preconditions(request: Request, tag: str | None) -> bool:
    """412 unless the request means what is there now (None: nothing); whether 304 is all there is to say (§13.2.2)."""
    match, none_match = request.environ.get("HTTP_IF_MATCH"), request.environ.get("HTTP_IF_NONE_MATCH")
    if match is not None and not _names(match, tag, weakly=False):
        raise http.PreconditionFailed("If-Match does not name what is there now")
    known = none_match is not None and _names(none_match, tag, weakly=True)
    if known and request.method not in ("GET", "HEAD"):
        raise http.PreconditionFailed("If-None-Match names what is there now")
    return known

def _names(header: str, tag: str | None, weakly: bool) -> bool:
    """Does * or a list of entity tags name this one? 400 for any other text."""
    if header.strip() == "*":
        return tag is not None
    if not (tags := _ETAG.findall(header)) or _ETAG.sub("", header).strip(", \t"):
        raise http.BadRequest("If-Match and If-None-Match take * or quoted entity tags with commas between")
    return any(text == tag and (weakly or not weak) for weak, text in tags)

_ETAG = re.compile(r'(W/)?("[\x21\x23-\x7e\x80-\xff]*")')

def allow(methods: Iterable[str]) -> dict[str, str]:
    return {"Allow": ", ".join(sorted({*methods, "OPTIONS"}))}

def cors_headers(environ: WSGIEnvironment, origins: list[str]) -> list[tuple[str, str]]:
    """What lets the pages of other origins use the service (Fetch standard §3.3); never with credentials."""
    origin = "*" if "*" in origins else environ.get("HTTP_ORIGIN")
    vary = [("Vary", "Origin")] if origins and "*" not in origins else []
    if origin not in origins:
        return vary
    allowed = [*vary, ("Access-Control-Allow-Origin", origin)]
    if environ["REQUEST_METHOD"] == "OPTIONS" and "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in environ:
        return [*allowed, ("Access-Control-Allow-Methods", "GET, HEAD, POST, PUT, PATCH, DELETE"),
                ("Access-Control-Allow-Headers", "Authorization, Content-Type, If-Match, If-None-Match")]  # fmt: skip
    return [*allowed, ("Access-Control-Expose-Headers", "ETag, Link, Location")]

def error_reply(error: http.HTTPException, oauth: bool) -> Any:
    """What an error is answered with; oauth: in the form of RFC 6749 §5.2, whose texts are plain ASCII."""
    if error.response is not None:  # an embedder's abort(Response(...))
        return error.response
    status, body = error.code or 500, getattr(error, "data", {"message": error.description})
    headers = {name: value for name, value in error.get_headers() if not name.startswith("Content-")}
    text = re.sub(r"[^ !#-\[\]-~]", "?", error.description or "")
    if isinstance(error, http.MethodNotAllowed):
        headers |= allow(error.valid_methods or ())
    if oauth and "error" not in body:
        code = {401: "invalid_grant", 429: "temporarily_unavailable", 503: "temporarily_unavailable"}
        body = {"error": code.get(status, "invalid_request"), "error_description": text}
        status = 400 if status == 401 else status
    if status == 401:
        why = f', error="invalid_token", error_description="{text}"' if isinstance(error, InvalidToken) else ""
        headers["WWW-Authenticate"] = f'Bearer realm="service"{why}'
    return body, status, headers | (NO_STORE if oauth else {})

def send(
    environ: WSGIEnvironment, start_response: StartResponse, reply: Any, more_headers: Iterable[tuple[str, str]] = ()
) -> Iterable[bytes]:
    """Answer with what a view returned: a Response, or JSON, or (JSON, status), or (JSON, status, headers)."""
    if isinstance(reply, werkzeug.Response):
        reply.headers.extend(more_headers)
        return reply(environ, start_response)
    body, status, headers = (*reply, {})[:3] if isinstance(reply, tuple) else (reply, 200, {})
    payload = b"" if body is None else to_json(body)
    lines = [*headers.items(), *more_headers]
    if status not in (204, 304):
        lines += [("Content-Type", "application/json"), ("Content-Length", str(len(payload)))]
    start_response(f"{status} {HTTP_STATUS_CODES.get(status, '')}", lines)
    return [payload] if payload and environ["REQUEST_METHOD"] != "HEAD" else []

NO_STORE = {"Cache-Control": "no-store"}

# ---- Views ----------------------------------------------------------------------------------------------------------
# Plain functions: parse, act, answer. A view takes the request and its URL arguments, raises early and catches
# nothing. It may be run again from its start, so what it does outside of the store must bear that.

NAME = Text(1, 64, "[a-z0-9][a-z0-9._@-]*", "made of a-z, 0-9 and . _ @ -, a letter or digit first")
PASSWORD, ANY = Text(15, 1024, r"[\s\S]*"), Text(1, 10**6, r"[\s\S]*")
ID = re.compile("[^/\x00-\x1f\x7f-\x9f\ufffd]{1,64}")  # U+FFFD is what a URL becomes that is not UTF-8

SIGN_UP = parser_of(Argument("username", NAME, required=True), Argument("password", PASSWORD, required=True))
NEW_PASSWORD = parser_of(Argument("password", ANY, required=True), Argument("new_password", PASSWORD, required=True))
OLD_PASSWORD = parser_of(Argument("password", ANY, required=True))
PAGE = parser_of(
    Argument("limit", int, choices=range(1, 1001), location="args", help="Must be a whole number from 1 to 1,000"),
    Argument("after", Text(1, 15, "[0-9a-f]+"), default="0", location="args", help="Must come from a Link header"),
)

def read_index(request: Request) -> Any:
    """What there is; a browser is sent to the page"""
    if request.accept_mimetypes.best_match(["application/json", "text/html"]) == "text/html":
        return None, 303, {"Location": f"{request.prefix}/docs", "Vary": "Accept"}
    index = {
        f"{method} {request.prefix}{rule.rule}": rule.endpoint.__doc__
        for rule in request.service.routes.iter_rules() for method in sorted(rule.methods or ()) if method != "HEAD"
    }  # fmt: skip
    return index, 200, {"Vary": "Accept"}

def read_health(request: Request) -> Any:
    """Whether the service and its store answer"""
    with request.service.store.read("") as data:
        data["account"].get("password")
    return {"status": "ok"}

def create_user(request: Request) -> Reply:
    """Sign up"""
    if request.service.settings.signup == "closed":
        raise http.Forbidden("Sign-up is closed: ask the operator for an account")
    given = request.parse(SIGN_UP, public=True)
    add_account(request.service, given.username, given.password)
    request.log("sign-up", given.username)
    return {"username": given.username}, 201, {}

def add_account(service: Service, name: str, password: str) -> None:
    """A new account with its starter items; 409 if the name is taken."""
    account = new_account(service, name, password, "password")
    with service.store.write(name) as data:
        if "password" in data["account"]:
            raise http.Conflict(f"The name {name} is taken")
        data["account"]["password"] = account
        for resource in service.resources:
            for id, item in resource.starter.items():
                add_item(data, resource, id, dict(item))

def new_account(service: Service, name: str, password: str, argument: str) -> dict[str, str]:
    if password.casefold() == name:
        raise Refusal(message={argument: "Must not be the name itself"})
    return {"hash": service.passwords.hash(password)}

def read_user(request: Request) -> Any:
    """Who is logged in"""
    with request.read():
        return {"username": request.user}

def change_password(request: Request) -> Reply:
    """Change the password; all other sessions end"""
    given = request.parse(NEW_PASSWORD)
    account = confirmed_account(request, given.password)
    changed = new_account(request.service, request.user, given.new_password, "new_password")
    with request.write() as data:
        refuse_unless(data, account)
        data["account"]["password"] = changed
        for sid in set(data["sessions"]) - {request.claims["sid"]}:
            del data["sessions"][sid]
    request.log("password changed", request.user)
    return None, 204, {}

def delete_user(request: Request) -> Reply:
    """Delete the account and all that it holds"""
    account = confirmed_account(request, request.parse(OLD_PASSWORD).password)
    with request.write() as data:
        refuse_unless(data, account)
        data.clear()
    request.log("account deleted", request.user)
    return None, 204, {}

def confirmed_account(request: Request, password: str) -> Any:
    """The bearer's account, once the bearer has given its password."""
    with request.read() as data:
        account = data["account"]["password"]
    if not request.service.passwords.match(account["hash"], password, request.user, request.remote_addr or ""):
        raise Refusal(message={"password": "Wrong password"})
    return account

def refuse_unless(data: Data, account: Any) -> None:
    """Passwords are checked outside of the transaction, so inside of it the account must still be the same."""
    if data["account"].get("password") != account:
        raise Refusal(message={"password": "Was changed at this moment"})

def issue_token(request: Request) -> Reply:
    """Log in, or refresh a session"""
    grant_type = token_request(request, GRANT).grant_type
    if grant_type not in GRANTS:
        raise Refusal(error="unsupported_grant_type", error_description=f"The grants are {' and '.join(GRANTS)}")
    parser, grant = GRANTS[grant_type]
    return grant(request, **token_request(request, parser)), 200, NO_STORE

def token_request(request: Request, parser: RequestParser) -> Namespace:
    """Arguments that stand once each, and in the body, since URLs are logged (RFC 6749 §3.2, §2.3.1)."""
    repeated = [each.name for each in parser.args if len(request.form.getlist(each.name)) > 1]
    in_url = request.args.keys() & {"username", "password", "refresh_token", "token", "access_token"}
    if repeated or in_url:
        right = "be sent once" if repeated else "be in the body, not in the URL"
        raise Refusal(error="invalid_request", error_description=f"{min(repeated or in_url)} must {right}")
    return request.parse(parser, public=True)

def log_in(request: Request, username: str, password: str) -> dict[str, Any]:
    """A new session's tokens. First-party login: RFC 9700 §2.4 retires this grant for third parties."""
    service, account = request.service, None
    if re.fullmatch(NAME.pattern, username):
        with service.store.read(username) as data:
            account = data["account"].get("password")
    if not service.passwords.match(account and account["hash"], password, username, request.remote_addr or ""):
        raise InvalidToken("The user name or the password is wrong")
    with service.store.write(username) as data:
        if data["account"].get("password") != account:
            raise InvalidToken("The user name or the password was changed at this moment")
        now = service.clock()
        sid, session = open_session(data, now, service.settings.refresh_ttl)
    return service.tokens.pair(username, sid, session, now)

def refresh(request: Request, refresh_token: str) -> dict[str, Any]:
    """The next generation's tokens; a replayed token ends its session."""
    service, claims = request.service, request.service.tokens.verify(REFRESH, refresh_token)
    user, sid = claims["sub"], claims["sid"]
    with service.store.write(user) as data:
        now, known = service.clock(), sid in data["sessions"]
        session = renew_session(data, sid, claims["gen"], now, service.settings.refresh_grace)
        ended = known and sid not in data["sessions"]
    if session:
        return service.tokens.pair(user, sid, session, now)
    if ended:
        request.log("reuse detected", user)
    raise InvalidToken("The session has ended: log in again")

def revoke_token(request: Request) -> Reply:
    """Log out: end the session of an access or a refresh token (RFC 7009)"""
    token = token_request(request, REVOKE).token
    for typ in (ACCESS, REFRESH):
        with suppress(InvalidToken):  # junk is no error here (§2.2), and a late logout still is a logout
            claims = request.service.tokens.verify(typ, token, expired=True)
            with request.service.store.write(claims["sub"]) as data:
                data["sessions"].pop(claims["sid"], None)
    return None, 200, {}

GRANT = parser_of(Argument("grant_type", ANY, required=True))
GRANTS: dict[str, tuple[RequestParser, View]] = {
    "password": (parser_of(*(Argument(name, ANY, required=True) for name in ("username", "password"))), log_in),
    "refresh_token": (parser_of(Argument("refresh_token", ANY, required=True)), refresh),
}
TOKEN_REQUESTS = [  # what POST /token takes, for its description
    parser_of(Argument("grant_type", choices=[name], required=True), *parser.args)
    for name, (parser, _) in GRANTS.items()
]
REVOKE = parser_of(Argument("token", ANY, required=True))

def read_jwks(request: Request) -> Reply:
    """The public keys that verify access tokens (RFC 7517)"""
    return request.service.tokens.jwks, 200, {"Cache-Control": "max-age=300"}

def read_metadata(request: Request) -> Any:
    """Where a client finds what, and how (RFC 8414)"""
    issuer, prefix = request.service.settings.issuer, request.prefix
    base = issuer.rstrip("/") + ("" if urlsplit(issuer).path.rstrip("/").endswith(prefix) else prefix)
    return {
        "issuer": issuer, "token_endpoint": f"{base}/token", "revocation_endpoint": f"{base}/revoke",
        "jwks_uri": f"{base}/.well-known/jwks.json", "grant_types_supported": [*GRANTS], "response_types_supported": [],
        "token_endpoint_auth_methods_supported": ["none"], "revocation_endpoint_auth_methods_supported": ["none"],
    }  # fmt: skip

def list_items(request: Request, resource: Resource) -> Reply:
    """List the items in the order of their creation"""
    given = request.parse(PAGE)
    with request.read() as data:
        rows = data[resource.name].page(int(given.after, 16), given.limit and given.limit + 1)
    link = {}
    if given.limit and len(rows) > given.limit:
        url = f"{request.prefix}/{resource.name}?limit={given.limit}&after={rows[-2][0]:x}"
        link = {"Link": f'<{url}>; rel="next"'}
    return conditional(request, {id: item for _, id, item in rows[: given.limit]}, **link)

def create_item(request: Request, resource: Resource) -> Reply:
    """Create an item under the next id"""
    item = dict(request.parse(resource.parser))
    with request.write() as data:
        counts, limit = counter(data, resource), request.service.settings.max_items
        number = counts["last"] + 1
        while (id := f"{resource.item}{number}") in data[resource.name] and counts["count"] < limit:
            number += 1
        add_item(data, resource, id, item, limit, number)
    return item, 201, {"Location": f"{request.prefix}/{resource.name}/{id}", "ETag": etag(item)}

def read_item(request: Request, resource: Resource, id: str) -> Reply:
    """Read one item"""
    with request.read() as data:
        item = existing_item(data, resource, id)
    return conditional(request, item)

def put_item(request: Request, resource: Resource, id: str) -> Reply:
    """Create or replace the item under an id of one's own choice"""
    if not ID.fullmatch(id):
        raise http.BadRequest("An id has 1 to 64 characters, none of them a slash or a control character")
    item = dict(request.parse(resource.parser))
    with request.write() as data:
        current = data[resource.name].get(id)
        check_preconditions(request, None if current is None else etag(current))
        if current is None:
            add_item(data, resource, id, item, request.service.settings.max_items)
        else:
            data[resource.name][id] = item
    return item, 201, {"ETag": etag(item)}

def update_item(request: Request, resource: Resource, id: str) -> Reply:
    """Change the arguments that are sent, and leave the others"""
    changes = request.parse(resource.changes)
    with request.write() as data:
        item = existing_item(data, resource, id)
        check_preconditions(request, etag(item))
        if changes:
            data[resource.name][id] = item = {**item, **changes}
    return item, 200, {"ETag": etag(item)}

def delete_item(request: Request, resource: Resource, id: str) -> Reply:
    """Delete an item; its id is not given again"""
    with request.write() as data:
        check_preconditions(request, etag(existing_item(data, resource, id)))
        del data[resource.name][id]
        counts = counter(data, resource)
        data["counters"][resource.name] = {**counts, "count": counts["count"] - 1}
    return None, 204, {}

def existing_item(data: Data, resource: Resource, id: str) -> dict[str, Any]:
    item: dict[str, Any] | None = data[resource.name].get(id) if ID.fullmatch(id) else None
    if item is None:
        raise http.NotFound(f"{resource.item.capitalize()} {id} doesn't exist")
    return item

def add_item(
    data: Data, resource: Resource, id: str, item: dict[str, Any], limit: float = math.inf, number: int = 0
) -> None:
    """Put an item where none is; 403 if the user has as many as the limit allows. The number of its id is used up."""
    counts = counter(data, resource)
    if counts["count"] >= limit:
        raise http.Forbidden(f"There is room for {limit} items: delete one first")
    if match := re.fullmatch(f"{resource.item}([1-9][0-9]{{0,39}})", id):  # todo007 is not todo7
        number = max(number, int(match[1]))  # counting on from 40 digits never comes to the end of 64 characters
    data["counters"][resource.name] = {"last": max(counts["last"], number), "count": counts["count"] + 1}
    data[resource.name][id] = item

def counter(data: Data, resource: Resource) -> dict[str, int]:
    """How many items there are, and the highest number in an id so far: kept, so that nothing has to be counted."""
    return data["counters"].get(resource.name) or {"last": 0, "count": 0}

# ---- OpenAPI --------------------------------------------------------------------------------------------------------
# The service as programs read it (OpenAPI 3.1), made from its routes, resources and parsers, so that it cannot drift;
# and the page that shows this to people. What a view answers stands beside its route.

_HEADERS = {"303": "Location", "304": "ETag", "401": "WWW-Authenticate", "429": "Retry-After", "503": "Retry-After"}
_EXAMPLES: dict[str, Any] = {  # of arguments, and of answers, whose schemas have the shape of their example
    "username": "alice", "password": "correct horse battery", "new_password": "battery horse correct", "after": "a",
    "User": {"username": "alice"}, "Health": {"status": "ok"}, "KeySet": {"keys": []}, "Index": {"GET /": "The index"},
    "TokenPair": {"access_token": "eyJ0…", "token_type": "Bearer", "expires_in": 900, "refresh_token": "eyJ1…"},
    "Metadata": {"issuer": "https://todo.example", "token_endpoint": "https://todo.example/token"},
    "Error": {"message": "There is none"}, "OAuthError": {"error": "invalid_grant", "error_description": "It ended"},
}  # fmt: skip
_TAGS = {"anyOf": [{"const": "*"}, {"type": "string", "pattern": r'^(W/)?"[!#-~]*"(, *(W/)?"[!#-~]*")*$'}]}
_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><title>To-do service</title>
<link rel="icon" href="docs/favicon-32x32.png"><link rel="stylesheet" href="docs/swagger-ui.css">
<div id="swagger-ui"></div><script src="docs/swagger-ui-bundle.js"></script><script src="docs/start.js"></script>"""
_START = 'SwaggerUIBundle({url: "openapi.json", dom_id: "#swagger-ui"})'
_POLICY = "default-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"

def read_openapi(request: Request) -> Any:
    """This description"""
    schemas = {name: object_schema([Argument(key, type(value), required=True) for key, value in shape.items()], shape)
               for name, shape in _EXAMPLES.items() if isinstance(shape, dict)}  # fmt: skip
    schemas["Error"]["properties"]["message"]["type"] = ["string", "object"]
    for each in request.service.resources:
        schemas[f"{each.name}.item"] = item = object_schema(each.arguments, each.example, kept=True)
        schemas[each.name] = {"type": "object", "additionalProperties": item}
    paths, names = defaultdict[str, dict[str, Any]](dict), list[str]()
    for rule in request.service.routes.iter_rules():
        path = re.sub("<(?:[^<>:]+:)?([^<>]+)>", r"{\1}", rule.rule)
        for method in sorted((rule.methods or {"GET", "POST", "PUT", "PATCH", "DELETE"}) - {"HEAD", "OPTIONS"}):
            if rule.endpoint not in (read_openapi, read_docs, read_docs_file):
                answers = request.service.answers.get(rule.endpoint, ("default", "", []))
                operation = paths[path][method.lower()] = _operation(rule, answers, re.findall("{(.+?)}", path))
                names.append(operation["operationId"])
                operation["operationId"] += f"_{n}" if (n := names.count(names[-1])) > 1 else ""
    flows = {"password": {"tokenUrl": f"{request.prefix}/token", "scopes": {}}}
    return {
        "openapi": "3.1.0", "info": {"title": "To-do service", "version": "1.0.0"}, "paths": paths,
        "servers": [{"url": request.prefix or "/"}], "components": {"schemas": schemas, "securitySchemes": {
            "login": {"type": "oauth2", "flows": flows}, "bearer": {"type": "http", "scheme": "bearer"}}},
    }  # fmt: skip

def _operation(rule: Rule, answers: Answers, variables: list[str]) -> dict[str, Any]:
    view, name, (success, others, parsers) = rule.endpoint, getattr(rule.endpoint, "__name__", "view"), answers
    resource = next((each for each in (rule.defaults or {}).values() if isinstance(each, Resource)), None)
    words = {"items": resource.name, "item": resource.item} if resource else {}
    examples = {"id": f"{resource.item}1", **resource.example} if resource else _EXAMPLES
    sent = [getattr(resource, str(each), each).args for each in parsers]
    status, schema, *headers = [*success.format(words.get("items")).split(), ""]
    error = "OAuthError" if view in (issue_token, revoke_token) else "Error"
    id = {"type": "string", "pattern": f"^{ID.pattern}$", "examples": [examples["id"]]} if words else {"type": "string"}
    where: list[Any] = [("path", each, True, id) for each in variables]
    where += [("query", it.name, it.required, it.schema()) for each in sent for it in each if "args" in it.places]
    where += [("header", each, False, _TAGS) for each in ("If-Match", "If-None-Match") if "412" in others]
    bearer: list[dict[str, Any]] = [{"login": []}, {"bearer": []}] if "401" in others or not others else []
    operation: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", re.sub("items?$", lambda found: words.get(found[0], found[0]), name)),
        "summary": (view.__doc__ or "").split("\n")[0], "tags": [words.get("items", "service")],
        "security": bearer if others else [*bearer, {}],  # an embedder's view may ask for a bearer or not
        "parameters": [dict(zip(("in", "name", "required", "schema"), each, strict=True)) for each in where],
        "responses": {status: _answer(status, schema, *headers)}
        | {code: _answer(code, error if code > "4" else "", _HEADERS.get(code, "")) for code in others.split()},
    }  # fmt: skip
    if shapes := [shape for shape in (object_schema(each, examples) for each in sent) if shape["properties"]]:
        body = {"schema": {"oneOf": shapes} if shapes[1:] else shapes[0], "example": shapes[0]["examples"][0]}
        kinds = ["application/json", FORMS[0], *["application/merge-patch+json"] * (view is update_item)]
        operation["requestBody"] = {"required": bool(shapes[0]["required"]), "content": dict.fromkeys(kinds, body)}
    return operation

def _answer(status: str, schema: str, *headers: str) -> dict[str, Any]:
    return {
        "description": HTTP_STATUS_CODES[int(status)] if status.isdigit() else "Whatever the view answers",
        "headers": {name: {"required": name != "Link", "schema": {"type": "string"}} for name in headers if name},
        "content": {"application/json": {"schema": {"$ref": f"#/components/schemas/{schema}"}}} if schema else {},
    }

def read_docs(request: Request) -> werkzeug.Response:
    """The page on which people read this description and try the service"""
    read_docs_file(request, "swagger-ui.css").close()  # 404 without the extra
    return werkzeug.Response(_PAGE, mimetype="text/html", headers={"Content-Security-Policy": _POLICY})

def read_docs_file(request: Request, file: str) -> werkzeug.Response:
    """A file of that page; Swagger UI's own come with the docs extra"""
    if (package := find_spec("flask_swagger_ui")) is None:
        raise http.NotFound("The page needs the docs extra: pip install 'todo-service[docs]'")
    if file == "start.js":
        return werkzeug.Response(_START, mimetype="text/javascript")
    return send_from_directory(Path(str(package.origin)).parent / "dist", file, request.environ)

# ---- Routes ---------------------------------------------------------------------------------------------------------
# One Map whose endpoints are the views themselves. Every resource gets the same six rules; an embedder's own rules
# come last and are served just the same.

ROUTES: dict[str, tuple[View, Answers | None]] = {
    # route: (view, (status, schema and headers of its success; all other statuses; its parsers, or a resource's))
    "GET /": (read_index, ("200 Index Vary", "303 400", [])),
    "GET /health": (read_health, ("200 Health", "400 503", [])),
    "GET /openapi.json": (read_openapi, None),
    "GET /docs": (read_docs, None), "GET /docs/<file>": (read_docs_file, None),
    "POST /users": (create_user, ("201 User", "400 403 409 413 415 503", [SIGN_UP])),
    "GET /users/me": (read_user, ("200 User", "400 401 503", [])),
    "PATCH /users/me": (change_password, ("204", "400 401 413 415 429 503", [NEW_PASSWORD])),
    "DELETE /users/me": (delete_user, ("204", "400 401 413 415 429 503", [OLD_PASSWORD])),
    "POST /token": (issue_token, ("200 TokenPair Cache-Control", "400 413 415 429 503", TOKEN_REQUESTS)),
    "POST /revoke": (revoke_token, ("200", "400 413 415 503", [REVOKE])),
    "GET /.well-known/jwks.json": (read_jwks, ("200 KeySet Cache-Control", "400", [])),
    "GET /.well-known/oauth-authorization-server": (read_metadata, ("200 Metadata", "400", [])),
}  # fmt: skip
ITEM_ROUTES: dict[str, tuple[View, Answers]] = {
    "GET /{}": (list_items, ("200 {} ETag Link", "304 400 401 412 413 415 503", [PAGE])),
    "POST /{}": (create_item, ("201 {}.item ETag Location", "400 401 403 413 415 503", ["parser"])),
    "GET /{}/<id>": (read_item, ("200 {}.item ETag", "304 400 401 404 412 503", [])),
    "PUT /{}/<id>": (put_item, ("201 {}.item ETag", "400 401 403 404 412 413 415 503", ["parser"])),
    "PATCH /{}/<id>": (update_item, ("200 {}.item ETag", "400 401 404 412 413 415 503", ["changes"])),
    "DELETE /{}/<id>": (delete_item, ("204", "400 401 404 412 503", [])),
}
ANSWERS = {view: answers for view, answers in [*ROUTES.values(), *ITEM_ROUTES.values()] if answers}

def make_routes(resources: Iterable[Resource], routes: Iterable[Rule]) -> Map:
    """The Map of an app. An embedder's rules are copied, since a Rule binds only once."""

    def rule(route: str, view: View, **defaults: Any) -> Rule:
        method, path = route.split()
        return Rule(path, methods=[method], endpoint=view, defaults=defaults)

    rules = [rule(route, view) for route, (view, _) in ROUTES.items()]
    for each in resources:
        rules += [rule(route.format(each.name), view, resource=each) for route, (view, _) in ITEM_ROUTES.items()]
    # No redirects: /todos/ and //todos are other paths than /todos.
    return Map([*rules, *(rule.empty() for rule in routes)], merge_slashes=False, redirect_defaults=False)

# ---- Application ----------------------------------------------------------------------------------------------------
# create_app puts the rooms together. Here, and only here, errors become responses. start_response is called directly,
# since a Response object costs as much as all the rest of an authenticated GET.

def make_service(
    settings: Settings, store: Any = None, resources: Iterable[Resource] | None = None, routes: Iterable[Rule] = (),
    clock: Clock = time.time,
) -> Service:  # fmt: skip
    """The parts of an app."""
    store = open_store(settings.store_url) if store is None else store
    if not settings.secret_key:
        if not isinstance(store, MemoryStore):
            raise ValueError(MISSING_SECRET)
        settings = replace(settings, secret_key=secrets.token_hex(32))  # it forgets as much at exit as the store does
    models = [TODO_RESOURCE] if resources is None else list(resources)
    names = [model.name for model in models]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(f"two resources are named {twice[0]!r}")
    urls = make_routes(models, routes)
    return Service(settings, store, Tokens(settings, clock), Passwords(clock), models, urls, ANSWERS, clock)

def refuse_malformed(request: Request) -> None:
    environ = request.environ
    if environ.get("SERVER_PROTOCOL") == "HTTP/1.1" and "HTTP_HOST" not in environ:
        raise http.BadRequest("HTTP/1.1 asks for a Host header (RFC 9112 §3.2)")
    if not request.query_string.isascii():
        raise http.BadRequest("A query string is percent-encoded (RFC 3986 §2.1)")
    if environ.get("PATH_INFO", "").startswith("//"):  # Werkzeug would take it for one slash
        raise http.NotFound()

def repeated(answer: View, request: Request) -> Any:
    """Run a view again after a conflict of its transaction, up to 8 times."""
    for attempt in range(7):
        try:
            return answer(request)
        except StoreError as error:
            if not error.conflict:
                raise
            time.sleep(random.random() * 0.005 * 2**attempt)
    return answer(request)

def create_app(
    settings: Settings | None = None, *, store: Any = None, resources: Iterable[Resource] | None = None,
    routes: Iterable[Rule] = (), clock: Clock = time.time,
) -> WSGIApplication:  # fmt: skip
    """The service as a WSGI callable (PEP 3333); ValueError for settings or names that cannot work.

    settings come from the environment unless given, the store from their URL; resources replace the to-dos;
    routes are Werkzeug Rules whose endpoints are views of your own, view(request, **url_arguments) returning JSON,
    (JSON, status), (JSON, status, headers) or a Werkzeug Response; clock gives the time in seconds.
    """
    service = make_service(settings or Settings.from_environ(), store, resources, routes, clock)
    adapter, hops = service.routes.bind(""), service.settings.proxies
    match = lru_cache(maxsize=1000)(adapter.match)  # 5 µs each; what fits no route is not remembered
    origins = comma_list(service.settings.cors_origins)

    def answer(request: Request) -> Any:
        refuse_malformed(request)
        if request.method == "OPTIONS" and (methods := adapter.allowed_methods(request.path)):
            return None, 204, allow(methods)
        view, arguments = match(request.path, request.method)
        return view(request, **arguments)

    def app(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        request = Request(environ, service)
        try:
            reply = repeated(answer, request)
        except RequestRedirect:
            reply = error_reply(http.NotFound(), oauth=False)
        except http.HTTPException as error:
            reply = error_reply(error, oauth=request.path in ("/token", "/revoke"))
        if "files" in request.__dict__:  # of an upload
            request.close()
        return send(environ, start_response, reply, cors_headers(environ, origins))

    return ProxyFix(app, x_for=hops, x_proto=hops, x_host=hops, x_prefix=hops) if hops else app

# ---- Guard ----------------------------------------------------------------------------------------------------------
# What other services mount in front of themselves, so that one login opens them too. It knows keys, but no sessions:
# a logout reaches them when the access token expires.

def guard(
    wsgi_app: WSGIApplication, *, issuer: str, audience: str, secret: str | None = None, jwks_url: str | None = None,
    open_paths: Iterable[str] = (), clock: Clock = time.time,
) -> WSGIApplication:  # fmt: skip
    """WSGI middleware that lets only valid access tokens through; the app finds REMOTE_USER and service.claims.

    It verifies with the issuer's secret (which can forge tokens as well) or with the keys at its jwks_url. Without a
    good token it answers 401 as RFC 6750 §3 says, without keys 503. CORS preflights and open_paths pass, as nobody.
    """
    if bool(secret) == bool(jwks_url) or isinstance(open_paths, str):
        raise ValueError("guard needs either secret or jwks_url, and a list of open_paths")
    settings, paths = Settings(secret_key=secret or "", issuer=issuer, audience=audience), set(open_paths)
    tokens = Tokens(settings, clock, remote_keys(jwks_url, clock) if jwks_url else None)

    def guarded(environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        for name in ("REMOTE_USER", "HTTP_REMOTE_USER", "AUTH_TYPE", "service.claims"):
            environ.pop(name, None)
        preflight = environ["REQUEST_METHOD"] == "OPTIONS" and "HTTP_ACCESS_CONTROL_REQUEST_METHOD" in environ
        if not preflight and environ.get("PATH_INFO") not in paths:
            try:
                claims = tokens.verify(ACCESS, bearer_token(environ))
            except http.HTTPException as error:
                return send(environ, start_response, error_reply(error, oauth=False))
            environ |= {"REMOTE_USER": claims["sub"], "AUTH_TYPE": "Bearer", "service.claims": dict(claims)}
        return wsgi_app(environ, start_response)

    return guarded

# ---- Main -----------------------------------------------------------------------------------------------------------
# python service.py is the development server, which starts anew whenever a file changes; and two commands.

def add_user(name: str) -> None:
    """Add an account, with a password from the prompt or from standard input."""
    settings = Settings.from_environ()
    if settings.store_url == "memory:":
        raise ValueError("adduser needs a store that outlives it, for example SERVICE_STORE_URL=sqlite:///todos.db")
    password = getpass() if sys.stdin.isatty() else sys.stdin.readline().rstrip("\n")
    for what, rule, text in (("name", NAME, name), ("password", PASSWORD, password)):
        try:
            rule(text)
        except ValueError as error:
            raise ValueError(f"The {what} cannot be: {error}") from None
    add_account(make_service(settings), name, password)

def generate_key(path: str) -> None:
    """Write a new Ed25519 private key that only its owner can read."""
    from cryptography.hazmat.primitives import serialization as pem
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    text = Ed25519PrivateKey.generate().private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption())
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(text)

def main() -> None:
    """Run the development server or a command."""
    parser = argparse.ArgumentParser(description="A to-do service with tokens: its development server")
    parser.add_argument("--port", type=int, default=5000)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("adduser", help="add an account where sign-up is closed").add_argument("name")
    commands.add_parser("genkey", help="write a new signing key").add_argument("file", nargs="?", default="ed25519.pem")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO)
    try:
        if options.command == "adduser":
            add_user(options.name)
        elif options.command == "genkey":
            generate_key(options.file)
        else:
            run_simple("127.0.0.1", options.port, create_app(), use_reloader=True, threaded=True)
    except (ValueError, OSError, ImportError, http.HTTPException) as error:
        sys.exit(str(error))

if __name__ == "__main__":
    main()
