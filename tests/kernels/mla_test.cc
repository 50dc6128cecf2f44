// SPDX-License-Identifier: Apache-2.0
//
// Defends: a token attends to rows 0..p of its own sequence and to nothing else, whatever lies
// behind them; its result has the same bits alone, in a batch, in chunks, on any number of threads
// and on every instruction set.
#include "kernels/mla.h"

#include <algorithm>
#include <limits>
#include <numeric>

#include "kernels/reference/kernels.h"
#include "tests/kernels/kernel_test_util.h"

namespace strait {
namespace {

using kernel_test::kAllTypes;
using kernel_test::kEps;
using kernel_test::MakeContext;
using kernel_test::RandomFloats;
using kernel_test::SameBits;
using kernel_test::StoredWeight;

constexpr uint32_t kWild = 0xdeadbeef;  // a block id far outside every pool

// Some sequences in a pool of shuffled blocks. Rows behind a sequence's end hold NaN, page tables
// go on with wild ids.
struct Cache {
  Cache(kernel_test::Rng& rng, RowFormat format, int64_t rank, int64_t rope,
        std::vector<int64_t> lengths)
      : layout(MakeCacheLayout(format, rank, rope)) {
    layout.block_bytes += 48;  // blocks need not touch
    int64_t num_blocks = 3;    // some that nobody owns
    for (int64_t length : lengths) num_blocks += (length + 63) / 64;
    bytes.resize(static_cast<size_t>(num_blocks * layout.block_bytes), std::byte{0xff});  // NaN
    std::vector<uint32_t> ids(static_cast<size_t>(num_blocks));
    std::iota(ids.begin(), ids.end(), 0u);
    std::shuffle(ids.begin(), ids.end(), rng);
    size_t next = 0;
    for (int64_t length : lengths) {
      tables.emplace_back();
      for (int64_t b = 0; b < (length + 63) / 64; ++b) tables.back().push_back(ids[next++]);
      tables.back().resize(tables.back().size() + 4, kWild);
    }
    for (const auto& table : tables) table_pointers.push_back(table.data());
    for (size_t s = 0; s < lengths.size(); ++s) {
      std::vector<float> rows = RandomFloats(rng, lengths[s] * (rank + rope));
      std::vector<int32_t> positions(static_cast<size_t>(lengths[s]));
      std::iota(positions.begin(), positions.end(), 0);
      const std::vector<int32_t> sequence(positions.size(), static_cast<int32_t>(s));
      reference::CacheAppend({.latent = rows.data(),
                              .latent_stride = rank + rope,
                              .rope_key = rows.data() + rank,
                              .rope_key_stride = rank + rope,
                              .positions = positions.data(),
                              .sequence_index = sequence.data(),
                              .page_tables = table_pointers.data(),
                              .blocks = bytes.data(),
                              .layout = layout,
                              .num_tokens = lengths[s]});
    }
  }

  CacheLayout layout;
  std::vector<std::byte> bytes;
  std::vector<std::vector<uint32_t>> tables;
  std::vector<const uint32_t*> table_pointers;
};

struct Token {
  int32_t sequence, position;
};

struct Batch {
  Batch(kernel_test::Rng& rng, const Cache& cache, int64_t num_heads, std::vector<Token> tokens)
      : heads(num_heads), rank(cache.layout.kv_lora_rank), rope(cache.layout.qk_rope_head_dim) {
    const int64_t pairs = static_cast<int64_t>(tokens.size()) * heads;
    q_latent = RandomFloats(rng, pairs * rank);
    q_rope = RandomFloats(rng, pairs * rope);
    for (const Token& token : tokens) {
      positions.push_back(token.position);
      sequences.push_back(token.sequence);
    }
  }
  // Tokens [begin, end) of the batch.
  MlaParams Params(const Cache& cache, size_t begin, size_t end, float* out) const {
    const int64_t first = static_cast<int64_t>(begin) * heads;
    return {.q_latent = &q_latent[static_cast<size_t>(first * rank)],
            .q_rope = &q_rope[static_cast<size_t>(first * rope)],
            .positions = &positions[begin],
            .sequence_index = &sequences[begin],
            .page_tables = cache.table_pointers.data(),
            .blocks = cache.bytes.data(),
            .layout = cache.layout,
            .softmax_scale = 1.0f / std::sqrt(static_cast<float>(rank + rope)),
            .o_latent = out,
            .num_tokens = static_cast<int64_t>(end - begin),
            .num_heads = heads};
  }
  std::vector<float> Run(cpu::Context& context, const Cache& cache, size_t begin,
                         size_t end) const {
    std::vector<float> out((end - begin) * static_cast<size_t>(heads * rank));
    cpu::Mla(context, Params(cache, begin, end, out.data()));
    return out;
  }
  size_t size() const { return positions.size(); }

