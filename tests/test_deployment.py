"""The service as it is deployed: nginx, systemd, PgBouncer, PostgreSQL, a failover.

The real programs, from Debian's packages; without its package a test is skipped. What
the README tells to write down is read from there.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import re
import resource
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psycopg
import pytest
from gunicorn.config import Config
from test_server import GUNICORNS, exchange, wired
from werkzeug.datastructures import Headers
from werkzeug.exceptions import ServiceUnavailable

import service
from conftest import ROOT, Postgres, eventually, free_port, is_running, run, serve
from test_service import (
    FORM,
    JSON,
    LOGIN,
    PASSWORD,
    SECRET,
    Answer,
    User,
    World,
    refreshed,
    together,
)

README = (ROOT / "README.md").read_text()
SYSTEM = f"{os.environ['PATH']}:/usr/sbin:/sbin"


def readme_block(language: str, word: str = "") -> str:
    """The one block of this language in the README that holds the word."""
    blocks = re.findall(rf"(?ms)^```{language}\n(.*?)^```", README)
    (block,) = [block for block in blocks if word in block]
    return str(block)


def needs(program: str, package: str = "") -> pytest.MarkDecorator:
    is_missing = shutil.which(program, path=SYSTEM) is None
    return pytest.mark.skipif(
        is_missing, reason=f"apt-get install {package or program}"
    )


# ---- nginx --------------------------------------------------------------------------


class Nginx:
    """An nginx with the README's server before a port, on a port of its own."""

    program = shutil.which("nginx", path=SYSTEM)

    def __init__(self, service: int, http_lines: str = "", location: str = "") -> None:
        self.service, self.port = service, free_port()
        self.lines, self.location = http_lines, location
        # A certificate of one's own, which no client here checks.
        self.tls = ssl.create_default_context()
        self.tls.check_hostname, self.tls.verify_mode = False, ssl.CERT_NONE

    def __enter__(self) -> Nginx:
        self.folder = Path(tempfile.mkdtemp(prefix="nginx"))
        subprocess.run(
            f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes"
            f" -subj /CN=todo.example -keyout {self.folder}/todo.key"
            f" -out {self.folder}/todo.pem".split(),
            check=True,
            capture_output=True,
        )
        (self.folder / "nginx.conf").write_text(self.configuration())
        self.process = subprocess.Popen(
            [
                str(self.program),
                "-e",
                "error.log",
                "-p",
                self.folder,
                "-c",
                "nginx.conf",
            ]
        )
        try:
            eventually(lambda: self("GET /api/health").status == 200)
        except BaseException:
            self.__exit__()
            raise
        return self

    def configuration(self) -> str:
        server = readme_block("nginx").replace("/etc/ssl", str(self.folder))
        server = server.replace("listen 443", f"listen 127.0.0.1:{self.port}")
        server = server.replace(":5000/", f":{self.service}/")
        server = server.replace("location /api/ {", "location /api/ {" + self.location)
        user = "" if os.geteuid() else "user root;"
        folders = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = "".join(f"{name}_temp_path {name};" for name in folders)
        return (
            f"daemon off; pid pid; {user} worker_processes 2;"
            " events { worker_connections 4096; }"
            f" http {{ access_log off; {temporary} {self.lines}\n{server} }}"
        )

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self.folder)

    def __call__(
        self,
        line: str,
        token: str = "",
        body: bytes = b"",
        kind: str = JSON,
        **headers: str,
    ) -> Answer:
        """The answer to a request such as "GET /api/todos"; status 0 if none came."""
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        sent |= {"Authorization": f"Bearer {token}"} if token else {}
        sent |= {"Content-Type": kind} if body else {}
        connection = http.client.HTTPSConnection(
            "127.0.0.1", self.port, timeout=30, context=self.tls
        )
        try:
            method, path = line.split()
            connection.request(
                method, path, body or None, {"Host": "todo.example", **sent}
            )
            answer = connection.getresponse()
            return Answer(answer.status, Headers(answer.getheaders()), answer.read())
        except (OSError, http.client.HTTPException):
            return Answer(0, Headers(), b"")
        finally:
            connection.close()


@pytest.fixture(scope="module")
def proxied() -> Iterator[serve]:
    """The service with the settings that the README has for nginx."""
    with serve(SERVICE_PROXIES="1", SERVICE_MAX_BODY="65536") as server:
        yield server


@needs("nginx")
def test_behind_the_readmes_nginx_the_service_knows_its_prefix_and_its_clients(
    proxied: serve,
) -> None:
    with Nginx(proxied.port) as nginx:
        token = proxied.user("alice")
        made = nginx("POST /api/todos", token, b'{"task": "x"}')
        assert made.status == 201
        assert re.fullmatch(r"/api/todos/todo\d+", made.headers["Location"])
        forged = {"X_Forwarded_For": "192.0.2.1", "X_Forwarded_Prefix": "/evil"}
        nginx("POST /api/users", "", b'{"username": "no", "password": "no"}', **forged)
        page = nginx("GET /api/todos?limit=1", token, **forged)
        assert page.headers["Link"].startswith("</api/todos?")
        nginx(
            "POST /api/users",
            "",
            b'{"username": "bob", "password": "%s"}' % PASSWORD.encode(),
            **forged,
        )
        assert eventually(lambda: re.search(r"sign-up.*bob.*127\.0\.0\.1", proxied.log))
        assert "192.0.2.1" not in proxied.log


@needs("nginx")
@pytest.mark.parametrize("size", [100_000, 3_000_000])
def test_a_body_too_large_is_refused_behind_nginx_and_the_client_reads_it(
    proxied: serve, size: int
) -> None:
    with Nginx(proxied.port) as nginx:
        answer = nginx("POST /api/users", "", b" " * size)
        assert answer.status == 413
        # Up to 1 MB the service answers; beyond, nginx in its own words.
        assert (answer.headers["Content-Type"] == JSON) == (size < 1_000_000)


