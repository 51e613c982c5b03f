"""A block of a model as a function to trace: forward, all gradients, all that importance needs.

`shared.graphs` says how inputs and outputs are called.

Shape suffixes: B sequences, T padded length, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from coordinator.graphs.linear import Adapter, Adapters, TracedLinear
from coordinator.graphs.model_to_trace import (
    BATCH,
    LENGTH,
    ModelToTrace,
    named_gradients,
    weight_inputs,
    weights_of,
)
from coordinator.graphs.tracing import Input, Traceable, Values


def block(model: ModelToTrace, number: int) -> Traceable:
    """Return block ``number`` (counted from 0); to be called once for a block.

    Raises:
        PlanError: a target module does not exist.
    """
    return _Block(model, number).traceable()


class _Block:
    """One block whose linear modules are replaced by ones that are traced by name."""

    def __init__(self, model: ModelToTrace, number: int) -> None:
        self._model = model
        self._number = number
        self._architecture = model.architecture
        self._sites = model.spec.sites()
        self._adapters = Adapters()
        self._module = model.skeleton.get_submodule(self._architecture.block_path(number))
        is_int8 = number < model.spec.training.int8_blocks
        self._int8 = tuple(self._architecture.linears) if is_int8 else ()
        for name in self._architecture.linears:
            linear: Any = self._module.get_submodule(name)
            _put(self._module, name, TracedLinear(linear, name, self._adapters))

    def traceable(self) -> Traceable:
        return Traceable({**self._inputs(), **self._int8_inputs()}, self._compute)

    def _compute(self, values: Values) -> dict[str, torch.Tensor]:
        hidden = values["hidden"].detach().requires_grad_()
        given = {name: self._adapter(values, name) for name in self._sites}
        scales = {name: values[f"scale.{name}.weight"] for name in self._int8}
        record = self._adapters.begin(given, scales)
        with torch.enable_grad():
            output = self._run(hidden, values)
        trained = [t for one in given.values() for t in (one.a_RI, one.b_OR)]
        gradients = torch.autograd.grad(output, [hidden, *trained], values["gradient"])
        factors = [f"{letter}.{name}" for name in self._sites for letter in ("a", "b")]
        return {
            "output": output.detach(),
            **{f"kept.{name}": kept for name, kept in record.outputs.items()},
            **named_gradients(["hidden", *factors], gradients),
            **{f"input.{name}": record.inputs[name] for name in self._sites},
            **named_gradients(
                [f"kept.{name}" for name in self._sites],
                [record.output_gradients[name] for name in self._sites],
            ),
        }

    # --- inputs -------------------------------------------------------------------------------

    def _inputs(self) -> Mapping[str, Input]:
        hidden = Input((BATCH, LENGTH, self._model.hidden_size))
        inputs = {"hidden": hidden, "gradient": hidden}
        if self._architecture.family.encoder is not None:
            inputs["lengths"] = Input((BATCH,), torch.int64)
        inputs |= weight_inputs(dict(self._module.named_parameters()))
        for name in self._sites:
            inputs |= self._adapter_inputs(name)
        return inputs

    def _adapter_inputs(self, name: str) -> Mapping[str, Input]:
        features_in, features_out = self._architecture.linears[name]
        rank, frozen = f"rank of {name}", f"rank of the residual of {name}"
        inputs = {
            f"a.{name}": Input((rank, features_in)),
            f"b.{name}": Input((features_out, rank)),
            f"scaling.{name}": Input(()),
            f"frozen_a.{name}": Input((frozen, features_in)),
            f"frozen_b.{name}": Input((features_out, frozen)),
        }
        if self._model.spec.has_dropout:
            inputs[f"mask.{name}"] = Input((BATCH, LENGTH, features_in))
        return inputs

    def _int8_inputs(self) -> Mapping[str, Input]:
        """Return the inputs of linear modules whose weights are in 8 bits."""
        inputs: dict[str, Input] = {}
        for name in self._int8:
            linear: Any = self._module.get_submodule(name)
            rows, columns = linear.weight.shape
            inputs_first = self._architecture.family.inputs_first
            inputs[f"weight.{name}.weight"] = Input((rows, columns), torch.int8)
            inputs[f"scale.{name}.weight"] = Input((1, columns) if inputs_first else (rows, 1))
        return inputs

    def _adapter(self, values: Values, name: str) -> Adapter:
        mask = values.get(f"mask.{name}")
        return Adapter(
            a_RI=values[f"a.{name}"].detach().requires_grad_(),
            b_OR=values[f"b.{name}"].detach().requires_grad_(),
            scaling=values[f"scaling.{name}"],
            frozen_a_FI=values[f"frozen_a.{name}"],
            frozen_b_OF=values[f"frozen_b.{name}"],
            mask_MI=None if mask is None else mask.reshape(-1, mask.shape[2]),
        )

    # --- the module ---------------------------------------------------------------------------

    def _run(self, hidden_BTD: torch.Tensor, values: Values) -> torch.Tensor:
        arguments: dict[str, Any] = {
            "attention_mask": self._mask(hidden_BTD, values),
            "use_cache": False,
        }
        path = self._architecture.family.rotary
        if path is not None:
            # Built anew: its tables are computed, and on `meta` they have no values.
            table: Any = type(self._model.skeleton.get_submodule(path))
            positions_1T = torch.arange(hidden_BTD.shape[1]).unsqueeze(0)
            rotary = table(config=self._model.config)
            arguments["position_embeddings"] = rotary(hidden_BTD, position_ids=positions_1T)
        output: torch.Tensor = functional_call(
            self._module, weights_of(values), (hidden_BTD,), arguments, tie_weights=False
        )
        return output

    def _mask(self, hidden_BTD: torch.Tensor, values: Values) -> torch.Tensor:
        """Return what is added to the attention scores: 0, or the lowest number where blind."""
        at_T = torch.arange(hidden_BTD.shape[1])
        if self._architecture.family.encoder is not None:
            seen = (at_T < values["lengths"].unsqueeze(1))[:, None, None]
        else:
            back_TT = at_T[:, None] - at_T[None, :]
            seen = (back_TT >= 0)[None, None]
            types = getattr(self._model.config, "layer_types", None)
            if types and types[self._number] == "sliding_attention":
                seen = seen & (back_TT < self._model.config.sliding_window)
        lowest = torch.full((), torch.finfo(hidden_BTD.dtype).min)
        return torch.where(seen, torch.zeros(()), lowest)


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
