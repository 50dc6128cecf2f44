// SPDX-License-Identifier: Apache-2.0
#include "worker/model/cpu_workspace.h"

#include <utility>
#include <vector>

#include "proto/base/status_macros.h"

namespace strait {
namespace {

void SetPointers(const CpuWorkspaceLayout& layout, std::byte* base, CpuWorkspace* w) {
  const auto set = [base](auto** pointer, uint64_t offset) {
    static_assert(sizeof(**pointer) == 4);
    *pointer = reinterpret_cast<std::remove_reference_t<decltype(*pointer)>>(base + offset);
  };
  set(&w->hidden, layout.hidden);
  set(&w->normed, layout.normed);
  set(&w->cos_sin, layout.cos_sin);
  set(&w->q_a, layout.q_a);
  set(&w->q, layout.q);
  set(&w->kv_a, layout.kv_a);
  set(&w->q_rope, layout.q_rope);
  set(&w->attended, layout.attended);
  set(&w->q_latent, layout.q_latent);
  set(&w->o_latent, layout.o_latent);
  set(&w->gate, layout.gate);
  set(&w->up, layout.up);
  set(&w->router_logits, layout.router_logits);
  set(&w->expert_weights, layout.expert_weights);
  set(&w->expert_ids, layout.expert_ids);
  set(&w->row_of, layout.row_of);
  set(&w->token_of, layout.token_of);
  set(&w->group_begin, layout.group_begin);
  set(&w->expert_gate, layout.expert_gate);
  set(&w->expert_up, layout.expert_up);
  set(&w->expert_rows, layout.expert_rows);
  set(&w->shared_rows, layout.shared_rows);
  set(&w->head_rows, layout.head_rows);
  set(&w->logits, layout.logits);
}

}  // namespace

absl::StatusOr<CpuWorkspace> CreateCpuWorkspace(const ModelConfig& config, uint64_t weight_bytes) {
  CpuWorkspace workspace;
  workspace.tile_rows =
      kMinTileRows *
      static_cast<uint32_t>(ChooseWorkspace(WorkspaceSizes(config), weight_bytes) + 1);
  const CpuWorkspaceLayout layout = LayOutCpuWorkspace(config, workspace.tile_rows);
  STRAIT_ASSIGN_OR_RETURN(workspace.memory, Mapping::Create(layout.bytes, "workspace"));
  SetPointers(layout, workspace.memory.data(), &workspace);
  return workspace;
}

}  // namespace strait