@needs("nginx")
def test_behind_nginx_200_stalled_clients_hold_nobody_up(
    proxied: serve,
) -> None:
    body = (
        b"POST /api/token HTTP/1.1\r\nHost: todo.example\r\nContent-Length: 99\r\n\r\nx"
    )
    with Nginx(proxied.port) as nginx:
        stalled = []
        for _ in range(200):
            plain = socket.create_connection(("127.0.0.1", nginx.port))
            stalled.append(nginx.tls.wrap_socket(plain))
            stalled[-1].sendall(body)
        assert nginx("GET /api/health").status == 200
        for client in stalled:
            client.close()


@needs("nginx")
def test_a_cache_in_nginx_gives_nobody_what_another_may_see(proxied: serve) -> None:
    cache = "proxy_cache_path cache keys_zone=todo:1m; proxy_cache_valid any 10m;"
    shown = "proxy_cache todo; add_header X-Cache $upstream_cache_status always;"
    alice, bob = proxied.user("alice"), proxied.user("bob")
    with Nginx(proxied.port, cache, shown) as nginx:
        nginx("PUT /api/todos/mine", alice, b'{"task": "secret"}')
        for path in ("/api/todos", "/api/todos/mine", "/api/users/me"):
            for _ in range(2):
                answer = nginx(f"GET {path}", alice)
                assert answer.status == 200
                assert answer.headers["X-Cache"] == "MISS"
            assert nginx(f"GET {path}", bob).body != answer.body
            assert nginx(f"GET {path}").status == 401
        # It is a cache: what is public comes from it.
        pages = [nginx("GET /api/openapi.json") for _ in range(2)]
        assert [page.headers["X-Cache"] for page in pages] == ["MISS", "HIT"]


@needs("nginx")
def test_gzip_in_nginx_leaves_etags_as_they_are(proxied: serve) -> None:
    zipped = "gzip on; gzip_types *; gzip_min_length 1; gzip_proxied any;"
    token = proxied.user("zoe")
    with Nginx(proxied.port, zipped) as nginx:
        nginx("PUT /api/todos/x", token, b'{"task": "y"}')
        tag = nginx("GET /api/todos/x", token, Accept_Encoding="gzip").headers["ETag"]
        put = nginx("PUT /api/todos/x", token, b'{"task": "z"}', If_Match=tag)
        assert put.status == 201


# ---- systemd ------------------------------------------------------------------------
# The unit of the README, its mounts and its user played by unshare and setpriv; in a
# namespace of its own, so that nothing is left of them.

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may play systemd")


class Machine:
    """A machine with the project in /opt/todo, and its interpreter for every user.

    Both may lie here where no other user may look; there, nothing else is shown.
    """

    def __init__(self, folder: Path) -> None:
        held, folder = folder / "held", folder / "todo"
        for path in (folder, held / "base", held / "packages"):
            path.mkdir(parents=True)
        for name in ("service.py", "gunicorn.conf.py"):
            shutil.copy(ROOT / name, folder)
        base, packages = Path(sys.base_prefix), Path(pytest.__file__).parent.parent
        venv = "import sys, venv; venv.create(sys.argv[1], symlinks=True)"
        subprocess.run([sys.executable, "-c", venv, folder / ".venv"], check=True)
        script = folder / ".venv/bin/gunicorn"
        script.write_text(
            "#!/opt/todo/.venv/bin/python\n"
            "from gunicorn.app.wsgiapp import run\nrun()\n"
        )
        script.chmod(0o755)
        (site,) = (folder / ".venv/lib").glob("python*/site-packages")
        inside = "/opt/todo" / site.relative_to(folder)
        hidden = [path for path in [Path("/root"), Path("/home")] if path.is_dir()]
        empty = "mount -t tmpfs -o mode=755 none"
        self.lines = [
            "set -e",
            # Held here while the folders above them are emptied.
            f"mount --bind {base} {held}/base",
            f"mount --bind {packages} {held}/packages",
            f"{empty} /opt && mkdir /opt/todo && mount --bind {folder} /opt/todo",
            f"mount --bind {held}/packages {inside}",
            f"{empty} /var/lib",
            *(f"{empty} {path}" for path in hidden),
        ]
        if any(base.is_relative_to(path) for path in hidden):
            self.lines.append(f"mkdir -p {base} && mount --bind {held}/base {base}")

    def serve(self, *command: str, **environ: str) -> serve:
        """A server on it, in /opt/todo."""
        script = "\n".join([*self.lines, "cd /opt/todo", 'exec "$@"'])
        return serve(
            command=["unshare", "-m", "sh", "-c", script, "sh", *command], **environ
        )


def unit_lines() -> list[tuple[str, str]]:
    """The settings of the README's unit, in their order."""
    lines = [line.partition("=") for line in readme_block("ini").splitlines()]
    return [(name, value) for name, sign, value in lines if sign]


def unit_environ() -> dict[str, str]:
    """The README's /etc/todo.env, with a secret."""
    lines = readme_block("sh", "SERVICE_PROXIES=1").split()
    return dict(line.split("=", 1) for line in lines) | {"SERVICE_SECRET_KEY": SECRET}


