import pytest

from megavlm.__main__ import main
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
