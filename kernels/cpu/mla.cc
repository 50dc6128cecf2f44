// SPDX-License-Identifier: Apache-2.0
//
// Cuts attention into tiles and spans for the threads; the pieces are in mla_body.h.
#include <algorithm>

#include "kernels/cpu/gemm.h"
#include "kernels/cpu/kernels.h"
#include "kernels/cpu/level.h"
#include "proto/base/check.h"

namespace strait::cpu {
namespace {

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Spans of one tile that may wait, unfolded, in scratch: bounds the scratch of long decodes.
constexpr int64_t kSpansPerWave = 16;
constexpr int64_t kTilesPerThread = 4;  // with fewer, a tile's spans go to different threads

int64_t PartialFloats(const MlaParams& p) {
  return kMlaPartialHead + kMlaTileQueries * PadTo16(p.layout.kv_lora_rank);
}

MlaPartial PartialAt(float* base) { return {base, base + kMlaTileQueries, base + kMlaPartialHead}; }

std::vector<MlaTile> CutTiles(const MlaParams& p) {
  std::vector<MlaTile> tiles;
  for (int64_t t = 0; t < p.num_tokens;) {
    int64_t end = t + 1;
    while (end < p.num_tokens && p.sequence_index[end] == p.sequence_index[t]) ++end;
    for (int64_t pair = t * p.num_heads; pair < end * p.num_heads; pair += kMlaTileQueries) {
      const int64_t count = std::min(kMlaTileQueries, end * p.num_heads - pair);
      int64_t last_position = 0;
      for (int64_t i = pair / p.num_heads; i <= (pair + count - 1) / p.num_heads; ++i) {
        STRAIT_CHECK(p.positions[i] >= 0);
        last_position = std::max<int64_t>(last_position, p.positions[i]);
      }
      tiles.push_back({pair, count, last_position});
    }
    t = end;
  }
  return tiles;
}

int64_t NumSpans(const MlaTile& tile) {
  return tile.last_position / (kMlaSpanBlocks * kCacheBlockTokens) + 1;
}

void CheckUpProjection(const WeightMatrix& w, int64_t num_heads, int64_t nope, int64_t v) {
  STRAIT_CHECK(w.rows == num_heads * (nope + v));
  STRAIT_CHECK((w.type == WeightType::kFp8E4m3) == (w.scale_inv != nullptr));
}

// One thread folds all spans of its tile.
void RunWholeTiles(Context& context, const MlaParams& p, const std::vector<MlaTile>& tiles) {
  const size_t floats = static_cast<size_t>(PartialFloats(p) + MlaScratch(p));
  const int64_t num_tiles = static_cast<int64_t>(tiles.size());
  context.pool().ParallelFor(num_tiles, [&](int64_t piece, int thread) {
    // The last tokens see the most rows: first, so that no thread is left with a long tile.
    const MlaTile& tile = tiles[static_cast<size_t>(num_tiles - 1 - piece)];
    float* scratch = context.Scratch(thread, floats);
    const MlaPartial total = PartialAt(scratch);
    context.table().mla_spans(p, tile, 0, NumSpans(tile), total, scratch + PartialFloats(p));
    context.table().mla_finish(p, tile, total);
  });
}

// Few tiles with long sequences: spans run on different threads, then are folded in order.
void RunSplitTiles(Context& context, const MlaParams& p, const std::vector<MlaTile>& tiles,
                   int64_t most_spans) {
  const int64_t num_tiles = static_cast<int64_t>(tiles.size());
  const int64_t wave = std::min(most_spans, kSpansPerWave);
  const int64_t slots = wave + 1;  // slot 0 of a tile holds the total
  float* partials =
      context.Scratch(Context::kShared, static_cast<size_t>(num_tiles * slots * PartialFloats(p)));
  const auto slot = [&](int64_t tile, int64_t index) {
    return PartialAt(partials + (tile * slots + index) * PartialFloats(p));
  };
  const size_t scratch_floats = static_cast<size_t>(MlaScratch(p));
  for (int64_t begin = 0; begin < most_spans; begin += wave) {
    context.pool().ParallelFor(num_tiles * wave, [&](int64_t piece, int thread) {
      const int64_t tile = piece / wave;
      const int64_t span = begin + piece % wave;
      if (span >= NumSpans(tiles[tile])) return;
      const MlaPartial to = slot(tile, span == 0 ? 0 : 1 + span - begin);
      context.table().mla_spans(p, tiles[tile], span, span + 1, to,
                                context.Scratch(thread, scratch_floats));
    });
    context.pool().ParallelFor(num_tiles, [&](int64_t tile, int) {
      const int64_t end = std::min(begin + wave, NumSpans(tiles[tile]));
      for (int64_t span = std::max<int64_t>(begin, 1); span < end; ++span) {
        context.table().mla_fold(p, tiles[tile], slot(tile, 0), slot(tile, 1 + span - begin), span);
      }
    });
  }
  context.pool().ParallelFor(num_tiles, [&](int64_t tile, int) {
    context.table().mla_finish(p, tiles[tile], slot(tile, 0));
  });
}

}  // namespace

int64_t MlaScratch(const MlaParams& p) {
  const int64_t width = PadTo16(p.layout.kv_lora_rank) + PadTo16(p.layout.qk_rope_head_dim);
  return (kMlaTileQueries + kCacheBlockTokens) * width + kMlaTileQueries * kCacheBlockTokens +
         PartialFloats(p);
}

int64_t AbsorbScratch(const AbsorbQueryParams& p) {
  return (kAbsorbRows + kAbsorbTokens) * PadTo16(p.kv_b_proj.cols) + kAbsorbTokens * kAbsorbRows;
}

void Mla(Context& context, const MlaParams& p) {
  CheckLayout(p.layout);
  STRAIT_CHECK(p.num_tokens >= 0 && p.num_heads > 0);
  const std::vector<MlaTile> tiles = CutTiles(p);
  int64_t most_spans = 0;
  for (const MlaTile& tile : tiles) most_spans = std::max(most_spans, NumSpans(tile));
  const bool few = static_cast<int64_t>(tiles.size()) < kTilesPerThread * context.num_threads();
  if (few && most_spans > 1 && context.num_threads() > 1) {
    RunSplitTiles(context, p, tiles, most_spans);
  } else {
    RunWholeTiles(context, p, tiles);
  }
}

void AbsorbQuery(Context& context, const AbsorbQueryParams& p) {
  CheckUpProjection(p.kv_b_proj, p.num_heads, p.qk_nope_head_dim, p.v_head_dim);
  const int64_t token_blocks = CeilDiv(p.num_tokens, kAbsorbTokens);
  context.pool().ParallelFor(p.num_heads * token_blocks, [&](int64_t piece, int thread) {
    const int64_t head = piece / token_blocks;
    const int64_t t0 = piece % token_blocks * kAbsorbTokens;
    context.table().absorb(p, head, t0, std::min(t0 + kAbsorbTokens, p.num_tokens),
                           context.Scratch(thread, static_cast<size_t>(AbsorbScratch(p))));
  });
}

void ValueUp(Context& context, const ValueUpParams& p) {
  CheckUpProjection(p.kv_b_proj, p.num_heads, p.qk_nope_head_dim, p.v_head_dim);
  std::vector<GemmWork> works(static_cast<size_t>(p.num_heads));
  for (int64_t h = 0; h < p.num_heads; ++h) {
    GemmWork& work = works[static_cast<size_t>(h)];
    work.weight_row = h * (p.qk_nope_head_dim + p.v_head_dim) + p.qk_nope_head_dim;
    work.params.x = p.o_latent + h * p.kv_b_proj.cols;
    work.params.x_stride = p.num_heads * p.kv_b_proj.cols;
    work.params.num_rows = p.num_tokens;
    work.params.weight = p.kv_b_proj;
    work.params.weight.rows = p.v_head_dim;
    work.params.y = p.out + h * p.v_head_dim;
    work.params.y_stride = p.num_heads * p.v_head_dim;
  }
  RunGemms(context, works);
}

}  // namespace strait::cpu
