"""Without a GPU the Triton kernels run through Triton's interpreter; that is decided before anything is imported."""

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
