/* A CUDA driver that does nothing, but keeps what a kernel was launched with. */

#include <stdint.h>
#include <string.h>

#define MOST 128

static int sizes[MOST], count, launches;
static unsigned char kept[8 * MOST];

/* How many bytes each parameter of the launches to come has. */
void expect(int number, const int *bytes) {
  count = number;
  memcpy(sizes, bytes, number * sizeof(int));
}

/* Parameters of the last launch, 8 bytes each; returns the number of launches. */
int taken(unsigned char *out) {
  memcpy(out, kept, sizeof kept);
  return launches;
}

int cuLaunchKernelEx(void *config, void *kernel, void **parameters, void **extra) {
  launches++;
  memset(kept, 0, sizeof kept);
  for (int i = 0; i < count; i++)
    memcpy(kept + 8 * i, parameters[i], sizes[i]);
  return 0;
}

/* The largest kernel that Triton asks about has room here, and threads. */
int cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 227 * 1024; return 0; }
int cuFuncGetAttribute(int *value, int attribute, void *kernel) { *value = attribute ? 0 : 1024; return 0; }

int cuCtxGetCurrent(void **context) { *context = kept; return 0; }
int cuCtxGetLimit(size_t *value, int limit) { *value = 1; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxSetLimit(int limit, size_t value) { return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 0; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = kept; return 0; }
int cuFuncSetAttribute(void *kernel, int attribute, int value) { return 0; }
int cuFuncSetCacheConfig(void *kernel, int config) { return 0; }
int cuGetErrorString(int error, const char **text) { *text = "stub"; return 0; }
int cuModuleGetFunction(void **kernel, void *module, const char *name) { *kernel = kept; return 0; }
int cuModuleLoadData(void **module, const void *data) { *module = kept; return 0; }
int cuOccupancyMaxActiveClusters(int *number, void *kernel, void *config) { *number = 1; return 0; }
int cuTensorMapEncodeTiled(void) { return 0; }
int cuPointerGetAttribute(void *data, int attribute, uint64_t place) {
  memcpy(data, &place, 8);
  return 0;
}
