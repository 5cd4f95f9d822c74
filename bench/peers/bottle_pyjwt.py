"""Bottle with PyJWT."""

import secrets
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import wraps
from typing import Any

import jwt
from bottle import Bottle, HTTPResponse, request, response

from peers import (
    ACCESS_LIFE,
    ISSUER,
    LONGEST_TASK,
    REFRESH_LIFE,
    SECRET,
    is_password,
    new_todos,
)

app = Bottle()
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
    return jwt.encode(claims, SECRET, algorithm="HS256")


def verify(token: str, kind: str) -> dict[str, Any]:
    try:
        claims = jwt.decode(
            token, SECRET, algorithms=["HS256"], audience=ISSUER, issuer=ISSUER
        )
    except jwt.InvalidTokenError as error:
        raise HTTPResponse({"message": str(error)}, 401) from error
    if claims["kind"] != kind or claims["jti"] in revoked:
        raise HTTPResponse({"message": "The token was revoked"}, 401)
    return claims


def pair(user: str) -> dict[str, str]:
    return {
        "access_token": sign(user, "access", ACCESS_LIFE),
        "refresh_token": sign(user, "refresh", REFRESH_LIFE),
    }


def with_token(view: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(view)
    def checked(**arguments: str) -> Any:
        scheme, _, token = request.get_header("Authorization", "").partition(" ")
        if scheme != "Bearer":
            raise HTTPResponse({"message": "Log in first"}, 401)
        return view(verify(token, "access"), **arguments)

    return checked


def read_item() -> dict[str, str]:
    task = request.json.get("task")
    if not isinstance(task, str) or not 1 <= len(task) <= LONGEST_TASK:
        raise HTTPResponse({"message": "task has 1 to 10,000 characters"}, 400)
    return {"task": task}


@app.get("/todos")
@with_token
def list_todos(claims: dict[str, Any]) -> Any:
    return todos[claims["sub"]]


@app.post("/todos")
@with_token
def create_todo(claims: dict[str, Any]) -> Any:
    mine, item = todos[claims["sub"]], read_item()
    id = f"todo{len(mine) + 1}"
    mine[id] = item
    response.status = 201
    response.set_header("Location", f"/todos/{id}")
    return item


@app.get("/todos/<id>")
@with_token
def read_todo(claims: dict[str, Any], id: str) -> Any:
    mine = todos[claims["sub"]]
    if id not in mine:
        response.status = 404
        return {"message": f"Todo {id} doesn't exist"}
    return mine[id]


@app.put("/todos/<id>")
@with_token
def put_todo(claims: dict[str, Any], id: str) -> Any:
    item = read_item()
    todos[claims["sub"]][id] = item
    response.status = 201
    return item


@app.post("/token")
def issue_token() -> Any:
    given = request.json
    if given["grant_type"] == "refresh_token":
        claims = verify(given["refresh_token"], "refresh")
        revoked.add(claims["jti"])
        return pair(claims["sub"])
    if not is_password(given["username"], given["password"]):
        raise HTTPResponse({"message": "The password is wrong"}, 400)
    return pair(given["username"])


@app.post("/revoke")
@with_token
def revoke(claims: dict[str, Any]) -> Any:
    revoked.add(claims["jti"])
    return {}


def create_app() -> Any:
    return app
