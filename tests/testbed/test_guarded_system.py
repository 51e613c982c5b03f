"""The real programs over a broker that asks for certificates, set up as `enroll` says."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

from tests.support.brokers import TLS_CONF, Mosquitto
from tests.testbed import small_run
from tests.testbed.in_process import coordinator_main
from tests.testbed.system import System

pytestmark = [pytest.mark.broker, pytest.mark.slow, pytest.mark.timeout(300)]


def enrolled(folder: Path, *arguments: str) -> str:
    """Return what ``hsplit-coordinator enroll`` prints."""
    ended = coordinator_main("enroll", *arguments, "--folder", str(folder))
    assert ended.code == 0, ended.words
    return ended.output


def test_a_run_over_mutual_tls_set_up_with_the_printed_lines(tmp_path: Path):
    credentials = tmp_path / "credentials"
    printed = enrolled(credentials, "--coordinator", "--broker-host", "localhost")
    section = yaml.safe_load(printed[printed.index("broker:\n") :])["broker"]
    text = small_run.write_text(tmp_path / "text")
    flags = {}
    for device in text:
        printed = enrolled(credentials, device)
        own = credentials / "devices" / device
        (command,) = re.findall(r"(?s)\nhsplit-agent run (.*)", printed)
        # A backslash ends a line for a shell, but not for shlex.
        words = shlex.split(command.replace("\\\n", " ").replace("hsplit-credentials", str(own)))
        # What the test's system says itself: the broker, the id, the data.
        flags[device] = words[words.index("--username") : words.index("--data")]
    certs = credentials / "broker" / "certs"
    with (
        Mosquitto(
            tmp_path,
            scheme="mqtts",
            conf=TLS_CONF,
            cafile=str(certs / "ca.crt"),
            certfile=str(certs / "server.crt"),
            keyfile=str(certs / "server.key"),
            password_file=str(credentials / "broker" / "passwords"),
            acl_file=str(TLS_CONF.with_name("acl")),
            require_certificate="true",
            use_identity_as_username="true",
        ) as broker,
        System(tmp_path / "system", broker.url) as system,
    ):
        settings = small_run.settings(
            broker={**section, "url": broker.url},
            rounds={"count": 1, "steps": 2},
            optimizer={"learning_rate": 5e-3},
        )
        coordinator = system.coordinator(settings)
        agents = [
            system.agent(device, one.data, *one.flags(), *flags[device])
            for device, one in text.items()
        ]
        # Agents first: one that ends at once is seen at once.
        codes = {one.name: one.wait(120.0) for one in (*agents, coordinator)}
        assert codes == {"coordinator": 0, "workstation": 0, "nano": 0}
        assert system.summary()["steps"] == 2
        secret = (credentials / "coordinator" / "password").read_text().strip()
        assert secret not in (system.run_folder / "run.yaml").read_text()
