"""A checkpoint's safetensors files, by byte range: where each tensor of the model lies.

Nothing is loaded; the files are mapped into memory and stay as they are. Pickled checkpoints
are refused, because unpickling runs code.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import safetensors

from shared.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""The dtypes that an unquantised checkpoint holds its weights in."""


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """One tensor in a file: ``stored_name`` there, dtype in safetensors' words, raw bytes.

    ``offset``: where in the file they begin.
    """

    file: Path
    stored_name: str
    dtype: str
    shape: tuple[int, ...]
    data: memoryview = field(repr=False)
    offset: int = 0


def weight_files(folder: Path, wanted: Callable[[str], bool] = lambda _: True) -> tuple[Path, ...]:
    """Return the safetensors files of a model's folder that hold tensors ``wanted``, sorted.

    Raises:
        ModelError: there are none, or the index names one that is not there.
    """
    if (folder / INDEX).is_file():
        return _indexed(folder, wanted)
    if (folder / SINGLE).is_file():
        return (folder / SINGLE,)
    if any(folder.glob("pytorch_model*.bin")):
        raise ModelError(
            f"{folder}: only pickled weights (pytorch_model.bin), which are refused because "
            "opening them runs code; where you trust them, convert them with transformers: "
            "AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    raise ModelError(
        f"{folder}: no model.safetensors and no index of several; is this the model's folder?"
    )


def file_names(folder: Path, wanted: Callable[[str], bool]) -> tuple[str, ...]:
    """Return the names of the files that hold tensors ``wanted``, there or not, sorted.

    Raises:
        ModelError: there is an index, and it is damaged.
    """
    index = folder / INDEX
    if not index.is_file():
        return (SINGLE,)
    try:
        file_of = json.loads(index.read_bytes())["weight_map"]
        return tuple(sorted({str(file) for name, file in file_of.items() if wanted(name)}))
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise ModelError(f"{index} is damaged ({error!r}); fetch the model again") from error


def open_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return every tensor of the files by its stored name; the files stay mapped while it lives.

    Raises:
        ModelError: a file is damaged, or two hold the same tensor.
    """
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        for name, tensor in _open_file(file).items():
            if name in tensors:
                raise ModelError(f"{name} is in {tensors[name].file} and in {file}; remove one")
            tensors[name] = tensor
    return tensors


def in_file_order(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Return the tensors widest first, then by name.

    So the format's own library writes them: every tensor is aligned, and the same tensors
    always give the same bytes.
    """

    def place(name: str) -> tuple[int, str]:
        return -ITEM_BYTES.get(tensors[name].dtype, 1), name

    return {name: tensors[name] for name in sorted(tensors, key=place)}


def header(tensors: Mapping[str, StoredTensor]) -> bytes:
    """Return the beginning of a safetensors file that holds ``tensors``, in their order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in tensors.items():
        end = offset + tensor.data.nbytes
        entries[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the format aligns the data to 8 bytes
    return struct.pack("<Q", len(text)) + text


def _indexed(folder: Path, wanted: Callable[[str], bool]) -> tuple[Path, ...]:
    names = file_names(folder, wanted)
    # Only files of the folder itself: an index may not point at other places of the disk.
    missing = [name for name in names if Path(name).name != name or not _is_file(folder / name)]
    if missing:
        raise ModelError(
            f"{folder / INDEX} names {len(missing)} files that are not in the folder (such as "
            f"{min(missing)}); the model is incomplete, fetch it again"
        )
    return tuple(folder / name for name in names)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long
        return False


def _open_file(file: Path) -> dict[str, StoredTensor]:
    try:
        with safetensors.safe_open(file, framework="np"):
            pass  # checks the header and that it and the file's length agree
        with file.open("rb") as opened:
            data = memoryview(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ))
    except (safetensors.SafetensorError, OSError) as error:
        raise ModelError(f"{file} is damaged ({error}); fetch it again") from error
    (header_bytes,) = struct.unpack("<Q", data[:8])
    entries = json.loads(bytes(data[8 : 8 + header_bytes]))
    entries.pop("__metadata__", None)
    start = 8 + header_bytes
    body = data[start:]
    return {
        name: StoredTensor(
            file,
            name,
            entry["dtype"],
            tuple(entry["shape"]),
            body[slice(*entry["data_offsets"])],
            start + entry["data_offsets"][0],
        )
        for name, entry in entries.items()
    }
