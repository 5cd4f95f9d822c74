"""A Django project on a port of its own that a login at the service opens; public keys are all it knows of it.
Run it: `ISSUER=http://localhost:5000 python examples/django_guarded.py` (README: One login, many services).
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
AUDIENCE = os.environ.get("AUDIENCE", "http://localhost:8000")  # one of the issuer's SERVICE_AUDIENCE


def who(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"user": request.META["REMOTE_USER"], "session": request.META["service.claims"]["sid"]})


def health(request: HttpRequest) -> JsonResponse:
    return JsonResponse({"status": "ok", "user": request.META.get("REMOTE_USER")})


urlpatterns = [path("", who), path("health", health)]
settings.configure(ROOT_URLCONF=__name__, SECRET_KEY=secrets.token_hex(32), ALLOWED_HOSTS=["localhost", "127.0.0.1"])
app = service.guard(
    get_wsgi_application(), issuer=ISSUER, audience=AUDIENCE, jwks_url=f"{ISSUER}/.well-known/jwks.json",
    open_paths=["/health"],
)  # fmt: skip

if __name__ == "__main__":
    run_simple("127.0.0.1", int(os.environ.get("PORT", "8000")), app, threaded=True)
