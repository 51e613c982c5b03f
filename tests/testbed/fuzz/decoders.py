"""Every place where foreign bytes become something: how payloads for it are made and given to it.

A decoder is made once in a process (`Decoder.open` gets an empty folder) and then called with one
payload after the other. What it may raise is `HsplitError`; whatever else comes out is a finding.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from coordinator import checkpoints, json_lines
from coordinator.aggregation import SERVER, ModuleUpdate, Sole
from coordinator.checkpoints import Checkpoint
from coordinator.fleet import Fleet
from coordinator.outliers import Screening
from coordinator.presence import Presence
from coordinator.reporting import Tallies
from coordinator.settings import CoordinatorSettings
from edge_agent.coordinator_watch import CoordinatorWatch
from edge_agent.part_file import PartFile
from edge_agent.profile_cache import ProfileCache, ProfileKey
from edge_agent.settings import AgentSettings
from shared import health, json_rows, profile_file, weight_files
from shared.adapters import FactoredDelta, LoraPair, ModuleAdapter
from shared.architecture import ModelArchitecture
from shared.clock import SystemClock
from shared.protocol import chunking, codec, topics
from shared.protocol.messages import Piece, RunId
from shared.protocol.tensors import ITEM_BYTES, TensorFrame, unpack
from tests.support.wire_samples import PAYLOADS, SAMPLES
from tests.testbed.fuzz import mutations

Make = Callable[[random.Random], bytes]
Take = Callable[[bytes], object]

ROOT = Path(__file__).parents[3]
_MESSAGE = struct.Struct("<2sBBI")
_MODULE = "transformer.h.0.attn.c_attn"
_JOINER_BYTES = 2**20
_KEY = ProfileKey(
    device_id="nano", model="0" * 64, blocks=3, backend="torch", device="auto", accelerator=None,
    power_mode=None, cpus=4.0, threads=None, emulate=None, dtype="float32", wire_dtype="float32",
    labels="device", optimizer="adamw", target_modules=("c_attn",), lora_dropout=False,
    micro_batch=4, length=64, hsplit_version="0", backend_version="0",
)  # fmt: skip


@dataclass(frozen=True)
class Decoder:
    """``make`` invents a payload; ``open`` returns what takes it."""

    make: Make
    open: Callable[[Path], Take]


def _stored(name: str) -> bytes:
    return (PAYLOADS / f"{codec.MAJOR}.{codec.MINOR}" / f"{name}.bin").read_bytes()


# --- the wire -----------------------------------------------------------------------------------


def _message(name: str) -> Decoder:
    mutate = functools.partial(mutations.in_message, prefix=_MESSAGE)
    return Decoder(mutations.any_of([_stored(name)], mutate), lambda _: codec.decode)


def _chunks() -> list[bytes]:
    payload = bytes(range(256)) * 20
    return [
        _stored("chunk"),
        *chunking.cut(payload, transfer=7, size=1024),
        *chunking.cut(b"", transfer=8, size=1024),
    ]


def _in_chunk(rng: random.Random, chunk: bytes) -> bytes:
    """Change a chunk's header: its fields, and mostly nothing else."""
    numbers = [rng.choice((7, 8, 9, rng.randrange(2**32))), rng.randrange(6)]
    total = rng.choice((0, 1, 5120, 1024, 2**20, *mutations.HUGE))
    size = rng.choice((0, 1, 1024, 5120, *mutations.HUGE))
    fields = [*numbers, total, size, rng.choice((0, rng.randrange(2**32)))]
    if rng.random() < 0.5:
        return mutations.in_bytes(rng, chunk[: chunking.HEADER_BYTES]) + chunk[64:]
    return chunking._pack(*(n % 2**64 for n in fields)) + chunk[64:]


def _joiner(_: Path) -> Take:
    """Return one joiner after the other; what each holds must stay under its bound."""
    joiner = chunking.Joiner(max_bytes=_JOINER_BYTES)
    now_s = 0.0

    def take(payload: bytes) -> None:
        nonlocal joiner, now_s
        now_s += 1.0
        if now_s % 500 == 0:
            joiner = chunking.Joiner(max_bytes=_JOINER_BYTES)
        try:
            joiner.add(payload, now_s)
        finally:
            held = sum(len(one.buffer) for one in joiner._open.values())
            assert held <= _JOINER_BYTES
            assert len(joiner._open) <= chunking.MAX_OPEN_TRANSFERS

    return take


