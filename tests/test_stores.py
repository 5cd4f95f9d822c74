"""What every store promises, and what only a database can do or suffer.

The same functions run on the memory store, SQLite and PostgreSQL; then come several
processes and their violent ends, outages, broken files, and what a statement costs.
"""

import copy
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import sqlite3
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

import psycopg
import pytest
from hypothesis import Phase, settings, stateful
from hypothesis import strategies as st
from test_deployment import Writing, execute, service_over
from werkzeug.exceptions import ServiceUnavailable

import service
from conftest import eventually, run
from test_service import (
    DAY,
    MOUNT,
    PASSWORD,
    TASK,
    User,
    World,
    cases,
    change_password,
    delete_account,
    each,
    events,
    log_out,
    logged_in,
    refreshed,
    together,
)

SQL = pytest.mark.parametrize("store_url", ["sqlite", "postgres"], indirect=True)
SQLITE = pytest.mark.parametrize("store_url", ["sqlite"], indirect=True)
A_FEW_SECONDS = settings(
    settings.get_profile("ci"),  # without deadline and database
    derandomize=False,
    max_examples=40,
    stateful_step_count=25,
    phases=[Phase.generate],  # to shrink what fails takes minutes on a database
)


def put(store: Any, key: str) -> None:
    with store.write("alice") as data:
        data["todos"][key] = {"task": key}


def items(store: Any) -> dict[str, Any]:
    return dict(store.read("alice")["todos"])


def sql(url: str, statement: str) -> list[Any]:
    """What a statement returns, run beside the service."""
    if not url.startswith("sqlite:"):
        return execute(url, statement)
    with closing(sqlite3.connect(url[10:], isolation_level=None)) as database:
        return database.execute(statement).fetchall()


# ---- The contract -------------------------------------------------------------------


def test_what_was_read_is_a_value_of_its_own(store):
    value = {"tags": ["x"]}
    with store.write("alice") as data:
        data["account"]["roles"] = ["operator"]
        data["todos"]["a"] = value
    value["tags"].append("not written")
    items(store)["a"]["tags"].append("not written either")
    before = store.read("alice")
    put(store, "b")
    with store.write("alice") as data:
        data["account"]["roles"].clear()
        data["todos"]["a"]["tags"].clear()
    assert dict(before["todos"]) == {"a": {"tags": ["x"]}}
    assert before["account"] == {"roles": ["operator"]}


def test_nobody_sees_a_write_before_its_block_ends(store):
    put(store, "a")
    seen = []
    reader = threading.Thread(target=lambda: seen.append(list(items(store))))
    with store.write("alice") as data:
        data["todos"]["b"] = {}
        reader.start()
        reader.join(timeout=0.2)  # it is through, or waits for this block to end
        assert seen in ([], [["a"]])
        del data["todos"]["b"]
    reader.join()
    assert seen == [["a"]]


@each("value", ["text", None, ["a list"], {"task": "\ud800"}])
def test_a_block_keeps_nothing_that_could_not_be_read_again(store, value):
    put(store, "a")
    with pytest.raises((TypeError, ValueError)), store.write("alice") as data:
        data["account"]["hash"] = "y"
        data["todos"]["b"] = value
    assert (list(items(store)), store.read("alice")["account"]) == (["a"], {})


def test_what_is_cleared_and_written_as_it_was_is_kept(store):
    for _ in range(2):
        with store.write("alice", service.NO_ITEMS) as data:
            data.clear()
            data["account"] = {"hash": None}
    assert store.read("alice")["account"] == {"hash": None}


@each("error", [sqlite3.IntegrityError, psycopg.IntegrityError])
def test_a_block_may_use_a_database_of_its_own(store, error):
    for _ in range(20):
        with pytest.raises(error), store.write("alice") as data:
            data["todos"]["b"] = {}
            raise error("of another table")
    assert items(store) == {}


