"""Without a GPU, Triton kernels run through the interpreter, which must be asked for before triton is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)  # the tests' matrices are small, and pytest runs on several processes
