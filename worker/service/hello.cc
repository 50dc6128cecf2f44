// SPDX-License-Identifier: Apache-2.0
#include "worker/service/hello.h"

#include <unistd.h>

#include <random>

#include "proto/wire/version.h"
#include "worker/transport/nccl_transport.h"

namespace strait {

v1::Hello MakeHello(const WorkerOptions& options, const Backend& backend,
                    const std::string& data_address) {
  v1::Hello hello;
  hello.set_wire_version(kWireVersion);
  hello.set_name(options.name);
  hello.set_data_address(data_address);
  hello.set_memory_bytes(options.memory_bytes);
  hello.set_model_fingerprint(options.model_fingerprint);
  hello.set_weights_fingerprint(options.weights_fingerprint);
  hello.set_cache_row_bytes(options.cache_row_bytes);
  if (options.stage_costs) {
    const StageCosts& costs = *options.stage_costs;
    v1::StageCosts& told = *hello.mutable_stage_costs();
    told.mutable_layer_bytes()->Add(costs.layer_bytes.begin(), costs.layer_bytes.end());
    told.set_embedding_bytes(costs.embedding_bytes);
    told.set_head_bytes(costs.head_bytes);
    told.set_block_bytes(costs.block_bytes);
    told.mutable_workspace_bytes()->Add(costs.workspace_bytes.begin(), costs.workspace_bytes.end());
    told.mutable_last_workspace_bytes()->Add(costs.last_workspace_bytes.begin(),
                                             costs.last_workspace_bytes.end());
    told.set_layer_workspace_bytes(costs.layer_workspace_bytes);
    told.set_stage_bytes(costs.stage_bytes);
    if (options.nccl.nccl) {  // its edges may be on the device
      told.set_edge_bytes(costs.edge_bytes + kNcclEdgeBytes);
      told.set_edge_row_bytes(kArenaSteps * backend.hidden_row_bytes());
    }
  }
  hello.set_numerics_id(backend.numerics_id());
  hello.set_backend(options.backend_name);
  hello.set_num_threads(options.num_threads);
  std::random_device random;
  hello.set_instance(uint64_t{random()} << 32 | random());
  hello.set_process_id(static_cast<uint32_t>(getpid()));
  if (options.nccl.nccl) hello.set_nccl_version(options.nccl.nccl->version());
  hello.set_nccl_problem(options.nccl.problem);
  return hello;
}

}  // namespace strait