def test_a_page_ends_at_its_limit_or_past_a_megabyte_and_the_next_goes_on(store):
    with store.write("alice") as data:
        for n in range(25):
            data["todos"][f"id{n}"] = {"task": "é" * 50_000}
            data["notes"][f"id{n}"] = {}
    assert len(items(store)) == 25  # as nobody asked for a page
    one = store.read("alice", service.Query("todos", "id7"))
    assert (list(one["todos"]), list(one["notes"])) == (["id7"], [])
    for limit, sizes in ((10**9, [10, 10, 5]), (10, [10, 10, 5]), (9, [9, 9, 7])):
        after, ids = 0, []
        for size in sizes:
            query = service.Query("todos", "", after, limit)
            page = store.read("alice", query)["todos"]
            later = store.read("alice", service.NO_ITEMS)
            assert not later["todos"]
            later.fetch(query)
            with store.write("alice", query) as data:
                for same in (later["todos"], data["todos"]):
                    assert (list(same), same.next) == (list(page), page.next)
            assert len(page) == size
            ids += page
            after = page.next
        assert (after, ids) == (None, list(items(store)))


def test_writes_that_come_at_once_come_one_after_the_other(store):
    for owner in ("cold", "warm", "warmer"):

        def write(number, owner=owner):
            with store.write(owner) as data:
                count = data["account"].get("count", 0)
                time.sleep(0)  # a chance for the others
                data["account"]["count"] = count + 1
                data["todos"][str(count)] = {}

        together(8, write)
        assert list(store.read(owner)["todos"]) == list("01234567")


def test_a_read_is_of_one_moment(store):
    keys = [f"id{n}" for n in range(200)]

    def work(number):
        for turn in range(20):
            if number == 0:
                with store.write("alice") as data:
                    data["account"] = {"turn": turn}
                    data["todos"] |= {key: {"turn": turn} for key in keys}
            else:
                data = store.read("alice")
                parts = [data["account"], *data["todos"].values()]
                assert parts == [data["account"]] * (201 if data["account"] else 1)

    together(3, work)


class StoreAgainstDict(stateful.RuleBasedStateMachine):
    """A store, and plain dicts that are told the same; or both fail."""

    store: Any
    USERS = st.sampled_from(["a_b", "a%b", "a b"])
    NAMES = st.sampled_from(["todos", "notes"])
    KEYS = st.sampled_from(["a", "b", "ключ", "🗝️", "e\u0301", "é", "';--", "%s", "\\"])
    JSON = st.none() | st.booleans() | st.integers() | st.floats(-1, 1e300) | st.text()
    VALUES = st.dictionaries(st.text(), JSON | st.lists(JSON, max_size=2), max_size=2)
    CHANGES = st.lists(st.tuples(NAMES, KEYS, st.none() | VALUES))
    ERRORS = st.sampled_from([None, None, KeyboardInterrupt, ValueError])
    NOTHING: ClassVar = {"account": {}, "todos": {}, "notes": {}}

    def __init__(self) -> None:
        super().__init__()
        self.run = os.urandom(6).hex()  # nobody of an earlier run
        self.models: dict[str, dict[str, Any]] = {}

    @stateful.rule(user=USERS, clears=st.booleans(), changes=CHANGES, error=ERRORS)
    def write(self, user: str, clears: bool, changes: list[Any], error: Any) -> None:
        had = self.NOTHING if clears else self.models.get(user, self.NOTHING)
        model = copy.deepcopy(had)
        outcome = pytest.raises(error) if error else nullcontext()
        with outcome, self.store.write(user + self.run) as data:
            if clears:
                data.clear()
                data.fetch(service.EVERYTHING)
                assert not any(data.values())  # nothing comes back
            for name, key, value in changes:
                if value is None:
                    assert data[name].pop(key, None) == model[name].pop(key, None)
                else:
                    data[name][key] = model[name][key] = value
                assert json.dumps(data[name]) == json.dumps(model[name])
            data["account"]["n"] = model["account"]["n"] = len(changes)
            if error is ValueError:
                data["todos"]["z"] = {"z": b"what JSON cannot hold"}
            elif error:
                raise error
        if not error:  # what was there before keeps its place
            for name, new in model.items():
                model[name] = {id: new[id] for id in had[name] if id in new} | new
            self.models[user] = model

    @stateful.rule(user=USERS)
    def read(self, user: str) -> None:
        data = self.store.read(user + self.run)
        for name, model in self.models.get(user, self.NOTHING).items():
            assert json.dumps(data[name]) == json.dumps(model)


def test_a_store_does_what_a_plain_dict_does(store):
    machine = type("Machine", (StoreAgainstDict,), {"store": store})
    stateful.run_state_machine_as_test(machine, settings=A_FEW_SECONDS)


