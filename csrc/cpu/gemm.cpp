// gemm on CPU: c = a b in fp32 with operands and result in fp32, bf16 or fp16. How: gemm.h; why: kernels/comm/gemm.py
#include "gemm.h"

namespace interlace {
namespace {
using namespace tiles;

View view(const Tensor& t) { return {t.data_ptr(), t.size(0), t.size(1), t.stride(0), t.stride(1)}; }

template <class F> void floats(const Tensor& t, const F& f) {
  switch (t.scalar_type()) {
    case ScalarType::Float: return f(float{});
    case ScalarType::BFloat16: return f(bf16{});
    case ScalarType::Half: return f(fp16{});
    default: STD_TORCH_CHECK(false, "gemm: dtype must be float32, bfloat16 or float16");
  }
}

// b in panels, as by_panels takes them: what a product does by itself, once for many.
void gemm_pack(Tensor b, Tensor packed) {
  floats(b, [&]<class T>(T) { pack_panels<T>(out<float>(packed), view(b), 0, b.size(1)); });
}

void gemm_packed(Tensor a, Tensor packed, Tensor c) {
  floats(a, [&]<class T>(T) { by_panels<T>(view(a), in<float>(packed), out<T>(c), c.stride(0), 0, c.size(1)); });
}

void gemm(Tensor a, Tensor b, Tensor c) {
  floats(a, [&]<class T>(T) { multiply<T>(view(a), view(b), out<T>(c), c.stride(0)); });
}

STABLE_TORCH_LIBRARY_IMPL(interlace, CPU, m) {
  m.impl("gemm", TORCH_BOX(&gemm));
  m.impl("gemm_pack", TORCH_BOX(&gemm_pack));
  m.impl("gemm_packed", TORCH_BOX(&gemm_packed));
}
}  // namespace
}  // namespace interlace
