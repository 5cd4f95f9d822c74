"""The description of the service, read by programs that others wrote."""

import datetime
import json
import re
import sys
from decimal import Decimal
from importlib import import_module
from inspect import signature
from pkgutil import walk_packages
from typing import Any
from uuid import UUID

from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

import service
from conftest import run, serve
from service import Argument, Resource, Route
from test_service import LOGIN, World, each


def document_of(world: World) -> dict[str, Any]:
    """The description, which must be valid OpenAPI 3.1."""
    document: dict[str, Any] = world("GET /openapi.json").json
    validate(document)
    return document


def capitals(value: Any) -> str:
    if not re.fullmatch("[A-Z]{2}", str(value)):
        raise ValueError("Two capital letters")
    return str(value)


capitals.__schema__ = {"type": "string", "pattern": "^[A-Z]{2}$"}  # type: ignore[attr-defined]
ARGUMENTS = [
    Argument("title", required=True),
    Argument("rank", int, default=7),
    Argument("price", Decimal),
    Argument("weight", float),
    Argument("is_done", bool),
    Argument("extra", dict),
    Argument("stars", int, choices=range(1, 6)),
    Argument("colour", choices=("red", "green")),
    Argument("tags", action="append"),
    Argument("parts", int, action="split"),
    Argument("note", nullable=True),
    Argument("mood", nullable=True, choices=("good", "bad")),
    Argument("text", service.Text(2, 8)),
    Argument("due", service.date),
    Argument("born", datetime.date.fromisoformat),
    Argument("uuid", UUID),
    Argument("country", capitals),
    Argument("shout", lambda value: str(value).upper()),
    Argument("nick", dest="alias"),
]


def library() -> World:
    """A service of somebody's own: resources, one of them shared, and routes."""
    notes = Resource("notes", "note", ARGUMENTS)
    rooms = Resource("reading-rooms", "room", [ARGUMENTS[0]], shared="operator")
    view, parser = (lambda request, **found: found), service.RequestParser()
    shelf = Route("GET /shelves/<int:number>/<path:rest>", view, is_open=True)
    lend = Route("POST /lend", view, takes=parser)
    return World(resources=[notes, rooms], routes=[shelf, lend], title="A library")


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


@each("make", [World, library])
def test_every_example_is_valid(make):
    document, objects, count = document_of(make()), [], 0

    def note(part):
        objects.append(part)
        return part

    json.loads(json.dumps(document), object_hook=note)
    for part in objects:
        schema = part.get("schema", part)
        given = [part["example"]] if "example" in part else []
        given += part["examples"] if isinstance(part.get("examples"), list) else []
        for example in given:
            whole = schema | {"components": document["components"]}
            Draft202012Validator(whole).validate(example)
            count += 1
    assert count > 5


NOTES: list[dict[str, Any]] = [
    {},
    {"note": None, "mood": "bad", "tags": ["a"], "parts": "1,2", "nick": "x"},
    {"price": "0.10", "weight": 1.5, "is_done": "on", "extra": {"a": [1]}},
    {"due": "2030-01-31", "born": "2030-01-31", "uuid": str(UUID(int=1))},
    {"country": "SE", "shout": "x", "stars": 5, "colour": "red", "text": "ab"},
]


@each("sent", NOTES)
def test_items_are_what_their_schema_says(sent):
    world = library()
    alice, document = world.user(), document_of(world)
    created = alice("POST /notes", {"title": "T", **sent})
    assert created.status == 201, created.text
    answer = operations(document)["POST /notes"]["responses"]["201"]
    schema = answer["content"]["application/json"]["schema"]
    whole = schema | {"components": document["components"]}
    Draft202012Validator(whole).validate(created.json)
    assert alice("PUT /notes/again", created.json).status == 201


def test_what_is_declared_oddly_is_described_rightly():
    odd = [
        Argument("key", location="headers"),
        Argument("id", location="cookies"),
        Argument("q"),
        Argument("n", int, choices=range(500, 0, -1), location="values"),
        Argument("p", Decimal, choices=[Decimal("0.5")], location="args"),
        Argument("none", choices=range(0), location="args"),
        Argument("big", int, choices=range(2**63), location="args"),
    ]
    example = [{"at": datetime.datetime(2030, 1, 1)}, {"at": None}]
    world = World(
        routes=[Route("GET /odd", dict, 299, service.parser_of(*odd), example)]
    )
    found = world("GET /openapi.json").json["paths"]["/odd"]["get"]
    assert "requestBody" not in found
    places = {each["name"]: each["in"] for each in found["parameters"]}
    assert list(places.values()) == ["header", "cookie", *["query"] * 5]
    schemas = {each["name"]: each["schema"] for each in found["parameters"]}
    assert schemas["n"] == {"type": "integer", "minimum": 1, "maximum": 500}
    assert schemas["p"]["enum"] == ["0.5"]
    content = found["responses"]["299"]["content"]["application/json"]
    assert content["schema"] == {"type": "array", "items": {}}


