import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from coordinator.settings import CoordinatorSettings
from shared.errors import ConfigError
from shared.protocol.messages import NAME_PATTERN, DeviceId
from shared.terms import LoraTerms, OptimizerTerms, TrainingChoices, TrainingTerms

NANO, ORIN = DeviceId("nano"), DeviceId("orin")


def load(tmp_path, text="", **environment):
    file = tmp_path / "run.yaml"
    file.write_text(text if "model:" in text else f"model: {{name: gpt2}}\n{text}")
    return CoordinatorSettings.load(file=file, environment=environment)


def complaint(tmp_path, text):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    return str(caught.value)


def test_a_model_is_all_that_a_run_must_be_told(tmp_path):
    settings = load(tmp_path)
    assert settings.broker is None
    assert settings.embedded_broker.host == "127.0.0.1"
    assert settings.lora == LoraTerms()
    assert settings.optimizer == OptimizerTerms()


def test_a_run_without_a_model_is_refused():
    with pytest.raises(ConfigError, match=r"model is not set.*name, revision"):
        CoordinatorSettings.load(environment={})


def test_total_steps_follow_from_the_rounds(tmp_path):
    settings = load(tmp_path, "rounds: {count: 3, steps: 7}\ntraining: {labels: server, seed: 4}")
    assert settings.training_terms == TrainingTerms(labels="server", seed=4, total_steps=21)
    assert "training.total_steps" in complaint(tmp_path, "training: {total_steps: 5}")


def test_training_choices_and_terms_differ_by_what_follows_from_others_alone():
    chosen = {field.name for field in fields(TrainingChoices)}
    assert {field.name for field in fields(TrainingTerms)} - chosen == {"total_steps"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("lora: {ranks: 4}", "lora.ranks"),
        ("optimizer: {lr: 1}", "optimizer.lr"),
        ("training: {label: device}", "did you mean training.labels?"),
        ("plan: {devices: {nano: {rank: 4}}}", "plan.devices.nano.rank"),
        ("plan: {devices: {no/slash: {r: 4}}}", "plan.devices.no/slash"),
        ("plan: {split_layer: 0}", "plan.split_layer"),
        ("plan: {batch: 4, micro_batch: 5}", "plan.micro_batch (5) exceeds its batch (4)"),
        (
            "plan: {batch: 4, devices: {nano: {micro_batch: 5}}}",
            "plan.devices.nano.micro_batch (5) exceeds its batch (4)",
        ),
        ("devices: {min: 3, expected: 2}", "expected (2) is below min (3)"),
        ("optimizer: {warmup_steps: 100}", "optimizer.warmup_steps (100)"),
        ("lora: {rank_pattern: {'h.(1': 4}}", "no regular expression"),
        ("plan: {devices: {nano: {rank_pattern: {'h.(1': 4}}}}", "no regular expression"),
        ("lora: {rank_pattern: {h.1: -4}}", "lora.rank_pattern.h.1"),
        ("aggregation: {hand_back: mean}", "'residual', 'merge', 'svd', 'zero-pad' or 'average'"),
        ("strategy: fedavg", "'hsplitlora', 'splitlora', 'hlora', 'fedlora', 'hetlora', 'flora'"),
        ("embedded_broker: {port: 70000}", "embedded_broker.port"),
        ("report_to: [wandb]", "report_to"),
        ("run: {id: 'a b'}", "run.id"),
        ("training: {task: regression}", "'causal-lm' or 'classification'"),
        ("training: {task: classification}", "takes two classes at least"),
        ("training: {task: classification, classes: [one]}", "takes two classes at least"),
        ("training: {task: classification, classes: [a, a]}", "each another one"),
        ("training: {task: classification, classes: [a, ' ']}", "each another one"),
        ("training: {classes: [a, b]}", "classes are for task: classification"),
        ("training: {int8_blocks: -1}", "training.int8_blocks"),
        ("training: {int8_blocks: 2, dtype: bfloat16}", "rounded a second time"),
        (
            "training: {int8_blocks: 2}\naggregation: {hand_back: merge}",
            "weights in 8 bits cannot be changed by so little",
        ),
    ],
)
def test_a_run_file_that_cannot_be_meant_is_refused_with_the_key(tmp_path, text, words):
    assert words in complaint(tmp_path, text)


def test_a_device_has_its_own_terms_and_the_rest_as_for_all(tmp_path):
    settings = load(
        tmp_path,
        """
lora: {r: 8, lora_alpha: 32, target_modules: [c_attn], rank_pattern: {c_attn: 6}}
plan:
  split_layer: 2
  batch: 8
  micro_batch: 6
  devices:
    nano: {split_layer: 1, r: 4, rank_pattern: {}, batch: 4, memory_limit: 2GiB}
""",
    )
    nano, orin = settings.device_terms(NANO), settings.device_terms(ORIN)
    assert (nano.split_layer, nano.batch, nano.in_flight) == (1, 4, 2)
    assert nano.micro_batch == 4  # what holds for all cannot exceed the smaller batch
    assert nano.memory_limit_bytes == 2 * 1024**3
    assert nano.lora == LoraTerms(r=4, lora_alpha=32.0, target_modules=("c_attn",))
    assert (orin.split_layer, orin.batch, orin.micro_batch) == (2, 8, 6)
    assert orin.lora == settings.lora


def test_rank_zero_for_one_device_is_not_mistaken_for_unset(tmp_path):
    settings = load(tmp_path, "plan: {devices: {nano: {r: 0}}}")
    assert settings.device_terms(NANO).lora.r == 0


def test_without_a_micro_batch_the_batch_is_cut_into_what_is_in_flight(tmp_path):
    assert load(tmp_path, "plan: {batch: 3}").device_terms(NANO).micro_batch == 2


@pytest.mark.parametrize("name", ["gpt2", "org/My model+1", "/models/tiny gpt2/", "x" * 200])
def test_a_run_gets_an_id_from_date_and_model(tmp_path, name):
    settings = load(tmp_path, f"model: {{name: '{name}'}}").with_run_id(1_769_903_999.0)
    assert re.fullmatch(NAME_PATTERN, settings.run_id)
    assert settings.run_id.startswith("20260131-235959-")
    assert settings.run_folder == Path("runs") / settings.run_id


def test_a_given_id_stays(tmp_path):
    settings = load(tmp_path, "run: {id: mine, folder: /data}").with_run_id(0.0)
    assert settings.run_folder == Path("/data/mine")


def test_a_run_without_an_id_has_no_folder_yet(tmp_path):
    with pytest.raises(ConfigError, match=r"run\.id"):
        _ = load(tmp_path).run_folder


def test_resolved_settings_describe_the_same_run(tmp_path):
    settings = load(
        tmp_path,
        "broker: {url: 'mqtt://h'}\nlora: {rank_pattern: {'h.[01].*': 4}}\n"
        "plan: {batch: 4, devices: {nano: {memory_limit: 1GiB}}}",
    ).with_run_id(0.0)
    assert load(tmp_path, yaml.safe_dump(settings.resolved())) == settings
