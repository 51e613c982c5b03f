"""PLANNING.md and the profiles that it plans with say the same as the programs.

Where a table of the document is out of date, the failure shows the one to put there; read then
whether the words beside it still hold.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import yaml

from coordinator.settings import CoordinatorSettings, PlanSettings
from shared import costs, profile_file
from shared.architecture import ModelArchitecture
from shared.protocol.profile import BlockPoint, LinkMeasurement, ProfileFile
from tests.testbed.in_process import coordinator_main

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "coordinator" / "planning" / "PLANNING.md").read_text(encoding="utf-8")
EXAMPLE = TEXT[TEXT.index("## A worked example") : TEXT.index("## Reading the reasons")]
BLOCKS = re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", EXAMPLE)
FOLDER = ROOT / "docker" / "config" / "profiles"
PROFILES = {path.name: profile_file.read(path) for path in sorted(FOLDER.glob("*.json"))}

QWEN = {
    "model_type": "qwen2",
    "hidden_size": 896,
    "num_hidden_layers": 24,
    "num_attention_heads": 14,
    "num_key_value_heads": 2,
    "intermediate_size": 4864,
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "tie_word_embeddings": True,
}
SHAPE = ModelArchitecture.from_config(QWEN)
GIB = 2**30

# What PLANNING.md says of all data-sheet examples: η, bytes kept and passing, bytes of the head.
REACHED = 0.5
KEPT_BYTES, PASSING_BYTES, HEAD_BYTES = 120e3, 130e3, 50e6
HEAD_WEIGHTS = SHAPE.vocab_size * SHAPE.hidden_size
AS_PRINTED = 0.006  # seconds have three digits in the files


def data_sheet() -> dict[str, list[float]]:
    """Return the numbers of the document's table by file name; an empty cell is left out."""
    rows = re.findall(r"(?m)^\| `([\w-]+\.json)` \(.*?\) \|(.*)\|$", EXAMPLE)
    return {
        name: [float(cell) for cell in cells.split("|") if cell.strip()] for name, cells in rows
    }


def code(language: str) -> str:
    """Return the first block of the worked example in a language."""
    return next(text for kind, text in BLOCKS if kind == language)


def sections() -> tuple[tuple[str, str], tuple[str, str]]:
    """Return both pairs of commands and the table that they print."""
    plain = [text for kind, text in BLOCKS if kind == ""]
    commands = [index for index, text in enumerate(plain) if "hsplit-coordinator plan" in text]
    first, second = ((plain[index], plain[index + 1]) for index in commands)
    return first, second


@pytest.fixture(scope="module")
def run_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the example's run, of a folder with no more than the document says is needed."""
    model = tmp_path_factory.mktemp("qwen")
    (model / "config.json").write_text(json.dumps(QWEN))
    words = tokenizers.models.WordLevel({"<unk>": 0}, unk_token="<unk>")
    tokenizers.Tokenizer(words).save(str(model / "tokenizer.json"))
    settings: dict[str, Any] = yaml.safe_load(code("yaml"))
    settings["model"]["name"] = str(model)
    path = model / "example.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def carry_out(commands: str, run_file: Path) -> str:
    """Run what the document says; `sed` and `cd` are the only other commands in it."""
    files = {name: FOLDER / name for name in PROFILES} | {"example.yaml": run_file}
    joined = commands.replace("\\\n", " ").splitlines()
    for line in joined:
        if found := re.match(r"sed -E 's/(.*)/(.*)/' (\S+) > (\S+)$", line):
            pattern, replacement, source, target = found.groups()
            files[target] = run_file.parent / target
            files[target].write_text(re.sub(pattern, replacement, files[source].read_text()))
    (line,) = (line for line in joined if line.startswith("hsplit-coordinator plan "))
    ended = coordinator_main(*(str(files.get(word, word)) for word in line.split()[1:]))
    assert ended.code == 0, ended.words
    return ended.output


@pytest.mark.parametrize("number", [0, 1])
def test_the_commands_of_the_document_print_its_tables(number: int, run_file: Path):
    commands, table = sections()[number]
    assert carry_out(commands, run_file) == table


