// SPDX-License-Identifier: Apache-2.0
//
// Protobuf by hand, for messages whose payload must not be copied through a message object: fields are
// written before a payload that is lent, and read from the slices in which a message came.
//
// Thread:  plain values.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "grpcpp/support/slice.h"

namespace strait::rpc {

// Protobuf tags: field number << 3 | wire type.
constexpr uint64_t VarintTag(uint32_t field) { return uint64_t{field} << 3; }
constexpr uint64_t BytesTag(uint32_t field) { return uint64_t{field} << 3 | 2; }

inline void AppendVarint(std::string* out, uint64_t value) {
  while (value >= 0x80) {
    out->push_back(static_cast<char>(value | 0x80));
    value >>= 7;
  }
  out->push_back(static_cast<char>(value));
}

// proto3 writes no zeros.
inline void AppendField(std::string* out, uint32_t field, uint64_t value) {
  if (value == 0) return;
  AppendVarint(out, VarintTag(field));
  AppendVarint(out, value);
}

class ByteCursor {
 public:
  // Borrows the slices.
  explicit ByteCursor(const std::vector<grpc::Slice>& slices) : slices_(slices) {
    for (const grpc::Slice& slice : slices) remaining_ += slice.size();
    SkipEmpty();
  }

  uint64_t remaining() const { return remaining_; }
  size_t slice() const { return slice_; }
  size_t offset() const { return offset_; }

  bool Varint(uint64_t* value) {
    *value = 0;
    for (int shift = 0; shift < 64; shift += 7) {
      if (remaining_ == 0) return false;
      const uint8_t byte = slices_[slice_].begin()[offset_];
      Advance(1);
      if (shift == 63 && byte > 1) return false;
      *value |= static_cast<uint64_t>(byte & 0x7f) << shift;
      if (byte < 0x80) return true;
    }
    return false;
  }

  // Appends. REQUIRES: n <= remaining().
  void Read(size_t n, std::string* out) {
    while (n > 0) {
      const size_t run = std::min(n, slices_[slice_].size() - offset_);
      out->append(reinterpret_cast<const char*>(slices_[slice_].begin()) + offset_, run);
      Advance(run);
      n -= run;
    }
  }

 private:
  void Advance(size_t n) {
    offset_ += n;
    remaining_ -= n;
    SkipEmpty();
  }
  void SkipEmpty() {
    while (slice_ < slices_.size() && offset_ == slices_[slice_].size()) {
      ++slice_;
      offset_ = 0;
    }
  }

  const std::vector<grpc::Slice>& slices_;
  size_t slice_ = 0;
  size_t offset_ = 0;
  uint64_t remaining_ = 0;
};

}  // namespace strait::rpc
