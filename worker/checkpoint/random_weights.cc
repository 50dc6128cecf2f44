// SPDX-License-Identifier: Apache-2.0
#include <sys/mman.h>
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/status_macros.h"
#include "worker/checkpoint/prefault.h"
#include "worker/checkpoint/tensor_provider.h"
#include "worker/checkpoint/weights.h"

namespace strait {
namespace {

constexpr uint64_t kTableSize = 4096;    // distinct values of a tensor
constexpr uint64_t kChunk = 1 << 20;     // elements that one thread fills at a time; divisible by 4
constexpr uint64_t kTensorAlign = 64;    // bytes
constexpr uint64_t kHugePage = 2 << 20;  // bytes
constexpr double kHeadGain = 2.5;  // logits with this standard deviation: neither flat nor one-hot
constexpr float kCorrectionBias = 0.02f;  // standard deviation
constexpr float kFp8Deviation = 64.0f;  // codes' standard deviation; the widest is 3.46 times that

uint64_t Mix(uint64_t x) {  // splitmix64's finalizer
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

// Deviation 1, mean exactly 0: sums of four 16-bit uniforms, in pairs of opposite sign. Integers
// and one exactly rounded division, so every machine has the same table.
const std::array<float, kTableSize>& UnitTable() {
  static const std::array<float, kTableSize> table = [] {
    std::array<float, kTableSize> t;
    for (uint64_t i = 0; i < kTableSize; i += 2) {
      const uint64_t bits = Mix(i + 0x9e3779b97f4a7c15u);
      const int64_t sum = static_cast<int64_t>((bits & 0xffff) + (bits >> 16 & 0xffff) +
                                               (bits >> 32 & 0xffff) + (bits >> 48));
      // A sum's deviation is 65536 * sqrt(4 / 12).
      t[i] = static_cast<float>(static_cast<double>(sum - 131070) / 37837.2270);
      t[i + 1] = -t[i];
    }
    return t;
  }();
  return table;
}

uint16_t ToBf16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// REQUIRES: |value| < 65504. Rounds by the float unit: adding a power of two leaves 10 mantissa
// bits.
uint16_t ToHalf(float value) {
  const uint16_t sign = static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 31 << 15);
  const float magnitude = std::fabs(value);
  if (magnitude < 0x1p-14f) return sign | static_cast<uint16_t>(std::lrint(magnitude * 0x1p24f));
  const uint32_t bits = std::bit_cast<uint32_t>(magnitude);
  return sign | static_cast<uint16_t>((bits + 0xfff + (bits >> 13 & 1) - (112u << 23)) >> 13);
}

// REQUIRES: |value| <= 448.
uint8_t ToE4m3(float value) {
  const uint8_t sign = static_cast<uint8_t>(std::bit_cast<uint32_t>(value) >> 31 << 7);
  const float magnitude = std::fabs(value);
  if (magnitude < 0x1p-6f) return sign | static_cast<uint8_t>(std::lrint(magnitude * 0x1p9f));
  const uint32_t bits = std::bit_cast<uint32_t>(magnitude);
  return sign | static_cast<uint8_t>((bits + 0x7ffff + (bits >> 20 & 1) - (120u << 23)) >> 20);
}

// Elements [begin, end) of a tensor; element i is lane i % 4 of the hash of i / 4.
// REQUIRES: begin % 4 == 0.
template <class T>
void FillRange(T* data, const std::array<T, kTableSize>& table, uint64_t key, uint64_t begin,
               uint64_t end) {
  const auto bits_of = [&](uint64_t i) { return Mix(key + (i / 4 + 1) * 0x9e3779b97f4a7c15u); };
  const uint64_t whole = begin + (end - begin) / 4 * 4;
  for (uint64_t i = begin; i < whole; i += 4) {
    const uint64_t bits = bits_of(i);
    data[i] = table[bits & (kTableSize - 1)];
    data[i + 1] = table[bits >> 16 & (kTableSize - 1)];
    data[i + 2] = table[bits >> 32 & (kTableSize - 1)];
    data[i + 3] = table[bits >> 48 & (kTableSize - 1)];
  }
  for (uint64_t i = whole; i < end; ++i) {
    data[i] = table[bits_of(whole) >> (16 * (i - whole)) & (kTableSize - 1)];
  }
}

// One tensor to be filled.
struct Job {
  void* data;
  WeightType type;
  uint64_t count;
  uint64_t key;
  float deviation;  // of what is stored
};

template <class T, class Convert>
void RunJobAs(const Job& job, uint64_t begin, uint64_t end, Convert convert) {
  std::array<T, kTableSize> table;
  const auto& unit = UnitTable();
  for (uint64_t i = 0; i < kTableSize; ++i) table[i] = convert(unit[i] * job.deviation);
  FillRange(static_cast<T*>(job.data), table, job.key, begin, end);
}

void RunJob(const Job& job, uint64_t begin, uint64_t end) {
  switch (job.type) {
    case WeightType::kFp32:
      return RunJobAs<float>(job, begin, end, [](float v) { return v; });
    case WeightType::kBf16:
      return RunJobAs<uint16_t>(job, begin, end, ToBf16);
    case WeightType::kFp16:
      return RunJobAs<uint16_t>(job, begin, end, ToHalf);
    case WeightType::kFp8E4m3:
      return RunJobAs<uint8_t>(job, begin, end, ToE4m3);
  }
}

// Anonymous memory for one load, in huge pages where the system gives them.
class Arena {
 public:
  static absl::StatusOr<std::shared_ptr<Arena>> Create(uint64_t bytes) {
    bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    void* data = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) {
      return absl::ResourceExhaustedError(
          absl::StrCat("random weights: ", bytes,
                       " bytes of memory cannot be had; give the worker fewer layers"));
    }
    (void)madvise(data, bytes, MADV_HUGEPAGE);
    return std::shared_ptr<Arena>(new Arena(static_cast<std::byte*>(data), bytes));
  }
  ~Arena() { munmap(data_, bytes_); }
  Arena(const Arena&) = delete;
  Arena& operator=(const Arena&) = delete;

