// SPDX-License-Identifier: Apache-2.0
//
// Attention of prompts on Hopper, keys and values of 128 + 64 and 128 columns a head: a thread block
// takes 128 tokens of one head and goes over their keys, 128 at a time.
//
// Roofline: products. 2 * 128 * 128 * (192 + 128) = 10.5 Mflop a tile of keys, for 80 KiB that come
//   from L2: 128 flops a byte, so 4.7 TB/s at 600 TFLOP/s. A tile costs 2,560 cycles of products and
//   1,024 of exponentials, which hide behind the other warpgroup's products; shared memory moves
//   288 KiB for it (two reads of keys and values, q, the copy itself), 2,300 cycles.
// Measured shares: tests/reports/gpu.md, written by tests/gpu.sh.
//
// Two consumer warpgroups hold 64 tokens each: scores, weights and sums stay in registers, the
// weights are the second product's left operand as they are. A group asks for the scores of the next
// tile before it has weighed the values of this one, and the groups take turns in asking: one's
// softmax runs beside the other's products. The running maximum moves only when a score passes it
// by 8 (a factor of 256): weights above 1 do no harm, rescaling does. A third warpgroup's first
// thread starts bulk copies into a ring of two stages.
//
// Order: heads go by groups of eight, whose keys stay in L2 while all their tiles pass; within a
// group the tiles of most keys first, so that short ones fill the end.
#include "kernels/cuda/attention/mha_prefill.h"

#include <algorithm>

#include "kernels/cuda/attention/mha_prefill_block.cuh"
#include "kernels/cuda/attention/mla_device.cuh"
#include "kernels/cuda/device/tensor_map.h"

namespace strait::cuda {
namespace {

using mla::kLog2e;
using mla::kMaxSlack;
using mla::NegInf;
using mla::Rescale;

using namespace mha;  // NOLINT: its own parts

#if defined(__CUDA_ARCH_FEAT_SM90_ALL)

// A warpgroup of 64 tokens; a thread has parts of two of them.
class Consumer {
 public:
  __device__ __forceinline__ Consumer(const Launch& p, const Work& work, const Shared& s)
      : p_(p),
        piece_(p.pieces[work.piece]),
        work_(work),
        s_(s),
        group_(__shfl_sync(0xffffffffu, threadIdx.x / 128, 0)),
        query_(wgmma::Rows(s.query() + group_ * (kChunkBytes / 2))) {
    const int in_group = threadIdx.x % 128 / 32 * 16 + threadIdx.x % 32 / 4;
    token_ = work.first + group_ * kGroupTokens + in_group;
  }

  __device__ __forceinline__ void Run() {
    float out[64];
    Begin(out);
    const auto count = static_cast<uint32_t>(work_.num_tiles);
    if (count > 0) {
      if (group_ == 1 && count > 1) ArriveSome(kTurn + 0, kConsumers);
      float scores[64];
      uint32_t weights[8][4];
      wgmma::BarrierWait(s_.query_full(), 0);
      wgmma::BarrierWait(s_.keys_full(0), 0);
      AskScores(0, scores);
      wgmma::Wait<0>();
      wgmma::Pin(scores);
      Release(s_.keys_empty(0));
      float factor[2];
      Softmax(0, scores, factor);
      if (!piece_.begins) RescaleOut(out, factor);
      Pack(scores, weights);
      for (uint32_t i = 1; i < count; ++i) {
        wgmma::BarrierWait(s_.keys_full(i), Parity(i));
        SyncSome(kTurn + group_, kConsumers);
        AskScores(i, scores);
        AskValues(i - 1, weights, out);
        if (group_ == 0 || i + 1 < count) ArriveSome(kTurn + 1 - group_, kConsumers);
        wgmma::Wait<1>();
        wgmma::Pin(scores);
        Release(s_.keys_empty(i));
        Softmax(i, scores, factor);
        AwaitValues(out, factor);
        wgmma::Pin(weights);
        Release(s_.values_empty(i - 1));
        Pack(scores, weights);
      }
      AskValues(count - 1, weights, out);
      wgmma::Wait<0>();
      wgmma::Pin(out);
      wgmma::Pin(weights);
    }
    Finish(out);
  }

