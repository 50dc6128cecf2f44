// SPDX-License-Identifier: Apache-2.0
//
// Warm spares hold weights ready: up to --warm-spares of them load layer ranges that pipelines serve, so that
// whoever takes the place of a lost stage reads none. NextWarm says which range a spare loads next.
//
//   spare ─▶ LoadStage with the least cache ─▶ LOADED: warm ─▶ its range is lost: the stage gets the place, the
//   spare's other ranges are unloaded, its cache grows to what was planned ─▶ activated as any other stage
//
// Thread:  pure; what is sent for it, Cluster decides (warming.cc), on the loop thread.
// Limits:  a range is loaded only where BookedBytes of all warm ranges of the spare stays within its memory, and where
//          it could serve alone with half of the rows that its pipeline was planned with. One loads at a time.
//          A warm load that fails leaves its spare alone for kWarmBackoffUs, doubling up to kWarmBackoffMaxUs; it
//          may be given a place meanwhile.
// Why:     a warm range is an ordinary stage that has no place. So a spare needs no new state, the books count it as
//          they count all, and taking it is giving it a place: nothing is loaded, moved or shared. It has one latent
//          block a layer until then, so that a spare holds as many ranges as its memory allows.
//          A warm spare is a spare for all else. Whatever else needs it has its warm ranges unloaded first, and asks
//          again when their memory is free; nothing is warmed while anything is put together.
//          A whole model as one warm range would be there beside the stage that takes a part of it, with a workspace
//          and edges of its own: the range alone costs less.
#pragma once

#include <cstdint>
#include <optional>

#include "absl/types/span.h"
#include "coordinator/core/core.h"
#include "coordinator/core/worker_books.h"
#include "proto/base/ids.h"

namespace strait {

inline constexpr uint64_t kWarmBackoffUs = 10'000'000;
inline constexpr uint64_t kWarmBackoffMaxUs = 600'000'000;

// A layer range that pipelines serve.
struct WarmRange {
  LayerRange layers;
  uint32_t num_stages = 0;    // that have it
  uint32_t num_covers = 0;    // spares that have it warm, or load it
  uint64_t planned_rows = 0;  // the least of their pipelines'
};

// As it is loaded: one block a layer.
uint64_t WarmCacheBytes(const ModelShape& model, LayerRange layers);

// What a spare of this memory that has `warm` loads next: of the ranges that fit the one with fewest covers, then
// most stages, then most weights; they take longest. Absent: none fits.
std::optional<LayerRange> NextWarm(const CoreOptions& options, const ModelShape& model,
                                   const WorkerMemory& memory, const HostedStages& warm,
                                   absl::Span<const WarmRange> ranges);

}  // namespace strait
