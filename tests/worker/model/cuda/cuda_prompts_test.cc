// SPDX-License-Identifier: Apache-2.0
//
// Defends: a layer whose prompts attend in the expanded form gives what it gives in the absorbed
// form, but for roundings to bf16, with the dimensions of DeepSeek's heads: rows of both forms side
// by side, chunks against cached prefixes, keys in one and in several launches.
#include <gtest/gtest.h>

#include <algorithm>
#include <optional>
#include <vector>

#include "kernels/cuda/attention/mha_prefill.h"
#include "kernels/rope.h"
#include "proto/model/reservation.h"
#include "tests/kernels/cuda/gpu_test.h"
#include "tests/worker/model/cuda/cuda_fixture.h"
#include "worker/model/cuda/layers.h"
#include "worker/model/cuda/step_tables.h"
#include "worker/model/cuda/uploader.h"
#include "worker/model/kernel_names.h"

namespace strait {
namespace {

using gpu_test::Buffer;

constexpr uint32_t kTileRows = 768;
constexpr uint32_t kPoolBlocks = 40;
constexpr LayerRange kLayers = {0, 1};

ModelConfig TrueHeads() {
  ModelConfig config = WithTrueHeads(TinyV2Lite());
  config.num_hidden_layers = 1;
  config.hidden_size = 256;
  config.num_attention_heads = 2;
  return config;
}

struct Chunk {
  uint32_t num_tokens;
  uint32_t first_position;
};

// One layer on the device, with the cache that Run has filled.
class OneLayer {
 public:
  OneLayer()
      : traits_{.num_multiprocessors = 132, .has_mha_prefill = true},
        memory_(static_cast<int64_t>(LayOut(nullptr))),
        pool_memory_(int64_t{kPoolBlocks} * kBlockBytes),
        table_memory_(
            static_cast<int64_t>(DeviceTables::DeviceBytes(kLayers.size(), kPoolBlocks))) {
    EXPECT_TRUE(ExpandsPrompts(config_, traits_));
    LayOut(memory_.data());
    EXPECT_EQ(cuda::PrepareMla(), cudaSuccess);
    EXPECT_EQ(cuda::PrepareMhaPrefill(), cudaSuccess);
    const auto source = MakeRandomWeights(config_, 3, 1);
    auto up = Uploader::Create(*pinned_);
    EXPECT_TRUE(up.ok());
    const auto loaded = source->LoadLayer(kLayers.begin);
    EXPECT_TRUE(UploadLayer(**up, config_, *loaded, layer_).ok() && (*up)->Finish().ok());
    std::vector<float> inv_freq(config_.qk_rope_head_dim / 2);
    RopeInverseFrequencies(RopeConfigOf(config_), inv_freq.data());
    inv_freq_.emplace(inv_freq);
    pool_.blocks = pool_memory_.data();
    pool_.block_bytes = kBlockBytes;
    EXPECT_EQ(cuda::MakeMlaPoolMap(pool_.blocks, kPoolBlocks, kBlockBytes, &pool_.map),
              cudaSuccess);
    layers_.emplace(config_, pool_, ws_, inv_freq_->data(), nullptr);
    auto tables = StepTables::Create(*pinned_, limits_, ws_.tables);
    EXPECT_TRUE(tables.ok()) << tables.status();
    tables_.emplace(*std::move(tables));
    StageSpec spec;
    spec.layers = kLayers;
    spec.pool_blocks = kPoolBlocks;
    page_tables_.emplace(spec, table_memory_.data());
    auto arrivals = pinned_->Take(DeviceTables::ArrivalBytes(kPoolBlocks));
    EXPECT_TRUE(arrivals.ok());
    arrivals_ = *std::move(arrivals);
  }

