/* The second half of stub.c: streams, events, graphs, kernels, and the driver. */

static cudaError_t make_stream(void **found) {
  stream *made = calloc(1, sizeof *made);
  made->device = device;
  *found = made;
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithPriority(cudaStream_t *found, unsigned flags, int priority) { BEGIN(0); return make_stream((void **)found); }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *found, unsigned flags) { BEGIN(0); return make_stream((void **)found); }
cudaError_t cudaStreamCreate(cudaStream_t *found) { BEGIN(0); return make_stream((void **)found); }
cudaError_t cudaStreamDestroy(cudaStream_t handle) { return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t handle, int *priority) { *priority = 0; return cudaSuccess; }
cudaError_t cudaStreamQuery(cudaStream_t handle) {
  BEGIN(1);
  stream *on = find_stream(handle);
  return on->done >= on->submitted ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  BEGIN(1);
  pthread_mutex_lock(&lock);
  stream *on = find_stream(handle);
  int is_captured = on->captured != NULL;
  if (is_captured) on->is_invalid = 1;
  else drain(on);
  pthread_mutex_unlock(&lock);
  return is_captured ? fail(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t *found, unsigned flags) { BEGIN(0); *found = calloc(1, sizeof(event)); return cudaSuccess; }
cudaError_t cudaEventCreate(cudaEvent_t *found) { return cudaEventCreateWithFlags(found, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t handle) { return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t of) {
  BEGIN(0);
  pthread_mutex_lock(&lock);
  stream *on = find_stream(of);
  *(event *)handle = (event){on, on->submitted, on->captured != NULL};
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t handle, cudaStream_t of, unsigned flags) { return cudaEventRecord(handle, of); }
cudaError_t cudaEventQuery(cudaEvent_t handle) {
  BEGIN(1);
  event *asked = (event *)handle;
  if (asked->is_captured) return fail(cudaErrorCapturedEvent);
  return !asked->on || asked->on->done >= asked->count ? cudaSuccess : cudaErrorNotReady;
}
cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  BEGIN(1);
  event *asked = (event *)handle;
  if (asked->is_captured) return fail(cudaErrorCapturedEvent);
  pthread_mutex_lock(&lock);
  while (asked->on && asked->on->done < asked->count) pthread_cond_wait(&changed, &lock);
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
cudaError_t cudaEventElapsedTime(float *milliseconds, cudaEvent_t first, cudaEvent_t second) { *milliseconds = 1; return cudaSuccess; }
cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t of, unsigned flags) {
  BEGIN(0);
  pthread_mutex_lock(&lock);
  event *asked = (event *)of;
  stream *on = find_stream(handle);
  int is_drawn = asked->is_captured && !on->captured;
  if (asked->on && !asked->is_captured) push(on, (work){.kind = WAIT, .other = asked->on, .count = asked->count});
  pthread_mutex_unlock(&lock);
  if (is_drawn) fprintf(stderr, "stub: a stream is drawn into the capture of another one\n");
  return is_drawn ? fail(cudaErrorStreamCaptureIsolation) : cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, enum cudaStreamCaptureStatus *status) {
  BEGIN(0);
  stream *on = find_stream(handle);
  *status = on->captured ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  if (on->captured && on->is_invalid) *status = cudaStreamCaptureStatusInvalidated;
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, enum cudaStreamCaptureStatus *status, unsigned long long *id,
                                     cudaGraph_t *into, const cudaGraphNode_t **after, const cudaGraphEdgeData **edges, size_t *count) {
  stream *on = find_stream(handle);
  if (id) *id = on->capture;
  if (into) *into = (cudaGraph_t)on->captured;
  if (after) *after = NULL;
  if (count) *count = 0;
  return cudaStreamIsCapturing(handle, status);
}
cudaError_t cudaStreamBeginCapture(cudaStream_t handle, enum cudaStreamCaptureMode given) {
  BEGIN(0);
  pthread_mutex_lock(&lock);
  stream *on = find_stream(handle);
  start(on);
  on->captured = calloc(1, sizeof(graph));
  on->mode = given;
  on->is_invalid = 0;
  on->owner = pthread_self();
  on->capture = ++num_captures;
  num_capturing++;
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t *made) {
  pthread_mutex_lock(&lock);
  stream *on = find_stream(handle);
  *made = (cudaGraph_t)on->captured;
  on->captured = NULL;
  num_capturing--;
  int is_invalid = on->is_invalid;
  pthread_mutex_unlock(&lock);
  return is_invalid ? fail(cudaErrorStreamCaptureInvalidated) : cudaSuccess;
}
cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *given) { int before = mode; mode = *given; *given = before; return cudaSuccess; }
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *made, cudaGraph_t of, unsigned long long flags) { *made = (cudaGraphExec_t)of; return cudaSuccess; }
cudaError_t cudaGraphLaunch(cudaGraphExec_t given, cudaStream_t handle) {
  BEGIN(0);
  pthread_mutex_lock(&lock);
  graph *of = (graph *)given;
  for (size_t i = 0; i < of->num_items; i++) push(find_stream(handle), of->items[i]);
  pthread_mutex_unlock(&lock);
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t given) { return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t given) { return cudaSuccess; }
cudaError_t cudaGraphGetNodes(cudaGraph_t given, cudaGraphNode_t *nodes, size_t *count) { *count = given ? ((graph *)given)->num_items : 0; return cudaSuccess; }

