/* What a convolution is, for the ways of computing one: `tiles.c`, `additions.c` and `lookups.c`. */
#pragma once

#include "operator.h"

#include <math.h>

#define LINE 64 /* bytes of the cache's */

typedef struct Way Way;
typedef struct Kernel Kernel;
typedef struct Call Call;

/* A way spreads the input in memory of its own, row by row, and multiplies then, grain by grain; of each, several may be
 * done at the same time. */
struct Way {
  const char* name; /* of the operator */
  size_t rank;      /* of the weights in its order */
  enum ONNXTensorElementDataType weight, bias, output;
  OrtStatusPtr (*fill)(Kernel* kernel, const OrtKernelInfo* info, int64_t* shape); /* what is its own; `shape` of weights */
  size_t (*lay_out)(Call* call); /* the same of a call, `rows` and `grains`; gives the bytes of `spread` */
  void (*spread_row)(void* call, size_t row);
  void (*multiply)(void* call, size_t grain);
  const Way* sparse; /* to which it gives way where few neurons fire, or NULL. Only these two ways have what follows: */
  double (*cycles)(const Call* call, double firing); /* estimated, if that share of the inputs is not 0 */
  int (*weight_of)(const Kernel* kernel, size_t output, size_t channel, size_t tap); /* of the one that gives way */
  void (*put)(Kernel* kernel, size_t output, size_t channel, size_t tap, int weight); /* of the other; all begin as 0 */
};

extern const Way INT8_TILES, INT8_ADDITIONS, INT8_LOOKUPS, SPIKE_TILES, SPIKE_ADDITIONS;

struct Kernel {
  const OrtApi* api;
  const Way* way;
  size_t size[2], strides[2], pads[4]; /* vertical, horizontal; pads as in ONNX */
  size_t in_channels, out_channels, taps;
  size_t blocks, chunks; /* of output and of input channels, of lookups groups of these */
  const void* weights;   /* the node's, or where they do not begin with a line `aligned` */
  void* aligned;
  float* scales;         /* these and biases are filled with zeros up to whole blocks */
  void* biases;          /* int32 or float32 */
  int64_t zero_point;    /* of uint8 outputs */
  size_t digits;         /* of tiles, and */
  int64_t plain;         /* if AMX is not to be used */
  size_t rows, most;     /* of additions: input channels in a chunk, what each is at most, */
  size_t width;          /* output channels in a block */
  int64_t vector_bytes;  /* and how long the registers are */
  int64_t together;      /* of lookups: runs whose sums are int16, */
  Kernel* sparse;        /* and the same convolution by additions, or NULL */
};

struct Call {
  const Kernel* kernel;
  const uint8_t* x;
  void *y, *spread;
  size_t images, size[2], out_size[2];
  size_t rows, grains;
  size_t pitch[2];  /* rows and columns of an image in `spread`; of tiles and lookups: in a plane of it */
  size_t planes[2]; /* of these: remainders of the strides that taps fall on, */
  size_t positions; /* of the outputs in a plane, padding included, */
  size_t allocated; /* positions of a plane, with zeros behind the last image, */
  size_t apart;     /* from one to the next, */
  size_t lanes, tiles, row_tiles; /* outputs of a tile, tiles, and those of one row, 0 if rows are not cut apart */
  size_t group;     /* of lookups: tiles in a grain */
  int by_channels;  /* of tiles: whether grains that follow one another have weights in common, not pixels */
};

static inline size_t least(size_t a, size_t b) { return a < b ? a : b; }
static inline size_t parts(size_t whole, size_t part) { return (whole + part - 1) / part; }
static inline OrtStatusPtr refused(const Kernel* kernel, const char* why) {
  return failed_in(kernel->api, kernel->way->name, why);
}

/* What becomes of int32 sums: uint8. */
INLINED void requantise(uint8_t* y, const int32_t* sums, const int32_t* biases, const float* scales, int32_t zero,
                        size_t n) {
  const float low = (float)-zero, high = (float)(255 - zero);
  for (size_t i = 0; i < n; ++i) {
    float scaled = (float)(int32_t)((uint32_t)sums[i] + (uint32_t)biases[i]) * scales[i];
    scaled = scaled > low ? scaled : low;
    scaled = scaled < high ? scaled : high;
    y[i] = (uint8_t)((int32_t)rintf(scaled) + zero);
  }
}

static inline OrtStatusPtr read_zero_point(Kernel* kernel, const OrtKernelInfo* info) {
  TRY(kernel->api->KernelInfoGetAttribute_int64(info, "zero_point", &kernel->zero_point));
  return kernel->zero_point < 0 || kernel->zero_point > 255 ? refused(kernel, "the zero point is no byte") : NULL;
}
