"""For all tests: one thread, which on small tensors and busy cores is many times faster than several."""

import os

import torch

torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"
