"""A limit: WSGI, PyJWT and json, no framework; the least that does the same work."""

import json
import secrets
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import Any

import jwt

from peers import (
    ACCESS_LIFE,
    ISSUER,
    LONGEST_TASK,
    REFRESH_LIFE,
    SECRET,
    is_password,
    new_todos,
)

REASONS = {
    200: "200 OK",
    201: "201 Created",
    400: "400 Bad Request",
    401: "401 Unauthorized",
    404: "404 Not Found",
}
Answer = tuple[int, Any, dict[str, str]]


def create_app() -> Any:
    todos = new_todos()
    revoked: set[str] = set()

    def sign(user: str, kind: str, life: timedelta) -> str:
        now = datetime.now(UTC)
        claims = {
            "iss": ISSUER,
            "aud": ISSUER,
            "sub": user,
            "iat": now,
            "exp": now + life,
            "jti": secrets.token_urlsafe(12),
            "kind": kind,
        }
        return jwt.encode(claims, SECRET, "HS256")

    def pair(user: str) -> dict[str, str]:
        return {
            "access_token": sign(user, "access", ACCESS_LIFE),
            "refresh_token": sign(user, "refresh", REFRESH_LIFE),
        }

    def verify(token: str, kind: str) -> dict[str, Any]:
        claims = jwt.decode(token, SECRET, ["HS256"], audience=ISSUER, issuer=ISSUER)
        if claims["kind"] != kind or claims["jti"] in revoked:
            raise jwt.InvalidTokenError
        return claims

    def bearer(environ: dict[str, Any]) -> dict[str, Any]:
        scheme, _, token = environ.get("HTTP_AUTHORIZATION", "").partition(" ")
        if scheme != "Bearer":
            raise jwt.InvalidTokenError
        return verify(token, "access")

    def read_json(environ: dict[str, Any]) -> Any:
        return json.loads(environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"])))

    def issue(environ: dict[str, Any]) -> Answer:
        given = read_json(environ)
        if given["grant_type"] == "refresh_token":
            claims = verify(given["refresh_token"], "refresh")
            revoked.add(claims["jti"])
            return 200, pair(claims["sub"]), {}
        if is_password(given["username"], given["password"]):
            return 200, pair(given["username"]), {}
        return 400, {"message": "The user name or the password is wrong"}, {}

    def respond(environ: dict[str, Any]) -> Answer:
        method, path = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        if path == "/token":
            return issue(environ)
        claims = bearer(environ)
        if path == "/revoke":
            revoked.add(claims["jti"])
            return 200, {}, {}
        mine, id = todos[claims["sub"]], path[len("/todos/") :]
        if method == "GET" and not id:
            return 200, mine, {}
        if method == "GET" and id in mine:
            return 200, mine[id], {}
        if method == "GET":
            return 404, {"message": f"Todo {id} doesn't exist"}, {}
        task = read_json(environ).get("task")
        if not isinstance(task, str) or not 1 <= len(task) <= LONGEST_TASK:
            return 400, {"message": {"task": "Must have 1 to 10,000 characters"}}, {}
        id = id or f"todo{len(mine) + 1}"
        mine[id] = {"task": task}
        return 201, mine[id], {"Location": f"/todos/{id}"}

    def app(environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        try:
            status, result, headers = respond(environ)
        except jwt.PyJWTError:
            status, result, headers = 401, {"message": "The token is not valid"}, {}
        body = json.dumps(result).encode()
        headers["Content-Type"] = "application/json"
        headers["Content-Length"] = str(len(body))
        start_response(REASONS[status], list(headers.items()))
        return [body]

    return app
