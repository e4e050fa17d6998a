"""Instruction tuning: chats of several turns and pictures, of which the answers are learned.

Trains the whole vision-language model but for what `train.frozen` names.
"""

from megavlm.data.collate import chats
from megavlm.stages.language import LanguageObjective


class Instruction(LanguageObjective):
    """Chats; single questions about the same pictures are joined into one."""

    collate = staticmethod(chats)
