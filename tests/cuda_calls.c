// Counts a process's calls of the CUDA runtime. Preloaded (LD_PRELOAD), it receives each call first and
// passes it on, or lets it fail on demand. Used by test_cuda_streams.py.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>

typedef struct {
  unsigned x, y, z;
} Dim3;

static void* last_stream;
static int launches, allocations, synchronisations;
static int error_to_report;

void calls_reset(void) {
  last_stream = NULL;
  launches = allocations = synchronisations = 0;
}
void* calls_last_stream(void) { return last_stream; }
int calls_launches(void) { return launches; }
int calls_allocations(void) { return allocations; }
int calls_synchronisations(void) { return synchronisations; }

// The next question for the last error is answered with this one.
void calls_report_error(int error) { error_to_report = error; }

int cudaGetLastError(void) {
  int (*next)(void) = dlsym(RTLD_NEXT, "cudaGetLastError");
  const int reported = error_to_report;
  error_to_report = 0;
  return reported ? reported : next();
}

// What kernel<<<grid, block, shared, stream>>>() becomes first.
unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
  unsigned (*next)(Dim3, Dim3, size_t, void*) = dlsym(RTLD_NEXT, "__cudaPushCallConfiguration");
  last_stream = stream;
  ++launches;
  return next(grid, block, shared, stream);
}

int cudaMalloc(void** data, size_t size) {
  int (*next)(void**, size_t) = dlsym(RTLD_NEXT, "cudaMalloc");
  ++allocations;
  return next(data, size);
}

int cudaMallocAsync(void** data, size_t size, void* stream) {
  int (*next)(void**, size_t, void*) = dlsym(RTLD_NEXT, "cudaMallocAsync");
  ++allocations;
  return next(data, size, stream);
}

int cudaDeviceSynchronize(void) {
  int (*next)(void) = dlsym(RTLD_NEXT, "cudaDeviceSynchronize");
  ++synchronisations;
  return next();
}

int cudaStreamSynchronize(void* stream) {
  int (*next)(void*) = dlsym(RTLD_NEXT, "cudaStreamSynchronize");
  ++synchronisations;
  return next(stream);
}

int cudaEventSynchronize(void* event) {
  int (*next)(void*) = dlsym(RTLD_NEXT, "cudaEventSynchronize");
  ++synchronisations;
  return next(event);
}

int cudaMemcpy(void* to, const void* from, size_t size, int kind) {
  int (*next)(void*, const void*, size_t, int) = dlsym(RTLD_NEXT, "cudaMemcpy");
  ++synchronisations;
  return next(to, from, size, kind);
}

int cudaMemcpyAsync(void* to, const void* from, size_t size, int kind, void* stream) {
  int (*next)(void*, const void*, size_t, int, void*) = dlsym(RTLD_NEXT, "cudaMemcpyAsync");
  ++synchronisations;  // between host and device it may wait; the operators copy nothing at all
  return next(to, from, size, kind, stream);
}
