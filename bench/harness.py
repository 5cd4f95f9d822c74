"""What the benchmarks share: apps in this process, apps under servers, and what they
cost.

Times are taken twice: by the clock, and as processor time, which a busy neighbour on
the same machine disturbs far less. Ratios are therefore ratios of processor time,
unless they say otherwise.
"""

from __future__ import annotations

import asyncio
import http.client
import io
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
sys.path[:0] = [str(ROOT), str(BENCH)]

from peers import ISSUER, SECRET  # noqa: E402

# service.py, set up as the peers are: tokens outlive the benchmark, and no grace.
ENVIRON = {
    "SERVICE_SECRET_KEY": SECRET,
    "SERVICE_ISSUER": ISSUER,
    "SERVICE_ACCESS_TTL": "7200",
    "SERVICE_REFRESH_GRACE": "0",
    "SERVICE_MAX_ITEMS": "9999999",
}


class Reply(NamedTuple):
    status: int
    headers: dict[str, str]  # names in lower case
    body: Any  # JSON


class Cost(NamedTuple):
    """Of one request, in microseconds."""

    cpu: float
    clock: float

    @property
    def requests_a_second(self) -> float:
        return 1e6 / self.clock


class Load(NamedTuple):
    """What wrk saw."""

    cost: Cost
    count: int
    refused: int  # answered with 400 or more
    p50: float  # microseconds that a client waited
    p99: float


def median_cost(costs: Iterable[Cost]) -> Cost:
    return Cost(*(median(column) for column in zip(*costs, strict=True)))


