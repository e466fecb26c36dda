/* A CUDA runtime and driver for machines without a device; see run.py.

   Memory of a device is the processor's. A stream is a thread that does what it was given in order, and late; nothing
   else is ordered. A call that would end a capture ends it, a wait that draws a stream into a capture fails, memory that
   was freed is unmapped, and a call that needs a context notes that it made one. Kernels do nothing but `spin_kernel`,
   which sleeps: simulated_kernels.py carries them out by `fake_cuda_call`. */

#define _GNU_SOURCE
#include <cuda_runtime_api.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

enum { NUM_DEVICES = 2, NUM_WAITING = 1 << 16, NUM_BLOCKS = 1 << 16, NUM_STREAMS = 4096, NUM_SPINS = 64, PINNED = -1 };
enum kind { COPY, FILL, WAIT, SLEEP, CALL };
enum { THREAD_LOCAL = cudaStreamCaptureModeThreadLocal, RELAXED = cudaStreamCaptureModeRelaxed };

typedef struct stream stream;
typedef struct {
  enum kind kind;
  char *to;
  const char *from;
  size_t nbytes;
  stream *other; /* WAIT: until it has done `count` */
  unsigned long count;
  double seconds;
  void (*function)(long);
  long argument;
} work;
typedef struct { work *items; size_t num_items; } graph;
struct stream {
  int device, is_started;
  work *waiting;
  unsigned long submitted, done;
  graph *captured;
  int mode, is_invalid;
  pthread_t owner;
  unsigned long long capture;
};
typedef struct { stream *on; unsigned long count; int is_captured; } event;
typedef struct { char *start; size_t nbytes; int device; } block;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t changed = PTHREAD_COND_INITIALIZER;
static stream defaults[NUM_DEVICES] = {{.device = 0}, {.device = 1}}, *streams[NUM_STREAMS];
static block blocks[NUM_BLOCKS];
static int num_blocks, num_streams, num_capturing, has_failed, contexts[NUM_DEVICES];
static size_t used[NUM_DEVICES];
static unsigned long long num_captures;
static long num_captured_copies;
static const void *spins[NUM_SPINS];
static int num_spins;
static _Thread_local int device, mode, pushed[8], num_pushed;
static _Thread_local cudaError_t last;

/* -- for tests ---------------------------------------------------------------------------------------------------- */

long fake_cuda_contexts(void) { return contexts[0] | contexts[1] << 1; }
long fake_cuda_captured_copies(void) { return num_captured_copies; }
void fake_cuda_fail(int is_failed) { has_failed = is_failed; } /* from here on every call does, as after an assert */

/* -- parts -------------------------------------------------------------------------------------------------------- */

static double read_number(const char *name, double otherwise) {
  const char *text = getenv(name);
  return text ? atof(text) : otherwise;
}

static size_t total(void) { return (size_t)read_number("FAKE_CUDA_MEMORY", 8e9); }

static void pause_for(double seconds) {
  struct timespec time = {(time_t)seconds, (long)((seconds - (double)(time_t)seconds) * 1e9)};
  if (seconds > 0) nanosleep(&time, NULL);
}

static cudaError_t fail(cudaError_t code) { return last = code; }

static cudaError_t touch(const char *call) {
  if (has_failed) return fail(cudaErrorAssert);
  if (!contexts[device] && getenv("FAKE_CUDA_TRACE")) fprintf(stderr, "stub: %s makes a context on %d\n", call, device);
  contexts[device] = 1;
  return cudaSuccess;
}

/* Say whether a call may be made while somebody captures; if it may not, it ends the capture. */
static cudaError_t find_harm(const char *call) {
  if (!num_capturing || mode == RELAXED) return cudaSuccess;
  for (int i = 0; i < num_streams; i++) {
    stream *on = streams[i];
    if (!on->captured || on->mode == RELAXED) continue;
    if (!pthread_equal(on->owner, pthread_self()) && (on->mode == THREAD_LOCAL || mode == THREAD_LOCAL)) continue;
    on->is_invalid = 1;
    fprintf(stderr, "stub: %s ends a capture\n", call);
    return fail(cudaErrorStreamCaptureUnsupported);
  }
  return cudaSuccess;
}

static cudaError_t begin(const char *call, int is_harmful) {
  cudaError_t code = touch(call);
  if (code || !is_harmful) return code;
  pthread_mutex_lock(&lock);
  code = find_harm(call);
  pthread_mutex_unlock(&lock);
  return code;
}
#define BEGIN(is_harmful) do { cudaError_t code_ = begin(__func__, is_harmful); if (code_) return code_; } while (0)

static stream *find_stream(cudaStream_t handle) {
  int is_default = !handle || handle == cudaStreamLegacy || handle == cudaStreamPerThread;
  return is_default ? &defaults[device] : (stream *)handle;
}

