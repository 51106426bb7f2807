// The scheduler of the threads of a block, and the list of global memory that they may access.
#include "emulator.h"

#include <cxxabi.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <exception>
#include <mutex>
#include <stdexcept>
#include <string_view>
#include <thread>
#include <vector>

#include "../device.h"
#include "fiber.h"
#include "shared_memory.h"

namespace empcause::cuda::emulator {

namespace {

// The most shared memory that a block can have on sm_86 and sm_89, which have the least of the GPUs from sm_80 on.
constexpr uint32_t kMostSharedBytes = 99 * 1024;

std::atomic<uint64_t> launch_count = 0, product_count = 0;

std::string name(Collective what) {
  switch (what) {
    case Collective::kBlockBarrier: return "sync_block";
    case Collective::kWarpBarrier: return "sync_warp";
    case Collective::kShuffle: return "shuffle";
    case Collective::kVote: return "any_lane";
    case Collective::kLoadMatrices: return "load_matrices";
    case Collective::kLoadMatricesTransposed: return "load_matrices_transposed";
    case Collective::kMma: return "mma";
  }
  return "?";
}

std::string name(const Source& source) {
  const std::string_view file = source.file_name();
  return std::string(file.substr(file.rfind('/') + 1)) + ":" + std::to_string(source.line());
}

bool same(const Source& a, const Source& b) { return a.line() == b.line() && a.column() == b.column(); }

// The threads that execute an operation together: of the whole block, or of one warp.
struct Meeting {
  Meeting(int first_thread, int num_threads) : first(first_thread), arguments(num_threads) {}

  int first, arrived = 0;
  Collective what = Collective::kBlockBarrier;
  Source source;
  std::vector<void*> arguments;  // what each thread passed as `mine`
};

struct Thread {
  Stack stack;
  StackPointer stack_pointer = nullptr;
  const Meeting* waits_in = nullptr;
  bool done = false;
};

// Runs blocks, one after another, on one thread of the host.
class Block {
 public:
  Block(int num_threads, uint32_t shared_bytes, const std::function<void()>& run)
      : shared(shared_bytes, num_threads), run_(run), threads_(num_threads), all_(0, num_threads) {
    for (int first = 0; first < num_threads; first += kWarpThreads) warps_.emplace_back(first, kWarpThreads);
  }

  // Runs one block of the grid to its end. Throws what the first failing thread threw.
  void operator()(Index3 index);

  Index3 index() const { return index_; }
  int thread() const { return running_; }

  void meet(Collective what, const Source& source, void* mine, Complete complete) {
    const int warp = running_ / kWarpThreads;
    Meeting& meeting = what == Collective::kBlockBarrier ? all_ : warps_[warp];
    if (meeting.arrived > 0 && (meeting.what != what || !same(meeting.source, source))) {
      fail(name(what) + " while others are in " + name(meeting.what) + " at " + name(meeting.source), source);
    }
    meeting.what = what;
    meeting.source = source;
    meeting.arguments[running_ - meeting.first] = mine;
    const int size = static_cast<int>(meeting.arguments.size());
    if (++meeting.arrived < size) {
      threads_[running_].waits_in = &meeting;
      leave();
      return;
    }
    meeting.arrived = 0;
    if (what == Collective::kMma) product_count.fetch_add(1, std::memory_order_relaxed);
    if (complete != nullptr) complete(meeting.arguments.data(), meeting.arguments.size());
    if (what == Collective::kBlockBarrier) shared.pass_barrier();
    if (what == Collective::kWarpBarrier) shared.pass_warp_barrier(warp);
    for (int i = 0; i < size; ++i) threads_[meeting.first + i].waits_in = nullptr;
  }

  SharedMemory shared;

 private:
  static void thread_main();

  // Continues the next thread that need not wait; if there is none, ends the block.
  void leave() {
    const int from = running_, count = static_cast<int>(threads_.size());
    for (int i = 1; i <= count; ++i) {
      const int next = (from + i) % count;
      if (threads_[next].waits_in != nullptr || threads_[next].done) continue;
      running_ = next;
      empcause_switch_fiber(&threads_[from].stack_pointer, threads_[next].stack_pointer);
      return;
    }
    empcause_switch_fiber(&threads_[from].stack_pointer, host_);
  }

  void check_nobody_waits();

