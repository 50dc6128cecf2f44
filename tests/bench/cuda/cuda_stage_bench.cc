// SPDX-License-Identifier: Apache-2.0
//
// cuda_stage_bench: steps of a stage on the GPU with random weights, through the Backend seam as a
// worker runs them, host work and copies included.
//
//   cuda_stage_bench CONFIG_DIR BEGIN END CASE… [--prefill TOKENS] [--memory BYTES] [--deterministic]
//                    [--cache-format bf16|fp8] [--fp8-activations] [--upload-all] [--copies]
//
// CASE: BATCH@CONTEXT, a decode step of BATCH sequences behind CONTEXT rows each; max@CONTEXT is
// the largest batch that fits. END: a layer, or "fit": as many layers as fit with the largest
// case. All run on one load. A step is timed alone, from its Begin to its results, and ahead:
// begun while the one before it computes, as a worker does it with granted steps. The floor of a
// step is reading, once, the weights that it touches (experts: as many as BATCH tokens choose on
// average) and the cache, at the read rate measured in this run. The cache holds zeros, which
// costs what any rows cost. begin: of the step alone, the host's time in Begin, and the bytes of page
// tables that a step brought to the device. These are none here, as no sequence grows: with --upload-all
// nothing is promised of the tables (BatchSequence::tables_id), so each step brings them all. --copies:
// steps ahead, in turn alone and with copies of cache rows to pinned memory beside them.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "proto/model/model_config.h"
#include "proto/model/reservation.h"
#include "tests/bench/cuda/limits.h"
#include "worker/model/cuda/cuda_backend.h"
#include "worker/model/cuda/prompt_plan.h"
#include "worker/model/cuda/stage_layout.h"
#include "worker/model/cuda/stage_model.h"

