/* A chain of element-wise operations as one operator of ONNX Runtime on a CPU.
 *
 * The node `ai.tetdeploy::Elementwise` runs a program (written by `tetdeploy/native/programs.py`) over all elements of
 * its inputs, BLOCK elements at a time: values between the operations stay in the first-level cache instead of going
 * through memory once per operation. Arithmetic is float32, one operation after the other and never contracted, so that
 * every result has the bits of ONNX Runtime's own operators.
 *
 * Inputs and outputs are cut into equal parts along their first axis, the time steps; element i of all parts belongs
 * together. A program either names the parts that it reads and writes, or runs once for each step, on a part each of
 * what has as many. What lasts from a step to the next stays in its first registers, which begin at zero. Attributes:
 *
 *   program       int64s, five an instruction: operation, d, a, b, k
 *   immediates    float32s that instructions refer to
 *   input_ports   int64s, two an input: its type (ONNX's numbering), and of how many parts it is; 0 are as many as steps,
 *                 -1 is one that all steps read
 *   output_ports  the same of the outputs
 *   states        int64, how many registers last; -1 if parts are named. Otherwise one more input follows, of any type:
 *                 its second axis is as long as there are steps
 */
#include "elementwise.h"

#define BLOCK 1024
#define GRAIN (16 * BLOCK) /* elements that are worth a thread's while */
#define MAX_PARTS (1 << 20)

#ifdef __clang__
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif
#define LOOP(value) INDEPENDENT for (size_t i = 0; i < n; ++i) d[i] = (value)

/* `value` of every `x`, element of a tensor of any type. */
#define OF_EACH(value)                                                                \
  do {                                                                                \
    if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) OF_EACH_OF(float, value);        \
    else if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8) OF_EACH_OF(int8_t, value);   \
    else OF_EACH_OF(uint8_t, value);                                                  \
  } while (0)
#define OF_EACH_OF(type, value)                     \
  do {                                              \
    const type* of = (const type*)source + start;   \
    LOOP((value));                                  \
  } while (0)
#define DEQUANTIZED (((float)of[i] - zero) * scale)

INLINED void load(float* d, const void* source, int64_t type, size_t start, size_t n, float zero, float scale) {
  OF_EACH(DEQUANTIZED);
}

INLINED void join_load(int64_t op, float* d, const float* a, const void* source, int64_t type, size_t start, size_t n,
                       float zero, float scale) {
  if (op == ADD_DEQUANTIZED) OF_EACH(a[i] + DEQUANTIZED);
  else if (op == SUB_DEQUANTIZED) OF_EACH(a[i] - DEQUANTIZED);
  else OF_EACH(DEQUANTIZED - a[i]);
}

/* `value` into every element of a tensor. */
#define INTO_EACH(value)                                    \
  do {                                                      \
    if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {      \
      float* d = (float*)target + start;                    \
      LOOP((float)(value));                                 \
    } else if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8) { \
      int8_t* d = (int8_t*)target + start;                  \
      LOOP((int8_t)(int32_t)(value));                       \
    } else {                                                \
      uint8_t* d = (uint8_t*)target + start;                \
      LOOP((uint8_t)(int32_t)(value));                      \
    }                                                       \
  } while (0)

INLINED void store(int64_t op, const float* a, void* target, int64_t type, size_t start, size_t n, float c) {
  switch (op) {
    case STORE: INTO_EACH(a[i]); break;
    case STORE_LESS: INTO_EACH(a[i] < c); break;
    case STORE_GREATER: INTO_EACH(a[i] > c); break;
    case STORE_LESS_EQUAL: INTO_EACH(a[i] <= c); break;
    case STORE_GREATER_EQUAL: INTO_EACH(a[i] >= c); break;
  }
}

