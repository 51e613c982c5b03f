"""An exported adapter on its base model, ready to be evaluated."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from coordinator import run_folder
from coordinator.export import WEIGHTS, without_their_quarrel
from coordinator.model_folder import ModelFolder, find_model, read_texts, tokenizer_file
from shared.errors import ModelError
from shared.modeling.compute import compute_device
from shared.prompt_tokens import FramedTokenizer
from shared.terms import ComputeDtype, TrainingChoices

CONFIG = "adapter_config.json"
ADAPTER = "adapter"
"""Where a run's folder holds it."""

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
LORA = ".lora_"


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterFolder:
    """A PEFT LoRA adapter on disk. ``max_length``: of the run that made it, if that is known."""

    path: Path
    base: str
    revision: str | None
    max_length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptedModel:
    """A base model with its adapter, and how it reads text.

    ``max_length``: input tokens of the longest sequence that it is measured on.
    """

    model: PeftModel
    tokenizer: FramedTokenizer
    eos_token_id: int | None
    positions: int | None
    vocabulary: int
    max_length: int

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        device: torch.device = self.model.device
        return device


def find_adapter(folder: Path) -> AdapterFolder:
    """Return the adapter in a PEFT folder or in a run's folder.

    Raises:
        ModelError: there is none, or it is not a causal LM's LoRA adapter in safetensors.
        ConfigError: a run's settings cannot be read.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder}: no such folder; give a PEFT adapter's or a run's folder")
    of_run = (folder / run_folder.RUN_FILE).exists()
    path = folder / ADAPTER if of_run else folder
    config = _config(path, of_run=of_run)
    return AdapterFolder(
        path=path,
        base=str(config.get("base_model_name_or_path") or ""),
        revision=config.get("revision"),
        max_length=run_folder.read_settings(folder).training.max_length
        if of_run
        else TrainingChoices().max_length,
    )


def open_adapted(
    adapter: AdapterFolder,
    *,
    base: str | None = None,
    device: str | None = None,
    dtype: ComputeDtype = "float32",
    max_length: int | None = None,
) -> AdaptedModel:
    """Return the adapter on its base, or on ``base``; ``device`` None: CUDA where there is one.

    Raises:
        ModelError: the base is missing, damaged, or another model than the adapter's.
        ConfigError: there is no such device here.
    """
    where = compute_device(device)
    folder = _base_folder(adapter, base)
    texts = read_texts(folder)
    tokenizer = FramedTokenizer(tokenizer_file(folder), eos_token_id=texts.eos_token_id)
    model = _with_adapter(_plain(folder, dtype), adapter, folder).to(where).eval()
    positions = getattr(model.config, "max_position_embeddings", None)
    longest = max_length or adapter.max_length
    return AdaptedModel(
        model=model,
        tokenizer=tokenizer,
        eos_token_id=texts.eos_token_id,
        positions=positions,
        vocabulary=int(model.config.vocab_size),
        max_length=min(longest, positions) if positions else longest,
    )


def _config(path: Path, *, of_run: bool) -> Mapping[str, Any]:
    for name in (CONFIG, WEIGHTS):
        if not (path / name).exists():
            advice = (
                f"write it with: hsplit-coordinator export {path.parent}"
                if of_run
                else "give a folder that PEFT, or hsplit-coordinator export, wrote"
            )
            raise ModelError(f"{path}: no adapter, {name} is missing; {advice}")
    try:
        config = json.loads((path / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path / CONFIG} cannot be read: {error}; export it again") from error
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ModelError(f"{path}: not a LoRA adapter; other kinds of PEFT are not evaluated")
    if config.get("task_type") not in {None, "CAUSAL_LM"}:
        raise ModelError(
            f"{path}: an adapter for {config['task_type']}, but only a causal language model "
            "(CAUSAL_LM) writes text that can be evaluated"
        )
    return config


def _base_folder(adapter: AdapterFolder, base: str | None) -> ModelFolder:
    if not (base or adapter.base):
        raise ModelError(f"{adapter.path} names no base model; give it with --model")
    if base:
        return find_model(base, setting="--model")
    try:
        return find_model(adapter.base, revision=adapter.revision, setting=CONFIG)
    except ModelError as error:
        raise ModelError(
            f"the base model that {adapter.path} names is not here; give it with --model ({error})"
        ) from error


def _plain(folder: ModelFolder, dtype: ComputeDtype) -> PreTrainedModel:
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            folder.path,
            dtype=_DTYPES[dtype],
            use_safetensors=True,  # never a pickle
        )
    except (OSError, ValueError, SafetensorError) as error:
        raise ModelError(f"base model {folder.source} cannot be loaded: {error}") from error
    # transformers fills in from it what a search does not say, such as a repetition penalty.
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    return model


def _with_adapter(plain: PreTrainedModel, adapter: AdapterFolder, base: ModelFolder) -> PeftModel:
    try:
        with without_their_quarrel():
            warnings.filterwarnings("ignore", "Found missing adapter keys", UserWarning)
            model = PeftModel.from_pretrained(plain, str(adapter.path))
        _check_complete(model, adapter.path / WEIGHTS)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0][:300]
        raise ModelError(
            f"{adapter.path} does not fit base model {base.source}: {reason}; was it trained on "
            "another one? --model names it"
        ) from error
    return model


def _check_complete(model: PeftModel, weights: Path) -> None:
    """Raise ValueError where a tensor is missing or has no place; PEFT goes on without it."""
    expected = get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    with safe_open(weights, framework="pt") as file:
        found = set(file.keys())
    wrong = sorted({*expected} - found) + sorted(one for one in found - {*expected} if LORA in one)
    if wrong:
        raise ValueError(f"{wrong[0]} is only in {'it' if wrong[0] in found else 'the model'}")
