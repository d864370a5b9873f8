/* Convolutions of spikes by additions, for processors without AMX: where there is no spike, there is nothing to add, and a
 * vector register adds weights that it loads as fast as it multiplies.
 *
 *   weights   [blocks, chunks, kernel height, kernel width, 1 + rows, width]: a block has `width` output channels, ROW
 *             bytes, and a chunk `rows` input channels, filled with zeros, and before them their sum; of float32 as int32,
 *             whole numbers of 24 bits, of int8 as int16
 *   most      what an input is at most; times `rows` no more than MOST_ADDITIONS, so that the sums of a chunk do not wrap
 *   zero_point     of the uint8 output of int8
 *   vector_bytes   how long the registers are that it uses: 64 or 32, which the processor must have, or 16
 *
 * A call first lists, for each pixel and chunk, the rows of weights to be added, or where inputs are 0 or 1 and more than
 * half of them 1 those of the others, to be taken from the sum; each pixel of the padding has an empty list. The rows of a
 * chunk and tap stay in the first-level cache, while a group of outputs adds what it needs of them.
 */
#include "convolution.h"

#define ROW 256            /* bytes of the weights that are added at once: of 64 output channels, in int8 of 128 */
#define MOST_ADDITIONS 255 /* without an overflow: of 24 bits into int32, of 8 into int16 */
#define MOST_ROWS 128      /* fill 32 KB of the cache */
#define GROUP 64           /* outputs in a grain */
#define LOWEST_FIRST (__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__) /* of the bytes of a word */

/* Where rows begin, in bytes from the first of a chunk and tap; `others` if they are of the channels that do not fire. */
typedef struct { uint16_t length, others, rows[]; } List;

static inline size_t list_bytes(const Kernel* kernel) { return (kernel->rows * kernel->most + 2) * sizeof(uint16_t); }

static size_t lay_out(Call* call) {
  const Kernel* kernel = call->kernel;
  for (int axis = 0; axis < 2; ++axis) call->pitch[axis] = call->size[axis] + kernel->pads[axis] + kernel->pads[axis + 2];
  call->rows = call->images * call->pitch[0];
  call->grains = kernel->blocks * parts(call->images * call->out_size[0] * call->out_size[1], GROUP);
  return kernel->chunks * call->rows * call->pitch[1] * list_bytes(kernel);
}

/* 1.5 for a register of 64 bytes, 64 for each list that an output goes through. Zen 4 takes 1.3 and 40, but on Zen 5 lookups
 * take fewer than they say. */
static double cycles(const Call* call, double firing) {
  const Kernel* kernel = call->kernel;
  const double outputs = (double)call->images * call->out_size[0] * call->out_size[1];
  const double added = kernel->in_channels * (firing > 0.5 ? 1 - firing : firing) * parts(kernel->out_channels, LINE / 2);
  return outputs * kernel->taps * (64.0 * kernel->chunks * kernel->blocks + 1.5 * added);
}

/* Which of up to 64 channels are not 0, as bits. */
INLINED uint64_t find_spikes(const uint8_t* x, size_t channels) {
  uint64_t found = 0;
  for (size_t c = 0; c < channels; c += 8) {
    const uint64_t sevens = 0x7f7f7f7f7f7f7f7f;
    uint64_t word = 0;
    if (channels - c >= 8) memcpy(&word, x + c, 8);
    else memcpy(&word, x + c, channels - c);
    const uint64_t ones = (((word & sevens) + sevens) | word) >> 7 & 0x0101010101010101;
    found |= ones * (LOWEST_FIRST ? 0x0102040810204080 : 0x8040201008040201) >> 56 << c;
  }
  return found;
}

FOR_EACH_CPU static void list_rows(List* list, const uint8_t* x, size_t channels, size_t most) {
  uint64_t found[MOST_ROWS / 64];
  size_t firing = 0;
  for (size_t c = 0; c < channels; c += 64) {
    found[c / 64] = find_spikes(x + c, least(channels - c, 64));
    firing += __builtin_popcountll(found[c / 64]);
  }
  list->others = most == 1 && 2 * firing > channels;
  uint16_t* row = list->rows;
  for (size_t c = 0; c < channels; c += 64) {
    uint64_t left = found[c / 64];
    if (list->others) left = ~left & ~0ull >> (64 - least(channels - c, 64));
    for (; left > 0; left &= left - 1) {
      const size_t channel = c + __builtin_ctzll(left);
      for (size_t times = most == 1 ? 1 : least(x[channel], most); times > 0; --times) *row++ = (1 + channel) * ROW;
    }
  }
  list->length = row - list->rows;
}

