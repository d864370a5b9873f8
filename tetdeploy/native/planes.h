/* Where `tiles.c` and `lookups.c` spread the input: the pixels of all images one behind the other with the zeros of the padding
 * between them, in a plane, and for strides one such plane for each remainder. Outputs that follow one another are then made
 * of positions that do, for every tap of the kernel, and `lanes` of them at once are a tile. Where it takes fewer tiles each
 * row of outputs is cut into its own; otherwise all are cut in one, outputs that would lie in the padding are computed with
 * the others, and left out.
 */
#pragma once

#include "convolution.h"

/* How long an axis of an image is in a plane, so that each output has a place and a tap beyond its end meets the zeros
 * before the next. */
static inline size_t pitch_of(size_t size, size_t out, size_t kernel, size_t stride, size_t before) {
  const size_t end = (out - 1) * stride + kernel; /* of what taps reach */
  size_t length = (size + before + stride - 1) / stride;
  if (length < out) length = out; /* as where padding is as wide as the kernel, and outputs are of nothing else */
  while (end > length * stride + before) ++length;
  return length;
}

static inline void lay_out_planes(Call* call, size_t lanes) {
  const Kernel* kernel = call->kernel;
  for (int axis = 0; axis < 2; ++axis) {
    const size_t stride = kernel->strides[axis], taps = kernel->size[axis];
    call->planes[axis] = least(stride, taps);
    call->pitch[axis] = pitch_of(call->size[axis], call->out_size[axis], taps, stride, kernel->pads[axis]);
  }
  const size_t image = call->pitch[0] * call->pitch[1], all = call->images * image;
  const size_t behind = kernel->size[0] * call->pitch[1] + kernel->size[1] + lanes; /* are read there at most */
  call->lanes = lanes;
  call->positions = all - (call->pitch[0] - call->out_size[0] + 1) * call->pitch[1] + call->out_size[1];
  call->allocated = call->apart = all + parts(behind, image) * image;
  call->rows = call->allocated / call->pitch[1] * call->planes[0];
  call->tiles = parts(call->positions, lanes);
  const size_t row_tiles = parts(call->out_size[1], lanes), tiles = call->images * call->out_size[0] * row_tiles;
  if (tiles <= call->tiles) call->tiles = tiles, call->row_tiles = row_tiles;
}

/* A row of the planes: which plane along the height, which row of it, and if that is `inside` an image the first pixel of
 * the row that it holds. */
typedef struct { size_t plane, at, pixel; int inside; } PlaneRow;

static inline PlaneRow plane_row(const Call* call, size_t grain) {
  const Kernel* kernel = call->kernel;
  const size_t plane = grain % call->planes[0], at = grain / call->planes[0];
  const size_t image = at / call->pitch[0], padded = at % call->pitch[0] * kernel->strides[0] + plane;
  const size_t row = padded - kernel->pads[0]; /* wraps above the image */
  const int inside = image < call->images && padded >= kernel->pads[0] && row < call->size[0];
  return (PlaneRow){plane, at, (image * call->size[0] + row) * call->size[1], inside};
}

/* Where the first position of each tap is, of planes of which there is one for each chunk. */
static inline void find_taps(const Call* call, size_t* taps) {
  const Kernel* kernel = call->kernel;
  for (size_t y = 0; y < kernel->size[0]; ++y)
    for (size_t x = 0; x < kernel->size[1]; ++x) {
      const size_t sy = kernel->strides[0], sx = kernel->strides[1], plane = y % sy * call->planes[1] + x % sx;
      const size_t at = plane * kernel->chunks * call->apart + y / sy * call->pitch[1] + x / sx;
      taps[y * kernel->size[1] + x] = at;
    }
}

/* The position of a tile's first output in a plane. */
static inline size_t position_of(const Call* call, size_t tile) {
  if (call->row_tiles == 0) return tile * call->lanes;
  const size_t row = tile / call->row_tiles, before = row / call->out_size[0] * call->pitch[0] + row % call->out_size[0];
  return before * call->pitch[1] + tile % call->row_tiles * call->lanes;
}

/* The `left` positions of a tile from its first on, which is (y, x) of an image. */
typedef struct { size_t y, x, left; } Place;

static inline Place place_of(const Call* call, size_t position) {
  const size_t x = position % call->pitch[1];
  const size_t left = call->row_tiles ? call->out_size[1] - x : call->positions - position;
  return (Place){position / call->pitch[1] % call->pitch[0], x, least(left, call->lanes)};
}

/* How many outputs are before a position, which is `place`. */
static inline size_t outputs_before(const Call* call, size_t position, Place place) {
  const size_t rows = position / (call->pitch[0] * call->pitch[1]) * call->out_size[0] + least(place.y, call->out_size[0]);
  return rows * call->out_size[1] + (place.y < call->out_size[0] ? least(place.x, call->out_size[1]) : 0);
}

/* Whether an output is there, and no padding. */
static inline int is_output(const Call* call, Place place) {
  return place.y < call->out_size[0] && place.x < call->out_size[1];
}

static inline void go_on(const Call* call, Place* place) {
  --place->left;
  if (++place->x < call->pitch[1]) return;
  place->x = 0;
  if (++place->y == call->pitch[0]) place->y = 0;
}

#if X86
/* As `requantise`, of 16 sums. */
__attribute__((target(V4))) INLINED __m128i requantised(__m512i sums, __m512i biases, __m512 scales, __m512 low,
                                                        __m512 high, __m512i zero) {
  __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(sums, biases)), scales);
  scaled = _mm512_min_ps(_mm512_max_ps(scaled, low), high);
  return _mm512_cvtepi32_epi8(_mm512_add_epi32(_mm512_cvtps_epi32(scaled), zero));
}
#endif
