"""What one request costs in Python, in process, beside two peers in the same run.

    pip install -e '.[bench]' && python bench/peers.py

The peers do the same work: `bare` is the least that one can write (WSGI, jwt.decode, json.dumps, a dict), without
routes, sessions or checks; `flask` is Flask, Flask-RESTful and Flask-JWT-Extended as their documentations show them,
with a block list of ended tokens. Batches take turns, so that a busy moment hits all three; environs are made
beforehand.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from importlib.metadata import version
from io import BytesIO
from pathlib import Path
from typing import Any

import flask_restful
import jwt
from flask import Flask
from flask_jwt_extended import (
    JWTManager,
    create_access_token,
    create_refresh_token,
    get_jwt,
    get_jwt_identity,
    jwt_required,
)
from flask_restful import reqparse

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import service

SECRET, ISSUER = "0123456789abcdef" * 4, "http://localhost:5000"
PASSWORD = "correct horse battery"
NO_LIMIT = 9_999_999
Environ = dict[str, Any]


def environ(method: str, path: str, token: str = "", body: bytes = b"") -> Environ:
    """What gunicorn would pass on for curl's request."""
    made: Environ = {
        "REQUEST_METHOD": method, "PATH_INFO": path, "SCRIPT_NAME": "", "QUERY_STRING": "", "RAW_URI": path,
        "SERVER_NAME": "localhost", "SERVER_PORT": "5000", "SERVER_PROTOCOL": "HTTP/1.1", "REMOTE_ADDR": "127.0.0.1",
        "HTTP_HOST": "localhost:5000", "HTTP_USER_AGENT": "curl/8.5.0", "HTTP_ACCEPT": "*/*",
        "wsgi.input": BytesIO(body), "wsgi.errors": sys.stderr, "wsgi.url_scheme": "http", "wsgi.version": (1, 0),
        "wsgi.multithread": True, "wsgi.multiprocess": False, "wsgi.run_once": False, "wsgi.input_terminated": True,
    }  # fmt: skip
    if token:
        made["HTTP_AUTHORIZATION"] = f"Bearer {token}"
    if body:
        made |= {"CONTENT_TYPE": "application/json", "CONTENT_LENGTH": str(len(body))}
    return made


def answer(app: Any, request: Environ) -> bytes:
    """The body of a good answer."""
    status = []
    chunks = app(request, lambda line, headers, exc_info=None: status.append(line))
    body = b"".join(chunks)
    if hasattr(chunks, "close"):
        chunks.close()
    assert status[0][0] == "2", (status, body)
    return body


# ---- The peers -------------------------------------------------------------------------------------------------------


