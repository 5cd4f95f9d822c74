"""Watch a station's channels as their viewers do, and report to tv_service.py.

    export TV_PASSWORD=…
    python examples/tv_monitor.py --user monitor1               # watch and report
    python examples/tv_monitor.py --user ann --import list.m3u  # fill the channel list

A second monitor stands by, and takes over when the first one's reports stop.

    Time · Transport streams · Judging · HLS · Multicast · Channels
    The service · Monitor · The terminal · Main

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
import ssl
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from getpass import getpass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, urlsplit

import httpx2
import m3u8
from authlib.integrations.httpx_client import AsyncOAuth2Client, OAuthError
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

ON_AIR, DEGRADED, OFF_AIR, UNKNOWN = "on air", "degraded", "off-air", "unknown"


class Trouble(Exception):
    """What a viewer's player would have met; status is of the answer, if any."""

    def __init__(self, text: str, status: int = 0) -> None:
        super().__init__(text)
        self.status = status


# ---- Time ----------------------------------------------------------------------------
# All judging goes by a clock that stands still while this process gets no processor
# time: to a monitor that was kept from looking, every answer would seem late.


class Clock:
    """Seconds during which this process could look. A class, since ticks feed it."""

    TICK = 0.1

    def __init__(self) -> None:
        self.now = 0.0
        self.lost = 0.0

    def tick(self, elapsed: float) -> None:
        """So much time has passed since the last tick; no more than two ticks count."""
        counted = min(elapsed, 2 * self.TICK)
        self.now += counted
        self.lost += elapsed - counted

    async def run(self) -> None:
        last = time.monotonic()
        while True:
            await asyncio.sleep(self.TICK)
            now = time.monotonic()
            self.tick(now - last)
            last = now


# ---- Transport streams ---------------------------------------------------------------
# MPEG-TS is packets of 188 bytes. Those with payload are numbered 0 to 15 within their
# stream (PID): what is lost leaves a gap (ISO/IEC 13818-1 §2.4.3.3).

PACKET = 188
NULL_PID = 0x1FFF


class Packets(NamedTuple):
    """What was seen in some packets."""

    seen: int
    errors: int  # gaps in the numbering, and packets marked as broken
    scrambled: int


