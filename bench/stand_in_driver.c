/* A CUDA driver that takes every launch and runs nothing: what is left of a launch is the host's part. */
#include <string.h>

typedef unsigned long long address;

/* Where Triton asks, this is an H100. */
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
  case 10: *value = 32; break;      /* threads of a warp */
  case 12: *value = 65536; break;   /* registers of a block */
  case 16: *value = 132; break;     /* multiprocessors */
  case 75: *value = 9; break;       /* compute capability, before the point */
  case 97: *value = 232448; break;  /* bytes of shared memory that a block may have */
  default: *value = 0;
  }
  return 0;
}

int cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? 1024 : 0; /* threads of a block; no registers, nothing spilled */
  return 0;
}

int cuPointerGetAttribute(void *found, int attribute, address given) {
  *(address *)found = given;
  return 0;
}

int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
int cuDeviceGet(int *device, int index) { *device = index; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
int cuDriverGetVersion(int *version) { *version = 13020; return 0; }
int cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *function, int cache) { return 0; }
int cuGetErrorString(int error, const char **text) { *text = "an error of the driver that runs nothing"; return 0; }
int cuInit(unsigned flags) { return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)1; return 0; }
int cuModuleLoadData(void **module, const void *image) { *module = (void *)1; return 0; }
int cuModuleUnload(void *module) { return 0; }
int cuOccupancyMaxActiveClusters(int *number, void *function, void *config) { *number = 1; return 0; }
int cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cuTensorMapEncodeIm2col(void *map) { memset(map, 0, 128); return 0; }
int cuTensorMapEncodeTiled(void *map) { memset(map, 0, 128); return 0; }

unsigned long long num_launches;
int cuLaunchKernel(void) { num_launches++; return 0; }
int cuLaunchKernelEx(void) { num_launches++; return 0; }
