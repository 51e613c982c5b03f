"""A random Llama whose blocks weigh enough to be seen in a process's memory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import transformers

from tests.support.vocabularies import EOS, byte_level

BLOCKS = 8
HIDDEN = 448
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}\n{% endfor %}"
)


def write(folder: Path) -> Path:
    """Write it as a Hugging Face folder: untied head, small vocabulary, a chat template."""
    tokenizer = byte_level()
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=HIDDEN,
        intermediate_size=4 * HIDDEN,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    texts = {"eos_token": EOS, "chat_template": CHAT_TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(texts))
    return folder


def block_bytes() -> int:
    """Return the bytes of one block: four attention and three feed-forward matrices, float32."""
    return 4 * (4 * HIDDEN**2 + 3 * HIDDEN * 4 * HIDDEN)
