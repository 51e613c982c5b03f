"""What is traced: a block with its gradients, the embeddings, and the heads with theirs.

The modules are the Hugging Face model's own, on torch's ``meta`` device; `shared.graphs` says how
inputs and outputs are called.

Shape suffixes: B sequences, T padded length, S = B·T rows, M rows that a head reads, D hidden
size, I and O in and out features, V vocabulary, K classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from coordinator.graphs.linear import Adapter, Adapters, TracedLinear
from coordinator.graphs.spec import GraphSpec
from coordinator.graphs.tracing import Input, Traceable, Values
from shared.modeling.heads import ClassifierHead
from shared.modeling.skeleton import empty_model

BATCH, LENGTH, ROWS = "batch", "length", "rows"


class ModelToTrace:
    """One model under a run's task, without weights, ready to be traced piece by piece."""

    def __init__(self, spec: GraphSpec) -> None:
        """Build the skeleton.

        Raises:
            ModelError: the family is not supported.
            PlanError: a target module does not exist.
        """
        self.architecture = spec.architecture()
        self._spec = spec
        self._sites = spec.sites()
        skeleton: Any = empty_model(json.loads(spec.config_json), self.architecture)
        self._skeleton: nn.Module = skeleton.eval().requires_grad_(False)
        self._config = skeleton.config
        # Attention as plain products and a softmax: ONNX has no word for torch's fused one.
        self._config._attn_implementation = "eager"  # noqa: SLF001 - no public setter
        self._hidden = self.architecture.hidden_size

    # --- blocks -------------------------------------------------------------------------------

    def block(self, number: int) -> Traceable:
        """Return block ``number`` with all gradients and all that importance is made of."""
        module = self._skeleton.get_submodule(self.architecture.block_path(number))
        adapters = Adapters()
        for name in self.architecture.linears:
            linear: Any = module.get_submodule(name)
            _put(module, name, TracedLinear(linear, name, adapters))
        int8 = tuple(self.architecture.linears) if number < self._spec.training.int8_blocks else ()
        inputs = {**self._block_inputs(module), **self._int8_inputs(module, int8)}

        def compute(values: Values) -> dict[str, torch.Tensor]:
            hidden = values["hidden"].detach().requires_grad_()
            given = {name: self._adapter(values, name) for name in self._sites}
            record = adapters.begin(given, {name: values[f"scale.{name}.weight"] for name in int8})
            with torch.enable_grad():
                output = self._run(module, number, hidden, values)
            trained = [t for one in given.values() for t in (one.a_RI, one.b_OR)]
            gradients = torch.autograd.grad(output, [hidden, *trained], values["gradient"])
            named = [f"{letter}.{name}" for name in self._sites for letter in ("a", "b")]
            return {
                "output": output.detach(),
                **{f"kept.{name}": kept for name, kept in record.outputs.items()},
                **_gradients(["hidden", *named], gradients),
                **{f"input.{name}": record.inputs[name] for name in self._sites},
                **_gradients(
                    [f"kept.{name}" for name in self._sites],
                    [record.output_gradients[name] for name in self._sites],
                ),
            }

        return Traceable(inputs, compute)

    def _block_inputs(self, module: nn.Module) -> Mapping[str, Input]:
        inputs = {
            "hidden": Input((BATCH, LENGTH, self._hidden)),
            "gradient": Input((BATCH, LENGTH, self._hidden)),
        }
        if self.architecture.family.encoder is not None:
            inputs["lengths"] = Input((BATCH,), torch.int64)
        inputs |= _weights(dict(module.named_parameters()))
        for name in self._sites:
            features_in, features_out = self.architecture.linears[name]
            rank, frozen = f"rank of {name}", f"rank of the residual of {name}"
            inputs |= {
                f"a.{name}": Input((rank, features_in)),
                f"b.{name}": Input((features_out, rank)),
                f"scaling.{name}": Input(()),
                f"frozen_a.{name}": Input((frozen, features_in)),
                f"frozen_b.{name}": Input((features_out, frozen)),
            }
            if self._spec.has_dropout:
                inputs[f"mask.{name}"] = Input((BATCH, LENGTH, features_in))
        return inputs

    def _int8_inputs(self, module: nn.Module, names: Iterable[str]) -> Mapping[str, Input]:
        """Return the inputs of linear modules whose weights are in 8 bits."""
        inputs: dict[str, Input] = {}
        for name in names:
            linear: Any = module.get_submodule(name)
            rows, columns = linear.weight.shape
            inputs_first = self.architecture.family.inputs_first
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

    def _run(
        self, module: nn.Module, number: int, hidden_BTD: torch.Tensor, values: Values
    ) -> torch.Tensor:
        arguments: dict[str, Any] = {
            "attention_mask": self._mask(number, hidden_BTD, values),
            "use_cache": False,
        }
        positions_1T = torch.arange(hidden_BTD.shape[1]).unsqueeze(0)
        path = self.architecture.family.rotary
        if path is not None:
            # Built anew: its tables are computed, and on `meta` they have no values.
            rotary: Any = type(self._skeleton.get_submodule(path))(config=self._config)
            arguments["position_embeddings"] = rotary(hidden_BTD, position_ids=positions_1T)
        output: torch.Tensor = functional_call(
            module, _of(values), (hidden_BTD,), arguments, tie_weights=False
        )
        return output

    def _mask(self, number: int, hidden_BTD: torch.Tensor, values: Values) -> torch.Tensor:
        """Return what is added to the attention scores: 0, or the lowest number where blind."""
        at_T = torch.arange(hidden_BTD.shape[1])
        if self.architecture.family.encoder is not None:
            seen = (at_T < values["lengths"].unsqueeze(1))[:, None, None]
        else:
            back_TT = at_T[:, None] - at_T[None, :]
            seen = (back_TT >= 0)[None, None]
            types = getattr(self._config, "layer_types", None)
            if types and types[number] == "sliding_attention":
                seen = seen & (back_TT < self._config.sliding_window)
        lowest = torch.full((), torch.finfo(hidden_BTD.dtype).min)
        return torch.where(seen, torch.zeros(()), lowest)

    # --- embeddings ---------------------------------------------------------------------------

    def embeddings(self) -> Traceable:
        """Return what is added to the tokens' own embeddings ``tokens`` (B, T, D)."""
        family = self.architecture.family
        paths = [path for path in family.embeddings if path != family.token_embedding]
        inputs = {"tokens": Input((BATCH, LENGTH, self._hidden))}
        if family.encoder is not None:
            inputs["token_types"] = Input((BATCH, LENGTH), torch.int64)
        inputs |= _weights(self._parameters(*paths))

        def run(skeleton: nn.Module, values: Values) -> torch.Tensor:
            hidden_BTD = values["tokens"]
            if family.position_embedding is not None:
                at_T = torch.arange(hidden_BTD.shape[1]) + self.architecture.first_position
                hidden_BTD = hidden_BTD + skeleton.get_submodule(family.position_embedding)(at_T)
            if family.encoder is None:
                return hidden_BTD
            table: Any = skeleton.get_submodule(family.encoder.token_types)
            types_BT = values["token_types"].clamp(max=table.num_embeddings - 1)
            hidden_BTD = hidden_BTD + table(types_BT)
            normed_BTD: torch.Tensor = skeleton.get_submodule(family.encoder.norm)(hidden_BTD)
            return normed_BTD

        whole = _Whole(self._skeleton, run)
        return Traceable(inputs, lambda values: {"output": whole.with_weights(values)})

    # --- heads --------------------------------------------------------------------------------

    def head(self) -> Traceable:
        """Return the loss of each row and the gradients of its sum."""
        return self._classifier() if self.architecture.classifies else self._words()

    def _words(self) -> Traceable:
        family, architecture = self.architecture.family, self.architecture
        tied = architecture.tied_embeddings
        projection = family.token_embedding if tied else architecture.frozen_head
        norms = () if family.final_norm is None else (family.final_norm,)
        inputs = {
            "hidden": Input((ROWS, self._hidden)),
            "targets": Input((ROWS,), torch.int64),
            **_weights(self._parameters(*norms, str(projection))),
        }

        def run(skeleton: nn.Module, values: Values) -> torch.Tensor:
            normed_MD = values["hidden"]
            for norm in norms:
                normed_MD = skeleton.get_submodule(norm)(normed_MD)
            table: Any = skeleton.get_submodule(str(projection))
            loss_M: torch.Tensor = _FrozenProjection.apply(  # type: ignore[no-untyped-call]
                normed_MD, table.weight, values["targets"]
            )
            return loss_M

        whole = _Whole(self._skeleton, run)

        def compute(values: Values) -> dict[str, torch.Tensor]:
            hidden = values["hidden"].detach().requires_grad_()
            with torch.enable_grad():
                loss_M = whole.with_weights({**values, "hidden": hidden})
            (gradient,) = torch.autograd.grad(loss_M, hidden, torch.ones_like(loss_M))
            return {"loss": loss_M.detach(), "gradient.hidden": gradient}

        return Traceable(inputs, compute)

    def _classifier(self) -> Traceable:
        trained = tuple(self.architecture.classifier_shapes())
        frozen = (self.architecture.family.final_norm, self.architecture.frozen_head)
        module = self.architecture.family.classifier.module
        paths = [*(path for path in frozen if path is not None), module]
        inputs = {
            "hidden": Input((ROWS, self._hidden)),
            "targets": Input((ROWS,), torch.int64),
            **_weights(self._parameters(*paths)),
        }

        def run(skeleton: nn.Module, values: Values) -> torch.Tensor:
            norm, pooler = (None if p is None else skeleton.get_submodule(p) for p in frozen)
            head = ClassifierHead(skeleton, self.architecture, norm=norm, pooler=pooler)
            return head.logits(values["hidden"])

        whole = _Whole(self._skeleton, run)

        def compute(values: Values) -> dict[str, torch.Tensor]:
            names = ["hidden", *(f"weight.{name}" for name in trained)]
            leaves = {name: values[name].detach().requires_grad_() for name in names}
            with torch.enable_grad():
                logits_MK = whole.with_weights({**values, **leaves})
                chances_MK = logits_MK.log_softmax(dim=1)
                loss_M = -chances_MK.gather(1, values["targets"].unsqueeze(1)).squeeze(1)
            gradients = torch.autograd.grad(loss_M, list(leaves.values()), torch.ones_like(loss_M))
            return {
                "loss": loss_M.detach(),
                "logits": logits_MK.detach(),
                **_gradients(names, gradients),
            }

        return Traceable(inputs, compute)

    def _parameters(self, *paths: str) -> Mapping[str, torch.Tensor]:
        return {
            f"{path}.{name}": parameter
            for path in paths
            for name, parameter in self._skeleton.get_submodule(path).named_parameters()
        }


