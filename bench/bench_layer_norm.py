"""layer_norm and add_layer_norm, forward + backward, against torch. `python -m interlace.bench.bench_layer_norm`"""
from functools import partial

import torch
import torch.nn.functional as F

from ..kernels import add_layer_norm, layer_norm, layer_norm_ref
from .harness import compare

SHAPES = [(1024, 256), (4096, 1024)]


def torch_norm(x, w, b):
    return F.layer_norm(x, x.shape[-1:], w, b, 1e-5)


def torch_add(x, r, w, b):
    h = x + r
    return h, torch_norm(h, w, b)


def main() -> None:
    for N, D in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            x, r, dy = (torch.randn(N, D, dtype=dtype) for _ in range(3))
            w, b = (torch.randn(D, dtype=dtype) for _ in range(2))

            def both(fn, inputs=(x, w, b), dy=dy, cast=dtype):
                leaves = [t.to(cast).detach().requires_grad_() for t in inputs]
                y = fn(*leaves)
                y.backward(dy.to(cast))
                return y, *(t.grad for t in leaves)

            def add_both(fn, inputs=(x, r, w, b), dy=dy, cast=dtype):
                leaves = [t.to(cast).detach().requires_grad_() for t in inputs]
                outs = fn(*leaves)
                torch.autograd.backward(outs, (dy.to(cast), dy.to(cast)))
                return *outs, *(t.grad for t in leaves)

            case, size = {"N": N, "D": D, "dtype": str(dtype)[6:], "pass": "fwd+bwd"}, x.element_size()
            compare("layer_norm", {"interlace": partial(both, layer_norm),
                                   "torch F.layer_norm": partial(both, torch_norm)},
                    truth=both(layer_norm_ref, cast=torch.float64), case=case, nbytes=5 * N * D * size)
            compare("add_layer_norm", {"interlace": partial(add_both, add_layer_norm),
                                       "torch": partial(add_both, torch_add)},
                    truth=add_both(torch_add, cast=torch.float64), case=case, nbytes=8 * N * D * size)


if __name__ == "__main__":
    main()
