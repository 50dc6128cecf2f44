// SPDX-License-Identifier: Apache-2.0
#include "coordinator/cli/stress_log.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/cli/measure.h"
#include "coordinator/cli/stress_timeline.h"

namespace strait::cli {
namespace {

constexpr uint64_t kRowsOfInterest[] = {1000, 4000};
// Of histograms. The last is beyond all.
const std::vector<double> kRowEdges = {0,    64,   128,  256,  512,   1000,  2000,
                                       3000, 4000, 6000, 8000, 12000, 16000, 1e12};
const std::vector<double> kPauseEdgesMs = {-1e12, 0,   5,    10,   20,   50,    100,
                                           200,   500, 1000, 2000, 5000, 10000, 1e12};

json::Object Spread(const std::vector<double>& values) {
  json::Object out;
  out["p50"] = Percentile(values, 0.50);
  out["p99"] = Percentile(values, 0.99);
  out["max"] = values.empty() ? 0 : *std::max_element(values.begin(), values.end());
  out["count"] = values.size();
  return out;
}

// Fewer digits, for what there is much of.
double Thousandths(double value) { return std::round(value * 1000) / 1000; }

template <class Map>
uint64_t CountOf(const Map& faults, std::string_view kind) {
  const auto found = faults.find(kind);
  return found == faults.end() ? 0 : found->second.size();
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

void StressLog::Begin() {
  std::lock_guard lock(mu_);
  begin_s_ = NowLocked();
}

double StressLog::NowLocked() const {
  return std::chrono::duration<double>(StressClock::now() - start_).count() - begin_s_;
}

void StressLog::CountFaultLocked(std::string_view kind) {
  faults_[std::string(kind)].push_back(NowLocked());
}

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
  CountFaultLocked("migration");
  const MoveLine& line = outcome.last;
  if (line.recomputed_rows > 0 || line.rows == 0 || line.rows < line.rows_total) {
    ++num_replaying_moves_;
    return;
  }
  moves_.push_back({request, choice, line, NowLocked()});
}

void StressLog::AddFault(std::string_view kind) {
  std::lock_guard lock(mu_);
  CountFaultLocked(kind);
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
  for (const auto& [kind, times] : faults_) {
    if (kind != "migration") absl::StrAppend(&text, ", ", kind, " ", times.size());
  }
  if (num_violations_ > 0) absl::StrAppend(&text, ", ", num_violations_, " VIOLATIONS");
  return text;
}

std::optional<double> StressLog::PauseLocked(const Move& move) const {
  const auto found = times_.find(move.request);
  if (found == times_.end() || move.choice >= found->second.choices.size()) return std::nullopt;
  return PauseMs(found->second.choices[move.choice], found->second.prompt_tokens, move.line.rows);
}

void StressLog::ReportMovesLocked(json::Object& out) const {
  uint64_t bytes = 0;
  double all_ms = 0;
  std::vector<double> pauses, told, total, rate, rows;
  json::Array points;
  for (const Move& move : moves_) {
    const MoveLine& line = move.line;
    bytes += line.moved_bytes;
    all_ms += line.total_ms;
    told.push_back(line.pause_ms);
    total.push_back(line.total_ms);
    rows.push_back(static_cast<double>(line.rows));
    if (line.total_ms > 0) {
      rate.push_back(static_cast<double>(line.moved_bytes) / line.total_ms * 1e3);
    }
    const std::optional<double> pause = PauseLocked(move);
    if (pause) pauses.push_back(*pause);
    points.push_back(json::Array{Thousandths(move.at_s), line.rows, line.moved_bytes,
                                 Thousandths(line.total_ms),
                                 pause ? json::Value(Thousandths(*pause)) : json::Value(nullptr)});
  }
  out["moved_bytes"] = bytes;
  out["gb_per_s"] = all_ms > 0 ? static_cast<double>(bytes) / all_ms / 1e6 : 0;
  out["pause_ms"] = Spread(pauses);
  out["pause_told_ms"] = Spread(told);
  out["move_ms"] = Spread(total);
  out["move_rows"] = Spread(rows);
  out["move_bytes_per_s"] = Spread(rate);
  out["move_rows_histogram"] = CountBySize(rows, kRowEdges);
  out["pause_ms_histogram"] = CountBySize(pauses, kPauseEdgesMs);
  out["moves"] = Some(std::move(points));
}

void StressLog::ReportTimesLocked(json::Object& out, double seconds) const {
  std::vector<double> tokens;
  for (const auto& [name, times] : times_) {
    for (const ChoiceOutcome& choice : times.choices) {
      for (const double at_s : choice.at_s) tokens.push_back(at_s - begin_s_);
    }
  }
  json::Object timeline;
  timeline["bin_s"] = BinSeconds(seconds);
  timeline["tokens"] = CountByTime(tokens, seconds);
  for (const auto& [kind, at_s] : faults_) timeline[kind] = CountByTime(at_s, seconds);
  out["timeline"] = std::move(timeline);
}

json::Object StressLog::Report(double seconds) const {
  std::lock_guard lock(mu_);
  json::Object out;
  out["streams"] = num_streams_;
  out["sequences"] = num_sequences_;
  for (const FaultKind& kind : kFaultKinds) out[kind.member] = CountOf(faults_, kind.name);
  out["migrations"] = moves_.size();
  for (const uint64_t rows : kRowsOfInterest) {
    out[absl::StrCat("migrations_of_", rows, "_rows")] = std::count_if(
        moves_.begin(), moves_.end(), [rows](const Move& move) { return move.line.rows >= rows; });
  }
  out["replaying_migrations"] = num_replaying_moves_;
  out["failed_migrations"] = Reasons(failed_, "migration");
  out["failed_reshapes"] = Reasons(failed_, "reshape");
  out["failed_drains"] = Reasons(failed_, "drain");
  out["failed_joins"] = Reasons(failed_, "join");
  out["violations"] = num_violations_;
  out["violation_texts"] = json::Array(violations_.begin(), violations_.end());
  ReportMovesLocked(out);
  ReportTimesLocked(out, seconds);

  json::Array skipped;
  for (const FaultKind& kind : kFaultKinds) {
    if (CountOf(faults_, kind.name) == 0) skipped.push_back(json::Value(kind.name));
  }
  out["skipped_faults"] = std::move(skipped);
  return out;
}

}  // namespace strait::cli
