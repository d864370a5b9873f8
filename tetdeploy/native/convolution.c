/* Convolutions of bytes as operators of ONNX Runtime: what their ways of computing have in common.
 *
 * `ai.tetdeploy::Int8Convolution`, with AMX, and `ai.tetdeploy::Int8Lookups` and `ai.tetdeploy::Int8Additions`, without, stand
 * for a `QLinearConv` of bytes that lie channels last, and give its bits: sums of int32, plus the bias, times a scale for
 * each channel in float32, limited, rounded to even, plus the zero point. Lookups give way to additions in calls in which
 * these take less time.
 *
 * `ai.tetdeploy::SpikeConvolution`, with AMX, and `ai.tetdeploy::SpikeAdditions`, without, stand for a float32 `Conv` of
 * spikes, or sums of some, and give the same bits. A weight is a whole number of 24 bits times a scale of its channel, as
 * near as float32 is to the channel's largest. The sums are whole and exact: high * 65536 + low, of which two float32
 * operations make a current, high * (scale * 65536) + (low * scale + bias).
 *
 *   input 0   uint8 [N, H, W, C], zero point 0
 *   input 1   weights, constant: int8 in tiles and of lookups, int16 or int32 of additions, in the order that `tiles.c`,
 *             `lookups.c` and `additions.c` say
 *   input 2   float32 [O], constant: scale of the input times that of the weights over that of the output; of the weights
 *   input 3   int32 [O], constant: bias; float32
 *   output    uint8 [N, H', W', O]; float32
 *   channels, kernel_shape, strides, pads   channels is C, others are as in ONNX
 */
#include "convolution.h"

static OrtStatusPtr place_outputs(Call* call, const int64_t* dims) {
  const Kernel* kernel = call->kernel;
  if ((size_t)dims[3] != kernel->in_channels) return refused(kernel, "the input has other channels than the weights");
  call->images = dims[0];
  double bytes = 1024.0 * dims[0] * dims[3]; /* of a channel of a pixel less is spread */
  for (int axis = 0; axis < 2; ++axis) {
    const size_t padded = dims[axis + 1] + kernel->pads[axis] + kernel->pads[axis + 2];
    if (padded < kernel->size[axis]) return refused(kernel, "the input is smaller than the kernel");
    bytes *= padded;
    call->size[axis] = dims[axis + 1];
    call->out_size[axis] = (padded - kernel->size[axis]) / kernel->strides[axis] + 1;
  }
  return bytes > 0x1p60 ? refused(kernel, "the input is too large") : NULL; /* its sizes would wrap */
}

/* The share of the inputs that are not 0, by 1,024 lines of the cache, which no period of channels or pixels can hide from. */
FOR_EACH_CPU static double firing_rate(const Call* call) {
  const size_t lines = call->images * call->size[0] * call->size[1] * call->kernel->in_channels / LINE, n = least(lines, 1024);
  int firing = 0;
  for (size_t i = 0; i < n; ++i) {
    const size_t at = n < lines ? (uint64_t)(uint32_t)(i * 0x9e3779b9) * lines >> 32 : i; /* multiples of the golden ratio */
    for (size_t k = 0; k < LINE; ++k) firing += call->x[at * LINE + k] != 0;
  }
  return n > 0 ? (double)firing / (n * LINE) : 0;
}

/* By the kernel's way, or by its sparse one if that takes fewer cycles: then the call is of that kernel. */
static size_t lay_out(Call* call) {
  const Kernel* kernel = call->kernel;
  const size_t bytes = kernel->way->lay_out(call);
  if (kernel->sparse == NULL) return bytes;
  Call sparse = *call;
  sparse.kernel = kernel->sparse;
  const size_t its_bytes = kernel->way->sparse->lay_out(&sparse);
  const double firing = firing_rate(call);
  if (kernel->way->sparse->cycles(&sparse, firing) >= kernel->way->cycles(call, firing)) return bytes;
  *call = sparse;
  return its_bytes;
}

static OrtStatusPtr run(Call* call, OrtKernelContext* context) {
  const size_t bytes = lay_out(call);
  const Kernel* kernel = call->kernel;
  const OrtApi* api = kernel->api;
  const Way* way = kernel->way;
  OrtMemoryInfo* where;
  OrtAllocator* allocator;
  TRY(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &where));
  OrtStatusPtr status = api->KernelContext_GetAllocator(context, where, &allocator);
  api->ReleaseMemoryInfo(where);
  if (status != NULL) return status;
  void* memory = NULL;
  status = api->AllocatorAlloc(allocator, bytes + LINE, &memory);
  if (status == NULL && memory == NULL) status = refused(kernel, "no memory");
  if (status == NULL) {
    call->spread = (char*)memory + (LINE - (uintptr_t)memory % LINE) % LINE;
    status = api->KernelContext_ParallelFor(context, way->spread_row, call->rows, 0, call);
    if (status == NULL) status = api->KernelContext_ParallelFor(context, way->multiply, call->grains, 0, call);
    OrtStatusPtr freed = api->AllocatorFree(allocator, memory);
    if (status == NULL) status = freed;
    else if (freed != NULL) api->ReleaseStatus(freed);
  }
  api->ReleaseAllocator(allocator);
  return status;
}

