// SPDX-License-Identifier: Apache-2.0
#include "tests/sim/oracle.h"

#include <algorithm>

#include "tests/sim/hash_model.h"

namespace strait::sim {
namespace {

// The model over one growing sequence: since attention is a sum, each layer keeps just that.
class Run {
 public:
  explicit Run(uint32_t num_layers) : attended_(num_layers, 0) {}
  // `rows`: of each layer, what it caches; may be null.
  uint64_t Feed(TokenId token, uint64_t* rows = nullptr) {
    uint64_t hidden = Embed(token, position_);
    for (LayerIndex layer = 0; layer < attended_.size(); ++layer) {
      const uint64_t row = CacheRow(hidden, layer, position_);
      if (rows != nullptr) rows[layer] = row;
      attended_[layer] += Attend(row, position_);
      hidden = LayerOut(hidden, attended_[layer], layer);
    }
    ++position_;
    return hidden;
  }

 private:
  std::vector<uint64_t> attended_;
  uint32_t position_ = 0;
};

}  // namespace

std::vector<std::vector<uint64_t>> ExpectRows(absl::Span<const TokenId> tokens, LayerRange layers) {
  Run run(layers.end);
  std::vector<uint64_t> each(layers.end);
  std::vector<std::vector<uint64_t>> rows(layers.size());
  for (const TokenId token : tokens) {
    run.Feed(token, each.data());
    for (LayerIndex l = layers.begin; l < layers.end; ++l)
      rows[l - layers.begin].push_back(each[l]);
  }
  return rows;
}

Expected Expect(const SequenceSpec& spec, const ModelShape& model) {
  Expected expected;
  std::vector<TokenId> stops = spec.stop_token_ids;
  if (!spec.ignore_eos) {
    stops.insert(stops.end(), model.eos_token_ids.begin(), model.eos_token_ids.end());
  }
  SamplingParams params;
  params.seed = spec.seed;
  params.choice_index = spec.choice_index;
  params.temperature = spec.temperature;
  params.presence_penalty = spec.presence_penalty;
  params.min_tokens = spec.min_tokens;
  if (spec.min_tokens > 0) params.banned_ids = stops;

  Run run(static_cast<uint32_t>(model.layer_weight_bytes.size()));
  const auto prompt_tokens = static_cast<uint32_t>(spec.prompt.size());
  uint64_t hidden = 0;
  for (uint32_t i = 0; i < prompt_tokens; ++i) {
    if (i > 0 && spec.score_prompt) {
      const TokenId token = spec.prompt[i];
      expected.scores.push_back(
          {i, token, Logprob(hidden, token), Top(hidden, spec.num_top, model.vocab_size)});
    }
    hidden = run.Feed(spec.prompt[i]);
  }
  for (uint32_t generated = 0; generated < spec.max_tokens; ++generated) {
    const uint32_t position = prompt_tokens + generated;
    if (LogitsAreNan(spec.seed, position)) {
      expected.reason = FinishReason::kError;
      break;
    }
    const TokenId token = Sample(hidden, params, position, prompt_tokens, model.vocab_size);
    expected.tokens.push_back(
        {position, token, Logprob(hidden, token),
         Top(hidden, spec.want_logprobs ? spec.num_top : 0, model.vocab_size)});
    // The stop rule in words: a stop token ends the stream once min_tokens came before it.
    if (generated >= spec.min_tokens &&
        std::find(stops.begin(), stops.end(), token) != stops.end()) {
      expected.reason = FinishReason::kStop;
      expected.stop_token = token;
      break;
    }
    hidden = run.Feed(token);
  }
  return expected;
}

}  // namespace strait::sim