#define FIRE_OF(type, to, current)                                \
  do {                                                            \
    const type* of = (const type*)source + start;                 \
    to* spikes = target;                                          \
    INDEPENDENT for (size_t i = 0; i < n; ++i) {                  \
      const float h = first ? (current) : a[i] * leak - (current); \
      const float held = h > kept ? h : 0.0f;                     \
      spikes[i] = first ? h > v_th : h < v_th;                    \
      d[i] = (first ? held - h : held) * leak_after;              \
    }                                                             \
  } while (0)
#define FIRE_TO(to)                                                                          \
  do {                                                                                       \
    if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) FIRE_OF(float, to, of[i]);              \
    else if (type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8) FIRE_OF(int8_t, to, DEQUANTIZED);   \
    else FIRE_OF(uint8_t, to, DEQUANTIZED);                                                  \
  } while (0)

INLINED void fire(const Step* in, int first, float* d, void* target, int64_t target_type, const float* a,
                  const void* source, int64_t type, size_t start, size_t n) {
  const float leak = in->leak, v_th = in->v_th, kept = in->kept, leak_after = in->leak_after;
  const float zero = in->zero, scale = in->scale;
  if (target_type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) FIRE_TO(float);
  else FIRE_TO(uint8_t);
}

FOR_EACH_CPU static void run_step(const Call* call, float* registers, const float** at, size_t step, size_t start,
                                  size_t n) {
  const Kernel* kernel = call->kernel;
  for (size_t p = 0; p < kernel->num_joined; ++p) {
    const Step* in = kernel->joined + p;
    const float *k = kernel->immediates + in->k, c = k[0];
    if (in->op >= FIRE) {
      const Port to = kernel->outputs[in->output];
      char* spikes = (char*)call->outputs[in->output] + (offset(call, to, in->part, step) + start) * bytes_of(to);
      const void* source = at[in->from < 0 ? in->b : 0];
      int64_t type = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
      size_t begin = 0;
      if (in->from >= 0) {
        source = call->inputs[in->b];
        type = kernel->inputs[in->b].type;
        begin = offset(call, kernel->inputs[in->b], in->from, step) + start;
      }
      float* d = registers + in->d * BLOCK;
      if (in->op == FIRE) fire(in, 0, d, spikes, to.type, at[in->a], source, type, begin, n);
      else fire(in, 1, d, spikes, to.type, NULL, source, type, begin, n);
      at[in->d] = d;
      continue;
    }
    if (in->op == STORE || in->op >= STORE_LESS) {
      const Port port = kernel->outputs[in->d];
      store(in->op, at[in->a], call->outputs[in->d], port.type, offset(call, port, in->part, step) + start, n, c);
      continue;
    }
    float* d = registers + in->d * BLOCK;
    if (in->op >= ADD_DEQUANTIZED) {
      const Port port = kernel->inputs[in->b];
      const size_t from = offset(call, port, in->part, step) + start;
      join_load(in->op, d, at[in->a], call->inputs[in->b], port.type, from, n, in->zero, in->scale);
      at[in->d] = d;
      continue;
    }
    if (in->op <= DEQUANTIZE) {
      const Port port = kernel->inputs[in->a];
      const size_t from = offset(call, port, in->part, step) + start;
      const int plain = in->op == LOAD;
      at[in->d] = d;
      if (plain && port.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT)
        at[in->d] = (const float*)call->inputs[in->a] + from;
      else
        load(d, call->inputs[in->a], port.type, from, n, plain ? 0.0f : c, plain ? 1.0f : k[1]);
      continue;
    }
    const float *a = at[in->a], *b = at[in->b];
    at[in->d] = d;
    switch (in->op) {
      case ADD: LOOP(a[i] + b[i]); break;
      case SUB: LOOP(a[i] - b[i]); break;
      case MUL: LOOP(a[i] * b[i]); break;
      case DIV: LOOP(a[i] / b[i]); break;
      case LESS: LOOP(a[i] < b[i] ? 1.0f : 0.0f); break;
      case GREATER: LOOP(a[i] > b[i] ? 1.0f : 0.0f); break;
      case LESS_EQUAL: LOOP(a[i] <= b[i] ? 1.0f : 0.0f); break;
      case GREATER_EQUAL: LOOP(a[i] >= b[i] ? 1.0f : 0.0f); break;
      case ADD_K: LOOP(a[i] + c); break;
      case SUB_K: LOOP(a[i] - c); break;
      case K_SUB: LOOP(c - a[i]); break;
      case MUL_K: LOOP(a[i] * c); break;
      case DIV_K: LOOP(a[i] / c); break;
      case K_DIV: LOOP(c / a[i]); break;
      case LESS_K: LOOP(a[i] < c ? 1.0f : 0.0f); break;
      case GREATER_K: LOOP(a[i] > c ? 1.0f : 0.0f); break;
      case LESS_EQUAL_K: LOOP(a[i] <= c ? 1.0f : 0.0f); break;
      case GREATER_EQUAL_K: LOOP(a[i] >= c ? 1.0f : 0.0f); break;
      case THRESHOLDED_RELU: LOOP(a[i] > c ? a[i] : 0.0f); break;
      case HARD_SIGMOID: {
        const float beta = k[1];
        LOOP(a[i] * c + beta);
        LOOP(d[i] > 1.0f ? 1.0f : d[i]); /* NaN stays */
        LOOP(d[i] < 0.0f ? 0.0f : d[i]);
        break;
      }
    }
  }
}

