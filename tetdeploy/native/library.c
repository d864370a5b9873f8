/* What ONNX Runtime calls when a session's options are given this library. */
#include "operator.h"

ORT_EXPORT OrtStatusPtr ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(API_VERSION);
  if (api == NULL) return base->GetApi(1)->CreateStatus(ORT_NOT_IMPLEMENTED, "this ONNX Runtime is older than 1.17");
  OrtCustomOpDomain* domain; /* lives as long as the process: sessions refer to it */
  TRY(api->CreateCustomOpDomain("ai.tetdeploy", &domain));
  TRY(api->CustomOpDomain_Add(domain, &ELEMENTWISE));
  for (const OrtCustomOp* const* op = CONVOLUTIONS; *op != NULL; ++op) TRY(api->CustomOpDomain_Add(domain, *op));
  return api->AddCustomOpDomain(options, domain);
}
