// SPDX-License-Identifier: Apache-2.0
//
// Times a hop of hidden states through NcclTransport against bare ncclSend and ncclRecv: two
// processes on one GPU send a step to and fro, and a hop is half of a round. The transport's time
// includes what a worker pays: its threads on both sides, the queue to the loop, memory from the
// arena. Beside it, the GPU memory that the transport's four ends of edges took, and what they may.
//   cuda_nccl_hop_bench [--smoke]
#include <cuda_runtime_api.h>
#include <signal.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <string>
#include <thread>
#include <vector>

#include "proto/check.h"
#include "proto/limits.h"
#include "proto/rpc/queue.h"
#include "worker/transport/nccl_device.h"
#include "worker/transport/nccl_library.h"
#include "worker/transport/nccl_transport.h"

namespace strait {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kSkipped = 77;
constexpr unsigned kHangsAfterSeconds = 300;
constexpr uint32_t kRowBytes = 8192;
constexpr uint64_t kThere = 1;  // edge of stages 1 → 2
constexpr uint64_t kBack = 3;   // edge of stages 3 → 4
constexpr int kWarmUp = 5;
constexpr int kDueAhead = 3;

struct Size {
  uint32_t tokens;
  int rounds;
};
constexpr Size kSizes[] = {{9, 200}, {128, 100}, {8192, 10}};  // 72 KiB, 1 MiB, 64 MiB

template <class T>
T Must(absl::StatusOr<T> value) {
  if (value.ok()) return *std::move(value);
  std::fprintf(stderr, "%s\n", value.status().ToString().c_str());
  std::exit(1);
}
void Must(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "%s\n", status.ToString().c_str());
  std::exit(1);
}

// One of the two processes; rank 0 measures.
class Side {
 public:
  Side(int rank, int peer, NcclOffer offer) : rank_(rank), peer_(peer), offer_(std::move(offer)) {}

  void Tell(const std::string& id) {
    STRAIT_CHECK(write(peer_, id.data(), id.size()) == static_cast<ssize_t>(id.size()));
  }
  std::string Hear() {
    std::string id(limits::kNcclIdBytes, 0);
    for (size_t have = 0; have < id.size();) {
      const ssize_t got = read(peer_, id.data() + have, id.size() - have);
      if (got <= 0) std::exit(1);  // the other has said why
      have += static_cast<size_t>(got);
    }
    return id;
  }

  // Both are here.
  void Meet() {
    Tell(std::string(limits::kNcclIdBytes, 'x'));
    (void)Hear();
  }
  // Median microseconds of a hop, bare.
  double Bare(const Size& size);
  // `taken`: bytes of GPU memory that both processes' edges took.
  double Transport(const Size& size, int64_t* taken);

 private:
  void Settle(NcclComm* comm, NcclCode code) {
    while (code == kNcclInProgress) {
      NcclCode state = kNcclSuccess;
      code = offer_.nccl->AsyncError(comm, &state);
      if (code == kNcclSuccess) code = state;
    }
    if (code == kNcclSuccess) return;
    std::fprintf(stderr, "%s\n", offer_.nccl->Text(code).c_str());
    std::exit(1);
  }
  // A communicator in which this process is `rank`; the one that is 1, who receives, makes the id.
  NcclComm* Join(int rank) {
    std::string id;
    if (rank == 1) {
      STRAIT_CHECK(offer_.nccl->MakeId(&id) == kNcclSuccess);
      Tell(id);
    } else {
      id = Hear();
    }
    NcclComm* comm = nullptr;
    const NcclCode begun = offer_.nccl->Init(&comm, id, rank);
    Settle(comm, begun);
    return comm;
  }
  template <class Round>
  double MedianHop(int rounds, Round round) {
    std::vector<double> hops;
    for (int i = 0; i < kWarmUp + rounds; ++i) {
      const auto begin = Clock::now();
      round();
      const std::chrono::duration<double, std::micro> took = Clock::now() - begin;
      if (i >= kWarmUp) hops.push_back(took.count() / 2);
    }
    std::nth_element(hops.begin(), hops.begin() + rounds / 2, hops.end());
    return hops[static_cast<size_t>(rounds) / 2];
  }

