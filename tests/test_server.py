"""What only a server shows: bytes on the wire, processes, signals, the log, the README.

gunicorn with either worker is how the service runs; what it owes to any server is shown
under Granian and waitress as well.
"""

from __future__ import annotations

import http.client
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from urllib.parse import urlencode

import pytest
from gunicorn.config import Config
from werkzeug.datastructures import Headers

import service
from conftest import ROOT, clean_environ, eventually, free_port, is_running, run, serve
from test_service import FORM, JSON, PASSWORD, SECRET, Answer, World, together

BIN = Path(sys.executable).parent
GUNICORNS = ["gthread", "gevent"]
SERVERS = {
    "gthread": [str(BIN / "gunicorn"), "-k", "gthread"],
    "gevent": [str(BIN / "gunicorn"), "-k", "gevent"],
    "granian": [
        *(str(BIN / "granian"), "--interface", "wsgi", "--host", "127.0.0.1"),
        *("--port", "{port}", "--factory", "service:create_app"),
    ],
    "waitress": [
        *(str(BIN / "waitress-serve"), "--listen", "127.0.0.1:{port}"),
        *("--call", "service:create_app"),
    ],
}


@pytest.fixture(scope="session")
def start() -> Iterator[Callable[[str], serve]]:
    """Each kind of server, started when it is first asked for, and left as it was."""
    with ExitStack() as stack:
        running: dict[str, serve] = {}

        def started(kind: str) -> serve:
            if kind not in running:
                running[kind] = stack.enter_context(serve(command=SERVERS[kind]))
            return running[kind]

        yield started


@pytest.fixture(params=SERVERS)
def web(request: pytest.FixtureRequest, start: Callable[[str], serve]) -> serve:
    return start(request.param)


@pytest.fixture(params=GUNICORNS)
def gunicorn(request: pytest.FixtureRequest, start: Callable[[str], serve]) -> serve:
    return start(request.param)


def read(wire: bytes) -> Answer:
    """The one answer in these bytes; the body is all that follows, rightly or not."""
    head, _, body = wire.partition(b"\r\n\r\n")
    line, *lines = head.decode().split("\r\n")
    headers = Headers([tuple(line.split(": ", 1)) for line in lines])
    return Answer(int(line.split()[1]), headers, body)


def wired(line: str, *headers: str, body: bytes = b"") -> bytes:
    """A request as it goes over the wire, on a connection that ends with its answer."""
    lines = [f"{line} HTTP/1.1", "Host: localhost", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def bearer(server: serve, name: str = "wire") -> str:
    return f"Authorization: Bearer {server.user(name)}"


def chunked(*chunks: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(each), each) for each in (*chunks, b""))


# ---- What any server shows ----------------------------------------------------------


@pytest.mark.parametrize("kind", [FORM, JSON])
def test_the_transcript_goes_as_ever(web: serve, kind: str) -> None:
    def send(line: str, token: str | None = None, /, **values: str) -> Answer:
        if kind == JSON and values:
            return web(line, token, json=values)
        return web(line, token, **values)

    account = {"username": f"transcript-{kind[-4:]}", "password": PASSWORD}
    assert send("POST /users", **account).status == 201
    pair = send("POST /token", grant_type="password", **account)
    assert (pair.status, pair.headers["Cache-Control"]) == (200, "no-store")
    token = pair.json["access_token"]
    assert web("GET /todos", token).json == {
        "todo1": {"task": "build an API"},
        "todo2": {"task": "?????"},
        "todo3": {"task": "profit!"},
    }
    assert web("GET /todos/todo3", token).json == {"task": "profit!"}
    deleted = web("DELETE /todos/todo2", token)
    assert (deleted.status, deleted.body) == (204, b"")
    created = send("POST /todos", token, task="something new")
    assert (created.status, created.json) == (201, {"task": "something new"})
    assert created.headers["Location"] == "/todos/todo4"
    replaced = send("PUT /todos/todo3", token, task="something different")
    assert (replaced.status, replaced.json) == (201, {"task": "something different"})
    missing = web("GET /todos/todo2", token)
    assert (missing.status, missing.headers["Content-Type"]) == (404, JSON)
    assert missing.json == {"message": "Todo todo2 doesn't exist"}
    renewal = pair.json["refresh_token"]
    renewed = send("POST /token", grant_type="refresh_token", refresh_token=renewal)
    token = renewed.json["access_token"]
    assert list(web("GET /todos", token).json) == ["todo1", "todo3", "todo4"]
    assert send("POST /revoke", token=token).json == {}
    assert web("GET /todos", token).status == 401