@needs_root
@needs("setpriv", "util-linux")
def test_the_readmes_unit_starts_says_so_reloads_and_ends(tmp_path: Path) -> None:
    unit = dict(unit_lines())
    assert unit["ProtectSystem"] == "strict"
    machine = Machine(tmp_path)
    state = f"/var/lib/{unit['StateDirectory']}"
    writable = ["/dev", "/proc", "/sys", state]
    machine.lines += [
        f"mkdir {state}",
        f"mount --bind {state} {state}",
        f"chown nobody {state}",
    ]
    if unit.get("PrivateTmp") == "true":
        machine.lines += ["mount -t tmpfs none /tmp", "mount -t tmpfs none /var/tmp"]
        writable += ["/tmp", "/var/tmp"]
    kept = "|".join(f"{path}|{path}/*" for path in writable)
    machine.lines += [
        # What another mount hides cannot be found, and need not be.
        "for path in $(cut -d ' ' -f 5 /proc/self/mountinfo); do"
        f" case $path in {kept}) ;;"
        " *) mount -o remount,bind,ro $path 2>/dev/null || true ;; esac; done",
        "for path in /opt/todo /usr /etc /var /root; do"
        " if touch $path/x 2>/dev/null; then exit 9; fi; done",
    ]
    as_user = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
    if unit.get("NoNewPrivileges") == "true":
        as_user.append("--no-new-privs")
    starts = [value for name, value in unit_lines() if name == "ExecStart"]
    check, reload = [value for name, value in unit_lines() if name == "ExecReload"]
    assert check == f"{starts[0]} --check-config"
    assert reload == "/bin/kill -HUP $MAINPID"

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.settimeout(30)
        systemd.bind("")  # an abstract name, which needs no folder
        address = "@" + systemd.getsockname()[1:].decode()
        assert unit["Type"] == "notify"
        environ = unit_environ() | {"NOTIFY_SOCKET": address}
        with machine.serve(*as_user, *starts[0].split(), **environ) as server:
            assert b"READY=1" in systemd.recv(1000)
            token = server.user("alice")
            assert server("PUT /todos/x", token, task="y").status == 201
            inside = Path(f"/proc/{server.process.pid}/root")
            owner = (inside / state.strip("/") / "todo.db").owner()
            assert owner == "nobody"
            before = {*server.workers}
            server.process.send_signal(signal.SIGHUP)
            eventually(lambda: server.workers and not before & {*server.workers}, 30)
            eventually(lambda: server("GET /todos/x", token).status == 200)
            assert server.stop() == 0
            assert "Traceback" not in server.log


@needs_root
def test_gunicorn_that_root_starts_with_a_user_writes_files_of_that_user(
    tmp_path: Path,
) -> None:
    machine = Machine(tmp_path)
    machine.lines += ["mkdir /var/lib/todo", "chown nobody /var/lib/todo"]
    command = ["/opt/todo/.venv/bin/gunicorn", "--user", "nobody", "--group", "nogroup"]
    with machine.serve(*command, **unit_environ()) as server:
        token = server.user("alice")
        assert server("PUT /todos/x", token, task="y").status == 201
        folder = Path(f"/proc/{server.process.pid}/root/var/lib/todo")
        assert {path.owner() for path in folder.iterdir()} == {"nobody"}


