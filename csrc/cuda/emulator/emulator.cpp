// The scheduler of lanes, and the records by which accesses are checked.
#include "emulator.h"

#include <cxxabi.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <exception>
#include <mutex>
#include <optional>
#include <thread>

#include "../device.h"
#include "fiber.h"

namespace empcause::cuda::emulator {

namespace {

constexpr int kWarpThreads = 32;
constexpr uint32_t kMostSharedBytes = 163 * 1024;  // of a block on sm_80, the smallest GPU that the kernels are built for

[[noreturn]] void fail(const std::string& what) { throw std::runtime_error(what); }

std::string name(Together what) {
  switch (what) {
    case Together::kBlockBarrier: return "sync_block";
    case Together::kWarpBarrier: return "sync_warp";
    case Together::kShuffle: return "shuffle";
    case Together::kLoadMatrices: return "load_matrices";
    case Together::kLoadMatricesTransposed: return "load_matrices_transposed";
    case Together::kMma: return "mma";
  }
  return "?";
}

// Disjoint and sorted.
struct Range {
  uintptr_t begin, end;
};
std::vector<Range> allowed;

// Two bytes of shared memory: who touched them last, and when. Times count barriers, of the block and of the warp.
struct Bytes {
  uint64_t written = 0, read = 0;  // 0: never, or its copy is under way
  uint32_t written_warp_time = 0, read_warp_time = 0;
  int writer = 0;
  int reader = 0, reader_warp = 0;  // -1: several
};
constexpr uint32_t kGranularity = 2;

struct Copy {
  uint32_t to, bytes;
  const void* from;  // null: zeros
};

struct Thread {
  enum class State { kReady, kWaiting, kDone };
  std::optional<Stack> stack;
  Place place = nullptr;
  State state = State::kReady;
  Together waits_in = Together::kBlockBarrier;
  std::vector<Copy> copies;     // asynchronous, not yet applied
  std::vector<size_t> groups;  // ends of committed groups in `copies`
};

// Threads that do something together.
struct Meeting {
  int first = 0, size = 0, arrived = 0;
  Together what = Together::kBlockBarrier;
  std::vector<void*> arguments;
};

// The threads of one block, on one host thread, block after block.
class Block {
 public:
  Block(int num_threads, uint32_t shared_bytes, const std::function<void()>& run)
      : run_(run), threads_(num_threads), memory_(shared_bytes), bytes_(shared_bytes / kGranularity + 1) {
    for (Thread& thread : threads_) thread.stack.emplace();
    all_ = make_meeting(0, num_threads);
    for (int first = 0; first < num_threads; first += kWarpThreads) warps_.push_back(make_meeting(first, kWarpThreads));
  }

  // Runs one block of the grid to its end. Throws what the first failing thread threw.
  void operator()(Index3 index);

  Index3 index() const { return index_; }
  uint32_t thread() const { return static_cast<uint32_t>(running_); }

  void meet(Together what, void* mine, Complete complete) {
    Meeting& meeting = what == Together::kBlockBarrier ? all_ : warps_[running_ / kWarpThreads];
    if (meeting.arrived > 0 && meeting.what != what) {
      fail("diverged: " + name(what) + " while other lanes of the warp are in " + name(meeting.what));
    }
    meeting.what = what;
    meeting.arguments[running_ - meeting.first] = mine;
    if (++meeting.arrived < meeting.size) {
      threads_[running_].state = Thread::State::kWaiting;
      threads_[running_].waits_in = what;
      leave();
      return;
    }
    meeting.arrived = 0;
    if (complete != nullptr) complete(meeting.arguments.data());
    if (what == Together::kBlockBarrier) ++time_;
    if (what == Together::kWarpBarrier) ++warp_time_[running_ / kWarpThreads];
    for (int i = 0; i < meeting.size; ++i) threads_[meeting.first + i].state = Thread::State::kReady;
  }

  const void* read_shared(int thread, uint32_t address, uint32_t bytes) {
    check_place("reads", address, bytes);
    const int warp = thread / kWarpThreads;
    for (uint32_t i = address / kGranularity; i < (address + bytes + 1) / kGranularity; ++i) {
      Bytes& b = bytes_[i];
      if (b.written < start_) fail("reads shared memory that nobody wrote, or whose copy was not waited for, at byte " + std::to_string(i * kGranularity));
      if (!ordered(b.written, b.written_warp_time, b.writer, b.writer / kWarpThreads, thread)) race("reads", "wrote", i, b.writer);
      const bool same_time = b.read == time_;
      b.reader = same_time && b.reader != thread ? -1 : thread;
      b.reader_warp = same_time && b.reader_warp != warp ? -1 : warp;
      b.read = time_;
      b.read_warp_time = warp_time_[warp];
    }
    return memory_.data() + address;
  }