  const int rank_;
  const int peer_;
  const NcclOffer offer_;
};

double Side::Bare(const Size& size) {
  NcclApi& nccl = *offer_.nccl;
  EdgeDevice& device = *offer_.device;
  const size_t bytes = size_t{size.tokens} * kRowBytes;
  // As the transport has them: one communicator each way, whose rank 0 sends.
  NcclComm* const there = Join(rank_);
  NcclComm* const back = Join(1 - rank_);
  std::byte* const data = Must(device.Take(bytes));
  void* const stream = Must(device.MakeStream());
  void* const event = Must(device.MakeEvent());
  const double hop = MedianHop(size.rounds, [&] {
    if (rank_ == 0) {
      Settle(there, nccl.Send(there, data, bytes, stream));
      Settle(back, nccl.Receive(back, data, bytes, stream));
    } else {
      Settle(there, nccl.Receive(there, data, bytes, stream));
      Settle(back, nccl.Send(back, data, bytes, stream));
    }
    Must(device.Record(event, stream));
    while (!Must(device.Done(event))) {
    }
  });
  // Both are done before either leaves.
  Meet();
  (void)nccl.Abort(there);
  (void)nccl.Abort(back);
  device.FreeEvent(event);
  device.FreeStream(stream);
  device.Give(data);
  return hop;
}

int64_t FreeBytes() {
  size_t free = 0;
  size_t total = 0;
  STRAIT_CHECK(cudaMemGetInfo(&free, &total) == cudaSuccess);
  return static_cast<int64_t>(free);
}

double Side::Transport(const Size& size, int64_t* taken) {
  Meet();
  const int64_t free_before = FreeBytes();
  Meet();
  const size_t bytes = size_t{size.tokens} * kRowBytes;
  constexpr PipelineEpoch kEpoch{1, 1};
  BoundedQueue<HiddenStep> arrived(64);
  BoundedQueue<std::string> ids(2);
  BoundedQueue<int> up(2);
  NcclTransportOptions options;
  options.hidden_row_bytes = kRowBytes;
  NcclEvents events;
  events.transport.on_edge_up = [&](const Edge&) { up.Push(1); };
  std::atomic<bool> over = false;
  events.transport.on_edge_down = [&over](const Edge&, absl::Status why) {
    if (!over) Must(why);  // at the end, the other may be gone first
  };
  events.transport.on_hidden = [&](uint64_t, HiddenStep step) { arrived.Push(std::move(step)); };
  events.on_id = [&](const Edge&, std::string id) { ids.Push(std::move(id)); };
  events.on_poisoned = [](const std::string& why) { Must(absl::InternalError(why)); };
  NcclTransport transport(options, offer_, events);
  const uint64_t sends = rank_ == 0 ? kThere : kBack;
  const uint64_t receives = (rank_ == 0 ? kBack : kThere) + 1;
  Edge edge;
  edge.epoch = kEpoch;
  edge.over_nccl = true;
  edge.max_tokens = size.tokens;
  edge.from_stage_id = receives - 1;
  edge.to_stage_id = receives;
  transport.Expect(edge);
  Tell(ids.PopAll(std::chrono::seconds(60)).front());
  edge.from_stage_id = sends;
  edge.to_stage_id = sends + 1;
  edge.nccl_id = Hear();
  transport.Connect(edge);
  STRAIT_CHECK(!up.PopAll(std::chrono::seconds(60)).empty());

  const auto rounds = static_cast<uint64_t>(kWarmUp + size.rounds);
  uint64_t due = 0;
  uint64_t step = 0;
  const double hop = MedianHop(size.rounds, [&] {
    ++step;
    while (due < std::min(rounds, step + kDueAhead)) {
      transport.Due(receives, StepId{++due}, size.tokens, StepId{0});
    }
    const auto send = [&] {
      Must(transport.Send(sends,
                          {kEpoch, StepId{step}, size.tokens, transport.Memory(sends, bytes)}));
    };
    if (rank_ == 0) send();
    std::deque<HiddenStep> here = arrived.PopAll(std::chrono::seconds(60), kEagerHiddenWait);
    STRAIT_CHECK(here.size() == 1 && here.front().step == StepId{step});
    if (rank_ == 1) send();
  });
  // Rank 0 has what rank 1 sent last before either leaves.
  over = true;
  Meet();
  *taken = free_before - FreeBytes();
  Meet();
  transport.Disconnect(sends);
  transport.Forget(receives);
  return hop;
}

