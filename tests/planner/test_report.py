import re

import pytest
import yaml

from megavlm.__main__ import main
from tests import runs
from tests.planner.test_cut import RUN

EXAMPLE = RUN.with_name("hostfile.example")
SPLIT = ["engine=megatron", "megatron.tensor_parallel=8", "megatron.pipeline_parallel=4"]
INTERLEAVED = [*SPLIT, "megatron.virtual_pipeline=2"]


def plan(*arguments) -> int:
    return main(["plan", str(RUN), *(str(argument) for argument in arguments)])


def test_a_plan_shows_which_layers_lie_where(capsys):
    assert plan("--hostfile", EXAMPLE, *SPLIT) == 0
    told = capsys.readouterr().out
    rows = [line.split("│")[1:-1] for line in told.splitlines() if line.count("│") == 7]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["0", "0", "0-3", "encoder, 4 self", "484,590,848", "25.6%"],
        ["1", "1", "4-26", "19 self, 4 cross", "1,111,561,224", "24.8%"],
        ["2", "2", "27-49", "19 self, 4 cross", "1,111,561,224", "24.8%"],
        ["3", "3", "50-71", "18 self, 4 cross, head", "1,112,390,664", "24.8%"],
    ]
    assert "rank = 32 x pipeline + 8 x data + tensor rank" in told
    assert "(p - 1) / (m v) = (4 - 1) / (8 x 1) = 37.5%" in told
    assert "4 copies of the model x 8 micro-batches x 64 samples" in told
    # 1,112,390,664 parameters x (2 of weights + 4 of gradients + 12 / 4 of optimiser states).
    assert "at most 10.0 GB a rank" in told


def test_a_plan_without_hosts_leaves_the_copies_open(capsys):
    assert plan(*INTERLEAVED) == 0
    told = capsys.readouterr().out
    assert "rank = (copies x 8) x pipeline + 8 x data + tensor rank" in told
    assert "(4 - 1) / (8 x 2) = 18.8%" in told
    assert told.count("all │") == 4 and "GB a rank" not in told


def test_other_engines_have_no_layout(capsys):
    assert plan() == 0
    assert "bubble" not in capsys.readouterr().out


@pytest.mark.parametrize("overrides", [SPLIT, INTERLEAVED, ["engine=megatron"]])
def test_a_picture_of_the_layout(tmp_path, overrides):
    first, second = tmp_path / "new" / "layout.svg", tmp_path / "again.svg"
    for path in (first, second):
        assert plan(*overrides, "--picture", path) == 0
    picture = first.read_text()
    assert "image encoder" in picture and "layers" in picture and "pipeline rank 0" in picture
    assert picture == second.read_text()
    assert len(picture) < 200_000
    assert plan(*overrides, "--picture", tmp_path / "layout.png") == 0
    assert (tmp_path / "layout.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "overrides", "says"),
    [
        ("layout.jpg", SPLIT, "layout.jpg must end in one of .svg, .png, .pdf"),
        ("layout", SPLIT, "layout must end in one of"),
        ("layout.svg", [], "engine=zero3 has no stages to draw; set engine=megatron"),
        ("file/layout.svg", SPLIT, "cannot write picture"),
    ],
)
def test_pictures_that_cannot_be_drawn(capsys, tmp_path, name, overrides, says):
    (tmp_path / "file").touch()
    assert plan(*overrides, "--picture", tmp_path / name) == 2
    assert says in capsys.readouterr().err


def test_the_shipped_run_of_the_megatron_engine_fits_its_hosts(capsys):
    run_file = RUN.with_name("vlm-30b-megatron.yaml")
    assert main(["plan", str(run_file), "--hostfile", str(EXAMPLE)]) == 0
    assert "4 copies of the model x 8 micro-batches x 64 samples" in capsys.readouterr().out


STAGES = {
    "pretraining": {
        "objectives": {"mim": 0.5, "contrastive": 1},
        "train": {"steps": 100, "samples_per_step": 64, "micro_batches": 2},
        "optimizer": {"encoder_layer_decay": 0.9},
        "evaluation": {"probe_kind": "category"},
    },
    "captioning": {
        "data": {"augment": {"operations": 0}},
        "train": {"steps": 300, "frozen": ["encoder", "decoder"]},
        "optimizer": {"schedule": "plan"},
    },
    "instruction": {
        "objectives": {"instruction": 1},
        "data": {
            "train": [
                {"folder": "data/[chats]", "parts": 3},
                {"folder": "data/pairs", "parts": 1, "tasks": ["caption", "keywords"]},
            ]
        },
        "train": {"steps": 1, "z_loss": 1e-4, "ema_decay": 0.999},
        "optimizer": {"scales": {"encoder": 0.1}},
    },
}


