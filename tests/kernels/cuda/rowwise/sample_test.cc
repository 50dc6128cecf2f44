// SPDX-License-Identifier: Apache-2.0
//
// Defends: the device's tokens, log-probabilities and best tokens are the reference's for every
// combination of sampling parameters, with ties, bans that leave nothing, NaN logits.
#include "kernels/cuda/rowwise/sample.h"

#include <algorithm>
#include <numeric>

#include "kernels/reference/kernels.h"
#include "tests/kernels/cuda/gpu_test.h"

namespace strait {
namespace {

using gpu_test::Buffer;
using kernel_test::RandomFloats;

struct Wanted {
  SampleParams params;
  double uniform = 0;
  std::vector<TokenCount> prompt, output;
  std::vector<TokenBias> bias;
  std::vector<int32_t> banned;
};

class CudaSampleTest : public gpu_test::GpuTest {
 protected:
  CudaSampleTest() : rng_(kernel_test::Seed()) {}

  // Rows of the same vocabulary: what the device makes of them.
  static std::vector<cuda::SampleResult> Run(const std::vector<float>& logits, int32_t vocab,
                                             const std::vector<Wanted>& wanted, int32_t num_top) {
    std::vector<cuda::SampleRow> rows;
    std::vector<cuda::TokenEntry> entries;
    for (const Wanted& w : wanted) {
      cuda::SampleRow row;
      row.banned_begin = static_cast<int32_t>(entries.size());
      for (const int32_t id : w.banned) entries.push_back({id, NAN});
      row.bias_begin = static_cast<int32_t>(entries.size());
      for (const TokenBias& bias : w.bias) entries.push_back({bias.token_id, bias.bias});
      row.prompt_begin = static_cast<int32_t>(entries.size());
      for (const TokenCount& token : w.prompt) {
        const bool in_output =
            std::any_of(w.output.begin(), w.output.end(),
                        [&](const TokenCount& o) { return o.token_id == token.token_id; });
        if (!in_output) entries.push_back({token.token_id, NAN});
      }
      row.output_begin = static_cast<int32_t>(entries.size());
      for (const TokenCount& token : w.output) {
        entries.push_back({token.token_id, static_cast<float>(token.count)});
      }
      row.output_end = static_cast<int32_t>(entries.size());
      row.num_top = num_top;
      row.sample = 1;
      row.top_k = w.params.top_k;
      row.temperature = w.params.temperature;
      row.top_p = w.params.top_p;
      row.min_p = w.params.min_p;
      row.repetition_penalty = w.params.repetition_penalty;
      row.presence_penalty = w.params.presence_penalty;
      row.frequency_penalty = w.params.frequency_penalty;
      row.uniform = w.uniform;
      rows.push_back(row);
    }
    entries.push_back({1 << 30, NAN});  // never read
    const auto count = static_cast<int64_t>(rows.size());
    const Buffer<float> d_logits(logits);
    const Buffer<float> d_adjusted(count * vocab);
    const Buffer<cuda::SampleRow> d_rows(rows);
    const Buffer<cuda::TokenEntry> d_entries(entries);
    const Buffer<cuda::SampleResult> d_results(count);
    const Buffer<int32_t> d_token_ids(count);
    cuda::SampleParams p;
    p.logits = d_logits.data();
    p.adjusted = d_adjusted.data();
    p.rows = d_rows.data();
    p.entries = d_entries.data();
    p.results = d_results.data();
    p.token_ids = d_token_ids.data();
    p.logits_stride = vocab;
    p.num_rows = count;
    p.vocab_size = vocab;
    EXPECT_EQ(cuda::Sample(p, nullptr), cudaSuccess);
    const std::vector<cuda::SampleResult> results = d_results.Get();
    const std::vector<int32_t> token_ids = d_token_ids.Get();
    for (size_t i = 0; i < results.size(); ++i) EXPECT_EQ(token_ids[i], results[i].token);
    return results;
  }

