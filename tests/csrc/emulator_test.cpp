// Toy kernels for test_emulator.py: some are correct, and their results are checked here; each of the others breaks
// one rule. `emulator_test NAME` runs one and prints "fine" or the error; without a name it prints the names. nvcc
// compiles the same kernels, which shows that both implementations of device.h have the same functions.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <limits>
#include <map>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "device.h"

namespace empcause::cuda {
namespace {

struct Buffers {
  const float* in;
  float* out;
  int count;
};

template <int kThreads_>
struct Toy {
  static constexpr int kThreads = kThreads_, kMinBlocks = 1;
  using Arguments = Buffers;
};

constexpr float kInfinity = std::numeric_limits<float>::infinity();

EMPCAUSE_DEVICE Shared word(uint32_t index) { return shared_memory() + index * 4; }
EMPCAUSE_DEVICE float in_at(const Buffers& b, uint32_t index) { return load_global(b.in + index); }
EMPCAUSE_DEVICE uint32_t global_thread(uint32_t threads) { return block_index().x * threads + thread_index(); }

// --- correct kernels

struct Indices : Toy<96> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    const Index3 block = block_index();
    const uint32_t index = ((block.z * 2 + block.y) * 3 + block.x) * kThreads + thread_index();
    store_global(b.out + index, static_cast<float>(warp_index() * 1000 + lane_index()));
  }
};

// Reverses the values of a block through shared memory, with barriers, several blocks and several warps.
struct Reverse : Toy<128> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    const uint32_t i = thread_index();
    for (int round = 0; round < 3; ++round) {
      store_shared(word(i), in_at(b, global_thread(kThreads)));
      sync_block();
      const float value = load_shared<float>(word(kThreads - 1 - i));
      sync_block();
      store_global(b.out + global_thread(kThreads), value);
    }
  }
};

// sync_warp orders accesses within a warp, also a write after reads of the word by several lanes at different times.
struct WarpExchange : Toy<64> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    const uint32_t lane = lane_index(), base = warp_index() * 32;
    store_shared(word(base + lane), in_at(b, thread_index()));
    sync_warp();
    const float next = load_shared<float>(word(base + (lane + 1) % 32));
    sync_warp();
    store_shared(word(base + lane), next);
    sync_warp();
    store_global(b.out + thread_index(), load_shared<float>(word(base + (lane + 1) % 32)));
  }
};

// Lane 0 reads, then lane 1 reads and writes. The barrier orders the read of lane 0 before the write;
// the other read is by the thread that writes.
struct ReadsAtTwoTimes : Toy<32> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    if (lane_index() == 0) store_shared(word(0), 1.0f);
    sync_warp();
    float value = 0.0f;
    if (lane_index() == 0) value = load_shared<float>(word(0));
    sync_warp();
    if (lane_index() == 1) {
      value = load_shared<float>(word(0));
      store_shared(word(0), 2.0f);
    }
    store_global(b.out + thread_index(), value);
  }
};

// A whole warp may exit if the others do not wait for it at a barrier of the block.
struct WarpLeaves : Toy<64> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    if (warp_index() == 1) return;
    store_global(b.out + thread_index(), shuffle(in_at(b, thread_index()), 31));
  }
};

template <int kBytes>
struct alignas(kBytes) Bytes {
  uint8_t at[kBytes];
};

// Copies `in` with accesses of every size: 16, 8, 4 and 2 bytes, then single bytes.
struct Sizes : Toy<32> {
  template <int kTo>
  static EMPCAUSE_DEVICE void move(Shared memory) {
    Bytes<kTo> bytes[16 / kTo];
    for (uint32_t i = 0; i < 16 / kTo; ++i) bytes[i] = load_shared<Bytes<kTo>>(memory + i * kTo);
    for (uint32_t i = 0; i < 16 / kTo; ++i) store_shared(memory + i * kTo, bytes[i]);
  }

  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    const Shared memory = shared_memory() + lane_index() * 16;
    store_shared(memory, load_global(reinterpret_cast<const Bytes<16>*>(b.in) + lane_index()));
    move<8>(memory);
    move<4>(memory);
    move<2>(memory);
    const auto bytes = load_shared<Bytes<16>>(memory);
    auto* const to = reinterpret_cast<uint8_t*>(b.out) + lane_index() * 16;
    for (int i = 0; i < 16; ++i) store_global(to + i, bytes.at[i]);
  }
};

