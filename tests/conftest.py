"""Runs before any test imports the package."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

# Ranks are forked from this process; a fork copies no worker threads, so have none.
torch.set_num_threads(1)
