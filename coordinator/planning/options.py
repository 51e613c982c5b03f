"""What a device could do, and what each of it costs. Pure.

Many devices at once: a fleet of thousands is a few operations on large arrays.

Shape suffixes: F devices, K split layers, M micro-batch sizes, O options (of K x M those that
are possible), Y batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from coordinator.planning.conditions import FleetDevice
from coordinator.planning.cost_book import CostBook
from coordinator.planning.cost_model import Numbers, Stages, added, stages
from coordinator.planning.exact_allocation import Table
from shared.protocol.messages import DeviceId

Array: TypeAlias = npt.NDArray[np.float64]
Integers: TypeAlias = npt.NDArray[np.int64]

MOST_TIMES_THE_MEAN = 16
"""No device takes more than this many times the batch of its terms."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Options:
    """The parts that one device could take, and what each costs with full micro-batches.

    ``share``: of the adapter parameters that its terms mean. ``least`` to ``most``: sequences it
    may take. ``in_flight_O``: as the terms say, fewer where memory holds no more. ``step_O``:
    seconds of a step with one micro-batch, ``cycle_O`` of each more; ``compute_O``, ``link_O``:
    seconds that one computes here, and is on the link; ``load_O``: what it costs the server.
    """

    device: FleetDevice
    share: float
    least: int
    most: int
    split_layer_O: Integers
    micro_batch_O: Integers
    in_flight_O: Integers
    step_O: Array
    cycle_O: Array
    compute_O: Array
    link_O: Array
    load_O: Array


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Grid:
    """What is possible for devices of equal terms. ``in_flight_FKM`` 0: not possible."""

    devices: Sequence[FleetDevice]
    share: float
    split_layer_K: Integers
    micro_batch_M: Integers
    in_flight_FKM: Integers


def options_of(grid: Grid, book: CostBook, *, keeps_batch: bool) -> dict[DeviceId, Options]:
    """Return the options of those devices for which anything is possible."""
    costs = book.of_all(grid.devices, axes=2)
    cut = book.cuts(grid.devices, grid.split_layer_K, share=grid.share)
    staged = stages(costs, book.server, cut, grid.micro_batch_M)
    shape = grid.in_flight_FKM.shape

    def whole(numbers: Numbers) -> Array:
        return np.broadcast_to(numbers, shape)

    costs_FKM = {
        "step_O": whole(staged.chain_s + staged.optimizer_s),
        "cycle_O": whole(staged.cycle_s(np.maximum(grid.in_flight_FKM, 1))),
        "compute_O": whole(added(staged.compute)),
        "link_O": whole(added(staged.up) + added(staged.down)),
        "load_O": whole(added(staged.server)),
    }
    found: dict[DeviceId, Options] = {}
    for row, device in enumerate(grid.devices):
        k_O, m_O = np.nonzero(grid.in_flight_FKM[row])
        if not len(k_O):
            continue
        batch = device.terms.batch
        stays = keeps_batch or device.terms.batch_is_stated
        found[device.device_id] = Options(
            device=device,
            share=grid.share,
            least=batch if stays else 1,
            most=batch if stays else batch * MOST_TIMES_THE_MEAN,
            split_layer_O=grid.split_layer_K[k_O],
            micro_batch_O=grid.micro_batch_M[m_O],
            in_flight_O=grid.in_flight_FKM[row, k_O, m_O],
            **{name: values[row, k_O, m_O] for name, values in costs_FKM.items()},
        )
    return found


def staged_choice(options: Options, option: int, batch: int, *, book: CostBook) -> Stages:
    """Return the stages of a micro-batch of mean size, with ``batch`` sequences in a step."""
    cut = book.cut(options.device, int(options.split_layer_O[option]), share=options.share)
    micro_batches = -(-batch // int(options.micro_batch_O[option]))
    return stages(book.of(options.device), book.server, cut, batch / micro_batches)


def table(options: Options, book: CostBook, *, most: int) -> Table:
    """Return what each option costs with every number of sequences up to ``most``."""
    batch_Y = np.arange(options.least, min(options.most, most) + 1)
    micro_batches_OY = -(-batch_Y // options.micro_batch_O[:, None])
    split_layer_O1 = options.split_layer_O[:, None]
    staged = stages(
        book.of(options.device),
        book.server,
        book.cut(options.device, split_layer_O1, share=options.share),
        batch_Y / micro_batches_OY,
    )
    seconds_OY = staged.step_s(micro_batches_OY, options.in_flight_O[:, None])
    load_OY = micro_batches_OY * added(staged.server)
    return Table(options.least, np.asarray(seconds_OY), np.asarray(load_OY))
