// SPDX-License-Identifier: Apache-2.0
#include "kernels/cuda/attention/mla_plan.h"

#include <algorithm>
#include <cstring>

#include "proto/base/check.h"

namespace strait::cuda {
namespace {

// What a stretch costs beside its blocks, in blocks: loading q, writing the result.
constexpr int64_t kStretchCost = 2;
constexpr int32_t CeilDiv(int64_t a, int64_t b) { return static_cast<int32_t>((a + b - 1) / b); }

constexpr int64_t Align16(int64_t bytes) { return (bytes + 15) / 16 * 16; }

// A stretch that may still be cut (or not), of `width` neighbouring tiles.
struct Unit {
  MlaWork first;  // of the first tile
  int32_t last_rows = 0;
  bool cuttable = true;
};

struct Piece {
  int32_t unit = 0;
  int32_t block_begin = 0;
  int32_t block_end = 0;
  int32_t part = 0;
};

// Deals the units to parts in order, none above `budget`; false if they do not fit.
bool Deal(const std::vector<Unit>& units, int32_t num_parts, int64_t budget, int32_t min_split,
          std::vector<Piece>* pieces) {
  pieces->clear();
  int32_t part = 0;
  int64_t left = budget;
  for (int32_t u = 0; u < static_cast<int32_t>(units.size()); ++u) {
    int32_t begin = units[u].first.block_begin;
    const int32_t end = units[u].first.block_end;
    for (bool done = false; !done;) {
      if (part == num_parts) return false;
      const int64_t blocks = end - begin;
      int64_t take = left - kStretchCost;
      if (blocks <= take) {
        pieces->push_back({u, begin, end, part});
        left -= blocks + kStretchCost;
        done = true;
        continue;
      }
      take = std::min(take, blocks - min_split);
      if (units[u].cuttable && take >= min_split) {
        pieces->push_back({u, begin, static_cast<int32_t>(begin + take), part});
        begin += static_cast<int32_t>(take);
      } else if (left == budget) {
        return false;
      }
      ++part;
      left = budget;
    }
  }
  return true;
}

std::vector<Unit> MakeUnits(const MlaSequence* sequences, int32_t num_sequences,
                            const MlaPlanOptions& options, int32_t width) {
  std::vector<Unit> units;
  for (int32_t s = 0; s < num_sequences; ++s) {
    const MlaSequence& sequence = sequences[s];
    const int32_t rows = sequence.num_tokens * options.num_heads;
    for (int32_t row = 0; row < rows; row += kMlaTileRows * width) {
      Unit unit;
      MlaWork& work = unit.first;
      const int32_t row_end = std::min(rows, row + kMlaTileRows * width);
      work.sequence = sequence.sequence;
      work.first_row = sequence.first_token * options.num_heads + row;
      work.num_rows = std::min(rows - row, kMlaTileRows);
      work.row_in_sequence = row;
      work.first_position = sequence.first_position;
      work.settled_blocks = sequence.settled_rows / kMlaBlockRows;
      const int32_t seen = sequence.first_position + (row_end - 1) / options.num_heads + 1;
      work.cache_rows = sequence.num_rows < 0 ? seen : sequence.num_rows;
      const int32_t num_blocks = CeilDiv(work.cache_rows, kMlaBlockRows);
      const int32_t span = options.deterministic ? kMlaDeterministicSpan : std::max(num_blocks, 1);
      unit.cuttable = !options.deterministic;
      for (int32_t begin = 0; begin == 0 || begin < num_blocks; begin += span) {
        work.block_begin = begin;
        work.block_end = std::min(begin + span, num_blocks);
        units.push_back(unit);
      }
    }
  }
  return units;
}

bool SameTile(const MlaWork& a, const MlaWork& b) { return a.first_row == b.first_row; }

}  // namespace

bool PlanMla(const MlaSequence* sequences, int32_t num_sequences, const MlaPlanOptions& options,
             const MlaPlanLimits& limits, MlaPlan* plan) {
  *plan = MlaPlan{};
  plan->limits = limits;
  plan->work_begin.assign(static_cast<size_t>(limits.num_thread_blocks) + 1, 0);
  // Tiles that are cut alike and run side by side read their cache once: the halves of 128 heads.
  const int32_t width = MlaTilesInPairs(options.num_heads, limits.num_thread_blocks) ? 2 : 1;
  const int32_t num_parts = limits.num_thread_blocks / width;
  const std::vector<Unit> units = MakeUnits(sequences, num_sequences, options, width);
  if (units.empty()) return true;

  int64_t total = 0;
  int64_t longest = 0;
  for (const Unit& unit : units) {
    const int64_t cost = unit.first.block_end - unit.first.block_begin + kStretchCost;
    total += cost;
    longest = std::max(longest, cost);
  }
  // The least budget that deals all: between the even share and everything to one part.
  int64_t low = total / num_parts;
  int64_t high = total;
  std::vector<Piece> pieces;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (Deal(units, num_parts, middle, options.min_split_blocks, &pieces)) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  Deal(units, num_parts, high, options.min_split_blocks, &pieces);

  // Number the partial results: for each tile that has several pieces, side by side.
  std::vector<int32_t> first_partial(pieces.size(), -1);
  std::vector<int32_t> pieces_of_tile(pieces.size(), 1);
  int32_t num_units = 0;
  for (size_t p = 0; p < pieces.size();) {
    const MlaWork& tile = units[pieces[p].unit].first;
    size_t end = p;
    while (end < pieces.size() && SameTile(units[pieces[end].unit].first, tile)) ++end;
    const int32_t count = static_cast<int32_t>(end - p);
    for (size_t i = p; count > 1 && i < end; ++i) {
      first_partial[i] = plan->num_partials + static_cast<int32_t>(i - p);
      pieces_of_tile[i] = count;
    }
    for (int32_t w = 0; count > 1 && w < width; ++w) {
      MlaMerge merge;
      merge.first_row = tile.first_row + w * kMlaTileRows;
      merge.num_rows = tile.num_rows;
      merge.first_partial = plan->num_partials;
      merge.num_partials = count;
      merge.first_unit = num_units;
      merge.warps = MlaMergeWarps(count, options.deterministic);
      num_units += MlaMergeUnits(merge.num_rows, merge.warps);
      plan->merges.push_back(merge);
      plan->num_partials += count;
    }
    p = end;
  }
  plan->num_merge_units = num_units;

  for (size_t p = 0; p < pieces.size();) {
    size_t end = p;
    while (end < pieces.size() && pieces[end].part == pieces[p].part) ++end;
    for (int32_t w = 0; w < width; ++w) {
      for (size_t i = p; i < end; ++i) {
        MlaWork work = units[pieces[i].unit].first;
        work.first_row += w * kMlaTileRows;
        work.row_in_sequence += w * kMlaTileRows;
        work.block_begin = pieces[i].block_begin;
        work.block_end = pieces[i].block_end;
        if (first_partial[i] >= 0) work.partial = first_partial[i] + w * pieces_of_tile[i];
        plan->work.push_back(work);
      }
      plan->work_begin[pieces[p].part * width + w + 1] = static_cast<int32_t>(plan->work.size());
    }
    p = end;
  }
  for (size_t i = 1; i < plan->work_begin.size(); ++i) {
    plan->work_begin[i] = std::max(plan->work_begin[i], plan->work_begin[i - 1]);
  }
  if (static_cast<int32_t>(plan->work.size()) > limits.max_work ||
      static_cast<int32_t>(plan->merges.size()) > limits.max_merges ||
      plan->num_partials > limits.max_partials) {
    *plan = MlaPlan{};
    plan->limits = limits;
    plan->work_begin.assign(static_cast<size_t>(limits.num_thread_blocks) + 1, 0);
    return false;
  }
  return true;
}

int32_t MlaLargestTile(const MlaPlan& plan) {
  int32_t rows = 0;
  for (const MlaWork& work : plan.work) rows = std::max(rows, work.num_rows);
  return rows;
}

MlaPlanLimits MaxMlaPlan(int32_t num_thread_blocks, int32_t max_sequences, int32_t max_tokens,
                         int32_t num_heads, int64_t max_rows, bool deterministic) {
  MlaPlanLimits limits;
  limits.num_thread_blocks = num_thread_blocks;
  const int32_t tiles = CeilDiv(static_cast<int64_t>(max_tokens) * num_heads, kMlaTileRows) +
                        std::min(max_sequences, max_tokens);
  if (deterministic) {
    const int32_t spans = std::max(1, CeilDiv(max_rows, kMlaBlockRows * kMlaDeterministicSpan));
    limits.max_work = tiles * spans;
    limits.max_merges = spans > 1 ? tiles : 0;
    limits.max_partials = spans > 1 ? tiles * spans : 0;
  } else {
    limits.max_work = tiles + num_thread_blocks;
    limits.max_merges = num_thread_blocks;
    limits.max_partials = 2 * num_thread_blocks;
  }
  return limits;
}

namespace {

// Partial results that one more token of a sequence can add: its own tiles, the one that it shares
// with the token before, each as long as can be.
int64_t TokenPartials(int32_t num_heads, int64_t spans) {
  return (CeilDiv(num_heads, kMlaTileRows) + int64_t{1}) * spans;
}

// What tokens of one sequence add to a deterministic plan.
struct PieceCost {
  int64_t work = 0;
  int64_t partials = 0;
  int64_t merges = 0;