struct Shuffles : Toy<64> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    const float value = in_at(b, thread_index());
    const int lane = static_cast<int>(lane_index());
    store_global(b.out + thread_index(), shuffle(value, (lane * 7 + 3) % 32));
    store_global(b.out + 64 + thread_index(), shuffle_xor(value, 5));
    store_global(b.out + 128 + thread_index(), static_cast<float>(shuffle(lane, 9)));
    store_global(b.out + 192 + thread_index(), shuffle(value, lane - 1));  // lanes count modulo 32
  }
};

// Counts the threads of a block and votes in its warps; sync_block_count is a barrier for shared memory, too.
struct Votes : Toy<96> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    const uint32_t i = thread_index();
    const float value = in_at(b, i);
    store_shared(word(i), value);
    const int positive = sync_block_count(value > 0.0f);
    const float next = load_shared<float>(word((i + 1) % kThreads));
    store_global(b.out + i, static_cast<float>(positive));
    store_global(b.out + 96 + i, any_lane(value > 2.0f) ? 1.0f : 0.0f);
    store_global(b.out + 192 + i, next);
  }
};

// Starts two groups of copies, the second of zeros, and reads the first before it waits for the second.
struct Copies : Toy<32> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    const uint32_t lane = lane_index();
    const Shared first = shared_memory() + lane * 16, second = shared_memory() + (512 + lane * 16);
    copy_async(first, b.in + lane * 4, true);
    copy_async_commit();
    copy_async(second, nullptr, false);
    copy_async_commit();
    copy_async_wait<1>();
    sync_block();
    for (uint32_t i = 0; i < 4; ++i) store_global(b.out + i * 32 + lane, load_shared<float>(word(i * 32 + lane)));
    copy_async_wait<0>();
    sync_block();
    for (uint32_t i = 4; i < 8; ++i) store_global(b.out + i * 32 + lane, load_shared<float>(word(i * 32 + lane)));
  }
};

// Stores the numbers 0 to 255 as 32 rows of eight 16-bit values, loads them as matrices, and writes
// each lane's four registers as two numbers each.
template <bool kTransposed>
struct LoadMatrices : Toy<32> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    const uint32_t lane = lane_index();
    for (uint32_t i = 0; i < 8; ++i) {
      store_shared(shared_memory() + (lane * 16 + i * 2), static_cast<uint16_t>(lane * 8 + i));
    }
    sync_warp();
    uint32_t r[4];
    if constexpr (kTransposed) {
      load_matrices_transposed(r, shared_memory() + lane * 16);
    } else {
      load_matrices(r, shared_memory() + lane * 16);
    }
    for (uint32_t m = 0; m < 4; ++m) {
      store_global(b.out + (lane * 4 + m) * 2, static_cast<float>(r[m] & 0xffffu));
      store_global(b.out + (lane * 4 + m) * 2 + 1, static_cast<float>(r[m] >> 16));
    }
  }
};

// Computes out = A B + C from in = A [16, 16], B [16, 8], C [16, 8]. Fragments are filled by the
// tables of the PTX manual.
template <class T>
struct Product : Toy<32> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    const uint32_t group = lane_index() >> 2, member = lane_index() % 4;
    uint32_t left[4], right[2];
    float c[4];
    for (uint32_t i = 0; i < 4; ++i) {
      const uint32_t row = i % 2 == 0 ? group : group + 8, column = member * 2 + (i < 2 ? 0 : 8);
      left[i] = pack<T>(in_at(b, row * 16 + column), in_at(b, row * 16 + column + 1));
    }
    for (uint32_t i = 0; i < 2; ++i) {
      const uint32_t row = member * 2 + i * 8;
      right[i] = pack<T>(in_at(b, 256 + row * 8 + group), in_at(b, 256 + (row + 1) * 8 + group));
    }
    const auto place = [&](uint32_t i) { return (i < 2 ? group : group + 8) * 8 + member * 2 + i % 2; };
    for (uint32_t i = 0; i < 4; ++i) c[i] = in_at(b, 384 + place(i));
    mma<T>(c, left, right);
    for (uint32_t i = 0; i < 4; ++i) store_global(b.out + place(i), c[i]);
  }
};

