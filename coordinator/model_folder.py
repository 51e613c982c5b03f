"""Finding a Hugging Face model, by folder or by hub name, and reading all of it but the weights."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from shared import hub
from shared.errors import ModelError

logger = logging.getLogger(__name__)

WANTED = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
)
"""What is fetched from the hub: no pickles, no copies in other formats."""

_SPECIAL_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    """A base model on this machine's disk.

    ``source`` is what a PEFT folder names as its base: the hub name or the folder as given.
    ``revision`` is the hub's commit, None for a plain folder.
    """

    source: str
    path: Path
    revision: str | None = None

    @property
    def name(self) -> str:
        """What devices are told: the hub name, or a folder's last part (not where it lies)."""
        return self.source if self.revision is not None else self.path.resolve().name


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTexts:
    """What stands beside the weights."""

    config_json: str
    config: Mapping[str, Any]
    chat_template: str | None
    special_tokens: Mapping[str, str]
    eos_token_id: int | None


def find_model(
    name_or_path: str,
    *,
    revision: str | None = None,
    setting: str = "model.name",
    files: Sequence[str] = WANTED,
) -> ModelFolder:
    """Return the folder of a model, fetching ``files`` from the Hugging Face hub where needed.

    ``setting``: where the name was given, for errors.
    The hub's own settings hold: ``HF_HOME``, ``HF_TOKEN``, and with ``HF_HUB_OFFLINE=1`` only
    what is in its cache.

    Raises:
        ModelError: it is not there, not allowed, or there is no way to the hub.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return ModelFolder(source=name_or_path, path=path)
    if not hub.is_hub_name(name_or_path):
        raise ModelError(f"model {name_or_path}: no such folder; check {setting}")
    fetched = hub.fetch(name_or_path, files=files, revision=revision, setting=setting)
    return ModelFolder(source=name_or_path, path=fetched, revision=fetched.name)


def read_texts(folder: ModelFolder) -> ModelTexts:
    """Return configuration, chat template and special tokens of a model.

    Raises:
        ModelError: ``config.json`` or ``tokenizer.json`` is missing or damaged.
    """
    config_json = read_config(folder)
    tokenizer_config = _json_object(folder, "tokenizer_config.json")
    names = {**_json_object(folder, "special_tokens_map.json"), **tokenizer_config}
    special_tokens = _special_tokens(names)
    config = _json_object(folder, "config.json")
    return ModelTexts(
        config_json=config_json,
        config=config,
        chat_template=_chat_template(folder, tokenizer_config),
        special_tokens=special_tokens,
        eos_token_id=_eos_token_id(tokenizer_file(folder), special_tokens, config),
    )


def read_config(folder: ModelFolder) -> str:
    """Return the text of ``config.json``.

    Raises:
        ModelError: it is missing, or cannot be read.
    """
    config_json = _read(folder, "config.json")
    if config_json is None:
        raise ModelError(f"{folder.path}: config.json is missing; is this a Hugging Face model?")
    return config_json


def tokenizer_file(folder: ModelFolder) -> Path:
    """Return the path of ``tokenizer.json``, which devices need.

    Raises:
        ModelError: the model has none.
    """
    path = folder.path / "tokenizer.json"
    if not path.is_file():
        raise ModelError(
            f"{folder.path}: tokenizer.json is missing, and devices read text with it alone; make "
            "it with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    return path


def _read(folder: ModelFolder, name: str) -> str | None:
    try:
        return (folder.path / name).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ModelError(f"{folder.path / name} cannot be read: {error}") from error


def _json_object(folder: ModelFolder, name: str) -> dict[str, Any]:
    text = _read(folder, name)
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ModelError(f"{folder.path / name} is not JSON: {error}; fetch it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{folder.path / name} is not a JSON object; fetch it again")
    return value


def _chat_template(folder: ModelFolder, tokenizer_config: Mapping[str, Any]) -> str | None:
    own_file = _read(folder, "chat_template.jinja")
    if own_file is not None:
        return own_file
    stored = tokenizer_config.get("chat_template")
    if isinstance(stored, list):  # several named ones, as transformers once stored them
        stored = {one.get("name"): one.get("template") for one in stored}.get("default")
    return stored if isinstance(stored, str) else None


def _special_tokens(names: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for kind in _SPECIAL_TOKENS:
        token = names.get(f"{kind}_token")
        if isinstance(token, dict):  # an AddedToken
            token = token.get("content")
        if isinstance(token, str):
            found[f"{kind}_token"] = token
    return found


def _eos_token_id(
    path: Path, special_tokens: Mapping[str, str], config: Mapping[str, Any]
) -> int | None:
    """Return the id of the tokenizer's end-of-text token; without one, the config's."""
    try:
        tokenizer = tokenizers.Tokenizer.from_file(os.fspath(path))
    except Exception as error:  # tokenizers raises bare Exception
        raise ModelError(f"{path} is not a readable tokenizer.json ({error})") from error
    if "eos_token" in special_tokens:
        token_id: int | None = tokenizer.token_to_id(special_tokens["eos_token"])
        if token_id is not None:
            return token_id
    stored = config.get("eos_token_id")
    if isinstance(stored, list):  # Llama 3: the first ends a text, the others a turn
        stored = stored[0] if stored else None
    return stored if isinstance(stored, int) else None
