// SPDX-License-Identifier: Apache-2.0
//
// Defends: attention of prompts in the expanded form is what float64 says, for ragged batches, any
// number of heads, chunks against a prefix and keys in several spans; neighbours in every buffer and
// rows beyond the last hold NaN. The gather lists the right rows and pads with a piece's last.
#include "kernels/cuda/attention/mha_prefill.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "tests/kernels/cuda/gpu_test.h"

namespace strait::cuda {
namespace {

using gpu_test::Bf16;
using gpu_test::Buffer;

// q, keys and values are bf16 on both sides, sums fp32: what is left is the rounding of weights and
// output to bf16, each at most 2^-9 relative and independent.
constexpr double kTolerance = 5e-3;
constexpr int64_t kCat = 576;  // rope columns of q lie in rows of so many, the state before them
constexpr int32_t kPairColumns = kMhaNope + kMhaValue;

struct Tokens {
  int32_t num_tokens = 1;
  int32_t first_position = 0;
};

class MhaPrefillTest : public gpu_test::GpuTest {
 protected:
  void SetUp() override {
    GpuTest::SetUp();
    if (IsSkipped()) return;
    if (!HasMhaPrefill()) GTEST_SKIP() << "SKIPPED: Hopper's instructions, on another GPU";
    ASSERT_EQ(PrepareMhaPrefill(), cudaSuccess);
  }

  std::vector<float> Random(int64_t count) {
    return gpu_test::RoundedToBf16(kernel_test::RandomFloats(rng_, count));
  }

  // Keys come in spans of span_keys; the batch shares every launch. A score is about
  // normal(0, spread).
  void Check(int32_t heads, const std::vector<Tokens>& batch, int32_t span_keys = 1 << 20,
             float spread = 1.3f);

  kernel_test::Rng rng_{kernel_test::Seed()};
};

void MhaPrefillTest::Check(int32_t heads, const std::vector<Tokens>& batch, int32_t span_keys,
                           float spread) {
  SCOPED_TRACE("heads " + std::to_string(heads) + ", " + std::to_string(batch.size()) +
               " sequences, spans of " + std::to_string(span_keys));
  int32_t tokens = 1;  // one of nobody before the first
  for (const Tokens& t : batch) tokens += t.num_tokens;
  const float scale = spread / std::sqrt(192.0f);
  const std::vector<float> q_nope = Random(int64_t{tokens} * heads * kMhaNope);
  const std::vector<float> q_rope = Random(int64_t{tokens} * heads * kMhaRope);
  // q as a projection leaves it: a head's rope columns, not rotated, behind its others.
  const int64_t q_stride = heads * 192 + 8;
  std::vector<float> q(static_cast<size_t>(tokens * q_stride), NAN);
  std::vector<float> cat(static_cast<size_t>(int64_t{tokens} * heads * kCat), NAN);
  for (int64_t pair = 0; pair < int64_t{tokens} * heads; ++pair) {
    std::copy_n(q_nope.begin() + pair * kMhaNope, kMhaNope,
                q.begin() + pair / heads * q_stride + pair % heads * 192);
    std::copy_n(q_rope.begin() + pair * kMhaRope, kMhaRope, cat.begin() + pair * kCat + 512);
  }
  std::vector<std::vector<float>> pairs;  // of a sequence: [keys, heads, 128 + 128]
  std::vector<std::vector<float>> rope;   // [keys, 64]
  int32_t longest = 0;
  for (const Tokens& t : batch) {
    const int32_t keys = t.first_position + t.num_tokens;
    longest = std::max(longest, keys);
    pairs.push_back(Random(int64_t{keys} * heads * kPairColumns));
    rope.push_back(Random(int64_t{keys} * kMhaRope));
  }

  const Buffer<Bf16> device_q(gpu_test::ToBf16(q));
  const Buffer<Bf16> device_cat(gpu_test::ToBf16(cat));
  const int64_t out_stride = heads * kMhaValue + 16;
  const Buffer<Bf16> out(tokens * out_stride);
  for (int32_t begin = 0; begin < longest; begin += span_keys) {
    std::vector<MhaPiece> pieces;
    std::vector<float> keys;
    std::vector<float> rope_keys;
    int32_t first_token = 1;
    const int64_t row = int64_t{heads} * kPairColumns;
    for (size_t s = 0; s < batch.size(); ++s) {
      const int32_t all = batch[s].first_position + batch[s].num_tokens;
      MhaPiece piece;
      piece.first_token = first_token;
      piece.num_tokens = batch[s].num_tokens;
      piece.first_key = static_cast<int32_t>(rope_keys.size()) / kMhaRope;
      piece.num_keys = std::min(all - begin, span_keys);
      piece.first_position = batch[s].first_position - begin;
      piece.span_position = begin;
      piece.begins = begin == 0;
      piece.ends = begin + span_keys >= all;
      first_token += batch[s].num_tokens;
      if (piece.num_keys <= 0) continue;
      pieces.push_back(piece);
      for (int32_t i = 0; i < MhaKeyRows(piece.num_keys); ++i) {
        const int64_t from = begin + std::min(i, piece.num_keys - 1);
        keys.insert(keys.end(), pairs[s].begin() + from * row, pairs[s].begin() + (from + 1) * row);
        rope_keys.insert(rope_keys.end(), rope[s].begin() + from * kMhaRope,
                         rope[s].begin() + (from + 1) * kMhaRope);
      }
    }
    MhaPrefillParams p;
    p.num_key_rows = pieces.back().first_key + pieces.back().num_keys;
    // Beyond them: NaN.
    std::fill(keys.begin() + p.num_key_rows * row, keys.end(), NAN);
    std::fill(rope_keys.begin() + int64_t{p.num_key_rows} * kMhaRope, rope_keys.end(), NAN);
    const Buffer<Bf16> device_keys(gpu_test::ToBf16(keys));
    const Buffer<Bf16> device_rope(gpu_test::ToBf16(rope_keys));
    p.pieces = pieces.data();
    p.num_pieces = static_cast<int32_t>(pieces.size());
    p.num_tokens = tokens;
    p.num_heads = heads;
    p.q = device_q.data();
    p.q_token_stride = q_stride;
    p.q_head_stride = 192;
    p.q_rope = device_cat.data() + 512;
    p.q_rope_token_stride = heads * kCat;
    p.q_rope_head_stride = kCat;
    p.keys = device_keys.data();
    p.values = device_keys.data() + kMhaNope;
    p.key_row_stride = row;
    p.key_head_stride = kPairColumns;
    p.rope_keys = device_rope.data();
    p.out = out.data();
    p.out_stride = out_stride;
    p.state = reinterpret_cast<float*>(device_cat.data());
    p.state_stride = kCat / 2;
    p.softmax_scale = scale;
    ASSERT_EQ(MhaPrefill(p, nullptr), cudaSuccess);
    ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);
  }

