// SPDX-License-Identifier: Apache-2.0
//
// What the emulator keeps in a CUtensorMap, and the copy that reads it.
#pragma once

#include <array>
#include <cstdint>

namespace strait::emulator {

struct TensorMap {
  const unsigned char* base;
  uint64_t strides[4];  // bytes, of dimensions 1...
  uint32_t sizes[5];
  uint32_t box[5];
  uint32_t rank;
  uint32_t element_bytes;
  uint32_t swizzled;  // in 128 bytes
};
static_assert(sizeof(TensorMap) <= 128);

// Copies the box at `at` to shared memory; what lies outside the tensor is zero. Returns its bytes.
uint32_t LoadBox(const TensorMap& map, const std::array<int, 5>& at, uint32_t to);

}  // namespace strait::emulator
