// SPDX-License-Identifier: Apache-2.0
//
// Defends: a checkpoint file that is cut while it is mapped ends the worker with one line that names
// the file and the remedy. Regression: the process died of SIGBUS without a word.
#include "worker/checkpoint/bus_error.h"

#include <gtest/gtest.h>
#include <sys/mman.h>
#include <unistd.h>

#include <string>

#include "tests/worker/checkpoint/fixture.h"
#include "worker/checkpoint/safetensors.h"

namespace strait {
namespace {

using strait::testing::FreshDir;
using strait::testing::Safetensors;
using strait::testing::WriteText;

// Reads the last byte of a tensor after its file was cut.
void ReadWhatWasCut(const std::string& path) {
  InstallBusErrorHandler();
  auto file = SafetensorsFile::Open(path);
  if (!file.ok() || truncate(path.c_str(), 4096) != 0) _exit(1);
  const TensorEntry* entry = (*file)->Find("w");
  const volatile std::byte* data = (*file)->Data(*entry);
  (void)data[entry->bytes - 1];
}

TEST(BusErrorTest, ACutFileIsNamed) {
  const std::string path = FreshDir() + "/model.safetensors";
  const uint64_t count = 100'000;
  WriteText(path, Safetensors({{"w", {"U8", {count}, std::string(count, 'x')}}}));
  EXPECT_EXIT(ReadWhatWasCut(path), ::testing::ExitedWithCode(kExitMappedFileFailed),
              "the checkpoint file .*/model.safetensors cannot be read at byte [0-9]+ of the "
              "[0-9]+ that it had .* Put the whole file back");
}

TEST(BusErrorTest, AFileThatWasClosedIsNotBlamed) {
  const std::string dir = FreshDir();
  WriteText(dir + "/other", std::string(4096, 'x'));
  EXPECT_EXIT(
      {
        InstallBusErrorHandler();
        FILE* file = fopen((dir + "/other").c_str(), "r+");
        void* data = mmap(nullptr, 8192, PROT_READ, MAP_SHARED, fileno(file), 0);
        { const WatchedMapping closed(static_cast<std::byte*>(data), 8192, "closed"); }
        (void)static_cast<volatile std::byte*>(data)[8191];
      },
      ::testing::KilledBySignal(SIGBUS), "bus error in memory that maps no checkpoint file");
}

TEST(BusErrorTest, MappingsBeyondTheTableAreTakenAllTheSame) {
  std::vector<std::unique_ptr<WatchedMapping>> many;
  std::byte byte{};
  for (int i = 0; i < 5000; ++i) {
    many.push_back(std::make_unique<WatchedMapping>(&byte, 1, "many"));
  }
  many.clear();
  const std::string path = FreshDir() + "/model.safetensors";
  WriteText(path, Safetensors({{"w", {"U8", {100'000}, std::string(100'000, 'x')}}}));
  EXPECT_EXIT(ReadWhatWasCut(path), ::testing::ExitedWithCode(kExitMappedFileFailed), "model");
}

}  // namespace
}  // namespace strait
