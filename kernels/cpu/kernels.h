// SPDX-License-Identifier: Apache-2.0
//
// The CPU kernels: one function for each parameter struct of kernels/*.h.
//
// Thread:  a context runs one call at a time; a call returns when its work is done.
// Errors:  none; arguments are checked as our own bugs.
// Why:     results are bitwise equal for every number of rows, threads and instruction set
//          (kernels/gemm.h and kernels/mla.h state the order of the sums).
#pragma once

#include <cstdint>
#include <vector>

#include "absl/types/span.h"
#include "kernels/cache.h"
#include "kernels/cpu/context.h"
#include "kernels/elementwise.h"
#include "kernels/gemm.h"
#include "kernels/mla.h"
#include "kernels/moe.h"
#include "kernels/norm.h"
#include "kernels/rope.h"
#include "kernels/sample.h"

namespace strait::cpu {

void Gemm(Context& context, const GemmParams& params);
void GroupedGemm(Context& context, absl::Span<const GemmParams> groups);

void RmsNorm(Context& context, const RmsNormParams& params);

void RopeTable(Context& context, const RopeTableParams& params);
void Rope(Context& context, const RopeParams& params);

void CacheAppend(Context& context, const CacheAppendParams& params);
void AbsorbQuery(Context& context, const AbsorbQueryParams& params);
void Mla(Context& context, const MlaParams& params);
void ValueUp(Context& context, const ValueUpParams& params);

void Router(Context& context, const RouterParams& params);
void ExpertSum(Context& context, const ExpertSumParams& params);

void SiluMul(Context& context, const SiluMulParams& params);
void Add(Context& context, const AddParams& params);
void Embedding(Context& context, const EmbeddingParams& params);

// Greatest logit and log of the sum of exponentials.
LogitStats ComputeLogitStats(Context& context, const float* logits, int64_t vocab_size);
// The k best tokens, best first, ties by lower id; fewer if the vocabulary is smaller.
std::vector<ScoredToken> TopTokens(Context& context, const float* logits, int64_t vocab_size,
                                   int64_t k);
// The sampled token id. uniform in [0, 1): SamplingUniform(). NaN logits are never chosen; if every
// token is banned or NaN the answer is token 0.
int32_t Sample(Context& context, const SampleParams& params, double uniform);

}  // namespace strait::cpu