template <class T>
struct Rounding : Toy<32> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    for (int i = static_cast<int>(thread_index()); i < b.count; i += 32) {
      const float value = load_global(b.in + i);
      const uint32_t both = pack<T>(value, -value);
      store_global(b.out + 3 * i, to_float(from_float<T>(value)));
      store_global(b.out + 3 * i + 1, to_float(T{static_cast<uint16_t>(both)}));
      store_global(b.out + 3 * i + 2, to_float(T{static_cast<uint16_t>(both >> 16)}));
    }
  }
};

struct Arithmetic : Toy<32> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    const float x = 1.0f + 1.0f / 4096, y = -1.0f - 1.0f / 2048;
    if (thread_index() != 0) return;
    store_global(b.out, add_rounded(multiply_rounded(x, x), y));  // the last bit of the product is rounded away
    store_global(b.out + 1, fma(x, x, y));                        // and here it is what is left
    store_global(b.out + 2, static_cast<float>(multiply_high(0x80000000u, 6u)));
    store_global(b.out + 3, exp2(-3.0f));
    store_global(b.out + 4, exp2(-kInfinity));
    store_global(b.out + 5, log2(0.25f));
    store_global(b.out + 6, log2(0.0f));
    store_global(b.out + 7, exp2(-130.0f));  // below the smallest normal number
    store_global(b.out + 8, log2(1e-40f));
  }
};

// --- kernels that break a rule

// Warp 1 reads what warp 0 wrote, without a barrier of the block.
template <bool kWarpBarrier>
struct ReadAfterWrite : Toy<64> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    if (warp_index() == 0) store_shared(word(lane_index()), 1.0f);
    if (kWarpBarrier) sync_warp();
    if (warp_index() == 1) store_global(b.out + lane_index(), load_shared<float>(word(lane_index())));
  }
};

// Lanes read what others wrote; the shuffle between does not order memory.
struct ReadAfterWriteInWarp : Toy<32> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    store_shared(word(lane_index()), 1.0f);
    store_global(b.out + lane_index(), shuffle(1.0f, 0) + load_shared<float>(word((lane_index() + 1) % 32)));
  }
};

// Warp 1 reads what warp 0 overwrites; only warp 1 passes a barrier, of its own.
struct WriteAfterRead : Toy<64> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    store_shared(word(thread_index()), 1.0f);
    sync_block();
    if (warp_index() == 1) {
      store_global(b.out + lane_index(), load_shared<float>(word(lane_index())));
      sync_warp();
    } else {
      store_shared(word(thread_index()), 2.0f);
    }
  }
};

// Lanes 0 and 1 read at different times, and lane 2 writes when a barrier orders only the first read before the write.
struct WriteAfterReads : Toy<32> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    const uint32_t lane = lane_index();
    if (lane == 0) store_shared(word(0), 1.0f);
    sync_warp();
    if (lane == 0) store_global(b.out, load_shared<float>(word(0)));
    sync_warp();
    if (lane == 1) store_global(b.out + 1, load_shared<float>(word(0)));
    if (lane == 2) store_shared(word(0), 2.0f);
  }
};

struct WriteAfterWrite : Toy<64> {
  static EMPCAUSE_DEVICE void run(const Buffers&) { store_shared(word(lane_index()), 1.0f); }
};

// Two of the four bytes that are read were not written.
struct HalfWritten : Toy<32> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    if (lane_index() != 0) return;
    store_shared(shared_memory(), static_cast<uint16_t>(1));
    store_global(b.out, load_shared<float>(shared_memory()));
  }
};

