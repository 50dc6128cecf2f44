// SPDX-License-Identifier: Apache-2.0
//
// Defends: whatever the batch, a plan covers every (tile, cache block) once, keeps its limits and
// an even load; a deterministic plan cuts each sequence as if it were alone. Needs no GPU.
#include "kernels/cuda/attention/mla_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <map>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace strait::cuda {
namespace {

struct Batch {
  std::vector<MlaSequence> sequences;
  int32_t num_tokens = 0;
  int32_t max_rows = 0;

  void Add(int32_t tokens, int32_t first_position, int32_t num_rows = -1) {
    const int32_t index = static_cast<int32_t>(sequences.size());
    sequences.push_back({index, num_tokens, tokens, first_position, num_rows, first_position});
    num_tokens += tokens;
    max_rows = std::max(max_rows, std::max(first_position + tokens, num_rows));
  }
};

MlaPlanLimits LimitsOf(const Batch& batch, int32_t heads, bool deterministic, int32_t grid = 132) {
  return MaxMlaPlan(grid, static_cast<int32_t>(batch.sequences.size()), batch.num_tokens, heads,
                    batch.max_rows, deterministic);
}

MlaPlan Plan(const Batch& batch, int32_t heads, bool deterministic, int32_t grid = 132) {
  MlaPlan plan;
  EXPECT_TRUE(PlanMla(batch.sequences.data(), static_cast<int32_t>(batch.sequences.size()),
                      {.num_heads = heads, .deterministic = deterministic},
                      LimitsOf(batch, heads, deterministic, grid), &plan));
  return plan;
}

int64_t Load(const MlaPlan& plan, size_t thread_block) {
  int64_t load = 0;
  for (int32_t w = plan.work_begin[thread_block]; w < plan.work_begin[thread_block + 1]; ++w) {
    load += plan.work[w].block_end - plan.work[w].block_begin + 2;
  }
  return load;
}

void ExpectWhole(const Batch& batch, int32_t heads, const MlaPlan& plan) {
  // row -> (begin, end, partial) of its stretches
  std::map<int32_t, std::vector<MlaWork>> tiles;
  for (const MlaWork& work : plan.work) tiles[work.first_row].push_back(work);
  std::map<int32_t, MlaMerge> merges;
  std::set<int32_t> slots;
  int32_t units = 0;
  for (const MlaMerge& merge : plan.merges) {
    EXPECT_TRUE(merges.emplace(merge.first_row, merge).second);
    EXPECT_EQ(merge.first_unit, units);
    units += MlaMergeUnits(merge.num_rows, merge.warps);
  }
  EXPECT_EQ(plan.num_merge_units, units);
  size_t num_tiles = 0;
  for (const MlaSequence& s : batch.sequences) {
    for (int32_t row = 0; row < s.num_tokens * heads; row += kMlaTileRows, ++num_tiles) {
      const int32_t rows = std::min(kMlaTileRows, s.num_tokens * heads - row);
      const int32_t seen =
          s.num_rows >= 0 ? s.num_rows : s.first_position + (row + rows - 1) / heads + 1;
      std::vector<MlaWork> stretches = tiles[s.first_token * heads + row];
      std::sort(stretches.begin(), stretches.end(),
                [](const MlaWork& a, const MlaWork& b) { return a.block_begin < b.block_begin; });
      ASSERT_FALSE(stretches.empty());
      int32_t at = 0;
      for (size_t i = 0; i < stretches.size(); ++i) {
        const MlaWork& work = stretches[i];
        EXPECT_EQ(work.block_begin, at);
        at = work.block_end;
        EXPECT_EQ(work.sequence, s.sequence);
        EXPECT_EQ(work.num_rows, rows);
        EXPECT_EQ(work.row_in_sequence, row);
        EXPECT_EQ(work.first_position, s.first_position);
        EXPECT_EQ(work.settled_blocks, s.settled_rows / kMlaBlockRows);
        EXPECT_GE(work.cache_rows, seen);
        EXPECT_LE(work.cache_rows, std::max(s.num_rows, s.first_position + s.num_tokens));
        if (stretches.size() == 1) {
          EXPECT_EQ(work.partial, -1);
        } else {
          EXPECT_GT(work.block_end, work.block_begin);
          const MlaMerge& merge = merges.at(work.first_row);
          EXPECT_EQ(merge.num_partials, static_cast<int32_t>(stretches.size()));
          EXPECT_EQ(merge.num_rows, rows);
          EXPECT_EQ(work.partial, merge.first_partial + static_cast<int32_t>(i));
          EXPECT_TRUE(slots.insert(work.partial).second);
          EXPECT_LT(work.partial, plan.limits.max_partials);
        }
      }
      EXPECT_EQ(at, (stretches[0].cache_rows + 63) / 64);
    }
  }
  EXPECT_EQ(tiles.size(), num_tiles);
  EXPECT_EQ(slots.size(), static_cast<size_t>(plan.num_partials));
}

TEST(MlaPlanTest, RandomBatchesAreCoveredOnceAndEvenly) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 rng(seed);
  const auto pick = [&](int32_t low, int32_t high) {
    return std::uniform_int_distribution<int32_t>(low, high)(rng);
  };
  for (int round = 0; round < 200; ++round) {
    const int32_t heads = std::vector<int32_t>{1, 5, 16, 20, 64, 128, 256}[pick(0, 6)];
    Batch batch;
    for (int32_t s = pick(1, 40); s > 0; --s) {
      if (pick(0, 9) == 0) {
        batch.Add(1, 0, 0);  // nothing to see
      } else {
        batch.Add(pick(1, round % 2 == 0 ? 4 : 200), pick(0, 1) == 0 ? pick(0, 20000) : 0);
      }
    }
    const int32_t grid = pick(1, 140);
    const MlaPlan plan = Plan(batch, heads, false, grid);
    ExpectWhole(batch, heads, plan);
    int32_t most_tokens = 0;
    for (const MlaSequence& s : batch.sequences) most_tokens = std::max(most_tokens, s.num_tokens);
    EXPECT_EQ(MlaLargestTile(plan), std::min(most_tokens * heads, kMlaTileRows));
    int64_t heaviest = 0;
    int64_t total = 0;
    for (size_t i = 0; i < static_cast<size_t>(grid); ++i) {
      heaviest = std::max(heaviest, Load(plan, i));
      total += Load(plan, i);
    }
    // A part stops at most 5 short of full, and another deal has at most 2 more of cuts a part.
    const int32_t dealt_to = heads % 128 == 0 && grid > 1 ? grid - grid % 2 : grid;
    EXPECT_LE(heaviest, total / dealt_to + 10);
    ExpectWhole(batch, heads, Plan(batch, heads, true, grid));
  }
}

