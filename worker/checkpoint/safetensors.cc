// SPDX-License-Identifier: Apache-2.0
#include "worker/checkpoint/safetensors.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"
#include "proto/base/text.h"
#include "worker/checkpoint/safetensors_header.h"

namespace strait {
namespace {

static_assert(std::endian::native == std::endian::little, "safetensors are little-endian");

constexpr uint64_t kLengthBytes = 8;

absl::Status Broken(const std::string& path, std::string_view what) {
  return absl::DataLossError(
      absl::StrCat(path, ": ", ToAbsl(what), "; the file is damaged, download it again"));
}

absl::Status BrokenTensor(const std::string& path, const HeaderEntry& entry,
                          std::string_view what) {
  return Broken(path, ToStd(absl::StrCat("tensor \"", entry.name, "\" ", ToAbsl(what))));
}

// Bytes that dtype and shape give.
absl::StatusOr<uint64_t> ExpectedBytes(const std::string& path, const HeaderEntry& entry) {
  uint64_t bytes = SafetensorsDTypeBytes(entry.dtype);
  if (bytes == 0) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": tensor \"", entry.name,
                                                   "\" has dtype \"", entry.dtype,
                                                   "\", which safetensors do not know"));
  }
  for (const uint64_t dim : entry.shape) {
    if (__builtin_mul_overflow(bytes, dim, &bytes)) {
      return BrokenTensor(path, entry,
                          ToStd(absl::StrCat("has shape [", absl::StrJoin(entry.shape, ", "),
                                             "], more than 2^64 bytes")));
    }
  }
  return bytes;
}

}  // namespace

uint32_t SafetensorsDTypeBytes(std::string_view dtype) {
  struct Row {
    std::string_view name;
    uint32_t bytes;
  };
  static constexpr Row kRows[] = {
      {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E5M2", 1}, {"F8_E4M3", 1}, {"F8_E8M0", 1},
      {"I16", 2},  {"U16", 2}, {"F16", 2}, {"BF16", 2},    {"I32", 4},     {"U32", 4},
      {"F32", 4},  {"F64", 8}, {"I64", 8}, {"U64", 8},     {"C64", 8}};
  for (const Row& row : kRows) {
    if (row.name == dtype) return row.bytes;
  }
  return 0;
}

absl::StatusOr<std::shared_ptr<const SafetensorsFile>> SafetensorsFile::Open(
    const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (fd < 0) {
    return absl::NotFoundError(absl::StrCat(path, ": cannot be opened: ", std::strerror(errno)));
  }
  struct stat info;
  if (fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
    close(fd);
    return absl::InvalidArgumentError(absl::StrCat(path, ": is not a regular file"));
  }
  const uint64_t size = static_cast<uint64_t>(info.st_size);
  if (size < kLengthBytes) {
    close(fd);
    return Broken(path, ToStd(absl::StrCat(size, " bytes are too few for a safetensors file")));
  }
  void* data = mmap(nullptr, size, PROT_READ, MAP_SHARED, fd, 0);
  const int map_error = errno;
  close(fd);
  if (data == MAP_FAILED) {
    return absl::ResourceExhaustedError(
        absl::StrCat(path, ": cannot be mapped: ", std::strerror(map_error)));
  }
  std::shared_ptr<SafetensorsFile> file(
      new SafetensorsFile(path, static_cast<const std::byte*>(data), size));
  STRAIT_RETURN_IF_ERROR(file->ParseHeader());
  return std::shared_ptr<const SafetensorsFile>(std::move(file));
}

SafetensorsFile::~SafetensorsFile() { munmap(const_cast<std::byte*>(data_), size_); }

absl::Status SafetensorsFile::ParseHeader() {
  uint64_t length;
  std::memcpy(&length, data_, kLengthBytes);
  if (length > limits::kMaxSafetensorsHeaderBytes) {
    return absl::InvalidArgumentError(absl::StrCat(
        path_, ": its header would be ", length, " bytes, more than the limit of ",
        limits::kMaxSafetensorsHeaderBytes, "; it is not a safetensors file or is damaged"));
  }
  if (length > size_ - kLengthBytes) {
    return Broken(path_, ToStd(absl::StrCat("truncated: the header has ", length,
                                            " bytes, the file only ", size_)));
  }
  const std::string_view json(reinterpret_cast<const char*>(data_) + kLengthBytes, length);
  STRAIT_ASSIGN_OR_RETURN(std::vector<HeaderEntry> entries, ParseSafetensorsHeader(json, path_));

  const uint64_t data_begin = kLengthBytes + length;
  const uint64_t data_bytes = size_ - data_begin;
  std::sort(entries.begin(), entries.end(), [](const HeaderEntry& a, const HeaderEntry& b) {
    return std::pair(a.begin, a.end) < std::pair(b.begin, b.end);
  });
  tensors_.reserve(entries.size());
  uint64_t end_of_previous = 0;
  for (HeaderEntry& entry : entries) {
    STRAIT_ASSIGN_OR_RETURN(const uint64_t bytes, ExpectedBytes(path_, entry));
    if (entry.end < entry.begin || entry.end - entry.begin != bytes) {
      return BrokenTensor(
          path_, entry,
          ToStd(absl::StrCat("has data_offsets [", entry.begin, ", ", entry.end, "], but ",
                             entry.dtype, " [", absl::StrJoin(entry.shape, ", "), "] takes ", bytes,
                             " bytes")));
    }
    if (entry.end > data_bytes) {
      return BrokenTensor(path_, entry,
                          ToStd(absl::StrCat("ends at byte ", entry.end, " of the data, but only ",
                                             data_bytes, " are there: truncated")));
    }
    if (entry.begin < end_of_previous) {
      return BrokenTensor(
          path_, entry,
          ToStd(absl::StrCat("begins at byte ", entry.begin,
                             ", inside another tensor that ends at ", end_of_previous)));
    }
    if (entry.begin > end_of_previous) {
      return BrokenTensor(
          path_, entry,
          ToStd(absl::StrCat("begins at byte ", entry.begin, " and leaves ",
                             entry.begin - end_of_previous, " bytes before it unused")));
    }
    end_of_previous = entry.end;
    TensorEntry tensor{std::move(entry.dtype), std::move(entry.shape), data_begin + entry.begin,
                       bytes};
    if (!tensors_.emplace(entry.name, std::move(tensor)).second) {
      return BrokenTensor(path_, entry, "is there twice");
    }
  }
  if (end_of_previous != data_bytes) {
    return Broken(
        path_, ToStd(absl::StrCat(data_bytes - end_of_previous, " bytes follow the last tensor")));
  }
  return absl::OkStatus();
}

const TensorEntry* SafetensorsFile::Find(std::string_view name) const {
  const auto it = tensors_.find(ToAbsl(name));
  return it == tensors_.end() ? nullptr : &it->second;
}

}  // namespace strait
