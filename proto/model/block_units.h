// SPDX-License-Identifier: Apache-2.0
//
// How a latent block lies in a pool that blocks of all row formats and ranks share: as pieces of equal
// units. The exact policy has no use for it: its blocks are all alike and lie contiguously
// (proto/latent_block.h, BlockBytes). Policies with tiers take their blocks in units.
//
// Thread:  pure functions.
// Shapes:  A unit has room for 64 rows of rope bf16 columns. It can be split into 8 grains. A piece is a
//          whole unit, or a run of 4, 2 or 1 grains of one that begins at a multiple of its size. The
//          pieces of a block, in this order:
//            rope key   one unit; with fp32 rows two
//            latent     sections, each of
//                         one grain of scales (fp8: of 4 units' codes, int4: of 1 unit's; else none),
//                         that many units of columns (fp32, bf16: 1), fewer in the last section,
//                       the last unit cut down to runs of grains of falling size.
//          A unit holds rope / 2 columns of fp32, rope of bf16, 2 rope of fp8, 4 rope of int4.
//          Bytes: each plane (a unit's columns, a grain of scales) has for every row the same number of
//          bytes, in the order that proto/latent_block.h gives them. They are cut in slices of rope / 4
//          bytes; a grain is one slice of all 64 rows, row after row.
// Limits:  rope is a multiple of 16, so that columns and scales end where slices, grains and units do.
//          rank: 1 to limits::kMaxLoraRank.
// Why:     slices go before rows, so the columns behind a rank are the last grains of the last pieces:
//          cutting the rank gives grains back and leaves every row where it is. A copy to the wire puts
//          a row together again; that is a gather, which a copy from a scattered pool is anyway.
#pragma once

#include <bit>
#include <cstdint>

#include "proto/base/limits.h"
#include "proto/latent_block.h"

namespace strait {

inline constexpr uint32_t kUnitGrains = 8;

// What decides the size of a block, given the model's rope.
struct BlockShape {
  RowFormat format = RowFormat::kFp32;
  uint32_t rank = 0;
  friend bool operator==(const BlockShape&, const BlockShape&) = default;
};

// Whether blocks with a key of so many columns can lie in units.
constexpr bool HasUnits(uint32_t rope) {
  return rope > 0 && rope % 16 == 0 && rope <= limits::kMaxHeadDim;
}

constexpr uint32_t UnitBytes(uint32_t rope) { return limits::kBlockTokens * rope * 2; }
constexpr uint32_t GrainBytes(uint32_t rope) { return UnitBytes(rope) / kUnitGrains; }

struct BlockPiece {
  uint32_t grains = 0;      // 1, 2, 4 or 8
  uint32_t used_bytes = 0;  // of rows; the rest of its last grain is padding
};

// The pieces of the blocks of one shape. REQUIRES: HasUnits(rope), and a rank within its limits.
class BlockUnits {
 public:
  constexpr BlockUnits(BlockShape shape, uint32_t rope)
      : shape_(shape),
        grain_bytes_(GrainBytes(rope)),
        rope_units_(shape.format == RowFormat::kFp32 ? 2 : 1),
        unit_columns_(shape.format == RowFormat::kInt4   ? 4 * rope
                      : shape.format == RowFormat::kFp8  ? 2 * rope
                      : shape.format == RowFormat::kBf16 ? rope
                                                         : rope / 2),
        section_units_(shape.format == RowFormat::kFp8 ? 4 : 1),
        has_scales_(ScaleBytes(shape.format, 1) > 0),
        full_units_(shape.rank / unit_columns_),
        tail_bytes_(limits::kBlockTokens *
                    LatentBytes(shape.format, shape.rank - full_units_ * unit_columns_)),
        tail_grains_((tail_bytes_ + grain_bytes_ - 1) / grain_bytes_) {
    const uint32_t units = full_units_ + (tail_grains_ > 0 ? 1 : 0);
    num_sections_ = (units + section_units_ - 1) / section_units_;
    first_tail_ = rope_units_ + full_units_ + (has_scales_ ? num_sections_ : 0);
  }