struct Unwritten : Toy<32> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    if (thread_index() != 17) store_shared(word(thread_index()), 1.0f);
    sync_block();
    store_global(b.out + thread_index(), load_shared<float>(word(thread_index())));
  }
};

// Only block 0 writes; block 40 must not read what it left.
struct UnwrittenByThisBlock : Toy<32> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    if (block_index().x == 0) store_shared(word(thread_index()), 1.0f);
    sync_block();
    if (block_index().x == 40) store_global(b.out, load_shared<float>(word(thread_index())));
  }
};

// Lane 5 did not write row 5, whose address it passes to load_matrices.
struct UnwrittenMatrix : Toy<32> {
  static EMPCAUSE_DEVICE void run(const Buffers&) {
    for (uint32_t i = 0; i < 4 && lane_index() != 5; ++i) store_shared(word(lane_index() * 4 + i), 0u);
    sync_warp();
    uint32_t r[4];
    load_matrices(r, shared_memory() + thread_index() * 16);
  }
};

struct SharedTooFar : Toy<32> {
  static EMPCAUSE_DEVICE void run(const Buffers&) { store_shared(word(thread_index() + 1), 1.0f); }
};

struct SharedMisaligned : Toy<32> {
  static EMPCAUSE_DEVICE void run(const Buffers&) { store_shared(shared_memory() + 2, 1.0f); }
};

struct MatrixMisaligned : Toy<32> {
  static EMPCAUSE_DEVICE void run(const Buffers&) {
    uint32_t r[4];
    load_matrices(r, shared_memory() + (lane_index() * 16 + 8));
  }
};

struct CopyMisaligned : Toy<32> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    if (thread_index() == 0) copy_async(shared_memory() + 8, b.in, true);
  }
};

struct CopyFromMisaligned : Toy<32> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    if (thread_index() == 0) copy_async(shared_memory(), b.in + 1, true);
  }
};

struct CopyFromOutside : Toy<32> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    if (thread_index() == 0) copy_async(shared_memory(), b.in + b.count, true);
  }
};

struct GlobalReadOutside : Toy<32> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) { store_global(b.out, load_global(b.in + b.count)); }
};

struct GlobalReadBefore : Toy<32> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) { store_global(b.out, load_global(b.in - 1)); }
};

struct GlobalWriteOutside : Toy<32> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) { store_global(b.out + 256, 1.0f); }
};

struct GlobalMisaligned : Toy<32> {
  struct alignas(8) Two {
    float at[2];
  };
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    store_global(b.out, load_global(reinterpret_cast<const Two*>(b.in + 1)).at[0]);
  }
};

struct CopyNotWaitedFor : Toy<32> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    copy_async(shared_memory() + thread_index() * 16, b.in + thread_index() * 4, true);
    copy_async_commit();
    copy_async_wait<1>();
    sync_block();
    store_global(b.out + thread_index(), load_shared<float>(word(thread_index())));
  }
};

struct CopyNotCommitted : Toy<32> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    copy_async(shared_memory() + thread_index() * 16, b.in + thread_index() * 4, true);
    copy_async_wait<0>();
    sync_block();
    store_global(b.out + thread_index(), load_shared<float>(word(thread_index())));
  }
};

struct CopyWithoutBarrier : Toy<32> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    copy_async(shared_memory() + thread_index() * 16, b.in + thread_index() * 4, true);
    copy_async_commit();
    copy_async_wait<0>();
    store_global(b.out + thread_index(), load_shared<float>(word(thread_index())));
  }
};

// A copy begins to overwrite data that other threads may still read.
struct CopyOverReaders : Toy<64> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    store_shared(word(thread_index()), 1.0f);
    sync_block();
    const float value = load_shared<float>(word(63 - thread_index()));
    if (thread_index() < 16) copy_async(shared_memory() + thread_index() * 16, b.in, true);
    store_global(b.out + thread_index(), value);
  }
};

