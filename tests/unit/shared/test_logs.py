import io
import json
import logging
import re
import threading
import warnings

import pytest

from shared import logs

logger = logging.getLogger("coordinator.rounds")


@pytest.fixture
def lines():
    """A function that sets logging up and returns what reads the lines so far."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    levels = {name: logging.getLogger(name).level for name in logs._QUIET}

    def set_up(level="info", log_format="text"):
        stream = io.StringIO()
        logs.set_up(level, log_format, stream=stream)
        return lambda: stream.getvalue().splitlines()

    yield set_up
    logs.bind(run_id=None, device_id=None, round=None)
    logging.captureWarnings(False)
    for handler in list(root.handlers):
        root.removeHandler(handler)
    for handler in handlers:
        root.addHandler(handler)
    root.setLevel(level)
    for name, old in levels.items():
        logging.getLogger(name).setLevel(old)


def test_a_text_record_is_one_line_with_time_level_logger_message_and_fields(lines):
    read = lines()
    logs.bind(run_id="r1")
    with logs.context(round=3):
        logger.info("loss %.2f", 1.5)
    time, rest = read()[0].split(" ", 1)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time)
    assert rest == "INFO    coordinator.rounds: loss 1.50 [run_id=r1 round=3]"


def test_text_from_elsewhere_cannot_forge_a_line(lines):
    read = lines()
    logger.info("refused: %s", "x\n2026-01-01T00:00:00.000Z INFO all is well")
    assert len(read()) == 1


def test_a_json_record_is_one_object_with_the_fields_beside_the_message(lines):
    read = lines(log_format="json")
    logs.bind(run_id="r1", device_id="nano")
    logger.warning("slow: %d s", 9, extra={"round": 4})
    record = json.loads(read()[0])
    assert record.pop("time")
    assert record == {
        "level": "WARNING",
        "logger": "coordinator.rounds",
        "message": "slow: 9 s",
        "run_id": "r1",
        "device_id": "nano",
        "round": 4,
    }


def test_a_json_record_carries_the_traceback_in_its_own_line(lines):
    read = lines(log_format="json")
    try:
        raise ValueError("odd")
    except ValueError:
        logger.exception("failed")
    assert "ValueError: odd" in json.loads(read()[0])["exc_info"]


def test_context_ends_with_its_block_and_inner_wins(lines):
    read = lines()
    with logs.context(round=1):
        with logs.context(round=2):
            logger.info("a")
        logger.info("b")
    logger.info("c")
    assert [line.split("rounds: ")[1] for line in read()] == ["a [round=2]", "b [round=1]", "c"]


def test_what_is_bound_holds_on_other_threads_too_and_can_be_taken_away(lines):
    read = lines()
    logs.bind(device_id="nano")
    thread = threading.Thread(target=logger.info, args=("from paho",))
    thread.start()
    thread.join()
    logs.bind(device_id=None)
    logger.info("after")
    assert [line.endswith("[device_id=nano]") for line in read()] == [True, False]


def test_the_level_holds_and_setting_up_twice_does_not_write_twice(lines):
    lines()
    read = lines("warning")
    logger.info("quiet")
    logger.warning("loud")
    assert len(read()) == 1


def test_chatty_libraries_are_heard_from_warning_on(lines):
    read = lines()
    logging.getLogger("amqtt.broker").info("chatter")
    logging.getLogger("amqtt.broker").warning("trouble")
    assert len(read()) == 1


def test_python_warnings_become_records(lines):
    read = lines()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.warn("old way", stacklevel=1)
    assert "py.warnings" in read()[0]
