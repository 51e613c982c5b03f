"""The global update as a PEFT adapter folder that `PeftModel.from_pretrained` opens.

Shape suffixes: I input features, O output features, R rank.
"""

from __future__ import annotations

import contextlib
import copy
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
)

from coordinator.aggregation import GlobalUpdate
from coordinator.atomic_folder import replacing
from coordinator.classifier import TrainedClassifier
from coordinator.factoring import split_evenly
from coordinator.model_card import ModelCard, render
from shared.adapters import AdapterState, LoraPair
from shared.architecture import ModelArchitecture
from shared.errors import ModelError, PlanError
from shared.int8_weights import int8_names, quantise

WEIGHTS = "adapter_model.safetensors"


def export_adapter(
    update: GlobalUpdate,
    base: str,
    folder: Path,
    *,
    card: ModelCard,
    revision: str | None = None,
    classifier: TrainedClassifier | None = None,
) -> Path:
    """Write ``update`` as a PEFT folder at ``folder``, replacing what was there; return it.

    ``base``: the Hugging Face name or folder of the base model; ``classifier``: what was trained
    in full beside it. Each module gets its own rank; every scaling is 1. PEFT itself names and
    sizes the tensors (on a model without weights), so that a folder which it could not open is
    not written.

    Raises:
        ModelError: the base cannot be found, or has no such modules or shapes.
        PlanError: the run adapts no module.
        StorageError: the disk is full or the folder cannot be written.
    """
    pairs = _pairs(update)
    task = _Exported.of(None if classifier is None else classifier.classes)
    model_config = _base_config(base, revision, task)
    lora = _lora_config(pairs, base, revision=revision, model_type=model_config.model_type)
    tensors = _tensors(pairs)
    if classifier is not None:
        lora.task_type, lora.modules_to_save = "SEQ_CLS", [classifier.module]
        tensors |= _classifier_tensors(classifier)
    _check_with_peft(tensors, lora=lora, model_config=model_config, auto_class=task.auto_class)
    with replacing(folder) as fresh:
        lora.save_pretrained(str(fresh))
        save_file(tensors, fresh / WEIGHTS, metadata={"format": "pt"})
        readme = render(card, largest_rank=int(lora.r))
        (fresh / "README.md").write_text(readme, encoding="utf-8")
    return folder


def export_merged(
    adapter: Path,
    base: str,
    folder: Path,
    *,
    revision: str | None = None,
    classes: Sequence[str] | None = None,
    int8_blocks: int = 0,
) -> Path:
    """Write base + adapter as a full model at ``folder``, with its tokenizer; return it.

    ``classes``: of a classifier, whose weights are in ``adapter``. ``int8_blocks``: what the
    adapter was trained on is the base in which so many blocks are rounded to 8 bits; so it is
    here. Merged in float32 and stored in the base's own dtype.

    Raises:
        ModelError: the base cannot be found.
        PlanError: it has no ``int8_blocks``.
        StorageError: the disk is full or the folder cannot be written.
    """
    task = _Exported.of(classes)
    config = _base_config(base, revision, task)
    plain = task.auto_class.from_pretrained(
        base, revision=revision, dtype=torch.float32, **task.config_changes
    )
    _round_to_int8(plain, config, blocks=int8_blocks)
    with without_their_quarrel():
        merged = PeftModel.from_pretrained(plain, str(adapter)).merge_and_unload()
    merged = merged.to(config.dtype or torch.float32)
    with replacing(folder) as fresh:
        merged.save_pretrained(fresh)
        if _has_tokenizer(base):
            AutoTokenizer.from_pretrained(base, revision=revision).save_pretrained(fresh)
    return folder


@torch.no_grad()
def _round_to_int8(plain: PreTrainedModel, config: PretrainedConfig, *, blocks: int) -> None:
    """Give the first blocks' weights the values that a run with `training.int8_blocks` has."""
    if not blocks:
        return
    architecture = ModelArchitecture.from_config(config.to_dict())
    architecture.check_int8_blocks(blocks)
    for name in int8_names(architecture, blocks):
        weight = plain.get_parameter(name)
        rounded = quantise(weight.numpy(), inputs_first=architecture.family.inputs_first)
        weight.copy_(torch.from_numpy(rounded.dequantised()))


