from pathlib import Path

import pytest

from edge_agent.settings import AgentSettings, ProfileSettings
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


def test_what_computes_need_not_be_said():
    assert load().backend == "auto"
    assert [load(backend=name).backend for name in ("auto", "torch", "onnx")] == [
        "auto",
        "torch",
        "onnx",
    ]


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:1", "tensorrt", "tensorrt:1"])
def test_where_to_compute_can_be_said(device):
    assert load(device=device).device == device


@pytest.mark.parametrize(
    ("device", "gpu"),
    [("auto", 0), ("cpu", None), ("cuda:1", 1), ("tensorrt", 0), ("tensorrt:2", 2)],
)
def test_the_gpu_that_sensors_look_at_is_the_one_to_compute_on(device, gpu):
    assert load(device=device).gpu == gpu


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
        {"device": "tensorrt:"},
        {"device": "cpu:1"},
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


@pytest.mark.parametrize(
    ("device", "gpu"), [("auto", 0), ("cuda", 0), ("cuda:3", 3), ("cpu", None)]
)
def test_the_gpu_to_watch_is_the_one_to_compute_on(device, gpu):
    assert load(device=device).gpu == gpu


def test_a_state_folder_can_be_named():
    assert load(state_folder="/var/lib/hsplit").state == Path("/var/lib/hsplit")


def test_a_settings_file_serves_as_well(tmp_path):
    file = tmp_path / "agent.yaml"
    file.write_text("broker: {url: 'mqtts://server'}\ndevice_id: nano\ndata: my.jsonl\nthreads: 2")
    settings = AgentSettings.load(file=file, environment={})
    assert (settings.broker.tls, settings.threads) == (True, 2)


# --- for measuring alone --------------------------------------------------------------------------


def profile(environment=None, **changes):
    flags = [Flag(f"--{key.replace('_', '-')}", key, value) for key, value in changes.items()]
    return ProfileSettings.load(flags=flags, environment=environment or {})


def test_a_profile_must_be_told_nothing():
    settings = profile()
    assert (settings.broker, settings.model, settings.data) == (None, None, None)
    assert (settings.micro_batch, settings.length, settings.labels) == (4, 128, "device")


@pytest.mark.parametrize(
    ("host", "device_id"),
    [
        ("nano", "nano"),
        ("nano.local", "nano.local"),
        ("my device_1", "my-device_1"),
        ("-._x", "x"),
        ("größe", "gr--e"),
        ("...", "device"),
        ("", "device"),
        ("n" * 100, "n" * 64),
    ],
)
def test_a_device_is_called_as_its_host_where_nobody_says_otherwise(monkeypatch, host, device_id):
    monkeypatch.setattr("socket.gethostname", lambda: host)
    assert profile().device_id == device_id
    assert profile(device_id="orin").device_id == "orin"


def test_an_agents_own_file_and_variables_serve_for_measuring(tmp_path):
    file = tmp_path / "agent.yaml"
    file.write_text(
        "broker: {url: 'mqtts://server'}\ndevice_id: nano\ndata: my.jsonl\nthreads: 2\n"
        "evaluation_fraction: 0.2\nshare_labels: true\nemulate: speed=0.5\n"
    )
    environment = {"HSPLIT_BROKER__USERNAME": "nano", "HSPLIT_MEMORY_LIMIT": "2GiB"}
    settings = ProfileSettings.load(file=file, environment=environment)
    assert settings.broker is not None
    assert (settings.broker.username, settings.device_id) == ("nano", "nano")
    assert (settings.threads, settings.least_memory) == (2, 2 * 1024**3)


def test_every_setting_of_an_agent_is_known_where_it_only_measures():
    assert set(AgentSettings.model_fields) <= set(ProfileSettings.model_fields)


@pytest.mark.parametrize(
    "changes",
    [
        {"length": 0},
        {"length": -5},
        {"length": "long"},
        {"micro_batch": 0},
        {"micro_batch": 5000},
        {"labels": "nobody"},
        {"threads": 0},
        {"device_id": "a/b"},
        {"device": "gpu"},
    ],
)
def test_a_wrong_value_for_measuring_is_refused_and_blamed_on_its_flag(changes):
    flag = next(iter(changes)).replace("_", "-")
    with pytest.raises(ConfigError, match=f"--{flag}"):
        profile(**changes)
