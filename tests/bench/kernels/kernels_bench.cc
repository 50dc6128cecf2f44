// SPDX-License-Identifier: Apache-2.0
//
// Measures the CPU kernels against this machine's own limits, taken in the same run: the rate of
// reading memory and the rate of fused multiply-adds.
//
//   kernels_bench [--smoke] [Google Benchmark's flags]
//
// Counters: GB/s counts the stored bytes that a call must read (weights, cache rows); GFLOP/s
// counts two per multiply-add; of_read and of_fma are the shares of the limits (1 = at the limit).
#include <benchmark/benchmark.h>

#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/cpu/kernels.h"

namespace strait {
namespace {

using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

std::unique_ptr<cpu::Context> MakeContext(int num_threads) {
  auto context = cpu::Context::Create({.num_threads = num_threads});
  if (!context.ok()) {
    std::fprintf(stderr, "%s\n", context.status().ToString().c_str());
    std::exit(1);
  }
  return *std::move(context);
}

// --- The machine's limits ------------------------------------------------------------------------

struct Limits {
  double read_bytes_per_s = 0;
  double flops_per_s = 0;
};

// Four streams, as a tile of weight rows has, each read once with prefetches ahead.
uint64_t ReadOnce(const uint64_t* p, size_t count) {
  typedef uint64_t U4 __attribute__((vector_size(32), aligned(8)));
  constexpr size_t kAhead = 128;
  const size_t quarter = count / 4 / 8 * 8;
  U4 sum[8] = {};
  for (size_t i = 0; i < quarter; i += 8) {
#pragma GCC unroll 4
    for (size_t stream = 0; stream < 4; ++stream) {
      const uint64_t* at = p + stream * quarter + i;
      __builtin_prefetch(at + kAhead);
      sum[2 * stream] ^= *reinterpret_cast<const U4*>(at);
      sum[2 * stream + 1] ^= *reinterpret_cast<const U4*>(at + 4);
    }
  }
  uint64_t total = 0;
  for (const U4& lanes : sum) total ^= lanes[0] ^ lanes[1] ^ lanes[2] ^ lanes[3];
  return total;
}

// Reads `bytes` with every thread on a part, and keeps the best of some runs.
double MeasureRead(cpu::ThreadPool& pool, size_t bytes) {
  std::vector<uint64_t> data(bytes / 8, 1);
  const int64_t pieces = 61;  // no power of two: four streams at such a distance share cache sets
  const size_t per_piece = data.size() / pieces;
  std::vector<uint64_t> sums(pieces);
  double best = 0;
  for (int run = 0; run < 5; ++run) {
    const auto start = Clock::now();
    pool.ParallelFor(pieces, [&](int64_t piece, int) {
      sums[static_cast<size_t>(piece)] =
          ReadOnce(data.data() + static_cast<size_t>(piece) * per_piece, per_piece);
    });
    best = std::max(best, static_cast<double>(bytes) / SecondsSince(start));
  }
  benchmark::DoNotOptimize(sums.data());
  return best;
}

#if defined(STRAIT_X86)
// Twelve independent chains: enough for two units of latency four.
__attribute__((target("avx2,fma"))) void FmaChains(int64_t steps, float* out) {
  typedef float F8 __attribute__((vector_size(32)));
  F8 c[12];
  F8 a;
  F8 b;
  for (int j = 0; j < 8; ++j) {
    a[j] = out[0];
    b[j] = out[1];
  }
#pragma GCC unroll 12
  for (auto& v : c) v = a;
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 12
    for (auto& v : c) asm("vfmadd231ps %1, %2, %0" : "+x"(v) : "x"(a), "x"(b));
  }
#pragma GCC unroll 12
  for (auto& v : c) out[2] += v[0];
}
__attribute__((target("avx512f"))) void FmaChains512(int64_t steps, float* out) {
  typedef float F16 __attribute__((vector_size(64)));
  F16 c[12];
  F16 a;
  F16 b;
  for (int j = 0; j < 16; ++j) {
    a[j] = out[0];
    b[j] = out[1];
  }
#pragma GCC unroll 12
  for (auto& v : c) v = a;
  for (int64_t i = 0; i < steps; ++i) {
#pragma GCC unroll 12
    for (auto& v : c) asm("vfmadd231ps %1, %2, %0" : "+v"(v) : "v"(a), "v"(b));
  }
#pragma GCC unroll 12
  for (auto& v : c) out[2] += v[0];
}
#endif

double MeasureFma(cpu::Context& context) {
#if defined(STRAIT_X86)
  if (context.simd_level() == cpu::SimdLevel::kPortable) return 0;
  const bool wide = context.simd_level() == cpu::SimdLevel::kAvx512;
  const int64_t steps = 2'000'000;
  const int64_t pieces = context.num_threads();
  double best = 0;
  for (int run = 0; run < 5; ++run) {
    const auto start = Clock::now();
    context.pool().ParallelFor(pieces, [&](int64_t, int) {
      float out[3] = {1e-3f, 1e-3f, 0};
      wide ? FmaChains512(steps, out) : FmaChains(steps, out);
      benchmark::DoNotOptimize(out);
    });
    const double flops = static_cast<double>(pieces * steps) * 12 * 2 * (wide ? 16 : 8);
    best = std::max(best, flops / SecondsSince(start));
  }
  return best;
#else
  (void)context;
  return 0;
#endif
}

// --- Reports -------------------------------------------------------------------------------------

void Report(benchmark::State& state, const Limits& limits, double bytes, double flops) {
  const double runs = static_cast<double>(state.iterations());
  const auto rate = [&](double per_run, double unit) {
    return benchmark::Counter(per_run * runs / unit, benchmark::Counter::kIsRate);
  };
  state.counters["GB/s"] = rate(bytes, 1e9);
  state.counters["GFLOP/s"] = rate(flops, 1e9);
  if (limits.read_bytes_per_s > 0) state.counters["of_read"] = rate(bytes, limits.read_bytes_per_s);
  if (limits.flops_per_s > 0) state.counters["of_fma"] = rate(flops, limits.flops_per_s);
}

std::vector<float> RandomFloats(int64_t count, float scale) {
  std::mt19937 rng(1);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> values(static_cast<size_t>(count));
  const size_t distinct = std::min<size_t>(values.size(), 65536);
  for (size_t i = 0; i < distinct; ++i) values[i] = normal(rng);
  for (size_t i = distinct; i < values.size(); ++i) values[i] = values[i % distinct];
  return values;
}

const char* TypeName(WeightType type) {
  switch (type) {
    case WeightType::kFp32:
      return "fp32";
    case WeightType::kBf16:
      return "bf16";
    case WeightType::kFp16:
      return "fp16";
    case WeightType::kFp8E4m3:
      return "fp8";
  }
  return "";
}

// Enough copies of one matrix that none of them is still in a cache when its turn comes again.
struct Weights {
  Weights(WeightType type, int64_t n, int64_t k, int64_t total_bytes) {
    const int64_t bytes = n * k * WeightElementBytes(type);
    const int64_t copies = std::max<int64_t>(1, total_bytes / bytes);
    data.resize(static_cast<size_t>(copies * bytes));
    for (size_t i = 0; i < data.size(); ++i) {
      // Ordinary numbers in every type: exponents in the middle.
      data[i] = static_cast<unsigned char>(i % 2 == 0 ? i * 7 & 0x7f : 0x3c);
    }
    scales.assign(static_cast<size_t>(((n + 127) / 128) * ((k + 127) / 128)), 0.01f);
    for (int64_t c = 0; c < copies; ++c) {
      matrices.push_back({data.data() + c * bytes,
                          type == WeightType::kFp8E4m3 ? scales.data() : nullptr, type, n, k});
    }
  }
  std::vector<unsigned char> data;
  std::vector<float> scales;
  std::vector<WeightMatrix> matrices;
};

struct Sizes {
  int64_t n = 4096, k = 7168, total_bytes = 256 << 20;
  std::vector<int64_t> rows = {2, 4, 8, 12, 16, 64, 256, 512};
  std::vector<int64_t> context_rows = {4096, 16384};
  int64_t prefill_tokens = 128;
  int64_t heads = 16, rank = 512, rope = 64, nope = 128, v = 128;
  int64_t vocab = 129280;
  size_t read_bytes = 512u << 20;
};

void BenchGemm(benchmark::State& state, cpu::Context& context, const Limits& limits,
               WeightType type, int64_t m, const Sizes& s) {
  const Weights weights(type, s.n, s.k, s.total_bytes);
  const std::vector<float> x = RandomFloats(m * s.k, 1.0f);
  std::vector<float> y(static_cast<size_t>(m * s.n));
  size_t turn = 0;
  for (auto _ : state) {
    cpu::Gemm(context, {.x = x.data(),
                        .x_stride = s.k,
                        .num_rows = m,
                        .weight = weights.matrices[turn++ % weights.matrices.size()],
                        .y = y.data(),
                        .y_stride = s.n});
  }
  Report(state, limits, static_cast<double>(s.n * s.k * WeightElementBytes(type)),
         2.0 * static_cast<double>(m * s.n * s.k));
}

// num_tokens last tokens of a sequence of num_rows rows; decoding when it is 1.
void BenchMla(benchmark::State& state, cpu::Context& context, const Limits& limits,
              RowFormat format, int64_t num_tokens, int64_t num_rows, const Sizes& s) {
  const CacheLayout layout = MakeCacheLayout(format, s.rank, s.rope);
  const int64_t num_blocks = (num_rows + kCacheBlockTokens - 1) / kCacheBlockTokens;
  std::vector<std::byte> pool(static_cast<size_t>(num_blocks * layout.block_bytes));
  const std::vector<float> rows = RandomFloats(num_rows * (s.rank + s.rope), 1.0f);
  std::vector<int32_t> positions, sequence(static_cast<size_t>(num_rows), 0);
  for (int64_t i = 0; i < num_rows; ++i) positions.push_back(static_cast<int32_t>(i));
  std::vector<uint32_t> pages;
  for (int64_t i = 0; i < num_blocks; ++i)
    pages.push_back(static_cast<uint32_t>(num_blocks - 1 - i));
  const uint32_t* tables[] = {pages.data()};
  cpu::CacheAppend(context, {.latent = rows.data(),
                             .latent_stride = s.rank + s.rope,
                             .rope_key = rows.data() + s.rank,
                             .rope_key_stride = s.rank + s.rope,
                             .positions = positions.data(),
                             .sequence_index = sequence.data(),
                             .page_tables = tables,
                             .blocks = pool.data(),
                             .layout = layout,
                             .num_tokens = num_rows});
  const std::vector<float> q = RandomFloats(num_tokens * s.heads * s.rank, 0.05f);
  std::vector<float> o(static_cast<size_t>(num_tokens * s.heads * s.rank));
  const int64_t first = num_rows - num_tokens;
  for (auto _ : state) {
    cpu::Mla(context, {.q_latent = q.data(),
                       .q_rope = q.data(),
                       .positions = positions.data() + first,
                       .sequence_index = sequence.data(),
                       .page_tables = tables,
                       .blocks = pool.data(),
                       .layout = layout,
                       .softmax_scale = 0.1f,
                       .o_latent = o.data(),
                       .num_tokens = num_tokens,
                       .num_heads = s.heads});
  }
  const double seen = static_cast<double>(num_tokens) *
                      (static_cast<double>(first + 1) + static_cast<double>(num_rows)) / 2;
  Report(state, limits, static_cast<double>(num_rows * layout.row_bytes),
         2.0 * seen * static_cast<double>(s.heads * (2 * s.rank + s.rope)));
}

void BenchAbsorb(benchmark::State& state, cpu::Context& context, const Limits& limits, int64_t m,
                 bool up, const Sizes& s) {
  const Weights weights(WeightType::kBf16, s.heads * (s.nope + s.v), s.rank, s.total_bytes);
  const std::vector<float> in = RandomFloats(m * s.heads * (s.nope + s.rank), 1.0f);
  std::vector<float> out(static_cast<size_t>(m * s.heads * (s.rank + s.v)));
  size_t turn = 0;
  for (auto _ : state) {
    const WeightMatrix& w = weights.matrices[turn++ % weights.matrices.size()];
    if (up) {
      cpu::ValueUp(context, {.o_latent = in.data(),
                             .kv_b_proj = w,
                             .out = out.data(),
                             .num_tokens = m,
                             .num_heads = s.heads,
                             .qk_nope_head_dim = s.nope,
                             .v_head_dim = s.v});
    } else {
      cpu::AbsorbQuery(context, {.q_nope = in.data(),
                                 .q_token_stride = s.heads * s.nope,
                                 .q_head_stride = s.nope,
                                 .kv_b_proj = w,
                                 .q_latent = out.data(),
                                 .num_tokens = m,
                                 .num_heads = s.heads,
                                 .qk_nope_head_dim = s.nope,
                                 .v_head_dim = s.v});
    }
  }
  const double numbers = static_cast<double>(s.heads * (up ? s.v : s.nope) * s.rank);
  Report(state, limits, numbers * 2, numbers * 2 * static_cast<double>(m));
}

void BenchSample(benchmark::State& state, cpu::Context& context, const Limits& limits, float top_p,
                 const Sizes& s) {
  const std::vector<float> logits = RandomFloats(s.vocab, 3.0f);
  SampleParams p = {.logits = logits.data(), .vocab_size = s.vocab, .top_p = top_p};
  int64_t position = 0;
  for (auto _ : state) {
    benchmark::DoNotOptimize(
        cpu::Sample(context, p, SamplingUniform(1, 0, static_cast<uint64_t>(position++))));
  }
  Report(state, limits, static_cast<double>(s.vocab) * 4, 0);
}

void RegisterAll(cpu::Context& context, const Limits& limits, const Sizes& s) {
  const std::string threads = "/threads:" + std::to_string(context.num_threads());
  const auto add = [&](const std::string& name, auto fn) {
    benchmark::RegisterBenchmark((name + threads).c_str(), fn)
        ->UseRealTime()
        ->Unit(benchmark::kMicrosecond);
  };
  const std::string shape = "/" + std::to_string(s.n) + "x" + std::to_string(s.k) + "/";
  for (WeightType type :
       {WeightType::kBf16, WeightType::kFp8E4m3, WeightType::kFp16, WeightType::kFp32}) {
    add("gemv" + shape + TypeName(type),
        [&, type, s](benchmark::State& state) { BenchGemm(state, context, limits, type, 1, s); });
  }
  for (int64_t m : s.rows) {
    add("gemm" + shape + "bf16/M:" + std::to_string(m), [&, m, s](benchmark::State& state) {
      BenchGemm(state, context, limits, WeightType::kBf16, m, s);
    });
  }
  for (RowFormat format : {RowFormat::kFp32, RowFormat::kBf16}) {
    const std::string kind = format == RowFormat::kFp32 ? "fp32" : "bf16";
    for (int64_t rows : s.context_rows) {
      for (int64_t tokens : {int64_t{1}, s.prefill_tokens}) {
        add("mla/" + kind + "/rows:" + std::to_string(rows) + "/tokens:" + std::to_string(tokens),
            [&, format, rows, tokens, s](benchmark::State& state) {
              BenchMla(state, context, limits, format, tokens, rows, s);
            });
      }
    }
  }
  for (int64_t tokens : {int64_t{1}, s.prefill_tokens}) {
    for (bool up : {false, true}) {
      add(std::string(up ? "value_up" : "absorb_query") + "/tokens:" + std::to_string(tokens),
          [&, tokens, up, s](benchmark::State& state) {
            BenchAbsorb(state, context, limits, tokens, up, s);
          });
    }
  }
  for (float top_p : {1.0f, 0.9f}) {
    add("sample/top_p:" + std::to_string(top_p).substr(0, 3),
        [&, top_p, s](benchmark::State& state) { BenchSample(state, context, limits, top_p, s); });
  }
}

int Main(int argc, char** argv) {
  Sizes sizes;
  std::vector<char*> args(argv, argv + argc);
  bool smoke = false;
  for (auto it = args.begin(); it != args.end();) {
    const bool is_smoke = std::strcmp(*it, "--smoke") == 0;
    smoke = smoke || is_smoke;
    it = is_smoke ? args.erase(it) : it + 1;
  }
  char min_time[] = "--benchmark_min_time=0.001";
  if (smoke) {
    sizes = {.n = 40,
             .k = 200,
             .total_bytes = 1 << 16,
             .rows = {4, 20},
             .context_rows = {130},
             .prefill_tokens = 3,
             .heads = 2,
             .rank = 48,
             .rope = 8,
             .nope = 16,
             .v = 16,
             .vocab = 1000,
             .read_bytes = 1u << 20};
    args.push_back(min_time);
  }
  int count = static_cast<int>(args.size());
  benchmark::Initialize(&count, args.data());
  if (benchmark::ReportUnrecognizedArguments(count, args.data())) return 1;
  std::vector<std::unique_ptr<cpu::Context>> contexts;
  std::vector<std::unique_ptr<Limits>> limits;
  for (int num_threads : {1, 2}) {
    contexts.push_back(MakeContext(num_threads));
    cpu::Context& context = *contexts.back();
    limits.push_back(std::make_unique<Limits>());
    limits.back()->read_bytes_per_s = MeasureRead(context.pool(), sizes.read_bytes);
    limits.back()->flops_per_s = MeasureFma(context);
    std::printf("limits, %d threads, %s: read %.1f GB/s, fma %.1f GFLOP/s\n", num_threads,
                std::string(cpu::SimdLevelName(context.simd_level())).c_str(),
                limits.back()->read_bytes_per_s / 1e9, limits.back()->flops_per_s / 1e9);
    RegisterAll(context, *limits.back(), sizes);
  }
  return benchmark::RunSpecifiedBenchmarks() > 0 ? 0 : 1;
}

}  // namespace
}  // namespace strait

int main(int argc, char** argv) { return strait::Main(argc, argv); }
