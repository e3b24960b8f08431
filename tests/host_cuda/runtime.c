// A CUDA runtime whose device is the host, to run the GPU's tests where there is none: device memory is the host's, copies are memcpy,
// streams run at once, kernels do nothing. What is not here returns success (build.py). HOST_CUDA_GPUS: how many devices; default 1.
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#define TRY(what) do { what; return cudaSuccess; } while (0)
static const size_t TOTAL = (size_t)140 << 30, PAGE = 4096;           // an H200's; pages that nobody touches cost nothing

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct { char* at; size_t size; int host; } blocks[1 << 16];
static int count;
static size_t used;

void host_cuda_note(void* p, size_t n, int host) {
  pthread_mutex_lock(&lock);
  if (count == 1 << 16) abort();
  blocks[count].at = p, blocks[count].size = n, blocks[count++].host = host;
  used += n;
  pthread_mutex_unlock(&lock);
}

int host_cuda_kind(const void* q) {                                   // 0: not ours; 1: pinned; 2: of the device
  int kind = 0;
  pthread_mutex_lock(&lock);
  for (int i = 0; i < count && !kind; i++)
    if ((const char*)q >= blocks[i].at && (const char*)q < blocks[i].at + blocks[i].size) kind = blocks[i].host ? 1 : 2;
  pthread_mutex_unlock(&lock);
  return kind;
}

static cudaError_t get(void** p, size_t n, int host) {
  if (used + n > TOTAL) return cudaErrorMemoryAllocation;
  *p = mmap(NULL, n ? n : 1, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);   // zero
  if (*p == MAP_FAILED) return cudaErrorMemoryAllocation;
  TRY(host_cuda_note(*p, n ? n : 1, host));
}

static cudaError_t drop(void* p) {
  pthread_mutex_lock(&lock);
  for (int i = 0; i < count; i++)
    if (blocks[i].at == p) {
      munmap(p, blocks[i].size), used -= blocks[i].size, blocks[i] = blocks[--count];
      break;
    }
  TRY(pthread_mutex_unlock(&lock));
}

int host_cuda_attribute(int which) {                                  // of sm_90, by the numbers of cudaDeviceAttr and CUdevice_attribute
  static const int known[][2] = {
      {1, 1024}, {2, 1024}, {3, 1024}, {4, 64}, {5, 2147483647}, {6, 65535}, {7, 65535}, {8, 49152}, {10, 32}, {12, 65536},
      {13, 1980000}, {16, 132}, {36, 2619000}, {37, 6144}, {38, 60 << 20}, {39, 2048}, {40, 1}, {41, 1}, {75, 9}, {76, 0}, {81, 233472},
      {82, 65536}, {95, 1}, {97, 232448}, {102, 1}, {103, 1}, {104, 1}, {115, 1}};
  for (size_t i = 0; i < sizeof known / sizeof *known; i++)
    if (known[i][0] == which) return known[i][1];
  return 0;
}

static int gpus(void) { const char* n = getenv("HOST_CUDA_GPUS"); return n ? atoi(n) : 1; }
static __thread int current;
cudaError_t cudaGetDeviceCount(int* n) { TRY(*n = gpus()); }
cudaError_t cudaGetDevice(int* d) { TRY(*d = current); }
cudaError_t cudaSetDevice(int d) { if (d < 0 || d >= gpus()) return cudaErrorInvalidDevice; TRY(current = d); }
cudaError_t cudaDriverGetVersion(int* v) { TRY(*v = 13000); }
cudaError_t cudaRuntimeGetVersion(int* v) { TRY(*v = 13000); }
const char* cudaGetErrorName(cudaError_t e) { (void)e; return "host_cuda"; }
const char* cudaGetErrorString(cudaError_t e) { return e == cudaErrorMemoryAllocation ? "out of memory" : "refused by tests/host_cuda"; }
cudaError_t cudaDeviceGetAttribute(int* v, enum cudaDeviceAttr a, int d) { (void)d; TRY(*v = host_cuda_attribute(a)); }
cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* most) { TRY((*least = 0, *most = -5)); }
cudaError_t cudaDeviceCanAccessPeer(int* can, int a, int b) { TRY(*can = a != b); }
cudaError_t cudaDeviceGetPCIBusId(char* s, int n, int d) { TRY(snprintf(s, n, "0000:%02x:00.0", d + 1)); }
cudaError_t cudaMemGetInfo(size_t* unused, size_t* all) { TRY((*unused = TOTAL - used, *all = TOTAL)); }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp* p, int d) {
  memset(p, 0, sizeof *p);
  strcpy(p->name, "no GPU (tests/host_cuda)");
  p->totalGlobalMem = TOTAL, p->major = 9, p->multiProcessorCount = 132, p->warpSize = 32, p->l2CacheSize = 60 << 20;
  p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048, p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlock = 49152, p->sharedMemPerBlockOptin = 232448, p->sharedMemPerMultiprocessor = 233472, p->memoryBusWidth = 6144;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535, p->maxBlocksPerMultiProcessor = 32;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->unifiedAddressing = p->concurrentKernels = p->cooperativeLaunch = 1;
  TRY(p->uuid.bytes[0] = d + 1);
}