static void run_grain(void* argument, size_t grain) {
  const Call* call = argument;
  const size_t count = call->kernel->registers;
  float registers[count * BLOCK] __attribute__((aligned(64)));
  const float* at[MAX_REGISTERS]; /* a register's values: its own, or a float32 input where it lies */
  size_t first = grain * GRAIN;
  const size_t last = first + GRAIN < call->elements ? first + GRAIN : call->elements;
  first = run_chain(call, first, last);
  for (size_t start = first; start < last; start += BLOCK) {
    for (size_t r = 0; r < count; ++r) at[r] = registers + r * BLOCK;
    if (call->kernel->states > 0) memset(registers, 0, call->kernel->states * BLOCK * sizeof(float));
    for (size_t step = 0; step < call->steps; ++step)
      run_step(call, registers, at, step, start, last - start < BLOCK ? last - start : BLOCK);
  }
}

static OrtStatusPtr failed(const OrtApi* api, const char* why) { return failed_in(api, "Elementwise", why); }

static int64_t parts_of(Port port, size_t steps) { return port.parts > 0 ? port.parts : port.parts == 0 ? (int64_t)steps : 1; }

/* The dimensions of a tensor, which must be as declared; how many elements it has. */
static OrtStatusPtr describe(const Kernel* kernel, const OrtValue* value, Port port, int64_t* dims, size_t* rank,
                             size_t* elements) {
  const OrtApi* api = kernel->api;
  OrtTensorTypeAndShapeInfo* info;
  TRY(api->GetTensorTypeAndShape(value, &info));
  enum ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  OrtStatusPtr status = api->GetTensorElementType(info, &type);
  if (status == NULL) status = api->GetDimensionsCount(info, rank);
  if (status == NULL && *rank > 0 && *rank <= 8) status = api->GetDimensions(info, dims, *rank);
  if (status == NULL) status = api->GetTensorShapeElementCount(info, elements);
  api->ReleaseTensorTypeAndShapeInfo(info);
  if (status == NULL && type != (enum ONNXTensorElementDataType)port.type)
    return failed(api, "a tensor is of another type");
  return status;
}

/* The dimensions of an input; how many elements each of its parts has. */
static OrtStatusPtr measure(const Kernel* kernel, const OrtValue* value, Port port, size_t steps, int64_t* dims,
                            size_t* rank, size_t* elements) {
  TRY(describe(kernel, value, port, dims, rank, elements));
  if (*rank < 1 || *rank > 8) return failed(kernel->api, "an input has no axis, or more than 8");
  if (dims[0] % parts_of(port, steps) != 0) return failed(kernel->api, "an input cannot be cut into its steps");
  *elements /= parts_of(port, steps);
  return NULL;
}