// A thread stores to bytes to which a copy is under way. Which of the two values remains is undefined,
// even with a barrier.
template <bool kOwn>
struct StoreUnderCopy : Toy<64> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    if (thread_index() == 0) copy_async(shared_memory(), b.in, true);
    copy_async_commit();
    sync_block();
    if (thread_index() == (kOwn ? 0 : 40)) store_shared(word(1), 5.0f);
    sync_block();
    copy_async_wait<0>();
  }
};

struct TwoCopies : Toy<64> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    if (thread_index() == 0) copy_async(shared_memory(), b.in, true);
    sync_block();
    if (thread_index() == 40) copy_async(shared_memory(), b.in + 4, true);
  }
};

struct ExitsBeforeBarrier : Toy<64> {
  static EMPCAUSE_DEVICE void run(const Buffers&) {
    if (thread_index() == 40) return;
    sync_block();
  }
};

struct ExitsBeforeShuffle : Toy<32> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    if (thread_index() == 3) return;
    store_global(b.out + thread_index(), shuffle(1.0f, 0));
  }
};

struct ShuffleInBranch : Toy<32> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    float value = 1.0f;
    if (thread_index() < 16) value = shuffle(value, 0);
    sync_block();
    store_global(b.out + thread_index(), value);
  }
};

struct VoteInBranch : Toy<32> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    bool any = false;
    if (thread_index() < 16) any = any_lane(true);
    sync_block();
    store_global(b.out + thread_index(), any ? 1.0f : 0.0f);
  }
};

struct CountInBranch : Toy<64> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    if (warp_index() == 0) store_global(b.out, static_cast<float>(sync_block_count(true)));
  }
};

struct BarrierAgainstShuffle : Toy<32> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    if (thread_index() < 16) {
      sync_warp();
    } else {
      store_global(b.out, shuffle(1.0f, 0));
    }
  }
};

struct BarrierInBranch : Toy<64> {
  static EMPCAUSE_DEVICE void run(const Buffers&) {
    if (warp_index() == 0) sync_block();
    sync_warp();
  }
};

struct ProductInBranch : Toy<32> {
  static EMPCAUSE_DEVICE void run(const Buffers&) {
    float c[4] = {};
    const uint32_t zeros[4] = {};
    if (lane_index() > 3) mma<BFloat16>(c, zeros, {0u, 0u});
  }
};

// Half of the lanes execute a shuffle at one line, the other half at another.
struct TwoShuffles : Toy<32> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    float value = 0.0f;
    if (thread_index() < 16) {
      value = shuffle(1.0f, 0);
      store_global(b.out, value);
    } else {
      value = shuffle(2.0f, 3);
      store_global(b.out + 1, value);
    }
  }
};

struct Asserts : Toy<64> {
  static EMPCAUSE_DEVICE void run(const Buffers& b) {
    require(thread_index() != 33 || block_index().x != 2 || b.count == 0, "the assertion's own words");
    sync_block();
  }
};

// --- the host runs the kernels and compares their results

void expect(bool condition, const std::string& what) {
  if (!condition) throw std::logic_error("wrong result: " + what);
}

