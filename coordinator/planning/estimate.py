"""A device's part without measurements: as the settings state it, else an estimate. Pure.

`memory_bytes` follows from the model's shapes alone; a device that measured itself is planned by
`coordinator.planning.planner`, whose bytes are measured ones.
"""

from __future__ import annotations

import math

from coordinator.planning.device_plan import DevicePlan, adapted
from coordinator.settings import DeviceTerms
from shared.architecture import ModelArchitecture
from shared.costs import BYTES_PER_PARAMETER
from shared.errors import PlanError
from shared.protocol.messages import DeviceId
from shared.protocol.tensors import ITEM_BYTES
from shared.terms import TrainingTerms

RUNTIME_BYTES = 300 * 2**20
"""What Python, torch and the connection take before any weight is loaded (CPU)."""

SAVED_PER_BLOCK = 34
"""Values that one block keeps for its backward pass, per token and hidden feature (*ours*:
two norms, q k v, attention output, the two halves of the feed-forward, the residual sums)."""

DEFAULT_SHARE = 4
"""Without a limit a device takes one block of this many."""


def plan_device(
    device: DeviceId,
    terms: DeviceTerms,
    *,
    architecture: ModelArchitecture,
    training: TrainingTerms,
    declared_limit_bytes: int | None,
) -> DevicePlan:
    """Return the part of one device: as stated, else the largest that its memory limit allows.

    ``declared_limit_bytes`` is the device's own word; the smaller of it and the settings' holds.

    Raises:
        PlanError: the stated split layer or a rank is out of range, a target module does not
            exist, or not even one block fits (with the bytes needed and allowed).
    """
    limits = [n for n in (terms.memory_limit_bytes, declared_limit_bytes) if n is not None]
    split_layer = terms.split_layer
    if split_layer is None:
        split_layer = _largest_that_fits(
            device, terms, architecture=architecture, training=training, limits=limits
        )
    architecture.check_split_layer(split_layer)
    ranks, scalings = adapted(terms.lora, architecture, range(split_layer))
    return DevicePlan(
        split_layer=split_layer,
        ranks=ranks,
        scalings=scalings,
        batch=terms.batch,
        micro_batch=terms.micro_batch,
        in_flight=terms.in_flight,
    )


def memory_bytes(
    split_layer: int,
    terms: DeviceTerms,
    *,
    architecture: ModelArchitecture,
    training: TrainingTerms,
) -> int:
    """Estimate what a device needs at ``split_layer``: runtime, base, adapters, activations."""
    item = ITEM_BYTES[training.dtype]
    hidden = architecture.hidden_size
    tokens = terms.micro_batch * terms.in_flight * training.max_length
    block = sum(f[0] * f[1] for f in architecture.linears.values())
    words = architecture.vocab_size * hidden
    has_words = training.labels == "device" and "head" in architecture.head_pieces()
    untied_head = words if has_words and not architecture.classifies else 0
    base = item * (words + untied_head + split_layer * block)
    ranks, _ = adapted(terms.lora, architecture, range(split_layer))
    factors = sum(rank * sum(architecture.features(m)) for m, rank in ranks.items())
    # The residual that a device holds frozen grows from round to round, at most to full rank.
    frozen = sum(ITEM_BYTES["float32"] * math.prod(architecture.features(m)) for m in ranks)
    saved = item * tokens * hidden * SAVED_PER_BLOCK * split_layer
    return RUNTIME_BYTES + base + BYTES_PER_PARAMETER * factors + frozen + saved


def _largest_that_fits(
    device: DeviceId,
    terms: DeviceTerms,
    *,
    architecture: ModelArchitecture,
    training: TrainingTerms,
    limits: list[int],
) -> int:
    if not limits:
        return max(1, architecture.block_count // DEFAULT_SHARE)
    limit = min(limits)
    for split_layer in range(architecture.block_count, 0, -1):
        needed = memory_bytes(split_layer, terms, architecture=architecture, training=training)
        if needed <= limit:
            return split_layer
    raise PlanError(
        f"{device} may use {limit / 2**20:.0f} MiB, but one block with micro-batches of "
        f"{terms.micro_batch} x {training.max_length} tokens needs about "
        f"{needed / 2**20:.0f} MiB: raise its memory_limit, or lower plan.micro_batch, "
        "plan.in_flight or training.max_length"
    )
