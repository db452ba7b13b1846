// SPDX-License-Identifier: Apache-2.0
// A driver library with one GPU whose memory is the host's: enough of the driver's interface for the real cuda-core and
// cuda-bindings to run the runtime's device layer on it. Work is done when it is handed over; while a stream captures,
// copies and fills are recorded, and a launched graph does them. Kernels are not run. A context is current in one thread,
// and what needs one fails in the others.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { INVALID = 1, MEMORY = 2, NO_CONTEXT = 201, NOT_FOUND = 500, UNSUPPORTED = 801 };
enum { ALIGNMENT = 256 };

typedef struct Operation {
    int kind;  // 0 copy, 1 rows, 2 words
    char *target, *source;
    size_t size, rows, target_pitch, source_pitch;
    uint32_t word;
} Operation;
typedef struct Graph { Operation operations[256]; size_t count; } Graph;
typedef struct Stream { Graph *captured; unsigned flags; uint64_t id; } Stream;

static size_t memory_limit = (size_t)1 << 30, used = 0, peak = 0;
static _Thread_local void *current = NULL;
static char context, pool;
static uint64_t streams = 0, stream_count = 0, event_count = 0, graph_count = 0;

// --- what a test asks and sets ---
size_t host_used(void) { return used; }
size_t host_graphs(void) { return graph_count; }
size_t host_streams(void) { return stream_count; }
size_t host_events(void) { return event_count; }
void host_limit(size_t bytes) { memory_limit = bytes; }

// --- driver, device, context ---
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuDeviceGetCount(int *count) { *count = 1; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal ? 101 : 0; }
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, "Host", length); return 0; }
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = memory_limit; return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 9 : attribute == 76 ? 0 : 1;
    return 0;
}
int cuDeviceGetUuid_v2(void *uuid, int device) { memset(uuid, 7, 16); return 0; }
int cuDevicePrimaryCtxRetain(void **made, int device) { *made = &context; return 0; }
int cuDevicePrimaryCtxRelease_v2(int device) { return 0; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) { *flags = 0; *active = 1; return 0; }
int cuCtxGetCurrent(void **found) { *found = current; return 0; }
int cuCtxSetCurrent(void *wanted) { current = wanted; return 0; }
int cuCtxPushCurrent_v2(void *wanted) { current = wanted; return 0; }
int cuCtxPopCurrent_v2(void **found) { *found = current; current = NULL; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return current ? 0 : NO_CONTEXT; }
int cuThreadExchangeStreamCaptureMode(int *mode) { *mode = 0; return 0; }
int cuCtxGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return 0; }
int cuGetErrorName(int code, char const **name) {
    *name = code == MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR_OTHER";
    return 0;
}
int cuGetErrorString(int code, char const **text) { *text = "as the stand-in decides"; return 0; }

// --- memory ---
static int allocated(void **address, size_t size) {
    if (used + size > memory_limit) return MEMORY;
    char *block = aligned_alloc(ALIGNMENT, (size + 2 * ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT);
    *(size_t *)block = size;
    memset(block + ALIGNMENT, 0xDD, size);
    *address = block + ALIGNMENT;
    used += size;
    if (used > peak) peak = used;
    return 0;
}
static int freed(void *address) {
    char *block = (char *)address - ALIGNMENT;
    used -= *(size_t *)block;
    free(block);
    return 0;
}
int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    *free_bytes = memory_limit - used;
    *total = memory_limit;
    return current ? 0 : NO_CONTEXT;
}
int cuDeviceGetDefaultMemPool(void **found, int device) { *found = &pool; return 0; }
int cuDeviceGetMemPool(void **found, int device) { *found = &pool; return 0; }
int cuMemGetDefaultMemPool(void **found, void *location, int type) { *found = &pool; return 0; }
int cuMemGetMemPool(void **found, void *location, int type) { *found = &pool; return 0; }
int cuMemPoolGetAttribute(void *from, int attribute, void *value) {
    *(uint64_t *)value = attribute >= 5 ? used : 0;
    return 0;
}
int cuMemPoolSetAttribute(void *of, int attribute, void *value) { return 0; }
int cuMemAllocFromPoolAsync(void **address, size_t size, void *from, void *stream) { return allocated(address, size); }
int cuMemAllocAsync(void **address, size_t size, void *stream) { return allocated(address, size); }
int cuMemFreeAsync(void *address, void *stream) { return freed(address); }
int cuMemFree_v2(void *address) { return freed(address); }
int cuMemAllocHost_v2(void **address, size_t size) {
    if (!current) return NO_CONTEXT;
    *address = aligned_alloc(ALIGNMENT, (size + 255) / 256 * 256);
    return 0;
}
int cuMemHostAlloc(void **address, size_t size, unsigned flags) { return cuMemAllocHost_v2(address, size); }
int cuMemFreeHost(void *address) { free(address); return 0; }
int cuPointerGetAttribute(void *value, int attribute, void *address) { *(int *)value = 0; return 0; }
int cuPointerGetAttributes(unsigned count, int *attributes, void **values, void *address) {
    for (unsigned i = 0; i < count; i++) *(int *)values[i] = 0;
    return 0;
}

