// SPDX-License-Identifier: Apache-2.0
//
// Defends: equal copies of a checkpoint have equal fingerprints, and whatever the fingerprint looks
// at (sampled bytes, names, dtypes, shapes, sizes, shards, seeds) changes it.
#include "worker/checkpoint/fingerprint.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <map>
#include <set>

#include "tests/worker/checkpoint/fixture.h"

namespace strait {
namespace {

using ::strait::testing::FreshDir;
using ::strait::testing::RawTensor;
using ::strait::testing::Safetensors;
using ::strait::testing::TinyConfig;
using ::strait::testing::WriteText;

class FingerprintTest : public ::testing::Test {
 protected:
  void SetUp() override { WriteText(dir_ + "/config.json", TinyConfig()); }
  uint64_t Of(const std::map<std::string, RawTensor>& tensors, size_t pad = 0) {
    WriteText(dir_ + "/model.safetensors", Safetensors(tensors, pad));
    const auto value = WeightsFingerprint(dir_);
    EXPECT_TRUE(value.ok()) << value.status();
    return value.value_or(0);
  }
  const std::string dir_ = FreshDir();
};

TEST_F(FingerprintTest, EqualFilesAgreeAndEveryDifferenceShows) {
  const std::string large(6 * kSampleBytes, 'x');
  const std::map<std::string, RawTensor> tensors = {
      {"large", {"U8", {large.size()}, large}}, {"small", {"BF16", {2, 2}, "12345678"}}};
  const uint64_t value = Of(tensors);
  EXPECT_EQ(Of(tensors), value);

  std::set<uint64_t> seen = {value};
  auto changed = tensors;
  for (const uint64_t at : {uint64_t{0}, kSampleBytes - 1, 3 * kSampleBytes, 4 * kSampleBytes - 1}) {
    changed = tensors;
    changed["large"].bytes[at] = 'y';
    EXPECT_TRUE(seen.insert(Of(changed)).second) << "byte " << at;
  }
  changed = tensors;
  changed["small"].bytes[7] = '9';
  EXPECT_TRUE(seen.insert(Of(changed)).second) << "small tensor";
  changed = tensors;
  changed["small"].shape = {4};
  EXPECT_TRUE(seen.insert(Of(changed)).second) << "shape";
  changed = tensors;
  changed["small"].dtype = "F16";
  EXPECT_TRUE(seen.insert(Of(changed)).second) << "dtype";
  changed = tensors;
  changed.erase("small");
  changed["smalm"] = tensors.at("small");
  EXPECT_TRUE(seen.insert(Of(changed)).second) << "name";
  EXPECT_TRUE(seen.insert(Of(tensors, 8)).second) << "file size";
}

TEST_F(FingerprintTest, EveryShardCountsAndMustBeThere) {
  WriteText(dir_ + "/model.safetensors.index.json",
            R"({"weight_map": {"a": "m-1.safetensors", "b": "m-2.safetensors"}})");
  WriteText(dir_ + "/m-1.safetensors", Safetensors({{"a", {"BF16", {1}, "11"}}}));
  EXPECT_EQ(WeightsFingerprint(dir_).status().code(), absl::StatusCode::kNotFound);
  WriteText(dir_ + "/m-2.safetensors", Safetensors({{"b", {"BF16", {1}, "22"}}}));
  const auto value = WeightsFingerprint(dir_);
  ASSERT_TRUE(value.ok()) << value.status();
  WriteText(dir_ + "/m-2.safetensors", Safetensors({{"b", {"BF16", {1}, "23"}}}));
  EXPECT_NE(*WeightsFingerprint(dir_), *value);
}

TEST(RandomWeightsFingerprintTest, IsOfTheSeed) {
  EXPECT_EQ(RandomWeightsFingerprint(7), RandomWeightsFingerprint(7));
  EXPECT_NE(RandomWeightsFingerprint(7), RandomWeightsFingerprint(8));
}

}  // namespace
}  // namespace strait
