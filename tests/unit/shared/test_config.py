from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from shared.config import BrokerSettings, Flag, HsplitSettings, MemoryLimit, Section, base_folder
from shared.errors import ConfigError
from shared.terms import LoraTerms


class Plan(Section):
    batch: int = 8
    memory: MemoryLimit | None = None


class Settings(HsplitSettings):
    name: str
    broker: BrokerSettings | None = None
    plan: Plan = Plan()
    lora: LoraTerms = LoraTerms()
    ratio: float = 0.5


def load(tmp_path, text="name: file", *, environment=None, flags=()):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    return Settings.load(file=file, environment=environment or {}, flags=flags)


def complaint(tmp_path, text, **sources):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, **sources)
    return str(caught.value)


def test_a_flag_wins_over_the_environment_and_that_over_the_file(tmp_path):
    text = "name: file\nplan: {batch: 1}\nlora: {r: 1, lora_alpha: 1}\nratio: 0.1"
    environment = {"HSPLIT_PLAN__BATCH": "2", "HSPLIT_LORA__R": "2", "HSPLIT_NAME": "environment"}
    settings = load(tmp_path, text, environment=environment, flags=[Flag("--rank", "lora.r", 3)])
    assert settings.ratio == 0.1
    assert (settings.name, settings.plan.batch) == ("environment", 2)
    assert (settings.lora.r, settings.lora.lora_alpha) == (3, 1.0)


def test_flags_that_were_not_given_and_empty_variables_change_nothing(tmp_path):
    settings = load(tmp_path, environment={"HSPLIT_NAME": ""}, flags=[Flag("--name", "name", None)])
    assert settings.name == "file"


def test_a_section_can_be_given_as_json_in_the_environment(tmp_path):
    environment = {"HSPLIT_LORA": '{"target_modules": ["c_attn"]}'}
    assert load(tmp_path, environment=environment).lora.target_modules == ("c_attn",)


def test_damaged_json_in_the_environment_is_named(tmp_path):
    assert "lora" in complaint(tmp_path, "name: x", environment={"HSPLIT_LORA": "{"})


def test_a_number_with_an_exponent_is_a_number_although_yaml_reads_text(tmp_path):
    assert load(tmp_path, "name: x\nratio: 1e-6").ratio == 1e-6


def test_the_process_environment_is_read_by_default(monkeypatch):
    monkeypatch.setenv("HSPLIT_NAME", "mine")
    assert Settings.load().name == "mine"


def test_made_directly_settings_ignore_the_environment(monkeypatch):
    monkeypatch.setenv("HSPLIT_RATIO", "0.9")
    assert Settings(name="x").ratio == 0.5


def test_settings_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        Settings(name="x").name = "y"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: x\nplan:\n  bach: 4", ["plan.bach", "run.yaml, line 3", "did you mean plan.batch"]),
        ("name: x\nbatch: 4", ["batch", "line 2", "did you mean plan.batch"]),
        ("name: x\nlora: {rr: 4}", ["lora.rr", "line 2", "did you mean lora.r?"]),
        ("name: x\nplan: {zzz: 4}", ["known in plan: batch, memory"]),
        ("name: x\nlora: {r: -1}", ["lora.r", "line 2", "greater than or equal to 0"]),
        ("name: x\nplan: {memory: 2}", ["plan.memory", "unit forgotten", "2GiB"]),
        ("name: x\nlog_level: loud", ["log_level", "'debug', 'info', 'warning' or 'error'"]),
        ("ratio: 1", ["name is not set", "HSPLIT_NAME"]),
        ("name: x\nbroker: {keepalive_s: 5}", ["broker.url is not set", "HSPLIT_BROKER__URL"]),
    ],
)
def test_a_wrong_key_in_the_file_is_named_with_its_line_and_what_is_allowed(tmp_path, text, words):
    said = complaint(tmp_path, text)
    assert [word for word in words if word not in said] == []


def test_all_faults_are_told_at_once(tmp_path):
    assert len(complaint(tmp_path, "plan: {bach: 4}\nratio: much").splitlines()) == 3


def test_a_wrong_value_is_blamed_on_the_source_that_set_it(tmp_path):
    text = "name: x\nplan: {batch: 4}"
    environment = {"HSPLIT_PLAN__BATCH": "four"}
    assert "(HSPLIT_PLAN__BATCH)" in complaint(tmp_path, text, environment=environment)
    flags = [Flag("--batch", "plan.batch", "five")]
    assert "(--batch)" in complaint(tmp_path, text, environment=environment, flags=flags)


