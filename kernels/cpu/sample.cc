// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <limits>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/level.h"
#include "kernels/float64_math.h"
#include "proto/base/check.h"

namespace strait::cpu {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();

// Better first: the greater logit, then the lower id.
bool Better(const ScoredToken& a, const ScoredToken& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.token_id < b.token_id);
}

float& At(float* logits, const SampleParams& p, int32_t token_id) {
  STRAIT_CHECK(token_id >= 0 && token_id < p.vocab_size);
  return logits[token_id];
}

// Copies the logits with bans, bias and penalties applied; NaN becomes "never".
void AdjustLogits(const SampleParams& p, float* logits) {
  for (int64_t i = 0; i < p.vocab_size; ++i) {
    logits[i] = std::isnan(p.logits[i]) ? kNever : p.logits[i];
  }
  for (int64_t i = 0; i < p.num_banned_tokens; ++i) At(logits, p, p.banned_tokens[i]) = kNever;
  for (int64_t i = 0; i < p.num_logit_bias; ++i) {
    At(logits, p, p.logit_bias[i].token_id) += p.logit_bias[i].bias;
  }
  if (p.repetition_penalty != 1.0f) {
    const auto penalize = [&](int32_t id) {
      float& logit = At(logits, p, id);
      logit = logit > 0 ? logit / p.repetition_penalty : logit * p.repetition_penalty;
    };
    // A token of prompt and output is penalized once: those of the output are told apart by id.
    std::vector<int32_t> in_prompt;
    in_prompt.reserve(static_cast<size_t>(p.num_prompt_tokens));
    for (int64_t i = 0; i < p.num_prompt_tokens; ++i) {
      penalize(p.prompt_tokens[i].token_id);
      in_prompt.push_back(p.prompt_tokens[i].token_id);
    }
    std::sort(in_prompt.begin(), in_prompt.end());
    for (int64_t i = 0; i < p.num_output_tokens; ++i) {
      const int32_t id = p.output_tokens[i].token_id;
      if (!std::binary_search(in_prompt.begin(), in_prompt.end(), id)) penalize(id);
    }
  }
  for (int64_t i = 0; i < p.num_output_tokens; ++i) {
    float& logit = At(logits, p, p.output_tokens[i].token_id);
    if (p.output_tokens[i].count <= 0) continue;
    logit -= p.frequency_penalty * static_cast<float>(p.output_tokens[i].count);
    logit -= p.presence_penalty;
  }
}

int32_t ArgMax(const float* logits, int64_t n) {
  int64_t best = 0;
  for (int64_t i = 1; i < n; ++i) {
    if (logits[i] > logits[best]) best = i;
  }
  return static_cast<int32_t>(best);
}

// Keeps the best tokens whose probabilities first reach top_p of `total`. Sorts only as far as it
// must: the number looked at grows eightfold.
void KeepTopP(std::vector<ScoredToken>& kept, const float* weights, double total, float top_p) {
  const double wanted = static_cast<double>(top_p) * total;
  size_t sorted = 0;
  double sum = 0;
  for (size_t limit = 64; sorted < kept.size(); limit *= 8) {
    const size_t end = std::min(limit, kept.size());
    if (end < kept.size()) {
      std::nth_element(kept.begin() + sorted, kept.begin() + end, kept.end(), Better);
    }
    std::sort(kept.begin() + sorted, kept.begin() + end, Better);
    for (; sorted < end; ++sorted) {
      sum += static_cast<double>(weights[kept[sorted].token_id]);
      if (sum >= wanted) {
        kept.resize(sorted + 1);
        return;
      }
    }
  }
}

}  // namespace

LogitStats ComputeLogitStats(Context& context, const float* logits, int64_t vocab_size) {
  STRAIT_CHECK(vocab_size > 0);
  const float max = logits[ArgMax(logits, vocab_size)];
  const double sum = context.table().sum_exp(logits, max, vocab_size);
  // A sum that is no positive number (NaN or infinite logits) has no logarithm worth computing.
  if (!(sum > 0) || std::isinf(sum)) return {max, std::numeric_limits<double>::quiet_NaN()};
  return {max, static_cast<double>(max) + Float64Log(sum)};
}

