"""Watch a station's channels as their viewers do, and report to tv_service.py.

    export TV_PASSWORD=…
    python examples/tv_monitor.py --user monitor1               # watch and report
    python examples/tv_monitor.py --user ann --import list.m3u  # fill the channel list

A second monitor stands by, and takes over when the first one's reports stop. The
clocks of their machines must agree within a second or two.

What it does not look at: alternate audio, subtitles, parts of segments (low latency,
byte ranges), and the inside of what is encrypted or no MPEG transport stream. It
downloads every variant, so it needs as much bandwidth as one viewer of each.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import signal
import socket
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from getpass import getpass
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import m3u8
from authlib.integrations.httpx_client import AsyncOAuth2Client, OAuthError
from httpx2 import AsyncClient, HTTPError, InvalidURL, Response, create_ssl_context
from rich.console import Console
from rich.live import Live
from rich.table import Table

COLOURS = {"off-air": "red", "degraded": "yellow", "unknown": "dim", "on air": "green"}
OFF_AIR, DEGRADED, UNKNOWN, ON_AIR = COLOURS  # the worst first
# What parsers raise.
MALFORMED = (ValueError, LookupError, TypeError, AttributeError, ArithmeticError)

console = Console(markup=False, highlight=False)  # names are shown as they are


def say(text: str) -> None:
    """A line, above the table if there is one."""
    console.out(time.strftime("%Y-%m-%d %H:%M:%S"), text)


# ---- Transport streams ---------------------------------------------------------------
# MPEG-TS is packets of 188 bytes. Those with payload are numbered 0 to 15 within their
# stream (PID): what is lost leaves a gap (ISO/IEC 13818-1 §2.4.3.3).

PACKET, NULL_PID = 188, 0x1FFF


class Continuity:
    """Follows the counters of one stream, from one piece of it to the next."""

    def __init__(self) -> None:
        self._last = b""  # the last packet of each PID

    def feed(self, data: bytes) -> tuple[int, int]:
        """How many errors there are, and scrambled packets."""
        data = self._last + data
        size = len(data) - len(data) % PACKET
        errors = int(size < len(data) or data[::PACKET].strip(b"\x47") != b"")
        scrambled = 0
        last: dict[int, int] = {}  # PID: where its last packet is
        columns = (data[n:size:PACKET] for n in range(1, 4))  # millions a second
        for number, (high, low, flags) in enumerate(zip(*columns, strict=True)):
            pid, at = (high & 0x1F) << 8 | low, number * PACKET
            if pid == NULL_PID or not flags & 0x10:  # without payload, not numbered
                continue
            scrambled += flags & 0xC0 > 0
            before = last.get(pid)
            last[pid] = at
            if high & 0x80:  # marked as broken: nothing follows from its counter
                errors += 1
                del last[pid]
            elif before is not None and (flags - data[before + 3] - 1) & 0x0F:
                packet = data[at : at + PACKET]
                is_duplicate = packet == data[before : before + PACKET]
                is_announced = flags & 0x20 and packet[4] and packet[5] & 0x80
                errors += not is_duplicate and not is_announced
        self._last = b"".join(data[at : at + PACKET] for at in last.values())
        return errors, scrambled


# ---- Judging -------------------------------------------------------------------------
# Variants and multicast groups are judged alike, by their last six segments: two bad
# ones degrade, only six good ones end that. One is dead when for three target durations
# nothing new could be had, as players begin three segments from the end (RFC 8216
# §6.3.3); or for two when its requests fail as well. A failed playlist request alone is
# nothing: players try again. And all goes by a clock that stands still while this
# process gets no processor time: to whoever could not look, every answer seems late.

TICK = 0.1


class Clock:
    """Seconds during which this process could look, and those that it lost."""

    now = lost = 0.0

    def tick(self, elapsed: float) -> None:
        """So much time has passed since the last tick; no more than two ticks count."""
        counted = min(elapsed, 2 * TICK)
        self.now, self.lost = self.now + counted, self.lost + elapsed - counted


clock = Clock()


class Stream:
    """What viewers receive, and how it has been lately."""

    task: asyncio.Task[None]
    target = 2.0  # its target duration, until a playlist says so
    is_opaque = False  # encrypted, or no transport stream

    def __init__(self, name: str, url: str) -> None:
        self.name, self.url = name, url
        self.had_at = clock.now  # when the last new thing could be had
        self.trouble = ""  # the last one, since something could be had
        self.reason = ""  # why it is degraded, if it is
        self.failures = self.kbps = self.cc_errors = 0
        self.continuity = Continuity()
        self._faults: deque[str] = deque(maxlen=6)  # "" is a good segment

    @property
    def silence(self) -> float:
        """Target durations without anything new."""
        return (clock.now - self.had_at) / self.target

    @property
    def is_dead(self) -> bool:
        return self.silence > (2 if self.failures >= 3 else 3)

    def judge(self, *faults: str) -> None:
        """Add segments; what is wrong with the whole stream counts as two."""
        self._faults.extend(faults)
        bad = [each for each in self._faults if each]
        if len(bad) >= 2:
            self.reason = f"{self.name}: {bad[-1]}" if self.name else bad[-1]
        elif not bad and len(self._faults) == 6:
            self.reason = ""

    def miss(self, trouble: str) -> None:
        """Judge a segment that could not be had."""
        self.trouble, self.continuity = trouble, Continuity()
        self.judge(trouble)

    def take(self, data: bytes, seconds: float, fault: str = "") -> None:
        """Judge a segment of so many seconds that could be had."""
        errors, scrambled = (0, 0) if self.is_opaque else self.continuity.feed(data)
        if not self.is_opaque and data[:1] != b"\x47":
            self.miss("no transport stream")
        elif scrambled > len(data) / PACKET / 2:
            self.miss("scrambled")
        else:
            self.had_at, self.trouble = clock.now, ""
            self.kbps = round(len(data) * 8 / 1000 / seconds)
            self.cc_errors += errors
            self.judge(f"{errors} continuity errors" if errors else fault)


# ---- HLS -----------------------------------------------------------------------------
# A channel's URL leads to a master playlist that names variants, or to the one media
# playlist itself (RFC 8216). Redirects are followed, and relative URLs resolve against
# where they led. Playlists are read as often as §6.3.4 lets a player read them.

TLS = create_ssl_context()  # slow to make, so one for all


class Trouble(Exception):
    """What a viewer's player would have met."""


