// dispatch and combine over the heap: token rows to the ranks of their experts, and sums of rows back. Meaning: kernels/comm/dispatch.py
//
// Both go through the tokens in chunks, one tick each (heap.h). dispatch: my tokens of the chunk into my place, once however many
// experts want them (and those nobody else wants, too: one long copy costs less than many short ones); every rank then reads those
// it wants, each into all of its rows. combine: into my place, for every other rank, the sums over my rows of its tokens of the
// chunk; every rank then adds up the sums of its own tokens. Row i of a place belongs to token i of the chunk: both sides know from
// the ids which of them are there, the others are not read.
#include "call.h"

namespace interlace {
namespace {

// Who wants what: ids [world * most, K] of all ranks' tokens, -1 for none; row [world * most, K] of my buffer, -1 for none.
struct Plan {
  const int32_t *ids, *row;
  int64_t tokens, most, K, per;  // tokens of mine, the most of a rank, experts a rank
  int count(int64_t token, int r) const {  // experts of rank r that `token` (of all ranks') asks for
    int n = 0;
    for (int64_t i = token * K; i < (token + 1) * K; i++) n += ids[i] >= r * per && ids[i] < (r + 1) * per;
    return n;
  }
};

// The chunks of a call: `rows` tokens by `cols` columns, so that `copies` rows of each token fit a chunk of the heap.
struct Grid {
  int64_t H, most, rows, cols, across, span;
  Grid(const Heap& h, int64_t H, int64_t most, int64_t size, int64_t copies) : H(H), most(most) {
    cols = std::clamp<int64_t>(h.chunk / copies / size, 1, std::max<int64_t>(H, 1));
    rows = std::clamp<int64_t>(h.chunk / (copies * cols * size), 1, std::max<int64_t>(most, 1));
    across = chunks(H, cols), span = copies * rows * cols * size;
  }
  int64_t ticks() const { return across * chunks(most, rows); }
  int64_t first(int64_t k) const { return k / across * rows; }  // token
  int64_t last(int64_t k, int64_t tokens) const { return std::min(tokens, first(k) + rows); }
  int64_t column(int64_t k) const { return k % across * cols; }
  int64_t width(int64_t k) const { return std::min(cols, H - column(k)); }
};

void fence() {
#if defined(__x86_64__)
  __builtin_ia32_sfence();  // other threads read what went past the caches
#endif
}

void post(Heap& h, uint32_t t, int64_t k, const Desc& d) { k ? signal(h, t) : first_signal(h, t, d); }
int await(Heap& h, uint32_t t, int64_t k, const Desc& d) { return k ? wait_all(h, t, d.op) : first_wait(h, t, d); }

}  // namespace
}  // namespace interlace

using namespace interlace;

// y[row] = the token's x, of all ranks; rows without a slot are zeros. x [tokens, H], y [R, H] of `size` bytes an element.
INTERLACE_API int interlace_dispatch(Heap* heap, const char* x, char* y, const int32_t* ids, const int32_t* row, const int32_t* slot,
                                     int64_t tokens, int64_t most, int64_t K, int64_t per, int64_t R, int64_t H, int64_t size, int dtype) {
  Call call(heap, DISPATCH, x, y, tokens * H * size);
  if (call.rc) return call.rc;
  Heap& h = *heap;
  const Plan plan{ids, row, tokens, most, K, per};
  const Grid grid(h, H, most, size, 1);
  const Desc d{DISPATCH, uint32_t(dtype), uint32_t(most), 0, H};
  const auto put = R * H * size >= h.stream ? kernels().past : kernels().copy;
  for (int64_t r = 0; r < R; r++)
    if (slot[r] < 0) memset(y + r * H * size, 0, size_t(H * size));
  for (int64_t k = 0; k < grid.ticks(); k++) {
    const uint32_t t = h.epoch() + 1;
    const int64_t first = grid.first(k), at = grid.column(k) * size, bytes = grid.width(k) * size;
    auto scatter = [&](int q, const char* from, int64_t stride, int64_t end) {  // token i of rank q's chunk is at from + i * stride
      const int32_t* to = row + (q * most + first) * K;
      for (int64_t i = 0; i < end - first; i++, from += stride)
        for (int64_t j = 0; j < K; j++)
          if (const int64_t r = *to++; r >= 0) put(y + r * H * size + at, from, bytes);
    };
    char* mine = begin(h, t, grid.span);
    const int64_t end = grid.last(k, tokens);
    if (grid.across == 1) fill(h, mine, x + first * H * size, std::max<int64_t>(0, end - first) * bytes);
    else for (int64_t i = first; i < end; i++) fill(h, mine + (i - first) * bytes, x + i * H * size + at, bytes);
    post(h, t, k, d);
    scatter(h.rank, x + first * H * size + at, H * size, end);  // while the others come
    if (const int rc = await(h, t, k, d)) return rc;
    for (int i = 1; i < h.world; i++) {
      const int q = (h.rank + i) % h.world;
      scatter(q, h.place(q, t, grid.span), bytes, grid.last(k, most));
    }
  }
  fence();
  return OK;
}