class Continuity:
    """Follows the counters of one stream, from one piece of it to the next."""

    def __init__(self) -> None:
        self._last: dict[int, tuple[int, bytes]] = {}  # PID: its counter and its packet

    def feed(self, data: bytes) -> Packets:
        """Look at whole packets, about five million a second."""
        counters = {pid: counter for pid, (counter, _) in self._last.items()}
        offsets: dict[int, int] = {}
        errors = scrambled = 0
        size = len(data) - len(data) % PACKET
        columns = (data[n:size:PACKET] for n in range(1, 4))
        for number, (high, low, flags) in enumerate(zip(*columns, strict=True)):
            pid = (high & 0x1F) << 8 | low
            if pid == NULL_PID or not flags & 0x10:  # without payload, not numbered
                continue
            scrambled += flags & 0xC0 > 0
            counter, offset = flags & 0x0F, number * PACKET
            before = counters.get(pid)
            if high & 0x80:
                errors += 1
            elif before is not None and counter != (before + 1) & 0x0F:
                packet = data[offset : offset + PACKET]
                old = offsets.get(pid)
                last = self._last[pid][1] if old is None else data[old : old + PACKET]
                is_duplicate = counter == before and packet == last
                is_announced = flags & 0x20 and packet[4] and packet[5] & 0x80
                errors += not is_duplicate and not is_announced
            counters[pid], offsets[pid] = counter, offset
        for pid, offset in offsets.items():
            self._last[pid] = (counters[pid], data[offset : offset + PACKET])
        return Packets(size // PACKET, errors, scrambled)


# ---- Judging -------------------------------------------------------------------------
# Off-air: for three target durations nothing new could be had, so players' buffers are
# empty (RFC 8216 §6.3.3 lets them start three segments from the end). Degraded: viewers
# notice something. A failed playlist request alone is nothing: players try again.

OFF_AIR_AFTER = 3  # target durations without anything new
DEAD_AFTER = 2  # target durations, for a variant whose requests fail as well


class Window:
    """The last six segments: two bad ones degrade, and only six good ones end that."""

    def __init__(self) -> None:
        self._faults: deque[str] = deque(maxlen=6)  # "" is a good segment
        self.reason = ""  # why it is degraded, if it is

    def add(self, fault: str) -> None:
        self._faults.append(fault)
        bad = [each for each in self._faults if each]
        if len(bad) >= 2:
            self.reason = bad[-1]
        elif not bad and len(self._faults) == 6:
            self.reason = ""

    def spoil(self, reason: str) -> None:
        """What is wrong is no single segment."""
        self.add(reason)
        self.add(reason)


# ---- HLS -----------------------------------------------------------------------------
# A channel's URL leads to a master playlist that names variants, or to the one media
# playlist itself (RFC 8216). Redirects are followed, and relative URLs resolve against
# where they led. Playlists are read as often as §6.3.4 lets a player read them.

PLAYLIST_BYTES, SEGMENT_BYTES = 1_000_000, 100_000_000
FIRST_TARGET = 2.0  # seconds; the target duration until a playlist has said it
MASTER_LIFE = 60.0  # seconds after which the variants are read again
FAILING_AFTER = 10.0  # seconds, for the URL itself while its variants are good
STUCK = "no new segment"
MALFORMED = (ValueError, LookupError, TypeError, AttributeError)  # m3u8 raises these


async def fetch(
    http: httpx2.AsyncClient, url: str, seconds: float, limit: int
) -> tuple[str, bytes]:
    """Where the redirects led, and the body. Raises Trouble."""
    try:
        async with asyncio.timeout(seconds), http.stream("GET", url) as response:
            if response.status_code != 200:
                raise Trouble(f"HTTP {response.status_code}", response.status_code)
            body = bytearray()
            async for part in response.aiter_bytes():
                body += part
                if len(body) > limit:
                    raise Trouble(f"more than {limit:,} bytes")
            return str(response.url), bytes(body)
    except (TimeoutError, httpx2.TimeoutException):
        raise Trouble("no answer in time") from None
    except httpx2.TooManyRedirects:
        raise Trouble("redirects in a loop") from None
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
        raise Trouble(str(error) or type(error).__name__) from None


async def read_playlist(
    http: httpx2.AsyncClient, url: str, seconds: float
) -> m3u8.M3U8:
    """A master or media playlist. Raises Trouble."""
    try:
        led_to, body = await fetch(http, url, seconds, PLAYLIST_BYTES)
    except Trouble as trouble:
        raise Trouble(f"playlist: {trouble}", trouble.status) from None
    text = body.decode(errors="replace")
    if not text.startswith("#EXTM3U"):  # m3u8 takes HTML for an empty playlist
        raise Trouble("playlist: not a playlist")
    try:
        return m3u8.loads(text, uri=led_to)
    except MALFORMED:
        raise Trouble("playlist: malformed") from None


async def read_segment(
    http: httpx2.AsyncClient, segment: m3u8.Segment, seconds: float
) -> bytes:
    """The whole of it. Raises Trouble."""
    try:
        _, body = await fetch(http, segment.absolute_uri, seconds, SEGMENT_BYTES)
    except Trouble as trouble:
        raise Trouble(f"segment: {trouble}") from None
    except MALFORMED:
        raise Trouble("segment: malformed URL") from None
    return body


def named_variants(master: m3u8.M3U8) -> dict[str, str]:
    """The variants' URLs, by what tells them apart. Raises Trouble."""
    found: dict[str, str] = {}
    try:
        for each in master.playlists:
            name = f"{each.stream_info.bandwidth // 1000} kbit/s"
            while name in found:  # the same on another server (§4.3.4.2)
                name += "'"
            found[name] = each.absolute_uri
    except MALFORMED:
        raise Trouble("playlist: malformed") from None
    if not found:
        raise Trouble("playlist: no variants in it")
    return found


class Variant:
    """One media playlist of a channel, and what its viewers get."""

    def __init__(self, name: str, url: str, clock: Clock) -> None:
        self.name, self.url, self._clock = name, url, clock
        self.target = FIRST_TARGET
        self.had_at = clock.now  # when the last new thing could be had
        self.failures = 0  # playlist requests in a row
        self.trouble = ""  # the last one, since something could be had
        self.window = Window()
        self.kbps = self.cc_errors = 0
        self._newest: int | None = None  # media sequence number of the last segment
        self._had: int | None = None  # and of the last one that could be had
        self._older = 0  # playlists in a row that are older than that
        self._continuity = Continuity()

    @property
    def silence(self) -> float:
        """Target durations without anything new."""
        return (self._clock.now - self.had_at) / self.target

    @property
    def has_begun(self) -> bool:
        return self._had is not None

    @property
    def reason(self) -> str:
        """Why viewers notice something, if they do."""
        reason = self.window.reason
        return f"{self.name}: {reason}" if reason and self.name else reason

    @property
    def is_dead(self) -> bool:
        is_failing = self.failures >= 3 and self.silence > DEAD_AFTER
        return is_failing or self.silence > OFF_AIR_AFTER

    def rejoin(self) -> None:
        """Try again what could not be had, as a player without a buffer does."""
        self._newest = self._had

    async def poll(self, http: httpx2.AsyncClient) -> float:
        """Read the playlist and its new segments; how long to wait from its request on.

        Raises Trouble with a status if the playlist's URL is no good any more.
        """
        try:
            seconds = max(self.target, 2.0)
            playlist = await read_playlist(http, self.url, seconds)
            if playlist.is_variant:
                raise Trouble("playlist: a master where a variant should be", 400)
        except Trouble as trouble:
            self.failures += 1
            self.trouble = str(trouble)
            if 400 <= trouble.status < 500:
                raise
            return self.retry_after
        self.failures = 0
        self.target = min(max(1.0, playlist.target_duration or self.target), 30.0)
        segments = self._new_segments(playlist)
        for number, segment in segments:
            await self._take(http, number, segment)
        if playlist.is_endlist and segments:  # the last one fills less of a buffer
            self.had_at -= self.target - min(self._length(segments[-1][1]), self.target)
        elif not segments and self.silence > 1:
            self.trouble = "the stream has ended" if playlist.is_endlist else STUCK
        return self.target if segments else self.target / 2

    @property
    def retry_after(self) -> float:
        """Soon, since players' buffers are small; later once it is dead."""
        return self.target / (2 if self.is_dead else 6)

    def _length(self, segment: m3u8.Segment) -> float:
        """In seconds; whatever the playlist says, it is a positive number."""
        return max(0.1, segment.duration or self.target)

    def _new_segments(self, playlist: m3u8.M3U8) -> list[tuple[int, m3u8.Segment]]:
        first = playlist.media_sequence or 0
        segments = list(enumerate(playlist.segments, first))
        end = first + len(segments) - 1
        # A cache may serve an old playlist now and then; an encoder that was started
        # again numbers its segments anew.
        self._older = self._older + 1 if segments and end < (self._newest or 0) else 0
        if self._older == 3:
            self._newest = self._had = None
        if self._newest is not None:
            segments = [pair for pair in segments if pair[0] > self._newest]
        return segments[-3:]  # §6.3.3; whoever fell behind skips as well

    async def _take(
        self, http: httpx2.AsyncClient, number: int, segment: m3u8.Segment
    ) -> None:
        """Download a segment and look at it."""
        began = self._clock.now
        if segment.discontinuity or number != (self._newest or 0) + 1:
            self._continuity = Continuity()
        self._newest = number
        try:
            if segment.gap_tag:
                raise Trouble("segment: marked as missing")
            body = await read_segment(http, segment, 2 * self.target)
            took = self._clock.now - began
            duration = self._length(segment)
            fault = self._look_at(body, segment)
        except Trouble as trouble:
            self.trouble = str(trouble)
            self._continuity = Continuity()
            self.window.add(str(trouble))
            return
        if not fault and took > duration:
            fault = f"slow: {took:.1f} s for a segment of {duration:.1f} s"
        self.had_at, self._had, self.trouble = self._clock.now, number, ""
        self.kbps = round(len(body) * 8 / 1000 / duration)
        self.window.add(fault)

    def _look_at(self, body: bytes, segment: m3u8.Segment) -> str:
        """What viewers would notice. Raises Trouble if they would see nothing."""
        is_encrypted = segment.key and segment.key.method not in (None, "NONE")
        if is_encrypted or segment.init_section or body[:3] == b"ID3":
            return "" if body else "segment: empty"
        if len(body) < PACKET or body[0] != 0x47:
            raise Trouble("segment: no transport stream")
        packets = self._continuity.feed(body)
        if packets.scrambled > packets.seen / 2:
            raise Trouble("scrambled")
        errors = packets.errors
        if len(body) % PACKET or body[::PACKET].strip(b"\x47"):
            errors += 1
        self.cc_errors += errors
        return f"{errors} continuity errors in a segment" if errors else ""


# ---- Multicast -----------------------------------------------------------------------
# The group that the channel is sent on to. A second of it counts as a segment does.

SILENT_AFTER = 3.0  # seconds


class Multicast(asyncio.DatagramProtocol):
    """A member of one group."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.window = Window()
        self.cc_errors = 0
        self._heard_at = clock.now
        self._continuity = Continuity()

    def datagram_received(self, data: bytes, address: Any) -> None:
        if data[:1] != b"\x47":
            data = data[12:]  # RTP's header (RFC 3550 §5.1)
        self._heard_at = self._clock.now
        self.cc_errors += self._continuity.feed(data).errors

    async def watch(self, group: str, interface: str) -> None:
        """Join the group, and judge it every second."""
        loop = asyncio.get_running_loop()
        try:
            receiver = join(group, interface)
        except (OSError, ValueError, TypeError) as error:
            self.window.spoil(f"multicast: {error}")
            return
        transport, _ = await loop.create_datagram_endpoint(lambda: self, sock=receiver)
        try:
            while True:
                errors, lost = self.cc_errors, self._clock.lost
                await asyncio.sleep(1)
                self._judge(self.cc_errors - errors, self._clock.lost > lost)
        finally:
            transport.close()

    def _judge(self, errors: int, was_away: bool) -> None:
        silence = self._clock.now - self._heard_at
        if silence > SILENT_AFTER:
            self.window.add(f"multicast: silent for {silence:.0f} s")
        elif errors and was_away:  # the packets were lost in this machine
            self.cc_errors -= errors
        else:
            self.window.add(f"multicast: {errors} continuity errors" if errors else "")


def join(group: str, interface: str) -> socket.socket:
    """A socket that hears udp://@address:port alone, on the interface at an address."""
    url = urlsplit(group)
    address, port = str(url.hostname), url.port
    receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_000_000)
        receiver.setblocking(False)
        receiver.bind((address, port))
        member = socket.inet_aton(address) + socket.inet_aton(interface)
        receiver.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
    except (OSError, TypeError):
        receiver.close()
        raise
    return receiver


