// SPDX-License-Identifier: Apache-2.0
//
// Scheduler time a step: what the coordinator's loop spends on one step of one pipeline, with every
// resident decoding, and while all of them are replayed after the loss of the middle stage.
//
//   scheduler_bench [--smoke]
//
// Prints for each case the median and the 99th percentile of: forming a step; checking and applying
// the reports of all of its stages; both. The goal is a median of both under 200 us with 256
// sequences. Plans are not sent: that is the stream's, in the background.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "coordinator/core/context.h"
#include "coordinator/core/journal.h"
#include "coordinator/core/scheduler.h"
#include "proto/base/check.h"

namespace strait {
namespace {

constexpr uint32_t kPromptTokens = 500;
constexpr uint32_t kLayersPerStage = 15;
constexpr uint32_t kToken = 7;

struct Case {
  uint32_t num_sequences;
  uint32_t num_stages;
  bool replays;
};

double Now() {
  return std::chrono::duration<double, std::micro>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

double Quantile(std::vector<double> values, double q) {
  STRAIT_CHECK(!values.empty());
  std::sort(values.begin(), values.end());
  return values[static_cast<size_t>(q * static_cast<double>(values.size() - 1))];
}

class Bench {
 public:
  explicit Bench(const Case& what) : case_(what), context_{Options(what), Model(what), {}, {}} {
    for (uint32_t i = 0; i < what.num_sequences; ++i) {
      RequestSpec spec;
      spec.sequences.resize(1);
      spec.sequences[0].prompt.assign(kPromptTokens + i % 64, kToken);
      spec.sequences[0].max_tokens = 100'000;
      spec.sequences[0].ignore_eos = true;
      journal_.Admit(RequestId{i + 1}, std::move(spec), ~uint64_t{0});
    }
    std::vector<Holdings> holdings(what.num_stages);
    for (uint32_t s = 0; what.replays && s < what.num_stages; ++s) {
      if (s == what.num_stages / 2) continue;
      for (const auto& [id, sequence] : journal_.waiting()) {
        const auto rows = static_cast<uint32_t>(sequence->tokens.size()) - 1;
        holdings[s][id] = {rows, rows};
      }
    }
    scheduler_.Start(std::vector<StageCache>(what.num_stages, {{0, kLayersPerStage}, 1ull << 46}),
                     Survivors(std::move(holdings)));
    const std::map<SequenceId, Sequence*> waiting = journal_.waiting();
    for (const auto& [id, sequence] : waiting) scheduler_.Place(sequence);
    if (what.replays) return;
    while (scheduler_.num_prefilling() > 0) Step();
    forming_.clear();
    reports_.clear();
  }
  ~Bench() { (void)scheduler_.Stop(); }

  // One more step is planned, as far as one may be, and the oldest is reported by all stages.
  void Step() {
    const double begin = Now();
    const bool formed = scheduler_.Form(1).has_value();
    if (formed) forming_.push_back(Now() - begin);
    if (formed && scheduler_.ledger().in_flight() <= case_.num_stages) return;
    std::vector<v1::StageReport> reports;
    for (uint32_t s = 0; s < case_.num_stages; ++s) reports.push_back(Report(s));
    const double then = Now();
    for (uint32_t s = 0; s < case_.num_stages; ++s) {
      STRAIT_CHECK(scheduler_.OnReport(s, reports[s], 1).ok());
    }
    reports_.push_back(Now() - then);
    context_.out.clear();
  }

  void Print() const {
    const double both = Quantile(forming_, 0.5) + Quantile(reports_, 0.5);
    std::printf("| %4u | %2u | %-7s | %7.1f | %7.1f | %7.1f | %7.1f | %7.1f |\n",
                case_.num_sequences, case_.num_stages, case_.replays ? "replay" : "decode",
                Quantile(forming_, 0.5), Quantile(forming_, 0.99), Quantile(reports_, 0.5),
                Quantile(reports_, 0.99), both);
  }
  bool has_figures() const { return !forming_.empty() && !reports_.empty(); }
  bool replaying() const { return scheduler_.num_prefilling() > 0; }

 private:
  static CoreOptions Options(const Case& what) {
    CoreOptions options;
    options.num_stages = what.num_stages;
    options.max_running = 1024;
    options.max_step_tokens = 2048;
    return options;
  }
  static ModelShape Model(const Case& what) {
    ModelShape model;
    model.vocab_size = 1000;
    model.max_positions = 1 << 20;
    model.layer_weight_bytes.assign(what.num_stages * kLayersPerStage, 1);
    model.block_bytes = 73'728;
    return model;
  }
  v1::StageReport Report(uint32_t stage_index) const {
    const StepRecord& record = scheduler_.ledger().records().front();
    const StageStep& stage = record.stages[stage_index];
    v1::StageReport report;
    report.set_step_id(record.id.value);
    report.set_cache_bytes(stage.cache_bytes);
    report.set_tables_digest(stage.tables_digest);
    report.set_rows_computed(stage.rows_computed);
    report.set_rows_stored(stage.rows_stored);
    const bool last = stage_index + 1 == case_.num_stages;
    for (size_t i = 0; (stage_index == 0 || last) && i < record.granted.size(); ++i) {
      report.add_granted_ids(kToken);
    }
    for (size_t i = 0; last && i < record.wanted.size(); ++i) {
      v1::SequenceResult* result = report.add_results();
      result->set_sequence_id(record.wanted[i].sequence.value);
      if (!record.wanted[i].sample) continue;
      result->mutable_sampled()->set_token_id(kToken);
      result->mutable_sampled()->set_logprob(-1);
    }
    return report;
  }

  const Case case_;
  Context context_;
  Journal journal_{&context_};
  Scheduler scheduler_{&context_, &journal_};
  std::vector<double> forming_;
  std::vector<double> reports_;
};

int Main(bool smoke) {
  std::printf("| sequences | stages | what | form us | p99 | reports us | p99 | both us |\n");
  std::printf("|---|---|---|---|---|---|---|---|\n");
  for (const uint32_t num_sequences : {256u, 1024u}) {
    for (const uint32_t num_stages : {1u, 4u, 16u}) {
      for (const bool replays : {false, true}) {
        if (replays && num_stages == 1) continue;
        const uint32_t count = smoke ? num_sequences / 64 : num_sequences;
        Bench bench({count, num_stages, replays});
        for (int step = 0; step < (smoke ? 10 : 2000); ++step) {
          if (replays && step > 2 && !bench.replaying()) break;
          bench.Step();
        }
        while (!bench.has_figures()) bench.Step();
        bench.Print();
      }
    }
  }
  return 0;
}

}  // namespace
}  // namespace strait

int main(int argc, char** argv) {
  return strait::Main(argc > 1 && std::strcmp(argv[1], "--smoke") == 0);
}
