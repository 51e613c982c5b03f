"""Graphs in a folder on this machine's disk, for a backend that computes with them.

In a run a device gets its graphs from the coordinator; this is for measuring without a run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from edge_agent.backends import chosen_backend
from edge_agent.local_model import LocalModel
from edge_agent.settings import ProfileSettings
from shared.errors import ConfigError
from shared.graphs import graph_names
from shared.probe_loads import MOST_BLOCKS

COMMAND = "hsplit-coordinator graphs"


def graphs_of(settings: ProfileSettings, model: LocalModel | None) -> Mapping[str, Path]:
    """Return the file of each graph that measuring ``model`` takes; none where it takes none.

    Raises:
        ConfigError: they are needed and not given, or not all are there, or the other way round.
    """
    if settings.graphs is not None and model is None:
        raise ConfigError("--graphs are those of a model: add --model")
    if model is None:
        return {}
    if chosen_backend(settings.backend) == "onnx":
        return _files(_folder(settings), model, settings)
    if settings.graphs is not None:
        raise ConfigError(
            "--graphs are for backend onnx, but what computes here is torch: add --backend onnx, "
            "or leave --graphs out"
        )
    return {}


def _folder(settings: ProfileSettings) -> Path:
    if settings.graphs is None:
        raise ConfigError(
            "backend onnx computes with graphs of the model, and there are none without a run: "
            f"make them where hsplit[coordinator] is installed, `{COMMAND} {settings.model} --out "
            "FOLDER`, and add --graphs FOLDER. Without them leave --model out: an agent "
            "measures itself with a run's graphs when it joins one. Torch needs none "
            "(--backend torch)"
        )
    return settings.graphs


def _files(folder: Path, model: LocalModel, settings: ProfileSettings) -> Mapping[str, Path]:
    names = graph_names(
        json.loads(model.config_json),
        blocks=range(min(MOST_BLOCKS, model.architecture.block_count)),
        head_on_device=settings.labels == "device",
    )
    files = {name: folder / f"{name}.onnx" for name in names}
    missing = [path.name for path in files.values() if not path.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ConfigError(
            f"--graphs {folder} lacks {missing[0]}{more}, which {model.name} with --labels "
            f"{settings.labels} needs: run `{COMMAND} {settings.model} --labels "
            f"{settings.labels} --out {folder}`"
        )
    return files
