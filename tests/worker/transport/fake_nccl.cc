// SPDX-License-Identifier: Apache-2.0
#include "tests/worker/transport/fake_nccl.h"

#include <xxhash.h>

#include <cstring>
#include <utility>

#include "proto/base/limits.h"

namespace strait {

struct NcclComm {
  FakeFabric::Pair* pair = nullptr;
  int rank = 0;
  uint32_t version = 0;
  NcclCode state = kNcclInProgress;  // of the communicator itself
  int polls_left = 0;                // the last call is in progress so long
  bool revoked = false;
  bool revoke_hangs = false;
  bool finalized = false;
  bool finalize_hangs = false;
  bool gone = false;
  std::function<void()> then;  // what the call in progress does at its end
};

namespace {

struct FakeStream {
  std::vector<FakeOpPtr> ops;
};
struct FakeEvent {
  FakeStream* stream = nullptr;
  size_t ops = 0;
};

void WaitWhile(const std::atomic<bool>& fault) {
  while (fault) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

// Waits for all that the process has on the device, inside CUDA.
void WaitForDevice(FakeFabric* fabric, FakeFaults* faults) {
  std::lock_guard cuda(faults->cuda);
  const auto idle = [&] {
    std::lock_guard lock(fabric->mu);
    std::erase_if(faults->on_device, [](const FakeOpPtr& op) { return op->done; });
    return faults->on_device.empty();
  };
  while (faults->frees_wait && !idle()) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

// Every operation that both sides have posted happens.
void Match(FakeFabric::Pair& pair) {
  auto& [sends, receives] = pair.ops;
  for (; pair.matched < std::min(sends.size(), receives.size()); ++pair.matched) {
    FakeOp& send = *sends[pair.matched];
    FakeOp& receive = *receives[pair.matched];
    // Unequal sizes: undefined; here the worst.
    if (send.hangs || receive.hangs || send.done || receive.done || send.bytes != receive.bytes) {
      continue;
    }
    memcpy(receive.to, send.from, send.bytes);
    if (send.corrupts) receive.to[send.bytes / 2] ^= std::byte{1};
    send.done = receive.done = true;
  }
}

}  // namespace

void FakeNccl::Problem(std::string what) { fabric_->problems.push_back(std::move(what)); }

void FakeNccl::CheckThread(const char* what) {
  std::lock_guard lock(fabric_->mu);
  if (std::this_thread::get_id() == fabric_->loop_thread) {
    Problem(std::string(what) + " on the loop thread");
  }
}

NcclCode FakeNccl::MakeId(std::string* id) {
  CheckThread("MakeId");
  std::lock_guard lock(fabric_->mu);
  *id = "id " + std::to_string(++fabric_->num_ids);
  id->resize(limits::kNcclIdBytes);
  fabric_->pairs[*id];
  return kNcclSuccess;
}

NcclCode FakeNccl::Init(NcclComm** comm, const std::string& id, int rank) {
  CheckThread("Init");
  ++inits;
  std::lock_guard lock(fabric_->mu);
  FakeFabric::Pair& pair = fabric_->pairs[id];
  auto* made = new NcclComm;
  made->pair = &pair;
  made->rank = rank;
  made->version = version_;
  made->polls_left = faults_->polls;
  *comm = made;
  ++comms;
  if (pair.ranks[rank] != nullptr) {
    made->state = kNcclInvalidUsage;  // a duplicate
    return kNcclInvalidUsage;
  }
  pair.ranks[rank] = made;
  if (faults_->init_hangs) return kNcclInProgress;
  NcclComm* const peer = pair.ranks[1 - rank];
  if (peer != nullptr && peer->state == kNcclInProgress) {
    made->state = peer->state = peer->version == version_ ? kNcclSuccess : kNcclInvalidUsage;
  }
  return kNcclInProgress;
}

NcclCode FakeNccl::AsyncError(NcclComm* comm, NcclCode* state) {
  CheckThread("AsyncError");
  std::lock_guard lock(fabric_->mu);
  if (comm->gone) Problem("AsyncError after the end");
  *state = comm->state;
  if (comm->revoked) {
    *state = comm->revoke_hangs ? kNcclInProgress : kNcclSuccess;
    return kNcclSuccess;
  }
  if (comm->finalized) {
    const bool waits = comm->finalize_hangs || (comm->polls_left > 0 && --comm->polls_left > 0);
    *state = waits ? kNcclInProgress : kNcclSuccess;
    return kNcclSuccess;
  }
  if (comm->state != kNcclSuccess) return kNcclSuccess;
  if (faults_->async_error != kNcclSuccess) *state = faults_->async_error;
  if (comm->polls_left > 0 && --comm->polls_left > 0) *state = kNcclInProgress;
  if (comm->polls_left == 0 && comm->then) std::exchange(comm->then, nullptr)();
  return kNcclSuccess;
}

NcclCode FakeNccl::Post(NcclComm* comm, FakeOp op, void* stream) {
  std::lock_guard cuda(faults_->cuda);
  std::lock_guard lock(fabric_->mu);
  if (comm->gone || comm->revoked || comm->finalized) Problem("an operation after the end");
  if (comm->state == kNcclInProgress || comm->polls_left > 0) {
    Problem("an operation while another call is in progress");
  }
  if (comm->state != kNcclSuccess) return comm->state;
  op.hangs = faults_->ops_hang;
  op.corrupts = faults_->corrupts;
  auto shared = std::make_shared<FakeOp>(op);
  const auto post = [this, comm, stream, shared] {
    comm->pair->ops[comm->rank].push_back(shared);
    static_cast<FakeStream*>(stream)->ops.push_back(shared);
    faults_->on_device.push_back(shared);
    ++posted;
    Match(*comm->pair);
  };
  comm->polls_left = faults_->polls;
  if (comm->polls_left > 0) {
    comm->then = post;
    return kNcclInProgress;
  }
  post();
  return kNcclSuccess;
}

NcclCode FakeNccl::Send(NcclComm* comm, const std::byte* data, size_t bytes, void* stream) {
  CheckThread("Send");
  WaitWhile(faults_->send_blocks);
  FakeOp op;
  op.from = data;
  op.bytes = bytes;
  return Post(comm, op, stream);
}

NcclCode FakeNccl::Receive(NcclComm* comm, std::byte* data, size_t bytes, void* stream) {
  CheckThread("Receive");
  FakeOp op;
  op.to = data;
  op.bytes = bytes;
  return Post(comm, op, stream);
}

void FakeNccl::Stop(NcclComm* comm) {
  comm->then = nullptr;
  for (const FakeOpPtr& op : comm->pair->ops[comm->rank]) op->done = true;
  NcclComm* const peer = comm->pair->ranks[1 - comm->rank];
  if (peer != nullptr && peer->state == kNcclSuccess) peer->state = kNcclRemoteError;
}

NcclCode FakeNccl::Finalize(NcclComm* comm) {
  CheckThread("Finalize");
  std::lock_guard lock(fabric_->mu);
  if (comm->finalized || comm->revoked || comm->gone) Problem("finalized too late");
  for (const FakeOpPtr& op : comm->pair->ops[comm->rank]) {
    if (!op->done) Problem("Finalize waits for what is under way");
  }
  comm->finalized = true;
  comm->finalize_hangs = faults_->finalize_hangs;
  comm->polls_left = faults_->polls;
  return kNcclInProgress;
}

NcclCode FakeNccl::Revoke(NcclComm* comm) {
  CheckThread("Revoke");
  ++revokes;
  std::lock_guard lock(fabric_->mu);
  if (comm->revoked || comm->gone) Problem("revoked twice");
  comm->revoked = true;
  comm->revoke_hangs = faults_->revoke_hangs;
  if (!comm->revoke_hangs) Stop(comm);
  return kNcclInProgress;
}

NcclCode FakeNccl::Destroy(NcclComm* comm) {
  CheckThread("Destroy");
  {
    std::lock_guard lock(fabric_->mu);
    const bool quiet =
        (comm->revoked && !comm->revoke_hangs) || (comm->finalized && !comm->finalize_hangs);
    if (!quiet) Problem("Destroy of what is not quiet would block");
    comm->pair->ranks[comm->rank] = nullptr;
  }
  Free(comm);
  return kNcclSuccess;
}

NcclCode FakeNccl::Abort(NcclComm* comm) {
  CheckThread("Abort");
  ++aborts;
  WaitWhile(faults_->abort_blocks);
  {
    std::lock_guard lock(fabric_->mu);
    if (comm->pair->ranks[comm->rank] == comm) {  // a duplicate never got there
      Stop(comm);
      comm->pair->ranks[comm->rank] = nullptr;
    }
  }
  Free(comm);
  return kNcclSuccess;
}

void FakeNccl::Free(NcclComm* comm) {
  WaitForDevice(fabric_, faults_);
  --comms;
  delete comm;
}

absl::StatusOr<std::byte*> FakeDevice::Take(size_t bytes) {
  std::lock_guard cuda(faults_->cuda);
  if (faults_->out_of_memory) return absl::ResourceExhaustedError("no memory on the fake");
  ++pieces;
  return new std::byte[bytes];
}
void FakeDevice::Give(std::byte* memory) {
  WaitForDevice(fabric_, faults_);
  --pieces;
  delete[] memory;
}
absl::StatusOr<void*> FakeDevice::MakeStream() {
  std::lock_guard cuda(faults_->cuda);
  ++streams;
  return new FakeStream;
}
void FakeDevice::FreeStream(void* stream) {
  std::lock_guard cuda(faults_->cuda);
  std::lock_guard lock(fabric_->mu);
  for (const FakeOpPtr& op : static_cast<FakeStream*>(stream)->ops) {
    if (!op->done) fabric_->problems.push_back("the stream's end would block");
  }
  --streams;
  delete static_cast<FakeStream*>(stream);
}
absl::StatusOr<void*> FakeDevice::MakeEvent() {
  std::lock_guard cuda(faults_->cuda);
  ++events;
  return new FakeEvent;
}
void FakeDevice::FreeEvent(void* event) {
  std::lock_guard cuda(faults_->cuda);
  --events;
  delete static_cast<FakeEvent*>(event);
}
absl::Status FakeDevice::Record(void* event, void* stream) {
  std::lock_guard cuda(faults_->cuda);
  std::lock_guard lock(fabric_->mu);
  auto* const on = static_cast<FakeStream*>(stream);
  *static_cast<FakeEvent*>(event) = {on, on->ops.size()};
  return absl::OkStatus();
}
absl::StatusOr<bool> FakeDevice::Done(void* event) {
  std::lock_guard cuda(faults_->cuda);
  std::lock_guard lock(fabric_->mu);
  const auto& [stream, ops] = *static_cast<FakeEvent*>(event);
  for (size_t i = 0; i < ops; ++i) {
    if (!stream->ops[i]->done) return false;
  }
  return true;
}
absl::Status FakeDevice::Upload(std::byte* to, const std::byte* from, size_t bytes, void*) {
  std::lock_guard cuda(faults_->cuda);
  ++uploads;
  memcpy(to, from, bytes);
  return absl::OkStatus();
}

absl::Status FakeDevice::Checksums(const std::byte* data, absl::Span<const uint32_t> piece_bytes,
                                   absl::Span<uint64_t> sums) {
  for (size_t i = 0; i < piece_bytes.size(); data += piece_bytes[i++]) {
    ++checksums;
    if (piece_bytes[i] <= kShortPieceBytes) return absl::InvalidArgumentError("a short piece");
    sums[i] = XXH3_64bits(data, piece_bytes[i]);
  }
  return absl::OkStatus();
}

}  // namespace strait
