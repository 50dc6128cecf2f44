// SPDX-License-Identifier: Apache-2.0
//
// Defends: no grain is lost or lent twice, whoever shares and cuts; used, padded and stranded bytes are
// those that the blocks themselves add up to; stranded and padded bytes stay under their goals; a cut
// moves nothing; the same calls give the same pieces.
#include "worker/cache/unit_pool.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "proto/model/reservation.h"

namespace strait {
namespace {

constexpr RowFormat kFormats[] = {RowFormat::kBf16, RowFormat::kFp8, RowFormat::kInt4};

// A block and what is written in its grains.
struct Held {
  UnitBlock block;
  uint64_t id = 0;  // the same of those that share
};

// What the pool must say of these blocks, from their pieces alone.
struct Sums {
  uint64_t used = 0;
  uint64_t padded = 0;
  uint64_t stranded = 0;
  uint32_t units = 0;
};

struct Mix {
  uint32_t rope;
  uint32_t max_rank;
  uint32_t num_units;
  bool cuts;
  bool shares;
};

// A random load that is always at the pool's end, and the bytes that belong to it: a number a grain.
class Load {
 public:
  Load(const Mix& mix, uint32_t seed)
      : mix_(mix),
        rng_(seed),
        pool_(mix.rope, mix.num_units),
        memory_(mix.num_units * kUnitGrains) {}

  void Step() {
    const uint32_t choice = Random(100);
    if (choice < 55 || held_.empty()) {
      Take();
    } else if (choice < 75) {
      if (mix_.cuts) Cut(&Any());
    } else if (choice < 85) {
      if (!mix_.shares || held_.size() > mix_.num_units) return;
      Held& other = Any();
      Held held{pool_.Share(other.block), other.id};
      if (Random(2) == 0) Cut(&held);
      held_.push_back(std::move(held));
      ++num_shares;
    } else {
      Give();
    }
  }

  void Take() {
    const BlockShape shape = {kFormats[Random(3)], (1 + Random(mix_.max_rank / 16)) * 16};
    std::optional<UnitBlock> block = pool_.Take(shape);
    if (!block && StrandedShare() > UnitPool::kMaxStrandedPercent / 100.0) {
      Compact();
      block = pool_.Take(shape);
    }
    if (!block) {
      // Nothing is left of the try, and little but whole blocks' bytes is in the way.
      ++num_refused;
      most_stranded = std::max(most_stranded, StrandedShare());
      most_padded =
          std::max(most_padded, double(pool_.padded_bytes()) / double(pool_.used_bytes()));
      EXPECT_LT(pool_.units_free() * uint64_t{UnitBytes(mix_.rope)},
                UnitBlockBytes(shape, mix_.rope));
      Give();
      return;
    }
    const uint64_t id = ++last_id_;
    uint64_t index = 0;
    ForGrains(*block, [&](uint32_t grain, uint32_t) { memory_[grain] = id << 16 | index++; });
    taken_bytes += UnitBlockBytes(shape, mix_.rope);
    held_.push_back({std::move(*block), id});
    ++num_takes;
  }

  void Cut(Held* held) {
    const uint32_t rank = (1 + Random(held->block.shape.rank / 16)) * 16;
    num_cuts += rank < held->block.shape.rank;
    pool_.Cut(&held->block, rank);
  }

  void Give() {
    if (held_.empty()) return;
    Held& held = Any();
    pool_.Give(std::move(held.block));
    if (&held != &held_.back()) held = std::move(held_.back());
    held_.pop_back();
  }

  void Compact() {
    const uint64_t stranded = pool_.stranded_bytes();
    const uint64_t used = pool_.used_bytes();
    const uint64_t padded = pool_.padded_bytes();
    std::vector<RunMove> moves;
    pool_.Compact(&moves);
    const uint64_t bytes = Move(moves);
    moved_bytes += bytes;
    ++num_compactions;
    EXPECT_LE(2 * bytes, 3 * stranded);
    EXPECT_LT(pool_.stranded_bytes(), UnitBytes(mix_.rope));
    EXPECT_EQ(pool_.used_bytes(), used);
    EXPECT_EQ(pool_.padded_bytes(), padded);
  }

