// The shared memory of a block, with a record of every two bytes: which threads accessed them last,
// and when. The record reveals reads of bytes that nobody wrote, races, and accesses to bytes to which
// an asynchronous copy is under way.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "emulator.h"

namespace empcause::cuda::emulator {

constexpr int kWarpThreads = 32;

class SharedMemory {
 public:
  SharedMemory(uint32_t size, int num_threads)
      : memory_(size), bytes_(size / kGranularity), copies_(num_threads), warp_time_(num_threads / kWarpThreads, 1) {}

  // Begins a block: what the block before wrote counts as unwritten.
  void begin() {
    start_ = ++time_;
    std::fill(memory_.begin(), memory_.end(), static_cast<unsigned char>(0xff));  // NaN in every dtype
    for (Copies& copies : copies_) copies = {};
  }

  // A barrier of the whole block, or of one warp, orders the accesses before it before those after it.
  void pass_barrier() { ++time_; }
  void pass_warp_barrier(int warp) { ++warp_time_[warp]; }

  const void* read(int thread, uint32_t address, uint32_t size, const Source& source) {
    check_place("reads", address, size, source);
    const int warp = thread / kWarpThreads;
    for (uint32_t i = first(address); i < last(address, size); ++i) {
      Bytes& b = bytes_[i];
      check_no_copy("reads", i, source);
      if (b.written < start_) fail("reads " + byte(i) + ", which nobody wrote", source);
      if (!before(b.written, b.written_warp_time, b.writer, b.writer / kWarpThreads, thread)) {
        race("reads", i, "wrote", b.writer, source);
      }
      // A write that is ordered after this read is ordered after the reads before it, too. If an earlier read is
      // not ordered before this one, a later write must be ordered after both: this is recorded as several readers.
      const bool others = b.read >= start_ && !before(b.read, b.read_warp_time, b.reader, b.reader_warp, thread);
      b.reader_warp = others && b.reader_warp != warp ? kSeveral : warp;
      b.reader = others ? kSeveral : thread;
      b.read = time_;
      b.read_warp_time = warp_time_[warp];
    }
    return memory_.data() + address;
  }

  void* write(int thread, uint32_t address, uint32_t size, const Source& source) {
    check_place("writes", address, size, source);
    record_write(thread, address, size, source);
    return memory_.data() + address;
  }

  // Begins an asynchronous copy; if `from` is null, it writes zeros. The bytes are copied when the
  // thread waits for the copy; nobody may access them until then.
  void copy_async(int thread, uint32_t to, const void* from, uint32_t size, const Source& source) {
    check_place("copies to", to, size, source);
    record_write(thread, to, size, source);
    set_copying(to, size, start_);
    copies_[thread].all.push_back({to, size, from, source});
  }

  void commit(int thread) { copies_[thread].groups.push_back(copies_[thread].all.size()); }

  void wait(int thread, size_t pending) {
    auto& [all, groups] = copies_[thread];
    if (groups.size() <= pending) return;
    const auto finished_groups = static_cast<ptrdiff_t>(groups.size() - pending);
    const size_t finished = groups[finished_groups - 1];
    for (size_t i = 0; i < finished; ++i) {
      const Copy& copy = all[i];
      set_copying(copy.to, copy.size, 0);
      record_write(thread, copy.to, copy.size, copy.source);
      if (copy.from == nullptr) {
        std::memset(memory_.data() + copy.to, 0, copy.size);
      } else {
        std::memcpy(memory_.data() + copy.to, copy.from, copy.size);
      }
    }
    all.erase(all.begin(), all.begin() + static_cast<ptrdiff_t>(finished));
    groups.erase(groups.begin(), groups.begin() + finished_groups);
    for (size_t& end : groups) end -= finished;
  }

 private:
  static constexpr uint32_t kGranularity = 2;
  static constexpr int kSeveral = -1;

  // The last accesses to two bytes. Times count barriers; those before start_ belong to blocks before this one.
  struct Bytes {
    uint64_t written = 0, read = 0;
    uint64_t copying = 0;  // start_ while a copy is under way
    uint32_t written_warp_time = 0, read_warp_time = 0;
    int writer = 0;
    int reader = 0, reader_warp = 0;  // or kSeveral, for reads that are not ordered
  };

  struct Copy {
    uint32_t to, size;
    const void* from;
    Source source;
  };

  // The copies of one thread that are under way.
  struct Copies {
    std::vector<Copy> all;
    std::vector<size_t> groups;  // the number of copies up to the end of each committed group
  };

  static uint32_t first(uint32_t address) { return address / kGranularity; }
  static uint32_t last(uint32_t address, uint32_t size) { return (address + size) / kGranularity; }
  static std::string byte(uint32_t i) { return "byte " + std::to_string(i * kGranularity) + " of shared memory"; }

  // Returns whether an access of `thread` at this time is ordered before what thread `mine` does now.
  bool before(uint64_t time, uint32_t warp_time, int thread, int warp, int mine) const {
    return time < time_ || thread == mine || (warp == mine / kWarpThreads && warp_time < warp_time_[warp]);
  }

  void record_write(int thread, uint32_t address, uint32_t size, const Source& source) {
    for (uint32_t i = first(address); i < last(address, size); ++i) {
      Bytes& b = bytes_[i];
      check_no_copy("writes", i, source);
      if (b.written >= start_ && !before(b.written, b.written_warp_time, b.writer, b.writer / kWarpThreads, thread)) {
        race("writes", i, "wrote", b.writer, source);
      }
      if (b.read >= start_ && !before(b.read, b.read_warp_time, b.reader, b.reader_warp, thread)) {
        race("writes", i, "read", b.reader, source);
      }
      b.written = time_;
      b.written_warp_time = warp_time_[thread / kWarpThreads];
      b.writer = thread;
    }
  }

  void set_copying(uint32_t address, uint32_t size, uint64_t start) {
    for (uint32_t i = first(address); i < last(address, size); ++i) bytes_[i].copying = start;
  }

  void check_no_copy(const char* verb, uint32_t i, const Source& source) const {
    if (bytes_[i].copying == start_) {
      fail(std::string(verb) + " " + byte(i) + ", to which an asynchronous copy is under way", source);
    }
  }

  void check_place(const char* verb, uint32_t address, uint32_t size, const Source& source) const {
    const bool inside = uint64_t{address} + size <= memory_.size();
    if (inside && address % size == 0) return;
    fail(std::string(verb) + " " + std::to_string(size) + " bytes at byte " + std::to_string(address) +
             " of shared memory, " +
             (inside ? "which is not a multiple of their number"
                     : "of which the block has " + std::to_string(memory_.size())),
         source);
  }

  [[noreturn]] static void race(const char* verb, uint32_t i, const char* other_verb, int other, const Source& source) {
    const std::string who = other == kSeveral ? "other threads" : "thread " + std::to_string(other);
    fail(
        std::string("race: ") + verb + " " + byte(i) + ", which " + who + " " + other_verb + " with no barrier between",
        source);
  }

  std::vector<unsigned char> memory_;
  std::vector<Bytes> bytes_;
  std::vector<Copies> copies_;
  uint64_t time_ = 1, start_ = 1;
  std::vector<uint32_t> warp_time_;
};

}  // namespace empcause::cuda::emulator
