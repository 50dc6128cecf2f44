// SPDX-License-Identifier: Apache-2.0
#include "coordinator/core/row_messages.h"

#include "coordinator/core/edges.h"
#include "proto/wire/epoch_wire.h"

namespace strait {

uint64_t RowsPass::SecretOf(uint64_t stage_id) const {
  const uint64_t key = EdgeNonce(edge_secret, static_cast<uint64_t>(use));
  return EdgeNonce(EdgeNonce(key, placement.counter), stage_id);
}

v1::FetchRows FetchFrom(const Pipeline& from, const Sequence& sequence, const RowsPass& pass,
                        LayerRange layers, uint32_t begin_row, uint32_t end_row,
                        const std::function<std::string(WorkerId)>& address) {
  v1::FetchRows fetch;
  fetch.set_sequence_id(pass.sequence.value);
  ToWire(pass.placement, fetch.mutable_placement());
  fetch.set_begin_row(begin_row);
  fetch.set_end_row(end_row);
  fetch.mutable_tokens()->mutable_ids()->Add(sequence.tokens.begin() + begin_row,
                                             sequence.tokens.begin() + end_row);
  for (const StageSlot& source : from.slots) {
    const LayerRange both = Intersection(source.layers, layers);
    if (both.size() == 0) continue;
    v1::RowsSource* rows = fetch.add_sources();
    rows->set_layer_begin(both.begin);
    rows->set_layer_end(both.end);
    rows->set_stage_id(source.stage_id);
    ToWire(from.epoch, rows->mutable_epoch());
    rows->set_data_address(address(source.worker));
    rows->set_secret(pass.SecretOf(source.stage_id));
  }
  return fetch;
}

v1::ServeRows ServeOf(PipelineEpoch epoch, uint64_t stage_id, const RowsPass& pass) {
  v1::ServeRows serve;
  serve.set_stage_id(stage_id);
  ToWire(epoch, serve.mutable_epoch());
  serve.set_sequence_id(pass.sequence.value);
  ToWire(pass.placement, serve.mutable_placement());
  serve.set_secret(pass.SecretOf(stage_id));
  return serve;
}

}  // namespace strait