namespace strait::bench {
namespace {

constexpr double kMemoryShare = 0.9;      // of the GPU's, as strait-worker takes it
constexpr uint32_t kMostSequences = 512;  // for max@…

struct Case {
  uint32_t batch = 0;  // 0: the largest that fits
  uint32_t context = 0;
  uint64_t columns(uint32_t sequences) const {
    return uint64_t{sequences} * BlocksPerLayer(context + 1);
  }
};

struct Options {
  std::string config;
  LayerRange layers;  // end 0: as many as fit
  std::vector<Case> cases;
  uint32_t prefill = 0;
  uint64_t memory_bytes = 0;
  bool deterministic = false;
  RowFormat rows = RowFormat::kBf16;
  bool fp8_activations = false;
  bool upload_all = false;
  bool copies = false;
};

template <class T>
T Must(absl::StatusOr<T> value) {
  if (!value.ok()) {
    std::fprintf(stderr, "cuda_stage_bench: %s\n", value.status().ToString().c_str());
    std::exit(1);
  }
  return *std::move(value);
}

// Bytes of weights that a step of `batch` tokens reads.
double TouchedBytes(const ModelConfig& c, LayerRange layers, double batch) {
  double bytes = 0;
  for (LayerIndex layer = layers.begin; layer < layers.end; ++layer) {
    const auto all = static_cast<double>(LayerWeightBytes(c, layer));
    if (!c.IsMoeLayer(layer)) {
      bytes += all;
      continue;
    }
    const double element = c.quantization == Quantization::kFp8Block128 ? 1.0 + 4.0 / 128 / 128 : 2;
    const double expert = 3.0 * c.hidden_size * c.moe_intermediate_size * element;
    const double share = static_cast<double>(c.num_experts_per_tok) / c.n_routed_experts;
    const double used = c.n_routed_experts * (1 - std::pow(1 - share, batch));
    bytes += all - expert * (c.n_routed_experts - used);
  }
  if (layers.end == c.num_hidden_layers) bytes += static_cast<double>(HeadBytes(c));
  return bytes;
}

// Multiplications and additions of one prompt of `tokens` through the layers, as they are done: tiles
// attend in the expanded form, which makes keys of the whole prefix anew, where `limits` has room for
// them, else every token in the absorbed form. Half of the pairs are not seen and are not counted.
double PrefillFlops(const ModelConfig& c, LayerRange layers, const StepLimits& limits,
                    uint32_t tokens) {
  const double hidden = c.hidden_size;
  const double heads = c.num_attention_heads;
  const double q = heads * c.qk_head_dim();
  const double rank = c.kv_lora_rank;
  const double row = rank + c.qk_rope_head_dim;
  double weights = 0;  // that a token is multiplied with
  for (LayerIndex layer = layers.begin; layer < layers.end; ++layer) {
    weights += c.q_lora_rank > 0 ? c.q_lora_rank * (hidden + q) : hidden * q;
    weights += hidden * row + heads * c.v_head_dim * hidden;
    weights += c.IsMoeLayer(layer)
                   ? hidden * c.n_routed_experts + 3 * hidden * c.moe_intermediate_size *
                                                       (c.num_experts_per_tok + c.n_shared_experts)
                   : 3 * hidden * c.intermediate_size;
  }
  double attention = 0;  // of a layer
  for (uint32_t begin = 0; begin < tokens; begin += limits.tile_rows) {
    const uint32_t end = std::min(tokens, begin + limits.tile_rows);
    const bool expanded =
        limits.expanded_keys > 0 && end - begin >= static_cast<uint32_t>(kMinExpandedTokens);
    const double seen = (1.0 + begin + end) / 2 * (end - begin);
    attention += seen * heads * (expanded ? c.qk_head_dim() + c.v_head_dim : row + rank);
    attention +=
        heads * rank * (c.qk_nope_head_dim + c.v_head_dim) * (expanded ? end : end - begin);
  }
  return 2 * weights * tokens + 2 * attention * layers.size();
}

// Sequences of `rows` new tokens each behind `context` cached ones, with blocks of their own.
class Batch {
 public:
  // `tables_id`: of its first sequence, those of the others follow; 0: none has one.
  Batch(uint32_t count, uint32_t context, uint32_t rows, LayerRange layers, bool last,
        uint64_t tables_id)
      : tokens_(count), tables_(count), views_(count) {
    BlockId next = 0;
    for (uint32_t s = 0; s < count; ++s) {
      // Other tokens in each sequence: equal ones would choose equal experts.
      for (uint32_t i = 0; i < context + rows; ++i)
        tokens_[s].push_back(7 + (s * 97 + i * 31) % 50'000);
      for (uint32_t layer = 0; layer < layers.size(); ++layer) {
        std::vector<BlockId> table;
        for (uint32_t i = 0; i < BlocksPerLayer(context + rows); ++i) table.push_back(next++);
        tables_[s].push_back(std::move(table));
      }
      for (const auto& table : tables_[s]) views_[s].push_back(table);
      BatchSequence sequence;
      sequence.id = SequenceId{s + 1};
      sequence.first_position = context;
      sequence.num_tokens = rows;
      sequence.tokens = tokens_[s];
      sequence.page_tables = views_[s];
      if (tables_id > 0) sequence.tables_id = tables_id + s;
      sequence.sampling = &sampling_;
      sequences_.push_back(sequence);
      LogitsRequest request;
      request.sequence_index = s;
      request.row = s * rows + rows - 1;
      request.sample = true;
      if (last) requests_.push_back(request);
    }
    sampling_.temperature = 0;
    batch_.sequences = sequences_;
    batch_.num_tokens = count * rows;
    batch_.logits = requests_;
  }
  const StageBatch& get() const { return batch_; }

 private:
  SamplingParams sampling_;
  std::vector<std::vector<TokenId>> tokens_;
  std::vector<std::vector<std::vector<BlockId>>> tables_;
  std::vector<std::vector<absl::Span<const BlockId>>> views_;
  std::vector<BatchSequence> sequences_;
  std::vector<LogitsRequest> requests_;
  StageBatch batch_;
};

void Must(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "cuda_stage_bench: %s\n", status.ToString().c_str());
  std::exit(1);
}

double Median(std::vector<double> times) {
  std::sort(times.begin(), times.end());
  return times[times.size() / 2];
}

// Copies of cache rows to pinned memory, two always under way: scattered blocks, all rows but the first,
// which a step of a context that is a multiple of 64 writes.
class CopyLoad {
 public:
  explicit CopyLoad(StageModel& model) : copies_(model.copies()) {
    const uint32_t blocks = model.spec().pool_blocks;
    for (uint32_t i = 0; i < std::min(blocks, 256u); ++i) {
      list_.push_back({0, static_cast<BlockId>(uint64_t{i} * 7919 % blocks), 1, 63});
    }
    bytes_ = list_.size() * 63 * copies_.row_bytes();
    for (CopyMemory& buffer : buffers_) buffer = Must(copies_.Take(bytes_));
  }
  ~CopyLoad() {
    while (copies_.num_under_way() > 0) Turn(false);
  }
  void Turn(bool more = true) {
    for (const CopyEnd& end : copies_.Poll()) {
      Must(end.status);
      done_bytes_ += bytes_;
    }
    // The oldest has ended, and its buffer is free.
    while (more && copies_.num_under_way() < 2) {
      Must(copies_.Read(list_, {{buffers_[next_].data.get(), bytes_}, false}).status());
      next_ ^= 1;
    }
  }
  double done_bytes() const { return static_cast<double>(done_bytes_); }

