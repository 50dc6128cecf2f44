// SPDX-License-Identifier: Apache-2.0
//
// Norm, activation, sums and exponentials of one instruction set.
//
// Why:     each is one pass at the speed of memory or cache; only exp has arithmetic worth a
//          thought (simd.h).
#pragma once

#include "kernels/cpu/gemm_body.h"
#include "kernels/cpu/level.h"
#include "kernels/cpu/simd.h"

namespace strait::cpu::STRAIT_LEVEL {

STRAIT_INLINE F32x16 LoadFloats(const float* p, int64_t count) {
  return count >= 16 ? Load16(p)
                     : LoadStoredTail<WeightType::kFp32>(reinterpret_cast<const char*>(p), count);
}
STRAIT_INLINE void StoreFloats(float* p, const F32x16& v, int64_t count) {
  if (count >= 16) return Store16(p, v);
  float lanes[16];
  Store16(lanes, v);
  memcpy(p, lanes, static_cast<size_t>(count) * sizeof(float));
}

void RmsNorm(const RmsNormParams& p, int64_t row0, int64_t row1) {
  // The weight vector as a matrix of one row.
  const WeightMatrix weight = {p.weight, nullptr, p.weight_type, 1, p.dim};
  for (int64_t t = row0; t < row1; ++t) {
    const float* x = p.x + t * p.x_stride;
    float* y = p.y + t * p.y_stride;
    F32x16 squares = Zero16();
    for (int64_t i = 0; i < p.dim; i += 16) {
      const F32x16 v = LoadFloats(x + i, p.dim - i);
      squares = Fma16(v, v, squares);
    }
    const float mean = Reduce(squares) / static_cast<float>(p.dim);
    const float factor = 1.0f / __builtin_sqrtf(mean + p.eps);
    float gain[64];
    for (int64_t i = 0; i < p.dim; i += 16) {
      const int64_t count = Smaller(16, p.dim - i);
      WidenColumnsOf(weight, 0, i, count, gain);
      const F32x16 v = Scale16(LoadFloats(x + i, count), factor);
      StoreFloats(y + i, Mul16(Load16(gain), v), count);
    }
  }
}

void SiluMul(const SiluMulParams& p, int64_t row0, int64_t row1) {
  for (int64_t t = row0; t < row1; ++t) {
    for (int64_t i = 0; i < p.dim; i += 16) {
      const int64_t count = p.dim - i;
      const F32x16 gate = LoadFloats(p.gate + t * p.gate_stride + i, count);
      const F32x16 up = LoadFloats(p.up + t * p.up_stride + i, count);
      F32x16 y;
      for (int part = 0; part < kParts; ++part) {
        const Vec g = gate.part[part];
        const Vec silu = Div(g, Add(Set1(1.0f), Exp(Sub(Zero(), g))));
        y.part[part] = Mul(silu, up.part[part]);
      }
      StoreFloats(p.y + t * p.y_stride + i, y, count);
    }
  }
}

void AddTo(const float* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    StoreFloats(y + i, Add16(LoadFloats(y + i, count - i), LoadFloats(x + i, count - i)),
                count - i);
  }
}

void ExpertSum(const ExpertSumParams& p, int64_t t0, int64_t t1) {
  for (int64_t t = t0; t < t1; ++t) {
    const int32_t* row_of = p.row_of + t * p.num_experts_per_tok;
    const float* weights = p.expert_weights + t * p.num_experts_per_tok;
    for (int64_t i = 0; i < p.dim; i += 16) {
      const int64_t count = p.dim - i;
      F32x16 sum = Zero16();
      for (int32_t j = 0; j < p.num_experts_per_tok; ++j) {
        const F32x16 row = LoadFloats(p.expert_rows + row_of[j] * p.dim + i, count);
        for (int part = 0; part < kParts; ++part) {
          sum.part[part] = Fma(Set1(weights[j]), row.part[part], sum.part[part]);
        }
      }
      if (p.addend) sum = Add16(sum, LoadFloats(p.addend + t * p.dim + i, count));
      float* y = p.y + t * p.dim + i;
      if (p.accumulate) sum = Add16(LoadFloats(y, count), sum);
      StoreFloats(y, sum, count);
    }
  }
}

void ExpShifted(const float* x, float shift, float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    F32x16 v = LoadFloats(x + i, count - i);
    for (int part = 0; part < kParts; ++part) v.part[part] = Exp(Sub(v.part[part], Set1(shift)));
    StoreFloats(y + i, v, count - i);
  }
}

void SigmoidOf(const float* x, float* y, int64_t count) {
  for (int64_t i = 0; i < count; i += 16) {
    F32x16 v = LoadFloats(x + i, count - i);
    for (int part = 0; part < kParts; ++part) v.part[part] = Sigmoid(v.part[part]);
    StoreFloats(y + i, v, count - i);
  }
}

double SumExp(const float* x, float shift, int64_t count) {
  constexpr int64_t kRun = 1024;
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kRun) {
    const int64_t end = Smaller(begin + kRun, count);
    F32x16 sum = Zero16();
    for (int64_t i = begin; i < end; i += 16) {
      F32x16 v = LoadFloats(x + i, end - i);
      if (end - i < 16) {  // lanes behind the end count nothing
        float lanes[16];
        Store16(lanes, v);
        for (int64_t j = end - i; j < 16; ++j) lanes[j] = -__builtin_inff();
        v = Load16(lanes);
      }
      for (int part = 0; part < kParts; ++part) v.part[part] = Exp(Sub(v.part[part], Set1(shift)));
      sum = Add16(sum, v);
    }
    total += static_cast<double>(Reduce(sum));
  }
  return total;
}

}  // namespace strait::cpu::STRAIT_LEVEL
