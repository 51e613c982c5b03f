"""Small tokenizers, made in memory, and the model descriptions that go with them."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from shared.protocol.messages import ModelDescription

CORPUS = (
    "name : The Eagle | Type : coffee shop -> The Eagle is a coffee shop . "
    "<|user|> What is it ? <|assistant|> It is a coffee shop near Café Adriatic , 5 stars ."
)
EOS, BOS = "<|end|>", "<|begin|>"


def byte_level(*, begin_of_text: bool = False, words: int = 320) -> Tokenizer:
    """Return a byte-level BPE that knows every text; with ``begin_of_text`` it adds `BOS`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=words,
        special_tokens=[EOS, BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([CORPUS] * 4, trainer)
    if begin_of_text:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A {EOS}",
            special_tokens=[(EOS, 0), (BOS, 1)],
        )
    return tokenizer


def word_boundary() -> Tokenizer:
    """Return a word tokenizer that, as SentencePiece does, marks the beginning of every text."""
    words = ["<unk>", "▁a", "▁b", "▁c", "▁", "▁ab"]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    return tokenizer


def merging() -> Tokenizer:
    """Return a tokenizer that makes one token of "ab" wherever it stands."""
    vocabulary = {"a": 0, "b": 1, "ab": 2, "c": 3}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"\n"), "isolated")
    return tokenizer


def described(
    *, chat_template: str | None = None, eos_token_id: int | None = 0, vocab_size: int = 320
) -> ModelDescription:
    """Return a model's description without pieces."""
    return ModelDescription(
        name="tiny",
        config_json=json.dumps({"model_type": "gpt2", "vocab_size": vocab_size}),
        pieces=(),
        chat_template=chat_template,
        eos_token_id=eos_token_id,
        special_tokens={"eos_token": EOS, "bos_token": BOS},
    )


def saved(tokenizer: Tokenizer, folder: Path) -> Path:
    """Write ``tokenizer.json`` into ``folder`` and return its path."""
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path
