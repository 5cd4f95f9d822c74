"""How fast service.py is, beside what others write with their frameworks.

    python -m venv .bench && .bench/bin/pip install -r bench/requirements.txt
    .bench/bin/python bench/speed.py            # about ten minutes, with wrk installed
    .bench/bin/python bench/speed.py --quick    # about two, kept nowhere

Every peer is checked to give the same answers, with the same checks of tokens, before
it is timed, and service.py to turn an item into JSON at most twice in a write. Peers
and servers take turns, round after round, so that a busy moment of the machine meets
all of them; the figures are medians over the rounds. Compare figures of one run only.
What is printed is kept in speed.json, and drawn in speed.svg, unless the run is quick.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from typing import Any

import jwt

from harness import (
    BENCH,
    ENVIRON,
    Cost,
    Reply,
    Server,
    WSGIApp,
    app_in_process,
    median_cost,
    progress,
)
from peers import NAMES, PASSWORD, SECRET

APPS = {
    "service": "service.py",
    "bare": "bare WSGI + PyJWT",
    "falcon_pyjwt": "Falcon + PyJWT",
    "bottle_pyjwt": "Bottle + PyJWT",
    "fastapi_pyjwt": "FastAPI + PyJWT",
    "flask_jwt": "Flask-RESTful + JWT-Extended",
    "django_simplejwt": "Django REST + simplejwt",
    "constant": "constant WSGI",
}
PACKAGES = [
    *("werkzeug", "pyjwt", "gunicorn", "gevent", "granian", "waitress", "pyuwsgi"),
    *("uvicorn", "fastapi", "falcon", "bottle", "flask", "flask-restful"),
    *("flask-jwt-extended", "django", "djangorestframework"),
    "djangorestframework-simplejwt",
]

# ---- What is asked -------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """One request, of one user."""

    title: str
    method: str
    path: str
    user: str = "alice"
    body: Any = None
    status: int = 200
    count: int = 200  # in one batch in this process


LOGIN = {"grant_type": "password", "username": "dave", "password": PASSWORD}
LOGGING_IN = Case("login", "POST", "/token", "", LOGIN, count=1)
REFRESH = Case("refresh", "POST", "/token", "dave", count=50)
FIRST_SIGHT = Case("GET one, token not seen before", "GET", "/todos/todo3", count=50)
BAD_TOKEN = Case("bad token", "GET", "/todos/todo3", status=401)
GET_ONE = Case("GET one", "GET", "/todos/todo3")
LONG_LIST = Case("GET list of 1,000", "GET", "/todos", "carol", count=10)
POST = Case("POST", "POST", "/todos", "bob", {"task": "something new"}, 201)
PUT = Case("PUT", "PUT", "/todos/todo2", "alice", {"task": "something else"}, 201)
PATCH = Case("PATCH", "PATCH", "/todos/todo2", "alice", {"task": "something other"})
CASES = [
    GET_ONE,
    FIRST_SIGHT,
    Case("GET list of 3", "GET", "/todos"),
    LONG_LIST,
    POST,
    PUT,
    Case("absent item", "GET", "/todos/absent", status=404),
    BAD_TOKEN,
    REFRESH,
    LOGGING_IN,
]


def log_in(app: WSGIApp | Server, user: str) -> dict[str, str]:
    """The token pair."""
    pair: dict[str, str] = app.call(
        "POST", "/token", "", LOGIN | {"username": user}
    ).body
    return pair


def refresh_body(pair: dict[str, str]) -> dict[str, str]:
    return {"grant_type": "refresh_token", "refresh_token": pair["refresh_token"]}


def altered(token: str) -> str:
    """The same claims under a signature that is none."""
    signed, _, signature = token.rpartition(".")
    return f"{signed}.{signature[::-1]}"


def with_claims(token: str, **claims: Any) -> str:
    """The token with other claims, well signed."""
    header = jwt.get_unverified_header(token)
    old = jwt.decode(token, options={"verify_signature": False})
    return jwt.encode(old | claims, SECRET, "HS256", header)


def prepare(app: WSGIApp | Server, name: str) -> dict[str, dict[str, str]]:
    """Everybody's token pair, once the app has shown that it does what all do."""
    if name == "service":  # whose accounts are made by sign-up
        for user in NAMES:
            account = {"username": user, "password": PASSWORD}
            made = app.call("POST", "/users", "", account)
            assert made.status == 201, made
    if name == "constant":
        return {user: {"access_token": "-", "refresh_token": "-"} for user in NAMES}
    pairs = {user: log_in(app, user) for user in NAMES}
    check_answers(app, pairs["alice"]["access_token"])
    check_refusals(app, pairs["alice"]["access_token"])
    for number in range(4, 1001):
        item = {"task": f"task number {number}"}
        app.call("POST", "/todos", pairs["carol"]["access_token"], item)
    items = app.call("GET", "/todos", pairs["carol"]["access_token"]).body
    assert len(items) == 1000, f"{name}: {len(items)} items"
    return pairs