def bare() -> Any:
    """The least that answers."""
    todos: dict[str, dict[str, Any]] = {"alice": {"todo3": {"task": "profit!"}}}

    def encode(user: str, kind: str, life: int) -> str:
        now = int(time.time())
        claims = {"iss": ISSUER, "sub": user, "aud": ISSUER, "iat": now, "exp": now + life, "kind": kind}
        return jwt.encode(claims, SECRET, "HS256")

    def pair(user: str) -> dict[str, Any]:
        return {"access_token": encode(user, "access", 900), "refresh_token": encode(user, "refresh", 86_400)}

    def app(request: Environ, start_response: Any) -> Iterable[bytes]:
        path, status = request["PATH_INFO"], "200 OK"
        if path == "/login":
            result: Any = pair("alice")
        else:
            token = request["HTTP_AUTHORIZATION"][7:]
            user = jwt.decode(token, SECRET, ["HS256"], audience=ISSUER, issuer=ISSUER)["sub"]
            if path == "/token":
                result = pair(user)
            elif request["REQUEST_METHOD"] == "POST":
                result, status = json.loads(request["wsgi.input"].read()), "201 CREATED"
                todos[user][f"todo{len(todos[user]) + 3}"] = result
            else:
                result = todos[user][path[7:]]
        body = json.dumps(result).encode()
        start_response(status, [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]

    return app


def flask() -> Any:
    """Flask, Flask-RESTful and Flask-JWT-Extended."""
    app = Flask("peer")
    app.config.update(
        JWT_SECRET_KEY=SECRET, JWT_ENCODE_AUDIENCE=ISSUER, JWT_DECODE_AUDIENCE=ISSUER, JWT_ENCODE_ISSUER=ISSUER,
        JWT_DECODE_ISSUER=ISSUER, JWT_ACCESS_TOKEN_EXPIRES=timedelta(minutes=15),
        JWT_REFRESH_TOKEN_EXPIRES=timedelta(days=1),
    )  # fmt: skip
    api, manager = flask_restful.Api(app), JWTManager(app)
    todos: dict[str, dict[str, Any]] = {"alice": {"todo3": {"task": "profit!"}}}
    ended: set[str] = set()
    parser = reqparse.RequestParser()
    parser.add_argument("task", type=str, required=True, location="json")

    @manager.token_in_blocklist_loader
    def is_ended(header: dict[str, Any], claims: dict[str, Any]) -> bool:
        return claims["jti"] in ended

    class Todo(flask_restful.Resource):  # type: ignore[misc]
        @jwt_required()
        def get(self, id: str) -> Any:
            if id not in todos[get_jwt_identity()]:
                flask_restful.abort(404, message=f"Todo {id} doesn't exist")
            return todos[get_jwt_identity()][id]

    class TodoList(flask_restful.Resource):  # type: ignore[misc]
        @jwt_required()
        def post(self) -> Any:
            mine, item = todos[get_jwt_identity()], dict(parser.parse_args())
            id = f"todo{len(mine) + 3}"
            mine[id] = item
            return item, 201, {"Location": f"/todos/{id}"}

    class Token(flask_restful.Resource):  # type: ignore[misc]
        @jwt_required(refresh=True)
        def post(self) -> Any:
            ended.add(get_jwt()["jti"])
            user = get_jwt_identity()
            return {"access_token": create_access_token(user), "refresh_token": create_refresh_token(user)}

    class Login(flask_restful.Resource):  # type: ignore[misc]
        def post(self) -> Any:
            return {"access_token": create_access_token("alice"), "refresh_token": create_refresh_token("alice")}

    api.add_resource(Todo, "/todos/<id>")
    api.add_resource(TodoList, "/todos")
    api.add_resource(Token, "/token")
    api.add_resource(Login, "/login")
    return app


def ours() -> Any:
    """service.py on the memory store; alice has an account and is logged in by her password."""
    app = service.create_app(service.Settings(secret_key=SECRET, issuer=ISSUER, max_items=NO_LIMIT))
    account = {"username": "alice", "password": PASSWORD}
    answer(app, environ("POST", "/users", body=json.dumps(account).encode()))
    return app


LOGINS = {
    "ours": ("/token", {"grant_type": "password", "username": "alice", "password": PASSWORD}),
    "bare": ("/login", {}),
    "flask": ("/login", {}),
}
Peer = tuple[str, Any, dict[str, str]]  # name, app, the newest token pair


def refresh_environ(name: str, token: str) -> Environ:
    """Ours takes the token in the body, as RFC 6749 §6 has it; the peers as a bearer."""
    if name != "ours":
        return environ("POST", "/token", token)
    return environ("POST", "/token", body=json.dumps({"grant_type": "refresh_token", "refresh_token": token}).encode())


def refresh(peer: Peer) -> None:
    name, app, tokens = peer
    tokens.update(json.loads(answer(app, refresh_environ(name, tokens["refresh_token"]))))


# ---- The requests ----------------------------------------------------------------------------------------------------
# Each is a function of a peer and a count: it makes what is needed, and returns the seconds of `count` requests.


def timed(app: Any, requests: Iterable[Environ]) -> float:
    started = time.perf_counter()
    for request in requests:
        answer(app, request)
    return time.perf_counter() - started


def get_item(peer: Peer, count: int) -> float:
    refresh(peer)
    return timed(peer[1], [environ("GET", "/todos/todo3", peer[2]["access_token"]) for _ in range(count)])


def get_item_first(peer: Peer, count: int) -> float:
    def made() -> Iterator[Environ]:
        for _ in range(count):
            refresh(peer)
            yield environ("GET", "/todos/todo3", peer[2]["access_token"])

    return timed(peer[1], list(made()))


def post_item(peer: Peer, count: int) -> float:
    refresh(peer)
    body = b'{"task": "something new"}'
    return timed(peer[1], [environ("POST", "/todos", peer[2]["access_token"], body) for _ in range(count)])


def refresh_pair(peer: Peer, count: int) -> float:
    seconds = 0.0
    name, app, tokens = peer
    for _ in range(count):  # each needs the token that the one before it gave
        request = refresh_environ(name, tokens["refresh_token"])
        started = time.perf_counter()
        body = answer(app, request)
        seconds += time.perf_counter() - started
        tokens.update(json.loads(body))
    return seconds


REQUESTS: dict[str, Callable[[Peer, int], float]] = {
    "GET of one item": get_item,
    "GET of one item, token seen for the first time": get_item_first,
    "POST of one item": post_item,
    "refresh": refresh_pair,
}


def measure(repeats: int, count: int) -> dict[str, dict[str, list[float]]]:
    """{request: {peer: [microseconds of one request, a figure a batch]}}"""
    peers: list[Peer] = []
    for name, app in (("bare", bare()), ("ours", ours()), ("flask", flask())):
        path, body = LOGINS[name]
        tokens = json.loads(answer(app, environ("POST", path, body=json.dumps(body).encode())))
        peers.append((name, app, tokens))
    figures: dict[str, dict[str, list[float]]] = {request: {peer[0]: [] for peer in peers} for request in REQUESTS}
    for repeat in range(-1, repeats):  # the first one warms up
        for request, run in REQUESTS.items():
            for peer in peers:
                micros = run(peer, count) / count * 1e6
                if repeat >= 0:
                    figures[request][peer[0]].append(micros)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description="What one request costs beside two peers")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--count", type=int, default=200, help="requests of one batch")
    options = parser.parse_args()
    figures = measure(options.repeats, options.count)
    names = ("Python", "werkzeug", "pyjwt", "flask", "flask-restful", "flask-jwt-extended")
    print(", ".join(f"{name} {platform.python_version() if name == 'Python' else version(name)}" for name in names))
    print(f"Microseconds of one request in process, median (least) of {options.repeats} batches of {options.count}\n")
    print("| request | bare | service.py | Flask | service.py / bare | Flask / service.py |\n|---|---|---|---|---|---|")
    for request, by_peer in figures.items():
        median = {name: statistics.median(batch) for name, batch in by_peer.items()}
        cells = [f"{median[name]:.1f} ({min(batch):.1f})" for name, batch in by_peer.items()]
        ratios = [f"{median['ours'] / median['bare']:.2f}", f"{median['flask'] / median['ours']:.1f}"]
        print(f"| {' | '.join([request, *cells, *ratios])} |")


if __name__ == "__main__":
    main()
