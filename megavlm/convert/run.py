"""`megavlm convert`: from any format to any other by way of our own names, tensor by tensor."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from megavlm.checkpoint.folder import Folder
from megavlm.checkpoint.lazy import LazyTensor, Tensors
from megavlm.checkpoint.state import checkpoint_state
from megavlm.checkpoint.storage import STATE_FILE, CheckpointReader
from megavlm.checkpoint.store import check_files, lazy_tensors
from megavlm.checkpoint.tensor_file import tensor_bytes
from megavlm.config.run import RunSettings
from megavlm.config.sizes import DecoderSizes, EncoderSizes, ModelSizes
from megavlm.convert import deepspeed, llama, megatron, mllama, towers
from megavlm.convert.certificate import CERTIFICATE_FILE, Record, check_against, read_certificate
from megavlm.convert.files import (
    CONFIG_FILE,
    hugging_face_tensors,
    mixed,
    preprocessor,
    read_json,
    remembering,
    write_hugging_face,
    write_json,
    write_native,
)
from megavlm.convert.names import BESIDE, SMALLEST_ENCODER, Sizes, cast
from megavlm.data.shards import ShardFolder
from megavlm.data.tokenizer import Tokenizer
from megavlm.errors import CheckpointError, ConfigError
from megavlm.planner.cut import with_cut

Kind = Literal["native", "mllama", "llama", "tower", "zero3", "universal", "megatron"]
TARGETS: tuple[Kind, ...] = ("native", "mllama", "llama", "megatron")
POINTERS: dict[Kind, str] = {
    "universal": "latest_universal",
    "zero3": "latest",
    "megatron": "latest_checkpointed_iteration.txt",
}
"""Files that name the newest checkpoint in folders of DeepSpeed and Megatron-LM."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What to convert into what."""

    sources: tuple[str, ...]
    """Paths or URLs of checkpoints; several are merged."""
    out: str
    to: Kind | None = None
    """None: ours from other formats, and Mllama from ours."""
    decoder_only: bool = False
    """Take the language half of an Mllama alone."""
    dtype: Literal["fp32", "bf16"] | None = None
    """None keeps every tensor's own."""
    weights_only: bool = False
    """Leave the optimiser's moments out, where there are any."""
    ema_decay: float | None = None
    """Weigh each merged checkpoint so much less than the one after it; None: alike."""
    compare: bool = True
    """Run both models on the same inputs, if one is Hugging Face's and they fit into memory."""
    max_file_bytes: int = 5_000_000_000
    run: RunSettings | None = None
    """The run that a checkpoint without sizes, or a decoder, is for; and the layout of shards."""


@dataclass(frozen=True, kw_only=True)
class Model:
    """A checkpoint of any origin, in our terms."""

    weights: Tensors
    """By the ledger's names, and what is kept beside them."""
    moments: Tensors
    """By `exp_avg/NAME` and `exp_avg_sq/NAME`."""
    sizes: Sizes
    state: dict[str, Any]
    """What a checkpoint of ours says of its run, beside the tensors."""
    dropped: tuple[str, ...] = ()


def convert(conversion: Conversion) -> dict[str, Any]:
    """Convert, and return the certificate, which lies in the new folder, too.

    Memory is bounded by a few of the largest tensors. Raises ConfigError and CheckpointError for
    what cannot be converted, before anything is written as far as shapes and names tell.
    """
    out = Folder(conversion.out)
    if out.names():
        raise CheckpointError(f"{out} is not empty; choose another folder, or delete it")
    sources = [Folder(place) for place in conversion.sources]
    kinds: list[Kind] = [kind_of(folder) for folder in sources]
    to: Kind = conversion.to or ("mllama" if kinds[0] == "native" else "native")
    if to == "megatron":
        _needed(conversion.run, to)
    with _progress() as progress:
        records: list[Record] = []
        models: list[Model] = []
        for folder, kind in zip(sources, kinds, strict=True):
            tensors, step = _tensors(kind, folder, conversion.run, progress)
            records.append(Record.of(tensors))
            remembered = remembering(records[-1].tensors)
            models.append(_in_our_terms(kind, folder, remembered, step, conversion))
        model = _prepared(models, conversion)
        config, targets = _out_of_our_terms(model, to)
        total = sum(tensor_bytes(t.shape, t.dtype) for t in targets.values())
        written = Record.of(targets, progress("converting", total))
        _write(to, out, written.tensors, model, config, conversion)
    certificate = {
        "sources": [
            {"place": str(folder), "kind": kind, **record.summary()}
            for folder, kind, record in zip(sources, kinds, records, strict=True)
        ],
        "target": {"kind": to, **written.summary()},
        "unchanged": _unchanged(records[0], written) if len(records) == 1 else 0,
        "model": model.sizes,
        "left_out": list(model.dropped),
        "comparison": _comparison(kinds, sources, to, out, model, conversion),
    }
    write_json(out, CERTIFICATE_FILE, certificate)
    return certificate


