"""rms_norm and add_rms_norm, forward + backward, against torch's own. `python -m interlace.bench.bench_rms_norm`"""
from functools import partial

import torch
import torch.nn.functional as F

from ..kernels import add_rms_norm, rms_norm, rms_norm_ref
from .harness import compare

SHAPES = [(1024, 256), (4096, 1024)]


def torch_norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, w.shape, w, 1e-6)


def main() -> None:
    for N, D in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            x, r, dy = (torch.randn(N, D, dtype=dtype) for _ in range(3))
            w = torch.randn(D, dtype=dtype)

            def both(fn, x=x, w=w, dy=dy, cast=dtype):
                xs, ws = x.to(cast).detach().requires_grad_(), w.to(cast).detach().requires_grad_()
                y = fn(xs, ws)
                y.backward(dy.to(cast))
                return y, xs.grad, ws.grad

            def add_both(fn, x=x, r=r, w=w, dy=dy, cast=dtype):
                xs, ws = x.to(cast).detach().requires_grad_(), w.to(cast).detach().requires_grad_()
                h, y = fn(xs, r.to(cast), ws)
                torch.autograd.backward((h, y), (dy.to(cast), dy.to(cast)))
                return h, y, xs.grad, ws.grad

            def torch_add(x, r, w, D=D):
                h = x + r
                return h, F.rms_norm(h, (D,), w, 1e-6)

            case, size = {"N": N, "D": D, "dtype": str(dtype)[6:], "pass": "fwd+bwd"}, x.element_size()
            compare("rms_norm", {"interlace": partial(both, rms_norm),
                                 "torch F.rms_norm": partial(both, torch_norm)},
                    truth=both(rms_norm_ref, cast=torch.float64), case=case, nbytes=5 * N * D * size)
            compare("add_rms_norm", {"interlace": partial(add_both, add_rms_norm), "torch": partial(add_both, torch_add)},
                    truth=add_both(torch_add, cast=torch.float64), case=case, nbytes=8 * N * D * size)


if __name__ == "__main__":
    main()
