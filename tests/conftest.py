"""For all tests: one torch thread.

Some tests fork. A forked child hangs in the first operation that torch shares out over threads which only
its parent has.
"""

from __future__ import annotations

import os

import torch

os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