 private:
  BlockCopies& copies_;
  std::vector<BlockRows> list_;
  size_t bytes_ = 0;
  CopyMemory buffers_[2];
  int next_ = 0;
  uint64_t done_bytes_ = 0;
};

struct StepTimes {
  double us = 0;  // from one step's results to the next one's
  double begin_us = 0;
  double page_table_bytes = 0;  // of a step, the average
  double copies_rate = 0;       // bytes a second
};

// Medians, with `num_begun` steps begun meanwhile; `copies` beside them, if given.
StepTimes TimeSteps(StageModel& model, const StageBatch& batch, const ModelConfig& c, int repeats,
                    int num_begun, CopyLoad* copies = nullptr) {
  const StageSpec& spec = model.spec();
  const size_t bytes = size_t{batch.num_tokens} * c.hidden_size * sizeof(float);
  std::vector<std::byte> in(spec.layers.begin == 0 ? 0 : bytes);
  for (size_t i = 0; i + 4 <= in.size(); i += 4) {
    const float value =
        static_cast<float>(static_cast<int>(i * 2654435761u >> 8 & 1023) - 512) / 512;
    std::memcpy(&in[i], &value, 4);
  }
  std::vector<std::byte> out(spec.layers.end == c.num_hidden_layers ? 0 : bytes);
  const auto begin = [&] { Must(model.Begin(batch, {in}, {absl::MakeSpan(out)})); };
  const auto entries = [&] {
    return static_cast<const CudaStageModel&>(model).page_tables().entries_brought();
  };
  using Us = std::chrono::duration<double, std::micro>;
  std::vector<double> times;
  std::vector<double> begins;
  for (int i = 1; i < num_begun; ++i) begin();
  auto last = std::chrono::steady_clock::now();
  uint64_t before = 0;
  double copied_before = 0;
  auto first = last;
  for (int i = 0; i < repeats + 2; ++i) {
    if (i == 2) before = entries();
    if (i == 2) first = last;
    if (i == 2 && copies != nullptr) copied_before = copies->done_bytes();
    if (copies != nullptr) copies->Turn();
    begin();
    const auto begun = std::chrono::steady_clock::now();
    std::vector<LogitsResult> results;
    Must(model.Finish(&results));
    const auto now = std::chrono::steady_clock::now();
    if (i >= 2) times.push_back(Us(now - last).count());
    if (i >= 2) begins.push_back(Us(begun - last).count());
    last = now;
  }
  StepTimes result;
  result.page_table_bytes = static_cast<double>((entries() - before) * sizeof(BlockId)) / repeats;
  for (int i = 1; i < num_begun; ++i) {
    std::vector<LogitsResult> results;
    Must(model.Finish(&results));
  }
  if (copies != nullptr) {
    result.copies_rate = (copies->done_bytes() - copied_before) / (Us(last - first).count() * 1e-6);
  }
  result.us = Median(times);
  result.begin_us = Median(begins);
  return result;
}

// Columns of latent blocks that fit beside the layers' weights.
uint64_t ColumnsThatFit(const StageCosts& costs, LayerRange layers, uint64_t memory_bytes) {
  const uint64_t fixed = StageFixedBytes(costs, layers);
  return fixed < memory_bytes ? (memory_bytes - fixed) / costs.block_bytes / layers.size() : 0;
}

int Main(Options o) {
  const ModelConfig config = Must(LoadModelConfig(o.config));
  const cuda::Device device = Must(OpenCudaDevice(0));
  const double read_rate = ReadRate();
  const double matrix_rate = o.prefill > 0 ? MatrixRate() : 0;
  const uint32_t threads = std::max(1u, std::thread::hardware_concurrency());
  CudaBackendOptions options;
  options.memory_bytes =
      o.memory_bytes > 0
          ? o.memory_bytes
          : static_cast<uint64_t>(static_cast<double>(device.memory_bytes) * kMemoryShare);
  options.deterministic = o.deterministic;
  options.row_format = o.rows;
  options.fp8_activations = o.fp8_activations;
  auto backend = Must(CudaBackend::Create(options, MakeRandomWeights(config, 1, threads)));
  const StageCosts costs = backend->stage_costs();
  uint64_t most = o.prefill > 0 ? BlocksPerLayer(o.prefill) : 1;
  for (const Case& one : o.cases) most = std::max(most, one.columns(std::max(one.batch, 1u)));
  if (o.layers.end == 0) {
    o.layers.end = config.num_hidden_layers;
    while (o.layers.size() > 1 && ColumnsThatFit(costs, o.layers, options.memory_bytes) < most) {
      --o.layers.end;
    }
  }
  const uint64_t columns = ColumnsThatFit(costs, o.layers, options.memory_bytes);
  for (Case& one : o.cases) {
    if (one.batch > 0) continue;
    one.batch = static_cast<uint32_t>(
        std::min<uint64_t>(columns / one.columns(1), uint64_t{kMostSequences}));
    most = std::max(most, one.columns(one.batch));
  }
  StageSpec spec;
  spec.layers = o.layers;
  spec.pool_blocks = static_cast<uint32_t>(most * o.layers.size());
  const CudaStageLayout layout = LayOutStage(config, spec, backend->traits(), nullptr);
  const CudaStageBytes& stated = layout.bytes;
  const auto begin = std::chrono::steady_clock::now();
  Must(backend->cache().Resize(spec.pool_blocks, {}));
  auto model = Must(backend->Load(spec, {}));
  const std::chrono::duration<double> load = std::chrono::steady_clock::now() - begin;
  const bool last = o.layers.end == config.num_hidden_layers;
  constexpr double kGiB = 1 << 30;
  std::printf(
      "%s layers %u to %u%s%s, %s rows, loaded in %.1f s, reading %.0f GB/s; GiB: weights %.2f, "
      "cache %.2f, workspace %.2f\n",
      o.config.c_str(), o.layers.begin, o.layers.end, o.deterministic ? ", deterministic" : "",
      o.fp8_activations ? ", fp8 activations" : "", RowFormatName(o.rows), load.count(),
      read_rate / 1e9, static_cast<double>(stated.weights) / kGiB,
      static_cast<double>(stated.pool) / kGiB, static_cast<double>(stated.workspace) / kGiB);
  const double row_bytes = RowBytes(o.rows, config.kv_lora_rank, config.qk_rope_head_dim);
  // What all lines of this run have in common.
  const std::string mode = absl::StrCat(
      "\"deterministic\":", o.deterministic ? "true" : "false", ",\"rows\":\"",
      RowFormatName(o.rows), "\",\"fp8_activations\":", o.fp8_activations ? "true" : "false");
  uint64_t tables_id = o.upload_all ? 0 : 1;
  for (const Case& one : o.cases) {
    const uint32_t count = one.batch;
    const Batch batch(count, one.context, 1, o.layers, last, tables_id);
    if (tables_id > 0) tables_id += count;
    const StepTimes alone = TimeSteps(*model, batch.get(), config, 20, 1);
    const double us = alone.us;
    // As alone where it is not taken ahead.
    const bool ahead = model->TakesAhead(count, last ? count : 0);
    const double ahead_us =
        ahead ? TimeSteps(*model, batch.get(), config, 20, kMaxStepsBegun).us : us;
    const double bytes = TouchedBytes(config, o.layers, count) +
                         row_bytes * count * (one.context + 1) * o.layers.size();
    const double floor_us = bytes / read_rate * 1e6;
    std::printf(
        "decode batch %4u at %6u: %9.1f us, ahead %9.1f us, floor %8.1f us, %5.1f %%, %8.0f "
        "tokens/s, begin %7.1f us, page tables %9.0f bytes\n",
        count, one.context, us, ahead_us, floor_us, 100 * floor_us / us, count / us * 1e6,
        alone.begin_us, alone.page_table_bytes);
    std::printf(
        "JSON {\"bench\":\"decode\",\"config\":\"%s\",\"layers\":%u,\"batch\":%u,\"context\":%u,"
        "%s,\"us\":%.1f,\"ahead_us\":%.1f,\"floor_us\":%.1f,\"share\":%.4f,\"cache_bytes\":%.0f,"
        "\"begin_us\":%.1f,\"page_table_bytes\":%.0f}\n",
        o.config.c_str(), o.layers.size(), count, one.context, mode.c_str(), us, ahead_us, floor_us,
        floor_us / us,
        static_cast<double>(one.columns(count) * o.layers.size() * backend->block_bytes()),
        alone.begin_us, alone.page_table_bytes);
  }
  if (o.copies) {
    CopyLoad copies(*model);
    for (const Case& one : o.cases) {
      const Batch batch(one.batch, one.context, 1, o.layers, last, tables_id);
      if (tables_id > 0) tables_id += one.batch;
      if (!model->TakesAhead(one.batch, last ? one.batch : 0)) continue;
      std::vector<double> ratios;
      std::vector<double> rates;
      for (int round = 0; round < 15; ++round) {
        const double us = TimeSteps(*model, batch.get(), config, 20, kMaxStepsBegun).us;
        const StepTimes with = TimeSteps(*model, batch.get(), config, 20, kMaxStepsBegun, &copies);
        ratios.push_back(with.us / us);
        rates.push_back(with.copies_rate / 1e9);
      }
      const auto [least, most] = std::minmax_element(ratios.begin(), ratios.end());
      std::printf("decode batch %4u at %6u beside copies of %.1f GB/s: x %.3f (%.3f to %.3f)\n",
                  one.batch, one.context, Median(rates), Median(ratios), *least, *most);
      std::printf(
          "JSON {\"bench\":\"copies\",\"config\":\"%s\",\"layers\":%u,\"batch\":%u,\"context\":%u,"
          "%s,\"ratio\":%.4f,\"gb_s\":%.2f}\n",
          o.config.c_str(), o.layers.size(), one.batch, one.context, mode.c_str(), Median(ratios),
          Median(rates));
    }
  }
  if (o.prefill > 0) {
    const Batch batch(1, 0, o.prefill, o.layers, last, tables_id);
    const double us = TimeSteps(*model, batch.get(), config, 3, 1).us;
    const double flops_s = PrefillFlops(config, o.layers, layout.limits, o.prefill) / us * 1e6;
    const double matrix_share = flops_s / matrix_rate;
    std::printf("prefill %u tokens: %.1f us, %.0f tokens/s, %.0f TFLOP/s, %.1f %% of products\n",
                o.prefill, us, o.prefill / us * 1e6, flops_s / 1e12, 100 * matrix_share);
    std::printf(
        "JSON {\"bench\":\"prefill\",\"config\":\"%s\",\"layers\":%u,\"tokens\":%u,"
        "%s,\"us\":%.1f,\"tflops\":%.1f,\"matrix_share\":%.4f,\"expanded\":%s}\n",
        o.config.c_str(), o.layers.size(), o.prefill, mode.c_str(), us, flops_s / 1e12,
        matrix_share, layout.limits.expanded_keys > 0 ? "true" : "false");
  }
  const uint64_t taken = backend->used_bytes();
  std::printf("GPU memory taken %.2f GiB of %.2f stated\n", static_cast<double>(taken) / kGiB,
              static_cast<double>(stated.total()) / kGiB);
  std::printf(
      "JSON {\"bench\":\"memory\",\"config\":\"%s\",\"layers\":%u,%s,"
      "\"weights\":%.0f,\"cache\":%.0f,\"workspace\":%.0f,\"stated\":%.0f,\"taken\":%.0f}\n",
      o.config.c_str(), o.layers.size(), mode.c_str(), static_cast<double>(stated.weights),
      static_cast<double>(stated.pool), static_cast<double>(stated.workspace),
      static_cast<double>(stated.total()), static_cast<double>(taken));
  return 0;
}

}  // namespace
}  // namespace strait::bench

