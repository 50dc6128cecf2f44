// SPDX-License-Identifier: Apache-2.0
//
// Warpgroup products and tensor copies of the emulator.
#include <cmath>
#include <limits>

#include "tests/emulator/device_language.h"
#include "tests/emulator/shadow/kernels/cuda/device/ptx.cuh"

namespace strait::emulator {
namespace {

constexpr int kProductRows = 64;
constexpr int kProductDepth = 16;
constexpr int kCodesDepth = 32;
// Bits of the largest term that a sum of products of codes keeps, as the tensor core of sm_90 does.
constexpr int kCodesBits = 14;

// Which thread has element (row, column) of a product's result, and in which register.
int Owner(int row, int column) { return row / 16 * 32 + row % 8 * 4 + column % 8 / 2; }
int Register(int row, int column) { return column / 8 * 4 + row % 16 / 8 * 2 + column % 2; }

// sums[column] += left[k] * right[k, column]: all terms cut where the largest of them has its last
// bit that is kept.
void AddCodes(const float* left, const float* right, int columns, float* sums) {
  for (int column = 0; column < columns; ++column) {
    float most = std::abs(sums[column]);
    for (int k = 0; k < kCodesDepth; ++k) {
      most = std::max(most, std::abs(left[k] * right[k * columns + column]));
    }
    if (most == 0) continue;
    const float unit = std::ldexp(1.0f, std::ilogb(most) + 1 - kCodesBits);
    const float per_unit = 1 / unit;
    float sum = std::trunc(sums[column] * per_unit);
    bool finite = std::isfinite(sums[column]);
    for (int k = 0; k < kCodesDepth; ++k) {
      const float product = left[k] * right[k * columns + column];
      finite = finite && std::isfinite(product);
      sum += std::trunc(product * per_unit);
    }
    sums[column] = finite ? sum * unit : std::numeric_limits<float>::quiet_NaN();
  }
}

void RunCodes(const Product* const* of_threads) {
  const Product& p = *of_threads[0];
  std::vector<float> a(kProductRows * kCodesDepth);
  std::vector<float> b(static_cast<size_t>(p.columns) * kCodesDepth);
  for (int k = 0; k < kCodesDepth; ++k) {
    for (int row = 0; row < kProductRows && p.a_pairs == nullptr; ++row) {
      a[static_cast<size_t>(row * kCodesDepth + k)] = Code(p.a_descriptor, row, k);
    }
    for (int column = 0; column < p.columns; ++column) {
      b[static_cast<size_t>(k * p.columns + column)] = Code(p.b_descriptor, column, k);
    }
  }
  for (int t = 0; t < kWarpgroupThreads && p.a_pairs != nullptr; ++t) {
    for (int i = 0; i < 16; ++i) {
      const int row = t / 32 * 16 + t % 32 / 4 + i / 4 % 2 * 8;
      const int k = t % 4 * 4 + i / 8 * 16 + i % 4;
      __nv_fp8_e4m3 code;
      code.__x = static_cast<uint8_t>(of_threads[t]->a_pairs[i / 4] >> i % 4 * 8);
      a[static_cast<size_t>(row * kCodesDepth + k)] = static_cast<float>(code);
    }
  }
  std::vector<float> sums(static_cast<size_t>(p.columns));
  for (int row = 0; row < kProductRows; ++row) {
    const auto of = [&](int column) -> float& {
      return of_threads[Owner(row, column)]->d[Register(row, column)];
    };
    for (int column = 0; column < p.columns; ++column) {
      sums[static_cast<size_t>(column)] = p.accumulate ? of(column) : 0;
    }
    AddCodes(&a[static_cast<size_t>(row * kCodesDepth)], b.data(), p.columns, sums.data());
    for (int column = 0; column < p.columns; ++column) {
      of(column) = sums[static_cast<size_t>(column)];
    }
  }
}

void Run(const Product* const* of_threads) {
  const Product& p = *of_threads[0];
  const bool half = p.kind == Product::Kind::kHalf;
  std::vector<float> a(kProductRows * kProductDepth);
  std::vector<float> b(static_cast<size_t>(p.columns) * kProductDepth);
  for (int t = 0; t < kWarpgroupThreads; ++t) {
    const Product& one = *of_threads[t];
    if (one.a_descriptor != p.a_descriptor || one.b_descriptor != p.b_descriptor ||
        one.columns != p.columns || one.kind != p.kind || one.accumulate != p.accumulate ||
        (one.a_pairs == nullptr) != (p.a_pairs == nullptr)) {
      Fail("the threads of a warpgroup want different products");
    }
    if (one.a_pairs == nullptr || p.kind == Product::Kind::kCodes) continue;
    for (int i = 0; i < 4; ++i) {
      const int row = t / 32 * 16 + t % 32 / 4 + i % 2 * 8;
      const int k = t % 4 * 2 + i / 2 * 8;
      const uint32_t pair = one.a_pairs[i];
      const auto at = static_cast<size_t>(row * kProductDepth + k);
      a[at] = half ? LowHalf(pair) : LowBf16(pair);
      a[at + 1] = half ? HighHalf(pair) : HighBf16(pair);
    }
  }
  if (p.kind == Product::Kind::kCodes) return RunCodes(of_threads);
  for (int k = 0; k < kProductDepth; ++k) {
    for (int row = 0; row < kProductRows && p.a_pairs == nullptr; ++row) {
      a[static_cast<size_t>(row * kProductDepth + k)] =
          Element(p.a_descriptor, false, half, row, k);
    }
    for (int column = 0; column < p.columns; ++column) {
      b[static_cast<size_t>(k * p.columns + column)] =
          Element(p.b_descriptor, p.b_columns, half, column, k);
    }
  }
  std::vector<float> sums(static_cast<size_t>(p.columns));
  for (int row = 0; row < kProductRows; ++row) {
    for (int column = 0; column < p.columns; ++column) {
      const float d = of_threads[Owner(row, column)]->d[Register(row, column)];
      sums[static_cast<size_t>(column)] = p.accumulate ? d : 0;
    }
    for (int k = 0; k < kProductDepth; ++k) {
      const float left = a[static_cast<size_t>(row * kProductDepth + k)];
      const float* const right = &b[static_cast<size_t>(k * p.columns)];
      for (int column = 0; column < p.columns; ++column) {
        sums[static_cast<size_t>(column)] += left * right[column];
      }
    }
    for (int column = 0; column < p.columns; ++column) {
      of_threads[Owner(row, column)]->d[Register(row, column)] = sums[static_cast<size_t>(column)];
    }
  }
}

void CopyBox(const TensorMap& map, const std::array<int, 5>& at, uint32_t to, uint32_t dimension,
             const unsigned char* from, bool inside, uint32_t* offset) {
  for (uint32_t i = 0; i < map.box[dimension]; ++i) {
    const int64_t index = int64_t{at[dimension]} + i;
    const bool in = inside && index >= 0 && index < map.sizes[dimension];
    const uint64_t stride = dimension == 0 ? map.element_bytes : map.strides[dimension - 1];
    const unsigned char* const element =
        in ? from + static_cast<uint64_t>(index) * stride : nullptr;
    if (dimension > 0) {
      CopyBox(map, at, to, dimension - 1, element, in, offset);
      continue;
    }
    uint32_t address = to + *offset;
    if (map.swizzled != 0) address ^= (address >> 7 & 7) << 4;
    if (in) {
      std::memcpy(At(address), element, map.element_bytes);
    } else {
      std::memset(At(address), 0, map.element_bytes);
    }
    *offset += map.element_bytes;
  }
}

}  // namespace

void FinishProducts(void* const* slots, uint32_t) {
  const Waiting& first = *static_cast<const Waiting*>(slots[0]);
  size_t count = 0;
  while (count < first.state->products.size() && first.state->products[count].group < first.below) {
    ++count;
  }
  for (size_t i = 0; i < count; ++i) {
    const Product* of_threads[kWarpgroupThreads];
    for (int t = 0; t < kWarpgroupThreads; ++t) {
      const Waiting& one = *static_cast<const Waiting*>(slots[t]);
      if (one.below != first.below || i >= one.state->products.size()) {
        Fail("the threads of a warpgroup wait for different products");
      }
      of_threads[t] = &one.state->products[i];
    }
    Run(of_threads);
  }
  for (int t = 0; t < kWarpgroupThreads; ++t) {
    auto& products = static_cast<const Waiting*>(slots[t])->state->products;
    products.erase(products.begin(), products.begin() + static_cast<std::ptrdiff_t>(count));
  }
}

uint32_t LoadBox(const TensorMap& map, const std::array<int, 5>& at, uint32_t to) {
  if (to % 128 != 0) Fail("a tensor copy to an address that is not a multiple of 128");
  uint32_t offset = 0;
  CopyBox(map, at, to, map.rank - 1, map.base, true, &offset);
  return offset;
}

}  // namespace strait::emulator
