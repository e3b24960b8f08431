// What a kernel of this folder says to the memory of its own and of other GPUs, in PTX; and the host's stand-in for a test.
//
// Each access says its scope and its order. A flag is released at system scope behind a barrier of the block, and acquired at system
// scope; data is relaxed. A multicast address is an alias of the ranks' own addresses: between an access through the one and an access
// through the other the path has a fence.proxy.alias (PTX ISA, memory consistency model), which every wait contains.
// BARRIER, ORDERED and FENCE are the negative controls: a test compiles without them and must see a failure.
#pragma once
#ifndef INTERLACE_BARRIER
#define INTERLACE_BARRIER 1
#endif
#ifndef INTERLACE_FENCE
#define INTERLACE_FENCE 1
#endif
#ifndef INTERLACE_ORDERED
#define INTERLACE_ORDERED 1
#endif

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <type_traits>

namespace interlace {
using bf16 = __nv_bfloat16;
using fp16 = __half;

__device__ inline float up(float x) { return x; }
__device__ inline float up(bf16 x) { return __bfloat162float(x); }
__device__ inline float up(fp16 x) { return __half2float(x); }
template <class T> __device__ T down(float x);
template <> __device__ inline float down<float>(float x) { return x; }
template <> __device__ inline bf16 down<bf16>(float x) { return __float2bfloat16_rn(x); }
template <> __device__ inline fp16 down<fp16>(float x) { return __float2half_rn(x); }

__device__ inline int load_flag(const int* at) {
  int value;
#if INTERLACE_ORDERED
  asm volatile("ld.acquire.sys.global.s32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
#else
  asm volatile("ld.relaxed.sys.global.s32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
#endif
  return value;
}

__device__ inline void store_flag(int* at, int value) {
#if INTERLACE_ORDERED
  asm volatile("st.release.sys.global.s32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
#else
  asm volatile("st.relaxed.sys.global.s32 [%0], %1;" ::"l"(at), "r"(value) : "memory");
#endif
}

__device__ inline int load_word(const int* at) {  // a word of this rank's own
  int value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(at) : "memory");
  return value;
}

__device__ inline int add_word(int* at, int value) {
  int old;
  asm volatile("atom.add.acq_rel.gpu.global.s32 %0, [%1], %2;" : "=r"(old) : "l"(at), "r"(value) : "memory");
  return old;
}

__device__ inline bool take_word(int* at) { return atomicCAS(at, 0, 1) == 0; }

// 16 bytes through a rank's own address
__device__ inline uint4 load_cell(const char* at) { return *reinterpret_cast<const uint4*>(at); }
__device__ inline void store_cell(char* at, uint4 v) { *reinterpret_cast<uint4*>(at) = v; }

__device__ inline void alias_fence() {
#if INTERLACE_FENCE
  asm volatile("fence.proxy.alias;" ::: "memory");
#endif
}

// 16 bytes to the same place of every rank's allocation.
__device__ inline void multimem_store(char* at, uint4 v) {
#if __CUDA_ARCH__ >= 900
  asm volatile("multimem.st.relaxed.sys.global.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(at), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
#else
  __trap();  // unreachable: the launcher refuses such a GPU
#endif
}

// 16 bytes: the sum of what the ranks' allocations hold there, added by the switch in its own order, in fp32 for 16-bit types.
template <class T> __device__ uint4 multimem_sum(const char* at) {
  uint4 v = {};
#if __CUDA_ARCH__ >= 900
#define INTERLACE_SUM(type)                                                                                                  \
  asm volatile("multimem.ld_reduce.relaxed.sys.global.add." type " {%0, %1, %2, %3}, [%4];"                                  \
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(at) : "memory")
  if constexpr (sizeof(T) == 4) {
    INTERLACE_SUM("v4.f32");
  } else if constexpr (std::is_same_v<T, bf16>) {
    INTERLACE_SUM("acc::f32.v4.bf16x2");
  } else {
    INTERLACE_SUM("acc::f32.v4.f16x2");
  }
#undef INTERLACE_SUM
#else
  __trap();
#endif
  return v;
}
}  // namespace interlace
#else
#include "cuda_on_cpu.h"  // tests/: threads of the host for those of a device
#endif
