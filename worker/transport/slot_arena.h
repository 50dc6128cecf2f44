// SPDX-License-Identifier: Apache-2.0
//
// SlotArena lends places of one piece of device memory to the steps of an edge; ArenaPool keeps
// such pieces for the next edge.
//
// Owns:    the pool: device memory, for as long as the pool or any place of it lives.
// Thread:  any, synchronized inside.
// Limits:  an arena's bytes; a full one answers nothing, and who asks tries again later.
// Why:     giving memory back to CUDA waits for everything that runs on the device, a receive that
//          was posted ahead included. So it is kept, unless the device has memory of another kind.
#pragma once

#include <cstddef>
#include <map>
#include <memory>
#include <mutex>
#include <optional>

#include "absl/status/statusor.h"
#include "worker/hidden_buffer.h"
#include "worker/transport/nccl_api.h"

namespace strait {

inline constexpr size_t kSlotAlign = 256;

class SlotArena;

class ArenaPool : public std::enable_shared_from_this<ArenaPool> {
 public:
  explicit ArenaPool(std::shared_ptr<EdgeDevice> device) : device_(std::move(device)) {}
  ~ArenaPool();

  // One of at least `bytes`; its memory comes back when the last place of it is dropped. Errors:
  // the device's.
  absl::StatusOr<std::shared_ptr<SlotArena>> Take(size_t bytes);
  size_t bytes_idle() const;

 private:
  friend class SlotArena;
  void PutBack(std::byte* memory, size_t bytes);

  const std::shared_ptr<EdgeDevice> device_;
  mutable std::mutex mu_;
  std::multimap<size_t, std::byte*> idle_;  // guarded by mu_, by size
};

class SlotArena : public std::enable_shared_from_this<SlotArena> {
 public:
  SlotArena(std::shared_ptr<ArenaPool> pool, std::byte* memory, size_t bytes);
  ~SlotArena();

  // The first place that fits; none if there is none now. REQUIRES: bytes > 0.
  std::optional<HiddenBuffer> Take(size_t bytes);
  size_t bytes() const { return bytes_; }

 private:
  void Give(size_t begin, size_t bytes);

  const std::shared_ptr<ArenaPool> pool_;
  std::byte* const memory_;
  const size_t bytes_;
  std::mutex mu_;
  std::map<size_t, size_t> free_;  // guarded by mu_: begin → end, never touching
};

}  // namespace strait
