"""What the TV examples promise: examples/tv_monitor.py and examples/tv_service.py.

An origin in this file makes segments of 188-byte packets, and can be told to break.
"""

from __future__ import annotations

import asyncio
import gc
import re
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from werkzeug import Request, Response
from werkzeug.serving import BaseWSGIServer, make_server
from werkzeug.test import Client, TestResponse
from werkzeug.utils import redirect

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import tv_monitor
import tv_service
from tv_monitor import (
    Channel,
    Clock,
    Continuity,
    Monitor,
    Service,
    Stream,
    Variant,
)

import service
from conftest import free_port
from test_service import CHEAP_HASH, PASSWORD, SECRET

# A request that is cancelled as it connects leaves a coroutine of anyio's that never
# ran: tests that cancel some end with gc.collect(), lest another test is told of it.
pytestmark = pytest.mark.filterwarnings("ignore:coroutine 'connect_tcp")

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
    assert sum(stream.feed(piece)[0] for piece in pieces) == errors


def test_scrambled_packets_are_counted() -> None:
    data = packets(1) + packet(2, flags=0xD0) + packet(3, flags=0x90)
    assert Continuity().feed(data) == (0, 2)


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
    stream = Stream("", "")
    for segment in segments:
        stream.judge("torn" if segment == "x" else "")
    assert stream.reason == ("torn" if WINDOWS[segments] else "")


@pytest.mark.parametrize(
    ("failures", "target_durations", "is_dead"),
    [(0, 2.9, False), (0, 3.1, True), (3, 1.9, False), (3, 2.1, True), (2, 2.1, False)],
)
def test_a_variant_without_anything_new_is_dead_sooner_if_its_requests_fail(
    failures: int, target_durations: float, is_dead: bool
) -> None:
    variant = Variant("", "http://o.example/1.m3u8")
    variant.target, variant.failures = 4.0, failures
    variant.had_at -= 4.0 * target_durations
    assert variant.is_dead == is_dead


def test_the_clock_stands_still_while_the_monitor_gets_no_processor_time() -> None:
    clock = Clock()
    for elapsed in (0.1, 0.11, 30.0, 0.1):
        clock.tick(elapsed)
    assert clock.now == pytest.approx(0.1 + 0.11 + 0.2 + 0.1)
    assert clock.lost == pytest.approx(29.8)


# ---- An origin -----------------------------------------------------------------------

PACKETS = 50  # in a segment of a second