int main(int argc, char** argv) {
  using strait::bench::Case;
  using strait::bench::Options;
  Options options;
  const auto usage = [] {
    std::fprintf(stderr,
                 "usage: cuda_stage_bench CONFIG_DIR BEGIN END|fit BATCH@CONTEXT… "
                 "[--prefill TOKENS] [--memory BYTES] [--deterministic] [--cache-format bf16|fp8] "
                 "[--fp8-activations] [--upload-all] [--copies]\n");
    return 2;
  };
  if (argc < 5) return usage();
  const auto number = [](const char* text) {
    return static_cast<uint32_t>(std::strtoul(text, nullptr, 10));
  };
  options.config = argv[1];
  options.layers = {number(argv[2]), std::strcmp(argv[3], "fit") == 0 ? 0 : number(argv[3])};
  for (int i = 4; i < argc; ++i) {
    const char* const at = std::strchr(argv[i], '@');
    if (std::strcmp(argv[i], "--prefill") == 0 && i + 1 < argc) {
      options.prefill = number(argv[++i]);
    } else if (std::strcmp(argv[i], "--memory") == 0 && i + 1 < argc) {
      options.memory_bytes = std::strtoull(argv[++i], nullptr, 10);
    } else if (std::strcmp(argv[i], "--deterministic") == 0) {
      options.deterministic = true;
    } else if (std::strcmp(argv[i], "--cache-format") == 0 && i + 1 < argc) {
      const auto rows = strait::RowFormatOf(argv[++i]);
      if (!rows || *rows == strait::RowFormat::kFp32) return usage();
      options.rows = *rows;
    } else if (std::strcmp(argv[i], "--fp8-activations") == 0) {
      options.fp8_activations = true;
    } else if (std::strcmp(argv[i], "--upload-all") == 0) {
      options.upload_all = true;
    } else if (std::strcmp(argv[i], "--copies") == 0) {
      options.copies = true;
    } else if (at != nullptr && number(at + 1) > 0) {
      const bool most = std::strncmp(argv[i], "max@", 4) == 0;
      const Case one = {most ? 0 : number(argv[i]), number(at + 1)};
      if (!most && one.batch == 0) return usage();
      options.cases.push_back(one);
    } else {
      return usage();
    }
  }
  return strait::bench::Main(options);
}
