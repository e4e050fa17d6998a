"""Tables of how the tensors of two models correspond, and the functions that follow them.

"Ours" are this trainer's tensors, under the ledger's names; "theirs" are those of a file that
another program reads or has written. A table is written once, for both directions. Converting reads
nothing but what must be zero; the bits of a weight never change.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from megavlm.checkpoint.lazy import LazyTensor, Tensors
from megavlm.config.sizes import EncoderSizes
from megavlm.errors import CheckpointError, ConfigError

Shape = tuple[int, ...]
Sizes = dict[str, Any]
"""Our sizes of the parts that there are, as plain data: `encoder`, `decoder`."""

SMALLEST_ENCODER = EncoderSizes(
    image_pixels=8, patch_pixels=8, width=8, layers=1, heads=1, mlp_width=8
)
"""Where a model needs an encoder that nothing is seen through."""

BESIDE = "beside."
"""What begins the names of tensors that our checkpoint keeps though the model has no use for them:
their bits come back when it is converted back. Those that are zero are not kept."""


@dataclass(frozen=True)
class Joined:
    """One of our tensors holds one or more of theirs, joined along the rows.

    Ours is `groups` groups of rows; in each lies one group of every one of theirs, in order. So
    queries, keys and values lie together for each key/value head, and a copy is the simplest case.
    """

    ours: str
    theirs: Mapping[str, int]
    """Their names, and how many shares of a group's rows each has."""
    groups: int = 1


def copied(ours: str, theirs: str) -> Joined:
    """The same tensor under another name."""
    return Joined(ours, {theirs: 1})


@dataclass(frozen=True)
class Extended:
    """Theirs is ours and, after it along `axis`, `more` slices that our model has no use for."""

    ours: str
    theirs: str
    axis: int
    more: int
    kept: bool = False
    """Our checkpoint keeps those slices beside the model; otherwise they must be zero."""


@dataclass(frozen=True)
class Absent:
    """A tensor of theirs that our model lacks."""

    theirs: str
    shape: Shape
    kept: bool = False
    """Our checkpoint keeps it beside the model; otherwise it must be zero."""


Rule = Joined | Extended | Absent


@dataclass(frozen=True)
class Converted:
    """What became of a checkpoint."""

    tensors: dict[str, LazyTensor]
    dropped: tuple[str, ...]
    """Tensors that were left out, because the other model has no such part."""


def within(ours: str, theirs: str, rules: Iterable[Rule]) -> list[Rule]:
    """The rules of one layer, or another module, with the prefixes that its names have."""
    inside: list[Rule] = []
    for rule in rules:
        match rule:
            case Joined():
                names = {theirs + name: shares for name, shares in rule.theirs.items()}
                inside.append(replace(rule, ours=ours + rule.ours, theirs=names))
            case Extended():
                inside.append(replace(rule, ours=ours + rule.ours, theirs=theirs + rule.theirs))
            case Absent():
                inside.append(replace(rule, theirs=theirs + rule.theirs))
    return inside


def to_theirs(
    ours: Tensors, rules: Iterable[Rule], shapes: Mapping[str, Shape]
) -> dict[str, LazyTensor]:
    """Our tensors as another program names and cuts them.

    shapes: of our tensors, from the ledger. Raises CheckpointError unless `ours` are exactly the
    tensors of the rules, with these shapes.
    """
    rules = list(rules)
    wanted = {rule.ours: shapes[rule.ours] for rule in rules if not isinstance(rule, Absent)}
    beside = [BESIDE + rule.theirs for rule in rules if not isinstance(rule, Joined) and rule.kept]
    _require_names(ours, wanted, optional=beside)
    _require_shapes(ours, wanted)
    dtype = ours[next(iter(wanted))].dtype
    theirs: dict[str, LazyTensor] = {}
    for rule in rules:
        match rule:
            case Joined():
                theirs |= _pieces(rule, ours[rule.ours])
            case Extended():
                theirs[rule.theirs] = _extended(rule, ours)
            case Absent():
                theirs[rule.theirs] = _beside(rule.theirs, rule.shape, dtype, ours)
    return theirs