def test_an_answer_without_a_body_ends_with_its_headers(web: serve) -> None:
    who = bearer(web)
    tag = read(web.exchange(wired("GET /todos/todo3", who))).headers["ETag"]
    web.exchange(wired("PUT /todos/gone", who, "Content-Length: 0"))
    for line, header, status in [
        ("HEAD /todos/todo3", "X: y", 200),
        ("HEAD /todos/todo9", "X: y", 404),
        ("HEAD /nowhere", "X: y", 404),
        ("GET /todos/todo3", f"If-None-Match: {tag}", 304),
        ("PUT /todos/gone", f"Content-Type: {FORM}\r\nContent-Length: 6", 201),
        ("DELETE /todos/gone", "X: y", 204),
        ("OPTIONS /todos", "X: y", 204),
    ]:
        wire = web.exchange(wired(line, who, header, body=b"task=x" * (status == 201)))
        assert (line, read(wire).status) == (line, status)
        assert bool(read(wire).body) == (status == 201)


def test_a_body_in_chunks_is_read_to_its_end_or_refused(web: serve) -> None:
    who, kind = bearer(web), f"Content-Type: {FORM}"
    body = chunked(b"task=in ", b"three ", b"parts")
    headers = (who, kind, "Transfer-Encoding: chunked")
    answer = read(web.exchange(wired("PUT /todos/parts", *headers, body=body)))
    if answer.status != 411:
        assert (answer.status, answer.json) == (201, {"task": "in three parts"})
        body = chunked(b"task=" + b"x" * 1000, b"x" * 65_000)
        answer = read(web.exchange(wired("PUT /todos/parts", *headers, body=body)))
        assert (answer.status, list(answer.json)) == (413, ["message"])


@pytest.mark.parametrize("size", [65_537, 1_000_000, 10_000_000])
def test_whoever_sends_too_much_gets_to_read_the_answer(web: serve, size: int) -> None:
    """Even a client that sends all of it before it reads anything."""
    if size > 1_000_000 and "gunicorn" not in web.command[0]:
        size = 66_000  # what others do with more is their own affair
    who, lengths = bearer(web), (f"Content-Length: {size}", f"Content-Type: {FORM}")
    for line, header, status in [
        ("POST /todos", who, 413),
        ("POST /users", "X: y", 413),
        ("POST /todos", "X: y", 401),
        ("POST /nowhere", "X: y", 404),
    ]:
        wire = wired(line, header, *lengths, body=b"x" * size)
        answer = read(web.exchange(wire))
        assert (line, answer.status) == (line, status)
        assert list(answer.json) == ["message"]


def test_sigterm_ends_every_server(start: Callable[[str], serve]) -> None:
    for kind in SERVERS:
        with serve(command=SERVERS[kind]) as server:
            server.stop()
            assert "Traceback" not in server.log
            assert server("GET /health").status == 0
            eventually(lambda pid=server.process.pid: not is_running(-pid))  # type: ignore[misc]


# ---- gunicorn: bytes on the wire ----------------------------------------------------


def test_a_length_over_the_limit_is_413_from_the_header_alone(gunicorn: serve) -> None:
    lengths = ("Content-Length: 200000", f"Content-Type: {FORM}")
    wire = wired("POST /todos", bearer(gunicorn), *lengths, body=b"x" * 1000)
    with gunicorn.send(wire) as connection, connection.makefile("rb") as stream:
        assert stream.readline().split()[1] == b"413"


