"""What plain ``gunicorn``, started in this folder, does; flags and GUNICORN_CMD_ARGS go before it."""

import os
import secrets
import sys
from typing import Any

import service

# A bad setting or key ends the start here, with its one line; in a worker it would be a traceback.
try:
    settings = service.Settings.from_environ()
    service.create_app(settings)
except ValueError as error:
    sys.exit(str(error))
del sys.modules["service"]  # workers import it themselves, so that HUP brings a changed file

in_memory = settings.store_url == "memory:"
if not settings.secret_key:  # made before any worker: the one secret survives their ends, and HUP
    os.environ["SERVICE_SECRET_KEY"] = secrets.token_hex(32)

wsgi_app = "service:create_app()"
bind = f"127.0.0.1:{os.environ.get('PORT') or 5000}"  # a proxy in front brings TLS and buffers slow clients
worker_class = "gthread"  # keeps connections open, and answers what is in flight when it must end
threads = 32  # two hash passwords while others wait up to 5 s for that: room for a rush of logins beside the rest
keepalive = 75  # seconds; longer than the 60 of most proxies, so that no request meets a closing connection
graceful_timeout = 20  # seconds on SIGTERM and HUP for what is in flight; a wait for a password takes 5 at most
control_socket_disable = True  # it would be one for all services in this HOME

# SERVICE_PROXIES alone says whom to believe. By default gunicorn lets any client on this host, and
# whoever a proxy on this host passes on, set the mount prefix with a header named SCRIPT_NAME.
forwarder_headers = ""
secure_scheme_headers: dict[str, str] = {}

if not in_memory:
    workers = int(os.environ.get("WEB_CONCURRENCY") or os.cpu_count() or 1)
    max_requests, max_requests_jitter = 100_000, 10_000  # bounds a leak; not all at the same time

accesslog = "-"  # stdout
# No query string and no headers, which may hold secrets; %a, since a path may hold a line break.
access_log_format = '%(h)s %(t)s %(m)s %(U)a %(s)s %(B)s bytes %(M)s ms'
logconfig_dict = {  # stdout as well; libraries only when something is wrong
    "root": {"level": "WARNING", "handlers": ["console"]},
    "loggers": {"service": {"level": "INFO"}},
}

ONE_WORKER = (
    "The memory store has one worker, never recycled; for more (-w, WEB_CONCURRENCY, SIGTTIN, SIGUSR2,"
    " --max-requests) set SERVICE_STORE_URL, for example sqlite:///todo.db"
)


def nworkers_changed(server: Any, new: int, old: int | None) -> None:
    """At the start and whenever the number changes: two workers would be two memories."""
    if in_memory and (new > 1 or server.cfg.max_requests):
        if old is None:
            sys.exit(ONE_WORKER)
        server.log.error(ONE_WORKER)
        server.num_workers = 1  # before the second one is started


def pre_exec(server: Any) -> None:
    """On SIGUSR2, in what would become a second master with a worker of its own."""
    if in_memory:
        server.log.error(ONE_WORKER)
        os._exit(1)  # the first master goes on
