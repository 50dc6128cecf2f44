// SPDX-License-Identifier: Apache-2.0
//
// CpuBackend runs real checkpoints on the CPU: fp32 hidden states, weights in their stored
// precision, the latent cache in fp32 or bf16 rows.
//
// Owns:    the weight source, the kernels' threads, the budget that its stages share. A stage
//          keeps what it needs of these alive, so it may outlive the backend.
// Thread:  Load any, several at a time; steps of all its stages by one thread (they share the
//          kernels' threads): Begin computes, one step at a time.
// Errors:  Create: InvalidArgument (fp8 rows), those of the kernels' context. Load: InvalidArgument
//          (layers), ResourceExhausted (bytes needed and available), those of the weights.
// Limits:  weights, pools and workspaces (proto/model/stage_memory.h) of all stages within memory_bytes.
// Why:     no bit depends on batch, chunks, threads, instruction set or stages (DESIGN:
//          determinism), so none of these is in numerics_id.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "kernels/cpu/simd_level.h"
#include "proto/model/model_config.h"
#include "proto/model/reservation.h"
#include "worker/backend.h"
#include "worker/checkpoint/weights.h"

namespace strait {

struct CpuBackendOptions {
  uint32_t num_threads = 1;            // of kernels, and of loading
  std::optional<cpu::SimdLevel> simd;  // absent: STRAIT_SIMD, else the widest that there is
  RowFormat row_format = RowFormat::kFp32;
  uint64_t memory_bytes = 0;  // for weights, pools and workspaces of all stages
};

class CpuBackend final : public Backend {
 public:
  static absl::StatusOr<std::unique_ptr<CpuBackend>> Create(const CpuBackendOptions& options,
                                                            std::unique_ptr<WeightSource> weights);
  ~CpuBackend() override;

  absl::StatusOr<std::unique_ptr<StageModel>> Load(
      const StageSpec& spec, std::function<void(uint64_t, uint64_t)> progress) override;

  CacheMemory& cache() override;
  uint32_t hidden_row_bytes() const override;
  uint32_t num_layers() const override;
  uint32_t vocab_size() const override;
  uint32_t max_positions() const override;
  uint64_t block_bytes() const override;
  RowShape row_shape() const override;
  std::string numerics_id() const override;

  const ModelConfig& config() const;
  uint64_t memory_bytes() const;  // the budget

  struct Shared;  // what stages keep alive

 private:
  explicit CpuBackend(std::shared_ptr<Shared> shared);
  const std::shared_ptr<Shared> shared_;
};

}  // namespace strait