# ---- The views that lean on it ------------------------------------------------------


@pytest.fixture
def alices(store, store_url):
    """One session at two processes, as it were: two apps over the same data."""
    alice = World(store=store).user()
    twin = store if store_url == "memory:" else service.open_store(store_url)
    return [alice, User(World(twin, alice.world.clock), "alice", alice.pair)]


def test_fifty_posts_at_once_give_fifty_ids_that_are_read_at_once(alices):
    def post(number):
        task = {"task": str(number)}
        answer = alices[number % 2]("POST /todos", task)
        path = answer.headers["Location"].removeprefix(MOUNT)
        assert alices[(number + 1) % 2](f"GET {path}").json == task
        return path

    assert set(together(50, post)) == {f"/todos/todo{n}" for n in range(4, 54)}
    assert list(alices[0]("GET /todos").json) == [f"todo{n}" for n in range(1, 54)]


def test_of_sixteen_writers_with_one_etag_one_wins(alices):
    for _ in range(3):
        tag = alices[0]("GET /todos/todo1").headers["ETag"]

        def write(number, tag=tag):
            task = {"task": os.urandom(4).hex()}
            return alices[number % 2]("PUT /todos/todo1", task, if_match=tag).status

        assert Counter(together(16, write)) == {201: 1, 412: 15}


def test_refreshes_at_once_give_one_successor_that_works(alices):
    for _ in range(3):
        renewed = together(16, lambda n: alices[n % 2].refresh())  # noqa: B023
        assert len({user.refresh_token for user in renewed}) == 1
        assert all(user.is_in for user in renewed)
        assert renewed[0].refresh_token != alices[0].refresh_token
        alices = renewed[:2]

    def refresh_or_log_out(number):
        world, token = alices[number % 2].world, alices[0].refresh_token
        if number == 0:
            return world("POST /revoke", {"token": token})
        return world.refresh(token)

    together(8, refresh_or_log_out)
    assert not alices[0].is_in  # the logout stands


def test_a_restart_keeps_all_and_a_cursor_outlives_its_item(alices):
    before, after = alices
    before.world.user("clerk", roles=["clerk"])
    before.world.user("gone")("DELETE /users/me", {"password": PASSWORD})
    link = before("GET /todos?limit=2").headers["Link"]
    page = re.findall(f"<{MOUNT}(.*)>", link)[0]
    assert list(before(f"GET {page}").json) == ["todo3"]
    for id in ("todo1", "todo2"):
        before(f"DELETE /todos/{id}")
    before("PUT /todos/todo2", {"task": "made again, so it is new"})
    assert list(after(f"GET {page}").json) == ["todo3", "todo2"]
    created = after("POST /todos", {"task": "x"})
    assert created.headers["Location"] == f"{MOUNT}/todos/todo4"
    assert after.refresh().refresh_token == before.refresh().refresh_token
    assert after.world.log_in("clerk")("GET /users/me").json["roles"] == ["clerk"]
    form = {"username": "gone", "password": PASSWORD}
    assert after.world("POST /users", form).status == 409  # it is never given again