TEST(MlaPlanTest, OneLongSequenceFillsTheDevice) {
  for (const int32_t heads : {16, 64, 128}) {
    Batch batch;
    batch.Add(1, 131071);
    const MlaPlan plan = Plan(batch, heads, false);
    const int64_t tiles_side_by_side = heads == 128 ? 2 : 1;
    const int64_t even = (2048 * tiles_side_by_side + 131) / 132;
    for (size_t i = 0; i < 132; ++i) EXPECT_LE(Load(plan, i), even + 2) << i;
  }
}

TEST(MlaPlanTest, ADeterministicPlanCutsASequenceAsIfAlone) {
  Batch alone;
  alone.Add(1, 9999);
  Batch batch;
  batch.Add(3, 100);
  batch.Add(1, 9999);
  batch.Add(1, 50000);
  const auto cuts = [](const MlaPlan& plan, int32_t first_row) {
    std::set<std::pair<int32_t, int32_t>> cuts;
    for (const MlaWork& work : plan.work) {
      if (work.first_row == first_row) cuts.emplace(work.block_begin, work.block_end);
    }
    return cuts;
  };
  EXPECT_EQ(cuts(Plan(alone, 16, true), 0), cuts(Plan(batch, 16, true, 7), 3 * 16));
  for (const auto& [begin, end] : cuts(Plan(alone, 16, true), 0)) {
    EXPECT_EQ(begin % kMlaDeterministicSpan, 0);
  }
}

