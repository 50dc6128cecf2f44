// SPDX-License-Identifier: Apache-2.0
//
// Defends: every routing method chooses the reference's experts with its weights, ties included;
// the lists that grouped products read hold each choice once, in order; sums are the reference's;
// logits that are NaN choose some valid experts. One launch for few tokens answers what the separate
// kernels answer.
#include "kernels/cuda/moe/moe.h"

#include <algorithm>
#include <set>

#include "kernels/cuda/rowwise/norm.h"
#include "kernels/reference/kernels.h"
#include "tests/kernels/cuda/gemm/device_matrix.h"
#include "tests/kernels/cuda/gpu_test.h"

namespace strait {
namespace {

using gpu_test::Bf16;
using gpu_test::Buffer;
using kernel_test::RandomFloats;

class CudaMoeTest : public gpu_test::GpuTest {
 protected:
  CudaMoeTest() : rng_(kernel_test::Seed()) {}
  kernel_test::Rng rng_;
};

struct Case {
  RouterMethod method;
  RouterScoring scoring;
  int32_t experts, picks, groups, topk_group;
  bool normalize;
};

const Case kCases[] = {
    {RouterMethod::kGreedy, RouterScoring::kSoftmax, 64, 6, 1, 1, false},
    {RouterMethod::kGreedy, RouterScoring::kSoftmax, 3, 3, 1, 1, false},
    {RouterMethod::kGroupLimitedGreedy, RouterScoring::kSoftmax, 160, 6, 8, 3, false},
    {RouterMethod::kGroupLimitedGreedy, RouterScoring::kSoftmax, 12, 4, 3, 2, false},
    {RouterMethod::kNoauxTc, RouterScoring::kSigmoid, 256, 8, 8, 4, true},
    {RouterMethod::kNoauxTc, RouterScoring::kSigmoid, 12, 3, 3, 2, false},
    {RouterMethod::kNoauxTc, RouterScoring::kSigmoid, 12, 5, 12, 5, true},
};

TEST_F(CudaMoeTest, RouterChoosesAndWeighs) {
  STRAIT_TRACE_SEED();
  for (const Case& c : kCases) {
    SCOPED_TRACE(testing::Message()
                 << "method " << static_cast<int>(c.method) << ", " << c.experts << " experts");
    const int64_t tokens = 65;
    std::vector<float> logits = RandomFloats(rng_, tokens * c.experts, 2.0f);
    // Ties in the first tokens: only few values.
    for (int64_t i = 0; i < 8 * c.experts; ++i) {
      logits[static_cast<size_t>(i)] = std::round(logits[static_cast<size_t>(i)] / 2);
    }
    const std::vector<float> bias = RandomFloats(rng_, c.experts, 0.1f);
    const bool biased = c.method == RouterMethod::kNoauxTc;
    RouterParams p;
    p.logits = logits.data();
    p.correction_bias = biased ? bias.data() : nullptr;
    p.scoring = c.scoring;
    p.method = c.method;
    p.n_routed_experts = c.experts;
    p.num_experts_per_tok = c.picks;
    p.n_group = c.groups;
    p.topk_group = c.topk_group;
    p.norm_topk_prob = c.normalize;
    p.routed_scaling_factor = 2.5f;
    p.num_tokens = tokens;
    std::vector<int32_t> ids(static_cast<size_t>(tokens * c.picks));
    std::vector<float> weights(ids.size());
    p.expert_ids = ids.data();
    p.expert_weights = weights.data();
    reference::Router(p);

    const Buffer<float> d_logits(logits);
    const Buffer<float> d_bias(bias);
    const Buffer<int32_t> d_ids(tokens * c.picks);
    const Buffer<float> d_weights(tokens * c.picks);
    RouterParams d = p;
    d.logits = d_logits.data();
    d.correction_bias = biased ? d_bias.data() : nullptr;
    d.expert_ids = d_ids.data();
    d.expert_weights = d_weights.data();
    ASSERT_EQ(cuda::Router(d, nullptr), cudaSuccess);
    // Random scores closer than an fp32 rounding are not to be expected among these few.
    EXPECT_EQ(d_ids.Get(), ids);
    EXPECT_TRUE(kernel_test::Within(d_weights.Get(), weights, 2.5 * 1e-6));
  }
}

TEST_F(CudaMoeTest, NanLogitsChooseValidExperts) {
  const int32_t experts = 12;
  const int32_t picks = 4;
  for (const auto method : {RouterMethod::kGreedy, RouterMethod::kNoauxTc}) {
    const Buffer<float> logits(2 * experts);  // NaN
    const Buffer<int32_t> ids(2 * picks);
    const Buffer<float> weights(2 * picks);
    RouterParams p;
    p.logits = logits.data();
    p.method = method;
    p.scoring = method == RouterMethod::kGreedy ? RouterScoring::kSoftmax : RouterScoring::kSigmoid;
    p.n_routed_experts = experts;
    p.num_experts_per_tok = picks;
    p.n_group = 3;
    p.topk_group = 2;
    p.expert_ids = ids.data();
    p.expert_weights = weights.data();
    p.num_tokens = 2;
    ASSERT_EQ(cuda::Router(p, nullptr), cudaSuccess);
    const std::vector<int32_t> got = ids.Get();
    for (int t = 0; t < 2; ++t) {
      const std::set<int32_t> one(got.begin() + t * picks, got.begin() + (t + 1) * picks);
      EXPECT_EQ(one.size(), static_cast<size_t>(picks));
      EXPECT_GE(*one.begin(), 0);
      EXPECT_LT(*one.rbegin(), experts);
    }
  }
}

TEST_F(CudaMoeTest, ListsHoldEveryChoiceOnceInOrder) {
  STRAIT_TRACE_SEED();
  struct Size {
    int32_t tokens, picks, experts, tile, shared;
  };
  for (const auto& [tokens, picks, experts, tile, shared] : {Size{1, 6, 64, 8, 2},
                                                             {3, 4, 12, 8, 0},
                                                             {700, 3, 12, 64, 1},
                                                             {257, 8, 256, 16, 1},
                                                             {2048, 6, 64, 128, 2},
                                                             {2048, 6, 64, 256, 2}}) {
    std::vector<int32_t> ids;
    for (int t = 0; t < tokens; ++t) {
      std::set<int32_t> own;
      // A favourite expert, so that lists are ragged.
      if (t % 2 == 0) own.insert(experts / 2);
      while (static_cast<int32_t>(own.size()) < picks) {
        own.insert(static_cast<int32_t>(rng_() % static_cast<uint64_t>(experts)));
      }
      ids.insert(ids.end(), own.begin(), own.end());
    }
    const int64_t choices = int64_t{tokens} * picks;
    std::vector<int32_t> begin(static_cast<size_t>(experts + 1));
    std::vector<int32_t> token_of(static_cast<size_t>(choices));
    std::vector<int32_t> row_of(static_cast<size_t>(choices));
    ExpertGroupParams g;
    g.expert_ids = ids.data();
    g.num_tokens = tokens;
    g.num_experts_per_tok = picks;
    g.n_routed_experts = experts;
    g.group_begin = begin.data();
    g.token_of = token_of.data();
    g.row_of = row_of.data();
    GroupByExpert(g);

    const Buffer<int32_t> d_ids(ids);
    const Buffer<int32_t> d_token_of(choices + int64_t{shared} * tokens);
    const Buffer<int32_t> d_row_of(choices);
    const int64_t max_tiles = cuda::MaxExpertTiles(tokens, picks, experts, shared, tile);
    const Buffer<cuda::RowTile> d_tiles(max_tiles);
    const Buffer<int32_t> d_num_tiles(1);
    cuda::ExpertListsParams p;
    p.expert_ids = d_ids.data();
    p.num_tokens = tokens;
    p.num_experts_per_tok = picks;
    p.n_routed_experts = experts;
    p.num_shared = shared;
    p.tile_rows = tile;
    p.token_of = d_token_of.data();
    p.row_of = d_row_of.data();
    p.tiles = d_tiles.data();
    p.num_tiles = d_num_tiles.data();
    ASSERT_EQ(cuda::ExpertLists(p, nullptr), cudaSuccess);
    for (int s = 0; s < shared; ++s) {
      for (int t = 0; t < tokens; ++t) token_of.push_back(t);
      begin.push_back(begin.back() + tokens);
    }
    EXPECT_EQ(d_token_of.Get(), token_of);
    EXPECT_EQ(d_row_of.Get(), row_of);
    const int32_t num_tiles = d_num_tiles.Get()[0];
    ASSERT_LE(num_tiles, max_tiles);
    const std::vector<cuda::RowTile> tiles = d_tiles.Get();
    size_t at = 0;
    for (int32_t i = 0; i < experts + shared; ++i) {
      const int32_t e = i < shared ? experts + i : i - shared;  // shared experts' tiles come first
      for (int32_t row = begin[static_cast<size_t>(e)]; row < begin[static_cast<size_t>(e) + 1];
           row += tile) {
        ASSERT_LT(at, static_cast<size_t>(num_tiles));
        EXPECT_EQ(tiles[at].group, e);
        EXPECT_EQ(tiles[at].begin, row);
        EXPECT_EQ(tiles[at].count, std::min(tile, begin[static_cast<size_t>(e) + 1] - row));
        ++at;
      }
    }
    EXPECT_EQ(at, static_cast<size_t>(num_tiles));
  }
}

// Logits are sums of products of bf16 in fp32 in another order; what follows from them is equal bit
// by bit.
TEST_F(CudaMoeTest, OneLaunchForFewTokensIsTheSeparateOnes) {
  STRAIT_TRACE_SEED();
  struct Shape {
    int32_t tokens, dim, shared;
    bool rest;
    Case how;
  };
  for (const Shape& s : {Shape{1, 2048, 2, false, kCases[0]},
                         {4, 2048, 2, true, kCases[0]},
                         {3, 40, 1, true, kCases[1]},
                         {2, 7168, 1, false, kCases[4]},
                         {4, 264, 0, false, kCases[5]},
                         {4, 5000, 2, true, kCases[2]},
                         {1, 8192, 1, true, kCases[6]}}) {
    SCOPED_TRACE(testing::Message() << s.tokens << " tokens, " << s.how.experts << " experts, "
                                    << s.dim << " columns");
    const Case& c = s.how;
    const int64_t stride = cuda::AlignedStride(s.dim);
    const int64_t choices = int64_t{s.tokens} * c.picks;
    const int32_t tile_rows = 8;
    const Buffer<float> x(RandomFloats(rng_, s.tokens * s.dim));
    const Buffer<float> norm_weight(RandomFloats(rng_, s.dim));
    const Buffer<float> bias(RandomFloats(rng_, c.experts, 0.1f));
    const gpu_test::DeviceMatrices gate(rng_, WeightType::kBf16, c.experts, s.dim);
    const gpu_test::DeviceMatrices rest(rng_, WeightType::kBf16, c.experts, s.dim);
    struct Out {
      Out(const Shape& s, int64_t choices, int64_t stride)
          : normed(s.tokens * stride),
            logits(s.tokens * s.how.experts),
            ids(choices),
            weights(choices),
            token_of(choices + s.shared * s.tokens),
            row_of(choices),
            tiles(cuda::MaxExpertTiles(s.tokens, s.how.picks, s.how.experts, s.shared, 8)),
            num_tiles(1) {}
      Buffer<Bf16> normed;
      Buffer<float> logits;
      Buffer<int32_t> ids;
      Buffer<float> weights;
      Buffer<int32_t> token_of;
      Buffer<int32_t> row_of;
      Buffer<cuda::RowTile> tiles;
      Buffer<int32_t> num_tiles;
    };
    const Out one(s, choices, stride);
    const Out apart(s, choices, stride);
    const std::vector<uint64_t> zeros(static_cast<size_t>(s.tokens * c.experts));
    const Buffer<uint64_t> handed(zeros);
    const auto params = [&](const Out& out) {
      cuda::ChooseExpertsParams p;
      p.x = x.data();
      p.norm_weight = norm_weight.data();
      p.eps = 1e-5f;
      p.normed = out.normed.data();
      p.normed_stride = stride;
      p.gate = gate.matrix();
      if (s.rest) p.gate_rest = rest.matrix();
      p.logits = out.logits.data();
      p.handed = handed.data();
      p.router.logits = out.logits.data();
      p.router.correction_bias = c.method == RouterMethod::kNoauxTc ? bias.data() : nullptr;
      p.router.scoring = c.scoring;
      p.router.method = c.method;
      p.router.n_routed_experts = c.experts;
      p.router.num_experts_per_tok = c.picks;
      p.router.n_group = c.groups;
      p.router.topk_group = c.topk_group;
      p.router.norm_topk_prob = c.normalize;
      p.router.routed_scaling_factor = 2.5f;
      p.router.expert_ids = out.ids.data();
      p.router.expert_weights = out.weights.data();
      p.router.num_tokens = s.tokens;
      p.lists.expert_ids = out.ids.data();
      p.lists.num_tokens = s.tokens;
      p.lists.num_experts_per_tok = c.picks;
      p.lists.n_routed_experts = c.experts;
      p.lists.num_shared = s.shared;
      p.lists.tile_rows = tile_rows;
      p.lists.token_of = out.token_of.data();
      p.lists.row_of = out.row_of.data();
      p.lists.tiles = out.tiles.data();
      p.lists.num_tiles = out.num_tiles.data();
      return p;
    };
    cuda::ChooseExpertsParams p = params(one);
    ASSERT_TRUE(cuda::CanChooseExperts(p));
    for (int i = 0; i < 2; ++i) {  // it leaves `handed` as it was
      ASSERT_EQ(cuda::ChooseExperts(p, nullptr), cudaSuccess);
      EXPECT_EQ(handed.Get(), zeros);
    }
    p = params(apart);
    cuda::RmsNormParams norm;
    norm.x = x.data();
    norm.x_stride = s.dim;
    norm.weight = norm_weight.data();
    norm.eps = p.eps;
    norm.y = p.normed;
    norm.y_stride = stride;
    norm.num_rows = s.tokens;
    norm.dim = s.dim;
    ASSERT_EQ(cuda::RmsNorm(norm, nullptr), cudaSuccess);
    cuda::GemmParams product;
    product.x = p.normed;
    product.x_stride = stride;
    product.num_rows = s.tokens;
    product.weight = gate.matrix();
    product.y_fp32 = p.logits;
    product.y_stride = c.experts;
    ASSERT_EQ(cuda::Gemm(product, nullptr), cudaSuccess);
    if (s.rest) {
      product.weight = rest.matrix();
      product.accumulate = true;
      ASSERT_EQ(cuda::Gemm(product, nullptr), cudaSuccess);
    }
    p.router.logits = one.logits.data();  // equal choices need equal logits
    ASSERT_EQ(cuda::Router(p.router, nullptr), cudaSuccess);
    ASSERT_EQ(cuda::ExpertLists(p.lists, nullptr), cudaSuccess);

    const auto rows = [&](const Buffer<Bf16>& padded) {
      const std::vector<float> all = gpu_test::ToFloat(padded.Get());
      std::vector<float> used;
      for (int64_t t = 0; t < s.tokens; ++t) {
        used.insert(used.end(), all.begin() + t * stride, all.begin() + t * stride + s.dim);
      }
      return used;
    };
    EXPECT_LE(gpu_test::RelativeError(rows(one.normed), rows(apart.normed)), gpu_test::kBf16Eps);
    // A bf16 of `normed` that falls on the other side of a rounding moves a logit more than the
    // order of the sum does.
    EXPECT_LE(gpu_test::RelativeError(one.logits.Get(), apart.logits.Get()), 1e-3);
    EXPECT_EQ(one.ids.Get(), apart.ids.Get());
    EXPECT_EQ(one.weights.Get(), apart.weights.Get());
    EXPECT_EQ(one.token_of.Get(), apart.token_of.Get());
    EXPECT_EQ(one.row_of.Get(), apart.row_of.Get());
    const int32_t num_tiles = one.num_tiles.Get()[0];
    ASSERT_EQ(num_tiles, apart.num_tiles.Get()[0]);
    const std::vector<cuda::RowTile> tiles = one.tiles.Get();
    const std::vector<cuda::RowTile> expected = apart.tiles.Get();
    for (size_t i = 0; i < static_cast<size_t>(num_tiles); ++i) {
      EXPECT_EQ(tiles[i].group, expected[i].group);
      EXPECT_EQ(tiles[i].begin, expected[i].begin);
      EXPECT_EQ(tiles[i].count, expected[i].count);
    }
  }
}

TEST_F(CudaMoeTest, SumAndNorm) {
  STRAIT_TRACE_SEED();
  for (const int32_t dim : {300, 2048, 7168, 301, 302, 8196}) {
    const int64_t tokens = 5;
    const int32_t picks = 3;
    const int32_t shared = 2;
    const std::vector<float> rows =
        gpu_test::RoundedToBf16(RandomFloats(rng_, tokens * (picks + shared) * dim));
    std::vector<int32_t> row_of(static_cast<size_t>(tokens * picks));
    for (size_t i = 0; i < row_of.size(); ++i) {
      row_of[i] = static_cast<int32_t>(row_of.size() - 1 - i);
    }
    const std::vector<float> weights = RandomFloats(rng_, tokens * picks);
    std::vector<float> y = RandomFloats(rng_, tokens * dim);
    const Buffer<Bf16> d_rows(gpu_test::ToBf16(rows));
    const Buffer<int32_t> d_row_of(row_of);
    const Buffer<float> d_weights(weights);
    const Buffer<float> d_y(y);
    cuda::ExpertSumParams p;
    p.expert_rows = d_rows.data();
    p.expert_stride = dim;
    p.row_of = d_row_of.data();
    p.expert_weights = d_weights.data();
    p.y = d_y.data();
    p.num_tokens = tokens;
    p.num_experts_per_tok = picks;
    p.num_shared = shared;
    p.dim = dim;
    const int64_t stride = cuda::AlignedStride(dim);
    const std::vector<float> norm_weight = RandomFloats(rng_, dim);
    const Buffer<float> d_norm_weight(norm_weight);
    const Buffer<Bf16> d_normed(tokens * stride);
    p.norm_weight = d_norm_weight.data();
    p.eps = 1e-5f;
    p.normed = d_normed.data();
    p.normed_stride = stride;
    ASSERT_EQ(cuda::ExpertSum(p, nullptr), cudaSuccess);
    ExpertSumParams r;
    r.expert_rows = rows.data();
    r.row_of = row_of.data();
    r.expert_weights = weights.data();
    r.y = y.data();
    r.accumulate = true;
    r.num_tokens = tokens;
    r.num_experts_per_tok = picks;
    r.dim = dim;
    std::vector<float> of_shared(static_cast<size_t>(tokens * dim), 0.0f);
    for (int64_t i = 0; i < tokens * dim; ++i) {
      for (int s = 0; s < shared; ++s) {
        of_shared[static_cast<size_t>(i)] +=
            rows[static_cast<size_t>(tokens * (picks + s) * dim + i)];
      }
    }
    r.addend = of_shared.data();
    reference::ExpertSum(r);
    EXPECT_TRUE(kernel_test::Within(d_y.Get(), y, 1e-5));
    const std::vector<float> normed = gpu_test::ToFloat(d_normed.Get());
    for (int64_t t = 0; t < tokens; ++t) {
      double squares = 0;
      for (int i = 0; i < dim; ++i) squares += std::pow(y[static_cast<size_t>(t * dim + i)], 2);
      const double scale = 1 / std::sqrt(squares / dim + 1e-5);
      std::vector<float> got(normed.begin() + t * stride, normed.begin() + t * stride + dim);
      std::vector<float> wanted;
      for (int i = 0; i < dim; ++i) {
        wanted.push_back(static_cast<float>(y[static_cast<size_t>(t * dim + i)] * scale *
                                            norm_weight[static_cast<size_t>(i)]));
      }
      EXPECT_LE(gpu_test::RelativeError(got, wanted), gpu_test::kBf16Eps);
    }
  }
}

}  // namespace
}  // namespace strait
