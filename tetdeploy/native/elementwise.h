/* A program of `elementwise.c`, as its two ways of running it know it. */
#pragma once

#include "operator.h"

#define MAX_REGISTERS 64 /* of 4 KB, on the stack of a thread */

/* Keep in step with `programs.py`. d, a and b are registers where nothing else is said, k counts immediates. */
enum {
  LOAD,       /* d = part b of input a */
  DEQUANTIZE, /* d = (part b of input a - immediate k) * immediate k + 1 */
  STORE,      /* part b of output d = a */
  ADD, SUB, MUL, DIV, LESS, GREATER, LESS_EQUAL, GREATER_EQUAL, /* d = a o b */
  ADD_K, SUB_K, K_SUB, MUL_K, DIV_K, K_DIV, LESS_K, GREATER_K, LESS_EQUAL_K, GREATER_EQUAL_K, /* d = a o immediate */
  THRESHOLDED_RELU, /* d = a if a > immediate k else 0 */
  HARD_SIGMOID,     /* d = min(max(immediate k * a + immediate k + 1, 0), 1) */
  OPERATIONS,
  /* Two in one pass, made by `join`; where one of them reads or writes a tensor, its part is in `part`. */
  ADD_DEQUANTIZED = OPERATIONS, /* d = a + input b, dequantised */
  SUB_DEQUANTIZED,              /* d = a - input b */
  DEQUANTIZED_SUB,              /* d = input b - a */
  STORE_LESS, STORE_GREATER, STORE_LESS_EQUAL, STORE_GREATER_EQUAL, /* part of output d = a o immediate */
  /* A step of neurons, negated as `neuron_steps.py` writes it: h = a * leak - current, part of an output = h < v_th,
   * d = (h if h > kept else 0) * leak_after. The current is b, or the part `from` of input b, dequantised. */
  FIRE,
  FIRE_FIRST /* h = current, part of an output = h > v_th, d = ((h if h > kept else 0) - h) * leak_after */
};

typedef struct { int64_t op, d, a, b, k; } Instruction;
typedef struct {
  int64_t op, d, a, b, k, part;
  float zero, scale;    /* of what two in one dequantise */
  int64_t output, from; /* of FIRE; `from` is -1 if the current is in a register */
  float leak, v_th, kept, leak_after;
} Step;
typedef struct { int64_t type, parts; } Port;
typedef struct Link Link; /* `chains.c` */

typedef struct {
  const OrtApi* api;
  Instruction* program;
  Step* joined; /* the same in fewer passes */
  float* immediates;
  Port *inputs, *outputs;
  Link* chain; /* the same in vector registers; NULL of one that is no chain, or for other processors */
  size_t length, num_joined, num_links, registers, num_immediates, num_inputs, num_outputs;
  int64_t states;
} Kernel;

typedef struct {
  const Kernel* kernel;
  const void** inputs;
  void** outputs;
  size_t elements; /* of a part */
  size_t steps;    /* how often the program runs */
} Call;

/* Where an instruction's part of a tensor begins, in elements. */
static inline size_t offset(const Call* call, Port port, int64_t part, size_t step) {
  return (port.parts > 0 ? (size_t)part : port.parts == 0 ? step : 0) * call->elements;
}

/* Of an element. */
static inline size_t bytes_of(Port port) { return port.type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? sizeof(float) : 1; }

/* Lets the program run in vector registers if it is a chain, and this processor has them. */
OrtStatusPtr find_chain(Kernel* kernel);
/* Runs it on elements from `first` on. Where it ends: fewer than are worth a vector may be left before `last`. */
size_t run_chain(const Call* call, size_t first, size_t last);
