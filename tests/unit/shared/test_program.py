"""How a program ends: with the code of its error, or after saying goodbye."""

from __future__ import annotations

import logging
import os
import re
import signal
import subprocess
import sys
import textwrap

import pytest

from shared import errors
from shared.errors import HsplitError, PlanError
from shared.program import INTERRUPTED, TERMINATED, exit_code, uninterrupted


def every_error() -> list[type[HsplitError]]:
    found = [HsplitError]
    for kind in found:
        found += kind.__subclasses__()
    return [kind for kind in found if kind.__module__ == errors.__name__]


def raising(error: BaseException):
    def work() -> int:
        raise error

    return work


def test_the_result_of_the_work_is_the_exit_code():
    assert exit_code(lambda: 3) == 3


@pytest.mark.parametrize("kind", every_error(), ids=lambda kind: kind.__name__)
def test_an_error_of_ours_is_one_log_line_and_its_own_code(kind, caplog):
    assert exit_code(raising(kind("not that"))) == kind.exit_code
    assert [(r.levelno, r.getMessage(), r.exc_info) for r in caplog.records] == [
        (logging.ERROR, "not that", None)
    ]


def test_the_tree_in_the_docstring_is_the_code():
    tree = re.findall(r"(\w+Error) +(\d+)", str(errors.__doc__))
    assert {name: int(code) for name, code in tree} == {
        kind.__name__: kind.exit_code for kind in every_error()
    }


def test_codes_are_told_apart_and_none_means_success():
    alike = {errors.CodecError, errors.MemoryFullError}
    codes = [kind.exit_code for kind in every_error() if kind not in alike]
    assert len(set(codes)) == len(codes), "only these share a code, with their parents"
    assert 0 not in codes


def test_a_mistake_of_ours_is_not_hidden():
    with pytest.raises(ZeroDivisionError):
        exit_code(raising(ZeroDivisionError()))


def test_ctrl_c_says_goodbye_and_ends_with_130(caplog):
    assert exit_code(raising(KeyboardInterrupt())) == INTERRUPTED == 130
    assert "Ctrl-C" in caplog.text


def test_sigterm_unwinds_so_that_every_finally_runs_and_ends_with_143(caplog):
    goodbyes = []

    def work() -> int:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        except Exception:  # noqa: BLE001
            goodbyes.append("caught as an ordinary error")
        finally:
            goodbyes.append("goodbye")
        return 0

    before = signal.getsignal(signal.SIGTERM)
    assert exit_code(work) == TERMINATED == 143
    assert goodbyes == ["goodbye"]
    assert "SIGTERM" in caplog.text
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_handler_is_put_back_after_an_error_too():
    before = signal.getsignal(signal.SIGTERM)
    exit_code(raising(PlanError("nothing fits")))
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_sigterm_does_not_wait_for_a_goodbye_that_hangs():
    program = """
        import os, signal
        from shared.program import exit_code

        def work():
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                signal.pause()
            finally:
                os.kill(os.getpid(), signal.SIGTERM)
                signal.pause()

        exit_code(work)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], timeout=30, check=False)
    assert done.returncode == -signal.SIGTERM


def test_an_error_before_logging_is_set_up_is_still_seen():
    program = """
        import sys
        from shared.errors import PlanError
        from shared.program import exit_code

        def work():
            raise PlanError("needs 5 MiB, has 3")

        sys.exit(exit_code(work))
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        timeout=30,
        check=False,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (5, "hsplit: needs 5 MiB, has 3\n")


@pytest.mark.parametrize(("how", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_inside_an_uninterrupted_block_stops_the_program_at_its_end(how, code):
    done = []

    def work() -> int:
        with uninterrupted():
            with uninterrupted():
                os.kill(os.getpid(), how)
                done.append("inside")
            done.append("still inside")
        done.append("after")
        return 0

    assert exit_code(work) == code
    assert done == ["inside", "still inside"]
    assert exit_code(lambda: 7) == 7, "nothing is left over"


def test_a_program_that_ignores_ctrl_c_goes_on_ignoring_it():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:

        def work() -> int:
            os.kill(os.getpid(), signal.SIGINT)
            return 3

        assert exit_code(work) == 3
    finally:
        signal.signal(signal.SIGINT, before)