def progress(text: str) -> None:
    """What is going on, on one line of a terminal."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


# ---- Apps in this process ------------------------------------------------------------


class WSGIApp:
    """An app as a WSGI server calls it; requests are prepared first, then timed."""

    def __init__(self, app: Any) -> None:
        self.app = app

    def prepare(
        self, method: str, path: str, token: str = "", body: Any = None
    ) -> dict[str, Any]:
        """What gunicorn makes of such a request by curl."""
        path, _, query = path.partition("?")
        content = b"" if body is None else json.dumps(body).encode()
        environ = {
            "REQUEST_METHOD": method,
            "SCRIPT_NAME": "",
            "PATH_INFO": path,
            "QUERY_STRING": query,
            "RAW_URI": path,
            "SERVER_NAME": "localhost",
            "SERVER_PORT": "5000",
            "SERVER_PROTOCOL": "HTTP/1.1",
            "REMOTE_ADDR": "127.0.0.1",
            "HTTP_HOST": "localhost:5000",
            "HTTP_USER_AGENT": "curl/8.5.0",
            "HTTP_ACCEPT": "*/*",
            "wsgi.input": io.BytesIO(content),
            "wsgi.input_terminated": True,
            "wsgi.errors": sys.stderr,
            "wsgi.url_scheme": "http",
            "wsgi.version": (1, 0),
            "wsgi.multithread": True,
            "wsgi.multiprocess": False,
            "wsgi.run_once": False,
        }
        if token:
            environ["HTTP_AUTHORIZATION"] = f"Bearer {token}"
        if body is not None:
            environ["CONTENT_TYPE"] = "application/json"
            environ["CONTENT_LENGTH"] = str(len(content))
        return environ

    def run(self, environ: dict[str, Any]) -> tuple[str, list[tuple[str, str]], bytes]:
        started: list[Any] = []

        def start_response(status: str, headers: Any, exc_info: Any = None) -> None:
            started.append((status, headers))

        chunks = self.app(environ, start_response)
        body = b"".join(chunks)
        if hasattr(chunks, "close"):
            chunks.close()
        return *started[0], body

    def run_all(self, prepared: list[Any]) -> set[str]:
        return {self.run(environ)[0] for environ in prepared}

    def call(self, *request: Any) -> Reply:
        """One request, untimed."""
        status, headers, body = self.run(self.prepare(*request))
        named = {name.lower(): value for name, value in headers}
        return Reply(int(status[:3]), named, json.loads(body or "null"))

    def time(self, requests: list[tuple[Any, ...]], status: int) -> Cost:
        """What each of these requests costs; all are answered with that status."""
        prepared = [self.prepare(*request) for request in requests]
        clock, cpu = time.perf_counter(), time.process_time()
        statuses = self.run_all(prepared)
        cpu, clock = time.process_time() - cpu, time.perf_counter() - clock
        assert {each[:3] for each in statuses} == {str(status)}, statuses
        return Cost(cpu / len(requests) * 1e6, clock / len(requests) * 1e6)


class ASGIApp(WSGIApp):
    """An app as an ASGI server calls it, in an event loop of its own."""

    def __init__(self, app: Any) -> None:
        super().__init__(app)
        self.loop = asyncio.new_event_loop()

    def prepare(self, method: str, path: str, token: str = "", body: Any = None) -> Any:
        """What uvicorn makes of such a request by curl."""
        path, _, query = path.partition("?")
        headers = [
            (b"host", b"localhost:5000"),
            (b"user-agent", b"curl/8.5.0"),
            (b"accept", b"*/*"),
        ]
        content = b"" if body is None else json.dumps(body).encode()
        if token:
            headers.append((b"authorization", f"Bearer {token}".encode()))
        if body is not None:
            headers.append((b"content-type", b"application/json"))
            headers.append((b"content-length", str(len(content)).encode()))
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "root_path": "",
            "headers": headers,
            "client": ("127.0.0.1", 50000),
            "server": ("127.0.0.1", 5000),
        }
        return scope, content

    async def _run(self, prepared: Any) -> tuple[str, Any, bytes]:
        scope, content = prepared
        sent: list[dict[str, Any]] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": content, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await self.app(scope, receive, send)
        body = b"".join(message.get("body", b"") for message in sent[1:])
        return str(sent[0]["status"]), sent[0]["headers"], body

    async def _run_all(self, prepared: list[Any]) -> set[str]:
        return {(await self._run(each))[0] for each in prepared}

    def run(self, prepared: Any) -> tuple[str, list[tuple[str, str]], bytes]:
        status, headers, body = self.loop.run_until_complete(self._run(prepared))
        text = [(name.decode(), value.decode()) for name, value in headers]
        return status, text, body

    def run_all(self, prepared: list[Any]) -> set[str]:
        return self.loop.run_until_complete(self._run_all(prepared))


def app_in_process(module: str) -> WSGIApp:
    """The app of bench/peers/<module>.py, or that of service.py on the memory store."""
    if module == "service":
        import service

        settings = service.Settings.from_environ(ENVIRON)
        return WSGIApp(service.create_app(settings))
    app = import_module(f"peers.{module}").create_app()
    return ASGIApp(app) if module == "fastapi_pyjwt" else WSGIApp(app)


# ---- Apps under servers --------------------------------------------------------------


def environ_without_ours() -> dict[str, str]:
    ours = ("SERVICE_", "GUNICORN_", "PORT", "WEB_CONCURRENCY", "SCRIPT_NAME")
    return {name: it for name, it in os.environ.items() if not name.startswith(ours)}


class Server:
    """An app under a server of its own, one worker, on a free port of 127.0.0.1."""

    def __init__(self, app: str, command: str, environ: dict[str, str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        bin = Path(sys.executable).parent
        words = command.format(app=app, port=self.port).split()
        path = os.pathsep.join([str(ROOT), str(BENCH)])
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the server)
        self.process = psutil.Popen(
            [bin / words[0], *words[1:]],
            cwd=ROOT,
            env=environ_without_ours() | {"PYTHONPATH": path} | environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self.log,
        )
        self.wait_until_it_answers()

    def wait_until_it_answers(self) -> None:
        deadline = time.monotonic() + 30
        while self.process.poll() is None and time.monotonic() < deadline:
            try:
                self.call("GET", "/health")
            except (OSError, http.client.HTTPException, ValueError):
                time.sleep(0.05)
            else:
                return
        self.stop()
        self.log.seek(0)
        raise RuntimeError(f"{self.process.args}: {self.log.read().decode()}")

    def call(
        self,
        method: str,
        path: str,
        token: str = "",
        body: Any = None,
        address: str = "127.0.0.1",
    ) -> Reply:
        """One request, untimed; address is the client's."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        content = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            content = json.dumps(body)
        connection = http.client.HTTPConnection(
            "127.0.0.1", self.port, timeout=30, source_address=(address, 0)
        )
        try:
            connection.request(method, path, content, headers)
            response = connection.getresponse()
            named = {name.lower(): value for name, value in response.getheaders()}
            text = response.read()
        finally:
            connection.close()
        is_json = named.get("content-type", "").startswith("application/json")
        return Reply(
            response.status, named, json.loads(text or "null") if is_json else None
        )

    def cpu(self) -> float:
        """Seconds of processor time of the server's processes so far."""
        family = [self.process, *self.process.children(recursive=True)]
        return sum(sum(process.cpu_times()[:2]) for process in family)

    def memory(self) -> int:
        """Bytes that its processes hold, shared pages counted once for each."""
        family = [self.process, *self.process.children(recursive=True)]
        return sum(process.memory_info().rss for process in family)

    def wrk(
        self, *arguments: str, seconds: int, threads: int, connections: int
    ) -> Load:
        """What a request costs while wrk sends as many as it can; see wrk.lua."""
        options = [f"-t{threads}", f"-c{connections}", f"-d{seconds}s", "--timeout=30s"]
        options += ["-s", str(BENCH / "wrk.lua"), f"http://127.0.0.1:{self.port}"]
        cpu = self.cpu()
        command = ["wrk", *options, "--", *arguments]
        output = subprocess.run(command, capture_output=True, text=True, check=True)
        cpu = self.cpu() - cpu
        figures = re.search("RESULT (.*)", output.stdout)[1].split()  # type: ignore[index]
        count, clock, refused, broken, p50, p99 = map(float, figures)
        assert count and not broken, output.stdout
        cost = Cost(cpu / count * 1e6, clock / count * 1e6)
        return Load(cost, int(count), int(refused), p50, p99)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
        try:
            self.process.wait(30)
        except psutil.TimeoutExpired:
            self.process.kill()
            self.process.wait()
