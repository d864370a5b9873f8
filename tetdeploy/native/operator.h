/* What the operators of this library have in common. The header beside this one is ONNX Runtime's C API (MIT license),
 * which only ever grows. */
#pragma once

#include "onnxruntime_c_api.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define API_VERSION 17 /* ONNX Runtime 1.17 was the first with all that is called here */

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define X86 1
#include <immintrin.h>
#define FOR_EACH_CPU __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
/* In place of arch=x86-64-v4, which would take away what -march=native gives, and with it what intrinsics are. */
#define V4 "avx2,bmi,bmi2,fma,lzcnt,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,prefer-vector-width=512"
#else
#define X86 0
#define FOR_EACH_CPU
#endif
#define INLINED static inline __attribute__((always_inline)) /* so that it is compiled for each CPU, too */

#define TRY(expression)                     \
  do {                                      \
    OrtStatusPtr status = (expression);     \
    if (status != NULL) return status;      \
  } while (0)

extern const OrtCustomOp ELEMENTWISE;
extern const OrtCustomOp* const CONVOLUTIONS[]; /* the last is followed by NULL */

static inline OrtStatusPtr failed_in(const OrtApi* api, const char* operator_, const char* why) {
  char message[200];
  snprintf(message, sizeof message, "ai.tetdeploy::%s: %s", operator_, why);
  return api->CreateStatus(ORT_INVALID_ARGUMENT, message);
}

/* What makes the kernel of a node, in the file of an operator: of its `Kernel`, which begins as zeros, by its `fill`. */
#define DEFINE_CREATE                                                                                                   \
  static OrtStatusPtr ORT_API_CALL create(const struct OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info,   \
                                          void** made) {                                                                \
    Kernel* kernel = calloc(1, sizeof *kernel);                                                                         \
    if (kernel == NULL) return failed_in(api, op->GetName(op), "no memory");                                            \
    kernel->api = api;                                                                                                  \
    OrtStatusPtr status = fill(kernel, op, info);                                                                       \
    if (status != NULL) destroy(kernel);                                                                                \
    *made = status == NULL ? kernel : NULL;                                                                             \
    return status;                                                                                                      \
  }

static inline const char* ORT_API_CALL provider(const struct OrtCustomOp* op) { return (void)op, "CPUExecutionProvider"; }
static inline size_t ORT_API_CALL one(const struct OrtCustomOp* op) { return (void)op, 1; }
static inline int ORT_API_CALL first_version(const struct OrtCustomOp* op) { return (void)op, 1; }
static inline OrtMemType ORT_API_CALL memory(const struct OrtCustomOp* op, size_t index) {
  return (void)op, (void)index, OrtMemTypeDefault;
}
