// SPDX-License-Identifier: Apache-2.0
#include "worker/checkpoint/fingerprint.h"

#include <fcntl.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "proto/base/status_macros.h"
#include "worker/checkpoint/checkpoint.h"
#include "worker/checkpoint/safetensors.h"

namespace strait {
namespace {

constexpr char kRevision[] = "strait-weights-1";

class Digest {
 public:
  Digest() {
    XXH3_64bits_reset(state_);
    Add(kRevision);
  }
  ~Digest() { XXH3_freeState(state_); }
  Digest(const Digest&) = delete;
  Digest& operator=(const Digest&) = delete;

  void Add(uint64_t value) { XXH3_64bits_update(state_, &value, sizeof(value)); }
  void Add(std::string_view text) {
    Add(uint64_t{text.size()});
    XXH3_64bits_update(state_, text.data(), text.size());
  }
  uint64_t Value() const { return XXH3_64bits_digest(state_); }

 private:
  XXH3_state_t* const state_ = XXH3_createState();
};

// Reads with a descriptor, not through the mapping: a fault there would read ahead much more.
class Reader {
 public:
  explicit Reader(const std::string& path)
      : path_(path), fd_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (fd_ >= 0) posix_fadvise(fd_, 0, 0, POSIX_FADV_RANDOM);
  }
  ~Reader() {
    if (fd_ >= 0) close(fd_);
  }
  Reader(const Reader&) = delete;
  Reader& operator=(const Reader&) = delete;

  absl::Status Sample(uint64_t begin, uint64_t bytes, Digest* digest) {
    buffer_.resize(bytes);
    uint64_t have = 0;
    while (have < bytes) {
      const ssize_t n =
          pread(fd_, buffer_.data() + have, bytes - have, static_cast<off_t>(begin + have));
      if (n < 0 && errno == EINTR) continue;
      if (n <= 0) {
        return absl::DataLossError(
            absl::StrCat(path_, ": cannot be read at byte ", begin + have, ": ",
                         n < 0 ? std::strerror(errno) : "the file was cut meanwhile"));
      }
      have += static_cast<uint64_t>(n);
    }
    digest->Add(std::string_view(buffer_));
    return absl::OkStatus();
  }

 private:
  const std::string path_;
  const int fd_;
  std::string buffer_;
};

absl::Status AddFile(const std::string& path, Digest* digest) {
  STRAIT_ASSIGN_OR_RETURN(const auto file, SafetensorsFile::Open(path));
  std::vector<std::pair<std::string_view, const TensorEntry*>> tensors;
  for (const auto& [name, entry] : file->tensors()) tensors.emplace_back(name, &entry);
  // In the file's order: reads go forward. Empty tensors share an offset, hence the name.
  std::sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) {
    return std::pair(a.second->begin, a.first) < std::pair(b.second->begin, b.first);
  });
  digest->Add(file->size());
  digest->Add(uint64_t{tensors.size()});
  Reader reader(path);
  for (const auto& [name, entry] : tensors) {
    digest->Add(name);
    digest->Add(std::string_view(entry->dtype));
    digest->Add(uint64_t{entry->shape.size()});
    for (const uint64_t dim : entry->shape) digest->Add(dim);
    digest->Add(entry->begin);
    digest->Add(entry->bytes);
    if (entry->bytes <= 2 * kSampleBytes) {
      STRAIT_RETURN_IF_ERROR(reader.Sample(entry->begin, entry->bytes, digest));
      continue;
    }
    STRAIT_RETURN_IF_ERROR(reader.Sample(entry->begin, kSampleBytes, digest));
    const uint64_t middle =
        std::min(std::max(entry->bytes / 2, kSampleBytes), entry->bytes - kSampleBytes);
    STRAIT_RETURN_IF_ERROR(reader.Sample(entry->begin + middle, kSampleBytes, digest));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<uint64_t> WeightsFingerprint(const std::string& dir) {
  STRAIT_ASSIGN_OR_RETURN(const std::shared_ptr<Checkpoint> checkpoint, Checkpoint::Open(dir));
  Digest digest;
  for (const std::string& file : checkpoint->files()) {
    digest.Add(std::string_view(file));
    STRAIT_RETURN_IF_ERROR(AddFile(dir + "/" + file, &digest));
  }
  return digest.Value();
}

uint64_t RandomWeightsFingerprint(uint64_t seed) {
  Digest digest;
  digest.Add(std::string_view("random"));
  digest.Add(seed);
  return digest.Value();
}

}  // namespace strait
