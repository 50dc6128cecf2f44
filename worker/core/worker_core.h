// SPDX-License-Identifier: Apache-2.0
//
// WorkerCore decides what a worker does: which stages it hosts, in which epoch and over which edges,
// what it answers to its coordinator, and which step is next. Events go in, calls on its ports and
// its transport come out.
//
// Owns:    the stages, and how they share the worker's cache; replicas of other workers' prefix blocks.
// Borrows: WorkerPorts, Transport, CacheMemory, RowTransfer; they outlive it.
// Thread:  loop thread only. No I/O, no clock of its own, no threads: the worker process
//          (worker/service) and the simulator (tests/sim) run this same code.
// Errors:  what the coordinator asks wrongly is answered by StageState FAILED or a StageReport with an
//          error; what a peer does wrongly breaks that edge.
// Limits:  kMaxHostedStages; WorkerCoreOptions::orphan_timeout_us.
// Why:     losing the coordinator is not losing the cache: stages stay for orphan_timeout_us, and a
//          coordinator of the same term takes them back with their rows. Steps under way go on; what
//          they would report is dropped with the stream, and the next epoch says what counts.
#pragma once

#include <cstdint>
#include <functional>
#include <initializer_list>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "proto/base/limits.h"
#include "proto/base/log.h"
#include "strait/v1/cluster.pb.h"
#include "worker/backend.h"
#include "worker/core/cache_shares.h"
#include "worker/stage/stage.h"
#include "worker/transfer/replica_store.h"
#include "worker/transfer/row_transfer.h"
#include "worker/transport/transport.h"

namespace strait {

inline constexpr size_t kMaxHostedStages = 64;

struct WorkerCoreOptions {
  // How long stages stay without a coordinator.
  uint64_t orphan_timeout_us = 60'000'000;
  uint64_t host_cache_bytes = 0;  // of host memory, for its stages' tiers; 0: none
  uint64_t replica_bytes = 0;     // of host memory, for replicas; 0: none
  std::string host_id;            // Hello.host_id
  // Of rows that it asks other workers for at once; less where rows are tiny.
  uint64_t transfer_frame_bytes = limits::kTransferFrameBytes;
};

// A stage to be loaded. Serials rise.
struct LoadOrder {
  uint64_t serial = 0;
  uint64_t stage_id = 0;
  StageSpec spec;
};

// What the core asks of the process around it. All calls come from within its events, and must not
// call it back.
class WorkerPorts {
 public:
  virtual ~WorkerPorts() = default;
  // To the coordinator; without one it is dropped.
  virtual void Tell(v1::FromWorker message) = 0;
  // The coordinator broke the protocol: its stream is to end, and OnDetached to follow.
  virtual void DropCoordinator(absl::Status why) = 0;
  virtual void Shutdown() = 0;
  // Answered by OnLoaded, unless it is cancelled before it begins.
  virtual void Load(const LoadOrder& order) = 0;
  virtual void CancelLoads(uint64_t up_to_serial) = 0;
  // So many rows of this step will come to the stage from the one before it. Told in step order.
  virtual void RowsDue(uint64_t stage_id, PipelineEpoch epoch, StepId step, uint32_t num_rows) = 0;
  // For people.
  virtual void Note(LogLevel level, std::string_view what,
                    std::initializer_list<LogField> fields) = 0;
};

class WorkerCore {
 public:
  enum class HostedState { kNone, kLoading, kLoaded, kActivating, kActive, kStuck };

  // `transfer` null: the worker neither gives nor takes rows.
  WorkerCore(WorkerCoreOptions options, const StageTraits& traits, CacheMemory* cache,
             Transport* transport, WorkerPorts* ports, RowTransfer* transfer = nullptr)
      : options_(options),
        traits_(traits),
        transport_(transport),
        ports_(ports),
        shares_(cache),
        replicas_(
            {.layers = {0, traits.num_layers}, .shape = traits.row_shape, .origin = traits.origin},
            options.replica_bytes, &share_) {
    host_budget_.limit_bytes = options.host_cache_bytes;
    share_.transfer = transfer;
    share_.frame_bytes = options.transfer_frame_bytes;
  }

