/* A CUDA driver that takes every launch and runs nothing: what is left of a launch is the host's part. Where a test says
   how many bytes each parameter has, what the last launch was given is kept. */
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

int attributes[32]; /* of functions, by their numbers */
int cuFuncSetAttribute(void *function, int attribute, int value) { attributes[attribute] = value; return 0; }
int cuFuncSetCacheConfig(void *function, int cache) { return 0; }
int cuGetErrorString(int error, const char **text) { *text = "an error of the driver that runs nothing"; return 0; }
int cuInit(unsigned flags) { return 0; }
int cuModuleGetFunction(void **function, void *module, const char *name) { *function = (void *)1; return 0; }

int num_modules;
int cuModuleLoadData(void **module, const void *image) {
  if (memcmp(image, "\177ELF", 4)) return 200;
  num_modules++;
  *module = (void *)1;
  return 0;
}

int cuModuleUnload(void *module) { return 0; }
int cuOccupancyMaxActiveClusters(int *number, void *function, void *config) { *number = 1; return 0; }
int cuStreamIsCapturing(void *stream, int *status) { *status = 0; return 0; }
int cuTensorMapEncodeIm2col(void *map) { memset(map, 0, 128); return 0; }

/* The descriptor is all that was said of it. */
int cuTensorMapEncodeTiled(unsigned *map, int type, unsigned rank, address base, const address *shape,
                           const address *strides, const unsigned *box, const unsigned *steps, int interleave,
                           int swizzle, int promotion, int fill) {
  memset(map, 0, 128);
  unsigned words[] = {type | rank << 8 | interleave << 12 | swizzle << 16 | promotion << 20 | fill << 24};
  memcpy(map, words, 4);
  memcpy(map + 2, &base, 8);
  memcpy(map + 4, shape, 8 * rank);
  memcpy(map + 14, strides, 8 * (rank - 1));
  memcpy(map + 22, box, 4 * rank);
  memcpy(map + 27, steps, 4 * rank);
  return 0;
}

unsigned long long num_launches;
unsigned num_parameters, parameter_bytes[64], launch_sizes[7]; /* grid, block, shared memory */
unsigned char parameters[8192];                                /* one behind the other */
void *launch_stream;

static int take(const unsigned *sizes, void **given) {
  num_launches++;
  unsigned char *end = parameters;
  for (unsigned i = 0; i < num_parameters; end += parameter_bytes[i++])
    memcpy(end, given[i], parameter_bytes[i]);
  if (num_parameters) memcpy(launch_sizes, sizes, sizeof launch_sizes);
  return 0;
}

int cuLaunchKernelEx(const unsigned *sizes, void *function, void **given) { return take(sizes, given); }
int cuLaunchKernel(void *function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x, unsigned block_y,
                   unsigned block_z, unsigned shared, void *stream, void **given) {
  unsigned sizes[] = {grid_x, grid_y, grid_z, block_x, block_y, block_z, shared};
  launch_stream = stream;
  return take(sizes, given);
}
