"""Try the TV examples on real streams that break, and print what came of it.

    python bench/tv.py                 # all of it, in under ten minutes; needs ffmpeg
    python bench/tv.py faults outages  # parts: faults days outages many lists

ffmpeg makes streams of 160x90 with a target duration of 2 s; an origin on the loopback
interface serves them under the names of many channels, and breaks each as it is told
to. A stream goes to multicast groups on the loopback interface alone. What was measured
stands in tv.json beside this file, with the machine's load at that time.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx2

ROOT = Path(__file__).resolve().parent.parent
PASSWORD = "correct horse battery staple"
GROUP = "239.255.42.42"
TARGET = 2


def note(text: str) -> None:
    """Progress, beside the results."""
    print(time.strftime("%H:%M:%S"), text, file=sys.stderr, flush=True)


# ---- The origin ----------------------------------------------------------------------
# A process of its own. /c/<channel>/master.m3u8 names the variants main and low, and
# /c/<channel>/<stream>/index.m3u8 is the playlist that ffmpeg wrote. What kind of
# channel it is, its name says: tokens-1, redirect-1, flaky-1.


class Origin:
    """Serves streams from a folder, and breaks them."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._faults: dict[str, str] = {}
        self._random = random.Random(12)

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        relay, _ = await loop.create_datagram_endpoint(
            lambda: Relay(self._faults), local_addr=("127.0.0.1", 0)
        )
        server = await asyncio.start_server(self._talk, "127.0.0.1", 0, backlog=1000)
        http = server.sockets[0].getsockname()[1]
        print(http, relay.get_extra_info("sockname")[1], flush=True)
        await server.serve_forever()

    async def _talk(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                url = urlsplit(head.split(b" ", 2)[1].decode())
                await self._answer(url.path, parse_qs(url.query), writer)
                await writer.drain()
        writer.close()

    async def _answer(
        self, path: str, query: dict[str, list[str]], writer: asyncio.StreamWriter
    ) -> None:
        _, root, channel, *rest = path.split("/")
        if root == "break":
            self._faults[channel] = query.get("fault", [""])[0]
            return reply(writer, 200)
        kind, fault = channel.rpartition("-")[0], self._faults.get(channel, "")
        stream, file = rest[0], rest[-1]
        is_playlist = file.endswith(".m3u8")
        if fault == "hanging origin":
            await asyncio.sleep(3600)
        if is_playlist and fault.startswith("playlist "):
            if fault == "playlist HTML":
                return reply(writer, 200, b"<!doctype html><title>Sorry</title>")
            if fault == "playlist redirect loop":
                return reply(writer, 302, location=path)
            return reply(writer, int(fault.split()[1]))
        if kind == "redirect" and "led" not in query:
            return reply(writer, 302, location=f"{path}?led=1")
        if kind == "flaky" and is_playlist and self._random.random() < 0.2:
            return reply(writer, 502)
        if file == "master.m3u8":
            return reply(writer, 200, self._master(kind))
        is_dead = fault == "all variants dead" or (
            fault == "one of two variants dead" and stream == "low"
        )
        if is_playlist and is_dead:
            return reply(writer, 404)
        until = float(query.get("until", ["inf"])[0])
        if is_playlist and time.time() > until:
            return reply(writer, 403)
        if not is_playlist and fault == "segments 404":
            return reply(writer, 404)
        try:
            body = (self._folder / stream / file).read_bytes()
        except FileNotFoundError:
            return reply(writer, 404)
        if not is_playlist:
            body = damage(body, fault, self._random)
        if not is_playlist and fault == "slow origin":
            reply(writer, 200, body[:1000], size=len(body))
            await asyncio.sleep(1.3 * TARGET)
            writer.write(body[1000:])
            return None
        return reply(writer, 200, body)

    def _master(self, kind: str) -> bytes:
        query = f"?until={time.time() + 8:.3f}" if kind == "tokens" else ""
        lines = ["#EXTM3U"]
        for stream, rate in (("main", 400_000), ("low", 200_000)):
            lines += [
                f"#EXT-X-STREAM-INF:BANDWIDTH={rate}",
                f"{stream}/index.m3u8{query}",
            ]
        return "\n".join(lines).encode()


def reply(
    writer: asyncio.StreamWriter,
    status: int,
    body: bytes = b"",
    size: int | None = None,
    location: str = "",
) -> None:
    head = f"HTTP/1.1 {status} .\r\nContent-Length: {size or len(body)}\r\n"
    head += f"Location: {location}\r\n" if location else ""
    writer.write(head.encode() + b"\r\n" + body)


def damage(body: bytes, fault: str, chance: random.Random) -> bytes:
    """A segment without 1 % of its packets, or with scrambled pictures and sound."""
    if fault not in ("1 % packet loss in segments", "scrambled"):
        return body
    packets = [body[n : n + 188] for n in range(0, len(body), 188)]
    if fault == "scrambled":
        for n, packet in enumerate(packets):
            pid = (packet[1] & 0x1F) << 8 | packet[2]
            if pid in (0x100, 0x101):  # ffmpeg's first two streams
                packets[n] = packet[:3] + bytes([packet[3] | 0xC0]) + packet[4:]
    else:
        packets = [packet for packet in packets if chance.random() >= 0.01]
    return b"".join(packets)


class Relay(asyncio.DatagramProtocol):
    """Sends what ffmpeg sends it on to the group, on the loopback interface alone."""

    def __init__(self, faults: dict[str, str]) -> None:
        self._faults = faults
        self._random = random.Random(12)
        self._sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        loopback = socket.inet_aton("127.0.0.1")
        self._sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, loopback)
        self._sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 0)

    def connection_made(self, transport: Any) -> None:
        self._port = transport.get_extra_info("sockname")[1]

    def datagram_received(self, data: bytes, address: Any) -> None:
        # Two channels share the stream: each has a group of its own.
        for group, fault in ((1, "2 % loss on multicast"), (2, "multicast silent")):
            is_broken = self._faults.get(f"group-{group}") == fault
            is_lost = group == 2 or self._random.random() < 0.02
            if not (is_broken and is_lost):
                self._sender.sendto(data, (f"{GROUP[:-1]}{group}", self._port))


