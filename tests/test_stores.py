"""What every store promises, and what only a database can do or suffer.

The same functions run on the memory store, SQLite and PostgreSQL; then come several
processes and their violent ends, outages, broken files, and what a statement costs.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    precondition,
    rule,
    run_state_machine_as_test,
)

import service
from conftest import eventually, run, serve
from test_service import CHEAP_HASH, MOUNT, PASSWORD, SECRET, User, World, together

SQL = pytest.mark.parametrize("store_url", ["sqlite", "postgres"], indirect=True)
SQLITE = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
A_FEW_SECONDS = settings(
    max_examples=40,
    stateful_step_count=25,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # to shrink what fails takes minutes on a database
    suppress_health_check=list(HealthCheck),
)


def put(store: Any, *keys: str, user: str = "alice", **value: Any) -> None:
    with store.write(user) as data:
        for key in keys:
            data["todos"][key] = value or {"task": key}


def items(store: Any, user: str = "alice", name: str = "todos") -> dict[str, Any]:
    with store.read(user) as data:
        return dict(data[name])


def sql(url: str, statement: str) -> list[Any]:
    """What a statement returns, run beside the service."""
    if url.startswith("sqlite:"):
        path = url.removeprefix("sqlite:///")
        with closing(sqlite3.connect(path, isolation_level=None)) as database:
            return database.execute(statement).fetchall()
    with psycopg.connect(url, autocommit=True) as connection:
        cursor = connection.execute(statement.encode())
        return cursor.fetchall() if cursor.description else []


# ---- The contract -------------------------------------------------------------------


def test_keys_come_in_the_order_of_their_creation(store):
    put(store, "b", "a", "c")
    put(store, "0")
    put(store, "a", task="overwritten")  # it keeps its place
    assert list(items(store)) == ["b", "a", "c", "0"]
    with store.write("alice") as data:
        del data["todos"]["b"]
    put(store, "b")
    assert list(items(store)) == ["a", "c", "0", "b"]
    assert items(store)["a"] == {"task": "overwritten"}


def test_keys_and_values_are_of_any_script(store):
    texts = ["ключ", "键", "🗝️", "e\u0301", "é", "'; DROP TABLE items; --", "%s", "\\"]
    for text in texts:
        put(store, text, **{text: [text, {text: text}]})
    assert items(store) == {text: {text: [text, {text: text}]} for text in texts}
    assert list(items(store)) == texts
    odd = {"a": None, "b": [True, False, 0, -1, 1.5, 1e300, 2**70, "", [], {}, "\0"]}
    put(store, "odd", **odd)
    assert json.dumps(items(store)["odd"]) == json.dumps(odd)


@pytest.mark.parametrize("error", [LookupError, KeyboardInterrupt, ValueError])
def test_a_block_that_raises_leaves_nothing_behind(store, error):
    put(store, "a", "b")
    with store.write("alice") as data:
        data["sessions"]["s"] = {"gen": 1}
    before = store.read("alice")
    for user in ("alice", "new"):
        with pytest.raises(error), store.write(user) as data:
            data["todos"]["a"] = {"task": "changed"}
            data["todos"]["c"] = {"what": b"JSON cannot hold"}  # a ValueError
            data["todos"].pop("b", None)
            data["notes"]["n"] = {}
            data["account"]["hash"] = "changed"
            data["sessions"].setdefault("s", {})["gen"] = 2
            if error is not ValueError:
                raise error
        with pytest.raises(error), store.write(user) as data:
            data.clear()
            raise error
    assert store.read("alice") == before
    assert store.read("new") == store.read("nobody")


def test_what_was_read_is_a_value_of_its_own(store):
    with store.write("alice") as data:
        data["account"]["roles"] = ["operator"]
        data["todos"]["a"] = {"tags": ["x"]}
    before = store.read("alice")
    put(store, "a", "b", tags=["changed"])
    with store.write("alice") as data:
        data["account"]["roles"] = []
    assert dict(before["todos"]) == {"a": {"tags": ["x"]}}
    assert before["account"] == {"roles": ["operator"]}
    value: dict[str, Any] = {"tags": ["x"]}
    put(store, "a", **value)
    value["tags"].append("not written")
    items(store)["a"]["tags"].append("not written either")
    assert items(store)["a"] == {"tags": ["x"]}


def test_nobody_sees_a_write_before_its_block_ends(store):
    put(store, "a")
    seen: list[list[str]] = []
    reader = threading.Thread(target=lambda: seen.append(list(items(store))))
    with store.write("alice") as data:
        data["todos"]["b"] = {}
        reader.start()
        reader.join(timeout=0.2)  # it is through, or waits for this block to end
        assert seen in ([], [["a"]])
        del data["todos"]["b"]
    reader.join()
    assert seen == [["a"]]


def second(store: Any, url: str) -> Any:
    """The same data as another process has it."""
    return store if url == "memory:" else service.open_store(url)


def test_one_users_writes_come_one_after_the_other(store, store_url):
    stores = [store, second(store, store_url)]

    def count(number):
        for _ in range(10):
            with stores[number % 2].write("alice") as data:
                last = data["account"].get("last", 0)
                time.sleep(0)  # a chance for the others
                data["account"]["last"] = last + 1
                data["todos"][f"todo{last}"] = {"by": number}

    together(8, count)
    assert store.read("alice")["account"] == {"last": 80}
    assert list(items(store)) == [f"todo{n}" for n in range(80)]


class StoreAgainstDict(RuleBasedStateMachine):
    """A store, and a plain dict that is told the same."""

    store: Any
    USERS = st.sampled_from(["a_b", "a%b", "a b"])
    NAMES = st.sampled_from(["todos", "notes"])
    KEYS = st.sampled_from("abcd")
    VALUES = st.dictionaries(st.text(max_size=3), st.none() | st.integers(), max_size=2)
    CHANGES = st.lists(st.tuples(NAMES, KEYS, st.none() | VALUES))

    def __init__(self) -> None:
        super().__init__()
        self.run = os.urandom(6).hex()  # nobody of an earlier run
        self.model: dict[tuple[str, str], dict[str, Any]] = {}
        self.changes: dict[str, int] = Counter()

    @rule(user=USERS, changes=CHANGES, fails=st.booleans())
    def write(self, user: str, changes: list[Any], fails: bool) -> None:
        model = {key: dict(value) for key, value in self.model.items()}
        try:
            with self.store.write(user + self.run) as data:
                for name, key, value in changes:
                    mine = model.setdefault((user, name), {})
                    assert data[name].get(key) == mine.get(key)
                    if value is None:
                        assert (data[name].pop(key, None)) == mine.pop(key, None)
                    else:
                        data[name][key] = mine[key] = value
                    assert list(data[name].items()) == list(mine.items())
                data["account"]["n"] = self.changes[user] + len(changes)
                if fails:
                    raise InterruptedError
        except InterruptedError:
            return
        for key, new in model.items():  # what was there before keeps its place
            old = self.model.get(key, {})
            self.model[key] = {id: new[id] for id in old if id in new} | new
        self.changes[user] += len(changes)

    @rule(user=USERS)
    def clear(self, user: str) -> None:
        with self.store.write(user + self.run) as data:
            data.clear()
        self.model = {key: had for key, had in self.model.items() if key[0] != user}
        self.changes[user] = 0

    @rule(user=USERS, name=NAMES)
    def read(self, user: str, name: str) -> None:
        data = self.store.read(user + self.run)
        mine = self.model.get((user, name), {})
        assert list(data[name].items()) == list(mine.items())
        assert data["account"].get("n", 0) == self.changes[user]


def test_a_store_does_what_a_plain_dict_does(store):
    machine = type("Machine", (StoreAgainstDict,), {"store": store})
    run_state_machine_as_test(machine, settings=A_FEW_SECONDS)


# ---- The views that lean on it ------------------------------------------------------


@pytest.fixture
def worlds(store, store_url):
    """Two processes, as it were, over one store."""
    first = World(store=store)
    return [first, World(store=second(store, store_url), clock=first.clock)]


def at(worlds: list[World], number: int, user: User) -> User:
    """The same user at one of these worlds."""
    return User(worlds[number % len(worlds)], user.name, user.pair)


def test_fifty_posts_at_once_give_fifty_ids(worlds):
    alice = worlds[0].user()

    def post(number):
        answer = at(worlds, number, alice)("POST /todos", {"task": str(number)})
        return str(answer.headers["Location"])

    found = together(50, post)
    assert set(found) == {f"{MOUNT}/todos/todo{n}" for n in range(4, 54)}
    assert list(alice("GET /todos").json) == [f"todo{n}" for n in range(1, 54)]


def test_of_sixteen_writers_with_one_etag_one_wins(worlds):
    alice = worlds[0].user()
    for _ in range(3):
        tag = alice("GET /todos/todo1").headers["ETag"]

        def write(number, tag=tag):
            user, task = at(worlds, number, alice), {"task": os.urandom(4).hex()}
            return user("PUT /todos/todo1", task, if_match=tag).status

        assert Counter(together(16, write)) == {201: 1, 412: 15}


def test_refreshes_at_once_give_one_successor_that_works(worlds):
    alice = worlds[0].user()
    for _ in range(3):
        renewed = together(16, lambda n: at(worlds, n, alice).refresh())  # noqa: B023
        assert len({user.refresh_token for user in renewed}) == 1
        assert all(user.is_in for user in renewed)
        assert renewed[0].refresh_token != alice.refresh_token
        alice = renewed[0]

    def refresh_or_log_out(number):
        world = worlds[number % 2]
        if number:
            world.refresh(alice.refresh_token)
        else:
            world("POST /revoke", form={"token": alice.refresh_token})

    together(8, refresh_or_log_out)
    assert not alice.is_in  # the logout stands


def test_a_cursor_outlives_its_item_and_a_restart(worlds):
    alice = worlds[0].user()
    link = alice("GET /todos?limit=2").headers["Link"]
    page = re.findall(f"<{MOUNT}(.*)>", link)[0]
    assert list(alice(f"GET {page}").json) == ["todo3"]
    for id in ("todo1", "todo2"):
        alice(f"DELETE /todos/{id}")
    alice("PUT /todos/todo2", {"task": "made again, so it is new"})
    assert list(at(worlds, 1, alice)(f"GET {page}").json) == ["todo3", "todo2"]
    created = at(worlds, 1, alice)("POST /todos", {"task": "x"})
    assert created.headers["Location"] == f"{MOUNT}/todos/todo4"


@SQL
def test_a_restart_keeps_all(store, store_url):
    before = World(store=store)
    alice = before.user("alice", roles=["operator"])
    alice("POST /todos", {"task": "kept"})
    other = before.user("other")
    other("DELETE /users/me", {"password": PASSWORD})
    after = World(store=service.open_store(store_url), clock=before.clock)
    assert at([after], 0, alice)("GET /todos/todo4").json == {"task": "kept"}
    renewed = at([after], 0, alice).refresh()
    assert renewed("GET /users/me").json["roles"] == ["operator"]
    assert alice.refresh().refresh_token == renewed.refresh_token
    form = {"username": "other", "password": PASSWORD}
    assert after("POST /users", form).status == 409  # a name is never given again


class Sessions(RuleBasedStateMachine):
    """Logins, refreshes with any token there ever was, logouts, steps of the clock."""

    tokens: Bundle[Any] = Bundle("tokens")

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        service.add_account(self.world.app, "alice", CHEAP_HASH)
        self.sessions: list[dict[str, Any]] = []

    def lives(self, session: dict[str, Any]) -> bool:
        now = self.world.clock.now
        return bool(session["is_open"]) and now < session["started_at"] + 86_400

    def note(self, session: dict[str, Any], pair: dict[str, Any]) -> Any:
        return session, len(session["texts"]) - 1, self.world.clock.now, pair

    @precondition(lambda self: len(self.sessions) < 20)
    @rule(target=tokens)
    def log_in(self) -> Any:
        pair, now = self.world.log_in("alice").pair, self.world.clock.now
        texts = [pair["refresh_token"]]
        session = {
            "is_open": True,
            "started_at": now,
            "rotated_at": now,
            "texts": texts,
        }
        self.sessions.append(session)
        return self.note(session, pair)

    @rule(target=tokens, token=tokens)
    def refresh(self, token: Any) -> Any:
        session, generation, _, pair = token
        answer, now = self.world.refresh(pair["refresh_token"]), self.world.clock.now
        age = len(session["texts"]) - 1 - generation
        is_forgiven = age == 1 and now - session["rotated_at"] <= 30
        if not self.lives(session) or not (age == 0 or is_forgiven):
            session["is_open"] = False
            assert (answer.status, answer.json["error"]) == (400, "invalid_grant")
            return token
        assert answer.status == 200
        if age == 0:
            assert answer.json["refresh_token"] not in session["texts"]
            session["texts"].append(answer.json["refresh_token"])
            session["rotated_at"] = now
        assert answer.json["refresh_token"] == session["texts"][-1]
        left = session["started_at"] + 86_400 - now
        assert answer.json["refresh_expires_in"] == left
        assert answer.json["expires_in"] == min(900, left)
        return self.note(session, answer.json)

    @rule(token=tokens, kind=st.sampled_from(["access_token", "refresh_token"]))
    def revoke(self, token: Any, kind: str) -> None:
        session, _, _, pair = token
        assert self.world("POST /revoke", form={"token": pair[kind]}).json == {}
        session["is_open"] = False

    @rule(seconds=st.sampled_from([1, 10, 30, 31, 600, 899, 900, 7200, 86_399]))
    def wait(self, seconds: int) -> None:
        self.world.clock.step(seconds)

    @rule(token=tokens)
    def use(self, token: Any) -> None:
        session, _, made_at, pair = token
        is_in = User(self.world, "alice", pair).is_in
        is_fresh = self.world.clock.now < made_at + pair["expires_in"]
        assert is_in == (self.lives(session) and is_fresh)


def test_a_session_lives_a_day_and_never_twice():
    run_state_machine_as_test(Sessions, settings=A_FEW_SECONDS)


# ---- Several processes, and their violent ends --------------------------------------


def environ(url: str, **more: str) -> dict[str, str]:
    given = {"STORE_URL": url, "SECRET_KEY": SECRET, "MAX_ITEMS": "999999"} | more
    return {f"SERVICE_{name}": text for name, text in given.items()}


FORKS = """
import os, sys, service
store = service.open_store(sys.argv[1])

