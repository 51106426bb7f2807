// Operator schemas and registration with torch, over its stable ABI.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(empcause, library) {
  library.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor? cause, float strength, Tensor? head_strength, "
      "Tensor? key_mask, bool causal, float scale, float dropout_p, Tensor? seed, Tensor? query_offset) "
      "-> (Tensor output, Tensor logsumexp)");
}
