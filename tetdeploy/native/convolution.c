/* Convolutions of bytes as operators of ONNX Runtime, for processors with AMX: ONNX Runtime's own multiply in vector
 * registers; tiles do sixteen times as much in an instruction.
 *
 * `ai.tetdeploy::Convolution` stands for a `QLinearConv` of bytes that lie channels last, and gives its bits: sums of
 * int32, plus the bias, times a scale for each channel in float32, limited, rounded to even, plus the zero point.
 *
 * `ai.tetdeploy::SpikeConvolution` stands for a float32 `Conv` of spikes, or sums of some. A weight is a whole number of 24
 * bits times a scale of its channel, as near as float32 is to the channel's largest. It comes in three digits of a byte,
 * (d0 * 256 + d1) * 256 + d2, whose sums are whole and exact; two float32 operations make a current of them.
 *
 *   input 0   uint8 [N, H, W, C], zero point 0
 *   input 1   int8 [blocks, digits, chunks, kernel height, kernel width, 2, CHUNK / 4, 16, 4], constant: a block has 32
 *             output channels, two tiles of 16, and a chunk CHUNK input channels, four after four; filled with zeros
 *   input 2   float32 [O], constant: scale of the input times that of the weights over that of the output; of the weights
 *   input 3   int32 [O], constant: bias; float32
 *   output    uint8 [N, H', W', O]; float32
 *   channels, strides, pads, zero_point   channels is C, others are as in ONNX; the zero point is that of a uint8 output
 *   tiles     1 to multiply with AMX, which `has_tiles` must allow; 0 in plain C
 *
 * A call first spreads the input: 64 channels after 64 channels, the pixels of all images one behind the other with the
 * zeros of the padding between them, and for strides one such plane for each remainder. Sixteen outputs that follow one
 * another are then made of sixteen rows of 64 bytes that do, for every tap of the kernel. Outputs that would lie in the
 * padding are computed with the others and left out.
 */
#define _GNU_SOURCE /* syscall, whatever standard of C is asked for */
#include "operator.h"

#include <math.h>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define TILES 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#define INLINED static inline __attribute__((always_inline))
#define FOR_TILES __attribute__((target("arch=x86-64-v4,prefer-vector-width=512,amx-tile,amx-int8")))
#else
#define TILES 0
#endif

#define CHUNK 64                               /* channels in a row of a tile */
#define ROWS 16                                /* of a tile */
#define POSITIONS (2 * ROWS)                   /* that are summed at once, */
#define CHANNELS 32                            /* for as many channels */
#define SUMS (POSITIONS * CHANNELS)
#define TILE (ROWS * CHUNK)                    /* bytes */
#define GROUP 8                                /* times POSITIONS in a grain */
#define MAX_DIGITS 3

typedef struct {
  const OrtApi* api;
  size_t kernel[2], strides[2], pads[4]; /* vertical, horizontal; pads as in ONNX */
  size_t in_channels, out_channels, chunks, blocks, taps, digits;
  size_t element;        /* bytes of an output's: 1, or 4 of three digits */
  const int8_t* weights; /* [blocks][digits][chunks][taps], each two tiles: the node's, or where that is not aligned */
  void* aligned;         /* a copy */
  float* scales;         /* these and biases are filled with zeros up to whole blocks */
  int32_t* biases;       /* or float32, of three digits */
  int64_t zero_point, tiles;
} Kernel;

typedef struct {
  const Kernel* kernel;
  const uint8_t* x;
  uint8_t *y, *spread;
  size_t images, size[2], out_size[2];
  size_t planes[2];   /* remainders of the strides that taps fall on */
  size_t pitch[2];    /* rows and columns of an image in a plane */
  size_t positions;   /* of the outputs in a plane, padding included */
  size_t allocated;   /* positions of a plane, with zeros behind the last image */
  const size_t* taps; /* where the first position of each is, in bytes */
  int by_channels;    /* grains that follow one another have weights in common, not pixels */
} Call;