 private:
  // All warps have read a stage.
  __device__ __forceinline__ void Release(uint32_t barrier) {
    if (threadIdx.x % 32 == 0) wgmma::BarrierArrive(barrier);
  }

  // scores = q . keys of tile i, which are there; when waited for.
  __device__ __forceinline__ void AskScores(uint32_t i, float (&scores)[64]) {
    const wgmma::Operand keys = wgmma::Rows(s_.keys(i));
    wgmma::Begin();
#pragma unroll
    for (int chunk = 0; chunk < kKeyChunks; ++chunk) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const uint32_t at = chunk * kChunkBytes + wgmma::RowsStep(step);
        wgmma::MultiplyRows(scores, query_.At(at), keys.At(at), chunk + step != 0);
      }
    }
    wgmma::Commit();
  }

  // out += weights . values of tile i, when waited for.
  __device__ __forceinline__ void AskValues(uint32_t i, const uint32_t (&weights)[8][4],
                                            float (&out)[64]) {
    wgmma::BarrierWait(s_.values_full(i), Parity(i));
    const wgmma::Operand values = wgmma::Columns(s_.values(i), kChunkBytes);
    wgmma::Begin();
#pragma unroll
    for (int step = 0; step < 8; ++step) {
      wgmma::MultiplyColumns(out, weights[step], values.At(wgmma::ColumnsStep(step)), 1);
    }
    wgmma::Commit();
  }