# ---- Channels ------------------------------------------------------------------------
# One task a channel, which owns those of its variants and of its group.


class Channel:
    """A channel that is being watched: what it is, and what came of it so far."""

    def __init__(self, item: dict[str, Any], clock: Clock, tls: ssl.SSLContext) -> None:
        self.item, self._clock = item, clock
        self.variants: dict[str, Variant] = {}
        self.multicast = Multicast(clock) if item.get("multicast") else None
        self.state, self.reason, self.since = UNKNOWN, "", int(time.time())
        self.history: list[dict[str, Any]] = []
        self._began = clock.now
        self._trouble = ""  # of the URL itself, at the last request
        self._failing_since = clock.now  # if there is such trouble
        self._cc_before = 0  # errors, in an earlier monitor's report
        self._read_master = asyncio.Event()
        # A client of its own: its cookies may be part of its token, and a hanging
        # origin takes no other channel's connections.
        self._http = httpx2.AsyncClient(
            verify=tls, follow_redirects=True, max_redirects=5, timeout=None
        )

    async def run(self, interface: str, delay: float = 0.0) -> None:
        await asyncio.sleep(delay)
        async with self._http, asyncio.TaskGroup() as group:
            if self.multicast:
                group.create_task(
                    self.multicast.watch(self.item["multicast"], interface)
                )
            tasks: dict[str, asyncio.Task[None]] = {}
            while True:
                self._read_master.clear()
                is_good = await self._find_variants()
                for name in tasks.keys() - self.variants.keys():
                    tasks.pop(name).cancel()
                for name in self.variants.keys() - tasks.keys():
                    tasks[name] = group.create_task(self._watch(self.variants[name]))
                with suppress(TimeoutError):
                    async with asyncio.timeout(MASTER_LIFE if is_good else 1):
                        await self._read_master.wait()

    async def _find_variants(self) -> bool:
        """Read the URL; the variants that were known keep what is known of them."""
        url = self.item["url"]
        try:
            playlist = await read_playlist(self._http, url, 5)
            found = named_variants(playlist) if playlist.is_variant else {"": url}
        except Trouble as trouble:
            if not self._trouble:
                self._failing_since = self._clock.now
            self._trouble = str(trouble)
            return False
        self._trouble = ""
        variants = {}
        for name, address in found.items():
            known = self.variants.get(name)
            variants[name] = known or Variant(name, address, self._clock)
            variants[name].url = address
        self.variants = variants
        return True

    async def _watch(self, variant: Variant) -> None:
        while True:
            began = self._clock.now
            try:
                wait = await variant.poll(self._http)
            except Trouble:  # its URL is no good any more: the master has the new one
                wait = variant.retry_after
                self._read_master.set()
            await asyncio.sleep(max(0.05, wait - (self._clock.now - began)))

    def judge(self) -> bool:
        """Look at all there is; has the state changed?"""
        state, reason = self._judge()
        self.reason = " ".join(reason.split())[:200]
        if state == self.state:
            return False
        self.state, self.since = state, int(time.time())
        if self.history and self.history[-1]["state"] == state:
            self.since = self.history[-1]["since"]  # so it was before a restart
        else:
            self.history.append(self.change)
        return True

    def _judge(self) -> tuple[str, str]:
        variants = self.variants.values()
        if all(each.silence > OFF_AIR_AFTER for each in variants):
            began = (self._clock.now - self._began) / FIRST_TARGET
            if not variants and began <= OFF_AIR_AFTER:
                return self.state, self.reason
            for each in variants:
                each.rejoin()
            troubles = [each.trouble for each in variants if each.trouble]
            return OFF_AIR, next(iter(troubles), self._trouble or STUCK)
        if not any(each.has_begun for each in variants):
            return self.state, self.reason
        dead = [each for each in variants if each.is_dead]
        for each in dead if len(dead) < len(variants) else []:
            each.window.spoil(f"dead: {each.trouble or STUCK}")
            each.rejoin()
        if self._trouble and self._clock.now - self._failing_since > FAILING_AFTER:
            return DEGRADED, f"nobody can tune in: {self._trouble}"
        reasons = [each.reason for each in variants]
        if self.multicast:
            reasons.append(self.multicast.window.reason)
        for reason in filter(None, reasons):
            return DEGRADED, reason
        if len(dead) == len(variants):  # it will be off-air, or go on
            return self.state, self.reason
        return ON_AIR, ""

    @property
    def change(self) -> dict[str, Any]:
        return {"state": self.state, "reason": self.reason, "since": self.since}

    @property
    def kbps(self) -> int:
        return max((each.kbps for each in self.variants.values()), default=0)

    @property
    def cc_errors(self) -> int:
        """Those that this monitor saw."""
        errors = sum(each.cc_errors for each in self.variants.values())
        return errors + (self.multicast.cc_errors if self.multicast else 0)

    def continue_from(self, report: dict[str, Any]) -> None:
        """Go on with the history of an earlier monitor's report."""
        if report["url"] != self.item["url"]:
            return
        merged = list(report["history"] or [])
        for change in self.history:
            last = merged[-1] if merged else {"state": "", "since": 0}
            is_later = change["since"] >= last["since"] and change not in merged
            if is_later and change["state"] != last["state"]:
                merged.append(change)
        self.history = merged
        if merged and merged[-1]["state"] == self.state:
            self.since = merged[-1]["since"]
        before = (report["cc_errors"] or 0) - self.cc_errors
        self._cc_before = max(self._cc_before, before)

    @property
    def report(self) -> dict[str, Any]:
        self.history = self.history[-20:]
        return self.change | {
            "url": self.item["url"],
            "checked": int(time.time()),
            "kbps": self.kbps,
            "cc_errors": self._cc_before + self.cc_errors,
            "history": self.history,
        }