def _tensor(rng: random.Random) -> bytes:
    """Invent a dtype, a shape and bytes that often fit together."""
    dtype = rng.choice((*ITEM_BYTES, "float64", "object", "O", "<f4", "", "V8", "str"))
    shape = [rng.choice((0, 1, 2, 3, 7, -1, *mutations.HUGE)) for _ in range(rng.randrange(6))]
    if rng.random() < 0.6:
        shape = [rng.randrange(4) for _ in range(rng.randrange(5))]
    size = int(np.prod([float(n) for n in shape])) * ITEM_BYTES.get(dtype, 1)
    size = size if 0 <= size < 10_000 and rng.random() < 0.9 else rng.randrange(100)
    return json.dumps([dtype, shape, rng.randbytes(size).hex()]).encode()


def _unpack(_: Path) -> Take:
    def take(payload: bytes) -> None:
        try:
            dtype, shape, data = json.loads(payload)
            frame = (str(dtype), tuple(int(n) for n in shape), bytes.fromhex(data))
        except (ValueError, TypeError, OverflowError, RecursionError):
            return  # only reached by bytes that were not made by `_tensor`
        array = unpack(TensorFrame(*frame))
        assert array.shape == frame[1]

    return take


def _topic(rng: random.Random) -> bytes:
    names = [
        topics.COORDINATOR_STATUS.name,
        "hsplit/v1/devices/nano/requests",
        "hsplit/v1/runs/run-1/devices/nano/activations",
    ]
    return mutations.any_of([name.encode() for name in names], _in_topic)(rng)


def _in_topic(rng: random.Random, name: bytes) -> bytes:
    parts = name.split(b"/")
    parts[rng.randrange(len(parts))] = rng.choice(
        (
            b"..",
            b".",
            b"",
            b"+",
            b"#",
            b"a" * 65,
            b"nano\n",
            b"\xc3\xa9",
            b"devices",
            b"a%2fb",
            b"\0",
        )
    )
    return b"/".join(parts)


def _parse_topic(_: Path) -> Take:
    def take(payload: bytes) -> None:
        address = topics.parse(payload.decode("utf-8", "surrogateescape"))
        names = [] if address is None else [address.device, address.run or "none"]
        assert all(Path(name).name == name and name.strip(".") for name in names)

    return take


def _status(rng: random.Random) -> bytes:
    seed = {"state": "online", "run_id": "r", "instance": "0a1b2c3d", "settled": False}
    return mutations.any_of([json.dumps(seed).encode()], mutations.in_json)(rng)


def _take_status(_: Path) -> Take:
    presence = Presence(RunId("r"), SystemClock())
    watch = CoordinatorWatch(SystemClock())

    def take(payload: bytes) -> None:
        watch.status(payload)
        presence.handle(payload)

    return take


def _model_config(_: Path) -> Take:
    return lambda payload: ModelArchitecture.from_json(payload.decode("utf-8", "replace"))


CONFIGS = (
    {"model_type": "gpt2", "vocab_size": 9, "n_embd": 8, "n_layer": 3, "n_head": 2,
     "n_positions": 64},
    {"model_type": "qwen3", "vocab_size": 9, "hidden_size": 32, "intermediate_size": 48,
     "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
     "max_position_embeddings": 64, "tie_word_embeddings": False},
    {"model_type": "roberta", "vocab_size": 9, "hidden_size": 32, "intermediate_size": 48,
     "num_hidden_layers": 3, "num_attention_heads": 4, "max_position_embeddings": 66,
     "pad_token_id": 1, "type_vocab_size": 1},
)  # fmt: skip

# --- files --------------------------------------------------------------------------------------