static void spread_row(void* argument, size_t row) {
  const Call* call = argument;
  const Kernel* kernel = call->kernel;
  const size_t image = row / call->pitch[0], y = row % call->pitch[0] - kernel->pads[0]; /* wraps above the image */
  const int there = y < call->size[0] && row % call->pitch[0] % kernel->strides[0] < kernel->size[0];
  for (size_t chunk = 0; chunk < kernel->chunks; ++chunk) {
    const size_t first = chunk * kernel->rows, n = least(kernel->in_channels - first, kernel->rows);
    char* list = (char*)call->spread + (chunk * call->rows + row) * call->pitch[1] * list_bytes(kernel);
    for (size_t at = 0; at < call->pitch[1]; ++at, list += list_bytes(kernel)) {
      const size_t x = at - kernel->pads[1]; /* wraps, too */
      const size_t pixel = (image * call->size[0] + y) * call->size[1] + x;
      const int read = there && x < call->size[1] && at % kernel->strides[1] < kernel->size[1];
      if (read) list_rows((List*)list, call->x + pixel * kernel->in_channels + first, n, kernel->most);
      else *(List*)list = (List){0};
    }
  }
}

/* Of a group of outputs: high * 65536 + low. */
typedef struct { int32_t high[GROUP][ROW / 4], low[GROUP][ROW / 4]; } __attribute__((aligned(LINE))) Sums;

/* The same of int8: `all` and those that are yet to be added to it, which are no more than MOST_ADDITIONS weights. */
typedef struct {
  int32_t all[GROUP][ROW / 2];
  int16_t some[GROUP][ROW / 2];
  size_t added[GROUP];
} __attribute__((aligned(LINE))) Int8Sums;

FOR_EACH_CPU static void widen(Int8Sums* sums, size_t p) {
  for (size_t o = 0; o < ROW / 2; ++o) sums->all[p][o] += sums->some[p][o];
  memset(sums->some[p], 0, ROW);
  sums->added[p] = 0;
}

/* What is added to them: the weights of a chunk of `rows` and a tap, of which a row takes so many lines of the cache, as
 * the lists say, `tap` behind those of the first. */
typedef struct {
  const char *weights, *first_lists[GROUP];
  size_t tap, outputs, lines, rows;
} Addition;

/* For `n` lines, in vector registers of `bytes`. */
#define DEFINE_ADD(name, element, bytes, target, Its, ADD)                                                  \
  typedef element Vector##name __attribute__((vector_size(bytes)));                                         \
  target INLINED void add_lines_##name(const Addition* addition, Its* sums, const size_t n) {               \
    const size_t vectors = n * LINE / bytes;                                                                \
    const Vector##name* all = (const Vector##name*)addition->weights;                                       \
    for (size_t p = 0; p < addition->outputs; ++p) {                                                        \
      const List* list = (const List*)(addition->first_lists[p] + addition->tap);                           \
      if (list->length + list->others == 0) continue;                                                       \
      Vector##name sum[ROW / bytes] = {0};                                                                  \
      for (size_t i = 0; i < list->length; ++i) {                                                           \
        const Vector##name* row = (const Vector##name*)(addition->weights + list->rows[i]);                 \
        for (size_t v = 0; v < vectors; ++v) sum[v] += row[v];                                              \
      }                                                                                                     \
      if (list->others)                                                                                     \
        for (size_t v = 0; v < vectors; ++v) sum[v] = all[v] - sum[v];                                      \
      ADD(Vector##name)                                                                                     \
    }                                                                                                       \
  }                                                                                                         \
  target static void add_##name(const Addition* addition, void* sums) {                                     \
    if (addition->lines > 3) add_lines_##name(addition, sums, 4);                                           \
    else if (addition->lines > 2) add_lines_##name(addition, sums, 3);                                      \
    else if (addition->lines > 1) add_lines_##name(addition, sums, 2);                                      \
    else add_lines_##name(addition, sums, 1);                                                               \
  }

#define ADD_FLOAT(Vector)                                             \
  Vector *high = (Vector*)sums->high[p], *low = (Vector*)sums->low[p]; \
  for (size_t v = 0; v < vectors; ++v) {                              \
    high[v] += sum[v] >> 16;                                          \
    low[v] += sum[v] & 0xffff;                                        \
  }

