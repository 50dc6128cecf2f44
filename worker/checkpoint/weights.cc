// SPDX-License-Identifier: Apache-2.0
#include "worker/checkpoint/weights.h"

#include <bit>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "proto/base/check.h"
#include "proto/base/status_macros.h"
#include "worker/checkpoint/checkpoint.h"
#include "worker/checkpoint/prefault.h"
#include "worker/checkpoint/tensor_provider.h"

namespace strait {
namespace {

constexpr WeightType kPlainTypes[] = {WeightType::kBf16, WeightType::kFp32, WeightType::kFp16};
constexpr WeightType kLinearTypes[] = {WeightType::kBf16, WeightType::kFp8E4m3, WeightType::kFp32,
                                       WeightType::kFp16};

float HalfToFloat(uint16_t half) {
  const uint32_t sign = uint32_t{half} >> 15 << 31;
  const uint32_t exponent = half >> 10 & 31;
  const uint32_t mantissa = half & 1023;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24
    const float value = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -value : value;
  }
  const uint32_t wide = exponent == 31 ? 255 : exponent + 112;
  return std::bit_cast<float>(sign | wide << 23 | mantissa << 13);
}

float ElementAsFloat(const std::byte* data, WeightType type) {
  if (type == WeightType::kFp32) {
    float value;
    std::memcpy(&value, data, sizeof(value));
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, data, sizeof(bits));
  return type == WeightType::kBf16 ? std::bit_cast<float>(uint32_t{bits} << 16) : HalfToFloat(bits);
}

// What the views of one load point to.
struct Storage {
  std::vector<std::shared_ptr<const SafetensorsFile>> files;  // each once
  std::vector<std::unique_ptr<float[]>> vectors;
  std::vector<std::unique_ptr<std::byte[]>> copies;  // of unaligned tensors
};

class CheckpointProvider final : public TensorProvider {
 public:
  explicit CheckpointProvider(Checkpoint& checkpoint) : checkpoint_(checkpoint) {}

  absl::StatusOr<WeightMatrix> Matrix(const std::string& name, uint32_t rows, uint32_t cols,
                                      TensorRole role) override {
    const bool linear = role == TensorRole::kLinear;
    STRAIT_ASSIGN_OR_RETURN(
        const TensorView view,
        checkpoint_.Get(name, {rows, cols},
                        linear ? absl::MakeConstSpan(kLinearTypes) : kPlainTypes));
    Keep(view.file);
    WeightMatrix matrix{Aligned(view), nullptr, view.type, rows, cols};
    if (view.type != WeightType::kFp8E4m3) return matrix;
    if (checkpoint_.config().quantization != Quantization::kFp8Block128) {
      return absl::InvalidArgumentError(absl::StrCat(
          view.file->path(), ": tensor \"", name, "\" is F8_E4M3, but ", checkpoint_.dir(),
          "/config.json has no quantization_config that explains it"));
    }
    STRAIT_ASSIGN_OR_RETURN(matrix.scale_inv,
                            Floats(name + "_scale_inv", {Blocks(rows), Blocks(cols)}));
    return matrix;
  }

  absl::StatusOr<VectorView> Vector(const std::string& name, uint32_t size, TensorRole) override {
    STRAIT_ASSIGN_OR_RETURN(const float* data, Floats(name, {size}));
    return VectorView{data, size};
  }

  absl::StatusOr<std::shared_ptr<const void>> Finish() override { return std::move(storage_); }

 private:
  static uint64_t Blocks(uint32_t size) { return (size + kFp8Block - 1) / kFp8Block; }

  void Keep(const std::shared_ptr<const SafetensorsFile>& file) {
    for (const auto& kept : storage_->files) {
      if (kept == file) return;
    }
    storage_->files.push_back(file);
  }

  // The format promises no alignment; kernels load elements whole.
  const void* Aligned(const TensorView& view) {
    const uintptr_t mask = static_cast<uintptr_t>(WeightElementBytes(view.type)) - 1;
    if ((reinterpret_cast<uintptr_t>(view.data) & mask) == 0) return view.data;
    storage_->copies.push_back(std::make_unique_for_overwrite<std::byte[]>(view.bytes));
    std::memcpy(storage_->copies.back().get(), view.data, view.bytes);
    return storage_->copies.back().get();
  }

  absl::StatusOr<const float*> Floats(const std::string& name,
                                      std::initializer_list<uint64_t> shape) {
    STRAIT_ASSIGN_OR_RETURN(const TensorView view, checkpoint_.Get(name, shape, kPlainTypes));
    const size_t element = static_cast<size_t>(WeightElementBytes(view.type));
    const size_t count = view.bytes / element;
    auto floats = std::make_unique_for_overwrite<float[]>(count);
    for (size_t i = 0; i < count; ++i) {
      floats[i] = ElementAsFloat(view.data + i * element, view.type);
    }
    storage_->vectors.push_back(std::move(floats));
    return storage_->vectors.back().get();
  }

