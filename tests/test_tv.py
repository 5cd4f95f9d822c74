"""What the TV examples promise: examples/tv_monitor.py and examples/tv_service.py.

An origin in this file makes segments of 188-byte packets, and can be told to break.
"""

from __future__ import annotations

import asyncio
import doctest
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import tv_monitor
from tv_monitor import Channel, Clock, Continuity, Window

# ---- Packets -------------------------------------------------------------------------

VIDEO, AUDIO = 0x100, 0x101


def packet(
    counter: int, pid: int = VIDEO, flags: int = 0x10, filler: int = 0xFF
) -> bytes:
    """A packet of a transport stream; flags are the upper half of its fourth byte."""
    head = bytes([0x47, pid >> 8, pid & 0xFF, flags | counter % 16])
    return head.ljust(188, bytes([filler]))


def packets(*counters: int) -> bytes:
    return b"".join(packet(counter, filler=counter % 256) for counter in counters)


ANNOUNCED = bytes([0x47, 1, 0, 0x39, 1, 0x80]).ljust(188, b"\0")  # a jump to 9
BROKEN = bytes([0x47, 0x81, 0, 0x12]).ljust(188, b"\0")  # the transport_error_indicator

CONTINUITY = {
    "in order": ([packets(14, 15, 0, 1)], 0),
    "over the borders of segments": ([packets(14, 15), packets(0, 1)], 0),
    "a lost packet": ([packets(1, 2, 4, 5)], 1),
    "a lost packet between segments": ([packets(1, 2), packets(4)], 1),
    "one of every other stream": ([packet(1) + packet(7, AUDIO), packet(3)], 1),
    "an exact duplicate": ([packets(1, 2, 2, 3)], 0),
    "an exact duplicate over a border": ([packets(1, 2), packets(2, 3)], 0),
    "the same number on another packet": ([packet(2) + packet(2, filler=0)], 1),
    "an announced discontinuity": ([packets(1) + ANNOUNCED + packets(10)], 0),
    "stuffing": ([packets(1) + packet(9, pid=0x1FFF) + packets(2)], 0),
    "no payload, so no number": ([packets(1) + packet(1, flags=0x20) + packets(2)], 0),
    "a packet marked as broken": ([packets(1) + BROKEN + packets(3)], 1),
}


@pytest.mark.parametrize("case", CONTINUITY)
def test_continuity_errors_are_the_gaps_that_viewers_notice(case: str) -> None:
    pieces, errors = CONTINUITY[case]
    stream = Continuity()
    assert sum(stream.feed(piece).errors for piece in pieces) == errors


def test_scrambled_packets_are_counted() -> None:
    data = packets(1) + packet(2, flags=0xD0) + packet(3, flags=0x90)
    assert Continuity().feed(data) == (3, 0, 2)


# ---- Judging -------------------------------------------------------------------------

WINDOWS = {  # segments, the newest last: is it degraded?
    "......": False,
    "x": False,
    "x.....x": False,
    "x....x": True,
    "xx": True,
    "xx.....": True,
    "xx.....x": True,
    "xx......": False,
    "xx......x": False,
}


@pytest.mark.parametrize("segments", WINDOWS)
def test_two_bad_of_six_segments_degrade_and_six_good_ones_end_it(
    segments: str,
) -> None:
    window = Window()
    for segment in segments:
        window.add("torn" if segment == "x" else "")
    assert window.reason == ("torn" if WINDOWS[segments] else "")


def test_the_clock_stands_still_while_the_monitor_gets_no_processor_time() -> None:
    clock = Clock()
    for elapsed in (0.1, 0.11, 30.0, 0.1):
        clock.tick(elapsed)
    assert clock.now == pytest.approx(0.1 + 0.11 + 0.2 + 0.1)
    assert clock.lost == pytest.approx(29.8)


def test_the_examples_in_the_monitor_are_right() -> None:
    assert doctest.testmod(tv_monitor).failed == 0
    assert doctest.testmod(tv_monitor).attempted > 0


# ---- An origin -----------------------------------------------------------------------

