// SPDX-License-Identifier: Apache-2.0
//
// The model as its paper writes it, in float64, one token after the other: keys and values are
// expanded for every head (nothing absorbed), every expert is computed where it is chosen. Slow
// and plain.
//
// Why:     shares no code with the backend but the reading of one stored weight.
#pragma once

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "kernels/reference/kernels.h"
#include "proto/model/model_config.h"
#include "worker/checkpoint/weights.h"

namespace strait {

class ReferenceModel {
 public:
  using Row = std::vector<double>;

  ReferenceModel(const ModelConfig& config, StageWeights weights)
      : c_(config),
        w_(std::move(weights)),
        keys_(config.num_hidden_layers),
        values_(config.num_hidden_layers) {}

  // Feeds the next token; returns the log-probabilities of the one after it.
  Row Next(TokenId token) {
    Row x = RowOf(w_.embedding->embed_tokens, token);
    for (const LayerWeights& layer : w_.layers) {
      Add(Attention(layer, Norm(x, layer.input_layernorm, c_.rms_norm_eps)), &x);
      const Row normed = Norm(x, layer.post_attention_layernorm, c_.rms_norm_eps);
      Add(c_.IsMoeLayer(layer.layer) ? Moe(layer.moe, normed) : Mlp(layer.mlp, normed), &x);
    }
    ++position_;
    Row logits = Times(w_.head->lm_head, Norm(x, w_.head->norm, c_.rms_norm_eps));
    const double max = *std::max_element(logits.begin(), logits.end());
    double sum = 0;
    for (const double v : logits) sum += std::exp(v - max);
    for (double& v : logits) v -= max + std::log(sum);
    return logits;
  }

  // The least distance, so far, between the last expert (or group) chosen and the first one left
  // out: two programs can only be compared where it is far above their rounding.
  double closest_choice() const { return closest_choice_; }

 private:
  static Row RowOf(const WeightMatrix& m, int64_t row) {
    Row out(static_cast<size_t>(m.cols));
    for (int64_t k = 0; k < m.cols; ++k) out[k] = reference::WeightValue(m, row, k);
    return out;
  }
  static Row Times(const WeightMatrix& m, const Row& x) {
    Row y(static_cast<size_t>(m.rows));
    for (int64_t n = 0; n < m.rows; ++n) {
      for (int64_t k = 0; k < m.cols; ++k) y[n] += reference::WeightValue(m, n, k) * x[k];
    }
    return y;
  }
  static void Add(const Row& from, Row* to) {
    for (size_t i = 0; i < to->size(); ++i) (*to)[i] += from[i];
  }
  static Row Norm(const Row& x, VectorView weight, double eps) {
    double sum = 0;
    for (const double v : x) sum += v * v;
    const double scale = 1 / std::sqrt(sum / static_cast<double>(x.size()) + eps);
    Row y(x.size());
    for (size_t i = 0; i < x.size(); ++i) y[i] = x[i] * scale * weight.data[i];
    return y;
  }
  static double Silu(double v) { return v / (1 + std::exp(-v)); }
  static Row Mlp(const MlpWeights& w, const Row& x) {
    Row gate = Times(w.gate_proj, x);
    const Row up = Times(w.up_proj, x);
    for (size_t i = 0; i < gate.size(); ++i) gate[i] = Silu(gate[i]) * up[i];
    return Times(w.down_proj, gate);
  }

  static double Mscale(double factor, double mscale) {
    return factor <= 1 ? 1 : 0.1 * mscale * std::log(factor) + 1;
  }
  // The angle of pair i at the current position, by YaRN's paper.
  double Angle(uint32_t i) const {
    const RopeParameters& r = c_.rope_parameters;
    const double dim = c_.qk_rope_head_dim;
    double frequency = std::pow(r.rope_theta, -2.0 * i / dim);
    if (r.rope_type == RopeType::kYarn) {
      const auto correction = [&](double rotations) {
        return dim * std::log(r.original_max_position_embeddings / (rotations * 2 * M_PI)) /
               (2 * std::log(r.rope_theta));
      };
      const double low = std::max(std::floor(correction(r.beta_fast)), 0.0);
      const double high = std::min(std::ceil(correction(r.beta_slow)), dim - 1);
      const double ramp = std::clamp((i - low) / (high - low), 0.0, 1.0);
      frequency = frequency / r.factor * ramp + frequency * (1 - ramp);
    }
    return position_ * frequency;
  }
  void Rotate(double* x) const {
    const RopeParameters& r = c_.rope_parameters;
    double magnitude = 1;
    if (r.rope_type == RopeType::kYarn) {
      magnitude = Mscale(r.factor, r.mscale) / Mscale(r.factor, r.mscale_all_dim);
    }
    for (uint32_t i = 0; i < c_.qk_rope_head_dim / 2; ++i) {
      const double cos = std::cos(Angle(i)) * magnitude;
      const double sin = std::sin(Angle(i)) * magnitude;
      const double a = x[2 * i];
      const double b = x[2 * i + 1];
      x[2 * i] = a * cos - b * sin;
      x[2 * i + 1] = b * cos + a * sin;
    }
  }

