// SPDX-License-Identifier: Apache-2.0
//
// Defends: a stage that does not fit says what it needs, what there is and what would fit, before
// weights are read; what the kernels cannot run is refused; nothing of a stage stays on the GPU.
#include "worker/model/cuda/cuda_backend.h"

#include <cuda_runtime_api.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include "kernels/cuda/gemm/gemm.h"
#include "proto/model/model_config.h"
#include "proto/model/reservation.h"
#include "tests/worker/model/cuda/cuda_fixture.h"
#include "tests/worker/model/load_with_cache.h"
#include "worker/model/cuda/stage_layout.h"

namespace strait {
namespace {

class CudaBackendTest : public CudaTest {
 protected:
  static ModelConfig Model() { return OnCuda(TinyV3()); }

  // `count` sequences of `rows` new rows each, from their beginning; tokens are not looked at.
  static void Step(StageModel* model, const ModelConfig& config, uint32_t count, uint32_t rows) {
    const std::vector<TokenId> tokens(rows, 5);
    const SamplingParams sampling;
    std::vector<std::vector<std::vector<BlockId>>> tables(count);
    std::vector<std::vector<absl::Span<const BlockId>>> views(count);
    std::vector<BatchSequence> sequences(count);
    std::vector<LogitsRequest> requests(count);
    BlockId next = 0;
    for (uint32_t s = 0; s < count; ++s) {
      for (uint32_t layer = 0; layer < config.num_hidden_layers; ++layer) {
        tables[s].emplace_back();
        for (uint32_t i = 0; i < BlocksPerLayer(rows); ++i) tables[s].back().push_back(next++);
      }
      for (const auto& table : tables[s]) views[s].push_back(table);
      sequences[s].id = SequenceId{s + 1};
      sequences[s].num_tokens = rows;
      sequences[s].tokens = tokens;
      sequences[s].page_tables = views[s];
      sequences[s].sampling = &sampling;
      requests[s].sequence_index = s;
      requests[s].row = (s + 1) * rows - 1;
      requests[s].sample = true;
    }
    StageBatch batch;
    batch.sequences = sequences;
    batch.num_tokens = count * rows;
    batch.logits = requests;
    std::vector<LogitsResult> results;
    absl::Status status = model->Begin(batch, {}, {});
    if (status.ok()) status = model->Finish(&results);
    ASSERT_TRUE(status.ok()) << status;
    ASSERT_EQ(results.size(), count);
  }