  Checkpoint& checkpoint_;
  std::shared_ptr<Storage> storage_ = std::make_shared<Storage>();
};

class CheckpointSource final : public WeightSource {
 public:
  explicit CheckpointSource(std::shared_ptr<Checkpoint> checkpoint)
      : checkpoint_(std::move(checkpoint)) {}

  const ModelConfig& config() const override { return checkpoint_->config(); }
  absl::StatusOr<LayerWeights> LoadLayer(LayerIndex layer) override {
    STRAIT_CHECK(layer < config().num_hidden_layers);
    CheckpointProvider provider(*checkpoint_);
    return AssembleLayer(config(), layer, provider);
  }
  absl::StatusOr<EmbeddingWeights> LoadEmbedding() override {
    CheckpointProvider provider(*checkpoint_);
    return AssembleEmbedding(config(), provider);
  }
  absl::StatusOr<HeadWeights> LoadHead() override {
    CheckpointProvider provider(*checkpoint_);
    return AssembleHead(config(), provider);
  }

 private:
  const std::shared_ptr<Checkpoint> checkpoint_;
};

std::vector<WeightMatrix> MatricesOf(const LayerWeights& w) {
  std::vector<WeightMatrix> list;
  const auto add = [&](const WeightMatrix& m) {
    if (m.data != nullptr) list.push_back(m);
  };
  const auto add_mlp = [&](const MlpWeights& mlp) {
    add(mlp.gate_proj);
    add(mlp.up_proj);
    add(mlp.down_proj);
  };
  add(w.attention.q_proj);
  add(w.attention.q_a_proj);
  add(w.attention.q_b_proj);
  add(w.attention.kv_a_proj_with_mqa);
  add(w.attention.kv_b_proj);
  add(w.attention.o_proj);
  add_mlp(w.mlp);
  add(w.moe.gate);
  for (const MlpWeights& expert : w.moe.experts) add_mlp(expert);
  add_mlp(w.moe.shared_experts);
  return list;
}

}  // namespace

absl::StatusOr<std::unique_ptr<WeightSource>> OpenCheckpointWeights(const std::string& dir) {
  STRAIT_ASSIGN_OR_RETURN(std::shared_ptr<Checkpoint> checkpoint, Checkpoint::Open(dir));
  return std::unique_ptr<WeightSource>(std::make_unique<CheckpointSource>(std::move(checkpoint)));
}

WeightParts PartsOf(const ModelConfig& config, LayerRange range) {
  WeightParts parts;
  for (LayerIndex layer = range.begin; layer < range.end; ++layer) parts.layers.push_back(layer);
  parts.embedding = range.begin == 0;
  parts.head = range.end == config.num_hidden_layers;
  return parts;
}

uint64_t PartsBytes(const ModelConfig& config, const WeightParts& parts) {
  uint64_t bytes =
      (parts.embedding ? EmbeddingBytes(config) : 0) + (parts.head ? HeadBytes(config) : 0);
  for (const LayerIndex layer : parts.layers) bytes += LayerWeightBytes(config, layer);
  return bytes;
}

absl::StatusOr<StageWeights> LoadWeightParts(WeightSource& source, const WeightParts& parts,
                                             uint32_t num_threads, const LoadProgress& progress) {
  const uint64_t total = PartsBytes(source.config(), parts);
  StageWeights stage;
  // Tensors stored wider than announced make more bytes than `total`: never report beyond it.
  const auto loaded = [&](uint64_t bytes, absl::Span<const WeightMatrix> matrices) {
    const uint64_t before = stage.bytes;
    TouchPages(matrices, num_threads, [&](uint64_t touched) {
      if (progress) progress(std::min(before + touched, total), total);
    });
    stage.bytes += bytes;
    if (progress) progress(std::min(stage.bytes, total), total);
  };
  if (parts.embedding) {
    STRAIT_ASSIGN_OR_RETURN(stage.embedding, source.LoadEmbedding());
    loaded(stage.embedding->bytes, {stage.embedding->embed_tokens});
  }
  for (const LayerIndex layer : parts.layers) {
    STRAIT_ASSIGN_OR_RETURN(LayerWeights weights, source.LoadLayer(layer));
    loaded(weights.bytes, MatricesOf(weights));
    stage.layers.push_back(std::move(weights));
  }
  if (parts.head) {
    STRAIT_ASSIGN_OR_RETURN(stage.head, source.LoadHead());
    loaded(stage.head->bytes, {stage.head->lm_head});
  }
  if (progress) progress(total, total);
  return stage;
}

absl::StatusOr<StageWeights> LoadStageWeights(WeightSource& source, LayerRange range,
                                              uint32_t num_threads, const LoadProgress& progress) {
  const ModelConfig& config = source.config();
  if (range.begin >= range.end || range.end > config.num_hidden_layers) {
    return absl::InvalidArgumentError(absl::StrCat("layers [", range.begin, ", ", range.end,
                                                   ") are not a range of a model of ",
                                                   config.num_hidden_layers, " layers"));
  }
  STRAIT_ASSIGN_OR_RETURN(StageWeights stage,
                          LoadWeightParts(source, PartsOf(config, range), num_threads, progress));
  stage.range = range;
  return stage;
}

}  // namespace strait
