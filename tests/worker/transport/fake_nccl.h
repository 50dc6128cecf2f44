// SPDX-License-Identifier: Apache-2.0
//
// FakeNccl and FakeDevice are NCCL and a GPU in host memory, with faults; FakeFabric is what joins
// the fakes of several workers.
//
// Thread:  any. The faults may be set at any time.
// Why:     a free waits, as CUDA's does, for all that its process has on the device, and lets no other
//          thread of the process into CUDA meanwhile. It also holds the caller to NCCL's rules: no call on a communicator that is in progress
//          but to ask or to stop it, none after it is gone, none on the loop thread. What is broken
//          is listed in FakeFabric::Problems.
#pragma once

#include <array>
#include <atomic>
#include <condition_variable>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "worker/transport/nccl_api.h"

namespace strait {

struct FakeOp {
  const std::byte* from = nullptr;
  std::byte* to = nullptr;
  size_t bytes = 0;
  bool hangs = false;
  bool corrupts = false;
  bool done = false;
};
using FakeOpPtr = std::shared_ptr<FakeOp>;

// Of one process.
struct FakeFaults {
  std::atomic<bool> init_hangs = false;      // is in progress for ever
  std::atomic<bool> ops_hang = false;        // what is posted from now on never ends by itself
  std::atomic<bool> corrupts = false;        // what is sent from now on arrives with another bit
  std::atomic<bool> send_blocks = false;     // the call does not come back until this is false
  std::atomic<bool> revoke_hangs = false;    // is in progress for ever
  std::atomic<bool> finalize_hangs = false;  // likewise
  std::atomic<bool> abort_blocks = false;    // does not come back until this is false
  std::atomic<bool> can_revoke = true;
  std::atomic<int> polls = 0;  // how often a call is still in progress before it is done
  std::atomic<NcclCode> async_error = kNcclSuccess;
  std::atomic<bool> out_of_memory = false;
  std::atomic<bool> frees_wait = true;  // false: what waits goes on, for a test that has failed
  std::mutex cuda;                      // held by who is in CUDA; before the fabric's mu
  std::vector<FakeOpPtr> on_device;     // guarded by the fabric's mu: all that was posted
};

class FakeFabric {
 public:
  std::vector<std::string> Problems() {
    std::lock_guard lock(mu);
    return problems;
  }

  struct Pair {
    std::array<NcclComm*, 2> ranks{};
    std::array<std::vector<FakeOpPtr>, 2> ops;
    size_t matched = 0;
  };
  std::mutex mu;
  std::map<std::string, Pair> pairs;
  std::vector<std::string> problems;
  int num_ids = 0;
  std::thread::id loop_thread;  // may not call
};

class FakeNccl final : public NcclApi {
 public:
  FakeNccl(FakeFabric* fabric, FakeFaults* faults, uint32_t version = 22809)
      : fabric_(fabric), faults_(faults), version_(version) {}

  uint32_t version() const override { return version_; }
  NcclCode MakeId(std::string* id) override;
  NcclCode Init(NcclComm** comm, const std::string& id, int rank) override;
  NcclCode AsyncError(NcclComm* comm, NcclCode* state) override;
  NcclCode Send(NcclComm* comm, const std::byte* data, size_t bytes, void* stream) override;
  NcclCode Receive(NcclComm* comm, std::byte* data, size_t bytes, void* stream) override;
  NcclCode Finalize(NcclComm* comm) override;
  bool can_revoke() const override { return faults_->can_revoke; }
  NcclCode Revoke(NcclComm* comm) override;
  NcclCode Destroy(NcclComm* comm) override;
  NcclCode Abort(NcclComm* comm) override;
  std::string Text(NcclCode code) const override { return "fake error " + std::to_string(code); }

  std::atomic<int> comms = 0;  // that exist
  std::atomic<int> inits = 0;
  std::atomic<int> aborts = 0;
  std::atomic<int> revokes = 0;
  std::atomic<int> posted = 0;  // sends and receives, since the start

 private:
  NcclCode Post(NcclComm* comm, FakeOp op, void* stream);
  void Free(NcclComm* comm);
  void Stop(NcclComm* comm);       // REQUIRES: mu held
  void Problem(std::string what);  // REQUIRES: mu held
  void CheckThread(const char* what);

  FakeFabric* const fabric_;
  FakeFaults* const faults_;
  const uint32_t version_;
};

class FakeDevice final : public EdgeDevice {
 public:
  FakeDevice(FakeFabric* fabric, FakeFaults* faults) : fabric_(fabric), faults_(faults) {}

  std::string name() const override { return device_name; }
  absl::Status Use() override { return absl::OkStatus(); }
  absl::StatusOr<std::byte*> Take(size_t bytes) override;
  void Give(std::byte* memory) override;
  absl::StatusOr<void*> MakeStream() override;
  void FreeStream(void* stream) override;
  absl::StatusOr<void*> MakeEvent() override;
  void FreeEvent(void* event) override;
  absl::Status Record(void* event, void* stream) override;
  absl::StatusOr<bool> Done(void* event) override;
  absl::Status Upload(std::byte* to, const std::byte* from, size_t bytes, void* stream) override;
  absl::Status Checksums(const std::byte* data, absl::Span<const uint32_t> piece_bytes,
                         absl::Span<uint64_t> sums) override;

  std::atomic<int> pieces = 0;   // of memory taken
  std::atomic<int> streams = 0;  // that exist
  std::atomic<int> events = 0;
  std::atomic<int> uploads = 0;
  std::atomic<int> checksums = 0;  // of pieces
  std::string device_name;         // constant after construction

 private:
  FakeFabric* const fabric_;
  FakeFaults* const faults_;
};

}  // namespace strait