class Origin:
    """Live channels of any name, at /<name>/master.m3u8 or /<name>/high.m3u8.

    faults[name] says what is wrong with one; all of its faults end when it is deleted.
    """

    def __init__(self) -> None:
        self.url = ""
        self.faults: dict[str, str] = {}
        self.frozen: dict[str, int] = {}  # the last segment of an encoder that stopped
        self.begun: dict[str, int] = {}  # the first one of an encoder that began anew
        self.closing = threading.Event()
        self.asked: Counter[str] = Counter()  # how often for what, by path
        self._began = time.monotonic()

    def __call__(self, environ: Any, start_response: Any) -> Any:
        request = Request(environ)
        self.asked[request.path] += 1
        return self.answer(request)(environ, start_response)

    def answer(self, request: Request) -> Response:
        _, name, *folders, file = request.path.split("/")
        kind, _, suffix = file.rpartition(".")
        fault, now = self.faults.get(name, ""), time.monotonic()
        if fault == "hanging":
            self.closing.wait(20)
        if suffix == "ts" and (
            fault == "no segments" or (name == "led" and "edge" not in folders)
        ):
            return Response("gone", 404)
        if suffix == "ts":
            body = segment(int(kind), fault)
            return Response(self.slowly(body) if fault == "slow" else body)
        if name == "led" and "edge" not in folders:
            return redirect(f"/led/edge/{file}")
        if fault == "loop":
            return redirect(f"{request.path}?{now}")
        if fault.startswith("playlist "):
            return Response("no", int(fault.split()[1]))
        if fault == "malformed":
            return Response("#EXTM3U\n#EXT-X-BYTERANGE:188@0\n1.ts")
        if fault == "endless":
            return Response("#EXTM3U\n# " + "x" * 1_000_000)
        if fault == "HTML":
            return Response("<html>Please log in</html>")
        if kind == "master":
            stream = "#EXT-X-STREAM-INF:BANDWIDTH="
            high, low = f"800000\nhigh.m3u8?{now}", f"200000\nlow.m3u8?{now}"
            return Response(f"#EXTM3U\n{stream}{high}\n{stream}{low}\n")
        if fault == "all variants" or (fault == "one variant" and kind == "low"):
            return Response("gone", 404)
        if name == "tokens" and now > float(request.query_string) + 2:
            return Response("too late", 403)
        if name == "flaky" and self.asked[request.path] % 3 == 0:
            return Response("try again", 502)
        return Response(self.playlist(name, kind, fault))

    def slowly(self, body: bytes) -> Iterator[bytes]:
        yield body[:188]
        self.closing.wait(1.3)
        yield body[188:]

    def playlist(self, name: str, kind: str, fault: str) -> str:
        newest = 1000 + int(time.monotonic() - self._began)
        last = newest - self.begun.get(name, 0)
        if fault in ("stopped", "ended"):
            last = self.frozen.setdefault(name, last)
        first = max(0, last - 4)
        lines = ["#EXTM3U", "#EXT-X-TARGETDURATION:1"]
        lines += [f"#EXT-X-MEDIA-SEQUENCE:{first}"]
        for number in range(first, last + 1):
            lines += ["#EXTINF:1.0,", f"{kind}/{number}.ts"]
        lines += ["#EXT-X-ENDLIST"] if fault == "ended" else []
        return "\n".join(lines)


def segment(number: int, fault: str) -> bytes:
    """Segment of a stream whose packets are numbered on from the one before."""
    counters = range(number * PACKETS, (number + 1) * PACKETS)
    flags = 0xD0 if fault == "scrambled" else 0x10
    made = [packet(counter, flags=flags, filler=counter % 256) for counter in counters]
    if fault == "lossy":
        del made[20]
    return b"".join(made)


@contextmanager
def serving(app: Any, port: int = 0) -> Iterator[BaseWSGIServer]:
    server = make_server("127.0.0.1", port, app, threaded=True)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def origin() -> Iterator[Origin]:
    origin = Origin()
    with serving(origin) as server:
        origin.url = f"http://127.0.0.1:{server.server_port}"
        yield origin
        origin.closing.set()


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


# ---- Watching ------------------------------------------------------------------------

NEWS: dict[str, Any] = {"name": 'News, 24 "HD"', "number": 7, "multicast": ""}
NEWS |= {"url": "http://o.example/news.m3u8"}

FAULTS = {  # what breaks, what that makes of a channel, and the reason that is given
    "stopped": ("off-air", "no new segment"),
    "ended": ("off-air", "the stream has ended"),
    "playlist 500": ("off-air", "playlist: HTTP 500"),
    "playlist 403": ("off-air", "playlist: HTTP 403"),
    "HTML": ("off-air", "playlist: not a playlist"),
    "malformed": ("off-air", "playlist: malformed"),
    "endless": ("off-air", "playlist: more than 1,000,000 bytes"),
    "loop": ("off-air", "playlist: Exceeded maximum allowed redirects"),
    "no segments": ("off-air", "segment: HTTP 404"),
    "hanging": ("off-air", "playlist: no answer"),
    "all variants": ("off-air", "playlist: HTTP 404"),
    "scrambled": ("off-air", "scrambled"),
    "one variant": ("degraded", "200 kbit/s: dead: playlist: HTTP 404"),
    "slow": ("degraded", "slow: "),
    "lossy": ("degraded", "1 continuity errors"),
    "silent group": ("degraded", "multicast: dead: silent"),
    "torn group": ("degraded", "continuity errors"),
}
HEALTHY = ("tokens", "led", "flaky")
WITH_MASTER = ("one variant", "all variants", "tokens")