# ---- What runs beside the bench ------------------------------------------------------


class Process:
    """A program in a process group of its own, with its output in a file."""

    def __init__(self, lab: Lab, name: str, *command: Any, **environ: str) -> None:
        self.log = lab.folder / f"{name}.log"
        self._command = [str(part) for part in command]
        self._environ = os.environ | environ
        self.start()
        lab.stack.callback(self.kill)

    def start(self) -> None:
        with self.log.open("a") as log:
            self._process = subprocess.Popen(
                self._command,
                env=self._environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        self._process.send_signal(number)
        self._process.wait(30)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    @property
    def cpu(self) -> float:
        """Seconds of processor time."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    @property
    def peak_mb(self) -> float:
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(r"VmHWM:\s+(\d+) kB", status)
        assert found
        return int(found[1]) / 1000


SOURCE = ["ffmpeg", "-loglevel", "error", "-nostdin", "-y"]
SOURCE += ["-re", "-f", "lavfi", "-i", "testsrc2=size=160x90:rate=25"]
SOURCE += ["-re", "-f", "lavfi", "-i", "sine=sample_rate=44100"]


def coding(kbps: int) -> list[str]:
    """Pictures at a constant rate, a key frame every TARGET seconds, and sound."""
    rate = f"{kbps}k"
    video = ["-c:v", "libx264", "-preset", "ultrafast", "-g", str(25 * TARGET)]
    video += ["-b:v", rate, "-minrate", rate, "-maxrate", rate, "-bufsize", rate]
    video += ["-x264-params", "nal-hrd=cbr:scenecut=0"]
    return ["-map", "0:v", "-map", "1:a", *video, "-c:a", "aac", "-b:a", "32k"]


class Lab:
    """The folder, the encoders and the origin that all parts share."""

    def __init__(self, stack: ExitStack) -> None:
        self.stack = stack
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        origin = subprocess.Popen(
            [sys.executable, __file__, "--origin", str(self.folder)],
            stdout=subprocess.PIPE,
            text=True,
        )
        stack.callback(origin.wait)
        stack.callback(origin.kill)
        assert origin.stdout
        http, self.relay = map(int, origin.stdout.readline().split())
        self.origin = f"http://127.0.0.1:{http}"
        self.encoders = {
            "main": self.encoder("main", "low"),
            "killed": self.encoder("killed"),
            "ended": self.encoder("ended"),
        }
        udp = f"udp://127.0.0.1:{self.relay}?pkt_size=1316"
        Process(self, "udp", *SOURCE, *coding(600), "-f", "mpegts", udp)
        streams = ("main", "low", "killed", "ended")
        wait(lambda: all(self.segments(each) >= 4 for each in streams), 60)

    def segments(self, stream: str) -> int:
        return len(list((self.folder / stream).glob("*.ts")))

    def encoder(self, *streams: str) -> Process:
        command: list[Any] = [*SOURCE]
        for n, stream in enumerate(streams):
            folder = self.folder / stream
            folder.mkdir(exist_ok=True)
            command += [*coding(400 // 2**n), "-f", "hls", "-hls_time", TARGET]
            command += ["-hls_list_size", 6, "-hls_flags", "delete_segments+temp_file"]
            command += [
                "-hls_segment_filename",
                folder / "%d.ts",
                folder / "index.m3u8",
            ]
        return Process(self, streams[0], *command)

    def fault(self, channel: str, fault: str) -> None:
        httpx2.get(f"{self.origin}/break/{channel}", params={"fault": fault})

    def url(self, channel: str, file: str = "main/index.m3u8") -> str:
        return f"{self.origin}/c/{channel}/{file}"


def wait(condition: Callable[[], Any], seconds: float) -> Any:
    """What the condition returns once it is true; TimeoutError."""
    deadline = time.monotonic() + seconds
    while not (result := condition()):
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.05)
    return result


def free_port() -> int:
    """Of those that no client gets while a service that comes back is away."""
    while True:
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", random.randrange(12_000, 32_000)))
            return int(probe.getsockname()[1])


class Station:
    """A service of its own with its accounts, and monitors."""

    def __init__(self, lab: Lab, name: str, **settings: str) -> None:
        self.lab, self.name = lab, name
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._environ = {
            "PORT": str(port),
            "PYTHONPATH": f"{ROOT}:{ROOT / 'examples'}",
            "SERVICE_SECRET_KEY": os.urandom(32).hex(),
            "SERVICE_STORE_URL": f"sqlite:///{lab.folder / name}.db",
            "SERVICE_ISSUER": self.url,
            **settings,
        }
        for user, role in (
            ("boss", "operator"),
            ("watch", "monitor"),
            ("spare", "monitor"),
            ("viewer", ""),
        ):
            self.add_user(user, role)
        gunicorn = [sys.executable, "-m", "gunicorn", "-c", ROOT / "gunicorn.conf.py"]
        self.service = Process(
            lab,
            f"{name}-service",
            *gunicorn,
            "tv_service:create_app()",
            **self._environ,
        )
        self._tokens: dict[str, str] = {}
        self._http = httpx2.Client(base_url=self.url, timeout=30)
        lab.stack.callback(self._http.close)
        self.logins = 0  # of the bench itself
        wait(self.is_up, 60)

    def is_up(self) -> bool:
        with suppress(httpx2.HTTPError):
            return self._http.get("/health").status_code == 200
        return False

    def add_user(self, name: str, role: str) -> None:
        program = str(ROOT / "examples" / "tv_service.py")
        command = [sys.executable, program, "adduser", name]
        subprocess.run(
            [*command, *(["--role", role] if role else [])],
            input=f"{PASSWORD}\n",
            text=True,
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | self._environ,
        )

    def call(self, user: str, method: str, path: str, **given: Any) -> httpx2.Response:
        """A request by a user, who is logged in if need be; by nobody if user is ""."""
        while True:
            headers = {**given.pop("headers", {})}
            if user and user not in self._tokens:
                form = {
                    "grant_type": "password",
                    "username": user,
                    "password": PASSWORD,
                }
                answer = self._http.post("/token", data=form).json()
                self._tokens[user] = answer["access_token"]
                self.logins += 1
            if user:
                headers["Authorization"] = f"Bearer {self._tokens[user]}"
            response = self._http.request(method, path, headers=headers, **given)
            if response.status_code != 401 or not user:
                return response
            del self._tokens[user]

    def add(self, name: str, url: str, **more: Any) -> str:
        """A channel; returns its id."""
        item = {"name": name, "url": url, **more}
        response = self.call("boss", "POST", "/channels", json=item)
        assert response.status_code == 201, response.text
        return response.headers["Location"].rpartition("/")[2]

    def monitor(self, user: str = "watch") -> Process:
        return Process(
            self.lab,
            f"{self.name}-{user}",
            *(sys.executable, ROOT / "examples" / "tv_monitor.py"),
            *("--service", self.url, "--user", user, "--interface", "127.0.0.1"),
            TV_PASSWORD=PASSWORD,
        )

    def states(self) -> dict[str, Any]:
        with suppress(httpx2.HTTPError, ValueError, KeyError):
            states: dict[str, Any] = self.call("viewer", "GET", "/states").json()
            return states
        return {}

    def state(self, id: str) -> str:
        return str(self.states().get(id, {}).get("state"))

    def all_on_air(self, ids: Iterable[str], seconds: float = 60) -> None:
        def are() -> bool:
            states = self.states()
            return all(states.get(id, {}).get("state") == "on air" for id in ids)

        wait(are, seconds)


# ---- Parts ---------------------------------------------------------------------------

OFF_AIR, DEGRADED = ("off-air", 8), ("degraded", 11)
FAULTS = {
    "encoder killed": OFF_AIR,
    "encoder ended": OFF_AIR,
    "playlist 500": OFF_AIR,
    "playlist 403": OFF_AIR,
    "playlist HTML": OFF_AIR,
    "playlist redirect loop": OFF_AIR,
    "segments 404": OFF_AIR,
    "hanging origin": OFF_AIR,
    "all variants dead": OFF_AIR,
    "scrambled": OFF_AIR,
    "one of two variants dead": ("degraded", 5),
    "slow origin": DEGRADED,
    "1 % packet loss in segments": DEGRADED,
    "2 % loss on multicast": DEGRADED,
    "multicast silent": ("degraded", 13),
}
REPAIRED = 13  # seconds


def try_faults(lab: Lab, report: Report, rounds: int = 3) -> None:
    """Break every channel at once, each in its way; then repair all of them."""
    station = Station(lab, "faults")
    ids = {}
    for n, fault in enumerate(FAULTS):
        url = lab.url(f"c-{n}")
        if "encoder" in fault:
            url = lab.url(f"c-{n}", f"{fault.split()[1]}/index.m3u8")
        if "variants" in fault:
            url = lab.url(f"c-{n}", "master.m3u8")
        group = {"2 % loss on multicast": 1, "multicast silent": 2}.get(fault)
        more = {"multicast": f"udp://@{GROUP[:-1]}{group}:{lab.relay}"} if group else {}
        ids[fault] = station.add(fault, url, **more)
    station.monitor()
    station.all_on_air(ids.values())
    seen: dict[str, list[float]] = {fault: [] for fault in FAULTS}
    repaired: dict[str, list[float]] = {fault: [] for fault in FAULTS}
    for number in range(rounds):
        note(f"faults: round {number + 1} of {rounds}")
        time.sleep(random.uniform(0, TARGET))
        began = time.monotonic()
        for n, fault in enumerate(FAULTS):
            break_channel(lab, n, fault, is_broken=True)
        wanted = {fault: state for fault, (state, _) in FAULTS.items()}
        measure(station, ids, wanted, began, seen)
        time.sleep(random.uniform(0, TARGET))
        began = time.monotonic()
        for n, fault in enumerate(FAULTS):
            break_channel(lab, n, fault, is_broken=False)
        measure(station, ids, dict.fromkeys(FAULTS, "on air"), began, repaired)
    for fault, (state, bound) in FAULTS.items():
        report.row(fault, state, max(seen[fault]), bound, "s")
    for fault in FAULTS:
        report.row(f"{fault}: repaired", "on air", max(repaired[fault]), REPAIRED, "s")


def break_channel(lab: Lab, n: int, fault: str, is_broken: bool) -> None:
    encoder = fault.partition("encoder ")[2]
    if encoder and is_broken:
        kill = signal.SIGKILL if encoder == "killed" else signal.SIGTERM
        lab.encoders[encoder].end(kill)
    elif encoder:
        lab.encoders[encoder].start()
    elif "multicast" in fault:
        lab.fault(
            "group-1" if "loss" in fault else "group-2", fault if is_broken else ""
        )
    else:
        lab.fault(f"c-{n}", fault if is_broken else "")


def measure(
    station: Station,
    ids: dict[str, str],
    wanted: dict[str, str],
    began: float,
    into: dict[str, list[float]],
) -> None:
    """How long it takes until the service says of each what is wanted of it."""
    missing = set(wanted)
    while missing and time.monotonic() < began + 30:
        states = station.states()
        for fault in list(missing):
            if states.get(ids[fault], {}).get("state") == wanted[fault]:
                into[fault].append(time.monotonic() - began)
                missing.remove(fault)
        time.sleep(0.1)
    for fault in missing:
        note(f"faults: {fault} was never {wanted[fault]}")
        into[fault].append(float("inf"))


def try_days(lab: Lab, report: Report, seconds: float = 300) -> None:
    """Side by side, for five minutes: healthy channels on a busy machine, a day."""
    healthy = Station(lab, "healthy")
    kinds = ["redirect", "tokens", "flaky", "flaky", *["healthy"] * 16]
    ids = []
    for n, kind in enumerate(kinds):
        file = "master.m3u8" if kind == "tokens" or n % 2 else "main/index.m3u8"
        ids.append(healthy.add(f"{kind} {n}", lab.url(f"{kind}-{n}", file)))
    healthy.monitor()
    day = Station(lab, "day", SERVICE_ACCESS_TTL="5", SERVICE_REFRESH_TTL="60")
    toggled = day.add("toggled", lab.url("day-1"))
    day.add("steady", lab.url("day-2"))
    monitor = day.monitor()
    healthy.all_on_air(ids)
    day.all_on_air([toggled])
    for n in range(2):
        Process(lab, f"busy-{n}", sys.executable, "-c", "while True: pass")
    changes: dict[int, str] = {}
    began, is_broken = time.monotonic(), False
    while time.monotonic() < began + seconds:
        if int((time.monotonic() - began) / 20) % 2 != is_broken:
            is_broken = not is_broken
            lab.fault("day-1", "playlist 500" if is_broken else "")
        for each in day.states().get(toggled, {}).get("history", []):
            changes[each["since"]] = each["state"]
        note(f"days: {time.monotonic() - began:.0f} of {seconds:.0f} s")
        time.sleep(10)
    lab.fault("day-1", "")
    day.all_on_air([toggled])
    states = healthy.states()
    alarms = [states[id]["history"] for id in ids if len(states[id]["history"]) > 1]
    report.row(f"false alarms, 20 channels, {seconds:.0f} s, busy", "", len(alarms), 0)
    for alarm in alarms:
        note(f"days: false alarm {alarm}")
    for each in day.states()[toggled]["history"]:
        changes[each["since"]] = each["state"]
    told = monitor.log.read_text()
    lost = len(re.findall(r"toggled: ", told)) - len(changes)
    log = day.service.log.read_text()
    logins = len(re.findall(r"login: user 'watch'", log))
    tokens = len(re.findall(r" POST '/token' 200 ", log)) - day.logins
    sessions = -(-(time.monotonic() - began) // 60)
    report.row("day: changes of state", "", len(changes), None)
    report.row("day: changes lost", "", lost, 0)
    report.row("day: logins in sessions of 60 s", "", logins, sessions + 1)
    # A token of 5 s lives for 3.5 s at least: Authlib counts whole seconds.
    report.row("day: refreshes", "", tokens - logins, seconds / 3.5)
    report.row("day: errors in the monitor's log", "", told.count("service: "), 0)


def try_outages(lab: Lab, report: Report) -> None:
    """End the service and the monitors in turns, while a channel comes and goes."""
    station = Station(lab, "outages")
    id = station.add("toggled", lab.url("outage-1"))
    monitor = station.monitor()
    station.all_on_air([id])
    wanted = ["on air"]

    def change() -> None:
        state = "off-air" if wanted[-1] == "on air" else "on air"
        lab.fault("outage-1", "playlist 500" if state == "off-air" else "")
        wanted.append(state)

    def delivered(what: str, since: float) -> None:
        with suppress(TimeoutError):
            wait(lambda: station.state(id) == wanted[-1], 30)
        report.row(what, "", time.monotonic() - since, 10, "s")

    note("outages: the service is away for 12 s")
    station.service.end()
    change()
    time.sleep(12)
    station.service.start()
    wait(station.is_up, 30)
    delivered("service away for 12 s: delivered after its return", time.monotonic())

    note("outages: the service is killed")
    change()
    station.service.kill()
    time.sleep(8)
    station.service.start()
    wait(station.is_up, 30)
    delivered("service killed: delivered after its return", time.monotonic())

    note("outages: the monitor gets no processor time for 12 s")
    os.kill(monitor.pid, signal.SIGSTOP)
    time.sleep(12)
    os.kill(monitor.pid, signal.SIGCONT)
    time.sleep(8)

    note("outages: the monitor is killed")
    monitor.kill()
    change()
    time.sleep(8)
    monitor.start()
    delivered("monitor killed: delivered after its return", time.monotonic())

    note("outages: a second monitor stands by, and the first is killed")
    spare = station.monitor("spare")
    time.sleep(8)
    change()
    wait(lambda: station.state(id) == wanted[-1], 30)
    stood_by = "reports" not in spare.log.read_text()
    report.row("a second monitor stood by", "", int(stood_by), None, is_good=stood_by)
    monitor.kill()
    change()
    delivered("first monitor killed: delivered by the second", time.monotonic())
    history = [each["state"] for each in station.states()[id]["history"]]
    lost = abs(len(wanted) - len(history))
    what = "changes lost or made up in outages"
    report.row(what, "", lost, 0, is_good=history == wanted)


def try_many(lab: Lab, report: Report, count: int = 200, seconds: float = 60) -> None:
    """So many channels at once."""
    station = Station(lab, "many")
    note(f"many: adding {count} channels")
    ids = [
        station.add(f"Channel {n}", lab.url(f"many-{n}"), number=n, group="Many")
        for n in range(1, count + 1)
    ]
    monitor = station.monitor()
    station.all_on_air(ids, 90)
    note(f"many: watching for {seconds:.0f} s")
    cpu, began = monitor.cpu, time.monotonic()
    time.sleep(seconds)
    share = 100 * (monitor.cpu - cpu) / (time.monotonic() - began)
    states = station.states()
    alarms = [id for id in ids if len(states[id]["history"]) > 1]
    report.row(f"{count} channels: of a core", "", share, 70, "%")
    report.row(f"{count} channels: peak memory", "", monitor.peak_mb, 100, "MB")
    report.row(f"{count} channels: false alarms", "", len(alarms), 0)
    for path in ("/status", "/metrics", "/channels.m3u"):
        times = []
        for _ in range(21):
            began = time.monotonic()
            assert station.call("", "GET", path).status_code == 200
            times.append(1000 * (time.monotonic() - began))
        report.row(f"{path}, {count} channels, median", "", median(times), 100, "ms")


def try_lists(lab: Lab, report: Report) -> None:
    """What players read, and what strangers can write."""
    station = Station(lab, "lists")
    name, url = 'News, 24 "HD"', lab.url("news")
    group = f"udp://@{GROUP}:5000"
    station.add(name, url, multicast=group, group='News, "all"', tvg_id="n24")
    for query, address in (("", url), ("?multicast=1", group)):
        text = station.call("", "GET", f"/channels.m3u{query}").text
        for player, read in (("Ministra", read_as_ministra), ("Kodi", read_as_kodi)):
            found = read(text)
            is_good = [(loosely(a), b) for a, b in found] == [(loosely(name), address)]
            what = f"{player} reads /channels.m3u{query}"
            report.row(what, "", len(found), None, is_good=is_good)
    item = {"name": "x", "url": url}
    state = {"url": url, "state": "on air", "since": 0, "checked": 0}
    for user, path, body, status in (
        ("", "/channels", item, 401),
        ("", "/states/channel1", state, 401),
        ("viewer", "/channels", item, 403),
        ("viewer", "/states/channel1", state, 403),
        ("watch", "/channels", item, 403),
        ("boss", "/states/channel1", state, 403),
    ):
        method = "POST" if path == "/channels" else "PUT"
        got = station.call(user, method, path, json=body).status_code
        who = user or "nobody"
        report.row(f"{method} {path} by {who}", "", got, None, is_good=got == status)


def loosely(name: str) -> str:
    """Without the form of its quotation marks, which Kodi's rules cannot do with."""
    return re.sub('["“”]', "'", name)


def read_as_ministra(text: str) -> list[tuple[str, str]]:
    """The name follows the first comma; the URL is the next line that is not empty."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    infos = [(a, b) for a, b in pairwise(lines) if a.startswith("#EXTINF")]
    return [(info.split(",", 1)[1], url) for info, url in infos]


def read_as_kodi(text: str) -> list[tuple[str, str]]:
    """The name follows a comma: that after the last quotation mark, or the last one."""
    found, name = [], ""
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.startswith("#EXTINF"):
            rest = line.rpartition('"')[2].strip()
            name = rest[1:] if rest.startswith(",") else line.rpartition(",")[2]
        elif not line.startswith("#"):
            found.append((name.strip(), line))
    return found


# ---- Main ----------------------------------------------------------------------------


class Report:
    """The rows of the table, as they come; a class, since parts run side by side."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def row(
        self,
        what: str,
        state: str,
        value: float,
        bound: float | None,
        unit: str = "",
        is_good: bool = True,
    ) -> None:
        is_good = is_good and (bound is None or value <= bound)
        row = {"what": what, "state": state, "value": round(value, 2), "unit": unit}
        self.rows.append(row | {"bound": bound, "is_good": is_good})
        note(f"{what}: {value:.4g} {unit}{'' if is_good else '  <- NOT GOOD'}")

    def table(self) -> str:
        lines = ["| what | state | measured | bound | |", "|---|---|---|---|---|"]
        for row in self.rows:
            value, bound = f"{row['value']:.4g} {row['unit']}".strip(), row["bound"]
            limit = "" if bound is None else f"{bound:.4g} {row['unit']}".strip()
            mark = "good" if row["is_good"] else "**not good**"
            lines.append(
                f"| {row['what']} | {row['state']} | {value} | {limit} | {mark} |"
            )
        return "\n".join(lines)


