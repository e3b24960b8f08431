"""cross_entropy, forward + backward, against torch's own. `python -m interlace.bench.bench_cross_entropy`"""
from functools import partial

import torch
import torch.nn.functional as F

from ..kernels import cross_entropy
from .harness import compare

SHAPES = [(1024, 8192), (256, 50304)]


def main() -> None:
    for N, V in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            x, dloss = torch.randn(N, V, dtype=dtype), torch.randn(N)
            targets = torch.randint(V, (N,))

            def both(fn, x=x, targets=targets, dloss=dloss, cast=dtype):
                xs = x.to(cast).detach().requires_grad_()
                loss = fn(xs, targets)
                loss.backward(dloss.to(loss.dtype))
                return loss, xs.grad

            def eager(x, targets):
                return F.cross_entropy(x, targets, reduction="none")

            def eager_fp32(x, targets, eager=eager):
                return eager(x.float(), targets)

            compare("cross_entropy", {"interlace": partial(both, cross_entropy),
                                      "torch F.cross_entropy": partial(both, eager),
                                      "torch, in fp32": partial(both, eager_fp32)},
                    truth=both(eager, cast=torch.float64), nbytes=3 * N * V * x.element_size(),
                    case={"N": N, "V": V, "dtype": str(dtype)[6:], "pass": "fwd+bwd"})


if __name__ == "__main__":
    main()
