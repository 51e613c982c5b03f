"""What both programs do around their work: exit codes, and a way to stop."""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType

from shared.errors import HsplitError

logger = logging.getLogger("hsplit")

INTERRUPTED = 130
TERMINATED = 143


class _TerminatedError(BaseException):
    """SIGTERM came. No `Exception`, as `KeyboardInterrupt` is none: nothing should catch it."""


@dataclass(slots=True)
class _Stops:
    """How deep in `uninterrupted` blocks the main thread is, and what waits for their end."""

    depth: int = 0
    waiting: type[BaseException] | None = None

    def stop(self, error: type[BaseException]) -> None:
        if not self.depth:
            raise error
        self.waiting = error


_stops = _Stops()


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM raise at the end of the block, and not inside it. Main thread only.

    For short calls into libraries with threads of their own: an exception between a lock of
    theirs and what lets go of it would leave those threads waiting, and the program with them.
    """
    _stops.depth += 1
    try:
        yield
    finally:
        _stops.depth -= 1
        if not _stops.depth and _stops.waiting is not None:
            error, _stops.waiting = _stops.waiting, None
            raise error


def exit_code(work: Callable[[], int]) -> int:
    """Carry out ``work``; return its result, or the exit code of what stopped it.

    An error of ours is one log line. Ctrl-C and SIGTERM unwind the stack, so that every
    ``finally`` says its goodbye; a second one does not wait for that.
    """
    before = {signal.SIGTERM: signal.signal(signal.SIGTERM, _terminate)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else somebody ignores it
        before[signal.SIGINT] = signal.signal(signal.SIGINT, _interrupt)
    try:
        return work()
    except HsplitError as error:
        _logged(f"{error}")
        return error.exit_code
    except KeyboardInterrupt:
        _logged("stopped by Ctrl-C", level=logging.WARNING)
        return INTERRUPTED
    except _TerminatedError:
        _logged("stopped by SIGTERM", level=logging.WARNING)
        return TERMINATED
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    _stops.stop(_TerminatedError)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    _stops.stop(KeyboardInterrupt)


def _logged(text: str, *, level: int = logging.ERROR) -> None:
    if not logging.getLogger().handlers:
        logging.basicConfig(format="hsplit: %(message)s")
    logger.log(level, "%s", text)
