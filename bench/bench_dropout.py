"""dropout, forward + backward, against torch's own. `python -m interlace.bench.bench_dropout`

The two drop different elements, so each way's first call, the one `compare` takes the error of, returns its distance
from its own truth: x and dy over 1 - p in fp64 where its y is not zero, and zero elsewhere.
"""
import torch
import torch.nn.functional as F

from ..kernels import dropout
from .harness import compare

SHAPES = [(1024, 256), (4096, 1024)]
P = 0.1


def _way(fn, x, dy):
    checked = False

    def run():
        nonlocal checked
        xs = x.detach().requires_grad_()
        y = fn(xs)
        y.backward(dy)
        if checked:
            return y, xs.grad
        checked = True
        truth = [torch.where(y != 0, full.double() / (1 - P), 0.0) for full in (x, dy)]
        return tuple((got.double() - want) / want.abs().max() for got, want in zip((y, xs.grad), truth, strict=True))

    return run


def main() -> None:
    for N, D in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            x, dy = torch.randn(N, D, dtype=dtype), torch.randn(N, D, dtype=dtype)
            strides = (3 * D, 1)                                      # x as a shard of a tensor three times as wide
            compare("dropout", {"interlace": _way(lambda x: dropout(x, P, 1), x, dy),
                                "interlace, a shard": _way(lambda x, s=strides: dropout(x, P, 1, strides=s), x, dy),
                                "torch F.dropout": _way(lambda x: F.dropout(x, P), x, dy)},
                    truth=(torch.zeros(N, D), torch.zeros(N, D)), nbytes=4 * N * D * x.element_size(),
                    case={"N": N, "D": D, "p": P, "dtype": str(dtype)[6:], "pass": "fwd+bwd"})


if __name__ == "__main__":
    main()