/* How many steps there are: the length of the second axis of the last input. */
static OrtStatusPtr count_steps(const Kernel* kernel, OrtKernelContext* context, size_t* steps) {
  const OrtApi* api = kernel->api;
  const OrtValue* value;
  OrtTensorTypeAndShapeInfo* info;
  int64_t dims[8] = {0};
  size_t rank = 0;
  TRY(api->KernelContext_GetInput(context, kernel->num_inputs, &value));
  TRY(api->GetTensorTypeAndShape(value, &info));
  OrtStatusPtr status = api->GetDimensionsCount(info, &rank);
  if (status == NULL && rank >= 2 && rank <= 8) status = api->GetDimensions(info, dims, rank);
  api->ReleaseTensorTypeAndShapeInfo(info);
  if (status == NULL && dims[1] < 1) return failed(api, "there is no step");
  if (status == NULL && dims[1] > MAX_PARTS) return failed(api, "there are too many steps");
  *steps = dims[1];
  return status;
}

static OrtStatusPtr ORT_API_CALL compute(void* self, OrtKernelContext* context) {
  const Kernel* kernel = self;
  const OrtApi* api = kernel->api;
  const void* inputs[kernel->num_inputs];
  void* outputs[kernel->num_outputs];
  int64_t dims[8] = {0}, ignored[8];
  size_t rank = 0, elements = 0, steps = 1, its_rank, its_elements;
  if (kernel->states >= 0) TRY(count_steps(kernel, context, &steps));
  for (size_t k = 0; k < kernel->num_inputs; ++k) {
    const OrtValue* value;
    TRY(api->KernelContext_GetInput(context, k, &value));
    TRY(measure(kernel, value, kernel->inputs[k], steps, k ? ignored : dims, k ? &its_rank : &rank, &its_elements));
    if (k == 0) elements = its_elements;
    if (its_elements != elements) return failed(api, "inputs have different shapes");
    TRY(api->GetTensorMutableData((OrtValue*)value, (void**)&inputs[k]));
  }
  const int64_t step = dims[0] / parts_of(kernel->inputs[0], steps);
  for (size_t k = 0; k < kernel->num_outputs; ++k) {
    OrtValue* value;
    dims[0] = step * parts_of(kernel->outputs[k], steps);
    TRY(api->KernelContext_GetOutput(context, k, dims, rank, &value));
    if (value == NULL) return failed(api, "an output has no name");
    TRY(describe(kernel, value, kernel->outputs[k], ignored, &its_rank, &its_elements));
    TRY(api->GetTensorMutableData(value, &outputs[k]));
  }
  Call call = {kernel, inputs, outputs, elements, steps};
  const size_t grains = (elements + GRAIN - 1) / GRAIN;
  if (grains > 1) return api->KernelContext_ParallelFor(context, run_grain, grains, 0, &call);
  if (grains == 1) run_grain(&call, 0);
  return NULL;
}

static void ORT_API_CALL destroy(void* self) {
  Kernel* kernel = self;
  free(kernel->program);
  free(kernel->joined);
  free(kernel->chain);
  free(kernel->immediates);
  free(kernel->inputs);
  free(kernel->outputs);
  free(kernel);
}

/* An attribute of whole numbers, `each` an item: the items, to be freed, and how many they are. */
static OrtStatusPtr read_items(const OrtApi* api, const OrtKernelInfo* info, const char* name, size_t each, void* items,
                               size_t* count) {
  size_t numbers = 0;
  int64_t* read = NULL;
  TRY(api->KernelInfoGetAttributeArray_int64(info, name, NULL, &numbers));
  if (numbers == 0 || numbers % each != 0) return failed(api, "an attribute has the wrong length");
  if ((read = malloc(numbers * sizeof *read)) == NULL) return failed(api, "no memory");
  *(int64_t**)items = read;
  *count = numbers / each;
  return api->KernelInfoGetAttributeArray_int64(info, name, read, &numbers);
}

