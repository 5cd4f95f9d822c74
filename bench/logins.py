"""What a reader feels while 24 clients log in for 20 s, under gthread and gevent.

    .bench/bin/python bench/logins.py            # a minute and a half, with wrk
    .bench/bin/python bench/logins.py --quick    # 5 s each, kept nowhere

Checking a password is slow on purpose (scrypt: 0.1 s of a core and 32 MB), so logins a
second have a bound that no service can pass; it is measured too. The reader asks for
one item over and over. A client that is told to come back later (503) waits as long as
Retry-After says.
"""

from __future__ import annotations

import argparse
import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from typing import Any

from speed import SERVERS, log_in, machine
from werkzeug.security import check_password_hash

from harness import BENCH, ENVIRON, Load, Server, progress
from peers import HASHES, PASSWORD

CLIENTS = 24
WORKERS = ("gunicorn gthread", "gunicorn gevent")


def scrypts_a_second(seconds: float) -> float:
    """Passwords that two threads check, with the whole machine to themselves."""
    until = time.perf_counter() + seconds

    def check_until_then(_: int) -> int:
        count = 0
        while time.perf_counter() < until:
            check_password_hash(HASHES["alice"], PASSWORD)
            count += 1
        return count

    with ThreadPoolExecutor(2) as pool:
        return sum(pool.map(check_until_then, range(2))) / seconds


@dataclass
class Crowd:
    """Clients that log in, again and again, until they are told to stop."""

    server: Server
    stop: threading.Event = field(default_factory=threading.Event)
    statuses: Counter[int] = field(default_factory=Counter)
    most_memory: int = 0  # bytes of the server's processes

    def log_in(self, name: str, address: str) -> None:
        grant = {"grant_type": "password", "username": name, "password": PASSWORD}
        while not self.stop.is_set():
            reply = self.server.call("POST", "/token", "", grant, address)
            self.statuses[reply.status] += 1
            if reply.status == 503:
                self.stop.wait(float(reply.headers["retry-after"]))

    def watch_memory(self) -> None:
        while not self.stop.wait(0.1):
            self.most_memory = max(self.most_memory, self.server.memory())


def measure(worker: str, seconds: int) -> dict[str, Any]:
    """What one worker did, times in milliseconds and memory in megabytes."""
    server = Server("service:create_app", SERVERS[worker], ENVIRON)
    try:
        names = [f"user{number}" for number in range(CLIENTS)]
        for name in ["reader", *names]:  # whose session no other login may end
            account = {"username": name, "password": PASSWORD}
            assert server.call("POST", "/users", "", account).status == 201
        token = log_in(server, "reader")["access_token"]

        def read() -> Load:
            request = ("GET", "/todos/todo3", token, "")
            return server.wrk(*request, seconds=seconds, threads=1, connections=1)

        progress(f"{worker}: quiet")
        quiet, memory = read(), server.memory()
        progress(f"{worker}: {CLIENTS} clients log in")
        crowd = Crowd(server)
        with ThreadPoolExecutor(CLIENTS + 1) as pool:
            tasks = [pool.submit(crowd.watch_memory)]
            tasks += [
                pool.submit(crowd.log_in, name, f"127.0.1.{number}")
                for number, name in enumerate(names, 1)
            ]
            began = time.perf_counter()
            crowded = read()
            crowd.stop.set()
        elapsed = time.perf_counter() - began  # with the logins that were on their way
        for task in tasks:
            task.result()
        assert not quiet.refused and not crowded.refused
        return {
            "p50": [quiet.p50 / 1e3, crowded.p50 / 1e3],
            "p99": [quiet.p99 / 1e3, crowded.p99 / 1e3],
            "logins a second": crowd.statuses[200] / elapsed,
            "503": crowd.statuses[503],
            "memory": [memory / 1e6, crowd.most_memory / 1e6],
        }
    finally:
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(
        description="What a reader feels while many log in"
    )
    parser.add_argument("--quick", action="store_true", help="5 s, kept nowhere")
    is_quick = parser.parse_args().quick
    seconds = 5 if is_quick else 20
    progress("scrypt alone")
    result: dict[str, Any] = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "scrypt alone, a second": scrypts_a_second(seconds / 4),
        "workers": {worker: measure(worker, seconds) for worker in WORKERS},
    }
    progress("")
    bound = result["scrypt alone, a second"]
    print(
        f"{result['date']}, {result['machine']}; scrypt alone: {bound:.1f} a second\n"
    )
    print("| worker | reader's p50, ms | p99, ms | logins/s | 503 | memory, MB |")
    print("|---|---|---|---|---|---|")
    for worker, it in result["workers"].items():
        (p50, crowded_p50), (p99, crowded_p99), memory = (
            it["p50"],
            it["p99"],
            it["memory"],
        )
        logins = it["logins a second"]
        print(
            f"| {worker} | {p50:.2f} → {crowded_p50:.2f}"
            f" | {p99:.2f} → {crowded_p99:.2f} ({crowded_p99 / p99:.1f} times)"
            f" | {logins:.1f} ({logins / bound:.2f} of scrypt alone) | {it['503']}"
            f" | {memory[0]:.0f} → {memory[1]:.0f} |"
        )
    if not is_quick:
        (BENCH / "logins.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
