// SPDX-License-Identifier: Apache-2.0
#include "kernels/cpu/context.h"

#include <new>
#include <string>

#include "absl/status/status.h"
#include "kernels/cpu/level.h"
#include "proto/base/check.h"

namespace strait::cpu {
namespace {

constexpr std::align_val_t kAlignment{64};

const LevelTable* TableOf(SimdLevel level) {
  switch (level) {
    case SimdLevel::kPortable:
      return &kPortableTable;
#if defined(STRAIT_X86)
    case SimdLevel::kAvx2:
      return &kAvx2Table;
    case SimdLevel::kAvx512:
      return &kAvx512Table;
#else
    case SimdLevel::kAvx2:
    case SimdLevel::kAvx512:
      break;
#endif
  }
  STRAIT_CHECK(false, "a level that is not compiled in");
  return nullptr;
}

}  // namespace

struct Context::Buffer {
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept : data(other.data), size(other.size) { other.data = nullptr; }
  ~Buffer() { ::operator delete(data, kAlignment); }

  float* data = nullptr;
  size_t size = 0;
};

Context::Context(SimdLevel level, const LevelTable* table, int num_threads)
    : level_(level), table_(table), pool_(num_threads) {
  scratch_.resize(static_cast<size_t>(num_threads) + 1);
}

Context::~Context() = default;

absl::StatusOr<std::unique_ptr<Context>> Context::Create(const ContextOptions& options) {
  if (options.num_threads < 1 || options.num_threads > kMaxThreads) {
    return absl::InvalidArgumentError("a CPU context has 1 to " + std::to_string(kMaxThreads) +
                                      " threads, not " + std::to_string(options.num_threads));
  }
  absl::StatusOr<SimdLevel> level = ResolveSimdLevel(options.simd);
  if (!level.ok()) return level.status();
  return std::unique_ptr<Context>(new Context(*level, TableOf(*level), options.num_threads));
}

float* Context::Scratch(int thread_index, size_t count) {
  const size_t slot =
      thread_index == kShared ? scratch_.size() - 1 : static_cast<size_t>(thread_index);
  STRAIT_CHECK(slot < scratch_.size());
  Buffer& buffer = scratch_[slot];
  if (buffer.size < count) {
    ::operator delete(buffer.data, kAlignment);
    buffer.data = nullptr;
    buffer.size = 0;
    buffer.data = static_cast<float*>(::operator new(count * sizeof(float), kAlignment));
    buffer.size = count;
  }
  return buffer.data;
}

}  // namespace strait::cpu
