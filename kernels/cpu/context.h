// SPDX-License-Identifier: Apache-2.0
//
// Context carries what every CPU kernel needs: threads, an instruction set, scratch memory.
//
// Owns:    the thread pool and scratch.
// Thread:  one kernel call at a time per context.
// Errors:  Create: InvalidArgument, FailedPrecondition (see simd_level.h).
// Limits:  kMaxThreads threads.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/cpu/simd_level.h"
#include "kernels/cpu/thread_pool.h"

namespace strait::cpu {

struct LevelTable;  // one level's compiled kernels (kernels/cpu/level.h)

struct ContextOptions {
  int num_threads = 1;            // the caller's thread included
  std::optional<SimdLevel> simd;  // unset: STRAIT_SIMD, else the widest available
};

class Context {
 public:
  static absl::StatusOr<std::unique_ptr<Context>> Create(const ContextOptions& options);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  SimdLevel simd_level() const { return level_; }
  int num_threads() const { return pool_.num_threads(); }
  ThreadPool& pool() { return pool_; }
  const LevelTable& table() const { return *table_; }

  // Scratch of at least `count` floats for one thread of the pool (or kShared), 64-byte aligned.
  // Valid until the next call for the same slot; contents are undefined.
  static constexpr int kShared = -1;
  float* Scratch(int thread_index, size_t count);

 private:
  struct Buffer;
  Context(SimdLevel level, const LevelTable* table, int num_threads);

  const SimdLevel level_;
  const LevelTable* const table_;
  ThreadPool pool_;
  std::vector<Buffer> scratch_;  // [num_threads + 1], the last one shared
};

}  // namespace strait::cpu