  // ---- The coordinator ----
  // What the next Hello must tell of stages that are kept. Where stages went without a coordinator, the
  // next Welcome may answer a Hello that was said before: that coordinator is dropped and told anew.
  void FillHello(v1::Hello* hello) const;
  void OnWelcome(const v1::Welcome& welcome);
  // Any message but Welcome and Ping.
  void OnMessage(v1::ToWorker message, uint64_t now_us);
  void OnDetached(uint64_t now_us);
  // Orphaned stages are dropped in time. Call it at least every second while detached.
  void OnTick(uint64_t now_us);

  // ---- Loads, edges ----
  void OnLoaded(const LoadOrder& order, absl::StatusOr<std::unique_ptr<StageModel>> model);
  void OnEdgeUp(const Edge& edge, HiddenMemory memory);
  void OnEdgeDown(const Edge& edge, const absl::Status& why);
  void OnNcclId(const Edge& edge, std::string nccl_id);
  void OnHidden(uint64_t to_stage_id, HiddenStep hidden, uint64_t now_us);
  void OnSampled(uint64_t to_stage_id, SampledStep sampled);

  // ---- Rows between workers. REQUIRES: there is a RowTransfer ----
  void OnRows(AskId id, absl::StatusOr<RowsFrame> frame, uint64_t now_us);
  void OnAsk(PeerAskId id, const RowsAsk& ask, uint64_t now_us);
  void OnServed(PeerAskId id, const std::vector<BlockHeader>& pieces, uint64_t now_us);

  // ---- Steps ----
  using Clock = std::function<uint64_t()>;
  // Stages take turns. Absent: none is ready to begin.
  std::optional<uint64_t> NextReady() const;
  // REQUIRES: NextReady() said so.
  void BeginStep(uint64_t stage_id, const Clock& clock);
  // Stages with steps begun whose oldest is done; `any_begun` says whether there are steps at all.
  std::optional<uint64_t> NextDone(bool* any_begun) const;
  // Waits for the oldest step begun, hands on what it made, reports. REQUIRES: one is begun.
  void FinishStep(uint64_t stage_id, const Clock& clock);

  // ---- Copies of rows, to and from host memory and other workers ----
  // Any is under way, or is to be asked for: PollCopies is to be called every millisecond or so.
  bool CopiesRows() const;
  // Rows of another worker's, or for one, are on their last yards: PollCopies may well be called sooner.
  bool MovesRows() const;
  void PollCopies(uint64_t now_us);

  // The process ends, or its data is not to be trusted: every stage goes.
  void DropStages();

  // ---- What others may ask ----
  size_t num_stages() const { return hosted_.size(); }
  std::vector<uint64_t> stage_ids() const;
  HostedState StateOf(uint64_t stage_id) const;
  // Null: not here, or still loading.
  const Stage* FindStage(uint64_t stage_id) const;
  const ReplicaStore& replicas() const { return replicas_; }
  bool attached() const { return attached_; }
  // Latent blocks held by all stages.
  uint64_t BlocksHeld() const;
  absl::Status CheckIntegrity() const;

 private:
  // One end of an edge, as this stage has it.
  struct End {
    std::optional<Edge> edge;  // since it was told
    bool is_up = false;        // of an outgoing one: the receiver accepted
    bool is_down = false;      // it broke, and stays so
    // Whether `next` is the edge that is there and works: then it goes on.
    bool Continues(const std::optional<Edge>& next) const {
      return edge && next && edge->id == next->id && !is_down;
    }
  };
  struct Hosted {
    std::unique_ptr<Stage> stage;  // null while it loads
    uint64_t load_serial = 0;
    LayerRange layers;
    bool unload_when_loaded = false;
    bool took_over = false;   // from its predecessors
    bool resize_due = false;  // CacheResized not yet told
    bool linking = false;     // in no epoch yet, and StageLinked not yet told
    bool activating = false;  // ACTIVE not yet told:
    bool edge_due = false;    // its next edge is not up in this epoch, or
    bool restoring = false;   // its first rows are not all here
    bool is_stuck = false;    // told that it cannot go on in this epoch
    End in;                   // from the stage before it, or of ids from the last
    End out;
    HiddenMemory memory;  // of hidden states that leave
  };

