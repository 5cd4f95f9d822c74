"""FastAPI with PyJWT, for uvicorn."""

import secrets
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal

import jwt
from fastapi import Depends, FastAPI, HTTPException, Response, status
from fastapi.responses import JSONResponse
from fastapi.security import OAuth2PasswordBearer
from pydantic import BaseModel, Field

from peers import (
    ACCESS_LIFE,
    ISSUER,
    LONGEST_TASK,
    NAMES,
    REFRESH_LIFE,
    SECRET,
    is_password,
    new_todos,
)


class Item(BaseModel):
    task: Annotated[str, Field(min_length=1, max_length=LONGEST_TASK)]


class Grant(BaseModel):
    grant_type: Literal["password", "refresh_token"]
    username: str = ""
    password: str = ""
    refresh_token: str = ""


class Pair(BaseModel):
    access_token: str
    refresh_token: str


app = FastAPI()
oauth2_scheme = OAuth2PasswordBearer(tokenUrl="token")
todos = {
    name: {id: Item(**item) for id, item in new_todos()[name].items()} for name in NAMES
}
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
    refusal = HTTPException(
        status.HTTP_401_UNAUTHORIZED, headers={"WWW-Authenticate": "Bearer"}
    )
    try:
        claims = jwt.decode(
            token, SECRET, algorithms=["HS256"], audience=ISSUER, issuer=ISSUER
        )
    except jwt.InvalidTokenError as error:
        raise refusal from error
    if claims["kind"] != kind or claims["jti"] in revoked:
        raise refusal
    return claims


def pair(user: str) -> Pair:
    return Pair(
        access_token=sign(user, "access", ACCESS_LIFE),
        refresh_token=sign(user, "refresh", REFRESH_LIFE),
    )


async def read_bearer(token: Annotated[str, Depends(oauth2_scheme)]) -> dict[str, Any]:
    return verify(token, "access")


Bearer = Annotated[dict[str, Any], Depends(read_bearer)]


@app.get("/todos")
async def list_todos(bearer: Bearer) -> dict[str, Item]:
    return todos[bearer["sub"]]


@app.post("/todos", status_code=status.HTTP_201_CREATED)
async def create_todo(bearer: Bearer, item: Item, response: Response) -> Item:
    mine = todos[bearer["sub"]]
    id = f"todo{len(mine) + 1}"
    mine[id] = item
    response.headers["Location"] = f"/todos/{id}"
    return item


@app.get("/todos/{id}", response_model=Item)
async def read_todo(bearer: Bearer, id: str) -> Any:
    mine = todos[bearer["sub"]]
    if id not in mine:
        return JSONResponse({"message": f"Todo {id} doesn't exist"}, 404)
    return mine[id]


@app.put("/todos/{id}", status_code=status.HTTP_201_CREATED)
async def put_todo(bearer: Bearer, id: str, item: Item) -> Item:
    todos[bearer["sub"]][id] = item
    return item


@app.post("/token")
async def issue_token(grant: Grant) -> Pair:
    if grant.grant_type == "refresh_token":
        claims = verify(grant.refresh_token, "refresh")
        revoked.add(claims["jti"])
        return pair(claims["sub"])
    if not is_password(grant.username, grant.password):
        raise HTTPException(400, "The user name or the password is wrong")
    return pair(grant.username)


@app.post("/revoke")
async def revoke(bearer: Bearer) -> dict[str, str]:
    revoked.add(bearer["jti"])
    return {}


def create_app() -> Any:
    return app