def test_the_unit_gives_what_is_in_flight_its_time() -> None:
    unit = dict(unit_lines())
    shown = subprocess.run(
        [sys.executable, "-m", "gunicorn", "--print-config"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    (seconds,) = re.findall(r"(?m)^graceful_timeout += (\d+)", shown)
    assert int(unit["TimeoutStopSec"]) > int(seconds)


# ---- PostgreSQL as it is found ------------------------------------------------------


def service_over(url: str, *flags: str, **settings: str) -> serve:
    given = {"SERVICE_STORE_URL": url, "SERVICE_SECRET_KEY": SECRET}
    return serve(*flags, **given, **settings)


def execute(url: str, *statements: str) -> list[Any]:
    """The rows of the last of these."""
    with psycopg.connect(url, autocommit=True) as connection:
        for statement in statements:
            cursor = connection.execute(statement)
        return cursor.fetchall() if cursor.description else []


@contextmanager
def configured(postgres: Postgres, setting: str, value: str) -> Iterator[None]:
    """All its sessions have this setting, until the block ends."""
    execute(postgres.url, f"ALTER SYSTEM SET {setting} = {value}")
    execute(postgres.url, "SELECT pg_reload_conf()")
    try:
        yield
    finally:
        execute(postgres.url, f"ALTER SYSTEM RESET {setting}")
        execute(postgres.url, "SELECT pg_reload_conf()")


def mixed_requests(server: serve, client: int, count: int) -> Counter[int]:
    """The statuses of so many requests of all kinds by one user."""
    statuses = Counter[int]()
    token = server.user(f"user{client}")
    for number in range(count // 6):
        path = f"/todos/item{number}"
        lines = ["PUT", "PATCH", "GET", "DELETE"]
        statuses.update(
            server(
                f"{line} {path}", token, **({"task": "x"} if line[0] == "P" else {})
            ).status
            for line in lines
        )
        statuses[server("POST /todos", token, task="y" * 50).status] += 1
        statuses[server("GET /todos", token).status] += 1
    return statuses


@needs("pgbouncer")
@pytest.mark.parametrize("worker", ["gthread", "gevent"])
def test_behind_pgbouncer_in_transaction_mode_no_request_fails(
    postgres: Postgres, postgres_url: str, worker: str
) -> None:
    flags = ["-w", "2", "-k", worker]
    with pgbouncer(postgres) as url, service_over(url, *flags) as server:
        with ThreadPoolExecutor(6) as pool:
            work = pool.map(lambda each: mixed_requests(server, each, 60), range(6))
            statuses = sum(work, Counter())
        assert {*statuses} == {200, 201, 204}
        assert "ERROR" not in server.log
        for client in range(6):  # and nobody's statement was executed for another
            there = server("GET /todos", server.user(f"user{client}")).json
            assert len(there) == 3 + 10


@contextmanager
def pgbouncer(postgres: Postgres) -> Iterator[str]:
    """The URL of the database behind PgBouncer, with fewer connections than clients."""
    port, folder = free_port(), postgres.folder  # its owner may read that
    (folder / "users").write_text('"postgres" ""\n')
    (folder / "pgbouncer.ini").write_text(
        f"[databases]\npostgres = host={folder}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n"
        f"unix_socket_dir =\nauth_type = trust\nauth_file = {folder}/users\n"
        "pool_mode = transaction\ndefault_pool_size = 3\n"
    )
    program = str(shutil.which("pgbouncer", path=SYSTEM))
    log = folder / "pgbouncer.log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [program, "-q", folder / "pgbouncer.ini"],
            stdout=output,
            stderr=output,
            **postgres.owner,
        )
    url = f"postgresql://postgres@127.0.0.1:{port}/postgres"

    def answers() -> bool:
        assert process.poll() is None, log.read_text()
        with suppress(psycopg.OperationalError):
            return bool(execute(url, "SELECT 1"))
        return False

    try:
        eventually(answers)
        yield url
    finally:
        process.terminate()
        process.wait()


@pytest.mark.parametrize("encoding", ["LATIN1", "SQL_ASCII"])
def test_a_database_that_is_not_utf8_is_refused_with_one_line(
    postgres: Postgres, encoding: str
) -> None:
    name = encoding.lower()
    choices = f"-E {encoding} -T template0 --locale=C -U postgres -h {postgres.folder}"
    execute(postgres.url, f"DROP DATABASE IF EXISTS {name}")
    postgres.run("createdb", *choices.split(), name)
    url = postgres.url.replace("/postgres?", f"/{name}?")
    settings = {"SERVICE_STORE_URL": url, "SERVICE_SECRET_KEY": SECRET}
    status, said = run(sys.executable, "-m", "gunicorn", **settings)
    assert status == 1
    assert re.fullmatch(r"SERVICE_STORE_URL .*\bUTF8\b.*\n", said)


def test_a_role_that_may_not_create_does_once_the_tables_are_there(
    postgres: Postgres, postgres_url: str
) -> None:
    with service_over(postgres.url) as server:
        server.user("alice")
    execute(
        postgres.url,
        "DROP ROLE IF EXISTS clerk",
        "CREATE ROLE clerk LOGIN",
        "REVOKE CREATE ON SCHEMA public FROM PUBLIC",
        "GRANT SELECT, INSERT, UPDATE, DELETE ON users, items TO clerk",
    )
    url = postgres.url.replace("postgres@", "clerk@")
    with pytest.raises(psycopg.errors.InsufficientPrivilege):
        execute(url, "CREATE TABLE other (id INT)")
    with service_over(url) as server:
        assert {*mixed_requests(server, 1, 12)} == {200, 201, 204}
        assert server.log_in("alice")
    execute(postgres.url, "DROP OWNED BY clerk", "DROP ROLE clerk")


def test_a_search_path_in_the_url_says_where_the_tables_are(
    postgres: Postgres, postgres_url: str
) -> None:
    execute(postgres.url, "DROP SCHEMA IF EXISTS mine CASCADE", "CREATE SCHEMA mine")
    with service_over(f"{postgres.url}&options=-csearch_path%3Dmine") as server:
        server.user("alice")
    tables = "SELECT schemaname, tablename FROM pg_tables"
    found = execute(postgres.url, f"{tables} WHERE tablename IN ('users', 'items')")
    assert {*found} == {("mine", "users"), ("mine", "items")}
    execute(postgres.url, "DROP SCHEMA mine CASCADE")


def test_writes_are_503_while_sessions_are_read_only_and_then_go_on(
    postgres: Postgres, postgres_url: str
) -> None:
    with service_over(postgres.url, "-w", "2") as server:
        token = server.user("alice")

        def put() -> int:
            return server("PUT /todos/x", token, task="y").status

        assert put() == 201
        with configured(postgres, "default_transaction_read_only", "on"):
            eventually(lambda: put() == 503)
            refused = server("PUT /todos/x", token, task="y")
            assert refused.headers["Retry-After"]
        eventually(lambda: [put() for _ in range(8)] == [201] * 8)
        assert "Traceback" not in server.log


@pytest.mark.parametrize("worker", ["gthread", "gevent"])
def test_beside_more_idle_clients_than_select_can_watch_requests_are_answered(
    postgres: Postgres, postgres_url: str, worker: str
) -> None:
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    if most < 4000:
        pytest.skip(f"only {most} files may be open here")
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with (
        service_over(postgres.url, "-w", "1", "-k", worker) as server,
        ExitStack() as idle,
    ):
        token = server.user("alice")
        for _ in range(1100):
            idle.enter_context(server.send(b""))
        for _ in range(3):
            answers = together(8, lambda _: server("POST /todos", token, task="x"))
            assert {answer.status for answer in answers} == {201}


def test_text_is_utf_8_whatever_the_url_says(postgres_url: str) -> None:
    mark = "&" if "?" in postgres_url else "?"
    store = service.open_store(postgres_url + mark + "client_encoding=latin1")
    with store.write("alice") as data:
        data["todos"]["日本"] = {"task": "ы"}
    assert dict(store.read("alice")["todos"]) == {"日本": {"task": "ы"}}


# ---- Failover -----------------------------------------------------------------------


class Pair:
    """Two PostgreSQL servers: the second has all that the first has answered for."""

    def __init__(self) -> None:
        self.first, self.second = Postgres(), Postgres()
        self.second.stop()
        shutil.rmtree(self.second.data)
        copied = f"-R -c fast --no-sync -U postgres -h {self.first.folder}"
        self.second.run("pg_basebackup", "-D", str(self.second.data), *copied.split())
        self.second.start()
        names = "ALTER SYSTEM SET synchronous_standby_names = '*'"
        execute(self.first.url, names, "SELECT pg_reload_conf()")
        states = "SELECT sync_state FROM pg_stat_replication"
        eventually(lambda: execute(self.first.url, states) == [("sync",)])

    @property
    def url(self) -> str:
        hosts = f"{self.first.folder},{self.second.folder}"
        session = "target_session_attrs=read-write"
        return f"postgresql://postgres@/postgres?host={hosts}&{session}"

    def fail_over(self) -> None:
        """The first is killed, and the second may be written from now on."""
        self.first.stop("KILL")
        self.second.run("pg_ctl", "promote", "-D", str(self.second.data))

    def close(self) -> None:
        self.first.close()
        self.second.close()


class Writing:
    """Eight clients that make items until the block ends, and what came of that."""

    def __init__(self, server: serve) -> None:
        self.server = server
        self.tokens = [server.user(f"user{n}") for n in range(4)] * 2
        self.acknowledged: list[tuple[int, str, str]] = []
        self.statuses = Counter[int]()
        self.last_refusal = 0.0
        self._is_over = threading.Event()
        self._threads = [
            threading.Thread(target=self._write, args=[n]) for n in range(8)
        ]

    def __enter__(self) -> Writing:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def stop(self) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _write(self, number: int) -> None:
        while not self._is_over.is_set():
            task = os.urandom(8).hex()
            made = self.server("POST /todos", self.tokens[number], task=task)
            self.statuses[made.status] += 1
            if made.status == 201:
                self.acknowledged.append((number, made.headers["Location"], task))
            else:
                self.last_refusal = time.monotonic()
                self._is_over.wait(0.02)

    def wait_for(self, count: int) -> None:
        """Until so many more are acknowledged."""
        aim = len(self.acknowledged) + count
        eventually(lambda: len(self.acknowledged) >= aim, 60)

    @property
    def missing(self) -> list[tuple[int, str, str]]:
        """What was acknowledged and is not there."""
        there = [self.server("GET /todos", token).json for token in self.tokens[:4]]
        return [
            (number, location, task)
            for number, location, task in self.acknowledged
            if there[number % 4].get(location.removeprefix("/todos/")) != {"task": task}
        ]


def test_a_failover_loses_nothing_that_was_answered_and_needs_no_restart() -> None:
    with (
        closing(Pair()) as pair,
        service_over(pair.url, "-w", "2", "-k", "gthread") as threads,
        service_over(pair.url, "-w", "2", "-k", "gevent") as events,
        Writing(threads) as first,
        Writing(events) as second,
    ):
        workers = [threads.workers, events.workers]
        for writing in (first, second):
            writing.wait_for(50)
        pair.fail_over()
        for writing in (first, second):
            writing.wait_for(50)
            writing.stop()
            assert {*writing.statuses} <= {201, 503}
            assert writing.missing == []
            assert "Traceback" not in writing.server.log
        assert [threads.workers, events.workers] == workers


# ---- Many nodes ---------------------------------------------------------------------

PARTS = """
CREATE TABLE {name} (LIKE whole_{name} INCLUDING ALL) PARTITION BY HASH ({column});
CREATE TABLE {name}_0 PARTITION OF {name} FOR VALUES WITH (MODULUS 4, REMAINDER 0);
CREATE TABLE {name}_1 PARTITION OF {name} FOR VALUES WITH (MODULUS 4, REMAINDER 1);
CREATE TABLE {name}_2 PARTITION OF {name} FOR VALUES WITH (MODULUS 4, REMAINDER 2);
CREATE TABLE {name}_3 PARTITION OF {name} FOR VALUES WITH (MODULUS 4, REMAINDER 3)
"""


def test_over_tables_that_are_split_by_owner_each_statement_touches_one_part(
    postgres: Postgres, postgres_url: str
) -> None:
    url = postgres.url
    with service_over(url) as server:
        server.user("maker")
    for name, column in (("users", "name"), ("items", "owner")):
        execute(url, f"ALTER TABLE {name} RENAME TO whole_{name}")
        execute(url, *PARTS.format(name=name, column=column).split(";"))
    with configured(postgres, "log_statement", "'all'"), service_over(url) as server:
        for client in range(4):
            assert {*mixed_requests(server, client, 12)} == {200, 201, 204}
        alice = server.user("alice")
        assert server("DELETE /users/me", alice, password=PASSWORD).status == 204
    found = statements(postgres)
    kinds = {sql.split()[0] for sql in found}
    assert kinds >= {"SELECT", "INSERT", "UPDATE", "DELETE"}
    for sql in found:
        plan = "\n".join(row[0] for row in execute(url, f"EXPLAIN {sql}"))
        for table in ("users", "items"):
            parts = {*re.findall(rf"on ({table}_[0-3])\b", plan)}
            assert len(parts) <= 1, f"{sql}\n{plan}"
        if not sql.startswith("INSERT"):  # whose plan does not say where the row goes
            assert re.search(r"on (users|items)_[0-3]\b", plan), f"{sql}\n{plan}"
    execute(url, "DROP TABLE users, items, whole_users, whole_items")


def statements(postgres: Postgres) -> set[str]:
    """What the service asked of its tables, from the server's log, with the values."""
    entry = re.compile(
        r"LOG:  (?:execute [^:]+|statement): (.*?)\n"
        r"(?:[^\n]*DETAIL:  [Pp]arameters: (.*?)\n)?(?=\d{4}-|\Z)",
        re.DOTALL,
    )
    found = set()
    for sql, detail in entry.findall((postgres.folder / "log").read_text()):
        is_ours = re.search(r"\b(users|items)\b", sql)
        if is_ours and not sql.startswith(("CREATE", "ALTER", "SELECT pg_")):
            given = re.findall(r"(\$\d+) = (NULL|'(?:[^']|'')*')", detail)
            values = dict(given)
            found.add(re.sub(r"\$\d+", lambda each: values[each[0]], sql))  # noqa: B023
    return found


# ---- Backup and restore -------------------------------------------------------------


def command(word: str) -> str:
    """The line with this word in one of the README's blocks for a shell."""
    lines = readme_block("sh", word).splitlines()
    (line,) = [line for line in lines if word in line]
    return line


def shell(line: str, folder: Path, **environ: str) -> None:
    subprocess.run(line, shell=True, check=True, cwd=folder, env=os.environ | environ)


@needs("sqlite3")
def test_backup_and_restore_of_sqlite_work_day_after_day(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/todo.db"
    with service_over(url) as server:
        token = server.user("alice")
        for task in ("first", "second"):
            server("PUT /todos/x", token, task=task)
            shell(command("VACUUM INTO"), tmp_path)
        server("PUT /todos/x", token, task="lost")
    for _ in range(2):
        shell(command("cp backup.db"), tmp_path)
        with service_over(url) as server:
            assert server("GET /todos/x", token).json == {"task": "second"}
            server("PUT /todos/x", token, task="lost again")


def test_backup_and_restore_of_postgresql_work_day_after_day(
    postgres: Postgres, postgres_url: str, tmp_path: Path
) -> None:
    def run_there(line: str) -> None:
        line = line.replace("postgresql://todo@localhost/todo", f"'{postgres.url}'")
        shell(line, tmp_path, PATH=f"{postgres.bin}:{os.environ['PATH']}")

    with service_over(postgres.url) as server:
        token = server.user("alice")
        for task in ("first", "second"):
            server("PUT /todos/x", token, task=task)
            run_there(command("pg_dump"))
        server("PUT /todos/x", token, task="lost")
    for _ in range(2):
        run_there(command("pg_restore"))
        with service_over(postgres.url) as server:
            assert server("GET /todos/x", token).json == {"task": "second"}
            server("PUT /todos/x", token, task="lost again")


# ---- A container --------------------------------------------------------------------


@needs_root
def test_what_the_readmes_container_runs_ends_well_as_process_one(
    tmp_path: Path,
) -> None:
    lines = dict(line.split(" ", 1) for line in readme_block("dockerfile").splitlines())
    assert len(lines) == 6
    for name in lines["COPY"].split()[:-1]:
        shutil.copy(ROOT / name, tmp_path)
    words = [word.strip('" ') for word in lines["CMD"].strip("[]").split(",")]
    alone = ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-m"]
    bound = [word.replace(":5000", ":{port}") for word in words]
    with serve(command=[*alone, *bound], folder=tmp_path) as server:
        assert server.user("alice")
        (child,) = (
            Path(f"/proc/{server.process.pid}/task/{server.process.pid}/children")
            .read_text()
            .split()
        )
        os.kill(int(child), signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert "Shutting down: Master" in server.log


# ---- gunicorn: crowds and slow clients ----------------------------------------------


@GUNICORNS
def test_a_rush_of_logins_leaves_room_for_everybody_else(kind):
    with serve("-k", kind) as server:
        token, read_meanwhile, statuses = server.user("alice"), 0, Counter[int]()

        def log_in(number):
            answer = server("POST /token", **LOGIN)
            assert answer.status == 200 or "Retry-After" in answer.headers
            statuses[answer.status] += 1

        rush = threading.Thread(target=together, args=(64, log_in))
        rush.start()
        eventually(lambda: statuses)
        while rush.is_alive():
            assert server("GET /todos/todo3", token).status == 200
            read_meanwhile += 1
        assert sum(statuses.values()) == 64
        assert statuses.keys() == {200, 503}
        assert read_meanwhile > 1


def test_the_log_tells_requests_and_events_and_no_secret():
    with serve() as server:
        token, form = server.user("alice"), {"grant_type": "password"}
        server("POST /token?password=in+the+url", **form)
        server("POST /token", **form, username="alice", password="wrong horse")
        server(f"GET /todos?access_token={token}", token)
        server("GET /todos/a%0a127.0.0.1%20forged", token)
        log = eventually(lambda: "forged" in server.log and server.log)
    assert re.search(r"\[INFO\] failed login\b.*'alice'.*'127\.0\.0\.1'", log)
    line = r"(?m)^127\.0\.0\.1 \[.*\] {} \d+ bytes \d+ ms$"
    assert re.search(line.format("POST '/users' 201"), log)
    assert re.search(line.format("GET '/todos' 200"), log)
    assert re.search(line.format(r"GET '/todos/a\\n127\.0\.0\.1 forged' 404"), log)
    secrets = [token, PASSWORD, "in+the+url", "wrong horse", "access_t"]
    assert [secret for secret in secrets if secret in log] == []


def test_who_waits_five_seconds_to_have_a_password_hashed_is_503(monkeypatch):
    world, answers, go_on = World(), [], threading.Event()

    def scrypt(*given, **options):
        assert go_on.wait(20)
        return b"a hash"

    def log_in(number):
        answers.append(world("POST /token", LOGIN, address=f"192.0.2.{number}"))
        go_on.set()  # when the first of three has been answered

    monkeypatch.setattr(hashlib, "scrypt", scrypt)
    together(3, log_in)
    assert [answer.status for answer in answers] == [503, 400, 400]
    assert answers[0].headers["Retry-After"] == "5"


def test_of_very_many_who_guessed_the_first_are_forgotten(monkeypatch):
    monkeypatch.setattr(hashlib, "scrypt", lambda *given, **options: b"a hash")
    world, guesses = World(), {"address": "192.0.2.1"}
    for status in [400] * 10 + [429]:
        assert world("POST /token", LOGIN, **guesses).status == status
    for number in range(10_000):
        world.app.passwords.match(None, "a guess", "bob", f"host {number}")
    assert world("POST /token", LOGIN, **guesses).status == 400


class Deaf:
    """A store of one's own that does not answer."""

    def read(self, *which: Any) -> Any:
        raise ServiceUnavailable("The store does not answer", retry_after=1)

    write = read


def test_a_store_that_does_not_answer_is_503_everywhere():
    alice = World().user()
    world = World(Deaf(), alice.world.clock)
    ann = User(world, "alice", alice.pair)
    for answer in (world("GET /health"), ann("GET /todos"), refreshed(ann)):
        assert (answer.status, answer.headers["Retry-After"]) == (503, "1")


# ---- Starting, living on, and ending  --------------------------------------

DATABASE = f"SERVICE_SECRET_KEY={SECRET} SERVICE_STORE_URL=sqlite:///"
ONE_WORKER = "The memory store has one worker"
BAD_STARTS = {  # flags and variables, and how the line begins
    "PORT=99999": "PORT ",
    "PORT=abc": "PORT ",
    "PORT=-1": "PORT ",
    f"PORT={'9' * 5_000}": "PORT ",
    "WEB_CONCURRENCY=0": "WEB_CONCURRENCY ",
    "WEB_CONCURRENCY=2": ONE_WORKER,
    "GUNICORN_CMD_ARGS=--workers=3": ONE_WORKER,
    "-w2": ONE_WORKER,
    "-w2 --preload": ONE_WORKER,
    "--max-requests=100": ONE_WORKER,
    "SERVICE_ACCESS_TTL=soon": "SERVICE_ACCESS_TTL ",
    "SERVICE_SECRET_KEY=short": "SERVICE_SECRET_KEY ",
    DATABASE.replace("sqlite", "pigeon"): "SERVICE_STORE_URL ",
    "SERVICE_STORE_URL=sqlite:///todo.db": "SERVICE_SECRET_KEY ",
    f"{DATABASE}/no/where.db": "SERVICE_STORE_URL ",
    "SERVICE_SIGNING_KEY_FILE=/no/key.pem": "SERVICE_SIGNING_KEY_FILE ",
    "--check-config SERVICE_MAX_BODY=1": "SERVICE_MAX_BODY ",
    "service.py SERVICE_REFRESH_TTL=0": "SERVICE_REFRESH_TTL ",
    "service.py PORT=99999": "PORT ",
    "service.py PORT=abc": "PORT ",
}


@pytest.fixture
def database(tmp_path):
    """The environment of a service that keeps its data, in a file of its own."""
    url = f"sqlite:///{tmp_path}/todo.db"
    return {"SERVICE_STORE_URL": url, "SERVICE_SECRET_KEY": SECRET}


@pytest.mark.parametrize(("words", "beginning"), BAD_STARTS.items())
def test_what_cannot_be_ends_the_start_in_one_line(words, beginning):
    variables = [word for word in words.split() if re.match("[A-Z]", word)]
    given = {"PORT": "0"} | dict(word.split("=", 1) for word in variables)
    flags = [word for word in words.split() if word not in variables]
    program = sys.executable if "service.py" in flags else "gunicorn"
    status, said = run(program, *flags, **given)
    assert (status, said.count("\n"), said.startswith(beginning)) == (1, 1, True), said
    assert "short" not in said


def test_it_listens_on_loopback_and_has_a_worker_for_each_core(tmp_path, database):
    for port, shown in (("", "5000"), ("8123", "8123")):
        config = run("gunicorn", "--print-config", PORT=port, **database)[1]
        assert re.search(rf"(?m)^bind +.*'127\.0\.0\.1:{shown}'", config)
        cores = len(os.sched_getaffinity(0))
        assert re.search(rf"(?m)^workers += {cores}$", config)
        assert re.search(r"(?m)^control_socket_disable += True$", config)
    assert not list(tmp_path.iterdir())  # what root made, workers could not write


def test_every_name_of_the_configuration_is_a_setting_or_is_read():
    """gunicorn ignores a misspelt setting without a word."""
    source = (ROOT / "gunicorn.conf.py").read_text()
    names = set(re.findall(r"(?m)^(?:def )?(\w+)(?= = |: .*? = |\()", source))
    assert len(names & Config().settings.keys()) > 10
    for name in names - Config().settings.keys():
        assert len(re.findall(rf"\b{name}\b", source)) > 1, name


def replace_worker(server: serve, sign: int, pid: int) -> None:
    """Send a signal that ends the one worker, and wait for its successor."""
    (worker,) = server.workers
    os.kill(pid, sign)
    eventually(lambda: not is_running(worker) and len(server.workers) == 1)
    server.wait_until_ready()


@GUNICORNS
def test_a_token_is_understood_when_the_memory_has_gone(kind):
    with serve("-k", kind) as server:
        master, worker = server.process.pid, server.workers[0]
        for sign, pid in ((signal.SIGKILL, worker), (signal.SIGHUP, master)):
            token = server.user("alice")
            replace_worker(server, sign, pid)
            refusal = server("GET /todos", token)  # understood: the secret is the same
            assert refusal.status == 401
            assert "The session has ended" in refusal.headers["WWW-Authenticate"]
        workers, token = server.workers, server.user("alice")
        for more in (signal.SIGTTIN, signal.SIGUSR2):
            refusals = server.log.count(f"[ERROR] {ONE_WORKER}")
            server.process.send_signal(more)
            eventually(lambda n=refusals: server.log.count(ONE_WORKER) > n)
        assert server("GET /todos/todo3", token).json == {"task": "profit!"}
        assert server.workers == workers
        assert server.stop() == 0


# ---- An app of one's own, and the command line --------------------------------------

MINE = """
from service import Argument, Resource, Settings, create_app as make_app, main

def create_app():
    books = Resource("books", "book", [Argument("title", required=True)],
                     {"book1": {"title": "Emma"}})
    return make_app(Settings.from_environ(), resources=[books])

if __name__ == "__main__":
    main(create_app())
"""


def test_ones_own_app_has_our_commands_and_runs_by_our_conf(tmp_path, database):
    mine, environ = tmp_path / "mine.py", database | {"PYTHONPATH": str(ROOT)}
    mine.write_text(MINE)
    command = (sys.executable, str(mine), "adduser", "alice")
    assert run(*command, typed=PASSWORD, **environ) == (0, "")
    conf = ("-c", str(ROOT / "gunicorn.conf.py"), "mine:create_app()")
    with serve(*conf, folder=tmp_path, WEB_CONCURRENCY="2", **environ) as server:
        token = server.log_in("alice")["access_token"]
        assert server("GET /books", token).json == {"book1": {"title": "Emma"}}
        assert server("GET /todos", token).status == 404
        assert len(server.workers) == 2
    mine.write_text(MINE.replace('"Emma"', "None"))
    status, said = run("gunicorn", *conf, folder=tmp_path, **environ)
    assert (status, said.count("\n"), "title" in said) == (1, 1, True), said


REFUSED = [  # commands, what is typed, and a word of the one line that comes back
    ("adduser é", PASSWORD, "name"),
    ("adduser alice", PASSWORD, "taken"),
    ("adduser bobs-very-own-name", "bobs-very-own-name", "name itself"),
    ("passwd nobody", PASSWORD, "nobody"),
    ("deluser nobody", "", "nobody"),
]


def test_a_server_that_runs_obeys_the_commands(database):
    def operate(command, password=""):
        words = (sys.executable, "service.py", *command.split())
        return run(*words, typed=f"{password}\n", **database)

    assert operate("adduser Alice --role operator", PASSWORD) == (0, "")
    with serve("-w", "1", SERVICE_SIGNUP="closed", **database) as server:
        assert server("POST /users", username="bob", password=PASSWORD).status == 403
        token = server.log_in("alice")["access_token"]
        assert server("GET /users/me", token).json["roles"] == ["operator"]
        assert list(server("GET /todos", token).json) == ["todo1", "todo2", "todo3"]
        assert operate("passwd alice", "a new pass phräse") == (0, "")
        assert server("GET /todos", token).status == 401
        token = server.log_in("alice", "a new pass phräse")["access_token"]
        assert operate("deluser alice") == (0, "")
        assert server("GET /todos", token).status == 401
    assert operate("passwd alice --role operator")[0] == 2  # which only adduser gives
    for command, password, why in REFUSED:
        status, said = operate(command, password)
        assert (status, said.count("\n"), why in said) == (1, 1, True), said


def test_the_development_server_starts_anew_with_its_file(tmp_path):
    shutil.copy(ROOT / "service.py", tmp_path)
    with serve(command=[sys.executable, "service.py"], folder=tmp_path) as server:
        account = {"username": "alice", "password": PASSWORD}
        assert server("POST /users", **account).status == 201
        assert re.search("sign-up.*'alice'", server.log)
        with (tmp_path / "service.py").open("a") as file:
            file.write("# changed\n")
        # The new process has a new memory, in which the name is free again.
        eventually(lambda: server("POST /users", **account).status == 201)
        os.killpg(server.process.pid, signal.SIGINT)  # Ctrl-C reaches both processes
        server.process.wait(timeout=20)
        assert "Traceback" not in server.log


# ---- Signals, and clients that stall -------------------------------------------------


STALLED = {
    "idle": b"",
    "one byte": b"G",
    "half a head": b"POST /token HTTP/1.1\r\nHost: localhost\r\n",
    "half a body": wired("POST /token", "Content-Length: 99", f"Content-Type: {FORM}"),
    "no hanging up": wired("GET /health"),
}


@pytest.mark.parametrize(
    ("kind", "how", "count"),
    [("gevent", how, 150) for how in STALLED]
    + [("gthread", "idle", 150), ("gthread", "no hanging up", 50)],
)
def test_slow_clients_stop_nobody(kind, how, count):
    with serve("-k", kind) as web, ExitStack() as stack:
        token = web.user("quick")
        for _ in range(count):
            stack.enter_context(web.send(STALLED[how]))
        assert web("GET /todos/todo3", token).json == {"task": "profit!"}
        assert web("PUT /todos/x", token, task="x").status == 201


@GUNICORNS
def test_more_connections_than_files_end_no_worker(kind):
    few = ["bash", "-c", f"ulimit -n 150; exec gunicorn -k {kind}"]
    with serve(command=few) as server:
        workers = server.workers
        with ExitStack() as stack:
            for _ in range(200):
                stack.enter_context(server.send(b""))
        eventually(lambda: server("GET /health").status == 200)
        assert server.workers == workers


def test_hup_brings_a_changed_service_and_a_broken_one_ends_it(tmp_path):
    for name in ("service.py", "gunicorn.conf.py"):
        shutil.copy(ROOT / name, tmp_path)
    with serve(folder=tmp_path, PYTHONPATH=str(tmp_path)) as server:
        source = (tmp_path / "service.py").read_text()
        (tmp_path / "service.py").write_text(source.replace("profit!", "prophet!"))
        replace_worker(server, signal.SIGHUP, server.process.pid)
        token = server.user("alice")
        assert server("GET /todos/todo3", token).json == {"task": "prophet!"}

        (tmp_path / "service.py").write_text("raise SystemExit('no service')\n")
        (worker,) = server.workers
        server.process.send_signal(signal.SIGHUP)
        assert server.process.wait(timeout=20) == 1
        eventually(lambda: not is_running(worker))
        assert "no service\n" in server.log


@GUNICORNS
def test_sigterm_lets_the_requests_in_flight_be_answered(kind):
    with serve("-k", kind) as server:
        server.user("alice")
        body = urlencode(LOGIN).encode()
        headers = (f"Content-Type: {FORM}", f"Content-Length: {len(body)}")
        wire = wired("POST /token", *headers, body=body)
        statuses: list[int] = []

        def log_in(number):
            statuses.append(exchange(server, wire).status)

        logins = threading.Thread(target=together, args=(8, log_in))
        logins.start()
        eventually(lambda: statuses)  # two hash at a time: the others are waiting
        server.process.terminate()
        logins.join()
        assert statuses == [200] * 8
        assert server.process.wait(timeout=20) == 0


def ask_late(port: int) -> bytes:
    """The first line of an answer to a request that comes after its connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=30) as client:
        select.select([client], [], [], 0.02)  # nothing comes: it waits for us
        client.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
        with suppress(OSError):
            return client.makefile("rb").readline().strip()
    return b""


def test_workers_that_are_recycled_drop_no_request(tmp_path):
    flags = ("-w", "2", "--max-requests", "20", "--max-requests-jitter", "5")
    database = {"STORE_URL": f"sqlite:///{tmp_path}/todo.db", "SECRET_KEY": SECRET}
    environ = {f"SERVICE_{name}": text for name, text in database.items()}
    with serve(*flags, **environ) as server:

        def late(number: int) -> list[bytes]:
            return [ask_late(server.port) for _ in range(15)]

        lines = {line for each in together(8, late) for line in each}
        assert lines == {b"HTTP/1.1 200 OK"}
        assert server.log.count("Autorestarting worker") >= 4