  Hosted* Find(uint64_t stage_id);
  const Hosted* Find(uint64_t stage_id) const;
  // The stage that has this edge as its incoming or outgoing one.
  Hosted* FindByEdge(uint64_t stage_id, End Hosted::*end, const Edge& edge);

  void OnLoad(const v1::LoadStage& load);
  void OnActivate(const v1::ActivateStage& activate, uint64_t now_us);
  void OnUnload(uint64_t stage_id);
  void OnResize(const v1::ResizeCache& resize);
  // What successors of it, of stages here, must be in themselves.
  absl::Status CheckSuccessor(const v1::LoadStage& load) const;
  void TakeOver(uint64_t stage_id, Hosted& hosted);
  // A stage that is loaded, or was to be, is gone from hosted_: its share goes, then it is told.
  void Release(uint64_t stage_id, v1::FromWorker told);
  // The cache becomes as small as it is due, once nothing is begun; then who waited for it is told. Called
  // wherever a stage may hold less than before, or has nothing begun any more.
  void Settle();
  void OnPlan(v1::StepPlan plan, uint64_t now_us);

  void OnFetch(const v1::FetchRows& fetch, uint64_t now_us);
  void OnServe(const v1::ServeRows& serve);
  void OnDropLanded(const v1::DropLanded& drop);
  // It fetches what it is to have before it is active.
  void Restore(uint64_t stage_id, Hosted& hosted, const v1::ActivateStage& activate,
               uint64_t now_us);
  void TellRestored(Hosted& hosted);
  // Of all stages: first for sequences that stand still.
  void AskRows(uint64_t now_us);
  void TellMoves(uint64_t stage_id, PipelineEpoch epoch, const HostMoves& moves,
                 const RowMoves& rows);
  absl::Status CheckTransfers() const;

  void Enter(uint64_t stage_id, Hosted& hosted, const v1::ActivateStage& activate);
  void SetIncoming(uint64_t stage_id, Hosted& hosted, const std::optional<Edge>& next);
  // Whether there is none: of one, on_edge_up tells that the receiver answered in this epoch.
  bool SetOutgoing(uint64_t stage_id, Hosted& hosted, const std::optional<Edge>& next);
  void ForgetEdges(uint64_t stage_id);
  // Those over NCCL, which end with the epoch: together, and before any of the next is made. But for `in` and `out`: those
  // were made ahead for the epoch that begins.
  void DropNcclEdges(uint64_t stage_id, Hosted& hosted, const std::optional<Edge>& in = {},
                     const std::optional<Edge>& out = {});

  // ---- Edges made ahead (edges.cc) ----
  void OnLink(const v1::LinkStage& link);
  // In no epoch yet.
  static bool IsAhead(const Hosted& hosted);
  // Of such a one: an edge of it broke.
  void TellUnlinked(uint64_t stage_id, Hosted& hosted, const absl::Status& why, const Edge& edge);
  // Unavailable: an edge that this activation goes on with, and cannot open anew, is not there.
  static absl::Status CheckMade(const v1::ActivateStage& activate, const Hosted& hosted);

  // If nothing of its activation is awaited any more.
  void TellActive(Hosted& hosted);
  // `edge`: what failed, if it was one.
  void TellFailed(uint64_t stage_id, const absl::Status& why, PipelineEpoch epoch = {},
                  const Edge* edge = nullptr);
  // Once in an epoch.
  void TellStuck(Hosted& hosted, uint64_t step, const absl::Status& why,
                 const Edge* edge = nullptr);

  const WorkerCoreOptions options_;
  const StageTraits traits_;
  Transport* const transport_;
  WorkerPorts* const ports_;

  bool attached_ = false;
  uint64_t term_ = 0;            // of the coordinator that gave the stages
  uint64_t detached_us_ = 0;     // since when
  bool hello_is_stale_ = false;  // or may be
  uint64_t last_serial_ = 0;
  CacheShares shares_;
  HostBudget host_budget_;
  TransferShare share_;
  ReplicaStore replicas_;
  uint64_t last_asked_ = 0;  // stage whose asks went first
  std::map<uint64_t, Hosted> hosted_;
  std::vector<v1::FromWorker> told_when_settled_;
  bool holds_steps_ = false;  // none begins: the cache is about to become smaller
  uint64_t last_begun_ = 0;   // stage
};

}  // namespace strait
