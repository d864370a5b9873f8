/* Convolutions in tiles, for processors with AMX: ONNX Runtime's own multiply in vector registers; tiles do sixteen times
 * as much in an instruction. Weights of 24 bits come in three digits of a byte, (d0 * 256 + d1) * 256 + d2, which are
 * summed one after the other.
 *
 *   weights   int8 [blocks, digits, chunks, kernel height, kernel width, 2, CHUNK / 4, 16, 4]: a block has 32 output
 *             channels, two tiles of 16, and a chunk CHUNK input channels, four after four; filled with zeros
 *   zero_point   of the uint8 output
 *   plain        1 for int8 in plain C, which is slow, also without AMX
 *
 * A call first spreads the input in planes (`planes.h`), 64 channels after 64 channels. Sixteen outputs that follow one another
 * are then made of sixteen rows of 64 bytes that do.
 */
#define _GNU_SOURCE /* syscall, whatever standard of C is asked for */
#include "planes.h"

#if X86
#include <sys/syscall.h>
#include <unistd.h>
#define FOR_TILES __attribute__((target(V4 ",amx-tile,amx-int8")))
#endif

#define CHUNK 64              /* channels in a row of a tile */
#define ROWS 16               /* of a tile */
#define CHANNELS 32           /* that are summed at once, of two tiles of outputs */
#define SUMS (2 * ROWS * CHANNELS)
#define TILE (ROWS * CHUNK)   /* bytes */
#define GROUP 16              /* tiles in a grain */
#define DIGITS 3