def verify(place: str, run: RunSettings | None) -> list[str]:
    """Check a converted folder, and its sources where they still are, by its certificate.

    Returns what was done, in lines. Raises CheckpointError, naming the tensor, if it differs.
    """
    out = Folder(place)
    certificate = read_certificate(out)
    lines: list[str] = []
    sides = [(out, certificate["target"])]
    sides += [(Folder(source["place"]), source) for source in certificate["sources"]]
    for folder, side in sides:
        if folder is not out and not folder.names():
            lines.append(f"{folder} is not there any more: not checked")
            continue
        with _progress() as progress:
            tensors, _ = _tensors(side["kind"], folder, run, progress, certificate["model"])
            checked = check_against(side, tensors, folder, progress("checking", side["bytes"]))
        lines.append(f"{folder}: {checked} tensors are as certified")
    return lines


def kind_of(folder: Folder) -> Kind:
    """What a folder holds; raises CheckpointError when it is no checkpoint that we know."""
    names = folder.names()
    if STATE_FILE in names:
        return "native"
    if CONFIG_FILE in names:
        model_type = read_json(folder, CONFIG_FILE).get("model_type")
        if model_type == "mllama":
            return "mllama"
        return "tower" if model_type in towers.FAMILIES else "llama"
    for kind, name in POINTERS.items():
        if name in names:
            return kind
    raise CheckpointError(
        f"{folder} holds neither our state.json nor a config.json of Hugging Face's nor the files "
        "of DeepSpeed or Megatron-LM; is it the checkpoint's own folder?"
    )


def _tensors(
    kind: Kind,
    folder: Folder,
    run: RunSettings | None,
    progress: "Start",
    sizes: Sizes | None = None,
) -> tuple[Tensors, int]:
    """A folder's tensors, by the names that its format has, and the step that they are of."""
    match kind:
        case "native":
            reader = CheckpointReader(folder)
            total = sum(file["bytes"] for file in reader.state["files"].values())
            check_files(reader, sorted(reader.state["files"]), progress("checking", total))
            return lazy_tensors(reader), reader.state["step"]
        case "mllama" | "llama" | "tower":
            return hugging_face_tensors(folder), 0
        case "zero3":
            path = _path(folder)
            return deepspeed.zero3_tensors(path, deepspeed.newest(path, "latest"))
        case "universal":
            path = _path(folder)
            return deepspeed.universal_tensors(path, deepspeed.newest(path, "latest_universal"))
        case "megatron":
            model = _model_sizes(sizes) if sizes else _needed(run, kind).model
            path = _path(folder)
            return megatron.megatron_shards(path, megatron.newest(path), model)


def _path(folder: Folder) -> Path:
    if not folder.is_local:
        raise ConfigError(f"{folder}: checkpoints of DeepSpeed and Megatron-LM must lie on a disk")
    return Path(folder.place)


def _in_our_terms(
    kind: Kind, folder: Folder, tensors: Tensors, step: int, conversion: Conversion
) -> Model:
    match kind:
        case "native":
            state = CheckpointReader(folder).state
            return _of_keys(tensors, state["settings"]["model"], state)
        case "mllama":
            config = read_json(folder, CONFIG_FILE)
            decoder = mllama.decoder_sizes_of(config)
            if conversion.decoder_only:
                whole, parts = ModelSizes(encoder=SMALLEST_ENCODER, decoder=decoder), ("decoder",)
            else:
                whole = ModelSizes(encoder=mllama.encoder_sizes_of(config), decoder=decoder)
                parts = mllama.PARTS
            sizes = {part: getattr(whole, part) for part in parts}
            converted = mllama.from_hugging_face(tensors, config, whole, parts)
        case "tower":
            config = read_json(folder, CONFIG_FILE)
            encoder = towers.encoder_sizes_of(config)
            sizes = {"encoder": encoder}
            converted = towers.from_hugging_face(tensors, config, encoder, preprocessor(folder))
        case "llama":
            config = read_json(folder, CONFIG_FILE)
            wanted = _needed(conversion.run, kind).model.decoder
            decoder = llama.decoder_sizes_of(
                config,
                cross_every=wanted.cross_every,
                cross_at=wanted.cross_at,
                vocabulary=wanted.vocabulary,
                initial_gate=wanted.initial_gate,
            )
            sizes = {"decoder": decoder}
            converted = llama.from_hugging_face(tensors, config, decoder)
        case "zero3" | "universal" | "megatron":
            run = _needed(conversion.run, kind)
            state: dict[str, Any] = {"step": step}
            plain = dataclasses.asdict(run.model)
            if kind == "megatron" or conversion.weights_only:
                return _of_keys(tensors, plain, state)
            training = ShardFolder(run.data.train)
            state |= checkpoint_state(run, Tokenizer(run.data.tokenizer), step, training)
            return _of_keys(tensors, plain, state)
    plain = {part: dataclasses.asdict(of_part) for part, of_part in sizes.items()}
    return Model(
        weights=converted.tensors,
        moments={},
        sizes=plain,
        state={"step": 0},
        dropped=converted.dropped,
    )