class Sessions(stateful.RuleBasedStateMachine):
    """Logins, refreshes with any token there ever was, logouts, steps of the clock."""

    tokens: stateful.Bundle[Any] = stateful.Bundle(
        "tokens"
    )  # session, generation, time, pair

    def __init__(self) -> None:
        super().__init__()
        self.world = World().user().world

    @stateful.rule(target=tokens)
    def log_in(self) -> Any:
        pair, now = self.world.log_in("alice").pair, self.world.clock.now
        ends, texts = now + pair["refresh_expires_in"], [pair["refresh_token"]]
        return {"ends": ends, "rotated": now, "texts": texts}, 0, now, pair

    @stateful.rule(target=tokens, token=tokens)
    def refresh(self, token: Any) -> Any:
        session, generation, _, pair = token
        texts, now = session["texts"], self.world.clock.now
        renewed = self.world.refresh(pair["refresh_token"]).json
        age, left = len(texts) - 1 - generation, session["ends"] - now
        is_forgiven = age == 1 and now - session["rotated"] <= 30
        if left <= 0 or not (age == 0 or is_forgiven):
            session["ends"] = 0
            assert renewed["error"] == "invalid_grant"
            return token
        if age == 0:
            assert renewed["refresh_token"] not in texts
            texts.append(renewed["refresh_token"])
            session["rotated"] = now
        assert renewed["refresh_token"] == texts[-1]
        lives = (renewed["expires_in"], renewed["refresh_expires_in"])
        assert lives == (min(900, left), left)
        return session, len(texts) - 1, now, renewed

    @stateful.rule(
        token=tokens, kind=st.sampled_from(["access_token", "refresh_token"])
    )
    def revoke(self, token: Any, kind: str) -> None:
        assert self.world("POST /revoke", form={"token": token[3][kind]}).json == {}
        token[0]["ends"] = 0

    @stateful.rule(seconds=st.sampled_from([1, 30, 31, 600, 899, 900, 7200, 86_399]))
    def wait(self, seconds: int) -> None:
        self.world.clock.step(seconds)

    @stateful.rule(token=tokens)
    def use(self, token: Any) -> None:
        session, _, made_at, pair = token
        ends = min(session["ends"], made_at + pair["expires_in"])
        is_in = User(self.world, "alice", pair).is_in
        assert is_in == (self.world.clock.now < ends)


def test_a_session_lives_a_day_and_never_twice():
    # Fewer steps than the 20 sessions that a user may have.
    few = settings(A_FEW_SECONDS, stateful_step_count=19, max_examples=150)
    stateful.run_state_machine_as_test(Sessions, settings=few)


# ---- Several processes, and their violent ends --------------------------------------

FORKS = """
import os, service, sys
store = service.open_store(sys.argv[1])

def write(name):
    for number in range(5):
        with store.write("alice") as data:
            data["account"]["n"] = data["account"].get("n", 0) + 1
            data["todos"][f"{name} {number}"] = {}
        store.read("alice")

write(f"before {os.getpid()}")
events = []
sys.addaudithook(lambda event, given: events.append(event))
child = os.fork()
write(f"after {os.getpid()}")
if child:
    sys.exit(os.waitpid(child, 0)[1])
assert "sqlite3.connect" in events or "sqlite:" not in sys.argv[1]
"""


@SQL
def test_eight_processes_start_at_once_and_forks_share_nothing(store, store_url):
    command = (sys.executable, "-c", FORKS, store_url)
    assert together(8, lambda n: run(*command)) == [(0, "")] * 8
    assert store.read("alice")["account"] == {"n": 8 * 15}
    assert len(items(store)) == 8 * 15


def assert_all_is_kept(writing: Writing) -> None:
    """What was acknowledged is there, and nothing twice."""
    assert writing.missing == []
    for token in writing.tokens[:4]:
        there = writing.server("GET /todos", token).json.values()
        assert len({item["task"] for item in there}) == len(there)


@SQL
def test_kill_9_loses_nothing_that_was_acknowledged(store_url):
    flags = (store_url, "-k", "gthread" if "sqlite" in store_url else "gevent", "-w3")
    with service_over(*flags) as server, Writing(server) as writing:
        for _ in range(4):
            writing.wait_for(30)
            os.kill(random.choice(server.workers), signal.SIGKILL)
        writing.wait_for(30)
        os.killpg(server.process.pid, signal.SIGKILL)
        writing.stop()
        assert {*writing.statuses} <= {201, 503, 0}
        assert "Traceback" not in server.log
    with service_over(*flags) as writing.server:
        assert_all_is_kept(writing)


@each("kind", ["gthread", "gevent"])
def test_an_outage_is_503_and_then_all_goes_on(postgres, kind):
    flags = (postgres.url, "-k", kind, "-w", "2")
    with service_over(*flags) as server, Writing(server) as writing:
        for how in ("INT", "QUIT"):  # stopped, crashed
            writing.wait_for(30)
            postgres.stop(how)
            try:
                began = time.monotonic()
                away = server("GET /health")
                assert (away.status, time.monotonic() - began < 2) == (503, True)
                assert int(away.headers["Retry-After"]) >= 1
                refused = writing.statuses[503]
                eventually(lambda n=refused: writing.statuses[503] > n + 10)
            finally:
                postgres.start()
            eventually(lambda: server("GET /health").status == 200, 5)
        writing.wait_for(30)
        writing.stop()
        assert {*writing.statuses} <= {201, 503}
        assert "Traceback" not in server.log
        assert_all_is_kept(writing)