class _Whole(nn.Module):
    """Runs a function on the whole skeleton, in which some weights are replaced by inputs."""

    def __init__(
        self, skeleton: nn.Module, run: Callable[[nn.Module, Values], torch.Tensor]
    ) -> None:
        super().__init__()
        self.skeleton = skeleton
        self._run = run

    def forward(self, values: Values) -> torch.Tensor:
        return self._run(self.skeleton, values)

    def with_weights(self, values: Values) -> torch.Tensor:
        weights = {f"skeleton.{name}": weight for name, weight in _of(values).items()}
        output: torch.Tensor = functional_call(self, weights, (values,), tie_weights=False)
        return output


class _FrozenProjection(torch.autograd.Function):
    """Loss of each row, -log softmax(W h_m)[target_m], with ∂/∂h_m = softmax(W h_m) W - W[target].

    Written out, as in `shared.modeling.loss`: autograd would make one more matrix of logits.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden_MD: torch.Tensor, weight_VD: torch.Tensor, targets_M: torch.Tensor
    ) -> torch.Tensor:
        chances_MV = (hidden_MD @ weight_VD.t()).log_softmax(dim=1)
        ctx.kept = chances_MV, weight_VD, targets_M
        return -chances_MV.gather(1, targets_M.unsqueeze(1)).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        """Return the gradient of the sum of all rows' losses."""
        chances_MV, weight_VD, targets_M = ctx.kept
        own_MD = weight_VD.index_select(0, targets_M)
        return chances_MV.exp() @ weight_VD - own_MD, None, None


def _weights(parameters: Mapping[str, torch.Tensor]) -> dict[str, Input]:
    return {f"weight.{name}": Input(tuple(p.shape)) for name, p in parameters.items()}


def _of(values: Values) -> dict[str, torch.Tensor]:
    """Return the weights among ``values`` by their names in the module."""
    prefix = "weight."
    return {name[len(prefix) :]: v for name, v in values.items() if name.startswith(prefix)}


def _gradients(names: list[str], gradients: Any) -> dict[str, torch.Tensor]:
    return {f"gradient.{n}": g for n, g in zip(names, gradients, strict=True)}


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)
