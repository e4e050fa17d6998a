"""Everything that can be wrong with a run, found before any process starts."""

from megavlm.checkpoint.folder import Folder
from megavlm.checkpoint.state import (
    check_checkpoint,
    check_data_position,
    check_moments,
    check_weights,
    checkpoint_root,
)
from megavlm.checkpoint.store import latest_checkpoint
from megavlm.config.run import RunSettings, data_parallel_ranks, samples_per_micro_batch
from megavlm.data.shards import ShardFolder
from megavlm.data.tokenizer import Tokenizer
from megavlm.errors import ConfigError


def check_run(run: RunSettings, ranks: int) -> None:
    """Raise the error that training on so many ranks would meet in sizes, data or checkpoint."""
    samples_per_micro_batch(run.train, data_parallel_ranks(run, ranks))
    training = ShardFolder(run.data.train)
    ShardFolder(run.data.heldout)
    if run.data.heldout_questions is not None:
        ShardFolder(run.data.heldout_questions)
    tokenizer = Tokenizer(run.data.tokenizer)
    if tokenizer.vocabulary != run.model.decoder.vocabulary:
        raise ConfigError(
            f"model.decoder.vocabulary={run.model.decoder.vocabulary} must equal the "
            f"{tokenizer.vocabulary} pieces of tokenizer {run.data.tokenizer}"
        )
    checkpoint = latest_checkpoint(checkpoint_root(run))
    if checkpoint is not None:
        check_checkpoint(checkpoint, run, tokenizer)
        check_data_position(checkpoint, run, training)
        check_moments(checkpoint, run)
    for place in run.checkpoint.start_from if checkpoint is None else ():
        check_weights(Folder(place), run.model, tokenizer)
    try:
        run.run_folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cannot create run_folder {run.run_folder}: {error.strerror}") from error
    checkpoint_root(run).check_writable()