  kernel_test::Rng rng_;
};

TEST_F(CudaSampleTest, EveryCombinationIsTheReferences) {
  STRAIT_TRACE_SEED();
  int differ = 0;
  int total = 0;
  for (const int32_t vocab : {7, 640, 5000, 129280}) {
    std::vector<Wanted> wanted;
    std::vector<float> logits;
    for (const float temperature : {0.0f, 0.7f, 1.0f}) {
      for (const int32_t top_k : {0, 1, 5, 900}) {
        for (const float top_p : {1.0f, 0.9f, 0.1f}) {
          for (const float min_p : {0.0f, 0.05f}) {
            for (const bool lists : {false, true}) {
              if (vocab > 5000 && !(wanted.size() % 5 == 0) && top_k != 5) continue;
              Wanted w;
              w.params.temperature = temperature;
              w.params.top_k = std::min(top_k, vocab);
              w.params.top_p = top_p;
              w.params.min_p = min_p;
              w.uniform = std::uniform_real_distribution<double>(0, 1)(rng_);
              if (lists) {
                w.params.repetition_penalty = 1.3f;
                w.params.presence_penalty = 0.4f;
                w.params.frequency_penalty = 0.2f;
                w.prompt = {{0, 1}, {3, 2}, {6, 1}};
                w.output = {{3, 5}, {5, 1}};
                w.bias = {{1, 3.0f}, {2, -100.0f}};
                w.banned = {4};
              }
              std::vector<float> row = RandomFloats(rng_, vocab, 3.0f);
              if (wanted.size() % 3 == 0) {  // ties
                for (float& logit : row) logit = std::round(logit);
              }
              logits.insert(logits.end(), row.begin(), row.end());
              wanted.push_back(std::move(w));
            }
          }
        }
      }
    }
    const int32_t num_top = std::min(vocab, cuda::kMaxTopTokens);
    const std::vector<cuda::SampleResult> got = Run(logits, vocab, wanted, num_top);
    for (size_t i = 0; i < wanted.size(); ++i) {
      Wanted& w = wanted[i];
      const float* row = logits.data() + i * static_cast<size_t>(vocab);
      w.params.logits = row;
      w.params.vocab_size = vocab;
      w.params.prompt_tokens = w.prompt.data();
      w.params.num_prompt_tokens = static_cast<int64_t>(w.prompt.size());
      w.params.output_tokens = w.output.data();
      w.params.num_output_tokens = static_cast<int64_t>(w.output.size());
      w.params.logit_bias = w.bias.data();
      w.params.num_logit_bias = static_cast<int64_t>(w.bias.size());
      w.params.banned_tokens = w.banned.data();
      w.params.num_banned_tokens = static_cast<int64_t>(w.banned.size());
      const int32_t expected = reference::Sample(w.params, w.uniform);
      ++total;
      differ += got[i].token != expected;
      if (w.params.temperature == 0) {
        EXPECT_EQ(got[i].token, expected);
      }
      ASSERT_GE(got[i].token, 0);
      ASSERT_LT(got[i].token, vocab);
      const LogitStats stats = reference::ComputeLogitStats(row, vocab);
      EXPECT_NEAR(got[i].logprob, row[got[i].token] - stats.log_sum_exp, 3e-6);
      std::vector<int32_t> order(static_cast<size_t>(vocab));
      std::iota(order.begin(), order.end(), 0);
      std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return row[a] > row[b]; });
      for (int32_t j = 0; j < num_top; ++j) {
        ASSERT_EQ(got[i].top_ids[j], order[static_cast<size_t>(j)]);
        ASSERT_NEAR(got[i].top_logprobs[j], row[got[i].top_ids[j]] - stats.log_sum_exp, 3e-6);
      }
    }
  }
  // The reference sums in float64 from float64 exponentials, the device fp32 ones as whole numbers:
  // a draw within 1e-6 of a boundary may fall on the other side, one in some 1e4.
  EXPECT_LE(differ, 2) << "of " << total;
  EXPECT_GT(total, 400);
}

TEST_F(CudaSampleTest, DrawsFollowTheDistribution) {
  STRAIT_TRACE_SEED();
  const int32_t vocab = 11;
  const int draws = 4000;
  const std::vector<float> row = RandomFloats(rng_, vocab);
  std::vector<float> logits;
  std::vector<Wanted> wanted(draws);
  for (int i = 0; i < draws; ++i) {
    logits.insert(logits.end(), row.begin(), row.end());
    wanted[static_cast<size_t>(i)].uniform = (i + 0.5) / draws;
  }
  std::vector<int> counts(vocab, 0);
  for (const cuda::SampleResult& result : Run(logits, vocab, wanted, 0)) ++counts[result.token];
  const LogitStats stats = reference::ComputeLogitStats(row.data(), vocab);
  for (int32_t id = 0; id < vocab; ++id) {
    EXPECT_NEAR(counts[static_cast<size_t>(id)], draws * std::exp(row[id] - stats.log_sum_exp),
                1.5);
  }
}

TEST_F(CudaSampleTest, NothingLeftOrNan) {
  const float nan = NAN;
  std::vector<Wanted> wanted(3);
  wanted[0].banned = {0, 1, 2};
  const std::vector<float> logits = {1, 2, 3, nan, nan, nan, nan, 5, nan};
  const std::vector<cuda::SampleResult> got = Run(logits, 3, wanted, 0);
  EXPECT_EQ(got[0].token, 0);
  EXPECT_EQ(got[1].token, 0);
  EXPECT_EQ(got[2].token, 1);
}

}  // namespace
}  // namespace strait