std::vector<float> random(int count) {
  std::mt19937 generator(7);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

// Runs a kernel and returns the out_count floats that it writes. Memory around both arrays is not
// allowed to the kernel.
template <class Kernel>
std::vector<float> run(const std::vector<float>& in, uint32_t out_count, Index3 grid = {1, 1, 1},
                       uint32_t shared_bytes = 1024) {
  struct alignas(16) Chunk {
    float at[4];
  };
  const size_t in_chunks = (in.size() + 3) / 4;
  std::vector<Chunk> memory(in_chunks + (out_count + 3) / 4 + 3);
  float *const first = memory[1].at, *const out = memory[in_chunks + 2].at;
  std::copy(in.begin(), in.end(), first);
  std::fill(out, out + out_count, -1.0f);
#if !defined(__CUDACC__)
  emulator::forbid_all();
  emulator::allow(nullptr, 0);
  emulator::allow(first, in.size() * sizeof(float));
  emulator::allow(out, out_count * sizeof(float));
#endif
  launch<Kernel>(grid, shared_bytes, nullptr, {first, out, static_cast<int>(in.size())});
  return {out, out + out_count};
}

void check_indices() {
  const auto out = run<Indices>({}, 12 * 96, {3, 2, 2});
  for (int i = 0; i < 12 * 96; ++i) expect(out[i] == static_cast<float>(i % 96 / 32 * 1000 + i % 32), "indices");
}

// Launches twice, the second time with the stacks of the first, and uses all of the shared memory.
void check_reverse() {
  const auto in = random(128 * 20);
  for (int launches = 0; launches < 2; ++launches) {
    const auto out = run<Reverse>(in, 128 * 20, {20, 1, 1}, 512);
    for (int i = 0; i < 128 * 20; ++i) expect(out[i] == in[i / 128 * 128 + 127 - i % 128], "reverse");
  }
}

void check_warps() {
  const auto in = random(64), out = run<WarpExchange>(in, 64), rest = run<WarpLeaves>(in, 64);
  for (int i = 0; i < 64; ++i) {
    expect(out[i] == in[i / 32 * 32 + (i + 2) % 32], "exchange in a warp");
    expect(rest[i] == (i < 32 ? in[31] : -1.0f), "a warp that leaves");
  }
  expect(run<ReadsAtTwoTimes>({}, 32)[1] == 1.0f, "reads at two times");
}

void check_sizes() {
  const auto in = random(128), out = run<Sizes>(in, 128);
  expect(in == out, "accesses of every size");
}

void check_shuffles() {
  const auto in = random(64), out = run<Shuffles>(in, 256);
  for (int i = 0; i < 64; ++i) {
    const int lane = i % 32, first = i - lane;
    expect(out[i] == in[first + (lane * 7 + 3) % 32], "shuffle");
    expect(out[64 + i] == in[first + (lane ^ 5)], "shuffle_xor");
    expect(out[128 + i] == 9.0f, "shuffle of an integer");
    expect(out[192 + i] == in[first + (lane + 31) % 32], "shuffle modulo 32");
  }
}

void check_votes() {
  auto in = random(96);
  for (int i = 0; i < 96; ++i) in[i] = i == 70 ? 3.0f : std::fmin(in[i], 2.0f);  // one value is above 2
  const auto out = run<Votes>(in, 288);
  const auto positive = std::count_if(in.begin(), in.end(), [](float value) { return value > 0.0f; });
  for (int i = 0; i < 96; ++i) {
    expect(out[i] == static_cast<float>(positive), "sync_block_count");
    expect(out[96 + i] == (i < 64 ? 0.0f : 1.0f), "any_lane");
    expect(out[192 + i] == in[(i + 1) % 96], "the barrier of sync_block_count");
  }
}

void check_copies() {
  const auto in = random(128), out = run<Copies>(in, 256);
  for (int i = 0; i < 256; ++i) expect(out[i] == (i < 128 ? in[i] : 0.0f), "copy_async");
}

template <bool kTransposed>
void check_load_matrices() {
  const auto out = run<LoadMatrices<kTransposed>>({}, 256);
  for (int lane = 0; lane < 32; ++lane) {
    for (int m = 0; m < 4; ++m) {
      for (int i = 0; i < 2; ++i) {
        const int row = kTransposed ? lane % 4 * 2 + i : lane / 4, column = kTransposed ? lane / 4 : lane % 4 * 2 + i;
        expect(out[(lane * 4 + m) * 2 + i] == static_cast<float>(m * 64 + row * 8 + column), "load_matrices");
      }
    }
  }
}

// Returns the number nearest to `value` in a format with so many bits, ties to even; computed in fp64,
// independently of the kernels.
float nearest(double value, int mantissa_bits, int least_exponent) {
  if (value == 0.0 || std::isinf(value)) return static_cast<float>(value);
  const int exponent = std::max(static_cast<int>(std::floor(std::log2(std::fabs(value)))), least_exponent);
  const double unit = std::ldexp(1.0, exponent - mantissa_bits);
  return static_cast<float>(std::nearbyint(value / unit) * unit);
}

template <class T>
struct Format;
template <>
struct Format<BFloat16> {
  static constexpr int kMantissaBits = 7, kLeastExponent = -126;
  static constexpr float kOverflow = std::numeric_limits<float>::max();
};
template <>
struct Format<Float16> {
  static constexpr int kMantissaBits = 10, kLeastExponent = -14;
  static constexpr float kOverflow = 65520.0f;  // halfway from the largest number, 65504, to 2^16
};

template <class T>
float rounded(float value) {
  if (std::isnan(value)) return value;
  if (std::fabs(value) >= Format<T>::kOverflow) return std::copysign(std::numeric_limits<float>::infinity(), value);
  return nearest(value, Format<T>::kMantissaBits, Format<T>::kLeastExponent);
}

template <class T>
void check_product() {
  const auto in = random(512);
  const auto out = run<Product<T>>(in, 128);
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      double sum = in[384 + row * 8 + column], size = std::fabs(sum);
      for (int k = 0; k < 16; ++k) {
        const double term = double{rounded<T>(in[row * 16 + k])} * rounded<T>(in[256 + k * 8 + column]);
        sum += term;
        size += std::fabs(term);
      }
      expect(std::fabs(out[row * 8 + column] - sum) <= 1e-6 * size, "mma");
    }
  }
}