int has_tiles(void) {
#if TILES
  static int found = -1; /* by whichever thread comes first, or by several */
  int known = __atomic_load_n(&found, __ATOMIC_RELAXED);
  if (known < 0) {
    __builtin_cpu_init();
    const int there = __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-int8") &&
                      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    known = there && syscall(SYS_arch_prctl, 0x1023 /* ARCH_REQ_XCOMP_PERM */, 18 /* tile data */) == 0;
    __atomic_store_n(&found, known, __ATOMIC_RELAXED);
  }
  return known;
#else
  return 0;
#endif
}

static inline size_t least(size_t a, size_t b) { return a < b ? a : b; }

static OrtStatusPtr failed(const OrtApi* api, const char* why) { return failed_in(api, "Convolution", why); }

/* One row of an image in the planes of its remainder, or one of zeros. */
static void spread_row(void* argument, size_t grain) {
  const Call* call = argument;
  const Kernel* kernel = call->kernel;
  const size_t plane = grain % call->planes[0], at = grain / call->planes[0];
  const size_t image = at / call->pitch[0], padded = at % call->pitch[0] * kernel->strides[0] + plane;
  const size_t row = padded - kernel->pads[0]; /* wraps above the image */
  const int inside = image < call->images && padded >= kernel->pads[0] && row < call->size[0];
  for (size_t remainder = 0; remainder < call->planes[1]; ++remainder) {
    for (size_t chunk = 0; chunk < kernel->chunks; ++chunk) {
      const size_t from = chunk * CHUNK, n = least(kernel->in_channels - from, CHUNK);
      const size_t before = (plane * call->planes[1] + remainder) * kernel->chunks + chunk;
      uint8_t* target = call->spread + (before * call->allocated + at * call->pitch[1]) * CHUNK;
      for (size_t j = 0; j < call->pitch[1]; ++j, target += CHUNK) {
        const size_t column = j * kernel->strides[1] + remainder - kernel->pads[1]; /* wraps, too */
        if (!inside || column >= call->size[1]) {
          memset(target, 0, CHUNK);
          continue;
        }
        const size_t pixel = (image * call->size[0] + row) * call->size[1] + column;
        const uint8_t* source = call->x + pixel * kernel->in_channels + from;
        if (n == CHUNK) {
          memcpy(target, source, CHUNK);
        } else {
          memcpy(target, source, n);
          memset(target + n, 0, CHUNK - n);
        }
      }
    }
  }
}

/* Sums that are to be written: those of `left` positions, of which the first is (y, x) of an image. */
typedef struct { const int32_t* sums; uint8_t* output; size_t y, x, left; } Pending;

static inline Pending sums_from(const Call* call, size_t block, size_t position, const int32_t* sums) {
  const size_t row = position / call->pitch[1], y = row % call->pitch[0], x = position % call->pitch[1];
  const size_t rows = row / call->pitch[0] * call->out_size[0] + least(y, call->out_size[0]); /* of outputs before it */
  const size_t pixels = rows * call->out_size[1] + (y < call->out_size[0] ? least(x, call->out_size[1]) : 0);
  uint8_t* output = call->y + (pixels * call->kernel->out_channels + block * CHANNELS) * call->kernel->element;
  return (Pending){sums, output, y, x, least(call->positions - position, POSITIONS)};
}

/* Goes on by a position. Where its output is to be written; NULL of padding. */
static inline uint8_t* next(const Call* call, Pending* pending) {
  uint8_t* output = NULL;
  if (pending->y < call->out_size[0] && pending->x < call->out_size[1]) {
    output = pending->output;
    pending->output += call->kernel->out_channels * call->kernel->element;
  }
  if (++pending->x == call->pitch[1]) {
    pending->x = 0;
    if (++pending->y == call->pitch[0]) pending->y = 0;
  }
  --pending->left;
  pending->sums += CHANNELS;
  return output;
}

static inline void requantise(uint8_t* y, const int32_t* sums, const int32_t* biases, const float* scales, int32_t zero,
                              size_t n) {
  const float low = (float)-zero, high = (float)(255 - zero);
  for (size_t i = 0; i < n; ++i) {
    float scaled = (float)(int32_t)((uint32_t)sums[i] + (uint32_t)biases[i]) * scales[i];
    scaled = scaled > low ? scaled : low;
    scaled = scaled < high ? scaled : high;
    y[i] = (uint8_t)((int32_t)rintf(scaled) + zero);
  }
}

