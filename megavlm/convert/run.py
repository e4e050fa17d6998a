"""`megavlm convert`: from any format to any other by way of our own names, tensor by tensor."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from megavlm.checkpoint.folder import WRITE_REMEDY, Folder
from megavlm.checkpoint.lazy import LazyTensor, Tensors
from megavlm.checkpoint.state import checkpoint_state
from megavlm.checkpoint.storage import STATE_FILE, CheckpointReader, read_state
from megavlm.checkpoint.store import check_files, lazy_tensors
from megavlm.checkpoint.tensor_file import tensor_bytes
from megavlm.config.run import RunSettings
from megavlm.config.sizes import DecoderSizes, EncoderSizes, ModelSizes
from megavlm.convert import deepspeed, llama, megatron, mllama, towers
from megavlm.convert.certificate import (
    CERTIFICATE_FILE,
    Record,
    check_against,
    check_target,
    hashes_of_files,
    read_certificate,
)
from megavlm.convert.files import (
    CONFIG_FILE,
    about,
    hugging_face_tensors,
    mixed,
    preprocessor,
    read_json,
    remembering,
    require_alike,
    write_hugging_face,
    write_json,
    write_native,
)
from megavlm.convert.names import BESIDE, SMALLEST_ENCODER, Sizes, cast, require_tensors
from megavlm.data.shards import ShardFolder
from megavlm.data.tokenizer import Tokenizer
from megavlm.errors import CheckpointError, ConfigError, MegavlmError
from megavlm.model.params import parameters
from megavlm.planner.cut import with_cut

Target = Literal["native", "mllama", "llama", "megatron"]
OfTorch = Literal["zero3", "universal", "megatron"]
Kind = Target | OfTorch | Literal["tower"]
POINTERS: dict[OfTorch, str] = {
    "universal": "latest_universal",
    "zero3": "latest",
    "megatron": megatron.LATEST_FILE,
}
"""Files that name the newest checkpoint in folders of DeepSpeed and Megatron-LM."""
HUGGING_FACE: dict[Kind, tuple[str, ...]] = {
    "mllama": ("mllama",),
    "llama": tuple(llama.DEFAULTS),
    "tower": tuple(towers.FAMILIES),
}
"""Kinds of Hugging Face's, and the model_type that their config.json has."""
OUT_REMEDY = "free space or permit writing there, or choose another --out; then convert again"


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What to convert into what."""

    sources: tuple[str, ...]
    """Paths or URLs of checkpoints; several are merged."""
    out: str
    to: Target | None = None
    """None: ours from other formats, and Mllama from ours."""
    kind: OfTorch | None = None
    """What to read of sources that hold several checkpoints."""
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
    max_file_gb: float = 5.0
    run: RunSettings | None = None
    """The run that a checkpoint without sizes, or a decoder, is for; and the layout of shards."""

    def __post_init__(self) -> None:
        if self.ema_decay is not None and not 0 < self.ema_decay <= 1:
            raise ConfigError(
                f"--ema-decay={self.ema_decay} must lie between 0 and 1, such as 0.9; without it "
                "checkpoints weigh alike"
            )
        if self.ema_decay is not None and len(self.sources) == 1:
            raise ConfigError(
                f"--ema-decay={self.ema_decay} merges several checkpoints, but {self.sources[0]} "
                "is one; name more, or leave it out"
            )
        if not 0 < self.max_file_gb < math.inf:
            raise ConfigError(
                f"--max-file-gb={self.max_file_gb} must be above 0 and finite, such as 5"
            )


@dataclass(frozen=True, kw_only=True)
class Source:
    """A checkpoint to read."""

    folder: Folder
    kind: Kind
    tag: str | None
    """Of DeepSpeed's and Megatron-LM's: which checkpoint of the folder, as its folder is named."""

    @classmethod
    def newest(cls, folder: Folder, wanted: OfTorch | None) -> "Source":
        with about(folder):
            kind, tag = kind_of(folder, wanted), None
            if kind == "zero3":
                tag = deepspeed.newest(_path(folder), "latest")
            elif kind == "universal":
                tag = deepspeed.newest(_path(folder), "latest_universal")
            elif kind == "megatron":
                tag = megatron.newest(_path(folder))
        return cls(folder=folder, kind=kind, tag=tag)

    def __str__(self) -> str:
        return f"{self.folder}/{self.tag}" if self.tag else str(self.folder)


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
    what cannot be converted; nothing stays written then. A comparison that fails is only noted.
    """
    out = Folder(conversion.out)
    if out.names():
        raise CheckpointError(f"{out} is not empty; choose another folder, or delete it")
    sources = [Source.newest(Folder(place), conversion.kind) for place in conversion.sources]
    to: Target = conversion.to or ("mllama" if sources[0].kind == "native" else "native")
    _check_applies(conversion, sources, to, out)
    with _whole_or_gone(out):
        out.check_writable()  # before hours of reading
        certificate, model = _converted(conversion, sources, to, out)
        # At first without the comparison: it may need more memory than there is.
        write_json(out, CERTIFICATE_FILE, certificate)
    certificate["comparison"] = _comparison(conversion, sources, to, out, model)
    write_json(out, CERTIFICATE_FILE, certificate)
    return certificate


