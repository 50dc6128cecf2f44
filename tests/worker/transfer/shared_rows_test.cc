// SPDX-License-Identifier: Apache-2.0
//
// Defends: what is offered is memory that only its writer writes, until it has left or is dead; what is not what it says is
// refused before it is mapped; and whichever end is killed, the other one goes on.
#include "worker/transfer/shared_rows.h"

#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace strait {
namespace {

using testing::HasSubstr;

constexpr uint64_t kBytes = 3 * kSharedUnitBytes - 100;
constexpr uint64_t kUnits = 3 * kSharedUnitBytes;

std::shared_ptr<SharedRegion> MakeRegion() {
  auto region = SharedRegion::Create({});
  EXPECT_TRUE(region.ok()) << region.status();
  return *region;
}
std::shared_ptr<MappedRegion> MapOf(const SharedPlace& place) {
  auto region = MappedRegion::Map(place, {});
  EXPECT_TRUE(region.ok()) << region.status();
  return *region;
}
void Fill(const LentRows& rows, int value) {
  std::memset(rows.memory.data(), value, rows.memory.size());
}

// A process of its own. It waits for a byte where it likes, and is killed at the end.
class Child {
 public:
  explicit Child(const std::function<void(Child*)>& run) {
    EXPECT_EQ(pipe(to_), 0);
    EXPECT_EQ(pipe(from_), 0);
    id = fork();
    if (id != 0) return;
    run(this);
    _exit(0);
  }
  ~Child() {
    Kill();
    for (const int file : {to_[0], to_[1], from_[0], from_[1]}) close(file);
  }
  void Kill() {
    if (id == 0) return;
    kill(id, SIGKILL);
    waitpid(id, nullptr, 0);
    id = 0;
  }
  // The test's side.
  template <class T>
  T Hear() {
    T told;
    EXPECT_EQ(read(from_[0], &told, sizeof(told)), static_cast<ssize_t>(sizeof(told)));
    return told;
  }
  void GoOn() { EXPECT_EQ(write(to_[1], "x", 1), 1); }
  // The child's.
  template <class T>
  void Tell(const T& what) {
    if (write(from_[1], &what, sizeof(what)) != static_cast<ssize_t>(sizeof(what))) _exit(1);
  }
  void Wait() {
    char any;
    if (read(to_[0], &any, 1) != 1) _exit(1);
  }
  pid_t id = 0;

