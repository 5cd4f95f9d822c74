"""Django REST framework with simplejwt.

Of simplejwt's ways the fastest is taken: JWTStatelessUserAuthentication, which asks no
database.
"""

from typing import Any

import django
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.urls import path
from rest_framework.exceptions import ValidationError

from peers import (
    ACCESS_LIFE,
    ISSUER,
    LONGEST_TASK,
    REFRESH_LIFE,
    SECRET,
    is_password,
    new_todos,
)

settings.configure(
    ALLOWED_HOSTS=["*"],
    APPEND_SLASH=False,
    INSTALLED_APPS=[
        "django.contrib.auth",
        "django.contrib.contenttypes",
        "rest_framework",
    ],
    MIDDLEWARE=["django.middleware.common.CommonMiddleware"],
    REST_FRAMEWORK={
        "DEFAULT_AUTHENTICATION_CLASSES": [],
        "DEFAULT_PERMISSION_CLASSES": ["rest_framework.permissions.IsAuthenticated"],
        "DEFAULT_RENDERER_CLASSES": ["rest_framework.renderers.JSONRenderer"],
        "DEFAULT_PARSER_CLASSES": ["rest_framework.parsers.JSONParser"],
    },
    ROOT_URLCONF=__name__,
    SECRET_KEY=SECRET,
    SIMPLE_JWT={
        "ACCESS_TOKEN_LIFETIME": ACCESS_LIFE,
        "REFRESH_TOKEN_LIFETIME": REFRESH_LIFE,
        "SIGNING_KEY": SECRET,
        "ISSUER": ISSUER,
        "AUDIENCE": ISSUER,
        "USER_ID_CLAIM": "sub",
    },
    USE_TZ=True,
)
django.setup()

# These read the settings as they are imported.
from rest_framework import serializers  # noqa: E402
from rest_framework.response import Response  # noqa: E402
from rest_framework.views import APIView  # noqa: E402
from rest_framework_simplejwt.authentication import (  # noqa: E402
    JWTStatelessUserAuthentication,
)
from rest_framework_simplejwt.exceptions import InvalidToken, TokenError  # noqa: E402
from rest_framework_simplejwt.tokens import RefreshToken  # noqa: E402

todos = new_todos()
revoked: set[str] = set()


class BlocklistAuthentication(JWTStatelessUserAuthentication):
    def get_validated_token(self, raw_token: bytes) -> Any:
        token = super().get_validated_token(raw_token)
        if token["jti"] in revoked:
            raise InvalidToken("The token was revoked")
        return token


class View(APIView):
    authentication_classes = [BlocklistAuthentication]  # noqa: RUF012


class ItemSerializer(serializers.Serializer[Any]):
    task = serializers.CharField(max_length=LONGEST_TASK)


class GrantSerializer(serializers.Serializer[Any]):
    grant_type = serializers.ChoiceField(["password", "refresh_token"])
    username = serializers.CharField(required=False)
    password = serializers.CharField(required=False)
    refresh_token = serializers.CharField(required=False)


def clean(serializer: Any) -> dict[str, Any]:
    serializer.is_valid(raise_exception=True)
    return dict(serializer.validated_data)


class TodoList(View):
    def get(self, request: Any) -> Response:
        return Response(todos[request.user.id])

    def post(self, request: Any) -> Response:
        mine, item = todos[request.user.id], clean(ItemSerializer(data=request.data))
        id = f"todo{len(mine) + 1}"
        mine[id] = item
        return Response(item, status=201, headers={"Location": f"/todos/{id}"})


class Todo(View):
    def get(self, request: Any, id: str) -> Response:
        mine = todos[request.user.id]
        if id not in mine:
            return Response({"message": f"Todo {id} doesn't exist"}, status=404)
        return Response(mine[id])

    def put(self, request: Any, id: str) -> Response:
        item = clean(ItemSerializer(data=request.data))
        todos[request.user.id][id] = item
        return Response(item, status=201)


class Token(APIView):
    authentication_classes: list[Any] = []  # noqa: RUF012
    permission_classes: list[Any] = []  # noqa: RUF012

    def get_authenticate_header(self, request: Any) -> str:
        return "Bearer"  # as simplejwt's own views say, so that a refusal is 401

    def post(self, request: Any) -> Response:
        given = clean(GrantSerializer(data=request.data))
        if given["grant_type"] == "refresh_token":
            try:
                old = RefreshToken(given["refresh_token"])
            except TokenError as error:
                raise InvalidToken(str(error)) from error
            if old["jti"] in revoked:
                raise InvalidToken("The token was revoked")
            revoked.add(old["jti"])
            return Response(pair(old["sub"]))
        if not is_password(given["username"], given["password"]):
            raise ValidationError("The user name or the password is wrong")
        return Response(pair(given["username"]))


class Revoke(View):
    def post(self, request: Any) -> Response:
        revoked.add(request.auth["jti"])
        return Response({})


def pair(user: str) -> dict[str, str]:
    token = RefreshToken()
    token["sub"] = user
    return {"access_token": str(token.access_token), "refresh_token": str(token)}


urlpatterns = [
    path("todos", TodoList.as_view()),
    path("todos/<str:id>", Todo.as_view()),
    path("token", Token.as_view()),
    path("revoke", Revoke.as_view()),
]


def create_app() -> Any:
    return get_wsgi_application()
