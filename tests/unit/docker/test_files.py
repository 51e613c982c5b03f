"""What docker/ ships fits the programs: settings load, paths exist, the broker's lines agree."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ByteSize, TypeAdapter

from coordinator.settings import CoordinatorSettings
from edge_agent.emulation import parse_emulation
from edge_agent.settings import AgentSettings
from shared.protocol import topics
from shared.protocol.messages import DeviceId, RunId

DOCKER = Path(__file__).parents[3] / "docker"
FILES = ("compose.yaml", "compose.testbed.yaml")
COMPOSED: dict[str, dict[str, Any]] = {
    name: yaml.safe_load((DOCKER / name).read_text())["services"] for name in FILES
}
AGENTS = {
    f"{file}-{name}": one
    for file, services in COMPOSED.items()
    for name, one in services.items()
    if name.startswith("agent-")
}


def composed_run(file: str) -> CoordinatorSettings:
    """Return the settings that a compose file hands to its coordinator."""
    (mounted,) = (
        volume.split(":")[0]
        for volume in COMPOSED[file]["coordinator"]["volumes"]
        if volume.endswith(":/config/run.yaml:ro")
    )
    return CoordinatorSettings.load(file=DOCKER / mounted, environment={})


@pytest.mark.parametrize("file", FILES)
def test_the_composed_run_loads(file: str):
    settings = composed_run(file)
    health = COMPOSED[file]["coordinator"]["healthcheck"]["test"]
    assert str(settings.run_folder) == health[health.index("--run-folder") + 1]
    devices = {
        agent["environment"]["HSPLIT_DEVICE_ID"]
        for name, agent in AGENTS.items()
        if name.startswith(f"{file}-")
    }
    assert set(settings.plan.devices) <= devices
    assert settings.devices.expected == settings.devices.min == len(devices)


def test_the_composed_devices_have_stated_parts_and_those_of_the_test_bed_none():
    assert set(composed_run("compose.yaml").plan.devices) == {"nano", "orin"}
    plan = composed_run("compose.testbed.yaml").plan
    assert (dict(plan.devices), plan.split_layer) == ({}, None)


def test_the_test_bed_plays_unequal_devices_that_fit_their_containers():
    played = [one for name, one in AGENTS.items() if "testbed" in name]
    emulations = [parse_emulation(one["environment"]["HSPLIT_EMULATE"]) for one in played]
    assert len(set(emulations)) == len(played) >= 3
    for agent, emulation in zip(played, emulations, strict=True):
        limit_bytes = TypeAdapter(ByteSize).validate_python(agent["mem_limit"])
        assert emulation.memory_bytes is not None
        assert emulation.memory_bytes < limit_bytes
        assert agent["cpus"] >= emulation.speed


@pytest.mark.parametrize("service", AGENTS)
def test_the_composed_agents_load(service: str):
    agent = AGENTS[service]
    settings = AgentSettings.load(
        file=DOCKER / "config" / "agent.yaml", environment=agent["environment"]
    )
    targets = {
        volume.split(":")[-2 if volume.endswith(":ro") else -1] for volume in agent["volumes"]
    }
    assert {str(settings.data), str(settings.cache_folder), str(settings.state)} <= targets
    health = agent["healthcheck"]["test"]
    assert str(settings.state) == health[health.index("--state") + 1]


@pytest.mark.parametrize("name", ["run.yaml", "agent.yaml", "testbed.yaml"])
def test_what_is_commented_out_is_a_setting_too(name: str):
    """Every commented key is known: uncommenting it must not stop the start."""
    program = AgentSettings if name == "agent.yaml" else CoordinatorSettings
    as_shipped = (DOCKER / "config" / name).read_text()
    text, uncommented = re.subn(r"(?m)^( *)# (\w+:)", r"\1\2", as_shipped)
    assert uncommented > 5 or name == "testbed.yaml", "the lines are written in another way"
    text = text.replace("mqtt://", "mqtts://")  # certificates are for TLS only
    program.model_validate(yaml.safe_load(text))  # an unknown key is an error


def test_every_file_that_compose_mounts_or_builds_exists():
    for service in (one for services in COMPOSED.values() for one in services.values()):
        for volume in service.get("volumes", ()):
            if volume.startswith("./"):
                assert (DOCKER / volume.split(":")[0]).exists(), volume
        if "build" in service:
            assert (DOCKER / service["build"]["context"] / service["build"]["dockerfile"]).exists()


@pytest.mark.parametrize("name", ["agent", "coordinator"])
def test_every_file_that_an_image_copies_is_let_through_and_exists(name: str):
    dockerfile = (DOCKER / f"{name}.Dockerfile").read_text()
    allowed = (DOCKER / f"{name}.Dockerfile.dockerignore").read_text().splitlines()
    copied = {
        source for line in re.findall(r"(?m)^COPY (.*) \S+$", dockerfile) for source in line.split()
    }
    assert copied == {line[1:] for line in allowed if line.startswith("!")}
    for source in copied:
        assert (DOCKER.parent / source).exists(), source


def _images() -> dict[str, str]:
    """Return the part of the agent's Dockerfile that makes each of its targets."""
    text = (DOCKER / "agent.Dockerfile").read_text()
    parts = re.split(r"(?m)^FROM \S+ AS (\S+)$", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("target", _images())
def test_an_image_holds_the_backend_that_it_chooses(target: str):
    (environment,) = re.findall(r"(?m)^ENV (HSPLIT_.*)$", _images()[target])
    settings = AgentSettings.load(
        file=DOCKER / "config" / "agent.yaml",
        environment={
            "HSPLIT_DEVICE_ID": "nano",
            **dict(one.split("=", maxsplit=1) for one in environment.split()),
        },
    )
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", _images()[target])
    assert settings.backend == extras.split(",")[0]


def test_every_composed_agent_is_of_a_target_that_exists():
    for agent in AGENTS.values():
        assert agent["build"]["target"] in _images()


def test_no_light_image_installs_torch():
    light = {name: text for name, text in _images().items() if "[onnx" in text}
    assert set(light) == {"onnx", "jetson"}
    for text in light.values():
        commands = [line for line in text.splitlines() if not line.startswith(("#", "FROM"))]
        assert "torch" not in "\n".join(commands)


def _acl() -> dict[str, list[str]]:
    text = (DOCKER / "mosquitto" / "acl").read_text()
    access: dict[str, list[str]] = {"read": [], "write": []}
    for kind, pattern in re.findall(r"(?m)^pattern (\w+) (\S+)$", text):
        for one in ("read", "write") if kind == "readwrite" else (kind,):
            access[one].append(pattern.replace("%u", "nano"))
    return access


def test_the_access_list_lets_a_device_read_what_it_subscribes_to_and_no_more():
    nano = DeviceId("nano")
    filters = (*topics.agent_filters(nano), *topics.echo_filters(nano))
    assert sorted(_acl()["read"]) == sorted(one.pattern for one in filters)


def test_the_access_list_lets_a_device_write_what_the_coordinator_or_itself_hears_and_no_more():
    filters = topics.coordinator_filters(RunId("RUN"))
    expected = [
        one.pattern.replace("/devices/+", "/devices/nano").replace("RUN", "+")
        for one in filters
        if "/devices/" in one.pattern
    ]
    echo = [one.pattern for one in topics.echo_filters(DeviceId("nano"))]
    assert sorted(_acl()["write"]) == sorted([*expected, *echo])


def test_nobody_but_the_coordinator_has_more_than_patterns():
    text = (DOCKER / "mosquitto" / "acl").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith(("#", "pattern "))]
    assert lines == ["user coordinator", f"topic readwrite {topics.ROOT}/#"]


def test_both_brokers_differ_only_in_who_may_connect():
    open_, guarded = (
        (DOCKER / "mosquitto" / name).read_text().split("# --- speed")
        for name in ("mosquitto.conf", "mosquitto-tls.conf")
    )
    assert open_[1] == guarded[1]


@pytest.mark.parametrize("file", FILES)
def test_no_variable_of_compose_is_taken_for_a_setting(file: str):
    """`HSPLIT_…` in somebody's shell would stop both programs."""
    variables = re.findall(r"\$\{(\w+)", (DOCKER / file).read_text())
    assert set(variables) - {"BROKER_BIND"} == {"MODEL_FOLDER", "DATA_FOLDER"}
    makefile = (DOCKER.parent / "Makefile").read_text()
    assert "MODEL_FOLDER=/model DATA_FOLDER=/data" in makefile


@pytest.mark.parametrize("file", FILES)
def test_an_interrupted_coordinator_goes_on_when_it_is_started_again(file: str):
    command = COMPOSED[file]["coordinator"]["command"]
    assert command[-1] == "--resume"
    assert str(command).replace("'", '"') in (DOCKER / "coordinator.Dockerfile").read_text()