# ---- The service ---------------------------------------------------------------------
# One login lasts for a session; its short-lived access tokens are refreshed on the way.
# When the session is about to end, or was ended, the monitor logs in again.


class Service:
    """The station's service, to somebody with an account."""

    def __init__(self, url: str, user: str, password: str) -> None:
        self._user, self._password = user, password
        self._url = url.rstrip("/")
        self._session_ends = 0.0
        self._http = AsyncOAuth2Client(
            token_endpoint=f"{self._url}/token", update_token=self._keep, timeout=10
        )

    async def request(self, method: str, path: str, **given: Any) -> httpx2.Response:
        """Raises OAuthError if there is no way to log in, HTTPError for much else."""
        url = path if "://" in path else self._url + path
        await self._log_in_if_needed()
        response = await self._ask(method, url, given)
        if response is None:
            self._http.token = None
            await self._log_in_if_needed()
            response = await self._ask(method, url, given)
        if response is None:
            raise OAuthError("invalid_token", "A token that was just given is refused")
        if response.status_code not in (304, 404, 409, 412):
            response.raise_for_status()
        return response

    async def _ask(
        self, method: str, url: str, given: dict[str, Any]
    ) -> httpx2.Response | None:
        """The answer, or None if the session is over, perhaps before its time."""
        try:
            response: httpx2.Response = await self._http.request(method, url, **given)
            if response.status_code == 401:  # as clocks differ, and count whole seconds
                await self._http.refresh_token()
                response = await self._http.request(method, url, **given)
        except OAuthError as error:
            if error.error == "invalid_grant":
                return None
            raise
        return None if response.status_code == 401 else response

    async def _log_in_if_needed(self) -> None:
        if self._http.token and time.time() < self._session_ends:
            return
        token = await self._http.fetch_token(
            username=self._user, password=self._password, grant_type="password"
        )
        await self._keep(token)

    async def _keep(self, token: dict[str, Any], **_: Any) -> None:
        """Decide when to renew what has just been given.

        No access token outlives its session, so refreshing those of a session's end
        brings nothing; by Authlib's default, each request of the last minute would.
        """
        life, session_life = token["expires_in"], token["refresh_expires_in"]
        margin = min(60.0, life / 10)
        self._session_ends = time.time() + session_life - margin
        self._http.leeway = margin if session_life > life else 0

    async def items(self, path: str, etag: str) -> tuple[dict[str, Any] | None, str]:
        """A list and its ETag; None if it is still the one with that ETag."""
        headers = {"If-None-Match": etag} if etag else {}
        response = await self.request("GET", path, headers=headers)
        if response.status_code == 304:
            return None, etag
        items, etag = response.json(), response.headers["ETag"]
        while "next" in response.links:  # each page has a tag, the whole has none
            url = str(response.url.join(response.links["next"]["url"]))
            response, etag = await self.request("GET", url), ""
            items |= response.json()
        return items, etag


