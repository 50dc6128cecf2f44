// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/hash_backend.h"

#include <algorithm>
#include <cstring>
#include <deque>
#include <limits>
#include <map>
#include <set>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "tests/sim/hash_model.h"
#include "tests/worker/polled_copies.h"
#include "tests/worker/stage/held_batch.h"

namespace strait::sim {
namespace {

// What a stage has of the weights, and its bytes: layers, the embedding as if it was the layer behind
// the last one, the head as the one behind that. Written apart from the planner's own, as a second
// opinion.
std::map<LayerIndex, uint64_t> PartsOf(const ModelShape& model, LayerRange layers) {
  const auto n = static_cast<LayerIndex>(model.layer_weight_bytes.size());
  std::map<LayerIndex, uint64_t> parts;
  for (LayerIndex l = layers.begin; l < layers.end; ++l) parts[l] = model.layer_weight_bytes[l];
  if (layers.begin == 0) parts[n] = model.embedding_bytes;
  if (layers.end == n) parts[n + 1] = model.head_bytes;
  return parts;
}

// Likewise: the largest within 5 % of the weights, or the least.
uint64_t WorkspaceBytes(const ModelShape& model, uint64_t weight_bytes) {
  uint64_t chosen = model.workspace_bytes.empty() ? 0 : model.workspace_bytes.front();
  for (const uint64_t bytes : model.workspace_bytes) {
    if (bytes * 20 <= weight_bytes) chosen = bytes;
  }
  return chosen;
}

}  // namespace

constexpr size_t kMaxTables = 512;

class HashStage : public StageModel {
 public:
  HashStage(HashBackend* backend, const StageSpec& spec, uint64_t weight_bytes)
      : backend_(backend),
        spec_(spec),
        weight_bytes_(weight_bytes),
        copies_(spec_.layers.size(), &backend->cache_, &backend->copy_faults) {}
  ~HashStage() override {
    for (size_t i = 0; i < begun_.size(); ++i) copies_.StepFinished();
    uint64_t bytes = WorkspaceBytes(backend_->model(), weight_bytes());
    for (const auto& [part, part_bytes] : PartsOf(backend_->model(), spec_.layers)) {
      if (--backend_->num_having_.at(part) == 0) bytes += part_bytes;
    }
    backend_->used_bytes_ -= bytes;
  }

  absl::Status Begin(const StageBatch& batch, HiddenIn in, HiddenOut out) override;
  bool TakesAhead(uint32_t num_rows, uint32_t) const override {
    return num_rows <= backend_->rows_ahead;
  }
  bool Done() const override { return backend_->done; }
  absl::Status Finish(std::vector<LogitsResult>* results) override;

  BlockCopies& copies() override { return copies_; }
  absl::Status SetCapacity(uint32_t pool_blocks) override {
    spec_.pool_blocks = pool_blocks;
    return absl::OkStatus();
  }
  const StageSpec& spec() const override { return spec_; }
  uint64_t weight_bytes() const override { return weight_bytes_; }

 private:
  uint64_t* Row(absl::Span<const BlockId> table, uint32_t position) {
    const uint32_t index = position / limits::kBlockTokens;
    STRAIT_CHECK(index < table.size(), "the page table ends before the row");
    return &backend_->cache_.Row(table[index], position % limits::kBlockTokens);
  }

  // Holds the batch to what BatchSequence::tables_id promises.
  void CheckTables(const StageBatch& batch);
  // A fake device's memory can be read here, too.
  void Compute(const StageBatch& batch, absl::Span<const std::byte> hidden_in,
               absl::Span<std::byte> hidden_out, std::vector<LogitsResult>* results);

