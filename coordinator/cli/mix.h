// SPDX-License-Identifier: Apache-2.0
//
// Mix makes well-mixed numbers of a counter, so that what is drawn depends on the seed alone and
// not on a library's version.
//
// Thread:  any; Draws is plain data.
#pragma once

#include <cstddef>
#include <cstdint>

namespace strait::cli {

inline uint64_t Mix(uint64_t x) {  // splitmix64's finalizer
  x += 0x9E3779B97F4A7C15;
  x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9;
  x = (x ^ (x >> 27)) * 0x94D049BB133111EB;
  return x ^ (x >> 31);
}

// A sequence of such numbers.
struct Draws {
  uint64_t key;
  uint64_t Next() { return Mix(key++); }
  // REQUIRES: n > 0. Even but for a share of n / 2^64.
  size_t Below(size_t n) { return Next() % n; }
};

}  // namespace strait::cli