def say(text: str) -> None:
    """A line, where no table is."""
    print(time.strftime("%Y-%m-%d %H:%M:%S"), text, flush=True)


# ---- Monitor -------------------------------------------------------------------------
# It watches the channels that the service lists, and puts a report under each one's id
# when its state changes, and every 30 s. Every 2 s some channel is reported, so whoever
# stands by knows within seconds that reports stopped. Two that report at the same time
# do not match each other's ETags: one of them stands by.

LIST_EVERY, REPORT_EVERY = 5.0, 30.0
TAKE_OVER_AFTER = 6.0  # seconds without anybody's report
NOTHING = float("-inf")


class Monitor:
    """All channels, and what was told of them."""

    def __init__(
        self, service: Service, interface: str, patience: float = TAKE_OVER_AFTER
    ) -> None:
        self.channels: dict[str, Channel] = {}
        self.is_active = False
        self.problem = ""  # with the service
        self.say: Callable[[str], None] = say
        self.clock = Clock()
        self._service, self._interface, self._patience = service, interface, patience
        self._tls = httpx2.create_ssl_context()  # slow to make, so one for all
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._news = asyncio.Event()
        self._list_etag, self._list_due, self._listed = "", NOTHING, frozenset[str]()
        self._etags: dict[str, str] = {}  # of reports; "" where there is none yet
        self._due: dict[str, float] = {}
        self._reported_at = NOTHING
        self._states: dict[str, Any] | None = None  # what others report
        self._states_etag, self._look_due, self._moved_at = "", NOTHING, 0.0

    async def run(self) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(self.clock.run())
            group.create_task(self._judge())
            group.create_task(self._talk())

    async def _judge(self) -> None:
        while True:
            await asyncio.sleep(0.25)
            for id, channel in self.channels.items():
                if channel.judge():
                    self._due[id] = NOTHING
                    self._news.set()
                    name, reason = channel.item["name"], channel.reason
                    self.say(f"{name}: {channel.state}{reason and f' ({reason})'}")

    async def _talk(self) -> None:
        """Keep up with the service, through its and its network's outages."""
        while True:
            wait, problem = 0.5, ""
            try:
                await self._read_channels()
                if not self.is_active:
                    await self._stand_by()
                if self.is_active:
                    await self._report()
            except httpx2.HTTPStatusError as error:
                problem = f"HTTP {error.response.status_code}"
                after = error.response.headers.get("Retry-After", "")
                wait = min(int(after), 30) if after.isdecimal() else 1
            except httpx2.HTTPError as error:
                problem, wait = str(error) or type(error).__name__, 1
            except OAuthError as error:
                problem, wait = str(error), 30
            except MALFORMED:  # such as what a proxy says in the service's place
                problem, wait = "an answer that is not the service's", 1
            if problem:
                self._states = None
            if problem != self.problem:
                self.problem = problem
                self.say(f"service: {problem or 'answers again'}")
            self._news.clear()
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await (asyncio.sleep(wait) if problem else self._news.wait())

    async def _read_channels(self) -> None:
        now = time.monotonic()
        if now < self._list_due:
            return
        items, self._list_etag = await self._service.items("/channels", self._list_etag)
        self._list_due = now + LIST_EVERY
        for id, task in self._tasks.items():
            if task.done():  # by a fault of this program, which must not end the rest
                self.say(f"{self.channels[id].item['name']}: {task.exception()!r}")
                self._watch(id, self.channels[id].item)
        if items is None:
            return
        self._listed = frozenset(items)
        enabled = {id: item for id, item in items.items() if item["enabled"]}
        for id in self._tasks.keys() - enabled.keys():
            self._tasks.pop(id).cancel()
            del self.channels[id], self._due[id]
        for number, (id, item) in enumerate(enabled.items()):
            old = self.channels[id].item if id in self.channels else {}
            if any(old.get(name) != item.get(name) for name in ("url", "multicast")):
                self._watch(id, item, delay=number / 50)  # no rush at the start
            self.channels[id].item = item

    def _watch(self, id: str, item: dict[str, Any], delay: float = 0.0) -> None:
        if id in self._tasks:
            self._tasks[id].cancel()
        channel = Channel(item, self.clock, self._tls)
        self.channels[id], self._due[id] = channel, NOTHING
        self._etags.pop(id, None)  # what is reported now belongs to another URL
        self._tasks[id] = asyncio.create_task(channel.run(self._interface, delay))

    async def _stand_by(self) -> None:
        """Look whether somebody else reports; if nobody does, it is up to us."""
        now = time.monotonic()
        if now < self._look_due:
            return
        self._look_due = now + self._patience / 3
        etag = self._states_etag if self._states is not None else ""
        states, self._states_etag = await self._service.items("/states", etag)
        if states is not None and states != self._states:
            self._states, self._moved_at = states, now
        if not self._states or now - self._moved_at >= self._patience:
            self.is_active = True
            self.say("this monitor reports")

    async def _report(self) -> None:
        now = time.monotonic()
        for id in self._etags.keys() - self._listed:
            await self._service.request("DELETE", f"/states/{quote(id, safe='')}")
            del self._etags[id]
        known = [id for id in self.channels if self.channels[id].state != UNKNOWN]
        known.sort(key=lambda id: self._due[id])
        ready = [id for id in known if self._due[id] <= now]
        if not ready and now - self._reported_at >= self._patience / 3:
            ready = known[:1]
        for id in ready:
            if self.is_active:
                await self._send(id)

    async def _send(self, id: str) -> None:
        channel, path = self.channels[id], f"/states/{quote(id, safe='')}"
        if id not in self._etags:
            response = await self._service.request("GET", path)
            self._etags[id] = response.headers.get("ETag", "")
            if response.status_code == 200:
                channel.continue_from(response.json())
        etag = self._etags.pop(id)  # if no answer comes, the next try looks first
        match = {"If-Match": etag} if etag else {"If-None-Match": "*"}
        self._due[id] = time.monotonic() + 1  # if this fails: again, after the others
        response = await self._service.request(
            "PUT", path, json=channel.report, headers=match
        )
        if response.status_code == 412:
            self.is_active, self._states = False, None
            self._etags.clear()
            self.say("another monitor reports: this one stands by")
        else:
            self._etags[id] = response.headers["ETag"]
            self._reported_at = time.monotonic()
            if self._due[id] > NOTHING:  # nothing changed meanwhile
                self._due[id] = self._reported_at + REPORT_EVERY