 private:
  int to_[2] = {-1, -1};
  int from_[2] = {-1, -1};
};

TEST(SharedRowsTest, WhatOneEndWritesTheOtherReads) {
  const auto region = MakeRegion();
  auto offer = region->Make(kBytes);
  ASSERT_NE(offer, nullptr);
  EXPECT_EQ(region->used_bytes(), kUnits);
  const auto mapped = MapOf(offer->place());
  auto written = mapped->Write(offer->place(), kBytes);
  ASSERT_TRUE(written.ok()) << written.status();
  ASSERT_EQ(written->memory.size(), kBytes);
  Fill(*written, 7);
  *written = {};
  auto rows = offer->Take(kBytes);
  ASSERT_TRUE(rows.ok()) << rows.status();
  offer.reset();
  EXPECT_NE(rows->memory.data(), written->memory.data());
  EXPECT_EQ(rows->memory.size(), kBytes);
  for (const std::byte byte : rows->memory) ASSERT_EQ(byte, std::byte{7});
  EXPECT_EQ(region->used_bytes(), kUnits);
  *rows = {};
  EXPECT_EQ(region->used_bytes(), 0u);
}

TEST(SharedRowsTest, AnOfferThatLiesIsNotMapped) {
  const auto region = MakeRegion();
  const auto offer = region->Make(kBytes);
  const SharedPlace good = offer->place();
  const auto expect = [](const SharedPlace& place, const char* why) {
    const auto mapped = MappedRegion::Map(place, {});
    EXPECT_TRUE(absl::IsFailedPrecondition(mapped.status())) << mapped.status();
    EXPECT_THAT(std::string(mapped.status().message()), HasSubstr(why));
  };
  const auto of_file = [&](int file) {
    SharedPlace place = good;
    place.file = static_cast<uint32_t>(file);
    return place;
  };
  SharedPlace other = good;
  other.nonce_low ^= 1;
  expect(other, "not the one that was told of");
  other = good;
  other.nonce_high ^= 1;
  expect(other, "not the one that was told of");

  // The same bytes, in memory whose size is not sealed, or is another.
  const uint64_t bytes = internal::kSharedPageBytes + kSharedRowsBytes;
  const auto copy = [&](const char* name, uint64_t size, int seals) {
    const int file = memfd_create(name, MFD_ALLOW_SEALING);
    char page[internal::kSharedPageBytes];
    const int from = open(("/proc/self/fd/" + std::to_string(good.file)).c_str(), O_RDONLY);
    EXPECT_EQ(pread(from, page, sizeof(page), 0), static_cast<ssize_t>(sizeof(page)));
    EXPECT_EQ(pwrite(file, page, sizeof(page), 0), static_cast<ssize_t>(sizeof(page)));
    close(from);
    EXPECT_EQ(ftruncate(file, static_cast<off_t>(size)), 0);
    if (seals != 0) {
      EXPECT_EQ(fcntl(file, F_ADD_SEALS, seals), 0);
    }
    return file;
  };
  constexpr int kAll = F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL;
  std::vector<int> files = {copy("strait-rows", bytes, 0),
                            copy("strait-rows", bytes, F_SEAL_GROW | F_SEAL_SEAL),
                            copy("strait-rows", bytes - 4096, kAll),
                            copy("strait-rows", bytes + 4096, kAll),
                            copy("other", bytes, kAll),
                            copy("strait-rows", bytes, kAll)};
  expect(of_file(files[0]), "size is not sealed");
  expect(of_file(files[1]), "size is not sealed");
  expect(of_file(files[2]), "another size");
  expect(of_file(files[3]), "another size");
  expect(of_file(files[4]), "no memory for rows");
  // It is these checks that refused them.
  EXPECT_TRUE(MappedRegion::Map(of_file(files[5]), {}).ok());

  // What must not even be opened.
  int ends[2];
  ASSERT_EQ(pipe(ends), 0);
  expect(of_file(ends[0]), "no memory for rows");
  files.insert(files.end(), {ends[0], ends[1]});
  for (const int file : files) close(file);
  expect(of_file(files[0]), "No such file");

  Child child([](Child*) {});
  other = good;
  other.process_id = static_cast<uint32_t>(child.id);
  child.Kill();
  expect(other, "No such file");
}

TEST(SharedRowsTest, OnlyAPlaceThatIsOfferedIsWritten) {
  const auto region = MakeRegion();
  auto offer = region->Make(kBytes);
  const SharedPlace good = offer->place();
  const auto mapped = MapOf(good);
  SharedPlace bad = good;
  bad.index = kMaxSharedPlaces;
  EXPECT_TRUE(absl::IsInvalidArgument(mapped->Write(bad, kBytes).status()));
  bad = good;
  bad.offset = kSharedRowsBytes - kBytes + 1;
  EXPECT_TRUE(absl::IsInvalidArgument(mapped->Write(bad, kBytes).status()));
  bad.offset = ~uint64_t{0};
  EXPECT_TRUE(absl::IsInvalidArgument(mapped->Write(bad, kBytes).status()));
  bad = good;
  bad.bytes = ~uint64_t{0};
  EXPECT_TRUE(absl::IsInvalidArgument(mapped->Write(bad, kBytes).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(mapped->Write(good, kBytes + 1).status()));
  bad = good;
  ++bad.ticket;
  EXPECT_TRUE(absl::IsFailedPrecondition(mapped->Write(bad, kBytes).status()));
  {
    const auto writes = mapped->Write(good, kBytes);
    EXPECT_TRUE(writes.ok()) << writes.status();
    EXPECT_TRUE(absl::IsFailedPrecondition(mapped->Write(good, kBytes).status()));  // twice
    EXPECT_TRUE(absl::IsDataLoss(offer->Take(kBytes).status()));                    // it writes
  }
  EXPECT_TRUE(absl::IsFailedPrecondition(mapped->Write(good, kBytes).status()));
  EXPECT_TRUE(absl::IsDataLoss(offer->Take(kBytes + 1).status()));
  EXPECT_TRUE(offer->Take(kBytes).ok());

  // Nobody has written there.
  offer = region->Make(kBytes);
  EXPECT_TRUE(absl::IsDataLoss(offer->Take(kBytes).status()));
  // The next one has the same memory, and the old offer is worth nothing.
  const SharedPlace before = offer->place();
  offer.reset();
  EXPECT_EQ(region->used_bytes(), 0u);
  offer = region->Make(kBytes);
  EXPECT_EQ(offer->place().offset, before.offset);
  EXPECT_EQ(offer->place().index, before.index);
  EXPECT_TRUE(absl::IsFailedPrecondition(mapped->Write(before, kBytes).status()));
  EXPECT_TRUE(mapped->Write(offer->place(), kBytes).ok());
}

TEST(SharedRowsTest, APlaceThatIsGivenUpIsNobodysBeforeItsWriterLeaves) {
  const auto region = MakeRegion();
  auto offer = region->Make(kBytes);
  const SharedPlace late = offer->place();
  const auto mapped = MapOf(late);
  auto writes = mapped->Write(late, kBytes);
  ASSERT_TRUE(writes.ok());
  offer.reset();
  // All of the rest is handed out, and that is not.
  std::vector<std::unique_ptr<SharedRegion::Offer>> others;
  while (auto other = region->Make(kUnits)) {
    EXPECT_GE(other->place().offset, late.offset + kUnits);
    others.push_back(std::move(other));
  }
  EXPECT_EQ(others.size(), kMaxSharedPlaces - 1);
  Fill(*writes, 1);
  *writes = {};
  offer = region->Make(kBytes);
  ASSERT_NE(offer, nullptr);
  EXPECT_EQ(offer->place().offset, late.offset);
  EXPECT_NE(offer->place().ticket, late.ticket);
  others.clear();
  offer.reset();
  EXPECT_EQ(region->used_bytes(), 0u);
}

TEST(SharedRowsTest, AWriterThatHangsKeepsItsPlaceAndOneThatDiesDoesNot) {
  const auto region = MakeRegion();
  auto offer = region->Make(kBytes);
  const SharedPlace place = offer->place();
  Child child([&](Child* self) {
    const auto mapped = MappedRegion::Map(place, {});
    if (!mapped.ok()) _exit(1);
    const auto writes = (*mapped)->Write(place, kBytes);
    if (!writes.ok()) _exit(1);
    std::memset(writes->memory.data(), 3, kBytes / 2);
    self->Tell(true);
    self->Wait();
    for (;;) std::memset(writes->memory.data(), 4, kBytes);
  });
  ASSERT_TRUE(child.Hear<bool>());
  EXPECT_TRUE(absl::IsDataLoss(offer->Take(kBytes).status()));
  offer.reset();
  EXPECT_EQ(region->used_bytes(), kUnits);
  auto other = region->Make(kBytes);
  EXPECT_EQ(other->place().offset, place.offset + kUnits);
  child.GoOn();  // and it writes on
  const auto mapped = MapOf(other->place());
  for (int i = 0; i < 20; ++i) {
    auto writes = mapped->Write(other->place(), kBytes);
    ASSERT_TRUE(writes.ok()) << writes.status();
    Fill(*writes, i);
    *writes = {};
    const auto rows = other->Take(kBytes);
    ASSERT_TRUE(rows.ok());
    for (const std::byte byte : rows->memory) ASSERT_EQ(byte, std::byte(i));
    other = region->Make(kBytes);
  }
  EXPECT_EQ(region->used_bytes(), 2 * kUnits);
  other.reset();
  child.Kill();
  EXPECT_EQ(region->used_bytes(), 0u);
  EXPECT_EQ(region->Make(kBytes)->place().offset, place.offset);
}

TEST(SharedRowsTest, AnOwnerThatDiesTakesNoMemoryFromItsWriter) {
  Child child([](Child* self) {
    const auto region = SharedRegion::Create({});
    if (!region.ok()) _exit(1);
    const auto offer = (*region)->Make(kBytes);
    self->Tell(offer->place());
    self->Wait();
  });
  const auto place = child.Hear<SharedPlace>();
  const auto mapped = MapOf(place);
  EXPECT_TRUE(mapped->IsOffered());
  const auto writes = mapped->Write(place, kBytes);
  ASSERT_TRUE(writes.ok()) << writes.status();
  child.Kill();
  Fill(*writes, 9);  // pages that nobody had touched among them
  EXPECT_FALSE(mapped->IsOffered());
  EXPECT_TRUE(absl::IsFailedPrecondition(MappedRegion::Map(place, {}).status()));
}

TEST(SharedRowsTest, NoMoreIsOfferedThanThereIs) {
  const auto region = MakeRegion();
  EXPECT_EQ(region->Make(0), nullptr);
  EXPECT_EQ(region->Make(limits::kTransferFrameBytes + 1), nullptr);
  std::vector<std::unique_ptr<SharedRegion::Offer>> offers;
  while (auto offer = region->Make(limits::kTransferFrameBytes)) offers.push_back(std::move(offer));
  EXPECT_EQ(offers.size(), kSharedRowsBytes / limits::kTransferFrameBytes);
  EXPECT_EQ(region->used_bytes(), kSharedRowsBytes);
  EXPECT_EQ(region->Make(1), nullptr);
  offers[5].reset();
  EXPECT_NE(region->Make(1), nullptr);
  // Trim leaves what is in use alone.
  const auto mapped = MapOf(offers[0]->place());
  auto writes = mapped->Write(offers[0]->place(), 100);
  Fill(*writes, 5);
  *writes = {};
  region->Trim();
  {
    const auto rows = offers[0]->Take(100);
    ASSERT_TRUE(rows.ok());
    EXPECT_EQ(rows->memory.back(), std::byte{5});
  }
  offers.clear();
  const auto resident = [&] {
    std::vector<unsigned char> pages(kSharedRowsBytes / 4096);
    const int file = static_cast<int>(region->Make(1)->place().file);
    void* at = mmap(nullptr, kSharedRowsBytes, PROT_READ, MAP_SHARED, file, 4096);
    EXPECT_EQ(mincore(at, kSharedRowsBytes, pages.data()), 0);
    munmap(at, kSharedRowsBytes);
    return std::count_if(pages.begin(), pages.end(), [](unsigned char page) { return page & 1; });
  };
  EXPECT_GT(resident(), 0);
  region->Trim();
  EXPECT_EQ(resident(), 0);
}

TEST(SharedRowsTest, BothEndsLockTheRowsForAsLongAsTheyHaveThem) {
  std::vector<size_t> sizes;
  int locked = 0;
  const LockPages lock =
      [&](absl::Span<std::byte> memory) -> absl::StatusOr<std::shared_ptr<void>> {
    sizes.push_back(memory.size());
    ++locked;
    return std::shared_ptr<void>(memory.data(), [&](void*) { --locked; });
  };
  auto region = SharedRegion::Create(lock);
  ASSERT_TRUE(region.ok());
  auto offer = (*region)->Make(kBytes);
  auto mapped = MappedRegion::Map(offer->place(), lock);
  ASSERT_TRUE(mapped.ok());
  EXPECT_TRUE((*mapped)->is_locked());
  EXPECT_EQ(sizes, std::vector<size_t>({kSharedRowsBytes, kSharedRowsBytes}));
  EXPECT_EQ(locked, 2);
  auto writes = (*mapped)->Write(offer->place(), kBytes);
  ASSERT_TRUE(writes.ok());
  mapped->reset();
  region->reset();
  EXPECT_EQ(locked, 2);  // the offer and what is written have them
  *writes = {};
  offer.reset();
  EXPECT_EQ(locked, 0);

  const auto unlocked = SharedRegion::Create([](absl::Span<std::byte>) {
    return absl::StatusOr<std::shared_ptr<void>>(absl::ResourceExhaustedError("no"));
  });
  ASSERT_TRUE(unlocked.ok());
  EXPECT_NE((*unlocked)->Make(kBytes), nullptr);
}

}  // namespace
}  // namespace strait
