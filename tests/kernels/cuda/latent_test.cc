// SPDX-License-Identifier: Apache-2.0
//
// Defends: norm, rotation, the cache row (bf16 and fp8) and the embedding are the reference's for
// odd sizes, and a row goes where its page table says and nowhere else. Beside a product, in one launch
// or two, it and the product leave the bits that they leave alone.
#include "kernels/cuda/latent.h"

#include <cuda_fp8.h>

#include <algorithm>
#include <cstring>

#include "kernels/cuda/norm.h"
#include "kernels/reference/kernels.h"
#include "tests/kernels/cuda/device_matrix.h"

namespace strait {
namespace {

using gpu_test::Bf16;
using gpu_test::Buffer;
using kernel_test::RandomFloats;

// One rounding to bf16, and a norm in fp32: nothing else may add to 2^-8 of each element.
constexpr double kOneRounding = gpu_test::kBf16Eps * 1.01;

// |got - expected| <= relative * |expected| + tiny, for each element.
testing::AssertionResult Near(const std::vector<float>& got, const std::vector<float>& expected,
                              double relative) {
  if (got.size() != expected.size()) return testing::AssertionFailure() << "sizes differ";
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = std::abs(static_cast<double>(got[i]) - expected[i]);
    if (!(error <= relative * std::abs(expected[i]) + 1e-6)) {
      return testing::AssertionFailure()
             << "element " << i << ": " << got[i] << ", expected " << expected[i];
    }
  }
  return testing::AssertionSuccess();
}

class CudaLatentTest : public gpu_test::GpuTest {
 protected:
  CudaLatentTest() : rng_(kernel_test::Seed()) {}
  kernel_test::Rng rng_;
};

TEST_F(CudaLatentTest, RmsNorm) {
  STRAIT_TRACE_SEED();
  for (const int dim : {36, 72, 100, 301, 2048, 7168, 9000}) {
      const int64_t rows = 5;
      const std::vector<float> x = RandomFloats(rng_, rows * dim, 3.0f);
      const std::vector<float> weight = RandomFloats(rng_, dim);
      const Buffer<float> dx(x);
      const Buffer<float> dw(weight);
      const int64_t stride = cuda::AlignedStride(dim);
      const Buffer<Bf16> y(rows * stride);
      cuda::RmsNormParams p;
      p.x = dx.data();
      p.x_stride = dim;
      p.weight = dw.data();
      p.eps = 1e-5f;
      p.y = y.data();
      p.y_stride = stride;
      p.num_rows = rows;
      p.dim = dim;
      ASSERT_EQ(cuda::RmsNorm(p, nullptr), cudaSuccess);
      std::vector<float> expected(static_cast<size_t>(rows * dim));
      RmsNormParams r;
      r.x = x.data();
      r.weight = weight.data();
      r.eps = 1e-5f;
      r.y = expected.data();
      r.x_stride = r.y_stride = r.dim = dim;
      r.num_rows = rows;
      reference::RmsNorm(r);
      const std::vector<float> padded = gpu_test::ToFloat(y.Get());
      std::vector<float> got;
      for (int64_t t = 0; t < rows; ++t) {
        got.insert(got.end(), padded.begin() + t * stride, padded.begin() + t * stride + dim);
      }
      EXPECT_TRUE(Near(got, expected, kOneRounding)) << dim;
  }
}

struct Sizes {
  int32_t heads, nope, rope, rank;
};

TEST_F(CudaLatentTest, AppendRotatesNormsAndRounds) {
  STRAIT_TRACE_SEED();
  for (const auto& [heads, nope, rope, rank] :
       {Sizes{6, 20, 24, 48}, {16, 128, 64, 512}, {5, 16, 8, 64}, {128, 128, 64, 512}}) {
    for (const auto format : {cuda::MlaRowFormat::kBf16, cuda::MlaRowFormat::kFp8}) {
      SCOPED_TRACE(testing::Message()
                   << heads << " heads, rank " << rank << ", format " << static_cast<int>(format));
      const int64_t tokens = 7;
      const int64_t kv_stride = rank + rope + 3;
      const int64_t q_head = nope + rope + 4;
      const std::vector<float> kv = RandomFloats(rng_, tokens * kv_stride, 2.0f);
      const std::vector<float> norm = RandomFloats(rng_, rank);
      const std::vector<float> q =
          gpu_test::RoundedToBf16(RandomFloats(rng_, tokens * heads * q_head));
      std::vector<float> inv_freq(static_cast<size_t>(rope / 2));
      RopeConfig config;
      config.qk_rope_head_dim = rope;
      RopeInverseFrequencies(config, inv_freq.data());
      // Two sequences, one with a far position.
      const std::vector<int32_t> positions = {0, 1, 62, 63, 64, 163'000, 163'001};
      const std::vector<int32_t> sequence = {0, 0, 0, 0, 0, 1, 1};
      std::vector<uint32_t> table0 = {7, 2};
      std::vector<uint32_t> table1(163'001 / 64 + 1, 0xffffffffu);
      table1[163'000 / 64] = 4;
      const int64_t num_blocks = 9;
      const int32_t row_bytes = cuda::MlaRowBytes(format, rank, rope);
      const int64_t block_bytes = 64 * row_bytes;
      const Buffer<uint32_t> d_table0(table0);
      const Buffer<uint32_t> d_table1(table1);
      std::vector<cuda::MlaSegment> segments(2);
      segments[0].page_table = d_table0.data();
      segments[1].page_table = d_table1.data();
      const Buffer<cuda::MlaSegment> d_segments(segments);
      const Buffer<float> d_kv(kv);
      const Buffer<float> d_norm(norm);
      const Buffer<Bf16> d_q(gpu_test::ToBf16(q));
      const Buffer<float> d_freq(inv_freq);
      const Buffer<int32_t> d_positions(positions);
      const Buffer<int32_t> d_sequence(sequence);
      const Buffer<float> d_cos_sin(tokens * rope);
      const Buffer<Bf16> d_q_rope(tokens * heads * rope);
      const Buffer<uint8_t> d_blocks(num_blocks * block_bytes);

      cuda::RopeTableParams table;
      table.positions = d_positions.data();
      table.inv_freq = d_freq.data();
      table.attention_scaling = 1.25f;
      table.cos_sin = d_cos_sin.data();
      table.num_tokens = tokens;
      table.dim = rope;
      ASSERT_EQ(cuda::RopeTable(table, nullptr), cudaSuccess);
      std::vector<float> cos_sin(static_cast<size_t>(tokens * rope));
      RopeTableParams r;
      r.positions = positions.data();
      r.inv_freq = inv_freq.data();
      r.attention_scaling = 1.25f;
      r.num_tokens = tokens;
      r.dim = rope;
      r.cos_sin = cos_sin.data();
      reference::RopeTable(r);
      // Float64 angles: the same to a rounding of fp32, at position 163,001 too.
      EXPECT_TRUE(kernel_test::Within(d_cos_sin.Get(), cos_sin, 1.25 * 0x1p-23));

      cuda::LatentAppendParams p;
      p.kv_a = d_kv.data();
      p.kv_a_stride = kv_stride;
      p.norm_weight = d_norm.data();
      p.cos_sin = d_cos_sin.data();
      p.q = d_q.data();
      p.q_token_stride = heads * q_head;
      p.q_head_stride = q_head;
      p.q_rope_offset = nope;
      p.q_rope = d_q_rope.data();
      p.q_rope_stride = rope;
      p.positions = d_positions.data();
      p.sequence_index = d_sequence.data();
      p.segments = d_segments.data();
      p.blocks = reinterpret_cast<std::byte*>(d_blocks.data());
      p.block_bytes = block_bytes;
      p.format = format;
      p.num_tokens = tokens;
      p.num_heads = heads;
      p.rank = rank;
      p.rope = rope;
      ASSERT_EQ(cuda::LatentAppend(p, nullptr), cudaSuccess);

      std::vector<float> q_rope(static_cast<size_t>(tokens * heads * rope));
      RopeParams rotate;
      rotate.cos_sin = cos_sin.data();
      rotate.num_tokens = tokens;
      rotate.dim = rope;
      rotate.num_heads = heads;
      rotate.x = q.data() + nope;
      rotate.x_token_stride = heads * q_head;
      rotate.x_head_stride = q_head;
      rotate.y = q_rope.data();
      rotate.y_token_stride = heads * rope;
      rotate.y_head_stride = rope;
      reference::Rope(rotate);
      EXPECT_TRUE(Near(gpu_test::ToFloat(d_q_rope.Get()), q_rope, kOneRounding * 1.01));

      std::vector<float> latent(static_cast<size_t>(tokens * rank));
      RmsNormParams n;
      n.x = kv.data();
      n.x_stride = kv_stride;
      n.weight = norm.data();
      n.y = latent.data();
      n.y_stride = n.dim = rank;
      n.num_rows = tokens;
      reference::RmsNorm(n);
      std::vector<float> key(static_cast<size_t>(tokens * rope));
      rotate.num_heads = 1;
      rotate.x = kv.data() + rank;
      rotate.x_token_stride = rotate.x_head_stride = kv_stride;
      rotate.y = key.data();
      rotate.y_token_stride = rotate.y_head_stride = rope;
      reference::Rope(rotate);

      std::vector<uint8_t> blocks = d_blocks.Get();
      for (int64_t t = 0; t < tokens; ++t) {
        const std::vector<uint32_t>& pages = sequence[t] == 0 ? table0 : table1;
        uint8_t* row =
            blocks.data() + pages[positions[t] / 64] * block_bytes + positions[t] % 64 * row_bytes;
        std::vector<float> got(static_cast<size_t>(rank));
        const auto expected = latent.begin() + t * rank;
        if (format == cuda::MlaRowFormat::kBf16) {
          std::vector<Bf16> stored(static_cast<size_t>(rank));
          std::memcpy(stored.data(), row, stored.size() * 2);
          got = gpu_test::ToFloat(stored);
          EXPECT_TRUE(Near(got, {expected, expected + rank}, kOneRounding));
        } else {
          for (int i = 0; i < rank; ++i) {
            float scale = 0;
            std::memcpy(&scale, row + cuda::MlaScalesOffset(rank) + i / 128 * 4, 4);
            __nv_fp8_e4m3 code;
            code.__x = row[i];
            got[static_cast<size_t>(i)] = static_cast<float>(code) * scale;
          }
          // e4m3: half a unit is 1/16 of the value, and 2^-10 of the scale below its normals.
          for (int i = 0; i < rank; ++i) {
            float most = 0;
            for (int c = i / 128 * 128; c < std::min(rank, i / 128 * 128 + 128); ++c) {
              most = std::max(most, std::abs(expected[c]));
            }
            EXPECT_NEAR(got[static_cast<size_t>(i)], expected[i],
                        std::abs(expected[i]) / 16 * 1.001 + most / 448 * 0x1p-10);
          }
        }
        std::vector<Bf16> stored(static_cast<size_t>(rope));
        const int32_t key_at = cuda::MlaRopeOffset(format, rank);
        std::memcpy(stored.data(), row + key_at, stored.size() * 2);
        EXPECT_TRUE(Near(gpu_test::ToFloat(stored),
                         {key.begin() + t * rope, key.begin() + (t + 1) * rope},
                         kOneRounding * 1.01));
        std::memset(row, 0xff, static_cast<size_t>(key_at + rope * 2));
      }
      EXPECT_TRUE(std::all_of(blocks.begin(), blocks.end(), [](uint8_t b) { return b == 0xff; }))
          << "bytes outside the rows were written";

      for (const int32_t rows : {7, 40}) {  // one launch, two
        SCOPED_TRACE(testing::Message() << "beside a product of " << rows << " rows");
        const int32_t groups = 3;
        const int32_t columns = 70;
        const gpu_test::DeviceMatrices weight(rng_, WeightType::kBf16, columns, 136, groups);
        const Buffer<Bf16> x(gpu_test::ToBf16(RandomFloats(rng_, rows * groups * 136)));
        const Buffer<Bf16> alone(rows * groups * columns);
        const Buffer<Bf16> beside(rows * groups * columns);
        cuda::GemmParams product;
        product.x = x.data();
        product.x_stride = groups * 136;
        product.x_group_stride = 136;
        product.num_rows = rows;
        product.weight = weight.matrix();
        product.num_groups = groups;
        product.weight_group_stride = weight.group_stride();
        product.y_stride = groups * columns;
        product.y_group_stride = columns;
        product.y_bf16 = alone.data();
        ASSERT_EQ(cuda::Gemm(product, nullptr), cudaSuccess);
        product.y_bf16 = beside.data();
        const Buffer<Bf16> q_rope_beside(tokens * heads * rope);
        const Buffer<uint8_t> blocks_beside(num_blocks * block_bytes);
        cuda::LatentAppendParams other = p;
        other.q_rope = q_rope_beside.data();
        other.blocks = reinterpret_cast<std::byte*>(blocks_beside.data());
        ASSERT_EQ(cuda::LatentAppendBeside(other, product, nullptr), cudaSuccess);
        EXPECT_EQ(blocks_beside.Get(), d_blocks.Get());
        EXPECT_TRUE(kernel_test::SameBits(gpu_test::ToFloat(q_rope_beside.Get()),
                                          gpu_test::ToFloat(d_q_rope.Get())));
        EXPECT_TRUE(kernel_test::SameBits(gpu_test::ToFloat(beside.Get()),
                                          gpu_test::ToFloat(alone.Get())));
      }
    }
  }
}

TEST_F(CudaLatentTest, Embedding) {
  STRAIT_TRACE_SEED();
  const gpu_test::DeviceMatrices table(rng_, WeightType::kBf16, 50, 72);
  const std::vector<int32_t> ids = {0, 49, 7, 7};
  // Two of them as what a step has sampled.
  const Buffer<int32_t> d_ids(
      std::vector<int32_t>{0, cuda::LateTokenId(2), 7, cuda::LateTokenId(0)});
  const Buffer<int32_t> d_sampled(std::vector<int32_t>{7, -1, 49});
  const Buffer<float> y(4 * 72);
  cuda::EmbeddingParams p;
  p.table = table.matrix();
  p.token_ids = d_ids.data();
  p.sampled_ids = d_sampled.data();
  p.y = y.data();
  p.num_tokens = 4;
  ASSERT_EQ(cuda::Embedding(p, nullptr), cudaSuccess);
  std::vector<float> expected(4 * 72);
  EmbeddingParams r;
  r.table = table.stored();
  r.token_ids = ids.data();
  r.y = expected.data();
  r.num_tokens = 4;
  reference::Embedding(r);
  EXPECT_EQ(y.Get(), expected);
}

}  // namespace
}  // namespace strait
