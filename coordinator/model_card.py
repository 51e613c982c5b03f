"""The README.md of an exported adapter: what it was trained from, how, by whom, and how well."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from shared.terms import HandBackMode, LabelMode

_CODE = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```"""

_CLASSIFIER_CODE = """```python
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

base = AutoModelForSequenceClassification.from_pretrained("{base}", num_labels={count})
model = PeftModel.from_pretrained(base, "path/to/this/folder")
```

The classes are, from 0 on: {classes}. In batches a decoder also needs `pad_token_id` in its
config: a token that ends no text, for Hugging Face looks for the last that is another one."""

_LABELS = {
    "device": "so did its labels",
    "server": "its labels, {what}, went to the server",
}

_HAND_BACK = {
    "residual": "exact, residual hand-back (what a device's rank cannot train is carried frozen)",
    "merge": "exact, merge hand-back (the update is folded into the base after every round)",
    "svd": "svd hand-back (a device goes on from the top part of the exact sum)",
    "zero-pad": "factors averaged, padded to the largest rank, and cut to a device's own",
    "average": "factors averaged, A and B apart",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CardDevice:
    """One row of the card's table; ``ranks`` the different LoRA ranks the device trained."""

    device: str
    split_layer: int
    ranks: Sequence[int]
    target_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """What is known of a run when its adapter is exported; None where it is not known.

    ``int8_blocks``: of so many blocks of the base, the run rounded the weights to 8 bits.
    """

    base_model: str
    run_id: str
    strategy: str
    hand_back: HandBackMode
    labels: LabelMode
    rounds: int
    steps: int
    devices: Sequence[CardDevice]
    base_licence: str | None = None
    perplexity_before: float | None = None
    perplexity_after: float | None = None
    classes: Sequence[str] = ()
    int8_blocks: int = 0
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    f1_before: float | None = None
    f1_after: float | None = None


def render(card: ModelCard, *, largest_rank: int) -> str:
    """Return the card as Markdown with Hugging Face's YAML header."""
    what = "the classes of its texts" if card.classes else "which are its token ids"
    licence = card.base_licence or "not known: look it up before you share this adapter"
    return "\n".join(
        (
            "---",
            yaml.safe_dump(_header(card), sort_keys=False).rstrip(),
            "---",
            "",
            f"# LoRA adapter of run {card.run_id}",
            "",
            f"Fine-tuned from **{card.base_model}** (licence: {licence}) with hsplit: split",
            f"learning with LoRA on unequal devices (strategy {card.strategy}). The text",
            f"stayed on the devices, and {_LABELS[card.labels].format(what=what)}.",
            "",
            f"* {card.rounds} rounds, {card.steps} steps; aggregation:",
            f"  {_HAND_BACK[card.hand_back]}",
            *_held_out(card),
            f"* rank of this adapter: up to {largest_rank}, each module's own in `rank_pattern`;",
            "  scaling 1 throughout",
            *_int8(card.int8_blocks),
            "",
            *_table(card.devices),
            "",
            _code(card),
            "",
        )
    )


def _int8(blocks: int) -> tuple[str, ...]:
    if not blocks:
        return ()
    return (
        f"* trained on the base with the linear weights of its first {blocks} blocks rounded to 8",
        "  bits (`training.int8_blocks`): what is said above is of that model, which is what",
        "  `hsplit-coordinator export --merged` writes; the plain base acts a little otherwise",
    )


def _held_out(card: ModelCard) -> tuple[str, ...]:
    if not card.classes:
        before, after = _number(card.perplexity_before), _number(card.perplexity_after)
        return (f"* perplexity on held-out text: {before} before, {after} after",)
    return tuple(
        f"* {name} on held-out texts: {_percent(before)} before, {_percent(after)} after"
        for name, before, after in (
            ("accuracy", card.accuracy_before, card.accuracy_after),
            ("F1", card.f1_before, card.f1_after),
        )
    )


def _code(card: ModelCard) -> str:
    if not card.classes:
        return _CODE.format(base=card.base_model)
    classes = ", ".join(card.classes)
    return _CLASSIFIER_CODE.format(base=card.base_model, count=len(card.classes), classes=classes)


def _header(card: ModelCard) -> dict[str, Any]:
    header: dict[str, Any] = {"base_model": card.base_model}
    if card.base_licence:
        header["license"] = card.base_licence
    header["library_name"] = "peft"
    header["pipeline_tag"] = "text-classification" if card.classes else "text-generation"
    header["tags"] = ["lora", "hsplit", "split-learning", "federated-learning", "peft"]
    return header


def _table(devices: Sequence[CardDevice]) -> tuple[str, ...]:
    return (
        "| device | split layer | ranks | target tokens |",
        "|---|---|---|---|",
        *(
            f"| {one.device} | {one.split_layer} | {', '.join(map(str, sorted(set(one.ranks))))} "
            f"| {one.target_tokens} |"
            for one in devices
        ),
    )


def _number(perplexity: float | None) -> str:
    return "not measured" if perplexity is None else f"{perplexity:.2f}"


def _percent(score: float | None) -> str:
    return "not measured" if score is None else f"{score:.1%}"