// What decides the bits of a row: the stretches that it sees, in order. A fold over at most four is
// the same in one warp and in four; of more it must be four.
struct RowCuts {
  std::vector<std::pair<int32_t, int32_t>> seen;  // blocks
  int32_t warps = 0;                              // of the merge; 0: none
  friend bool operator==(const RowCuts&, const RowCuts&) = default;
};
using Rows = std::map<std::pair<int32_t, int32_t>, RowCuts>;  // by position and head

// Rows of sequence `sequence` in a plan; each must be there once over all plans of a batch.
void AddRows(const MlaPlan& plan, int32_t sequence, int32_t heads, Rows* rows) {
  std::map<int32_t, int32_t> warps;
  for (const MlaMerge& merge : plan.merges) warps[merge.first_row] = merge.warps;
  std::map<int32_t, std::vector<MlaWork>> tiles;
  for (const MlaWork& work : plan.work) {
    if (work.sequence == sequence) tiles[work.first_row].push_back(work);
  }
  for (auto& [first_row, stretches] : tiles) {
    std::sort(stretches.begin(), stretches.end(),
              [](const MlaWork& a, const MlaWork& b) { return a.block_begin < b.block_begin; });
    for (int32_t r = 0; r < stretches[0].num_rows; ++r) {
      const int32_t row = stretches[0].row_in_sequence + r;
      const int32_t position = stretches[0].first_position + row / heads;
      RowCuts cuts;
      for (const MlaWork& work : stretches) {
        const int32_t end = std::min(work.block_end, position / kMlaBlockRows + 1);
        if (work.block_begin < end) cuts.seen.emplace_back(work.block_begin, end);
      }
      if (cuts.seen.size() > 4) {
        ASSERT_TRUE(warps.contains(first_row));
        cuts.warps = warps.at(first_row);
      }
      ASSERT_TRUE(rows->emplace(std::pair(position, row % heads), cuts).second)
          << "twice: position " << position << " head " << row % heads;
    }
  }
}

// Cuts, plans every part and checks it; the number of parts.
int32_t PlanInParts(const Batch& batch, int32_t heads, const MlaPartLimits& limits,
                    std::map<int32_t, Rows>* rows) {
  const MlaPlanOptions options = {.num_heads = heads, .deterministic = true};
  MlaParts parts;
  CutMlaBatch(batch.sequences.data(), static_cast<int32_t>(batch.sequences.size()), options,
              limits.plan, &parts);
  const auto num_parts = static_cast<int32_t>(parts.begin.size()) - 1;
  EXPECT_LE(num_parts, limits.max_parts);
  int64_t bytes = 0;
  for (int32_t part = 0; part < num_parts; ++part) {
    Batch one;
    one.sequences.assign(parts.sequences.begin() + parts.begin[part],
                         parts.sequences.begin() + parts.begin[part + 1]);
    MlaPlan plan;
    EXPECT_TRUE(PlanMla(one.sequences.data(), static_cast<int32_t>(one.sequences.size()), options,
                        limits.plan, &plan))
        << "part " << part << " of " << num_parts;
    ExpectWhole(one, heads, plan);
    bytes += MlaPlanUsedBytes(plan);
    for (const MlaSequence& s : batch.sequences) {
      AddRows(plan, s.sequence, heads, &(*rows)[s.sequence]);
    }
  }
  EXPECT_LE(bytes, limits.plan_bytes);
  return num_parts;
}

