// SPDX-License-Identifier: Apache-2.0
//
// SafetensorsFile maps one .safetensors file and answers where its tensors lie.
//
// Owns:    the mapping (read-only, shared with the page cache). Views borrow it.
// Thread:  immutable after Open.
// Errors:  all name file and tensor. NotFound: no such file. DataLoss: the bytes contradict
//          themselves (truncated, offsets outside, overlaps, gaps, size that shape and dtype do
//          not give). InvalidArgument: not a safetensors file (malformed header).
// Limits:  limits::kMaxSafetensorsHeaderBytes, kMaxTensorRank, kMaxTensorsPerFile.
// Why:     the format is a length, a JSON header and bytes; checking it all once here is what lets
//          the rest of the worker trust a view.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "worker/checkpoint/bus_error.h"

namespace strait {

struct TensorEntry {
  std::string dtype;  // safetensors' name, one of the format's: "BF16", "F8_E4M3", "I64", …
  std::vector<uint64_t> shape;
  uint64_t begin = 0;  // bytes from the start of the file
  uint64_t bytes = 0;
};

class SafetensorsFile {
 public:
  static absl::StatusOr<std::shared_ptr<const SafetensorsFile>> Open(const std::string& path);
  ~SafetensorsFile();
  SafetensorsFile(const SafetensorsFile&) = delete;
  SafetensorsFile& operator=(const SafetensorsFile&) = delete;

  // nullptr if there is none.
  const TensorEntry* Find(std::string_view name) const;
  // REQUIRES: `entry` came from Find. Not aligned: the format does not promise it.
  const std::byte* Data(const TensorEntry& entry) const { return data_ + entry.begin; }

  const std::string& path() const { return path_; }
  uint64_t size() const { return size_; }
  const absl::flat_hash_map<std::string, TensorEntry>& tensors() const { return tensors_; }

 private:
  SafetensorsFile(std::string path, const std::byte* data, uint64_t size)
      : path_(std::move(path)), data_(data), size_(size), watched_(data, size, path_.c_str()) {}
  absl::Status ParseHeader();

  const std::string path_;
  const std::byte* const data_;
  const uint64_t size_;
  const WatchedMapping watched_;  // a fault in the mapping is told with the path
  absl::flat_hash_map<std::string, TensorEntry> tensors_;
};

// Bytes of one element; 0 for a name that the format does not have.
uint32_t SafetensorsDTypeBytes(std::string_view dtype);

}  // namespace strait