def to_ours(
    theirs: Tensors, rules: Iterable[Rule], shapes: Mapping[str, Shape]
) -> dict[str, LazyTensor]:
    """Tensors of another program as our model holds them; the reverse of `to_theirs`.

    Raises CheckpointError unless `theirs` are exactly the tensors of the rules, with the shapes
    that follow from `shapes`, and zero where the rules say so. Read here is only what must be zero,
    or is kept beside the model if it is not.
    """
    rules = list(rules)
    wanted: dict[str, Shape] = {}
    for rule in rules:
        wanted |= _their_shapes(rule, shapes)
    require_tensors(theirs, wanted)
    ours: dict[str, LazyTensor] = {}
    for rule in rules:
        match rule:
            case Joined():
                ours[rule.ours] = _join(rule, theirs)
            case Extended():
                ours |= _cut(rule, theirs[rule.theirs])
            case Absent():
                ours |= _kept(rule, theirs[rule.theirs])
    return ours


def cast(tensors: Tensors, dtype: torch.dtype) -> dict[str, LazyTensor]:
    """The same tensors in one floating-point type."""
    return {
        name: t if t.dtype == dtype else LazyTensor(t.shape, dtype, lambda t=t: t.read().to(dtype))
        for name, t in tensors.items()
    }


def require_tensors(tensors: Tensors, wanted: Mapping[str, Shape]) -> None:
    """Raise CheckpointError unless the tensors have exactly these names and shapes."""
    _require_names(tensors, wanted)
    _require_shapes(tensors, wanted)


def require_values(config: Mapping[str, Any], required: Mapping[str, Any], remedy: str) -> None:
    """Raise ConfigError, naming every value that differs, unless the config has the required ones.

    A setting that the config lacks is as required.
    """
    wrong = [
        f"{name}={config[name]} must be {value}"
        for name, value in required.items()
        if config.get(name, value) != value
    ]
    if wrong:
        raise ConfigError(f"{', '.join(wrong)}: {remedy}")


def listed(names: Collection[str]) -> str:
    """How many names, and the first of them, for a message."""
    shown = ", ".join(sorted(names)[:3])
    return f"{len(names)} ({shown}{', ...' if len(names) > 3 else ''})"


