// SPDX-License-Identifier: Apache-2.0
//
// Where a run of 1, 2 or 4 grains fits into a split unit, and which unit to prefer: tables over the 256
// masks of free grains. A part of UnitPool.
//
// Thread:  constants.
// Why:     the fullest unit first, whatever its holes look like: so the emptiest ones get the time to
//          become whole. Only between equally full ones does the hole decide: the smallest that fits.
#pragma once

#include <array>
#include <bit>
#include <cstdint>

#include "proto/model/block_units.h"

namespace strait {

inline constexpr uint32_t kAllGrains = 255;  // mask of a unit that is free
inline constexpr uint32_t kNumRunSizes = 3;  // 1, 2, 4

constexpr uint32_t MaskOf(uint32_t first, uint32_t grains) {
  return ((1u << grains) - 1) << first % kUnitGrains;
}

// Where a run fits into a split unit, and which unit to prefer: by the mask of its free grains.
struct FitTables {
  // [run size][mask]: first grain of the run, or kUnitGrains: none.
  std::array<std::array<uint8_t, 256>, kNumRunSizes> place = {};
  // [run size]: masks with a place, the fullest units first; and each mask's place in that order.
  std::array<std::array<uint8_t, 256>, kNumRunSizes> order = {};
  std::array<std::array<uint8_t, 256>, kNumRunSizes> rank = {};
};

constexpr FitTables MakeFitTables() {
  FitTables tables;
  for (uint32_t size = 0; size < kNumRunSizes; ++size) {
    const uint32_t grains = 1u << size;
    // By what the place would break up: a larger run is left whole where another place is.
    std::array<uint32_t, 256> breaks = {};
    for (uint32_t mask = 0; mask < 256; ++mask) {
      tables.place[size][mask] = kUnitGrains;
      breaks[mask] = 2 * kUnitGrains;
      for (uint32_t first = 0; first < kUnitGrains; first += grains) {
        if ((mask & MaskOf(first, grains)) != MaskOf(first, grains)) continue;
        uint32_t room = grains;
        while (room < kUnitGrains) {
          const uint32_t larger = MaskOf(first / (2 * room) * (2 * room), 2 * room);
          if ((mask & larger) != larger) break;
          room *= 2;
        }
        if (room >= breaks[mask]) continue;
        breaks[mask] = room;
        tables.place[size][mask] = static_cast<uint8_t>(first);
      }
    }
    uint32_t count = 0;
    for (int free = 1; free < static_cast<int>(kUnitGrains); ++free) {
      for (uint32_t room = grains; room < kUnitGrains; room *= 2) {
        for (uint32_t mask = 1; mask < kAllGrains; ++mask) {
          if (std::popcount(mask) != free || breaks[mask] != room) continue;
          tables.rank[size][mask] = static_cast<uint8_t>(count);
          tables.order[size][count++] = static_cast<uint8_t>(mask);
        }
      }
    }
  }
  return tables;
}

inline constexpr FitTables kFit = MakeFitTables();

}  // namespace strait
