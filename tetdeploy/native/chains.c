/* Chains of neurons in vector registers, for processors with AVX-512.
 *
 * Most programs of `elementwise.c` are chains: neurons fire step after step, on a current that is one tensor or the sum of
 * two. Here some elements go through all steps before the next ones do, and their membranes never leave the registers. The
 * operations are the same, in the same order, and so are the bits.
 */
#include "elementwise.h"

#if X86
#define FOR_V4 __attribute__((target(V4)))
#define VECTORS 8            /* that go through all steps at once */
#define GROUP (16 * VECTORS) /* elements */
#define MAX_LINKS 64         /* in a call; where more tensors are read and written by turns, nothing is gained */

enum { NONE, FLOAT32, BYTE, KINDS };
typedef struct { int64_t kind, input, part; float zero, scale; } Term; /* of a current; bytes are dequantised */
struct Link { /* a step of neurons, `FIRE` or `FIRE_FIRST` */
  Term terms[2];
  int first, to_bytes;
  int64_t output, part;
  float leak, v_th, kept, leak_after;
};
typedef struct { const char* terms[2]; char* spikes; } Place;

FOR_V4 INLINED __m512 values(const Term* term, int kind, const char* from, int vector) {
  if (kind == FLOAT32) return _mm512_loadu_ps((const float*)from + 16 * vector);
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)from + vector));
  const __m512 centred = _mm512_sub_ps(_mm512_cvtepi32_ps(bytes), _mm512_set1_ps(term->zero));
  return _mm512_mul_ps(centred, _mm512_set1_ps(term->scale));
}

/* Neurons with membranes `u` fire. */
FOR_V4 INLINED void fire(const Link* link, Place at, __m512* u, int first, int kind, int other_kind) {
  const __m512 leak = _mm512_set1_ps(link->leak), leak_after = _mm512_set1_ps(link->leak_after);
  const __m512 v_th = _mm512_set1_ps(link->v_th), kept = _mm512_set1_ps(link->kept);
  __mmask16 fires[VECTORS];
#pragma GCC unroll 8
  for (int v = 0; v < VECTORS; ++v) {
    __m512 h = values(link->terms, kind, at.terms[0], v);
    if (other_kind != NONE) h = _mm512_add_ps(h, values(link->terms + 1, other_kind, at.terms[1], v));
    if (!first) h = _mm512_sub_ps(_mm512_mul_ps(u[v], leak), h);
    fires[v] = first ? _mm512_cmp_ps_mask(h, v_th, _CMP_GT_OQ) : _mm512_cmp_ps_mask(h, v_th, _CMP_LT_OQ);
    __m512 held = _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(h, kept, _CMP_GT_OQ), h);
    if (first) held = _mm512_sub_ps(held, h);
    u[v] = _mm512_mul_ps(held, leak_after);
  }
  if (!link->to_bytes) {
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v)
      _mm512_storeu_ps((float*)at.spikes + 16 * v, _mm512_maskz_mov_ps(fires[v], _mm512_set1_ps(1)));
    return;
  }
#pragma GCC unroll 8
  for (int v = 0; v < VECTORS; v += 4) {
    const __mmask64 four = _mm512_kunpackd(_mm512_kunpackw(fires[v + 3], fires[v + 2]),
                                           _mm512_kunpackw(fires[v + 1], fires[v]));
    _mm512_storeu_si512(at.spikes + 16 * v, _mm512_maskz_set1_epi8(four, 1));
  }
}

#define WAY(first, kind, other_kind) (((first) * KINDS + (kind)) * KINDS + (other_kind))
#define WAYS(kind, other_kind)                                                      \
  case WAY(0, kind, other_kind): fire(links[k], at, u, 0, kind, other_kind); break; \
  case WAY(1, kind, other_kind): fire(links[k], at, u, 1, kind, other_kind); break

