from pathlib import Path

import pytest

from edge_agent.settings import AgentSettings
from shared.config import Flag
from shared.errors import ConfigError

FLAGS = {
    "--broker": ("broker.url", "mqtt://server"),
    "--device-id": ("device_id", "nano"),
    "--data": ("data", "~/my.jsonl"),
}


def load(environment=None, **changes):
    flags = [Flag(name, key, value) for name, (key, value) in FLAGS.items()]
    changed = [Flag(f"--{key}", key, value) for key, value in changes.items()]
    return AgentSettings.load(flags=[*flags, *changed], environment=environment or {})


def test_broker_id_and_data_are_all_that_an_agent_must_be_told():
    settings = load()
    assert (settings.broker.host, settings.device_id) == ("server", "nano")
    assert settings.data == Path.home() / "my.jsonl"
    assert settings.evaluation_fraction == 0.1


@pytest.mark.parametrize("missing", sorted(FLAGS))
def test_each_of_them_is_asked_for_by_name(missing):
    given = [Flag(name, key, value) for name, (key, value) in FLAGS.items() if name != missing]
    with pytest.raises(ConfigError, match=f"{FLAGS[missing][0].split('.')[0]} is not set"):
        AgentSettings.load(flags=given, environment={})


def test_a_memory_limit_is_read_with_its_unit():
    assert load(memory_limit="2GiB").memory_limit == 2 * 1024**3
    assert load({"HSPLIT_MEMORY_LIMIT": "800MB"}).memory_limit == 800_000_000


def test_labels_are_shared_only_where_somebody_says_so():
    assert load().share_labels is False
    assert load(share_labels="true").share_labels is True


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1"])
def test_where_to_compute_can_be_said(device):
    assert load(device=device).device == device


@pytest.mark.parametrize(
    "changes",
    [
        {"device_id": "a/b"},
        {"device_id": ""},
        {"device_id": "x" * 65},
        {"evaluation_fraction": 0},
        {"evaluation_fraction": 1},
        {"memory_limit": "2"},
        {"memory_limit": "much"},
        {"threads": 0},
        {"device": "gpu"},
        {"device": "cuda:x"},
        {"cache_limit": "20"},
        {"share_labels": "perhaps"},
        {"backend": "tensorflow"},
        {"learning_rate": 1},
    ],
)
def test_a_value_out_of_range_is_blamed_on_its_flag(changes):
    with pytest.raises(ConfigError, match=f"--{next(iter(changes))}"):
        load(**changes)


def test_agents_on_one_machine_share_the_cache_but_not_their_state(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    one, two = load(), load(device_id="orin")
    assert one.cache_folder == two.cache_folder == Path("/cache/hsplit")
    assert one.health_file == Path("/state/hsplit/nano/health.json")
    assert two.health_file == Path("/state/hsplit/orin/health.json")


def test_a_state_folder_can_be_named():
    assert load(state_folder="/var/lib/hsplit").state == Path("/var/lib/hsplit")


def test_a_settings_file_serves_as_well(tmp_path):
    file = tmp_path / "agent.yaml"
    file.write_text("broker: {url: 'mqtts://server'}\ndevice_id: nano\ndata: my.jsonl\nthreads: 2")
    settings = AgentSettings.load(file=file, environment={})
    assert (settings.broker.tls, settings.threads) == (True, 2)
