"""`megavlm convert`: from any format to any other by way of our own names, tensor by tensor."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

from megavlm.checkpoint.lazy import Tensors
from megavlm.checkpoint.storage import read_state
from megavlm.checkpoint.tensor_file import tensor_bytes
from megavlm.config.plan import Plan
from megavlm.config.sizes import DecoderSizes
from megavlm.convert import llama, megatron, mllama
from megavlm.convert.certificate import (
    CERTIFICATE_FILE,
    Record,
    check_against,
    check_target,
    hashes_of_files,
    read_certificate,
)
from megavlm.convert.files import (
    about,
    remembering,
    write_hugging_face,
    write_json,
    write_native,
)
from megavlm.convert.merge import merged
from megavlm.convert.names import BESIDE, Sizes, cast
from megavlm.convert.processor import write_processor
from megavlm.convert.sources import (
    HUGGING_FACE,
    POINTERS,
    Kind,
    Model,
    OfTorch,
    Source,
    Start,
    Target,
    in_our_terms,
    kinds_of,
    needed,
    path_of,
    tensors_of,
    whole_sizes,
)
from megavlm.data.tokenizer import Tokenizer
from megavlm.errors import CheckpointError, ConfigError, MegavlmError, TokenizerError
from megavlm.files.folder import Folder
from megavlm.planner.cut import with_cut

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
    tokenizer: Path | None = None
    """Of the model; None: where the checkpoint or the run says that it is. For Mllama only."""
    with_tokenizer: bool = True
    """False writes an Mllama without what transformers needs to read texts and pictures."""
    plan: Plan | None = None
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


def convert(conversion: Conversion) -> dict[str, Any]:
    """Convert, and return the certificate, which lies in the new folder, too.

    Memory is bounded by a few of the largest tensors. Raises ConfigError and CheckpointError for
    what cannot be converted; nothing stays written then. A comparison that fails is only noted.
    """
    out = Folder(conversion.out, write_remedy=OUT_REMEDY)
    if out.names():
        raise CheckpointError(f"{out} is not empty; choose another folder, or delete it")
    sources = [Source.newest(Folder(place), conversion.kind) for place in conversion.sources]
    to: Target = conversion.to or ("mllama" if sources[0].kind == "native" else "native")
    _check_applies(conversion, sources, to, out)
    if to == "mllama":
        conversion = replace(conversion, tokenizer=_tokenizer_path(conversion, sources))
    with _whole_or_gone(out):
        out.check_writable(OUT_REMEDY)  # before hours of reading
        certificate, weights = _converted(conversion, sources, to, out)
        # At first without the comparison: it may need more memory than there is.
        write_json(out, CERTIFICATE_FILE, certificate)
    certificate["comparison"] = _comparison(
        conversion, sources, to, out, weights, certificate["model"]
    )
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
            sizes = whole_sizes(model) if source.kind in POINTERS else None
            tensors, _ = tensors_of(source, sizes, progress)
            if folder is out:
                check_target(side, tensors, out)
            on_read = progress("checking", side["bytes"])
            checked = check_against(side, tensors, str(source), on_read)
        lines.append(f"{source}: {checked} tensors are as certified")
    return lines


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
    if to != "mllama" and (conversion.tokenizer is not None or not conversion.with_tokenizer):
        option = "--tokenizer" if conversion.with_tokenizer else "--no-tokenizer"
        raise ConfigError(f"{option} is for --to mllama, but this is --to {to}; leave it out")
    if to == "megatron":
        needed(conversion.plan, to)
        path_of(out)


def _tokenizer_path(conversion: Conversion, sources: Sequence[Source]) -> Path | None:
    """Of the model's tokenizer; None if it is not wanted.

    Raises TokenizerError where it is not found, or is another than that of a checkpoint.
    """
    if not conversion.with_tokenizer:
        return None
    trained_with: dict[Source, str | None] = {}
    places: list[str | Path | None] = []
    for source in sources:
        if source.kind == "native":
            with about(source.folder):
                state = read_state(source.folder)
                trained_with[source] = state.get("tokenizer_sha256")
                places.append(state["settings"].get("data", {}).get("tokenizer"))
    if conversion.plan is not None:
        places.append(conversion.plan.last.data.tokenizer)
    path = conversion.tokenizer or next((Path(place) for place in places if place), None)
    remedy = "with --tokenizer, or write weights alone with --no-tokenizer"
    if path is None:
        raise TokenizerError(
            f"{sources[0]} does not say which tokenizer it was trained with; name it {remedy}"
        )
    if not path.is_file():
        raise TokenizerError(f"tokenizer {path} is not there; name where it is {remedy}")
    fingerprint = Tokenizer(path).fingerprint
    for source, wanted in trained_with.items():
        if wanted is not None and wanted != fingerprint:
            raise TokenizerError(
                f"{source} was trained with another tokenizer (SHA-256 {wanted[:12]}) than "
                f"{path} ({fingerprint[:12]}); name the right one {remedy}"
            )
    return path


@contextmanager
def _whole_or_gone(out: Folder) -> Iterator[None]:
    """What fails leaves nothing behind, so that it can be tried again in the same place."""
    path = out.local_path
    new = None if path is None or path.exists() else path
    try:
        yield
    except BaseException as error:
        try:
            for name in out.names():
                (out / name).delete()
        except CheckpointError:
            if isinstance(error, MegavlmError):
                raise type(error)(f"{error}; delete what is left in {out} first") from error
        if new is not None:
            with suppress(OSError):
                new.rmdir()
        raise


def _converted(
    conversion: Conversion, sources: Sequence[Source], to: Target, out: Folder
) -> tuple[dict[str, Any], Tensors]:
    """Write everything but the certificate; returns that, and our weights to compare."""
    with _progress() as progress:
        records: list[Record] = []
        models: list[Model] = []
        for source in sources:
            with about(source.folder):
                plan = needed(conversion.plan, source.kind) if source.kind in POINTERS else None
                tensors, step = tensors_of(source, plan and plan.last.model, progress)
                records.append(Record.of(tensors))
                remembered = remembering(records[-1].tensors)
                model = in_our_terms(
                    source,
                    remembered,
                    step,
                    conversion.plan,
                    decoder_only=conversion.decoder_only,
                    weights_only=conversion.weights_only,
                )
                models.append(model)
        model = _prepared(models, sources, conversion)
        with about(sources[-1].folder):
            config, targets, left_out = _out_of_our_terms(model, to, conversion.tokenizer)
        total = sum(tensor_bytes(t.shape, t.dtype) for t in targets.values())
        written = Record.of(targets, progress("converting", total))
        _write(to, out, written.tensors, model, config, conversion)
    tag = megatron.newest(path_of(out)) if to == "megatron" else None
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
    # A comparison is of what was read with what was written, also if that was cast.
    return certificate, models[0].weights if to in HUGGING_FACE else model.weights


def _prepared(models: Sequence[Model], sources: Sequence[Source], conversion: Conversion) -> Model:
    """The one model to write: merged, cast, with or without moments."""
    model = merged(models, sources, conversion.ema_decay) if len(models) > 1 else models[0]
    if conversion.dtype is not None:
        from megavlm.engine.base import DTYPES  # megatron-core takes seconds to import

        dtype = DTYPES[conversion.dtype]
        if any(tensor.dtype != dtype for tensor in model.weights.values()):
            model = replace(model, weights=cast(model.weights, dtype)).without_moments()
    return model.without_moments() if conversion.weights_only else model


def _out_of_our_terms(
    model: Model, to: Target, tokenizer: Path | None
) -> tuple[dict[str, Any], Tensors, list[str]]:
    """The target's configuration, if it has one, its tensors, and what they lack of the model."""
    match to:
        case "mllama":
            sizes = whole_sizes(model.sizes)
            config = mllama.mllama_config(sizes, _image_token(tokenizer, sizes.decoder))
            return config, mllama.to_hugging_face(model.weights, sizes), kinds_of(model.moments)
        case "llama":
            if "decoder" not in model.sizes:
                raise ConfigError("the checkpoint holds no decoder, which --to llama converts")
            decoder = DecoderSizes(**model.sizes["decoder"])
            converted = llama.to_hugging_face(model.weights, decoder)
            left_out = [*converted.dropped, *kinds_of(model.moments)]
            return llama.llama_config(decoder), converted.tensors, left_out
        case "native":
            tensors = {_key(name): t for name, t in model.weights.items()} | dict(model.moments)
            return {}, tensors, []
        case "megatron":
            weights = {_key(n): t for n, t in model.weights.items() if not n.startswith(BESIDE)}
            beside = [_key(name) for name in model.weights if name.startswith(BESIDE)]
            return {}, weights, [*beside, *kinds_of(model.moments)]


