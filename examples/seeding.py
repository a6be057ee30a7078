"""Random numbers that depend on where in a run they are drawn, and not on what was drawn before.

Every image of every epoch, and every step of every process, starts from a seed of its own. So
there is no state to save: a resumed run draws what the uninterrupted one would have drawn, with
any number of loader workers, and the images look the same on any number of processes.
"""

from __future__ import annotations

import random

import numpy as np
import torch

IMAGES, STEPS = 1, 2  # the first number after the run's seed, so that no two streams are the same


def seed_generators(*numbers: int) -> None:
    """Seed Python's, NumPy's and PyTorch's CPU generator from `numbers`, none of them negative.

    A CUDA generator is left alone: a loader worker must not touch CUDA.
    """
    first, second, third = np.random.SeedSequence(numbers).generate_state(3)
    random.seed(int(first))
    np.random.seed(second)
    torch.default_generator.manual_seed(int(third))
