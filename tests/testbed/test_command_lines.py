"""What people have in their scripts: flags and exit codes do not change by accident."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

import coordinator.cli
import edge_agent.cli
from shared import errors, program
from shared.clock import SystemClock
from shared.health import FILE_NAME, HealthFile
from tests.testbed.in_process import agent_main, coordinator_main

ROOT = Path(__file__).resolve().parents[2]

AGENT = {
    "run": {
        *("--config", "--broker", "--username", "--password-file", "--ca-file", "--device-id"),
        *("--cert-file", "--key-file"),
        *("--data", "--evaluation-data", "--evaluation-fraction", "--share-labels"),
        *("--cache-folder", "--cache-limit", "--state-folder", "--memory-limit", "--device"),
        "--backend",
        *("--threads", "--emulate", "--log-level", "--log-format"),
    },
    "profile": {
        *("--config", "--broker", "--username", "--password-file", "--ca-file", "--device-id"),
        *("--cert-file", "--key-file"),
        *("--cache-folder", "--state-folder", "--memory-limit", "--device", "--threads"),
        "--backend",
        *(
            "--emulate",
            "--log-level",
            "--log-format",
            "--model",
            "--graphs",
            "--labels",
            "--dtype",
            "--micro-batch",
        ),
        *("--length", "--fresh", "--json", "--output"),
    },
    "health": {"--state", "--device-id", "--max-age-s"},
}
COORDINATOR = {
    "run": {
        *("file", "--resume", "--run-id", "--model", "--strategy", "--broker"),
        *("--log-level", "--log-format"),
    },
    "plan": {
        *("file", "profiles", "--server-profile", "--measure-server", "--json"),
        *("--log-level", "--log-format"),
    },
    "demo": {"--folder", "--labels", "--rounds", "--strategy", "--log-level", "--log-format"},
    "graphs": {"model", "--out", "--labels", "--target-modules", "--log-level", "--log-format"},
    "export": {"run_folder", "--to", "--merged"},
    "evaluate": {
        *("folder", "--data", "--model", "--metrics", "--limit", "--max-length", "--beams"),
        *("--length-penalty", "--no-repeat-ngram", "--max-answer", "--batch", "--device"),
        *("--dtype", "--threads", "--output", "--json", "--log-level", "--log-format"),
    },
    "report": {"run_folder", "--to"},
    "enroll": {"device", "--coordinator", "--folder", "--broker-host", "--days", "--renew"},
    "shard": {
        *("data", "--to", "--devices", "--by", "--column", "--alpha", "--sizes", "--seed"),
        "--min-records",
    },
    "status": {"run_folder", "--json"},
    "health": {"--run-folder", "--max-age-s"},
}


def commands(parser: argparse.ArgumentParser) -> dict[str, set[str]]:
    """Return each command's flags and arguments."""
    (commands_,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return {
        name: {word for action in own._actions for word in action.option_strings or [action.dest]}
        - {"-h", "--help"}
        for name, own in commands_.choices.items()
    }


@pytest.mark.parametrize(
    ("module", "expected"), [(edge_agent.cli, AGENT), (coordinator.cli, COORDINATOR)]
)
def test_the_flags_are_these(module, expected):
    assert commands(module._parser()) == expected


def test_no_flag_takes_a_password():
    """Other users of the machine can read flags."""
    every = {flag for own in (AGENT, COORDINATOR) for flags in own.values() for flag in flags}
    assert not [flag for flag in every if re.search("password|secret|token|key", flag)
                and not flag.endswith("-file")]  # fmt: skip


@pytest.mark.parametrize("main", [agent_main, coordinator_main])
def test_help_and_version_need_nothing_else(main):
    assert main("--version").output.startswith("hsplit ")
    assert "run" in main("--help").output
    assert main("run", "--help").code == 0
    assert main().code == 2


def test_health_finds_an_agent_by_its_device_id_as_well_as_by_its_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    state = tmp_path / "hsplit" / "nano"
    HealthFile(state / FILE_NAME, SystemClock()).progress("training")
    by_id, by_folder = (
        agent_main("health", "--device-id", "nano"),
        agent_main("health", "--state", str(state)),
    )
    assert (by_id.code, by_id.output) == (0, "training: well\n")
    assert by_folder == by_id
    assert agent_main("health", "--device-id", "orin").code == errors.UnhealthyError.exit_code
    assert agent_main("health").code == 2
    assert agent_main("health", "--device-id", "nano", "--state", str(state)).code == 2


def test_consent_is_a_flag_without_a_value(tmp_path):
    """It fails later, at the data: that is after the settings were read."""
    flags = ("--broker", "mqtt://x", "--device-id", "nano", "--data", str(tmp_path / "none.jsonl"))
    assert agent_main("run", *flags, "--share-labels").code == errors.DataError.exit_code


def tree(error: type[errors.HsplitError]) -> list[type[errors.HsplitError]]:
    """Return an error and all below it that programs may end with."""
    own = [below for below in error.__subclasses__() if below.__module__ == errors.__name__]
    return [error, *(one for below in own for one in tree(below))]


@pytest.fixture(scope="module")
def documented() -> dict[str, str]:
    """Error → code, as the README's table has it; without an error, the code itself."""
    rows = re.findall(r"(?m)^\| ([\d, ]+) \| ([\w, ]*) ?\|", (ROOT / "README.md").read_text())
    return {word: code for code, words in rows for word in re.findall(r"\w+", words or code)}


@pytest.mark.parametrize("error", tree(errors.HsplitError), ids=lambda error: error.__name__)
def test_the_readme_has_every_exit_code(documented, error):
    assert documented.get(error.__name__) == str(error.exit_code)


@pytest.mark.parametrize("code", [0, program.INTERRUPTED, program.TERMINATED])
def test_the_readme_has_the_exit_codes_that_are_no_error(documented, code):
    assert str(code) in documented


def test_the_readme_has_no_other_exit_codes(documented):
    codes = {int(word) for word in documented if word.isdecimal()}
    known = {error.__name__ for error in tree(errors.HsplitError)}
    assert codes == {0, program.INTERRUPTED, program.TERMINATED}
    assert {word for word in documented if not word.isdecimal()} == known
