"""A trained model, ready to generate."""

import torch

from megavlm.checkpoint.shards import whole
from megavlm.checkpoint.state import check_checkpoint, checkpoint_root
from megavlm.checkpoint.store import latest_checkpoint, load_checkpoint
from megavlm.config.run import RunSettings
from megavlm.data.tokenizer import Tokenizer
from megavlm.dist import groups
from megavlm.errors import CheckpointError
from megavlm.model.vlm import VisionLanguageModel


def load_trained(run: RunSettings) -> tuple[VisionLanguageModel, Tokenizer]:
    """The model of a run's newest checkpoint, in evaluation mode, and its tokenizer.

    bf16 on a GPU, fp32 on the CPU. Call it inside `process_groups`. Raises CheckpointError when
    there is no checkpoint or it does not fit the run file.
    """
    checkpoint = latest_checkpoint(checkpoint_root(run))
    if checkpoint is None:
        raise CheckpointError(
            f"{checkpoint_root(run)} holds no checkpoint; train first with `megavlm train`"
        )
    tokenizer = Tokenizer(run.data.tokenizer)
    check_checkpoint(checkpoint, run.model, tokenizer)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    with groups.device():
        model = VisionLanguageModel(run.model, dtype=dtype)
    weights = {f"weights/{name}": whole(p.detach()) for name, p in model.named_parameters()}
    load_checkpoint(checkpoint, weights)
    return model.eval(), tokenizer
