"""What only a server shows: bytes on the wire, processes, signals, the log, the README.

gunicorn with either worker is how the service runs; what it owes to any server is shown
under Granian and waitress as well.
"""

import http.client
import json
import re
import shutil
import sys
from dataclasses import fields
from urllib.parse import urlencode

import pytest
from werkzeug.datastructures import Headers

import service
from conftest import ROOT, eventually, free_port, is_running, run, serve
from test_service import (
    FORM,
    JSON,
    PASSWORD,
    SECRET,
    TRANSCRIPT,
    Answer,
    World,
    each,
)

GRANIAN = "granian --interface wsgi --host 127.0.0.1 --port {port} --factory"
SERVERS = {
    "gthread": "gunicorn -k gthread",
    "gevent": "gunicorn -k gevent",
    "granian": f"{GRANIAN} service:create_app",
    "waitress": "waitress-serve --listen 127.0.0.1:{port} --call service:create_app",
}
GUNICORNS = each("kind", "gthread gevent")


@pytest.fixture(scope="session", params=SERVERS)
def web(request):
    """Each kind of server, for all tests that leave it as it was."""
    with serve(command=SERVERS[request.param].split()) as server:
        yield server


def wired(line: str, *headers: str, body: bytes = b"") -> bytes:
    """A request as it goes over the wire, on a connection that ends with its answer."""
    lines = [f"{line} HTTP/1.1", "Host: localhost", "Connection: close", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + body


def exchange(server: serve, wire: bytes) -> Answer:
    """The answer to these bytes; its body is all that follows, rightly or not."""
    with server.send(wire) as connection, connection.makefile("rb") as stream:
        status = int(stream.readline().split()[1])
        headers = Headers(http.client.parse_headers(stream).items())
        return Answer(status, headers, stream.read())


def bearer(server: serve) -> str:
    return f"Authorization: Bearer {server.user('wire')}"


# ---- What any server shows ----------------------------------------------------------


@each("kind", [FORM, JSON])
def test_one_connection_serves_the_whole_transcript(web, kind):
    connection = http.client.HTTPConnection("127.0.0.1", web.port, timeout=30)
    headers, sockets = {"Content-Type": kind}, set()

    def send(line, values=None):
        body = json.dumps(values) if kind == JSON else urlencode(values or {})
        connection.request(*line.split(), body if values else None, headers)
        sockets.add(connection.sock.getsockname())
        with connection.getresponse() as answer:
            found = Headers(answer.getheaders())
            return Answer(answer.status, found, answer.read())

    headers["Authorization"] = f"Bearer {web.user(f'user-{kind[-4:]}')}"
    for line, values, status, expected in TRANSCRIPT[2:]:  # but who alice is
        answer = send(line, values)
        found = answer.json if answer.body else None
        assert (line, answer.status, found) == (line, status, expected)
    created = send("POST /todos", {"task": "x"})
    assert created.headers["Location"] == "/todos/todo5"
    assert send("POST /todos", {"tusk": "x"}).status == 400
    headers["Connection"] = "close"
    assert send("GET /nowhere").status == 404
    assert len(sockets) == 1 or "waitress" in web.command[0]  # it parts after a 204


def test_an_answer_without_a_body_ends_with_its_headers(web):
    token = web.user("wire")
    tag = web("PUT /todos/x", token, task="x").headers["ETag"]
    for line, condition, status in [
        ("HEAD /todos/x", "", 200),
        ("HEAD /todos/todo9", "", 404),
        ("HEAD /nowhere", "", 404),
        ("GET /todos/x", tag, 304),
        ("DELETE /todos/x", "", 204),
        ("OPTIONS /todos", "", 204),
    ]:
        headers = (f"Authorization: Bearer {token}", f"If-None-Match: {condition}")
        answer = exchange(web, wired(line, *headers))
        assert (line, answer.status, answer.body) == (line, status, b"")


def test_a_body_in_chunks_is_read_to_its_end_or_refused(web):
    headers = (bearer(web), f"Content-Type: {FORM}", "Transfer-Encoding: chunked")

    def put(*chunks):
        body = b"".join(b"%x\r\n%s\r\n" % (len(each), each) for each in (*chunks, b""))
        return exchange(web, wired("PUT /todos/parts", *headers, body=body))

    answer = put(b"task=in ", b"three ", b"parts")
    if answer.status != 411:
        assert (answer.status, answer.json) == (201, {"task": "in three parts"})
        answer = put(b"task=" + b"x" * 1000, b"x" * 65_000)
        assert (answer.status, list(answer.json)) == (413, ["message"])


@each("size", [65_537, 1_000_000, 10_000_000])
def test_whoever_sends_too_much_gets_to_read_the_answer(web, size):
    """Even a client that sends all of it before it reads anything."""
    if size > 1_000_000 and web.command[0] != "gunicorn":
        size = 66_000  # what others do with more is their own affair
    who, lengths = bearer(web), (f"Content-Length: {size}", f"Content-Type: {FORM}")
    for line, header, status in [
        ("POST /todos", who, 413),
        ("POST /users", "X: y", 413),
        ("POST /todos", "X: y", 401),
        ("POST /nowhere", "X: y", 404),
    ]:
        answer = exchange(web, wired(line, header, *lengths, body=b"x" * size))
        assert (line, answer.status) == (line, status)
        assert list(answer.json) == ["message"]
    if web.command[0] == "gunicorn":  # from the header alone, before the body is there
        with web.send(wired("POST /todos", who, *lengths)) as connection:
            assert connection.recv(12) == b"HTTP/1.1 413"


@each("kind", SERVERS)
def test_sigterm_ends_every_server(kind):
    with serve(command=SERVERS[kind].split()) as server:
        server.stop()
        assert "Traceback" not in server.log
        assert server("GET /health").status == 0
        eventually(lambda: not is_running(-server.process.pid))


# ---- gunicorn: bytes on the wire ----------------------------------------------------

CHUNKED = "Transfer-Encoding: chunked"
SMUGGLED = b"0\r\n\r\nGET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
AMBIGUOUS = [  # headers of requests that two servers could read differently
    ("Content-Length: 6", CHUNKED),
    (CHUNKED, CHUNKED),
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
)


@pytest.mark.parametrize("web", ["gthread", "gevent"], indirect=True)
def test_what_is_malformed_is_refused_and_odd_is_no_error(web):
    who, kind = bearer(web), f"Content-Type: {FORM}"
    for headers in AMBIGUOUS:
        answer = exchange(web, wired("POST /todos", *headers, body=SMUGGLED))
        assert answer.status in (400, 501), headers
        assert (b"HTTP/1.1 " in answer.body, b'"ok"' in answer.body) == (False, False)
    for size in (b"zz", b"-6", b"5", b"0x6"):
        body = size + b"\r\ntask=x\r\n0\r\n\r\n"
        answer = exchange(web, wired("POST /todos", who, kind, CHUNKED, body=body))
        assert (size, answer.status) == (size, 400)
    for line in ODD_LINES.split("|"):
        status = exchange(web, wired(line, who)).status
        assert (line, 200 <= status < 500) == (line, True)
    many = "If-None-Match: " + '"x",' * 1500 + '"x"'  # takes long to read
    assert exchange(web, wired("GET /todos", who, many)).status == 431
    for version, status in ((b"1.1", 400), (b"1.0", 200)):  # without Host
        wire = b"GET /health HTTP/%s\r\nConnection: close\r\n\r\n" % version
        assert exchange(web, wire).status == status


def test_no_header_of_a_client_moves_the_service_but_the_environment_does():
    forged = ["SCRIPT_NAME: /evil", "PATH_INFO: /health", "X-Forwarded-Proto: https"]
    forged += ["X-Forwarded-Prefix: /evil", "X-Forwarded-Host: evil"]
    kind = (f"Content-Type: {FORM}", "Content-Length: 6")
    with serve(SCRIPT_NAME="/api") as server:
        wire = wired("POST /api/todos", bearer(server), *forged, *kind, body=b"task=x")
        answer = exchange(server, wire)
        assert (answer.status, answer.headers["Location"]) == (201, "/api/todos/todo4")


# ---- The README ---------------------------------------------------------------------
# Its commands run, its sessions go as printed, its pieces of code are those of files.
# What it shows of nginx, systemd, containers and backups, test_deployment.py runs.

README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"(?ms)^```(\w+)\n(.*?)^```$", README)
RUN_ELSEWHERE = "SERVICE_PROXIES=1|VACUUM INTO|pg_restore|apt-get|pytest"
SHELL = [code for language, code in BLOCKS if language == "sh"]
SCRIPTS = [code for code in SHELL if not re.search(RUN_ELSEWHERE, code)]
GOES_ON = r"\b(gunicorn|granian|waitress-serve|service\.py|examples/\w+\.py)\b"
LOCAL = "http://localhost"
ENDS = r"--check-config|adduser|passwd|deluser|--import|pip install"


