"""Kill, stop and crash the service's parts while eight clients write; an error if anything acknowledged is lost.

    python bench/faults.py sqlite 60       # kill -9 of workers, and of all of gunicorn, on a new SQLite file
    python bench/faults.py postgres 60     # the same over a PostgreSQL of one's own
    python bench/faults.py outage 60       # that PostgreSQL stopped, and crashed, and started
    python bench/faults.py postgresql://…  # kill -9 over another database, for 60 s; its tables must be empty

What is checked is what test_service.py checks for some seconds.
"""

import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from test_service import Postgres, store_killings, store_outages


def main(kind: str = "sqlite", seconds: str = "60") -> None:
    began = time.monotonic()
    if kind == "sqlite":
        with tempfile.TemporaryDirectory() as folder:
            happened = store_killings(f"sqlite:///{folder}/store.db", float(seconds))
    elif "://" in kind:
        happened = store_killings(kind, float(seconds))
    else:
        with closing(Postgres()) as postgres:
            happened = (store_outages if kind == "outage" else store_killings)(
                postgres if kind == "outage" else postgres.url, float(seconds)
            )
    told = ", ".join(f"{count:,} {what}" for what, count in happened.items())
    print(f"{kind.partition('://')[0]}: {told}; nothing acknowledged was lost, in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
