"""Falcon with PyJWT."""

import secrets
from datetime import UTC, datetime, timedelta
from typing import Any

import falcon
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
        raise falcon.HTTPUnauthorized(description=str(error)) from error
    if claims["kind"] != kind or claims["jti"] in revoked:
        raise falcon.HTTPUnauthorized(description="The token was revoked")
    return claims


def pair(user: str) -> dict[str, str]:
    return {
        "access_token": sign(user, "access", ACCESS_LIFE),
        "refresh_token": sign(user, "refresh", REFRESH_LIFE),
    }


class BearerMiddleware:
    def process_request(self, req: falcon.Request, resp: falcon.Response) -> None:
        if req.path == "/token":
            return
        scheme, _, token = (req.auth or "").partition(" ")
        if scheme != "Bearer":
            raise falcon.HTTPUnauthorized(description="Log in first")
        req.context.claims = verify(token, "access")


def read_item(req: falcon.Request) -> dict[str, str]:
    task = req.get_media().get("task")
    if not isinstance(task, str) or not 1 <= len(task) <= LONGEST_TASK:
        raise falcon.HTTPBadRequest(description="task has 1 to 10,000 characters")
    return {"task": task}


class TodoList:
    def on_get(self, req: falcon.Request, resp: falcon.Response) -> None:
        resp.media = todos[req.context.claims["sub"]]

    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        mine, item = todos[req.context.claims["sub"]], read_item(req)
        id = f"todo{len(mine) + 1}"
        mine[id] = item
        resp.status = falcon.HTTP_201
        resp.location = f"/todos/{id}"
        resp.media = item


class Todo:
    def on_get(self, req: falcon.Request, resp: falcon.Response, id: str) -> None:
        mine = todos[req.context.claims["sub"]]
        if id in mine:
            resp.media = mine[id]
        else:
            resp.status = falcon.HTTP_404
            resp.media = {"message": f"Todo {id} doesn't exist"}

    def on_put(self, req: falcon.Request, resp: falcon.Response, id: str) -> None:
        item = read_item(req)
        todos[req.context.claims["sub"]][id] = item
        resp.status = falcon.HTTP_201
        resp.media = item


class Token:
    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        given = req.get_media()
        if given["grant_type"] == "refresh_token":
            claims = verify(given["refresh_token"], "refresh")
            revoked.add(claims["jti"])
            resp.media = pair(claims["sub"])
        elif is_password(given["username"], given["password"]):
            resp.media = pair(given["username"])
        else:
            raise falcon.HTTPBadRequest(description="The password is wrong")


class Revoke:
    def on_post(self, req: falcon.Request, resp: falcon.Response) -> None:
        revoked.add(req.context.claims["jti"])
        resp.media = {}


def create_app() -> Any:
    app = falcon.App(middleware=[BearerMiddleware()])
    app.add_route("/todos", TodoList())
    app.add_route("/todos/{id}", Todo())
    app.add_route("/token", Token())
    app.add_route("/revoke", Revoke())
    return app