def told_of(capsys, folder, *arguments, stages=STAGES, code=0):
    """What `plan` prints of a run of several stages; of errors instead if it must end in one."""
    path = folder / "plan.yaml"
    tree = yaml.safe_load(runs.RUN.read_text()) | {"stages": stages}
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    assert main(["plan", str(path), *(str(argument) for argument in arguments)]) == code
    captured = capsys.readouterr()
    return captured.err if code else captured.out


def columns_of(told):
    """Cells of the table of stages, by stage and row; their lines are joined by `; `."""
    lines = re.split(r"Stages *\n", told)[1].partition("└")[0].splitlines()
    _, *names = (cell.strip() for cell in lines[1].split("┃")[1:-1])
    columns, row = {name: {} for name in names}, ""
    for line in (line for line in lines[2:] if line.startswith("│")):
        first, *cells = (cell.strip() for cell in line.split("│")[1:-1])
        row = first or row
        for name, cell in zip(names, cells, strict=True):
            if cell:
                columns[name].setdefault(row, []).append(cell)
    return {name: {r: "; ".join(c) for r, c in rows.items()} for name, rows in columns.items()}


@pytest.fixture
def wide(monkeypatch):
    """A terminal in which no cell needs a second line."""
    monkeypatch.setenv("COLUMNS", "400")


def test_a_column_says_all_of_a_stage(capsys, tmp_path, wide):
    columns = columns_of(told_of(capsys, tmp_path))
    assert list(columns) == ["pretraining", "captioning", "instruction"]
    assert columns["pretraining"] == {
        "objectives": "0.5 x mim + 1 x contrastive (infonce)",
        "steps": "100 (0 to 100)",
        "batch": "64 samples in 2 micro-batches",
        "samples": "6,400",
        "data": "data/emoji/train",
        "pictures": "224 pixels, RandAugment(1, 3) without colours",
        "trained": "encoder (1.19 M); text tower (683 k); heads (429 k)",
        "frozen": "nothing",
        "learning rate": "up to 0.002 over 5 steps, then cosine to 1e-06; "
        "x 0.9 for each encoder layer below the last",
        "further": "recompute none, fp32",
        "measured after": "probe, retrieval",
        "goes on with": "nothing",
        "new in it": "weights (initial): encoder, text tower, heads; "
        "moments: encoder, text tower, heads",
    }
    captioning = columns["captioning"]
    assert captioning["objectives"] == "captioning"
    assert captioning["steps"] == "300 (100 to 400)"
    assert captioning["pictures"] == "224 pixels"
    assert captioning["trained"] == "projector (16.5 k); cross attention (394 k)"
    assert captioning["frozen"] == "encoder (1.19 M); decoder (1.3 M)"
    # 5 % of all 401 steps, not of 300.
    rate = "up to 0.002 over 21 steps, then cosine to 1e-06 over the plan"
    assert captioning["learning rate"] == rate
    assert captioning["measured after"] == "captions"
    instruction = columns["instruction"]
    assert instruction["samples"] == "32"
    assert instruction["data"] == "75% data/[chats]; 25% data/pairs: caption, keywords"
    assert instruction["learning rate"].endswith("over 1 step, then cosine to 1e-06; encoder x 0.1")
    assert instruction["further"].endswith("z-loss 0.0001, average of weights 0.999")
    assert instruction["measured after"] == "captions, vqa"


def test_what_carries_over(capsys, tmp_path, wide):
    """Weights from any stage before; moments of what the stage right before trained, too."""
    columns = columns_of(told_of(capsys, tmp_path, "checkpoint.start_from=[there]"))
    origin = "weights (start_from or initial)"
    assert columns["captioning"]["goes on with"] == "weights: encoder"
    new = f"{origin}: projector, decoder, cross attention; moments: projector, cross attention"
    assert columns["captioning"]["new in it"] == new
    kept = "weights: encoder, projector, decoder, cross attention"
    moments = "moments: projector, cross attention"
    assert columns["instruction"]["goes on with"] == f"{kept}; {moments}"
    assert columns["instruction"]["new in it"] == "moments: encoder, decoder"


