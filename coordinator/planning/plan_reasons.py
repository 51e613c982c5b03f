"""Why a device got the split layer that it got: as data, and in words. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from coordinator.planning.cost_book import CostBook
from coordinator.planning.options import Options

Kind: TypeAlias = Literal[
    "stated", "estimated", "kept", "whole", "capped", "unable", "memory", "server", "speed", "link"
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Reason:
    """What decided a split layer.

    ``kind``: it was ``stated``, ``estimated`` without measurements or ``kept`` as it was; it is the
    ``whole`` model; the settings give no device more (``capped``); the device was ``unable`` to
    prepare more; ``memory`` allows no more; more blocks relieve a busy ``server``; the device's
    own ``speed``, or its ``link``, leaves no time for more. ``allowed``: blocks that memory would
    allow with this ``micro_batch``. ``needed_bytes`` of one block more than that, against
    ``limit_bytes``. ``alone``: the split layer that were best for the device by itself.
    ``share``: of its adapter parameters that found room.
    """

    kind: Kind
    split_layer: int
    micro_batch: int | None = None
    allowed: int | None = None
    needed_bytes: float | None = None
    limit_bytes: int | None = None
    alone: int | None = None
    share: float = 1.0

    def __str__(self) -> str:
        """Return it as a sentence."""
        return f"k = {self.split_layer}: {_words(self)}{_less_rank(self)}"


def reason_of(options: Options, option: int, batch: int, *, book: CostBook) -> Reason:
    """Return why ``option`` was taken, with ``batch`` sequences."""
    split_layer = int(options.split_layer_O[option])
    micro_batch = int(options.micro_batch_O[option])
    same = options.micro_batch_O == micro_batch
    allowed = int(options.split_layer_O[same].max())
    count = -(-batch // micro_batch)
    seconds = options.step_O + (count - 1) * options.cycle_O
    alone = int(options.split_layer_O[same][np.argmin(seconds[same])])
    needed = _needed(options, allowed, micro_batch, book=book)
    kind = _kind(
        options, option, allowed=allowed, alone=alone, needed=needed, blocks=book.server.block_count
    )
    if kind == "unable" and allowed != options.device.most_blocks:
        kind = "capped"
    return Reason(
        kind=kind,
        split_layer=split_layer,
        micro_batch=micro_batch,
        allowed=allowed,
        needed_bytes=needed,
        limit_bytes=options.device.memory_limit_bytes,
        alone=alone,
        share=options.share,
    )


def _kind(
    options: Options, option: int, *, allowed: int, alone: int, needed: float | None, blocks: int
) -> Kind:
    split_layer = int(options.split_layer_O[option])
    if options.device.terms.split_layer is not None:
        return "stated"
    if split_layer == blocks:
        return "whole"
    if split_layer == allowed:
        return "unable" if needed is None else "memory"
    if split_layer > alone:
        return "server"
    return "link" if options.link_O[option] > options.compute_O[option] else "speed"


def _needed(options: Options, allowed: int, micro_batch: int, *, book: CostBook) -> float | None:
    """Return the bytes of one block more than allowed; None where bytes are not the reason."""
    device = options.device
    if allowed in (book.server.block_count, book.most_blocks, device.most_blocks):
        return None
    if device.memory_limit_bytes is None:
        return None
    cut = book.cut(device, allowed + 1, share=options.share)
    return float(book.of(device).memory_bytes(cut, micro_batch, at_once=1))


def _gib(size: float | None) -> str:
    size = size or 0.0
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.0f} MiB"


def _room(reason: Reason) -> str:
    if reason.needed_bytes is None:
        return f"{reason.allowed} are allowed"
    return f"memory allows {reason.allowed} ({_beyond(reason)})"


def _beyond(reason: Reason) -> str:
    needed, limit = _gib(reason.needed_bytes), _gib(reason.limit_bytes)
    blocks = f"{(reason.allowed or 0) + 1} with micro-batches of {reason.micro_batch}"
    return f"{blocks} would need {needed} of {limit}"


def _words(reason: Reason) -> str:
    memory = "" if reason.allowed is None else _room(reason)
    return {
        "stated": "as the settings say",
        "estimated": "estimated from the model's shapes, because it measured nothing",
        "kept": "as it has",
        "whole": "it holds the whole model",
        "capped": "no device gets more (plan.most_blocks)",
        "unable": "it could not prepare more",
        "memory": f"memory allows no more ({_beyond(reason)})",
        "server": f"{memory}; alone {reason.alone} would be faster, but the server is busy",
        "speed": f"{memory}, but its own speed makes {reason.split_layer} faster",
        "link": f"{memory}, but the link makes {reason.split_layer} faster",
    }[reason.kind]


def _less_rank(reason: Reason) -> str:
    return "" if reason.share == 1.0 else f"; ranks cut to {reason.share:.1%} to fit"