/* The sums of digits that follow one another, the highest first, are SUMS apart. */
static inline void put_together(float* y, const int32_t* sums, const float* biases, const float* scales, size_t n) {
  for (size_t i = 0; i < n; ++i) {
    const int32_t low = (int32_t)((uint32_t)sums[SUMS + i] * 256 + (uint32_t)sums[2 * SUMS + i]);
    y[i] = fmaf((float)sums[i], scales[i] * 65536, fmaf((float)low, scales[i], biases[i]));
  }
}

static void add_products(const Call* call, int32_t* sums, const int8_t* weights, size_t position) {
  const Kernel* kernel = call->kernel;
  for (size_t chunk = 0; chunk < kernel->chunks; ++chunk) {
    const uint8_t* pixels = call->spread + (chunk * call->allocated + position) * CHUNK;
    for (size_t tap = 0; tap < kernel->taps; ++tap, weights += 2 * TILE)
      for (size_t p = 0; p < POSITIONS; ++p)
        for (size_t c = 0; c < CHUNK; ++c) {
          const int32_t pixel = pixels[call->taps[tap] + p * CHUNK + c];
          if (pixel == 0) continue;
          for (size_t o = 0; o < CHANNELS; ++o) {
            const int32_t product = pixel * weights[o / 16 * TILE + c / 4 * CHUNK + o % 16 * 4 + c % 4];
            sums[p * CHANNELS + o] = (int32_t)((uint32_t)sums[p * CHANNELS + o] + (uint32_t)product);
          }
        }
  }
}

/* Channels `block` of a group of outputs. */
static void multiply_plain(const Call* call, size_t block, size_t first, size_t last) {
  const Kernel* kernel = call->kernel;
  const size_t digit_size = kernel->chunks * kernel->taps * 2 * TILE;
  for (size_t position = first; position < last; position += POSITIONS) {
    int32_t sums[MAX_DIGITS * SUMS] = {0}; /* wrap, as those of tiles do */
    for (size_t digit = 0; digit < kernel->digits; ++digit)
      add_products(call, sums + digit * SUMS, kernel->weights + (block * kernel->digits + digit) * digit_size, position);
    Pending pending = sums_from(call, block, position, sums);
    const size_t channel = block * CHANNELS, n = least(kernel->out_channels - channel, CHANNELS);
    const int32_t* biases = kernel->biases + channel;
    while (pending.left > 0) {
      const int32_t* its = pending.sums;
      uint8_t* y = next(call, &pending);
      if (y == NULL) continue;
      if (kernel->digits == 1) requantise(y, its, biases, kernel->scales + channel, (int32_t)kernel->zero_point, n);
      else put_together((float*)y, its, (const float*)biases, kernel->scales + channel, n);
    }
  }
}

#if TILES
typedef struct {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
} TileShapes;

/* Eight tiles. Constant, since GCC before 12.4 and 13.3 thinks that only the first 8 bytes of a configuration are read,
 * and may leave out what is written into the others (PR 114098). */
static const TileShapes SHAPES = {
    .palette = 1,
    .bytes = {CHUNK, CHUNK, CHUNK, CHUNK, CHUNK, CHUNK, CHUNK, CHUNK},
    .rows = {ROWS, ROWS, ROWS, ROWS, ROWS, ROWS, ROWS, ROWS},
};

/* What `requantise` and `put_together` need of two times 16 channels. */
typedef struct {
  __m512 scales[2], high_scales[2], low, high;
  __m512i biases[2], zero;
  __mmask16 there[2];
} Channels;