/* The dimensions of a tensor, which must have `rank`. */
static OrtStatusPtr dimensions(const Kernel* kernel, const OrtValue* value, int64_t* dims, size_t rank) {
  const OrtApi* api = kernel->api;
  OrtTensorTypeAndShapeInfo* info;
  size_t found = 0;
  TRY(api->GetTensorTypeAndShape(value, &info));
  OrtStatusPtr status = api->GetDimensionsCount(info, &found);
  if (status == NULL && found == rank) status = api->GetDimensions(info, dims, rank);
  api->ReleaseTensorTypeAndShapeInfo(info);
  return status == NULL && found != rank ? refused(kernel, "a tensor has another number of axes") : status;
}

static OrtStatusPtr ORT_API_CALL compute(void* self, OrtKernelContext* context) {
  const Kernel* kernel = self;
  const OrtApi* api = kernel->api;
  const OrtValue* x;
  OrtValue* y;
  int64_t dims[4];
  Call call = {.kernel = kernel};
  TRY(api->KernelContext_GetInput(context, 0, &x));
  TRY(dimensions(kernel, x, dims, 4));
  TRY(place_outputs(&call, dims));
  const int64_t out[] = {dims[0], call.out_size[0], call.out_size[1], kernel->out_channels};
  TRY(api->KernelContext_GetOutput(context, 0, out, 4, &y));
  TRY(api->GetTensorMutableData((OrtValue*)x, (void**)&call.x));
  TRY(api->GetTensorMutableData(y, &call.y));
  return call.images > 0 ? run(&call, context) : NULL;
}

static void ORT_API_CALL destroy(void* self) {
  Kernel* kernel = self;
  if (kernel->sparse != NULL) free(kernel->sparse->aligned); /* all else is the kernel's */
  free(kernel->sparse);
  free(kernel->aligned);
  free(kernel->scales);
  free(kernel->biases);
  free(kernel);
}

/* A constant input of `rank` axes. */
static OrtStatusPtr constant(const Kernel* kernel, const OrtKernelInfo* info, size_t index, size_t rank, int64_t* dims,
                             const void** data) {
  const OrtApi* api = kernel->api;
  int is_constant = 0;
  const OrtValue* value = NULL;
  TRY(api->KernelInfoGetConstantInput_tensor(info, index, &is_constant, &value));
  if (!is_constant || value == NULL) return refused(kernel, "weights, scales and biases must be constant");
  TRY(dimensions(kernel, value, dims, rank));
  return api->GetTensorMutableData((OrtValue*)value, (void**)data);
}

static OrtStatusPtr read_sizes(const Kernel* kernel, const OrtKernelInfo* info, const char* name, size_t least,
                               size_t* sizes, size_t count) {
  const OrtApi* api = kernel->api;
  int64_t read[4];
  size_t found = 0;
  TRY(api->KernelInfoGetAttributeArray_int64(info, name, NULL, &found));
  if (found != count) return refused(kernel, "an attribute has the wrong length");
  TRY(api->KernelInfoGetAttributeArray_int64(info, name, read, &found));
  for (size_t k = 0; k < count; ++k) {
    if (read[k] < (int64_t)least || read[k] > 1 << 16) return refused(kernel, "a size in an attribute is out of range");
    sizes[k] = read[k];
  }
  return NULL;
}

static void* zeros(size_t bytes) { /* of whole lines of the cache */
  void* made = aligned_alloc(LINE, parts(bytes, LINE) * LINE);
  return made == NULL ? NULL : memset(made, 0, bytes);
}

typedef struct {
  OrtCustomOp op; /* first, so that one stands for the other */
  const Way* way;
} Operator;

static const Way* way_of(const OrtCustomOp* op) { return ((const Operator*)op)->way; }

static size_t bytes_of(const Way* way, const int64_t* shape) {
  size_t bytes = way->weight == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32   ? sizeof(int32_t)
                 : way->weight == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16 ? sizeof(int16_t)
                                                                      : 1;
  for (size_t axis = 0; axis < way->rank; ++axis) bytes *= shape[axis];
  return bytes;
}

/* The kernel's `sparse` one, with weights in its own order. */
static OrtStatusPtr fill_sparse(Kernel* kernel, const OrtKernelInfo* info) {
  int64_t shape[16];
  Kernel* sparse = kernel->sparse = malloc(sizeof *sparse);
  if (sparse == NULL) return refused(kernel, "no memory");
  *sparse = *kernel;
  sparse->way = kernel->way->sparse;
  sparse->sparse = NULL;
  sparse->aligned = NULL;
  TRY(sparse->way->fill(sparse, info, shape));
  sparse->weights = sparse->aligned = zeros(bytes_of(sparse->way, shape));
  if (sparse->aligned == NULL) return refused(kernel, "no memory");
  for (size_t output = 0; output < kernel->out_channels; ++output)
    for (size_t channel = 0; channel < kernel->in_channels; ++channel)
      for (size_t tap = 0; tap < kernel->taps; ++tap)
        sparse->way->put(sparse, output, channel, tap, kernel->way->weight_of(kernel, output, channel, tap));
  return NULL;
}

