"""Logging, set up once per program: one line of text, or one JSON object, per record on stderr.

Records carry ``run_id``, ``device_id`` and ``round`` where they are known: `bind` sets what
holds for the whole program from then on, on every thread; `context` what holds inside a block.
Files, rotation and shipping belong to journald or docker.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import Literal, TextIO, TypeAlias

from pythonjsonlogger.json import JsonFormatter

LogFormat: TypeAlias = Literal["text", "json"]


_FIELDS = ("run_id", "device_id", "round")
_QUIET = ("amqtt", "asyncio", "filelock", "httpx", "transitions", "urllib3")
"""Libraries whose INFO lines tell an operator nothing."""

_bound: dict[str, object] = {}
_context: ContextVar[Mapping[str, object]] = ContextVar("log_context", default={})  # noqa: B039


def set_up(level: str, log_format: LogFormat = "text", *, stream: TextIO | None = None) -> None:
    """Send records of ``level`` (``info``, say) and above to ``stream``, stderr by default.

    Replaces what was set up before. Warnings of the `warnings` module become records.
    """
    handler = logging.StreamHandler(stream if stream is not None else sys.stderr)
    handler.setFormatter(_TextFormatter() if log_format == "text" else _json_formatter())
    handler.addFilter(_add_context)
    logging.basicConfig(level=level.upper(), handlers=[handler], force=True)
    logging.captureWarnings(True)
    for name in _QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLogger().level))


def bind(**fields: object) -> None:
    """Put ``fields`` on every record of this program from now on; None takes one away."""
    _bound.update(fields)
    for name in [name for name, value in _bound.items() if value is None]:
        del _bound[name]


@contextlib.contextmanager
def context(**fields: object) -> Iterator[None]:
    """Put ``fields`` on every record that this thread logs inside the block."""
    token = _context.set({**_context.get(), **fields})
    try:
        yield
    finally:
        _context.reset(token)


def _add_context(record: logging.LogRecord) -> bool:
    for name, value in {**_bound, **_context.get()}.items():
        # What a call gave as `extra` says it better than what surrounds it.
        if not hasattr(record, name):
            setattr(record, name, value)
    return True


class _TextFormatter(logging.Formatter):
    """``2026-01-31T23:59:59.123Z INFO    coordinator.rounds: message [round=3]``."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s")

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        """Return the record's time in UTC, ISO 8601."""
        date = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
        return f"{date}.{int(record.msecs):03d}Z"

    def formatMessage(self, record: logging.LogRecord) -> str:
        """Return the line; what came from elsewhere cannot break it into two."""
        line = super().formatMessage(record)
        known = [f"{name}={getattr(record, name)}" for name in _FIELDS if hasattr(record, name)]
        line = f"{line} [{' '.join(known)}]" if known else line
        return line.replace("\r", "\\r").replace("\n", "\\n")


def _json_formatter() -> logging.Formatter:
    return JsonFormatter(
        "%(levelname)s %(name)s %(message)s",
        rename_fields={"levelname": "level", "name": "logger"},
        timestamp="time",
    )