  // Scores of tile i become weights; factor is what the result so far must be multiplied by.
  __device__ __forceinline__ void Softmax(uint32_t i, float (&scores)[64], float (&factor)[2]) {
    const int first_key = static_cast<int>(i) * kMhaTileKeys;
    const int quad = threadIdx.x % 4;
    // Of the group's first token, which sees least.
    const int least = piece_.first_position + work_.first + group_ * kGroupTokens + 1;
    if (min(least, piece_.num_keys) - first_key < kMhaTileKeys) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int seen =
            min(piece_.first_position + token_ + r * 8 + 1, piece_.num_keys) - first_key;
#pragma unroll
        for (int n = 0; n < 32; ++n) {
          if (n / 2 * 8 + quad * 2 + n % 2 >= seen) scores[n / 2 * 4 + r * 2 + n % 2] = NegInf();
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float max = NegInf();
#pragma unroll
      for (int n = 0; n < 32; ++n) max = fmaxf(max, scores[n / 2 * 4 + r * 2 + n % 2]);
      max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 1));
      max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 2)) * p_.scale;
      const float to = max > max_[r] + kMaxSlack ? max : max_[r];
      factor[r] = Rescale(max_[r], to);
      max_[r] = to;
      const float base = to == NegInf() ? 0.0f : to;
      float sum = 0;
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        float& low = scores[n * 4 + r * 2];
        float& high = scores[n * 4 + r * 2 + 1];
        low = Exp2(fmaf(low, p_.scale, -base));
        high = Exp2(fmaf(high, p_.scale, -base));
        sum += low + high;
      }
      sum_[r] = sum_[r] * factor[r] + sum;
    }
  }

  // Weights as the left operand of a product: step k takes keys 16k to 16k + 15.
  __device__ __forceinline__ void Pack(const float (&scores)[64], uint32_t (&weights)[8][4]) {
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      weights[i / 4][i % 4] = PackBf16(scores[2 * i], scores[2 * i + 1]);
    }
  }

  __device__ __forceinline__ void RescaleOut(float (&out)[64], const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < 64; ++i) out[i] *= factor[i / 2 % 2];
  }

  // Waits for the products of values asked for; out is then of the new maximum. The branch asks for
  // the sums, which it does not need, so that the compiler cannot wait first and weigh then: a
  // branch is all that holds it.
  __device__ __forceinline__ void AwaitValues(float (&out)[64], const float (&factor)[2]) {
    const bool same = factor[0] == 1.0f && factor[1] == 1.0f && sum_[0] >= 0 && sum_[1] >= 0;
    if (__all_sync(0xffffffffu, same)) {
      wgmma::Wait<0>();
      wgmma::Pin(out);
    } else {
      wgmma::Wait<0>();
      wgmma::Pin(out);
      RescaleOut(out, factor);
    }
  }

  __device__ __forceinline__ float* StateOf(int r) const {
    const int64_t token = piece_.first_token + token_ + r * 8;
    return p_.state + (token * p_.num_heads + work_.head) * p_.state_stride;
  }

  // The result so far: nothing, or what the span before has left.
  __device__ __forceinline__ void Begin(float (&out)[64]) {
    const int quad = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      max_[r] = NegInf();
      sum_[r] = 0;
      const bool goes_on = !piece_.begins && token_ + r * 8 < piece_.num_tokens;
      const float* const from = goes_on ? StateOf(r) : nullptr;
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        float2 pair = make_float2(0, 0);
        if (goes_on) pair = *reinterpret_cast<const float2*>(from + n * 8 + quad * 2);
        out[n * 4 + r * 2] = pair.x;
        out[n * 4 + r * 2 + 1] = pair.y;
      }
      if (!goes_on) continue;
      max_[r] = from[kMhaValue];
      if (quad == 0) sum_[r] = from[kMhaValue + 1];
    }
  }

  __device__ __forceinline__ void Finish(const float (&out)[64]) {
    const int quad = threadIdx.x % 4;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = sum_[r];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      if (token_ + r * 8 >= piece_.num_tokens) continue;
      if (piece_.ends) {
        const float inverse = sum > 0 ? 1.0f / sum : 0.0f;
        const int64_t token = piece_.first_token + token_ + r * 8;
        Bf16* const to = p_.out + token * p_.out_stride + work_.head * kMhaValue + quad * 2;
#pragma unroll
        for (int n = 0; n < 16; ++n) {
          *reinterpret_cast<uint32_t*>(to + n * 8) =
              PackBf16(out[n * 4 + r * 2] * inverse, out[n * 4 + r * 2 + 1] * inverse);
        }
        continue;
      }
      float* const to = StateOf(r);
#pragma unroll
      for (int n = 0; n < 16; ++n) {
        *reinterpret_cast<float2*>(to + n * 8 + quad * 2) =
            make_float2(out[n * 4 + r * 2], out[n * 4 + r * 2 + 1]);
      }
      if (quad == 0) {
        *reinterpret_cast<float2*>(to + kMhaValue) = make_float2(max_[r], sum);
      }
    }
  }

  const Launch& p_;
  const MhaPiece& piece_;
  const Work& work_;
  const Shared s_;
  const int group_;
  const wgmma::Operand query_;
  int token_;  // of the piece, and the one 8 behind it
  float max_[2];
  float sum_[2];  // of this thread's keys
};

#endif  // sm_90a

__global__ void __launch_bounds__(kThreads, 1) PrefillKernel(const __grid_constant__ Launch p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const uint32_t start = SharedAddress(DynamicShared<unsigned char>());
  const Shared s = {(start + 1023) / 1024 * 1024};
  const Work work = FindWork(p);
  if (threadIdx.x == 0) {
    wgmma::BarrierInit(s.query_full(), 1);
    for (uint32_t i = 0; i < kStages; ++i) {
      wgmma::BarrierInit(s.keys_full(i), 1);
      wgmma::BarrierInit(s.keys_empty(i), kConsumers / 32);
      wgmma::BarrierInit(s.values_full(i), 1);
      wgmma::BarrierInit(s.values_empty(i), kConsumers / 32);
    }
    wgmma::FenceBarrierInit();
  }
  __syncthreads();
  StartNext();
  WaitForEarlier();
  if (threadIdx.x >= kConsumers) {
    wgmma::FewerRegisters<24>();
    if (threadIdx.x == kConsumers) Feed(p, work, s);
  } else {
    wgmma::MoreRegisters<240>();
    Consumer(p, work, s).Run();
  }
#else
  Trap();
#endif
}