def _their_shapes(rule: Rule, shapes: Mapping[str, Shape]) -> dict[str, Shape]:
    match rule:
        case Joined():
            rows, *rest = shapes[rule.ours]
            return {
                name: (rows // sum(rule.theirs.values()) * shares, *rest)
                for name, shares in rule.theirs.items()
            }
        case Extended():
            shape = shapes[rule.ours]
            return {rule.theirs: _with(shape, rule.axis, shape[rule.axis] + rule.more)}
        case Absent():
            return {rule.theirs: rule.shape}


def _pieces(rule: Joined, ours: LazyTensor) -> dict[str, LazyTensor]:
    """Theirs, out of ours."""
    pieces: dict[str, LazyTensor] = {}
    first = 0
    for name, shape in _their_shapes(rule, {rule.ours: ours.shape}).items():
        shares = slice(first, first + rule.theirs[name])
        first = shares.stop

        def read(shares: slice = shares) -> Tensor:
            in_shares = ours.read().unflatten(0, (rule.groups, sum(rule.theirs.values()), -1))
            return in_shares[:, shares].flatten(0, 2)

        pieces[name] = LazyTensor(shape, ours.dtype, read)
    return pieces


def _join(rule: Joined, theirs: Tensors) -> LazyTensor:
    """Ours, out of theirs."""
    parts = {name: theirs[name] for name in rule.theirs}
    dtypes = {part.dtype for part in parts.values()}
    if len(dtypes) > 1:
        raise CheckpointError(
            f"{', '.join(parts)} are joined, so they must have one type, but have "
            f"{' and '.join(sorted(map(str, dtypes)))}; cast them first"
        )
    rows = sum(part.shape[0] for part in parts.values())
    shape = (rows, *next(iter(parts.values())).shape[1:])

    def read() -> Tensor:
        in_shares = [
            part.read().unflatten(0, (rule.groups, rule.theirs[name], -1))
            for name, part in parts.items()
        ]
        whole = in_shares[0] if len(in_shares) == 1 else torch.cat(in_shares, dim=1)
        return whole.flatten(0, 2)

    return LazyTensor(shape, dtypes.pop(), read)


def _extended(rule: Extended, ours: Tensors) -> LazyTensor:
    """Theirs, out of ours and of what is kept beside it."""
    tensor = ours[rule.ours]
    more = _beside(rule.theirs, _with(tensor.shape, rule.axis, rule.more), tensor.dtype, ours)
    shape = _with(tensor.shape, rule.axis, tensor.shape[rule.axis] + rule.more)
    return LazyTensor(
        shape, tensor.dtype, lambda: torch.cat([tensor.read(), more.read()], rule.axis)
    )


def _cut(rule: Extended, theirs: LazyTensor) -> dict[str, LazyTensor]:
    """Ours, and what is kept beside it, out of theirs."""
    length = theirs.shape[rule.axis] - rule.more

    def part(first: int, count: int) -> LazyTensor:
        return LazyTensor(
            _with(theirs.shape, rule.axis, count),
            theirs.dtype,
            lambda: theirs.read().narrow(rule.axis, first, count).contiguous(),
        )

    return {rule.ours: part(0, length)} | _kept(rule, part(length, rule.more))


def _beside(theirs: str, shape: Shape, dtype: torch.dtype, ours: Tensors) -> LazyTensor:
    """What our checkpoint keeps for a tensor of theirs, or zeros."""
    if BESIDE + theirs not in ours:
        return LazyTensor(shape, dtype, lambda: torch.zeros(shape, dtype=dtype))
    _require_shapes(ours, {BESIDE + theirs: shape})
    return ours[BESIDE + theirs]


def _kept(rule: Extended | Absent, surplus: LazyTensor) -> dict[str, LazyTensor]:
    """What our checkpoint keeps of what our model has no use for; zeros are made anew."""
    if _is_zero(surplus.read()):
        return {}
    if rule.kept:
        return {BESIDE + rule.theirs: surplus}
    raise CheckpointError(
        f"{rule.theirs} holds values in a place of shape {list(surplus.shape)} that must be zero: "
        "our model has nothing that does what they do; convert only the parts without it"
    )


def _with(shape: Shape, axis: int, length: int) -> Shape:
    """The shape with another length along one axis."""
    return (*shape[:axis], length, *shape[axis + 1 :])


def _is_zero(tensor: Tensor) -> bool:
    """Every bit is zero, so that zeros which are made anew equal these."""
    return not tensor.contiguous().view(torch.uint8).any()


def _require_names(
    tensors: Tensors, wanted: Collection[str], optional: Collection[str] = ()
) -> None:
    missing = set(wanted) - set(tensors)
    unexpected = set(tensors) - set(wanted) - set(optional)
    if missing or unexpected:
        faults = [f"lacks {listed(missing)}"] * bool(missing)
        faults += [f"has {listed(unexpected)} that its sizes do not explain"] * bool(unexpected)
        raise CheckpointError(
            f"of {len(wanted)} tensors the checkpoint {' and '.join(faults)}; are its tensors and "
            "its sizes of the same model?"
        )


def _require_shapes(tensors: Tensors, wanted: Mapping[str, Shape]) -> None:
    wrong = {name for name, shape in wanted.items() if tensors[name].shape != shape}
    if wrong:
        name = min(wrong)
        raise CheckpointError(
            f"{name} has shape {list(tensors[name].shape)}, but its sizes say {list(wanted[name])} "
            f"({len(wrong)} of {len(wanted)} tensors differ); are its tensors and its sizes of the "
            "same model?"
        )