  const std::function<void()>& run_;
  std::vector<Thread> threads_;
  Meeting all_;
  std::vector<Meeting> warps_;
  Index3 index_{};
  int running_ = 0;
  StackPointer host_ = nullptr;
  std::exception_ptr error_;
};

thread_local Block* current = nullptr;

void Block::thread_main() {
  Block& block = *current;
  try {
    block.run_();
  } catch (...) {
    block.error_ = std::current_exception();
  }
  Thread& thread = block.threads_[block.running_];
  thread.done = true;
  if (block.error_) empcause_switch_fiber(&thread.stack_pointer, block.host_);
  block.leave();
  std::terminate();  // nobody switches to a thread that is done
}

void Block::operator()(Index3 index) {
  index_ = index;
  current = this;
  error_ = nullptr;
  shared.begin();
  for (Thread& thread : threads_) {
    thread.waits_in = nullptr;
    thread.done = false;
    thread.stack_pointer = thread.stack.prepare(thread_main);
  }
  all_.arrived = 0;
  for (Meeting& warp : warps_) warp.arrived = 0;
  running_ = 0;
  empcause_switch_fiber(&host_, threads_[0].stack_pointer);
  if (error_) std::rethrow_exception(error_);
  check_nobody_waits();
}

void Block::check_nobody_waits() {
  const auto waits = [](const Thread& thread) { return thread.waits_in != nullptr; };
  const auto waiting = std::find_if(threads_.begin(), threads_.end(), waits);
  if (waiting == threads_.end()) return;
  running_ = static_cast<int>(waiting - threads_.begin());
  const Meeting& meeting = *waiting->waits_in;
  fail("waits in " + name(meeting.what) + ", which not all " +
           (&meeting == &all_ ? "threads of the block" : "lanes of the warp") + " reach",
       meeting.source);
}

// The allowed ranges of global memory, disjoint and sorted.
struct Range {
  uintptr_t begin, end;
};
std::vector<Range> allowed;

std::string readable(const char* type) {
  char* name = abi::__cxa_demangle(type, nullptr, nullptr, nullptr);
  const std::string result = name != nullptr ? name : type;
  std::free(name);
  return result;
}

}  // namespace

void fail(const std::string& what, const Source& source) { throw std::runtime_error(what + ", at " + name(source)); }

void allow(const void* pointer, size_t bytes) {
  if (bytes == 0) return;
  Range range{reinterpret_cast<uintptr_t>(pointer), reinterpret_cast<uintptr_t>(pointer) + bytes};
  const auto touches = [&](const Range& r) { return r.begin <= range.end && range.begin <= r.end; };
  for (const Range& r : allowed) {
    if (touches(r)) range = {std::min(r.begin, range.begin), std::max(r.end, range.end)};
  }
  std::erase_if(allowed, touches);
  const auto before = [](const Range& a, const Range& b) { return a.begin < b.begin; };
  allowed.insert(std::upper_bound(allowed.begin(), allowed.end(), range, before), range);
}

void forbid_all() { allowed.clear(); }

void check_global(const void* pointer, uint32_t size, const Source& source) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  const auto before = [](uintptr_t a, const Range& r) { return a < r.begin; };
  const auto next = std::upper_bound(allowed.begin(), allowed.end(), address, before);
  const bool inside = next != allowed.begin() && address + size <= std::prev(next)->end;
  if (inside && address % size == 0) return;
  fail("touches " + std::to_string(size) + " bytes of global memory " +
           (inside ? "that are not aligned to their number" : "outside of the arguments"),
       source);
}

uint32_t thread_index() { return static_cast<uint32_t>(current->thread()); }
Index3 block_index() { return current->index(); }

void meet(Collective what, const Source& source, void* mine, Complete complete) {
  current->meet(what, source, mine, complete);
}

const void* read_shared(uint32_t address, uint32_t size, const Source& source) {
  return current->shared.read(current->thread(), address, size, source);
}

void* write_shared(uint32_t address, uint32_t size, const Source& source) {
  return current->shared.write(current->thread(), address, size, source);
}

void copy_async(uint32_t to, const void* from, uint32_t size, bool valid, const Source& source) {
  if (valid) check_global(from, size, source);
  current->shared.copy_async(current->thread(), to, valid ? from : nullptr, size, source);
}

void copy_async_commit() { current->shared.commit(current->thread()); }
void copy_async_wait(size_t pending) { current->shared.wait(current->thread(), pending); }

uint64_t launches() { return launch_count; }
uint64_t products() { return product_count; }

void launch(const char* kernel, Index3 grid, int threads, uint32_t shared_bytes, const std::function<void()>& run) {
  ++launch_count;
  if (shared_bytes > kMostSharedBytes) {
    throw std::runtime_error("a block has at most " + std::to_string(kMostSharedBytes) +
                             " bytes of shared memory, not " + std::to_string(shared_bytes) + " (" + readable(kernel) +
                             ")");
  }
  const uint64_t count = uint64_t{grid.x} * grid.y * grid.z;
  std::atomic<uint64_t> next = 0;
  std::mutex mutex;
  std::string error;
  const auto work = [&] {
    Block block(threads, shared_bytes, run);
    for (uint64_t i = next++; i < count; i = next++) {
      const Index3 index{static_cast<uint32_t>(i % grid.x), static_cast<uint32_t>(i / grid.x % grid.y),
                         static_cast<uint32_t>(i / grid.x / grid.y)};
      try {
        block(index);
      } catch (const std::exception& exception) {
        next = count;
        const std::lock_guard lock(mutex);
        if (!error.empty()) return;
        error = std::string(exception.what()) + " (" + readable(kernel) + ", block " + std::to_string(index.x) + " " +
                std::to_string(index.y) + " " + std::to_string(index.z) + ", thread " + std::to_string(block.thread()) +
                ")";
      }
    }
  };
  const uint64_t workers = std::min<uint64_t>(count, std::max(1u, std::thread::hardware_concurrency()));
  std::vector<std::thread> others;
  for (uint64_t i = 1; i < workers; ++i) others.emplace_back(work);
  if (workers > 0) work();
  for (std::thread& other : others) other.join();
  if (!error.empty()) throw std::runtime_error(error);
}

}  // namespace empcause::cuda::emulator