  void* write_shared(uint32_t address, uint32_t bytes) {
    check_place("writes", address, bytes);
    mark_written(address, bytes, time_);
    return memory_.data() + address;
  }

  void copy_async(uint32_t to, const void* from, uint32_t bytes) {
    check_place("copies to", to, bytes);
    mark_written(to, bytes, 0);
    threads_[running_].copies.push_back({to, bytes, from});
  }

  void copy_async_commit() { threads_[running_].groups.push_back(threads_[running_].copies.size()); }

  void copy_async_wait(size_t pending) {
    Thread& thread = threads_[running_];
    if (thread.groups.size() <= pending) return;
    const size_t groups = thread.groups.size() - pending, count = thread.groups[groups - 1];
    for (size_t i = 0; i < count; ++i) {
      const Copy& copy = thread.copies[i];
      mark_written(copy.to, copy.bytes, time_);
      if (copy.from == nullptr) {
        std::memset(memory_.data() + copy.to, 0, copy.bytes);
      } else {
        std::memcpy(memory_.data() + copy.to, copy.from, copy.bytes);
      }
    }
    thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<ptrdiff_t>(count));
    thread.groups.erase(thread.groups.begin(), thread.groups.begin() + static_cast<ptrdiff_t>(groups));
    for (size_t& end : thread.groups) end -= count;
  }

 private:
  Meeting make_meeting(int first, int size) {
    Meeting meeting;
    meeting.first = first;
    meeting.size = size;
    meeting.arguments.resize(static_cast<size_t>(size));
    return meeting;
  }

  static void thread_main();

  // Goes on with the next thread that can, or ends the block.
  void leave() {
    const int from = running_, count = static_cast<int>(threads_.size());
    for (int i = 1; i <= count; ++i) {
      const int next = (from + i) % count;
      if (threads_[next].state != Thread::State::kReady) continue;
      running_ = next;
      if (next != from) empcause_switch_fiber(&threads_[from].place, threads_[next].place);
      return;
    }
    empcause_switch_fiber(&threads_[from].place, host_);
  }

  // An access at (time, warp_time) by a thread (-1: several of a warp, or of several) comes before what `mine` does now.
  bool ordered(uint64_t time, uint32_t warp_time, int thread, int warp, int mine) const {
    return time < time_ || thread == mine || (warp == mine / kWarpThreads && warp_time < warp_time_[warp]);
  }

  [[noreturn]] static void race(const char* verb, const char* other_verb, uint32_t i, int other) {
    fail(std::string("race: ") + verb + " byte " + std::to_string(i * kGranularity) + " of shared memory, which " +
         (other < 0 ? "other threads " : "thread " + std::to_string(other) + " ") + other_verb + " with no barrier between");
  }

  void mark_written(uint32_t address, uint32_t bytes, uint64_t time) {
    for (uint32_t i = address / kGranularity; i < (address + bytes + 1) / kGranularity; ++i) {
      Bytes& b = bytes_[i];
      if (b.written >= start_ && !ordered(b.written, b.written_warp_time, b.writer, b.writer / kWarpThreads, running_)) {
        race("writes", "wrote", i, b.writer);
      }
      if (b.read >= start_ && !ordered(b.read, b.read_warp_time, b.reader, b.reader_warp, running_)) {
        race("writes", "read", i, b.reader);
      }
      b.written = time;
      b.written_warp_time = warp_time_[running_ / kWarpThreads];
      b.writer = running_;
    }
  }

  void check_place(const char* verb, uint32_t address, uint32_t bytes) const {
    if (uint64_t{address} + bytes > memory_.size()) {
      fail(std::string(verb) + " bytes [" + std::to_string(address) + ", " + std::to_string(uint64_t{address} + bytes) +
           ") of shared memory, of which the block has " + std::to_string(memory_.size()));
    }
    if (address % bytes != 0) {
      fail(std::string(verb) + " " + std::to_string(bytes) + " bytes at " + std::to_string(address) + " of shared memory, not a multiple");
    }
  }

