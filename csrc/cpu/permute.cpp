// permute on CPU: y[row_of_slot[t, k]] = x[t], every other row zero. Bytes are moved, never computed with. Shapes: kernels/permute.py
#include <optional>

#include "moe_rows.h"

namespace interlace {
namespace {

// Token by token: the row stays in the first-level cache while it is stored K times.
void move_rows(const char* x, const Tensor& row_of_slot, const Tensor& slot_of_row, char* y, int64_t bytes) {
  const int64_t T = row_of_slot.size(0), K = row_of_slot.size(1), R = slot_of_row.size(0);
  const int32_t* row = in<int32_t>(row_of_slot);
  const bool past = past_cache(R * bytes);
  rows(T, K * bytes / 4, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++)
      for (int64_t k = 0; k < K; k++)
        if (const int64_t r = row[t * K + k]; r >= 0) copy_row(y + r * bytes, x + t * bytes, bytes, past);
    fence();
  });
  zero_pads(y, in<int32_t>(slot_of_row), R, bytes);
}

void permute_out(Tensor x, Tensor row_of_slot, Tensor slot_of_row, Tensor y) {
  move_rows(in<char>(x), row_of_slot, slot_of_row, out<char>(y), x.size(1) * x.element_size());
}

std::tuple<Tensor, Tensor> permute_fwd(Tensor x, std::optional<Tensor> probs, Tensor row_of_slot, Tensor slot_of_row) {
  const int64_t R = slot_of_row.size(0);
  Tensor y = torch::stable::new_empty(x, {R, x.size(1)});
  permute_out(x, row_of_slot, slot_of_row, y);
  if (!probs) return {y, torch::stable::new_empty(x, {0})};
  Tensor moved = torch::stable::new_empty(*probs, {R});
  dispatch(*probs, "permute", [&]<class P>(P) {
    const int32_t* slot = in<int32_t>(slot_of_row);
    for (int64_t r = 0; r < R; r++) out<P>(moved)[r] = slot[r] < 0 ? P{} : in<P>(*probs)[slot[r]];
  });
  return {y, moved};
}

STABLE_TORCH_LIBRARY_IMPL(interlace, CPU, m) {
  m.impl("permute_fwd", TORCH_BOX(&permute_fwd));
  m.impl("permute_out", TORCH_BOX(&permute_out));
}
}  // namespace
}  // namespace interlace
