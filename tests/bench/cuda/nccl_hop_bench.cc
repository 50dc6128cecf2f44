// SPDX-License-Identifier: Apache-2.0
//
// Times a hop of hidden states through NcclTransport against bare ncclSend and ncclRecv: two
// processes send a step to and fro, and a hop is half of a round. Both take turns, a batch of rounds
// each, so that what the machine does meanwhile meets both. The transport's time includes what a
// worker pays: its threads on both sides, the queue to the loop, memory from the arena. Beside it, the
// GPU memory that the transport's ends of edges took, four on one GPU or two on each, and what they may.
//   cuda_nccl_hop_bench [--gpus N] [--smoke]    N: 1 (default), or 2: one each
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
#include <string_view>
#include <thread>
#include <vector>

#include "proto/base/check.h"
#include "proto/base/limits.h"
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
constexpr int kWarmUp = 3;      // rounds of a batch that are not counted
constexpr int kDueAhead = 3;

struct Size {
  uint32_t tokens;
  int batches;
  int rounds;  // of a batch
};
// 72 KiB, 1 MiB, 64 MiB
constexpr Size kSizes[] = {{9, 10, 20}, {128, 10, 10}, {8192, 4, 3}};

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
  Side(int rank, int peer, NcclOffer offer) : rank(rank), offer(std::move(offer)), peer_(peer) {}

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

  const int rank;
  const NcclOffer offer;

 private:
  const int peer_;
};

class BareHop {
 public:
  BareHop(Side* side, const Size& size)
      : side_(*side), bytes_(size_t{size.tokens} * kRowBytes), data_(Must(device().Take(bytes_))) {}
  ~BareHop() {
    (void)nccl().Abort(there_);
    (void)nccl().Abort(back_);
    device().FreeEvent(event_);
    device().FreeStream(stream_);
    device().Give(data_);
  }

  void Round() {
    if (side_.rank == 0) {
      Settle(there_, nccl().Send(there_, data_, bytes_, stream_));
      Settle(back_, nccl().Receive(back_, data_, bytes_, stream_));
    } else {
      Settle(there_, nccl().Receive(there_, data_, bytes_, stream_));
      Settle(back_, nccl().Send(back_, data_, bytes_, stream_));
    }
    Must(device().Record(event_, stream_));
    while (!Must(device().Done(event_))) {
    }
  }

 private:
  NcclApi& nccl() { return *side_.offer.nccl; }
  EdgeDevice& device() { return *side_.offer.device; }
  void Settle(NcclComm* comm, NcclCode code) {
    while (code == kNcclInProgress) {
      NcclCode state = kNcclSuccess;
      code = nccl().AsyncError(comm, &state);
      if (code == kNcclSuccess) code = state;
    }
    if (code == kNcclSuccess) return;
    std::fprintf(stderr, "%s\n", nccl().Text(code).c_str());
    std::exit(1);
  }
  // A communicator in which this process is `rank`; the one that is 1, who receives, makes the id.
  NcclComm* Join(int rank) {
    std::string id;
    if (rank == 1) {
      STRAIT_CHECK(nccl().MakeId(&id) == kNcclSuccess);
      side_.Tell(id);
    } else {
      id = side_.Hear();
    }
    NcclComm* comm = nullptr;
    const NcclCode begun = nccl().Init(&comm, id, rank);
    Settle(comm, begun);
    return comm;
  }

  Side& side_;
  const size_t bytes_;
  // As the transport has them: one communicator each way, whose rank 0 sends.
  NcclComm* const there_ = Join(side_.rank);
  NcclComm* const back_ = Join(1 - side_.rank);
  std::byte* const data_;
  void* const stream_ = Must(device().MakeStream());
  void* const event_ = Must(device().MakeEvent());
};

class TransportHop {
 public:
  TransportHop(Side* side, const Size& size)
      : side_(*side),
        tokens_(size.tokens),
        bytes_(size_t{size.tokens} * kRowBytes),
        transport_(Options(), side->offer, Events()) {
    Edge edge;
    edge.id = 1;
    edge.over_nccl = true;
    edge.max_tokens = tokens_;
    edge.from_stage_id = receives_ - 1;
    edge.to_stage_id = receives_;
    transport_.Expect(edge);
    side_.Tell(ids_.PopAll(std::chrono::seconds(60)).front());
    edge.from_stage_id = sends_;
    edge.to_stage_id = sends_ + 1;
    edge.nccl_id = side_.Hear();
    transport_.Connect(edge);
    STRAIT_CHECK(!up_.PopAll(std::chrono::seconds(60)).empty());
  }
  // REQUIRES: both sides are here: rank 0 has what rank 1 sent last.
  ~TransportHop() {
    over_ = true;
    side_.Meet();
    transport_.Disconnect(sends_);
    transport_.Forget(receives_);
  }

