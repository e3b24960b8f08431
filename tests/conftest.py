import os

os.environ.setdefault("TORCH_DISTRIBUTED_DEBUG", "DETAIL")           # gloo alone sums mismatched dtypes in silence
os.environ.setdefault("OMP_NUM_THREADS", "1")                        # 2 cores: one thread a rank

import pytest
import torch


@pytest.fixture
def device():
    return "cuda" if torch.cuda.is_available() else "cpu"
