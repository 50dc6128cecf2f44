// SPDX-License-Identifier: Apache-2.0
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "kernels/reference/kernels.h"

namespace strait::reference {
namespace {

template <typename T>
T ReadElement(const void* data, int64_t index) {
  T value;  // the data may lie unaligned in a memory-mapped file
  std::memcpy(&value, static_cast<const char*>(data) + index * static_cast<int64_t>(sizeof(T)),
              sizeof(T));
  return value;
}

// A binary floating-point number of the given widths, read by its definition.
double DecodeFloat(uint32_t bits, int exponent_bits, int mantissa_bits) {
  const uint32_t mantissa = bits & ((1u << mantissa_bits) - 1);
  const int exponent = static_cast<int>(bits >> mantissa_bits & ((1u << exponent_bits) - 1));
  const double sign = bits >> (mantissa_bits + exponent_bits) & 1u ? -1.0 : 1.0;
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const double fraction = std::ldexp(static_cast<double>(mantissa), -mantissa_bits);
  if (exponent == 0) return sign * std::ldexp(fraction, 1 - bias);
  return sign * std::ldexp(1.0 + fraction, exponent - bias);
}

double DecodeIeee(uint32_t bits, int exponent_bits, int mantissa_bits) {
  const uint32_t all_ones = (1u << exponent_bits) - 1;
  if ((bits >> mantissa_bits & all_ones) == all_ones) {
    if (bits & ((1u << mantissa_bits) - 1)) return std::numeric_limits<double>::quiet_NaN();
    const bool negative = bits >> (mantissa_bits + exponent_bits) & 1u;
    return negative ? -std::numeric_limits<double>::infinity()
                    : std::numeric_limits<double>::infinity();
  }
  return DecodeFloat(bits, exponent_bits, mantissa_bits);
}

double VectorValue(const void* data, WeightType type, int64_t index) {
  switch (type) {
    case WeightType::kFp32:
      return ReadElement<float>(data, index);
    case WeightType::kBf16:
      return DecodeIeee(ReadElement<uint16_t>(data, index), 8, 7);
    case WeightType::kFp16:
      return DecodeIeee(ReadElement<uint16_t>(data, index), 5, 10);
    case WeightType::kFp8E4m3:
      return E4m3Value(ReadElement<uint8_t>(data, index));
  }
  return 0;
}

// The code whose value is nearest, of two the even one.
uint8_t NearestE4m3(double value) {
  if (std::isnan(value)) return 0x7f;
  uint8_t best = 0;
  for (uint8_t code = 1; code < 0x7f; ++code) {
    const double better = std::abs(E4m3Value(best) - std::abs(value));
    const double distance = std::abs(E4m3Value(code) - std::abs(value));
    if (distance < better || (distance == better && code % 2 == 0)) best = code;
  }
  return static_cast<uint8_t>(best | (std::signbit(value) ? 0x80 : 0));
}

}  // namespace

double E4m3Value(uint8_t code) {
  if ((code & 0x7f) == 0x7f) return std::numeric_limits<double>::quiet_NaN();
  return DecodeFloat(code, 4, 3);  // no infinities: the greatest exponent is an ordinary one
}

double WeightValue(const WeightMatrix& w, int64_t row, int64_t col) {
  const double value = VectorValue(w.data, w.type, row * w.cols + col);
  if (w.type != WeightType::kFp8E4m3) return value;
  const int64_t scale_cols = (w.cols + kFp8BlockSize - 1) / kFp8BlockSize;
  const float scale = w.scale_inv[row / kFp8BlockSize * scale_cols + col / kFp8BlockSize];
  return static_cast<float>(value) * scale;
}

void Gemm(const GemmParams& p) {
  for (int64_t m = 0; m < p.num_rows; ++m) {
    const float* x = p.x + (p.x_rows ? p.x_rows[m] : m) * p.x_stride;
    for (int64_t n = 0; n < p.weight.rows; ++n) {
      double sum = p.accumulate ? p.y[m * p.y_stride + n] : 0.0;
      for (int64_t k = 0; k < p.weight.cols; ++k) sum += x[k] * WeightValue(p.weight, n, k);
      p.y[m * p.y_stride + n] = static_cast<float>(sum);
    }
  }
}

void Quantize(const QuantizeParams& p) {
  constexpr double kLargest = 448;
  const int64_t scale_cols = (p.dim + kQuantizeColumns - 1) / kQuantizeColumns;
  for (int64_t t = 0; t < p.num_rows; ++t) {
    for (int64_t block = 0; block < scale_cols; ++block) {
      const int64_t begin = block * kQuantizeColumns;
      const int64_t end = std::min(begin + kQuantizeColumns, p.dim);
      double most = 0;
      for (int64_t k = begin; k < end; ++k) {
        most = std::fmax(most, std::abs(static_cast<double>(p.x[t * p.dim + k])));
      }
      double scale = 0x1p-126;
      while (most > kLargest * scale) scale *= 2;
      p.scales[t * scale_cols + block] = static_cast<float>(scale);
      for (int64_t k = begin; k < end; ++k) {
        p.codes[t * p.dim + k] = NearestE4m3(p.x[t * p.dim + k] / scale);
      }
    }
  }
}

void RmsNorm(const RmsNormParams& p) {
  for (int64_t t = 0; t < p.num_rows; ++t) {
    const float* x = p.x + t * p.x_stride;
    double squares = 0;
    for (int64_t i = 0; i < p.dim; ++i) squares += static_cast<double>(x[i]) * x[i];
    const double norm = std::sqrt(squares / static_cast<double>(p.dim) + p.eps);
    for (int64_t i = 0; i < p.dim; ++i) {
      p.y[t * p.y_stride + i] =
          static_cast<float>(VectorValue(p.weight, p.weight_type, i) * (x[i] / norm));
    }
  }
}

void SiluMul(const SiluMulParams& p) {
  for (int64_t t = 0; t < p.num_rows; ++t) {
    for (int64_t i = 0; i < p.dim; ++i) {
      const double gate = p.gate[t * p.gate_stride + i];
      const double up = p.up[t * p.up_stride + i];
      p.y[t * p.y_stride + i] = static_cast<float>(gate / (1.0 + std::exp(-gate)) * up);
    }
  }
}

void Add(const AddParams& p) {
  for (int64_t i = 0; i < p.count; ++i) p.y[i] += p.x[i];
}

void Embedding(const EmbeddingParams& p) {
  for (int64_t t = 0; t < p.num_tokens; ++t) {
    for (int64_t i = 0; i < p.table.cols; ++i) {
      p.y[t * p.table.cols + i] = static_cast<float>(WeightValue(p.table, p.token_ids[t], i));
    }
  }
}

}  // namespace strait::reference
