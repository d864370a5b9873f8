/* Convolutions of spikes by lookups, for processors that permute registers of 64 bytes as fast as they multiply them (AMD's
 * with AVX-512): of five inputs that are 0 or 1 there are 32 sums of weights. They fill a register, a table, and each lane of
 * another takes the sum that its inputs name.
 *
 *   weights   int8 [blocks, 2, groups, kernel height, kernel width, 8, 5]: a block has 16 output channels, eight and eight,
 *             and a group five input channels, of which the first comes last; of 64 the last group has four; filled with zeros
 *   together  so many runs add up within int16; a run is as many groups and taps as is said below
 *   zero_point   of the uint8 output
 *   most, vector_bytes   of the additions to which calls give way in which few neurons fire: 1, and 0 if none does
 *
 * A call first writes, in planes, which channels of a group fire, five bits for each position. A grain makes the tables of a
 * run of groups and taps, for eight channels, and looks up its sums at the positions of one tile after the other.
 */
#include "planes.h"

#define CHANNELS 5 /* in a group */
#define CHUNK 64   /* which the groups divide anew */
#define OUTPUTS 16 /* in a block */
#define SOME 8     /* of them, whose sums for three tiles stay in registers */
#define LANES 32
#define MOST_GROUPS 47 /* in a run: its tables leave room in the first cache */
#define LEAST_TILES 24 /* in a grain, of which there should be MANY: each makes its tables anew */
#define MOST_TILES 96
#define MANY 32

int has_lookups(void) {
#if X86
  __builtin_cpu_init();
  return __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512vnni");
#else
  return 0;
#endif
}

int has_fast_lookups(void) {
#if X86
  return has_lookups() && __builtin_cpu_is("amd"); /* others take longer to permute words */
#else
  return 0;
#endif
}

/* Of SOME outputs, for a group and tap. */
typedef struct { int8_t of[SOME][CHANNELS]; } Weights;

#if X86
#define FOR_LOOKUPS __attribute__((target(V4 ",avx512vnni")))

/* One row of an image, or one of zeros, in the planes of its remainder: of CHUNK positions and channels after others. */
FOR_LOOKUPS static void spread_row(void* argument, size_t grain) {
  const Call* call = argument;
  const Kernel* kernel = call->kernel;
  const PlaneRow from = plane_row(call, grain);
  for (size_t remainder = 0; remainder < call->planes[1]; ++remainder)
    for (size_t first = 0; first < call->pitch[1]; first += CHUNK)
      for (size_t channel = 0; channel < kernel->in_channels; channel += CHUNK) {
        const size_t n = least(call->pitch[1] - first, CHUNK), channels = least(kernel->in_channels - channel, CHUNK);
        uint64_t fires[CHUNK] = {0};
        for (size_t j = 0; from.inside && j < n; ++j) {
          const size_t column = (first + j) * kernel->strides[1] + remainder - kernel->pads[1]; /* wraps before the row */
          if (column >= call->size[1]) continue;
          const uint8_t* x = call->x + (from.pixel + column) * kernel->in_channels + channel;
          const __m512i bytes = _mm512_maskz_loadu_epi8(~0ull >> (CHUNK - channels), x);
          fires[j] = _mm512_test_epi8_mask(bytes, bytes);
        }
        const size_t before = (from.plane * call->planes[1] + remainder) * kernel->chunks;
        const size_t group = before + channel / CHUNK * parts(CHUNK, CHANNELS);
        uint16_t* target = (uint16_t*)call->spread + group * call->apart + from.at * call->pitch[1] + first;
        for (size_t c = 0; c < channels; c += CHANNELS, target += call->apart)
          for (size_t j = 0; j < n; ++j) target[j] = fires[j] >> c & 31;
      }
}

INLINED int32_t four_bytes(const int8_t* from) {
  int32_t read;
  memcpy(&read, from, sizeof read);
  return read;
}

/* Of SOME outputs, for a group and tap or for a tile. */
typedef struct { __m512i of[SOME]; } Some;

