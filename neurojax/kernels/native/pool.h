// Units of work, shared between the threads of XLA.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <vector>

#include "numbers.h"

namespace {

// The units of a call. Every thread has a range of them and, done with it, helps with the others.
class Units {
 public:
  Units(int64_t units, int64_t threads) : left_(units) {
    ranges_ = std::vector<Range>(std::clamp<int64_t>(threads, 1, std::max<int64_t>(units, 1)));
    for (size_t i = 0; i < ranges_.size(); ++i) {
      ranges_[i].next = units * i / ranges_.size();
      ranges_[i].end = units * (i + 1) / ranges_.size();
    }
  }

  size_t threads() const { return ranges_.size(); }
  bool done() const { return left_.load(std::memory_order_acquire) == 0; }

  template <typename Each>
  void work(size_t thread, Each& each) {
    for (size_t i = 0; i < ranges_.size(); ++i) {
      Range& range = ranges_[(thread + i) % ranges_.size()];
      for (int64_t unit; (unit = range.next.fetch_add(1)) < range.end;) {
        each(unit);
        left_.fetch_sub(1, std::memory_order_release);
      }
    }
  }

 private:
  struct alignas(kLine) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Range> ranges_;
  std::atomic<int64_t> left_;
};

// Calls `make()(unit)` for every unit below `units`, on `threads` threads; each makes its own.
// `make` is kept until the last thread has found that nothing is left: it must own what it refers to,
// while what it makes is only called before this returns.
template <typename Make>
void share(ffi::ThreadPool pool, int64_t units, int64_t threads, Make make) {
  struct Job {
    Job(int64_t units, int64_t threads, Make make) : units(units, threads), make(std::move(make)) {}
    Units units;
    Make make;
  };
  auto job = std::make_shared<Job>(units, threads, std::move(make));
  auto run = [job](size_t thread) {
    if (job->units.done()) return;
    auto each = job->make();
    job->units.work(thread, each);
  };
  for (size_t i = 1; i < job->units.threads(); ++i) pool.Schedule([run, i] { run(i); });
  run(0);
  // What is left is in the hands of threads that run: one that starts now finds nothing to do.
  for (int spins = 0; !job->units.done(); ++spins) {
    if (spins > 10000) std::this_thread::yield();
  }
}

}  // namespace