def check_answers(app: WSGIApp | Server, token: str) -> None:
    """The same requests get the same answers."""
    todos = {
        "todo1": {"task": "build an API"},
        "todo2": {"task": "?????"},
        "todo3": {"task": "profit!"},
    }
    new = {"task": "Ελληνικά"}
    expected: list[tuple[tuple[Any, ...], int, Any]] = [
        (("GET", "/todos/todo3", token), 200, todos["todo3"]),
        (("GET", "/todos", token), 200, todos),
        (("PUT", "/todos/todo3", token, new), 201, new),
        (("GET", "/todos/todo3", token), 200, new),
        (("PUT", "/todos/todo3", token, todos["todo3"]), 201, todos["todo3"]),
        (
            ("GET", "/todos/absent", token),
            404,
            {"message": "Todo absent doesn't exist"},
        ),
    ]
    for request, status, body in expected:
        reply = app.call(*request)
        assert (reply.status, reply.body) == (status, body), (request, reply)
    token = log_in(app, "bob")["access_token"]
    reply = app.call("POST", "/todos", token, new)
    assert (reply.status, reply.body) == (201, new), reply
    assert app.call("GET", reply.headers["location"], token).body == new, reply
    for item in ({}, {"task": ""}, {"task": "x" * 10_001}):
        reply = app.call("POST", "/todos", token, item)
        assert reply.status in (400, 422), (item, reply)


def check_refusals(app: WSGIApp | Server, token: str) -> None:
    """No app saves itself a check."""

    def status(token: str) -> int:
        return app.call("GET", "/todos/todo3", token).status

    now = int(time.time())
    assert status(with_claims(token, iat=now - 1)) == 200
    refused = {
        "none": "",
        "bad signature": altered(token),
        "expired": with_claims(token, exp=now - 60),
        "other issuer": with_claims(token, iss="https://other.example"),
        "other audience": with_claims(token, aud="https://other.example"),
    }
    pair = log_in(app, "dave")
    refused["refresh token"] = pair["refresh_token"]
    assert status(pair["access_token"]) == 200
    revoked = {"token": pair["access_token"]}
    assert app.call("POST", "/revoke", pair["access_token"], revoked).status == 200
    refused["revoked"] = pair["access_token"]
    for what, bad in refused.items():
        assert status(bad) == 401, (what, status(bad))
    pair = log_in(app, "dave")
    assert app.call("POST", "/token", "", refresh_body(pair)).status == 200
    again: Reply = app.call("POST", "/token", "", refresh_body(pair))
    assert again.status in (400, 401), again
    wrong = app.call("POST", "/token", "", LOGIN | {"password": "a" * 20})
    assert wrong.status == 400, wrong


# ---- In this process -----------------------------------------------------------------


class Peer:
    """An app in this process, and its users' tokens."""

    def __init__(self, name: str) -> None:
        self.app = app_in_process(name)
        self.pairs = prepare(self.app, name)
        self.is_constant = name == "constant"

    def time(self, case: Case) -> Cost:
        """What one request costs, measured over a batch."""
        gc.collect()
        status = 200 if self.is_constant else case.status
        if case is REFRESH:
            return self.time_refreshes(case.count)
        token = self.pairs[case.user]["access_token"] if case.user else ""
        tokens = [altered(token) if case is BAD_TOKEN else token] * case.count
        if case is FIRST_SIGHT:
            tokens = [self.refresh("alice")["access_token"] for _ in tokens]
        requests = [(case.method, case.path, token, case.body) for token in tokens]
        return self.app.time(requests, status)

    def refresh(self, user: str) -> dict[str, str]:
        if not self.is_constant:
            body = refresh_body(self.pairs[user])
            self.pairs[user] = self.app.call("POST", "/token", "", body).body
        return self.pairs[user]

    def time_refreshes(self, count: int) -> Cost:
        """Each needs the token that the one before it gave."""
        cpu = clock = 0.0
        for _ in range(count):
            body = refresh_body(self.pairs["dave"])
            prepared = self.app.prepare("POST", "/token", "", body)
            clock_before, cpu_before = time.perf_counter(), time.process_time()
            status, _, answer = self.app.run(prepared)
            cpu += time.process_time() - cpu_before
            clock += time.perf_counter() - clock_before
            assert status[:3] == "200", answer
            if not self.is_constant:
                self.pairs["dave"] = json.loads(answer)
        return Cost(cpu / count * 1e6, clock / count * 1e6)


