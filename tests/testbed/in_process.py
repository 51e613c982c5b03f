"""A program's ``main`` inside this process: no seconds of imports for each wrong flag."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import coordinator.cli
import edge_agent.cli
from shared import logs


@dataclass(frozen=True)
class Ended:
    """How a program ended: exit code, stdout, and stderr with its log."""

    code: int
    output: str
    words: str


def coordinator_main(*arguments: str) -> Ended:
    """Run ``hsplit-coordinator`` here."""
    return _run(coordinator.cli.main, arguments)


def agent_main(*arguments: str) -> Ended:
    """Run ``hsplit-agent`` here."""
    return _run(edge_agent.cli.main, arguments)


def _run(main: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> Ended:
    output, words = io.StringIO(), io.StringIO()
    with (
        _logging_left_as_it_was(),
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(words),
    ):
        try:
            code = main(arguments)
        except SystemExit as exit_:  # argparse ends a program so
            code = int(exit_.code or 0)
    return Ended(code, output.getvalue(), words.getvalue())


@contextlib.contextmanager
def _logging_left_as_it_was() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    root.handlers.clear()
    try:
        yield
    finally:
        logs.bind(run_id=None, device_id=None, round=None)
        logging.captureWarnings(False)
        root.handlers[:] = handlers
        root.setLevel(level)
