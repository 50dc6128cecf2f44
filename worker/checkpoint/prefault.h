// SPDX-License-Identifier: Apache-2.0
//
// Brings the pages of matrices into memory, so that the first step does not wait for a disk.
//
// Thread:  returns when all pages are there; `progress` is called from the calling thread only.
// Why:     several threads, because one thread's page faults do not keep a disk busy.
#pragma once

#include <cstdint>
#include <functional>

#include "absl/types/span.h"
#include "kernels/weight.h"

namespace strait {

// `progress(bytes touched so far)`; it only grows.
void TouchPages(absl::Span<const WeightMatrix> matrices, uint32_t num_threads,
                const std::function<void(uint64_t)>& progress);

// Calls work(index) for every index below `count`, by `num_threads` threads that take the next free
// index; the caller is one of them and, between its own, calls `between()` (which may be empty).
void ParallelFor(uint64_t count, uint32_t num_threads, const std::function<void(uint64_t)>& work,
                 const std::function<void()>& between);

}  // namespace strait