// o[t] = the sum over ranks of (the sum over its rows there of y) + residual[t], which may be null. y [.., H], o [tokens, H].
INTERLACE_API int interlace_combine(Heap* heap, const char* y, char* o, const char* residual, const int32_t* ids, const int32_t* row,
                                    int64_t tokens, int64_t most, int64_t K, int64_t per, int64_t H, int dtype) {
  Call call(heap, COMBINE, y, o, 0);
  if (call.rc) return call.rc;
  Heap& h = *heap;
  const int64_t size = SIZES[dtype], wide = std::max<int64_t>(size, 4);
  const Plan plan{ids, row, tokens, most, K, per};
  const Grid grid(h, H, most, wide, h.world - 1);
  const Desc d{COMBINE, uint32_t(dtype), uint32_t(most), 0, H};
  const bool lines = reinterpret_cast<uintptr_t>(o) % 64 == 0 && H * size % 64 == 0 && grid.across == 1;
  const bool past = lines && tokens * H * size >= h.stream;
  std::vector<const void*> rows(K), next(K), terms(h.world + 1);
  std::vector<Group> groups(h.world + 1);
  const SumRows narrow = kernels().wide[dtype], total = kernels().total[dtype];
  for (int64_t k = 0; k < grid.ticks(); k++) {
    const uint32_t t = h.epoch() + 1;
    const int64_t first = grid.first(k), at = grid.column(k) * size, n = grid.width(k);
    auto find = [&](int64_t token, std::vector<const void*>& found) {  // my rows of `token`
      int m = 0;
      for (int64_t j = token * K; j < (token + 1) * K; j++)
        if (row[j] >= 0) found[m++] = y + row[j] * H * size + at;
      return m;
    };
    auto part = [&](int q, int r, int64_t i) {  // in rank q's place: the sums for rank r's token i of the chunk
      return h.place(q, t, grid.span) + (((r - q - 1 + h.world) % h.world) * grid.rows + i) * grid.cols * wide;
    };
    begin(h, t, grid.span);
    for (int i = 1; i < h.world; i++) {
      const int q = (h.rank + i) % h.world;
      const int64_t end = grid.last(k, most);
      for (int64_t token = first; token < end; token++) {
        const int asked = plan.count(q * most + token, h.rank);
        if (!asked) continue;
        const int m = find(q * most + token, rows), ahead = token + 1 < end ? find(q * most + token + 1, next) : 0;
        const Group mine{rows.data(), m, false};
        (asked == 1 ? total : narrow)(part(h.rank, q, token - first), &mine, m > 0, n, next.data(), ahead, false);
      }
    }
    post(h, t, k, d);
    if (const int rc = await(h, t, k, d)) return rc;
    const int64_t end = grid.last(k, tokens);
    for (int64_t token = first; token < end; token++) {
      const int64_t own = h.rank * most + token;
      int g = 0;
      for (int q = 0; q < h.world; q++) {
        if (q == h.rank) {
          if (const int m = find(own, rows)) groups[g++] = {rows.data(), m, false};
        } else if (const int asked = plan.count(own, q)) {  // one row is exact in its own type, and half as long in 16 bits
          terms[g] = part(q, h.rank, token - first);
          groups[g] = {&terms[g], 1, asked > 1 && size < 4};
          g++;
        }
      }
      if (residual) terms[g] = residual + token * H * size + at, groups[g] = {&terms[g], 1, false}, g++;
      const int ahead = token + 1 < end ? find(own + 1, next) : 0;
      total(o + token * H * size + at, groups.data(), g, n, next.data(), ahead, past);
    }
  }
  fence();
  return OK;
}