  void* Take(uint64_t bytes) {
    void* taken = data_ + used_;
    used_ += (bytes + kTensorAlign - 1) / kTensorAlign * kTensorAlign;
    STRAIT_CHECK(used_ <= bytes_, "random weights outgrow LayerWeightBytes");
    return taken;
  }

 private:
  Arena(std::byte* data, uint64_t bytes) : data_(data), bytes_(bytes) {}
  std::byte* const data_;
  const uint64_t bytes_;
  uint64_t used_ = 0;
};

class RandomProvider final : public TensorProvider {
 public:
  RandomProvider(const ModelConfig& config, uint64_t seed, uint32_t num_threads,
                 std::shared_ptr<Arena> arena)
      : config_(config), seed_(seed), num_threads_(num_threads), arena_(std::move(arena)) {}

  absl::StatusOr<WeightMatrix> Matrix(const std::string& name, uint32_t rows, uint32_t cols,
                                      TensorRole role) override {
    const bool fp8 =
        role == TensorRole::kLinear && config_.quantization == Quantization::kFp8Block128;
    WeightMatrix m{nullptr, nullptr, fp8 ? WeightType::kFp8E4m3 : PlainType(), rows, cols};
    const uint64_t count = uint64_t{rows} * cols;
    void* data = arena_->Take(count * static_cast<uint64_t>(WeightElementBytes(m.type)));
    m.data = data;
    const float deviation = Deviation(role, cols);
    if (fp8) {
      const uint64_t blocks =
          uint64_t{(rows + kFp8Block - 1) / kFp8Block} * ((cols + kFp8Block - 1) / kFp8Block);
      auto* scales = static_cast<float*>(arena_->Take(blocks * sizeof(float)));
      std::fill_n(scales, blocks, deviation / kFp8Deviation);
      m.scale_inv = scales;
    }
    jobs_.push_back({data, m.type, count, Key(name), fp8 ? kFp8Deviation : deviation});
    return m;
  }