static void carry_out(work *item, unsigned *seed, double lag) {
  size_t half = item->nbytes / 2;
  if (item->kind == SLEEP) pause_for(item->seconds);
  if (item->kind == CALL) item->function(item->argument);
  if (item->kind == FILL) memset(item->to, (int)item->count, item->nbytes);
  if (item->kind != COPY) return;
  pause_for(lag * (rand_r(seed) % 1000) / 500.0);
  memmove(item->to, item->from, half);
  pause_for(lag / 10);
  memmove(item->to + half, item->from + half, item->nbytes - half);
}

static void *run_stream(void *given) {
  stream *on = given;
  unsigned seed = (unsigned)(size_t)given;
  double lag = read_number("FAKE_CUDA_LAG_US", 0) * 1e-6;
  pthread_mutex_lock(&lock);
  for (;;) {
    while (on->done == on->submitted) pthread_cond_wait(&changed, &lock);
    work item = on->waiting[on->done % NUM_WAITING];
    while (item.kind == WAIT && item.other->done < item.count) pthread_cond_wait(&changed, &lock);
    pthread_mutex_unlock(&lock);
    carry_out(&item, &seed, lag);
    pthread_mutex_lock(&lock);
    on->done++;
    pthread_cond_broadcast(&changed);
  }
  return NULL;
}

static void start(stream *on) {
  pthread_t thread;
  if (on->is_started) return;
  on->is_started = 1;
  on->waiting = calloc(NUM_WAITING, sizeof(work));
  streams[num_streams++] = on;
  pthread_create(&thread, NULL, run_stream, on);
  pthread_detach(thread);
}

static void push(stream *on, work item) { /* with the lock */
  graph *into = on->captured;
  if (into) {
    into->items = realloc(into->items, (into->num_items + 1) * sizeof(work));
    into->items[into->num_items++] = item;
    num_captured_copies += item.kind == COPY;
    return;
  }
  start(on);
  while (on->submitted - on->done >= NUM_WAITING) pthread_cond_wait(&changed, &lock);
  on->waiting[on->submitted++ % NUM_WAITING] = item;
  pthread_cond_broadcast(&changed);
}

static cudaError_t submit(cudaStream_t handle, work item) {
  pthread_mutex_lock(&lock);
  push(find_stream(handle), item);
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}

static void drain(stream *on) { /* with the lock */
  unsigned long count = on->submitted;
  while (on->done < count) pthread_cond_wait(&changed, &lock);
}

void fake_cuda_call(long handle, void (*function)(long), long argument) {
  submit((cudaStream_t)handle, (work){.kind = CALL, .function = function, .argument = argument});
}

/* -- devices ------------------------------------------------------------------------------------------------------ */

