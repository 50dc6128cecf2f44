// SPDX-License-Identifier: Apache-2.0
//
// Defends: a sequence is protected while copies of its blocks are anywhere that a stage would begin with, also where
// another sequence, or an earlier stay, had these blocks first; and gets its copies before what nobody has.
#include "tests/coordinator/core/replicas_fixture.h"

namespace strait {
namespace {

// One that generated the same tokens as another before it had no prefix blocks from there on, and no copies: it was
// unprotected for the rest of its life.
TEST_F(ReplicasTest, ASequenceOfTheSameTokensAsAnotherStaysProtected) {
  Start(Options(2), {kRoomy, kRoomy, 0});
  h_->token_at = [](uint64_t, uint32_t position) { return 10 + position * 7 % 83; };
  const RequestId first = h_->Submit(OneSequence(300, 200));
  Until(first, 10);
  const RequestId second = h_->Submit(OneSequence(300, 200));
  Until(second, 150);
  Until(first, 200);
  EXPECT_GE(ProtectedRows(), 448u) << "of the second";
  EXPECT_FALSE(IsUnprotected());
  h_->core.OnFlush(h_->now_us);
  EXPECT_GE(ProtectedRows(), 448u) << "it has the blocks itself";
  h_->Run();
  ExpectWhole(second, 2, 300, 200);
}

// It was told to be unprotected until its new pipeline had copies of its own, though those of the old one served as well.
TEST_F(ReplicasTest, CopiesOfItsOldPipelineProtectAMovedSequence) {
  Start(Options(1, 2), {0, 0, kRoomy, kRoomy});
  const RequestId request = h_->Submit(OneSequence(300, 300));
  Until(request, 10);
  const uint64_t at = HostOf(0, 1) == HostOfSequence(1) ? 1 : 2;
  ASSERT_EQ(ProtectedRows(), 256u);
  h_->answer_replicas = false;
  const VerbId verb = h_->Migrate(1, PipelineId{3 - at});
  Until(request, 30);
  ASSERT_TRUE(h_->verbs.contains(verb));
  ASSERT_TRUE(h_->verbs.at(verb).ok()) << h_->verbs.at(verb);
  EXPECT_EQ(ProtectedRows(), 256u);
  EXPECT_FALSE(IsUnprotected());
  const uint64_t replayed = h_->core.Stats().replayed_tokens;
  h_->Lose(HostOf(0, 3 - at));
  Until(request, 31);
  EXPECT_LE(h_->core.Stats().replayed_tokens - replayed, 127u);
  h_->answer_replicas = true;
  h_->Run();
  ExpectWhole(request, 1, 300, 300);
}

// A sequence waited for its copies behind those of all that had ended before it, and was unprotected meanwhile.
TEST_F(ReplicasTest, ANewBuddyIsToldFirstOfWhatSequencesHave) {
  Start(Options(1), {0, kRoomy, kRoomy});
  for (int i = 0; i < 30; ++i) {
    RequestSpec spec = OneSequence(300, 2);
    spec.sequences[0].cache_salt = std::to_string(i);
    h_->Submit(std::move(spec));
    h_->Run();
  }
  const RequestId request = h_->Submit(OneSequence(300, 60));
  h_->answer_replicas = false;
  Until(request, 30);
  WorkerId buddy;
  for (const auto& [id, worker] : h_->workers) {
    if (!worker.replicas.asked.empty()) buddy = id;
  }
  ASSERT_NE(buddy.value, 0u);
  h_->Lose(buddy);
  Rounds(3);
  size_t bytes = 0;
  for (const auto& [id, worker] : h_->workers) {
    for (const v1::Replicate& asked : worker.replicas.asked) bytes += asked.keys().size();
  }
  EXPECT_EQ(bytes / kContentKeyBytes, 5u) << "its own full blocks";
  h_->answer_replicas = true;
  h_->Run();
  ExpectWhole(request, 31, 300, 60);
}

}  // namespace
}  // namespace strait