  Row Attention(const LayerWeights& layer, const Row& x) {
    const AttentionWeights& w = layer.attention;
    const uint32_t heads = c_.num_attention_heads;
    const uint32_t nope = c_.qk_nope_head_dim;
    const uint32_t rope = c_.qk_rope_head_dim;
    const uint32_t value = c_.v_head_dim;
    const uint32_t rank = c_.kv_lora_rank;
    Row q = c_.q_lora_rank == 0
                ? Times(w.q_proj, x)
                : Times(w.q_b_proj, Norm(Times(w.q_a_proj, x), w.q_a_layernorm, kLoraNormEps));
    for (uint32_t h = 0; h < heads; ++h) Rotate(&q[h * (nope + rope) + nope]);
    Row joint = Times(w.kv_a_proj_with_mqa, x);
    Rotate(&joint[rank]);
    const Row latent =
        Norm(Row(joint.begin(), joint.begin() + rank), w.kv_a_layernorm, kLoraNormEps);
    const Row expanded = Times(w.kv_b_proj, latent);  // per head: key, value
    Row key(heads * (nope + rope));
    Row val(heads * value);
    for (uint32_t h = 0; h < heads; ++h) {
      const double* head = &expanded[h * (nope + value)];
      std::copy_n(head, nope, &key[h * (nope + rope)]);
      std::copy_n(&joint[rank], rope, &key[h * (nope + rope) + nope]);
      std::copy_n(head + nope, value, &val[h * value]);
    }
    std::vector<Row>& keys = keys_[layer.layer];
    std::vector<Row>& values = values_[layer.layer];
    keys.push_back(key);
    values.push_back(val);

    double scale = 1 / std::sqrt(static_cast<double>(nope + rope));
    const RopeParameters& r = c_.rope_parameters;
    if (r.rope_type == RopeType::kYarn && r.mscale_all_dim != 0) {
      const double mscale = Mscale(r.factor, r.mscale_all_dim);
      scale *= mscale * mscale;
    }
    Row out(heads * value);
    for (uint32_t h = 0; h < heads; ++h) {
      Row scores(keys.size());
      for (size_t t = 0; t < keys.size(); ++t) {
        for (uint32_t i = 0; i < nope + rope; ++i) {
          scores[t] += q[h * (nope + rope) + i] * keys[t][h * (nope + rope) + i];
        }
        scores[t] *= scale;
      }
      Softmax(&scores);
      for (size_t t = 0; t < keys.size(); ++t) {
        for (uint32_t i = 0; i < value; ++i)
          out[h * value + i] += scores[t] * values[t][h * value + i];
      }
    }
    return Times(w.o_proj, out);
  }

  static void Softmax(Row* x) {
    const double max = *std::max_element(x->begin(), x->end());
    double sum = 0;
    for (double& v : *x) sum += v = std::exp(v - max);
    for (double& v : *x) v /= sum;
  }

  // Indices of the `count` greatest.
  std::vector<uint32_t> Greatest(const Row& x, uint32_t count) {
    std::vector<uint32_t> order(x.size());
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](uint32_t a, uint32_t b) { return x[a] > x[b]; });
    if (count < x.size() && std::isfinite(x[order[count]])) {
      closest_choice_ = std::min(closest_choice_, x[order[count - 1]] - x[order[count]]);
    }
    order.resize(count);
    return order;
  }

  Row Moe(const MoeWeights& w, const Row& x) {
    const bool v3 = c_.scoring_func == ScoringFunc::kSigmoid;
    Row scores = Times(w.gate, x);
    if (v3) {
      for (double& v : scores) v = 1 / (1 + std::exp(-v));
    } else {
      Softmax(&scores);
    }
    Row choice = scores;
    if (v3) {
      for (size_t e = 0; e < choice.size(); ++e) choice[e] += w.e_score_correction_bias.data[e];
    }
    if (c_.topk_method != TopkMethod::kGreedy) {
      const uint32_t size = c_.n_routed_experts / c_.n_group;
      Row groups(c_.n_group);
      for (uint32_t g = 0; g < c_.n_group; ++g) {
        Row members(choice.begin() + g * size, choice.begin() + (g + 1) * size);
        std::sort(members.rbegin(), members.rend());
        groups[g] = v3 ? members[0] + members[1] : members[0];
      }
      const std::vector<uint32_t> chosen = Greatest(groups, c_.topk_group);
      for (uint32_t e = 0; e < c_.n_routed_experts; ++e) {
        if (std::count(chosen.begin(), chosen.end(), e / size) == 0) choice[e] = -INFINITY;
      }
    }
    const std::vector<uint32_t> experts = Greatest(choice, c_.num_experts_per_tok);
    double sum = 0;
    for (const uint32_t e : experts) sum += scores[e];
    Row out(x.size());
    for (const uint32_t e : experts) {
      const double weight =
          scores[e] / (v3 && c_.norm_topk_prob ? sum : 1) * c_.routed_scaling_factor;
      const Row y = Mlp(w.experts[e], x);
      for (size_t i = 0; i < out.size(); ++i) out[i] += weight * y[i];
    }
    if (!w.shared_experts.empty()) Add(Mlp(w.shared_experts, x), &out);
    return out;
  }

  const ModelConfig c_;
  const StageWeights w_;
  uint32_t position_ = 0;
  std::vector<std::vector<Row>> keys_;    // [layer][position]
  std::vector<std::vector<Row>> values_;  // [layer][position]
  double closest_choice_ = INFINITY;
};

}  // namespace strait