FOR_TILES INLINED void write_some(const Call* call, const Channels* channels, Pending* pending, size_t most, size_t digits) {
  for (; most > 0 && pending->left > 0; --most) {
    const int32_t* sums = pending->sums;
    uint8_t* y = next(call, pending);
    if (y == NULL) continue;
    for (int half = 0; half < 2; ++half, sums += 16) {
      if (digits > 1) {
        const __m512i middle = _mm512_slli_epi32(_mm512_load_si512(sums + SUMS), 8);
        const __m512i low = _mm512_add_epi32(middle, _mm512_load_si512(sums + 2 * SUMS));
        const __m512 high = _mm512_cvtepi32_ps(_mm512_load_si512(sums)), bias = _mm512_castsi512_ps(channels->biases[half]);
        const __m512 below = _mm512_fmadd_ps(_mm512_cvtepi32_ps(low), channels->scales[half], bias);
        const __m512 current = _mm512_fmadd_ps(high, channels->high_scales[half], below);
        _mm512_mask_storeu_ps((float*)y + 16 * half, channels->there[half], current);
        continue;
      }
      const __m512i sum = _mm512_add_epi32(_mm512_load_si512(sums), channels->biases[half]);
      __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), channels->scales[half]);
      scaled = _mm512_min_ps(_mm512_max_ps(scaled, channels->low), channels->high);
      const __m512i bytes = _mm512_add_epi32(_mm512_cvtps_epi32(scaled), channels->zero);
      _mm_mask_storeu_epi8(y + 16 * half, channels->there[half], _mm512_cvtepi32_epi8(bytes));
    }
  }
}

FOR_TILES INLINED Channels channels_of(const Kernel* kernel, size_t block) {
  const size_t first = block * CHANNELS, left = kernel->out_channels - first;
  const int32_t zero = (int32_t)kernel->zero_point;
  Channels made = {.low = _mm512_set1_ps((float)-zero),
                   .high = _mm512_set1_ps((float)(255 - zero)),
                   .zero = _mm512_set1_epi32(zero)};
  for (size_t half = 0; half < 2; ++half) {
    made.scales[half] = _mm512_load_ps(kernel->scales + first + 16 * half);
    made.high_scales[half] = _mm512_mul_ps(made.scales[half], _mm512_set1_ps(65536));
    made.biases[half] = _mm512_load_si512(kernel->biases + first + 16 * half);
    made.there[half] = (1u << least(left < 16 * half ? 0 : left - 16 * half, 16)) - 1;
  }
  return made;
}

/* The same. While a position's tiles are multiplied, the sums of those before it are written. */
FOR_TILES INLINED void multiply_digits(const Call* call, size_t block, size_t first, size_t last, size_t digits) {
  const Kernel* kernel = call->kernel;
  _tile_loadconfig(&SHAPES);
  int32_t sums[2][MAX_DIGITS * SUMS] __attribute__((aligned(64)));
  Pending pending = {.left = 0};
  const Channels channels = channels_of(kernel, block);
  const size_t steps = digits * kernel->chunks * kernel->taps, each = (POSITIONS + steps - 1) / steps;
  int turn = 0;
  for (size_t position = first; position < last; position += POSITIONS, turn = !turn) {
    const int8_t* weights = kernel->weights + block * steps * 2 * TILE;
    for (int32_t* its = sums[turn]; its < sums[turn] + digits * SUMS; its += SUMS) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (size_t chunk = 0; chunk < kernel->chunks; ++chunk) {
        const uint8_t* plane = call->spread + (chunk * call->allocated + position) * CHUNK;
        for (size_t tap = 0; tap < kernel->taps; ++tap, weights += 2 * TILE) {
          const uint8_t* pixels = plane + call->taps[tap];
          _tile_loadd(4, pixels, CHUNK);
          _tile_loadd(6, weights, CHUNK);
          _tile_loadd(7, weights + TILE, CHUNK);
          _tile_loadd(5, pixels + TILE, CHUNK);
          _tile_dpbusd(0, 4, 6);
          _tile_dpbusd(1, 4, 7);
          _tile_dpbusd(2, 5, 6);
          _tile_dpbusd(3, 5, 7);
          write_some(call, &channels, &pending, each, digits);
        }
      }
      _tile_stored(0, its, 4 * CHANNELS);
      _tile_stored(1, its + 16, 4 * CHANNELS);
      _tile_stored(2, its + SUMS / 2, 4 * CHANNELS);
      _tile_stored(3, its + SUMS / 2 + 16, 4 * CHANNELS);
    }
    pending = sums_from(call, block, position, sums[turn]);
  }
  write_some(call, &channels, &pending, POSITIONS, digits);
  _tile_release();
}

FOR_TILES static void multiply_tiles(const Call* call, size_t block, size_t first, size_t last) {
  if (call->kernel->digits == 1) multiply_digits(call, block, first, last, 1);
  else multiply_digits(call, block, first, last, MAX_DIGITS);
}
#endif

