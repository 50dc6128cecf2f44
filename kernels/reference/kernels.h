// SPDX-License-Identifier: Apache-2.0
//
// The reference twins: each kernel once more, as its formula reads, summed in float64.
//
// Thread:  any.
// Shapes:  those of the parameter structs; outputs are rounded to fp32 at the end.
// Why:     they define what a kernel means; tests hold cpu/ and cuda/ against them.
#pragma once

#include <cstdint>

#include "kernels/cache.h"
#include "kernels/elementwise.h"
#include "kernels/gemm.h"
#include "kernels/mla.h"
#include "kernels/moe.h"
#include "kernels/norm.h"
#include "kernels/quantize.h"
#include "kernels/rope.h"
#include "kernels/sample.h"

namespace strait::reference {

// Stored element [row, col] of a matrix as a real number (fp8: code * scale, rounded to fp32).
double WeightValue(const WeightMatrix& matrix, int64_t row, int64_t col);
double E4m3Value(uint8_t code);

void Gemm(const GemmParams& params);
void Quantize(const QuantizeParams& params);
void RmsNorm(const RmsNormParams& params);
void RopeTable(const RopeTableParams& params);
void Rope(const RopeParams& params);
void CacheAppend(const CacheAppendParams& params);
void AbsorbQuery(const AbsorbQueryParams& params);
void Mla(const MlaParams& params);
void ValueUp(const ValueUpParams& params);
void Router(const RouterParams& params);
void ExpertSum(const ExpertSumParams& params);
void SiluMul(const SiluMulParams& params);
void Add(const AddParams& params);
void Embedding(const EmbeddingParams& params);
LogitStats ComputeLogitStats(const float* logits, int64_t vocab_size);
int32_t Sample(const SampleParams& params, double uniform);

}  // namespace strait::reference