  int64_t heads, rank, rope;
  std::vector<float> q_latent, q_rope;
  std::vector<int32_t> positions, sequences;
};

class MlaTest : public kernel_test::LevelTest {};
STRAIT_FOR_EACH_LEVEL(MlaTest);

struct Shape {
  int64_t heads, rank, rope;
};

TEST_P(MlaTest, MatchesReferenceAndNeverReadsBehindThePosition) {
  STRAIT_TRACE_SEED();
  kernel_test::Rng rng(kernel_test::Seed());
  auto context = MakeContext(GetParam(), 2);
  for (RowFormat format : {RowFormat::kFp32, RowFormat::kBf16}) {
    for (const Shape s : {Shape{1, 16, 8}, {6, 32, 24}, {5, 24, 6}, {16, 64, 16}, {3, 129, 7}}) {
      const Cache cache(rng, format, s.rank, s.rope, {1, 64, 65, 300, 1300});
      const Batch batch(rng, cache, s.heads,
                        {{0, 0},
                         {1, 63},
                         {2, 64},
                         {3, 297},
                         {3, 298},
                         {3, 299},
                         {4, 1023},
                         {4, 1024},
                         {4, 1299},
                         {2, 0},
                         {4, 5},
                         {3, 1}});
      const std::vector<float> out = batch.Run(*context, cache, 0, batch.size());
      std::vector<float> expected(out.size());
      reference::Mla(batch.Params(cache, 0, batch.size(), expected.data()));
      // Scores are of order 1 to 5 with an absolute error of a few eps each, weights sum to 1, and
      // values are of order 1: some dozens of eps, more where a sum runs over many rows.
      EXPECT_TRUE(kernel_test::Within(out, expected, 400 * kEps))
          << s.heads << " heads, rank " << s.rank << ", rope " << s.rope;
    }
  }
}

TEST_P(MlaTest, SameBitsHoweverTokensAreGrouped) {
  STRAIT_TRACE_SEED();
  kernel_test::Rng rng(kernel_test::Seed());
  auto portable = MakeContext(cpu::SimdLevel::kPortable);
  std::vector<std::unique_ptr<cpu::Context>> contexts;
  // The portable level is slow: fewer ways to run stand for all.
  const bool slow = GetParam() == cpu::SimdLevel::kPortable;
  for (int threads : {1, 2, 3}) {
    if (threads != 2 || !slow) contexts.push_back(MakeContext(GetParam(), threads));
  }
  for (RowFormat format : {RowFormat::kFp32, RowFormat::kBf16}) {
    for (const Shape s : {Shape{6, 48, 24}, {3, 40, 6}}) {
      const Cache cache(rng, format, s.rank, s.rope, {130, 2200, 70});
      std::vector<Token> tokens;
      for (int32_t p = 0; p < 130; ++p) tokens.push_back({0, p});
      for (int32_t p = 2197; p < 2200; ++p) tokens.push_back({1, p});  // three spans
      for (int32_t p : {69, 3, 64, 63}) tokens.push_back({2, p});
      tokens.push_back({1, 1500});
      const Batch batch(rng, cache, s.heads, tokens);
      std::vector<float> alone;
      for (size_t t = 0; t < batch.size(); ++t) {
        const std::vector<float> one = batch.Run(*contexts[0], cache, t, t + 1);
        alone.insert(alone.end(), one.begin(), one.end());
      }
      EXPECT_TRUE(SameBits(alone, batch.Run(*portable, cache, 0, batch.size())));
      for (const auto& context : contexts) {
        for (size_t chunk : {size_t{7}, size_t{64}, batch.size()}) {
          if (slow && chunk == 64) continue;
          std::vector<float> out;
          for (size_t t = 0; t < batch.size(); t += chunk) {
            const std::vector<float> part =
                batch.Run(*context, cache, t, std::min(t + chunk, batch.size()));
            out.insert(out.end(), part.begin(), part.end());
          }
          EXPECT_TRUE(SameBits(alone, out))
              << "chunks of " << chunk << ", " << context->num_threads() << " threads";
        }
      }
    }
  }
}

// A row that is not a number harms the tokens that see it and no other, in one tile and out of it.
TEST_P(MlaTest, NanStaysWithThoseWhoSeeIt) {
  STRAIT_TRACE_SEED();
  kernel_test::Rng rng(kernel_test::Seed());
  auto context = MakeContext(GetParam());
  Cache cache(rng, RowFormat::kFp32, 32, 8, {100});
  std::vector<Token> tokens;
  for (int32_t p = 60; p < 100; ++p) tokens.push_back({0, p});
  const Batch batch(rng, cache, 2, tokens);
  const std::vector<float> before = batch.Run(*context, cache, 0, batch.size());
  std::byte* row = cache.bytes.data() + cache.tables[0][1] * cache.layout.block_bytes +
                   (80 - 64) * cache.layout.row_bytes;
  std::fill_n(row, cache.layout.row_bytes, std::byte{0xff});
  const std::vector<float> after = batch.Run(*context, cache, 0, batch.size());
  const int64_t width = 2 * 32;
  for (int64_t t = 0; t < 40; ++t) {
    if (t < 20) {
      EXPECT_TRUE(SameBits(&before[t * width], &after[t * width], width)) << "position " << 60 + t;
    } else {
      EXPECT_TRUE(std::isnan(after[t * width])) << "position " << 60 + t;
    }
  }
}

TEST_P(MlaTest, AbsorbAndValueUpMatchReference) {
  STRAIT_TRACE_SEED();
  kernel_test::Rng rng(kernel_test::Seed());
  auto context = MakeContext(GetParam(), 2);
  struct Dims {
    int64_t tokens, heads, nope, v, rank;
  };
  for (const Dims d :
       {Dims{1, 6, 48, 32, 64}, {5, 3, 24, 40, 129}, {50, 2, 33, 7, 24}, {3, 4, 128, 128, 160}}) {
    for (WeightType type : kAllTypes) {
      const StoredWeight w(rng, type, d.heads * (d.nope + d.v), d.rank);
      const int64_t token_stride = d.heads * (d.nope + 5);  // the rope part lies between heads
      const std::vector<float> q = RandomFloats(rng, d.tokens * token_stride);
      std::vector<float> out(static_cast<size_t>(d.tokens * d.heads * d.rank)),
          expected(out.size());
      AbsorbQueryParams p = {.q_nope = q.data(),
                             .q_token_stride = token_stride,
                             .q_head_stride = d.nope + 5,
                             .kv_b_proj = w.matrix(),
                             .q_latent = out.data(),
                             .num_tokens = d.tokens,
                             .num_heads = d.heads,
                             .qk_nope_head_dim = d.nope,
                             .v_head_dim = d.v};
      cpu::AbsorbQuery(*context, p);
      p.q_latent = expected.data();
      reference::AbsorbQuery(p);
      // One rounding per term, each relative to a sum of about depth terms of at most 4 * 4.
      EXPECT_TRUE(
          kernel_test::Within(out, expected, static_cast<double>(d.nope * d.nope) * 4 * kEps));

      const std::vector<float> o = RandomFloats(rng, d.tokens * d.heads * d.rank);
      std::vector<float> up(static_cast<size_t>(d.tokens * d.heads * d.v)), up_expected(up.size());
      ValueUpParams v = {.o_latent = o.data(),
                         .kv_b_proj = w.matrix(),
                         .out = up.data(),
                         .num_tokens = d.tokens,
                         .num_heads = d.heads,
                         .qk_nope_head_dim = d.nope,
                         .v_head_dim = d.v};
      cpu::ValueUp(*context, v);
      v.out = up_expected.data();
      reference::ValueUp(v);
      EXPECT_TRUE(kernel_test::Within(
          up, up_expected,
          (static_cast<double>(d.rank) / 16 + 8) * static_cast<double>(d.rank) * 4 * kEps));
    }
  }
}

TEST_P(MlaTest, AbsorbAndValueUpDoNotDependOnCompany) {
  STRAIT_TRACE_SEED();
  kernel_test::Rng rng(kernel_test::Seed());
  auto portable = MakeContext(cpu::SimdLevel::kPortable);
  auto one = MakeContext(GetParam(), 1);
  auto three = MakeContext(GetParam(), 3);
  constexpr int64_t kTokens = 101, kHeads = 3, kNope = 40, kV = 24, kRank = 72;
  for (WeightType type : kAllTypes) {
    const StoredWeight w(rng, type, kHeads * (kNope + kV), kRank);
    const std::vector<float> q = RandomFloats(rng, kTokens * kHeads * kNope);
    const std::vector<float> o = RandomFloats(rng, kTokens * kHeads * kRank);
    const auto absorb = [&](cpu::Context& context, int64_t t, int64_t count, float* out) {
      cpu::AbsorbQuery(context, {.q_nope = &q[t * kHeads * kNope],
                                 .q_token_stride = kHeads * kNope,
                                 .q_head_stride = kNope,
                                 .kv_b_proj = w.matrix(),
                                 .q_latent = out,
                                 .num_tokens = count,
                                 .num_heads = kHeads,
                                 .qk_nope_head_dim = kNope,
                                 .v_head_dim = kV});
    };
    const auto up = [&](cpu::Context& context, int64_t t, int64_t count, float* out) {
      cpu::ValueUp(context, {.o_latent = &o[t * kHeads * kRank],
                             .kv_b_proj = w.matrix(),
                             .out = out,
                             .num_tokens = count,
                             .num_heads = kHeads,
                             .qk_nope_head_dim = kNope,
                             .v_head_dim = kV});
    };
    std::vector<float> alone(kTokens * kHeads * kRank), all(alone.size());
    std::vector<float> up_alone(kTokens * kHeads * kV), up_all(up_alone.size());
    for (int64_t t = 0; t < kTokens; ++t) {
      absorb(*one, t, 1, &alone[t * kHeads * kRank]);
      up(*one, t, 1, &up_alone[t * kHeads * kV]);
    }
    for (cpu::Context* context : {portable.get(), one.get(), three.get()}) {
      absorb(*context, 0, kTokens, all.data());
      EXPECT_TRUE(SameBits(alone, all));
      up(*context, 0, kTokens, up_all.data());
      EXPECT_TRUE(SameBits(up_alone, up_all));
    }
  }
}

}  // namespace
}  // namespace strait