def verify(place: str) -> list[str]:
    """Check a converted folder, and its sources where they still are, by its certificate.

    Returns what was done, in lines. Raises CheckpointError, naming the tensor or the file, if it
    differs.
    """
    out = Folder(place)
    certificate = read_certificate(out)
    with about(out):
        model: Sizes = certificate["model"]
        sides = [(out, certificate["target"])]
        sides += [(Folder(source["place"]), source) for source in certificate["sources"]]
        sources = [Source(folder=f, kind=side["kind"], tag=side["tag"]) for f, side in sides]
    lines: list[str] = []
    for source, (folder, side) in zip(sources, sides, strict=True):
        names = folder.names()
        if folder is not out and (source.tag not in names if source.tag else not names):
            lines.append(f"{source} is not there any more: not checked")
            continue
        with about(folder), _progress() as progress:
            sizes = _model_sizes(model) if source.kind in POINTERS else None
            tensors, _ = _tensors(source, sizes, progress)
            if folder is out:
                check_target(side, tensors, out)
            on_read = progress("checking", side["bytes"])
            checked = check_against(side, tensors, str(source), on_read)
        lines.append(f"{source}: {checked} tensors are as certified")
    return lines


def kind_of(folder: Folder, wanted: OfTorch | None = None) -> Kind:
    """What a folder holds; raises CheckpointError when it is no checkpoint that we know.

    wanted: what to take where DeepSpeed's and Megatron-LM's checkpoints lie in one folder.
    """
    names = folder.names()
    if wanted is not None:
        if POINTERS[wanted] not in names:
            raise ConfigError(
                f"{folder} has no file {POINTERS[wanted]}, which --from {wanted} needs; leave it "
                "out, or name another folder"
            )
        return wanted
    if STATE_FILE in names:
        return "native"
    if CONFIG_FILE in names:
        model_type = read_json(folder, CONFIG_FILE).get("model_type")
        for kind, model_types in HUGGING_FACE.items():
            if model_type in model_types:
                return kind
        known = ", ".join(name for model_types in HUGGING_FACE.values() for name in model_types)
        raise ConfigError(
            f"{folder} has model_type={model_type}; converted are {known}; choose a model of these"
        )
    kinds: list[OfTorch] = [kind for kind, name in POINTERS.items() if name in names]
    if len(kinds) > 1:
        raise CheckpointError(
            f"{folder} has {' and '.join(POINTERS[kind] for kind in kinds)}, so two checkpoints; "
            f"say which to read with --from {' or --from '.join(kinds)}"
        )
    if kinds:
        return kinds[0]
    raise CheckpointError(
        f"{folder} holds neither our state.json nor a config.json of Hugging Face's nor the files "
        "of DeepSpeed or Megatron-LM; is it the checkpoint's own folder?"
    )