def _image_token(path: Path | None, decoder: DecoderSizes) -> int | None:
    """Of the model's tokenizer; raises TokenizerError if that cannot be the model's."""
    if path is None:
        return None
    tokenizer = Tokenizer(path)
    if tokenizer.vocabulary != decoder.vocabulary:
        raise TokenizerError(
            f"tokenizer {path} has {tokenizer.vocabulary} pieces, but the model "
            f"model.decoder.vocabulary={decoder.vocabulary}; name the model's with --tokenizer"
        )
    return tokenizer.image


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
            run = needed(conversion.plan, to).last
            sizes, step = whole_sizes(model.sizes), model.state["step"]
            parallel = with_cut(replace(run, engine="megatron"))
            megatron.write_megatron_shards(tensors, sizes, parallel, path_of(out), step)
        case "mllama" | "llama":
            if conversion.tokenizer is not None:
                write_processor(out, conversion.tokenizer, whole_sizes(model.sizes))
            write_hugging_face(out, tensors, config, max_file_bytes)


def _comparison(
    conversion: Conversion,
    sources: Sequence[Source],
    to: Target,
    out: Folder,
    ours: Tensors,
    sizes: Sizes,
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
    weights = {name: t for name, t in ours.items() if not name.startswith(BESIDE)}
    try:
        return compared(kind, folder, weights, sizes)
    except Exception as error:  # transformers may raise anything; what is written is whole
        said = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        return {"compared": False, "reason": f"it failed with {said}"}


def _unchanged(read: Record, written: Record) -> int:
    """How many tensors have their name and their bits on both sides."""
    return sum(read.hashes.get(name) == digest for name, digest in written.hashes.items())


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
