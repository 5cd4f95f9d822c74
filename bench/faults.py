"""What the service withstands: faults and floods against real servers, in figures.

    python bench/faults.py               # all of it, in fifteen minutes
    python bench/faults.py --quick       # a little of everything, in ninety seconds
    python bench/faults.py kills floods  # these sections alone

Each section starts gunicorn on loopback (gthread, and gevent where it is installed),
with nginx and PostgreSQL where they are needed, does its harm, and tells what was
tried, how often, and what was lost. The exit status is 1 if anything was. The run of
all of it writes bench/faults.json. It needs the `test` extra; only root fills a disk.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import sqlite3
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from urllib.parse import urlencode

BENCH = Path(__file__).resolve().parent
sys.path[:0] = [str(BENCH.parent), str(BENCH.parent / "tests"), str(BENCH)]

import psycopg  # noqa: E402
from faults_app import PASSWORD  # noqa: E402
from test_deployment import Nginx, Pair, Writing  # noqa: E402

from conftest import ROOT, Postgres, eventually, serve  # noqa: E402

SECRET = "0123456789abcdef" * 4
WRONG = "wrong horse battery"
FORM, JSON = "application/x-www-form-urlencoded", "application/json"
WORKERS = ["gthread", "gevent"] if find_spec("gevent") else ["gthread"]
# SQLite is not deployed under gevent: who waits for its file stops all of the worker.
SQL = [("sqlite", "gthread"), *(("postgres", worker) for worker in WORKERS)]
STORES = [*(("memory", worker) for worker in WORKERS), *SQL]
DEPLOYED = [SQL[0], SQL[-1]]  # for what takes long


class Row(NamedTuple):
    """What was tried, how often, what was lost, and what else was seen."""

    section: str
    what: str
    where: str
    tried: int
    lost: int
    seen: str


def row(what: str, where: str, tried: int, lost: Counter[str], seen: str) -> Row:
    """A row of the section that runs; what was lost has names."""
    names = [f"{count:,} {name}" for name, count in lost.items() if count]
    return Row(_section, what, where, tried, lost.total(), "; ".join([seen, *names]))


# ---- Servers -------------------------------------------------------------------------


class OnePostgres:
    """A PostgreSQL for the whole run, made when it is first asked for."""

    server: Postgres | None = None

    def empty_url(self) -> str:
        if self.server is None:
            self.server = Postgres()
        with psycopg.connect(self.server.url, autocommit=True) as connection:
            connection.execute("DROP TABLE IF EXISTS users, items")
        return self.server.url

    def close(self) -> None:
        if self.server:
            self.server.close()


postgres = OnePostgres()


@contextmanager
def an_empty(store: str) -> Iterator[str]:
    """The URL of such a store."""
    if store == "memory":
        yield "memory:"
    elif store == "postgres":
        yield postgres.empty_url()
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield f"sqlite:///{folder}/todo.db"


def service(url: str, worker: str, *flags: str, **settings: str) -> serve:
    """The service as it is deployed."""
    given = {"SERVICE_STORE_URL": url, "SERVICE_SECRET_KEY": SECRET} | settings
    return serve("-k", worker, *flags, **given)


QUICK_APP = ["-c", str(ROOT / "gunicorn.conf.py"), "faults_app:create_app()"]
QUICK_PATH = os.pathsep.join([str(ROOT), str(BENCH)])


def quick_service(
    url: str, worker: str, users: Iterable[str], *flags: str, **settings: str
) -> serve:
    """The service with users whose passwords are quickly checked."""
    given = {"FAULTS_USERS": " ".join(users), "PYTHONPATH": QUICK_PATH} | settings
    return service(url, worker, *flags, *QUICK_APP, **given)


def resident(server: serve) -> float:
    """Megabytes that the workers hold."""
    files = [Path(f"/proc/{pid}/statm") for pid in server.workers]
    pages = sum(int(file.read_text().split()[1]) for file in files)
    return pages * resource.getpagesize() / 1e6


def tracebacks(server: serve) -> int:
    return server.log.count("Traceback")


# ---- Clients -------------------------------------------------------------------------


class Reply(NamedTuple):
    status: int  # 0: no answer
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def wire(
    line: str, token: str = "", body: bytes = b"", kind: str = FORM, more: str = ""
) -> bytes:
    """A request as it goes over the wire; more holds header lines, with their ends."""
    head = f"{line} HTTP/1.1\r\nHost: localhost\r\n{more}"
    if token:
        head += f"Authorization: Bearer {token}\r\n"
    if body:
        head += f"Content-Type: {kind}\r\nContent-Length: {len(body)}\r\n"
    return f"{head}\r\n".encode() + body


class Client:
    """A client that keeps its connection, and costs less than the service."""

    def __init__(self, port: int, source: str = "127.0.0.1") -> None:
        self.port, self.source, self.token, self.is_head = port, source, "", False
        self.socket: socket.socket | None = None

    def __call__(self, line: str, **form: str) -> Reply:
        """The answer to a request such as "POST /todos"; status 0 if none came."""
        try:
            self.send(line, **form)
            return self.receive()
        except (OSError, ValueError):
            self.close()
            return Reply(0, {}, b"{}")

    def send(self, line: str, **form: str) -> None:
        if self.socket is None:
            self.socket = socket.create_connection(
                ("127.0.0.1", self.port), 30, (self.source, 0)
            )
        self.is_head = line.startswith("HEAD ")
        self.socket.sendall(wire(line, self.token, urlencode(form).encode()))

    def receive(self) -> Reply:
        """The answer to what was sent."""
        got = b""
        while b"\r\n\r\n" not in got:
            got += self._more()
        head, _, body = got.partition(b"\r\n\r\n")
        line, *lines = head.decode("latin-1").split("\r\n")
        pairs = [each.partition(": ") for each in lines]
        headers = {name.lower(): value for name, _, value in pairs}
        length = 0 if self.is_head else int(headers.get("content-length", 0))
        while len(body) < length:
            body += self._more()
        if headers.get("connection") == "close":
            self.close()
        return Reply(int(line.split()[1]), headers, body)

    def _more(self) -> bytes:
        assert self.socket
        if not (data := self.socket.recv(65_536)):
            raise ConnectionResetError
        return data

    def close(self) -> None:
        if self.socket:
            self.socket = self.socket.close()

    def log_in(self, name: str, password: str = PASSWORD) -> Reply:
        """A login; its access token goes with the requests that follow."""
        form = {"grant_type": "password", "username": name, "password": password}
        reply = self("POST /token", **form)
        if reply.status == 200:
            self.token = reply.json["access_token"]
        return reply

    def refresh(self, token: str) -> Reply:
        return self("POST /token", grant_type="refresh_token", refresh_token=token)

    def tasks(self) -> dict[str, str]:
        """All tasks of the user, page by page."""
        found, path = {}, "/todos?limit=1000"
        while path:
            reply = self(f"GET {path}")
            found |= {id: item["task"] for id, item in reply.json.items()}
            path = "".join(re.findall("<(.+)>", reply.headers.get("link", "")))
        return found


@contextmanager
def crowd(
    count: int, work: Callable[[int, threading.Event], None]
) -> Iterator[list[threading.Thread]]:
    """So many threads that work until the block ends; their first error is raised."""
    is_over, errors = threading.Event(), list[BaseException]()

    def guarded(number: int) -> None:
        try:
            work(number, is_over)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=[n]) for n in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield threads
    finally:
        is_over.set()
        for thread in threads:
            thread.join()
    if errors:
        raise errors[0]


# ---- Kills: kill -9 during writes ----------------------------------------------------


def kills(is_quick: bool) -> Iterator[Row]:
    """Workers die, and every fifth time all of gunicorn, while eight clients write."""
    aim, deaths = (400, 5) if is_quick else (20_000, 100)
    for store, worker in DEPLOYED:
        with an_empty(store) as url:
            yield killed(url, f"{store}, {worker}", worker, aim, deaths)


def killed(url: str, where: str, worker: str, aim: int, deaths: int) -> Row:
    names = [f"writer{n}" for n in range(4)]
    settings = {"SERVICE_MAX_ITEMS": "1000000", "SERVICE_ACCESS_TTL": "7200"}
    kept, statuses, done = list[tuple[str, str, str]](), Counter[int](), 0

    def write(server: serve, number: int, is_over: threading.Event) -> None:
        client, name = Client(server.port), names[number % 4]
        while not is_over.is_set():
            if not client.token:
                client.log_in(name)
                continue
            task = os.urandom(8).hex()
            reply = client("POST /todos", task=task)
            statuses[reply.status] += 1
            if reply.status == 201:
                id = reply.headers["location"].removeprefix("/todos/")
                kept.append((name, id, task))
            else:
                is_over.wait(0.01)

    def go_on() -> None:
        """Until it is time for the next kill."""
        progress(f"kills, {where}: {len(kept):,} of {aim:,} writes, {done} kills")
        eventually(lambda: len(kept) * deaths >= aim * (done + 1), 120)

    while done < deaths:
        with (
            quick_service(url, worker, names, "-w", "3", **settings) as server,
            crowd(8, lambda *given: write(server, *given)),
        ):
            for _ in range(4):
                go_on()
                os.kill(random.choice(server.workers), signal.SIGKILL)
                done += 1
            go_on()
            os.killpg(server.process.pid, signal.SIGKILL)
            done += 1
    lost = Counter[str](
        odd=sum(statuses[s] for s in statuses if s not in (201, 503, 0))
    )
    with quick_service(url, worker, names, **settings) as server:
        client = Client(server.port)
        for name in names:
            client.log_in(name)
            there = client.tasks()
            mine = [(id, task) for owner, id, task in kept if owner == name]
            lost["lost"] += sum(there.get(id) != task for id, task in mine)
            lost["ids twice"] += len(mine) - len(dict(mine))
            lost["tasks twice"] += len(there) - len({*there.values()})
    seen = f"{statuses[0]} cut off, {statuses[503]} times 503"
    return row(f"acknowledged writes, {done} kill -9", where, len(kept), lost, seen)


# ---- Ends: SIGTERM and HUP under load ------------------------------------------------


def ends(is_quick: bool) -> Iterator[Row]:
    """No request fails when the service ends, or loads itself anew."""
    for store, worker in DEPLOYED if is_quick else SQL:
        with an_empty(store) as url:
            yield renewed(url, f"{store}, {worker}", worker, 1 if is_quick else 8)
        with an_empty(store) as url:
            yield ended(url, f"{store}, {worker}", worker, 1 if is_quick else 5)


def renewed(url: str, where: str, worker: str, times: int) -> Row:
    """Half of the clients keep their connections, half make one for each request."""
    statuses = Counter[int]()

    def ask(server: serve, number: int, is_over: threading.Event) -> None:
        client = Client(server.port)
        client.log_in("alice")
        while not is_over.is_set():
            statuses[client("PUT /todos/x", task="y").status] += 1
            if number % 2:
                client.close()
            statuses[client("GET /todos").status] += 1

    with quick_service(url, worker, ["alice"], "-w", "2") as server:
        with crowd(8, lambda *given: ask(server, *given)):
            for each in range(times):
                progress(f"ends, {where}: HUP {each + 1} of {times}")
                aim = statuses.total() + 100
                eventually(lambda: statuses.total() > aim)  # noqa: B023
                old = {*server.workers}
                server.process.send_signal(signal.SIGHUP)
                eventually(lambda: not old & {*server.workers}, 60)  # noqa: B023
            eventually(lambda: len(server.workers) == 2)
        lost = Counter(tracebacks=tracebacks(server))
    lost["failed"] = statuses.total() - statuses[200] - statuses[201]
    seen = "half of them on connections that stay"
    return row(f"requests during {times} HUP", where, statuses.total(), lost, seen)


def ended(url: str, where: str, worker: str, times: int) -> Row:
    """Eight logins, of which two at a time are checked, are in flight at SIGTERM."""
    lost, seconds = Counter[str](), []
    form = {"grant_type": "password", "username": "alice", "password": PASSWORD}
    for each in range(times):
        progress(f"ends, {where}: SIGTERM {each + 1} of {times}")
        with service(url, worker, "-w", "1") as server:
            server("POST /users", username="alice", password=PASSWORD)
            clients = [Client(server.port) for _ in range(8)]
            for client in clients:
                client.send("POST /token", **form)
            # Once one is answered, all have been accepted.
            lost["failed"] += clients[0].receive().status != 200
            began = time.monotonic()
            server.process.terminate()
            for client in clients[1:]:
                with suppress(OSError):
                    lost["failed"] -= client.receive().status == 200
                lost["failed"] += 1
                client.close()
            server.process.wait(30)
            seconds.append(time.monotonic() - began)
    seen = f"ended in {max(seconds):.1f} s at most"
    return row(f"logins in flight at {times} SIGTERM", where, 8 * times, lost, seen)


# ---- Mutations: broken bytes over raw sockets ----------------------------------------

BEARER, REFRESH = "bearer.goes.here", "refresh.goes.here"
PART = b'--b\r\nContent-Disposition: form-data; name="task"\r\n\r\nx\r\n--b--\r\n'
CHUNKS = b'b\r\n{"task": "a\r\n3\r\nb"}\r\n0\r\n\r\n'
CONDITIONS = 'If-Match: "a", W/"b"\r\nIf-None-Match: *\r\n'
MANNERS = "Origin: https://a.example\r\nAccept: text/html, */*;q=0.1\r\n"
CHEAP = [
    wire("GET /"),
    wire("GET /health", more=MANNERS),
    wire("GET /openapi.json"),
    wire("GET /docs"),
    wire("GET /.well-known/jwks.json"),
    wire("OPTIONS /todos", more=MANNERS + "Access-Control-Request-Method: PUT\r\n"),
    wire("HEAD /todos", BEARER),
    wire("GET /users/me", BEARER),
    wire("GET /users/me/sessions", BEARER),
    wire("DELETE /users/me/sessions/none", BEARER),
    wire("DELETE /users/me/sessions", BEARER),
    wire("GET /todos?limit=2", BEARER),
    wire("GET /todos/todo1", BEARER, more='If-None-Match: "a"\r\n'),
    wire("POST /todos", BEARER, b'{"task": "caf\xc3\xa9"}', JSON),
    wire("POST /todos", BEARER, PART, "multipart/form-data; boundary=b"),
    wire("POST /todos", BEARER, more=f"Content-Type: {JSON}\r\n").replace(
        b"\r\n\r\n", b"\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKS
    ),
    wire("PUT /todos/mine", BEARER, b"task=something+else%21"),
    wire("PUT /todos/mine", BEARER, b'{"task": "\\ud83d\\ude00"}', JSON),
    wire("PUT /todos/mine", BEARER, b"task=x", more=CONDITIONS),
    wire("PATCH /todos/mine", BEARER, b'{"task": "a"}', "application/merge-patch+json"),
    wire("DELETE /todos/mine", BEARER),
    wire(
        "POST /token", "", f"grant_type=refresh_token&refresh_token={REFRESH}".encode()
    ),
    wire("POST /revoke", "", b"token=abc.def.ghi"),
]
DEAR = [  # a password is hashed for these
    wire("POST /users", "", b"username=bob&password=correct+horse+battery"),
    wire("POST /token", "", b"grant_type=password&username=bob&password=not+the+right"),
    wire("PATCH /users/me", BEARER, b'{"password": "x", "new_password": "y"}', JSON),
    wire("DELETE /users/me", BEARER, b"password=not+the+right+one"),
]
ODD = [b"[" * 99, b"9" * 30, b"a" * 5000]
ODD += (
    b'\0|\r\n|\n|\xff|%00|%|{|"|\\u|;|,|:| |\xc3|\xf0\x9f\x98\x80|-1|1e999|NaN|../|//'
).split(b"|")


def mutated(chance: random.Random, sent: bytes) -> bytes:
    """These bytes with one or two things broken."""
    data = bytearray(sent)
    for _ in range(chance.randint(1, 2)):
        start = chance.randrange(len(data) + 1)
        end = min(len(data), start + chance.randint(1, 12))
        match chance.randrange(6):
            case 0 if start < len(data):
                data[start] ^= 1 << chance.randrange(8)
            case 1:
                del data[start:end]
            case 2:
                data[start:start] = chance.choice(ODD)
            case 3:
                data[start:start] = data[start:end] * chance.randint(1, 40)
            case 4:
                data[start:start] = chance.randbytes(chance.randint(1, 8))
            case 5:
                other = chance.choice(CHEAP)
                data[start:] = other[chance.randrange(len(other)) :]
    return bytes(data)


def mutations(is_quick: bool) -> Iterator[Row]:
    """Broken requests; and whole heads over broken bodies, which are all answered."""
    for worker in WORKERS:
        yield attacked(worker, 2_000 if is_quick else 50_000)


def attacked(worker: str, count: int) -> Row:
    statuses, lost, tried = Counter[int](), Counter[str](), Counter[str]()

    def attack(server: serve, pair: dict[str, str], number: int) -> None:
        chance = random.Random(number)
        for each in range(count // 8):
            sent = chance.choice(DEAR if chance.random() < 0.01 else CHEAP)
            head, _, body = sent.partition(b"\r\n\r\n")
            is_whole = bool(each % 2 and body and b"chunked" not in head)
            if is_whole:
                body = mutated(chance, body)
                length = b"Length: %d" % len(body)
                sent = re.sub(rb"Length: \d+", length, head) + b"\r\n\r\n" + body
            else:
                sent = mutated(chance, sent)
            sent = sent.replace(BEARER.encode(), pair["access_token"].encode())
            sent = sent.replace(REFRESH.encode(), pair["refresh_token"].encode())
            got = exchanged(server.port, sent)
            answers = [int(each) for each in re.findall(rb"HTTP/1\.1 (\d{3}) ", got)]
            statuses.update(answers)
            if 500 in answers or (is_whole and not answers):
                lost["of 500" if answers else "without answer"] += 1
                print(f"\n{sent!r}\n{got!r}", file=sys.stderr)
            tried["requests"] += 1
            if each % 50 == 0:
                progress(f"mutations, {worker}: {tried['requests']:,} of {count:,}")

    settings = {"SERVICE_ACCESS_TTL": "7200"}
    with quick_service("memory:", worker, ["alice"], **settings) as server:
        pair, before = Client(server.port).log_in("alice").json, server.workers
        with crowd(8, lambda number, _: attack(server, pair, number)) as threads:
            for thread in threads:
                thread.join()
        lost["worker deaths"] = int(server.workers != before)
        lost["tracebacks"] = tracebacks(server)
    kinds = Counter(f"{status // 100}xx" for status in statuses.elements())
    seen = ", ".join(f"{count:,} {kind}" for kind, count in sorted(kinds.items()))
    tried_all = tried["requests"]
    return row("requests with broken bytes", f"memory, {worker}", tried_all, lost, seen)


def exchanged(port: int, sent: bytes) -> bytes:
    """All that comes back for these bytes and the end of them."""
    got = b""
    with suppress(OSError), socket.create_connection(("127.0.0.1", port), 20) as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        while data := client.recv(65_536):
            got += data
    return got


# ---- Large: the 413 that a client gets to read ---------------------------------------

CURL = "curl -sSo /dev/null -w %{http_code} -H Content-Type:$3 --data-binary @$1 $2"
REQUESTS = """
import requests, sys
file, url, kind = sys.argv[1:]
answer = requests.post(url, open(file, "rb").read(), headers={"Content-Type": kind})
print(answer.status_code)
"""
FETCH = """
const [file, url, kind] = process.argv.slice(1)
const body = require("fs").readFileSync(file), headers = {"Content-Type": kind}
fetch(url, {method: "POST", body, headers})
  .then(answer => console.log(answer.status), error => console.log(error.cause))
