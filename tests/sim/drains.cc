// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/drains.h"

#include <algorithm>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace strait::sim {
namespace {

constexpr uint64_t kSlackUs = 300'000;

std::string NameOf(uint64_t instance) { return absl::StrCat("w", instance); }

Phase PhaseOf(std::string_view name) {
  if (name == "moving") return Phase::kDrainMoves;
  if (name == "replacing") return Phase::kDrainReplaces;
  if (name == "unloading") return Phase::kDrainUnloads;
  return Phase::kDrainWaits;
}

}  // namespace

json::Value Drains::Status() const {
  return *json::Parse(core_->StatusJson(world_->now_us()), "status");
}

bool Drains::IsOut(uint64_t instance) const {
  const auto it = duties_.find(instance);
  return it != duties_.end() && it->second != Duty::kServes;
}

void Drains::AskForOne(const std::vector<uint64_t>& instances) {
  World& w = *world_;
  const VerbId id{++last_verb_.value};
  Verb verb;
  verb.instance = instances[w.Random(0, instances.size() - 1)];
  const bool was_out = IsOut(verb.instance);
  DrainSpec spec;
  spec.worker = NameOf(verb.instance);
  if (w.Chance(0.3)) spec.timeout_us = w.Pick({20'000, 1'000'000, 20'000'000});
  // Who is drained already, or is being drained, is given back more often than asked for again.
  if (was_out && w.Chance(0.7)) {
    spec.undo = verb.undoes = true;
  } else if (w.Chance(0.1)) {
    verb.is_odd = true;
    switch (w.Random(0, 2)) {
      case 0:
        spec.worker = "nobody";
        verb.instance = 0;
        break;
      case 1:
        spec.dry_run = true;
        break;
      case 2:
        spec.undo = true;
        verb.undoes = was_out;
        break;
    }
  }
  verb.timeout_us = spec.timeout_us > 0 ? spec.timeout_us : scenario_->options.migrate_timeout_us;
  const auto duty = duties_.find(verb.instance);
  const bool drains =
      duty != duties_.end() && (duty->second == Duty::kDraining || duty->second == Duty::kLeaving);
  verb.changes = !verb.is_odd && !verb.undoes && !drains;
  if (verb.changes) duties_[verb.instance] = Duty::kDraining;
  w.Trace(absl::StrCat("verb ", id.value, ": ", spec.worker,
                       spec.undo ? " is given back" : " is to be drained",
                       spec.dry_run ? ", only asked" : ""));
  ++num_asked_;
  verbs_[id] = verb;
  core_->OnDrain(id, spec, w.now_us());
}

void Drains::OnLeave(uint64_t instance) {
  Duty& duty = duties_[instance];
  num_leaving_ += duty != Duty::kLeaving;
  duty = Duty::kLeaving;
}

void Drains::OnAttached(uint64_t instance) {
  const auto it = duties_.find(instance);
  if (it != duties_.end() && it->second == Duty::kDraining) duties_.erase(it);
}

void Drains::OnGone(uint64_t instance) {
  const auto it = duties_.find(instance);
  // Its drain goes on until the coordinator hears of it.
  if (it != duties_.end() && it->second == Duty::kLeaving) --num_leaving_;
}

void Drains::OnSent(uint64_t instance, const v1::ToWorker& message, bool scales) {
  const bool gives =
      message.has_load_stage() || (message.has_replicate() && !message.replicate().keys().empty());
  if (!gives || !IsOut(instance)) return;
  if (duties_.at(instance) != Duty::kDrained) {
    // What had begun before is seen through: a scale, or another drain's replacement.
    if (scales) return;
    for (const Live& drain : Current()) {
      if (drain.instance != instance && drain.phase == Phase::kDrainReplaces) return;
    }
  }
  world_->Violation(absl::StrCat("w", instance, ", which is drained, gets ",
                                 message.has_load_stage() ? "a stage" : "a copy"));
}

void Drains::OnMessage(const DrainTold& told) {
  const auto it = verbs_.find(told.verb);
  if (it == verbs_.end()) return world_->Violation("a drain is told of after its end");
  const DrainReport& report = told.report;
  world_->Trace(absl::StrCat("verb ", told.verb.value, ": drain of ", report.name, " by ",
                             report.way, ", ", report.phase, ", ", report.sequences_moved,
                             " moved, ", report.sequences_left, " left"));
  it->second.phase = report.phase;
  it->second.way = report.way;
}

std::optional<uint64_t> Drains::OnMessage(const VerbEnded& ended) {
  const auto it = verbs_.find(ended.verb);
  if (it == verbs_.end()) {
    world_->Violation("a verb is answered twice");
    return std::nullopt;
  }
  const Verb verb = it->second;
  verbs_.erase(it);
  const absl::Status& status = ended.status;
  world_->Trace(absl::StrCat("verb ", ended.verb.value, " ended: ", status.ToString()));
  if (verb.undoes) {
    if (!status.ok()) return std::nullopt;
    duties_.erase(verb.instance);
    ++num_undone_;
    counts_->AddEnd("drain: given back");
    return std::nullopt;
  }
  // One whose stream had ended, unknown to who asked, drains anew.
  if (verb.is_odd || (!verb.changes && !status.ok())) {
    counts_->AddEnd("drain: asked for what cannot be");
    return std::nullopt;
  }
  counts_->AddEnd(absl::StrCat("drain by ", verb.way, ": ",
                               status.ok() ? "done" : absl::StatusCodeToString(status.code()),
                               status.ok() ? "" : " while ", status.ok() ? "" : verb.phase));
  if (absl::IsResourceExhausted(status)) {
    counts_->Add(Fault::kNoRoom, verb.way == "move" ? Phase::kDrainMoves : Phase::kDrainWaits);
  }
  Duty& duty = duties_[verb.instance];
  if (status.ok()) {
    ++num_done_;
    if (duty != Duty::kLeaving) duty = Duty::kDrained;
    CheckNoStages(verb.instance);
    return verb.instance;
  }
  switch (status.code()) {
    case absl::StatusCode::kAborted:  // it died
    case absl::StatusCode::kResourceExhausted:
    case absl::StatusCode::kDeadlineExceeded:
    case absl::StatusCode::kCancelled:
      break;
    default:
      world_->Violation(absl::StrCat("a drain ended with ", status.ToString()));
  }
  if (duty != Duty::kLeaving) duties_.erase(verb.instance);
  return std::nullopt;
}

void Drains::CheckNoStages(uint64_t instance) const {
  const json::Value status = Status();
  for (const json::Value& worker : status.at("workers").as_array()) {
    if (worker.at("name").as_string() != NameOf(instance)) continue;
    if (worker.at("stages").as_array().empty()) continue;
    world_->Violation(absl::StrCat("w", instance, " is drained, and has a stage"));
  }
}

std::vector<Drains::Live> Drains::Current() const {
  std::vector<Live> live;
  if (!any()) return live;
  const json::Value status = Status();
  for (const json::Value& drain : status.at("drains").as_array()) {
    uint64_t instance = 0;
    const std::string name(drain.at("worker").as_string());
    if (!absl::SimpleAtoi(name.substr(1), &instance)) continue;
    live.push_back({instance, PhaseOf(drain.at("phase").as_string())});
  }
  return live;
}

void Drains::CheckDeadlines(uint64_t clock_us) {
  const std::vector<Live> live = Current();
  for (const Live& each : live) {
    const auto [it, is_new] = phases_.try_emplace(each.instance, each.phase);
    if (is_new || it->second != each.phase) counts_->AddReached(each.phase);
    it->second = each.phase;
  }
  std::erase_if(phases_, [&](const auto& entry) {
    return std::none_of(live.begin(), live.end(),
                        [&](const Live& each) { return each.instance == entry.first; });
  });
  for (auto& [id, verb] : verbs_) {
    if (!verb.begin_us) verb.begin_us = clock_us;
    if (!verb.changes || clock_us <= *verb.begin_us + verb.timeout_us + kSlackUs) continue;
    world_->Violation(absl::StrCat("the drain of w", verb.instance, " outlives its time"));
  }
}

}  // namespace strait::sim
