// SPDX-License-Identifier: Apache-2.0
//
// StageRows says how many rows of one sequence each stage of a pipeline has, and cuts the next rows
// into chunks.
//
// Thread:  plain value.
// Why:     rows are planned by position: those below `next` are in every stage. What a stage kept
//          over an epoch may reach beyond; then rows go through its layers again for the sake of a
//          stage that lacks them, and through no stage behind the last of those. In each chunk a
//          stage has either all rows or none, so one number, replay_stages, says what all do.
#pragma once

#include <cstdint>
#include <vector>

namespace strait {

class StageRows {
 public:
  StageRows() = default;
  // What each stage kept. Planned next is the first row that one of them lacks.
  explicit StageRows(std::vector<uint32_t> kept);

  // Rows below are in every stage.
  uint32_t next() const { return next_; }
  // All stages have as many.
  bool even() const { return kept_.empty(); }
  uint32_t at(uint32_t stage_index) const;

  struct Chunk {
    uint32_t num_rows = 0;
    // As SequenceStep has it: the leading stages that it goes through; 0: all, and all store it.
    uint32_t replay_stages = 0;
    bool GoesThrough(uint32_t stage_index) const {
      return replay_stages == 0 || stage_index < replay_stages;
    }
  };
  // The next chunk, of at most `rows_max` rows. REQUIRES: rows_max > 0.
  Chunk Cut(uint32_t rows_max) const;
  // Whether the next chunk is new to the stage.
  bool Stores(uint32_t stage_index) const { return even() || kept_[stage_index] <= next_; }
  // The next chunk is planned. REQUIRES: `num_rows` is at most that of Cut.
  void Advance(uint32_t num_rows);

 private:
  void Even();

  uint32_t next_ = 0;
  std::vector<uint32_t> kept_;  // by stage; empty: none has more than next_
};

}  // namespace strait
