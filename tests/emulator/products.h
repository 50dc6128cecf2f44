// SPDX-License-Identifier: Apache-2.0
//
// Warpgroup products of the emulator: kept by each thread, done when the warpgroup waits for them.
#pragma once

#include <cstdint>
#include <vector>

namespace strait::emulator {

// d[64, columns] (+)= A[64, 16] B[16, columns], of e4m3 codes 32 instead of 16, as one thread sees it.
struct Product {
  enum class Kind { kBf16, kHalf, kCodes };
  float* d;  // the thread's share
  int columns;
  Kind kind;                // of A's and B's numbers
  const uint32_t* a_pairs;  // 4 registers, of codes four each; null: a_descriptor
  uint64_t a_descriptor;
  uint64_t b_descriptor;
  bool b_columns;  // B's columns are contiguous in memory instead of k
  bool accumulate;
  uint64_t group;
};

struct ProductState {
  std::vector<Product> products;
  uint64_t group = 0;  // of the next product
};

// Of the thread that runs.
ProductState& Products();

struct Waiting {
  ProductState* state;
  uint64_t below;  // groups below it must be done
};

// A Combine over a warpgroup's Waiting.
void FinishProducts(void* const* slots, uint32_t mask);

}  // namespace strait::emulator
