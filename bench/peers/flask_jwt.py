"""Flask with Flask-RESTful and Flask-JWT-Extended."""

from typing import Any

from flask import Flask, request
from flask_jwt_extended import (
    JWTManager,
    create_access_token,
    create_refresh_token,
    get_jwt,
    get_jwt_identity,
    jwt_required,
    verify_jwt_in_request,
)
from flask_restful import Api, Resource, abort, reqparse

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


def task_text(value: Any) -> str:
    if not isinstance(value, str) or not 1 <= len(value) <= LONGEST_TASK:
        raise ValueError("Must have 1 to 10,000 characters")
    return value


task_parser = reqparse.RequestParser()
task_parser.add_argument("task", type=task_text, required=True, location="json")

login_parser = reqparse.RequestParser()
login_parser.add_argument("username", required=True, location="json")
login_parser.add_argument("password", required=True, location="json")


class TodoList(Resource):
    @jwt_required()
    def get(self) -> Any:
        return todos[get_jwt_identity()]

    @jwt_required()
    def post(self) -> Any:
        mine, item = todos[get_jwt_identity()], dict(task_parser.parse_args())
        id = f"todo{len(mine) + 1}"
        mine[id] = item
        return item, 201, {"Location": f"/todos/{id}"}


class Todo(Resource):
    @jwt_required()
    def get(self, id: str) -> Any:
        mine = todos[get_jwt_identity()]
        if id not in mine:
            abort(404, message=f"Todo {id} doesn't exist")
        return mine[id]

    @jwt_required()
    def put(self, id: str) -> Any:
        item = dict(task_parser.parse_args())
        todos[get_jwt_identity()][id] = item
        return item, 201


class Token(Resource):
    def post(self) -> Any:
        if request.json["grant_type"] == "refresh_token":
            verify_jwt_in_request(refresh=True, locations=["json"])
            revoked.add(get_jwt()["jti"])
            return pair(get_jwt_identity())
        given = login_parser.parse_args()
        if not is_password(given["username"], given["password"]):
            abort(400, message="The user name or the password is wrong")
        return pair(given["username"])


class Revoke(Resource):
    @jwt_required(verify_type=False)
    def post(self) -> Any:
        revoked.add(get_jwt()["jti"])
        return {}


def pair(user: str) -> dict[str, str]:
    return {
        "access_token": create_access_token(user),
        "refresh_token": create_refresh_token(user),
    }


def create_app() -> Any:
    app = Flask(__name__)
    app.config.update(
        JWT_SECRET_KEY=SECRET,
        JWT_ENCODE_ISSUER=ISSUER,
        JWT_DECODE_ISSUER=ISSUER,
        JWT_ENCODE_AUDIENCE=ISSUER,
        JWT_DECODE_AUDIENCE=ISSUER,
        JWT_ACCESS_TOKEN_EXPIRES=ACCESS_LIFE,
        JWT_REFRESH_TOKEN_EXPIRES=REFRESH_LIFE,
        PROPAGATE_EXCEPTIONS=True,  # or Flask-RESTful answers 500 for a bad token
    )
    manager = JWTManager(app)

    @manager.token_in_blocklist_loader
    def is_revoked(header: dict[str, Any], claims: dict[str, Any]) -> bool:
        return claims["jti"] in revoked

    @manager.invalid_token_loader
    def refuse(reason: str) -> Any:
        return {"message": reason}, 401  # 422 unless told otherwise

    api = Api(app)
    api.add_resource(TodoList, "/todos")
    api.add_resource(Todo, "/todos/<id>")
    api.add_resource(Token, "/token")
    api.add_resource(Revoke, "/revoke")
    return app