bool Aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// [rows, heads, columns] of bf16, in boxes of 128 rows of 64 columns of one head.
cudaError_t Describe(const Bf16* base, int64_t rows, int64_t heads, int64_t columns,
                     int64_t row_stride, int64_t head_stride, CUtensorMap* map) {
  return MakeTensorMap(
      base, {{columns, heads, rows}, {head_stride * 2, row_stride * 2}, {64, 1, 128}}, map);
}

}  // namespace

bool HasMhaPrefill() { return ComputeCapabilityMajor() == 9; }

cudaError_t PrepareMhaPrefill() {
  if (!HasMhaPrefill()) return cudaSuccess;
  return cudaFuncSetAttribute(PrefillKernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(kSharedBytes));
}

cudaError_t MhaPrefill(const MhaPrefillParams& params, cudaStream_t stream) {
  if (params.num_pieces == 0) return cudaSuccess;
  if (!HasMhaPrefill()) return cudaErrorNotSupported;
  if (params.num_pieces < 0 || params.num_pieces > kMhaMaxPieces || params.num_heads <= 0 ||
      params.out_stride % 2 != 0 || params.state_stride % 2 != 0 || !Aligned(params.q) ||
      !Aligned(params.q_rope) || !Aligned(params.keys) || !Aligned(params.values) ||
      !Aligned(params.rope_keys)) {
    return cudaErrorInvalidValue;
  }
  Launch p = {};
  for (int i = 0; i < params.num_pieces; ++i) {
    const MhaPiece& piece = params.pieces[i];
    if (piece.num_tokens <= 0 || piece.num_keys <= 0 || piece.first_key % kMhaTileKeys != 0 ||
        piece.first_token + piece.num_tokens > params.num_tokens ||
        piece.first_key + piece.num_keys > params.num_key_rows ||
        ((!piece.begins || !piece.ends) && params.state == nullptr)) {
      return cudaErrorInvalidValue;
    }
    p.pieces[i] = piece;
    p.num_tiles += TilesOf(piece.num_tokens);
  }
  const auto seen = [](const MhaPiece& piece) {
    return std::min(piece.num_keys, piece.first_position + piece.num_tokens);
  };
  std::sort(p.pieces, p.pieces + params.num_pieces,
            [&](const MhaPiece& a, const MhaPiece& b) { return seen(a) > seen(b); });
  const int64_t heads = params.num_heads;
  cudaError_t error = Describe(params.q, params.num_tokens, heads, kMhaNope, params.q_token_stride,
                               params.q_head_stride, &p.q);
  if (error != cudaSuccess) return error;
  error = Describe(params.q_rope, params.num_tokens, heads, kMhaRope, params.q_rope_token_stride,
                   params.q_rope_head_stride, &p.q_rope);
  if (error != cudaSuccess) return error;
  error = Describe(params.keys, params.num_key_rows, heads, kMhaNope, params.key_row_stride,
                   params.key_head_stride, &p.keys);
  if (error != cudaSuccess) return error;
  error = Describe(params.values, params.num_key_rows, heads, kMhaValue, params.key_row_stride,
                   params.key_head_stride, &p.values);
  if (error != cudaSuccess) return error;
  error = Describe(params.rope_keys, params.num_key_rows, 1, kMhaRope, kMhaRope, kMhaRope,
                   &p.rope_keys);
  if (error != cudaSuccess) return error;
  p.num_heads = params.num_heads;
  p.scale = params.softmax_scale * kLog2e;
  p.out = params.out;
  p.out_stride = params.out_stride;
  p.state = params.state;
  p.state_stride = params.state_stride;
  return LaunchChained(PrefillKernel, dim3(static_cast<unsigned>(p.num_heads * p.num_tiles)),
                       kThreads, kSharedBytes, stream, p);
}

}  // namespace strait::cuda
