"""Print what an authenticated request costs on each store, among 10 users and among 100,000, as a Markdown table.

    python bench/stores.py [users]

Requests go through the WSGI callable in this process, one after the other, to 10 of the users in turn. A few users
and many are measured in turns, too. The figures are medians; beside them, the growth of the medians and of the minima.
"""

import io
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any

import psycopg

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import service
from test_service import Postgres, store_insert

SETTINGS = service.Settings(secret_key="0123456789abcdef0123456789abcdef")
ROUNDS, EACH = 101, 20


def users_rows(count: int, now: float) -> Iterator[tuple[str, str, int, str, str]]:
    """What so many users own, each with one session."""
    values: dict[str, dict[str, Any]] = {
        "account": {"password": {"hash": "none"}},
        "sessions": {"s": {"gen": 1, "rotated_at": now, "expires_at": int(now) + SETTINGS.refresh_ttl}},
        "counters": {"todos": {"last": 3, "count": 3}},
        "todos": service.TODOS,
    }
    texts = [(name, key, json.dumps(value)) for name, rows in values.items() for key, value in rows.items()]
    for n in range(count):
        for position, (collection, key, text) in enumerate(texts, 1):
            yield f"user{n}", collection, position, key, text


class Bench:
    """An app over a store of so many users; a class, since a refresh needs the token that the last one gave."""

    def __init__(self, url: str, count: int) -> None:
        now, self.url = time.time(), url
        self.store = service.open_store(url)
        rows = users_rows(count, now)
        if url == "memory:":
            for owner, collection, _, key, text in rows:
                with self.store.write(owner) as data:
                    data[collection][key] = json.loads(text)
        else:
            store_insert(url, rows)
            if url.startswith("postgresql:") and count > 10:  # a table of one page would get plans that scan it
                with psycopg.connect(url, autocommit=True) as database:
                    database.execute("VACUUM ANALYZE user_data")
                    database.execute("CHECKPOINT")
        self.app = service.create_app(SETTINGS, store=self.store)
        parts, self.pairs = service.make_service(SETTINGS, self.store), []
        for n in range(0, count, count // 10):
            with self.store.read(f"user{n}") as data:
                self.pairs.append(parts.tokens.pair(f"user{n}", "s", data["sessions"]["s"], now))

    def call(self, method: str, path: str, token: str = "", body: str = "") -> bytes:
        """One request as a server would pass it on."""
        environ = {
            "REQUEST_METHOD": method, "SCRIPT_NAME": "", "PATH_INFO": path, "QUERY_STRING": "",
            "SERVER_NAME": "localhost", "SERVER_PORT": "80", "SERVER_PROTOCOL": "HTTP/1.1", "HTTP_HOST": "localhost",
            "REMOTE_ADDR": "127.0.0.1", "wsgi.url_scheme": "http", "wsgi.input": io.BytesIO(body.encode()),
            "CONTENT_TYPE": "application/x-www-form-urlencoded", "CONTENT_LENGTH": str(len(body)),
            **({"HTTP_AUTHORIZATION": f"Bearer {token}"} if token else {}),
        }  # fmt: skip
        statuses: list[str] = []
        start: Any = lambda status, headers: statuses.append(status)  # noqa: E731
        answer = b"".join(self.app(environ, start))
        assert statuses[0][0] == "2", (statuses, answer)
        return answer

    def get(self, n: int) -> None:
        self.call("GET", "/todos/todo3", self.pairs[n]["access_token"])

    def post(self, n: int) -> None:
        self.call("POST", "/todos", self.pairs[n]["access_token"], "task=something+new")

    def refresh(self, n: int) -> None:
        token = self.pairs[n]["refresh_token"]
        self.pairs[n] = json.loads(self.call("POST", "/token", "", f"grant_type=refresh_token&refresh_token={token}"))


def time_of(request: Callable[[int], Any]) -> float:
    """Microseconds for one."""
    began = time.perf_counter()
    for n in range(EACH):
        request(n % 10)
    return (time.perf_counter() - began) / EACH * 1e6


def measure(name: str, few: Bench, many: Bench) -> str:
    """A row of the table."""
    cells = []
    for what in ("get", "post", "refresh"):
        times: dict[Bench, list[float]] = {few: [], many: []}
        for turn in range(ROUNDS):
            for bench in (few, many) if turn % 2 else (many, few):
                times[bench].append(time_of(getattr(bench, what)))
        usual, least = ([pick(times[bench]) for bench in (few, many)] for pick in (median, min))
        growth = f"{usual[1] / usual[0]:.2f}, {least[1] / least[0]:.2f}"
        cells.append(f"{usual[0]:,.0f} → {usual[1]:,.0f} ({growth})")
    return f"| {name} | {' | '.join(cells)} |"


def main(users: str = "100000") -> None:
    count = int(users)
    print(f"| µs among 10 → {count:,} users (growth) | GET an item | POST an item | refresh |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder, closing(Postgres()) as postgres:
        with psycopg.connect(postgres.url, autocommit=True) as database:
            database.execute("CREATE DATABASE many")
        urls = {
            "memory": ("memory:", "memory:"),
            "SQLite": (f"sqlite:///{folder}/few.db", f"sqlite:///{folder}/many.db"),
            "PostgreSQL": (postgres.url, postgres.url.replace("/postgres?", "/many?")),
        }
        for name, (few_url, many_url) in urls.items():
            few, many = Bench(few_url, 10), Bench(many_url, count)
            print(measure(name, few, many), flush=True)
            for bench in (few, many):
                if isinstance(bench.store, service.SQLStore):
                    bench.store.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
