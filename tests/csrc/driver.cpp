// Runs the CPU's kernels without torch on random problems of every kind, and compares them with the
// equations in fp64. It is meant to run under sanitizers. -DEMPCAUSE_BUILD_DRIVER=ON builds it.
//
//   driver [cases] [seed]      exit code 0 if all cases agree; else prints the first that does not, to repeat it
//
// Memory that a kernel must not read or write (padding between rows, masked keys) is NaN. Every case runs
// serially and with threads, and the results must be the same bits. EMPCAUSE_CPU_ISA chooses the instruction set.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "cpu/kernels.h"

using namespace empcause;
using namespace empcause::cpu;

namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

void serial(int64_t count, Task task, void* context) {
  for (int64_t i = 0; i < count; ++i) task(context, i, i + 1 < count ? i + 1 : -1);
}

void threaded(int64_t count, Task task, void* context) {
  constexpr int64_t kThreads = 3;
  std::vector<std::thread> threads;
  for (int64_t t = 0; t < kThreads; ++t) {
    threads.emplace_back([=] {
      const int64_t end = count * (t + 1) / kThreads;
      for (int64_t i = count * t / kThreads; i < end; ++i) task(context, i, i + 1 < end ? i + 1 : -1);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

struct Random {
  std::mt19937_64 engine;

  int64_t upto(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(engine); }
  bool one_in(int64_t n) { return upto(1, n) == 1; }
  float normal() { return std::normal_distribution<float>()(engine); }
};

// A tensor [batch, heads, rows, dim] in one of several layouts; memory between and after its rows is NaN.
class Buffer {
 public:
  Buffer(DType dtype, int64_t batch, int64_t heads, int64_t rows, int64_t dim, bool heads_last, int64_t padding)
      : dtype_(dtype), batch_(batch), heads_(heads), rows_(rows), dim_(dim) {
    const int64_t line = dim + padding;
    view.row = heads_last ? heads * line : line;
    view.head = heads_last ? line : rows * line;
    view.batch = rows * heads * line;
    bytes_.assign(static_cast<size_t>((batch * view.batch + padding) * size()), 0xff);
    view.data = bytes_.data();
  }

  Buffer(const Buffer& other)
      : view(other.view),
        dtype_(other.dtype_),
        batch_(other.batch_),
        heads_(other.heads_),
        rows_(other.rows_),
        dim_(other.dim_),
        bytes_(other.bytes_) {
    view.data = bytes_.data();
  }

  float get(int64_t b, int64_t h, int64_t i, int64_t d) const {
    const unsigned char* at = place(b, h, i, d);
    if (dtype_ == DType::kFloat32) return read<float>(at);
    if (dtype_ == DType::kFloat16) return static_cast<float>(read<_Float16>(at));
    return __builtin_bit_cast(float, static_cast<uint32_t>(read<uint16_t>(at)) << 16);
  }

  void set(int64_t b, int64_t h, int64_t i, int64_t d, float value) {
    unsigned char* at = const_cast<unsigned char*>(place(b, h, i, d));
    if (dtype_ == DType::kFloat32) return write(at, value);
    if (dtype_ == DType::kFloat16) return write(at, static_cast<_Float16>(value));
    write(at, static_cast<uint16_t>(__builtin_bit_cast(uint32_t, value) >> 16));
  }

  void fill(Random& random) {
    for_each([&](int64_t b, int64_t h, int64_t i, int64_t d) { set(b, h, i, d, random.normal()); });
  }

  // Returns whether nothing was written outside of the rows.
  bool padding_is_untouched() const {
    std::vector<bool> inside(bytes_.size());
    for_each([&](int64_t b, int64_t h, int64_t i, int64_t d) {
      for (int64_t k = 0; k < size(); ++k) inside[static_cast<size_t>(place(b, h, i, d) - bytes_.data() + k)] = true;
    });
    for (size_t k = 0; k < bytes_.size(); ++k) {
      if (!inside[k] && bytes_[k] != 0xff) return false;
    }
    return true;
  }

  bool operator==(const Buffer& other) const { return bytes_ == other.bytes_; }

  template <class Function>
  void for_each(Function function) const {
    for (int64_t b = 0; b < batch_; ++b)
      for (int64_t h = 0; h < heads_; ++h)
        for (int64_t i = 0; i < rows_; ++i)
          for (int64_t d = 0; d < dim_; ++d) function(b, h, i, d);
  }

  Matrices view{};

 private:
  int64_t size() const { return dtype_ == DType::kFloat32 ? 4 : 2; }
  const unsigned char* place(int64_t b, int64_t h, int64_t i, int64_t d) const {
    return bytes_.data() + (b * view.batch + h * view.head + i * view.row + d) * size();
  }
  template <class T>
  static T read(const unsigned char* at) {
    T value;
    std::memcpy(&value, at, sizeof(T));
    return value;
  }
  template <class T>
  static void write(unsigned char* at, T value) {
    std::memcpy(at, &value, sizeof(T));
  }

  DType dtype_;
  int64_t batch_, heads_, rows_, dim_;
  std::vector<unsigned char> bytes_;
};

// The sizes and options of a problem.
struct Shape {
  int64_t batch, heads, key_heads, queries, keys, dim;  // if packed, queries and keys are upper bounds of the lengths
  DType dtype;
  bool causal, packed, head_weights, heads_last;
  int64_t padding;
  bool has_offset;
  int64_t offset;
  double dropout_p;

  static Shape draw(Random& r) {
    Shape s{};
    s.batch = r.upto(1, 3);
    s.key_heads = r.upto(1, 3);
    s.heads = s.key_heads * r.upto(1, 3);
    const bool long_keys = r.one_in(8);
    s.queries = long_keys ? r.upto(0, 5) : r.one_in(10) ? r.upto(0, 210) : r.upto(0, 40);
    s.keys = long_keys ? r.upto(0, 600) : r.one_in(3) ? s.queries : r.one_in(10) ? r.upto(0, 210) : r.upto(0, 70);
    s.dim = r.one_in(3) ? 8 * r.upto(1, 4) : r.one_in(20) ? r.upto(1, 130) : r.upto(1, 20);
    s.dtype = r.one_in(3) ? DType::kBFloat16 : r.one_in(4) ? DType::kFloat16 : DType::kFloat32;
    s.causal = !r.one_in(4);
    s.packed = r.one_in(4);
    s.head_weights = r.one_in(4);
    s.heads_last = r.one_in(2);
    s.padding = r.one_in(2) ? 0 : r.upto(1, 9);
    s.has_offset = !s.packed && r.one_in(4);
    s.offset = r.upto(-s.queries - 3, s.keys + 3);
    s.dropout_p = r.one_in(3) ? 0.25 : 0.0;
    return s;
  }

  void print() const {
    std::printf(
        "B%lld H%lld/%lld Q%lld K%lld D%lld dtype %d causal %d packed %d head weights %d heads last %d padding %lld "
        "offset %d %lld dropout %g\n",
        (long long)batch, (long long)heads, (long long)key_heads, (long long)queries, (long long)keys, (long long)dim,
        static_cast<int>(dtype), causal, packed, head_weights, heads_last, (long long)padding, has_offset,
        (long long)offset, dropout_p);
  }
};

// A problem with the memory of its tensors.
struct Problem {
  Shape s;
  int64_t outer, total_queries, total_keys, seed;
  std::vector<int32_t> cu_queries{0}, cu_keys{0};
  Buffer query, key, value, grad_output, output, grad_query, grad_key, grad_value;
  std::vector<float> weight, maximum, total, grad_weight;
  std::vector<int16_t> rounding;
  std::vector<char> key_mask;
  AttentionBackward g;

  static Buffer rows(const Shape& s, int64_t outer, int64_t heads, int64_t count) {
    return Buffer(s.dtype, outer, heads, count, s.dim, s.heads_last, s.padding);
  }

  Problem(const Shape& shape, Random& r, const std::vector<int32_t>& queries, const std::vector<int32_t>& keys)
      : s(shape),
        outer(s.packed ? 1 : s.batch),
        total_queries(s.packed ? queries.back() : s.queries),
        total_keys(s.packed ? keys.back() : s.keys),
        seed(static_cast<int64_t>(r.engine())),
        cu_queries(queries),
        cu_keys(keys),
        query(rows(s, outer, s.heads, total_queries)),
        key(rows(s, outer, s.key_heads, total_keys)),
        value(rows(s, outer, s.key_heads, total_keys)),
        grad_output(rows(s, outer, s.heads, total_queries)),
        output(rows(s, outer, s.heads, total_queries)),
        grad_query(rows(s, outer, s.heads, total_queries)),
        grad_key(rows(s, outer, s.key_heads, total_keys)),
        grad_value(rows(s, outer, s.key_heads, total_keys)) {
    for (Buffer* buffer : {&query, &key, &value, &grad_output}) buffer->fill(r);
    const int64_t weight_heads = s.head_weights ? s.heads : 1;
    weight.resize(static_cast<size_t>(outer * weight_heads * total_keys));
    key_mask.resize(static_cast<size_t>(outer * total_keys));
    for (char& keep : key_mask) keep = !r.one_in(6);
    for (int64_t b = 0; b < outer; ++b) {
      for (int64_t j = 0; j < total_keys; ++j) {
        const bool keep = key_mask[static_cast<size_t>(b * total_keys + j)];
        for (int64_t h = 0; h < weight_heads; ++h) {
          const float w = !keep || r.one_in(9) ? 0.0f : std::abs(r.normal()) + 0.1f;
          weight[static_cast<size_t>((b * weight_heads + h) * total_keys + j)] = w;
        }
        for (int64_t h = 0; !keep && h < s.key_heads; ++h) {
          for (int64_t d = 0; d < s.dim; ++d) {
            key.set(b, h, j, d, std::nanf(""));
            value.set(b, h, j, d, std::nanf(""));
          }
        }
      }
    }
    maximum.assign(static_cast<size_t>(outer * s.heads * total_queries), std::nanf(""));
    total = maximum;
    rounding.assign(s.dtype == DType::kFloat32 ? 0 : maximum.size() * static_cast<size_t>(s.dim), 0x7fff);
    grad_weight.assign(static_cast<size_t>(outer * s.heads * total_keys), std::nanf(""));
  }

  void run(const Kernels& kernels, ParallelFor parallel_for) {
    Attention& a = g.forward;
    a = {};
    a.batch = s.batch;
    a.num_heads = s.heads;
    a.num_key_heads = s.key_heads;
    a.head_dim = s.dim;
    a.num_queries = s.queries;
    a.num_keys = s.keys;
    a.total_queries = total_queries;
    a.total_keys = total_keys;
    a.causal = s.causal;
    a.query_offset = s.has_offset ? &s.offset : nullptr;
    a.scale = scale();
    a.dropout_p = s.dropout_p;
    a.seed = s.dropout_p > 0 ? &seed : nullptr;
    a.dtype = s.dtype;
    a.query = query.view;
    a.key = key.view;
    a.value = value.view;
    a.output = output.view;
    const int64_t weight_heads = s.head_weights ? s.heads : 1;
    a.weight = {weight.data(), weight_heads * total_keys, s.head_weights ? total_keys : 0};
    a.maximum = {maximum.data(), s.heads * total_queries, total_queries};
    a.total = {total.data(), s.heads * total_queries, total_queries};
    a.rounding = {rounding.data(), s.heads * total_queries * s.dim, total_queries * s.dim, s.dim};
    g.grad_output = grad_output.view;
    g.grad_query = grad_query.view;
    g.grad_key = grad_key.view;
    g.grad_value = grad_value.view;
    g.grad_weight = {grad_weight.data(), s.heads * total_keys, total_keys};
    g.key_mask = reinterpret_cast<const bool*>(key_mask.data());
    g.key_mask_batch = total_keys;
    if (s.packed) {
      a.cu_queries = cu_queries.data();
      a.cu_keys = cu_keys.data();
      a.weight.batch = a.maximum.batch = a.total.batch = g.grad_weight.batch = g.key_mask_batch = 0;
      for (Matrices* m : {&a.query, &a.key, &a.value, &a.output, &a.rounding, &g.grad_output, &g.grad_query,
                          &g.grad_key, &g.grad_value}) {
        m->batch = 0;
      }
    }
    kernels.forward(a, parallel_for);
    kernels.backward(g, parallel_for);
  }

  float scale() const { return 1.0f / std::sqrt(static_cast<float>(s.dim)); }

  bool operator==(const Problem& other) const {
    return output == other.output && grad_query == other.grad_query && grad_key == other.grad_key &&
           grad_value == other.grad_value && same(maximum, other.maximum) && same(total, other.total) &&
           same(rounding, other.rounding) && same(grad_weight, other.grad_weight);
  }
  template <class T>
  static bool same(const std::vector<T>& a, const std::vector<T>& b) {
    return a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0;
  }

  // Returns the output before it was rounded to the dtype, from `output` and `rounding`.
  double unrounded(int64_t b, int64_t h, int64_t i, int64_t d) const {
    const float stored = output.get(b, h, i, d);
    if (rounding.empty()) return stored;
    const int32_t units = rounding[static_cast<size_t>(((b * s.heads + h) * total_queries + i) * s.dim + d)];
    return __builtin_bit_cast(float, __builtin_bit_cast(int32_t, stored) + units);
  }
};

// Returns whether dropout keeps a probability, by the 16 bits number key % 8 of the Philox4x32-10 draw
// for (head, row, key / 8).
bool kept(const Problem& p, int64_t batch_head, int64_t row, int64_t key) {
  uint32_t c[4] = {static_cast<uint32_t>(batch_head), static_cast<uint32_t>(row), static_cast<uint32_t>(key / 8), 0};
  uint32_t k[2] = {static_cast<uint32_t>(p.seed), static_cast<uint32_t>(static_cast<uint64_t>(p.seed) >> 32)};
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = uint64_t{0xD2511F53u} * c[0], p1 = uint64_t{0xCD9E8D57u} * c[2];
    const uint32_t next[4] = {static_cast<uint32_t>(p1 >> 32) ^ c[1] ^ k[0], static_cast<uint32_t>(p1),
                              static_cast<uint32_t>(p0 >> 32) ^ c[3] ^ k[1], static_cast<uint32_t>(p0)};
    std::copy(next, next + 4, c);
    k[0] += 0x9E3779B9u;
    k[1] += 0xBB67AE85u;
  }
  const uint32_t lane = c[key % 8 / 2] >> (key % 2 * 16) & 0xffffu;
  return lane >= static_cast<uint32_t>(std::floor(p.s.dropout_p * 65536.0 + 0.5));
}

// A sum, and the sum of the magnitudes of its terms.
struct Sum {
  double value = 0, magnitude = 0;

  void operator+=(double term) {
    value += term;
    magnitude += std::abs(term);
  }
};

// Computes the largest error of the kernels relative to the tolerance, which is a small multiple of the dtype's
// rounding. It is infinite where a result is NaN or memory outside of the rows was written. Where probabilities
// and gradients of logits are rounded to bf16, the tolerance includes this rounding for every term of a sum.
class Judge {
 public:
  Judge(const Problem& problem, const Kernels& kernels)
      : p_(problem),
        tolerance_(p_.s.dtype == DType::kFloat32   ? 1e-4
                   : p_.s.dtype == DType::kFloat16 ? 6e-4
                                                   : 4e-3),
        term_tolerance_(kernels.multiplies_bfloat16 && p_.s.dtype == DType::kBFloat16 ? 0x1p-9 : 0) {}

  double worst() {
    std::vector<Sum> grad_key(count(p_.s.key_heads)), grad_value(count(p_.s.key_heads));
    for (int64_t b = 0; b < p_.s.batch; ++b) {
      for (int64_t h = 0; h < p_.s.heads; ++h) sequence(b, h, grad_key, grad_value);
    }
    size_t at = 0;
    p_.grad_key.for_each(
        [&](int64_t b, int64_t h, int64_t j, int64_t d) { compare(p_.grad_key.get(b, h, j, d), grad_key[at++]); });
    at = 0;
    p_.grad_value.for_each(
        [&](int64_t b, int64_t h, int64_t j, int64_t d) { compare(p_.grad_value.get(b, h, j, d), grad_value[at++]); });
    for (const Buffer* buffer : {&p_.output, &p_.grad_query, &p_.grad_key, &p_.grad_value}) {
      if (!buffer->padding_is_untouched()) worst_ = kInf;
    }
    return worst_;
  }

 private:
  size_t count(int64_t heads) const { return static_cast<size_t>(p_.outer * heads * p_.total_keys * p_.s.dim); }

  void compare(double got, double expected, double magnitude = 0) {
    const double error =
        std::abs(got - expected) / (tolerance_ * (1 + std::abs(expected)) + term_tolerance_ * magnitude);
    worst_ = error <= worst_ ? worst_ : std::isnan(error) ? kInf : error;
  }
  void compare(double got, const Sum& expected) { compare(got, expected.value, expected.magnitude); }

  void sequence(int64_t b, int64_t h, std::vector<Sum>& grad_key, std::vector<Sum>& grad_value) {
    const Shape& s = p_.s;
    const int64_t outer = s.packed ? 0 : b, kh = h / (s.heads / s.key_heads);
    const auto at = [](const std::vector<int32_t>& sums, int64_t i) {
      return static_cast<int64_t>(sums[static_cast<size_t>(i)]);
    };
    const int64_t q0 = s.packed ? at(p_.cu_queries, b) : 0, k0 = s.packed ? at(p_.cu_keys, b) : 0;
    const int64_t queries = s.packed ? at(p_.cu_queries, b + 1) - q0 : s.queries;
    const int64_t keys = s.packed ? at(p_.cu_keys, b + 1) - k0 : s.keys;
    const int64_t offset = s.has_offset ? s.offset : keys - queries;
    const auto key_index = [&](int64_t j, int64_t d) {
      return static_cast<size_t>(((outer * s.key_heads + kh) * p_.total_keys + k0 + j) * s.dim + d);
    };
    std::vector<double> e(static_cast<size_t>(keys)), dp(e.size()), grad_weight(e.size());
    for (int64_t i = 0; i < queries; ++i) {
      double total = 0, delta = 0;
      const int64_t seen = s.causal ? std::clamp<int64_t>(i + offset + 1, 0, keys) : keys;
      const auto masked = [&](int64_t j) { return !p_.key_mask[static_cast<size_t>(outer * p_.total_keys + k0 + j)]; };
      const auto weight = [&](int64_t j) {
        const int64_t head = s.head_weights ? outer * s.heads + h : outer;
        return double(p_.weight[static_cast<size_t>(head * p_.total_keys + k0 + j)]);
      };
      for (int64_t j = 0; j < seen; ++j) {
        if (masked(j)) continue;
        double x = 0;
        for (int64_t d = 0; d < s.dim; ++d) {
          x += p_.query.get(outer, h, q0 + i, d) * double(p_.key.get(outer, kh, k0 + j, d));
        }
        e[static_cast<size_t>(j)] = std::exp(p_.scale() * x);
        total += weight(j) * e[static_cast<size_t>(j)];
      }
      const auto row = static_cast<size_t>((outer * s.heads + h) * p_.total_queries + q0 + i);
      if (total > 0) {
        compare(p_.maximum[row] * std::log(2.0) + std::log(p_.total[row]), std::log(total));
      } else if (p_.total[row] != 0) {
        worst_ = kInf;
      }
      std::vector<Sum> output(static_cast<size_t>(s.dim)), grad_query(output.size());
      const auto go = [&](int64_t d) { return double(p_.grad_output.get(outer, h, q0 + i, d)); };
      for (int64_t j = 0; total > 0 && j < seen; ++j) {
        if (masked(j)) continue;
        const double z = s.dropout_p == 0 ? 1 : kept(p_, b * s.heads + h, i, j) ? 1 / (1 - s.dropout_p) : 0;
        double dot = 0;
        for (int64_t d = 0; d < s.dim; ++d) {
          const double v = p_.value.get(outer, kh, k0 + j, d);
          dot += go(d) * v;
          output[static_cast<size_t>(d)] += weight(j) * e[static_cast<size_t>(j)] / total * z * v;
        }
        dp[static_cast<size_t>(j)] = z * dot;
      }
      for (int64_t d = 0; d < s.dim; ++d) delta += go(d) * p_.unrounded(outer, h, q0 + i, d);
      for (int64_t j = 0; total > 0 && j < seen; ++j) {
        if (masked(j)) continue;
        const double probability = e[static_cast<size_t>(j)] / total, centred = dp[static_cast<size_t>(j)] - delta;
        const double z = s.dropout_p == 0 ? 1 : kept(p_, b * s.heads + h, i, j) ? 1 / (1 - s.dropout_p) : 0;
        grad_weight[static_cast<size_t>(j)] += probability * centred;
        const double grad_logit = weight(j) * probability * centred * p_.scale();
        for (int64_t d = 0; d < s.dim; ++d) {
          grad_value[key_index(j, d)] += weight(j) * probability * z * go(d);
          if (weight(j) == 0) continue;
          grad_key[key_index(j, d)] += grad_logit * p_.query.get(outer, h, q0 + i, d);
          grad_query[static_cast<size_t>(d)] += grad_logit * p_.key.get(outer, kh, k0 + j, d);
        }
      }
      for (int64_t d = 0; d < s.dim; ++d) {
        compare(p_.output.get(outer, h, q0 + i, d), output[static_cast<size_t>(d)]);
        compare(p_.grad_query.get(outer, h, q0 + i, d), grad_query[static_cast<size_t>(d)]);
      }
    }
    for (int64_t j = 0; j < keys; ++j) {
      compare(p_.grad_weight[static_cast<size_t>((outer * s.heads + h) * p_.total_keys + k0 + j)],
              grad_weight[static_cast<size_t>(j)]);
    }
  }

  const Problem& p_;
  double tolerance_, term_tolerance_;
  double worst_ = 0;
};

std::vector<int32_t> lengths(Random& r, int64_t batch, int64_t longest) {
  std::vector<int32_t> sums{0};
  for (int64_t b = 0; b < batch; ++b) sums.push_back(sums.back() + static_cast<int32_t>(r.upto(0, longest)));
  return sums;
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t cases = argc > 1 ? std::atoll(argv[1]) : 1000, seed = argc > 2 ? std::atoll(argv[2]) : 0;
  const Kernels& kernels = select_kernels();
  double worst = 0;
  for (int64_t index = 0; index < cases; ++index) {
    Random random{std::mt19937_64(static_cast<uint64_t>(seed + index))};
    const Shape shape = Shape::draw(random);
    const auto queries = lengths(random, shape.batch, shape.queries), keys = lengths(random, shape.batch, shape.keys);
    Problem first(shape, random, queries, keys), second = first;
    first.run(kernels, serial);
    second.run(kernels, threaded);
    const double error = Judge(first, kernels).worst();
    worst = std::max(worst, error);
    if (error > 1 || !(first == second)) {
      std::printf("FAIL %s %s, driver 1 %lld: ", kernels.isa, error > 1 ? "is wrong" : "depends on threads",
                  (long long)(seed + index));
      std::printf("error %g of 1 allowed; ", error);
      shape.print();
      return 1;
    }
  }
  std::printf("ok %s: %lld cases, largest error %.2g of 1 allowed\n", kernels.isa, (long long)cases, worst);
  return 0;
}