# ---- The terminal --------------------------------------------------------------------

COLOURS = {ON_AIR: "green", DEGRADED: "yellow", OFF_AIR: "red", UNKNOWN: "dim"}


async def show(monitor: Monitor) -> None:
    """A table that is always up to date."""
    last: deque[str] = deque(maxlen=5)
    monitor.say = lambda text: last.append(f"{time.strftime('%H:%M:%S')} {text}")
    with Live(console=Console(), auto_refresh=False) as live:
        while True:
            live.update(table(monitor, last), refresh=True)
            await asyncio.sleep(0.5)


def table(monitor: Monitor, last: deque[str]) -> Table:
    role = "reports" if monitor.is_active else "stands by"
    notes = Text("\n".join(last))
    shown = Table(title=f"This monitor {role}", caption=notes, expand=True)
    for name in ("channel", "state", "reason", "for"):
        shown.add_column(name)
    for name in ("kbit/s", "errors"):
        shown.add_column(name, justify="right")
    trouble_first = [OFF_AIR, DEGRADED, UNKNOWN, ON_AIR].index
    for channel in sorted(
        monitor.channels.values(), key=lambda each: trouble_first(each.state)
    ):
        shown.add_row(
            Text(channel.item["name"]),
            Text(channel.state, COLOURS[channel.state]),
            Text(channel.reason),
            ago(int(time.time()) - channel.since),
            f"{channel.kbps:,}",
            f"{channel.cc_errors:,}",
        )
    return shown