PACKETS = 50  # in a segment of a second


class Origin(ThreadingHTTPServer):
    """Live channels of any name, at /<name>/master.m3u8 or /<name>/high.m3u8.

    faults[name] says what is wrong with one; all of its faults end when it is deleted.
    """

    daemon_threads = True
    request_queue_size = 100

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.faults: dict[str, str] = {}
        self.frozen: dict[str, int] = {}  # the last segment of an encoder that stopped
        self.closing = threading.Event()
        self.requests = 0
        self._began = time.monotonic()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def newest(self) -> int:
        """The last complete segment; there were ten at the start."""
        return 9 + int(time.monotonic() - self._began)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that hang up are what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    server: Origin
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        _, name, *folders, file = path.split("/")
        self.server.requests += 1
        fault = self.server.faults.get(name, "")
        if fault == "hanging":
            self.server.closing.wait(20)
        elif name == "led" and "edge" not in folders:
            is_playlist = file.endswith(".m3u8")
            self.reply(302 if is_playlist else 404, b"", Location=f"/led/edge/{file}")
        elif file.endswith(".m3u8"):
            self.reply_playlist(name, file.removesuffix(".m3u8"), query, fault)
        elif fault == "no segments":
            self.reply(404, b"gone")
        else:
            body = segment(int(file.removesuffix(".ts")), fault)
            self.reply(200, body, slowly=fault == "slow")

    def reply_playlist(self, name: str, kind: str, query: str, fault: str) -> None:
        if fault.startswith("playlist "):
            self.reply(int(fault.split()[1]), b"no")
        elif fault == "HTML":
            self.reply(200, b"<html>Please log in</html>")
        elif fault == "loop":
            self.reply(302, b"", Location=f"/{name}/{kind}.m3u8?{time.monotonic_ns()}")
        elif kind == "master":
            self.reply(200, self.master(name))
        elif fault == "all variants" or (fault == "one variant" and kind == "low"):
            self.reply(404, b"gone")
        elif name == "tokens" and time.monotonic() > float(query) + 2:
            self.reply(403, b"too late")
        elif name == "flaky" and self.server.requests % 3 == 0:
            self.reply(502, b"try again")
        else:
            self.reply(200, self.playlist(name, kind, fault))

    def master(self, name: str) -> bytes:
        token = f"?{time.monotonic():.3f}"
        stream = "#EXT-X-STREAM-INF:BANDWIDTH="
        return (
            f"#EXTM3U\n{stream}800000\nhigh.m3u8{token}\n{stream}200000\nlow.m3u8{token}\n"
        ).encode()

    def playlist(self, name: str, kind: str, fault: str) -> bytes:
        last = self.server.newest
        if fault in ("stopped", "ended"):
            last = self.server.frozen.setdefault(name, last)
        lines = [
            "#EXTM3U",
            "#EXT-X-TARGETDURATION:1",
            f"#EXT-X-MEDIA-SEQUENCE:{last - 4}",
        ]
        for number in range(last - 4, last + 1):
            lines += ["#EXTINF:1.0,", f"{kind}/{number}.ts"]
        lines += ["#EXT-X-ENDLIST"] if fault == "ended" else []
        return "\n".join(lines).encode()

    def reply(
        self, status: int, body: bytes, slowly: bool = False, **headers: str
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if slowly:
            self.wfile.write(body[:188])
            self.server.closing.wait(1.3)
            body = body[188:]
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        pass


def segment(number: int, fault: str) -> bytes:
    """Segment of a stream whose packets are numbered on from the one before."""
    counters = range(number * PACKETS, (number + 1) * PACKETS)
    flags = 0xD0 if fault == "scrambled" else 0x10
    made = [packet(counter, flags=flags, filler=counter % 256) for counter in counters]
    if fault == "lossy":
        del made[20]
    return b"".join(made)


@pytest.fixture
def origin() -> Iterator[Origin]:
    server = Origin()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    yield server
    server.closing.set()
    server.shutdown()
    server.server_close()
    thread.join()


@contextmanager
def sending(
    groups: dict[str, tuple[str, int]], faults: dict[str, str]
) -> Iterator[None]:
    """Send transport streams to groups, on the loopback interface alone."""
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    loopback = socket.inet_aton("127.0.0.1")
    sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, loopback)
    ended = threading.Event()

    def send() -> None:
        first = 0
        while not ended.wait(0.05):
            for name, address in groups.items():
                fault = faults.get(name, "")
                lost = 3 if fault == "torn group" and first % 4 == 0 else 0
                if fault != "silent group":
                    sender.sendto(packets(*range(first + lost, first + 7)), address)
            first += 7

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        sender.close()


