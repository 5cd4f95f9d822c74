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
from collections.abc import Iterator
from dataclasses import replace
from html import escape
from typing import Any, NamedTuple

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from werkzeug import Response
from werkzeug import exceptions as http

import service
from service import Argument, Request, RequestParser, Resource, Route, Text

STATES = ("off-air", "degraded", "unknown", "on air")  # the worst first
SILENT_AFTER = 120  # seconds without a report, and a channel's state is unknown

LINE = Text(1, 200, r"[^\x00-\x1f\x7f]*", "one line")
SHORT = Text(0, 200, r"[^\x00-\x1f\x7f]*", "one line")
URL = Text(
    8, 2000, r"https?://[^\s\x00]+", "a URL such as http://origin.example/1.m3u8"
)
GROUP = Text(0, 60, r"((udp|rtp)://@?[0-9.]+:[0-9]+)?", "as udp://@239.1.2.3:5000")

CHANNELS = Resource(
    "channels",
    "channel",
    [
        Argument("name", LINE, required=True),
        Argument("url", URL, required=True, help="{error_msg}: an HLS playlist"),
        Argument(
            "multicast", GROUP, default="", help="{error_msg}: where it is sent on"
        ),
        Argument("number", int, choices=range(1, 100_000)),
        Argument("group", SHORT, default=""),
        Argument("tvg_id", SHORT, default=""),
        Argument("logo", SHORT, default=""),
        Argument("enabled", bool, default=True),
    ],
    shared="operator",
)
# A resource of its own, under the channels' ids: in the channels it would change the
# ETag of their list with every report.
REPORTS = Resource(
    "states",
    "state",
    [
        Argument("url", URL, required=True),  # what was watched
        Argument("state", required=True, choices=STATES),
        Argument("reason", Text(0, 500), default=""),
        Argument("since", int, required=True),  # seconds since 1970, as are all times
        Argument("checked", int, required=True),
        Argument("kbps", int, default=0),
        Argument("cc_errors", int, default=0),
        Argument("history", dict, action="append", default=[]),  # the last one is now
    ],
    shared="monitor",
)


class Channel(NamedTuple):
    """A channel that is to be watched, and what is known of it now."""

    id: str
    item: dict[str, Any]
    report: dict[str, Any]
    state: str


def enabled_channels(request: Request) -> list[Channel]:
    """In the order of their numbers."""
    data, now = request.app.store.read(service.SHARED), request.app.clock()
    channels = []
    for id, item in data["channels"].items():
        report = data["states"].get(id, {})
        is_known = report.get("url") == item["url"]
        if not is_known or now - report["checked"] > SILENT_AFTER:
            report = report | {"state": "unknown", "reason": ""}
        if item["enabled"]:
            channels.append(Channel(id, item, report, report["state"]))
    return sorted(channels, key=lambda each: (each.item["number"] or 10**6, each.id))


# ---- For players ---------------------------------------------------------------------

PLAYLIST = RequestParser()
PLAYLIST.add_argument("multicast", type=bool, default=False, location="args")
PLAYLIST.add_argument("key", default="", location="args")


def read_playlist(request: Request, key: str) -> Response:
    given = PLAYLIST.parse_args(request)
    if key and not hmac.compare_digest(key.encode(), given["key"].encode()):
        raise http.Forbidden("The key in the URL is wrong")
    lines = ["#EXTM3U"]
    for _, item, _, _ in enabled_channels(request):
        logo = item["logo"].replace(",", "%2C")
        labels = {"tvg-id": item["tvg_id"], "tvg-chno": item["number"] or ""}
        labels |= {"tvg-logo": logo, "group-title": item["group"]}
        # Some players take the name from behind the first comma, others from behind the
        # last quotation mark: neither may be where another player does not expect it.
        texts = [f'{name}="{plain(text, ",")}"' for name, text in labels.items()]
        lines.append(f"#EXTINF:-1 {' '.join(texts)},{plain(item['name'])}")
        lines.append((given["multicast"] and item["multicast"]) or item["url"])
    return Response("\n".join(lines) + "\n", mimetype="audio/x-mpegurl")


def plain(text: Any, without: str = "") -> str:
    """In one line, with quotation marks that are no delimiters."""
    return " ".join(str(text).replace('"', "”").replace(without or "\n", " ").split())


# ---- For people ----------------------------------------------------------------------

PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="refresh" content="10"><title>{title}</title><style>
body {{ font: 16px/1.4 system-ui, sans-serif; max-width: 60rem; margin: 1rem auto;
  padding: 0 1rem; color: #1b1f24; background: #fff }}
h1 {{ font-size: 1.4rem }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ text-align: left; padding: .4rem .6rem; border-bottom: 1px solid #d5dae0 }}
.n {{ text-align: right; white-space: nowrap }}
b {{ display: inline-block; min-width: 5.5rem; padding: .1rem .4rem; text-align: center;
  border-radius: .3rem; color: #fff; background: #1a7f37 }}
.off-air b {{ background: #b3261e }} .degraded b {{ background: #8a5a00 }}
.unknown b {{ background: #59636e }}
@media (max-width: 40rem) {{ thead {{ display: none }}
  tr {{ display: flex; flex-wrap: wrap; gap: .1rem .6rem; padding: .5rem 0;
    border-bottom: 1px solid #d5dae0 }}
  td {{ border: 0; padding: 0; overflow-wrap: anywhere }}
  td:empty {{ display: none }} td:first-child {{ width: 100%; font-weight: 600 }}
  .why {{ order: 1; width: 100% }} }}
</style><h1>{title}</h1><p>As of {time} UTC.</p>
<table><thead><tr><th>Channel<th>State<th>Why<th class="n">For<th class="n">Rate
<th class="n">Stream</thead><tbody>
{rows}
</tbody></table></html>
"""
ROW = (
    '<tr class="{kind}"><td>{name}<td><b>{state}</b><td class="why">{reason}'
    '<td class="n">{age}<td class="n">{rate}<td class="n">{errors}'
)


def read_status(request: Request) -> Response:
    """Show how the channels are, trouble first, on a page that refreshes itself"""
    channels, now = enabled_channels(request), request.app.clock()
    channels.sort(key=lambda each: STATES.index(each.state))
    good = sum(each.state == "on air" for each in channels)
    rows = []
    for _, item, report, state in channels:
        rate, errors = report.get("kbps"), report.get("cc_errors")
        row = ROW.format(
            kind=state.replace(" ", "-"),
            name=escape(f"{item['number'] or ''} {item['name']}".strip()),
            state=state,
            reason=escape(report["reason"]),
            age=ago(now - report["since"]) if "since" in report else "",
            rate=f"{rate:,} kbit/s" if rate else "",
            errors=f"{errors:,} errors" if errors else "",
        )
        rows.append(row)
    page = PAGE.format(
        title=f"{good} of {len(channels)} channels on air",
        time=time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(now)),
        rows="\n".join(rows),
    )
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    headers = {"Content-Security-Policy": policy, "Cache-Control": "no-store"}
    return Response(page, mimetype="text/html", headers=headers)


def ago(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"


# ---- For Prometheus ------------------------------------------------------------------


class Measured(Collector):
    """What Prometheus asks for; a class, since its library wants one."""

    def __init__(self, channels: list[Channel]) -> None:
        self._channels = channels

    def collect(self) -> Iterator[Metric]:
        labels = ["id", "channel"]
        state = GaugeMetricFamily(
            "tv_state", "1 for the state of the channel", labels=[*labels, "state"]
        )
        kbps = GaugeMetricFamily("tv_kbps", "Rate of the last segment", labels=labels)
        errors = CounterMetricFamily("tv_cc_errors", "Continuity errors", labels=labels)
        for id, item, report, now in self._channels:
            for each in STATES:
                state.add_metric([id, item["name"], each], each == now)
            kbps.add_metric([id, item["name"]], report.get("kbps", 0))
            errors.add_metric([id, item["name"]], report.get("cc_errors", 0))
        yield from (state, kbps, errors)


def read_metrics(request: Request) -> Response:
    """Give the states in Prometheus's text format"""
    registry = CollectorRegistry()
    registry.register(Measured(enabled_channels(request)))
    return Response(generate_latest(registry), content_type=CONTENT_TYPE_LATEST)


# ---- The app -------------------------------------------------------------------------


def create_app(
    settings: service.Settings | None = None, key: str | None = None, **options: Any
) -> service.App:
    """The service with the station's data and views; nobody signs up by himself."""
    settings = replace(settings or service.Settings.from_environ(), signup="closed")
    key = os.environ.get("TV_KEY", "") if key is None else key

    def list_for_players(request: Request) -> Response:
        """List the channels for players; with multicast, by their groups"""
        return read_playlist(request, key)

    routes = [
        Route("GET /channels.m3u", list_for_players, takes=PLAYLIST, is_open=True),
        Route("GET /status", read_status, is_open=True),
        Route("GET /metrics", read_metrics, is_open=True),
    ]
    resources = [CHANNELS, REPORTS]
    return service.create_app(
        settings, resources=resources, routes=routes, title="TV station", **options
    )


if __name__ == "__main__":
    try:
        app = create_app()
    except ValueError as error:  # a bad setting
        sys.exit(str(error))
    service.main(app)