MOST_BYTES = {"playlist": 1_000_000, "segment": 100_000_000}


async def fetch(
    http: AsyncClient, what: str, url: str, seconds: float
) -> tuple[str, bytes]:
    """Where redirects led, and all that is there. Raises Trouble."""
    body, most = bytearray(), MOST_BYTES[what]
    try:
        async with asyncio.timeout(seconds), http.stream("GET", url) as response:
            if response.status_code != 200:
                raise Trouble(f"{what}: HTTP {response.status_code}")
            async for chunk in response.aiter_bytes():
                body += chunk
                if len(body) > most:  # an origin may never end
                    raise Trouble(f"{what}: more than {most:,} bytes")
    except (TimeoutError, HTTPError, InvalidURL, ValueError) as error:
        text = str(error)[:200] or "no answer"  # a timeout has no text
        raise Trouble(f"{what}: {text}") from None
    return str(response.url), bytes(body)


async def read_playlist(http: AsyncClient, url: str, seconds: float) -> m3u8.M3U8:
    """A master or media playlist with absolute URLs. Raises Trouble."""
    url, body = await fetch(http, "playlist", url, seconds)
    text = body.decode(errors="replace")
    if not text.startswith("#EXTM3U"):  # m3u8 takes HTML for an empty playlist
        raise Trouble("playlist: not a playlist")
    try:
        playlist = m3u8.loads(text, uri=url)
        for each in [*playlist.playlists, *playlist.segments]:
            each.uri = str(each.absolute_uri)
        for each in playlist.segments:  # m3u8 lets them have none
            each.duration = max(0.1, float(each.duration))
    except MALFORMED:
        raise Trouble("playlist: malformed") from None
    return playlist


