"""Law 4: after every hand-back, base + adapters are base + G on every side."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from coordinator import checkpoints
from shared.adapters import Array
from shared.int8_weights import int8_names, quantise
from tests.support.closeness import relative
from tests.support.simulation import Simulation
from tests.support.spies import Held
from tests.support.tiny_models import tiny_model
from tests.support.vocabularies import byte_level


def weights_compared(sim: Simulation, seen: Iterable[Held]) -> int:
    """Check every weight that anybody held after any hand-back of a finished run.

    It must have kept all its checkpoints, for G at the beginning of a round is in the one before.
    Returns how many of the weights had been updated.
    """
    base = base_weights(sim)
    saved = sim.config.run_folder / "checkpoints"
    compared = 0
    for held in seen:
        updates = checkpoints.load(saved / f"round-{held.round - 1:06d}").update
        for module, weight in held.weights.items():
            where = (held.round, held.holder, module)
            update = updates.get(module)
            whole = base[module] if update is None else base[module] + update.total.delta_OI()
            assert relative(weight, whole) <= 1e-5, where
            if update is not None and update.total.rank:
                change = relative(weight - base[module], update.total.delta_OI())
                assert change <= 1e-4, where
                compared += 1
    return compared


def base_weights(sim: Simulation) -> dict[str, Array]:
    """Return the base's weight (out, in) of every linear module in the blocks of a GPT-2.

    With the values that they are rounded to, where a run has `training.int8_blocks`.
    """
    words = byte_level().get_vocab_size()
    model = tiny_model(sim.family, vocab_size=words, **sim.model_changes)
    weights = {name: tensor.numpy() for name, tensor in model.tensors.items()}
    for name in int8_names(model.architecture, sim.config.training.int8_blocks):
        weights[name] = quantise(weights[name], inputs_first=True).dequantised()
    return {
        name.removesuffix(".weight"): weight.T.astype(np.float64)
        for name, weight in weights.items()
        if ".h." in name and ".c_" in name and name.endswith(".weight")
    }