/* -- kernels ------------------------------------------------------------------------------------------------------ */

static _Thread_local struct { dim3 grid, group; size_t shared; cudaStream_t handle; } launch;

void **__cudaRegisterFatBinary(void *given) { static void *handle[1]; return handle; }
void __cudaRegisterFatBinaryEnd(void **handle) {}
void __cudaUnregisterFatBinary(void **handle) {}
char __cudaInitModule(void **handle) { return 1; }
void __cudaRegisterVar(void **handle, char *host, char *there, const char *name, int a, size_t b, int c, int d) {}
void __cudaRegisterFunction(void **handle, const char *host, char *there, const char *name, int limit, void *a, void *b, void *c, void *d, int *e) {
  if (strstr(name, "spin_kernel") && num_spins < NUM_SPINS) spins[num_spins++] = host;
}
unsigned __cudaPushCallConfiguration(dim3 grid, dim3 group, size_t shared, struct CUstream_st *handle) {
  launch.grid = grid, launch.group = group, launch.shared = shared, launch.handle = handle;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *group, size_t *shared, void *handle) {
  *grid = launch.grid, *group = launch.group, *shared = launch.shared, *(cudaStream_t *)handle = launch.handle;
  return cudaSuccess;
}
cudaError_t cudaLaunchKernel(const void *host, dim3 grid, dim3 group, void **given, size_t shared, cudaStream_t handle) {
  BEGIN(0);
  for (int i = 0; i < num_spins; i++)
    if (spins[i] == host) submit(handle, (work){.kind = SLEEP, .seconds = *(long long *)given[0] / 2e9});
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t *found, const void *host) { *found = (cudaKernel_t)host; return cudaSuccess; }
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 group, void **given, size_t shared, cudaStream_t handle) {
  return cudaLaunchKernel((const void *)kernel, grid, group, given, shared, handle);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *how, const void *host, void **given) {
  return cudaLaunchKernel(host, how->gridDim, how->blockDim, given, 0, how->stream);
}
cudaError_t cudaLaunchCooperativeKernel(const void *host, dim3 grid, dim3 group, void **given, size_t shared, cudaStream_t handle) {
  return cudaLaunchKernel(host, grid, group, given, shared, handle);
}
cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t function, void *argument) {
  return submit(handle, (work){.kind = CALL, .function = (void (*)(long))function, .argument = (long)argument});
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *found, const void *host) {
  *found = (struct cudaFuncAttributes){.maxThreadsPerBlock = 1024};
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *host, enum cudaFuncAttribute which, int value) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *count, const void *host, int size, size_t shared) { *count = 2; return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *host, int size, size_t shared, unsigned flags) { *count = 2; return cudaSuccess; }

/* -- the driver --------------------------------------------------------------------------------------------------- */

static int refuse(void) { return 801; }
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **found, unsigned version, unsigned long long flags, enum cudaDriverEntryPointQueryResult *result) {
  *found = (void *)refuse;
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
int cuInit(unsigned flags) { return 0; }
int cuDeviceGet(int *found, int index) { *found = index; return index >= NUM_DEVICES ? 101 : 0; }
int cuDevicePrimaryCtxGetState(int index, unsigned *flags, int *is_active) { *flags = 0; *is_active = contexts[index]; return 0; }
int cuDevicePrimaryCtxRetain(void **found, int index) { *found = &contexts[index]; return 0; }
int cuCtxPushCurrent_v2(void *context) { pushed[num_pushed++] = device; device = (int)((int *)context - contexts); return 0; }
int cuCtxPopCurrent_v2(void **context) { *context = &contexts[device]; device = pushed[--num_pushed]; return 0; }
int cuCtxGetCurrent(void **context) { *context = &contexts[device]; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuStreamCreate(void **found, unsigned flags) { return flags == cudaStreamNonBlocking ? make_stream(found) : 1; }
int cuThreadExchangeStreamCaptureMode(int *given) { int before = mode; mode = *given; *given = before; return 0; }
int cuGetErrorString(int code, const char **text) { *text = "an error of the stub"; return 0; }