Figures = dict[str, dict[str, Cost]]  # {title of the case: {app: median cost}}


def measure_in_process(rounds: int) -> Figures:
    peers = {}
    for name in APPS:
        progress(f"check {name}")
        peers[name] = Peer(name)
    for case in (POST, PUT, PATCH):
        assert times_written(peers["service"], case) <= 2, case
    return take_turns(
        rounds,
        [(case.title, name, case) for case in CASES for name in APPS],
        lambda name, case: peers[name].time(case),
    )


def times_written(peer: Peer, case: Case) -> int:
    """How often one request turns its item into JSON."""
    written = 0

    def watch(frame: Any, event: str, _: Any) -> None:
        nonlocal written
        if event == "call" and frame.f_code is json.JSONEncoder.encode.__code__:
            written += frame.f_locals["o"] == case.body

    token = peer.pairs[case.user]["access_token"]
    prepared = peer.app.prepare(case.method, case.path, token, case.body)
    sys.setprofile(watch)
    try:
        status, *_ = peer.app.run(prepared)
    finally:
        sys.setprofile(None)
    assert status[:3] == str(case.status), status
    return written


def take_turns(
    rounds: int,
    turns: list[tuple[str, str, Case]],
    measure: Callable[[str, Case], Cost],
) -> Figures:
    """Medians over rounds in which everybody has a turn; the first one warms up."""
    costs: dict[str, dict[str, list[Cost]]] = {}
    for number in range(rounds + 1):
        for title, name, case in turns:
            progress(f"round {number} of {rounds}: {title}, {name}")
            cost = measure(name, case)
            if number or rounds == 1:
                costs.setdefault(title, {}).setdefault(name, []).append(cost)
    return {
        title: {name: median_cost(each) for name, each in by_name.items()}
        for title, by_name in costs.items()
    }


# ---- Under servers -------------------------------------------------------------------

GUNICORN = "gunicorn -c gunicorn.conf.py -w 1 -b 127.0.0.1:{port}"
SERVERS = {
    "gunicorn gthread": GUNICORN + " -k gthread {app}()",
    "gunicorn gevent": GUNICORN + " -k gevent {app}()",
    "gunicorn sync": GUNICORN + " -k sync {app}()",
    "uvicorn": "uvicorn --factory --port {port} {app}",
    "Granian": "granian --interface wsgi --factory --port {port} {app}",
    "waitress": "waitress-serve --listen=127.0.0.1:{port} --call {app}",
    "uWSGI": "uwsgi --http11-socket=127.0.0.1:{port} --enable-threads --threads=8"
    " --need-app --die-on-term --module={app}()",
}
THOROUGHLY = [  # with every case
    ("service", "gunicorn gthread"),
    ("service", "gunicorn gevent"),
    ("service", "Granian"),
    ("fastapi_pyjwt", "uvicorn"),
    ("falcon_pyjwt", "gunicorn gthread"),
    ("flask_jwt", "gunicorn gthread"),
]
BRIEFLY = [  # with GET one
    ("constant", "gunicorn gthread"),
    ("constant", "gunicorn gevent"),
    ("constant", "Granian"),
    ("bare", "gunicorn gthread"),
    ("bottle_pyjwt", "gunicorn gthread"),
    ("django_simplejwt", "gunicorn gthread"),
    ("falcon_pyjwt", "gunicorn gevent"),
    ("flask_jwt", "gunicorn gevent"),
    ("service", "gunicorn sync"),
    ("service", "waitress"),
    ("service", "uWSGI"),
]


