"""Laws 1, 4 and 5 with the first blocks in 8 bits: the base is the rounded one, to everybody."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from coordinator.aggregation import SERVER, GlobalUpdate, ModuleUpdate
from coordinator.export import export_adapter, export_merged
from coordinator.factoring import Term, recompress
from edge_agent.backends.base import FrontBase, MicroBatch
from edge_agent.backends.onnx_backend import OnnxBackend
from edge_agent.backends.torch_backend import TorchBackend
from shared.adapters import LoraPair, ModuleAdapter
from shared.errors import ProtocolError
from shared.int8_weights import int8_names
from shared.protocol.messages import DeviceId
from shared.protocol.tensors import pack, unpack
from shared.terms import LoraTerms, OptimizerTerms, TrainingTerms
from tests.equivalence.test_split_is_whole import OPTIMIZERS, STEPS, batches_of_run, lora_of
from tests.support import exported_adapters
from tests.support.closeness import largest_difference, relative
from tests.support.graph_files import ALL_LINEAR, graph_files, put_in_cache
from tests.support.int8_models import Int8Model, int8_model, plain_model
from tests.support.law_4 import weights_compared
from tests.support.monolithic import train_whole
from tests.support.outcomes import LINES, USUAL
from tests.support.simulation import Simulation
from tests.support.spies import watch_hand_backs
from tests.support.split_system import SplitSystem
from tests.support.tiny_models import fresh_adapters, tiny_batch

BLOCKS = 2
"""In 8 bits, of three: so a device may hold blocks of both kinds, and the server one of each."""
# A first export takes its time where many tests run at once.
pytestmark = pytest.mark.timeout(600)
TRAINING = TrainingTerms(
    labels="device", wire_dtype="float32", max_length=16, total_steps=STEPS, int8_blocks=BLOCKS
)
SGD = OPTIMIZERS["sgd"]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> Int8Model:
    return int8_model("gpt2", tmp_path_factory.mktemp("gpt2"), blocks=BLOCKS)


def system_of(
    model: Int8Model, split_layers: dict[str, int], folder: Path, *, backend: str
) -> SplitSystem:
    return SplitSystem(
        model,
        split_layers,
        folder,
        training=TRAINING,
        lora=lora_of("gpt2"),
        optimizer=SGD,
        backends=dict.fromkeys(split_layers, backend),
    )


# --- law 1 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "onnx"])
@pytest.mark.parametrize("split_layer", [1, 3])
def test_a_split_run_equals_the_monolithic_one_on_the_rounded_base(
    gpt2, split_layer, backend, tmp_path
):
    system = system_of(gpt2, {"nano": split_layer}, tmp_path, backend=backend)
    losses = [system.step(n, {"nano": [batch]}) for n, batch in enumerate(batches_of_run())]
    found = {module: pair for (_, module), pair in system.adapters().items()}
    whole = train_whole(gpt2, batches_of_run(), lora=lora_of("gpt2"), optimizer=SGD)
    assert largest_difference(found, whole.adapters) <= 1e-5
    np.testing.assert_allclose(losses, whole.losses, rtol=1e-5)
    plain = train_whole(plain_model("gpt2"), batches_of_run(), lora=lora_of("gpt2"), optimizer=SGD)
    assert largest_difference(plain.adapters, whole.adapters) > 1e-3, "rounding must matter"


def outcome(backend, model, folder, graphs, lora):
    """Return activations, gradients (as what a large step does) and importance of a front."""
    base = model.front_base(folder, split_layer=2, head=False)
    backend.load(
        FrontBase(base.config_json, base.files, 2, graphs),
        device_id=DeviceId("nano"),
        training=dataclasses.replace(TRAINING, labels="server"),
        lora=lora,
        optimizer=OptimizerTerms(
            name="sgd", learning_rate=512, weight_decay=0, schedule="constant", max_grad_norm=0
        ),
    )
    adapters = fresh_adapters(model.architecture, lora, blocks=range(2))
    backend.set_adapters(adapters, fold=False)
    batch = tiny_batch((9, 4, 12))
    backend.begin_probe(list(adapters))
    hidden = backend.forward(MicroBatch(0, 0), batch, train=True)
    gradient = pack(np.random.default_rng(0).standard_normal(hidden.shape).astype(np.float32))
    backend.backward(MicroBatch(0, 0), gradient)
    sums = backend.end_probe()
    backend.forward(MicroBatch(0, 0), batch, train=True)
    backend.backward(MicroBatch(0, 0), gradient)
    backend.step(0, target_tokens=1)
    return unpack(hidden), backend.adapters(), sums


def test_both_agents_compute_alike_where_the_weights_lie_the_other_way(tmp_path):
    """Llama's are (O, I); and only some of its modules are adapted here."""
    model = int8_model("llama", tmp_path / "model", blocks=BLOCKS)
    lora = LoraTerms(r=4, target_modules=("q_proj", "down_proj"))
    graphs = graph_files(
        model.config, lora=lora, training=dataclasses.replace(model.training, labels="server")
    )
    args = (model, tmp_path, graphs, lora)
    hidden, adapters, sums = outcome(OnnxBackend("cpu", threads=1), *args)
    expected_hidden, expected, expected_sums = outcome(TorchBackend("cpu"), *args)
    assert relative(hidden, expected_hidden) <= 1e-6
    assert largest_difference(adapters, expected) <= 1e-5
    assert sums == pytest.approx(expected_sums, rel=1e-5)