"""


def large(is_quick: bool) -> Iterator[Row]:
    """Clients that others wrote send far too much, and get to read the refusal."""
    for worker in WORKERS:
        yield refused(worker, {"/users": "413"} if is_quick else REFUSALS, is_quick)


REFUSALS = {"/users": "413", "/todos": "401", "/nowhere": "404"}


def refused(worker: str, refusals: dict[str, str], is_quick: bool) -> Row:
    clients = {"requests": [sys.executable, "-c", REQUESTS]}
    if shutil.which("curl"):
        clients["curl"] = ["sh", "-c", CURL, "sh"]
    if shutil.which("node"):
        clients["fetch"] = ["node", "-e", FETCH]
    tried, lost = 0, Counter[str]()
    with service("memory:", worker) as server, tempfile.NamedTemporaryFile() as file:
        for size in [1_000_000, 20_000_000] * (1 if is_quick else 3):
            file.truncate(size)
            for name, command in clients.items():
                for path, status in refusals.items():
                    progress(f"large, {worker}: {size:,} bytes by {name} to {path}")
                    words = [*command, file.name, server.url + path, JSON]
                    said = subprocess.run(words, capture_output=True, text=True).stdout
                    tried += 1
                    lost[f"by {name}"] += said.strip() != status
    what = f"{', '.join(refusals.values())} read by the client"
    seen = f"1 and 20 MB by {', '.join(clients)}"
    return row(what, f"memory, {worker}", tried, lost, seen)


# ---- Races: one refresh token, 32 clients --------------------------------------------


def races(is_quick: bool) -> Iterator[Row]:
    """One successor for all, which works; a thief who comes late ends the session."""
    for store, worker in [STORES[0], *DEPLOYED] if is_quick else STORES:
        with an_empty(store) as url:
            yield raced(url, store, worker, 10 if is_quick else 300)


def raced(url: str, store: str, worker: str, rounds: int) -> Row:
    names, grace = [f"racer{n}" for n in range(32)], 1
    flags = ["-w", "1" if store == "memory" else "3"]
    settings = {"SERVICE_REFRESH_GRACE": str(grace)}
    lost, superseded = Counter[str](), deque[tuple[float, str, dict[str, str]]]()
    with quick_service(url, worker, names, *flags, **settings) as server:
        clients = [Client(server.port) for _ in range(32)]
        owner = clients[0]

        def steal(due: float, token: str, newest: dict[str, str]) -> None:
            """The superseded token comes when its grace is over."""
            time.sleep(max(0.0, due - time.monotonic()))
            thief = Client(server.port).refresh(token)
            owner.token = newest["access_token"]
            ends = [
                thief,
                owner("GET /users/me"),
                owner.refresh(newest["refresh_token"]),
            ]
            statuses = [reply.status for reply in ends]
            lost["sessions that went on"] += statuses != [400, 401, 400]

        for each in range(rounds):
            progress(f"races, {store}, {worker}: round {each + 1} of {rounds}")
            old = owner.log_in(names[each % 32]).json["refresh_token"]
            form = {"grant_type": "refresh_token", "refresh_token": old}
            for client in clients:
                client.send("POST /token", **form)
            pairs = [client.receive().json for client in clients]
            successors = {pair.get("refresh_token") for pair in pairs}
            lost["successors"] += (
                len(successors - {old, None}) != 1 or None in successors
            )
            owner.token = random.choice(pairs).get("access_token", "")
            lost["successors that fail"] += owner("GET /users/me").status != 200
            superseded.append((time.monotonic() + grace + 1.1, old, pairs[0]))
            while superseded[0][0] < time.monotonic():
                steal(*superseded.popleft())
                if not superseded:
                    break
        while superseded:
            steal(*superseded.popleft())
        lost["tracebacks"] = tracebacks(server)
    seen = f"{rounds} rounds; each session ended by its thief"
    return row(
        "refreshes of one token by 32", f"{store}, {worker}", 32 * rounds, lost, seen
    )


# ---- Floods: wrong passwords, and many logins ----------------------------------------


def floods(is_quick: bool) -> Iterator[Row]:
    """Guessers are slowed down; whoever is elsewhere logs in; memory is bounded."""
    for worker in WORKERS:
        yield guessed(worker, "for one name", 3 if is_quick else 15)
        if not (is_quick and worker == "gevent"):
            yield guessed(worker, "for many names", 3 if is_quick else 15)
        yield guessed_from_everywhere(worker, 1_000 if is_quick else 20_000)
        yield logged_in_again(worker, 500 if is_quick else 20_000)


def guessed(worker: str, how: str, seconds: int) -> Row:
    """24 clients guess from one address; the user logs in from another meanwhile."""
    statuses, waits, elsewhere = Counter[int](), [0], list[float]()
    lost = Counter[str]()
    progress(f"floods, {worker}: wrong passwords {how}")

    def guess(server: serve, number: int, is_over: threading.Event) -> None:
        client, count = Client(server.port), 0
        while not is_over.is_set():
            name = "victim" if how == "for one name" else f"name{number}-{count}"
            reply = client.log_in(name, WRONG)
            statuses[reply.status] += 1
            count += 1
            if reply.status in (429, 503):
                waits.append(int(reply.headers["retry-after"]))
                is_over.wait(0.1)  # far sooner than it was told

    with service("memory:", worker) as server:
        server("POST /users", username="victim", password=PASSWORD)
        before = resident(server)
        with crowd(24, lambda *given: guess(server, *given)):
            end = time.monotonic() + seconds
            while time.monotonic() < end or not statuses[429]:
                began = time.monotonic()
                user = Client(server.port, "127.0.0.2")
                lost["logins elsewhere"] += user.log_in("victim").status != 200
                elsewhere.append(time.monotonic() - began)
                user.close()
                time.sleep(0.1)
        grown = resident(server) - before
        lost["tracebacks"] = tracebacks(server)
    lost["waits over 15 min"] = max(waits) > 900
    seen = (
        f"{statuses[400]:,} checked, {statuses[429]:,} times 429,"
        f" {statuses[503]:,} times 503; {len(elsewhere)} logins elsewhere in"
        f" {median(elsewhere):.2f} s, {max(elsewhere):.2f} s at most; {grown:+.0f} MB"
    )
    total = statuses.total()
    return row(
        f"wrong passwords {how}, 24 clients", f"memory, {worker}", total, lost, seen
    )


def guessed_from_everywhere(worker: str, count: int) -> Row:
    """Every guess from another address: what is remembered of them is bounded."""
    names = [f"user{n}" for n in range(16)]

    def guess(server: serve, numbers: range) -> float:
        for n in numbers:
            client = Client(server.port, f"127.1.{n // 250}.{n % 250 + 1}")
            client.log_in(names[n % 16], WRONG)
            client.close()
            if n % 100 == 0:
                progress(f"floods, {worker}: {n:,} of {count:,} addresses")
        return resident(server)

    with quick_service("memory:", worker, names) as server:
        early = guess(server, range(count // 10))
        late = guess(server, range(count // 10, count))
    lost = Counter(memory=int(late > early + 10))  # 10,000 names and addresses at most
    seen = f"{early:.0f} MB after {count // 10:,}, {late:.0f} MB after all"
    what = "wrong passwords, each from another address"
    return row(what, f"memory, {worker}", count, lost, seen)


def logged_in_again(worker: str, count: int) -> Row:
    """One user logs in and refreshes over and over: 20 sessions are kept.

    The 10,000 tokens that a worker remembers are there after half of it.
    """
    statuses, early = Counter[int](), 0.0
    with quick_service("memory:", worker, ["alice"]) as server:
        client = Client(server.port)
        for each in range(count):
            login = client.log_in("alice")
            refresh = client.refresh(login.json["refresh_token"])
            statuses.update([login.status, refresh.status])
            if each % 100 == 0:
                progress(
                    f"floods, {worker}: {each:,} of {count:,} logins and refreshes"
                )
            if each == count // 2:
                early = resident(server)
        late = resident(server)
    lost = Counter(failed=statuses.total() - statuses[200])
    lost["memory"] = int(late > early * 1.1)
    seen = f"{early:.0f} MB after half, {late:.0f} MB after all"
    total = statuses.total()
    return row(
        "logins and refreshes of one user", f"memory, {worker}", total, lost, seen
    )


# ---- Slow clients --------------------------------------------------------------------

SLOW = {
    "send nothing": b"",
    "send one byte": b"P",
    "send half a head": b"POST /api/token HTTP/1.1\r\nHost: todo.exam",
    "send half a body": b"POST /token HTTP/1.1\r\nHost: todo.example\r\n"
    b"Content-Length: 50\r\nContent-Type: application/json\r\n\r\n{",
}


def slow(is_quick: bool) -> Iterator[Row]:
    """How many clients may stall, and others still be answered within 100 ms."""
    crowds = [200] if is_quick else [10, 30, 100, 300, 1000]
    for worker in WORKERS:
        with service("memory:", worker) as server:
            for how, sent in SLOW.items():
                # A thread of gthread waits for whoever has begun to send.
                is_promised = worker == "gevent" or not sent
                yield stalled(server.port, None, f"{worker}", how, crowds, is_promised)
            if Nginx.program:
                with Nginx(server.port) as nginx:
                    for how in SLOW:
                        where = f"{worker} behind nginx"
                        yield stalled(nginx.port, nginx.tls, where, how, crowds, True)


def stalled(
    port: int,
    tls: ssl.SSLContext | None,
    where: str,
    how: str,
    crowds: list[int],
    is_promised: bool,
) -> Row:
    withstood, worst = 0, 0.0
    for count in crowds:
        progress(f"slow, {where}: {count} clients that {how}")
        worst = healthy_beside(port, tls, count, SLOW[how])
        if worst > 0.1:
            break
        withstood = count
    seen = f"{worst * 1000:.0f} ms at most" if worst < 2 else "no answer in 2 s"
    if worst > 0.1:
        seen = f"beside {withstood:,} within 100 ms, beside {count:,} {seen}"
    lost = Counter(failures=int(is_promised and worst > 0.1))
    return row(f"clients that {how}", where, crowds[-1], lost, seen)


def healthy_beside(
    port: int, tls: ssl.SSLContext | None, count: int, sent: bytes
) -> float:
    """Seconds of the slowest of 20 requests beside stalled clients; 2 at most."""
    path, times, stalled = "/api/health" if tls else "/health", list[float](), []
    request = f"GET {path} HTTP/1.1\r\nHost: todo.example\r\n\r\n".encode()
    try:
        for _ in range(count):
            client = socket.create_connection(("127.0.0.1", port), 5)
            if tls and sent:
                client = tls.wrap_socket(client)
            client.sendall(sent)
            stalled.append(client)
        while len(times) < 21 and 2.0 not in times:
            began = time.monotonic()
            with socket.create_connection(("127.0.0.1", port), 2) as client:
                if tls:
                    client = tls.wrap_socket(client)
                client.sendall(request)
                is_good = b" 200 " in client.recv(65_536)
                client.close()
            times.append(time.monotonic() - began if is_good else 2.0)
        if len(times) == 21:
            del times[0]  # which came while the stalled ones were still let in
    except OSError:
        times.append(2.0)
    for client in stalled:
        client.close()
    return max(times)


# ---- Disks: full, and read-only ------------------------------------------------------


def disks(is_quick: bool) -> Iterator[Row]:
    """SQLite on a disk that is full, and in a file that may not be written."""
    if os.geteuid():
        progress("disks: not tried, for only root may mount a small one", True)
        return
    times = 1 if is_quick else 10
    with tempfile.TemporaryDirectory() as folder, small_disk(folder) as (disk, enter):
        yield spoilt("full", times, folder, disk, enter)
    with tempfile.TemporaryDirectory() as folder:
        # As root who must heed the mode of a file.
        rights = "-dac_override,-dac_read_search"
        enter = ["setpriv", f"--bounding-set={rights}", f"--inh-caps={rights}"]
        yield spoilt("read-only", times, folder, Path(folder), enter)


@contextmanager
def small_disk(folder: str) -> Iterator[tuple[Path, list[str]]]:
    """4 MB at this folder, for who enters its namespace, so that nothing is left."""
    script = 'mount -t tmpfs -o size=4m none "$0" && echo && cat'
    pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = ["unshare", "-m", "sh", "-c", script, folder]
    with subprocess.Popen(command, **pipes) as holder:
        holder.stdout.readline()  # it is mounted
        enter = ["nsenter", f"--mount=/proc/{holder.pid}/ns/mnt"]
        yield Path(f"/proc/{holder.pid}/root{folder}"), enter
        holder.stdin.close()


def spoilt(what: str, times: int, folder: str, disk: Path, enter: list[str]) -> Row:
    lost, statuses, seconds = Counter[str](), Counter[int](), list[float]()
    kept: dict[str, str] = {}
    gunicorn = [*enter, sys.executable, "-m", "gunicorn", "-k", "gthread", "-w", "2"]
    environ = {
        "SERVICE_STORE_URL": f"sqlite:///{folder}/todo.db",
        "SERVICE_SECRET_KEY": SECRET,
        "FAULTS_USERS": "alice",
        "PYTHONPATH": QUICK_PATH,
    }
    with serve(command=gunicorn + QUICK_APP, **environ) as server:
        client = Client(server.port)
        client.log_in("alice")

        def put(number: int) -> int:
            id, task = f"item{number}", os.urandom(4000).hex()
            status = client(f"PUT /todos/{id}", task=task).status
            statuses[status] += 1
            if status == 201:
                kept[id] = task
            elif status != 503:
                lost[f"answers {status}"] += 1
            return status

        for each in range(times):
            progress(f"disks, {what}: {each + 1} of {times}")
            lost["writes before"] += [put(n) for n in range(20)] != [201] * 20
            with spoiling(what, disk):
                if what == "read-only":  # who has the file open goes on writing
                    for pid in server.workers:
                        os.kill(pid, signal.SIGKILL)
                    client.close()
                eventually(lambda: put(random.randrange(100)) == 503, 60)
                lost["reads"] += client("GET /todos").status not in (200, 503)
                # It looks at the disk every five seconds.
                eventually(lambda: client("GET /health").status == 503)
            began = time.monotonic()
            eventually(lambda: put(100) == 201, 30)
            seconds.append(time.monotonic() - began)
        there = client.tasks()
        lost["items"] += sum(there.get(id) != task for id, task in kept.items())
        lost["tracebacks"] += tracebacks(server)
    with closing(sqlite3.connect(disk / "todo.db")) as file:
        found = file.execute("PRAGMA integrity_check").fetchall()
        lost["corrupted"] += found != [("ok",)]
    seen = f"{statuses[503]} times 503, serving again {max(seconds):.1f} s after"
    total = statuses.total()
    return row(f"writes, {times} times {what}", "sqlite, gthread", total, lost, seen)


@contextmanager
def spoiling(what: str, disk: Path) -> Iterator[None]:
    """A disk without room, or a file that nobody may write, until the block ends."""
    if what == "full":
        filler = disk / "filler"
        with suppress(OSError), open(filler, "wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
        yield
        filler.unlink()
        return
    for path in disk.glob("todo.db*"):
        path.chmod(0o400)
    yield
    for path in disk.glob("todo.db*"):  # SQLite makes its log with the file's mode
        path.chmod(0o600)


# ---- Clocks: an hour back and forth --------------------------------------------------


def clocks(is_quick: bool) -> Iterator[Row]:
    """The clock jumps about; no token opens anything before its time or after."""
    for worker in WORKERS:
        with tempfile.NamedTemporaryFile("w") as file:
            yield jumped(worker, Path(file.name), 40 if is_quick else 400)


def jumped(worker: str, file: Path, jumps: int) -> Row:
    chance, lost, tried, hour = random.Random(1), Counter[str](), 0, 3600
    pairs, offset, accepted = deque[dict[str, str]](maxlen=6), 0, 0
    file.write_text("0")
    settings = {"FAULTS_CLOCK": str(file)}
    with quick_service("memory:", worker, ["alice", "bob"], **settings) as server:
        client = Client(server.port)
        for each in range(jumps):
            progress(f"clocks, {worker}: jump {each + 1} of {jumps}")
            step = chance.choice([-hour, hour, -300, 800, 5 * hour, -5 * hour])
            offset = min(max(-2 * hour, offset + step), 26 * hour)
            file.write_text(str(offset))
            pairs.append(client.log_in("alice").json)
            for pair in pairs:
                access, refresh = (
                    claims(pair[name]) for name in ("access_token", "refresh_token")
                )
                client.token = pair["access_token"]
                is_in = client("GET /users/me").status == 200
                now = time.time() + offset
                born, ends = access["iat"], access["exp"]
                lost["after their end"] += is_in and now > ends + 1
                lost["too long"] += (
                    ends > born + 900 or refresh["exp"] > born + 24 * hour
                )
                accepted += is_in
                tried += 1
        # A throttled name waits no longer than was said, when the clock is put back.
        file.write_text("0")
        replies = [client.log_in("bob", WRONG) for _ in range(14)]
        wait = max(int(reply.headers.get("retry-after", 0)) for reply in replies)
        lost["not throttled"] += not 0 < wait <= 900
        file.write_text(str(-hour + wait + 1))
        lost["throttled too long"] += client.log_in("bob").status != 200
        lost["tracebacks"] = tracebacks(server)
    lost["no login"] = int(accepted < jumps)
    seen = f"{accepted:,} of them accepted; {jumps} jumps, 5 minutes to 5 hours"
    return row("tokens used", f"memory, {worker}", tried, lost, seen)


def claims(token: str) -> dict[str, Any]:
    text = token.split(".")[1]
    padded = text + "=" * (-len(text) % 4)
    return dict(json.loads(base64.urlsafe_b64decode(padded)))


# ---- Memory: many requests -----------------------------------------------------------


def memory(is_quick: bool) -> Iterator[Row]:
    """The same requests, ten times as many: no more memory, no more files."""
    for store, worker in DEPLOYED:
        with an_empty(store) as url:
            yield used(url, store, worker, 1_000 if is_quick else 100_000)


def used(url: str, store: str, worker: str, count: int) -> Row:
    names, statuses, lost = (
        [f"user{n}" for n in range(4)],
        Counter[int](),
        Counter[str](),
    )

    def work(server: serve, number: int, total: int) -> None:
        client = Client(server.port)
        token = client.log_in(names[number]).json["refresh_token"]
        while statuses.total() < total:
            made = client("POST /todos", task="x" * 100)
            path = made.headers["location"]
            lines = ["GET /todos", "HEAD /todos", "OPTIONS /todos", "GET /users/me"]
            lines += [f"GET {path}", "GET /nowhere", "GET /openapi.json", "POST /todos"]
            lines += [f"DELETE {path}", f"GET {path}"]
            replies = [made, client(f"PUT {path}", task="y")]
            replies += [client(line) for line in lines]
            replies += [client.refresh(token), client("POST /revoke", token="junk")]
            token = replies[-2].json["refresh_token"]
            statuses.update(reply.status for reply in replies)
            progress(f"memory, {store}, {worker}: {statuses.total():,} of {count:,}")
        client.close()

    def volley(server: serve, total: int) -> tuple[float, int]:
        with crowd(4, lambda number, _: work(server, number, total)) as threads:
            for thread in threads:
                thread.join()
        return resident(server), files_at_rest(server)

    flags, settings = ["-w", "1"], {"SERVICE_ACCESS_TTL": "7200"}
    with quick_service(url, worker, names, *flags, **settings) as server:
        early, files = volley(server, count // 10)
        late, files_late = volley(server, count)
        lost["tracebacks"] = tracebacks(server)
    good = (200, 201, 204, 400, 404)
    lost["odd"] = sum(n for status, n in statuses.items() if status not in good)
    lost["files"] = max(0, files_late - files)
    lost["memory"] = int(late > early * 1.1)
    seen = f"{early:.1f} MB after a tenth, {late:.1f} MB after all; {files_late} files"
    return row("mixed requests", f"{store}, {worker}", statuses.total(), lost, seen)


def files_at_rest(server: serve) -> int:
    """How many files are open, once that has not changed for a second."""
    counts = [0]
    while len(counts) < 10 or len({*counts[-10:]}) > 1:
        time.sleep(0.1)
        counts.append(sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in server.workers))
    return counts[-1]


# ---- Failovers -----------------------------------------------------------------------


def failovers(is_quick: bool) -> Iterator[Row]:
    """The primary is killed and the standby promoted, while eight clients write."""
    for worker in WORKERS:
        progress(f"failovers, {worker}")
        with closing(Pair()) as pair, service(pair.url, worker, "-w", "2") as server:
            before = server.workers
            with Writing(server) as writing:
                writing.wait_for(50 if is_quick else 500)
                pair.fail_over()
                promoted = time.monotonic()
                writing.wait_for(50 if is_quick else 500)
            after = max(0.0, writing.last_refusal - promoted)
            lost = Counter(lost=len(writing.missing), tracebacks=tracebacks(server))
            lost["restarts"] = int(server.workers != before)
            lost["refusals late"] = int(after > 3)
        refusals = writing.statuses.total() - writing.statuses[201]
        seen = f"{refusals} times 503, the last {after:.1f} s after the promotion"
        kept = len(writing.acknowledged)
        yield row("acknowledged writes", f"postgres, {worker}", kept, lost, seen)


# ---- The run -------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[bool], Iterator[Row]]] = {
    "kills": kills,
    "ends": ends,
    "mutations": mutations,
    "large": large,
    "races": races,
    "floods": floods,
    "slow": slow,
    "disks": disks,
    "clocks": clocks,
    "memory": memory,
    "failovers": failovers,
}
_began, _section = time.monotonic(), ""


def progress(text: str, is_lasting: bool = False) -> None:
    """One line that changes on a terminal; elsewhere only what is to last."""
    text = f"{time.monotonic() - _began:4.0f} s  {text}"
    if sys.stderr.isatty():
        end = "\n" if is_lasting else ""
        print(f"\r\033[K{text[:100]}", end=end, file=sys.stderr, flush=True)
    elif is_lasting:
        print(text, file=sys.stderr, flush=True)


def table(rows: list[Row]) -> str:
    cells = [("what was tried", "where", "how often", "lost", "seen")]
    cells += [(r.what, r.where, f"{r.tried:,}", f"{r.lost:,}", r.seen) for r in rows]
    widths = [max(len(line[n]) for line in cells) for n in range(4)]
    form = "  ".join(f"{{:{width}}}" for width in widths) + "  {}"
    return "\n".join(form.format(*line) for line in cells)


def processor() -> str:
    names = re.findall("model name.*: (.+)", Path("/proc/cpuinfo").read_text())
    return f"{names[0] if names else 'unknown'}, {len(os.sched_getaffinity(0))} cores"


def main() -> int:
    global _section
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", help=" ".join(SECTIONS))
    parser.add_argument("--quick", action="store_true", help="a little of everything")
    options = parser.parse_args()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    # Whoever ends it ends its servers with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))
    rows = []
    with closing(postgres):
        for _section in options.sections or SECTIONS:
            if options.quick and _section == "failovers":
                continue  # that is what tests/test_deployment.py does
            for found in SECTIONS[_section](options.quick):
                rows.append(found)
                told = f"{found.what}, {found.where}: {found.tried:,} tried,"
                progress(f"{told} {found.lost:,} lost; {found.seen}", True)
    seconds = round(time.monotonic() - _began)
    print(f"\n{table(rows)}\n\n{seconds} s on {processor()}")
    if not options.quick and not options.sections:
        names = ("gunicorn", "gevent", "werkzeug", "psycopg")
        run = {
            "date": str(date.today()),
            "processor": processor(),
            "seconds": seconds,
            "versions": {name: version(name) for name in names if find_spec(name)},
            "rows": [found._asdict() for found in rows],
        }
        text = json.dumps(run, indent=1, ensure_ascii=False)
        (BENCH / "faults.json").write_text(f"{text}\n")
    return int(any(found.lost for found in rows))


if __name__ == "__main__":
    sys.exit(main())
