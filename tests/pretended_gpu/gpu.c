/* A pretended GPU: stands in for the CUDA runtime, the driver, cuBLAS and NCCL under torch's own CUDA build.
 *
 * Kernels do nothing. All that runs on the host is real: torch's dispatch and its checks of devices and dtypes, its caching allocator (so memory
 * is true), autograd's threads, events, pinned memory, and Triton's compiler. Values, times, cuDNN and several GPUs cannot be tested with it.
 *
 * FAKEGPU_FILL: what a copy to the host gives, as a float32 in every place; unset gives zeros. FAKEGPU_COUNT: number of devices (1).
 * FAKEGPU_VERBOSE: names each stub at its first call. `fakegpu_reset` and `fakegpu_dump` count launches by kernel; see counter.py.
 */
#define _GNU_SOURCE
#define __CUDA_RUNTIME_API_H_FAKE
#include <driver_types.h>
#include <vector_types.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <stdint.h>
#include <time.h>
#include <pthread.h>
#include <dlfcn.h>
#include <sys/mman.h>
#define FAKE int
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static size_t TOTAL = 81559ULL << 20;       /* H100: what nvidia-smi says, less the context */
static size_t USED = 600ULL << 20, PEAK = 0;
static int verbose = -1;
void fake_note(const char* n) { if (verbose < 0) verbose = getenv("FAKEGPU_VERBOSE") != 0; if (verbose) fprintf(stderr, "[fakegpu] stub %s\n", n); }
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec * 1e3 + t.tv_nsec / 1e6; }

/* kernels: host function -> name -> launches */
typedef struct { const void* fun; const char* name; long count; } K;
static K* table; static size_t cap = 1 << 18, filled;
static K* slot(const void* f) {
  if (!table) table = calloc(cap, sizeof(K));
  size_t i = ((uintptr_t)f * 0x9E3779B97F4A7C15ULL) >> 46;
  while (table[i].fun && table[i].fun != f) i = (i + 1) & (cap - 1);
  return table + i;
}
static long launches, memcpys, memsets, gemms, syncs, d2h;
static void launched(const void* f) { pthread_mutex_lock(&lock); launches++; K* k = slot(f); if (!k->fun) { k->fun = f; k->name = "?"; } k->count++; pthread_mutex_unlock(&lock); }
void fakegpu_reset(void) { launches = memcpys = memsets = gemms = syncs = d2h = 0; if (table) for (size_t i = 0; i < cap; i++) table[i].count = 0; }
void fakegpu_dump(const char* path) {
  FILE* f = fopen(path, "w");
  fprintf(f, "launches %ld\nmemcpy %ld\nmemset %ld\ngemm %ld\nsyncs %ld\nd2h %ld\n", launches, memcpys, memsets, gemms, syncs, d2h);
  for (size_t i = 0; table && i < cap; i++) if (table[i].fun && table[i].count) fprintf(f, "%ld\t%s\n", table[i].count, table[i].name);
  fclose(f);
}
size_t fakegpu_used(void) { return USED; } size_t fakegpu_peak(void) { return PEAK; }

FAKE __cudaRegisterFunction(void** h, const char* fun, char* dfun, const char* name, int a, void* b, void* c, void* d, void* e, int* g) {
  pthread_mutex_lock(&lock); K* k = slot(fun); k->fun = fun; k->name = name; filled++; pthread_mutex_unlock(&lock); return 0; }
void** __cudaRegisterFatBinary(void* p) { static void* x; return &x; }
void __cudaRegisterFatBinaryEnd(void** h) {}
void __cudaUnregisterFatBinary(void** h) {}
void __cudaRegisterVar(void** h, char* a, char* b, const char* c, int d, size_t e, int f, int g) {}
int __cudaInitModule(void** h) { return 1; }
static __thread struct { dim3 g, b; size_t s; void* st; } cfg;
unsigned __cudaPushCallConfiguration(dim3 g, dim3 b, size_t s, void* st) { cfg.g = g; cfg.b = b; cfg.s = s; cfg.st = st; return 0; }
int __cudaPopCallConfiguration(dim3* g, dim3* b, size_t* s, void* st) { *g = cfg.g; *b = cfg.b; *s = cfg.s; *(void**)st = cfg.st; return 0; }
int __cudaGetKernel(void** k, const void* f) { *k = (void*)f; return 0; }
int __cudaLaunchKernel(void* k, dim3 g, dim3 b, void** a, size_t s, void* st) { launched(k); return 0; }
int cudaLaunchKernel(const void* f, dim3 g, dim3 b, void** a, size_t s, cudaStream_t st) { launched(f); return 0; }
int cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void** a) { launched(f); return 0; }
int cudaLaunchCooperativeKernel(const void* f, dim3 g, dim3 b, void** a, size_t s, cudaStream_t st) { launched(f); return 0; }