static int within(int64_t value, size_t limit) { return value >= 0 && (size_t)value < limit; }

/* Refuse a program that would reach beyond its registers, immediates or tensors. */
static OrtStatusPtr check(Kernel* kernel) {
  if (kernel->states > MAX_REGISTERS) return failed(kernel->api, "it has too many states");
  kernel->registers = kernel->states > 0 ? kernel->states : 0;
  for (int side = 0; side < 2; ++side) {
    const Port* ports = side ? kernel->outputs : kernel->inputs;
    for (size_t k = 0; k < (side ? kernel->num_outputs : kernel->num_inputs); ++k) {
      const int64_t type = ports[k].type, parts = ports[k].parts;
      const int named = parts >= 1 && parts <= MAX_PARTS, stepwise = parts == 0 || (parts == -1 && !side);
      if (kernel->states < 0 ? !named : !stepwise)
        return failed(kernel->api, "a tensor has no parts, or too many");
      if (type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT && type != ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8 &&
          type != ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 && type != ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL)
        return failed(kernel->api, "a tensor has a type that is not supported");
    }
  }
  for (size_t p = 0; p < kernel->length; ++p) {
    const Instruction in = kernel->program[p];
    int fine = within(in.op, OPERATIONS) && in.k >= 0 && (size_t)in.k <= kernel->num_immediates;
    int64_t used[] = {in.d, in.a, in.b}; /* registers */
    if (fine && in.op <= DEQUANTIZE) {
      fine = within(in.a, kernel->num_inputs) &&
             (kernel->states >= 0 ? in.b >= 0 : within(in.b, kernel->inputs[in.a].parts));
      used[1] = used[2] = 0;
    } else if (fine && in.op == STORE) {
      fine = within(in.d, kernel->num_outputs) && (kernel->states >= 0 || within(in.b, kernel->outputs[in.d].parts));
      used[0] = used[2] = 0;
    }
    for (int r = 0; r < 3 && fine; ++r) {
      fine = within(used[r], MAX_REGISTERS);
      if (fine && (size_t)used[r] >= kernel->registers) kernel->registers = used[r] + 1;
    }
    if (!fine) return failed(kernel->api, "its program is damaged");
  }
  return NULL;
}

static int reads(const Instruction* in, int64_t r) {
  if (in->op <= DEQUANTIZE) return 0;
  return in->a == r || (in->op >= ADD && in->op < ADD_K && in->b == r);
}

/* Whether nothing from instruction p on reads register r as it is now. */
static int is_done(const Kernel* kernel, size_t p, int64_t r) {
  for (; p < kernel->length; ++p) {
    if (reads(kernel->program + p, r)) return 0;
    if (kernel->program[p].op != STORE && kernel->program[p].d == r) return 1;
  }
  return r >= kernel->states; /* which the next run reads */
}

/* Whether nothing after instruction p reads the register that it writes, but the next. */
static int only_next_reads(const Kernel* kernel, size_t p) {
  const Instruction* in = kernel->program + p;
  if (p + 1 == kernel->length || !reads(in + 1, in->d)) return 0;
  return (in[1].op != STORE && in[1].d == in->d) || is_done(kernel, p + 2, in->d);
}