NcclOffer Open(int rank) {
  // Two processes on one GPU join only if they seem to be on two hosts.
  setenv("NCCL_HOSTID", ("strait-hop-" + std::to_string(rank)).c_str(), 1);
  setenv("NCCL_SOCKET_IFNAME", "lo", 0);
  setenv("NCCL_IB_DISABLE", "1", 0);
  NcclOffer offer;
  auto nccl = LoadNccl("");
  if (!nccl.ok()) {
    std::printf("SKIPPED: %s\n", std::string(nccl.status().message()).c_str());
    std::exit(kSkipped);
  }
  offer.nccl = *std::move(nccl);
  offer.device = MakeCudaEdgeDevice(0);
  if (const absl::Status used = offer.device->Use(); !used.ok()) {
    std::printf("SKIPPED, no GPU: %s\n", std::string(used.message()).c_str());
    std::exit(kSkipped);
  }
  return offer;
}

int Run(bool smoke) {
  int ends[2];
  STRAIT_CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
  const pid_t child = fork();  // before either has touched CUDA
  STRAIT_CHECK(child >= 0);
  const int rank = child == 0 ? 1 : 0;
  close(ends[1 - rank]);
  alarm(kHangsAfterSeconds);
  Side side(rank, ends[rank], Open(rank));
  const char* const mps = getenv("CUDA_MPS_PIPE_DIRECTORY") != nullptr ? "true" : "false";
  for (Size size : kSizes) {
    if (smoke) size.rounds = 3;
    const double bare = side.Bare(size);
    int64_t taken = 0;
    const double transport = side.Transport(size, &taken);
    if (rank == 1) continue;
    const size_t bytes = size_t{size.tokens} * kRowBytes;
    const double stated = 4.0 * static_cast<double>(kNcclEdgeBytes + kArenaSteps * bytes);
    std::printf(
        "%9zu bytes: a hop bare %9.1f us, through NcclTransport %9.1f us, ratio %.2f; four ends of "
        "edges took %.1f MiB of %.1f stated\n",
        bytes, bare, transport, transport / bare, static_cast<double>(taken) / (1 << 20),
        stated / (1 << 20));
    std::printf(
        "JSON {\"bench\": \"nccl_hop\", \"mps\": %s, \"nccl\": \"%s\", \"bytes\": %zu, "
        "\"bare_us\": %.1f, \"transport_us\": %.1f, \"ratio\": %.3f, \"taken\": %.0f, "
        "\"stated\": %.0f}\n",
        mps, NcclVersionText(LoadNccl("").value()->version()).c_str(), bytes, bare, transport,
        transport / bare, static_cast<double>(taken), stated);
    std::fflush(stdout);
  }
  if (rank == 1) std::_Exit(0);
  int status = 0;
  STRAIT_CHECK(waitpid(child, &status, 0) == child);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 1;
}

}  // namespace
}  // namespace strait

int main(int argc, char** argv) {
  return strait::Run(argc > 1 && std::strcmp(argv[1], "--smoke") == 0);
}
