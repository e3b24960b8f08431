"""Layouts in the types that kernels take, over the kernels of the GPU: interpreted on CPU ranks, or on as many GPUs as a layout needs.
float64, in which layouts are held to 1e-10 (test_equal, test_mix), goes past them. A gradient summed twice or not is off by 50%."""
import pytest
import torch
from ranks import run
from test_equal import config

from interlace.kernels import dispatch
from interlace.models.verify import compare
from interlace.parallel.data_parallel import DistributedDataParallel
from interlace.parallel.layout import Layout
from interlace.parallel.mesh import Mesh

interpreted = pytest.mark.skipif(not dispatch.INTERPRET, reason="needs TRITON_INTERPRET=1")
SMALL = {"num_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "ffn_hidden_size": 32, "micro_batch_size": 1, "global_batch_size": 2,
         "vocab_size": 29}
MOE = {"num_moe_experts": 4, "moe_router_topk": 2, "expert_model_parallel_size": 2}
LAYOUTS = {                                                           # ranks, options of the model, tp, sp, of the optimizer
    "tp": (2, {"add_bias_linear": True}, 2, False, {}),
    "tp-sp": (2, {}, 2, True, {}),
    "dp-zero1": (2, {}, 1, False, {"use_distributed_optimizer": True}),
    "pp": (2, {"num_layers": 2, "pipeline_model_parallel_size": 2}, 1, False, {}),
    "ep-zero1": (2, MOE, 1, False, {"use_distributed_optimizer": True}),
    "tp-sp-ep": (2, MOE, 2, True, {}),
}


def _close(rank, world, options, tp, sp, optim, dtype, device):
    torch.manual_seed(rank)
    if device == "cuda":
        torch.cuda.set_device(rank)
    cfg = config({**SMALL, **options}, tp, sp, **optim)

    def wrap(*args, **options):
        ddp = DistributedDataParallel(*args, **options)
        assert ddp.worker is None, "Triton's interpreter serves one thread, and a GPU has streams"
        return ddp
    found = compare(cfg, Mesh.build(Layout.from_config(cfg, world)), vocab_size=29, steps=1, wrap=wrap, dtype=dtype, device=device)
    far = {"gradient": 300, "weight": 3000}                           # Adam's first step is lr * sign(g): a small g may turn it
    bad = [f for f in found if not f.error <= far.get(f.what, 30) * torch.finfo(dtype).eps]
    assert not bad, "\n".join(f"{f.what} {f.name}: {f.error:.1e}" for f in bad[:10])


@interpreted
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_kernel_matches_one_process(name):
    run(LAYOUTS[name][0], _close, *LAYOUTS[name], torch.float32, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_on_gpus(name):
    if torch.cuda.device_count() < LAYOUTS[name][0]:
        pytest.skip(f"needs {LAYOUTS[name][0]} GPUs")
    run(LAYOUTS[name][0], _close, *LAYOUTS[name], torch.float32, "cuda", backend="cpu:gloo,cuda:nccl")