async def until(is_so: Callable[[], Any], what: str, seconds: float = 20) -> None:
    """Wait for it; a bound for when it never comes."""
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline, what
        await asyncio.sleep(0.02)


def segments_asked(origin: Origin, channel: str) -> list[int]:
    """How often for each."""
    asked = origin.asked.items()
    return [n for path, n in asked if path.startswith(f"/{channel}/") and ".ts" in path]


def test_each_fault_is_told_as_what_it_is_and_so_is_its_end(origin: Origin) -> None:
    paths = {name: name.replace(" ", "-") for name in (*FAULTS, *HEALTHY)}
    channels, groups = {}, {}
    for name, path in paths.items():
        file = "master" if name in WITH_MASTER else "high"
        item = NEWS | {"name": name, "url": f"{origin.url}/{path}/{file}.m3u8"}
        if "group" in name:
            groups[path] = group = ("239.255.77.1", free_port())
            item["multicast"] = f"udp://@{group[0]}:{group[1]}"
        channels[name,] = Channel(item, "127.0.0.1")

    def all_are_on_air() -> bool:
        return all(each.report["state"] == "on air" for each in channels.values())

    async def break_and_repair(name: str, state: str, reason: str) -> None:
        path, report = paths[name], channels[name,].report
        origin.faults[path] = name
        await until(
            lambda: report["state"] == state and reason in report["reason"],
            f"{name} is told",
        )
        if name == "no segments":  # it tries again
            await until(lambda: max(segments_asked(origin, path)) > 1, "a second try")
        del origin.faults[path]
        if path in origin.frozen:  # its segments are numbered anew
            origin.begun[path] = origin.frozen.pop(path)

    async def test() -> None:
        monitor = Monitor(Service("", "", ""), "", channels=channels)
        watching = [each.run() for each in channels.values()]
        tasks = [asyncio.create_task(each) for each in (*watching, monitor.judge())]
        await until(all_are_on_air, "all are on air at first")
        await asyncio.gather(
            *(break_and_repair(name, *FAULTS[name]) for name in FAULTS)
        )
        await until(all_are_on_air, "all are on air again")
        for task in tasks:
            task.cancel()

    with sending(groups, origin.faults):
        asyncio.run(test())
        gc.collect()
    for (name,), channel in channels.items():
        states = [change["state"] for change in channel.history]
        worst, _ = FAULTS.get(name, ("", ""))
        if worst == "off-air":  # on the way there and back viewers may notice less
            states = [state for state in states if state != "degraded"]
        assert states == (["on air", worst, "on air"] if worst else ["on air"]), name
    assert max(segments_asked(origin, "flaky")) == 1


def test_a_channel_that_was_long_away_is_on_air_at_once_when_it_is_back() -> None:
    channel = Channel(NEWS, "127.0.0.1")
    channel.streams[""] = variant = Variant("", NEWS["url"])
    variant.had = 7
    states = []
    for had_at, failures in ((0, 0), (-7, 20), (0, channel.failures)):
        variant.had_at = tv_monitor.clock.now + had_at
        channel.failures = failures
        channel.judge()
        states.append(channel.report["state"])
    assert states == ["on air", "off-air", "on air"]


def test_a_master_that_fails_for_long_is_told_while_its_variants_are_good() -> None:
    channel = Channel(NEWS, "127.0.0.1")
    channel.streams["low"] = variant = Variant("low", NEWS["url"])
    variant.had, channel.failures, channel.trouble = 7, 10, "playlist: HTTP 404"
    assert channel.judge()
    assert channel.report["reason"] == "nobody can tune in: playlist: HTTP 404"


