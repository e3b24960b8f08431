"""permute, into a reused output, against index_select; its backward. `python -m interlace.bench.bench_permute`"""
from functools import partial

import torch

from ..kernels import permute, route_plan
from .harness import compare

SHAPES = [(8192, 1024, 2, 8), (2048, 1024, 8, 64)]


def main() -> None:
    for T, H, K, E in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            plan = route_plan(torch.rand(T, E).topk(K).indices, E)
            x, dy = torch.randn(T, H, dtype=dtype), torch.randn(T * K, H, dtype=dtype)
            token, size = plan.slot_of_row.long() // K, x.element_size()
            case = {"T": T, "H": H, "K": K, "E": E, "dtype": str(dtype)[6:]}
            ours, theirs, copy = (torch.empty(T * K, H, dtype=dtype) for _ in range(3))
            compare("permute", {"interlace": partial(permute, x, plan, out=ours),
                                "index_select(out=)": partial(torch.index_select, x, 0, token, out=theirs)},
                    truth=x[token], case={**case, "pass": "fwd"}, nbytes=(1 + K) * T * H * size)
            compare("permute", {"memcpy": partial(copy.copy_, dy)}, truth=dy, case={**case, "pass": "copy of y"},
                    nbytes=2 * T * K * H * size)

            def grad(fn, x=x, dy=dy):
                xs = x.detach().requires_grad_()
                fn(xs).backward(dy)
                return xs.grad

            compare("permute", {"interlace": partial(grad, partial(permute, plan=plan)),
                                "index_select": partial(grad, partial(torch.index_select, dim=0, index=token))},
                    truth=torch.zeros(T, H, dtype=torch.float64).index_add(0, token, dy.double()),
                    case={**case, "pass": "fwd+bwd"}, nbytes=2 * (1 + K) * T * H * size)


if __name__ == "__main__":
    main()
