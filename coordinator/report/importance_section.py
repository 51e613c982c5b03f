"""What the page shows of the weights: how much each matters, and the rank that it was given."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from coordinator.report import derived
from coordinator.report.charts import PALETTE, Chart, Grid, Key, Line, Scale
from coordinator.report.drawing import grid_chart, line_chart
from coordinator.report.page import Section
from coordinator.report.records import RunRecords
from coordinator.report.sections import drawn


def importance(records: RunRecords) -> Section:
    """Return the importance of each module, and beside it the rank that it was given."""
    scores = {
        module: score
        for module, score in (records.importance[-1].scores if records.importance else {}).items()
        if score is not None
    }
    ranks = derived.mean_ranks(records.plans[-1]) if records.plans else {}
    modules = (*scores, *ranks)
    return Section(
        title="Importance and ranks",
        text="" if scores else "The importance of weights was not measured in this run.",
        charts=drawn(
            _block_chart("Importance", scores, modules, log=True),
            _block_chart("Rank, the mean over who holds a copy", ranks, modules),
            _importance_over_time(records),
        ),
    )


def _block_chart(
    title: str, of: Mapping[str, float], modules: Sequence[str], *, log: bool = False
) -> Chart | None:
    placed = derived.block_map(of, modules)
    columns = [str(block) for block in placed.blocks]
    grid = Grid(rows=placed.kinds, columns=columns, values_RC=placed.values_KB, x="block", log=log)
    return grid_chart(title, grid)


def _importance_over_time(records: RunRecords) -> Chart | None:
    """Return the mean over blocks of each kind of module, where it was measured repeatedly."""
    if len(records.importance) < 2:
        return None
    means: dict[str, list[tuple[int, float]]] = {}
    for line in records.importance:
        known = {module: score for module, score in line.scores.items() if score is not None}
        placed = derived.block_map(known, known)
        for kind, row_B in zip(placed.kinds, placed.values_KB, strict=True):
            means.setdefault(kind, []).append((line.step, float(np.nanmean(row_B))))
    lines = [
        Line(xs=[x for x, _ in pairs], ys=[y for _, y in pairs], key=Key(kind, colour))
        for (kind, pairs), colour in zip(means.items(), PALETTE, strict=False)
    ]
    everything = [y for line in lines for y in line.ys]
    log = min(everything, default=0) > 0 and max(everything) > 30 * min(everything)
    scale = Scale(x="optimizer steps", y="mean over blocks", log=log)
    return line_chart("Importance by kind of module", lines, scale=scale)
