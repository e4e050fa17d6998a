import pytest
import torch

from megavlm.checkpoint.lazy import LazyTensor
from megavlm.convert.names import (
    BESIDE,
    Absent,
    Extended,
    Joined,
    cast,
    copied,
    to_ours,
    to_theirs,
    within,
)
from megavlm.errors import CheckpointError
from tests.convert.hugging_face import assert_same

# Two key/value heads, three query heads each, four wide; rows are numbered.
QKV = Joined("qkv", {"q": 3, "k": 1, "v": 1}, groups=2)
RULES = [
    QKV,
    *within("layer.", "block.", [copied("norm", "scale")]),
    Extended("embedding", "rows", axis=0, more=2, kept=True),
    Extended("projector", "columns", axis=1, more=3),
    Absent("gate", (1,)),
    Absent("table", (2, 5), kept=True),
]
SHAPES = {"qkv": (40, 6), "layer.norm": (6,), "embedding": (7, 6), "projector": (6, 4)}


class Reads:
    """Tensors of random bits, and a list of which were read."""

    def __init__(self, shapes):
        self.done = []
        generator = torch.Generator().manual_seed(0)
        values = {n: torch.randn(shape, generator=generator) for n, shape in shapes.items()}
        self.tensors = {
            n: LazyTensor(tuple(t.shape), t.dtype, lambda n=n, t=t: self._read(n, t))
            for n, t in values.items()
        }

    def _read(self, name, tensor):
        self.done.append(name)
        return tensor


@pytest.mark.parametrize("shape", [(40, 6), (40,)], ids=["weight", "bias"])
def test_queries_keys_and_values_of_a_head_lie_together(shape):
    rows = torch.arange(40.0)[(...,) + (None,) * (len(shape) - 1)].expand(shape)
    ours = {"qkv": LazyTensor(shape, rows.dtype, lambda: rows)}
    theirs = to_theirs(ours, [QKV], {"qkv": shape})
    first_column = {n: t.read().reshape(t.shape[0], -1)[:, 0].tolist() for n, t in theirs.items()}
    assert first_column == {
        "q": [*range(12), *range(20, 32)],
        "k": [*range(12, 16), *range(32, 36)],
        "v": [*range(16, 20), *range(36, 40)],
    }
    assert_same(to_ours(theirs, [QKV], {"qkv": shape}), ours)


@pytest.mark.parametrize("kept", [{}, {"table": (2, 5)}, {"rows": (2, 6), "table": (2, 5)}])
def test_there_and_back(kept):
    ours = Reads(SHAPES | {BESIDE + name: shape for name, shape in kept.items()})
    theirs = to_theirs(ours.tensors, RULES, SHAPES)
    assert ours.done == []
    assert {name: tensor.shape for name, tensor in theirs.items()} == {
        "q": (24, 6),
        "k": (8, 6),
        "v": (8, 6),
        "block.scale": (6,),
        "rows": (9, 6),
        "columns": (6, 7),
        "gate": (1,),
        "table": (2, 5),
    }
    theirs["k"].read()
    assert ours.done == ["qkv"]
    assert bool(theirs["table"].read().any()) == ("table" in kept)
    assert not theirs["columns"].read()[:, 4:].any()
    assert bool(theirs["rows"].read()[7:].any()) == ("rows" in kept)
    ours.done.clear()
    again = to_ours(theirs, RULES, SHAPES)
    assert set(ours.done) <= {"embedding", "projector", *(BESIDE + name for name in kept)}
    assert_same(again, ours.tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": None, "v": None}, r"of 8 tensors the checkpoint lacks 2 \(q, v\); are its"),
        (
            {f"new.{i}": torch.ones(1) for i in range(5)},
            r"has 5 \(new.0, new.1, new.2, ...\) that its sizes do not explain",
        ),
        ({"k": torch.ones(4, 6)}, r"k has shape \[4, 6\], but .* \[8, 6\] \(1 of 8 tensors"),
        ({"k": torch.ones(8, 6).half()}, "q, k, v are joined, .* torch.float16 and torch.float32"),
        ({"gate": torch.ones(1)}, r"gate holds values in a place of shape \[1\] that must be zero"),
        ({"columns": torch.ones(6, 7)}, r"columns holds values in a place of shape \[6, 3\]"),
    ],
)
def test_what_does_not_fit_is_named(change, message):
    theirs = to_theirs(Reads(SHAPES).tensors, RULES, SHAPES)
    for name, value in change.items():
        if value is None:
            del theirs[name]
        else:
            theirs[name] = LazyTensor(tuple(value.shape), value.dtype, lambda v=value: v)
    with pytest.raises(CheckpointError, match=message):
        to_ours(theirs, RULES, SHAPES)


def test_our_tensors_that_do_not_fit_are_named():
    def convert(shapes):
        return to_theirs(Reads(shapes).tensors, RULES, SHAPES)

    with pytest.raises(CheckpointError, match=r"of 4 tensors the checkpoint lacks 1 \(layer.norm"):
        convert({name: shape for name, shape in SHAPES.items() if name != "layer.norm"})
    with pytest.raises(CheckpointError, match=r"has 1 \(beside.gate\)"):
        convert({**SHAPES, "beside.gate": (1,)})
    with pytest.raises(CheckpointError, match=r"beside.rows has shape \[3, 6\]"):
        convert({**SHAPES, "beside.rows": (3, 6)})
    with pytest.raises(CheckpointError, match=r"qkv has shape \[20, 6\]"):
        convert({**SHAPES, "qkv": (20, 6)})


def test_casting_is_lazy():
    ours = Reads(SHAPES)
    half = cast(ours.tensors, torch.bfloat16)
    assert ours.done == []
    for name, tensor in half.items():
        assert tensor.read().dtype == tensor.dtype == torch.bfloat16
        assert torch.equal(tensor.read(), ours.tensors[name].read().bfloat16())