def _file(read: Callable[[Path], object], name: str = "payload") -> Callable[[Path], Take]:
    """Return what writes each payload to a file and has it read."""

    def open_(folder: Path) -> Take:
        path = folder / name

        def take(payload: bytes) -> None:
            path.write_bytes(payload)
            read(path)

        return take

    return open_


def _profiles() -> list[bytes]:
    return [path.read_bytes() for path in (ROOT / "docker/config/profiles").glob("*.json")]


def _cached(folder: Path) -> bytes:
    """Return a true file of the cache, for `_KEY`."""
    found = profile_file.read(ROOT / "docker/config/profiles/cpu-only.json").measurements
    assert found is not None
    ProfileCache(folder).save(_KEY, found)
    return (folder / _KEY.file_name).read_bytes()


def _part(folder: Path) -> Take:
    """Return what continues a damaged unfinished file, with what may or may not be its end."""
    true = bytes(range(256)) * 8
    piece = Piece(name="head", sha256=hashlib.sha256(true).hexdigest(), size_bytes=len(true))

    def take(payload: bytes) -> None:
        (folder / f"{piece.sha256}.0.part").write_bytes(payload[:1024])
        part = PartFile(folder, piece)
        try:
            assert part.size_bytes <= piece.size_bytes
            part.append(payload[1024:])
        except BaseException:
            part.close()
            raise
        descriptor = part.finish()
        assert (folder / piece.sha256).read_bytes() == true
        if descriptor is not None:
            part.close()
        (folder / piece.sha256).unlink()

    return take


def _checkpoint_files(folder: Path) -> dict[str, bytes]:
    total = FactoredDelta(np.ones((4, 2)), np.ones(2), np.ones((2, 3)))
    pair = LoraPair(np.ones((2, 3), np.float32), np.ones((4, 2), np.float32), 2.0)
    own = {"split_layer": 1, "ranks": {_MODULE: 2}, "target_tokens": 9}
    state = {
        **asdict(Tallies(steps=20, target_tokens={"nano": 9})),
        "plans": {"nano": own},
        "fleet": {"positions": {"nano": {"step": 1, "position": 2, "batch": 3}}}
        | {"importance": {"scores": {_MODULE: 1.0}}, "ranked_by": {"scores": {}}},
        "outliers": {"accepted": [{"adapters": [1.0, 2.0]}], "in_a_row": {"nano": 2}},
    }
    one = Checkpoint(
        round=1,
        step=20,
        update={_MODULE: ModuleUpdate(total, total, Sole(SERVER, 2, 2.0), pair)},
        server={_MODULE: ModuleAdapter(pair, pair)},
        optimizer={"m": np.ones(3, np.float32)},
        state=state,
        classifier={"score.weight": np.ones((2, 3), np.float32)},
    )
    path = checkpoints.save(folder, one, keep=1)
    return {file.name: file.read_bytes() for file in path.iterdir()}


def _read_checkpoint(folder: Path) -> Take:
    """Return what puts each payload in place of one file, named by its first byte.

    The manifest then is right, as it would be for somebody who makes a checkpoint up.
    """
    files = _checkpoint_files(folder / "true")
    names = sorted(files)
    path = folder / "round-000001"
    path.mkdir()
    settings = CoordinatorSettings(model={"name": "x"})
    architecture = ModelArchitecture.from_config(CONFIGS[0])

    def take(payload: bytes) -> None:
        name = names[payload[0] % len(names)] if payload else names[0]
        changed = {**files, name: payload[1:]}
        if name != "manifest.json":
            sums = {n: hashlib.sha256(d).hexdigest() for n, d in changed.items()}
            sums.pop("manifest.json")
            changed["manifest.json"] = json.dumps(sums).encode()
        for own, data in changed.items():
            (path / own).write_bytes(data)
        loaded = checkpoints.load(path)
        Fleet(settings, architecture).resume(loaded.state)
        Screening(10.0).resume(loaded.state)
        Tallies.restored(loaded.state)

    return take


def _checkpoint(files: Mapping[str, bytes], rng: random.Random) -> bytes:
    number = rng.randrange(len(files))
    name = sorted(files)[number]
    mutate = mutations.in_json if name.endswith(".json") else mutations.in_safetensors
    return bytes([number]) + mutations.any_of([files[name]], mutate)(rng)