class Variant(Stream):
    """One media playlist of a channel."""

    had = newest = -1  # the numbers of the last segments that could be had, was tried

    async def watch(self, channel: Channel) -> None:
        """Read it again and again; if that fails, the master may have a better URL."""
        while True:
            began = clock.now
            try:
                wait = await self._poll(channel.http)
            except Trouble as trouble:
                self.failures, self.trouble = self.failures + 1, str(trouble)
                channel.due = 0.0
                # Soon, since players' buffers are small; later once it is dead.
                wait = self.target / (2 if self.is_dead else 6)
            await asyncio.sleep(max(0.05, wait - (clock.now - began)))

    async def _poll(self, http: AsyncClient) -> float:
        """Read the playlist and its new segments; how long to wait from then on."""
        playlist = await read_playlist(http, self.url, max(self.target, 2.0))
        self.failures = 0
        self.target = min(max(1.0, playlist.target_duration or self.target), 30.0)
        segments = self._new(playlist.segments)
        for segment in segments:
            await self._take(http, segment)
        if segments and playlist.is_endlist:  # the last one fills less of a buffer
            self.had_at -= max(0.0, self.target - segments[-1].duration)
        elif not segments and self.silence > 1:
            has_ended = playlist.is_endlist
            self.trouble = "the stream has ended" if has_ended else "no new segment"
        return self.target if segments else self.target / 2

    def _new(self, segments: list[m3u8.Segment]) -> list[m3u8.Segment]:
        """The last three at most (§6.3.3): whoever fell behind skips as well."""
        if self.is_dead:  # as a player without a buffer tries them again
            self.newest = self.had
        # A cache may serve an old playlist now and then; an encoder that was started
        # again numbers its segments anew.
        if segments and segments[-1].media_sequence < self.newest and self.silence > 2:
            self.newest = -2
        return [each for each in segments if each.media_sequence > self.newest][-3:]

    async def _take(self, http: AsyncClient, segment: m3u8.Segment) -> None:
        began, number = clock.now, segment.media_sequence
        if segment.discontinuity or number != self.newest + 1:
            self.continuity = Continuity()
        self.newest = number
        try:
            if segment.gap_tag:
                raise Trouble("segment: marked as missing")
            _, body = await fetch(http, "segment", segment.uri, 2 * self.target)
        except Trouble as trouble:
            self.miss(str(trouble))
        else:
            self._look_at(body, segment, clock.now - began)
            self.had = self.had if self.trouble else number

    def _look_at(self, body: bytes, segment: m3u8.Segment, took: float) -> None:
        is_encrypted = segment.key and segment.key.method != "NONE"
        is_audio = body[:3] == b"ID3"
        self.is_opaque = bool(is_encrypted or segment.init_section or is_audio)
        seconds = segment.duration
        slow = f"slow: {took:.1f} s for a segment of {seconds:.1f} s"
        self.take(body, seconds, slow if took > seconds else "")


# ---- Multicast -----------------------------------------------------------------------
# The group that the channel is sent on to: a second of it is judged as a segment is.


class Group(Stream, asyncio.DatagramProtocol):
    """A member of one group."""

    target = 1.0

    def datagram_received(self, data: bytes, address: Any) -> None:
        self._data += data if data[:1] == b"\x47" else data[12:]  # RTP (RFC 3550 §5.1)

    async def watch(self, channel: Channel) -> None:
        """Join udp://@address:port on the interface at an address, and listen."""
        group, loop = urlsplit(self.url), asyncio.get_running_loop()
        self._data = bytearray()
        try:
            member = socket.inet_aton(str(group.hostname))
            member += socket.inet_aton(channel.interface)
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
                receiver.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_000_000)
                receiver.bind((group.hostname, group.port))
                receiver.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
                made = await loop.create_datagram_endpoint(lambda: self, sock=receiver)
                with closing(made[0]):
                    await self._judge()
        except (OSError, ValueError) as error:  # ValueError: the port cannot be
            self.trouble = str(error)

    async def _judge(self) -> None:
        while True:
            lost = clock.lost
            await asyncio.sleep(self.target)
            data, self._data = bytes(self._data), bytearray()
            if not data:
                self.trouble = "silent"
            elif clock.lost > lost:  # packets may have been lost in this machine
                self.had_at, self.continuity = clock.now, Continuity()
            else:
                self.take(data, self.target)


# ---- Channels ------------------------------------------------------------------------
# One task a channel, which owns those of its variants and of its group. Off-air: all
# variants are dead for good, so players' buffers are empty. Degraded: viewers notice
# something.