#define ADD_INT8(Vector)                                                                    \
  const size_t added = list->others ? addition->rows - list->length : list->length;         \
  if (sums->added[p] + added > MOST_ADDITIONS) widen(sums, p);                              \
  sums->added[p] += added;                                                                  \
  Vector* some = (Vector*)sums->some[p];                                                    \
  for (size_t v = 0; v < vectors; ++v) some[v] += sum[v];

#define DEFINE_BOTH(cpu, bytes, target)                                \
  DEFINE_ADD(float_##cpu, int32_t, bytes, target, Sums, ADD_FLOAT)     \
  DEFINE_ADD(int8_##cpu, int16_t, bytes, target, Int8Sums, ADD_INT8)

DEFINE_BOTH(any, 16, )
#if X86
DEFINE_BOTH(v3, 32, __attribute__((target("arch=x86-64-v3"))))
DEFINE_BOTH(v4, 64, __attribute__((target("arch=x86-64-v4,prefer-vector-width=512"))))
#endif

int vector_bytes(void) {
#if X86
  __builtin_cpu_init();
  if (__builtin_cpu_supports("x86-64-v4")) return 64;
  if (__builtin_cpu_supports("x86-64-v3")) return 32;
#endif
  return 16;
}

int has_vnni(void) {
#if X86
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512vnni") || __builtin_cpu_supports("avxvnni");
#else
  return 0;
#endif
}

typedef void Add(const Addition* addition, void* sums);

#if X86
#define ADD_OF(kernel, name) ((kernel)->vector_bytes == 64   ? add_##name##_v4 \
                              : (kernel)->vector_bytes == 32 ? add_##name##_v3 \
                                                             : add_##name##_any)
#else
#define ADD_OF(kernel, name) add_##name##_any
#endif

/* A block of channels, of which there are `channels`, of a group of `outputs`. */
typedef struct { size_t block, channel, channels, first, outputs; } Part;

static Part part_of(const Call* call, size_t grain) {
  const Kernel* kernel = call->kernel;
  const size_t all = call->images * call->out_size[0] * call->out_size[1], groups = parts(all, GROUP);
  const size_t block = grain / groups, first = grain % groups * GROUP, channel = block * kernel->width;
  return (Part){block, channel, least(kernel->out_channels - channel, kernel->width), first, least(all - first, GROUP)};
}

static void add_up(const Call* call, const Part* part, Add* add, void* sums) {
  const Kernel* kernel = call->kernel;
  const size_t bytes = list_bytes(kernel), panel = (1 + kernel->rows) * ROW, width = call->out_size[1];
  const size_t lines = parts(part->channels * (ROW / kernel->width), LINE);
  Addition addition = {.outputs = part->outputs, .lines = lines, .rows = kernel->rows};
  for (size_t p = 0, row = part->first / width, column = part->first % width; p < part->outputs; ++p) {
    const size_t y = row / call->out_size[0] * call->pitch[0] + row % call->out_size[0] * kernel->strides[0];
    const size_t list = y * call->pitch[1] + column * kernel->strides[1];
    addition.first_lists[p] = (const char*)call->spread + list * bytes;
    if (++column == width) column = 0, ++row;
  }
  addition.weights = (const char*)kernel->weights + part->block * kernel->chunks * kernel->taps * panel;
  for (size_t chunk = 0; chunk < kernel->chunks; ++chunk)
    for (size_t tap = 0; tap < kernel->taps; ++tap, addition.weights += panel) {
      const size_t row = chunk * call->rows + tap / kernel->size[1], column = tap % kernel->size[1];
      addition.tap = (row * call->pitch[1] + column) * bytes;
      add(&addition, sums);
    }
}

FOR_EACH_CPU static void put_together(float* y, const int32_t* high, const int32_t* low, const float* scales,
                                      const float* biases, size_t n) {
  for (size_t o = 0; o < n; ++o) {
    const float below = fmaf((float)(low[o] & 0xffff), scales[o], biases[o]);
    y[o] = fmaf((float)(high[o] + (low[o] >> 16)), scales[o] * 65536, below);
  }
}

static void multiply_float(void* argument, size_t grain) {
  const Call* call = argument;
  const Kernel* kernel = call->kernel;
  const Part part = part_of(call, grain);
  Sums sums;
  memset(sums.high, 0, part.outputs * sizeof *sums.high);
  memset(sums.low, 0, part.outputs * sizeof *sums.low);
  add_up(call, &part, ADD_OF(kernel, float), &sums);
  const float *scales = kernel->scales + part.channel, *biases = (const float*)kernel->biases + part.channel;
  float* y = (float*)call->y + part.first * kernel->out_channels + part.channel;
  for (size_t p = 0; p < part.outputs; ++p, y += kernel->out_channels)
    put_together(y, sums.high[p], sums.low[p], scales, biases, part.channels);
}

FOR_EACH_CPU static void requantise_row(uint8_t* y, const int32_t* sums, const int32_t* biases, const float* scales,
                                        int32_t zero, size_t n) {
  requantise(y, sums, biases, scales, zero, n);
}

static void multiply_int8(void* argument, size_t grain) {
  const Call* call = argument;
  const Kernel* kernel = call->kernel;
  const Part part = part_of(call, grain);
  Int8Sums sums;
  memset(sums.all, 0, part.outputs * sizeof *sums.all);
  memset(sums.some, 0, part.outputs * sizeof *sums.some);
  memset(sums.added, 0, sizeof sums.added);
  add_up(call, &part, ADD_OF(kernel, int8), &sums);
  const float* scales = kernel->scales + part.channel;
  const int32_t* biases = (const int32_t*)kernel->biases + part.channel;
  uint8_t* y = (uint8_t*)call->y + part.first * kernel->out_channels + part.channel;
  for (size_t p = 0; p < part.outputs; ++p, y += kernel->out_channels) {
    widen(&sums, p);
    requantise_row(y, sums.all[p], biases, scales, (int32_t)kernel->zero_point, part.channels);
  }
}

static OrtStatusPtr fill(Kernel* kernel, const OrtKernelInfo* info, size_t element, int64_t* shape) {
  int64_t most;
  TRY(kernel->api->KernelInfoGetAttribute_int64(info, "most", &most));
  TRY(kernel->api->KernelInfoGetAttribute_int64(info, "vector_bytes", &kernel->vector_bytes));
  if (most < 1 || most > MOST_ADDITIONS) return refused(kernel, "the largest input is no byte");
  if (kernel->vector_bytes > vector_bytes()) return refused(kernel, "this processor has shorter vector registers");
  kernel->most = most;
  kernel->rows = least(least(MOST_ADDITIONS / kernel->most, MOST_ROWS), kernel->in_channels);
  kernel->chunks = parts(kernel->in_channels, kernel->rows);
  kernel->width = ROW / element;
  kernel->blocks = parts(kernel->out_channels, kernel->width);
  const int64_t sizes[] = {kernel->blocks,  kernel->chunks,   kernel->size[0],
                           kernel->size[1], 1 + kernel->rows, kernel->width};
  memcpy(shape, sizes, sizeof sizes);
  return NULL;
}

static OrtStatusPtr fill_float(Kernel* kernel, const OrtKernelInfo* info, int64_t* shape) {
  return fill(kernel, info, sizeof(int32_t), shape);
}

static OrtStatusPtr fill_int8(Kernel* kernel, const OrtKernelInfo* info, int64_t* shape) {
  TRY(read_zero_point(kernel, info));
  return fill(kernel, info, sizeof(int16_t), shape);
}

static void put_int8(Kernel* kernel, size_t output, size_t channel, size_t tap, int weight) {
  const size_t chunk = output / kernel->width * kernel->chunks + channel / kernel->rows;
  int16_t* panel = (int16_t*)kernel->aligned + (chunk * kernel->taps + tap) * (1 + kernel->rows) * kernel->width;
  panel[output % kernel->width] += weight;
  panel[(1 + channel % kernel->rows) * kernel->width + output % kernel->width] = weight;
}

#define ADDITIONS_WAY .rank = 6, .lay_out = lay_out, .spread_row = spread_row
const Way SPIKE_ADDITIONS = {.name = "SpikeAdditions",
                             .weight = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32,
                             .bias = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
                             .output = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
                             .fill = fill_float,
                             .multiply = multiply_float,
                             ADDITIONS_WAY};
const Way INT8_ADDITIONS = {.name = "Int8Additions",
                            .weight = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16,
                            .bias = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32,
                            .output = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8,
                            .fill = fill_int8,
                            .multiply = multiply_int8,
                            .cycles = cycles,
                            .put = put_int8,
                            ADDITIONS_WAY};