static size_t groups(const Call* call) { return (call->positions + GROUP * POSITIONS - 1) / (GROUP * POSITIONS); }

static void multiply(void* argument, size_t grain) {
  const Call* call = argument;
  const size_t blocks = call->kernel->blocks;
  const size_t block = call->by_channels ? grain / groups(call) : grain % blocks;
  const size_t first = (call->by_channels ? grain % groups(call) : grain / blocks) * GROUP * POSITIONS;
  const size_t last = least(first + GROUP * POSITIONS, call->positions);
#if TILES
  if (call->kernel->tiles) {
    multiply_tiles(call, block, first, last);
    return;
  }
#endif
  multiply_plain(call, block, first, last);
}

/* How long an axis of an image is in a plane, so that each output has a place and a tap beyond its end meets the zeros
 * before the next. */
static size_t pitch(size_t size, size_t out, size_t kernel, size_t stride, size_t before) {
  const size_t end = (out - 1) * stride + kernel; /* of what taps reach */
  size_t length = (size + before + stride - 1) / stride;
  if (length < out) length = out; /* as where padding is as wide as the kernel, and outputs are of nothing else */
  while (end > length * stride + before) ++length;
  return length;
}

static OrtStatusPtr lay_out(Call* call, const int64_t* dims) {
  const Kernel* kernel = call->kernel;
  if ((size_t)dims[3] != kernel->in_channels) return failed(kernel->api, "the input has other channels than the weights");
  call->images = dims[0];
  for (int axis = 0; axis < 2; ++axis) {
    const size_t padded = dims[axis + 1] + kernel->pads[axis] + kernel->pads[axis + 2];
    if (padded < kernel->kernel[axis]) return failed(kernel->api, "the input is smaller than the kernel");
    const size_t stride = kernel->strides[axis], taps = kernel->kernel[axis];
    call->size[axis] = dims[axis + 1];
    call->out_size[axis] = (padded - taps) / stride + 1;
    call->planes[axis] = least(stride, taps);
    call->pitch[axis] = pitch(call->size[axis], call->out_size[axis], taps, stride, kernel->pads[axis]);
  }
  const size_t image = call->pitch[0] * call->pitch[1];
  const size_t behind = kernel->kernel[0] * call->pitch[1] + kernel->kernel[1] + POSITIONS; /* are read there at most */
  call->positions = call->images * image;
  call->allocated = call->positions + (behind + image - 1) / image * image;
  return NULL;
}

static OrtStatusPtr run(Call* call, OrtKernelContext* context) {
  const Kernel* kernel = call->kernel;
  const OrtApi* api = kernel->api;
  size_t taps[kernel->taps];
  for (size_t y = 0; y < kernel->kernel[0]; ++y)
    for (size_t x = 0; x < kernel->kernel[1]; ++x) {
      const size_t sy = kernel->strides[0], sx = kernel->strides[1], plane = y % sy * call->planes[1] + x % sx;
      const size_t at = plane * kernel->chunks * call->allocated + y / sy * call->pitch[1] + x / sx;
      taps[y * kernel->kernel[1] + x] = at * CHUNK;
    }
  call->taps = taps;
  const size_t rows = call->allocated / call->pitch[1] * call->planes[0];
  const size_t spread = call->planes[0] * call->planes[1] * kernel->chunks * call->allocated * CHUNK;
  call->by_channels = spread < kernel->blocks * kernel->digits * kernel->chunks * kernel->taps * 2 * TILE;
  OrtMemoryInfo* where;
  OrtAllocator* allocator;
  TRY(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &where));
  OrtStatusPtr status = api->KernelContext_GetAllocator(context, where, &allocator);
  api->ReleaseMemoryInfo(where);
  if (status != NULL) return status;
  void* memory = NULL;
  status = api->AllocatorAlloc(allocator, spread + CHUNK, &memory);
  if (status == NULL && memory == NULL) status = failed(api, "no memory");
  if (status == NULL) {
    call->spread = (uint8_t*)memory + (CHUNK - (uintptr_t)memory % CHUNK) % CHUNK;
    status = api->KernelContext_ParallelFor(context, spread_row, rows, 0, call);
    if (status == NULL) status = api->KernelContext_ParallelFor(context, multiply, groups(call) * kernel->blocks, 0, call);
    OrtStatusPtr freed = api->AllocatorFree(allocator, memory);
    if (status == NULL) status = freed;
    else if (freed != NULL) api->ReleaseStatus(freed);
  }
  api->ReleaseAllocator(allocator);
  return status;
}

