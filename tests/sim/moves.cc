// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/moves.h"

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "tests/worker/polled_copies.h"

namespace strait::sim {
namespace {

// Between two looks at a move, and between the coordinator's own.
constexpr uint64_t kSlackUs = 300'000;
// After the commit the destination goes on, or is found to have failed, within this.
constexpr uint64_t kAdoptUs = 60'000'000;

uint64_t Number(const json::Value& value, const char* key) {
  return value.at(key).to_number<uint64_t>();
}

MovePhase PhaseOf(const json::Value& move) {
  const std::string name(move.at("phase").as_string());
  for (size_t p = 0; p < kNumMovePhases; ++p) {
    if (name == Name(static_cast<MovePhase>(p))) return static_cast<MovePhase>(p);
  }
  return MovePhase::kReserve;
}

void FindStages(const json::Value& status, PipelineId pipeline, std::vector<WorkerId>* workers,
                std::vector<LayerIndex>* layers) {
  for (const json::Value& each : status.at("pipelines").as_array()) {
    if (Number(each, "id") != pipeline.value) continue;
    for (const json::Value& stage : each.at("stages").as_array()) {
      layers->push_back(static_cast<LayerIndex>(Number(stage, "layer_begin")));
      if (stage.as_object().contains("worker_id")) {
        workers->push_back(WorkerId{Number(stage, "worker_id")});
      }
    }
  }
}

}  // namespace

json::Value Moves::Status() const {
  return *json::Parse(core_->StatusJson(world_->now_us()), "status");
}

uint64_t Moves::EpochOf(const json::Value& status, PipelineId pipeline) {
  for (const json::Value& each : status.at("pipelines").as_array()) {
    if (Number(each, "id") == pipeline.value) return Number(each.at("epoch"), "counter");
  }
  return 0;
}

bool Moves::AskForOne() {
  World& w = *world_;
  const json::Value status = Status();
  struct Resident {
    uint64_t sequence;
    uint64_t pipeline;
  };
  std::vector<Resident> residents;
  for (const json::Value& sequence : status.at("sequences").as_array()) {
    if (!sequence.as_object().contains("pipeline_id")) continue;
    residents.push_back({Number(sequence, "id"), Number(sequence, "pipeline_id")});
  }
  std::vector<uint64_t> serving;
  for (const json::Value& pipeline : status.at("pipelines").as_array()) {
    if (pipeline.at("state").as_string() == "active") serving.push_back(Number(pipeline, "id"));
  }
  if (residents.empty() || serving.size() < 2) return false;
  const Resident resident = residents[w.Random(0, residents.size() - 1)];
  std::erase(serving, resident.pipeline);
  if (serving.empty()) return false;
  const VerbId id{++last_verb_.value};
  Verb& verb = verbs_[id];
  verb.sequence = SequenceId{resident.sequence};
  verb.to = PipelineId{serving[w.Random(0, serving.size() - 1)]};
  verb.to_epoch = EpochOf(status, verb.to);
  MigrateSpec spec;
  if (w.Chance(0.1)) {
    verb.is_odd = true;
    switch (w.Random(0, 4)) {
      case 0:
        verb.to = PipelineId{resident.pipeline};  // it is there
        break;
      case 1:
        verb.to = PipelineId{1'000};  // there is none
        break;
      case 2:
        verb.sequence = SequenceId{1'000'000};
        break;
      case 3:
        spec.dry_run = true;
        break;
      case 4:
        spec.timeout_us = w.Random(1, 50'000);
        break;
    }
  }
  spec.sequence = absl::StrCat(verb.sequence.value);
  spec.to = verb.to;
  std::vector<WorkerId> workers;
  std::vector<LayerIndex> here, there;
  FindStages(status, PipelineId{resident.pipeline}, &workers, &here);
  FindStages(status, verb.to, &workers, &there);
  verb.other_layers = here != there;
  verb.other_stages = here.size() != there.size();
  ++num_asked_;
  w.Trace(absl::StrCat("verb ", id.value, ": sequence ", spec.sequence, " is to go from pipeline ",
                       resident.pipeline, " to ", spec.to.value,
                       spec.dry_run ? ", only asked" : ""));
  core_->OnMigrate(id, spec, w.now_us());
  return true;
}

// ---------------------------------------------------------------- what is told

void Moves::OnMessage(const MoveTold& told) {
  const auto it = verbs_.find(told.verb);
  if (it == verbs_.end()) return world_->Violation("a move is told of after its end");
  const MoveReport& report = told.report;
  world_->Trace(absl::StrCat("verb ", told.verb.value, ": ", report.phase, ", ", report.rows,
                             " of ", report.rows_total, " rows, ", report.moved_bytes, " bytes, ",
                             report.rounds, " rounds"));
  it->second.phase = report.phase;
  it->second.is_live = true;
  const uint64_t bytes =
      uint64_t{report.rows} * scenario_->model.layer_weight_bytes.size() * kHashRowBytes;
  if (report.phase == "done" && (report.moved_bytes != bytes || report.recomputed_rows > 0)) {
    world_->Violation(absl::StrCat("a move of ", report.rows, " rows is done with ",
                                   report.moved_bytes, " bytes moved and ", report.recomputed_rows,
                                   " rows recomputed"));
  }
}

void Moves::OnMessage(const VerbEnded& ended) {
  const auto it = verbs_.find(ended.verb);
  if (it == verbs_.end()) return world_->Violation("a verb is answered twice");
  const Verb verb = it->second;
  verbs_.erase(it);
  Watch watch;
  if (verb.is_live) {
    watch = watches_[verb.sequence];
    watches_.erase(verb.sequence);
  }
  world_->Trace(absl::StrCat("verb ", ended.verb.value, " ended: ", ended.status.ToString()));
  if (!verb.is_live && ended.status.ok()) {
    return world_->Violation("a move is done of which nothing was told");
  }
  if (verb.is_odd) return counts_.AddEnd("asked for what cannot be");
  if (!ended.status.ok()) {
    const std::string reason = Reason(verb, ended.status);
    counts_.AddEnd(reason);
    if (verb.is_live && absl::EndsWith(reason, ": no room")) {
      for (size_t p = 0; p < kNumMovePhases; ++p) {
        if (verb.phase != Name(static_cast<MovePhase>(p))) continue;
        counts_.Add(MoveFault::kNoRoom, static_cast<MovePhase>(p));
      }
    }
    CheckBack(verb, watch);
    return CheckReason(verb, ended.status);
  }
  ++num_done_;
  num_other_layers_ += verb.other_layers;
  num_other_stages_ += verb.other_stages;
  counts_.AddEnd("done");
  const json::Value status = Status();
  for (const json::Value& sequence : status.at("sequences").as_array()) {
    if (Number(sequence, "id") != verb.sequence.value) continue;
    if (!sequence.as_object().contains("pipeline_id")) continue;  // it had to give way at once
    if (Number(sequence, "pipeline_id") != verb.to.value) {
      world_->Violation(
          absl::StrCat("sequence ", verb.sequence.value, " has moved, and is not where it went"));
    }
  }
}

std::string Moves::Reason(const Verb& verb, const absl::Status& status) const {
  const std::string why(status.message());
  const auto has = [&](const char* part) { return absl::StrContains(why, part); };
  std::string reason = absl::StatusCodeToString(status.code());
  if (absl::IsResourceExhausted(status)) reason = "no room";
  if (has("needed the room")) {
    reason = EpochOf(Status(), verb.to) == verb.to_epoch ? "no room" : "the destination failed";
  } else if (has("the source goes on")) {
    reason = "the destination failed, the source goes on";
  } else if (has("had to give way there")) {
    reason = "the source failed, or it had to give way";
  } else if (has("ended before")) {
    reason = "the sequence ended";
  } else if (has("grows faster")) {
    reason = "it grows faster than its rows go over";
  } else if (has("--migrate-")) {
    reason = has("--migrate-stall") ? "--migrate-stall" : "--migrate-pause";
  } else if (has("the move's timeout")) {
    reason = "its timeout";
  } else if (has("failed") && absl::IsAborted(status)) {
    reason = "the destination failed";
  }
  return absl::StrCat(verb.is_live ? verb.phase : "refused", ": ", reason);
}

void Moves::CheckBack(const Verb& verb, const Watch& watch) {
  if (verb.phase != Name(MovePhase::kAdopt) || watch.placement == 0) return;
  const json::Value status = Status();
  for (const json::Value& sequence : status.at("sequences").as_array()) {
    if (Number(sequence, "id") != verb.sequence.value) continue;
    if (!sequence.as_object().contains("placement")) continue;
    if (Number(sequence.at("placement"), "counter") > watch.placement) continue;
    world_->Violation(absl::StrCat("sequence ", verb.sequence.value,
                                   " went back under no newer placement epoch"));
  }
}

void Moves::CheckReason(const Verb& verb, const absl::Status& status) {
  bool allowed = false;
  switch (status.code()) {
    case absl::StatusCode::kAborted:
    case absl::StatusCode::kResourceExhausted:
    case absl::StatusCode::kDeadlineExceeded:
    case absl::StatusCode::kCancelled:
      allowed = true;
      break;
    case absl::StatusCode::kFailedPrecondition:
      allowed = !verb.is_live;  // not now
      break;
    case absl::StatusCode::kDataLoss:
      allowed = num_corrupt_ > 2;
      break;
    case absl::StatusCode::kInternal:
      allowed = copies_fail_;
      break;
    default:
      break;
  }
  if (allowed) return;
  world_->Violation(absl::StrCat("the move of sequence ", verb.sequence.value, " in phase ",
                                 verb.phase, " ended with ", status.ToString()));
}

void Moves::OnRowFault(RowFault fault, SequenceId sequence) {
  num_corrupt_ += fault == RowFault::kCorrupt;
  if (fault == RowFault::kLate) ++num_late_;
  if (fault == RowFault::kLate) return;
  const MoveFault counted = fault == RowFault::kBreak     ? MoveFault::kBreakRows
                            : fault == RowFault::kCorrupt ? MoveFault::kCorruptFrame
                                                          : MoveFault::kDuplicateFrame;
  for (const LiveMove& move : Live()) {
    if (move.sequence == sequence) counts_.Add(counted, move.phase);
  }
}

// ---------------------------------------------------------------- what is under way

std::vector<LiveMove> Moves::Live() const {
  std::vector<LiveMove> live;
  if (verbs_.empty() && scenario_->num_drains + scenario_->num_leaves == 0) return live;
  const json::Value status = Status();
  for (const json::Value& each : status.at("migrations").as_array()) {
    LiveMove move;
    move.sequence = SequenceId{Number(each, "sequence")};
    move.from = PipelineId{Number(each, "from")};
    move.to = PipelineId{Number(each, "to")};
    move.phase = PhaseOf(each);
    move.total_ms = Number(each, "total_ms");
    move.progress = {move.phase, Number(each, "rounds"), Number(each, "rows"),
                     Number(each, "moved_bytes")};
    FindStages(status, move.from, &move.sources, &move.source_layers);
    FindStages(status, move.to, &move.destinations, &move.destination_layers);
    for (const json::Value& sequence : status.at("sequences").as_array()) {
      if (Number(sequence, "id") != move.sequence.value) continue;
      move.decodes = Number(sequence, "generated_tokens") > 0;
      if (sequence.as_object().contains("placement")) {
        move.placement = Number(sequence.at("placement"), "counter");
      }
      move.request = RequestId{Number(sequence, "request_id")};
      move.choice = static_cast<uint32_t>(Number(sequence, "choice"));
    }
    live.push_back(std::move(move));
  }
  return live;
}

void Moves::CheckDeadlines(uint64_t clock_us) {
  const CoreOptions& options = scenario_->options;
  const auto late = [&](const LiveMove& move, uint64_t since_us, const char* what) {
    world_->Violation(absl::StrCat("the move of sequence ", move.sequence.value, " in phase \"",
                                   Name(move.phase), "\" outlives ", what, " after ",
                                   (clock_us - since_us) / 1000, " ms"));
  };
  const std::vector<LiveMove> live = Live();
  // Of drains' moves nobody tells the end.
  std::erase_if(watches_, [&](const auto& entry) {
    return std::none_of(live.begin(), live.end(), [&](const LiveMove& move) {
      return move.sequence == entry.first && move.total_ms >= entry.second.total_ms;
    });
  });
  for (const LiveMove& move : live) {
    Watch& watch =
        watches_.try_emplace(move.sequence, Watch{move.progress, clock_us, clock_us, {}, {}})
            .first->second;
    watch.total_ms = move.total_ms;
    if (watch.progress != move.progress) {
      watch.progress = move.progress;
      watch.since_us = clock_us;
    }
    const bool stands_still =
        move.phase == MovePhase::kFreeze || move.phase == MovePhase::kLastRows;
    if (stands_still && !watch.frozen_us) watch.frozen_us = clock_us;
    if (move.phase == MovePhase::kAdopt) {
      if (!watch.adopts_us) watch.adopts_us = clock_us;
      watch.placement = std::max(watch.placement, move.placement);
      if (clock_us > *watch.adopts_us + kAdoptUs) late(move, *watch.adopts_us, "all patience");
      continue;
    }
    if (clock_us > watch.begin_us + options.migrate_timeout_us + kSlackUs) {
      late(move, watch.begin_us, "its timeout");
    }
    // That rows were served is progress, too, and status does not show it.
    const uint64_t times = stands_still ? 2 : 1;
    if (clock_us > watch.since_us + times * options.migrate_stall_us + kSlackUs) {
      late(move, watch.since_us, "--migrate-stall");
    }
    if (stands_still && move.decodes &&
        clock_us > *watch.frozen_us + options.migrate_pause_us + kSlackUs) {
      late(move, *watch.frozen_us, "--migrate-pause");
    }
  }
}

}  // namespace strait::sim