  absl::StatusOr<VectorView> Vector(const std::string& name, uint32_t size,
                                    TensorRole role) override {
    auto* data = static_cast<float*>(arena_->Take(size * sizeof(float)));
    if (role == TensorRole::kNorm) {
      std::fill_n(data, size, 1.0f);
    } else {
      jobs_.push_back({data, WeightType::kFp32, size, Key(name), kCorrectionBias});
    }
    return VectorView{data, size};
  }

  absl::StatusOr<std::shared_ptr<const void>> Finish() override {
    struct Part {
      const Job* job;
      uint64_t begin;
    };
    std::vector<Part> parts;
    for (const Job& job : jobs_) {
      for (uint64_t begin = 0; begin < job.count; begin += kChunk) parts.push_back({&job, begin});
    }
    ParallelFor(parts.size(), num_threads_,
                [&](uint64_t i) {
                  const Part& part = parts[i];
                  RunJob(*part.job, part.begin, std::min(part.begin + kChunk, part.job->count));
                },
                {});
    return std::shared_ptr<const void>(std::move(arena_));
  }

 private:
  WeightType PlainType() const {
    switch (config_.dtype) {
      case DType::kF32:
        return WeightType::kFp32;
      case DType::kF16:
        return WeightType::kFp16;
      case DType::kBf16:
        break;
    }
    return WeightType::kBf16;
  }

  // Rows of about unit length keep a normed input's deviation.
  float Deviation(TensorRole role, uint32_t fan_in) const {
    const double unit = 1.0 / std::sqrt(static_cast<double>(fan_in));
    const bool head = role == TensorRole::kHead ||
                      (role == TensorRole::kEmbedding && config_.tie_word_embeddings);
    if (head) return static_cast<float>(kHeadGain * unit);
    return role == TensorRole::kEmbedding ? 1.0f : static_cast<float>(unit);
  }

  uint64_t Key(const std::string& name) const {
    return XXH3_64bits_withSeed(name.data(), name.size(), seed_);
  }

  const ModelConfig& config_;
  const uint64_t seed_;
  const uint32_t num_threads_;
  std::shared_ptr<Arena> arena_;
  std::vector<Job> jobs_;
};

class RandomSource final : public WeightSource {
 public:
  RandomSource(const ModelConfig& config, uint64_t seed, uint32_t num_threads)
      : config_(config), seed_(seed), num_threads_(num_threads) {}

  const ModelConfig& config() const override { return config_; }
  absl::StatusOr<LayerWeights> LoadLayer(LayerIndex layer) override {
    STRAIT_CHECK(layer < config_.num_hidden_layers);
    STRAIT_ASSIGN_OR_RETURN(RandomProvider provider, Provider(LayerWeightBytes(config_, layer)));
    return AssembleLayer(config_, layer, provider);
  }
  absl::StatusOr<EmbeddingWeights> LoadEmbedding() override {
    STRAIT_ASSIGN_OR_RETURN(RandomProvider provider, Provider(EmbeddingBytes(config_)));
    return AssembleEmbedding(config_, provider);
  }
  absl::StatusOr<HeadWeights> LoadHead() override {
    STRAIT_ASSIGN_OR_RETURN(RandomProvider provider, Provider(HeadBytes(config_)));
    return AssembleHead(config_, provider);
  }

 private:
  absl::StatusOr<RandomProvider> Provider(uint64_t bytes) const {
    // Three matrices an expert, each with scales, and fewer than 32 other tensors.
    const uint64_t tensors = 6 * (uint64_t{config_.n_routed_experts} + 1) + 32;
    STRAIT_ASSIGN_OR_RETURN(std::shared_ptr<Arena> arena,
                            Arena::Create(bytes + tensors * kTensorAlign));
    return RandomProvider(config_, seed_, num_threads_, std::move(arena));
  }

  const ModelConfig config_;
  const uint64_t seed_;
  const uint32_t num_threads_;
};

}  // namespace

std::unique_ptr<WeightSource> MakeRandomWeights(const ModelConfig& config, uint64_t seed,
                                                uint32_t num_threads) {
  return std::make_unique<RandomSource>(config, seed, num_threads);
}

}  // namespace strait
