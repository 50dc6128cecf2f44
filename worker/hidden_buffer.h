// SPDX-License-Identifier: Apache-2.0
//
// HiddenBuffer holds the hidden states of a step on their way, in host memory or on the device;
// HiddenView lends them to a backend.
//
// Owns:    host memory, or a place on the device that goes back to its owner when it is dropped.
// Thread:  a plain value; the owner of device memory takes it back on any thread.
// Shapes:  [num_tokens, hidden_row_bytes], row-major.
// Why:     who meets device memory where it cannot (a CPU backend, gRPC) has found a bug of ours:
//          an edge has device memory only if both of its ends compute there.
#pragma once

#include <cstddef>
#include <functional>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "proto/base/check.h"

namespace strait {

template <class Byte>
struct HiddenView {
  absl::Span<Byte> bytes;
  bool on_device = false;

  // REQUIRES: host memory.
  absl::Span<Byte> host() const {
    STRAIT_CHECK(!on_device, "hidden states on a device came to who computes on the host");
    return bytes;
  }
};
using HiddenIn = HiddenView<const std::byte>;
using HiddenOut = HiddenView<std::byte>;

class HiddenBuffer {
 public:
  HiddenBuffer() = default;
  HiddenBuffer(std::vector<std::byte> host) : host_(std::move(host)) {}  // NOLINT: a plain wrap
  // `bytes` at `device`, until `give_back`, which may be called on any thread.
  HiddenBuffer(std::byte* device, size_t bytes, std::function<void()> give_back)
      : device_(device), device_bytes_(bytes), give_back_(std::move(give_back)) {}
  HiddenBuffer(HiddenBuffer&& other) noexcept { Swap(other); }
  HiddenBuffer& operator=(HiddenBuffer&& other) noexcept {
    HiddenBuffer taken(std::move(other));
    Swap(taken);
    return *this;
  }
  ~HiddenBuffer() {
    if (give_back_) give_back_();
  }

  size_t size() const { return device_ != nullptr ? device_bytes_ : host_.size(); }
  bool on_device() const { return device_ != nullptr; }
  const std::byte* data() const { return device_ != nullptr ? device_ : host_.data(); }
  std::byte* data() { return device_ != nullptr ? device_ : host_.data(); }
  HiddenIn in() const { return {{data(), size()}, on_device()}; }
  HiddenOut out() { return {{data(), size()}, on_device()}; }

  // Keeps the first `bytes`. REQUIRES: no more than size().
  void Shrink(size_t bytes) {
    STRAIT_CHECK(bytes <= size());
    if (device_ != nullptr) {
      device_bytes_ = bytes;
    } else {
      host_.resize(bytes);
    }
  }

  // REQUIRES: host memory.
  std::vector<std::byte>& host() {
    STRAIT_CHECK(device_ == nullptr);
    return host_;
  }

 private:
  void Swap(HiddenBuffer& other) noexcept {
    std::swap(host_, other.host_);
    std::swap(device_, other.device_);
    std::swap(device_bytes_, other.device_bytes_);
    std::swap(give_back_, other.give_back_);
  }

  std::vector<std::byte> host_;
  std::byte* device_ = nullptr;
  size_t device_bytes_ = 0;
  std::function<void()> give_back_;
};

// Where a stage writes the hidden states of a step that leave it.
using HiddenMemory = std::function<HiddenBuffer(size_t bytes)>;

}  // namespace strait
