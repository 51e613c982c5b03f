"""Law 4 in the whole system: after every hand-back all sides compute with base + G again.

Four blocks. Device b adapts no c_fc; device d comes late and holds less than all before it, so
that the server must take in another block; device c dies and comes back. Once more with devices
a and c that compute without torch.
"""

from __future__ import annotations

from collections import defaultdict

import pytest

from coordinator import checkpoints
from coordinator.aggregation import SERVER
from edge_agent.backends import open_backend
from tests.support.graph_files import put_in_cache
from tests.support.law_4 import weights_compared
from tests.support.outcomes import LINES, USUAL
from tests.support.simulation import Simulation
from tests.support.spies import watch_hand_backs

# A first export takes its time where many tests run at once.
pytestmark = pytest.mark.timeout(600)

ROUNDS = 4
TARGETS = ["c_attn", "c_fc", "attn.c_proj"]
SETTINGS = {
    "rounds": {"count": ROUNDS, "steps": 2},
    "plan": {
        "batch": 4,
        "devices": {
            "a": {"split_layer": 4, "r": 2, "lora_alpha": 8.0},
            "b": {"split_layer": 2, "r": 4, "rank_pattern": {"c_fc": 0, "1.attn.c_attn": 7}},
            "c": {"split_layer": 3, "batch": 3},
            "d": {"split_layer": 1, "r": 6},
        },
    },
    "lora": {"r": 8, "target_modules": TARGETS},
    "optimizer": {"learning_rate": 2e-2},
    "devices": USUAL,
    "checkpoints": {"keep": 99},
}


WAYS = [(way, onnx) for onnx in ("", "ac") for way in (("residual", "device"), ("merge", "server"))]


@pytest.fixture(scope="module", params=WAYS, ids=str)
def run(request, tmp_path_factory):
    """How parts are handed back, the finished run, and its hand-backs by round and holder."""
    (hand_back, labels), without_torch = request.param
    folder = tmp_path_factory.mktemp(f"{hand_back}-{labels}")
    training = {"max_length": 48, "labels": labels, "wire_dtype": "float32"}
    sim = Simulation(
        folder,
        settings={**SETTINGS, "training": training, "aggregation": {"hand_back": hand_back}},
        model_changes={"n_layer": 4},
    )
    if without_torch:
        put_in_cache(sim.graphs)

    def backend(device):
        return open_backend("onnx" if device in without_torch else "torch", device="cpu", threads=1)

    with pytest.MonkeyPatch.context() as patch:
        seen = watch_hand_backs(patch, sim)
        for device in "abc":
            sim.add_device(device, lines=LINES, backend=backend(device))
        sim.run_to("round 2, step 2")
        sim.add_device("d", lines=LINES)
        sim.vanish("c")
        sim.add_device("c", lines=LINES, backend=backend("c"))
        sim.run()
    by_round = defaultdict(dict)
    for held in seen:  # a server that takes in more blocks first puts back what it had
        by_round[held.round][held.holder] = held
    return hand_back, sim, by_round


def test_every_side_has_the_same_effective_weights_after_every_hand_back(run):
    _, sim, by_round = run
    held = [one for holders in by_round.values() for one in holders.values()]
    assert weights_compared(sim, held) > 100


def test_who_held_what_was_as_varied_as_intended(run):
    hand_back, sim, by_round = run
    assert by_round.keys() == set(range(1, ROUNDS + 2))
    assert by_round[2].keys() == {"a", "b", "c", SERVER}
    assert by_round[3].keys() == {"a", "b", "c", "d", SERVER}
    blocks = {n: min(m.split(".")[2] for m in by_round[n][SERVER].weights) for n in (2, 3)}
    assert blocks == {2: "2", 3: "1"}
    without = by_round[4]["b"].received["transformer.h.0.mlp.c_fc"]
    assert without.trainable.rank == 0
    assert without.frozen is not None
    late = by_round[3]["d"].received["transformer.h.0.attn.c_attn"]
    assert late.trainable.rank == 6
    saved = sim.config.run_folder / "checkpoints" / "round-000002"
    norm = checkpoints.load(saved).update["transformer.h.0.attn.c_attn"].total.norm
    assert norm > 0.1, "the update must matter for this law to mean anything"
    if hand_back == "merge":
        assert not late.trainable.b_OR.any()