def _check_applies(
    conversion: Conversion, sources: Sequence[Source], to: Target, out: Folder
) -> None:
    """Raise ConfigError for options that these sources and this target do not have."""
    for source in sources:
        if conversion.decoder_only and source.kind != "mllama":
            raise ConfigError(
                f"--decoder-only takes the language half of an Mllama, but {source} is of kind "
                f"{source.kind}; leave it out"
            )
    if to == "megatron":
        _needed(conversion.run, to)
        _path(out)


@contextmanager
def _whole_or_gone(out: Folder) -> Iterator[None]:
    """What fails leaves nothing behind, so that it can be tried again in the same place."""
    path = out.local_path
    new = None if path is None or path.exists() else path
    try:
        yield
    except BaseException as error:
        said = str(error).replace(WRITE_REMEDY, OUT_REMEDY)
        said = said.replace("permit writing there or choose another checkpoint.folder", OUT_REMEDY)
        try:
            for name in out.names():
                (out / name).delete()
        except CheckpointError:
            said += f"; delete what is left in {out} first"
        if new is not None:
            with suppress(OSError):
                new.rmdir()
        if isinstance(error, MegavlmError):
            raise type(error)(said) from error
        raise


def _converted(
    conversion: Conversion, sources: Sequence[Source], to: Target, out: Folder
) -> tuple[dict[str, Any], Model]:
    """Write everything but the certificate; returns that, and the model in our terms."""
    with _progress() as progress:
        records: list[Record] = []
        models: list[Model] = []
        for source in sources:
            with about(source.folder):
                run = _needed(conversion.run, source.kind) if source.kind in POINTERS else None
                tensors, step = _tensors(source, run and run.model, progress)
                records.append(Record.of(tensors))
                remembered = remembering(records[-1].tensors)
                models.append(_in_our_terms(source, remembered, step, conversion))
        model = _prepared(models, sources, conversion)
        with about(sources[-1].folder):
            config, targets, left_out = _out_of_our_terms(model, to)
        total = sum(tensor_bytes(t.shape, t.dtype) for t in targets.values())
        written = Record.of(targets, progress("converting", total))
        _write(to, out, written.tensors, model, config, conversion)
    tag = megatron.newest(_path(out)) if to == "megatron" else None
    certificate = {
        "sources": [
            {
                "place": str(source.folder.local_path or source.folder),
                "kind": source.kind,
                "tag": source.tag,
                "step": of_source.state["step"],
                **record.summary(),
            }
            for source, of_source, record in zip(sources, models, records, strict=True)
        ],
        "target": {"kind": to, "tag": tag, "files": hashes_of_files(out), **written.summary()},
        "unchanged": _unchanged(records[0], written) if len(records) == 1 else 0,
        "model": model.sizes,
        "left_out": [*model.dropped, *left_out],
        "comparison": {"compared": False, "reason": "it did not end"},
    }
    return certificate, model


def _tensors(source: Source, sizes: ModelSizes | None, progress: "Start") -> tuple[Tensors, int]:
    """A checkpoint's tensors, by the names that its format has, and the step that they are of.

    sizes: of the model, where the format does not say them.
    """
    folder = source.folder
    match source.kind:
        case "native":
            reader = CheckpointReader(folder)
            total = sum(file["bytes"] for file in reader.state["files"].values())
            check_files(reader, sorted(reader.state["files"]), progress("checking", total))
            return lazy_tensors(reader), reader.state["step"]
        case "mllama" | "llama" | "tower":
            return hugging_face_tensors(folder), 0
        case "zero3":
            assert source.tag is not None
            return deepspeed.zero3_tensors(_path(folder), source.tag)
        case "universal":
            assert source.tag is not None
            return deepspeed.universal_tensors(_path(folder), source.tag)
        case "megatron":
            assert source.tag is not None and sizes is not None
            return megatron.megatron_shards(_path(folder), source.tag, sizes)


def _path(folder: Folder) -> Path:
    if folder.local_path is None:
        raise ConfigError(
            f"{folder} is in an object store, but checkpoints of DeepSpeed and Megatron-LM must "
            "lie on a disk; copy or write it there"
        )
    return folder.local_path


