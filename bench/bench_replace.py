"""A step of Hugging Face's Llama, replaced by `interlace.replace_`, against the stock model. `interlace bench replace`

Loss and every gradient of one sample; the optimizer is the user's own and the same for both, so it is left out. The bound row has the
step's matrix products through `gemm` and torch's attention alone: what no other kernel can save. The error is that of the gradient of
the first layer's queries, which every layer has a part in, against the stock model in float64.
"""
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dropin.replace import replace_
from ..kernels.comm.gemm import gemm
from .cases import Case, Make, Way, Ways

SHAPES = {"quick": {"llama-tiny": {"L": 2, "D": 64, "F": 176, "H": 4, "S": 32, "V": 512}},
          "cpu": {"llama": {"L": 4, "D": 512, "F": 1376, "H": 8, "S": 512, "V": 32000},
                  "llama-small-vocab": {"L": 4, "D": 512, "F": 1376, "H": 8, "S": 512, "V": 8192}}}


def cases(sweep: str, world: int) -> list[Case]:
    return [Case("replace", name, shape) for name, shape in SHAPES.get(sweep, SHAPES["cpu"]).items()]


def _model(s: dict[str, int], make: Make, replaced: bool, dtype: torch.dtype = torch.float32) -> Any:
    import transformers
    config = transformers.LlamaConfig(
        hidden_size=s["D"], intermediate_size=s["F"], num_hidden_layers=s["L"], num_attention_heads=s["H"], num_key_value_heads=s["H"],
        vocab_size=s["V"], max_position_embeddings=s["S"], pad_token_id=None, bos_token_id=None, eos_token_id=None)
    torch.manual_seed(make.seed)
    model: Any = transformers.LlamaForCausalLM(config)
    model = model.to(make.device, dtype)
    if replaced:
        replace_(model)
    return model


def _step(model: Any, ids: Tensor) -> Callable[[], Tensor]:
    def run() -> Tensor:
        model.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return model.model.layers[0].self_attn.q_proj.weight.grad.detach()
    return run


def _products(s: dict[str, int], make: Make) -> Callable[[], Tensor]:
    """The products of the step's linear layers, forward and both gradients, and its attention."""
    S, D = s["S"], s["D"]
    shapes = [(D, D)] * 4 * s["L"] + [(D, s["F"])] * 2 * s["L"] + [(s["F"], D)] * s["L"] + [(D, s["V"])]
    held = {shape: (make.randn(S, shape[0], grad=False), make.randn(shape[1], shape[0], grad=False), make.randn(S, shape[1], grad=False))
            for shape in set(shapes)}
    q = make.randn(1, s["H"], S, D // s["H"])

    def run() -> Tensor:
        for shape in shapes:
            x, w, dy = held[shape]
            gemm(x, w.t()), gemm(dy, w), gemm(dy.t(), x)
        for _ in range(s["L"]):
            F.scaled_dot_product_attention(q, q, q, is_causal=True).backward(q.detach())
        return q.detach()
    return run


def ways(case: Case, make: Make) -> Ways:
    if find_spec("transformers") is None:
        raise NotImplementedError("replace is a bench of transformers' Llama: pip install transformers")
    s = case.shape
    ids = make.randint(s["V"], 1, s["S"])
    true = [_step(_model(s, make, False, torch.float64), ids)()]
    known = lambda got: true  # noqa: E731
    products = sum(a * b for a, b in [(4 * s["L"] * s["D"], s["D"]), (3 * s["L"] * s["D"], s["F"]), (s["D"], s["V"])])
    bound = _products(s, make)
    return Ways((), lambda: true[0], Way(truth=known, fresh=lambda: _step(_model(s, make, True), ids)), {
        "torch eager": Way(truth=known, fresh=lambda: _step(_model(s, make, False), ids)),
        "torch.compile": "left out: ours is not compiled either"},
        flops=(2 * s["S"] * products, 4 * s["S"] * products), gemm=Way(bound, truth=lambda got: got))
