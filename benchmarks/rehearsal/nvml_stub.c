/* NVML of a machine that is not there. STUB_GPU is "major minor bytes count nvlink name": nvlink is 1
   where every pair of GPUs is connected. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory_t;
static int major, minor, nvlink, count, taken;
static unsigned long long bytes;
static char name[96];
static void take(void) {
  if (taken) return;
  const char *text = getenv("STUB_GPU");
  if (text) sscanf(text, "%d %d %llu %d %d %95[^\n]", &major, &minor, &bytes, &count, &nvlink, name);
  taken = 1;
}
int nvmlInit_v2(void) { take(); return 0; }
int nvmlInitWithFlags(unsigned flags) { take(); return 0; }
int nvmlShutdown(void) { return 0; }
const char *nvmlErrorString(int error) { return "no such entry of the stub"; }
int nvmlDeviceGetCount_v2(unsigned *result) { take(); *result = count; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
  take();
  if (index >= (unsigned)count) return 2; /* NVML_ERROR_INVALID_ARGUMENT */
  *handle = (void *)(size_t)(index + 1);
  return 0;
}
int nvmlDeviceGetIndex(void *device, unsigned *index) { *index = (size_t)device - 1; return 0; }
int nvmlDeviceGetCudaComputeCapability(void *device, int *a, int *b) { *a = major; *b = minor; return 0; }
int nvmlDeviceGetName(void *device, char *result, unsigned length) { snprintf(result, length, "%s", name); return 0; }
int nvmlDeviceGetUUID(void *device, char *result, unsigned length) {
  snprintf(result, length, "GPU-%08zu", (size_t)device);
  return 0;
}
int nvmlDeviceGetMemoryInfo(void *device, memory_t *memory) {
  memory->total = memory->free = bytes;
  memory->used = 0;
  return 0;
}
int nvmlDeviceGetP2PStatus(void *one, void *other, int kind, int *status) { *status = nvlink ? 0 : 1; return 0; }
/* The CUDA runtime, as far as vLLM's allocator for sleeping looks its functions up. */
int cudaSetDevice(int device) { return 0; }
int cudaDeviceSynchronize(void) { return 0; }
int cudaDeviceReset(void) { return 0; }
const char *cudaGetErrorString(int error) { return "the stub has no CUDA"; }
int cudaMalloc(void **pointer, size_t size) { return 2; }
int cudaFree(void *pointer) { return 0; }
int cudaMemset(void *pointer, int value, size_t count) { return 0; }
int cudaMemcpy(void *to, const void *from, size_t count, int kind) { return 0; }
int cudaIpcGetMemHandle(void *handle, void *pointer) { return 2; }
int cudaIpcOpenMemHandle(void **pointer, void *handle, unsigned flags) { return 2; }
int cudaHostRegister(void *pointer, size_t size, unsigned flags) { return 0; }
int cudaHostUnregister(void *pointer) { return 0; }
int cudaGetLastError(void) { return 0; }