def test_a_database_may_start_late_and_anew_at_any_time(postgres):
    sql(postgres.url, "DROP TABLE IF EXISTS users, items")
    postgres.stop()
    try:
        world = World(store=service.open_store(postgres.url))
        assert world("GET /health").status == 503
    finally:
        postgres.start()
    eventually(lambda: world("GET /health").status == 200, 5)
    alice = world.user()
    together(4, lambda n: alice("GET /todos"))  # so that some connections wait
    postgres.stop("QUIT")
    postgres.start()
    assert {alice("POST /todos", {"task": "x"}).status for _ in range(4)} == {201}


def test_a_database_that_accepts_and_then_says_nothing_is_503():
    with socket.create_server(("127.0.0.1", 0)) as mute:
        url = f"postgresql://todo@127.0.0.1:{mute.getsockname()[1]}/todo"
        began = time.monotonic()
        answer = World(store=service.open_store(url))("GET /health")
    assert (answer.status, time.monotonic() - began < 10) == (503, True)


def test_a_transaction_that_is_cut_off_leaves_nothing_but_a_line(postgres_url, caplog):
    cut_off = (
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE state = 'idle in transaction' AND datname = current_database()"
    )
    store = service.open_store(postgres_url)
    put(store, "whole")
    with pytest.raises(ServiceUnavailable), store.write("alice") as data:
        data["todos"]["half"] = {}
        assert sql(postgres_url, cut_off) == [(True,)]
    assert "\n" not in caplog.messages[-1]  # further ones may quote users
    with pytest.raises(KeyError), store.write("alice"):
        assert sql(postgres_url, cut_off) == [(True,)]
        raise KeyError  # which is what its writer gets to see
    put(store, "next")
    assert list(items(store)) == ["whole", "next"]


def test_when_all_connections_are_taken_there_is_503(postgres_url):
    alice = World(store=service.open_store(postgres_url)).user()
    assert {*together(40, lambda n: alice("GET /todos/todo1").status)} == {200}
    with ExitStack() as busy:
        for n in range(15):
            busy.enter_context(alice.world.store.write(f"user{n}"))
        began = time.monotonic()
        assert alice("GET /todos/todo1").status == 503
        assert time.monotonic() - began < 5
    assert alice("GET /todos/todo1").status == 200


# ---- What happens between the read and the write of a request ------------------------


class Interrupted:
    """A store where something happens between a request's last read and its write."""

    def __init__(self, store: Any, happening: Callable[[], Any]) -> None:
        self.store, self.happenings = store, [happening]

    def read(self, *which: Any) -> Any:
        return self.store.read(*which)

    def write(self, *which: Any) -> Any:
        while self.happenings:
            self.happenings.pop()()
        return self.store.write(*which)


def interrupted(user: User, happening: Callable[[User], Any]) -> User:
    """The same user, to whom something happens in the middle of the next write."""
    store = Interrupted(user.world.store, lambda: happening(user))
    return User(World(store, user.world.clock), user.name, user.pair)


@cases(
    "happening, act, status",
    {
        "a login, a deletion": (delete_account, logged_in, 400),
        "a login, a new password": (change_password, logged_in, 400),
        "a new password, a deletion": (delete_account, change_password, 401),
        "a new password, another": (change_password, change_password, 400),
        "a new password, a logout": (log_out, change_password, 401),
        "a deletion, a new password": (change_password, delete_account, 400),
        "a refresh, a logout": (log_out, refreshed, 400),
        "a refresh, its end": (lambda user: user.world.clock.step(DAY), refreshed, 400),
        "a new item, a logout": (log_out, lambda user: user("POST /todos", TASK), 401),
    },
)
def test_what_another_did_first_stands(caplog, happening, act, status):
    alice = World().user()
    caplog.set_level(logging.INFO, "service")
    after = []

    def happen(user):
        happening(user)
        after.append(user.world.owned("alice"))

    assert act(interrupted(alice, happen)).status == status
    assert after == [alice.world.owned("alice")]
    assert events(caplog, "reuse detected") == []


# ---- Broken rows, files and rights --------------------------------------------------


