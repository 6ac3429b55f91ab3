"""What the process says on stderr: lines for people, or one JSON object per line for machines.

No line holds a key, a header, a query, or anything of a body; what clients choose is a request's id, of harmless
characters, and a path as it came, with its percent signs.
"""

import logging
import time
from typing import Any

import orjson

access = logging.getLogger("patchsight_serve.access")
PROBES = frozenset({"/livez", "/readyz", "/metrics"})  # asked every few seconds: said at level debug only


class JsonLines(logging.Formatter):
    """A record as one line of JSON: time (UTC), level, process, logger, message, `fields`, exception."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        seconds = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        line: dict[str, Any] = {
            "time": f"{seconds}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "process": record.process,
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line, default=str).decode()


def set_up(level: str, form: str, requests: bool, several: bool = False) -> None:
    """Log from `level` on, as `text` or `json`, with a line for each request if `requests`, and with the process' id
    in each line if it is one of `several`."""
    handler = logging.StreamHandler()
    process = " [%(process)d]" if several else ""
    text = logging.Formatter(f"%(asctime)s %(levelname)s{process} %(name)s: %(message)s")
    handler.setFormatter(JsonLines() if form == "json" else text)
    logging.basicConfig(level=level.upper(), handlers=[handler])
    logging.getLogger("faiss").setLevel(logging.WARNING)  # tells which of its builds it tried, six lines long
    access.setLevel(logging.NOTSET if requests else logging.WARNING)


def log_request(
    method: str, route: str, status: int, seconds: float, images: int, request_id: str, error: str | None
) -> None:
    """One line about a request that was answered. Costs next to nothing where it is not wanted."""
    level = logging.DEBUG if route in PROBES else logging.INFO
    if not access.isEnabledFor(level):
        return
    ms = round(1000 * seconds, 1)
    fields: dict[str, Any] = {
        "method": method, "route": route, "status": status, "ms": ms, "images": images, "request_id": request_id,
    }  # fmt: skip
    if error:
        fields["error"] = error
    said = f"{status} {error}" if error else status
    access.log(
        level, "%s %s %s in %s ms, images: %d, request %s", method, route, said, ms, images, request_id,
        extra={"fields": fields},
    )  # fmt: skip