def test_the_second_plan_differs_from_the_first_as_the_document_says():
    first, second = (
        {line.split()[0]: line.split()[1:4] for line in table.splitlines()[1:5]}
        for _, table in sections()
    )
    assert {device for device in first if first[device] != second[device]} == set(first) - {
        "cpu-only"
    }


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_is_of_the_example_and_can_be_fitted(name: str):
    found = PROFILES[name].measurements
    assert found.model == SHAPE.fingerprint
    assert found.dtype == "float32"
    assert found.memory_bytes is not None
    fitted = costs.fit(found)
    near = 0.01 if name in data_sheet() else 0.25  # formulas are lines, measurements nearly so
    for point in found.blocks:
        load = {
            "blocks": point.blocks,
            "tokens": point.sequences * point.length,
            "adapter_parameters": point.adapter_parameters,
        }
        assert fitted.forward_s(**load) == pytest.approx(point.forward_s, rel=near)
        assert fitted.backward_s(**load) == pytest.approx(point.backward_s, rel=near)


def test_the_example_has_no_other_profiles_than_the_document_names():
    assert {*data_sheet(), "cpu-only.json"} == set(PROFILES)


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_says_whether_it_was_measured(name: str):
    is_measured = name not in data_sheet()
    machine = PROFILES[name].machine
    assert ("compute MEASURED" in machine) == is_measured
    assert ("EXAMPLE computed from published figures, NOT measured" in machine) != is_measured


@pytest.mark.parametrize("name", data_sheet())
def test_a_data_sheet_profile_holds_what_the_formulas_give(name: str):
    profile = PROFILES[name]
    teraflops, gigabytes, launch_ms, runtime_gib, usable_gib, *link = data_sheet()[name]
    rate, launch_s = REACHED * teraflops * 1e12, launch_ms * 1e-3
    found = profile.measurements
    assert found.runtime_bytes == runtime_gib * GIB
    assert found.memory_bytes == usable_gib * GIB
    assert found.link == _link(*link)
    for point in found.blocks:
        _check_block(point, profile, rate=rate, launch_s=launch_s)
    for head in found.head:
        seconds = 4 * HEAD_WEIGHTS * head.tokens / rate + 2 * launch_s
        assert head.seconds == pytest.approx(seconds, rel=AS_PRINTED)
        assert head.extra_bytes == HEAD_BYTES
    for step in found.optimizer:
        seconds = 28 * step.adapter_parameters / (gigabytes * 1e9) + launch_s
        assert step.seconds == pytest.approx(seconds, rel=AS_PRINTED)


def _link(*numbers: float) -> LinkMeasurement | None:
    if not numbers:
        return None
    megabits, round_trip_ms = numbers
    return LinkMeasurement(
        uplink_bytes_per_s=megabits * 125e3,
        downlink_bytes_per_s=megabits * 125e3,
        round_trip_s=round_trip_ms * 1e-3,
    )


def _check_block(point: BlockPoint, profile: ProfileFile, *, rate: float, launch_s: float) -> None:
    blocks, adapters = point.blocks, point.adapter_parameters
    tokens = point.sequences * point.length
    base_s = blocks * 2 * SHAPE.block_parameters * tokens / rate
    forward_s = base_s + blocks * launch_s + 2 * adapters * tokens / rate
    backward_s = base_s + 2 * blocks * launch_s + 4 * adapters * tokens / rate
    assert point.forward_s == pytest.approx(forward_s, rel=AS_PRINTED)
    assert point.backward_s == pytest.approx(backward_s, rel=AS_PRINTED)
    held = 4 * SHAPE.block_parameters * blocks + 8 * adapters
    held += 4 * HEAD_WEIGHTS if profile.measurements.head else 0
    passing = (point.in_flight * KEPT_BYTES * blocks + PASSING_BYTES) * tokens
    peak = profile.measurements.runtime_bytes + held + passing
    assert point.peak_bytes == pytest.approx(peak, rel=1e-9)


def test_the_table_of_settings_has_every_key_and_its_default():
    rows = dict(re.findall(r"(?m)^\| `plan\.(\w+)` \| (.*?) ?\|", TEXT))
    defaults = {name: field.get_default() for name, field in PlanSettings.model_fields.items()}
    printed = {
        name: "" if value is None else str(value).lower() for name, value in defaults.items()
    }
    assert rows == {**printed, "devices": ""}


def test_the_example_is_a_run_file():
    settings = CoordinatorSettings.model_validate(yaml.safe_load(code("yaml")))
    assert settings.training.dtype == "float32"
    assert settings.training.labels == "device"
