"""Checkpoint folders as lazy tensors, and lazy tensors as checkpoint folders."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor

from megavlm.checkpoint.lazy import LazyTensor, Tensors, read_by
from megavlm.checkpoint.storage import file_name, write_state
from megavlm.checkpoint.tensor_file import (
    NAMES,
    Entry,
    read_header,
    read_tensor,
    tensor_bytes,
    write_tensors,
)
from megavlm.errors import CheckpointError, MegavlmError
from megavlm.files.folder import Folder, sync

CONFIG_FILE = "config.json"


@contextmanager
def about(folder: Folder) -> Iterator[None]:
    """Errors name the folder; a value of the wrong kind in one of its JSON files is one of them."""
    try:
        yield
    except MegavlmError as error:
        said = str(error)
        if f"{folder}/" in said or said.startswith((f"{folder} ", f"checkpoint {folder} ")):
            raise
        raise type(error)(f"{folder}: {said}") from error
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,  # pydantic's, too
    ) as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise CheckpointError(
            f"{folder} holds a value that cannot be one of a model ({said}); mend its JSON files, "
            "or copy them again"
        ) from error


def read_json(folder: Folder, name: str) -> dict[str, Any]:
    """A JSON object of a folder; raises CheckpointError when it is missing or is none."""
    try:
        content = json.loads(folder.read(name))
    except (RecursionError, ValueError) as error:
        raise CheckpointError(f"cannot read {folder}/{name}: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{folder}/{name} must hold a JSON object")
    return cast(dict[str, Any], content)


def preprocessor(folder: Folder) -> dict[str, Any]:
    """How a Hugging Face folder prepares pictures; empty if it does not say."""
    name = "preprocessor_config.json"
    return read_json(folder, name) if folder.has(name) else {}


def hugging_face_tensors(folder: Folder) -> dict[str, LazyTensor]:
    """The tensors of a Hugging Face folder of safetensors, sharded or not, by their names there.

    Raises CheckpointError for other files: those of torch can run code.
    """
    names = folder.names()
    if "model.safetensors.index.json" in names:
        index = read_json(folder, "model.safetensors.index.json").get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(n, str) for n in index.values()):
            raise CheckpointError(
                f"{folder}/model.safetensors.index.json must have the name of a file for each "
                "tensor under 'weight_map'; copy it again"
            )
        files = sorted(set(index.values()))
    else:
        index, files = None, [name for name in names if name.endswith(".safetensors")]
    if not files:
        found = [name for name in names if name.endswith((".bin", ".pt", ".pth"))]
        remedy = (
            f"; save {found[0]} as safetensors first (`model.save_pretrained` does)"
            if found
            else ""
        )
        raise CheckpointError(f"{folder} holds no safetensors files{remedy}")
    tensors: dict[str, LazyTensor] = {}
    for name in files:
        if name not in names:
            raise CheckpointError(f"{folder} lacks the file {name} of its index")
        for tensor, lazy in _file_tensors(folder, name).items():
            if index is not None and index.get(tensor) != name:
                raise CheckpointError(f"{folder}/{name} holds {tensor} against the index")
            tensors[tensor] = lazy
    if index is not None and len(index) != len(tensors):
        missing = sorted(index.keys() - tensors.keys())
        raise CheckpointError(f"{folder} lacks {missing[0]} ({len(missing)} tensors) of its index")
    return tensors


def _file_tensors(folder: Folder, name: str) -> dict[str, LazyTensor]:
    with folder.open(name, "rb") as file:
        entries = read_header(file, folder.size(name), f"{folder}/{name}")

    def read(entry: Entry) -> Tensor:
        with folder.open(name, "rb") as file:
            return read_tensor(file, entry)

    return {
        tensor: LazyTensor(entry.shape, entry.dtype, lambda entry=entry: read(entry))
        for tensor, entry in entries.items()
    }


def write_hugging_face(
    folder: Folder, tensors: Tensors, config: Mapping[str, Any], max_file_bytes: int
) -> None:
    """Write a folder that `from_pretrained` reads; its config.json, last, makes it one."""
    parts = divided(tensors, max_file_bytes)
    weight_map: dict[str, str] = {}
    for number, part in enumerate(parts, start=1):
        name = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        if len(parts) == 1:
            name = "model.safetensors"
        _write_file(folder, name, part)
        weight_map |= dict.fromkeys(part, name)
    if len(parts) > 1:
        total = sum(tensor_bytes(t.shape, t.dtype) for t in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(folder, "model.safetensors.index.json", index)
    text = config.get("text_config", config)
    tokens = {name: text[name] for name in text if name in _GENERATION and text[name] is not None}
    if tokens:
        write_json(folder, "generation_config.json", {**tokens, "do_sample": False})
    dtypes = {str(t.dtype).removeprefix("torch.") for t in tensors.values()}
    write_json(folder, CONFIG_FILE, {**config, "dtype": dtypes.pop() if len(dtypes) == 1 else None})


_GENERATION = ("bos_token_id", "eos_token_id", "pad_token_id")


def write_native(
    folder: Folder, tensors: Tensors, state: dict[str, Any], max_file_bytes: int
) -> None:
    """Write a checkpoint of ours, by the keys that it has there; its state.json makes it one."""
    parts = divided(tensors, max_file_bytes)
    files: dict[str, Any] = {}
    for number, part in enumerate(parts, start=1):
        name = file_name(number, len(parts))
        digest, size = _write_file(folder, name, part)
        files[name] = {"sha256": digest, "bytes": size}
    listed = {
        name: {"dtype": NAMES[t.dtype], "shape": list(t.shape)}
        for name, t in sorted(tensors.items())
    }
    write_state(folder, {**state, "files": files, "tensors": listed})


def write_json(folder: Folder, name: str, content: Any) -> None:
    """Write a JSON file, whole or not at all."""
    folder.write_atomically(name, json.dumps(content, indent=1).encode())


def divided(tensors: Tensors, max_file_bytes: int) -> list[dict[str, LazyTensor]]:
    """Tensors in order, as files of at most so many bytes, or of one larger tensor, hold them."""
    files: list[dict[str, LazyTensor]] = [{}]
    used = 0
    for name, tensor in tensors.items():
        size = tensor_bytes(tensor.shape, tensor.dtype)
        if files[-1] and used + size > max_file_bytes:
            files.append({})
            used = 0
        files[-1][name] = tensor
        used += size
    return files


def _write_file(folder: Folder, name: str, tensors: Tensors) -> tuple[str, int]:
    with folder.open(name, "wb") as file:
        written = write_tensors(file, tensors, {"format": "pt"})
        sync(file)
    return written


def remembering(tensors: Tensors) -> dict[str, LazyTensor]:
    """The same tensors; one that is read several times in a row is read once."""
    last: dict[str, Tensor] = {}

    def read(name: str) -> Tensor:
        if name not in last:
            last.clear()
            last[name] = tensors[name].read()
        return last[name]

    return read_by(read, tensors)