  const std::function<void()>& run_;
  std::vector<Thread> threads_;
  std::vector<unsigned char> memory_;
  std::vector<Bytes> bytes_;
  Meeting all_;
  std::vector<Meeting> warps_;
  std::vector<uint32_t> warp_time_ = std::vector<uint32_t>(threads_.size() / kWarpThreads, 1);
  uint64_t time_ = 1, start_ = 1;  // barriers so far, and when this block began
  Index3 index_{};
  int running_ = 0;
  Place host_ = nullptr;
  std::exception_ptr error_;
};

thread_local Block* current = nullptr;

void Block::thread_main() {
  Block& block = *current;
  try {
    block.run_();
  } catch (...) {
    if (!block.error_) block.error_ = std::current_exception();
  }
  Thread& thread = block.threads_[block.running_];
  thread.state = Thread::State::kDone;
  if (block.error_) empcause_switch_fiber(&thread.place, block.host_);
  block.leave();
  std::terminate();  // nobody switches to a thread that is done
}

void Block::operator()(Index3 index) {
  index_ = index;
  current = this;
  start_ = ++time_;
  error_ = nullptr;
  std::fill(memory_.begin(), memory_.end(), static_cast<unsigned char>(0xff));  // NaN, if it were read after all
  for (Thread& thread : threads_) {
    thread.state = Thread::State::kReady;
    thread.place = thread.stack->prepare(thread_main);
    thread.copies.clear();
    thread.groups.clear();
  }
  all_.arrived = 0;
  for (Meeting& warp : warps_) warp.arrived = 0;
  running_ = 0;
  empcause_switch_fiber(&host_, threads_[0].place);
  if (error_) std::rethrow_exception(error_);
  const auto waits = [](const Thread& thread) { return thread.state == Thread::State::kWaiting; };
  const auto waiting = std::find_if(threads_.begin(), threads_.end(), waits);
  if (waiting == threads_.end()) return;
  running_ = static_cast<int>(waiting - threads_.begin());
  const bool all = waiting->waits_in == Together::kBlockBarrier;
  fail("waits in " + name(waiting->waits_in) + ", which not all " + (all ? "threads of the block" : "lanes of the warp") + " reach");
}

}  // namespace

void allow(const void* pointer, size_t bytes) {
  if (bytes == 0) return;
  Range range{reinterpret_cast<uintptr_t>(pointer), reinterpret_cast<uintptr_t>(pointer) + bytes};
  const auto touches = [&](const Range& r) { return r.begin <= range.end && range.begin <= r.end; };
  for (const Range& r : allowed) {
    if (touches(r)) range = {std::min(r.begin, range.begin), std::max(r.end, range.end)};
  }
  std::erase_if(allowed, touches);
  const auto place = std::upper_bound(allowed.begin(), allowed.end(), range, [](Range a, Range b) { return a.begin < b.begin; });
  allowed.insert(place, range);
}

void forbid_all() { allowed.clear(); }

void check_global(const void* pointer, uint32_t bytes) {
  const auto address = reinterpret_cast<uintptr_t>(pointer);
  auto after = std::upper_bound(allowed.begin(), allowed.end(), address, [](uintptr_t a, const Range& r) { return a < r.begin; });
  if (after == allowed.begin() || address + bytes > std::prev(after)->end) {
    fail("touches " + std::to_string(bytes) + " bytes of global memory outside of the arguments");
  }
  if (address % bytes != 0) fail("touches " + std::to_string(bytes) + " bytes of global memory that are not aligned to it");
}

uint32_t thread_index() { return current->thread(); }
Index3 block_index() { return current->index(); }
void meet(Together what, void* mine, Complete complete) { current->meet(what, mine, complete); }
const void* read_shared(uint32_t thread, uint32_t address, uint32_t bytes) {
  return current->read_shared(static_cast<int>(thread), address, bytes);
}
void* write_shared(uint32_t address, uint32_t bytes) { return current->write_shared(address, bytes); }

void copy_async(uint32_t to, const void* from, uint32_t bytes, bool valid) {
  if (valid) check_global(from, bytes);
  current->copy_async(to, valid ? from : nullptr, bytes);
}

void copy_async_commit() { current->copy_async_commit(); }
void copy_async_wait(int pending) { current->copy_async_wait(static_cast<size_t>(pending)); }

void launch(const char* kernel, Index3 grid, int threads, uint32_t shared_bytes, const std::function<void()>& run) {
  if (threads <= 0 || threads % kWarpThreads != 0 || threads > 1024) fail("a block has whole warps and at most 1024 threads");
  if (shared_bytes > kMostSharedBytes) fail("a block has at most " + std::to_string(kMostSharedBytes) + " bytes of shared memory");
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
        char* readable = abi::__cxa_demangle(kernel, nullptr, nullptr, nullptr);
        error = std::string(exception.what()) + " (" + (readable != nullptr ? readable : kernel) + ", block " +
                std::to_string(index.x) + " " + std::to_string(index.y) + " " + std::to_string(index.z) + ", thread " +
                std::to_string(block.thread()) + ")";
        std::free(readable);
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
