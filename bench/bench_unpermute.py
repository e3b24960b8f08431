"""unpermute with probs, into a reused output, against torch's ways; its backward. `python -m interlace.bench.bench_unpermute`"""
import torch
import torch.nn.functional as F

from ..kernels import route_plan, unpermute, unpermute_ref
from .harness import compare

SHAPES = [(8192, 1024, 2, 8), (2048, 1024, 8, 64)]


def forward(y, p, plan, case) -> None:
    (T, K), H, size = p.shape, y.shape[1], y.element_size()
    row, slot = plan.row_of_slot.long(), plan.slot_of_row.long()
    token, weight = slot // K, p.flatten()[slot][:, None].to(y.dtype)
    ours, sums, weighted, copy = (torch.empty(n, H, dtype=y.dtype) for n in (T, T, T * K, T * K))

    def index_add():
        torch.mul(y, weight, out=weighted)
        return sums.zero_().index_add_(0, token, weighted)

    bag = p.to(y.dtype)                                               # embedding_bag takes weights of y's dtype only
    rows = compare("unpermute", {"interlace": lambda: unpermute(y, plan, p, out=ours),
                                 "mul + index_add": index_add,
                                 "index_add, weighted": lambda: sums.zero_().index_add_(0, token, weighted),
                                 "F.embedding_bag": lambda: F.embedding_bag(row, y, mode="sum", per_sample_weights=bag),
                                 "memcpy of y (error: none)": lambda: (copy.copy_(y), ours)[1]},
                   truth=unpermute_ref(y.double(), plan, p.double()), case={**case, "pass": "fwd"}, nbytes=(1 + K) * T * H * size)
    print(f"    useful bytes per second over memcpy's: {(1 + K) / (2 * K) * rows[-1]['ratio']:.2f}")


def backward(y, p, plan, g, case) -> None:
    (T, K), H = p.shape, y.shape[1]
    slot = plan.slot_of_row.long()
    token = slot // K

    def composed(y, p):
        weighted = y * p.flatten()[slot][:, None].to(y.dtype)
        return y.new_zeros(T, H).index_add(0, token, weighted)

    def graph(fn, cast):
        ys, ps = y.to(cast).detach().requires_grad_(), p.to(p.dtype if cast == y.dtype else cast).detach().requires_grad_()
        return fn(ys, ps), (ys, ps)

    def bwd(fn, cast=y.dtype):
        o, leaves = graph(fn, cast)
        return lambda: torch.autograd.grad(o, leaves, g.to(cast), retain_graph=True)

    ours = lambda y, p: unpermute(y, plan, p)  # noqa: E731
    compare("unpermute", {"interlace": bwd(ours), "mul + index_add": bwd(composed)}, truth=bwd(composed, torch.float64)(),
            case={**case, "pass": "bwd"}, nbytes=(1 + 2 * K) * T * H * y.element_size())


def main() -> None:
    for T, H, K, E in SHAPES:
        for dtype in (torch.float32, torch.bfloat16):
            torch.manual_seed(0)
            scores, ids = torch.rand(T, E).topk(K)
            plan = route_plan(ids, E)
            case = {"T": T, "H": H, "K": K, "E": E, "dtype": str(dtype)[6:]}
            y, g = torch.randn(T * K, H).to(dtype), torch.randn(T, H).to(dtype)
            forward(y, scores.softmax(-1), plan, case)
            backward(y, scores.softmax(-1), plan, g, case)


if __name__ == "__main__":
    main()