def test_two_monitors_make_one_history() -> None:
    ours = Channel(NEWS, "127.0.0.1")
    ours.history = [
        {"state": "off-air", "since": 90},
        {"state": "on air", "since": 130},
    ]
    begun = [{"state": "on air", "since": 10}, {"state": "off-air", "since": 90}]
    theirs = ours.report | {"history": begun, "since": 90, "cc_errors": 5}
    ours.continue_from(theirs)
    assert [each["since"] for each in ours.report["history"]] == [10, 90, 130]
    assert ours.report["cc_errors"] == 5
    ours.continue_from(theirs | {"url": "http://o.example/old.m3u8", "history": []})
    assert len(ours.history) == 3


# ---- A station -----------------------------------------------------------------------

ROLES = {"ann": "operator", "watch": "monitor", "spare": "monitor", "viewer": ""}


class Station:
    """The service with an account for each role; its clock is moved by tests alone."""

    def __init__(self, **settings: Any) -> None:
        self.now = 1_800_000_000.0
        given = service.Settings(secret_key=SECRET, **settings)
        self.app = tv_service.create_app(given, clock=lambda: self.now)
        for name, role in ROLES.items():
            service.add_account(self.app, name, CHEAP_HASH, [role] if role else [])
        self._client = Client(self.app)
        self._bearers: dict[str, str] = {}

    def __call__(self, request: str, by: str = "", **given: Any) -> TestResponse:
        """A request such as "PUT /states/x"; nobody's if by nobody."""
        method, path = request.split()
        headers = {"Authorization": self._bearer(by)} if by else {}
        json = given or None
        return self._client.open(path, method=method, json=json, headers=headers)

    def _bearer(self, name: str) -> str:
        if name not in self._bearers:
            form = {"grant_type": "password", "username": name, "password": PASSWORD}
            answer = self._client.post("/token", data=form).get_json()
            self._bearers[name] = f"Bearer {answer['access_token']}"
        return self._bearers[name]

    def add(self, **item: Any) -> str:
        """A channel; returns its id."""
        response = self("POST /channels", "ann", **{**NEWS, **item})
        assert response.status_code == 201, response.text
        return response.headers["Location"].rpartition("/")[2]

    def tell(self, id: str, state: str, **more: Any) -> None:
        """Report a state, as a monitor does."""
        now = int(self.now)
        report = {"url": NEWS["url"], "state": state, "since": now, "checked": now}
        response = self(f"PUT /states/{id}", "watch", **{**report, **more})
        assert response.status_code == 201, response.text

    def sessions(self, name: str) -> list[int]:
        """How often each session of a user was refreshed."""
        sessions = self.app.store.read(name)["sessions"]
        return [session["gen"] - 1 for session in sessions.values()]


@pytest.fixture
def station() -> Station:
    return Station()


REPORT = {"url": NEWS["url"], "state": "on air", "since": 0, "checked": 0}


@pytest.mark.parametrize(
    ("request_line", "by", "item", "status"),
    [
        ("POST /channels", "", NEWS, 401),
        ("POST /channels", "viewer", NEWS, 403),
        ("POST /channels", "watch", NEWS, 403),
        ("POST /channels", "ann", NEWS, 201),
        ("PUT /states/channel1", "", REPORT, 401),
        ("PUT /states/channel1", "viewer", REPORT, 403),
        ("PUT /states/channel1", "ann", REPORT, 403),
        ("PUT /states/channel1", "watch", REPORT, 201),
        ("POST /users", "", {"username": "eve", "password": PASSWORD}, 403),
    ],
)
def test_each_list_is_written_by_its_role_alone(
    station: Station, request_line: str, by: str, item: dict[str, Any], status: int
) -> None:
    before = {
        line: station(line, "viewer").text for line in ("GET /channels", "GET /states")
    }
    assert station(request_line, by, **item).status_code == status
    after = {line: station(line, "viewer").text for line in before}
    assert (after == before) == (status != 201)


