// SPDX-License-Identifier: Apache-2.0
//
// Defends: whatever is wrong with a machine's GPU, the first thing that is wrong is told in a
// sentence that names it and the fix. Needs no GPU.
#include <gtest/gtest.h>

#include "kernels/cuda/device/device.h"

namespace strait::cuda {
namespace {

DriverFacts Usable() {
  DriverFacts facts;
  facts.driver_version = 13000;
  facts.runtime_version = 13000;
  facts.num_gpus = 2;
  facts.index = 1;
  facts.device.name = "NVIDIA H200";
  facts.device.compute_capability = 90;
  facts.build_archs = "sm_90a";
  return facts;
}

void ExpectSays(const DriverFacts& facts, std::initializer_list<const char*> parts) {
  const std::string why = WhyUnusable(facts);
  for (const char* part : parts)
    EXPECT_NE(why.find(part), std::string::npos) << part << ": " << why;
}

TEST(DeviceFactsTest, AUsableGpuHasNoProblem) { EXPECT_EQ(WhyUnusable(Usable()), ""); }

TEST(DeviceFactsTest, NoDriver) {
  DriverFacts facts = Usable();
  facts.driver_version = 0;
  facts.num_gpus = 0;
  ExpectSays(facts, {"no NVIDIA driver", "container"});
}

TEST(DeviceFactsTest, ADriverOfAnOlderMajorVersion) {
  DriverFacts facts = Usable();
  facts.driver_version = 12080;
  ExpectSays(facts, {"too old", "CUDA 12.8", "13.0 or newer", "update the driver"});
}

TEST(DeviceFactsTest, AnOlderDriverOfTheSameMajorVersionWillDo) {
  DriverFacts facts = Usable();
  facts.runtime_version = 13020;
  EXPECT_EQ(WhyUnusable(facts), "");
  facts.runtime_version = 12090;
  EXPECT_EQ(WhyUnusable(facts), "") << "a newer driver runs what is older";
}

TEST(DeviceFactsTest, NoGpu) {
  DriverFacts facts = Usable();
  facts.num_gpus = 0;
  ExpectSays(facts, {"no NVIDIA GPU", "CUDA_VISIBLE_DEVICES"});
}

TEST(DeviceFactsTest, CudaThatDoesNotStartIsNotTakenForNoGpu) {
  DriverFacts facts = Usable();
  facts.num_gpus = 0;
  facts.start_error = "initialization error";
  ExpectSays(facts, {"CUDA does not start", "initialization error"});
}

TEST(DeviceFactsTest, AnIndexThatIsNotThere) {
  DriverFacts facts = Usable();
  facts.index = 2;
  ExpectSays(facts, {"no GPU 2", "has 2, numbers 0 to 1", "--gpu"});
  facts.num_gpus = 1;
  ExpectSays(facts, {"no GPU 2", "has 1, number 0"});
  facts.index = -1;
  ExpectSays(facts, {"no GPU -1"});
}

TEST(DeviceFactsTest, AGpuThatAnotherProcessKeepsForItself) {
  DriverFacts facts = Usable();
  facts.use_error = "all CUDA-capable devices are busy or unavailable";
  ExpectSays(facts, {"GPU 1 cannot be used", "busy"});
}

TEST(DeviceFactsTest, ATooOldGpuIsRefusedBeforeItsMissingCodeIsBlamed) {
  DriverFacts facts = Usable();
  facts.device.name = "Tesla T4";
  facts.device.compute_capability = 75;
  facts.probe_error = "no kernel image";
  ExpectSays(facts, {"Tesla T4", "7.5", "need 8.0"});
}

TEST(DeviceFactsTest, AGpuThatTheBuildHasNoCodeFor) {
  DriverFacts facts = Usable();
  facts.device.name = "NVIDIA A100";
  facts.device.compute_capability = 80;
  facts.probe_error = "no kernel image is available";
  ExpectSays(facts, {"NVIDIA A100", "8.0", "sm_90a only", "no kernel image",
                     "-DSTRAIT_CUDA_ARCHITECTURES=80"});
}

TEST(DeviceFactsTest, ThisMachineIsLookedAtInThatOrder) {
  // With or without a GPU: an index that no machine has.
  const DriverFacts facts = LookAtDevice(1000);
  EXPECT_GT(facts.runtime_version, 12000);
  EXPECT_NE(WhyUnusable(facts), "");
  EXPECT_EQ(facts.device.name, "");
}

}  // namespace
}  // namespace strait::cuda