/* Two instructions as one; its operation is -1 if there is none for them. */
static Step pair(const Kernel* kernel, const Instruction* first, const Instruction* next) {
  Step step = {.op = -1, .d = next->d, .k = first->k};
  const int converts = first->op == LOAD && kernel->inputs[first->a].type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  if ((first->op == DEQUANTIZE || converts) && (next->op == ADD || next->op == SUB) && next->a != next->b) {
    const int left = next->a == first->d;
    step.op = next->op == ADD ? ADD_DEQUANTIZED : left ? DEQUANTIZED_SUB : SUB_DEQUANTIZED;
    step.a = left ? next->b : next->a;
    step.b = first->a;
    step.part = first->b;
    step.zero = converts ? 0 : kernel->immediates[first->k];
    step.scale = converts ? 1 : kernel->immediates[first->k + 1];
  } else if (first->op >= LESS_K && first->op <= GREATER_EQUAL_K && next->op == STORE) {
    step.op = STORE_LESS + first->op - LESS_K;
    step.a = first->a;
    step.part = next->b;
  }
  return step;
}

/* Of the instructions from p on those that are a step of neurons, as one; how many they are, 0 if they are none. `h`
 * is where their membrane is. */
static size_t neurons(const Kernel* kernel, size_t p, Step* step) {
  const Instruction *in = kernel->program + p, *end = kernel->program + kernel->length;
  const int first = in->op == GREATER_K;
  int64_t h = in->a, held = -1;
  *step = (Step){.op = FIRE_FIRST, .b = h, .from = -1, .leak = 1, .leak_after = 1};
  if (!first) {
    if (in->op != SUB || in->a == in->b) return 0;
    *step = (Step){.op = FIRE, .a = in->a, .b = in->b, .from = -1, .leak = 1, .leak_after = 1};
    h = (in++)->d;
  }
  if (end - in < 2 || in->op != (first ? GREATER_K : LESS_K) || in->a != h || in[1].op != STORE) return 0;
  const int64_t type = kernel->outputs[in[1].d].type;
  if (type != ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 && type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) return 0;
  if (in[1].a != in->d) return 0;
  if (!is_done(kernel, in + 2 - kernel->program, in->d)) return 0;
  step->v_th = kernel->immediates[in->k];
  step->output = in[1].d;
  step->part = in[1].b;
  step->d = in->d; /* is not read where the membrane is not */
  in += 2;
  const int keeps = in < end && in->op == THRESHOLDED_RELU && in->a == h;
  if (first && !keeps) return 0;
  if (keeps) {
    step->kept = kernel->immediates[in->k];
    step->d = held = (in++)->d;
    if (first) { /* held - h */
      if (in == end || in->op != SUB || in->a != held || in->b != h || held == h) return 0;
      if (in->d != held && !is_done(kernel, in + 1 - kernel->program, held)) return 0;
      step->d = held = (in++)->d;
    }
    if (in < end && in->op == MUL_K && in->a == held &&
        (in->d == held || is_done(kernel, in + 1 - kernel->program, held))) {
      step->leak_after = kernel->immediates[in->k];
      step->d = (in++)->d;
    }
  }
  if (!first && step->d != h && !is_done(kernel, in - kernel->program, h)) return 0; /* it is nowhere then */
  return in - (kernel->program + p);
}

/* Let a step of neurons do what those joined before it do for it alone: the leak, and loading the current. */
static void take_in(Kernel* kernel, size_t p, Step* step) {
  for (int k = 0; k < 2 && kernel->num_joined > 0; ++k) {
    const Step* last = kernel->joined + kernel->num_joined - 1;
    const int done = last->d == step->d || is_done(kernel, p, last->d);
    if (last->op == MUL_K && step->op == FIRE && last->d == step->a && done && step->leak == 1) {
      step->leak = kernel->immediates[last->k];
      step->a = last->a;
    } else if (last->op == DEQUANTIZE && step->from < 0 && last->d == step->b && done &&
               (step->op == FIRE_FIRST || last->d != step->a) &&
               kernel->inputs[last->a].type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
      step->b = last->a;
      step->from = last->b;
      step->zero = kernel->immediates[last->k];
      step->scale = kernel->immediates[last->k + 1];
    } else {
      return;
    }
    --kernel->num_joined;
  }
}