  // Steps are told ahead within these rounds, and none is left behind them.
  void Expect(int rounds) { last_ = step_ + static_cast<uint64_t>(rounds); }
  void Round() {
    ++step_;
    while (due_ < std::min(last_, step_ + kDueAhead)) {
      transport_.Due(receives_, kEpoch, StepId{++due_}, tokens_);
    }
    if (side_.rank == 0) Send(step_ - 1);
    std::deque<HiddenStep> here = arrived_.PopAll(std::chrono::seconds(60), kEagerHiddenWait);
    STRAIT_CHECK(here.size() == 1 && here.front().step == StepId{step_});
    if (side_.rank == 1) Send(step_);
  }

 private:
  static constexpr PipelineEpoch kEpoch{1, 1};

  static NcclTransportOptions Options() {
    NcclTransportOptions options;
    options.hidden_row_bytes = kRowBytes;
    return options;
  }
  NcclEvents Events() {
    NcclEvents events;
    events.transport.on_edge_up = [this](const Edge&, HiddenMemory memory) {
      memory_ = std::move(memory);
      up_.Push(1);
    };
    events.transport.on_edge_down = [this](const Edge&, absl::Status why) {
      if (!over_) Must(why);  // at the end, the other may be gone first
    };
    events.transport.on_hidden = [this](uint64_t, HiddenStep step) {
      arrived_.Push(std::move(step));
    };
    events.transport.on_nccl_id = [this](const Edge&, std::string id) { ids_.Push(std::move(id)); };
    events.on_poisoned = [](const std::string& why) { Must(absl::InternalError(why)); };
    return events;
  }
  // As a worker that has computed: what is next is sent first.
  void Send(uint64_t computed) {
    Must(transport_.Send(sends_, {kEpoch, StepId{step_}, tokens_, memory_(bytes_)}));
    if (computed > 0) transport_.Consumed(receives_, kEpoch, StepId{computed});
  }

  Side& side_;
  const uint32_t tokens_;
  const size_t bytes_;
  const uint64_t sends_ = side_.rank == 0 ? kThere : kBack;
  const uint64_t receives_ = (side_.rank == 0 ? kBack : kThere) + 1;
  BoundedQueue<HiddenStep> arrived_{64};
  BoundedQueue<std::string> ids_{2};
  BoundedQueue<int> up_{2};
  HiddenMemory memory_;  // written before up_ tells
  std::atomic<bool> over_ = false;
  uint64_t due_ = 0;
  uint64_t step_ = 0;
  uint64_t last_ = 0;
  NcclTransport transport_;
};

// Adds the microseconds of a hop of each round.
template <class Hop>
void Batch(Hop& hop, int rounds, std::vector<double>* hops) {
  for (int i = 0; i < kWarmUp + rounds; ++i) {
    const auto begin = Clock::now();
    hop.Round();
    const std::chrono::duration<double, std::micro> took = Clock::now() - begin;
    if (i >= kWarmUp) hops->push_back(took.count() / 2);
  }
}

double Median(std::vector<double> values) {
  const auto middle = values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2);
  std::nth_element(values.begin(), middle, values.end());
  return *middle;
}

int64_t FreeBytes() {
  size_t free = 0;
  size_t total = 0;
  STRAIT_CHECK(cudaMemGetInfo(&free, &total) == cudaSuccess);
  return static_cast<int64_t>(free);
}

struct Measured {
  double bare_us = 0;
  double transport_us = 0;
  int64_t taken =
      0;  // bytes of this GPU's memory that the transport took, of both if they share it
};

