// SPDX-License-Identifier: Apache-2.0
//
// RunVerb is what the verbs with streamed answers (migrate, drain) do at the command line: reports as
// progress, the end in words. Ctrl-C detaches.
//
// Thread:  main. Returns the process's exit code (coordinator/cli/commands.h).
#pragma once

#include <cstdio>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "coordinator/cli/commands.h"
#include "coordinator/cli/terminal.h"
#include "coordinator/cli/verb_call.h"

namespace strait::cli {

// How a verb looks to who asked for it. ProgressText(line) says how far it is.
template <class Line>
struct VerbWords {
  const char* noun;         // "move"
  const char* after_error;  // behind how far a failed one came: "; it goes on where it was"
  std::function<double(const Line&)> share;  // of it that is done; negative: unknown
  std::function<std::string(const Line&)> done;
};

template <class Line>
using VerbCaller = std::function<absl::StatusOr<VerbOutcome<Line>>(
    HttpClient& client, const std::function<void(const Line&)>& on_report)>;

template <class Line>
int RunVerb(const OperatorFlags& flags, const VerbCaller<Line>& call,
            const VerbWords<Line>& words) {
  absl::StatusOr<Signals> signals = Signals::Create();
  if (!signals.ok()) return Fail(signals.status());
  absl::StatusOr<std::unique_ptr<HttpClient>> client = OperatorClient(flags, signals->fd());
  if (!client.ok()) return Fail(client.status());
  Terminal terminal;
  const absl::StatusOr<VerbOutcome<Line>> outcome = call(**client, [&](const Line& report) {
    terminal.Progress(ProgressText(report), words.share(report));
  });
  terminal.EndProgress();
  if (absl::IsCancelled(outcome.status())) {
    std::fprintf(stderr,
                 "strait: detached; if the %s had begun it goes on, and strait status shows it\n",
                 words.noun);
    return kExitCancelled;
  }
  if (!outcome.ok()) return Fail(outcome.status(), (*client)->url().Text());
  if (!outcome->done) {
    const Line& last = outcome->last;
    return Fail(absl::InternalError(
        last.event.empty()
            ? outcome->message
            : absl::StrCat(outcome->message, " (", ProgressText(last), words.after_error, ")")));
  }
  std::printf("%s\n", words.done(outcome->last).c_str());
  return 0;
}

}  // namespace strait::cli