  void AddTile(int64_t spans) {
    work += spans;
    if (spans > 1) {
      partials += spans;
      ++merges;
    }
  }
  bool Fits(const PieceCost& used, const MlaPlanLimits& limits) const {
    return used.work + work <= limits.max_work && used.partials + partials <= limits.max_partials &&
           used.merges + merges <= limits.max_merges;
  }
  void Add(const PieceCost& other) {
    work += other.work;
    partials += other.partials;
    merges += other.merges;
  }
};

int64_t SpansOf(int64_t rows) {
  return std::max(1, CeilDiv(rows, kMlaBlockRows * kMlaDeterministicSpan));
}

// The most leading tokens of `sequence` that still fit beside `used`, and their cost.
int32_t TokensThatFit(const MlaSequence& sequence, int32_t num_heads, const MlaPlanLimits& limits,
                      const PieceCost& used, PieceCost* cost) {
  PieceCost whole;  // of the tiles that are full
  int64_t tile_begin = 0;
  int32_t fits = 0;
  for (int32_t tokens = 1; tokens <= sequence.num_tokens; ++tokens) {
    const int64_t rows = int64_t{tokens} * num_heads;
    // A tile that this token fills ends with it, or within it.
    for (; tile_begin + kMlaTileRows <= rows; tile_begin += kMlaTileRows) {
      whole.AddTile(SpansOf(sequence.first_position + int64_t{tokens}));
    }
    PieceCost all = whole;
    if (tile_begin < rows) all.AddTile(SpansOf(sequence.first_position + int64_t{tokens}));
    if (!all.Fits(used, limits)) return fits;
    fits = tokens;
    *cost = all;
  }
  return fits;
}

}  // namespace

MlaPartLimits MaxMlaParts(int32_t num_thread_blocks, int32_t max_sequences, int32_t max_tokens,
                          int32_t num_heads, int64_t max_rows, int32_t wanted_partials) {
  MlaPartLimits limits;
  limits.plan = MaxMlaPlan(num_thread_blocks, max_sequences, max_tokens, num_heads, max_rows, true);
  const int64_t spans = SpansOf(max_rows);
  const int64_t tiles = limits.plan.max_work / spans;
  const int64_t token = TokenPartials(num_heads, spans);
  const int64_t capped = std::max(3 * token, int64_t{wanted_partials});
  limits.max_parts = 1;
  if (spans > 1 && capped < limits.plan.max_partials) {
    limits.plan.max_partials = static_cast<int32_t>(capped);
    limits.plan.max_work = static_cast<int32_t>(std::max(capped, tiles));
    limits.plan.max_merges = static_cast<int32_t>(capped / 2);
    // A part ends when the next token might not fit, so it is fuller than capped - token; a cut
    // inside a tile adds a tile, at most half a token's. Solved for the number of parts; each has a
    // token.
    limits.max_parts = static_cast<int32_t>(
        std::min<int64_t>(tiles * spans / (capped - 2 * token) + 2, max_tokens));
  }
  // Work of all parts, and what precedes it in each.
  MlaPlanLimits no_work = limits.plan;
  no_work.max_work = 0;
  limits.plan_bytes = limits.max_parts * MlaPlanBytes(no_work) +
                      (tiles + limits.max_parts) * spans * static_cast<int64_t>(sizeof(MlaWork));
  return limits;
}

void CutMlaBatch(const MlaSequence* sequences, int32_t num_sequences, const MlaPlanOptions& options,
                 const MlaPlanLimits& limits, MlaParts* parts) {
  parts->sequences.clear();
  parts->begin.assign(1, 0);
  const auto end_part = [parts] {
    const auto end = static_cast<int32_t>(parts->sequences.size());
    if (end > parts->begin.back()) parts->begin.push_back(end);
  };
  PieceCost used;
  for (int32_t s = 0; s < num_sequences; ++s) {
    MlaSequence rest = sequences[s];
    while (rest.num_tokens > 0) {
      PieceCost cost;
      const int32_t tokens = options.deterministic
                                 ? TokensThatFit(rest, options.num_heads, limits, used, &cost)
                                 : rest.num_tokens;
      if (tokens > 0) {
        MlaSequence piece = rest;
        piece.num_tokens = tokens;
        parts->sequences.push_back(piece);
        used.Add(cost);
        rest.first_token += tokens;
        rest.first_position += tokens;
        rest.num_tokens -= tokens;
      }
      if (rest.num_tokens > 0) {
        STRAIT_CHECK(tokens > 0 || used.work > 0, "the limits hold for one token of any sequence");
        end_part();
        used = {};
      }
    }
  }
  end_part();
}

// Layout: {merges, merge units, 0, 0}, work_begin, merges, work; each part 16-byte aligned. Work
// lies last, so that the bytes in use are a prefix.
int64_t MlaPlanBytes(const MlaPlanLimits& limits) {
  return 16 + Align16((limits.num_thread_blocks + 1) * int64_t{4}) +
         limits.max_merges * static_cast<int64_t>(sizeof(MlaMerge)) +
         limits.max_work * static_cast<int64_t>(sizeof(MlaWork));
}

MlaPlanView ViewMlaPlan(const MlaPlanLimits& limits, const void* buffer) {
  const char* at = static_cast<const char*>(buffer);
  MlaPlanView view;
  view.limits = limits;
  view.counts = reinterpret_cast<const int32_t*>(at);
  at += 16;
  view.work_begin = reinterpret_cast<const int32_t*>(at);
  at += Align16((limits.num_thread_blocks + 1) * int64_t{4});
  view.merges = reinterpret_cast<const MlaMerge*>(at);
  at += limits.max_merges * static_cast<int64_t>(sizeof(MlaMerge));
  view.work = reinterpret_cast<const MlaWork*>(at);
  return view;
}

int64_t MlaPlanUsedBytes(const MlaPlan& plan) {
  MlaPlanLimits used = plan.limits;
  used.max_work = static_cast<int32_t>(plan.work.size());
  return MlaPlanBytes(used);
}

int64_t WriteMlaPlan(const MlaPlan& plan, void* to) {
  const MlaPlanView view = ViewMlaPlan(plan.limits, to);
  const auto write = [](const void* at, const void* from, size_t bytes) {
    if (bytes > 0) std::memcpy(const_cast<void*>(at), from, bytes);
  };
  const int32_t counts[4] = {static_cast<int32_t>(plan.merges.size()), plan.num_merge_units, 0, 0};
  write(view.counts, counts, sizeof(counts));
  write(view.work_begin, plan.work_begin.data(), plan.work_begin.size() * sizeof(int32_t));
  write(view.merges, plan.merges.data(), plan.merges.size() * sizeof(MlaMerge));
  write(view.work, plan.work.data(), plan.work.size() * sizeof(MlaWork));
  return MlaPlanUsedBytes(plan);
}

}  // namespace strait::cuda