/* For each of `n` groups and taps. Lane i has the sum of the channels whose bits i has. */
FOR_LOOKUPS INLINED void make_tables(Some* tables, const Weights* weights, size_t n) {
  const __m512i bits = _mm512_set_epi32(0x01010101, 0x01010100, 0x01010001, 0x01010000, 0x01000101, 0x01000100, 0x01000001,
                                        0x01000000, 0x00010101, 0x00010100, 0x00010001, 0x00010000, 0x00000101, 0x00000100,
                                        0x00000001, 0x00000000);
  for (size_t k = 0; k < n; ++k)
    for (size_t o = 0; o < SOME; ++o) { /* the first channel is in every other lane, the upper half of 32 bits */
      const int8_t* its = weights[k].of[o];
      const __m512i without = _mm512_dpbusd_epi32(_mm512_setzero_si512(), bits, _mm512_set1_epi32(four_bytes(its)));
      const __m512i first = _mm512_srai_epi32(_mm512_set1_epi32(four_bytes(its + 1)), 8); /* of the highest byte */
      const __m512i with = _mm512_add_epi32(_mm512_slli_epi32(without, 16), first);
      tables[k].of[o] = _mm512_mask_mov_epi16(with, 0x55555555, without);
    }
}

/* Of a tile: int32 [output][position]. */
typedef struct { __m512i of[OUTPUTS][2]; } Sums;

/* What becomes of the sums of a run: it begins with zeros or what was kept, and ends in `Sums` or in what is kept. */
typedef struct { int begins, ends; } Run;

FOR_LOOKUPS INLINED void keep(__m512i sum, Sums* sums, size_t output, Some* kept, size_t o, Run run) {
  if (!run.ends) {
    kept->of[o] = sum;
    return;
  }
  __m512i* its = sums->of[output + o];
  its[0] = _mm512_add_epi32(its[0], _mm512_cvtepi16_epi32(_mm512_castsi512_si256(sum)));
  its[1] = _mm512_add_epi32(its[1], _mm512_cvtepi16_epi32(_mm512_extracti64x4_epi64(sum, 1)));
}

/* Compilers would let the sums wander from register to register, or keep an array of them in memory. */
#define FOR_SOME(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7)
#define BEGIN(o)                                                      \
  __m512i a##o = run.begins ? _mm512_setzero_si512() : kept[0].of[o]; \
  __m512i b##o = run.begins || tiles < 2 ? a##o : kept[1].of[o];      \
  __m512i c##o = run.begins || tiles < 3 ? a##o : kept[2].of[o];