@SQL
@each("column", ["users SET document", "items SET value"])
def test_a_row_that_is_no_json_is_503_until_mended(store, store_url, column, caplog):
    alice, name = World(store=store).user(), column.split()[-1]
    deep = "[" * 3_000 + "]" * 3_000
    members = ["NaN", "1e999", '"\\ud800"', deep]
    changes = [("{}", ""), ("{},", ""), ("[", "]"), ("", ",{}")]
    changes += [(f'{{"a": {member}, "b": ', "}") for member in members]
    broken = {f"'{a}' || {name} || '{b}'": (len(a), len(a + b)) for a, b in changes}
    if store_url.startswith("sqlite:"):
        broken[f"x'ff' || {name}"] = (1, 1)
    for spoilt, (start, more) in broken.items():
        sql(store_url, f"UPDATE {column} = {spoilt}")
        caplog.clear()
        answer = alice("GET /todos/todo1")
        assert (answer.status, list(answer.json)) == (503, ["message"])
        (line,) = caplog.messages
        assert "\n" not in line
        account = {"username": "alice", "password": PASSWORD}
        status = 409 if "items" in column else 503  # a taken name reads no items
        assert alice.world("POST /users", account).status == status
        text = f"CAST({name} AS TEXT)"
        mended = f"substr({text}, {start + 1}, length({text}) - {more})"
        sql(store_url, f"UPDATE {column} = {mended}")
        assert alice("GET /todos/todo1").json == {"task": "build an API"}


@SQLITE
def test_a_deleted_file_is_503_until_a_copy_is_there(store, store_url):
    path = Path(store_url[10:])
    alice, away = World(store=store).user(), path.with_name("away")
    away.mkdir()
    for file in path.parent.glob(f"{path.name}*"):
        file.rename(away / file.name)
    assert alice("PUT /todos/x", {"task": "into nothing"}).status == 503
    assert alice("GET /todos/todo1").status == 503
    assert alice.world("GET /health").status == 503
    for file in away.iterdir():
        shutil.copy(file, path.parent)
    assert alice("PUT /todos/x", {"task": "kept"}).status == 201
    assert items(service.open_store(store_url))["x"] == {"task": "kept"}


@SQLITE
def test_a_deleted_file_is_not_made_anew_by_another_process(store, store_url):
    put(store, "a")
    Path(store_url[10:]).unlink()
    link = Path(store_url[10:]).parent / "link"
    link.symlink_to(store_url[10:])
    for url in (store_url, f"sqlite:///{link}"):
        with pytest.raises(ServiceUnavailable):
            service.open_store(url).read("alice")
    assert not Path(store_url[10:]).exists()