cudaError_t cudaGetDeviceCount(int *count) { *count = NUM_DEVICES; return cudaSuccess; }
cudaError_t cudaGetDevice(int *found) { *found = device; return cudaSuccess; }
cudaError_t cudaSetDevice(int index) {
  if (index < 0 || index >= NUM_DEVICES) return fail(cudaErrorInvalidDevice);
  device = index;
  return touch(__func__);
}
cudaError_t cudaInitDevice(int index, unsigned device_flags, unsigned flags) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13000; return cudaSuccess; }
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *found, int index) {
  *found = (struct cudaDeviceProp){.name = "no device", .major = 9, .totalGlobalMem = total(), .multiProcessorCount = 4,
    .warpSize = 32, .maxThreadsPerBlock = 1024, .maxThreadsPerMultiProcessor = 2048, .sharedMemPerBlock = 49152,
    .sharedMemPerMultiprocessor = 233472, .regsPerMultiprocessor = 65536, .regsPerBlock = 65536, .l2CacheSize = 1 << 20,
    .maxGridSize = {65535, 65535, 65535}, .maxThreadsDim = {1024, 1024, 1024}};
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr which, int index) { *value = 0; return cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int index) { snprintf(text, size, "0000:0%d:00.0", index); return cudaSuccess; }
cudaError_t cudaDeviceCanAccessPeer(int *can, int index, int peer) { *can = 0; return cudaSuccess; }
cudaError_t cudaDeviceEnablePeerAccess(int peer, unsigned flags) { return cudaSuccess; }
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { *least = 0; *greatest = -5; return cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) {
  BEGIN(1);
  pthread_mutex_lock(&lock);
  for (int i = 0; i < num_streams; i++) if (streams[i]->device == device) drain(streams[i]);
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
cudaError_t cudaGetLastError(void) { cudaError_t code = last; last = cudaSuccess; return code; }
cudaError_t cudaPeekAtLastError(void) { return last; }
const char *cudaGetErrorName(cudaError_t code) { return "stubError"; }
const char *cudaGetErrorString(cudaError_t code) {
  static _Thread_local char text[64];
  if (code == cudaErrorAssert) return "device-side assert triggered";
  if (code == cudaErrorMemoryAllocation) return "out of memory";
  snprintf(text, sizeof text, "error %d of the stub", code);
  return text;
}

/* -- memory ------------------------------------------------------------------------------------------------------- */

static block *find_block(const void *at) {
  for (int i = 0; i < num_blocks; i++)
    if (blocks[i].start && (char *)at >= blocks[i].start && (char *)at < blocks[i].start + blocks[i].nbytes) return &blocks[i];
  return NULL;
}

static void note_block(void *at, size_t nbytes, int place) {
  int i = 0;
  while (i < num_blocks && blocks[i].start) i++;
  num_blocks += i == num_blocks;
  blocks[i] = (block){at, nbytes, place};
}

static cudaError_t take(void **found, size_t nbytes, int place) {
  const size_t page = 4096, large = 2 << 20;
  nbytes = (nbytes + page - 1) / page * page;
  if (place != PINNED && used[place] + nbytes > total()) return fail(cudaErrorMemoryAllocation);
  char *start_at = mmap(NULL, nbytes + large, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start_at == MAP_FAILED) return fail(cudaErrorMemoryAllocation);
  *found = (void *)(((size_t)start_at + large - 1) / large * large);
  note_block(*found, nbytes, place);
  if (place == PINNED) return cudaSuccess;
  used[place] += nbytes;
  memset(*found, 0xFF, nbytes); /* NaN: whoever looks too soon sees it */
  return cudaSuccess;
}

static cudaError_t let_go(void *at) {
  if (!at) return cudaSuccess;
  for (int i = 0; i < num_streams; i++) drain(streams[i]);
  block *found = find_block(at);
  if (!found || found->start != at) return fail(cudaErrorInvalidValue);
  munmap(found->start, found->nbytes);
  if (found->device != PINNED) used[found->device] -= found->nbytes;
  found->start = NULL;
  return cudaSuccess;
}

static cudaError_t locked_take(void **found, size_t nbytes, int place) {
  pthread_mutex_lock(&lock);
  cudaError_t code = take(found, nbytes, place);
  pthread_mutex_unlock(&lock);
  return code;
}

static cudaError_t locked_let_go(void *at) {
  pthread_mutex_lock(&lock);
  cudaError_t code = let_go(at);
  pthread_mutex_unlock(&lock);
  return code;
}

cudaError_t cudaMalloc(void **found, size_t nbytes) { BEGIN(1); return locked_take(found, nbytes, device); }
cudaError_t cudaFree(void *at) { BEGIN(1); return locked_let_go(at); }
cudaError_t cudaHostAlloc(void **found, size_t nbytes, unsigned flags) { BEGIN(1); return locked_take(found, nbytes, PINNED); }
cudaError_t cudaFreeHost(void *at) { BEGIN(1); return locked_let_go(at); }
cudaError_t cudaHostRegister(void *at, size_t nbytes, unsigned flags) {
  BEGIN(1);
  if (flags & ~15u) return fail(cudaErrorInvalidValue);
  pthread_mutex_lock(&lock);
  note_block(at, nbytes, PINNED);
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void *at) {
  BEGIN(1);
  pthread_mutex_lock(&lock);
  block *found = find_block(at);
  int is_known = found && found->start == at;
  if (is_known) found->start = NULL;
  pthread_mutex_unlock(&lock);
  return is_known ? cudaSuccess : fail(cudaErrorHostMemoryNotRegistered);
}
cudaError_t cudaMemGetInfo(size_t *left, size_t *all) { BEGIN(0); *all = total(); *left = *all - used[device]; return cudaSuccess; }
cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *found, const void *at) {
  pthread_mutex_lock(&lock);
  block *known = find_block(at);
  *found = (struct cudaPointerAttributes){.type = cudaMemoryTypeUnregistered};
  if (known) {
    found->type = known->device == PINNED ? cudaMemoryTypeHost : cudaMemoryTypeDevice;
    found->device = known->device == PINNED ? 0 : known->device;
    found->devicePointer = (void *)at;
  }
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t nbytes, enum cudaMemcpyKind kind, cudaStream_t handle) {
  BEGIN(0);
  pthread_mutex_lock(&lock);
  stream *on = find_stream(handle);
  int is_pageable = !find_block(to) || !find_block(from);
  push(on, (work){.kind = COPY, .to = to, .from = from, .nbytes = nbytes});
  if (is_pageable && !on->captured) drain(on);
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void *to, const void *from, size_t nbytes, enum cudaMemcpyKind kind) {
  cudaError_t code = cudaMemcpyAsync(to, from, nbytes, kind, NULL);
  return code ? code : cudaStreamSynchronize(NULL);
}
cudaError_t cudaMemcpyPeerAsync(void *to, int to_device, const void *from, int from_device, size_t nbytes, cudaStream_t handle) {
  return cudaMemcpyAsync(to, from, nbytes, cudaMemcpyDeviceToDevice, handle);
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t nbytes, cudaStream_t handle) {
  BEGIN(0);
  return submit(handle, (work){.kind = FILL, .to = to, .nbytes = nbytes, .count = value});
}
cudaError_t cudaMemset(void *to, int value, size_t nbytes) { return cudaMemsetAsync(to, value, nbytes, NULL); }

#include "streams.h"