  const std::vector<float> all = gpu_test::ToFloat(out.Get());
  std::vector<float> actual;
  std::vector<float> expected;
  int64_t token = 1;
  for (size_t s = 0; s < batch.size(); ++s) {
    for (int32_t t = 0; t < batch[s].num_tokens; ++t, ++token) {
      const int32_t seen = batch[s].first_position + t + 1;
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t pair = token * heads + h;
        std::vector<double> weights(static_cast<size_t>(seen));
        double max = -INFINITY;
        for (int32_t j = 0; j < seen; ++j) {
          const float* const key = &pairs[s][static_cast<size_t>((j * heads + h) * kPairColumns)];
          double score = 0;
          for (int i = 0; i < kMhaNope; ++i) {
            score += double{q_nope[static_cast<size_t>(pair * kMhaNope + i)]} * key[i];
          }
          for (int i = 0; i < kMhaRope; ++i) {
            score += double{q_rope[static_cast<size_t>(pair * kMhaRope + i)]} *
                     rope[s][static_cast<size_t>(j * kMhaRope + i)];
          }
          weights[static_cast<size_t>(j)] = score * scale;
          max = std::max(max, score * scale);
        }
        std::vector<double> sums(kMhaValue);
        double sum = 0;
        for (int32_t j = 0; j < seen; ++j) {
          const double weight = std::exp(weights[static_cast<size_t>(j)] - max);
          const float* const value =
              &pairs[s][static_cast<size_t>((j * heads + h) * kPairColumns + kMhaNope)];
          for (int i = 0; i < kMhaValue; ++i) sums[static_cast<size_t>(i)] += weight * value[i];
          sum += weight;
        }
        for (int64_t i = 0; i < kMhaValue; ++i) {
          expected.push_back(static_cast<float>(sums[static_cast<size_t>(i)] / sum));
          actual.push_back(all[static_cast<size_t>(token * out_stride + h * kMhaValue + i)]);
        }
      }
    }
  }
  EXPECT_LT(gpu_test::RelativeError(actual, expected), kTolerance);
  // What belongs to nobody is not written.
  for (int64_t i = 0; i < out_stride; ++i) EXPECT_TRUE(std::isnan(all[static_cast<size_t>(i)]));
  for (int64_t t = 1; t < tokens; ++t) {
    EXPECT_TRUE(std::isnan(all[static_cast<size_t>((t + 1) * out_stride - 1)]));
  }
}

