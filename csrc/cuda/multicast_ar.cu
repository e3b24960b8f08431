// multicast_ar on CUDA: the launcher. Schema, fake and the text on it: kernels/comm/multicast_ar.py
#include "multicast_ar.cuh"

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace interlace {
namespace {
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T> void start(const Call& call, bool two_shot, int programs, cudaStream_t stream) {
  auto* kernel = two_shot ? multicast_ar_kernel<T, true> : multicast_ar_kernel<T, false>;
  kernel<<<programs, THREADS, 0, stream>>>(call);
}

// y = sum over ranks of x. peers, local, error: of the pad; multicast: its multicast address; data, nbytes, flags: its layout.
void multicast_ar(Tensor x, Tensor y, Tensor peers, Tensor local, Tensor error, int64_t multicast, int64_t rank, int64_t polls,
                  int64_t data, int64_t nbytes, int64_t flags, int64_t op, bool two_shot, int64_t programs) {
  const int device = x.get_device();
  torch::stable::accelerator::DeviceGuard guard(device);
  int major = 0;
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  STD_TORCH_CHECK(major >= 9, "multicast_ar: the GPU must have multimem instructions, compute capability 9.0 or more, got ", major,
                  ".x; choose another path");
  STD_TORCH_CHECK(multicast != 0, "multicast_ar: the pad must have a multicast address, got none; choose another path");
  const auto* from = static_cast<const char*>(x.data_ptr());
  auto* to = static_cast<char*>(y.data_ptr());
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(from) % VECTOR == 0 && reinterpret_cast<uintptr_t>(to) % VECTOR == 0,
                  "multicast_ar: x and y must begin at a multiple of 16 bytes; clone them");
  const int64_t bytes = x.numel() * static_cast<int64_t>(x.element_size());
  STD_TORCH_CHECK(bytes > 0 && (bytes + CHUNK - 1) / CHUNK <= flags, "multicast_ar: x must have 1 to ", flags * CHUNK, " bytes, got ", bytes,
                  "; make the pad with needs() of the largest call");
  const Call call{from, to, static_cast<const int64_t*>(peers.data_ptr()), static_cast<int*>(local.data_ptr()),
                  static_cast<int*>(error.data_ptr()), reinterpret_cast<char*>(multicast), data, nbytes, bytes, static_cast<int>(rank),
                  static_cast<int>(peers.numel()), static_cast<int>(polls), static_cast<int>(flags), static_cast<int>(op)};
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device, &stream) == 0, "multicast_ar: no current stream");
  switch (x.scalar_type()) {
    case ScalarType::Float: start<float>(call, two_shot, static_cast<int>(programs), static_cast<cudaStream_t>(stream)); break;
    case ScalarType::BFloat16: start<bf16>(call, two_shot, static_cast<int>(programs), static_cast<cudaStream_t>(stream)); break;
    case ScalarType::Half: start<fp16>(call, two_shot, static_cast<int>(programs), static_cast<cudaStream_t>(stream)); break;
    default: STD_TORCH_CHECK(false, "multicast_ar: dtype must be float32, bfloat16 or float16");
  }
  const cudaError_t status = cudaGetLastError();
  STD_TORCH_CHECK(status == cudaSuccess, "multicast_ar: the kernel must start, got ", cudaGetErrorString(status),
                  "; was csrc/cuda built for this GPU? `interlace doctor`");
}

STABLE_TORCH_LIBRARY_IMPL(interlace, CUDA, m) { m.impl("multicast_ar", TORCH_BOX(&multicast_ar)); }
}  // namespace
}  // namespace interlace
