"""swiglu, forward + backward, against silu(gate) * up in torch. `python -m interlace.bench.bench_swiglu`"""
from functools import partial

import torch
import torch.nn.functional as F

from ..kernels import swiglu, swiglu_ref
from .harness import compare

SHAPES = [(1024, 256), (4096, 1024)]                                  # N, F of the output


def torch_swiglu(gate_up):
    gate, up = gate_up.chunk(2, -1)
    return F.silu(gate) * up


def main() -> None:
    for N, width in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            x, dy = torch.randn(N, 2 * width, dtype=dtype), torch.randn(N, width, dtype=dtype)

            def both(fn, x=x, dy=dy, cast=dtype):
                leaf = x.to(cast).detach().requires_grad_()
                y = fn(leaf)
                y.backward(dy.to(cast))
                return y, leaf.grad

            compare("swiglu", {"interlace": partial(both, swiglu),
                               "torch silu(gate) * up": partial(both, torch_swiglu)},
                    truth=both(swiglu_ref, cast=torch.float64), nbytes=8 * N * width * x.element_size(),
                    case={"N": N, "F": width, "dtype": str(dtype)[6:], "pass": "fwd+bwd"})


if __name__ == "__main__":
    main()