class Channel:
    """A channel that is being watched, and the report that comes of it."""

    task: asyncio.Task[None]
    etag = ""  # of the report that the service has
    told_at = float("-inf")
    due = 0.0  # when its URL is to be read

    def __init__(self, item: dict[str, Any], interface: str) -> None:
        self.item, self.interface, url = item, interface, item["url"]
        self.streams: dict[str, Variant | Group] = {}  # by names for them
        self.report: dict[str, Any] = {"url": url, "state": UNKNOWN, "reason": ""}
        self.report |= {"since": int(time.time()), "cc_errors": 0, "kbps": 0}
        self.history: list[dict[str, Any]] = []  # of changes; the last one is now
        self.told: list[dict[str, Any]] = []  # the last one that the service has
        self.trouble, self.failures = "", 0  # with the URL itself, one a second
        self._group = {"multicast": item["multicast"]} if item["multicast"] else {}
        # A client of its own: its cookies may be part of its token, and a hanging
        # origin takes no other channel's connections.
        self.http = AsyncClient(verify=TLS, follow_redirects=True, timeout=None)

    async def run(self) -> None:
        urls = {"": self.item["url"]} | self._group  # until a master names variants
        async with self.http, asyncio.TaskGroup() as group:
            while True:
                for name in self.streams.keys() - urls.keys():
                    self.streams.pop(name).task.cancel()
                for name, url in urls.items():
                    if name not in self.streams:
                        kind = Group if name == "multicast" else Variant
                        self.streams[name] = stream = kind(name, url)
                        stream.task = group.create_task(stream.watch(self))
                    self.streams[name].url = url
                await asyncio.sleep(TICK)
                if clock.now >= self.due:
                    urls = await self._read_urls() or urls

    async def _read_urls(self) -> dict[str, str]:
        """Those of the variants and of the group, by names for them; {} in trouble."""
        try:
            playlist = await read_playlist(self.http, self.item["url"], 5)
        except Trouble as trouble:
            self.trouble, self.failures = str(trouble), self.failures + 1
            self.due = clock.now + 1
            return {}
        self.failures, self.due = 0, clock.now + 60
        urls = {"": self.item["url"]}
        if playlist.is_variant:
            urls = {
                f"variant {n}, {each.stream_info.bandwidth // 1000} kbit/s": each.uri
                for n, each in enumerate(playlist.playlists, 1)
            }
        return urls | self._group

    def judge(self) -> bool:
        """Bring the report up to date; has the state changed?"""
        report, before, now = self.report, self.report["state"], int(time.time())
        state, reason = self._judge()
        report |= {"state": state, "reason": reason, "checked": now}
        report["kbps"] = max((each.kbps for each in self.streams.values()), default=0)
        for each in self.streams.values():
            report["cc_errors"] += each.cc_errors
            each.cc_errors = 0
        if state != before:
            self._follow({"state": state, "reason": reason, "since": now})
        return bool(state != before)

    def _judge(self) -> tuple[str, str]:
        streams = self.streams.values()
        variants = [each for each in streams if isinstance(each, Variant)]
        if variants and all(each.silence > 3 for each in variants):
            troubles = [each.trouble for each in variants if each.trouble]
            self.failures = 0  # these count while there is something to tune in to
            return OFF_AIR, next(iter(troubles), self.trouble)
        is_new = all(each.had < 0 for each in variants)
        if is_new or all(each.is_dead for each in variants):
            return self.report["state"], self.report["reason"]  # not yet
        for each in streams:
            if each.is_dead:
                each.judge(*[f"dead: {each.trouble}"] * 2)
        reasons = [each.reason for each in streams if each.reason]
        if self.failures > 9:
            reasons.append(f"nobody can tune in: {self.trouble}")
        return (DEGRADED, reasons[0]) if reasons else (ON_AIR, "")

    def _follow(self, change: dict[str, Any]) -> None:
        """Add a change to the history, unless nothing changes."""
        if not self.history or self.history[-1]["state"] != change["state"]:
            self.history = [*self.history[-19:], change]
        self.report |= {"history": self.history, "since": self.history[-1]["since"]}

    def continue_from(self, report: dict[str, Any]) -> None:
        """Go on with the history of another monitor's report."""
        if report["url"] == self.report["url"]:
            errors = max(self.report["cc_errors"], report["cc_errors"])
            self.report["cc_errors"] = errors
            ours, self.history = self.history, report["history"]
            for change in ours:
                if change["since"] >= report["since"]:
                    self._follow(change)
            if ours:
                self._follow(ours[-1] | {"since": int(time.time())})


# ---- The service ---------------------------------------------------------------------
# One login lasts for a session; its short-lived access tokens are refreshed on the way,
# by Authlib when they end (leeway=0: by default, each request of a session's last
# minute refreshes), and by us when they are refused before. When the session is about
# to end, or was ended, the monitor logs in again.


