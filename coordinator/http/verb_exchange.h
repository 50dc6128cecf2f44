// SPDX-License-Identifier: Apache-2.0
//
// VerbExchange carries what the engine says of one elastic verb to the client that asked for it.
//
// Owns:    itself: the engine holds it until the verb has ended.
// Thread:  the engine's calls only enqueue; everything else runs in the Responder's posts.
// Errors:  before the first report: the status of ToVerbError and a JSON error; later: a last line
//          {"event":"error","error":{…}}.
// Limits:  one report waits at most: a newer one takes its place.
// Why:     a client that goes away only detaches. What moves is others' sequences, and half a move
//          is worth nothing.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <variant>

#include "coordinator/engine.h"
#include "coordinator/http/api_error.h"
#include "coordinator/http/completion_exchange.h"
#include "coordinator/http/message.h"
#include "coordinator/http/verb_request.h"

namespace strait {

class VerbExchange : public VerbListener, public std::enable_shared_from_this<VerbExchange> {
 public:
  VerbExchange(std::shared_ptr<ApiState> state, std::string route, std::string request_id,
               std::shared_ptr<Responder> responder);

  // One of the three, once.
  void Migrate(MigrateSpec spec);
  void Drain(DrainSpec spec);
  void Scale(ScaleRequest request);

  void OnMove(MoveReport report) override;
  void OnDrain(DrainReport report) override;
  void OnVerbEnd(absl::Status status) override;

 private:
  using Report = std::variant<MoveReport, DrainReport, ScaleReport>;
  struct Ended {
    absl::Status status;
    std::optional<ScaleOutcome> outcome;  // of a scale, but of no dry run
  };

  void Watch();  // the client
  void Post();   // under mu_
  void Take();   // what was posted for
  void Tell(const Report& report, std::string_view event);
  void Line(std::string line);
  void End(const Ended& ended);
  void Fail(const ApiError& error);
  void Abandoned(AbandonReason reason);
  void Finish(int status);
  HttpHeaders Headers() const;

  // Constant after construction.
  const std::shared_ptr<ApiState> state_;
  const std::string route_;
  const std::string request_id_;
  const std::shared_ptr<Responder> responder_;

  // Used in posts only.
  std::optional<Report> last_;  // that was told
  bool streams_ = true;         // a line for each report
  bool streaming_ = false;
  bool finished_ = false;

  std::mutex mu_;  // between the engine's thread and the posts; guards what follows
  std::optional<Report> report_;
  std::optional<Ended> ended_;
  bool posted_ = false;
  bool closed_ = false;  // nobody listens any more
};

}  // namespace strait