cudaError_t cudaMalloc(void** p, size_t n) { return get(p, n, 0); }
cudaError_t cudaMallocHost(void** p, size_t n) { return get(p, n, 1); }
cudaError_t cudaHostAlloc(void** p, size_t n, unsigned f) { (void)f; return get(p, n, 1); }
cudaError_t cudaFree(void* p) { return drop(p); }
cudaError_t cudaFreeHost(void* p) { return drop(p); }
cudaError_t cudaHostGetDevicePointer(void** d, void* h, unsigned f) { (void)f; TRY(*d = h); }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes* a, const void* p) {
  int kind = host_cuda_kind(p);
  memset(a, 0, sizeof *a);
  a->device = current, a->type = kind == 2 ? cudaMemoryTypeDevice : kind ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  TRY((a->devicePointer = kind ? (void*)p : NULL, a->hostPointer = kind == 1 ? (void*)p : NULL));
}
cudaError_t cudaMemcpy(void* d, const void* s, size_t n, enum cudaMemcpyKind k) { (void)k; TRY(memmove(d, s, n)); }
cudaError_t cudaMemcpyAsync(void* d, const void* s, size_t n, enum cudaMemcpyKind k, cudaStream_t t) {
  (void)k, (void)t;
  TRY(memmove(d, s, n));
}
cudaError_t cudaMemcpy2DAsync(void* d, size_t dp, const void* s, size_t sp, size_t w, size_t h, enum cudaMemcpyKind k, cudaStream_t t) {
  (void)k, (void)t;
  TRY(for (size_t i = 0; i < h; i++) memmove((char*)d + i * dp, (const char*)s + i * sp, w));
}
cudaError_t cudaMemset(void* d, int v, size_t n) { TRY(memset(d, v, n)); }
cudaError_t cudaMemsetAsync(void* d, int v, size_t n, cudaStream_t t) { (void)t; TRY(memset(d, v, n)); }

static void* fresh(void) { static long last = 1 << 16; return (void*)__atomic_add_fetch(&last, 256, __ATOMIC_RELAXED); }
static __thread cudaStream_t capturing;
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* s, unsigned f) { (void)f; TRY(*s = fresh()); }
cudaError_t cudaStreamCreateWithPriority(cudaStream_t* s, unsigned f, int p) { (void)f, (void)p; TRY(*s = fresh()); }
cudaError_t cudaStreamGetPriority(cudaStream_t s, int* p) { (void)s; TRY(*p = 0); }
cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus* c) {
  TRY(*c = s && s == capturing ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone);
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus* c, unsigned long long* id, cudaGraph_t* g,
                                     const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges, size_t* n) {
  cudaStreamIsCapturing(s, c);
  if (id) *id = *c != 0;
  if (g) *g = *c ? (cudaGraph_t)fresh() : NULL;
  if (nodes) *nodes = NULL;
  if (edges) *edges = NULL;
  if (n) *n = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode m) { (void)m; TRY(capturing = s); }
cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t* g) { (void)s; TRY((capturing = NULL, *g = fresh())); }
cudaError_t cudaGraphGetNodes(cudaGraph_t g, cudaGraphNode_t* nodes, size_t* n) { (void)g, (void)nodes; TRY(*n = 1); }   // 0 warns
cudaError_t cudaGraphInstantiate(cudaGraphExec_t* e, cudaGraph_t g, unsigned long long f) { (void)g, (void)f; TRY(*e = fresh()); }

static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec * 1e3 + t.tv_nsec * 1e-6; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* e, unsigned f) { (void)f; TRY(*e = calloc(1, sizeof(double))); }
cudaError_t cudaEventDestroy(cudaEvent_t e) { TRY(free(e)); }
cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t s) { (void)s; TRY(*(double*)e = now()); }
cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned f) { (void)f; return cudaEventRecord(e, s); }
cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t a, cudaEvent_t b) { TRY(*ms = *(double*)b - *(double*)a + 1e-3); }

cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes* a, const void* f) {
  (void)f;
  memset(a, 0, sizeof *a);
  TRY((a->maxThreadsPerBlock = 1024, a->numRegs = 32));
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void* f, int b, size_t s) { (void)f, (void)b, (void)s; TRY(*n = 2); }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void* f, int b, size_t s, unsigned g) {
  (void)g;
  return cudaOccupancyMaxActiveBlocksPerMultiprocessor(n, f, b, s);
}
void** __cudaRegisterFatBinary(void* p) { (void)p; return calloc(1, 64); }
cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** f, unsigned v, unsigned long long g,
                                             enum cudaDriverEntryPointQueryResult* found) {
  static void* driver;
  (void)v, (void)g;
  if (!driver) driver = dlopen("libcuda.so.1", RTLD_NOW);
  *f = driver ? dlsym(driver, name) : NULL;
  if (found) *found = *f ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}
