from dataclasses import replace

import pytest

from megavlm.checkpoint.folder import Folder
from megavlm.checkpoint.state import check_checkpoint, checkpoint_state
from megavlm.checkpoint.storage import write_state
from megavlm.data.tokenizer import Tokenizer
from megavlm.errors import CheckpointError
from tests.batches import OTHER_FORM


def test_sizes_that_json_writes_otherwise_fit_the_checkpoint(tiny_run, tmp_path):
    run = replace(tiny_run, model=OTHER_FORM)
    tokenizer = Tokenizer(run.data.tokenizer)
    state = checkpoint_state(run, tokenizer, 0, 40)
    write_state(Folder(tmp_path), {"step": 0, "files": {}, "tensors": {}, **state})
    check_checkpoint(Folder(tmp_path), OTHER_FORM, tokenizer)
    elsewhere = replace(OTHER_FORM, decoder=replace(OTHER_FORM.decoder, cross_at=(1, 3, 4)))
    with pytest.raises(
        CheckpointError, match=r"decoder.cross_layers=\(0, 3, 4\), the run file says"
    ):
        check_checkpoint(Folder(tmp_path), elsewhere, tokenizer)


def test_a_checkpoint_from_before_a_setting_has_its_default(tiny_run, tmp_path):
    tokenizer = Tokenizer(tiny_run.data.tokenizer)
    state = checkpoint_state(tiny_run, tokenizer, 0, 40)
    del state["settings"]["model"]["encoder"]["attention_bias"]
    write_state(Folder(tmp_path), {"step": 0, "files": {}, "tensors": {}, **state})
    check_checkpoint(Folder(tmp_path), tiny_run.model, tokenizer)