class Service:
    """The station's service, to somebody with an account."""

    def __init__(self, url: str, user: str, password: str) -> None:
        self._account = {"username": user, "password": password}
        self._url, self._session_ends = url.rstrip("/"), 0.0
        self._channels: tuple[str, dict[str, Any]] = ("", {})  # ETag, and all of them
        self._http = AsyncOAuth2Client(
            token_endpoint=f"{self._url}/token", leeway=0, timeout=10
        )

    async def request(self, method: str, path: str, **given: Any) -> Response:
        """Raises OAuthError if there is no way to log in, HTTPError for much else."""
        for _ in range(3):
            if time.time() >= self._session_ends:
                token = await self._http.fetch_token(
                    **self._account, grant_type="password"
                )
                self._session_ends = time.time() + token["refresh_expires_in"] - 2
            try:
                response = await self._http.request(method, self._url + path, **given)
            except OAuthError:  # the session was ended
                self._session_ends = 0.0
                continue
            if response.status_code != 401:
                break
            self._http.token["expires_at"] = 0  # clocks differ
        else:
            raise OAuthError("invalid_token", "A token that was just given is refused")
        if response.status_code not in (304, 404, 412):
            response.raise_for_status()
        return response

    async def channels(self) -> dict[str, Any]:
        """All of them, by id; they are sent only if they have changed."""
        etag, items = self._channels
        headers = {"If-None-Match": etag}
        response = await self.request("GET", "/channels", headers=headers)
        if response.status_code == 200:
            etag, items = response.headers["ETag"], response.json()
            while "next" in response.links:  # each page has a tag, the whole has none
                query = urlsplit(response.links["next"]["url"]).query
                response, etag = await self.request("GET", f"/channels?{query}"), ""
                items |= response.json()
            self._channels = etag, items
        return items


# ---- Monitor -------------------------------------------------------------------------
# It watches the channels that the service lists, and puts a report under each one's id
# when its state changes, and every 30 s. The first channel is reported every 2 s, so
# whoever stands by sees from the age of that when reports have stopped. Two that report
# at once do not match each other's ETags: one of them stands by.


@dataclass
class Monitor:
    """All channels, and what was told of them."""

    service: Service
    interface: str
    patience: float = 6.0  # seconds without a report, and this one takes over
    is_active: bool = False
    problem: str = ""  # with the service
    channels: dict[tuple[str, ...], Channel] = field(default_factory=dict)
    list_due: float = 0.0

    async def run(self) -> None:
        live = Live(get_renderable=lambda: table(self), console=console)
        with live if console.is_terminal else nullcontext():
            await asyncio.gather(self.judge(), self.talk())

    async def judge(self) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(TICK)
            last, before = time.monotonic(), last
            clock.tick(last - before)
            for channel in self.channels.values():
                if channel.judge():
                    what = "{state} {reason}".format_map(channel.report)
                    say(f"{channel.item['name']}: {what}")

    async def talk(self) -> None:
        """Keep up with the service, through its and its network's outages."""
        while True:
            wait, problem = 0.1, ""
            try:
                await self._read_channels()
                await self._report()
            # MALFORMED: such as what a proxy says in the service's place.
            except (HTTPError, OAuthError, *MALFORMED) as error:
                problem = f"{type(error).__name__} {error}".partition("\n")[0]
                wait = 30 if isinstance(error, OAuthError) else 1
            if problem != self.problem:
                self.problem = problem
                say(f"service: {problem or 'answers again'}")
            await asyncio.sleep(wait)

    async def _read_channels(self) -> None:
        """Watch what the service lists, and what has another URL as something else."""
        if time.monotonic() < self.list_due:
            return
        items = await self.service.channels()
        self.list_due = time.monotonic() + 5
        wanted = {
            (id, item["url"], item["multicast"]): item
            for id, item in items.items()
            if item["enabled"]
        }
        for key, channel in list(self.channels.items()):
            if key not in wanted or channel.task.done():  # by a fault of this program
                channel.task.cancel()
                del self.channels[key]
                if self.is_active and key[0] not in items:
                    await self.service.request("DELETE", state_path(key[0]))
        for key, item in wanted.items():
            if key not in self.channels:
                self.channels[key] = channel = Channel(item, self.interface)
                channel.task = asyncio.create_task(channel.run())
                await asyncio.sleep(0.02)  # no rush at the start
            self.channels[key].item = item

    async def _report(self) -> None:
        """What is due, and what waits longest first, lest one refusal stops all."""
        first = min(self.channels, default=None)
        for key in sorted(self.channels, key=lambda key: self.channels[key].told_at):
            channel = self.channels[key]
            age = time.monotonic() - channel.told_at
            is_due = age >= (self.patience / 3 if key == first else 30)
            is_news = channel.history[-1:] != channel.told
            if (is_due or is_news) if self.is_active else (is_due and key == first):
                await self._send(state_path(key[0]), channel)

    async def _send(self, path: str, channel: Channel) -> None:
        """Put a report, unless somebody else does."""
        channel.told_at = time.monotonic()
        if not channel.etag:
            response = await self.service.request("GET", path)
            if response.status_code == 200:
                channel.continue_from(response.json())
                age = time.time() - response.json()["checked"]
                if age < self.patience and not self.is_active:
                    return
            channel.etag = response.headers.get("ETag", "")
        if channel.report["state"] == UNKNOWN:
            return
        match = {"If-Match": channel.etag} if channel.etag else {"If-None-Match": "*"}
        channel.etag = ""  # if no answer comes, the next try looks first
        report, change = channel.report, channel.history[-1:]
        response = await self.service.request("PUT", path, json=report, headers=match)
        is_mine = response.status_code != 412
        if is_mine:
            channel.etag, channel.told = response.headers["ETag"], change
        else:  # nor are the others as they were
            for each in self.channels.values():
                each.etag = ""
        if is_mine != self.is_active:
            self.is_active = is_mine
            say(f"this monitor {'reports' if is_mine else 'stands by'}")