def ago(seconds: int) -> str:
    """
    >>> ago(59), ago(3600), ago(200_000)
    ('59 s', '60 min', '55 h')
    """
    if seconds < 120:
        return f"{seconds} s"
    return f"{seconds // 60} min" if seconds < 7200 else f"{seconds // 3600} h"


# ---- Main ----------------------------------------------------------------------------


def read_m3u(text: str) -> Iterator[dict[str, Any]]:
    """The channels of a playlist as players keep them.

    >>> info = '#EXTINF:-1 tvg-chno="7" group-title="News, local",City, live'
    >>> list(read_m3u(f"#EXTM3U\\n{info}\\nhttp://o.example/7.m3u8"))
    [{'name': 'City, live', 'url': 'http://o.example/7.m3u8', 'number': 7, 'group': 'News, local'}]
    """  # noqa: E501
    names = {"tvg-id": "tvg_id", "tvg-logo": "logo", "group-title": "group"}
    item: dict[str, Any] = {}
    for line in map(str.strip, text.splitlines()):
        if line.startswith("#EXTINF:"):
            given = dict(re.findall(r'([\w-]+)="([^"]*)"', line))
            # The name follows the first comma that stands in no quoted value.
            name = re.sub(r'^[^",]*("[^"]*"[^",]*)*,?', "", line).strip()
            item = {"name": name, "number": given.get("tvg-chno", "")}
            item |= {ours: given.get(theirs, "") for theirs, ours in names.items()}
        elif line and not line.startswith("#"):
            number = int(item["number"]) if item.get("number", "").isdecimal() else None
            item |= {"name": item.get("name") or line, "url": line, "number": number}
            order = ("name", "url", "number", "group", "tvg_id", "logo")
            yield {name: item[name] for name in order if item.get(name)}
            item = {}


