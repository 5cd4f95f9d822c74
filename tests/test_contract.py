"""The description of the service, read by programs that others wrote."""

from __future__ import annotations

import datetime
import json
import re
import sys
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar
from uuid import UUID

import pytest
from jsonschema import Draft202012Validator
from openapi_spec_validator import validate

import service
from conftest import run, serve
from service import Argument, Resource, Route
from test_service import PASSWORD, World


def document_of(world: World, mount: str = "/api") -> dict[str, Any]:
    """The description, which must be valid OpenAPI 3.1."""
    answer = world("GET /openapi.json", environ={"SCRIPT_NAME": mount})
    validate(answer.json)
    return dict(answer.json)


def read_shelf(request: Any, number: int, rest: str) -> Any:
    """What stands on a shelf

    More than the summary.
    """
    return {"number": number, "rest": rest}


class Capitals:
    """Two capital letters: a type of somebody's own."""

    __schema__: ClassVar = {"type": "string", "pattern": "^[A-Z]{2}$"}

    def __call__(self, value: Any) -> str:
        if not re.fullmatch("[A-Z]{2}", str(value)):
            raise ValueError("Two capital letters")
        return str(value)


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
    Argument("country", Capitals()),
    Argument("shout", lambda value: str(value).upper()),
    Argument("nick", dest="alias"),
]


@pytest.fixture
def library() -> World:
    """A service of somebody's own: resources, one of them shared, and routes."""
    notes = Resource("notes", "note", ARGUMENTS)
    rooms = Resource("reading-rooms", "room", [ARGUMENTS[0]], shared="operator")
    shelf = Route("GET /shelves/<int:number>/<path:rest>", read_shelf, is_open=True)
    lend = Route("POST /lend", lambda request: None, takes=service.RequestParser())
    return World(resources=[notes, rooms], routes=[shelf, lend], title="A library")


@pytest.fixture(params=["todos", "library"])
def described(request: pytest.FixtureRequest, world: World) -> World:
    return request.getfixturevalue("library") if request.param == "library" else world


def operations(document: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {
        f"{method.upper()} {path}": operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


def parts(value: Any) -> Iterator[dict[str, Any]]:
    """Every object in the document."""
    if isinstance(value, dict):
        yield value
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from parts(each)


def test_every_example_is_valid(described: World) -> None:
    document, count = document_of(described), 0
    for part in parts({name: document[name] for name in ("paths", "components")}):
        schema = part.get("schema", part)
        given = [part["example"]] if "example" in part else []
        given += part["examples"] if isinstance(part.get("examples"), list) else []
        for example in given:
            whole = schema | {"components": document["components"]}
            Draft202012Validator(whole).validate(example)
            count += 1
    assert count > 5


@pytest.mark.parametrize(
    "sent",
    [
        {},
        {"note": None, "mood": "bad", "tags": ["a"], "parts": "1,2", "nick": "x"},
        {"price": "0.10", "weight": 1.5, "is_done": "on", "extra": {"a": [1]}},
        {"due": "2030-01-31", "born": "2030-01-31", "uuid": str(UUID(int=1))},
        {"country": "SE", "shout": "x", "stars": 5, "colour": "red", "text": "ab"},
    ],
)
def test_items_are_what_their_schema_says(library: World, sent: dict[str, Any]) -> None:
    alice = library.user()
    created = alice("POST /notes", {"title": "T", **sent})
    assert created.status == 201, created.text
    document = document_of(library)
    answer = operations(document)["POST /notes"]["responses"]["201"]
    schema = answer["content"]["application/json"]["schema"]
    whole = schema | {"components": document["components"]}
    Draft202012Validator(whole).validate(created.json)
    assert alice("PUT /notes/again", created.json).status == 201


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


def test_the_service_does_what_its_description_says(tmp_path: Path) -> None:
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
        report = "\n".join(line[:500] for line in said.splitlines())
        assert status == 0, report
        for phase in ("Coverage", "Stateful"):
            assert re.search(rf"✅ +{phase}", report), report
        assert server("GET /health").status == 200
        assert "Traceback" not in server.log


# ---- A client that is generated -----------------------------------------------------

LIFE = """
import sys
from importlib import import_module
from inspect import signature
from pkgutil import walk_packages

import todo_client
from todo_client import AuthenticatedClient, Client
from todo_client.api.service import post_token
from todo_client.api.todos import delete_todos_id, get_todos, get_todos_id
from todo_client.api.todos import patch_todos_id, post_todos, put_todos_id


def body(operation, **values):
    kinds = signature(operation.sync_detailed).parameters["body"].annotation
    return kinds.__args__[0].from_dict(values)


url, name, password = sys.argv[1:]
login = body(post_token, grant_type="password", username=name, password=password)
pair = post_token.sync(client=Client(url), body=login)
client = AuthenticatedClient(url, pair.access_token)
created = post_todos.sync(client=client, body=body(post_todos, task="new"))
assert created.task == "new"
assert get_todos.sync(client=client).to_dict()["todo4"] == {"task": "new"}
task = body(put_todos_id, task="replaced")
replaced = put_todos_id.sync_detailed("x", client=client, body=task)
assert (replaced.status_code, replaced.parsed.task) == (201, "replaced")
tag, task = replaced.headers["ETag"], body(patch_todos_id, task="changed")
changed = patch_todos_id.sync("x", client=client, if_match=tag, body=task)
assert changed.task == "changed"
stale = delete_todos_id.sync_detailed("x", client=client, if_match=tag)
assert stale.status_code == 412
assert delete_todos_id.sync_detailed("x", client=client).status_code == 204
assert get_todos_id.sync("x", client=client).message == "Todo x doesn't exist"
for module in walk_packages(todo_client.__path__, "todo_client."):
    import_module(module.name)
print("lived")
"""


def test_a_generated_client_lives_a_todos_life(server: serve, tmp_path: Path) -> None:
    status, said = run(
        *("openapi-python-client", "generate", "--meta", "none", "--fail-on-warning"),
        *("--url", f"{server.url}/openapi.json", "--output-path", "todo_client"),
        folder=tmp_path,
    )
    assert (status, "arning" in said) == (0, False), said
    document = server("GET /openapi.json").json
    names = {each["operationId"] for each in operations(document).values()}
    modules = {path.stem: path for path in tmp_path.glob("todo_client/api/*/*.py")}
    assert names <= modules.keys()
    (tmp_path / "life.py").write_text(LIFE)
    server.user("generated")
    command = (sys.executable, "life.py", server.url, "generated", PASSWORD)
    assert run(*command, folder=tmp_path) == (0, "lived\n")