# ---- Requests that are made up ------------------------------------------------------

SCHEMATHESIS = """
[checks]  # beside the usual ones: an entity tag that is another one's, and a long body
positive_data_acceptance.expected-statuses = [
    "2xx", "3xx", 401, 403, 404, 409, 412, 413, 429,
]
negative_data_rejection.expected-statuses = [
    400, 401, 403, 404, 405, 409, 411, 412, 413, 415, 429,
]

[[operations]]  # a made-up password is well-formed and wrong, a form may have no part
include-path-regex = "/users/me$|/todos/"
checks.positive_data_acceptance.expected-statuses = ["2xx", "3xx", "4xx"]
"""


def test_the_service_does_what_its_description_says(tmp_path):
    """Schemathesis makes up requests, whole sequences too, and checks each answer.

    The bearer's password is none of the examples, so that no request ends the account.
    """
    (tmp_path / "schemathesis.toml").write_text(SCHEMATHESIS)
    with serve() as server:
        account = {"username": "tester", "password": "one that is no example"}
        assert server("POST /users", **account).status == 201
        token = server.log_in(*account.values())["access_token"]
        document = server("GET /openapi.json").json
        for name, operation in operations(document).items():
            if "requestBody" in operation:  # left open there for openapi-python-client
                is_required = not name.startswith("PATCH /todos")
                operation["requestBody"]["required"] = is_required
        (tmp_path / "openapi.json").write_text(json.dumps(document))
        status, said = run(
            *(sys.executable, "-m", "schemathesis.cli", "--no-color"),
            *("--config-file", "schemathesis.toml", "run"),
            *("openapi.json", "--url", server.url, "--checks", "all"),
            *("--header", f"Authorization: Bearer {token}", "--max-examples", "4"),
            *("--phases", "coverage,stateful", "--workers", "2"),
            *("--generation-deterministic", "--continue-on-failure"),
            folder=tmp_path,
        )
        assert status == 0, said[-5000:]
        for phase in ("Coverage", "Stateful"):
            assert re.search(rf"✅ +{phase}", said), said
        assert "Traceback" not in server.log


# ---- A client that is generated -----------------------------------------------------


def test_a_generated_client_lives_a_todos_life(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    with serve() as server:
        server.user("alice")
        status, said = run(
            *("openapi-python-client", "generate", "--meta", "none"),
            *("--fail-on-warning", "--output-path", "todo_client"),
            *("--url", f"{server.url}/openapi.json"),
            folder=tmp_path,
        )
        assert (status, "arning" in said) == (0, False), said
        found = [each.name for each in walk_packages([str(tmp_path)])]
        modules = {name.rpartition(".")[2]: import_module(name) for name in found}
        described = operations(server("GET /openapi.json").json).values()
        assert {each["operationId"] for each in described} <= modules.keys()

        def call(name, *path, options=(), **values):
            """An operation, whose body is the first of the kinds that it takes."""
            given, operation = dict(options), modules[name].sync_detailed
            if values:
                kinds = signature(operation).parameters["body"].annotation
                given["body"] = kinds.__args__[0].from_dict(values)
            answer = operation(*path, client=client, **given)
            shown = answer.parsed.to_dict() if answer.parsed else None
            return answer.status_code, shown, answer.headers.get("ETag")

        kinds = modules["client"]
        with kinds.Client(server.url) as client:
            token = call("post_token", **LOGIN)[1]["access_token"]
        with kinds.AuthenticatedClient(server.url, token) as client:
            assert call("post_todos", task="new")[:2] == (201, {"task": "new"})
            assert call("get_todos")[1]["todo4"] == {"task": "new"}
            status, replaced, tag = call("put_todos_id", "x", task="replaced")
            assert (status, replaced) == (201, {"task": "replaced"})
            known = {"if_match": tag}
            changed = call("patch_todos_id", "x", options=known, task="changed")
            assert changed[:2] == (200, {"task": "changed"})
            assert call("delete_todos_id", "x", options=known)[0] == 412
            assert call("delete_todos_id", "x")[0] == 204
            missing = {"message": "Todo x doesn't exist"}
            assert call("get_todos_id", "x")[:2] == (404, missing)