  // What the layer adds to `hidden`. `key_rows`: room for expanded keys; 0: all are absorbed.
  std::vector<float> Run(const std::vector<Chunk>& chunks, const std::vector<float>& hidden,
                         int32_t key_rows, PromptPlan* prompts) {
    EXPECT_LE(key_rows, limits_.expanded_keys);
    Fill(chunks);
    EXPECT_EQ(
        cudaMemcpy(ws_.hidden, hidden.data(), hidden.size() * sizeof(float), cudaMemcpyDefault),
        cudaSuccess);
    std::vector<cuda::MlaSequence> sequences;
    int32_t rows = 0;
    for (const Chunk& chunk : chunks) {
      const auto count = static_cast<int32_t>(chunk.num_tokens);
      sequences.push_back({static_cast<int32_t>(sequences.size()), rows, count,
                           static_cast<int32_t>(chunk.first_position), -1});
      rows += count;
    }
    PlanPrompts(sequences, key_rows, prompts);
    CudaTile tile;
    tile.num_rows = rows;
    tile.positions = tables_->positions();
    tile.sequence_index = tables_->sequence_index();
    tile.prompts = prompts->pieces.empty() ? nullptr : prompts;
    cuda::MlaPlan plan;
    EXPECT_TRUE(cuda::PlanMla(
        prompts->absorbed.data(), static_cast<int32_t>(prompts->absorbed.size()),
        {.num_heads = static_cast<int32_t>(config_.num_attention_heads)}, limits_.mla, &plan));
    std::vector<std::byte> bytes(limits_.plan_bytes);
    cuda::WriteMlaPlan(plan, bytes.data());
    EXPECT_EQ(cudaMemcpy(ws_.plan, bytes.data(), bytes.size(), cudaMemcpyDefault), cudaSuccess);
    const cuda::MlaPlanView view = cuda::ViewMlaPlan(limits_.mla, ws_.plan);
    if (!prompts->absorbed.empty()) tile.plans = absl::MakeConstSpan(&view, 1);
    EXPECT_TRUE(layers_->Rotate(tile).ok());
    EXPECT_TRUE(layers_->Run(layer_, nullptr, tables_->segments(0), tile).ok());
    std::vector<float> out(hidden.size());
    EXPECT_EQ(cudaDeviceSynchronize(), cudaSuccess);
    EXPECT_EQ(cudaMemcpy(out.data(), ws_.hidden, out.size() * sizeof(float), cudaMemcpyDefault),
              cudaSuccess);
    for (size_t i = 0; i < out.size(); ++i) out[i] -= hidden[i];
    return out;
  }

  size_t hidden_size() const { return config_.hidden_size; }

 private:
  static constexpr int64_t kBlockBytes = 64 * 576 * 2;

  // Blocks of the sequences in turn, so that they are apart.
  void Fill(const std::vector<Chunk>& chunks) {
    StageBatch batch;
    std::vector<BatchSequence> sequences(chunks.size());
    std::vector<std::vector<TokenId>> tokens;
    std::vector<std::vector<BlockId>> blocks;
    std::vector<absl::Span<const BlockId>> tables;
    for (size_t s = 0; s < chunks.size(); ++s) {
      const uint32_t end = chunks[s].first_position + chunks[s].num_tokens;
      tokens.emplace_back(end, 1);
      blocks.emplace_back();
      for (uint32_t b = 0; b < BlocksPerLayer(end); ++b) {
        blocks.back().push_back(static_cast<BlockId>((b + 1) * chunks.size() - 1 - s));
      }
    }
    for (const auto& of_sequence : blocks) tables.emplace_back(of_sequence);
    for (size_t s = 0; s < chunks.size(); ++s) {
      sequences[s].first_position = chunks[s].first_position;
      sequences[s].num_tokens = chunks[s].num_tokens;
      sequences[s].tokens = tokens[s];
      sequences[s].page_tables = absl::MakeConstSpan(&tables[s], 1);
      batch.num_tokens += chunks[s].num_tokens;
    }
    batch.sequences = sequences;
    EXPECT_TRUE(tables_
                    ->Fill(batch, config_.max_position_embeddings, kPoolBlocks, &*page_tables_,
                           absl::MakeSpan(arrivals_.data(), arrivals_.bytes()), nullptr)
                    .ok());
  }

