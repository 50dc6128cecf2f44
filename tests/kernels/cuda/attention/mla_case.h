// SPDX-License-Identifier: Apache-2.0
//
// One batch of latent attention as the GPU tests pose it: cache and queries on both sides, the run
// on the device, what the float64 twin says.
//
// Why:     rows that nobody wrote hold NaN, page tables end in wild ids, slabs are longer than
//          their rows and q has room between its rows: what is read beyond shows.
#pragma once

#include <cuda_fp8.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "kernels/cuda/attention/mla.h"
#include "kernels/reference/kernels.h"
#include "tests/kernels/cuda/gpu_test.h"

namespace strait::cuda::mla_test {

using gpu_test::Bf16;
using gpu_test::Buffer;

// q and rows are bf16 on both sides, products fp32: what is left is the rounding of the weights to
// bf16 (2^-9 relative each, independent) and of the output: 2e-3 was the peer's error. fp8 rows add
// one rounding of code * scale to bf16.
inline constexpr double kTolerance = 5e-3;

struct Shape {
  int32_t heads = 16;
  int32_t rank = 512;
  int32_t rope = 64;
  RowFormat format = RowFormat::kBf16;
  MlaPath path = MlaPath::kHopper;
  bool deterministic = false;
  bool out_fp32 = false;
  bool block_lse = false;
  bool positions = false;            // blocks say where they begin; every third block is missing
  int32_t tile_rows = kMlaTileRows;  // MlaParams::tile_rows
  float scale_spread = 4;            // fp8: a scale lies between 0.005 and that many times it
  float query_factor = 1;            // of q, a power of two; the softmax scale makes up for it
  bool units = false;                // the pool is units of 64 columns (mla.h), scattered
};

struct Tokens {
  int32_t num_tokens = 1;
  int32_t first_position = 0;
  bool empty = false;  // no cache at all
};

template <class Function>
inline void InParallel(int64_t count, const Function& function) {
  std::atomic<int64_t> next{0};
  std::vector<std::thread> threads;
  for (unsigned i = 0; i < std::max(1u, std::thread::hardware_concurrency()); ++i) {
    threads.emplace_back([&] {
      for (int64_t at = next++; at < count; at = next++) function(at);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

// One batch: its cache and queries on both sides, and what the twin says.
class Case {
 public:
  Case(kernel_test::Rng& rng, const Shape& shape, std::vector<Tokens> tokens)
      : shape_(shape), tokens_(std::move(tokens)) {
    row_bytes_ = RowBytes(shape.format, shape.rank, shape.rope);
    block_bytes_ = 64 * row_bytes_ + 64;  // slabs may be longer than their rows
    for (const Tokens& t : tokens_) {
      num_tokens_ += t.num_tokens;
      rows_.push_back(t.empty ? 0 : t.first_position + t.num_tokens);
    }
    FillPool(rng);
    const int64_t pairs = int64_t{num_tokens_} * shape.heads;
    q_latent_ = gpu_test::RoundedToBf16(kernel_test::RandomFloats(rng, pairs * shape.rank));
    q_rope_ = gpu_test::RoundedToBf16(kernel_test::RandomFloats(rng, pairs * shape.rope));
    for (std::vector<float>* q : {&q_latent_, &q_rope_}) {
      for (float& value : *q) value *= shape.query_factor;
    }
  }

  // A score is about normal(0, 1.3). bf16: fp32 sums only. fp8: each code * scale is rounded to
  // bf16, at most 2^-9 off: 1.5e-3 on a score in the mean square, eight times that allowed.
  // The kernels that widen in registers do not; but for more than kMlaFewRows q is the sum of two codes,
  // 7e-4 on a score in the mean square, six times that allowed.
  double LseTolerance() const {
    const bool tiles =
        shape_.tile_rows > kMlaHalfTileRows || shape_.block_lse || shape_.path != MlaPath::kHopper;
    if (shape_.format != RowFormat::kFp8) return 2e-3;
    return tiles ? 1.2e-2 : shape_.tile_rows > kMlaFewRows ? 4.5e-3 : 2e-3;
  }
  Shape& shape() { return shape_; }
  int64_t pairs() const { return int64_t{num_tokens_} * shape_.heads; }
  float scale() const {
    return 1.3f / std::sqrt(static_cast<float>(shape_.rank + shape_.rope)) / shape_.query_factor;
  }

  // The same rows and queries, each block nine units at random places of a pool of its own.
  Case InUnits(kernel_test::Rng& rng) const {
    Case other = *this;
    other.shape_.units = true;
    std::vector<uint32_t> ids(static_cast<size_t>((num_blocks_ + 2) * kMlaBlockUnits));
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<uint32_t>(i);
    std::shuffle(ids.begin(), ids.end(), rng);
    other.num_units_ = static_cast<int64_t>(ids.size());
    other.units_.assign(ids.size() * size_t{kMlaUnitBytes}, std::byte{0xff});  // NaN
    size_t next = 0;
    for (const std::vector<uint32_t>& pages : pages_) {
      other.unit_pages_.emplace_back();
      for (const uint32_t page : pages) {
        for (int64_t unit = 0; unit < kMlaBlockUnits; ++unit) {
          const uint32_t id = ids[next++];
          other.unit_pages_.back().push_back(id);
          for (int64_t row = 0; row < 64; ++row) {
            std::memcpy(other.units_.data() + id * kMlaUnitBytes + row * 128,
                        pool_.data() + page * block_bytes_ + row * row_bytes_ + unit * 128, 128);
          }
        }
      }
    }
    return other;
  }

  // The same of fp8 rows, their numbers rounded to bf16.
  Case InBf16() const {
    Case other = *this;
    other.shape_.format = RowFormat::kBf16;
    other.row_bytes_ = RowBytes(RowFormat::kBf16, shape_.rank, shape_.rope);
    other.block_bytes_ = 64 * other.row_bytes_ + 64;
    other.pool_.assign(static_cast<size_t>(num_blocks_ * other.block_bytes_), std::byte{0xff});
    const int64_t width = shape_.rank + shape_.rope;
    for (int64_t i = 0; i < num_blocks_ * 64; ++i) {
      const std::vector<float> row(wide_.begin() + i * width, wide_.begin() + (i + 1) * width);
      const std::vector<Bf16> rounded = gpu_test::ToBf16(row);
      std::memcpy(other.pool_.data() + i / 64 * other.block_bytes_ + i % 64 * other.row_bytes_,
                  rounded.data(), static_cast<size_t>(other.row_bytes_));
    }
    return other;
  }

  // Takes only sequence `index` with its queries, on the same pool.
  Case Alone(size_t index) const {
    Case one = *this;
    int64_t first = 0;
    for (size_t s = 0; s < index; ++s) first += tokens_[s].num_tokens;
    const int64_t count = tokens_[index].num_tokens;
    const auto cut = [&](std::vector<float>& values, int64_t width) {
      values = std::vector<float>(values.begin() + first * width,
                                  values.begin() + (first + count) * width);
    };
    cut(one.q_latent_, int64_t{shape_.heads} * shape_.rank);
    cut(one.q_rope_, int64_t{shape_.heads} * shape_.rope);
    one.tokens_ = {tokens_[index]};
    one.rows_ = {rows_[index]};
    one.pages_ = {pages_[index]};
    one.block_positions_ = {block_positions_[index]};
    one.num_tokens_ = static_cast<int32_t>(count);
    return one;
  }

  struct Result {
    std::vector<float> out;
    std::vector<float> lse;
    std::vector<float> block_lse;
    int64_t block_lse_stride = 0;
  };

  // wanted_partials, of a deterministic case: not 0: in parts that have so many, or the least.
  Result Run(int32_t grid = 0, int32_t wanted_partials = 0) const {
    if (grid == 0) {
      EXPECT_EQ(cudaDeviceGetAttribute(&grid, cudaDevAttrMultiProcessorCount, 0), cudaSuccess);
    }
    std::vector<MlaSequence> sequences;
    int32_t token = 0;
    int32_t max_rows = 1;
    for (size_t s = 0; s < tokens_.size(); ++s) {
      const bool follow = !tokens_[s].empty && !shape_.positions;
      sequences.push_back({static_cast<int32_t>(s), token, tokens_[s].num_tokens,
                           tokens_[s].first_position, follow ? -1 : rows_[s],
                           follow ? tokens_[s].first_position : 0});
      token += tokens_[s].num_tokens;
      max_rows = std::max(max_rows, rows_[s]);
    }
    const int32_t num_sequences = static_cast<int32_t>(sequences.size());
    const MlaPlanOptions options = {.num_heads = shape_.heads,
                                    .deterministic = shape_.deterministic};
    MlaPlanLimits limits =
        MaxMlaPlan(grid, num_sequences, num_tokens_, shape_.heads, max_rows, shape_.deterministic);
    MlaParts parts = {sequences, {0, num_sequences}};
    if (wanted_partials > 0) {
      limits =
          MaxMlaParts(grid, num_sequences, num_tokens_, shape_.heads, max_rows, wanted_partials)
              .plan;
      CutMlaBatch(sequences.data(), num_sequences, options, limits, &parts);
      EXPECT_GT(parts.begin.size(), 2u) << "the case was meant to need several parts";
    }
    std::vector<std::byte> plan_bytes;
    std::vector<int64_t> plan_begins;
    for (size_t part = 0; part + 1 < parts.begin.size(); ++part) {
      MlaPlan plan;
      EXPECT_TRUE(PlanMla(&parts.sequences[static_cast<size_t>(parts.begin[part])],
                          parts.begin[part + 1] - parts.begin[part], options, limits, &plan));
      plan_begins.push_back(static_cast<int64_t>(plan_bytes.size()));
      plan_bytes.resize(plan_bytes.size() + static_cast<size_t>(MlaPlanUsedBytes(plan)));
      WriteMlaPlan(plan, plan_bytes.data() + plan_begins.back());
    }
    const Buffer<std::byte> device_plan(plan_bytes);

    std::vector<std::unique_ptr<Buffer<uint32_t>>> tables;
    std::vector<std::unique_ptr<Buffer<int32_t>>> positions;
    std::vector<MlaSegment> segments;
    for (size_t s = 0; s < tokens_.size(); ++s) {
      std::vector<uint32_t> table = shape_.units ? unit_pages_[s] : pages_[s];
      table.resize(table.size() + 40, 0xdeadbeefu);
      tables.push_back(std::make_unique<Buffer<uint32_t>>(table));
      std::vector<int32_t> first = block_positions_[s];
      first.resize(first.size() + 3, -7);
      positions.push_back(std::make_unique<Buffer<int32_t>>(first));
      MlaSegment segment;
      segment.page_table = tables.back()->data();
      segment.block_positions = shape_.positions ? positions.back()->data() : nullptr;
      segment.num_rows =
          shape_.positions || s % 2 == 0 ? rows_[s] : std::numeric_limits<int32_t>::max();
      if (tokens_[s].empty) segment.num_rows = 0;
      segment.rank = shape_.rank;
      segment.format = shape_.format;
      segments.push_back(segment);
    }
    const Buffer<MlaSegment> device_segments(segments);
    const Buffer<std::byte> pool(shape_.units ? units_ : pool_);
    // q side by side with room between rows, as a fused projection leaves it
    const int64_t stride = shape_.rank + shape_.rope + 8;
    std::vector<float> q(static_cast<size_t>(pairs() * stride), NAN);
    for (int64_t i = 0; i < pairs(); ++i) {
      std::copy_n(q_latent_.begin() + i * shape_.rank, shape_.rank, q.begin() + i * stride);
      std::copy_n(q_rope_.begin() + i * shape_.rope, shape_.rope,
                  q.begin() + i * stride + shape_.rank);
    }
    const Buffer<Bf16> device_q(gpu_test::ToBf16(q));
    const int64_t partials = std::max(1, limits.max_partials);
    const Buffer<float> partial_out(partials * 64 * shape_.rank);
    const Buffer<float> partial_lse(partials * 64);
    const Buffer<float> out_fp32(pairs() * shape_.rank);
    const Buffer<Bf16> out_bf16(pairs() * shape_.rank);
    const Buffer<float> lse(pairs());
    Result result;
    result.block_lse_stride = (max_rows + 63) / 64 + 1;
    const Buffer<float> block_lse(pairs() * result.block_lse_stride);

    MlaParams p;
    p.q_latent = device_q.data();
    p.q_rope = device_q.data() + shape_.rank;
    p.q_latent_stride = p.q_rope_stride = stride;
    p.segments = device_segments.data();
    p.blocks = pool.data();
    p.block_bytes = block_bytes_;
    p.units = shape_.units;
    if (shape_.units) {
      EXPECT_EQ(MakeMlaUnitMap(pool.data(), num_units_, false, &p.pool_map), cudaSuccess);
    } else if (shape_.path == MlaPath::kHopper && shape_.format == RowFormat::kBf16) {
      EXPECT_EQ(MakeMlaPoolMap(pool.data(), num_blocks_, block_bytes_, &p.pool_map), cudaSuccess);
    }
    p.partial_out = partial_out.data();
    p.partial_lse = partial_lse.data();
    p.out = shape_.out_fp32 ? static_cast<void*>(out_fp32.data()) : out_bf16.data();
    p.lse = lse.data();
    p.block_lse = shape_.block_lse ? block_lse.data() : nullptr;
    p.block_lse_stride = result.block_lse_stride;
    p.softmax_scale = scale();
    p.num_heads = shape_.heads;
    p.rank = shape_.rank;
    p.rope = shape_.rope;
    p.format = shape_.format;
    p.out_fp32 = shape_.out_fp32;
    p.path = shape_.path;
    p.tile_rows = shape_.tile_rows;
    EXPECT_EQ(PrepareMla(), cudaSuccess);
    for (const int64_t begin : plan_begins) {
      p.plan = ViewMlaPlan(limits, device_plan.data() + begin);
      EXPECT_EQ(LaunchMla(p, nullptr), cudaSuccess);
    }
    result.out = shape_.out_fp32 ? out_fp32.Get() : gpu_test::ToFloat(out_bf16.Get());
    result.lse = lse.Get();
    if (shape_.block_lse) result.block_lse = block_lse.Get();
    return result;
  }

  // Against the twin, pair by pair in parallel.
  void Expect(const Result& result, double tolerance = kTolerance) const {
    std::vector<int32_t> sequence_of(static_cast<size_t>(num_tokens_));
    std::vector<int32_t> position_of(static_cast<size_t>(num_tokens_));
    for (size_t s = 0, t = 0; s < tokens_.size(); ++s) {
      for (int32_t i = 0; i < tokens_[s].num_tokens; ++i, ++t) {
        sequence_of[t] = static_cast<int32_t>(s);
        position_of[t] = tokens_[s].first_position + i;
      }
    }
    const int64_t rank = shape_.rank;
    std::vector<float> out(static_cast<size_t>(pairs() * rank));
    std::vector<float> lse(static_cast<size_t>(pairs()));
    std::atomic<int> wrong_block_lse{0};
    InParallel(pairs(), [&](int64_t pair) {
      const size_t token = static_cast<size_t>(pair / shape_.heads);
      const size_t s = static_cast<size_t>(sequence_of[token]);
      // Rows that this token sees, in order: block, row.
      int32_t seen = std::min(rows_[s], position_of[token] + 1);
      if (shape_.positions) {
        seen = 0;
        for (int32_t row = 0; row < rows_[s]; ++row) {
          seen += block_positions_[s][row / 64] + row % 64 <= position_of[token];
        }
      }
      std::vector<double> scores(static_cast<size_t>(seen));
      double max = -INFINITY;
      for (int32_t row = 0; row < seen; ++row) {
        const float* values = Row(s, row);
        double score = 0;
        for (int64_t i = 0; i < rank; ++i) score += double{q_latent_[pair * rank + i]} * values[i];
        for (int64_t i = 0; i < shape_.rope; ++i) {
          score += double{q_rope_[pair * shape_.rope + i]} * values[rank + i];
        }
        scores[row] = score * scale();
        max = std::max(max, scores[row]);
      }
      double sum = 0;
      for (int32_t block = 0; block * 64 < rows_[s]; ++block) {
        double block_sum = 0;
        for (int32_t row = block * 64; row < std::min(seen, block * 64 + 64); ++row) {
          block_sum += std::exp(scores[row] - max);
        }
        sum += block_sum;
        if (!shape_.block_lse) continue;
        const double expected = block_sum > 0 ? max + std::log(block_sum) : -INFINITY;
        const double actual = result.block_lse[pair * result.block_lse_stride + block];
        // a tile's blocks end with its last token's; behind them nothing is written
        const bool right = block_sum > 0 ? std::abs(actual - expected) <= LseTolerance()
                                         : std::isnan(actual) || actual == expected;
        wrong_block_lse += !right;
      }
      lse[pair] = static_cast<float>(sum > 0 ? max + std::log(sum) : -INFINITY);
      if (seen == 0) return;
      strait::MlaParams twin;
      const int32_t last = seen - 1;
      const int32_t zero = 0;
      const uint32_t* table = pages_[s].data();
      twin.q_latent = q_latent_.data() + pair * rank;
      twin.q_rope = q_rope_.data() + pair * shape_.rope;
      twin.positions = &last;
      twin.sequence_index = &zero;
      twin.page_tables = &table;
      twin.blocks = reinterpret_cast<const std::byte*>(wide_.data());
      twin.layout = MakeCacheLayout(RowFormat::kFp32, rank, shape_.rope);
      twin.softmax_scale = scale();
      twin.o_latent = out.data() + pair * rank;
      twin.num_tokens = 1;
      twin.num_heads = 1;
      reference::Mla(twin);
    });
    EXPECT_LT(gpu_test::RelativeError(result.out, out), tolerance);
    for (size_t i = 0; i < lse.size(); ++i) {
      if (std::isinf(lse[i])) {
        EXPECT_EQ(result.lse[i], lse[i]) << i;
        for (int64_t c = 0; c < rank; ++c) EXPECT_EQ(result.out[i * rank + c], 0) << i;
      } else if (!(std::abs(result.lse[i] - lse[i]) <= LseTolerance())) {
        ADD_FAILURE() << "lse of pair " << i << ": " << result.lse[i] << ", not " << lse[i];
        break;
      }
    }
    EXPECT_EQ(wrong_block_lse, 0);
  }

 private:
  const float* Row(size_t s, int32_t row) const {
    const int64_t width = wide_row_bytes() / 4;
    return wide_.data() + (int64_t{pages_[s][row / 64]} * 64 + row % 64) * width;
  }
  int64_t wide_row_bytes() const { return RowBytes(RowFormat::kFp32, shape_.rank, shape_.rope); }

  void FillPool(kernel_test::Rng& rng) {
    int64_t used = 0;
    for (const int32_t rows : rows_) used += (rows + 63) / 64;
    num_blocks_ = used + 3;
    std::vector<uint32_t> ids(static_cast<size_t>(num_blocks_));
    for (size_t i = 0; i < ids.size(); ++i) ids[i] = static_cast<uint32_t>(i);
    std::shuffle(ids.begin(), ids.end(), rng);
    pool_.assign(static_cast<size_t>(num_blocks_ * block_bytes_), std::byte{0xff});  // NaN
    wide_.assign(static_cast<size_t>(num_blocks_ * 64 * wide_row_bytes() / 4), NAN);
    size_t next = 0;
    for (const int32_t rows : rows_) {
      pages_.emplace_back();
      block_positions_.emplace_back();
      for (int32_t block = 0; block * 64 < rows; ++block) {
        pages_.back().push_back(ids[next++]);
        block_positions_.back().push_back(block / 2 * 192 + block % 2 * 64);
      }
      for (int32_t row = 0; row < rows; ++row) FillRow(rng, pages_.back()[row / 64], row % 64);
    }
  }

  void FillRow(kernel_test::Rng& rng, int64_t block, int64_t row) {
    std::byte* to = pool_.data() + block * block_bytes_ + row * row_bytes_;
    float* wide = wide_.data() + (block * 64 + row) * (wide_row_bytes() / 4);
    std::normal_distribution<float> normal;
    const auto put_bf16 = [&](std::byte* at, float* value) {
      const Bf16 rounded = __float2bfloat16(normal(rng));
      std::memcpy(at, &rounded, 2);
      *value = __bfloat162float(rounded);
    };
    if (shape_.format == RowFormat::kBf16) {
      for (int32_t i = 0; i < shape_.rank + shape_.rope; ++i) put_bf16(to + 2 * i, wide + i);
      return;
    }
    std::uniform_real_distribution<float> scales(0, std::log(shape_.scale_spread));
    for (int32_t first = 0; first < shape_.rank; first += 128) {
      const float scale = 0.005f * std::exp(scales(rng));
      std::memcpy(to + ScalesOffset(shape_.rank) + first / 128 * 4, &scale, 4);
      for (int32_t i = first; i < std::min(first + 128, shape_.rank); ++i) {
        __nv_fp8_e4m3 code(normal(rng) / scale);
        std::memcpy(to + i, &code, 1);
        wide[i] = static_cast<float>(code) * scale;
      }
    }
    for (int32_t i = 0; i < shape_.rope; ++i) {
      put_bf16(to + RopeKeyOffset(shape_.format, shape_.rank) + 2 * i, wide + shape_.rank + i);
    }
  }

  Shape shape_;
  std::vector<Tokens> tokens_;
  std::vector<int32_t> rows_;
  std::vector<std::vector<uint32_t>> pages_;
  std::vector<std::vector<int32_t>> block_positions_;
  std::vector<std::byte> pool_;   // as on the device
  std::vector<std::byte> units_;  // where InUnits made them, and their ids, nine a block
  std::vector<std::vector<uint32_t>> unit_pages_;
  std::vector<float> wide_;  // the same numbers in fp32, as the twin reads them
  std::vector<float> q_latent_;
  std::vector<float> q_rope_;
  int64_t row_bytes_ = 0;
  int64_t block_bytes_ = 0;
  int64_t num_blocks_ = 0;
  int64_t num_units_ = 0;
  int32_t num_tokens_ = 0;
};

}  // namespace strait::cuda::mla_test