// --- streams and events ---
static void perform(Operation const *o) {
    if (o->kind == 0) memmove(o->target, o->source, o->size);
    if (o->kind == 1)
        for (size_t row = 0; row < o->rows; row++)
            memmove(o->target + row * o->target_pitch, o->source + row * o->source_pitch, o->size);
    if (o->kind == 2)
        for (size_t i = 0; i < o->size; i++) ((uint32_t *)o->target)[i] = o->word;
}
static int handed(Stream *stream, Operation operation) {
    if (!current) return NO_CONTEXT;
    if (!stream) return INVALID;
    if (!stream->captured) { perform(&operation); return 0; }
    if (stream->captured->count == 256) return UNSUPPORTED;
    stream->captured->operations[stream->captured->count++] = operation;
    return 0;
}
int cuStreamCreateWithPriority(Stream **made, unsigned flags, int priority) {
    *made = calloc(1, sizeof(Stream));
    (*made)->flags = flags;
    (*made)->id = ++streams;
    stream_count++;
    return 0;
}
int cuStreamCreate(Stream **made, unsigned flags) { return cuStreamCreateWithPriority(made, flags, 0); }
int cuStreamDestroy_v2(Stream *stream) { stream_count--; free(stream); return 0; }
int cuStreamSynchronize(Stream *stream) { return stream->captured ? 900 : 0; }
int cuStreamGetFlags(Stream *stream, unsigned *flags) { *flags = stream->flags; return 0; }
int cuStreamGetPriority(Stream *stream, int *priority) { *priority = 0; return 0; }
int cuStreamGetId(Stream *stream, uint64_t *id) { *id = stream->id; return 0; }
int cuStreamGetCtx(Stream *stream, void **found) { *found = &context; return 0; }
int cuStreamGetCtx_v2(Stream *stream, void **found, void **green) { *found = &context; *green = NULL; return 0; }
int cuStreamGetDevice(Stream *stream, int *device) { *device = 0; return 0; }
int cuStreamWaitEvent(Stream *stream, void *event, unsigned flags) { return event ? 0 : INVALID; }
int cuEventCreate(void **made, unsigned flags) {
    if (!current) return NO_CONTEXT;
    *made = malloc(1);
    event_count++;
    return 0;
}
int cuEventRecord(void *event, Stream *stream) { return event && stream ? 0 : INVALID; }
int cuEventRecordWithFlags(void *event, Stream *stream, unsigned flags) { return cuEventRecord(event, stream); }
int cuEventQuery(void *event) { return 0; }
int cuEventSynchronize(void *event) { return !current ? NO_CONTEXT : event ? 0 : INVALID; }
int cuEventDestroy_v2(void *event) { event_count--; free(event); return 0; }

// --- copies ---
int cuMemcpyHtoDAsync_v2(void *target, void const *source, size_t size, Stream *stream) {
    return handed(stream, (Operation){.target = target, .source = (char *)source, .size = size});
}
int cuMemcpyDtoHAsync_v2(void *target, void *source, size_t size, Stream *stream) {
    return cuMemcpyHtoDAsync_v2(target, source, size, stream);
}
int cuMemcpyDtoDAsync_v2(void *target, void *source, size_t size, Stream *stream) {
    return cuMemcpyHtoDAsync_v2(target, source, size, stream);
}
int cuMemsetD32Async(void *target, unsigned word, size_t count, Stream *stream) {
    return handed(stream, (Operation){.kind = 2, .target = target, .size = count, .word = word});
}
typedef struct Rows {  // CUDA_MEMCPY2D
    size_t source_x, source_y;
    int source_type;
    void const *source_host;
    void *source, *source_array;
    size_t source_pitch, target_x, target_y;
    int target_type;
    void *target_host, *target, *target_array;
    size_t target_pitch, width, height;
} Rows;
int cuMemcpy2DAsync_v2(Rows const *r, Stream *stream) {
    if (r->source_type != 2 || r->target_type != 2 || r->source_pitch < r->width || r->target_pitch < r->width)
        return INVALID;
    return handed(stream, (Operation){.kind = 1, .target = r->target, .source = r->source, .size = r->width,
                                      .rows = r->height, .target_pitch = r->target_pitch,
                                      .source_pitch = r->source_pitch});
}