def test_a_connection_serves_one_request_after_the_other(gunicorn: serve) -> None:
    headers = {"Authorization": f"Bearer {gunicorn.user('keeper')}"}
    connection = http.client.HTTPConnection("127.0.0.1", gunicorn.port, timeout=30)
    sockets = set()
    for line, body, status in [
        ("GET /nowhere", "", 404),
        ("PUT /todos/x", "task=x", 201),
        ("POST /todos", "tusk=x", 400),
        ("DELETE /todos/x", "", 204),
        ("HEAD /todos", "", 200),
        ("GET /todos/todo3", "", 200),
    ]:
        connection.request(*line.split(), body, headers | {"Content-Type": FORM})
        sockets.add(connection.sock.getsockname())
        with connection.getresponse() as answer:
            assert (line, answer.status) == (line, status)
            answer.read()
    connection.close()
    assert len(sockets) == 1


SMUGGLED = b"0\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
AMBIGUOUS = [  # requests that two servers could read differently
    ("Content-Length: 6", "Transfer-Encoding: chunked"),
    ("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
    ("Transfer-Encoding: xchunked",),
    ("Transfer-Encoding : chunked",),
    ("Content-Length: 6", "Content-Length: 70"),
    ("Content-Length: +6",),
    ("Host: elsewhere",),
]
ODD_LINES = (
    "OPTIONS *|CONNECT example.org:80|GET http://example.org/|GET /%ff%fe|GET /%00|"
    "GET /todos/%f0%9f%90%8d?limit=%ff|GET /todos?after=%00|PROPFIND /todos|"
    f"GET //todos|GET /todos/|get /|GET /../../etc/passwd|TRACE /|GET /{'x' * 5000}"
).split("|")


def test_what_is_malformed_is_refused_and_odd_is_no_error(gunicorn: serve) -> None:
    who, kind = bearer(gunicorn), f"Content-Type: {FORM}"
    for headers in AMBIGUOUS:
        wire = gunicorn.exchange(wired("POST /todos", *headers, body=SMUGGLED))
        assert read(wire).status in (400, 501), headers
        assert (wire.count(b"HTTP/1.1 "), b'"ok"' in wire) == (1, False)
    for size in (b"zz", b"-6", b"5", b"0x6"):
        body = size + b"\r\ntask=x\r\n0\r\n\r\n"
        headers = (who, kind, "Transfer-Encoding: chunked")
        wire = gunicorn.exchange(wired("POST /todos", *headers, body=body))
        assert (size, read(wire).status) == (size, 400)
    for line in ODD_LINES:
        status = read(gunicorn.exchange(wired(line, who))).status
        assert (line, 200 <= status < 500) == (line, True)
    many = "If-None-Match: " + '"x",' * 1500 + '"x"'  # takes long to read
    assert read(gunicorn.exchange(wired("GET /todos", who, many))).status == 400
    wire = gunicorn.exchange(b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n")
    assert read(wire).status == 400
    assert read(gunicorn.exchange(b"GET /health HTTP/1.0\r\n\r\n")).status == 200


def test_no_header_of_a_client_moves_the_service_but_the_environment_does() -> None:
    forged = ["SCRIPT_NAME: /evil", "PATH_INFO: /health", "X-Forwarded-Proto: https"]
    forged += ["X-Forwarded-Prefix: /evil", "X-Forwarded-Host: evil"]
    kind = (f"Content-Type: {FORM}", "Content-Length: 6")
    with serve(SCRIPT_NAME="/api") as server:
        wire = wired("POST /api/todos", bearer(server), *forged, *kind, body=b"task=x")
        answer = read(server.exchange(wire))
        assert (answer.status, answer.headers["Location"]) == (201, "/api/todos/todo4")


# ---- gunicorn: crowds and slow clients ----------------------------------------------

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
def test_slow_clients_stop_nobody(
    start: Callable[[str], serve], kind: str, how: str, count: int
) -> None:
    server = start(kind)
    token = server.user("quick")
    with ExitStack() as stack:
        for _ in range(count):
            stack.enter_context(server.send(STALLED[how]))
        assert server("GET /todos/todo3", token).json == {"task": "profit!"}
        assert server("PUT /todos/x", token, task="x").status == 201


@pytest.mark.parametrize("kind", GUNICORNS)
def test_more_connections_than_files_end_no_worker(kind: str) -> None:
    few = f"ulimit -n 150; exec {sys.executable} -m gunicorn -k {kind}"
    with serve(command=["bash", "-c", few]) as server:
        workers = server.workers
        with ExitStack() as stack:
            for _ in range(200):
                stack.enter_context(server.send(b""))
        eventually(lambda: server("GET /health").status == 200)
        assert server.workers == workers


@pytest.mark.parametrize("kind", GUNICORNS)
def test_a_rush_of_logins_leaves_room_for_everybody_else(kind: str) -> None:
    with serve("-k", kind) as server:
        token, read_meanwhile, statuses = server.user("alice"), 0, Counter[int]()
        form = {"grant_type": "password", "username": "alice", "password": PASSWORD}

        def log_in(number: int) -> None:
            answer = server("POST /token", **form)
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


# ---- gunicorn: the log --------------------------------------------------------------


def test_the_log_tells_requests_and_events_and_no_secret() -> None:
    with serve() as server:
        form = {"grant_type": "password", "username": "logged"}
        server.user("logged")
        pair = server.log_in("logged")
        server("POST /token", **form, password="wrong horse battery")
        server(f"POST /token?password={PASSWORD.replace(' ', '+')}", **form)
        token, renewal = pair["access_token"], pair["refresh_token"]
        server("POST /token", grant_type="refresh_token", refresh_token=renewal)
        server(f"GET /todos?access_token={token}", token)
        server("GET /todos/a%0a127.0.0.1%20forged", token)
        server("POST /revoke", token=token)
        log = eventually(lambda: "/revoke" in server.log and server.log)
    for event in ("sign-up", "login", "failed login", "logout"):
        assert re.search(rf"\[INFO\] {event}\b.*'logged'.*'127\.0\.0\.1'", log), event
    line = r"(?m)^127\.0\.0\.1 \[.*\] {} \d+ bytes \d+ ms$"
    assert re.search(line.format("POST '/users' 201"), log)
    assert re.search(line.format("GET '/todos' 200"), log)
    assert re.search(line.format(r"GET '/todos/a\\n127\.0\.0\.1 forged' 404"), log)
    secrets = [token, renewal, PASSWORD, "correct+horse", "wrong horse", "access_t"]
    assert [secret for secret in secrets if secret in log] == []


# ---- gunicorn: starting -------------------------------------------------------------


DATABASE = f"SERVICE_SECRET_KEY={SECRET} SERVICE_STORE_URL=sqlite:///"
BAD_STARTS = [  # flags and variables, and how the line begins
    ("PORT=99999", "PORT "),
    ("PORT=abc", "PORT "),
    ("PORT=-1", "PORT "),
    ("WEB_CONCURRENCY=0", "WEB_CONCURRENCY "),
    ("WEB_CONCURRENCY=2", "The memory store has one worker"),
    ("GUNICORN_CMD_ARGS=--workers=3", "The memory store has one worker"),
    ("-w2", "The memory store has one worker"),
    ("-w2 --preload", "The memory store has one worker"),
    ("--max-requests=100", "The memory store has one worker"),
    ("SERVICE_ACCESS_TTL=soon", "SERVICE_ACCESS_TTL "),
    ("SERVICE_SECRET_KEY=short", "SERVICE_SECRET_KEY "),
    (DATABASE.replace("sqlite", "pigeon"), "SERVICE_STORE_URL "),
    ("SERVICE_STORE_URL=sqlite:///todo.db", "SERVICE_SECRET_KEY "),
    (f"{DATABASE}/no/where.db", "SERVICE_STORE_URL "),
    ("SERVICE_SIGNING_KEY_FILE=/no/key.pem", "SERVICE_SIGNING_KEY_FILE "),
    ("--check-config SERVICE_MAX_BODY=1", "SERVICE_MAX_BODY "),
]


@pytest.mark.parametrize(("words", "beginning"), BAD_STARTS)
def test_what_cannot_be_ends_the_start_in_one_line(words: str, beginning: str) -> None:
    flags = [word for word in words.split() if word.startswith("-")]
    given = [word.split("=", 1) for word in words.split() if not word.startswith("-")]
    command = (sys.executable, "-m", "gunicorn", *flags)
    status, said = run(*command, **{"PORT": "0"} | dict(given))
    assert (status, said.count("\n"), said.startswith(beginning)) == (1, 1, True), said
    assert "short" not in said


def test_it_listens_on_loopback_and_has_a_worker_for_each_core(tmp_path: Path) -> None:
    given = dict(word.split("=") for word in f"{DATABASE}{tmp_path}/x.db".split())
    for port, shown in (("", "5000"), ("8123", "8123")):
        command = (sys.executable, "-m", "gunicorn", "--print-config")
        config = run(*command, PORT=port, **given)[1]
        assert re.search(rf"(?m)^bind +.*'127\.0\.0\.1:{shown}'", config)
        cores = len(os.sched_getaffinity(0))
        assert re.search(rf"(?m)^workers += {cores}$", config)
    assert not list(tmp_path.iterdir())  # what root made, workers could not write


def test_every_name_of_the_configuration_is_a_setting_or_is_read() -> None:
    """gunicorn ignores a misspelt setting without a word."""
    source = (ROOT / "gunicorn.conf.py").read_text()
    names = set(re.findall(r"(?m)^(?:def )?(\w+)(?= = |: .*? = |\()", source))
    assert len(names & Config().settings.keys()) > 10
    for name in names - Config().settings.keys():
        assert len(re.findall(rf"\b{name}\b", source)) > 1, name


def test_no_control_socket_is_opened(tmp_path: Path) -> None:
    with serve(HOME=str(tmp_path), XDG_RUNTIME_DIR=str(tmp_path)):
        assert not [path for path in tmp_path.rglob("*") if path.is_socket()]


# ---- gunicorn: living on, and ending ------------------------------------------------


def replace_worker(server: serve, how: Callable[[int], None]) -> None:
    """Do what ends the one worker, and wait until another has taken its place."""
    (worker,) = server.workers
    how(worker)
    eventually(lambda: not is_running(worker) and len(server.workers) == 1)
    server.wait_until_ready()


@pytest.mark.parametrize("kind", GUNICORNS)
def test_a_token_is_understood_when_the_memory_has_gone(kind: str) -> None:
    with serve("-k", kind) as server:
        for how in (
            lambda pid: os.kill(pid, signal.SIGKILL),
            lambda pid: server.process.send_signal(signal.SIGHUP),
        ):
            token = server.user("alice")
            replace_worker(server, how)
            refusal = server("GET /todos", token)  # understood: the secret is the same
            assert refusal.status == 401
            assert "The session has ended" in refusal.headers["WWW-Authenticate"]
        workers, token = server.workers, server.user("alice")
        for more in (signal.SIGTTIN, signal.SIGUSR2):
            said = server.log.count("[ERROR] The memory store has one worker") + 1
            server.process.send_signal(more)
            eventually(lambda n=said: server.log.count("[ERROR] The memory") == n)  # type: ignore[misc]
        assert server("GET /todos/todo3", token).json == {"task": "profit!"}
        assert server.workers == workers
        assert server.stop() == 0


def test_hup_brings_a_changed_service_and_a_broken_one_ends_it(tmp_path: Path) -> None:
    for name in ("service.py", "gunicorn.conf.py"):
        shutil.copy(ROOT / name, tmp_path)
    with serve(folder=tmp_path, PYTHONPATH=str(tmp_path)) as server:
        source = (tmp_path / "service.py").read_text()
        (tmp_path / "service.py").write_text(source.replace("profit!", "prophet!"))
        replace_worker(server, lambda pid: server.process.send_signal(signal.SIGHUP))
        token = server.user("alice")
        assert server("GET /todos/todo3", token).json == {"task": "prophet!"}

        (tmp_path / "service.py").write_text("raise SystemExit('no service')\n")
        (worker,) = server.workers
        server.process.send_signal(signal.SIGHUP)
        assert server.process.wait(timeout=20) == 1
        eventually(lambda: not is_running(worker))
        assert "no service\n" in server.log


@pytest.mark.parametrize("kind", GUNICORNS)
def test_sigterm_lets_the_requests_in_flight_be_answered(kind: str) -> None:
    with serve("-k", kind) as server:
        server.user("alice")
        form = {"grant_type": "password", "username": "alice", "password": PASSWORD}
        body = urlencode(form).encode()
        headers = (f"Content-Type: {FORM}", f"Content-Length: {len(body)}")
        wire = wired("POST /token", *headers, body=body)
        statuses: list[int] = []

        def log_in(number: int) -> None:
            statuses.append(read(server.exchange(wire)).status)

        logins = threading.Thread(target=together, args=(8, log_in))
        logins.start()
        eventually(lambda: statuses)  # two hash at a time: the others are waiting
        server.process.terminate()
        logins.join()
        assert statuses == [200] * 8
        assert server.process.wait(timeout=20) == 0


def test_workers_that_are_recycled_drop_no_request(tmp_path: Path) -> None:
    database = {"SERVICE_STORE_URL": f"sqlite:///{tmp_path}/todo.db"}
    flags = ("-w", "2", "--max-requests", "20", "--max-requests-jitter", "5")
    with serve(*flags, SERVICE_SECRET_KEY=SECRET, **database) as server:

        def work(number: int) -> list[int]:
            return [server("GET /health").status for _ in range(15)]

        assert together(8, work) == [[200] * 15] * 8
        assert server.log.count("Autorestarting worker") >= 4


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


@pytest.fixture
def mine(tmp_path: Path) -> dict[str, str]:
    """The environment in which somebody's own app, mine.py, stands in the folder."""
    (tmp_path / "mine.py").write_text(MINE)
    return {
        "PYTHONPATH": f"{tmp_path}:{ROOT}",
        "SERVICE_STORE_URL": f"sqlite:///{tmp_path}/mine.db",
        "SERVICE_SECRET_KEY": SECRET,
    }


def test_ones_own_app_runs_by_our_conf(tmp_path: Path, mine: dict[str, str]) -> None:
    conf = ("-c", str(ROOT / "gunicorn.conf.py"), "mine:create_app()")
    with serve(*conf, folder=tmp_path, WEB_CONCURRENCY="2", **mine) as server:
        token = server.user("alice")
        assert server("GET /books", token).json == {"book1": {"title": "Emma"}}
        assert server("GET /todos", token).status == 404
        assert len(server.workers) == 2
    command = (sys.executable, "-m", "gunicorn", *conf)
    (tmp_path / "mine.py").write_text(MINE.replace('"Emma"', "None"))
    status, said = run(*command, folder=tmp_path, **mine)
    assert (status, said.count("\n"), "title" in said) == (1, 1, True), said


def account(command: str, password: str = "", **environ: str) -> tuple[int, str]:
    """What a command about an account says, when the password comes from a pipe."""
    done = subprocess.run(
        [sys.executable, *command.split()],
        input=f"{password}\n",
        cwd=ROOT,
        env=clean_environ(**environ),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stderr


def test_accounts_are_made_mended_and_deleted_by_hand(tmp_path: Path) -> None:
    environ = {
        "SERVICE_STORE_URL": f"sqlite:///{tmp_path}/todo.db",
        "SERVICE_SECRET_KEY": SECRET,
        "SERVICE_SIGNUP": "closed",
    }
    added = account("service.py adduser Alice --role operator", PASSWORD, **environ)
    assert added == (0, "")
    with serve("-w", "1", **environ) as server:
        assert server("POST /users", username="bob", password=PASSWORD).status == 403
        token = server.user("alice")
        who = server("GET /users/me", token).json
        assert who == {"username": "alice", "roles": ["operator"]}
        assert list(server("GET /todos", token).json) == ["todo1", "todo2", "todo3"]

        changed = account("service.py passwd alice", "a new pass phräse", **environ)
        assert changed == (0, "")
        assert server("GET /todos", token).status == 401
        token = server.log_in("alice", "a new pass phräse")["access_token"]

        assert account("service.py deluser alice", **environ) == (0, "")
        assert server("GET /todos", token).status == 401
        status, said = account("service.py adduser alice", PASSWORD, **environ)
        assert (status, said.count("\n"), "taken" in said) == (1, 1, True)


@pytest.mark.parametrize(
    ("command", "password", "why"),
    [
        ("adduser é", PASSWORD, "name"),
        ("adduser bob", "short", "password"),
        ("adduser bob", "", "password"),
        ("adduser bobs-very-own-name", "bobs-very-own-name", "name itself"),
        ("passwd nobody", PASSWORD, "nobody"),
        ("deluser nobody", "", "nobody"),
    ],
)
def test_what_cannot_be_done_by_hand_is_said_in_one_line(
    tmp_path: Path, command: str, password: str, why: str
) -> None:
    store = {"SERVICE_STORE_URL": f"sqlite:///{tmp_path}/x.db"}
    given = store | {"SERVICE_SECRET_KEY": SECRET}
    status, said = account(f"service.py {command}", password, **given)
    assert status != 0
    assert why in said.splitlines()[-1]
    status, said = account(f"service.py {command}", password)
    assert status != 0  # the memory store would forget it at once


def test_adduser_makes_ones_own_starters(tmp_path: Path, mine: dict[str, str]) -> None:
    assert account(f"{tmp_path}/mine.py adduser alice", PASSWORD, **mine) == (0, "")
    conf = ("-c", str(ROOT / "gunicorn.conf.py"), "-w", "1", "mine:create_app()")
    with serve(*conf, folder=tmp_path, **mine) as server:
        token = server.log_in("alice")["access_token"]
        assert server("GET /books", token).json == {"book1": {"title": "Emma"}}


def test_the_development_server_starts_anew_with_its_file(tmp_path: Path) -> None:
    shutil.copy(ROOT / "service.py", tmp_path)
    command = [sys.executable, "service.py"]
    with serve(command=command, folder=tmp_path) as server:
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


def test_the_development_server_too_ends_with_one_line_for_a_bad_setting() -> None:
    for bad in ({"SERVICE_REFRESH_TTL": "0"}, {"PORT": "99999"}, {"PORT": "abc"}):
        status, said = run(sys.executable, "service.py", **bad)
        assert (status, said.count("\n")) == (1, 1), said
        assert said.startswith(next(iter(bad)))


# ---- The README ---------------------------------------------------------------------
# Its commands run, its sessions go as printed, its pieces of code are those of files.
# What it shows of nginx, systemd, containers and backups, test_deployment.py runs.

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"(?ms)^```(\w+)\n(.*?)^```$", README)
RUN_ELSEWHERE = "SERVICE_PROXIES=1|VACUUM INTO|pg_restore|apt-get|pytest"
SCRIPTS = [
    code
    for language, code in BLOCKS
    if language == "sh" and not re.search(RUN_ELSEWHERE, code)
]
GOES_ON = r"\b(gunicorn|granian|waitress-serve|service\.py|examples/\w+\.py)\b"
LOCAL = "http://localhost"
ENDS = r"--check-config|adduser|passwd|deluser|--import|pip install"


@pytest.fixture
def clone(tmp_path: Path) -> Path:
    """The repository as its reader has it, with our environment for its .venv."""
    folder = tmp_path / "todo"
    kept = ("*.py", "*.toml", "*.md", "LICENSE")
    for path in [each for kind in kept for each in ROOT.glob(kind)]:
        (folder / path.name).parent.mkdir(exist_ok=True)
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "examples", folder / "examples")
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


def bash(script: str, folder: Path) -> None:
    """A script, step by step; what serves goes to the background, on a free port."""
    port, other = str(free_port()), str(free_port())
    script = script.replace(":5000", f":{port}").replace(":8000", f":{other}")
    steps = ["trap 'kill $(jobs -p) 2>/dev/null || :' EXIT"]
    for step in re.split(r" && |\n", script):
        if "pip install" in step:
            step = step.replace("pip install", "python -m pip install --dry-run -q", 1)
        elif re.search(r"adduser|passwd", step):
            step = f"echo '{PASSWORD}' | {step}"
        step = step.replace("tv_monitor.py", f"tv_monitor.py --service {LOCAL}:{port}")
        if re.search(GOES_ON, step) and not re.search(ENDS, step):
            step += f" &\nuntil curl -so /dev/null {LOCAL}:$PORT; do kill -0 $!; done"
        steps.append(step)
    (folder / "list.m3u").write_text(f"#EXTM3U\n#EXTINF:-1,News\n{LOCAL}:9/news.m3u8\n")
    given = {"PORT": port, "TV_PASSWORD": PASSWORD, "SERVICE_SECRET_KEY": SECRET}
    given |= {"HOME": str(folder), "PYTHONPATH": str(folder)}
    status, said = run("bash", "-euc", "\n".join(steps), folder=folder, **given)
    assert status == 0, "\n".join([*steps, said])
    assert "does not provide the extra" not in said


def masked(text: str) -> str:
    """A session without what is new each time: tokens, dates, times."""
    text = re.sub(r"eyJ[\w.…-]+", "TOKEN", text.replace("\r\n", "\n"))
    text = re.sub(r"(?m)^(Date|Server): .*$", r"\1", text)
    return re.sub(r"\b(86400|863\d\d)\b|\b1[78]\d{8}\b", "TIME", text)


@pytest.mark.parametrize("script", SCRIPTS[1:])
def test_the_commands_of_the_readme_run(clone: Path, script: str) -> None:
    bash(script, clone)


SESSIONS = [code for language, code in BLOCKS if language == "console"]


@pytest.mark.parametrize("session", SESSIONS)
def test_a_session_of_the_readme_goes_as_printed(clone: Path, session: str) -> None:
    steps = [step.partition("\n") for step in re.split(r"(?m)^\$ ", session)[1:]]
    with serve(folder=clone, PYTHONPATH=str(clone)) as server:
        script = "\nprintf '\\0'\n".join(command for command, _, _ in steps)
        script = script.replace("localhost:5000", f"127.0.0.1:{server.port}")
        status, said = run("bash", "-euc", script.replace("curl ", "curl -sS "))
    assert status == 0, said
    printed = [(command, masked(output)) for command, _, output in steps]
    outputs = said.split("\0")
    real = [
        (command, masked(output))
        for (command, _, _), output in zip(steps, outputs, strict=True)
    ]
    assert real == printed


def test_the_first_command_sets_everything_up_and_runs_the_service(clone: Path) -> None:
    (clone / ".venv").unlink()
    home = {"PYTHONPATH": "", "HOME": str(clone)}
    with serve(
        command=["bash", "-c", SCRIPTS[0]], folder=clone, seconds=300, **home
    ) as server:
        token = server.user("alice")
        assert server("GET /todos/todo3", token).json == {"task": "profit!"}


def test_the_second_command_is_what_ci_runs() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    second = next(code for language, code in BLOCKS if "pytest" in code)
    assert [line for line in second.splitlines() if line in lines]


@pytest.mark.parametrize(
    "code", [code for language, code in BLOCKS if language == "python"]
)
def test_a_piece_of_code_in_the_readme_is_real_or_runs(code: str, clone: Path) -> None:
    files = [*ROOT.glob("*.py"), *ROOT.glob("examples/*.py")]
    if not any(code.strip() in path.read_text() for path in files):
        (clone / "piece.py").write_text(code)
        status, said = run(
            sys.executable, "piece.py", folder=clone, PYTHONPATH=str(clone)
        )
        assert status == 0, said


def test_every_block_of_the_readme_is_of_a_kind_that_some_test_reads() -> None:
    deployment = (ROOT / "tests" / "test_deployment.py").read_text()
    for language, code in BLOCKS:
        known = language in ("sh", "console", "python", "mermaid")
        assert known or f'"{language}"' in deployment or "not run here" in README, code


def test_the_tables_of_the_readme_are_those_of_the_service() -> None:
    settings = {f"SERVICE_{field.name.upper()}" for field in fields(service.Settings)}
    assert set(re.findall(r"(?m)^\| `(SERVICE_\w+)` \|", README)) == settings
    rooms = re.findall(r"(?m)^# ---- (.+?) -+$", (ROOT / "service.py").read_text())
    listed = [
        name
        for name in re.findall(r"(?m)^\| ([A-Z][^|]*?) \|", README)
        if name in rooms
    ]
    assert listed == rooms
    paths = World()("GET /openapi.json").json["paths"]
    operations = {
        f"{method.upper()} {path}" for path in paths for method in paths[path]
    }
    rows = re.findall(r"(?m)^\| (`[A-Z]+ /[^|]*) \|", README)
    named = re.findall(r"`([A-Z]+ /[^` ?]*)", "".join(rows))
    assert operations <= {re.sub("<(.*?)>", r"{\1}", each) for each in named}