  static size_t FreeBytes() {
    size_t free = 0;
    size_t total = 0;
    EXPECT_EQ(cudaMemGetInfo(&free, &total), cudaSuccess);
    return free;
  }
};

TEST_F(CudaBackendTest, MoreMemoryThanTheGpuHas) {
  CudaBackendOptions options;
  options.memory_bytes = uint64_t{1} << 45;
  const absl::Status status =
      CudaBackend::Create(options, MakeRandomWeights(Model(), 1, 1)).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  for (const char* part : {"the GPU has", "was to take", "--memory"}) {
    EXPECT_NE(status.message().find(part), std::string::npos) << part << " in: " << status;
  }
}

TEST_F(CudaBackendTest, BeyondItsBudget) {
  const ModelConfig config = Model();
  StageSpec spec;
  spec.layers = {0, config.num_hidden_layers};
  spec.pool_blocks = 100;
  EXPECT_EQ(LoadWithCache(MakeCuda(config, {.memory_bytes = 1000}).get(), spec).status().code(),
            absl::StatusCode::kResourceExhausted);
  // Room for a cache, and then for nothing else.
  const auto backend = MakeCuda(config, {.memory_bytes = 64 << 20});
  spec.pool_blocks = static_cast<uint32_t>((60 << 20) / backend->block_bytes());
  const absl::Status status = LoadWithCache(backend.get(), spec).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  for (const char* part : {"needs", "weights", "cache", "workspace", "available", "would fit"}) {
    EXPECT_NE(status.message().find(part), std::string::npos) << part << " in: " << status;
  }
  EXPECT_EQ(backend->used_bytes(), 0u);
}

TEST_F(CudaBackendTest, LayersThatAreNotThere) {
  const ModelConfig config = Model();
  StageSpec spec;
  spec.layers = {1, config.num_hidden_layers + 1};
  spec.pool_blocks = 1;
  EXPECT_EQ(MakeCuda(config, {.memory_bytes = 1 << 30})->Load(spec, {}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(CudaBackendTest, AStageGivesAllMemoryBack) {
  const ModelConfig config = Model();
  const auto backend = MakeCuda(config, {.memory_bytes = 1 << 30});
  StageSpec spec;
  spec.layers = {0, config.num_hidden_layers};
  spec.pool_blocks = 1000;
  {
    const auto model = LoadWithCache(backend.get(), spec);
    ASSERT_TRUE(model.ok()) << model.status();
    const uint64_t used = backend->used_bytes();
    // A second one shares the weights.
    const auto second = backend->Load(spec, {});
    ASSERT_TRUE(second.ok()) << second.status();
    EXPECT_LT(backend->used_bytes() - used + (*second)->weight_bytes(), used);
  }
  ASSERT_TRUE(backend->cache().Resize(0, {}).ok());
  EXPECT_EQ(backend->used_bytes(), 0u);
}

// Rows of blocks stay what they are while the cache grows and shrinks; those that are moved follow.
TEST_F(CudaBackendTest, TheCacheGrowsAndShrinksAroundItsRows) {
  const auto backend = MakeCuda(Model(), {.memory_bytes = uint64_t{256} << 20});
  const auto block_bytes = static_cast<size_t>(backend->block_bytes());
  const auto many = static_cast<uint32_t>((uint64_t{200} << 20) / block_bytes);
  ASSERT_TRUE(backend->cache().Resize(10, {}).ok());
  std::byte* const blocks = backend->cache_pool().blocks;
  const auto put = [&](BlockId block, int value) {
    ASSERT_EQ(cudaMemset(blocks + block * block_bytes, value, block_bytes), cudaSuccess);
  };
  const auto get = [&](BlockId block) {
    std::vector<uint8_t> bytes(block_bytes);
    EXPECT_EQ(
        cudaMemcpy(bytes.data(), blocks + block * block_bytes, block_bytes, cudaMemcpyDeviceToHost),
        cudaSuccess);
    for (const uint8_t byte : bytes) {
      if (byte != bytes[0]) return -1;
    }
    return static_cast<int>(bytes[0]);
  };
  for (BlockId block = 0; block < 10; ++block) put(block, 1 + static_cast<int>(block));
  for (int round = 0; round < 3; ++round) {
    ASSERT_TRUE(backend->cache().Resize(many, {}).ok());
    ASSERT_EQ(backend->cache_pool().blocks, blocks);
    for (BlockId block = 0; block < 10; ++block) ASSERT_EQ(get(block), 1 + static_cast<int>(block));
    EXPECT_EQ(get(many - 1), 0);
    const uint64_t used = backend->used_bytes();
    // Nothing else has room; and then it has.
    EXPECT_EQ(backend->cache().Resize(2 * many, {}).code(), absl::StatusCode::kResourceExhausted);
    EXPECT_EQ(backend->cache().num_blocks(), many);
    put(many - 1, 77);
    put(many - 2, 78);
    const std::vector<BlockMove> moves = {{many - 1, 10}, {many - 2, 11}};
    ASSERT_TRUE(backend->cache().Resize(12, moves).ok());
    EXPECT_EQ(get(10), 77);
    EXPECT_EQ(get(11), 78);
    for (BlockId block = 0; block < 10; ++block) ASSERT_EQ(get(block), 1 + static_cast<int>(block));
    EXPECT_LT(backend->used_bytes(), used / 2);
  }
}

// The stated bytes are what it takes, and no step takes more; one step of each kind may make CUDA take
// what it takes once in a process.
TEST_F(CudaBackendTest, AStageTakesWhatItSaysAndAStepNothing) {
  ModelConfig config = Model();
  config.hidden_size = 1024;  // so that the stage is large beside what CUDA rounds to
  config.moe_intermediate_size = 1024;
  for (const auto& [deterministic, rows] :
       {std::pair(false, RowFormat::kBf16), std::pair(true, RowFormat::kBf16),
        std::pair(false, RowFormat::kFp8)}) {
    CudaBackendOptions options;
    options.memory_bytes = uint64_t{8} << 30;
    options.deterministic = deterministic;
    options.row_format = rows;
    const auto backend = MakeCuda(config, options);
    ASSERT_NE(backend, nullptr);
    StageSpec spec;
    spec.layers = {0, config.num_hidden_layers};
    spec.pool_blocks = 100'000;
    const CudaStageBytes stated = LayOutStage(config, spec, backend->traits(), nullptr).bytes;
    ASSERT_GT(stated.total(), uint64_t{256} << 20);
    const auto model = LoadWithCache(backend.get(), spec);
    ASSERT_TRUE(model.ok()) << model.status();
    EXPECT_EQ(backend->used_bytes(), stated.total());
    for (uint32_t rows = 1; rows <= 3; ++rows) Step(model->get(), config, rows, 1);
    Step(model->get(), config, 1, 200);
    // All sizes of decode steps that there are: graphs come and go.
    constexpr uint64_t kPiece = 2 << 20;  // that CUDA takes memory in
    const size_t before = FreeBytes();
    size_t least = before;
    for (int round = 0; round < 2; ++round) {
      for (uint32_t rows = 1; rows <= 100; ++rows) {
        Step(model->get(), config, rows, 1);
        least = std::min(least, FreeBytes());
      }
      Step(model->get(), config, 3, 700);
      EXPECT_LE(before - least, stated.graphs + kPiece) << "round " << round;
    }
    const size_t settled = FreeBytes();
    for (uint32_t i = 0; i < 200; ++i) Step(model->get(), config, 100, 1);
    EXPECT_EQ(FreeBytes(), settled);
    EXPECT_EQ(backend->used_bytes(), stated.total());
  }
}

TEST_F(CudaBackendTest, Fp8ActivationsAreForFp8Weights) {
  CudaBackendOptions options;
  options.memory_bytes = 1 << 30;
  options.fp8_activations = true;
  const auto refused = CudaBackend::Create(options, MakeRandomWeights(Model(), 1, 1));
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kInvalidArgument) << refused.status();
  EXPECT_NE(refused.status().message().find("--fp8-activations"), std::string::npos);

  ModelConfig fp8 = TinyV3Fp8();
  fp8.kv_lora_rank = 48;
  fp8.qk_nope_head_dim = 24;
  const auto backend = CudaBackend::Create(options, MakeRandomWeights(fp8, 1, 1));
  if (!cuda::MultipliesCodes()) {
    EXPECT_EQ(backend.status().code(), absl::StatusCode::kFailedPrecondition) << backend.status();
    return;
  }
  ASSERT_TRUE(backend.ok()) << backend.status();
  // Pipelines that mix both ways of computing show it.
  options.fp8_activations = false;
  const auto plain = CudaBackend::Create(options, MakeRandomWeights(fp8, 1, 1));
  ASSERT_TRUE(plain.ok()) << plain.status();
  EXPECT_NE((*backend)->numerics_id(), (*plain)->numerics_id());
}

TEST_F(CudaBackendTest, ARankThatTheKernelsDoNotTake) {
  const auto backend = CudaBackend::Create({}, MakeRandomWeights(TinyV3(), 1, 1));
  EXPECT_EQ(backend.status().code(), absl::StatusCode::kInvalidArgument) << backend.status();
}

TEST_F(CudaBackendTest, ARowFormatIsPartOfWhatItSaysOfItself) {
  const auto bf16 = MakeCuda(Model(), {.memory_bytes = 1 << 30});
  const auto fp8 = MakeCuda(Model(), {.memory_bytes = 1 << 30, .row_format = RowFormat::kFp8});
  EXPECT_EQ(bf16->block_bytes(), 64u * 144);  // 48 + 24 columns of two bytes
  EXPECT_EQ(fp8->block_bytes(), 64u * 112);   // 48 codes, a scale, 24 columns of two bytes: 100
  EXPECT_EQ(fp8->block_bytes() + 12, fp8->stage_costs().block_bytes);
  EXPECT_NE(bf16->numerics_id().find("/bf16"), std::string::npos) << bf16->numerics_id();
  EXPECT_NE(fp8->numerics_id().find("/fp8"), std::string::npos) << fp8->numerics_id();
}

// No machine needs a GPU to be told so.
TEST(CudaModelTest, RowsThatTheKernelsDoNotTake) {
  for (const RowFormat format : {RowFormat::kFp32, RowFormat::kInt4}) {
    CudaBackendOptions options;
    options.row_format = format;
    const auto backend = CudaBackend::Create(options, MakeRandomWeights(OnCuda(TinyV3()), 1, 1));
    EXPECT_EQ(backend.status().code(), absl::StatusCode::kInvalidArgument) << backend.status();
    EXPECT_NE(backend.status().message().find("--cache-format bf16 or fp8"), std::string::npos);
  }
}

}  // namespace
}  // namespace strait