class Served:
    """An app under a server, and its users' tokens."""

    def __init__(self, name: str, server: str) -> None:
        module = name if name == "service" else f"peers.{name}"
        self.server = Server(f"{module}:create_app", SERVERS[server], ENVIRON)
        try:
            self.pairs = prepare(self.server, name)
        except BaseException:
            self.server.stop()
            raise

    def load(self, case: Case, seconds: int) -> Cost:
        if case is REFRESH:
            sessions = [log_in(self.server, "dave")["refresh_token"] for _ in range(4)]
            load = self.server.wrk(
                "REFRESH", *sessions, seconds=seconds, threads=4, connections=4
            )
        else:
            token = self.pairs[case.user]["access_token"] if case.user else ""
            token = altered(token) if case is BAD_TOKEN else token
            body = "" if case.body is None else json.dumps(case.body)
            is_slow = case is LOGGING_IN
            load = self.server.wrk(
                *(case.method, case.path, token, body),
                seconds=seconds * 2 if is_slow else seconds,
                threads=1,
                connections=2 if is_slow else 16,
            )
        refused = load.count if case.status >= 400 else 0
        assert load.refused == refused, (case, load)
        return load.cost


def measure_servers(rounds: int, seconds: int) -> Figures:
    served: dict[str, Served] = {}
    try:
        for name, server in THOROUGHLY + BRIEFLY:
            progress(f"start {name} under {server}")
            served[f"{name}, {server}"] = Served(name, server)
        everywhere = [(GET_ONE.title, name, GET_ONE) for name in served]
        thoroughly = [
            (case.title, f"{name}, {server}", case)
            for case in CASES
            for name, server in THOROUGHLY
            if case not in (GET_ONE, FIRST_SIGHT)
        ]
        return take_turns(
            rounds,
            everywhere + thoroughly,
            lambda name, case: served[name].load(case, seconds),
        )
    finally:
        for each in served.values():
            each.server.stop()


# ---- Tables --------------------------------------------------------------------------


def tables(result: dict[str, Any]) -> Iterable[str]:
    """What was measured, as Markdown."""
    yield f"{result['date']}, {result['machine']}"
    yield ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    for part, heading in (
        ("in_process", "In process"),
        ("servers", "Through servers, one worker"),
    ):
        yield f"\n## {heading}\n"
        yield "| request | app | processor time, µs | requests/s | × service.py |"
        yield "|---|---|---:|---:|---:|"
        for title, by_name in result[part].items():
            ours = next(cost for name, cost in by_name.items() if "service" in name)
            for name, cost in by_name.items():
                ratio = cost["cpu"] / ours["cpu"]
                yield (
                    f"| {title} | {label(name)} | {cost['cpu']:,.1f} "
                    f"| {1e6 / cost['clock']:,.0f} | {ratio:.2f} |"
                )
    yield "\n## Targets\n"
    yield "| | target | measured | |\n|---|---:|---:|---|"
    for what, target, measured in targets(result):
        verdict = "reached" if measured >= target else "missed"
        yield f"| {what} | {target} | {measured:.2f} | {verdict} |"


def label(name: str) -> str:
    app, comma, server = name.partition(", ")
    return APPS[app] + comma + server


def targets(result: dict[str, Any]) -> Iterable[tuple[str, float, float]]:
    """(what, what is aimed at, what it is)"""
    flask, falcon, bare = "flask_jwt", "falcon_pyjwt", "bare"
    for case, peer, target in (
        (GET_ONE, flask, 12),
        (GET_ONE, falcon, 2.5),
        (GET_ONE, bare, 2),
        (PUT, flask, 7),
        (PUT, falcon, 1.4),
        (PUT, bare, 0.9),
        (POST, flask, 7),
        (POST, falcon, 1.4),
        (POST, bare, 0.9),
        (LONG_LIST, flask, 1.5),
        (LONG_LIST, falcon, 1.2),
    ):
        costs = result["in_process"][case.title]
        ratio = costs[peer]["cpu"] / costs["service"]["cpu"]
        yield f"{case.title}, in process: faster than {APPS[peer]}", target, ratio
    clock = {
        name: cost["clock"] for name, cost in result["servers"][GET_ONE.title].items()
    }
    for ours, other, target in (
        ("service, gunicorn gthread", "constant, gunicorn gthread", 0.88),
        ("service, gunicorn gevent", "constant, gunicorn gevent", 0.88),
        ("service, gunicorn gevent", "fastapi_pyjwt, uvicorn", 1.05),
        ("service, Granian", "fastapi_pyjwt, uvicorn", 4),
    ):
        ratio = clock[other] / clock[ours]
        yield f"requests/s, {label(ours)}: of {label(other)}", target, ratio