static OrtStatusPtr fill(Kernel* kernel, const OrtCustomOp* op, const OrtKernelInfo* info) {
  const Way* way = kernel->way = way_of(op);
  int64_t shape[16], packed[16], channels[2], in_channels;
  const void *scales, *biases;
  TRY(kernel->api->KernelInfoGetAttribute_int64(info, "channels", &in_channels));
  TRY(read_sizes(kernel, info, "kernel_shape", 1, kernel->size, 2));
  TRY(read_sizes(kernel, info, "strides", 1, kernel->strides, 2));
  TRY(read_sizes(kernel, info, "pads", 0, kernel->pads, 4));
  TRY(constant(kernel, info, 1, way->rank, shape, &kernel->weights));
  TRY(constant(kernel, info, 2, 1, channels, &scales));
  TRY(constant(kernel, info, 3, 1, channels + 1, &biases));
  if (channels[0] != channels[1]) return refused(kernel, "each channel needs a scale and a bias");
  if (in_channels < 1 || channels[0] < 1) return refused(kernel, "there are no weights");
  kernel->in_channels = in_channels;
  kernel->out_channels = channels[0];
  kernel->taps = kernel->size[0] * kernel->size[1];
  if (kernel->taps > 1 << 10) return refused(kernel, "the kernel is too large");
  TRY(way->fill(kernel, info, packed));
  for (size_t axis = 0; axis < way->rank; ++axis)
    if (shape[axis] != packed[axis]) return refused(kernel, "its weights are not in the right order");
  const size_t whole = parts(kernel->out_channels, 2 * LINE) * 2 * LINE * sizeof(float); /* a block is no larger */
  kernel->scales = zeros(whole);
  kernel->biases = zeros(whole);
  if (!kernel->scales || !kernel->biases) return refused(kernel, "no memory");
  memcpy(kernel->scales, scales, kernel->out_channels * sizeof(float));
  memcpy(kernel->biases, biases, kernel->out_channels * sizeof(float)); /* int32 is as long */
  if ((uintptr_t)kernel->weights % LINE != 0) { /* what lies across two lines of the cache would take twice the time */
    if ((kernel->aligned = zeros(bytes_of(way, shape))) == NULL) return refused(kernel, "no memory");
    kernel->weights = memcpy(kernel->aligned, kernel->weights, bytes_of(way, shape));
  }
  return way->sparse != NULL && kernel->vector_bytes > 0 ? fill_sparse(kernel, info) : NULL;
}

DEFINE_CREATE

static const char* ORT_API_CALL name(const OrtCustomOp* op) { return way_of(op)->name; }
static size_t ORT_API_CALL inputs(const OrtCustomOp* op) { return (void)op, 4; }
static enum ONNXTensorElementDataType ORT_API_CALL input_type(const OrtCustomOp* op, size_t index) {
  const enum ONNXTensorElementDataType types[] = {ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, way_of(op)->weight,
                                                  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, way_of(op)->bias};
  return types[index];
}
static enum ONNXTensorElementDataType ORT_API_CALL output_type(const OrtCustomOp* op, size_t index) {
  return (void)index, way_of(op)->output;
}
static OrtCustomOpInputOutputCharacteristic ORT_API_CALL required(const OrtCustomOp* op, size_t index) {
  return (void)op, (void)index, INPUT_OUTPUT_REQUIRED;
}

#define OPERATOR                                                                                                      \
  {                                                                                                                   \
    .version = API_VERSION, .GetName = name, .GetExecutionProviderType = provider, .GetInputType = input_type,        \
    .GetInputTypeCount = inputs, .GetOutputType = output_type, .GetOutputTypeCount = one, .KernelDestroy = destroy,   \
    .GetInputCharacteristic = required, .GetOutputCharacteristic = required, .GetInputMemoryType = memory,            \
    .CreateKernelV2 = create, .KernelComputeV2 = compute, .GetStartVersion = first_version,                           \
    .GetEndVersion = first_version,                                                                                   \
  }
static const Operator OPERATORS[] = {
    {OPERATOR, &INT8_TILES},  {OPERATOR, &INT8_ADDITIONS},  {OPERATOR, &INT8_LOOKUPS},
    {OPERATOR, &SPIKE_TILES}, {OPERATOR, &SPIKE_ADDITIONS},
};
const OrtCustomOp* const CONVOLUTIONS[] = {&OPERATORS[0].op, &OPERATORS[1].op, &OPERATORS[2].op,
                                           &OPERATORS[3].op, &OPERATORS[4].op, NULL};