# --- law 4 --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "onnx"])
def test_devices_and_server_hold_the_same_values_to_the_bit(gpt2, backend, tmp_path):
    system = system_of(gpt2, {"nano": 1, "orin": 3}, tmp_path, backend=backend)
    assert system.server is not None
    server = dict(system.server._back.skeleton.named_parameters())
    names = [n for n in int8_names(gpt2.architecture, BLOCKS) if gpt2.architecture.block_of(n)]
    for name in names:
        module = name.removesuffix(".weight")
        held = system.devices["orin"]
        if isinstance(held, OnnxBackend):
            weight = held._loaded().front.module(module).weight
            assert weight.values.dtype == np.int8
            device = weight.dequantised()
        else:
            device = held._loaded().skeleton.get_submodule(module).base.weight.numpy()
        assert np.array_equal(server[f"{module}.base.weight"].numpy(), device)
        assert not np.array_equal(device, plain_model("gpt2").tensors[name].numpy())


@pytest.mark.parametrize("rank", [3, 40])
def test_a_residual_of_any_rank_is_carried_exactly(gpt2, rank, tmp_path):
    """On a base in float32 one of rank 40 would become a second weight; here it must not."""
    module = "transformer.h.0.mlp.c_fc"
    outputs = []
    random = np.random.default_rng(0)
    frozen = LoraPair(random.standard_normal((rank, 32)), random.standard_normal((128, rank)), 0.01)
    trained = fresh_adapters(gpt2.architecture, lora_of("gpt2"), blocks=range(1))[module].trainable
    for backend in ("torch", "onnx"):
        device = system_of(gpt2, {"nano": 1}, tmp_path, backend=backend).devices["nano"]
        device.set_adapters({module: ModuleAdapter(trained, frozen)}, fold=False)
        hidden = device.forward(MicroBatch(0, 0), tiny_batch((5, 9)), train=True)
        outputs.append(unpack(hidden))
    assert relative(outputs[1], outputs[0]) <= 1e-6
    held = device._loaded().front.module(module)
    exact = gpt2.tensors[f"{module}.weight"].numpy().T + frozen.delta_OI() + trained.delta_OI()
    assert relative(held.effective_CI(slice(None)), exact) <= 1e-6
    assert relative(held.effective_CI(slice(5, 20)), exact[5:20]) <= 1e-6
    assert held.weight.values.dtype == np.int8


def test_nothing_can_be_folded_into_weights_in_8_bits(gpt2, tmp_path):
    device = system_of(gpt2, {"nano": 1}, tmp_path, backend="onnx").devices["nano"]
    before = device.adapters()
    pair = LoraPair(np.ones((1, 32), np.float32), np.ones((128, 1), np.float32), 1.0)
    with pytest.raises(ProtocolError, match="8 bits: nothing can be folded"):
        device.set_adapters({"transformer.h.0.mlp.c_fc": ModuleAdapter(pair, pair)}, fold=True)
    assert largest_difference(device.adapters(), before) == 0


ROUNDS = 3
SETTINGS = {
    "training": {"max_length": 48, "wire_dtype": "float32", "int8_blocks": BLOCKS},
    "rounds": {"count": ROUNDS, "steps": 2},
    "plan": {
        "batch": 4,
        "devices": {"light": {"split_layer": 3, "r": 2}, "heavy": {"split_layer": 1, "r": 6}},
    },
    "lora": {"r": 8, "target_modules": list(ALL_LINEAR["gpt2"])},
    "optimizer": {"learning_rate": 2e-2},
    "devices": {**USUAL, "min": 2, "expected": 2},
    "checkpoints": {"keep": 99},
}


def test_a_fleet_of_both_agents_holds_base_and_update_after_every_hand_back(tmp_path):
    sim = Simulation(tmp_path, settings=SETTINGS)
    put_in_cache(sim.graphs)
    with pytest.MonkeyPatch.context() as patch:
        seen = watch_hand_backs(patch, sim)
        sim.add_device("light", lines=LINES, backend=OnnxBackend("cpu", threads=1))
        sim.add_device("heavy", lines=LINES)
        sim.run()
    assert {(one.holder, one.round) for one in seen} == {
        (holder, round_) for holder in ("light", "heavy", SERVER) for round_ in range(1, ROUNDS + 2)
    }
    assert weights_compared(sim, seen) > 50


# --- law 5 --------------------------------------------------------------------------------------

CARD = dataclasses.replace(exported_adapters.CARD, int8_blocks=BLOCKS)


def random_update(model: Int8Model) -> GlobalUpdate:
    random = np.random.default_rng(1)
    update = {}
    for name in int8_names(model.architecture, 3):
        module = name.removesuffix(".weight")
        inputs, outputs = model.architecture.features(module)
        term = Term(0.1 * random.standard_normal((outputs, 2)), random.standard_normal((2, inputs)))
        total = recompress([term], shape=(outputs, inputs), tolerance=1e-6).delta
        update[module] = ModuleUpdate(total, total)
    return update


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
def test_the_merged_model_is_the_rounded_base_with_the_update(gpt2, tmp_path):
    base = str(gpt2.store.folder.path)
    adapter = export_adapter(random_update(gpt2), base, tmp_path / "adapter", card=CARD)
    whole = export_merged(adapter, base, tmp_path / "merged", int8_blocks=BLOCKS)
    merged = AutoModelForCausalLM.from_pretrained(whole).eval()
    expected = PeftModel.from_pretrained(gpt2.hugging_face(), str(adapter)).eval()
    plain = PeftModel.from_pretrained(plain_model("gpt2").hugging_face(), str(adapter)).eval()
    tokens = torch.arange(60).reshape(3, 20) * 7 % 100
    with torch.no_grad():
        logits, wanted, others = (m(tokens).logits.numpy() for m in (merged, expected, plain))
    assert relative(logits, wanted) <= 1e-5
    assert relative(others, wanted) > 1e-4, "rounding must matter"
    assert "first 2 blocks rounded to 8" in (adapter / "README.md").read_text()