PARTS: dict[str, Callable[[Lab, Report], None]] = {
    "faults": try_faults,
    "days": try_days,
    "outages": try_outages,
    "many": try_many,
    "lists": try_lists,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="part", help=", ".join(PARTS))
    parser.add_argument("--origin", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    parts = options.parts or list(PARTS)
    if not set(parts) <= set(PARTS):
        parser.error(f"parts are {', '.join(PARTS)}")
    if options.origin:
        asyncio.run(Origin(options.origin).serve())
        return
    if not shutil.which("ffmpeg"):
        sys.exit("ffmpeg is needed: apt install ffmpeg")
    report, load = Report(), os.getloadavg()
    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(590)
    with ExitStack() as stack:
        note("starting ffmpeg and the origin")
        lab = Lab(stack)
        run(parts, lab, report)
    print(report.table())
    if set(parts) == set(PARTS):
        result = {
            "target_duration": TARGET,
            "processors": os.cpu_count(),
            "load_before": load,
            "load_after": os.getloadavg(),
            "rows": report.rows,
        }
        path = Path(__file__).with_suffix(".json")
        path.write_text(json.dumps(result, indent=1) + "\n")
    sys.exit(not all(row["is_good"] for row in report.rows))


def run(parts: list[str], lab: Lab, report: Report) -> None:
    """One part after the other, but the outages beside the days, which take long."""
    beside = []
    for part in parts:
        if part == "outages" and "days" in parts:
            continue
        if part == "days" and "outages" in parts:
            beside = [threading.Thread(target=try_outages, args=(lab, report))]
            beside[0].start()
        PARTS[part](lab, report)
    for thread in beside:
        thread.join()


def give_up(number: int, frame: object) -> None:
    raise TimeoutError("ten minutes are over")


if __name__ == "__main__":
    main()