  constexpr uint32_t size() const {
    return first_tail_ + static_cast<uint32_t>(std::popcount(tail_grains_));
  }

  // REQUIRES: index < size().
  constexpr BlockPiece operator[](uint32_t index) const {
    if (index >= first_tail_) return TailPiece(index - first_tail_);
    const uint32_t in_section = section_units_ + 1;
    if (!has_scales_ || index < rope_units_ || (index - rope_units_) % in_section != 0) {
      return {kUnitGrains, kUnitGrains * grain_bytes_};
    }
    const uint32_t columns = section_units_ * unit_columns_;
    const uint32_t begin = (index - rope_units_) / in_section * columns;
    const uint32_t count = shape_.rank - begin < columns ? shape_.rank - begin : columns;
    return {1, limits::kBlockTokens * ScaleBytes(shape_.format, count)};
  }

  constexpr uint64_t grains() const {
    return uint64_t{rope_units_ + full_units_} * kUnitGrains + tail_grains_ +
           (has_scales_ ? num_sections_ : 0);
  }
  // What a block takes of the pool: rows and padding.
  constexpr uint64_t bytes() const { return grains() * grain_bytes_; }
  // What rows have of it.
  constexpr uint64_t used_bytes() const {
    return uint64_t{rope_units_ + full_units_} * kUnitGrains * grain_bytes_ + tail_bytes_ +
           limits::kBlockTokens * uint64_t{ScaleBytes(shape_.format, shape_.rank)};
  }
  constexpr uint64_t padded_bytes() const { return bytes() - used_bytes(); }

 private:
  // The runs of the last unit: a run for each bit of the number of grains, the largest first.
  constexpr BlockPiece TailPiece(uint32_t index) const {
    uint32_t rest = tail_grains_;
    for (; index > 0; --index) rest -= std::bit_floor(rest);
    const uint32_t grains = std::bit_floor(rest);
    const uint32_t bytes = tail_bytes_ - (tail_grains_ - rest) * grain_bytes_;
    return {grains, bytes < grains * grain_bytes_ ? bytes : grains * grain_bytes_};
  }

  BlockShape shape_;
  uint32_t grain_bytes_;
  uint32_t rope_units_;
  uint32_t unit_columns_;
  uint32_t section_units_;
  bool has_scales_;
  uint32_t full_units_;
  uint32_t tail_bytes_;   // of the columns beyond full units
  uint32_t tail_grains_;  // 0 to 8
  uint32_t num_sections_ = 0;
  uint32_t first_tail_ = 0;  // index of its first piece
};

constexpr uint64_t UnitBlockBytes(BlockShape shape, uint32_t rope) {
  return BlockUnits(shape, rope).bytes();
}

// V3's units, and the blocks of its whole rank, which have no padding.
static_assert(UnitBytes(64) == 8192 && GrainBytes(64) == 1024);
static_assert(UnitBlockBytes({RowFormat::kFp32, 512}, 64) == BlockBytes(RowFormat::kFp32, 512, 64));
static_assert(UnitBlockBytes({RowFormat::kBf16, 512}, 64) == BlockBytes(RowFormat::kBf16, 512, 64));
static_assert(UnitBlockBytes({RowFormat::kFp8, 512}, 64) == BlockBytes(RowFormat::kFp8, 512, 64));
static_assert(UnitBlockBytes({RowFormat::kInt4, 512}, 64) == BlockBytes(RowFormat::kInt4, 512, 64));
// Where a grain of scales, or the last grain of codes, is not full.
static_assert(BlockUnits({RowFormat::kFp8, 144}, 64).grains() == 8 + 1 + 8 + 1);
static_assert(BlockUnits({RowFormat::kFp8, 144}, 64).padded_bytes() == 512);
static_assert(BlockUnits({RowFormat::kInt4, 240}, 64).size() ==
              3);  // 7.5 grains of codes are a unit
static_assert(BlockUnits({RowFormat::kInt4, 240}, 64).padded_bytes() == 512);

}  // namespace strait