# ---- The drawing ---------------------------------------------------------------------

# To be read on white and on black.
GREY, OURS, OTHERS, LIMITS = "#7d7d7d", "#2f81f7", "#b08800", "#8a8f98"
DRAWN = [GET_ONE, PUT, POST, LONG_LIST]


def colour(name: str) -> str:
    if "service" in name:
        return OURS
    return LIMITS if "WSGI" in name else OTHERS


def draw(result: dict[str, Any]) -> None:
    """speed.svg: ratios to service.py, through servers to it under gunicorn gevent."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    pyplot.rcParams |= {
        "font.size": 10,
        "svg.fonttype": "none",
        "svg.hashsalt": "speed",
        "text.color": GREY,
        "axes.labelcolor": GREY,
        "axes.edgecolor": GREY,
        "xtick.color": GREY,
        "ytick.color": GREY,
    }
    panels = []
    for case in DRAWN:
        costs = result["in_process"][case.title]
        bars = [
            (
                APPS[name],
                cost["cpu"] / costs["service"]["cpu"],
                f"{cost['cpu']:,.0f} µs",
            )
            for name, cost in costs.items()
            if name != "constant"
        ]
        title = f"{case.title} in process: processor time"
        panels.append((title, sorted(bars, key=lambda bar: -bar[1])))
    costs = result["servers"][GET_ONE.title]
    reference = costs["service, gunicorn gevent"]["clock"]
    bars = [
        (label(name), reference / cost["clock"], f"{1e6 / cost['clock']:,.0f}/s")
        for name, cost in costs.items()
    ]
    title = "GET one through servers: requests a second"
    panels.append((title, sorted(bars, key=lambda bar: bar[1])))

    heights = [len(bars) + 1.5 for _, bars in panels]
    figure, all_axes = pyplot.subplots(
        len(panels), figsize=(8, sum(heights) * 0.24), height_ratios=heights
    )
    for axes, (title, bars) in zip(all_axes, panels, strict=True):
        names, ratios, figures = zip(*bars, strict=True)
        drawn = axes.barh(names, ratios, color=[colour(name) for name in names])
        axes.axvline(1, color=GREY, linewidth=0.5, zorder=0)
        texts = [f" {r:.2f} ({f})" for r, f in zip(ratios, figures, strict=True)]
        axes.bar_label(drawn, texts)
        axes.set_title(title, loc="left", fontsize=10, fontweight="bold")
        axes.set_xlim(0, max(ratios) * 1.4)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.tick_params(bottom=False, labelbottom=False)
    figure.suptitle(
        f"Ratio to service.py ({result['date']}, {result['machine']})", fontsize=10
    )
    figure.tight_layout()
    figure.savefig(BENCH / "speed.svg", transparent=True, metadata={"Date": None})


# ---- Main ----------------------------------------------------------------------------


def as_json(figures: Figures) -> dict[str, Any]:
    return {
        title: {
            name: {unit: round(value, 2) for unit, value in cost._asdict().items()}
            for name, cost in by_name.items()
        }
        for title, by_name in figures.items()
    }


def machine() -> str:
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return f"{len(os.sched_getaffinity(0))} cores, {platform.system()}, {python}"


def main() -> None:
    parser = argparse.ArgumentParser(description="How fast service.py is")
    parser.add_argument("--quick", action="store_true", help="few rounds, kept nowhere")
    parser.add_argument("--draw", action="store_true", help="draw speed.json again")
    options = parser.parse_args()
    kept = BENCH / "speed.json"
    if options.draw:
        draw(json.loads(kept.read_text()))
        return
    result = {
        "date": date.today().isoformat(),
        "machine": machine(),
        "versions": {name: version(name) for name in PACKAGES},
        "in_process": as_json(measure_in_process(3 if options.quick else 11)),
        "servers": as_json(measure_servers(1 if options.quick else 7, seconds=1)),
    }
    progress("")
    print("\n".join(tables(result)))
    if not options.quick:
        kept.write_text(json.dumps(result, indent=1) + "\n")
        draw(result)


if __name__ == "__main__":
    main()