int has_tiles(void) {
#if X86
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

/* One row of an image in the planes of its remainder, or one of zeros. */
static void spread_row(void* argument, size_t grain) {
  const Call* call = argument;
  const Kernel* kernel = call->kernel;
  const PlaneRow from = plane_row(call, grain);
  for (size_t remainder = 0; remainder < call->planes[1]; ++remainder) {
    for (size_t chunk = 0; chunk < kernel->chunks; ++chunk) {
      const size_t first = chunk * CHUNK, n = least(kernel->in_channels - first, CHUNK);
      const size_t before = (from.plane * call->planes[1] + remainder) * kernel->chunks + chunk;
      uint8_t* target = (uint8_t*)call->spread + (before * call->apart + from.at * call->pitch[1]) * CHUNK;
      for (size_t j = 0; j < call->pitch[1]; ++j, target += CHUNK) {
        const size_t column = j * kernel->strides[1] + remainder - kernel->pads[1]; /* wraps, too */
        if (!from.inside || column >= call->size[1]) {
          memset(target, 0, CHUNK);
          continue;
        }
        const uint8_t* source = call->x + (from.pixel + column) * kernel->in_channels + first;
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

static inline size_t element(const Kernel* kernel) { return kernel->digits == 1 ? 1 : sizeof(float); } /* of an output's */

/* Sums that are to be written: of two tiles, or of one. */
typedef struct { const int32_t *sums, *seconds; uint8_t* output; Place now, then; } Pending;

static inline Pending sums_from(const Call* call, size_t block, size_t tile, size_t last, const int32_t* sums) {
  const size_t position = position_of(call, tile);
  const Place now = place_of(call, position);
  const Place then = tile + 1 < last ? place_of(call, position_of(call, tile + 1)) : (Place){.left = 0};
  const size_t outputs = outputs_before(call, position, now) * call->kernel->out_channels + block * CHANNELS;
  uint8_t* output = (uint8_t*)call->y + outputs * element(call->kernel);
  return (Pending){sums, sums + ROWS * CHANNELS, output, now, then};
}

/* Goes on by a position. Where its output is to be written; NULL of padding. */
static inline uint8_t* next(const Call* call, Pending* pending) {
  uint8_t* output = NULL;
  Place* now = &pending->now;
  if (is_output(call, *now)) {
    output = pending->output;
    pending->output += call->kernel->out_channels * element(call->kernel);
  }
  pending->sums += CHANNELS;
  go_on(call, now);
  if (now->left == 0 && pending->then.left > 0) {
    pending->sums = pending->seconds;
    *now = pending->then;
    pending->then.left = 0;
  }
  return output;
}

static void add_products(const Call* call, const size_t* taps, int32_t* sums, const int8_t* weights, size_t position) {
  const Kernel* kernel = call->kernel;
  for (size_t chunk = 0; chunk < kernel->chunks; ++chunk) {
    const uint8_t* pixels = (const uint8_t*)call->spread + (chunk * call->allocated + position) * CHUNK;
    for (size_t tap = 0; tap < kernel->taps; ++tap, weights += 2 * TILE)
      for (size_t p = 0; p < ROWS; ++p)
        for (size_t c = 0; c < CHUNK; ++c) {
          const int32_t pixel = pixels[taps[tap] + p * CHUNK + c];
          if (pixel == 0) continue;
          for (size_t o = 0; o < CHANNELS; ++o) {
            const int32_t product = pixel * weights[o / 16 * TILE + c / 4 * CHUNK + o % 16 * 4 + c % 4];
            sums[p * CHANNELS + o] = (int32_t)((uint32_t)sums[p * CHANNELS + o] + (uint32_t)product);
          }
        }
  }
}

/* Channels `block` of a group of tiles, of int8. */
static void multiply_plain(const Call* call, const size_t* taps, size_t block, size_t first, size_t last) {
  const Kernel* kernel = call->kernel;
  const int8_t* weights = (const int8_t*)kernel->weights + block * kernel->chunks * kernel->taps * 2 * TILE;
  for (size_t tile = first; tile < last; ++tile) {
    int32_t sums[ROWS * CHANNELS] = {0}; /* wrap, as those of tiles do */
    add_products(call, taps, sums, weights, position_of(call, tile));
    Pending pending = sums_from(call, block, tile, tile + 1, sums);
    const size_t channel = block * CHANNELS, n = least(kernel->out_channels - channel, CHANNELS);
    const int32_t* biases = (const int32_t*)kernel->biases + channel;
    while (pending.now.left > 0) {
      const int32_t* its = pending.sums;
      uint8_t* y = next(call, &pending);
      if (y != NULL) requantise(y, its, biases, kernel->scales + channel, (int32_t)kernel->zero_point, n);
    }
  }
}

#if X86
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

/* What two times 16 channels need. */
typedef struct {
  __m512 scales[2], high_scales[2], low, high;
  __m512i biases[2], zero;
  __mmask16 there[2];
} Channels;

/* Writes the next `most` sums of two tiles. */
FOR_TILES INLINED void write_some(const Call* call, const Channels* channels, Pending* pending, size_t most, size_t digits) {
  for (; most > 0 && pending->now.left > 0; --most) {
    const int32_t* sums = pending->sums;
    uint8_t* y = next(call, pending);
    if (y == NULL) continue;
    for (int half = 0; half < 2; ++half, sums += 16) {
      if (digits > 1) {
        __m512i low = _mm512_slli_epi32(_mm512_load_si512(sums + SUMS), 8);
        low = _mm512_add_epi32(low, _mm512_load_si512(sums + 2 * SUMS));
        const __m512i high = _mm512_add_epi32(_mm512_load_si512(sums), _mm512_srai_epi32(low, 16));
        low = _mm512_and_si512(low, _mm512_set1_epi32(0xffff));
        const __m512 bias = _mm512_castsi512_ps(channels->biases[half]);
        const __m512 below = _mm512_fmadd_ps(_mm512_cvtepi32_ps(low), channels->scales[half], bias);
        const __m512 current = _mm512_fmadd_ps(_mm512_cvtepi32_ps(high), channels->high_scales[half], below);
        _mm512_mask_storeu_ps((float*)y + 16 * half, channels->there[half], current);
        continue;
      }
      const __m128i bytes = requantised(_mm512_load_si512(sums), channels->biases[half], channels->scales[half],
                                        channels->low, channels->high, channels->zero);
      _mm_mask_storeu_epi8(y + 16 * half, channels->there[half], bytes);
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
    made.biases[half] = _mm512_load_si512((const int32_t*)kernel->biases + first + 16 * half);
    made.there[half] = (1u << least(left < 16 * half ? 0 : left - 16 * half, 16)) - 1;
  }
  return made;
}

/* The same. While two tiles of outputs are multiplied, the sums of those before them are written. */
FOR_TILES INLINED void multiply_digits(const Call* call, const size_t* taps, size_t block, size_t first, size_t last,
                                       size_t digits) {
  const Kernel* kernel = call->kernel;
  _tile_loadconfig(&SHAPES);
  int32_t sums[2][DIGITS * SUMS] __attribute__((aligned(64)));
  Pending pending = {.now = {.left = 0}};
  const Channels channels = channels_of(kernel, block);
  const size_t steps = digits * kernel->chunks * kernel->taps, each = parts(2 * ROWS, steps);
  int turn = 0;
  for (size_t tile = first; tile < last; tile += 2, turn = !turn) {
    const int8_t* weights = (const int8_t*)kernel->weights + block * steps * 2 * TILE;
    const size_t position = position_of(call, tile);
    const size_t second = (position_of(call, least(tile + 1, last - 1)) - position) * CHUNK; /* from the first in bytes */
    for (int32_t* its = sums[turn]; its < sums[turn] + digits * SUMS; its += SUMS) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (size_t chunk = 0; chunk < kernel->chunks; ++chunk) {
        const uint8_t* plane = (const uint8_t*)call->spread + (chunk * call->allocated + position) * CHUNK;
        for (size_t tap = 0; tap < kernel->taps; ++tap, weights += 2 * TILE) {
          const uint8_t* pixels = plane + taps[tap];
          _tile_loadd(4, pixels, CHUNK);
          _tile_loadd(6, weights, CHUNK);
          _tile_loadd(7, weights + TILE, CHUNK);
          _tile_loadd(5, pixels + second, CHUNK);
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
    pending = sums_from(call, block, tile, last, sums[turn]);
  }
  write_some(call, &channels, &pending, 2 * ROWS, digits);
  _tile_release();
}

FOR_TILES static void multiply_tiles(const Call* call, const size_t* taps, size_t block, size_t first, size_t last) {
  if (call->kernel->digits == 1) multiply_digits(call, taps, block, first, last, 1);
  else multiply_digits(call, taps, block, first, last, DIGITS);
}
#endif

static void multiply(void* argument, size_t grain) {
  const Call* call = argument;
  const Kernel* kernel = call->kernel;
  const size_t groups = parts(call->tiles, GROUP);
  const size_t block = call->by_channels ? grain / groups : grain % kernel->blocks;
  const size_t first = (call->by_channels ? grain % groups : grain / kernel->blocks) * GROUP;
  const size_t last = least(first + GROUP, call->tiles);
  size_t taps[kernel->taps];
  find_taps(call, taps);
  for (size_t tap = 0; tap < kernel->taps; ++tap) taps[tap] *= CHUNK; /* now in bytes */
#if X86
  if (!kernel->plain) {
    multiply_tiles(call, taps, block, first, last);
    return;
  }
#endif
  multiply_plain(call, taps, block, first, last);
}

static size_t lay_out(Call* call) {
  const Kernel* kernel = call->kernel;
  lay_out_planes(call, ROWS);
  call->grains = parts(call->tiles, GROUP) * kernel->blocks;
  const size_t spread = call->planes[0] * call->planes[1] * kernel->chunks * call->allocated * CHUNK;
  call->by_channels = spread < kernel->blocks * kernel->digits * kernel->chunks * kernel->taps * 2 * TILE;
  return spread;
}

static OrtStatusPtr fill(Kernel* kernel, size_t digits, int64_t* shape) {
  if (!kernel->plain && !has_tiles()) return refused(kernel, "this processor, or its system, has no AMX");
  kernel->digits = digits;
  kernel->chunks = parts(kernel->in_channels, CHUNK);
  kernel->blocks = parts(kernel->out_channels, CHANNELS);
  const int64_t sizes[] = {kernel->blocks, digits, kernel->chunks, kernel->size[0], kernel->size[1], 2, CHUNK / 4, 16, 4};
  memcpy(shape, sizes, sizeof sizes);
  return NULL;
}

static OrtStatusPtr fill_int8(Kernel* kernel, const OrtKernelInfo* info, int64_t* shape) {
  TRY(read_zero_point(kernel, info));
  TRY(kernel->api->KernelInfoGetAttribute_int64(info, "plain", &kernel->plain));
  return fill(kernel, 1, shape);
}

static OrtStatusPtr fill_spikes(Kernel* kernel, const OrtKernelInfo* info, int64_t* shape) {
  return (void)info, fill(kernel, DIGITS, shape);
}

#define TILES_WAY                                                                                      \
  .rank = 9, .weight = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8, .lay_out = lay_out, .spread_row = spread_row, \
  .multiply = multiply
const Way INT8_TILES = {.name = "Int8Convolution",
                        .bias = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32,
                        .output = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8,
                        .fill = fill_int8,
                        TILES_WAY};
const Way SPIKE_TILES = {.name = "SpikeConvolution",
                         .bias = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
                         .output = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
                         .fill = fill_spikes,
                         TILES_WAY};
