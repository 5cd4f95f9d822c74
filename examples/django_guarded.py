"""A Django project that a login at the service opens: all it knows of it is its keys.

Run it: ISSUER=http://localhost:5000 python examples/django_guarded.py
"""

import os
import secrets

from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, JsonResponse
from django.urls import path
from werkzeug.serving import run_simple

import service

ISSUER = os.environ.get("ISSUER", "http://localhost:5000")
# One of those that the service names in its SERVICE_AUDIENCE.
AUDIENCE = os.environ.get("AUDIENCE", "http://localhost:8000")


def who(request: HttpRequest) -> JsonResponse:
    session = request.META["service.claims"]["sid"]
    return JsonResponse({"user": request.META["REMOTE_USER"], "session": session})


def health(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"status": "ok", "user": request.META.get("REMOTE_USER")})


urlpatterns = [path("", who), path("health", health)]
settings.configure(
    ROOT_URLCONF=__name__,
    SECRET_KEY=secrets.token_hex(32),
    ALLOWED_HOSTS=["localhost", "127.0.0.1"],
)
app = service.guard(
    get_wsgi_application(),
    issuer=ISSUER,
    audience=AUDIENCE,
    jwks_url=f"{ISSUER}/.well-known/jwks.json",
    open_paths=["/health"],
)

if __name__ == "__main__":
    run_simple("127.0.0.1", int(os.environ.get("PORT", "8000")), app, threaded=True)
