// SPDX-License-Identifier: Apache-2.0
//
// Defends: norm, rotation, the cache row (bf16 and fp8) and the embedding are the reference's for
// odd sizes, and a row goes where its page table says and nowhere else. Beside a product, in one launch
// or two, it and the product leave the bits that they leave alone.
#include "kernels/cuda/attention/latent.h"

#include <cuda_fp8.h>

#include <algorithm>
#include <cstring>

#include "kernels/cuda/rowwise/norm.h"
#include "kernels/reference/kernels.h"
#include "tests/kernels/cuda/gemm/device_matrix.h"

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

constexpr Sizes kSizes[] = {
    {6, 20, 24, 48}, {16, 128, 64, 512}, {5, 16, 8, 64}, {128, 128, 64, 512}};
constexpr RowFormat kFormats[] = {RowFormat::kBf16, RowFormat::kFp8};
constexpr int64_t kTokens = 7;
constexpr int64_t kNumBlocks = 9;
constexpr float kScaling = 1.25f;

std::vector<uint32_t> FarPages() {
  std::vector<uint32_t> pages(163'001 / 64 + 1, 0xffffffffu);
  pages[163'000 / 64] = 4;
  return pages;
}

// What a step appends: tokens of two sequences, one with a far position.
struct Step {
  Step(kernel_test::Rng& rng, const Sizes& sizes, RowFormat format_in)
      : heads(sizes.heads),
        nope(sizes.nope),
        rope(sizes.rope),
        rank(sizes.rank),
        format(format_in),
        kv(RandomFloats(rng, kTokens * kv_stride, 2.0f)),
        norm(RandomFloats(rng, rank)),
        q(gpu_test::RoundedToBf16(RandomFloats(rng, kTokens * heads * q_head))) {
    RopeConfig config;
    config.qk_rope_head_dim = rope;
    RopeInverseFrequencies(config, inv_freq.data());
    d_inv_freq.Put(inv_freq);
    std::vector<cuda::MlaSegment> segments(2);
    segments[0].page_table = d_pages[0].data();
    segments[1].page_table = d_pages[1].data();
    d_segments.Put(segments);
  }

  // Fills d_cos_sin, which the append reads.
  cudaError_t MakeRopeTable() const {
    cuda::RopeTableParams p;
    p.positions = d_positions.data();
    p.inv_freq = d_inv_freq.data();
    p.attention_scaling = kScaling;
    p.cos_sin = d_cos_sin.data();
    p.num_tokens = kTokens;
    p.dim = rope;
    return cuda::RopeTable(p, nullptr);
  }

  const int32_t heads, nope, rope, rank;
  const RowFormat format;
  const int64_t kv_stride = rank + rope + 3;
  const int64_t q_head = nope + rope + 4;
  const int32_t row_bytes = RowBytes(format, rank, rope);
  const int64_t block_bytes = 64 * row_bytes;
  const std::vector<int32_t> positions = {0, 1, 62, 63, 64, 163'000, 163'001};
  const std::vector<int32_t> sequence = {0, 0, 0, 0, 0, 1, 1};
  const std::vector<uint32_t> pages[2] = {{7, 2}, FarPages()};
  const std::vector<float> kv, norm, q;
  std::vector<float> inv_freq = std::vector<float>(static_cast<size_t>(rope / 2));

  const Buffer<uint32_t> d_pages[2] = {Buffer<uint32_t>(pages[0]), Buffer<uint32_t>(pages[1])};
  Buffer<cuda::MlaSegment> d_segments{2};
  const Buffer<float> d_kv{kv};
  const Buffer<float> d_norm{norm};
  const Buffer<Bf16> d_q{gpu_test::ToBf16(q)};
  Buffer<float> d_inv_freq{rope / 2};
  const Buffer<int32_t> d_positions{positions};
  const Buffer<int32_t> d_sequence{sequence};
  const Buffer<float> d_cos_sin{kTokens * rope};
};

// What an append leaves.
struct Appended {
  explicit Appended(const Step& step)
      : q_rope(kTokens * step.heads * step.rope), blocks(kNumBlocks * step.block_bytes) {}
  const Buffer<Bf16> q_rope;
  const Buffer<uint8_t> blocks;
};

cuda::LatentAppendParams ParamsOf(const Step& step, const Appended& to) {
  cuda::LatentAppendParams p;
  p.kv_a = step.d_kv.data();
  p.kv_a_stride = step.kv_stride;
  p.norm_weight = step.d_norm.data();
  p.cos_sin = step.d_cos_sin.data();
  p.q = step.d_q.data();
  p.q_token_stride = step.heads * step.q_head;
  p.q_head_stride = step.q_head;
  p.q_rope_offset = step.nope;
  p.q_rope = to.q_rope.data();
  p.q_rope_stride = step.rope;
  p.positions = step.d_positions.data();
  p.sequence_index = step.d_sequence.data();
  p.segments = step.d_segments.data();
  p.blocks = reinterpret_cast<std::byte*>(to.blocks.data());
  p.block_bytes = step.block_bytes;
  p.format = step.format;
  p.num_tokens = kTokens;
  p.num_heads = step.heads;
  p.rank = step.rank;
  p.rope = step.rope;
  return p;
}

TEST_F(CudaLatentTest, AppendRotatesNormsAndRounds) {
  STRAIT_TRACE_SEED();
  for (const Sizes& sizes : kSizes) {
    for (const auto format : kFormats) {
      const auto& [heads, nope, rope, rank] = sizes;
      SCOPED_TRACE(testing::Message()
                   << heads << " heads, rank " << rank << ", format " << static_cast<int>(format));
      const Step step(rng_, sizes, format);
      ASSERT_EQ(step.MakeRopeTable(), cudaSuccess);
      std::vector<float> cos_sin(static_cast<size_t>(kTokens * rope));
      RopeTableParams r;
      r.positions = step.positions.data();
      r.inv_freq = step.inv_freq.data();
      r.attention_scaling = kScaling;
      r.num_tokens = kTokens;
      r.dim = rope;
      r.cos_sin = cos_sin.data();
      reference::RopeTable(r);
      // Float64 angles: the same to a rounding of fp32, at position 163,001 too.
      EXPECT_TRUE(kernel_test::Within(step.d_cos_sin.Get(), cos_sin, 1.25 * 0x1p-23));

      const Appended appended(step);
      ASSERT_EQ(cuda::LatentAppend(ParamsOf(step, appended), nullptr), cudaSuccess);

      std::vector<float> q_rope(static_cast<size_t>(kTokens * heads * rope));
      RopeParams rotate;
      rotate.cos_sin = cos_sin.data();
      rotate.num_tokens = kTokens;
      rotate.dim = rope;
      rotate.num_heads = heads;
      rotate.x = step.q.data() + nope;
      rotate.x_token_stride = heads * step.q_head;
      rotate.x_head_stride = step.q_head;
      rotate.y = q_rope.data();
      rotate.y_token_stride = heads * rope;
      rotate.y_head_stride = rope;
      reference::Rope(rotate);
      EXPECT_TRUE(Near(gpu_test::ToFloat(appended.q_rope.Get()), q_rope, kOneRounding * 1.01));

      std::vector<float> latent(static_cast<size_t>(kTokens * rank));
      RmsNormParams n;
      n.x = step.kv.data();
      n.x_stride = step.kv_stride;
      n.weight = step.norm.data();
      n.y = latent.data();
      n.y_stride = n.dim = rank;
      n.num_rows = kTokens;
      reference::RmsNorm(n);
      std::vector<float> key(static_cast<size_t>(kTokens * rope));
      rotate.num_heads = 1;
      rotate.x = step.kv.data() + rank;
      rotate.x_token_stride = rotate.x_head_stride = step.kv_stride;
      rotate.y = key.data();
      rotate.y_token_stride = rotate.y_head_stride = rope;
      reference::Rope(rotate);

      std::vector<uint8_t> blocks = appended.blocks.Get();
      for (int64_t t = 0; t < kTokens; ++t) {
        const std::vector<uint32_t>& pages = step.pages[step.sequence[t]];
        uint8_t* row = blocks.data() + pages[step.positions[t] / 64] * step.block_bytes +
                       step.positions[t] % 64 * step.row_bytes;
        std::vector<float> got(static_cast<size_t>(rank));
        const auto expected = latent.begin() + t * rank;
        if (format == RowFormat::kBf16) {
          std::vector<Bf16> stored(static_cast<size_t>(rank));
          std::memcpy(stored.data(), row, stored.size() * 2);
          got = gpu_test::ToFloat(stored);
          EXPECT_TRUE(Near(got, {expected, expected + rank}, kOneRounding));
        } else {
          for (int i = 0; i < rank; ++i) {
            float scale = 0;
            std::memcpy(&scale, row + ScalesOffset(rank) + i / 128 * 4, 4);
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
        const int32_t key_at = RopeKeyOffset(format, rank);
        std::memcpy(stored.data(), row + key_at, stored.size() * 2);
        EXPECT_TRUE(Near(gpu_test::ToFloat(stored),
                         {key.begin() + t * rope, key.begin() + (t + 1) * rope},
                         kOneRounding * 1.01));
        EXPECT_TRUE(std::all_of(row + key_at + rope * 2, row + step.row_bytes, [](uint8_t b) {
          return b == 0;
        })) << "a row's last bytes are zeros, whatever was there";
        std::memset(row, 0xff, static_cast<size_t>(step.row_bytes));
      }
      EXPECT_TRUE(std::all_of(blocks.begin(), blocks.end(), [](uint8_t b) { return b == 0xff; }))
          << "bytes outside the rows were written";
    }
  }
}

TEST_F(CudaLatentTest, BesideAProductBothLeaveTheirBits) {
  STRAIT_TRACE_SEED();
  const int32_t groups = 3;
  const int32_t columns = 70;
  const int32_t k = 136;
  for (const Sizes& sizes : kSizes) {
    for (const auto format : kFormats) {
      const Step step(rng_, sizes, format);
      ASSERT_EQ(step.MakeRopeTable(), cudaSuccess);
      const Appended alone(step);
      ASSERT_EQ(cuda::LatentAppend(ParamsOf(step, alone), nullptr), cudaSuccess);
      for (const int32_t rows : {7, 40}) {  // one launch, two
        SCOPED_TRACE(testing::Message()
                     << sizes.heads << " heads, rank " << sizes.rank << ", format "
                     << static_cast<int>(format) << ", a product of " << rows << " rows");
        const gpu_test::DeviceMatrices weight(rng_, WeightType::kBf16, columns, k, groups);
        const Buffer<Bf16> x(gpu_test::ToBf16(RandomFloats(rng_, rows * groups * k)));
        const Buffer<Bf16> y_alone(rows * groups * columns);
        const Buffer<Bf16> y_beside(rows * groups * columns);
        cuda::GemmParams product;
        product.x = x.data();
        product.x_stride = groups * k;
        product.x_group_stride = k;
        product.num_rows = rows;
        product.weight = weight.matrix();
        product.num_groups = groups;
        product.weight_group_stride = weight.group_stride();
        product.y_stride = groups * columns;
        product.y_group_stride = columns;
        product.y_bf16 = y_alone.data();
        ASSERT_EQ(cuda::Gemm(product, nullptr), cudaSuccess);
        product.y_bf16 = y_beside.data();
        const Appended beside(step);
        ASSERT_EQ(cuda::LatentAppendBeside(ParamsOf(step, beside), product, nullptr), cudaSuccess);
        EXPECT_EQ(beside.blocks.Get(), alone.blocks.Get());
        EXPECT_TRUE(kernel_test::SameBits(gpu_test::ToFloat(beside.q_rope.Get()),
                                          gpu_test::ToFloat(alone.q_rope.Get())));
        EXPECT_TRUE(kernel_test::SameBits(gpu_test::ToFloat(y_beside.Get()),
                                          gpu_test::ToFloat(y_alone.Get())));
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