/* The dimensions of a tensor, which must have `rank`. */
static OrtStatusPtr dimensions(const OrtApi* api, const OrtValue* value, int64_t* dims, size_t rank) {
  OrtTensorTypeAndShapeInfo* info;
  size_t found = 0;
  TRY(api->GetTensorTypeAndShape(value, &info));
  OrtStatusPtr status = api->GetDimensionsCount(info, &found);
  if (status == NULL && found == rank) status = api->GetDimensions(info, dims, rank);
  api->ReleaseTensorTypeAndShapeInfo(info);
  return status == NULL && found != rank ? failed(api, "a tensor has another number of axes") : status;
}

static OrtStatusPtr ORT_API_CALL compute(void* self, OrtKernelContext* context) {
  const Kernel* kernel = self;
  const OrtApi* api = kernel->api;
  const OrtValue* x;
  OrtValue* y;
  int64_t dims[4];
  Call call = {.kernel = kernel};
  TRY(api->KernelContext_GetInput(context, 0, &x));
  TRY(dimensions(api, x, dims, 4));
  TRY(lay_out(&call, dims));
  const int64_t out[] = {dims[0], call.out_size[0], call.out_size[1], kernel->out_channels};
  TRY(api->KernelContext_GetOutput(context, 0, out, 4, &y));
  TRY(api->GetTensorMutableData((OrtValue*)x, (void**)&call.x));
  TRY(api->GetTensorMutableData(y, (void**)&call.y));
  return call.images > 0 ? run(&call, context) : NULL;
}

static void ORT_API_CALL destroy(void* self) {
  Kernel* kernel = self;
  free(kernel->aligned);
  free(kernel->scales);
  free(kernel->biases);
  free(kernel);
}

/* A constant input of `rank` axes. */
static OrtStatusPtr constant(const OrtApi* api, const OrtKernelInfo* info, size_t index, size_t rank, int64_t* dims,
                             const void** data) {
  int is_constant = 0;
  const OrtValue* value = NULL;
  TRY(api->KernelInfoGetConstantInput_tensor(info, index, &is_constant, &value));
  if (!is_constant || value == NULL) return failed(api, "weights, scales and biases must be constant");
  TRY(dimensions(api, value, dims, rank));
  return api->GetTensorMutableData((OrtValue*)value, (void**)data);
}

static OrtStatusPtr read_sizes(const OrtApi* api, const OrtKernelInfo* info, const char* name, size_t least, size_t* sizes,
                               size_t count) {
  int64_t read[4];
  size_t found = 0;
  TRY(api->KernelInfoGetAttributeArray_int64(info, name, NULL, &found));
  if (found != count) return failed(api, "an attribute has the wrong length");
  TRY(api->KernelInfoGetAttributeArray_int64(info, name, read, &found));
  for (size_t k = 0; k < count; ++k) {
    if (read[k] < (int64_t)least || read[k] > 1 << 16) return failed(api, "a stride or pad is too small, or too large");
    sizes[k] = read[k];
  }
  return NULL;
}

static void* zeros(size_t bytes) { /* of whole lines of the cache */
  void* made = aligned_alloc(CHUNK, bytes);
  return made == NULL ? NULL : memset(made, 0, bytes);
}

/* One for outputs of uint8, three for float32. */
static OrtStatusPtr count_digits(Kernel* kernel, const OrtKernelInfo* info) {
  const OrtApi* api = kernel->api;
  OrtTypeInfo* type;
  const OrtTensorTypeAndShapeInfo* tensor;
  enum ONNXTensorElementDataType element = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  TRY(api->KernelInfo_GetOutputTypeInfo(info, 0, &type));
  OrtStatusPtr status = api->CastTypeInfoToTensorInfo(type, &tensor);
  if (status == NULL) status = api->GetTensorElementType(tensor, &element);
  api->ReleaseTypeInfo(type);
  kernel->digits = element == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? MAX_DIGITS : 1;
  return status;
}