@SQLITE
def test_a_locked_file_is_503_for_writers_alone(store, store_url, monkeypatch):
    class Impatient(sqlite3.Connection):  # we would wait for 10 s
        def execute(self, sql, *given):
            return super().execute(sql.replace("10000", "50"), *given)

    impatient = partial(sqlite3.connect, factory=Impatient)
    monkeypatch.setattr(sqlite3, "connect", impatient)
    alice = World(store=store).user()
    with closing(sqlite3.connect(store_url[10:], isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert alice("POST /todos", {"task": "x"}).status == 503
        assert alice("GET /todos/todo3").json == {"task": "profit!"}
        assert alice.world("GET /health").status == 503  # it tells of writing too
    created = alice("POST /todos", {"task": "x"})
    assert created.headers["Location"] == f"{MOUNT}/todos/todo4"


@SQLITE
def test_commits_are_synced_to_a_file_of_ones_own(store, store_url, connections):
    path = Path(store_url[10:])
    assert not path.exists()  # nothing is made before the first use
    put(store, "a")
    assert connections[-1].execute("PRAGMA journal_mode").fetchone() == ("wal",)
    # FULL, for the power may fail; kill -9 alone would not show the difference.
    assert connections[-1].execute("PRAGMA synchronous").fetchone() == (2,)
    assert path.stat().st_mode & 0o777 == 0o600


@SQLITE
def test_a_block_that_changes_nothing_writes_nothing(store, store_url, connections):
    put(store, "a")
    written = connections[-1].total_changes
    with store.write("alice") as data:
        assert list(data["todos"]) == ["a"]
    assert connections[-1].total_changes == written
    with store.write("nobody"):
        pass
    assert sql(store_url, "SELECT name FROM users") == [("alice",)]


def test_a_file_that_is_no_database_is_503(tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for path in (tmp_path, "/dev/null", "no/x", "x" * 300, "loop/x", "no/../x"):
        with pytest.raises(ValueError, match=r"SERVICE_STORE_URL .*\Z"):
            service.open_store(f"sqlite:///{tmp_path / path}")
    (tmp_path / "text.db").write_text("no database " * 1000)
    world = World(store=service.open_store(f"sqlite:///{tmp_path}/text.db"))
    account = {"username": "alice", "password": PASSWORD}
    assert world("POST /users", account).status == 503
    assert world("GET /health").status == 503


def test_two_machines_may_make_the_tables_at_once(postgres_url):
    with psycopg.connect(postgres_url) as other:
        other.execute(service.TABLES[0])
        opening = threading.Thread(target=service.open_store, args=(postgres_url,))
        opening.start()
        opening.join(0.3)
        other.commit()
        opening.join()
    put(service.open_store(postgres_url), "a")


URLS = """
postgresql://todo:hunter2@127.0.0.1:1/todo
postgresql://todo@127.0.0.1:1/todo?password=hunter2
postgresql://todo:hunter2
postgresql://todo:p@hunter2@127.0.0.1:1/todo
postgresql://todo:hunter2@127.0.0.1:1/todo?sslmod=require
"""


@each("url", URLS)
def test_no_secret_of_a_url_is_told_anybody(url, caplog):
    caplog.set_level("DEBUG")
    try:
        store = service.open_store(url)
        told = repr(store) + World(store=store)("GET /health").text
    except ValueError as error:
        told = str(error)
        assert "SERVICE_STORE_URL" in told
    assert "hunter2" not in told + caplog.text
    assert not [line for line in caplog.messages if re.match("store: .*\n", line)]


# ---- What it costs ------------------------------------------------------------------

COSTLY = (
    "GET /todos/todo1|GET /todos?limit=10|GET /todos/no|GET /users/me|POST /todos|"
    "PUT /todos/new|PUT /todos/new|PATCH /todos/new|DELETE /todos/new|POST /token"
)


def test_a_get_costs_two_round_trips_and_a_write_four_however_much_is_there(
    postgres_url, tmp_path, connections
):
    world = World(store=service.open_store(postgres_url), max_items=99_999)
    users, statements = [world.user("few"), world.user("many")], set()
    link, trace = connections[-1], tmp_path / "trace"
    with world.store.write("many") as data:
        data["todos"] |= {f"old{n}": {"task": "x"} for n in range(3000)}
    sql(postgres_url, "ANALYZE")
    for turn in range(7):  # psycopg prepares what comes often
        for line in COSTLY.split("|"):
            costs, body = [], {"task": str(turn)} if line.startswith("P") else None
            for user in users:
                send = user.refresh if "token" in line else partial(user, line, body)
                with trace.open("wb") as file:
                    link.pgconn.trace(file.fileno())  # libpq's own: a line a message
                    send()
                    link.pgconn.untrace()  # which writes what is still held back
                log = trace.read_text()
                statements |= set(re.findall(r'\tParse\t "\w*" "(.+)" \d', log))
                sent = re.findall(r"(?m)^\S+ \S+\t([FB])\t(\d+)", log)
                waits = sum((a, b) == ("F", "B") for (a, _), (b, _) in pairwise(sent))
                back = sum(int(size) for way, size in sent if way == "B")
                costs.append((waits, back))
            (few, little), (many, much) = costs
            if turn == 6:
                assert 0 < few == many <= (2 if "GET" in line else 4), (line, costs)
                assert much < little + 300 or "limit" in line, (line, costs)
    ours = [each for each in statements if re.search(r"\b(users|items)\b", each)]
    assert len(ours) >= 5
    wary = "-c enable_seqscan=off"  # so that few rows are no reason for one
    with psycopg.connect(postgres_url, options=wary) as explaining:
        for statement in ours:
            explain = f"EXPLAIN (GENERIC_PLAN) {statement}".encode()
            plan = str(explaining.execute(explain).fetchall())
            assert "Seq Scan" not in plan, (statement, plan)