TEST_F(MhaPrefillTest, OneTile) {
  STRAIT_TRACE_SEED();
  Check(1, {{128, 0}});
  Check(1, {{1, 0}});
  Check(2, {{65, 0}});
}

TEST_F(MhaPrefillTest, SeveralTilesOfKeys) {
  STRAIT_TRACE_SEED();
  Check(1, {{300, 0}});
  Check(1, {{128, 640}});
}

TEST_F(MhaPrefillTest, ChunksAgainstAPrefix) {
  STRAIT_TRACE_SEED();
  Check(2, {{140, 77}});
  Check(1, {{40, 351}});  // the tile's last keys are beyond what the first group sees
}

TEST_F(MhaPrefillTest, RaggedBatchesOfAllHeadCounts) {
  STRAIT_TRACE_SEED();
  std::uniform_int_distribution<int32_t> any(1, 150);
  Check(3, {{any(rng_), any(rng_)}, {129, 0}, {5, 130}});
  Check(9, {{30, 60}, {70, 1}});
  Check(17, {{20, 3}});
}

TEST_F(MhaPrefillTest, ManyTilesOfManyHeads) {
  STRAIT_TRACE_SEED();
  Check(20, {{300, 0}, {140, 520}});
  Check(2, {{1100, 401}});
}

TEST_F(MhaPrefillTest, KeysInSpans) {
  STRAIT_TRACE_SEED();
  Check(2, {{70, 300}}, 128);
  // A tile's tokens are before the last span; one sequence ends before the other.
  Check(1, {{300, 0}, {40, 100}}, 128);
  Check(1, {{200, 250}, {140, 10}}, 256);
}

TEST_F(MhaPrefillTest, MaximaThatMoveFar) {
  STRAIT_TRACE_SEED();
  // By much more than a factor of 256 from tile to tile, and from span to span.
  Check(1, {{128, 900}, {60, 1000}}, 1 << 20, 40.0f);
  Check(1, {{100, 700}}, 128, 40.0f);
}

TEST_F(MhaPrefillTest, GatherListsRowsAndRopeKeys) {
  STRAIT_TRACE_SEED();
  constexpr int64_t kBlocks = 12;
  const std::vector<float> pool = Random(kBlocks * 64 * kCat);
  const std::vector<std::vector<uint32_t>> pages = {{7, 2, 11, 0xdeadbeef}, {5, 9, 0, 3, 1}};
  const Buffer<uint32_t> first(pages[0]);
  const Buffer<uint32_t> second(pages[1]);
  std::vector<MlaSegment> segments(2);
  segments[0].page_table = first.data();
  segments[1].page_table = second.data();
  const Buffer<MlaSegment> device_segments(segments);
  const Buffer<Bf16> device_pool(gpu_test::ToBf16(pool));
  std::vector<MhaPiece> pieces(2);
  pieces[0].num_keys = 187;
  pieces[0].sequence = 0;
  pieces[1].first_key = 256;
  pieces[1].num_keys = 150;
  pieces[1].span_position = 128;
  pieces[1].sequence = 1;
  const Buffer<int32_t> rows(256 + 256);
  const Buffer<Bf16> rope_keys((256 + 256) * kMhaRope);
  MhaGatherParams p;
  p.pieces = pieces.data();
  p.num_pieces = 2;
  p.segments = device_segments.data();
  p.blocks = reinterpret_cast<const std::byte*>(device_pool.data());
  p.block_bytes = 64 * kCat * 2;
  p.rows = rows.data();
  p.rope_keys = rope_keys.data();
  ASSERT_EQ(MhaGather(p, nullptr), cudaSuccess);
  const std::vector<int32_t> got = rows.Get();
  const std::vector<float> got_rope = gpu_test::ToFloat(rope_keys.Get());
  for (int32_t i = 0; i < 512; ++i) {
    const size_t s = i < 256 ? 0 : 1;
    const int32_t position = s == 0 ? std::min(i, 186) : 128 + std::min(i - 256, 149);
    const int32_t row =
        static_cast<int32_t>(pages[s][static_cast<size_t>(position / 64)]) * 64 + position % 64;
    ASSERT_EQ(got[static_cast<size_t>(i)], row) << i;
    for (int64_t c = 0; c < kMhaRope; ++c) {
      ASSERT_EQ(got_rope[static_cast<size_t>(i * kMhaRope + c)],
                pool[static_cast<size_t>(row * kCat + 512 + c)])
          << i;
    }
  }
}

