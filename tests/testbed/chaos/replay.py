"""The same run once more, with nobody to disturb it: over the same accepted contributions.

One process, one thread, no network: the coordinator's own `GlobalModel` and `ServerTrainer`, the
agents' own backends, tokenizer and order of sequences, in order of names. It knows only what the
books say (`ledger`), and comes to an update that the disturbed run must agree with.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from coordinator import run_folder
from coordinator.aggregation import Contribution
from coordinator.fleet import Fleet
from coordinator.global_model import GlobalModel
from coordinator.handback import HandBack
from coordinator.model_store import ModelStore
from coordinator.planning.device_plan import DevicePlan
from coordinator.registry import Member
from coordinator.wire_adapters import to_wire
from edge_agent import records, wire_adapters
from edge_agent.backends.base import FrontBase, TokenBatch
from edge_agent.backends.torch_backend import TorchBackend
from edge_agent.dataset import Dataset
from edge_agent.tasks import sequences_of
from edge_agent.vocabulary import Vocabulary
from shared.adapters import Array
from shared.protocol.messages import DeviceId, DeviceProfile, SessionId
from tests.support.split_system import SplitSystem, tokens_of
from tests.testbed.chaos.bed import EVALUATION_FRACTION
from tests.testbed.chaos.ledger import AcceptedRound, Share


class MiscountedError(AssertionError):
    """The books do not agree with what the device's own text holds at that place."""


class Replay(SplitSystem):
    """Carries out accepted rounds, one after the other."""

    def __init__(self, outcome: Path, texts: Path, scratch: Path) -> None:
        """Read the run's settings from its folder; ``scratch`` is for pieces of the model."""
        settings = self._settings = run_folder.read_settings(outcome)
        self.training = settings.training_terms
        self._store = ModelStore.open(
            settings.model.name, cache_folder=scratch / "store", training=settings.training
        )
        self._architecture = self._store.architecture
        self.blocks = self._architecture.block_count
        self.model = GlobalModel(settings, self._store, self._architecture)
        self._fleet = Fleet(settings, self._architecture)
        self._texts = texts
        self._files = self._written_pieces(scratch)
        self._data: dict[str, Dataset] = {}
        self.devices: dict[str, TorchBackend] = {}
        self.split_layers: dict[str, int] = {}

    def run(self, rounds: Sequence[AcceptedRound]) -> Mapping[str, Array]:
        """Return the dense update of every module, (out, in), after these rounds."""
        for accepted in rounds:
            self._round(accepted)
        return {module: one.total.delta_OI() for module, one in self.model.update.items()}

    @property
    def server(self):
        return self.model.trainer

    def _round(self, accepted: AcceptedRound) -> None:
        shares = dict(sorted(accepted.shares.items()))
        self.split_layers = {device: one.plan.split_layer for device, one in shares.items()}
        members = [_member(device, one.plan) for device, one in shares.items()]
        handed = self.model.start_round(
            accepted.number, members, server_ranks=self._fleet.server_ranks
        )
        self.devices = {device: self._backend(device, handed) for device in shares}
        for step in range(accepted.first_step, accepted.end_step):
            self.step(
                step,
                {
                    device: self._batches(device, share, step, step - accepted.first_step)
                    for device, share in shares.items()
                    if step in share.tokens
                },
            )
        self.model.finish_round(
            [self._contribution(device, one) for device, one in shares.items() if one.tokens]
        )

    def _batches(self, device: str, share: Share, step: int, number: int) -> Sequence[TokenBatch]:
        batches = self._dataset(device).micro_batches(
            share.position + number * share.plan.batch,
            batch=share.plan.batch,
            micro_batch=share.plan.micro_batch,
        )
        if tokens_of(batches) != share.tokens[step]:
            raise MiscountedError(
                f"step {step}: {device} has {tokens_of(batches)} target tokens there, "
                f"and {share.tokens[step]} were counted"
            )
        return batches

    def _contribution(self, device: str, share: Share) -> Contribution:
        return Contribution(
            device=device,
            split_layer=share.plan.split_layer,
            target_tokens=sum(share.tokens.values()),
            adapters=self.devices[device].adapters() if share.delivered else None,
        )

    # --- parts --------------------------------------------------------------------------------

    def _backend(self, device: str, handed: HandBack) -> TorchBackend:
        """Return a new one: every module of a front has another holder, so all is handed back."""
        backend = TorchBackend("cpu")
        split_layer = self.split_layers[device]
        pieces = self._architecture.front_pieces(
            split_layer, head_on_device=self.training.labels == "device"
        )
        files = {name: self._files[name] for name in pieces}
        backend.load(
            FrontBase(self._store.describe().config_json, files, split_layer),
            device_id=DeviceId(device),
            training=self.training,
            lora=self._settings.lora,
            optimizer=self._settings.optimizer,
        )
        held = wire_adapters.from_wire(to_wire(handed.adapters_of(device)))
        backend.set_adapters(held, fold=handed.fold)
        return backend

    def _dataset(self, device: str) -> Dataset:
        if device not in self._data:
            text = records.load(
                self._texts / f"{device}.jsonl",
                evaluation_data=None,
                evaluation_fraction=EVALUATION_FRACTION,
            )
            training = sequences_of(
                text.training,
                Vocabulary(self._files["tokenizer"], self._store.describe()),
                training=self.training,
                architecture=self._architecture,
            )
            self._data[device] = Dataset(
                training=training,
                held_out=None,
                seed=self.training.seed,
                device_id=DeviceId(device),
            )
        return self._data[device]

    def _written_pieces(self, folder: Path) -> dict[str, Path]:
        files = {}
        for piece in self._store.describe().pieces:
            files[piece.name] = folder / piece.name
            data = self._store.read(piece.sha256, offset=0, length=piece.size_bytes)
            files[piece.name].write_bytes(data)
        return files


def _member(device: str, plan: DevicePlan) -> Member:
    profile = DeviceProfile(
        backend="torch", hsplit_version="0", sequences=1, evaluation_sequences=0
    )
    member = Member(DeviceId(device), SessionId("0" * 16), profile, 0.0, 0.0)
    member.plan = plan
    return member
