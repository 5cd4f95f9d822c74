"""What plain `gunicorn` does in this folder, and `gunicorn -c …/gunicorn.conf.py
'mine:create_app()'` for an app of one's own. Flags and GUNICORN_CMD_ARGS go before it.
"""

import hashlib
import os
import resource
import secrets
import shlex
import socket
import sys
import time
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gunicorn import util
from gunicorn.config import Config
from gunicorn.workers import SUPPORTED_WORKERS, gthread

wsgi_app = "service:create_app()"


# ---- The app -------------------------------------------------------------------------
# It is made once before anything starts, so that a bad setting or key ends the start
# with its one line; in a worker it would be a traceback, or workers starting for ever.


def store_of_app() -> str:
    """How the URL of the app's store begins; ends the start if the app refuses.

    Asked in a process of its own. The workers import the app themselves, so HUP brings
    changed files, and nothing is made or opened as the user who starts gunicorn.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            is_good, said = ask_app()
            os.write(writing, said.encode())
            os._exit(0 if is_good else 1)
        finally:
            os._exit(1)  # whatever happens, the child never goes on as gunicorn
    os.close(writing)
    with open(reading, encoding="utf-8") as pipe:
        said = pipe.read()
    if os.waitpid(child, 0)[1]:
        sys.exit(said)
    return said


def ask_app() -> tuple[bool, str]:
    """Whether the app can be made, and what store it has or what is wrong."""
    words = shlex.split(os.environ.get("GUNICORN_CMD_ARGS", "")) + sys.argv[1:]
    flags = Config().parser().parse_args(words)
    os.environ.update(pair.split("=", 1) for pair in flags.raw_env or [])
    os.chdir(flags.chdir or ".")
    sys.path[:0] = [os.getcwd(), *(flags.pythonpath or "").split(",")]
    # What wraps our app does not show its store.
    store = url = os.environ.get("SERVICE_STORE_URL") or "memory:"
    kinds = {"MemoryStore": "memory:", "SQLiteStore": "sqlite:"}
    try:
        app = util.import_app(flags.args[-1] if flags.args else wsgi_app)
        if hasattr(app, "store"):
            store = kinds.get(type(app.store).__name__, "another")
    except (ValueError, SystemExit) as error:
        return False, str(error)
    except Exception:
        pass  # a bug, or a name that is not there: a worker tells it, with its place
    # Later it may be so for a while; from the start on it would be for ever.
    file = Path(url.removeprefix("sqlite:///"))
    place = file if file.exists() else file.parent
    if url.startswith("sqlite:///") and not os.access(place, os.W_OK):
        return False, f"SERVICE_STORE_URL must name what can be written, not {file}"
    return True, store


def number(variable: str, default: int, least: int, most: int) -> int:
    """A whole number from the environment; ends the start if it is out of range."""
    text = os.environ.get(variable) or str(default)
    is_number = text.isascii() and text.isdigit() and len(text) < 9
    if not (is_number and least <= int(text) <= most):
        sys.exit(f"{variable} is a number, {least} to {most}, and not {text[:40]!r}")
    return int(text)


store = store_of_app()
in_memory = store == "memory:"
if in_memory and not os.environ.get("SERVICE_SECRET_KEY"):
    # Made before any worker: one secret for all that come, and after HUP.
    os.environ["SERVICE_SECRET_KEY"] = secrets.token_hex(32)


# ---- Workers -------------------------------------------------------------------------
# Both of gunicorn's kinds, made to let no client hold up the others. `-k` decides; else
# it is gevent where that is installed, which stands a thousand slow clients. Whoever
# waits for SQLite's file would stop all of a gevent worker, so SQLite gets threads.


def hang_up(sock: Any) -> None:
    """Say the end, and read away what the client still sends: closing on unread bytes
    resets the connection, and a client that is busy sending never sees its 413.

    Until there is half a second of silence; 64 MB and 10 s at most.
    """
    end = time.monotonic() + 10
    with suppress(OSError):
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(0.5)
        for _ in range(1024):
            if not sock.recv(65_536) or time.monotonic() > end:
                break
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)  # so that nobody waits when it is closed


DEFER = gthread._DEFER  # type: ignore[attr-defined]


class ThreadWorker(gthread.ThreadWorker):
    """gthread whose one loop never waits for a client."""

    def handle(self, conn: Any) -> Any:
        # A new connection that is silent waits in the loop, not on a thread for 5 s;
        # but not when the worker ends, whose loop would drop it.
        if self.alive and not (conn.initialized or conn.wait_for_data(0)):
            return DEFER
        goes_on = super().handle(conn)
        if goes_on is DEFER:
            goes_on = False
        if not goes_on:
            hang_up(conn.sock)  # here on the thread; else the loop would
        return goes_on

    def finish_request(self, conn: Any, fs: Any) -> None:
        is_deferred = not (fs.cancelled() or fs.exception()) and fs.result() is DEFER
        if is_deferred and not self.alive:  # since a moment ago
            self.enqueue_req(conn)
        else:
            super().finish_request(conn, fs)


SUPPORTED_WORKERS["gthread"] = f"{__name__}.ThreadWorker"

if find_spec("gevent"):
    import gevent
    from gunicorn.workers import ggevent

    class GeventWorker(ggevent.GeventWorker):
        """gevent that goes on while a password is hashed, and ends when told to."""

        def __init__(self, *values: Any, **options: Any) -> None:
            super().__init__(*values, **options)
            self.idle = set[Any]()  # connections on which no request is being answered

        def patch(self) -> None:
            super().patch()
            scrypt = hashlib.scrypt

            def scrypt_in_thread(*values: Any, **options: Any) -> Any:
                pool = gevent.get_hub().threadpool
                return pool.apply(scrypt, values, options)

            hashlib.scrypt = scrypt_in_thread

        def run(self) -> None:
            gevent.spawn(self.part_from_idle)
            super().run()

        def part_from_idle(self) -> None:
            """When the worker ends: 2 s for a request on its way, as gthread gives."""
            while self.alive:
                gevent.sleep(0.1)
            gevent.sleep(2)
            for sock in self.idle:
                # This reads as the client's end; of sock itself, as an error.
                with suppress(OSError), sock.dup() as twin:
                    twin.shutdown(socket.SHUT_RD)

        def handle(self, listener: Any, client: Any, addr: Any) -> None:
            self.idle.add(client)
            try:
                super().handle(listener, client, addr)
            finally:
                self.idle.discard(client)

        def handle_request(self, listener: Any, req: Any, sock: Any, addr: Any) -> bool:
            self.idle.discard(sock)
            try:
                return super().handle_request(listener, req, sock, addr)
            except StopIteration:  # the last one on this connection
                hang_up(sock)
                raise
            finally:
                self.idle.add(sock)

        def handle_error(self, req: Any, client: Any, addr: Any, exc: Any) -> None:
            super().handle_error(req, client, addr, exc)
            hang_up(client)

    SUPPORTED_WORKERS["gevent"] = f"{__name__}.GeventWorker"

is_evented = find_spec("gevent") and not store.startswith("sqlite:")
worker_class = "gevent" if is_evented else "gthread"
threads = 32  # of which at most half wait for their turn to hash a password
# Most systems give 1,024 files, though a program may take more; accept() without a free
# one ends the worker.
_, most_files = resource.getrlimit(resource.RLIMIT_NOFILE)
files = 65_536 if most_files == resource.RLIM_INFINITY else min(most_files, 65_536)
resource.setrlimit(resource.RLIMIT_NOFILE, (files, most_files))
worker_connections = min(4000, files // 2)

try:
    cores = len(os.sched_getaffinity(0))  # those that taskset or a container leaves
except AttributeError:  # not on macOS
    cores = os.cpu_count() or 1
workers = number("WEB_CONCURRENCY", 1 if in_memory else cores, 1, 1000)
if not in_memory:
    max_requests = 100_000  # bounds a leak
    max_requests_jitter = 10_000  # not all of them at the same time

ONE_WORKER = (
    "The memory store has one worker, never recycled; for more (-w, WEB_CONCURRENCY,"
    " SIGTTIN, SIGUSR2, --max-requests) set SERVICE_STORE_URL, for example"
    " sqlite:///todo.db"
)


def nworkers_changed(server: Any, new: int, old: int | None) -> None:
    """At the start and when the number changes: two workers would be two memories."""
    if in_memory and (new > 1 or server.cfg.max_requests):
        if old is None:
            sys.exit(ONE_WORKER)
        server.log.error(ONE_WORKER)
        server.num_workers = 1  # before the second one is started
    elif old is None and new < 1:
        sys.exit("-w is 1 or more")


def pre_exec(server: Any) -> None:
    """On SIGUSR2, in what would become a second master with a worker of its own."""
    if in_memory:
        server.log.error(ONE_WORKER)
        os._exit(1)  # the first master goes on


# ---- The network ---------------------------------------------------------------------

# A proxy in front brings TLS and buffers slow clients.
bind = f"127.0.0.1:{number('PORT', 5000, 0, 65_535)}"
# Seconds; longer than a proxy keeps its side open, so that no request meets a closing
# connection: nginx 60, Heroku and Traefik 90, Caddy 120. For Google: --keep-alive 620.
keepalive = 125
graceful_timeout = 20  # on SIGTERM and HUP for what is in flight; a password takes 5
control_socket_disable = True  # it would be one for all services in this HOME

# SERVICE_PROXIES alone says whom to believe. By default gunicorn lets any client on
# this host, and whoever a proxy on it passes on, set the mount prefix by a header.
forwarder_headers = ""
secure_scheme_headers: dict[str, str] = {}


# ---- The log -------------------------------------------------------------------------

accesslog = "-"  # stdout
# No query string, no headers, which may hold secrets; %a, as a path may break a line.
access_log_format = "%(h)s %(t)s %(m)s %(U)a %(s)s %(B)s bytes %(M)s ms"
logconfig_dict = {  # stdout as well; libraries only when something is wrong
    "root": {"level": "WARNING", "handlers": ["console"]},
    "loggers": {"service": {"level": "INFO"}},
}
