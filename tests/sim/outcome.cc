// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/simulation.h"

namespace strait::sim {

void Outcome::Add(const Outcome& other) {
  for (const auto field : {&Outcome::requests,
                           &Outcome::sequences_finished,
                           &Outcome::sequences_nan,
                           &Outcome::scales,
                           &Outcome::scales_done,
                           &Outcome::corruptions,
                           &Outcome::evictions,
                           &Outcome::lies_told,
                           &Outcome::lies_caught,
                           &Outcome::moves_asked,
                           &Outcome::moves_done,
                           &Outcome::moves_other_layers,
                           &Outcome::moves_other_stages,
                           &Outcome::drains_asked,
                           &Outcome::drains_done,
                           &Outcome::drains_undone,
                           &Outcome::leaves,
                           &Outcome::left,
                           &Outcome::left_with_stages,
                           &Outcome::joins}) {
    this->*field += other.*field;
  }
  for (const auto field : {&Outcome::cached_tokens, &Outcome::scale_kept, &Outcome::steps_ahead,
                           &Outcome::late_ids, &Outcome::late_frames, &Outcome::rows_restored}) {
    this->*field += other.*field;
  }
  for (const auto field : {&CoreStats::steps,
                           &CoreStats::preemptions,
                           &CoreStats::recoveries,
                           &CoreStats::generated_tokens,
                           &CoreStats::granted_tokens,
                           &CoreStats::surplus_tokens,
                           &CoreStats::replayed_tokens,
                           &CoreStats::recomputed_rows,
                           &CoreStats::cached_rows,
                           &CoreStats::kept_rows,
                           &CoreStats::warm_stages_taken,
                           &CoreStats::prefix_blocks_made,
                           &CoreStats::prefix_blocks_dropped,
                           &CoreStats::prefix_blocks_survived,
                           &CoreStats::prefix_blocks_mended,
                           &CoreStats::prefix_blocks_offloaded,
                           &CoreStats::prefix_blocks_returned,
                           &CoreStats::prefix_blocks_forgotten,
                           &CoreStats::prefix_blocks_lost,
                           &CoreStats::replicas_made,
                           &CoreStats::replicas_failed}) {
    stats.*field += other.stats.*field;
  }
  events.Add(other.events);
  moves.Add(other.moves);
  procedures.Add(other.procedures);
}

}  // namespace strait::sim