@pytest.mark.parametrize(
    ("variable", "suggestion"),
    [
        ("HSPLIT_PLAN__BACH", "plan.batch"),
        ("HSPLIT_LORAA__R", "lora.r"),
        ("hsplit_nam", "name"),
        ("HSPLIT_NAME__X", "single value"),
    ],
)
def test_an_unknown_variable_stops_the_start(tmp_path, variable, suggestion):
    said = complaint(tmp_path, "name: x", environment={variable: "4"})
    assert variable in said
    assert suggestion in said


@pytest.mark.parametrize("what", ["BROKER", "INDEX"])
def test_the_variables_that_speak_to_the_tests_are_no_settings(tmp_path, what):
    assert load(tmp_path, environment={f"HSPLIT_REQUIRE_{what}": "1", "PATH": "/bin"})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name: [", "not YAML"),
        ("- name", "key: value"),
        ("name: x\nname: y", "line 2: name is set twice"),
        ("name: x\nplan: {batch: 1, batch: 2}", "plan.batch is set twice"),
        ("name: x\nno: 1", "line 2: YAML reads this key as no text"),
    ],
)
def test_a_file_that_is_no_settings_file_is_refused_with_the_reason(tmp_path, text, words):
    assert words in complaint(tmp_path, text)


def test_an_empty_file_sets_nothing(tmp_path):
    assert load(tmp_path, "# nothing\n", environment={"HSPLIT_NAME": "x"}).name == "x"


def test_a_file_that_does_not_exist_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"missing\.yaml cannot be read"):
        Settings.load(file=tmp_path / "missing.yaml", environment={})


def test_resolved_settings_can_be_written_and_loaded_again(tmp_path):
    text = "name: x\nplan: {memory: 2GiB}\nbroker: {url: 'mqtt://h', protocol: 5}\nratio: 1e-6"
    settings = load(tmp_path, text)
    assert load(tmp_path, yaml.safe_dump(settings.resolved())) == settings


def test_passwords_appear_in_no_error_no_repr_and_no_resolved_settings(tmp_path):
    broker = "broker: {url: 'mqtt://h', username: u, password: s3cret}"
    settings = load(tmp_path, f"name: x\n{broker}")
    assert settings.broker.secret() == "s3cret"
    assert "s3cret" not in repr(settings) + yaml.safe_dump(settings.resolved())
    damaged = broker.replace("s3cret", "[s3cret]")
    assert "s3cret" not in complaint(tmp_path, f"name: x\n{damaged}")


@pytest.mark.parametrize(
    ("url", "host", "port", "tls"),
    [
        ("mqtt://broker", "broker", 1883, False),
        ("mqtts://broker", "broker", 8883, True),
        ("mqtt://10.0.0.7:2000", "10.0.0.7", 2000, False),
        ("mqtts://[::1]:2000", "::1", 2000, True),
    ],
)
def test_a_broker_url_is_taken_apart(url, host, port, tls):
    broker = BrokerSettings(url=url)
    assert (broker.host, broker.port, broker.tls) == (host, port, tls)


@pytest.mark.parametrize(
    "url",
    [
        "broker:1883",
        "http://broker",
        "mqtt://",
        "mqtt://broker:0",
        "mqtt://broker:99999",
        "mqtt://broker:port",
        "mqtt://user:word@broker",
        "mqtt://broker/path",
        "mqtt://[::1",
    ],
)
def test_a_broker_url_that_means_nothing_is_refused(url):
    with pytest.raises(ValidationError) as caught:
        BrokerSettings(url=url)
    assert "word@" not in str(caught.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"username": "u", "password": "p", "password_file": "f"},
        {"password": "p"},
        {"ca_file": "ca.pem"},
        {"url": "mqtts://h", "key_file": "k.pem"},
        {"keepalive_s": 0},
        {"protocol": "4"},
    ],
)
def test_broker_settings_that_contradict_each_other_are_refused(fields):
    with pytest.raises(ValidationError):
        BrokerSettings(**{"url": "mqtt://h", **fields})


def test_a_password_file_is_read_without_its_last_newline(tmp_path):
    file = tmp_path / "password"
    file.write_text("with space \n")
    broker = BrokerSettings(url="mqtt://h", username="u", password_file=file)
    assert broker.secret() == "with space "


@pytest.mark.parametrize("content", [None, b"", b"\n", b"\xff"])
def test_a_password_file_that_gives_no_password_is_named(tmp_path, content):
    file = tmp_path / "password"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match="password_file"):
        BrokerSettings(url="mqtt://h", username="u", password_file=file).secret()


def test_without_a_password_there_is_no_secret():
    assert BrokerSettings(url="mqtt://h").secret() is None


def test_the_xdg_folders_are_followed_unless_relative(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
    assert base_folder("XDG_CACHE_HOME", "~/.cache") == Path("/cache")
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    assert base_folder("XDG_CACHE_HOME", "~/.cache") == Path.home() / ".cache"