  // Smaller by so many of the free units, and back.
  void Resize(uint32_t units) {
    units = std::min(units, pool_.units_free());
    std::vector<RunMove> moves;
    pool_.Narrow(mix_.num_units - units, &moves);
    Move(moves);
    pool_.DropNarrowed();
    EXPECT_EQ(pool_.size(), mix_.num_units - units);
    for (size_t g = size_t{pool_.size()} * kUnitGrains; g < memory_.size(); ++g) memory_[g] = 0;
    CheckAll();
    pool_.Grow(mix_.num_units);
  }

  void CheckAll() const {
    const absl::Status integrity = pool_.CheckIntegrity();
    ASSERT_TRUE(integrity.ok()) << integrity;
    const Sums due = SumsOf();
    ASSERT_EQ(pool_.used_bytes(), due.used);
    ASSERT_EQ(pool_.padded_bytes(), due.padded);
    ASSERT_EQ(pool_.stranded_bytes(), due.stranded);
    ASSERT_EQ(pool_.units_used(), due.units);
    for (const Held& held : held_) {
      uint64_t index = 0;
      ForGrains(held.block, [&](uint32_t grain, uint32_t) {
        ASSERT_EQ(memory_[grain], held.id << 16 | index++) << "a row is not where its block says";
      });
    }
  }

  double StrandedShare() const {
    return double(pool_.stranded_bytes()) / (double(pool_.size()) * UnitBytes(mix_.rope));
  }
  uint32_t Random(uint32_t below) { return static_cast<uint32_t>(rng_() % below); }
  UnitPool& pool() { return pool_; }
  std::vector<Held>& held() { return held_; }

  uint64_t num_takes = 0;
  uint64_t num_cuts = 0;
  uint64_t num_shares = 0;
  uint64_t num_refused = 0;
  uint64_t num_compactions = 0;
  uint64_t taken_bytes = 0;
  uint64_t moved_bytes = 0;
  double most_stranded = 0;
  double most_padded = 0;

 private:
  Held& Any() { return held_[Random(static_cast<uint32_t>(held_.size()))]; }

  uint64_t Move(const std::vector<RunMove>& moves) {
    uint64_t grains = 0;
    for (const RunMove& move : moves) {
      for (uint32_t g = 0; g < move.grains; ++g) {
        memory_[move.to + g] = std::exchange(memory_[move.from + g], 0);
      }
      grains += move.grains;
    }
    for (Held& held : held_) pool_.Follow(&held.block);
    return grains * GrainBytes(mix_.rope);
  }

  template <class Visit>  // with each grain and the bytes of rows in it
  void ForGrains(const UnitBlock& block, Visit visit) const {
    const BlockUnits layout(block.shape, mix_.rope);
    ASSERT_EQ(block.pieces.size(), layout.size());
    for (uint32_t i = 0; i < layout.size(); ++i) {
      ASSERT_EQ(block.pieces[i] % layout[i].grains, 0u);
      for (uint32_t g = 0; g < layout[i].grains; ++g) {
        const uint32_t bytes = layout[i].used_bytes - g * GrainBytes(mix_.rope);
        visit(block.pieces[i] + g, std::min(bytes, GrainBytes(mix_.rope)));
      }
    }
  }

  Sums SumsOf() const {
    std::vector<uint32_t> filled(memory_.size());  // the most bytes that a holder has in a grain
    for (const Held& held : held_) {
      ForGrains(held.block, [&](uint32_t grain, uint32_t bytes) {
        filled.at(grain) = std::max(filled[grain], bytes);
      });
    }
    Sums sums;
    for (size_t unit = 0; unit < filled.size(); unit += kUnitGrains) {
      uint64_t used = 0;
      for (size_t grain = unit; grain < unit + kUnitGrains; ++grain) {
        if (filled[grain] == 0) continue;
        used += GrainBytes(mix_.rope);
        sums.padded += GrainBytes(mix_.rope) - filled[grain];
      }
      sums.used += used;
      if (used > 0) sums.stranded += UnitBytes(mix_.rope) - used;
      sums.units += used > 0;
    }
    return sums;
  }