BAD_CHANNELS = [
    {"url": "file:///etc/passwd"},
    {"url": "http://o.example/a b"},
    {"name": "two\nlines"},
    {"multicast": "239.1.1.1"},
    {"number": 0},
]


@pytest.mark.parametrize("bad", BAD_CHANNELS)
def test_a_channel_that_no_player_could_open_is_refused(
    station: Station, bad: dict[str, Any]
) -> None:
    assert station("POST /channels", "ann", **{**NEWS, **bad}).status_code == 400


def as_ministra_reads(text: str) -> list[tuple[str, str]]:
    lines = [line for line in text.splitlines() if line.strip()]
    infos = [(a, b) for a, b in pairwise(lines) if a.startswith("#EXTINF")]
    return [(info.split(",", 1)[1], url) for info, url in infos]


def as_kodi_reads(text: str) -> list[tuple[str, str]]:
    """Kodi's IPTV Simple looks for a comma behind the last quotation mark."""
    lines = text.splitlines()
    infos = [(a, b) for a, b in pairwise(lines) if a.startswith("#EXTINF")]
    read = []
    for info, url in infos:
        behind = info.rpartition('"')[2].strip()
        name = behind[1:] if behind.startswith(",") else info.rpartition(",")[2]
        read.append((name.strip(), url))
    return read


@pytest.mark.parametrize("read", [as_ministra_reads, as_kodi_reads])
def test_players_read_the_right_names_and_urls(
    station: Station, read: Callable[[str], list[tuple[str, str]]]
) -> None:
    logo = "http://o.example/a,b.png"
    station.add(
        group='News, "all"',
        tvg_id='n,"24',
        logo=logo,
        multicast="udp://@239.1.1.1:5000",
    )
    station.add(name="Plain", number=8, url="http://o.example/plain.m3u8")
    names = ["News, 24 ”HD”", "Plain"]
    urls = [NEWS["url"], "http://o.example/plain.m3u8"]
    assert read(station("GET /channels.m3u").text) == list(
        zip(names, urls, strict=True)
    )
    groups = ["udp://@239.1.1.1:5000", urls[1]]
    text = station("GET /channels.m3u?multicast=1").text
    assert read(text) == list(zip(names, groups, strict=True))


def test_players_find_number_guide_logo_and_group(station: Station) -> None:
    station.add(group="News", tvg_id="n24", logo="http://o.example/2,4.png")
    info = station("GET /channels.m3u").text.splitlines()[1]
    labels = dict(re.findall('([a-z-]+)="([^"]*)"', info))
    assert labels == {
        "tvg-id": "n24",
        "tvg-chno": "7",
        "tvg-logo": "http://o.example/2%2C4.png",  # no comma before the name's
        "group-title": "News",
    }


def test_players_see_enabled_channels_in_the_order_of_their_numbers(
    station: Station,
) -> None:
    for name, number in (("nine", 9), ("none", None), ("two", 2), ("ten", 10)):
        station.add(name=name, number=number)
    station.add(name="off", enabled=False)
    names = [name for name, _ in as_kodi_reads(station("GET /channels.m3u").text)]
    assert names == ["two", "nine", "ten", "none"]


def test_the_list_may_need_a_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TV_KEY", "схема")
    station = Station()
    assert station("GET /channels.m3u").status_code == 403
    assert station("GET /channels.m3u?key=other").status_code == 403
    assert (
        station("GET /channels.m3u?key=%D1%81%D1%85%D0%B5%D0%BC%D0%B0").status_code
        == 200
    )


def test_people_see_trouble_first(station: Station) -> None:
    for state in ("on air", "degraded", "off-air"):
        station.tell(station.add(name=state[:2]), state, reason="since <then>")
    station.add(name="new")
    page = station("GET /status").text
    assert re.findall(r"<strong>7 (\w+)", page) == ["of", "de", "new", "on"]
    assert "1 of 4 channels on air" in page
    assert "since &lt;then&gt;" in page