def state_path(id: str) -> str:
    return f"/states/{quote(id, safe='')}"


def table(monitor: Monitor) -> Table:
    role = "reports" if monitor.is_active else "stands by"
    columns = ("channel", "state", "reason", "for", "kbit/s", "errors")
    shown = Table(*columns, title=f"This monitor {role}", expand=True)
    rows = [(each.report, each.item["name"]) for each in [*monitor.channels.values()]]
    for report, name in sorted(rows, key=lambda row: [*COLOURS].index(row[0]["state"])):
        age = timedelta(seconds=int(time.time()) - report["since"])
        numbers = (f"{report[each]:,}" for each in ("kbps", "cc_errors"))
        row = (name, report["state"], report["reason"], str(age), *numbers)
        shown.add_row(*row, style=COLOURS[report["state"]])
    return shown


# ---- Main ----------------------------------------------------------------------------


def read_m3u(text: str) -> Iterator[dict[str, Any]]:
    """The channels of a playlist as players keep them."""
    labels = {"group": "group-title", "tvg_id": "tvg-id", "logo": "tvg-logo"}
    name, given = "", {}
    for line in map(str.strip, text.splitlines()):
        if line.startswith("#EXTINF:"):
            given = dict(re.findall(r'([\w-]+)="([^"]*)"', line))
            # The name follows the first comma that stands in no quoted value.
            name = re.sub(r'^[^",]*("[^"]*"[^",]*)*,?', "", line).strip()
        elif line and not line.startswith("#"):
            number = given.get("tvg-chno", "")
            item: dict[str, Any] = {"name": name or line, "url": line}
            item["number"] = int(number) if number.isdecimal() else None
            yield item | {ours: given.get(theirs) for ours, theirs in labels.items()}
            name, given = "", {}


async def import_m3u(service: Service, text: str) -> int:
    """Add a playlist's channels to the service; those whose URL it has are there."""
    urls = {item["url"] for item in (await service.channels()).values()}
    added = 0
    for item in read_m3u(text):
        if urlsplit(item["url"]).scheme not in ("http", "https"):
            say(f"{item['name']}: left out, {item['url']} is no HTTP")
        elif item["url"] not in urls:
            await service.request("POST", "/channels", json=item)
            urls.add(item["url"])
            added += 1
    return added


def main() -> None:
    parser = argparse.ArgumentParser(description="Watch a station's channels")
    parser.add_argument("--service", default="http://localhost:5000", help="its URL")
    parser.add_argument("--user", required=True, help="password: TV_PASSWORD, or asked")
    parser.add_argument("--import", dest="m3u", type=Path, help="add channels, and end")
    parser.add_argument("--interface", default="0.0.0.0", help="for multicast, by IP")
    options = parser.parse_args()
    password = os.environ.get("TV_PASSWORD") or getpass()
    # As Ctrl-C does, so that the terminal gets its cursor back.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    service = Service(options.service, options.user, password)
    try:
        if options.m3u:
            text = options.m3u.read_text(encoding="utf-8-sig", errors="replace")
            print(asyncio.run(import_m3u(service, text)), "channels added")
        else:
            asyncio.run(Monitor(service, options.interface).run())
    except (OSError, OAuthError, HTTPError, KeyboardInterrupt) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
