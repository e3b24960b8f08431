import os
import pathlib
import sys

# `python -m pytest` puts the repo root on sys.path, where transformers looks for Hugging Face's `kernels` and finds our folder.
sys.path[:] = [p for p in sys.path if pathlib.Path(p).resolve() != pathlib.Path(__file__).parents[1]]
os.environ.setdefault("TORCH_DISTRIBUTED_DEBUG", "DETAIL")           # gloo alone sums mismatched dtypes in silence
os.environ.setdefault("OMP_NUM_THREADS", "1")                        # 2 cores: one thread a rank
os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "32")           # ranks that are streams: of 8 queues two may share one, and wait

import pytest  # noqa: E402
import torch  # noqa: E402


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Every kernel test runs on the CPU, and once more, marked gpu, on a CUDA device."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param