def free_port() -> int:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---- Watching ------------------------------------------------------------------------

FAULTS = {  # what breaks, and what it makes of a channel
    "stopped": "off-air",
    "ended": "off-air",
    "playlist 500": "off-air",
    "playlist 403": "off-air",
    "HTML": "off-air",
    "loop": "off-air",
    "no segments": "off-air",
    "hanging": "off-air",
    "all variants": "off-air",
    "scrambled": "off-air",
    "one variant": "degraded",
    "slow": "degraded",
    "lossy": "degraded",
    "silent group": "degraded",
    "torn group": "degraded",
}
HEALTHY = ("tokens", "led", "flaky")
WITH_MASTER = ("one variant", "all variants", "tokens")


async def until(is_so: Callable[[], Any], what: str, seconds: float = 20) -> None:
    """Wait for it; a bound for when it never comes."""
    async with asyncio.timeout(seconds) as limit:
        with suppress(asyncio.CancelledError):
            while not is_so():
                await asyncio.sleep(0.02)
            return
    assert not limit.expired(), what


def watch(
    items: dict[str, dict[str, Any]],
    test: Callable[[dict[str, Channel]], Awaitable[None]],
) -> None:
    """Watch and judge channels while the test runs."""

    async def main() -> None:
        clock, tls = Clock(), httpx2.create_ssl_context()
        channels = {name: Channel(item, clock, tls) for name, item in items.items()}

        async def judge() -> None:
            while True:
                await asyncio.sleep(0.05)
                for channel in channels.values():
                    channel.judge()

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(clock.run()), group.create_task(judge())]
            for channel in channels.values():
                tasks.append(group.create_task(channel.run("127.0.0.1")))
            await test(channels)
            for task in tasks:
                task.cancel()

    asyncio.run(main())


def history(channel: Channel) -> list[str]:
    return [change["state"] for change in channel.history]


def test_each_fault_is_told_as_what_it_is_and_so_is_its_end(origin: Origin) -> None:
    names = dict(enumerate([*FAULTS, *HEALTHY]))
    paths = {name: name if name in HEALTHY else str(n) for n, name in names.items()}
    files = dict.fromkeys(paths, "high") | dict.fromkeys(WITH_MASTER, "master")
    items = {
        name: {"url": f"{origin.url}/{path}/{files[name]}.m3u8"}
        for name, path in paths.items()
    }

    groups = {}
    for name in ("silent group", "torn group"):
        groups[paths[name]] = group = ("239.255.77.1", free_port())
        items[name]["multicast"] = f"udp://@{group[0]}:{group[1]}"

    async def test(channels: dict[str, Channel]) -> None:
        def all_are_on_air() -> bool:
            return all(channel.state == "on air" for channel in channels.values())

        await until(all_are_on_air, "all are on air at first")
        origin.faults |= {paths[name]: name for name in FAULTS}
        for name, state in FAULTS.items():
            channel = channels[name]
            await until(lambda: channel.state == state, f"{name} is seen")  # noqa: B023
        origin.faults.clear()
        origin.frozen.clear()
        await until(all_are_on_air, "all are on air again")
        for name, channel in channels.items():
            states = history(channel)
            worst = FAULTS.get(name)
            if worst == "off-air":  # on the way there and back viewers may notice less
                states = [state for state in states if state != "degraded"]
            assert states == (["on air", worst, "on air"] if worst else ["on air"]), (
                name
            )

    with sending(groups, origin.faults):
        watch(items, test)
