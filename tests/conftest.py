"""Shared by all tests: helpers on the path, one thread per worker, and no look at the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

import torch

# Workers run side by side on few cores: threads of their own would only contend. It also fixes summation order.
torch.set_num_threads(1)
