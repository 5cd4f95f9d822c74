"""What a request costs as a user owns more, and as there are more users, on all three
stores.

    .bench/bin/python bench/growth.py            # about four minutes
    .bench/bin/python bench/growth.py --quick    # fewer of everything, kept nowhere

Requests go to the app in this process, and are timed by the clock, for a database works
elsewhere; small and large take turns. POST is followed by a DELETE that is not timed,
so that nothing grows meanwhile; passwords have a hash that costs nothing, so that a
login shows what the store costs. What is printed is kept in growth.json and drawn in
growth.svg.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import date
from statistics import median
from typing import Any

import psycopg
from speed import GREY, log_in, machine
from werkzeug.security import generate_password_hash

import service
from harness import BENCH, ENVIRON, ROOT, WSGIApp, progress
from peers import PASSWORD

sys.path.insert(0, str(ROOT / "tests"))
from conftest import Postgres

STORES = ("memory", "SQLite", "PostgreSQL")
CHEAP_HASH = generate_password_hash(PASSWORD, "pbkdf2:sha256:1")
FLAT = 1.3  # as much as the largest may cost of the smallest
BATCH = 10

# Users who are all like alice, in one statement.
NUMBERS = """
    WITH RECURSIVE numbers (n) AS
    (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < {count})
"""
COPY_USERS = f"""{NUMBERS}
    INSERT INTO users (name, document) SELECT 'user' || n, document FROM users, numbers
"""
COPY_ITEMS = f"""{NUMBERS}
    INSERT INTO items (owner, resource, position, id, value)
    SELECT 'user' || n, resource, position, id, value FROM items, numbers
"""


class Bench:
    """An app over an empty store, in this process."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.service = service.create_app(
            service.Settings.from_environ(ENVIRON | {"SERVICE_STORE_URL": url})
        )
        self.app = WSGIApp(self.service)

    def add(self, name: str) -> None:
        service.add_account(self.service, name, CHEAP_HASH)

    def add_users(self, count: int) -> None:
        """user1, user2, …, each with three items."""
        if self.url == "memory:":
            for number in range(1, count + 1):
                self.add(f"user{number}")
            return
        self.add("alice")
        if self.url.startswith("sqlite:"):
            file = self.url.removeprefix("sqlite:///")
            with closing(sqlite3.connect(file)) as database, database:
                for statement in (COPY_ITEMS, COPY_USERS):
                    database.execute(statement.format(count=count))
        else:
            with psycopg.connect(self.url, autocommit=True) as database:
                for statement in (COPY_ITEMS, COPY_USERS):
                    database.execute(statement.format(count=count))

    def settle(self) -> None:
        """Let PostgreSQL do now what it would do in the midst of the measurement."""
        if self.url.startswith("postgresql:"):
            with psycopg.connect(self.url, autocommit=True) as database:
                for statement in ("VACUUM ANALYZE", "CHECKPOINT"):
                    database.execute(statement)

    def fill(self, name: str, count: int) -> None:
        """So many items for a user."""
        token = log_in(self.app, name)["access_token"]
        for number in range(4, count + 1):
            item = {"task": f"task number {number}"}
            assert self.app.call("POST", "/todos", token, item).status == 201


class Person:
    """A user who asks."""

    def __init__(self, bench: Bench, name: str) -> None:
        self.app, self.name, self.puts = bench.app, name, 0
        self.token = log_in(self.app, name)["access_token"]

    def get(self) -> float:
        return self.time(("GET", "/todos/todo3", self.token), 200)

    def post(self) -> float:
        prepared = self.app.prepare("POST", "/todos", self.token, {"task": "new"})
        began = time.perf_counter()
        status, headers, _ = self.app.run(prepared)
        seconds = time.perf_counter() - began
        assert status[:3] == "201"
        made = self.app.call("DELETE", dict(headers)["Location"], self.token)
        assert made.status == 204
        return seconds

    def put(self) -> float:
        self.puts += 1  # what is there already would not be written
        item = {"task": f"version {self.puts}"}
        return self.time(("PUT", "/todos/todo2", self.token, item), 201)

    def page(self) -> float:
        return self.time(("GET", "/todos?limit=10", self.token), 200)

    def login(self) -> float:
        grant = {"grant_type": "password", "username": self.name, "password": PASSWORD}
        prepared = self.app.prepare("POST", "/token", "", grant)
        began = time.perf_counter()
        status, _, body = self.app.run(prepared)
        seconds = time.perf_counter() - began
        assert status[:3] == "200"
        self.token = json.loads(body)["access_token"]  # older sessions go
        return seconds

    def time(self, request: tuple[Any, ...], status: int) -> float:
        return self.app.time([request], status).clock / 1e6


REQUESTS: dict[str, Callable[[Person], float]] = {
    "GET one": Person.get,
    "POST": Person.post,
    "PUT": Person.put,
    "page of 10": Person.page,
    "login": Person.login,
}
Curves = dict[str, dict[int, float]]  # {request: {size: microseconds}}


def measure(people: dict[int, list[Person]], rounds: int, what: str) -> Curves:
    """Medians for each size; people of all sizes take turns."""
    times: dict[str, dict[int, list[float]]] = {
        title: {size: [] for size in people} for title in REQUESTS
    }
    for number in range(-1, rounds):  # the first one warms up
        for title, ask in REQUESTS.items():
            progress(f"{what}, round {number + 1} of {rounds}: {title}")
            for size, some in people.items():
                seconds = [ask(some[n % len(some)]) for n in range(BATCH)]
                if number >= 0:
                    times[title][size] += [each * 1e6 for each in seconds]
    return {
        title: {size: round(median(each), 1) for size, each in by_size.items()}
        for title, by_size in times.items()
    }