template <class T>
void check_rounding() {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  std::vector<float> in = random(200);
  for (int i = 0; i < 100; ++i) in[i] *= std::ldexp(1.0f, i - 50);
  const float unit = std::ldexp(1.0f, -Format<T>::kMantissaBits);
  // These are ties to even in both directions, the largest numbers, overflow, subnormal numbers of fp16,
  // signed zero, NaN.
  for (float v : {1 + unit / 2, 1 + 1.5f * unit, 1 + 0.499f * unit, 1 + 0.501f * unit, 65504.0f, 65519.0f, 65520.0f,
                  3.4e38f, 6e-8f, 2.9e-8f, 3e-8f, 6.1e-5f, 0.0f, -0.0f, kInfinity, -kInfinity, kNan,
                  std::bit_cast<float>(0x7f800001u), std::bit_cast<float>(0xffffffffu)}) {
    in.push_back(v);
  }
  const auto out = run<Rounding<T>>(in, static_cast<int>(in.size()) * 3);
  for (size_t i = 0; i < in.size(); ++i) {
    const float expected = rounded<T>(in[i]);
    for (int j = 0; j < 3; ++j) {
      const float got = j == 2 ? -out[3 * i + j] : out[3 * i + j];
      const bool same = std::bit_cast<uint32_t>(got) == std::bit_cast<uint32_t>(expected);
      expect(same || (std::isnan(expected) && std::isnan(got)), "rounding of " + std::to_string(in[i]));
    }
  }
}

void check_arithmetic() {
  const auto out = run<Arithmetic>({}, 9);
  const float expected[] = {0.0f, std::ldexp(1.0f, -24), 3.0f, 0.125f, 0.0f, -2.0f, -kInfinity, 0.0f, -kInfinity};
  for (int i = 0; i < 9; ++i) expect(out[i] == expected[i], "arithmetic " + std::to_string(i));
}

// A launch that failed does not affect later ones.
void check_after_failure() {
  for (int i = 0; i < 3; ++i) {
    std::string message;
    try {
      run<ExitsBeforeBarrier>({}, 1, {4, 1, 1});
    } catch (const std::runtime_error& error) {
      message = error.what();
    }
    expect(!message.empty(), "the failure");
    check_reverse();
  }
}

void check_empty_grid() { run<Asserts>({}, 1, {0, 1, 1}); }

// Runs a kernel that breaks a rule, with 256 floats in and 256 floats out.
template <class Kernel>
void broken() {
  run<Kernel>(random(256), 256, {64, 1, 1});
}

using Case = void (*)();

