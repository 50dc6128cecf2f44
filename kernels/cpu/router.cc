// SPDX-License-Identifier: Apache-2.0
//
// Chooses experts: scores by the level's exponential, choices by plain comparisons.
#include <algorithm>
#include <limits>

#include "kernels/cpu/kernels.h"
#include "kernels/cpu/level.h"
#include "proto/base/check.h"

namespace strait::cpu {
namespace {

constexpr float kNone = -std::numeric_limits<float>::infinity();

// Marks the `count` greatest of values[0..n), equal ones by lower index. NaN counts as least.
void MarkGreatest(const float* values, int32_t n, int32_t count, bool* chosen) {
  std::fill_n(chosen, n, false);
  for (int32_t c = 0; c < count; ++c) {
    int32_t best = -1;
    for (int32_t i = 0; i < n; ++i) {
      if (chosen[i]) continue;
      if (best < 0 || values[i] > values[best] ||
          (values[best] != values[best] && values[i] == values[i])) {
        best = i;
      }
    }
    chosen[best] = true;
  }
}

// A group's score: its best expert (V2), or the sum of its best two (V3).
float GroupScore(RouterMethod method, const float* scores, int32_t size) {
  float first = kNone;
  float second = kNone;
  for (int32_t i = 0; i < size; ++i) {
    if (scores[i] > first) {
      second = first;
      first = scores[i];
    } else if (scores[i] > second) {
      second = scores[i];
    }
  }
  if (method == RouterMethod::kGroupLimitedGreedy || size < 2) return first;
  return first + second;
}

void CheckRouter(const RouterParams& p) {
  STRAIT_CHECK(p.n_routed_experts > 0 && p.num_experts_per_tok > 0);
  STRAIT_CHECK(p.num_experts_per_tok <= p.n_routed_experts);
  if (p.method == RouterMethod::kGreedy) return;
  STRAIT_CHECK(p.n_group > 0 && p.n_routed_experts % p.n_group == 0);
  STRAIT_CHECK(p.topk_group > 0 && p.topk_group <= p.n_group);
}

void Softmax(const LevelTable& table, const float* logits, int32_t n, float* scores) {
  float max = logits[0];
  for (int32_t i = 1; i < n; ++i) max = std::max(max, logits[i]);
  table.exp_shifted(logits, max, scores, n);
  const float sum = static_cast<float>(table.sum_exp(logits, max, n));
  for (int32_t i = 0; i < n; ++i) scores[i] /= sum;
}

// One token. choice: [n] scratch; flags: [n] scratch.
void RouteToken(const LevelTable& table, const RouterParams& p, int64_t t, float* scores,
                float* choice, bool* flags) {
  const int32_t n = p.n_routed_experts;
  const float* logits = p.logits + t * n;
  if (p.scoring == RouterScoring::kSoftmax) {
    Softmax(table, logits, n, scores);
  } else {
    table.sigmoid(logits, scores, n);
  }
  for (int32_t i = 0; i < n; ++i) {
    choice[i] = p.correction_bias ? scores[i] + p.correction_bias[i] : scores[i];
  }
  if (p.method != RouterMethod::kGreedy) {
    const int32_t size = n / p.n_group;
    float* groups = choice + n;  // [n_group]
    for (int32_t g = 0; g < p.n_group; ++g) {
      groups[g] = GroupScore(p.method, choice + g * size, size);
    }
    MarkGreatest(groups, p.n_group, p.topk_group, flags);
    // transformers gives experts outside the chosen groups zero (V2) or minus infinity (V3).
    const float outside = p.method == RouterMethod::kNoauxTc ? kNone : 0.0f;
    for (int32_t i = 0; i < n; ++i) {
      if (flags[i / size]) continue;
      choice[i] = outside;
      if (p.method == RouterMethod::kGroupLimitedGreedy) scores[i] = 0.0f;
    }
  }
  MarkGreatest(choice, n, p.num_experts_per_tok, flags);

  int32_t* ids = p.expert_ids + t * p.num_experts_per_tok;
  float* weights = p.expert_weights + t * p.num_experts_per_tok;
  float sum = 0;
  for (int32_t i = 0, j = 0; i < n; ++i) {
    if (!flags[i]) continue;
    ids[j] = i;
    weights[j] = scores[i];
    sum += scores[i];
    ++j;
  }
  const bool normalize = p.norm_topk_prob && p.scoring == RouterScoring::kSigmoid;
  const float divisor = normalize ? sum + 1e-20f : 1.0f;
  for (int32_t j = 0; j < p.num_experts_per_tok; ++j) {
    weights[j] = weights[j] / divisor * p.routed_scaling_factor;
  }
}

}  // namespace

void Router(Context& context, const RouterParams& p) {
  CheckRouter(p);
  constexpr int64_t kTokensPerPiece = 8;
  const size_t n = static_cast<size_t>(p.n_routed_experts);
  const int64_t pieces = (p.num_tokens + kTokensPerPiece - 1) / kTokensPerPiece;
  context.pool().ParallelFor(pieces, [&](int64_t piece, int thread) {
    // scores [n], choice [n], groups [n_group <= n], flags [n] bytes
    float* scratch = context.Scratch(thread, 4 * n);
    const int64_t end = std::min(p.num_tokens, (piece + 1) * kTokensPerPiece);
    for (int64_t t = piece * kTokensPerPiece; t < end; ++t) {
      RouteToken(context.table(), p, t, scratch, scratch + n,
                 reinterpret_cast<bool*>(scratch + 3 * n));
    }
  });
}

}  // namespace strait::cpu