def write(name, count):
    for n in range(count):
        with store.write("alice") as data:
            data["account"]["n"] = data["account"].get("n", 0) + 1
            data["todos"][f"{name}{n}"] = {"by": name}
        store.read("alice")

write("before", 1)
children = []
for number in range(4):
    if not (child := os.fork()):
        write(f"child{number}-", 20)
        os._exit(0)
    children.append(child)
write("parent", 20)
print([os.waitpid(child, 0)[1] for child in children], store.read("alice")["account"])
"""


@SQL
def test_a_fork_shares_no_connection(store, store_url):
    status, said = run(sys.executable, "-c", FORKS, store_url)
    assert (status, said) == (0, "[0, 0, 0, 0] {'n': 101}\n")
    assert len(items(store)) == 101


@SQL
def test_eight_processes_may_start_at_once(store, store_url):
    starter = (
        "import service, sys; store = service.open_store(sys.argv[1])\n"
        "with store.write(sys.argv[2]) as data: data['todos']['a'] = {}"
    )
    command = (sys.executable, "-c", starter, store_url)
    assert together(8, lambda n: run(*command, f"user{n}")) == [(0, "")] * 8
    assert [items(store, f"user{n}") for n in range(8)] == [{"a": {}}] * 8


class Writers:
    """Four clients that create items and read them back as fast as they can.

    A class, since it keeps count: of the statuses (0: no answer), and of what was
    acknowledged.
    """

    def __init__(self, server: serve, token: str) -> None:
        self.server, self.token = server, token
        self.acknowledged: dict[str, str] = {}
        self.statuses, self.faults = Counter[int](), list[str]()
        self._is_over = threading.Event()
        self._threads = [threading.Thread(target=self._work) for _ in range(4)]

    def __enter__(self) -> Writers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._is_over.set()
        for thread in self._threads:
            thread.join()

    def _work(self) -> None:
        while not self._is_over.is_set():
            task = os.urandom(12).hex()
            created = self.server("POST /todos", self.token, task=task)
            self.statuses[created.status] += 1
            if created.status != 201:
                self._is_over.wait(0.01)
                continue
            location = created.headers["Location"]
            if self.acknowledged.setdefault(location, task) != task:
                self.faults.append(f"{location} was given twice")
            read = self.server(f"GET {location}", self.token)
            self.statuses[read.status] += 1
            if read.status == 200 and read.json != {"task": task}:
                self.faults.append(f"{location} {task}: {read}")

    def wait_for(self, count: int, *statuses: int) -> None:
        """Until there have been so many more answers of these statuses."""
        aim = count + sum(self.statuses[status] for status in statuses)
        eventually(lambda: sum(self.statuses[each] for each in statuses) >= aim, 30)


def assert_kept(server: serve, token: str, acknowledged: dict[str, str]) -> None:
    """Everything acknowledged is there, and nothing twice."""
    there, page = dict[str, str](), "/todos"
    while page:
        answer = server(f"GET {page}", token)
        there |= {f"/todos/{id}": item["task"] for id, item in answer.json.items()}
        link = answer.headers.get("Link", "")
        page = link[link.find("<") + 1 : link.find(">")] if link else ""
    assert acknowledged.items() <= there.items()
    assert len(set(there.values())) == len(there)


@pytest.mark.parametrize(
    ("store_url", "kind"),
    [("sqlite", "gthread"), ("postgres", "gevent")],
    indirect=["store_url"],
)
def test_kill_9_loses_nothing_that_was_acknowledged(store_url, kind):
    flags = ("-k", kind, "-w", "3")
    with serve(*flags, **environ(store_url)) as server:
        token = server.user("alice")
        with Writers(server, token) as writers:
            for _ in range(4):
                writers.wait_for(30, 201)
                os.kill(random.choice(server.workers), signal.SIGKILL)
            writers.wait_for(30, 201)
            os.killpg(server.process.pid, signal.SIGKILL)
            writers.wait_for(4, 0)
        assert {*writers.statuses} <= {200, 201, 503, 0}
        assert writers.faults == []
        assert "Traceback" not in server.log
    with serve("-k", kind, "-w", "1", **environ(store_url)) as server:
        assert_kept(server, token, writers.acknowledged)


@pytest.mark.parametrize("kind", ["gthread", "gevent"])
def test_an_outage_is_503_and_then_all_goes_on(postgres, kind):
    name = f"outage_{kind}"
    sql(postgres.url, f"CREATE DATABASE {name}")
    url = postgres.url.replace("/postgres?", f"/{name}?")
    with serve("-k", kind, "-w", "2", **environ(url)) as server:
        token = server.user("alice")
        with Writers(server, token) as writers:
            for how in ("INT", "QUIT"):  # stopped, crashed
                writers.wait_for(30, 201)
                postgres.stop(how)
                try:
                    began = time.monotonic()
                    away = server("GET /health")
                    assert (away.status, time.monotonic() - began < 2) == (503, True)
                    assert int(away.headers["Retry-After"]) >= 1
                    writers.wait_for(10, 503)
                finally:
                    postgres.start()
                eventually(lambda: server("GET /todos/todo1", token).status == 200, 5)
            writers.wait_for(30, 201)
        assert {*writers.statuses} <= {200, 201, 503}
        assert writers.faults == []
        assert "Traceback" not in server.log
        assert_kept(server, token, writers.acknowledged)


def test_a_database_may_start_late_and_anew_at_any_time(postgres):
    sql(postgres.url, "CREATE DATABASE later")
    postgres.stop()
    try:
        url = postgres.url.replace("/postgres?", "/later?")
        world = World(store=service.open_store(url))
        assert world("GET /health").status == 503
    finally:
        postgres.start()
    eventually(lambda: world("GET /health").status == 200, 5)
    alice = world.user()
    together(4, lambda n: alice("GET /todos"))  # so that some connections wait
    postgres.stop("QUIT")
    postgres.start()
    for _ in range(4):
        assert alice("POST /todos", {"task": "x"}).status == 201


def test_a_database_that_accepts_and_then_says_nothing_is_503():
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"postgresql://todo@127.0.0.1:{mute.getsockname()[1]}/todo"
        answer = World(store=service.open_store(url))("GET /health")
    assert (answer.status, list(answer.json)) == (503, ["message"])


def test_a_transaction_that_is_cut_off_leaves_nothing(postgres_url):
    cut_off = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE state = 'idle in transaction' AND datname = current_database()"
    )

    def interrupted(request):
        with request.app.store.write(request.user) as data:
            data["todos"]["half"] = {"task": "half"}
            if request.args:
                assert sql(postgres_url, cut_off) == [(True,)]
            data["todos"]["other"] = {"task": "other half"}

    route = service.Route("POST /interrupted", interrupted)
    world = World(store=service.open_store(postgres_url), routes=[route])
    alice = world.user()
    assert alice("POST /interrupted?now=1").status == 503
    assert list(alice("GET /todos").json) == ["todo1", "todo2", "todo3"]
    assert alice("POST /interrupted").status == 200
    assert list(alice("GET /todos").json)[3:] == ["half", "other"]


def test_when_all_connections_are_taken_there_is_503(postgres_url):
    alice = World(store=service.open_store(postgres_url)).user()
    assert {*together(40, lambda n: alice("GET /todos/todo1").status)} == {200}
    with ExitStack() as busy:
        for n in range(15):
            busy.enter_context(alice.world.store.write(f"user{n}"))
        assert alice("GET /todos/todo1").status == 503
    assert alice("GET /todos/todo1").status == 200


# ---- Broken rows, files and rights --------------------------------------------------


@SQL
@pytest.mark.parametrize("row", ["document", "value"])
def test_a_row_that_is_no_json_is_503_and_one_line_until_it_is_mended(
    store, store_url, row, caplog
):
    alice = World(store=store).user()
    spoil = {
        "document": "UPDATE users SET document = '{}' || document WHERE name = 'alice'",
        "value": "UPDATE items SET value = '{}' || value WHERE owner = 'alice'",
    }[row]
    sql(store_url, spoil)
    caplog.clear()
    broken = alice("GET /todos/todo1")
    assert (broken.status, list(broken.json)) == (503, ["message"])
    assert len(caplog.records) == 1
    assert "\n" not in caplog.text.strip()
    sql(store_url, spoil.replace(f"'{{}}' || {row}", f"substr({row}, 3)"))
    assert alice("GET /todos/todo1").json == {"task": "build an API"}


@SQLITE
def test_a_deleted_file_is_503_until_it_is_back(store, store_url):
    path = Path(store_url.removeprefix("sqlite:///"))
    alice = World(store=store).user()
    away = path.with_name("away")
    away.mkdir()
    for each in path.parent.glob("todo.db*"):
        each.rename(away / each.name)
    assert alice("PUT /todos/x", {"task": "into nothing"}).status == 503
    assert alice("GET /todos/todo1").status == 503
    assert alice.world("GET /health").status == 503
    for each in path.parent.glob("todo.db*"):
        each.unlink()
    for each in away.iterdir():
        each.rename(path.with_name(each.name))
    assert alice("PUT /todos/x", {"task": "kept"}).status == 201
    assert items(service.open_store(store_url))["x"] == {"task": "kept"}


@SQLITE
def test_a_locked_file_is_503_for_writers_and_no_matter_for_readers(
    store, store_url, connections
):
    alice = World(store=store).user()

    def hurry():
        for connection in connections:
            with suppress(sqlite3.ProgrammingError):  # it was closed
                connection.execute("PRAGMA busy_timeout = 50")  # not our 10 s

    with closing(sqlite3.connect(store_url[10:], isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        hurry()
        assert alice("POST /todos", {"task": "x"}).status == 503
        assert alice("GET /todos/todo3").json == {"task": "profit!"}
        hurry()
        assert alice.world("GET /health").status == 503  # it tells of writing too
    created = alice("POST /todos", {"task": "x"})
    assert created.headers["Location"] == f"{MOUNT}/todos/todo4"


@SQLITE
def test_a_commit_is_synced_to_the_disk_and_the_file_is_its_owners_alone(
    store, store_url, connections
):
    path = Path(store_url.removeprefix("sqlite:///"))
    assert not path.exists()  # nothing is made before the first use
    put(store, "a")
    assert connections[-1].execute("PRAGMA journal_mode").fetchone() == ("wal",)
    # FULL, for the power may fail; kill -9 alone would not show the difference.
    assert connections[-1].execute("PRAGMA synchronous").fetchone() == (2,)
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_file_that_is_no_database_is_503(tmp_path):
    (tmp_path / "text.db").write_text("no database " * 1000)
    world = World(store=service.open_store(f"sqlite:///{tmp_path}/text.db"))
    assert (
        world("POST /users", form={"username": "a", "password": PASSWORD}).status == 503
    )
    assert world("GET /health").status == 503


URLS = """
postgresql://todo:hunter2@127.0.0.1:1/todo
postgresql://todo@127.0.0.1:1/todo?password=hunter2
postgresql://todo:hunter2
postgresql://todo:p@hunter2@127.0.0.1:1/todo
postgresql://todo:hunter2@127.0.0.1:1/todo?sslmod=require
"""


@pytest.mark.parametrize("url", URLS.split())
def test_no_secret_of_a_url_is_told_anybody(url, caplog):
    caplog.set_level("DEBUG")
    told = repr(service.Settings(secret_key=SECRET, store_url=url))
    try:
        store = service.open_store(url)
        told += repr(store) + World(store=store)("GET /health").text
    except ValueError as error:
        told += str(error)
        assert "SERVICE_STORE_URL" in told
    assert "hunter2" not in told + caplog.text


# ---- What it costs ------------------------------------------------------------------


class Trace:
    """What psycopg sends and receives, by libpq's own trace: a line a message."""

    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path, self.connections = path, list[Any]()
        path.touch()
        connect = psycopg.connect

        def traced(*given: Any, **options: Any) -> Any:
            self.connections.append(connect(*given, **options))
            self.read()
            return self.connections[-1]

        monkeypatch.setattr(psycopg, "connect", traced)

    def read(self) -> str:
        for connection in self.connections:
            connection.pgconn.untrace()  # which writes what was still held back
            connection.pgconn.trace(os.open(self.path, os.O_WRONLY | os.O_APPEND))
        return self.path.read_text()

    def cost(self, work: Callable[[], Any]) -> tuple[int, int]:
        """How often it waits for the server, and how many bytes come back."""
        before = len(self.read())
        work()
        found = re.findall(r"(?m)^\S+ \S+\t([FB])\t(\d+)", self.read()[before:])
        waits = sum((a, b) == ("F", "B") for (a, _), (b, _) in pairwise(found))
        return waits, sum(int(size) for way, size in found if way == "B")

    def statements(self) -> set[str]:
        parsed = r'(?m)\tParse\t "\w*" "(.+)" \d[\d ]*$|\tQuery\t "(.+)"$'
        return {"".join(both) for both in re.findall(parsed, self.read())}