def _in_our_terms(source: Source, tensors: Tensors, step: int, conversion: Conversion) -> Model:
    folder, kind = source.folder, source.kind
    match kind:
        case "native":
            state = read_state(folder)
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
            _require_ledger(tensors, run.model)
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


def _require_ledger(tensors: Tensors, sizes: ModelSizes) -> None:
    """Raise CheckpointError unless these are the weights of a model of these sizes, and moments."""
    ledger = {parameter.name: parameter.shape for parameter in parameters(sizes)}
    by_kind: dict[str, dict[str, LazyTensor]] = {"weights": {}}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        by_kind.setdefault(kind, {})[name] = tensor
    for kind, of_kind in by_kind.items():
        trained = {name: shape for name, shape in ledger.items() if name in of_kind}
        require_tensors(of_kind, ledger if kind == "weights" else trained)


def _prepared(models: Sequence[Model], sources: Sequence[Source], conversion: Conversion) -> Model:
    """The one model to write: merged, cast, with or without moments."""
    model = models[0]
    if len(models) > 1:
        _check_mergeable(models, sources, conversion.ema_decay)
        decay = 1.0 if conversion.ema_decay is None else conversion.ema_decay
        shares = [decay ** (len(models) - 1 - i) for i in range(len(models))]
        shares = [share / sum(shares) for share in shares]
        dropped = [name for one in models for name in (*one.dropped, *_kinds(one.moments))]
        model = replace(
            models[-1],
            weights=mixed([one.weights for one in models], shares),
            moments={},
            dropped=tuple(dict.fromkeys(dropped)),
        )
    if conversion.dtype is not None:
        from megavlm.engine.base import DTYPES  # megatron-core takes seconds to import

        dtype = DTYPES[conversion.dtype]
        if any(tensor.dtype != dtype for tensor in model.weights.values()):
            model = _without_moments(replace(model, weights=cast(model.weights, dtype)))
    return _without_moments(model) if conversion.weights_only else model


def _check_mergeable(
    models: Sequence[Model], sources: Sequence[Source], ema_decay: float | None
) -> None:
    """Raise CheckpointError unless a mean of the models says something."""
    for source, model in zip(sources[1:], models[1:], strict=True):
        with about(source.folder):
            one, other = _comparable(models[0].sizes), _comparable(model.sizes)
        for name in sorted(one.keys() | other.keys()):
            if one.get(name) != other.get(name):
                raise CheckpointError(
                    f"{source} has {name}={other.get(name)}, {sources[0]} {one.get(name)}; only "
                    "checkpoints of one model can be merged"
                )
    require_alike(
        [(source.folder, model.weights) for source, model in zip(sources, models, strict=True)]
    )
    if ema_decay is None:
        return
    for (before, earlier), (after, later) in pairwise(zip(sources, models, strict=True)):
        step, next_step = earlier.state["step"], later.state["step"]
        # Hugging Face's say no step.
        if next_step < step or next_step == step > 0:
            raise CheckpointError(
                f"{after} of step {next_step} comes after {before} of step {step}; for "
                f"--ema-decay={ema_decay} name the oldest first"
            )


def _comparable(sizes: Sizes) -> dict[str, Any]:
    """By setting. Where gates start does not matter, nor how positions of layers are spelled."""
    values: dict[str, Any] = {}
    for part, plain in sizes.items():
        of_part = EncoderSizes(**plain) if part == "encoder" else DecoderSizes(**plain)
        fields = dataclasses.asdict(of_part)
        if isinstance(of_part, DecoderSizes):
            del fields["initial_gate"], fields["cross_every"]
            fields["cross_at"] = of_part.cross_layers
        values |= {f"model.{part}.{name}": value for name, value in fields.items()}
    return values


def _without_moments(model: Model) -> Model:
    return replace(model, moments={}, dropped=(*model.dropped, *_kinds(model.moments)))