std::vector<ScoredToken> TopTokens(Context&, const float* logits, int64_t vocab_size, int64_t k) {
  // The best k so far, as a heap whose front is the worst of them.
  std::vector<ScoredToken> best;
  k = std::min(k, vocab_size);
  if (k <= 0) return best;
  best.reserve(static_cast<size_t>(k) + 1);
  for (int64_t i = 0; i < vocab_size; ++i) {
    const ScoredToken token = {static_cast<int32_t>(i), std::isnan(logits[i]) ? kNever : logits[i]};
    if (static_cast<int64_t>(best.size()) == k) {
      if (!Better(token, best.front())) continue;
      std::pop_heap(best.begin(), best.end(), Better);
      best.pop_back();
    }
    best.push_back(token);
    std::push_heap(best.begin(), best.end(), Better);
  }
  std::sort_heap(best.begin(), best.end(), Better);
  return best;
}

int32_t Sample(Context& context, const SampleParams& p, double uniform) {
  STRAIT_CHECK(p.vocab_size > 0 && p.temperature >= 0 && uniform >= 0 && uniform < 1);
  const size_t n = static_cast<size_t>(p.vocab_size);
  float* logits = context.Scratch(Context::kShared, 2 * n);
  float* weights = logits + n;  // exp(logit / temperature - greatest)
  AdjustLogits(p, logits);
  const int32_t best = ArgMax(logits, p.vocab_size);
  if (p.temperature == 0 || logits[best] == kNever) return best;
  if (p.temperature != 1.0f) {
    for (size_t i = 0; i < n; ++i) logits[i] /= p.temperature;
  }
  if (std::isinf(logits[best])) return best;  // overflown by a tiny temperature: greedy
  context.table().exp_shifted(logits, logits[best], weights, p.vocab_size);

  std::vector<ScoredToken> kept;
  const bool all = (p.top_k <= 0 || p.top_k >= p.vocab_size) && p.top_p >= 1.0f && p.min_p <= 0.0f;
  if (!all) {
    // The greatest weight is exactly 1, so min_p compares with the weight itself.
    kept.reserve(n);
    for (size_t i = 0; i < n; ++i) {
      if (weights[i] > 0 && weights[i] >= p.min_p) {
        kept.push_back({static_cast<int32_t>(i), logits[i]});
      }
    }
    if (p.top_k > 0 && kept.size() > static_cast<size_t>(p.top_k)) {
      std::nth_element(kept.begin(), kept.begin() + p.top_k, kept.end(), Better);
      kept.resize(static_cast<size_t>(p.top_k));
    }
    if (p.top_p < 1.0f) {
      // In order of id, so that the sum does not depend on how nth_element arranged them.
      std::sort(kept.begin(), kept.end(),
                [](const ScoredToken& a, const ScoredToken& b) { return a.token_id < b.token_id; });
      double total = 0;
      for (const ScoredToken& token : kept) total += static_cast<double>(weights[token.token_id]);
      KeepTopP(kept, weights, total, p.top_p);
    }
    std::vector<float> only(n, 0.0f);
    for (const ScoredToken& token : kept) only[token.token_id] = weights[token.token_id];
    std::copy(only.begin(), only.end(), weights);
  }
  double total = 0;
  for (size_t i = 0; i < n; ++i) total += static_cast<double>(weights[i]);
  const double wanted = uniform * total;
  double sum = 0;
  int32_t last = best;
  for (size_t i = 0; i < n; ++i) {
    if (weights[i] == 0) continue;
    sum += static_cast<double>(weights[i]);
    last = static_cast<int32_t>(i);
    if (sum > wanted) return last;
  }
  return last;
}

}  // namespace strait::cpu
