"""The service under /api of a Django project (here a whole one in one file).

Run it: python examples/django_mount.py
Then: curl localhost:8000/api/health
"""

import os
import secrets

from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, HttpResponse
from django.urls import path
from werkzeug.middleware.dispatcher import DispatcherMiddleware
from werkzeug.serving import run_simple

import service


def home(request: HttpRequest) -> HttpResponse:
    return HttpResponse("A page of Django's; the to-dos are under /api.\n")


urlpatterns = [path("", home)]
settings.configure(
    ROOT_URLCONF=__name__,
    SECRET_KEY=secrets.token_hex(32),
    ALLOWED_HOSTS=["localhost", "127.0.0.1"],
)
app = DispatcherMiddleware(
    get_wsgi_application(), {"/api": service.create_app()}
)  # for a project's wsgi.py

if __name__ == "__main__":
    run_simple("127.0.0.1", int(os.environ.get("PORT", "8000")), app, threaded=True)
