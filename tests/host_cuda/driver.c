// The CUDA driver beside runtime.c, as far as Triton's launcher and torch's symmetric memory ask it. A launch checks its grid and does
// nothing; memory that processes share is a memfd.
#define _GNU_SOURCE
#include <cuda.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#define TRY(what) do { what; return CUDA_SUCCESS; } while (0)
static void* runtime(const char* name) {
  static void* lib;
  if (!lib) lib = dlopen("libcudart.so.13", RTLD_NOW);
  return dlsym(lib, name);
}
static void* fresh(void) { static long last = 1 << 24; return (void*)__atomic_add_fetch(&last, 256, __ATOMIC_RELAXED); }

CUresult cuDriverGetVersion(int* v) { TRY(*v = 13000); }
CUresult cuDeviceGetCount(int* n) { return ((int (*)(int*))runtime("cudaGetDeviceCount"))(n); }
CUresult cuDeviceGet(CUdevice* d, int i) { TRY(*d = i); }
CUresult cuDeviceGetName(char* s, int n, CUdevice d) { (void)d; TRY(snprintf(s, n, "no GPU (tests/host_cuda)")); }
CUresult cuDeviceGetAttribute(int* v, CUdevice_attribute a, CUdevice d) {
  (void)d;
  TRY(*v = ((int (*)(int))runtime("host_cuda_attribute"))(a));
}
CUresult cuDevicePrimaryCtxRetain(CUcontext* c, CUdevice d) { (void)d; TRY(*c = (CUcontext)1); }
CUresult cuDevicePrimaryCtxGetState(CUdevice d, unsigned* f, int* active) { (void)d; TRY((*f = 0, *active = 1)); }
CUresult cuCtxGetCurrent(CUcontext* c) { TRY(*c = (CUcontext)1); }
CUresult cuCtxGetDevice(CUdevice* d) { return ((int (*)(int*))runtime("cudaGetDevice"))(d); }
CUresult cuGetErrorString(CUresult e, const char** s) { (void)e; TRY(*s = "refused by tests/host_cuda"); }

CUresult cuModuleLoadData(CUmodule* m, const void* image) { (void)image; TRY(*m = fresh()); }
CUresult cuModuleGetFunction(CUfunction* f, CUmodule m, const char* name) { (void)m, (void)name; TRY(*f = fresh()); }
CUresult cuFuncGetAttribute(int* v, CUfunction_attribute a, CUfunction f) {
  (void)f;
  TRY(*v = a == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : a == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : 0);
}
CUresult cuPointerGetAttribute(void* v, CUpointer_attribute a, CUdeviceptr p) {
  if (!((int (*)(const void*))runtime("host_cuda_kind"))((void*)p)) return CUDA_ERROR_INVALID_VALUE;
  if (a == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) TRY(*(CUdeviceptr*)v = p);
  TRY(*(int*)v = CU_MEMORYTYPE_DEVICE);
}
CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void** args, void** extra) {
  (void)f, (void)args, (void)extra;
  int grid = c->gridDimX && c->gridDimY && c->gridDimZ && c->gridDimY < 65536 && c->gridDimZ < 65536;
  return grid && c->sharedMemBytes <= 232448 ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

typedef struct { int fd; } Shared;
static CUresult share(CUmemGenericAllocationHandle* h, int fd) {
  Shared* s = malloc(sizeof *s);
  TRY((s->fd = fd, *h = (CUmemGenericAllocationHandle)s));
}
CUresult cuMemGetAllocationGranularity(size_t* g, const CUmemAllocationProp* p, CUmemAllocationGranularity_flags o) {
  (void)p, (void)o;
  TRY(*g = 2 << 20);
}
CUresult cuMemCreate(CUmemGenericAllocationHandle* h, size_t n, const CUmemAllocationProp* p, unsigned long long f) {
  int fd = memfd_create("host_cuda", 0);
  (void)p, (void)f;
  return fd < 0 || ftruncate(fd, n) ? CUDA_ERROR_OUT_OF_MEMORY : share(h, fd);
}
CUresult cuMemExportToShareableHandle(void* fd, CUmemGenericAllocationHandle h, CUmemAllocationHandleType t, unsigned long long f) {
  (void)t, (void)f;
  TRY(*(int*)fd = dup(((Shared*)h)->fd));
}
CUresult cuMemImportFromShareableHandle(CUmemGenericAllocationHandle* h, void* fd, CUmemAllocationHandleType t) {
  (void)t;
  return share(h, dup((int)(long)fd));
}
CUresult cuMemAddressReserve(CUdeviceptr* p, size_t n, size_t align, CUdeviceptr at, unsigned long long f) {
  (void)align, (void)at, (void)f;
  void* m = mmap(NULL, n + (2 << 20), PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  TRY(*p = ((CUdeviceptr)m + (2 << 20) - 1) & ~(CUdeviceptr)((2 << 20) - 1));
}
CUresult cuMemMap(CUdeviceptr p, size_t n, size_t from, CUmemGenericAllocationHandle h, unsigned long long f) {
  (void)f;
  if (mmap((void*)p, n, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, ((Shared*)h)->fd, from) == MAP_FAILED)
    return CUDA_ERROR_INVALID_VALUE;
  TRY(((void (*)(void*, size_t, int))runtime("host_cuda_note"))((void*)p, n, 0));
}
CUresult cuMemsetD32Async(CUdeviceptr p, unsigned v, size_t n, CUstream s) {
  (void)s;
  TRY(for (size_t i = 0; i < n; i++) ((unsigned*)p)[i] = v);
}
