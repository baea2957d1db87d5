"""One thread for all tests: their tensors are small, and more threads would only wait.

What the collection makes stays to the end, so that the garbage collector need not look at it again
and again.
"""

import gc

import torch

torch.set_num_threads(1)
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    gc.enable()