TEST_F(MhaPrefillTest, WrongShapesAreRefused) {
  constexpr int32_t kTokens = 4;
  constexpr int32_t kKeyRows = kMhaTileKeys + 4;
  const Buffer<Bf16> q(kTokens * kMhaNope);
  const Buffer<Bf16> q_rope(kTokens * kMhaRope);
  const Buffer<Bf16> pairs(kKeyRows * kPairColumns);
  const Buffer<Bf16> rope_keys(kKeyRows * kMhaRope);
  const Buffer<Bf16> out(kTokens * kMhaValue);
  MhaPiece piece;
  piece.num_tokens = kTokens;
  piece.first_key = kMhaTileKeys;
  piece.num_keys = kKeyRows - kMhaTileKeys;
  MhaPrefillParams p;
  p.pieces = &piece;
  p.num_pieces = 1;
  p.num_tokens = kTokens;
  p.num_key_rows = kKeyRows;
  p.num_heads = 1;
  p.q = q.data();
  p.q_token_stride = p.q_head_stride = kMhaNope;
  p.q_rope = q_rope.data();
  p.q_rope_token_stride = p.q_rope_head_stride = kMhaRope;
  p.keys = pairs.data();
  p.values = pairs.data() + kMhaNope;
  p.key_row_stride = p.key_head_stride = kPairColumns;
  p.rope_keys = rope_keys.data();
  p.out = out.data();
  p.out_stride = kMhaValue;
  ASSERT_EQ(MhaPrefill(p, nullptr), cudaSuccess);  // what each change below makes wrong
  ASSERT_EQ(cudaDeviceSynchronize(), cudaSuccess);

  struct Change {
    const char* name;
    void (*make)(MhaPrefillParams& p, MhaPiece& piece);
  };
  for (const Change& change : {
           Change{"pieces below zero", [](auto&p, auto&) { p.num_pieces = -1; }},
           {"too many pieces", [](auto&p, auto&) { p.num_pieces = kMhaMaxPieces + 1; }},
           {"no heads", [](auto&p, auto&) { p.num_heads = 0; }},
           {"odd rows of out", [](auto&p, auto&) { ++p.out_stride; }},
           {"odd rows of state", [](auto&p, auto&) { ++p.state_stride; }},
           {"q not aligned", [](auto&p, auto&) { ++p.q; }},
           {"q_rope not aligned", [](auto&p, auto&) { ++p.q_rope; }},
           {"keys not aligned", [](auto&p, auto&) { ++p.keys; }},
           {"values not aligned", [](auto&p, auto&) { ++p.values; }},
           {"rope_keys not aligned", [](auto&p, auto&) { ++p.rope_keys; }},
           {"fewer tokens than the piece has", [](auto&p, auto&) { --p.num_tokens; }},
           {"tokens beyond q", [](auto&, auto&piece) { ++piece.first_token; }},
           {"keys beyond the rows", [](auto&p, auto&) { --p.num_key_rows; }},
           {"a piece of more keys than rows", [](auto&, auto&piece) { ++piece.num_keys; }},
           {"keys within a tile", [](auto&, auto&piece) { piece.first_key -= 64; }},
           {"no tokens", [](auto&, auto&piece) { piece.num_tokens = 0; }},
           {"no keys", [](auto&, auto&piece) { piece.num_keys = 0; }},
           {"no state to go on from", [](auto&, auto&piece) { piece.begins = false; }},
           {"no room for the state", [](auto&, auto&piece) { piece.ends = false; }},
       }) {
    MhaPrefillParams changed = p;
    MhaPiece changed_piece = piece;
    changed.pieces = &changed_piece;
    change.make(changed, changed_piece);
    EXPECT_EQ(MhaPrefill(changed, nullptr), cudaErrorInvalidValue) << change.name;
  }
}

}  // namespace
}  // namespace strait::cuda
