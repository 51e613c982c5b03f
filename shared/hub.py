"""Fetching files of a model from the Hugging Face hub, with errors that say what to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shared.errors import ConfigError, ModelError


def is_hub_name(name: str) -> bool:
    """Tell whether ``name`` could be a model's on the hub, and not only a path."""
    return not name.startswith((".", "/", "~")) and name.count("/") <= 1


def fetch(name: str, *, files: Sequence[str], revision: str | None, setting: str) -> Path:
    """Return the folder of a model's snapshot, in which those of ``files`` lie that it has.

    ``files`` may be patterns; ``setting``: where the name was given. The hub's own settings
    hold: ``HF_HOME``, ``HF_TOKEN``, and with ``HF_HUB_OFFLINE=1`` only what is in its cache.

    Raises:
        ModelError: it is not there, not allowed, or there is no way to the hub.
        ConfigError: the hub's library is not installed.
    """
    try:
        # Inside the function: a device that gets its model from a coordinator needs none of it.
        import huggingface_hub  # noqa: PLC0415
        from huggingface_hub import errors as hub_errors  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{setting} {name} is no folder here, and to fetch it from the hub {error.name} is "
            "needed: pip install huggingface-hub, or give a folder"
        ) from error
    at = f"model {name}" + (f" at revision {revision}" if revision else "")
    try:
        return Path(
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=list(files))
        )
    except hub_errors.HFValidationError as error:
        raise ModelError(f"{at}: neither a folder here nor a possible hub name") from error
    except hub_errors.GatedRepoError as error:
        raise ModelError(
            f"{at}: its licence must be accepted on the hub's page first; then set HF_TOKEN"
        ) from error
    except hub_errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"{at}: the hub knows no such model, or it is private; check {setting}, or set HF_TOKEN"
        ) from error
    except hub_errors.RevisionNotFoundError as error:
        raise ModelError(f"{at}: no such revision; check model.revision") from error
    except (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled) as error:
        raise ModelError(
            f"{at}: no such folder here, not in the hub's cache, and the hub cannot be reached "
            f"(or HF_HUB_OFFLINE is set); check {setting}, or give a folder"
        ) from error
    except OSError as error:  # all of the hub's HTTP errors, and a full disk
        raise ModelError(f"{at}: could not be fetched from the hub: {error}") from error