static OrtStatusPtr fill(Kernel* kernel, const OrtKernelInfo* info) {
  const OrtApi* api = kernel->api;
  int64_t shape[9], channels[2], in_channels;
  const float* scales;
  const void* biases;
  TRY(read_sizes(api, info, "strides", 1, kernel->strides, 2));
  TRY(read_sizes(api, info, "pads", 0, kernel->pads, 4));
  TRY(api->KernelInfoGetAttribute_int64(info, "channels", &in_channels));
  TRY(api->KernelInfoGetAttribute_int64(info, "zero_point", &kernel->zero_point));
  TRY(api->KernelInfoGetAttribute_int64(info, "tiles", &kernel->tiles));
  TRY(constant(api, info, 1, 9, shape, (const void**)&kernel->weights));
  TRY(constant(api, info, 2, 1, channels, (const void**)&scales));
  TRY(constant(api, info, 3, 1, channels + 1, &biases));
  if (channels[0] != channels[1]) return failed(api, "each channel needs a scale and a bias");
  if (in_channels < 1 || channels[0] < 1 || shape[3] < 1 || shape[4] < 1) return failed(api, "there are no weights");
  if (shape[3] * shape[4] > 1 << 10) return failed(api, "the kernel is too large");
  if (kernel->zero_point < 0 || kernel->zero_point > 255) return failed(api, "the zero point is no byte");
  if (kernel->tiles && !has_tiles()) return failed(api, "this processor has no AMX");
  kernel->out_channels = channels[0];
  kernel->in_channels = in_channels;
  kernel->kernel[0] = shape[3];
  kernel->kernel[1] = shape[4];
  kernel->taps = shape[3] * shape[4];
  kernel->chunks = (kernel->in_channels + CHUNK - 1) / CHUNK;
  kernel->blocks = (kernel->out_channels + CHANNELS - 1) / CHANNELS;
  TRY(count_digits(kernel, info));
  const int64_t packed[] = {kernel->blocks, kernel->digits, kernel->chunks, shape[3], shape[4], 2, CHUNK / 4, 16, 4};
  if (memcmp(shape, packed, sizeof packed) != 0) return failed(api, "its weights are not in tiles");
  kernel->element = kernel->digits == 1 ? 1 : sizeof(float);
  kernel->scales = zeros(kernel->blocks * CHANNELS * sizeof *scales);
  kernel->biases = zeros(kernel->blocks * CHANNELS * sizeof *kernel->biases);
  if (!kernel->scales || !kernel->biases) return failed(api, "no memory");
  memcpy(kernel->scales, scales, kernel->out_channels * sizeof *scales);
  memcpy(kernel->biases, biases, kernel->out_channels * sizeof *kernel->biases);
  if ((uintptr_t)kernel->weights % CHUNK != 0) { /* rows across two lines of the cache would take twice the time */
    const size_t bytes = kernel->blocks * kernel->digits * kernel->chunks * kernel->taps * 2 * TILE;
    if ((kernel->aligned = zeros(bytes)) == NULL) return failed(api, "no memory");
    kernel->weights = memcpy(kernel->aligned, kernel->weights, bytes);
  }
  return NULL;
}

DEFINE_CREATE

static const char* ORT_API_CALL name(const struct OrtCustomOp* op) {
  return op == &CONVOLUTION ? "Convolution" : "SpikeConvolution";
}
static size_t ORT_API_CALL inputs(const struct OrtCustomOp* op) { return (void)op, 4; }
static enum ONNXTensorElementDataType ORT_API_CALL input_type(const struct OrtCustomOp* op, size_t index) {
  static const enum ONNXTensorElementDataType types[] = {
      ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
      ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32};
  return op != &CONVOLUTION && index == 3 ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT : types[index];
}
static enum ONNXTensorElementDataType ORT_API_CALL output_type(const struct OrtCustomOp* op, size_t index) {
  return (void)index, op == &CONVOLUTION ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
}
static OrtCustomOpInputOutputCharacteristic ORT_API_CALL required(const struct OrtCustomOp* op, size_t index) {
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
const OrtCustomOp CONVOLUTION = OPERATOR, SPIKE_CONVOLUTION = OPERATOR;