  HashBackend* const backend_;
  StageSpec spec_;
  const uint64_t weight_bytes_;
  PolledCopies copies_;
  // By tables_id, what the last batch with it had; of the latest kMaxTables numbers.
  std::map<uint64_t, std::vector<std::vector<BlockId>>> tables_;
  std::deque<HeldBatch> begun_;
  std::vector<LogitsResult> before_;  // of the last step that is done
};

absl::Status HashStage::Begin(const StageBatch& batch, HiddenIn in, HiddenOut out) {
  STRAIT_CHECK(begun_.size() < kMaxStepsBegun);
  STRAIT_CHECK(begun_.empty() || TakesAhead(batch.num_tokens, 0));
  if (!backend_->fail_next_begin.ok()) {
    return std::exchange(backend_->fail_next_begin, absl::OkStatus());
  }
  for (const BatchSequence& sequence : batch.sequences) {
    backend_->late_ids += sequence.token_of_request.has_value();
  }
  CheckTables(batch);
  copies_.StepBegun(batch);
  begun_.emplace_back(batch, in, out);
  return absl::OkStatus();
}

void HashStage::CheckTables(const StageBatch& batch) {
  std::set<uint64_t> in_batch;
  for (const BatchSequence& sequence : batch.sequences) {
    const uint64_t id = sequence.tables_id;
    if (id == 0) continue;
    STRAIT_CHECK(in_batch.insert(id).second, "two sequences of a batch have the same tables_id");
    std::vector<std::vector<BlockId>>& seen = tables_[id];
    seen.resize(spec_.layers.size());
    for (size_t layer = 0; layer < seen.size(); ++layer) {
      const absl::Span<const BlockId> table = sequence.page_tables[layer];
      STRAIT_CHECK(table.size() >= seen[layer].size() &&
                       std::equal(seen[layer].begin(), seen[layer].end(), table.begin()),
                   "a page table's entry changed under its tables_id");
      seen[layer].insert(seen[layer].end(),
                         table.begin() + static_cast<ptrdiff_t>(seen[layer].size()), table.end());
    }
  }
  while (tables_.size() > kMaxTables) tables_.erase(tables_.begin());
}

absl::Status HashStage::Finish(std::vector<LogitsResult>* results) {
  STRAIT_CHECK(!begun_.empty());
  HeldBatch step = std::move(begun_.front());
  begun_.pop_front();
  copies_.StepFinished();
  if (!backend_->fail_next_finish.ok()) {
    // What it was to sample, a step begun behind it may feed.
    before_.assign(limits::kMaxStepTokens, {});
    return std::exchange(backend_->fail_next_finish, absl::OkStatus());
  }
  Compute(step.With(before_), step.hidden_in.bytes, step.hidden_out.bytes, results);
  before_ = *results;
  return absl::OkStatus();
}

void HashStage::Compute(const StageBatch& batch, absl::Span<const std::byte> hidden_in,
                        absl::Span<std::byte> hidden_out, std::vector<LogitsResult>* results) {
  const bool first = spec_.layers.begin == 0;
  const bool last = spec_.layers.end == backend_->num_layers();
  std::vector<uint64_t> hidden(batch.num_tokens);
  STRAIT_CHECK(hidden_in.size() == (first ? 0 : hidden.size() * sizeof(uint64_t)));
  STRAIT_CHECK(hidden_out.size() == (last ? 0 : hidden.size() * sizeof(uint64_t)));
  if (!first) std::memcpy(hidden.data(), hidden_in.data(), hidden_in.size());
  uint32_t row = 0;
  for (const BatchSequence& sequence : batch.sequences) {
    STRAIT_CHECK(sequence.tokens.size() == sequence.first_position + sequence.num_tokens);
    STRAIT_CHECK(sequence.page_tables.size() == spec_.layers.size());
    for (uint32_t i = 0; i < sequence.num_tokens; ++i, ++row) {
      const uint32_t position = sequence.first_position + i;
      uint64_t h = first ? Embed(sequence.tokens[position], position) : hidden[row];
      for (LayerIndex layer = spec_.layers.begin; layer < spec_.layers.end; ++layer) {
        const absl::Span<const BlockId> table = sequence.page_tables[layer - spec_.layers.begin];
        const uint64_t stored = CacheRow(h, layer, position);
        if (sequence.is_cached) {
          STRAIT_CHECK(*Row(table, position) == stored, "a row that was kept is another one");
        } else {
          *Row(table, position) = stored;
        }
        uint64_t attended = 0;
        for (uint32_t block = 0; block <= position; block += limits::kBlockTokens) {
          const uint64_t* rows = Row(table, block);
          const uint32_t end = std::min(position + 1 - block, limits::kBlockTokens);
          for (uint32_t r = 0; r < end; ++r) attended += Attend(rows[r], block + r);
        }
        h = LayerOut(h, attended + backend_->weights() - kHashWeights, layer);
      }
      hidden[row] = h;
    }
  }
  STRAIT_CHECK(row == batch.num_tokens);
  if (!last) {
    std::memcpy(hidden_out.data(), hidden.data(), hidden_out.size());
    STRAIT_CHECK(batch.logits.empty());
    return;
  }
  for (const LogitsRequest& request : batch.logits) {
    const BatchSequence& sequence = batch.sequences[request.sequence_index];
    const uint64_t h = hidden[request.row];
    LogitsResult result;
    if (request.sample) {
      result.token = Sample(h, *sequence.sampling, static_cast<uint32_t>(sequence.tokens.size()),
                            sequence.prompt_tokens, backend_->vocab_size());
    } else {
      result.token = request.token;
    }
    result.logprob = Logprob(h, result.token);
    if (request.sample &&
        LogitsAreNan(sequence.sampling->seed, static_cast<uint32_t>(sequence.tokens.size()))) {
      result.logprob = std::numeric_limits<float>::quiet_NaN();
    }
    result.top = Top(h, request.num_top, backend_->vocab_size());
    results->push_back(std::move(result));
  }
}

absl::Status HashBackend::Take(int64_t bytes) {
  const uint64_t used = used_bytes_.load() + static_cast<uint64_t>(bytes);
  if (bytes > 0 && used > memory_bytes_) {
    return absl::ResourceExhaustedError(absl::StrCat(
        "needs ", bytes, " bytes, ", used_bytes_.load(), " of ", memory_bytes_, " are taken"));
  }
  used_bytes_ += static_cast<uint64_t>(bytes);
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<StageModel>> HashBackend::Load(
    const StageSpec& spec, std::function<void(uint64_t, uint64_t)> progress) {
  if (!fail_next_load.ok()) return std::exchange(fail_next_load, absl::OkStatus());
  const std::map<LayerIndex, uint64_t> parts = PartsOf(*model_, spec.layers);
  uint64_t weights = 0;
  uint64_t missing = 0;
  for (const auto& [part, bytes] : parts) {
    weights += bytes;
    if (num_having_[part] == 0) missing += bytes;
  }
  if (absl::Status taken = Take(static_cast<int64_t>(missing + WorkspaceBytes(*model_, weights)));
      !taken.ok()) {
    return taken;
  }
  for (const auto& [part, bytes] : parts) ++num_having_[part];
  progress(weights, weights);
  return std::make_unique<HashStage>(this, spec, weights);
}

}  // namespace strait::sim
