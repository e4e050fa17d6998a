"""A trained model, ready to generate."""

import torch

from megavlm.checkpoint.folder import Folder
from megavlm.checkpoint.shards import whole
from megavlm.checkpoint.state import check_checkpoint, check_weights, checkpoint_root
from megavlm.checkpoint.storage import read_state
from megavlm.checkpoint.store import latest_checkpoint, load_weights
from megavlm.config.run import RunSettings
from megavlm.data.tokenizer import Tokenizer
from megavlm.dist import groups
from megavlm.errors import CheckpointError
from megavlm.model.params import parameters
from megavlm.model.vlm import VisionLanguageModel


def load_trained(run: RunSettings) -> tuple[VisionLanguageModel, Tokenizer]:
    """The model of a run's newest checkpoint, in evaluation mode, and its tokenizer.

    Before the first checkpoint, the model that the run starts from, if that is a whole one. bf16 on
    a GPU, fp32 on the CPU. Call it inside `process_groups`. Raises CheckpointError when there is no
    model or it does not fit the run file.
    """
    tokenizer = Tokenizer(run.data.tokenizer)
    checkpoint = latest_checkpoint(checkpoint_root(run))
    folders = [Folder(place) for place in run.checkpoint.start_from]
    if checkpoint is not None:
        check_checkpoint(checkpoint, run, tokenizer)
        folders = [checkpoint]
    for folder in folders:
        check_weights(folder, run.model, tokenizer)
    saved = {name for folder in folders for name in read_state(folder)["tensors"]}
    missing = {f"weights/{parameter.name}" for parameter in parameters(run.model)} - saved
    if missing:
        start = f" and checkpoint.start_from lacks {min(missing)}" if folders else ""
        raise CheckpointError(
            f"{checkpoint_root(run)} holds no checkpoint{start}; train first with `megavlm train`"
        )
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    with groups.device():
        model = VisionLanguageModel(run.model, dtype=dtype)
    weights = {f"weights/{name}": whole(p.detach()) for name, p in model.named_parameters()}
    for folder in folders:
        load_weights(folder, weights)
    return model.eval(), tokenizer