  const Mix mix_;
  std::mt19937 rng_;
  UnitPool pool_;
  std::vector<uint64_t> memory_;  // [grain]
  std::vector<Held> held_;
  uint64_t last_id_ = 0;
};

TEST(UnitPoolTest, SmallRunsShareAUnitAndMakeItWholeAgain) {
  UnitPool pool(64, 10);
  // One unit of key, six grains of columns.
  std::optional<UnitBlock> a = pool.Take({RowFormat::kBf16, 48});
  ASSERT_TRUE(a);
  EXPECT_EQ(a->pieces, (std::vector<uint32_t>{0, 8, 12}));
  EXPECT_EQ(pool.stranded_bytes(), 2048u);
  // Two grains go where two are free.
  std::optional<UnitBlock> b = pool.Take({RowFormat::kBf16, 16});
  EXPECT_EQ(b->pieces, (std::vector<uint32_t>{16, 14}));
  EXPECT_EQ(pool.stranded_bytes(), 0u);
  EXPECT_EQ(pool.used_bytes(), 3 * 8192u);
  pool.Give(std::move(*a));
  EXPECT_EQ(pool.stranded_bytes(), 6 * 1024u);
  EXPECT_EQ(pool.units_used(), 2u);
  pool.Give(std::move(*b));
  EXPECT_EQ(pool.stranded_bytes(), 0u);
  EXPECT_EQ(pool.units_free(), 10u);
  EXPECT_TRUE(pool.CheckIntegrity().ok()) << pool.CheckIntegrity();
}

TEST(UnitPoolTest, TheFullestSplitUnitIsTakenFrom) {
  UnitPool pool(64, 20);
  const auto take = [&](uint32_t rank) { return pool.Take({RowFormat::kBf16, rank}).value(); };
  UnitBlock a = take(32);      // four grains of one unit
  UnitBlock fills = take(32);  // the other four
  UnitBlock b = take(48);      // six of another
  pool.Give(std::move(fills));
  EXPECT_EQ(take(16).pieces[1], b.pieces[2] + 2) << "not from the unit with four free";
  EXPECT_EQ(take(16).pieces[1], a.pieces[1] + 4);
}

TEST(UnitPoolTest, ACutLeavesTheHeadWhereItWas) {
  UnitPool pool(64, 20);
  UnitBlock block = pool.Take({RowFormat::kBf16, 512}).value();
  const std::vector<uint32_t> before = block.pieces;
  pool.Cut(&block, 56);  // seven grains
  EXPECT_EQ(block.pieces,
            (std::vector<uint32_t>{before[0], before[1], before[1] + 4, before[1] + 6}));
  EXPECT_EQ(pool.used_bytes(), 15 * 1024u);
  EXPECT_EQ(pool.stranded_bytes(), 1024u);
  pool.Cut(&block, 40);  // five: the run of two is cut, the last one goes
  EXPECT_EQ(block.pieces, (std::vector<uint32_t>{before[0], before[1], before[1] + 4}));
  EXPECT_EQ(pool.used_bytes(), 13 * 1024u);
  pool.Cut(&block, 40);
  EXPECT_EQ(pool.used_bytes(), 13 * 1024u);
  EXPECT_TRUE(pool.CheckIntegrity().ok()) << pool.CheckIntegrity();
  pool.Give(std::move(block));
  EXPECT_EQ(pool.units_free(), 20u);
}

TEST(UnitPoolTest, ACutOfASharedBlockLetsGoOfItsTailAlone) {
  UnitPool pool(64, 20);
  UnitBlock a = pool.Take({RowFormat::kInt4, 512}).value();
  const uint64_t whole = pool.used_bytes();
  UnitBlock b = pool.Share(a);
  EXPECT_EQ(pool.used_bytes(), whole) << "shared bytes count once";
  pool.Cut(&a, 48);
  EXPECT_EQ(pool.used_bytes(), whole);
  EXPECT_EQ(pool.padded_bytes(), 0u) << "the other one fills what this one leaves";
  UnitBlock c = pool.Share(a);
  pool.Give(std::move(b));
  // Key; a grain of scales, two of 32 columns each; one and a half grains of codes.
  EXPECT_EQ(pool.used_bytes(), 8192u + 1024 + 2048);
  EXPECT_EQ(pool.padded_bytes(), (1024u - 256) + 512);
  pool.Give(std::move(a));
  EXPECT_EQ(pool.padded_bytes(), (1024u - 256) + 512);
  pool.Give(std::move(c));
  EXPECT_EQ(pool.used_bytes(), 0u);
  EXPECT_EQ(pool.padded_bytes(), 0u);
  EXPECT_EQ(pool.units_free(), 20u);
}

// Nobody wants the small runs that these cuts leave free.
TEST(UnitPoolTest, TailsThatNobodyTakesAreMovedTogether) {
  UnitPool pool(64, 900);
  std::vector<UnitBlock> blocks;
  for (int i = 0; i < 100; ++i) blocks.push_back(pool.Take({RowFormat::kBf16, 512}).value());
  EXPECT_EQ(pool.units_free(), 0u);
  for (UnitBlock& block : blocks) pool.Cut(&block, 240);
  EXPECT_EQ(pool.stranded_bytes(), 100 * 2 * 1024u);
  EXPECT_EQ(pool.units_free(), 100 * 4u);
  std::vector<RunMove> moves;
  pool.Compact(&moves);
  // Six grains of each, in 75 units in place of 100.
  EXPECT_EQ(pool.stranded_bytes(), 0u);
  EXPECT_EQ(pool.units_free(), 100 * 4u + 25);
  uint64_t grains = 0;
  for (const RunMove& move : moves) grains += move.grains;
  EXPECT_LE(2 * grains, 3 * 200u);
  for (UnitBlock& block : blocks) pool.Follow(&block);
  EXPECT_TRUE(pool.CheckIntegrity().ok()) << pool.CheckIntegrity();
  for (UnitBlock& block : blocks) pool.Give(std::move(block));
  EXPECT_EQ(pool.units_free(), 900u);
}

TEST(UnitPoolTest, AWholeBlockOrNothing) {
  UnitPool pool(64, 12);
  UnitBlock a = pool.Take({RowFormat::kBf16, 304}).value();  // six units
  EXPECT_FALSE(pool.Take({RowFormat::kBf16, 512}));
  EXPECT_FALSE(pool.Take({RowFormat::kBf16, 400}));
  EXPECT_TRUE(pool.CheckIntegrity().ok()) << pool.CheckIntegrity();
  EXPECT_EQ(pool.used_bytes(), BlockBytes(RowFormat::kBf16, 304, 64));
  // The failed ones left the same units first in turn.
  EXPECT_EQ(pool.Take({RowFormat::kBf16, 128})->pieces, (std::vector<uint32_t>{48, 56, 64}));
}

TEST(UnitPoolTest, GrowsAndNarrowsAroundItsBlocks) {
  UnitPool pool(16, 4);
  UnitBlock a = pool.Take({RowFormat::kBf16, 32}).value();
  pool.Grow(8);
  UnitBlock b =
      pool.Take({RowFormat::kInt4, 16}).value();  // the fourth unit, and three grains of a fifth
  UnitBlock shared = pool.Share(b);
  pool.Give(std::move(a));
  std::vector<RunMove> moves;
  pool.Narrow(3, &moves);
  ASSERT_EQ(moves.size(), 2u);
  EXPECT_EQ(moves[0].grains, kUnitGrains);
  EXPECT_DEATH(pool.DropNarrowed(), "did not follow");
  pool.Follow(&b);
  EXPECT_DEATH(pool.DropNarrowed(), "did not follow");
  pool.Follow(&shared);
  pool.DropNarrowed();
  EXPECT_EQ(pool.size(), 3u);
  EXPECT_EQ(b.pieces, shared.pieces);
  for (const uint32_t piece : b.pieces) EXPECT_LT(piece, 3 * kUnitGrains);
  EXPECT_TRUE(pool.CheckIntegrity().ok()) << pool.CheckIntegrity();
  EXPECT_DEATH(pool.Narrow(1, &moves), "more units are held");
}

TEST(UnitPoolDeathTest, ChecksItsCaller) {
  EXPECT_DEATH(UnitPool(24, 1), "no units");
  UnitPool pool(64, 20);
  UnitBlock block = pool.Take({RowFormat::kFp8, 256}).value();
  EXPECT_DEATH(pool.Cut(&block, 272), "does not widen");
  EXPECT_DEATH(pool.Cut(&block, 0), "does not widen");
  UnitBlock forged;
  forged.shape = block.shape;
  forged.pieces = block.pieces;
  pool.Give(std::move(block));
  EXPECT_DEATH(pool.Give(std::move(forged)), "given back twice");
}

class UnitPoolFuzzTest : public testing::TestWithParam<uint32_t> {};

// Every operation is checked, in a pool so small that blocks meet all the time.
TEST_P(UnitPoolFuzzTest, NoGrainIsLostOrLentTwice) {
  for (const Mix& mix : {Mix{64, 512, 60, true, true}, {16, 128, 60, true, true}}) {
    Load load(mix, GetParam());
    Load twin(mix, GetParam());
    for (int i = 0; i < 1500; ++i) {
      SCOPED_TRACE(testing::Message()
                   << "seed " << GetParam() << " step " << i << " rope " << mix.rope);
      for (Load* one : {&load, &twin}) {
        one->Step();
        if (i % 50 == 49) one->Compact();
        if (i % 70 == 69) one->Resize(one->Random(60));
      }
      load.CheckAll();
      if (HasFatalFailure()) return;
      ASSERT_EQ(load.held().size(), twin.held().size());
    }
    for (size_t i = 0; i < load.held().size(); ++i) {
      ASSERT_EQ(load.held()[i].block.pieces, twin.held()[i].block.pieces);
    }
    EXPECT_GT(load.num_shares, 0u);
    EXPECT_GT(load.num_refused, 0u);
    while (!load.held().empty()) load.Give();
    EXPECT_EQ(load.pool().used_bytes(), 0u);
    EXPECT_EQ(load.pool().units_free(), load.pool().size());
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, UnitPoolFuzzTest, testing::Range(1u, 7u));

class UnitPoolMillionTest : public testing::TestWithParam<Mix> {};

TEST_P(UnitPoolMillionTest, LittleIsStrandedOrPadded) {
  const Mix mix = GetParam();
  constexpr uint32_t kSeed = 1;
  Load load(mix, kSeed);
  for (int i = 0; i < 1'000'000; ++i) {
    load.Step();
    if (i % 50'000 == 0) load.CheckAll();
    if (HasFatalFailure()) FAIL() << "seed " << kSeed << " step " << i;
  }
  EXPECT_LE(load.most_stranded, UnitPool::kMaxStrandedPercent / 100.0);
  EXPECT_LE(load.most_padded, 0.05);
  EXPECT_GT(load.num_refused, 100'000u) << "the pool was not full";
  // Cuts are why runs are moved at all.
  if (!mix.cuts && !mix.shares) {
    EXPECT_EQ(load.num_compactions, 0u);
  }
  std::printf(
      "rope %u%s%s: %zu blocks in %u units; %zu takes, %zu cuts, %zu shares, %zu refusals; "
      "stranded at "
      "most %.2f %%, padded at most %.2f %%; %zu compactions moved %.2f %% of the bytes taken\n",
      mix.rope, mix.cuts ? ", cuts" : "", mix.shares ? ", shares" : "", load.held().size(),
      mix.num_units, size_t{load.num_takes}, size_t{load.num_cuts}, size_t{load.num_shares},
      size_t{load.num_refused}, 100 * load.most_stranded, 100 * load.most_padded,
      size_t{load.num_compactions}, 100 * double(load.moved_bytes) / double(load.taken_bytes));
  RecordProperty("stranded_most", std::to_string(load.most_stranded));
  RecordProperty("padded_most", std::to_string(load.most_padded));
  RecordProperty("moved_of_taken",
                 std::to_string(double(load.moved_bytes) / double(load.taken_bytes)));
  while (!load.held().empty()) load.Give();
  EXPECT_EQ(load.pool().used_bytes(), 0u);
  EXPECT_EQ(load.pool().padded_bytes(), 0u);
  EXPECT_EQ(load.pool().stranded_bytes(), 0u);
  EXPECT_EQ(load.pool().units_free(), load.pool().size());
  EXPECT_TRUE(load.pool().CheckIntegrity().ok()) << load.pool().CheckIntegrity();
}

INSTANTIATE_TEST_SUITE_P(Mixes, UnitPoolMillionTest,
                         testing::Values(Mix{64, 512, 20'000, true, true},
                                         Mix{16, 128, 20'000, true, true},
                                         Mix{64, 512, 20'000, false, false}),
                         [](const auto& info) {
                           return "Rope" + std::to_string(info.param.rope) +
                                  (info.param.cuts ? "Cuts" : "");
                         });

}  // namespace
}  // namespace strait
