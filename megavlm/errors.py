"""Every exception that a user can meet. The command line prints it as one line and exits with 2."""

from megavlm.redact import without_secrets
from megavlm.terminal import printable


class MegavlmError(Exception):
    """Base of the errors that the user can mend; the message names value, rule and remedy."""

    is_told = False
    """Whether people have read it; then it only ends what it has to end."""

    def __str__(self) -> str:
        """Harmless to a terminal, whatever the message quotes of a user's files; no credentials."""
        return without_secrets("\n".join(map(printable, super().__str__().split("\n"))))


class ConfigError(MegavlmError):
    """A setting is unknown, has the wrong type, or breaks a rule."""


class LaunchError(MegavlmError):
    """The hostfile or the launch environment does not fit the run."""


class DataError(MegavlmError):
    """A data folder, shard or index is missing or corrupt."""


class BadSampleError(DataError):
    """One sample cannot be used (a truncated picture, say); skipped or fatal, as configured."""


class TokenizerError(MegavlmError):
    """The tokenizer is missing, or is not the one that the run or checkpoint was made with."""


class DivergenceError(MegavlmError):
    """The loss or its gradient is no number any more."""


class OutOfMemoryError(MegavlmError):
    """A step does not fit into the memory of a GPU or of a host."""


class StoppedError(Exception):
    """A signal has ended a run, which is saved: no mistake, so the code is another."""


class CheckpointError(MegavlmError):
    """A checkpoint is missing, incomplete, or of another model."""


class DamagedError(CheckpointError):
    """A checkpoint is not as it was written. Who needs it knows what to do about it."""


class StorageError(CheckpointError, DataError):
    """A disk or an object store cannot be read or written, whatever was to lie there."""


class RequestError(MegavlmError):
    """What a model is asked is not as it must be."""


class RanksError(MegavlmError):
    """Ranks that hold a model together cannot go on."""