@pytest.fixture
def clone(tmp_path):
    """The repository as its reader has it, with our environment for its .venv."""
    ours = shutil.ignore_patterns(".*", "tests", "bench", "__pycache__", "*.egg-info")
    folder = shutil.copytree(ROOT, tmp_path / "todo", ignore=ours)
    (folder / ".venv").symlink_to(sys.prefix)
    return folder


@each("script", SCRIPTS[1:])
def test_the_commands_of_the_readme_run(clone, script):
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
    (clone / "list.m3u").write_text(f"#EXTM3U\n#EXTINF:-1,News\n{LOCAL}:9/news.m3u8\n")
    given = {"PORT": port, "TV_PASSWORD": PASSWORD, "SERVICE_SECRET_KEY": SECRET}
    given |= {"HOME": str(clone), "PYTHONPATH": str(clone)}
    status, said = run("bash", "-euc", "\n".join(steps), folder=clone, **given)
    assert status == 0, "\n".join([*steps, said])
    assert "does not provide the extra" not in said


@each("session", [code for language, code in BLOCKS if language == "console"])
def test_a_session_of_the_readme_goes_as_printed(clone, session):
    (clone / ".curlrc").write_text("silent")
    with serve(folder=clone, PYTHONPATH=str(clone)) as server:
        commands = "".join(re.findall(r"(?m)^\$ (.*\n)", session))
        typed = commands.replace(":5000", f":{server.port}")
        # -v repeats each line before it is run, as the session shows them.
        status, said = run("bash", "-euv", typed=typed, HOME=str(clone))
    new_each_time = r"eyJ[\w.…-]+|\b86400\b|\b863\d\d\b"
    said, session = (re.sub(new_each_time, "…", text) for text in (said, session))
    printed = session.replace("$ ", "").replace(":5000", f":{server.port}")
    assert (status, said) == (0, printed)


