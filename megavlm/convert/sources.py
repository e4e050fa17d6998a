"""Checkpoints of every format that is read, in our terms."""

import dataclasses
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from megavlm.checkpoint.lazy import LazyTensor, Tensors
from megavlm.checkpoint.load import check_files, lazy_tensors
from megavlm.checkpoint.state import checkpoint_state
from megavlm.checkpoint.storage import STATE_FILE, CheckpointReader, read_state
from megavlm.config.objectives import Part
from megavlm.config.plan import Plan, Stage
from megavlm.config.sizes import DecoderSizes, EncoderSizes, ModelSizes
from megavlm.convert import deepspeed, llama, megatron, mllama, towers
from megavlm.convert.files import CONFIG_FILE, about, hugging_face_tensors, preprocessor, read_json
from megavlm.convert.names import BESIDE, SMALLEST_ENCODER, Sizes, require_tensors
from megavlm.data.sources import training_sources
from megavlm.data.tokenizer import Tokenizer
from megavlm.errors import CheckpointError, ConfigError
from megavlm.files.folder import Folder
from megavlm.model.params import parameters

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
Start = Callable[[str, int], Callable[[int], None]]
"""Begins a task of so many bytes; what it returns hears of every byte that is done."""


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
                tag = deepspeed.newest(path_of(folder), "latest")
            elif kind == "universal":
                tag = deepspeed.newest(path_of(folder), "latest_universal")
            elif kind == "megatron":
                tag = megatron.newest(path_of(folder))
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

    def without_moments(self) -> "Model":
        """Its weights; that there were moments is noted."""
        left_out = (*self.dropped, *kinds_of(self.moments))
        return replace(self, moments={}, dropped=left_out)


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
    if not names:
        raise CheckpointError(f"{folder} does not exist, or is empty; is the path right?")
    if steps := [name for name in names if name.startswith("step-")]:
        raise CheckpointError(f"{folder} holds several checkpoints; name one, such as {steps[-1]}")
    if any(name.startswith(("mp_rank_", "zero_pp_rank_")) for name in names):
        raise CheckpointError(f"{folder} is one step of a checkpoint; name the folder above it")
    raise CheckpointError(
        f"{folder} holds neither our state.json nor a config.json of Hugging Face's nor the files "
        "of DeepSpeed or Megatron-LM; is it the checkpoint's own folder?"
    )


def tensors_of(source: Source, sizes: ModelSizes | None, progress: Start) -> tuple[Tensors, int]:
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
            return deepspeed.zero3_tensors(path_of(folder), source.tag)
        case "universal":
            assert source.tag is not None
            return deepspeed.universal_tensors(path_of(folder), source.tag)
        case "megatron":
            assert source.tag is not None and sizes is not None
            return megatron.megatron_shards(path_of(folder), source.tag, sizes)


def path_of(folder: Folder) -> Path:
    """Where a folder lies on a disk; raises ConfigError if it does not."""
    if folder.local_path is None:
        raise ConfigError(
            f"{folder} is in an object store, but checkpoints of DeepSpeed and Megatron-LM must "
            "lie on a disk; copy or write it there"
        )
    return folder.local_path


def in_our_terms(
    source: Source,
    tensors: Tensors,
    step: int,
    plan: Plan | None,
    *,
    decoder_only: bool,
    weights_only: bool,
) -> Model:
    """A checkpoint by our names.

    decoder_only: take the language half of an Mllama. weights_only: without moments a checkpoint
    of DeepSpeed's says nothing of a run, whose data and tokenizer need not be there then.
    """
    folder, kind = source.folder, source.kind
    match kind:
        case "native":
            state = read_state(folder)
            return _of_keys(tensors, state["settings"]["model"], state)
        case "mllama":
            config = read_json(folder, CONFIG_FILE)
            decoder = mllama.decoder_sizes_of(config)
            if decoder_only:
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
            wanted = needed(plan, kind).last.model.decoder
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
            plan = needed(plan, kind)
            run = plan.last
            state: dict[str, Any] = {"step": step}
            plain = dataclasses.asdict(run.model)
            _require_ledger(tensors, run.model)
            if kind == "megatron" or weights_only:
                return _of_keys(tensors, plain, state)
            state |= _state(plan.at(step), step)
            return _of_keys(tensors, plain, state)
    plain = {part: dataclasses.asdict(of_part) for part, of_part in sizes.items()}
    return Model(
        weights=converted.tensors,
        moments={},
        sizes=plain,
        state={"step": 0},
        dropped=converted.dropped,
    )


def _state(stage: Stage, step: int) -> dict[str, Any]:
    """What a checkpoint of this step would say of its run."""
    run = stage.run
    taken: dict[Part, int] = dict.fromkeys(run.trained_parts, step - stage.first_step)
    training = training_sources(run)
    return checkpoint_state(stage, Tokenizer(run.data.tokenizer), step, training, taken)


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


def whole_sizes(sizes: Sizes) -> ModelSizes:
    """Of both parts; raises ConfigError if there is one only."""
    if "encoder" not in sizes or "decoder" not in sizes:
        raise ConfigError(
            f"the checkpoint holds the {' and '.join(sizes)} only; a whole model is needed, except "
            "for --to native (and, of a decoder, --to llama)"
        )
    return ModelSizes(
        encoder=EncoderSizes(**sizes["encoder"]), decoder=DecoderSizes(**sizes["decoder"])
    )


def needed(plan: Plan | None, kind: Kind) -> Plan:
    """The plan of a run, where a kind needs one; raises ConfigError if none was named."""
    if plan is None:
        what = {"megatron": "the sizes and the layout", "llama": "the vocabulary and the layers"}
        raise ConfigError(
            f"{kind} leaves {what.get(kind, 'the sizes')} of the model open; name a run's file, "
            "which has them, with --run"
        )
    return plan


def kinds_of(moments: Tensors) -> list[str]:
    """What the certificate says of moments that are left out."""
    counts = Counter(key.partition("/")[0] for key in moments)
    return [f"{kind}/* ({count} tensors)" for kind, count in counts.items()]