COSTS = [
    # a request, its body, and the most round trips that it may cost
    ("GET /todos/todo1", None, 2),
    ("GET /todos?limit=10", None, 2),
    ("GET /todos/no", None, 2),
    ("GET /users/me", None, 2),
    ("POST /todos", {"task": "x"}, 4),
    ("PUT /todos/new", {"task": "x"}, 4),
    ("PUT /todos/new", {"task": "y"}, 4),
    ("PATCH /todos/new", {"task": "z"}, 4),
    ("DELETE /todos/new", None, 4),
    ("POST /token", None, 4),
]


def test_a_get_costs_two_round_trips_and_a_post_four_however_much_is_there(
    postgres_url, tmp_path, monkeypatch
):
    trace = Trace(tmp_path / "trace", monkeypatch)
    world = World(store=service.open_store(postgres_url), max_items=99_999)
    users = {name: world.user(name) for name in ("few", "many")}
    with world.store.write("many") as data:
        for n in range(3000):
            data["todos"][f"old{n}"] = {"task": "x"}
    sql(postgres_url, "ANALYZE")
    for is_warm in (False,) * 6 + (True,):  # psycopg prepares what comes often
        for line, body, most in COSTS:
            costs = {}
            for name, user in users.items():
                send = user.refresh if "token" in line else partial(user, line, body)
                costs[name] = trace.cost(send)
            if is_warm:
                few, many = costs["few"], costs["many"]
                assert 0 < few[0] == many[0] <= most, (line, costs)
                assert many[1] < few[1] + 300 or "limit" in line, (line, costs)
    named, wary = 0, "-c enable_seqscan=off"  # so that few rows are no reason for one
    with psycopg.connect(postgres_url, options=wary) as explaining:
        for statement in trace.statements():
            tables = re.findall(r"(FROM|UPDATE|INTO) (users|items)\b", statement)
            owner = r"WHERE (owner|name) = \$\d|INTO \w+ \((owner|name), "
            assert len(re.findall(owner, statement)) == len(tables), statement
            if tables:
                explain = f"EXPLAIN (GENERIC_PLAN) {statement}".encode()
                plan = str(explaining.execute(explain).fetchall())
                assert "Seq Scan" not in plan, (statement, plan)
                named += 1
    assert named >= 5
