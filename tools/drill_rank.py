"""A rank of a drill: `megavlm`, but its gradients can be spoiled from outside.

    DRILL_FOLDER=FOLDER torchrun --nproc-per-node=2 tools/drill_rank.py train run.yaml

A file `nan-1` or `spike-1` in the folder spoils the next micro-batch of rank 1, and is removed.
"""

import math
import os
import sys
from pathlib import Path
from typing import Any

from megavlm.__main__ import main
from megavlm.stages.captioning import Captioning

FACTORS = {"nan": math.nan, "spike": 1e6}


def spoil(folder: Path, rank: int) -> None:
    """Have `Captioning.losses` look for the files."""
    objective: Any = Captioning
    losses = objective.losses

    def spoiled(self: Captioning, *arguments: Any) -> Any:
        found = losses(self, *arguments)
        for name, factor in FACTORS.items():
            path = folder / f"{name}-{rank}"
            if found.backward.requires_grad and path.exists():
                path.unlink()
                return found._replace(backward=found.backward * factor)
        return found

    objective.losses = spoiled


if __name__ == "__main__":
    spoil(Path(os.environ["DRILL_FOLDER"]), int(os.environ["RANK"]))
    sys.exit(main())
