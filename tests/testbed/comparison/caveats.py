"""What a comparison's figures are, and what they are not, in words."""

from __future__ import annotations

from coordinator.report.page import Section
from tests.testbed.comparison import tables
from tests.testbed.comparison.results import Comparison

_TIME = (
    "Time is emulated: what the devices, links and server of the settings would have taken for the "
    "work that was done. It is no wall-clock time of the machine that ran this."
)
_BYTES = "Bytes are those of all devices, in both directions, since the start."
_SEEDS = (
    "Curves are means over seeds at the same step; shades reach from the least to the largest "
    "seed. With so few seeds, a difference within the shades is no difference."
)
_ERROR = (
    "The aggregation error is how far what devices are handed is from the exact weighted sum of "
    "their updates, over all modules together, in that round."
)
_REFERENCE = (
    "A reference is no competitor: it does what no fleet could, such as training on all data in "
    "one place. It has no traffic, so it is in no chart over bytes."
)
_PREDICTED = "Peak memory is predicted from measured costs; it was not measured in these runs."
_MIXED = "Peak memory is measured in some runs and predicted in others."


def section(comparison: Comparison, target: float) -> Section:
    """Return what a reader has to know; ``target``: the common perplexity."""
    points = [_TIME, _BYTES, _SEEDS, _target(comparison, target), _ERROR]
    if any(run.kind == "reference" for run in comparison.methods):
        points.append(_REFERENCE)
    kinds = {run.peak_memory for run in comparison.methods}
    if "predicted" in kinds:
        points.append(_PREDICTED if kinds == {"predicted"} else _MIXED)
    return Section(title="How to read this", points=points)


def _target(comparison: Comparison, target: float) -> str:
    words = f"The common target is perplexity {tables.perplexity(target)}"
    between = "Between two evaluations, figures are interpolated."
    if "target_perplexity" in comparison.settings:
        return f"{words}, as the settings state it. {between}"
    return (
        f"{words}, the lowest that every seed of every strategy reached, but for strategies that "
        f"hardly learnt: these do not move it, and have no time to it. {between}"
    )