def test_the_first_command_sets_everything_up_and_runs_the_service(clone):
    (clone / ".venv").unlink()
    home = {"PYTHONPATH": "", "HOME": str(clone)}
    command = ["bash", "-c", SCRIPTS[0]]
    with serve(command=command, folder=clone, seconds=300, **home) as server:
        token = server.user("alice")
        assert server("GET /todos/todo3", token).json == {"task": "profit!"}


@each("code", [code for language, code in BLOCKS if language == "python"])
def test_a_piece_of_code_in_the_readme_is_real_or_runs(code, clone):
    files = [*ROOT.glob("*.py"), *ROOT.glob("examples/*.py")]
    if not any(code.strip() in path.read_text() for path in files):
        (clone / "piece.py").write_text(code)
        there = {"folder": clone, "PYTHONPATH": str(clone)}
        assert run(sys.executable, "piece.py", **there)[0] == 0


def test_every_block_of_the_readme_is_read_by_some_test_or_by_ci():
    deployment = (ROOT / "tests" / "test_deployment.py").read_text()
    for language, code in BLOCKS:
        known = language in ("sh", "console", "python", "mermaid")
        assert known or f'"{language}"' in deployment or "not run here" in README, code
    second = next(code for code in SHELL if "pytest" in code).splitlines()
    assert {*second} & {*(ROOT / ".ci" / "run").read_text().splitlines()}


def test_the_tables_of_the_readme_are_those_of_the_service():
    settings = {f"SERVICE_{field.name.upper()}" for field in fields(service.Settings)}
    assert set(re.findall(r"(?m)^\| `(SERVICE_\w+)` \|", README)) == settings
    rooms = re.findall(r"(?m)^# ---- (.+?) -+$", (ROOT / "service.py").read_text())
    rows = re.findall(r"(?m)^\| ([A-Z][^|]*?) \|", README)
    assert [name for name in rows if name in rooms] == rooms
    paths = World()("GET /openapi.json").json["paths"].items()
    operations = {f"{way.upper()} {path}" for path, ways in paths for way in ways}
    rows = re.findall(r"(?m)^\| (`[A-Z]+ /[^|]*) \|", README)
    named = re.findall(r"`([A-Z]+ /[^` ?]*)", "".join(rows))
    assert operations <= {re.sub("<(.*?)>", r"{\1}", each) for each in named}
