"""One thread for all tests: their tensors are small, and more threads would only wait."""

import torch

torch.set_num_threads(1)