/* memory */
typedef struct R { uintptr_t p; size_t n; int host; struct R* next; } R; static R* regions;
static void add(void* p, size_t n, int host) { R* r = malloc(sizeof(R)); r->p = (uintptr_t)p; r->n = n; r->host = host; pthread_mutex_lock(&lock); r->next = regions; regions = r; pthread_mutex_unlock(&lock); }
static R* find(const void* p) { for (R* r = regions; r; r = r->next) if ((uintptr_t)p >= r->p && (uintptr_t)p < r->p + r->n) return r; return 0; }
static size_t drop(void* p) { pthread_mutex_lock(&lock); R** q = &regions; while (*q && (*q)->p != (uintptr_t)p) q = &(*q)->next; size_t n = 0; if (*q) { R* r = *q; n = r->n; *q = r->next; free(r); } pthread_mutex_unlock(&lock); return n; }
static __thread int last;
int cudaMalloc(void** p, size_t n) {
  n = (n + (2 << 20) - 1) & ~(size_t)((2 << 20) - 1);
  if (USED + n > TOTAL) { last = cudaErrorMemoryAllocation; *p = 0; return last; }
  void* m = mmap(0, n, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (m == MAP_FAILED) { last = cudaErrorMemoryAllocation; return last; }
  USED += n; if (USED > PEAK) PEAK = USED; add(m, n, 0); *p = m; return 0; }
int cudaFree(void* p) { if (!p) return 0; size_t n = drop(p); if (n) { munmap(p, n); USED -= n; } return 0; }
int cudaHostAlloc(void** p, size_t n, unsigned f) { if (posix_memalign(p, 4096, n ? n : 1)) return cudaErrorMemoryAllocation; add(*p, n, 1); return 0; }
int cudaFreeHost(void* p) { drop(p); free(p); return 0; }
int cudaHostRegister(void* p, size_t n, unsigned f) { add(p, n, 1); return 0; }
int cudaHostUnregister(void* p) { drop(p); return 0; }
int cudaMemGetInfo(size_t* f, size_t* t) { *f = TOTAL - USED; *t = TOTAL; return 0; }
int cudaPointerGetAttributes(struct cudaPointerAttributes* a, const void* p) { memset(a, 0, sizeof *a); pthread_mutex_lock(&lock); R* r = find(p); pthread_mutex_unlock(&lock);
  a->type = !r ? cudaMemoryTypeUnregistered : r->host ? cudaMemoryTypeHost : cudaMemoryTypeDevice; a->devicePointer = r ? (void*)p : 0; a->hostPointer = r && r->host ? (void*)p : 0; return 0; }
static int copy(void* d, const void* s, size_t n) { memcpys++; R *a = find(d), *b = find(s); int dd = a && !a->host, sd = b && !b->host;
  if (!dd && sd) { d2h++; const char* v = getenv("FAKEGPU_FILL"); if (!v) memset(d, 0, n); else if (n % 4) memset(d, 1, n); else { float w = atof(v); for (size_t i = 0; i < n / 4; i++) ((float*)d)[i] = w; } } else if (!dd && !sd) memcpy(d, s, n); return 0; }
int cudaMemcpy(void* d, const void* s, size_t n, int k) { syncs++; return copy(d, s, n); }
int cudaMemcpyAsync(void* d, const void* s, size_t n, int k, void* st) { return copy(d, s, n); }
int cudaMemcpy2DAsync(void* d, size_t dp, const void* s, size_t sp, size_t w, size_t h, int k, void* st) { memcpys++; return 0; }
int cudaMemsetAsync(void* d, int v, size_t n, void* st) { memsets++; return 0; }
int cudaMemset(void* d, int v, size_t n) { memsets++; return 0; }
int cudaMallocAsync(void** p, size_t n, void* s) { return cudaMalloc(p, n); }
int cudaFreeAsync(void* p, void* s) { return cudaFree(p); }
int cudaGetSymbolAddress(void** p, const void* s) { return cudaMalloc(p, 1 << 20); }
/* device */
int cudaGetDeviceCount(int* n) { const char* v = getenv("FAKEGPU_COUNT"); *n = v ? atoi(v) : 1; return 0; }
static __thread int dev;
int cudaGetDevice(int* d) { *d = dev; return 0; }
int cudaSetDevice(int d) { dev = d; return 0; }
int cudaRuntimeGetVersion(int* v) { *v = 13000; return 0; }
int cudaDriverGetVersion(int* v) { *v = 13000; return 0; }
static int attribute(int a) { switch (a) {
  case cudaDevAttrMaxThreadsPerBlock: return 1024; case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: return 1024; case cudaDevAttrMaxBlockDimZ: return 64;
  case cudaDevAttrMaxGridDimX: return 2147483647; case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: return 65535;
  case cudaDevAttrMaxSharedMemoryPerBlock: return 49152; case cudaDevAttrMaxSharedMemoryPerBlockOptin: return 232448; case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return 233472;
  case cudaDevAttrWarpSize: return 32; case cudaDevAttrMultiProcessorCount: return 132; case cudaDevAttrMaxThreadsPerMultiProcessor: return 2048;
  case cudaDevAttrMaxRegistersPerBlock: return 65536; case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
  case cudaDevAttrComputeCapabilityMajor: return 9; case cudaDevAttrComputeCapabilityMinor: return 0; case cudaDevAttrClockRate: return 1980000; case cudaDevAttrMemoryClockRate: return 2619000;
  case cudaDevAttrGlobalMemoryBusWidth: return 5120; case cudaDevAttrL2CacheSize: return 50 << 20; case cudaDevAttrUnifiedAddressing: case cudaDevAttrManagedMemory: case cudaDevAttrConcurrentKernels: case cudaDevAttrCooperativeLaunch: case cudaDevAttrMemoryPoolsSupported: return 1; } return 0; }
int cudaDeviceGetAttribute(int* v, int a, int d) { *v = attribute(a); return 0; }
int cudaGetDeviceProperties(struct cudaDeviceProp* p, int d) { memset(p, 0, sizeof *p); strcpy(p->name, "NVIDIA H100 80GB HBM3"); p->totalGlobalMem = TOTAL; p->sharedMemPerBlock = 49152; p->sharedMemPerBlockOptin = 232448; p->sharedMemPerMultiprocessor = 233472;
  p->regsPerBlock = 65536; p->regsPerMultiprocessor = 65536; p->warpSize = 32; p->maxThreadsPerBlock = 1024; p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024; p->maxThreadsDim[2] = 64; p->maxGridSize[0] = 2147483647; p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->major = 9; p->minor = 0; p->multiProcessorCount = 132; p->maxThreadsPerMultiProcessor = 2048; p->l2CacheSize = 50 << 20; p->unifiedAddressing = 1; p->concurrentKernels = 1; p->asyncEngineCount = 3; p->memoryBusWidth = 5120; p->maxBlocksPerMultiProcessor = 32; p->textureAlignment = 512; p->canMapHostMemory = 1; p->managedMemory = 1; p->cooperativeLaunch = 1; p->memoryPoolsSupported = 1; return 0; }
int cudaDeviceGetPCIBusId(char* s, int n, int d) { snprintf(s, n, "0000:00:04.0"); return 0; }
int cudaDeviceGetStreamPriorityRange(int* a, int* b) { *a = 0; *b = -5; return 0; }
int cudaDeviceCanAccessPeer(int* a, int b, int c) { *a = 0; return 0; }
int cudaDeviceSynchronize(void) { syncs++; return 0; }
int cudaStreamSynchronize(void* s) { syncs++; return 0; }
int cudaEventSynchronize(void* e) { syncs++; return 0; }
int cudaGetLastError(void) { int e = last; last = 0; return e; }
int cudaPeekAtLastError(void) { return last; }
const char* cudaGetErrorString(cudaError_t e) { return e == cudaErrorMemoryAllocation ? "out of memory" : "fake"; }
const char* cudaGetErrorName(cudaError_t e) { return "cudaErrorFake"; }
int cudaGetDriverEntryPointByVersion(const char* sym, void** f, unsigned v, unsigned long long fl, void* st) { *f = dlsym(RTLD_DEFAULT, sym); fake_note(sym); if (st) *(int*)st = *f ? 0 : 1; return 0; }
/* streams and events */
static uintptr_t streams = 0x1000;
int cudaStreamCreate(void** s) { *s = (void*)(streams += 16); return 0; }
int cudaStreamCreateWithPriority(void** s, unsigned f, int p) { *s = (void*)(streams += 16); return 0; }
int cudaStreamGetPriority(void* s, int* p) { *p = 0; return 0; }
int cudaStreamIsCapturing(void* s, int* p) { *p = 0; return 0; }
int cudaStreamGetCaptureInfo(void* s, int* p, void* id, void* g, void* d, void* e, void* n) { *p = 0; if (id) *(unsigned long long*)id = 0; return 0; }
int cudaEventCreate(void** e) { *e = calloc(1, 16); return 0; }
int cudaEventCreateWithFlags(void** e, unsigned f) { *e = calloc(1, 16); return 0; }
int cudaEventDestroy(void* e) { free(e); return 0; }
int cudaEventRecord(void* e, void* s) { *(double*)e = now(); return 0; }
int cudaEventRecordWithFlags(void* e, void* s, unsigned f) { *(double*)e = now(); return 0; }
int cudaEventElapsedTime(float* ms, void* a, void* b) { *ms = *(double*)b - *(double*)a; return 0; }
int cudaThreadExchangeStreamCaptureMode(int* m) { *m = 0; return 0; }
int cudaLaunchHostFunc(void* s, void (*f)(void*), void* d) { f(d); return 0; }
int cudaStreamAddCallback(void* s, void (*f)(void*, int, void*), void* d, unsigned x) { f(s, 0, d); return 0; }
int cudaFuncGetAttributes(struct cudaFuncAttributes* a, const void* f) { memset(a, 0, sizeof *a); a->maxThreadsPerBlock = 1024; a->numRegs = 64; a->binaryVersion = 90; a->ptxVersion = 90; a->maxDynamicSharedSizeBytes = 232448; return 0; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* n, const void* f, int b, size_t s, unsigned x) { *n = 2; return 0; }
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* n, const void* f, int b, size_t s) { *n = 2; return 0; }
/* cuBLAS */
FAKE cublasCreate_v2(void** h) { *h = calloc(1, 64); return 0; }
FAKE cublasDestroy_v2(void* h) { return 0; }
FAKE cublasGetPointerMode_v2(void* h, int* m) { *m = 0; return 0; }
FAKE cublasGetMathMode(void* h, int* m) { *m = 0; return 0; }
static int gemm(void) { __sync_fetch_and_add(&gemms, 1); return 0; }
FAKE cublasGemmEx() { return gemm(); }
FAKE cublasGemmStridedBatchedEx() { return gemm(); }
FAKE cublasSgemm_v2() { return gemm(); }
FAKE cublasSgemmStridedBatched() { return gemm(); }
FAKE cublasDgemm_v2() { return gemm(); }
FAKE cublasCgemm_v2() { return gemm(); }
FAKE cublasLtGetVersion() { return 130100; }
FAKE cublasLtMatmul() { return gemm(); }
FAKE cublasLtMatmulDescCreate(void** p, int a, int b) { *p = calloc(1, 256); return 0; }
FAKE cublasLtMatmulPreferenceCreate(void** p) { *p = calloc(1, 256); return 0; }
FAKE cublasLtMatrixLayoutCreate(void** p, int t, uint64_t r, uint64_t c, int64_t ld) { *p = calloc(1, 256); return 0; }
FAKE cublasLtMatmulDescDestroy(void* p) { free(p); return 0; }
FAKE cublasLtMatmulPreferenceDestroy(void* p) { free(p); return 0; }
FAKE cublasLtMatrixLayoutDestroy(void* p) { free(p); return 0; }
FAKE cublasLtMatmulAlgoGetHeuristic(void* h, void* d, void* A, void* B, void* C, void* D, void* pref, int want, char* results, int* got) { memset(results, 0, 104); *got = 1; return 0; }
/* NCCL */
FAKE ncclGetVersion(int* v) { *v = 22809; return 0; }
FAKE ncclCommInitRank(void** c) { *c = calloc(1, 64); return 0; }
FAKE ncclCommInitRankConfig(void** c) { *c = calloc(1, 64); return 0; }
FAKE ncclCommCount(void* c, int* n) { *n = 1; return 0; }
FAKE ncclCommUserRank(void* c, int* n) { *n = 0; return 0; }
FAKE ncclCommGetAsyncError(void* c, int* e) { *e = 0; return 0; }
FAKE ncclRedOpCreatePreMulSum(int* o) { *o = 5; return 0; }
const char* ncclGetErrorString(int e) { return "fake nccl"; }
const char* ncclGetLastError(void* c) { return "fake nccl"; }
/* driver */
FAKE cuInit(unsigned f) { return 0; }
FAKE cuDriverGetVersion(int* v) { *v = 13000; return 0; }
FAKE cuDeviceGetCount(int* n) { return cudaGetDeviceCount(n); }
FAKE cuDeviceGet(int* d, int i) { *d = i; return 0; }
FAKE cuDeviceGetAttribute(int* v, int a, int d) { *v = attribute(a); return 0; }
FAKE cuDevicePrimaryCtxGetState(int d, unsigned* f, int* active) { *f = 0; *active = 1; return 0; }
FAKE cuDevicePrimaryCtxRetain(void** c, int d) { *c = (void*)0x77; return 0; }
FAKE cuCtxGetCurrent(void** c) { *c = (void*)0x77; return 0; }
FAKE cuCtxGetDevice(int* d) { *d = 0; return 0; }
FAKE cuGetErrorString(int e, const char** s) { *s = "fake"; return 0; }
FAKE cuModuleLoadData(void** m, const void* i) { *m = calloc(1, 64); return 0; }
FAKE cuModuleGetFunction(void** f, void* m, const char* n) { char* s = strdup(n); pthread_mutex_lock(&lock); K* k = slot(s); k->fun = s; k->name = s; pthread_mutex_unlock(&lock); *f = s; return 0; }
FAKE cuFuncGetAttribute(int* v, int a, void* f) { *v = a == 0 ? 1024 : a == 4 ? 64 : 0; return 0; }
FAKE cuFuncSetAttribute(void* f, int a, int v) { return 0; }
FAKE cuLaunchKernel(void* f) { launched(f); return 0; }
FAKE cuLaunchKernelEx(void* c, void* f) { launched(f); return 0; }
FAKE cuOccupancyMaxActiveClusters(int* n) { *n = 66; return 0; }
FAKE cuPointerGetAttribute(void* d, int a, unsigned long long p) { if (a == 2) *(int*)d = 2; else *(unsigned long long*)d = p; return 0; }
FAKE cuCtxSetLimit() { return 0; }
FAKE cuCtxGetLimit(size_t* v) { *v = 1 << 20; return 0; }
FAKE cuCtxPushCurrent_v2() { return 0; }
FAKE cuCtxPopCurrent_v2() { return 0; }
FAKE cuLibraryLoadData(void** m) { *m = calloc(1, 64); return 0; }
FAKE cuOccupancyMaxActiveBlocksPerMultiprocessor_x() { return 0; }
FAKE cuCtxSynchronize() { return 0; }
FAKE cuDeviceGetName(char* s, int n, int d) { strcpy(s, "NVIDIA H100"); return 0; }
FAKE cuDeviceTotalMem_v2(size_t* n, int d) { *n = TOTAL; return 0; }
FAKE cuMemAlloc_v2(void** p, size_t n) { return cudaMalloc(p, n); }
