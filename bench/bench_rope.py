"""rope on a slice of a fused qkv buffer, forward + backward, against torch. `python -m interlace.bench.bench_rope`"""
from functools import partial

import torch

from ..kernels import rope, rope_tables
from .harness import compare

SHAPES = [(256, 4, 4, 64), (1024, 4, 16, 64)]                         # S, B, H, Dh: 1024 x 256 and 4096 x 1024


def rotate_half(x):
    a, b = x.chunk(2, -1)
    return torch.cat((-b, a), -1)


def main() -> None:
    for S, B, H, Dh in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            x = torch.randn(S, B, H, 3 * Dh, dtype=dtype)[..., :Dh]   # q, where each head holds its q, k and v
            dy = torch.randn(S, B, H, Dh, dtype=dtype)

            def tables(cast, full, S=S, Dh=Dh):
                cos, sin = rope_tables(torch.arange(S), Dh, dtype=cast)
                return tuple(torch.cat((t, t), -1)[:, None, None] for t in (cos, sin)) if full else (cos, sin)

            def torch_rope(x, cos, sin):
                return x * cos + rotate_half(x) * sin

            def both(fn, angles, x=x, dy=dy, cast=dtype):
                leaf = x.to(cast).detach().requires_grad_()
                y = fn(leaf, *angles)
                y.backward(dy.to(cast))
                return y, leaf.grad

            half, full = tables(torch.float32, False), tables(dtype, True)   # torch's in x.dtype, as models cast them
            exact = tables(torch.float64, True)
            compare("rope", {"interlace": partial(both, rope, half),
                             "torch rotate_half": partial(both, torch_rope, full)},
                    truth=both(torch_rope, exact, cast=torch.float64), nbytes=4 * dy.numel() * dy.element_size(),
                    case={"S": S, "B": B, "H": H, "Dh": Dh, "dtype": str(dtype)[6:], "pass": "fwd+bwd"})


if __name__ == "__main__":
    main()