static OrtStatusPtr join(Kernel* kernel) {
  if ((kernel->joined = malloc(kernel->length * sizeof *kernel->joined)) == NULL) return failed(kernel->api, "no memory");
  for (size_t p = 0; p < kernel->length;) {
    const Instruction* in = kernel->program + p;
    Step step;
    size_t count = neurons(kernel, p, &step);
    if (count > 0) {
      take_in(kernel, p + count, &step);
    } else {
      Step next;
      step.op = -1;
      if (only_next_reads(kernel, p) && !neurons(kernel, p + 1, &next)) step = pair(kernel, in, in + 1);
      count = step.op < 0 ? 1 : 2;
      if (step.op < 0) step = (Step){.op = in->op, .d = in->d, .a = in->a, .b = in->b, .k = in->k, .part = in->b};
    }
    p += count;
    kernel->joined[kernel->num_joined++] = step;
  }
  return NULL;
}

static OrtStatusPtr fill(Kernel* kernel, const OrtCustomOp* op, const OrtKernelInfo* info) {
  (void)op;
  const OrtApi* api = kernel->api;
  TRY(read_items(api, info, "program", 5, &kernel->program, &kernel->length));
  TRY(read_items(api, info, "input_ports", 2, &kernel->inputs, &kernel->num_inputs));
  TRY(read_items(api, info, "output_ports", 2, &kernel->outputs, &kernel->num_outputs));
  size_t given;
  TRY(api->KernelInfo_GetInputCount(info, &given));
  TRY(api->KernelInfoGetAttribute_int64(info, "states", &kernel->states));
  if (given != kernel->num_inputs + (kernel->states >= 0)) return failed(api, "it has another number of inputs");
  TRY(api->KernelInfo_GetOutputCount(info, &given));
  if (given != kernel->num_outputs) return failed(api, "it has another number of outputs");
  TRY(api->KernelInfoGetAttributeArray_float(info, "immediates", NULL, &kernel->num_immediates));
  kernel->immediates = calloc(kernel->num_immediates + 2, sizeof(float)); /* every instruction may look at two */
  if (kernel->immediates == NULL) return failed(api, "no memory");
  TRY(api->KernelInfoGetAttributeArray_float(info, "immediates", kernel->immediates, &kernel->num_immediates));
  TRY(check(kernel));
  TRY(join(kernel));
  return find_chain(kernel);
}

DEFINE_CREATE

static const char* ORT_API_CALL name(const struct OrtCustomOp* op) { return (void)op, "Elementwise"; }
static int ORT_API_CALL at_least_one(const struct OrtCustomOp* op) { return (void)op, 1; }
static int ORT_API_CALL mixed(const struct OrtCustomOp* op) { return (void)op, 0; }
static enum ONNXTensorElementDataType ORT_API_CALL any_type(const struct OrtCustomOp* op, size_t index) {
  return (void)op, (void)index, ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}
static OrtCustomOpInputOutputCharacteristic ORT_API_CALL variadic(const struct OrtCustomOp* op, size_t index) {
  return (void)op, (void)index, INPUT_OUTPUT_VARIADIC;
}

const OrtCustomOp ELEMENTWISE = {
    .version = API_VERSION,
    .GetName = name,
    .GetExecutionProviderType = provider,
    .GetInputType = any_type,
    .GetInputTypeCount = one,
    .GetOutputType = any_type,
    .GetOutputTypeCount = one,
    .KernelDestroy = destroy,
    .GetInputCharacteristic = variadic,
    .GetOutputCharacteristic = variadic,
    .GetInputMemoryType = memory,
    .GetVariadicInputMinArity = at_least_one,
    .GetVariadicInputHomogeneity = mixed,
    .GetVariadicOutputMinArity = at_least_one,
    .GetVariadicOutputHomogeneity = mixed,
    .CreateKernelV2 = create,
    .KernelComputeV2 = compute,
    .GetStartVersion = first_version,
    .GetEndVersion = first_version,
};