const std::map<std::string, Case> kCases = {
    {"right: indices", check_indices},
    {"right: barriers", check_reverse},
    {"right: warps", check_warps},
    {"right: sizes", check_sizes},
    {"right: shuffles", check_shuffles},
    {"right: votes", check_votes},
    {"right: copies", check_copies},
    {"right: load_matrices", check_load_matrices<false>},
    {"right: load_matrices_transposed", check_load_matrices<true>},
    {"right: mma of bf16", check_product<BFloat16>},
    {"right: mma of fp16", check_product<Float16>},
    {"right: rounding to bf16", check_rounding<BFloat16>},
    {"right: rounding to fp16", check_rounding<Float16>},
    {"right: arithmetic", check_arithmetic},
    {"right: after a failure", check_after_failure},
    {"right: empty grid", check_empty_grid},
    {"ReadAfterWrite", broken<ReadAfterWrite<false>>},
    {"ReadAfterWrite with sync_warp", broken<ReadAfterWrite<true>>},
    {"ReadAfterWriteInWarp", broken<ReadAfterWriteInWarp>},
    {"WriteAfterRead", broken<WriteAfterRead>},
    {"WriteAfterReads", broken<WriteAfterReads>},
    {"WriteAfterWrite", broken<WriteAfterWrite>},
    {"Unwritten", broken<Unwritten>},
    {"UnwrittenByThisBlock", broken<UnwrittenByThisBlock>},
    {"UnwrittenMatrix", broken<UnwrittenMatrix>},
    {"HalfWritten", broken<HalfWritten>},
    {"SharedTooFar", [] { run<SharedTooFar>({}, 1, {1, 1, 1}, 128); }},
    {"SharedTooLarge", [] { run<Reverse>({}, 1, {1, 1, 1}, 100 * 1024); }},
    {"SharedMisaligned", broken<SharedMisaligned>},
    {"MatrixMisaligned", broken<MatrixMisaligned>},
    {"CopyMisaligned", broken<CopyMisaligned>},
    {"CopyFromMisaligned", broken<CopyFromMisaligned>},
    {"CopyFromOutside", broken<CopyFromOutside>},
    {"GlobalReadOutside", broken<GlobalReadOutside>},
    {"GlobalReadBefore", broken<GlobalReadBefore>},
    {"GlobalWriteOutside", broken<GlobalWriteOutside>},
    {"GlobalMisaligned", broken<GlobalMisaligned>},
    {"CopyNotWaitedFor", broken<CopyNotWaitedFor>},
    {"CopyNotCommitted", broken<CopyNotCommitted>},
    {"CopyWithoutBarrier", broken<CopyWithoutBarrier>},
    {"CopyOverReaders", broken<CopyOverReaders>},
    {"StoreUnderCopy", broken<StoreUnderCopy<false>>},
    {"StoreUnderOwnCopy", broken<StoreUnderCopy<true>>},
    {"TwoCopies", broken<TwoCopies>},
    {"ExitsBeforeBarrier", broken<ExitsBeforeBarrier>},
    {"ExitsBeforeShuffle", broken<ExitsBeforeShuffle>},
    {"ShuffleInBranch", broken<ShuffleInBranch>},
    {"VoteInBranch", broken<VoteInBranch>},
    {"CountInBranch", broken<CountInBranch>},
    {"ProductInBranch", broken<ProductInBranch>},
    {"BarrierAgainstShuffle", broken<BarrierAgainstShuffle>},
    {"BarrierInBranch", broken<BarrierInBranch>},
    {"TwoShuffles", broken<TwoShuffles>},
    {"Asserts", broken<Asserts>},
};

}  // namespace
}  // namespace empcause::cuda

int main(int count, char** arguments) {
  using empcause::cuda::kCases;
  if (count < 2) {
    for (const auto& [name, run] : kCases) std::puts(name.c_str());
    return 0;
  }
  try {
    kCases.at(arguments[1])();
    std::puts("fine");
  } catch (const std::exception& error) {
    std::puts(error.what());
  }
}
