// SPDX-License-Identifier: Apache-2.0
#include "worker/checkpoint/prefault.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

namespace strait {
namespace {

constexpr uint64_t kChunkBytes = 8 << 20;

void Touch(const std::byte* begin, uint64_t bytes) {
  static const uintptr_t kPage = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = reinterpret_cast<uintptr_t>(begin) & ~(kPage - 1);
  const uintptr_t end = reinterpret_cast<uintptr_t>(begin) + bytes;
#ifdef MADV_POPULATE_READ
  if (madvise(reinterpret_cast<void*>(first), end - first, MADV_POPULATE_READ) == 0) return;
#endif
  // An older kernel: read one byte of each page, within the matrix only.
  (void)madvise(reinterpret_cast<void*>(first), end - first, MADV_WILLNEED);
  const volatile std::byte* bytes_of = begin;
  for (uint64_t offset = 0; offset < bytes; offset += kPage) (void)bytes_of[offset];
  (void)bytes_of[bytes - 1];
}

}  // namespace

void ParallelFor(uint64_t count, uint32_t num_threads, const std::function<void(uint64_t)>& work,
                 const std::function<void()>& between) {
  std::atomic<uint64_t> next = 0;
  const auto run = [&](const std::function<void()>& after) {
    for (uint64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      work(i);
      if (after) after();
    }
  };
  std::vector<std::thread> helpers;
  const uint64_t wanted = std::min<uint64_t>(std::max(num_threads, 1u), count);
  for (uint64_t t = 1; t < wanted; ++t) helpers.emplace_back([&] { run({}); });
  run(between);
  for (std::thread& helper : helpers) helper.join();
}

void TouchPages(absl::Span<const WeightMatrix> matrices, uint32_t num_threads,
                const std::function<void(uint64_t)>& progress) {
  struct Chunk {
    const std::byte* begin;
    uint64_t bytes;
  };
  std::vector<Chunk> chunks;
  for (const WeightMatrix& m : matrices) {
    const auto* data = static_cast<const std::byte*>(m.data);
    const uint64_t bytes = static_cast<uint64_t>(m.rows * m.cols * WeightElementBytes(m.type));
    for (uint64_t offset = 0; offset < bytes; offset += kChunkBytes) {
      chunks.push_back({data + offset, std::min(kChunkBytes, bytes - offset)});
    }
  }
  std::atomic<uint64_t> touched = 0;
  ParallelFor(
      chunks.size(), num_threads,
      [&](uint64_t i) {
        Touch(chunks[i].begin, chunks[i].bytes);
        touched.fetch_add(chunks[i].bytes, std::memory_order_relaxed);
      },
      [&] { progress(touched.load(std::memory_order_relaxed)); });
}

}  // namespace strait