Measured Measure(Side* side, const Size& size) {
  BareHop bare(side, size);
  std::vector<double> bare_us;
  std::vector<double> transport_us;
  Batch(bare, 1, &bare_us);  // NCCL has taken its memory
  bare_us.clear();
  side->Meet();
  const int64_t free_before = FreeBytes();
  side->Meet();
  Measured measured;
  {
    TransportHop transport(side, size);
    for (int batch = 0; batch < size.batches; ++batch) {
      transport.Expect(kWarmUp + size.rounds);
      Batch(transport, size.rounds, &transport_us);
      side->Meet();
      Batch(bare, size.rounds, &bare_us);
      side->Meet();
    }
    measured.taken = free_before - FreeBytes();
    side->Meet();
  }
  side->Meet();  // both are done before either leaves
  measured.bare_us = Median(std::move(bare_us));
  measured.transport_us = Median(std::move(transport_us));
  return measured;
}

NcclOffer Open(int rank, int num_gpus) {
  if (num_gpus == 1) {
    // Two processes on one GPU join only if they seem to be on two hosts.
    setenv("NCCL_HOSTID", ("strait-hop-" + std::to_string(rank)).c_str(), 1);
    setenv("NCCL_SOCKET_IFNAME", "lo", 0);
    setenv("NCCL_IB_DISABLE", "1", 0);
  }
  NcclOffer offer;
  auto nccl = LoadNccl("");
  if (!nccl.ok()) {
    std::printf("SKIPPED: %s\n", std::string(nccl.status().message()).c_str());
    std::exit(kSkipped);
  }
  offer.nccl = *std::move(nccl);
  offer.device = MakeCudaEdgeDevice(rank % num_gpus);
  if (const absl::Status used = offer.device->Use(); !used.ok()) {
    std::printf("SKIPPED, no GPU: %s\n", std::string(used.message()).c_str());
    std::exit(kSkipped);
  }
  return offer;
}

int Run(int num_gpus, bool smoke) {
  int ends[2];
  STRAIT_CHECK(socketpair(AF_UNIX, SOCK_STREAM, 0, ends) == 0);
  const pid_t child = fork();  // before either has touched CUDA
  STRAIT_CHECK(child >= 0);
  const int rank = child == 0 ? 1 : 0;
  close(ends[1 - rank]);
  alarm(kHangsAfterSeconds);
  Side side(rank, ends[rank], Open(rank, num_gpus));
  const char* const mps = getenv("CUDA_MPS_PIPE_DIRECTORY") != nullptr ? "true" : "false";
  for (Size size : kSizes) {
    if (smoke) size.batches = 1;
    const Measured hop = Measure(&side, size);
    if (rank == 1) continue;
    const size_t bytes = size_t{size.tokens} * kRowBytes;
    const double ratio = hop.transport_us / hop.bare_us;
    const int ends_here = num_gpus == 1 ? 4 : 2;
    const double stated = ends_here * static_cast<double>(kNcclEdgeBytes + kArenaSteps * bytes);
    const auto taken = static_cast<double>(hop.taken);
    std::printf(
        "%9zu bytes: a hop bare %9.1f us, through NcclTransport %9.1f us, ratio %.2f; %d ends of "
        "edges took %.1f MiB of %.1f stated\n",
        bytes, hop.bare_us, hop.transport_us, ratio, ends_here, taken / (1 << 20),
        stated / (1 << 20));
    std::printf(
        "JSON {\"bench\": \"nccl_hop\", \"gpus\": %d, \"mps\": %s, \"nccl\": \"%s\", "
        "\"bytes\": %zu, \"bare_us\": %.1f, \"transport_us\": %.1f, \"ratio\": %.3f, "
        "\"taken\": %.0f, \"stated\": %.0f}\n",
        num_gpus, mps, NcclVersionText(LoadNccl("").value()->version()).c_str(), bytes, hop.bare_us,
        hop.transport_us, ratio, taken, stated);
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
  bool smoke = false;
  int num_gpus = 1;
  for (int i = 1; i < argc; ++i) {
    const std::string_view flag = argv[i];
    if (flag == "--smoke") {
      smoke = true;
    } else if (flag == "--gpus" && i + 1 < argc && (num_gpus = std::atoi(argv[++i])) >= 1 &&
               num_gpus <= 2) {
    } else {
      std::fprintf(stderr, "usage: cuda_nccl_hop_bench [--gpus 1|2] [--smoke]\n");
      return 2;
    }
  }
  return strait::Run(num_gpus, smoke);
}
