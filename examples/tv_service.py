"""The service of a TV station: its channels, how they are, and what players open.

    export SERVICE_SECRET_KEY=… SERVICE_STORE_URL=sqlite:///tv.db
    python examples/tv_service.py adduser ann --role operator
    python examples/tv_service.py adduser monitor1 --role monitor
    gunicorn -c gunicorn.conf.py --pythonpath examples 'tv_service:create_app()'

Operators write /channels, monitors write /states (tv_monitor.py does), everybody with
an account reads both. Without one: /status for people, /metrics for Prometheus, and
/channels.m3u for players, which can send no token; if TV_KEY is set, they need ?key=….
"""

from __future__ import annotations

import hmac
import os
import sys
import time
from dataclasses import replace
from datetime import timedelta
from html import escape
from typing import Any

import prometheus_client as prometheus
from prometheus_client import CollectorRegistry, Counter, Gauge
from werkzeug import Response
from werkzeug import exceptions as http

import service
from service import Argument, Request, RequestParser, Resource, Route, Text

WORST_FIRST = ("off-air", "degraded", "unknown", "on air")

LINE = Text(0, 200, r"[^\x00-\x1f\x7f]*", "one line")
URL = Text(8, 2000, r"https?://[^\s\x00]+", "the URL of an HLS playlist")
GROUP = Text(0, 60, r"((udp|rtp)://@?[0-9.]+:[0-9]+)?", "as udp://@239.1.2.3:5000")

CHANNEL = [
    Argument("name", replace(LINE, shortest=1), required=True),
    Argument("url", URL, required=True),
    Argument("multicast", GROUP, default=""),  # where it is sent on
    Argument("number", int, choices=range(1, 100_000)),
    *[Argument(name, LINE, default="") for name in ("group", "tvg_id", "logo")],
    Argument("enabled", bool, default=True),
]
STATE = [
    Argument("url", URL, required=True),  # what was watched
    Argument("state", required=True, choices=WORST_FIRST),
    Argument("reason", Text(0, 500), default=""),
    *[Argument(name, int, required=True) for name in ("since", "checked")],  # Unix time
    *[Argument(name, int, default=0) for name in ("kbps", "cc_errors")],
    Argument("history", dict, action="append", default=[]),  # the last one is now
]
# Two, as states in the channels would change the ETag of their list with every report.
CHANNELS = Resource("channels", "channel", CHANNEL, shared="operator")
STATES = Resource("states", "state", STATE, shared="monitor")


def enabled_channels(request: Request) -> list[dict[str, Any]]:
    """Each with what is reported of it, in the order of their numbers."""
    data, now = request.app.store.read(service.SHARED), int(request.app.clock())
    channels = []
    for id, item in data["channels"].items():
        report = {"id": id, "since": now, "checked": 0, "kbps": 0, "cc_errors": 0}
        if data["states"].get(id, {}).get("url") == item["url"]:
            report |= data["states"][id]
        if now - report["checked"] > 120:  # the monitor is silent
            report |= {"state": "unknown", "reason": ""}
        if item["enabled"]:
            channels.append(report | item)
    return sorted(channels, key=lambda each: (each["number"] or 10**6, each["id"]))


def playlist(channels: list[dict[str, Any]], multicast: bool) -> str:
    """Some players take the name from behind the first comma, others from behind the
    last quotation mark: neither may be where another one does not expect it."""
    lines = ["#EXTM3U"]
    for each in channels:
        labels = {"tvg-id": each["tvg_id"], "tvg-chno": each["number"] or ""}
        labels |= {"tvg-logo": each["logo"].replace(",", "%2C")}
        labels |= {"group-title": each["group"]}
        texts = [f'{key}="{plain(label, ",")}"' for key, label in labels.items()]
        lines.append(f"#EXTINF:-1 {' '.join(texts)},{plain(each['name'])}")
        lines.append((multicast and each["multicast"]) or each["url"])
    return "\n".join(lines) + "\n"


def plain(text: Any, without: str = "\n") -> str:
    """With quotation marks that are no delimiters."""
    return " ".join(str(text).replace('"', "”").replace(without, " ").split())


PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="10"><title>{title}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: auto;
  padding: 1rem; color: #1b1f24; background: #fff }}
p {{ display: flex; flex-wrap: wrap; gap: 0 1rem; margin: 0; padding: .5rem 0;
  border-top: 1px solid #d5dae0; overflow-wrap: anywhere }}
b {{ width: 6rem; align-self: start; text-align: center; border-radius: .3rem }}
b {{ color: #fff }} strong {{ flex: 1 1 12rem }} i {{ flex: 2 1 12rem }}
.off-air {{ background: #b3261e }} .degraded {{ background: #8a5a00 }}
.unknown {{ background: #59636e }} .on {{ background: #1a7f37 }}
</style><h1>{title}</h1>
{rows}
<p>As of {time} UTC.</html>
"""
ROW = '<p><b class="{state}">{state}</b><strong>{name}</strong><i>{reason}</i>{notes}'


def read_status(request: Request) -> Response:
    """Show how the channels are, trouble first, on a page that refreshes itself"""
    channels, now, rows = enabled_channels(request), int(request.app.clock()), []
    for each in sorted(channels, key=lambda each: WORST_FIRST.index(each["state"])):
        name = escape(f"{each['number'] or ''} {each['name']}")
        notes = f"for {timedelta(seconds=max(0, now - each['since']))}"
        notes += f", {each['kbps']:,} kbit/s, {each['cc_errors']:,} errors"
        state, reason = each["state"], escape(each["reason"])
        rows.append(ROW.format(state=state, name=name, reason=reason, notes=notes))
    good = sum(each["state"] == "on air" for each in channels)
    title = f"{good} of {len(channels)} channels on air"
    as_of = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(now))
    page = PAGE.format(title=title, time=as_of, rows="\n".join(rows))
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    headers = {"Content-Security-Policy": policy, "Cache-Control": "no-store"}
    return Response(page, mimetype="text/html", headers=headers)


def read_metrics(request: Request) -> Response:
    """Give the states in Prometheus's text format"""
    registry, names = CollectorRegistry(), ["id", "channel"]
    state = Gauge("tv_state", "1 if it is so", [*names, "state"], registry=registry)
    kbps = Gauge("tv_kbps", "Rate of the last segment", names, registry=registry)
    errors = Counter("tv_cc_errors", "Continuity errors", names, registry=registry)
    for channel in enabled_channels(request):
        labels = (channel["id"], channel["name"])
        for each in WORST_FIRST:
            state.labels(*labels, each).set(each == channel["state"])
        kbps.labels(*labels).set(channel["kbps"])
        errors.labels(*labels).inc(channel["cc_errors"])
    text, kind = prometheus.generate_latest(registry), prometheus.CONTENT_TYPE_LATEST
    return Response(text, content_type=kind)


def create_app(settings: service.Settings | None = None, **options: Any) -> service.App:
    """The service with the station's data and views; nobody signs up by himself."""
    settings = replace(settings or service.Settings.from_environ(), signup="closed")
    key = os.environ.get("TV_KEY", "")
    prometheus.disable_created_metrics()  # counters are made for each answer
    query = RequestParser().add_argument("key", default="", location="args")
    query.add_argument("multicast", type=bool, default=False, location="args")

    def read_playlist(request: Request) -> Response:
        """List the channels for players; with multicast, by their groups"""
        given = query.parse_args(request)
        if key and not hmac.compare_digest(key.encode(), given["key"].encode()):
            raise http.Forbidden("The key in the URL is wrong")
        text = playlist(enabled_channels(request), given["multicast"])
        return Response(text, mimetype="audio/x-mpegurl")

    routes = [
        Route("GET /channels.m3u", read_playlist, takes=query, is_open=True),
        Route("GET /status", read_status, is_open=True),
        Route("GET /metrics", read_metrics, is_open=True),
    ]
    options |= {"resources": [CHANNELS, STATES], "routes": routes}
    return service.create_app(settings, title="TV station", **options)


if __name__ == "__main__":
    try:
        service.main(create_app())
    except ValueError as error:  # of a setting
        sys.exit(str(error))