def _of_keys(tensors: Tensors, sizes: Sizes, state: dict[str, Any]) -> Model:
    """A checkpoint whose keys are `weights/NAME` and so on."""
    weights: dict[str, LazyTensor] = {}
    moments: dict[str, LazyTensor] = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        match kind:
            case "weights":
                weights[name] = tensor
            case "beside":
                weights[BESIDE + name] = tensor
            case _:
                moments[key] = tensor
    return Model(weights=weights, moments=moments, sizes=sizes, state=state)


def _prepared(models: Sequence[Model], conversion: Conversion) -> Model:
    """The one model to write: merged, cast, with or without moments."""
    model = models[0]
    if len(models) > 1:
        decay = 1.0 if conversion.ema_decay is None else conversion.ema_decay
        shares = [decay ** (len(models) - 1 - i) for i in range(len(models))]
        shares = [share / sum(shares) for share in shares]
        for other in models[1:]:
            if other.sizes != model.sizes:
                raise CheckpointError("only checkpoints of one model can be merged")
        merged = mixed([other.weights for other in models], shares)
        model = replace(models[-1], weights=merged, moments={})
    if conversion.dtype is not None:
        weights = cast(model.weights, DTYPES[conversion.dtype])
        model = replace(model, weights=weights, moments={})
    return replace(model, moments={}) if conversion.weights_only else model


def _out_of_our_terms(model: Model, to: Kind) -> tuple[dict[str, Any], Tensors]:
    """The target's configuration, if it has one, and its tensors."""
    match to:
        case "mllama":
            sizes = _model_sizes(model.sizes)
            return mllama.mllama_config(sizes), mllama.to_hugging_face(model.weights, sizes)
        case "llama":
            decoder = DecoderSizes(**model.sizes["decoder"])
            converted = llama.to_hugging_face(model.weights, decoder)
            return llama.llama_config(decoder), converted.tensors
        case "native":
            return {}, {_key(name): t for name, t in model.weights.items()} | dict(model.moments)
        case "megatron":
            weights = {_key(name): t for name, t in model.weights.items()}
            return {}, {key: t for key, t in weights.items() if key.startswith("weights/")}
        case _:
            raise ConfigError(f"--to {to}: converted is to {', '.join(TARGETS)}")


def _key(name: str) -> str:
    if name.startswith(BESIDE):
        return f"beside/{name.removeprefix(BESIDE)}"
    return f"weights/{name}"


def _write(
    to: Kind,
    out: Folder,
    tensors: Tensors,
    model: Model,
    config: dict[str, Any],
    conversion: Conversion,
) -> None:
    out.check_writable()
    match to:
        case "native":
            settings = {"model": model.sizes}
            state = {"settings": settings, "tokenizer_sha256": None, **model.state}
            write_native(out, tensors, state, conversion.max_file_bytes)
        case "megatron":
            run = _needed(conversion.run, to)
            sizes, step = _model_sizes(model.sizes), model.state["step"]
            megatron.write_megatron_shards(tensors, sizes, with_cut(run), _path(out), step)
        case _:
            write_hugging_face(out, tensors, config, conversion.max_file_bytes)


def _comparison(
    kinds: Sequence[Kind],
    sources: Sequence[Folder],
    to: Kind,
    out: Folder,
    model: Model,
    conversion: Conversion,
) -> dict[str, Any]:
    """Computed by Hugging Face's code and ours, if just one side is Hugging Face's."""
    if not conversion.compare:
        return {"compared": False, "reason": "it was not asked for"}
    pairs = [*zip(kinds, sources, strict=True), (to, out)]
    theirs = [pair for pair in pairs if pair[0] in ("mllama", "llama", "tower")]
    if not theirs:
        return {"compared": False, "reason": "both sides are run by our code alone"}
    from megavlm.convert.compare import compared  # megatron-core takes seconds to import

    [(kind, folder)] = theirs
    if kind == "mllama" and conversion.decoder_only:
        return {"compared": False, "reason": "a part of a model computes no logits"}
    weights = {name: t for name, t in model.weights.items() if not name.startswith(BESIDE)}
    return compared(kind, folder, weights, model.sizes)


def _unchanged(read: Record, written: Record) -> int:
    """How many tensors have their name and their bits on both sides."""
    return sum(read.hashes.get(name) == digest for name, digest in written.hashes.items())


def _model_sizes(sizes: Sizes) -> ModelSizes:
    if "encoder" not in sizes or "decoder" not in sizes:
        raise ConfigError(
            f"the checkpoint holds the {' and '.join(sizes)} only; a whole model is needed"
        )
    return ModelSizes(
        encoder=EncoderSizes(**sizes["encoder"]), decoder=DecoderSizes(**sizes["decoder"])
    )


def _needed(run: RunSettings | None, kind: Kind) -> RunSettings:
    if run is None:
        raise ConfigError(f"{kind} says too little of the model; name the run's file with --run")
    return run


Start = Callable[[str, int], Callable[[int], None]]
"""Begins a task of so many bytes; what it returns hears of every byte that is done."""


@contextmanager
def _progress() -> Iterator[Start]:
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(
        *columns, TransferSpeedColumn(), console=console, disable=not console.is_terminal
    ) as progress:

        def start(what: str, total: int) -> Callable[[int], None]:
            task = progress.add_task(what, total=total)
            return lambda done: progress.advance(task, done)

        yield start