def test_a_head_that_comes_later_is_new(capsys, tmp_path, wide):
    stages = {
        "first": {"objectives": {"mim": 1}, "train": {"steps": 5}},
        "second": {"objectives": {"mim": 1, "contrastive": 1}, "train": {"steps": 5}},
        "third": {"objectives": {"mim": 1}, "train": {"steps": 5}},
        "fourth": {"objectives": {"captioning": 1}, "train": {"steps": 5}},
        "fifth": {"objectives": {"mim": 1}, "train": {"steps": 5}},
    }
    columns = columns_of(told_of(capsys, tmp_path, stages=stages))
    # A part goes on whole, or not at all: AdamW counts its steps by part.
    assert columns["second"]["goes on with"] == "weights: encoder, heads; moments: encoder"
    both = "weights: encoder, heads; moments: encoder, heads"
    assert columns["third"]["goes on with"] == both
    new = "weights (initial): text tower, heads; moments: text tower, heads"
    assert columns["second"]["new in it"] == new
    assert columns["third"]["new in it"] == "nothing"
    # Its heads are the third stage's, but their moments ended there.
    assert columns["fifth"]["goes on with"] == "weights: encoder, heads; moments: encoder"
    assert columns["fifth"]["new in it"] == "moments: heads"


def test_the_batch_of_each_stage_on_its_hosts(capsys, tmp_path, wide):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("a slots=4\n")
    split = ["engine=megatron", "megatron.tensor_parallel=2", "megatron.pipeline_parallel=2"]
    columns = columns_of(told_of(capsys, tmp_path, "--hostfile", hostfile, *split))
    # The ranks of a pipeline hold further copies in pre-training.
    assert [column["batch"] for column in columns.values()] == [
        "2 copies of the model x 2 micro-batches x 16 samples",
        "1 copy of the model x 1 micro-batch x 32 samples",
        "1 copy of the model x 1 micro-batch x 32 samples",
    ]


@pytest.mark.parametrize("name", list(STAGES))
def test_a_batch_that_does_not_divide_is_refused_in_its_stage(capsys, tmp_path, name):
    hostfile = tmp_path / "hostfile"
    hostfile.write_text("a slots=4\n")
    batch = [f"stages.{name}.train.samples_per_step=42", f"stages.{name}.train.micro_batches=2"]
    says = told_of(capsys, tmp_path, "--hostfile", hostfile, *batch, code=2)
    assert says == (
        f"megavlm: error: stages.{name}: train.samples_per_step=42 is not divisible by "
        "train.micro_batches=2 x data_parallel=4 = 8; try 40 or 48, or train.micro_batch_samples\n"
    )
    batch = [f"stages.{name}.train.samples_per_step=42", f"stages.{name}.train.micro_batches=4"]
    says = told_of(capsys, tmp_path, *batch, code=2)
    assert f"stages.{name}: train.samples_per_step=42 is not divisible by" in says
    assert "try [1, 2, 3, 6, 7, 14, 21, 42]" in says


@pytest.mark.parametrize("columns", [80, 100])
def test_a_plan_fits_its_terminal_and_draws_the_lengths_in_one_line(
    capsys, tmp_path, monkeypatch, columns
):
    monkeypatch.setenv("COLUMNS", str(columns))
    told = told_of(capsys, tmp_path)
    assert max(len(line) for line in told.splitlines()) <= columns
    [strip] = [line for line in told.splitlines() if "█" in line]
    drawn = dict(re.findall(r"(\w+) (█+)", strip))
    lengths = {name: len(blocks) for name, blocks in drawn.items()}
    assert list(lengths) == list(STAGES) and lengths["instruction"] == 1
    assert lengths["captioning"] == pytest.approx(3 * lengths["pretraining"], abs=3)
    assert columns - 4 <= len(strip) <= columns


def test_a_run_of_one_stage_carries_nothing_over(capsys):
    assert plan() == 0
    told = capsys.readouterr().out
    assert "Run" in told and "goes on with" not in told and "█" not in told
