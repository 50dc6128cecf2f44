// SPDX-License-Identifier: Apache-2.0
//
// FaultPolicy says who is to blame for what failed, and what follows: which workers are not put next to each other, who
// is set aside, who is left alone for a while, who is evicted, how long a step may take.
//
// Owns:    all blame of workers and stages. Of sequences it has the rules; the counts are theirs (Sequence), and go
//          with the next token.
// Thread:  loop thread only; no I/O, no clock: events and `now` go in, verdicts come out.
// Limits:  kBlameUs, kMaxStageErrors, kMaxDeaths; it remembers pairs of workers that are attached.
// Why:     a link that fails shows two ends and not which of them is at fault. So the pair is blamed, and another
//          neighbour tells: who fails with several is at fault, who works with another is not. A link's failure evicts
//          nobody: an evicted worker comes back at once, and knows no more than before.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/types/span.h"
#include "coordinator/core/core.h"
#include "coordinator/core/scheduler.h"
#include "proto/base/ids.h"

namespace strait {

// Blame of a pair ends so long after its last failure.
inline constexpr uint64_t kBlameUs = 600'000'000;
// A link that carried steps and broke is tried once more before its ends are parted: most such breaks are of the moment.
// One that did not even answer is not.
inline constexpr uint32_t kBreaksOfAPair = 2;
// A worker whose links fail with so many others is set aside.
inline constexpr uint32_t kPartnersOfOneAtFault = 2;
// A worker whose stage fails so often without a finished step in between is evicted.
inline constexpr uint32_t kMaxStageErrors = 3;
// A worker that could not load a stage is left alone so long, doubling.
inline constexpr uint64_t kLoadBackoffUs = 1'000'000;
inline constexpr uint64_t kLoadBackoffMaxUs = 60'000'000;
// Wait before an activation after a failure that cost no worker: doubles from the first to the last.
inline constexpr uint64_t kActivateBackoffUs = 20'000;
inline constexpr uint64_t kActivateBackoffMaxUs = 2'000'000;
// Processes that may come back, of which it is known who was in their hands.
inline constexpr size_t kMaxDeaths = 64;
// A step that takes so many times its estimate hangs.
inline constexpr uint32_t kStepPatience = 20;
// What a stage without a step in its times is taken for: it reads its weights once for so many rows. CPUs that serve
// from files which are not in memory take longest.
inline constexpr uint64_t kFirstStepBytesPerUs = 20'000;
inline constexpr uint32_t kFirstStepRows = 64;
inline constexpr uint64_t kFirstStepMaxUs = 300'000'000;

uint64_t Doubling(uint64_t first, uint32_t times, uint64_t most);

// How long a step of `num_rows` rows takes a stage of so many bytes of weights, by its times.
double EstimateStepUs(const StageTimes& times, uint32_t num_rows, uint64_t weight_bytes);
// How long nothing may come of such a step.
uint64_t StepPatienceUs(const StageTimes& times, uint32_t num_rows, uint64_t weight_bytes,
                        uint64_t least_us);

class FaultPolicy {
 public:
  enum class Standing {
    kGood,
    kSuspect,   // a link of it failed, and its partner there works with another since
    kSetAside,  // links of it failed with several
  };

  // ---- Links ----
  // `answered`: it was up in this epoch.
  void OnLinkFailed(WorkerId from, WorkerId to, bool answered, std::string why, uint64_t now_us);
  // It carried steps.
  void OnLinkWorked(WorkerId from, WorkerId to, uint64_t now_us);
  // 0: nothing speaks against this link; 1: that the other way round failed; 2: it failed.
  uint32_t CostOfLink(WorkerId from, WorkerId to, uint64_t now_us) const;
  // What speaks against these workers as the stages of a pipeline, in this order; 0: nothing. `ring`: the last one has
  // a link to the first.
  uint32_t CostOf(absl::Span<const WorkerId> workers, bool ring, uint64_t now_us) const;
  // The same workers in the order against which least speaks; as they are where no order is better.
  std::vector<WorkerId> BestOrder(std::vector<WorkerId> workers, bool ring, uint64_t now_us) const;
  // `size` of them, the first ones before others, by age unless another order is better.
  std::vector<WorkerId> ChooseCrew(std::vector<WorkerId> candidates, size_t size, bool ring,
                                   uint64_t now_us) const;
  Standing StandingOf(WorkerId worker, uint64_t now_us) const;
  // For people.
  struct FailedLink {
    WorkerId from;
    WorkerId to;
    uint64_t until_us = 0;
    uint32_t times = 0;
    std::string why;
  };
  std::vector<FailedLink> FailedLinksOf(WorkerId worker, uint64_t now_us) const;

  // ---- Stages ----
  // Its step failed, and it says that no link is why. True: once too often.
  bool OnStageError(uint64_t stage_id) { return ++stage_errors_[stage_id] >= kMaxStageErrors; }
  uint32_t stage_errors(uint64_t stage_id) const;
  // A step went through this stage and all others of its pipeline; or the stage is gone.
  void ForgiveStage(uint64_t stage_id) { stage_errors_.erase(stage_id); }

  // ---- Sequences ----
  // A process is gone, for all that is known, and these were in its unfinished step.
  void OnDied(uint64_t instance, std::vector<SequenceId> sequences);
  // It was not: its stream alone had ended. Those for whom its death was counted.
  std::vector<SequenceId> OnReturned(uint64_t instance);

  // ---- Loads ----
  void OnLoadFailed(WorkerId worker, uint64_t now_us);
  void OnLoaded(WorkerId worker) { loads_.erase(worker); }
  // It may be given something to load.
  bool IsFit(WorkerId worker, uint64_t now_us) const;

  // A worker is gone, and explains what its links did; ids are not reused.
  void Forget(WorkerId worker);

 private:
  using Pair = std::pair<WorkerId, WorkerId>;  // from, to
  struct Failure {
    uint64_t last_us = 0;
    uint32_t times = 0;
    bool acts = false;  // they are to be parted
    std::string why;
  };
  struct Load {
    uint32_t failures = 0;
    uint64_t unfit_until_us = 0;
  };
  bool Acts(const Failure& failure, uint64_t now_us) const {
    return failure.acts && now_us < failure.last_us + kBlameUs;
  }
  // Those that explain the most failures, one by one, as long as one explains several.
  std::vector<WorkerId> SetAside(uint64_t now_us) const;
  bool WorkedSince(WorkerId worker, bool as_sender, uint64_t since_us) const;

  std::map<Pair, Failure> failures_;
  // When a link of it carried steps last, as its sender and as its receiver.
  std::map<WorkerId, std::pair<uint64_t, uint64_t>> worked_us_;
  std::map<uint64_t, uint32_t> stage_errors_;
  std::map<WorkerId, Load> loads_;
  std::deque<std::pair<uint64_t, std::vector<SequenceId>>> deaths_;  // by instance, the last ones
};

}  // namespace strait