@dataclass(frozen=True, slots=True)
class _Exported:
    """As which kind of Hugging Face model a base is opened, and what its config then says."""

    auto_class: Any
    config_changes: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, classes: Sequence[str] | None) -> _Exported:
        """Return it for a classifier with these classes; None: for a model that writes."""
        if classes is None:
            return cls(AutoModelForCausalLM)
        names = dict(enumerate(classes))
        numbers = {name: number for number, name in names.items()}
        return cls(AutoModelForSequenceClassification, {"id2label": names, "label2id": numbers})


def _pairs(update: GlobalUpdate) -> AdapterState:
    """Return the modules that have an update; where none has, all of them with a product of 0."""
    if not update:
        raise PlanError("nothing to export: this run adapts no module; check lora.target_modules")
    pairs = {m: split_evenly(one.total) for m, one in sorted(update.items()) if one.total.rank}
    return pairs or {m: _nothing(*one.total.shape) for m, one in sorted(update.items())}


def _nothing(out_features: int, in_features: int) -> LoraPair:
    """Return a rank 1 pair of product 0 that can still be trained: PEFT allows no rank 0."""
    a_RI = np.full((1, in_features), in_features**-0.5, dtype=np.float32)
    return LoraPair(a_RI, np.zeros((out_features, 1), dtype=np.float32), 1.0)


def _lora_config(
    pairs: AdapterState, base: str, *, revision: str | None, model_type: str
) -> LoraConfig:
    """Return PEFT's configuration: largest rank as ``r``, the other ranks as patterns.

    alpha = rank everywhere, so the scaling is 1 even for a reader that ignores the patterns.
    PEFT takes a pattern's key for a regular expression on the end of the module path; these are
    escaped and anchored, so each means exactly one module.
    """
    r = max(pair.rank for pair in pairs.values())
    pattern = {f"^{re.escape(m)}": pair.rank for m, pair in pairs.items() if pair.rank != r}
    return LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=list(pairs),
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        lora_dropout=0.0,
        bias="none",
        fan_in_fan_out=model_type == "gpt2",  # its Conv1D keeps weights as (in, out)
        task_type="CAUSAL_LM",
        inference_mode=True,
        base_model_name_or_path=base,
        revision=revision,
    )


def _tensors(pairs: AdapterState) -> dict[str, torch.Tensor]:
    tensors = {}
    for module, pair in pairs.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = torch.from_numpy(pair.a_RI)
        tensors[f"base_model.model.{module}.lora_B.weight"] = torch.from_numpy(pair.b_OR)
    return tensors


def _classifier_tensors(classifier: TrainedClassifier) -> dict[str, torch.Tensor]:
    return {
        f"base_model.model.{name}": torch.from_numpy(np.array(weight, dtype=np.float32))
        for name, weight in classifier.weights.items()
    }


def _check_with_peft(
    tensors: Mapping[str, torch.Tensor],
    *,
    lora: LoraConfig,
    model_config: PretrainedConfig,
    auto_class: Any,
) -> None:
    try:
        with torch.device("meta"), without_their_quarrel():
            plain: PreTrainedModel = auto_class.from_config(model_config)
            # A copy: PEFT adds what it thinks a classifier may be called.
            skeleton = get_peft_model(plain, copy.deepcopy(lora))
    except ValueError as error:
        raise ModelError(f"the base model does not take this adapter: {error}") from error
    expected = {name: t.shape for name, t in get_peft_model_state_dict(skeleton).items()}
    ours = {name: tensor.shape for name, tensor in tensors.items()}
    wrong = sorted(n for n in expected.keys() | ours.keys() if expected.get(n) != ours.get(n))
    if wrong:
        raise ModelError(
            f"the base model does not take this adapter: {wrong[0]} is {ours.get(wrong[0])} here "
            f"and {expected.get(wrong[0])} there; was it trained on another model?"
        )


@contextlib.contextmanager
def without_their_quarrel() -> Iterator[None]:
    """Hide that PEFT 0.21 asks transformers 5.23 by a name that is going away: not ours to mend."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        yield


def _base_config(base: str, revision: str | None, task: _Exported) -> PretrainedConfig:
    changes = task.config_changes
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(base, revision=revision, **changes)
    except (OSError, ValueError) as error:
        raise ModelError(f"base model {base!r} cannot be loaded: {error}") from error
    return config


def _has_tokenizer(base: str) -> bool:
    """Say whether a local folder has a tokenizer; a model of the hub has one."""
    return not Path(base).is_dir() or (Path(base) / "tokenizer.json").exists()