def _kinds(moments: Tensors) -> list[str]:
    """What the certificate says of moments that are left out."""
    counts = Counter(key.partition("/")[0] for key in moments)
    return [f"{kind}/* ({count} tensors)" for kind, count in counts.items()]


def _out_of_our_terms(model: Model, to: Target) -> tuple[dict[str, Any], Tensors, list[str]]:
    """The target's configuration, if it has one, its tensors, and what they lack of the model."""
    match to:
        case "mllama":
            sizes = _model_sizes(model.sizes)
            config = mllama.mllama_config(sizes)
            return config, mllama.to_hugging_face(model.weights, sizes), _kinds(model.moments)
        case "llama":
            if "decoder" not in model.sizes:
                raise ConfigError("the checkpoint holds no decoder, which --to llama converts")
            decoder = DecoderSizes(**model.sizes["decoder"])
            converted = llama.to_hugging_face(model.weights, decoder)
            left_out = [*converted.dropped, *_kinds(model.moments)]
            return llama.llama_config(decoder), converted.tensors, left_out
        case "native":
            tensors = {_key(name): t for name, t in model.weights.items()} | dict(model.moments)
            return {}, tensors, []
        case "megatron":
            weights = {_key(n): t for n, t in model.weights.items() if not n.startswith(BESIDE)}
            beside = [_key(name) for name in model.weights if name.startswith(BESIDE)]
            return {}, weights, [*beside, *_kinds(model.moments)]


def _key(name: str) -> str:
    if name.startswith(BESIDE):
        return f"beside/{name.removeprefix(BESIDE)}"
    return f"weights/{name}"


def _write(
    to: Target,
    out: Folder,
    tensors: Tensors,
    model: Model,
    config: dict[str, Any],
    conversion: Conversion,
) -> None:
    max_file_bytes = int(conversion.max_file_gb * 1e9)
    match to:
        case "native":
            settings = {"model": model.sizes}
            state = {"settings": settings, "tokenizer_sha256": None, **model.state}
            write_native(out, tensors, state, max_file_bytes)
        case "megatron":
            run = _needed(conversion.run, to)
            sizes, step = _model_sizes(model.sizes), model.state["step"]
            megatron.write_megatron_shards(tensors, sizes, with_cut(run), _path(out), step)
        case "mllama" | "llama":
            write_hugging_face(out, tensors, config, max_file_bytes)


def _comparison(
    conversion: Conversion, sources: Sequence[Source], to: Target, out: Folder, model: Model
) -> dict[str, Any]:
    """Computed by Hugging Face's code and ours, if just one side is Hugging Face's; or why not."""
    sides: list[tuple[Kind, Folder]] = [*((s.kind, s.folder) for s in sources), (to, out)]
    theirs = [side for side in sides if side[0] in HUGGING_FACE]
    reason = ""
    if not conversion.compare:
        reason = "it was not asked for"
    elif len(sources) > 1:
        reason = "several checkpoints were merged into one"
    elif not theirs:
        reason = "both sides are run by our code alone"
    elif len(theirs) > 1:
        reason = "both sides are Hugging Face's"
    elif conversion.decoder_only:
        reason = "a part of a model computes no logits"
    if reason:
        return {"compared": False, "reason": reason}
    from megavlm.convert.compare import compared  # megatron-core takes seconds to import

    [(kind, folder)] = theirs
    weights = {name: t for name, t in model.weights.items() if not name.startswith(BESIDE)}
    try:
        return compared(kind, folder, weights, model.sizes)
    except Exception as error:  # transformers may raise anything; what is written is whole
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return {"compared": False, "reason": f"it failed with {said}"}


def _unchanged(read: Record, written: Record) -> int:
    """How many tensors have their name and their bits on both sides."""
    return sum(read.hashes.get(name) == digest for name, digest in written.hashes.items())


def _model_sizes(sizes: Sizes) -> ModelSizes:
    if "encoder" not in sizes or "decoder" not in sizes:
        raise ConfigError(
            f"the checkpoint holds the {' and '.join(sizes)} only; a whole model is needed, except "
            "for --to native (and, of a decoder, --to llama)"
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