def test_a_state_is_unknown_once_no_monitor_reported_it_for_120_seconds(
    station: Station,
) -> None:
    station.tell(station.add(), "on air")
    station.now += 120
    assert "1 of 1 channels on air" in station("GET /status").text
    station.now += 1
    page = station("GET /status").text
    assert "0 of 1 channels on air" in page
    assert ">unknown</b>" in page


def test_a_state_of_another_url_says_nothing(station: Station) -> None:
    station.tell(station.add(), "on air", url="http://o.example/old.m3u8")
    assert ">unknown</b>" in station("GET /status").text


def test_the_page_of_states_renews_itself_fits_phones_and_runs_nothing(
    station: Station,
) -> None:
    station.add(name="<script>alert(1)</script>")
    response = station("GET /status")
    assert '<meta http-equiv="refresh"' in response.text
    assert '<meta name="viewport" content="width=device-width' in response.text
    assert "<script" not in response.text
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]


def test_prometheus_reads_states_rates_and_errors(station: Station) -> None:
    id = station.add()
    station.tell(id, "degraded", kbps=4000, cc_errors=3)
    text = station("GET /metrics").text
    samples = {
        (sample.name, sample.labels.get("state")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.labels["id"] == id and sample.labels["channel"] == NEWS["name"]
    }
    states = {
        ("tv_state", each): float(each == "degraded") for each in tv_service.WORST_FIRST
    }
    assert samples == states | {
        ("tv_kbps", None): 4000,
        ("tv_cc_errors_total", None): 3,
    }


def test_the_description_tells_of_the_stations_own_routes(station: Station) -> None:
    paths = station("GET /openapi.json").get_json()["paths"]
    assert {"/channels", "/states/{id}", "/channels.m3u", "/status", "/metrics"} <= set(
        paths
    )


# ---- The monitor and the service -----------------------------------------------------


@pytest.fixture
def server(station: Station) -> Iterator[BaseWSGIServer]:
    with serving(station.app) as server:
        yield server


def client(server: BaseWSGIServer, user: str) -> Service:
    return Service(f"http://127.0.0.1:{server.server_port}/", user, PASSWORD)


def test_a_playlist_is_imported_once(station: Station, server: BaseWSGIServer) -> None:
    station.add(group="News", tvg_id="n24", logo="http://o.example/24.png")
    station.add(name="Two", number=None, url="http://o.example/2.m3u8")
    text = (
        station("GET /channels.m3u").text + "#EXTINF:-1,Radio\nudp://@239.1.1.1:5000\n"
    )
    listed = station("GET /channels", "viewer").get_json()
    for id in listed:
        station(f"DELETE /channels/{id}", "ann")

    async def imports() -> list[int]:
        ann = client(server, "ann")
        return [await tv_monitor.import_m3u(ann, text) for _ in range(2)]

    assert asyncio.run(imports()) == [2, 0]
    imported = station("GET /channels", "viewer").get_json()
    listed["channel1"]["name"] = "News, 24 ”HD”"
    assert list(imported.values()) == list(listed.values())


def sessions_after(
    station: Station, requests: Callable[[Service], Awaitable[None]]
) -> list[int]:
    """How often each session of a monitor was refreshed."""
    with serving(station.app) as server:
        station.now = time.time()
        asyncio.run(requests(client(server, "watch")))
    return station.sessions("watch")


@pytest.mark.parametrize("session_life", [30, 1000])
def test_a_login_is_refreshed_when_its_token_ends_and_not_before(
    session_life: int,
) -> None:
    async def requests(watch: Service) -> None:
        for _ in range(5):  # by Authlib's default, all but the first refresh
            await watch.channels()

    station = Station(access_ttl=900, refresh_ttl=session_life)
    assert sessions_after(station, requests) == [0]


def test_a_token_that_is_refused_before_its_time_is_refreshed() -> None:
    async def requests(watch: Service) -> None:
        await watch.channels()
        station.now += 61  # the service's clock alone
        await watch.channels()

    station = Station(access_ttl=60, refresh_ttl=1000)
    assert sessions_after(station, requests) == [1]


def test_a_token_is_refreshed_and_a_session_that_ended_is_begun_anew() -> None:
    async def requests(watch: Service) -> None:
        async with asyncio.timeout(10):
            while not any(station.sessions("watch")):
                await watch.channels()
                await asyncio.sleep(0.05)
                station.now = time.time()
        assert len(station.sessions("watch")) == 1
        with station.app.store.write("watch") as data:
            data["sessions"].clear()
        await watch.channels()

    station = Station(access_ttl=2, refresh_ttl=1000)
    assert sessions_after(station, requests) == [0]


def test_the_table_shows_names_as_they_are_and_trouble_first(origin: Origin) -> None:
    monitor = Monitor(Service(origin.url, "watch", PASSWORD), "127.0.0.1")
    for name, state in (("Fine", "on air"), ("[red]Bad[/b]", "off-air")):
        item = NEWS | {"name": name}
        monitor.channels[name,] = channel = Channel(item, "127.0.0.1")
        channel.report |= {"state": state, "reason": f"[{state}]"}
    with tv_monitor.console.capture() as captured:
        tv_monitor.console.print(tv_monitor.table(monitor))
    shown = captured.get()
    assert shown.index("[red]Bad[/b]") < shown.index("[off-air]") < shown.index("Fine")


@asynccontextmanager
async def monitoring(service: Service) -> AsyncIterator[Monitor]:
    """A monitor that is impatient to take over."""
    monitor = Monitor(service, "127.0.0.1", patience=2)
    task = asyncio.create_task(monitor.run())
    try:
        yield monitor
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


def test_reports_survive_the_ends_of_the_service_and_of_a_monitor(
    origin: Origin, station: Station
) -> None:
    id = station.add(url=f"{origin.url}/c/high.m3u8")
    station.now = time.time()

    def states() -> list[str]:
        report = station(f"GET /states/{id}", "viewer").get_json()
        return [change["state"] for change in report.get("history", [])]

    async def test(port: int) -> None:
        ends, monitors = {}, {}
        async with AsyncExitStack() as stack:
            for user in ("watch", "spare"):
                one = Service(f"http://127.0.0.1:{port}", user, PASSWORD)
                ends[user] = await stack.enter_async_context(AsyncExitStack())
                monitors[user] = await ends[user].enter_async_context(monitoring(one))

            def has_problem(monitor: Monitor) -> bool:
                return monitor.problem.startswith("JSONDecodeError")

            def sees_fault(monitor: Monitor) -> bool:
                return any(
                    each.report["state"] == "off-air"
                    for each in monitor.channels.values()
                )

            def reporters() -> list[str]:
                return [user for user in monitors if monitors[user].is_active]

            with serving(station.app, port):  # both find that nobody reports
                await until(lambda: states() == ["on air"], "a report")
                await until(lambda: len(reporters()) == 1, "one stands by")
            origin.faults["c"] = "playlist 500"
            with serving(Response("<h1>Back soon</h1>"), port):  # as a proxy may say
                await until(lambda: all(map(has_problem, monitors.values())), "it")
                await until(lambda: all(map(sees_fault, monitors.values())), "it")
            with serving(station.app, port):
                await until(lambda: states() == ["on air", "off-air"], "a report")
                await until(lambda: len(reporters()) == 1, "one still stands by")
            await ends[reporters()[0]].aclose()
            origin.faults.clear()
            with serving(station.app, port):
                expected = ["on air", "off-air", "on air"]
                await until(lambda: states() == expected, "the other one's report")
                station(f"DELETE /channels/{id}", "ann")
                for monitor in monitors.values():
                    monitor.list_due = 0.0  # not in 5 s
                report = f"GET /states/{id}"
                await until(
                    lambda: station(report, "viewer").status_code == 404,
                    "the report goes with its channel",
                )

    asyncio.run(test(free_port()))
    gc.collect()