async def import_m3u(service: Service, text: str) -> int:
    """Add a playlist's channels to the service; those whose URL it has are there."""
    listed, _ = await service.items("/channels", "")
    urls = {item["url"] for item in (listed or {}).values()}
    added = 0
    for item in read_m3u(text):
        if urlsplit(item["url"]).scheme not in ("http", "https"):
            say(f"{item['name']}: left out, {item['url']} is no HTTP")
        elif item["url"] not in urls:
            await service.request("POST", "/channels", json=item)
            urls.add(item["url"])
            added += 1
    return added


async def watch(service: Service, interface: str) -> None:
    """Until a signal comes."""
    monitor = Monitor(service, interface)
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(monitor.run())]
        if sys.stdout.isatty():
            tasks.append(group.create_task(show(monitor)))
        for number in (signal.SIGINT, signal.SIGTERM):
            for task in tasks:
                asyncio.get_running_loop().add_signal_handler(number, task.cancel)


def main() -> None:
    parser = argparse.ArgumentParser(description="Watch a station's channels")
    parser.add_argument("--service", default="http://localhost:5000", help="its URL")
    parser.add_argument("--user", required=True, help="password: TV_PASSWORD, or asked")
    parser.add_argument("--import", dest="m3u", type=Path, help="add channels, and end")
    parser.add_argument("--interface", default="0.0.0.0", help="for multicast, by IP")
    options = parser.parse_args()
    password = os.environ.get("TV_PASSWORD") or getpass()
    service = Service(options.service, options.user, password)
    try:
        if options.m3u:
            text = options.m3u.read_text(encoding="utf-8-sig", errors="replace")
            print(asyncio.run(import_m3u(service, text)), "channels added")
        else:
            asyncio.run(watch(service, options.interface))
    except (OSError, OAuthError, httpx2.HTTPError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