TEST(MlaPlanTest, ARowsCutsAreItsSequencesAlone) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 rng(seed);
  const auto pick = [&](int32_t low, int32_t high) {
    return std::uniform_int_distribution<int32_t>(low, high)(rng);
  };
  int32_t most_parts = 0;
  for (int round = 0; round < 60; ++round) {
    const int32_t heads = std::vector<int32_t>{1, 5, 16, 20, 64, 128, 256}[pick(0, 6)];
    const int32_t first = round % 3 == 0 ? pick(0, 900) : pick(900, 12000);
    const int32_t tokens = pick(1, 150);
    // Token by token, alone, on another device: the longest way of all.
    Rows expected;
    for (int32_t i = 0; i < tokens; ++i) {
      Batch one;
      one.Add(1, first + i);
      std::map<int32_t, Rows> rows;
      PlanInParts(one, heads, MaxMlaParts(7, 1, 1, heads, 20000, 1 << 20), &rows);
      expected.merge(rows[0]);
    }
    ASSERT_EQ(expected.size(), static_cast<size_t>(tokens * heads));
    for (const auto& [row, cuts] : expected) {
      for (const auto& [begin, end] : cuts.seen) EXPECT_EQ(begin % kMlaDeterministicSpan, 0);
      EXPECT_EQ(cuts.warps, cuts.seen.size() > 4 ? 4 : 0);
    }
    // In chunks, each in a batch of others.
    for (const int32_t chunk : {1, 7, 64, tokens}) {
      Rows rows;
      for (int32_t at = 0; at < tokens; at += chunk) {
        const int32_t count = std::min(chunk, tokens - at);
        Batch batch;
        for (int32_t other = pick(0, 8); other > 0; --other) batch.Add(pick(1, 9), pick(0, 19000));
        const auto index = static_cast<int32_t>(batch.sequences.size());
        batch.Add(count, first + at);
        for (int32_t other = pick(0, 8); other > 0; --other) batch.Add(pick(1, 9), pick(0, 19000));
        std::map<int32_t, Rows> all;
        const int32_t wanted = pick(0, 2) == 0 ? 1 << 20 : pick(1, 300);
        most_parts =
            std::max(most_parts,
                     PlanInParts(batch, heads,
                                 MaxMlaParts(pick(1, 140), 1024, 512, heads, 20000, wanted), &all));
        for (size_t s = 0; s < batch.sequences.size(); ++s) {
          EXPECT_EQ(all[static_cast<int32_t>(s)].size(),
                    static_cast<size_t>(batch.sequences[s].num_tokens * heads));
        }
        rows.merge(all[index]);
      }
      EXPECT_TRUE(rows == expected) << "chunks of " << chunk;
    }
  }
  EXPECT_GT(most_parts, 3) << "batches that need several parts were meant to be among them";
}

// The merge kernel's sums (kernels/cuda/attention/mla.cu) over the first `seen` of `count` partial results;
// the others saw nothing: a weight of 0 and a result of 0.
float Merged(const std::vector<float>& out, const std::vector<float>& lse, int32_t seen,
             int32_t count) {
  if (count == 1) return out[0];
  float max = -INFINITY;
  for (int32_t s = 0; s < seen; ++s) max = std::max(max, lse[s]);
  const int32_t warps = MlaMergeWarps(count, true);
  float sums[4] = {};
  float weights[4] = {};
  for (int32_t w = 0; w < warps; ++w) {
    for (int32_t s = w; s < count; s += warps) {
      const float weight = s < seen ? std::exp2((lse[s] - max) * 1.4426950408889634f) : 0.0f;
      weights[w] += weight;
      sums[w] += weight * (s < seen ? out[s] : 0.0f);
    }
  }
  for (int32_t w = 1; w < warps; ++w) {
    sums[0] += 1.0f * sums[w];
    weights[0] += weights[w];
  }
  return sums[0] * (1.0f / weights[0]);
}

// A row's tile may reach further than the row sees, by as much as the chunk that it came in.
TEST(MlaPlanTest, PartialsThatSawNothingMoveNoBitOfAMerge) {
  const uint64_t seed = std::random_device{}();
  SCOPED_TRACE("seed " + std::to_string(seed));
  std::mt19937_64 rng(seed);
  std::normal_distribution<float> normal(0, 3);
  for (int round = 0; round < 200; ++round) {
    std::vector<float> out;
    std::vector<float> lse;
    for (int i = 0; i < 40; ++i) {
      out.push_back(normal(rng));
      lse.push_back(normal(rng));
    }
    for (int32_t seen = 1; seen <= 40; ++seen) {
      const float alone = Merged(out, lse, seen, seen);
      for (const int32_t more : {1, 2, 3, 4, 11, 17, 100}) {
        const float got = Merged(out, lse, seen, seen + more);
        ASSERT_EQ(std::bit_cast<uint32_t>(got), std::bit_cast<uint32_t>(alone))
            << seen << " of " << seen + more;
      }
    }
  }
}