#define ADD_IN_PLACE(sum, number) __asm__("vpaddw %1, %0, %0" : "+v"(sum) : "v"(number))
#define ADD(o)                                                             \
  {                                                                        \
    __m512i table = tables[k].of[o];                                       \
    __asm__("" : "+v"(table)); /* read once */                             \
    ADD_IN_PLACE(a##o, _mm512_permutexvar_epi16(a, table));                \
    if (tiles > 1) ADD_IN_PLACE(b##o, _mm512_permutexvar_epi16(b, table)); \
    if (tiles > 2) ADD_IN_PLACE(c##o, _mm512_permutexvar_epi16(c, table)); \
  }
#define END(o)                                                   \
  keep(a##o, sums, output, kept, o, run);                        \
  if (tiles > 1) keep(b##o, sums + 1, output, kept + 1, o, run); \
  if (tiles > 2) keep(c##o, sums + 2, output, kept + 2, o, run);

/* Adds to SOME outputs from `output` on, of up to three tiles, what `n` groups and taps give, which are `offsets` behind the
 * first of each tile. */
FOR_LOOKUPS INLINED void look_up(Sums* sums, Some* kept, Run run, size_t output, const Some* tables,
                                 const uint16_t** firsts, const size_t* offsets, size_t n, const int tiles) {
  FOR_SOME(BEGIN)
  for (size_t k = 0; k < n; ++k) {
    const __m512i a = _mm512_loadu_si512(firsts[0] + offsets[k]);
    const __m512i b = tiles > 1 ? _mm512_loadu_si512(firsts[1] + offsets[k]) : a;
    const __m512i c = tiles > 2 ? _mm512_loadu_si512(firsts[2] + offsets[k]) : a;
    FOR_SOME(ADD)
  }
  FOR_SOME(END)
}

/* 16 positions with outputs for lanes, of 16 outputs with positions for lanes. */
FOR_LOOKUPS INLINED void transpose(__m512i* turned, const Sums* sums, size_t half) {
  __m512i two[16], four[16];
  for (int i = 0; i < 16; i += 2) {
    two[i] = _mm512_unpacklo_epi32(sums->of[i][half], sums->of[i + 1][half]);
    two[i + 1] = _mm512_unpackhi_epi32(sums->of[i][half], sums->of[i + 1][half]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int k = 0; k < 2; ++k) {
      four[i + 2 * k] = _mm512_unpacklo_epi64(two[i + k], two[i + k + 2]);
      four[i + 2 * k + 1] = _mm512_unpackhi_epi64(two[i + k], two[i + k + 2]);
    }
  for (int c = 0; c < 4; ++c) { /* four[4 * q + c] has outputs 4 * q to 4 * q + 3 of positions c, c + 4, c + 8 and c + 12 */
    const __m512i a = _mm512_shuffle_i32x4(four[c], four[4 + c], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(four[8 + c], four[12 + c], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(four[c], four[4 + c], 0xdd);
    const __m512i e = _mm512_shuffle_i32x4(four[8 + c], four[12 + c], 0xdd);
    turned[c] = _mm512_shuffle_i32x4(a, b, 0x88);
    turned[c + 4] = _mm512_shuffle_i32x4(d, e, 0x88);
    turned[c + 8] = _mm512_shuffle_i32x4(a, b, 0xdd);
    turned[c + 12] = _mm512_shuffle_i32x4(d, e, 0xdd);
  }
}

/* Writes the outputs of a tile. */
FOR_LOOKUPS INLINED void write_tile(const Call* call, size_t block, size_t tile, const Sums* sums) {
  const Kernel* kernel = call->kernel;
  const size_t channel = block * OUTPUTS, channels = least(kernel->out_channels - channel, OUTPUTS);
  const size_t position = position_of(call, tile);
  const int32_t zero = (int32_t)kernel->zero_point;
  const __m512i zeros = _mm512_set1_epi32(zero), biases = _mm512_load_si512((const int32_t*)kernel->biases + channel);
  const __m512 scales = _mm512_load_ps(kernel->scales + channel);
  const __m512 low = _mm512_set1_ps((float)-zero), high = _mm512_set1_ps((float)(255 - zero));
  Place now = place_of(call, position);
  uint8_t* y = (uint8_t*)call->y + outputs_before(call, position, now) * kernel->out_channels + channel;
  for (size_t half = 0; half < 2; ++half) {
    __m512i turned[16];
    transpose(turned, sums, half);
    for (size_t i = 0; i < 16 && now.left > 0; ++i, go_on(call, &now)) {
      if (!is_output(call, now)) continue;
      const __m128i bytes = requantised(turned[i], biases, scales, low, high, zeros);
      if (channels == OUTPUTS) _mm_storeu_si128((__m128i*)y, bytes); /* faster than with a mask */
      else _mm_mask_storeu_epi8(y, (1u << channels) - 1, bytes);
      y += kernel->out_channels;
    }
  }
}

/* What a grain works on, too much for the stacks of some threads. */
static _Thread_local struct {
  Sums sums[MOST_TILES];
  Some kept[MOST_TILES]; /* int16 that is yet to be added to them */
  Some tables[MOST_GROUPS];
} own;

FOR_LOOKUPS static void multiply(void* argument, size_t grain) {
  const Call* call = argument;
  const Kernel* kernel = call->kernel;
  const size_t block = grain % kernel->blocks, first = grain / kernel->blocks * call->group;
  const size_t tiles = least(call->tiles - first, call->group);
  const size_t all = kernel->chunks * kernel->taps, runs = parts(all, MOST_GROUPS);
  const Weights* weights = (const Weights*)kernel->weights + block * (OUTPUTS / SOME) * all;
  Sums* sums = own.sums;
  Some* kept = own.kept;
  const uint16_t* firsts[MOST_TILES];
  size_t taps[kernel->taps], offsets[MOST_GROUPS];
  find_taps(call, taps);
  for (size_t t = 0; t < tiles; ++t) firsts[t] = (const uint16_t*)call->spread + position_of(call, first + t);
  memset(sums, 0, tiles * sizeof *sums);
  for (size_t output = 0; output < OUTPUTS; output += SOME, weights += all)
    for (size_t run = 0; run < runs; ++run) {
      const size_t begin = run * all / runs, n = (run + 1) * all / runs - begin;
      const Run its = {run % kernel->together == 0, (run + 1) % kernel->together == 0 || run + 1 == runs};
      make_tables(own.tables, weights + begin, n);
      for (size_t k = 0; k < n; ++k)
        offsets[k] = (begin + k) / kernel->taps * call->apart + taps[(begin + k) % kernel->taps];
      size_t t = 0;
      for (; t + 3 <= tiles; t += 3) look_up(sums + t, kept + t, its, output, own.tables, firsts + t, offsets, n, 3);
      if (tiles - t == 2) look_up(sums + t, kept + t, its, output, own.tables, firsts + t, offsets, n, 2);
      if (tiles - t == 1) look_up(sums + t, kept + t, its, output, own.tables, firsts + t, offsets, n, 1);
    }
  for (size_t t = 0; t < tiles; ++t) write_tile(call, block, first + t, sums + t);
}

static size_t lay_out(Call* call) {
  const Kernel* kernel = call->kernel;
  lay_out_planes(call, LANES);
  call->apart = (parts(call->allocated, LANES) | 1) * LANES; /* so that groups do not meet in one set of the cache */
  call->group = least(parts(call->tiles * kernel->blocks, MANY), MOST_TILES);
  if (call->group < LEAST_TILES) call->group = LEAST_TILES;
  call->grains = parts(call->tiles, call->group) * kernel->blocks;
  return call->planes[0] * call->planes[1] * kernel->chunks * call->apart * sizeof(uint16_t);
}

/* 1.5 for a lookup and its addition, 5 for a table, as measured on Zen 4. */
static double cycles(const Call* call, double firing) {
  const Kernel* kernel = call->kernel;
  const double each = 1.5 * call->tiles * kernel->blocks + 5.0 * call->grains;
  return (void)firing, each * kernel->chunks * kernel->taps * OUTPUTS;
}
#endif

static OrtStatusPtr fill(Kernel* kernel, const OrtKernelInfo* info, int64_t* shape) {
  if (!has_lookups()) return refused(kernel, "this processor has no AVX-512, or no VNNI");
  TRY(read_zero_point(kernel, info));
  TRY(kernel->api->KernelInfoGetAttribute_int64(info, "together", &kernel->together));
  TRY(kernel->api->KernelInfoGetAttribute_int64(info, "vector_bytes", &kernel->vector_bytes));
  if (kernel->together < 1) return refused(kernel, "no run adds up");
  const size_t whole = kernel->in_channels / CHUNK * parts(CHUNK, CHANNELS);
  kernel->chunks = whole + parts(kernel->in_channels % CHUNK, CHANNELS);
  kernel->blocks = parts(kernel->out_channels, OUTPUTS);
  const int64_t sizes[] = {kernel->blocks, OUTPUTS / SOME, kernel->chunks, kernel->size[0], kernel->size[1], SOME, CHANNELS};
  memcpy(shape, sizes, sizeof sizes);
  return NULL;
}

static int weight_of(const Kernel* kernel, size_t output, size_t channel, size_t tap) {
  const size_t group = channel / CHUNK * parts(CHUNK, CHANNELS) + channel % CHUNK / CHANNELS;
  const Weights* its = (const Weights*)kernel->weights + (output / SOME * kernel->chunks + group) * kernel->taps + tap;
  return its->of[output % SOME][(channel % CHUNK % CHANNELS + CHANNELS - 1) % CHANNELS];
}

const Way INT8_LOOKUPS = {.name = "Int8Lookups",
                          .rank = 7,
                          .weight = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8,
                          .bias = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32,
                          .output = ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8,
#if X86
                          .lay_out = lay_out,
                          .spread_row = spread_row,
                          .multiply = multiply,
                          .cycles = cycles,
#endif
                          .fill = fill,
                          .sparse = &INT8_ADDITIONS,
                          .weight_of = weight_of};