  uint64_t LayOut(std::byte* base) {
    Region region(base);
    layer_ = LayOutLayer(config_, kLayers.begin, true, region);
    limits_ = MakeStepLimits(config_, kLayers, kTileRows, traits_);
    ws_ = LayOutCudaWorkspace(config_, kLayers, limits_, region);
    return region.end();
  }

  const ModelConfig config_ = TrueHeads();
  const std::shared_ptr<PinnedPool> pinned_ = std::make_shared<PinnedPool>();
  const CudaTraits traits_;
  DeviceLayer layer_;
  StepLimits limits_;
  CudaWorkspace ws_;
  const Buffer<std::byte> memory_;
  const Buffer<std::byte> pool_memory_;
  const Buffer<std::byte> table_memory_;
  PinnedMemory arrivals_;
  CudaPool pool_;
  std::optional<Buffer<float>> inv_freq_;
  std::optional<CudaLayers> layers_;
  std::optional<DeviceTables> page_tables_;
  std::optional<StepTables> tables_;
};

class CudaPromptsTest : public CudaTest {
 protected:
  void SetUp() override {
    CudaTest::SetUp();
    if (!IsSkipped() && !cuda::HasMhaPrefill()) {
      GTEST_SKIP() << "SKIPPED: Hopper's instructions, on another GPU";
    }
  }
};

TEST_F(CudaPromptsTest, BothFormsAgree) {
  STRAIT_TRACE_SEED();
  kernel_test::Rng rng(kernel_test::Seed());
  OneLayer layer;
  const auto random = [&](const std::vector<Chunk>& chunks) {
    uint32_t rows = 0;
    for (const Chunk& chunk : chunks) rows += chunk.num_tokens;
    return kernel_test::RandomFloats(rng, static_cast<int64_t>(rows * layer.hidden_size()));
  };
  const std::vector<Chunk> prefixes = {{1, 0}, {77, 0}, {200, 0}, {131, 0}};
  const std::vector<Chunk> chunks = {{270, 1}, {1, 77}, {100, 200}, {300, 131}};
  PromptPlan plan;
  layer.Run(prefixes, random(prefixes), 0, &plan);
  const std::vector<float> hidden = random(chunks);
  const std::vector<float> absorbed = layer.Run(chunks, hidden, 0, &plan);
  EXPECT_EQ(plan.num_launches(), 0);
  for (const int32_t key_rows : {1024, 256}) {
    SCOPED_TRACE(key_rows);
    const std::vector<float> expanded = layer.Run(chunks, hidden, key_rows, &plan);
    EXPECT_EQ(plan.num_launches(), key_rows == 1024 ? 1 : 4);
    EXPECT_EQ(plan.absorbed_rows.size(), 1u);
    // The absorbed form rounds the query in latent space and the sum there, the expanded one keys
    // and values; both the weights. Each is 2^-9 at most, independent, and the feed-forward layer
    // that follows gives on what it gets.
    EXPECT_LT(gpu_test::RelativeError(expanded, absorbed), 1e-2);
    const auto differ = [&](uint32_t begin, uint32_t count) {
      const auto from = static_cast<std::ptrdiff_t>(begin * layer.hidden_size());
      return !std::equal(
          expanded.begin() + from,
          expanded.begin() + from + static_cast<std::ptrdiff_t>(count * layer.hidden_size()),
          absorbed.begin() + from);
    };
    EXPECT_TRUE(differ(0, 270)) << "the other form rounds elsewhere: it did not run";
    EXPECT_TRUE(differ(371, 300)) << "the other form rounds elsewhere: it did not run";
  }
}

}  // namespace
}  // namespace strait
