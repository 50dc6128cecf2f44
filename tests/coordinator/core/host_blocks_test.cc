// SPDX-License-Identifier: Apache-2.0
//
// Defends: what the prefix index says of blocks in host memory is what was done with them, and a worker that tells of
// blocks which nobody asked for is evicted with a sentence. (What becomes of sequences: tests/sim.)
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "coordinator/core/prefix_index.h"
#include "tests/coordinator/core/harness.h"

namespace strait {
namespace {

using testing::HasSubstr;

constexpr uint64_t kMemory = 200'000;

class PrefixesOnHostTest : public testing::Test {
 protected:
  PrefixesOnHostTest() {
    index_.Start(2);
    for (uint32_t block = 0; block < 3; ++block) {
      path_.push_back(index_.Add(Key(block), block == 0 ? nullptr : path_.back(), block));
      index_.SetWhole(path_.back());
      index_.Hold(path_.back());
    }
  }
  static ContentKey Key(uint64_t n) { return {n + 1, 1}; }
  void Leave() {
    for (size_t i = path_.size(); i-- > 0;) index_.Leave(path_[i]);
  }
  void ExpectSound() {
    const absl::Status sound = index_.CheckIntegrity({});
    EXPECT_TRUE(sound.ok()) << sound;
  }

  PrefixIndex index_;
  std::vector<PrefixIndex::Node*> path_;
};

TEST_F(PrefixesOnHostTest, TheDeepestGoesFirstAndComesBackLast) {
  Leave();
  for (size_t i = 3; i-- > 0;) {
    ASSERT_EQ(index_.Oldest(), path_[i]);
    index_.ToHost(path_[i]);
    ExpectSound();
  }
  EXPECT_EQ(index_.num_on_host(), 3u);
  EXPECT_EQ(index_.num_on(0) + index_.num_on(1), 0u);
  EXPECT_EQ(index_.OldestOnHost(), path_[2]);
  EXPECT_TRUE(PrefixIndex::IsOlder(*path_[2], *path_[0]));
  index_.Return(path_[0]);
  ExpectSound();
  EXPECT_TRUE(path_[0]->whole() && path_[0]->returning);
  EXPECT_EQ(index_.num_on_host(), 3u);
  EXPECT_TRUE(index_.AnswerDue(Key(0), 0) && index_.AnswerDue(Key(0), 1));
  EXPECT_FALSE(index_.Answer(Key(0), 1));
  EXPECT_FALSE(index_.AnswerDue(Key(0), 1));
  EXPECT_TRUE(index_.Answer(Key(0), 0));
  index_.LeaveHost(path_[0]);
  ExpectSound();
  EXPECT_EQ(index_.num_on_host(), 2u);
  EXPECT_EQ(index_.Oldest(), path_[0]);
}

TEST_F(PrefixesOnHostTest, WhatHadToLeaveAgainWaitsForTheAnswers) {
  Leave();
  for (size_t i = 3; i-- > 0;) index_.ToHost(path_[i]);
  index_.Return(path_[0]);
  index_.ToHost(path_[0]);
  ExpectSound();
  EXPECT_TRUE(path_[0]->only_on_host());
  EXPECT_TRUE(index_.AnswerDue(Key(0))) << "it cannot return a second time before that";
  // Answers come though it is gone for good.
  for (size_t i = 3; i-- > 0;) index_.Remove(path_[i]);
  ExpectSound();
  EXPECT_EQ(index_.num_on_host(), 0u);
  EXPECT_FALSE(index_.Answer(Key(0), 0));
  EXPECT_TRUE(index_.Answer(Key(0), 1));
}

struct Lie {
  const char* what;
  bool late;  // of an epoch before
  void (*tell)(v1::PrefixesMoved* moved);
  const char* sentence;  // null: it is ignored
};

TEST(HostBlocksTest, WhoTellsWhatNobodyAskedForIsEvicted) {
  const Lie lies[] = {
      {"returned", false, [](auto* m) { m->set_returned(std::string(kContentKeyBytes, 'k')); },
       "moved, which was not to return there"},
      {"lost", false, [](auto* m) { m->set_lost(std::string(kContentKeyBytes, 'k')); },
       "moved, which was not to return there"},
      {"half a key", false, [](auto* m) { m->set_lost("half"); }, "16"},
      {"another stage", false, [](auto* m) { m->set_stage_id(99); }, "which is in no epoch"},
      {"a later epoch", false, [](auto* m) { m->mutable_epoch()->set_counter(77); },
       "that nobody asked for"},
      {"late", true, [](auto* m) { m->set_lost(std::string(kContentKeyBytes, 'k')); }, nullptr},
      {"bytes alone", false, [](auto* m) { m->set_copied_bytes(5); }, nullptr},
  };
  for (const Lie& lie : lies) {
    SCOPED_TRACE(lie.what);
    CoreOptions options;
    options.prefix_cache = true;
    Harness h(options, SmallModel());
    v1::Hello hello = h.MakeHello(kMemory);
    hello.set_host_cache_bytes(1 << 20);
    const WorkerId worker = h.Attach(hello);
    ASSERT_TRUE(h.core.Ready());
    EXPECT_EQ(h.StageOf(worker).activate.host_blocks(), (1u << 20) / (4 * 128));
    EXPECT_EQ(h.core.Stats().host_bytes_total, 1u << 20);
    v1::FromWorker message;
    v1::PrefixesMoved* moved = message.mutable_prefixes_moved();
    moved->set_stage_id(h.StageOf(worker).load.stage_id());
    *moved->mutable_epoch() = h.StageOf(worker).activate.epoch();
    lie.tell(moved);
    if (lie.late) moved->mutable_epoch()->set_counter(0);
    h.core.OnWorkerMessage(worker, message, h.now_us);
    h.Pump();
    EXPECT_EQ(h.workers.at(worker).evicted, lie.sentence != nullptr);
    if (lie.sentence != nullptr) {
      EXPECT_THAT(h.workers.at(worker).why.ToString(), HasSubstr(lie.sentence));
    }
  }
}

TEST(HostBlocksTest, ReplayTakesNoHostMemory) {
  CoreOptions options;
  options.preempt = PreemptMode::kReplay;
  Harness h(options, SmallModel());
  v1::Hello hello = h.MakeHello(kMemory);
  hello.set_host_cache_bytes(1 << 20);
  const WorkerId worker = h.Attach(hello);
  EXPECT_EQ(h.StageOf(worker).activate.host_blocks(), 0u);
  EXPECT_EQ(h.core.Stats().host_bytes_total, 0u);
}

}  // namespace
}  // namespace strait
