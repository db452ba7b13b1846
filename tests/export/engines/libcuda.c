// SPDX-License-Identifier: Apache-2.0
// A driver library with one GPU, or with what the macros say: for tests of how the driver is asked.
#include <stddef.h>
#include <string.h>

#ifndef GPUS
#define GPUS 1
#endif
#ifndef INIT
#define INIT 0
#endif
#ifndef VERSION
#define VERSION 13020
#endif

static int depth = 0;

int cuInit(unsigned int flags) { return INIT; }
int cuDriverGetVersion(int* version) { *version = VERSION; return 0; }
int cuDeviceGetCount(int* count) { *count = GPUS; return 0; }
int cuDeviceGet(int* device, int ordinal) { *device = 40 + ordinal; return ordinal < GPUS ? 0 : 101; }
int cuDeviceGetName(char* name, int length, int device) {
    strncpy(name, device == 40 ? "NVIDIA H200" : "NVIDIA L40S", length);
    return 0;
}
int cuDeviceTotalMem_v2(size_t* bytes, int device) {
    *bytes = device == 40 ? 150754820096u : 48305799168u;
    return 0;
}
int cuDeviceGetAttribute(int* value, int attribute, int device) {
    if (attribute != 75 && attribute != 76) return 1;
    *value = attribute == 75 ? (device == 40 ? 9 : 8) : (device == 40 ? 0 : 9);
    return 0;
}
int cuDevicePrimaryCtxRetain(void** context, int device) { *context = (void*)(size_t)device; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
int cuCtxPushCurrent_v2(void* context) { depth++; return 0; }
int cuCtxPopCurrent_v2(void** context) { depth--; return 0; }
int cuMemGetInfo_v2(size_t* free, size_t* total) {
    if (depth != 1) return 201;
    *free = 123456789; *total = 150754820096u;
    return 0;
}
int cuGetErrorName(int code, char const** name) {
    if (code == 100) { *name = "CUDA_ERROR_NO_DEVICE"; return 0; }
    if (code == 201) { *name = "CUDA_ERROR_INVALID_CONTEXT"; return 0; }
    return 1;
}