def _settings(kind: type[CoordinatorSettings | AgentSettings]) -> Callable[[Path], Take]:
    environment = {"HSPLIT_DEVICE_ID": "nano"} if kind is AgentSettings else {}
    return _file(lambda path: kind.load(file=path, environment=environment))


def _settings_files(name: str) -> Make:
    seeds = [(ROOT / "docker/config" / name).read_bytes()]
    lines = [line for line in seeds[0].split(b"\n") if not line.lstrip().startswith(b"#")]
    return mutations.any_of([b"\n".join(lines)], mutations.in_yaml)


def _read_rows(path: Path) -> None:
    with json_rows.opened(path) as file:
        for _ in json_rows.rows(file, path):
            pass


_ROWS = b"\n".join(
    json.dumps(row).encode()
    for row in (
        {"prompt": "the red fox ->", "completion": " saw a house"},
        {"text": "the red fox saw a house", "label": 1},
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes"}]},
    )
)
_JOURNAL = b'{"time": 1.5, "round": 1, "step": 20, "train/loss": 3.5}\n' * 3
_WEIGHTS = save(
    {"transformer.wte.weight": np.ones((3, 4), np.float32), "lm_head.weight": np.ones(4)},
    metadata={"format": "pt"},
)
_INDEX = json.dumps({"metadata": {}, "weight_map": {"a": "x.safetensors", "b": "y"}}).encode()


def _read_index(folder: Path) -> Take:
    (folder / "x.safetensors").write_bytes(_WEIGHTS)
    path = folder / weight_files.INDEX

    def take(payload: bytes) -> None:
        path.write_bytes(payload)
        for file in weight_files.weight_files(folder):
            assert file.resolve().parent == folder.resolve()

    return take


def _read_health(path: Path) -> None:
    health.check(path, max_age_s=1e9, clock=SystemClock())


def all_decoders(scratch: Path) -> dict[str, Decoder]:
    """Return every decoder by name; ``scratch``: an empty folder."""
    checkpoint = functools.partial(_checkpoint, _checkpoint_files(scratch / "checkpoints"))
    of = mutations.any_of
    configs = [json.dumps(config).encode() for config in CONFIGS]
    moment = {"pid": 1, "phase": "x", "progress_monotonic_s": 1.0, "progress_wall_s": 2.0}
    return {
        **{f"codec {name}": _message(name) for name in sorted(SAMPLES)},
        "chunking": Decoder(of(_chunks(), _in_chunk), _joiner),
        "tensors": Decoder(_tensor, _unpack),
        "topics": Decoder(_topic, _parse_topic),
        "status": Decoder(_status, _take_status),
        "model config": Decoder(of(configs, mutations.in_json), _model_config),
        "profile file": Decoder(of(_profiles(), mutations.in_json), _file(profile_file.read)),
        "profile cache": Decoder(
            of([_cached(scratch / "profiles")], mutations.in_json),
            lambda folder: _file(lambda _: ProfileCache(folder).load(_KEY), _KEY.file_name)(folder),
        ),
        "part file": Decoder(of([bytes(range(256)) * 8], mutations.in_bytes), _part),
        "checkpoint": Decoder(checkpoint, _read_checkpoint),
        "run.yaml": Decoder(_settings_files("run.yaml"), _settings(CoordinatorSettings)),
        "agent.yaml": Decoder(_settings_files("agent.yaml"), _settings(AgentSettings)),
        "data rows": Decoder(of([_ROWS], mutations.in_lines), _file(_read_rows)),
        "journal lines": Decoder(of([_JOURNAL], mutations.in_lines), _file(json_lines.records)),
        "safetensors": Decoder(
            of([_WEIGHTS], mutations.in_safetensors),
            _file(lambda path: weight_files.open_tensors([path])),
        ),
        "weights index": Decoder(of([_INDEX], mutations.in_json), _read_index),
        "health file": Decoder(
            of([json.dumps(moment).encode()], mutations.in_json), _file(_read_health)
        ),
    }
