from dataclasses import replace

import pytest

from megavlm.checkpoint.listing import claim, latest_checkpoint
from megavlm.checkpoint.save import CheckpointSaver
from megavlm.checkpoint.storage import folder_name
from megavlm.config.run import CheckpointSettings
from megavlm.errors import CheckpointError
from megavlm.files.folder import Folder
from tests.checkpoint.written import SYNCHRONOUS, assert_loads, held, save
from tests.ranks import run_on_ranks


def test_the_newest_and_the_chosen_are_kept(tmp_path):
    for step in (2, 4, 10, 13):
        save(tmp_path, step, ranks=1, settings=CheckpointSettings(every=1, keep_every=4))
    kept = ["step-00000004", "step-00000010", "step-00000013"]
    assert sorted(p.name for p in tmp_path.iterdir()) == kept


def test_what_a_crash_leaves_is_not_seen_and_swept_away(tmp_path):
    assert latest_checkpoint(Folder(tmp_path)) is None
    save(tmp_path, 2, ranks=1)
    for step in (1, 4):
        (tmp_path / f"step-{step:08d}").mkdir()
        (tmp_path / f"step-{step:08d}" / "tensors-00001-of-00002.safetensors").write_text("half")
    assert str(latest_checkpoint(Folder(tmp_path))) == str(tmp_path / "step-00000002")
    save(tmp_path, 4, ranks=1)
    assert_loads(latest_checkpoint(Folder(tmp_path)), 4, 1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000002", "step-00000004"]
    assert len(list((tmp_path / "step-00000004").iterdir())) == 2


def test_a_folder_of_checkpoints_belongs_to_one_run_and_is_shared(tmp_path):
    root = tmp_path / "checkpoints"

    def on_rank(rank):
        claim(Folder(root), tmp_path / "one")
        claim(Folder(root), tmp_path / "one")  # it goes on
        with pytest.raises(CheckpointError, match=f"belongs to the run in {tmp_path}/one"):
            claim(Folder(root), tmp_path / "other")
        own = Folder(tmp_path / f"host-{rank}")
        own.create()
        with pytest.raises(CheckpointError, match="host-1 is not shared by all hosts"):
            claim(own, tmp_path / "one")

    run_on_ranks(2, on_rank)
    save(root, 1)
    assert latest_checkpoint(Folder(root)) == Folder(root) / folder_name(1)


def test_what_cannot_be_deleted_is_told_and_stays(tmp_path, capfd):
    for name in ("step-7", "step-²", "step-old", "notes"):
        (tmp_path / name).mkdir(parents=True)

    def on_rank(_):
        delete = Folder.delete
        Folder.delete = lambda f: (_ for _ in ()).throw(CheckpointError("cannot delete it"))
        with CheckpointSaver(Folder(tmp_path), replace(SYNCHRONOUS, keep_last=1)) as saver:
            saver.save(1, held(0, 1), {})
            saver.save(2, held(0, 1), {})
        Folder.delete = delete

    run_on_ranks(1, on_rank)
    assert "warning: cannot delete it" in capfd.readouterr().err
    assert_loads(latest_checkpoint(Folder(tmp_path)), 0, 1)
    assert (tmp_path / "step-7").exists()