/* Elements from `start` on, group after group, each through all steps of the call. */
FOR_V4 static size_t run(const Call* call, size_t start, size_t last) {
  const Kernel* kernel = call->kernel;
  const size_t count = kernel->num_links * call->steps;
  const Link* links[MAX_LINKS];
  Place places[MAX_LINKS];
  size_t bytes[MAX_LINKS][3]; /* of an element */
  for (size_t k = 0; k < count; ++k) {
    const size_t step = k / kernel->num_links;
    const Link* link = links[k] = kernel->chain + k % kernel->num_links;
    for (int t = 0; t < 2; ++t) {
      const Term* term = link->terms + t;
      const Port port = kernel->inputs[term->input];
      bytes[k][t] = bytes_of(port);
      places[k].terms[t] = (const char*)call->inputs[term->input] + offset(call, port, term->part, step) * bytes[k][t];
    }
    const Port port = kernel->outputs[link->output];
    bytes[k][2] = bytes_of(port);
    places[k].spikes = (char*)call->outputs[link->output] + offset(call, port, link->part, step) * bytes[k][2];
  }
  for (; start + GROUP <= last; start += GROUP) {
    __m512 u[VECTORS];
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; ++v) u[v] = _mm512_setzero_ps();
    for (size_t k = 0; k < count; ++k) {
      const Place at = {{places[k].terms[0] + start * bytes[k][0], places[k].terms[1] + start * bytes[k][1]},
                        places[k].spikes + start * bytes[k][2]};
      switch (WAY(links[k]->first, links[k]->terms[0].kind, links[k]->terms[1].kind)) {
        WAYS(FLOAT32, NONE);
        WAYS(BYTE, NONE);
        WAYS(FLOAT32, FLOAT32);
        WAYS(FLOAT32, BYTE);
        WAYS(BYTE, BYTE);
      }
    }
  }
  return start;
}

size_t run_chain(const Call* call, size_t first, size_t last) {
  const Kernel* kernel = call->kernel;
  return kernel->chain == NULL || kernel->num_links * call->steps > MAX_LINKS ? first : run(call, first, last);
}

/* A register's value: the sum of these, of which the first has no kind if it is none. */
typedef struct { Term terms[2]; } Sum;

/* A part of an input; none if it is neither float32 as it is nor uint8. */
static Sum tensor(const Kernel* kernel, int64_t input, int64_t part, float zero, float scale) {
  const int64_t type = kernel->inputs[input].type;
  const int is_float = type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  if (is_float ? zero != 0 || scale != 1 : type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8) return (Sum){0};
  return (Sum){{{is_float ? FLOAT32 : BYTE, input, part, zero, scale}}};
}

static Sum both(Sum a, Sum b) {
  if (!a.terms[0].kind || !b.terms[0].kind || a.terms[1].kind || b.terms[1].kind) return (Sum){0};
  const int turned = a.terms[0].kind > b.terms[0].kind; /* float32 comes first */
  return (Sum){{turned ? b.terms[0] : a.terms[0], turned ? a.terms[0] : b.terms[0]}};
}

/* What an instruction that is no step of neurons gives. */
static Sum sum_of(const Kernel* kernel, const Step* step, const Sum* sums) {
  const float* k = kernel->immediates + step->k;
  switch (step->op) {
    case LOAD: return tensor(kernel, step->a, step->b, 0, 1);
    case DEQUANTIZE: return tensor(kernel, step->a, step->b, k[0], k[1]);
    case ADD: return both(sums[step->a], sums[step->b]);
    case ADD_DEQUANTIZED: return both(sums[step->a], tensor(kernel, step->b, step->part, step->zero, step->scale));
    default: return (Sum){0};
  }
}

/* The links of a chain into `chain`; how many there are, 0 if it is none. */
static size_t links_of(const Kernel* kernel, Link* chain) {
  Sum sums[MAX_REGISTERS] = {0};
  int64_t u = kernel->states == 1 ? 0 : -1; /* the register with the membranes */
  size_t count = 0;
  for (const Step* step = kernel->joined; step < kernel->joined + kernel->num_joined; ++step) {
    if (step->op < FIRE) {
      const Sum sum = sum_of(kernel, step, sums);
      if (!sum.terms[0].kind || step->d == u) return 0;
      sums[step->d] = sum;
      continue;
    }
    const int first = step->op == FIRE_FIRST;
    const Sum current = step->from < 0 ? sums[step->b] : tensor(kernel, step->b, step->from, step->zero, step->scale);
    if (!current.terms[0].kind || (!first && step->a != u)) return 0;
    const int to_bytes = kernel->outputs[step->output].type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    chain[count++] = (Link){{current.terms[0], current.terms[1]}, first, to_bytes, step->output, step->part,
                            step->leak, step->v_th, step->kept, step->leak_after};
    u = step->d;
    sums[u] = (Sum){0};
  }
  return kernel->states == 1 && u != 0 ? 0 : count;
}

OrtStatusPtr find_chain(Kernel* kernel) {
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("x86-64-v4") || kernel->states > 1) return NULL;
  Link* chain = malloc(kernel->num_joined * sizeof *chain);
  if (chain == NULL) return failed_in(kernel->api, "Elementwise", "no memory");
  kernel->num_links = links_of(kernel, chain);
  if (kernel->num_links > 0) kernel->chain = chain;
  else free(chain);
  return NULL;
}
#else
OrtStatusPtr find_chain(Kernel* kernel) { return (void)kernel, NULL; }
size_t run_chain(const Call* call, size_t first, size_t last) { return (void)call, (void)last, first; }
#endif