TEST(MlaPlanTest, TheLargestStepsArePlannedInParts) {
  // As stages pose them: 512 rows of 128 heads behind 163,840 cached ones.
  const MlaPartLimits limits = MaxMlaParts(132, 1024, 512, 128, 163840, 1024);
  for (const int32_t sequences : {1, 512}) {
    Batch batch;
    for (int32_t s = 0; s < sequences; ++s) batch.Add(512 / sequences, 163840 - 512 / sequences);
    std::map<int32_t, Rows> rows;
    EXPECT_GT(PlanInParts(batch, 128, limits, &rows), 100);
    EXPECT_EQ(rows.size(), static_cast<size_t>(sequences));
  }
  EXPECT_LT(int64_t{limits.plan.max_partials} * 64 * 512 * 4, int64_t{256} << 20);
  EXPECT_LT(limits.plan_bytes, int64_t{64} << 20);
}

TEST(MlaPlanTest, WithoutFixedCutsABatchIsOnePart) {
  Batch batch;
  for (int i = 0; i < 5; ++i) batch.Add(3, 100000 * i);
  MlaParts parts;
  CutMlaBatch(batch.sequences.data(), 5, {.num_heads = 16}, LimitsOf(batch, 16, false), &parts);
  EXPECT_EQ(parts.begin, (std::vector<int32_t>{0, 5}));
  CutMlaBatch(nullptr, 0, {.num_heads = 16}, LimitsOf(batch, 16, false), &parts);
  EXPECT_EQ(parts.begin, std::vector<int32_t>{0});
}

TEST(MlaPlanTest, TooSmallALimitIsRefusedAndLeavesAnEmptyPlan) {
  Batch batch;
  batch.Add(1, 100000);
  for (int which = 0; which < 3; ++which) {
    MlaPlanLimits limits = LimitsOf(batch, 16, false);
    if (which == 0) limits.max_work = 3;
    if (which == 1) limits.max_merges = 0;
    if (which == 2) limits.max_partials = 5;
    MlaPlan plan;
    EXPECT_FALSE(PlanMla(batch.sequences.data(), 1, {.num_heads = 16}, limits, &plan));
    EXPECT_TRUE(plan.work.empty());
    EXPECT_EQ(plan.work_begin, std::vector<int32_t>(133, 0));
  }
}

TEST(MlaPlanTest, ABufferReadsBackAsWritten) {
  Batch batch;
  for (int i = 0; i < 30; ++i) batch.Add(1, 1000 * i);
  const MlaPlan plan = Plan(batch, 128, false);
  std::vector<MlaWork> buffer(static_cast<size_t>(MlaPlanBytes(plan.limits)) / sizeof(MlaWork) + 1);
  const int64_t used = WriteMlaPlan(plan, buffer.data());
  EXPECT_LE(used, MlaPlanBytes(plan.limits));
  const MlaPlanView view = ViewMlaPlan(plan.limits, buffer.data());
  EXPECT_EQ(view.counts[0], static_cast<int32_t>(plan.merges.size()));
  EXPECT_EQ(view.counts[1], plan.num_merge_units);
  for (size_t i = 0; i < plan.work_begin.size(); ++i) {
    EXPECT_EQ(view.work_begin[i], plan.work_begin[i]);
  }
  for (size_t i = 0; i < plan.work.size(); ++i) {
    EXPECT_EQ(view.work[i].first_row, plan.work[i].first_row);
    EXPECT_EQ(view.work[i].partial, plan.work[i].partial);
  }
  for (size_t i = 0; i < plan.merges.size(); ++i) {
    EXPECT_EQ(view.merges[i].first_partial, plan.merges[i].first_partial);
  }
}

}  // namespace
}  // namespace strait::cuda
