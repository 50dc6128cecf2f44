// SPDX-License-Identifier: Apache-2.0
//
// RowsDigest sums up which rows of a sequence went from one worker to another, and what they are:
// RowsFetched.digest, RowsServed.digest. Who reads and who is read compute it each from its own
// bytes; the sums over all stages of both pipelines must be equal.
//
// Thread:  plain value.
// Why:     a piece is the rows of one BlockHeader. It counts by its layer, its first position, its
//          number of rows and their checksum, which was made when they were read, or had arrived.
//          Pieces are summed up, so the stages of the two pipelines may have other layers, and a
//          piece that was read twice, since a stream broke, counts once.
#pragma once

#ifndef XXH_INLINE_ALL
#define XXH_INLINE_ALL
#endif
#include <xxhash.h>

#include <bit>
#include <cstdint>
#include <map>
#include <utility>

#include "proto/latent_block.h"

namespace strait {

static_assert(std::endian::native == std::endian::little);

class RowsDigest {
 public:
  void Add(const BlockHeader& piece) {
    Piece& entry = pieces_[{piece.layer, piece.first_position}];
    num_rows_ += uint64_t{piece.num_rows} - entry.num_rows;
    value_ -= entry.hash;
    const uint64_t words[] = {piece.layer, piece.first_position, piece.num_rows,
                              piece.row_checksum};
    entry = {piece.num_rows, XXH3_64bits(words, sizeof(words))};
    value_ += entry.hash;
  }
  uint64_t Value() const { return value_; }
  // Summed over layers.
  uint64_t num_rows() const { return num_rows_; }

 private:
  struct Piece {
    uint32_t num_rows = 0;
    uint64_t hash = 0;
  };
  std::map<std::pair<uint32_t, uint32_t>, Piece> pieces_;  // by layer and first position
  uint64_t num_rows_ = 0;
  uint64_t value_ = 0;
};

}  // namespace strait
