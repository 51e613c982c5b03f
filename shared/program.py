"""What both programs do around their work: exit codes, and a way to stop."""

from __future__ import annotations

import logging
import signal
from collections.abc import Callable
from types import FrameType

from shared.errors import HsplitError

logger = logging.getLogger("hsplit")

INTERRUPTED = 130
TERMINATED = 143


class _TerminatedError(BaseException):
    """SIGTERM came. No `Exception`, as `KeyboardInterrupt` is none: nothing should catch it."""


def exit_code(work: Callable[[], int]) -> int:
    """Carry out ``work``; return its result, or the exit code of what stopped it.

    An error of ours is one log line. Ctrl-C and SIGTERM unwind the stack, so that every
    ``finally`` says its goodbye; a second one does not wait for that.
    """
    before = signal.signal(signal.SIGTERM, _terminate)
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
        signal.signal(signal.SIGTERM, before)


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    raise _TerminatedError


def _logged(text: str, *, level: int = logging.ERROR) -> None:
    if not logging.getLogger().handlers:
        logging.basicConfig(format="hsplit: %(message)s")
    logger.log(level, "%s", text)
