// The kernels without torch, under sanitizers, on odd shapes, against the equations in double: exit code 0 if all agree.
// EMPCAUSE_CPU_ISA chooses the instruction set. Built by -DEMPCAUSE_BUILD_DRIVER=ON, see CMakeLists.txt.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <vector>

#include "cpu/attention.h"

using namespace empcause;
using namespace empcause::cpu;

namespace {

struct Shape {
  int64_t batch, heads, key_heads, queries, keys, dim;
  bool causal;
};

void serial(int64_t count, Task task, void* context) {
  for (int64_t i = 0; i < count; ++i) task(context, i, i + 1);
}

std::vector<float> random_values(int64_t count, std::mt19937& engine) {
  std::normal_distribution<float> normal;
  std::vector<float> values(static_cast<size_t>(count));
  for (float& value : values) value = normal(engine);
  return values;
}

Matrices view(std::vector<float>& values, int64_t heads, int64_t rows, int64_t dim) {
  return {values.data(), heads * rows * dim, rows * dim, dim};
}

// Largest difference between the kernels and sums in double, over output and gradients.
double check(const Kernels& kernels, const Shape& s) {
  std::mt19937 engine(7);
  const int64_t q_count = s.batch * s.heads * s.queries * s.dim, k_count = s.batch * s.key_heads * s.keys * s.dim;
  auto query = random_values(q_count, engine), key = random_values(k_count, engine), value = random_values(k_count, engine);
  auto grad_output = random_values(q_count, engine);
  std::vector<float> weight(static_cast<size_t>(s.batch * s.keys));
  for (size_t j = 0; j < weight.size(); ++j) weight[j] = j % 5 == 3 ? 0.0f : 1.0f + 0.1f * static_cast<float>(j % 7);
  std::vector<float> output(query.size()), logsumexp(static_cast<size_t>(s.batch * s.heads * s.queries));
  std::vector<float> grad_query(query.size()), grad_key(key.size()), grad_value(value.size());
  std::vector<float> grad_weight(static_cast<size_t>(s.batch * s.heads * s.keys));

  AttentionBackward g;
  Attention& a = g.forward;
  a.batch = s.batch;
  a.num_heads = s.heads;
  a.num_key_heads = s.key_heads;
  a.head_dim = s.dim;
  a.num_queries = a.total_queries = s.queries;
  a.num_keys = a.total_keys = s.keys;
  a.causal = s.causal;
  a.scale = 0.5f;
  a.dropout_p = 0.0;
  a.dtype = DType::kFloat32;
  a.query = view(query, s.heads, s.queries, s.dim);
  a.key = view(key, s.key_heads, s.keys, s.dim);
  a.value = view(value, s.key_heads, s.keys, s.dim);
  a.output = view(output, s.heads, s.queries, s.dim);
  a.weight = {weight.data(), s.keys, 0};
  a.logsumexp = {logsumexp.data(), s.heads * s.queries, s.queries};
  g.grad_output = view(grad_output, s.heads, s.queries, s.dim);
  g.grad_query = view(grad_query, s.heads, s.queries, s.dim);
  g.grad_key = view(grad_key, s.key_heads, s.keys, s.dim);
  g.grad_value = view(grad_value, s.key_heads, s.keys, s.dim);
  g.grad_weight = {grad_weight.data(), s.heads * s.keys, s.keys};
  kernels.forward(a, serial);
  kernels.backward(g, serial);

  double worst = 0;
  std::vector<double> expected_query(query.size()), expected_key(key.size()), expected_value(value.size());
  std::vector<double> e(static_cast<size_t>(s.keys)), grad_prob(static_cast<size_t>(s.keys));
  for (int64_t b = 0; b < s.batch; ++b) {
    for (int64_t h = 0; h < s.heads; ++h) {
      const int64_t kh = h / (s.heads / s.key_heads);
      for (int64_t i = 0; i < s.queries; ++i) {
        const int64_t row = ((b * s.heads + h) * s.queries + i) * s.dim, keys = (b * s.key_heads + kh) * s.keys;
        double total = 0, delta = 0;
        for (int64_t j = 0; j < s.keys; ++j) {
          double x = 0;
          for (int64_t d = 0; d < s.dim; ++d) x += query[row + d] * double(key[(keys + j) * s.dim + d]);
          const bool seen = !s.causal || j <= i + s.keys - s.queries;
          e[j] = seen ? std::exp(0.5 * x) * weight[b * s.keys + j] : 0.0;
          total += e[j];
        }
        for (int64_t j = 0; j < s.keys; ++j) {
          e[j] = total > 0 ? e[j] / total : 0.0;
          grad_prob[j] = 0;
          for (int64_t d = 0; d < s.dim; ++d) grad_prob[j] += grad_output[row + d] * double(value[(keys + j) * s.dim + d]);
          delta += e[j] * grad_prob[j];
        }
        for (int64_t d = 0; d < s.dim; ++d) {
          double o = 0;
          for (int64_t j = 0; j < s.keys; ++j) {
            o += e[j] * value[(keys + j) * s.dim + d];
            const double grad_logit = 0.5 * e[j] * (grad_prob[j] - delta);
            expected_query[row + d] += grad_logit * key[(keys + j) * s.dim + d];
            expected_key[(keys + j) * s.dim + d] += grad_logit * query[row + d];
            expected_value[(keys + j) * s.dim + d] += e[j] * grad_output[row + d];
          }
          worst = std::max(worst, std::abs(o - output[row + d]));
        }
      }
    }
  }
  const auto compare = [&worst](const std::vector<double>& expected, const std::vector<float>& got) {
    for (size_t i = 0; i < got.size(); ++i) worst = std::max(worst, std::abs(expected[i] - got[i]));
  };
  compare(expected_query, grad_query);
  compare(expected_key, grad_key);
  compare(expected_value, grad_value);
  for (float x : grad_weight) worst = std::isfinite(x) ? worst : INFINITY;
  return worst;
}

}  // namespace

int main() {
  const Shape shapes[] = {{1, 1, 1, 1, 1, 1, true},    {2, 4, 2, 33, 33, 15, true}, {1, 2, 1, 7, 150, 64, true},
                          {1, 2, 2, 130, 129, 8, true}, {2, 3, 1, 25, 31, 80, false}, {1, 1, 1, 0, 5, 4, true},
                          {1, 1, 1, 5, 0, 4, true}};
  int failures = 0;
  const Kernels& kernels = select_kernels();
  for (const Shape& s : shapes) {
    const double error = check(kernels, s);
    const bool fine = error < 2e-4;
    failures += !fine;
    std::printf("%s %s B%lld H%lld/%lld Q%lld K%lld D%lld error %.2g\n", fine ? "ok  " : "FAIL", kernels.isa,
                (long long)s.batch, (long long)s.heads, (long long)s.key_heads, (long long)s.queries, (long long)s.keys,
                (long long)s.dim, error);
  }
  return failures;
}