@contextmanager
def empty_stores(store: str, count: int) -> Iterator[list[str]]:
    """URLs of so many empty stores of one kind."""
    if store == "memory":
        yield ["memory:"] * count
    elif store == "SQLite":
        with tempfile.TemporaryDirectory() as folder:
            yield [f"sqlite:///{folder}/todo{number}.db" for number in range(count)]
    else:
        with closing(Postgres()) as postgres:
            names = [f"todo{number}" for number in range(count)]
            for name in names:
                postgres.run(
                    "createdb", "-h", str(postgres.folder), "-U", "postgres", name
                )
            yield [postgres.url.replace("/postgres?", f"/{name}?") for name in names]


def growth_by_items(store: str, sizes: list[int], rounds: int) -> Curves:
    with empty_stores(store, 1) as (url,):
        bench, people = Bench(url), {}
        for size in sizes:
            progress(f"{store}: a user with {size:,} items")
            bench.add(f"owner{size}")
            bench.fill(f"owner{size}", size)
            people[size] = [Person(bench, f"owner{size}")]
        bench.settle()
        return measure(people, rounds, f"{store}, items")


def growth_by_users(store: str, sizes: list[int], rounds: int) -> Curves:
    with empty_stores(store, len(sizes)) as urls:
        people = {}
        for size, url in zip(sizes, urls, strict=True):
            progress(f"{store}: {size:,} users")
            bench = Bench(url)
            bench.add_users(size)
            bench.settle()
            chosen = range(1, size + 1, size // BATCH)
            people[size] = [Person(bench, f"user{number}") for number in chosen]
        return measure(people, rounds, f"{store}, users")


def memory_of_a_user() -> dict[str, int]:
    """Bytes in the memory store: of a user with three items, and of an item."""
    bench = Bench("memory:")
    bench.add("first")
    bench.fill("first", 10)
    tracemalloc.start()
    count = 1000
    before = tracemalloc.get_traced_memory()[0]
    for number in range(count):
        bench.add(f"user{number}")
    users = tracemalloc.get_traced_memory()[0]
    bench.fill("user0", count + 3)
    items = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    return {"user": (users - before) // count, "item": (items - users) // count}


# ---- Table and drawing ---------------------------------------------------------------

COLOURS = ("#2f81f7", "#b08800", "#2ea043", "#bf5af2", "#e0564f")  # on white and black
Result = dict[str, Any]


def table(result: Result) -> Iterator[str]:
    """What was measured, as Markdown."""
    yield f"{result['date']}, {result['machine']}; medians in µs; flat: {FLAT} at most"
    for what in ("items", "users"):
        for store, curves in result[what].items():
            sizes = [f"{int(size):,}" for size in next(iter(curves.values()))]
            yield f"\n| {store}, {what} | {' | '.join(sizes)} | growth | |"
            yield "|---|" + "---:|" * (len(sizes) + 1) + "---|"
            for title, by_size in curves.items():
                figures = [*by_size.values()]
                growth = figures[-1] / figures[0]
                cells = [title, *(f"{each:,.0f}" for each in figures), f"{growth:.2f}"]
                verdict = "flat" if growth <= FLAT else "grows"
                yield f"| {' | '.join(cells)} | {verdict} |"
    memory = result["memory"]
    yield (
        f"\nMemory store: {memory['user']:,} bytes a user with three items and no"
        f" session, {memory['item']:,} an item of two words"
    )


def draw(result: Result) -> None:
    """growth.svg: cost against items of a user, and against users."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams |= {
        "font.size": 9,
        "svg.fonttype": "none",
        "svg.hashsalt": "growth",
    }
    pyplot.rcParams |= dict.fromkeys(
        (
            "text.color",
            "axes.labelcolor",
            "axes.edgecolor",
            "xtick.color",
            "ytick.color",
        ),
        GREY,
    )
    figure, grid = pyplot.subplots(2, 3, figsize=(8, 5), sharey="col")
    for row, what in zip(grid, ("items", "users"), strict=True):
        for axes, (store, curves) in zip(row, result[what].items(), strict=True):
            for (title, by_size), colour in zip(curves.items(), COLOURS, strict=True):
                sizes = [int(size) for size in by_size]
                axes.plot(sizes, [*by_size.values()], "o-", color=colour, label=title)
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_title(store)
            axes.set_xlabel(what + (" of the user" if what == "items" else ""))
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_facecolor("none")
    for axes in grid[:, 0]:
        axes.set_ylabel("µs a request")
    handles, titles = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, titles, loc="upper center", ncols=5, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    figure.savefig(BENCH / "growth.svg", transparent=True, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description="What growing costs")
    parser.add_argument("--quick", action="store_true", help="kept nowhere")
    is_quick = parser.parse_args().quick
    rounds = 5 if is_quick else 31
    items = [10, 100, 1000] if is_quick else [10, 100, 1000, 10_000]
    users = [10, 1000] if is_quick else [10, 1000, 100_000]
    result: Result = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "items": {store: growth_by_items(store, items, rounds) for store in STORES},
        "users": {store: growth_by_users(store, users, rounds) for store in STORES},
        "memory": memory_of_a_user(),
    }
    result = json.loads(
        json.dumps(result)
    )  # sizes are texts, as they are when it is kept
    progress("")
    print("\n".join(table(result)))
    if not is_quick:
        (BENCH / "growth.json").write_text(json.dumps(result, indent=1) + "\n")
        draw(result)


if __name__ == "__main__":
    main()