// --- graphs ---
int cuStreamBeginCapture_v2(Stream *stream, int mode) {
    if (mode != 1 || stream->captured) return INVALID;  // thread-local
    stream->captured = calloc(1, sizeof(Graph));
    return 0;
}
int cuStreamEndCapture(Stream *stream, Graph **made) {
    *made = stream->captured;
    stream->captured = NULL;
    return *made ? 0 : INVALID;
}
int cuStreamIsCapturing(Stream *stream, int *status) { *status = stream->captured != NULL; return 0; }
int cuStreamGetCaptureInfo_v3(Stream *stream, int *status, uint64_t *id, Graph **graph, void const **dependencies,
                              void const **edges, size_t *count) {
    *status = stream->captured != NULL;
    if (id) *id = 1;
    if (graph) *graph = stream->captured;
    if (dependencies) *dependencies = NULL;
    if (edges) *edges = NULL;
    if (count) *count = 0;
    return 0;
}
int cuStreamGetCaptureInfo_v2(Stream *stream, int *status, uint64_t *id, Graph **graph, void const **d, size_t *count) {
    return cuStreamGetCaptureInfo_v3(stream, status, id, graph, d, NULL, count);
}
int cuGraphGetNodes(Graph *graph, void **nodes, size_t *count) {
    for (size_t i = 0; nodes && i < *count && i < graph->count; i++) nodes[i] = &graph->operations[i];
    *count = graph->count;
    return 0;
}
int cuGraphNodeGetType(Operation *node, int *type) { *type = node->kind == 2 ? 2 : 1; return 0; }
int cuGraphInstantiateWithParams(Graph **made, Graph *graph, uint64_t *parameters) {
    *made = malloc(sizeof(Graph));
    **made = *graph;
    graph_count++;
    ((int *)parameters)[6] = 0;  // result_out: after flags, stream and node
    return 0;
}
int cuGraphInstantiateWithFlags(Graph **made, Graph *graph, unsigned long long flags) {
    *made = malloc(sizeof(Graph));
    **made = *graph;
    graph_count++;
    return 0;
}
int cuGraphClone(Graph **made, Graph *graph) {
    *made = malloc(sizeof(Graph));
    **made = *graph;
    return 0;
}
int cuUserObjectCreate(void **made, void *held, void (*destroy)(void *), unsigned references, unsigned flags) {
    *made = held;
    return 0;
}
int cuUserObjectRelease(void *object, unsigned count) { return 0; }
int cuGraphRetainUserObject(Graph *graph, void *object, unsigned count, unsigned flags) { return 0; }
int cuGraphReleaseUserObject(Graph *graph, void *object, unsigned count) { return 0; }
int cuGraphUpload(Graph *graph, Stream *stream) { return 0; }
int cuGraphLaunch(Graph *graph, Stream *stream) {
    if (!current) return NO_CONTEXT;
    for (size_t i = 0; i < graph->count; i++) perform(&graph->operations[i]);
    return 0;
}
int cuGraphExecDestroy(Graph *graph) { graph_count--; free(graph); return 0; }
int cuGraphDestroy(Graph *graph) { free(graph); return 0; }

// --- how the bindings find all of this ---
int cuGetProcAddress_v2(char const *symbol, void **found, int version, uint64_t flags, int *status) {
    static char const *const suffixes[] = {"", "_v2", "_v3"};
    char name[128];
    *found = NULL;
    for (int i = 2; i >= 0 && !*found; i--) {
        snprintf(name, sizeof name, "%s%s", symbol, suffixes[i]);
        *found = dlsym(RTLD_DEFAULT, name);
    }
    if (status) *status = *found ? 0 : 1;
    return *found ? 0 : NOT_FOUND;
}
int cuGetProcAddress(char const *symbol, void **found, int version, uint64_t flags) {
    return cuGetProcAddress_v2(symbol, found, version, flags, NULL);
}
