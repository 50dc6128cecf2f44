// SPDX-License-Identifier: Apache-2.0
#include "coordinator/cli/stress_log.h"

#include <algorithm>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/cli/measure.h"

namespace strait::cli {
namespace {

constexpr uint64_t kRowsOfInterest[] = {1000, 4000};

json::Object Spread(const std::vector<double>& values) {
  json::Object out;
  out["p50"] = Percentile(values, 0.50);
  out["p99"] = Percentile(values, 0.99);
  out["max"] = values.empty() ? 0 : *std::max_element(values.begin(), values.end());
  out["count"] = values.size();
  return out;
}

template <class Map>
uint64_t CountOf(const Map& map, std::string_view key) {
  const auto found = map.find(key);
  return found == map.end() ? 0 : found->second;
}

json::Object Reasons(
    const std::map<std::string, std::map<std::string, uint64_t>, std::less<>>& failed,
    std::string_view kind) {
  json::Object out;
  if (const auto found = failed.find(kind); found != failed.end()) {
    for (const auto& [reason, count] : found->second) out[reason] = count;
  }
  return out;
}

}  // namespace

void StressLog::AddStream(StreamOutcome outcome, uint32_t prompt_tokens, std::string violation) {
  std::lock_guard lock(mu_);
  ++num_streams_;
  num_sequences_ += outcome.choices.size();
  if (!violation.empty()) {
    ++num_violations_;
    if (violations_.size() < kMaxViolationsShown) {
      violations_.push_back(absl::StrCat(outcome.name.empty() ? "a request" : outcome.name, ": ",
                                         std::move(violation)));
    }
  }
  if (outcome.name.empty()) return;
  for (ChoiceOutcome& choice : outcome.choices) {
    std::vector<uint32_t>().swap(choice.ids);
    std::vector<double>().swap(choice.logprobs);
  }
  times_[outcome.name] = {prompt_tokens, std::move(outcome.choices)};
}

void StressLog::AddMove(const std::string& request, uint32_t choice, const MoveOutcome& outcome) {
  std::lock_guard lock(mu_);
  if (!outcome.done) {
    ++failed_["migration"][outcome.code.empty() ? "unknown" : outcome.code];
    return;
  }
  ++faults_["migration"];
  const MoveLine& line = outcome.last;
  if (line.recomputed_rows > 0 || line.rows == 0 || line.rows < line.rows_total) {
    ++num_replaying_moves_;
    return;
  }
  moves_.push_back({request, choice, line});
}

void StressLog::AddFault(std::string_view kind) {
  std::lock_guard lock(mu_);
  ++faults_[std::string(kind)];
}

void StressLog::AddFailure(std::string_view kind, const std::string& reason) {
  std::lock_guard lock(mu_);
  ++failed_[std::string(kind)][reason];
}

uint64_t StressLog::num_migrations() const {
  std::lock_guard lock(mu_);
  return moves_.size();
}
uint64_t StressLog::num_streams() const {
  std::lock_guard lock(mu_);
  return num_streams_;
}
uint64_t StressLog::num_violations() const {
  std::lock_guard lock(mu_);
  return num_violations_;
}
std::vector<std::string> StressLog::violations() const {
  std::lock_guard lock(mu_);
  return violations_;
}

std::string StressLog::Progress() const {
  std::lock_guard lock(mu_);
  std::string text = absl::StrCat(num_streams_, " streams, ", moves_.size(), " moves");
  for (const auto& [kind, what] :
       {std::pair("death", " deaths"), std::pair("stop", " stops"),
        std::pair("reshape", " reshapes"), std::pair("drain", " drains")}) {
    if (const uint64_t count = CountOf(faults_, kind)) absl::StrAppend(&text, ", ", count, what);
  }
  if (num_violations_ > 0) absl::StrAppend(&text, ", ", num_violations_, " VIOLATIONS");
  return text;
}

std::vector<double> StressLog::PausesLocked() const {
  std::vector<double> pauses;
  for (const Move& move : moves_) {
    const auto found = times_.find(move.request);
    if (found == times_.end() || move.choice >= found->second.choices.size()) continue;
    const std::optional<double> pause =
        PauseMs(found->second.choices[move.choice], found->second.prompt_tokens, move.line.rows);
    if (pause) pauses.push_back(*pause);
  }
  return pauses;
}

json::Object StressLog::Report() const {
  std::lock_guard lock(mu_);
  json::Object out;
  out["streams"] = num_streams_;
  out["sequences"] = num_sequences_;
  out["migrations"] = moves_.size();
  for (const uint64_t rows : kRowsOfInterest) {
    out[absl::StrCat("migrations_of_", rows, "_rows")] = std::count_if(
        moves_.begin(), moves_.end(), [rows](const Move& move) { return move.line.rows >= rows; });
  }
  out["replaying_migrations"] = num_replaying_moves_;
  out["failed_migrations"] = Reasons(failed_, "migration");
  out["worker_deaths"] = CountOf(faults_, "death");
  out["worker_stops"] = CountOf(faults_, "stop");
  out["reshapes"] = CountOf(faults_, "reshape");
  out["failed_reshapes"] = Reasons(failed_, "reshape");
  out["drains"] = CountOf(faults_, "drain");
  out["failed_drains"] = Reasons(failed_, "drain");
  out["violations"] = num_violations_;
  out["violation_texts"] = json::Array(violations_.begin(), violations_.end());

  uint64_t bytes = 0;
  std::vector<double> told, total, rate, rows;
  for (const Move& move : moves_) {
    bytes += move.line.moved_bytes;
    told.push_back(move.line.pause_ms);
    total.push_back(move.line.total_ms);
    rows.push_back(static_cast<double>(move.line.rows));
    if (move.line.total_ms > 0) {
      rate.push_back(static_cast<double>(move.line.moved_bytes) / move.line.total_ms * 1e3);
    }
  }
  out["moved_bytes"] = bytes;
  out["pause_ms"] = Spread(PausesLocked());
  out["pause_told_ms"] = Spread(told);
  out["move_ms"] = Spread(total);
  out["move_rows"] = Spread(rows);
  out["move_bytes_per_s"] = Spread(rate);

  json::Array skipped;
  for (const std::string_view kind : kFaultKinds) {
    if (CountOf(faults_, kind) == 0) skipped.push_back(json::Value(kind));
  }
  out["skipped_faults"] = std::move(skipped);
  return out;
}

}  // namespace strait::cli
