// SPDX-License-Identifier: Apache-2.0
#include "coordinator/service/engine_metrics.h"

#include <string_view>

#include "absl/strings/str_cat.h"
#include "proto/base/text.h"

namespace strait {
namespace {

template <class T>
void Append(std::string* out, std::string_view name, std::string_view type, std::string_view help,
            T value) {
  absl::StrAppend(out, "# HELP ", ToAbsl(name), " ", ToAbsl(help), "\n# TYPE ", ToAbsl(name), " ",
                  ToAbsl(type), "\n", ToAbsl(name), " ", value, "\n");
}

}  // namespace

std::string EngineMetricsText(const CoreStats& stats, uint64_t workers_attached) {
  std::string out;
  const auto gauge = [&](std::string_view name, std::string_view help, auto value) {
    Append(&out, name, "gauge", help, value);
  };
  const auto counter = [&](std::string_view name, std::string_view help, auto value) {
    Append(&out, name, "counter", help, value);
  };
  gauge("strait_num_requests_running", "Sequences resident in a pipeline.", stats.running);
  gauge("strait_num_requests_waiting", "Sequences admitted and not resident.", stats.waiting);
  gauge("strait_workers_attached", "Workers attached to this coordinator.", workers_attached);
  gauge("strait_pipelines_active", "Pipelines that serve.", stats.pipelines_active);
  gauge("strait_cache_bytes_used", "Bytes of latent blocks held by sequences, of all stages.",
        stats.cache_bytes_used);
  gauge("strait_cache_bytes_total", "Bytes of latent blocks of all stages.",
        stats.cache_bytes_total);
  gauge("strait_kv_cache_usage_perc", "Share of the bytes of latent blocks in use, 0 to 1.",
        stats.cache_bytes_total == 0 ? 0.0
                                     : static_cast<double>(stats.cache_bytes_used) /
                                           static_cast<double>(stats.cache_bytes_total));
  counter("strait_steps_total", "Steps planned.", stats.steps);
  counter("strait_prompt_tokens_total", "Prompt tokens computed, replays not counted.",
          stats.prompt_tokens);
  counter("strait_generation_tokens_total", "Tokens generated.", stats.generated_tokens);
  counter("strait_replayed_tokens_total", "Tokens computed again after a preemption or a failure.",
          stats.replayed_tokens);
  counter("strait_recomputed_rows_total", "The same, each for every stage that computed it again.",
          stats.recomputed_rows);
  counter("strait_kept_rows_total", "Rows that stages kept when their pipeline began a new epoch.",
          stats.kept_rows);
  counter("strait_granted_tokens_total",
          "Tokens planned before the one that they follow was known.", stats.granted_tokens);
  counter("strait_surplus_tokens_total", "Tokens sampled for sequences that had ended.",
          stats.surplus_tokens);
  counter("strait_prefix_cached_rows_total", "Rows that sequences found in prefix blocks.",
          stats.cached_rows);
  counter("strait_prefix_blocks_made_total", "Full blocks that became prefix blocks.",
          stats.prefix_blocks_made);
  counter("strait_prefix_blocks_dropped_total", "Prefix blocks that made room for others.",
          stats.prefix_blocks_dropped);
  counter("strait_prefix_blocks_offloaded_total", "Prefix blocks that went to host memory.",
          stats.prefix_blocks_offloaded);
  counter("strait_prefix_blocks_returned_total", "Prefix blocks that came back from there.",
          stats.prefix_blocks_returned);
  counter("strait_prefix_blocks_lost_total",
          "Prefix blocks whose bytes there had changed, or whose copy failed; computed again.",
          stats.prefix_blocks_lost);
  counter("strait_prefix_blocks_forgotten_total", "Prefix blocks that made room there for others.",
          stats.prefix_blocks_forgotten);
  counter("strait_host_copied_bytes_total", "Bytes copied to and from host memory, of all stages.",
          stats.host_copied_bytes);
  counter("strait_host_copying_us_total",
          "Microseconds in which such copies were under way, summed over stages.",
          stats.host_copying_us);
  gauge("strait_host_cache_bytes_used", "Bytes of prefix blocks in host memory, of all stages.",
        stats.host_bytes_used);
  gauge("strait_host_cache_bytes_total", "Bytes that prefix blocks may have there.",
        stats.host_bytes_total);
  counter("strait_warm_stages_taken_total",
          "Lost stages whose successor had the weights ready and read none.",
          stats.warm_stages_taken);
  counter("strait_num_preemptions_total", "Sequences that lost their blocks to older ones.",
          stats.preemptions);
  counter("strait_migrations_total", "Sequences that went to another pipeline with all their rows.",
          stats.migrations);
  counter("strait_migrations_failed_total", "Moves that were given up; the sequence went on.",
          stats.migrations_failed);
  counter("strait_migrated_bytes_total", "Bytes of cache rows that went over.",
          stats.migrated_bytes);
  counter("strait_migrated_shared_bytes_total",
          "Of these, bytes that went through shared memory, or stayed in a worker.",
          stats.migrated_shared_bytes);
  counter("strait_migrated_nccl_bytes_total", "Of these, bytes that went by NCCL.",
          stats.migrated_nccl_bytes);
  counter(
      "strait_migration_pause_us_total",
      "Microseconds from the last token of the old pipeline to the first of the new one, summed.",
      stats.migration_pause_us);
  gauge("strait_migration_pause_us_max", "The longest of these.", stats.migration_pause_us_max);
  counter("strait_pipeline_recoveries_total", "Pipelines that came back with a new epoch.",
          stats.recoveries);
  counter("strait_workers_lost_total", "Workers whose stream ended.", stats.workers_lost);
  counter("strait_requests_refused_total", "Requests refused at admission.",
          stats.requests_refused);
  absl::StrAppend(&out,
                  "# HELP strait_sequences_ended_total Sequences that ended, by reason.\n"
                  "# TYPE strait_sequences_ended_total counter\n");
  constexpr std::string_view kReasons[] = {"stop", "length", "cancelled", "error"};
  for (size_t i = 0; i < std::size(kReasons); ++i) {
    absl::StrAppend(&out, "strait_sequences_ended_total{finished_reason=\"", ToAbsl(kReasons[i]),
                    "\"} ", stats.requests_ended[i], "\n");
  }
  return out;
}

}  // namespace strait
