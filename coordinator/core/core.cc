// SPDX-License-Identifier: Apache-2.0
#include "coordinator/core/core.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "coordinator/core/admission.h"
#include "coordinator/core/router.h"
#include "coordinator/core/state.h"
#include "proto/base/check.h"
#include "proto/base/limits.h"
#include "proto/base/status_macros.h"

namespace strait {
namespace {

absl::Status CheckOption(const char* name, uint64_t value, uint64_t least, uint64_t most) {
  if (value >= least && value <= most) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(name, " is ", value, ", it must be ", least, " to ", most));
}

}  // namespace

absl::Status ValidateOptions(const CoreOptions& options, const ModelShape& model) {
  const uint64_t num_layers = model.layer_weight_bytes.size();
  STRAIT_RETURN_IF_ERROR(CheckOption("--pipelines", options.num_pipelines, 1, limits::kMaxWorkers));
  STRAIT_RETURN_IF_ERROR(CheckOption(
      "--stages (of strait up: --workers over --pipelines; a stage has a layer at least)",
      options.num_stages, 1, std::min<uint64_t>(num_layers, limits::kMaxStagesPerPipeline)));
  STRAIT_RETURN_IF_ERROR(
      CheckOption("--max-step-tokens", options.max_step_tokens, 1, limits::kMaxStepTokens));
  STRAIT_RETURN_IF_ERROR(
      CheckOption("--prefill-chunk", options.prefill_chunk, 1, limits::kMaxStepTokens));
  // Every resident may have to be closed in one step.
  STRAIT_RETURN_IF_ERROR(
      CheckOption("--max-running", options.max_running, 1, limits::kMaxStepSequences));
  STRAIT_RETURN_IF_ERROR(CheckOption("--max-waiting", options.max_waiting, 1, 1u << 20));
  STRAIT_RETURN_IF_ERROR(
      CheckOption("steps_in_flight", options.steps_in_flight, 0, limits::kMaxStepsInFlight));
  STRAIT_RETURN_IF_ERROR(
      CheckOption("--grant-depth", options.grant_depth, 1, limits::kMaxGrantDepth));
  STRAIT_RETURN_IF_ERROR(CheckOption("--heartbeat-timeout, in microseconds,",
                                     options.heartbeat_timeout_us, 10'000, 3'600'000'000));
  for (const auto& [name, us] :
       {std::pair("--load-timeout, in microseconds,", options.load_timeout_us),
        std::pair("--step-timeout, in microseconds,", options.step_timeout_us),
        std::pair("--replay-timeout, in microseconds,", options.replay_timeout_us),
        std::pair("--migrate-timeout, in microseconds,", options.migrate_timeout_us),
        std::pair("--migrate-stall, in microseconds,", options.migrate_stall_us)}) {
    STRAIT_RETURN_IF_ERROR(CheckOption(name, us, 100'000, 86'400'000'000));
  }
  STRAIT_RETURN_IF_ERROR(CheckOption("--restore-timeout, in microseconds,",
                                     options.restore_timeout_us, 10'000, 3'600'000'000));
  STRAIT_RETURN_IF_ERROR(
      CheckOption("--spare-wait, in microseconds,", options.spare_wait_us, 0, 86'400'000'000));
  STRAIT_RETURN_IF_ERROR(CheckOption("--warm-spares", options.warm_spares, 0, limits::kMaxWorkers));
  STRAIT_RETURN_IF_ERROR(CheckOption("--migrate-pause, in microseconds,", options.migrate_pause_us,
                                     10'000, 86'400'000'000));
  STRAIT_RETURN_IF_ERROR(CheckOption("the model's vocab_size", model.vocab_size, 1, 1u << 31));
  STRAIT_RETURN_IF_ERROR(
      CheckOption("the model's max_positions", model.max_positions, 1, 1u << 30));
  STRAIT_RETURN_IF_ERROR(CheckOption("the model's block_bytes", model.block_bytes, 1, 1u << 30));
  return CheckOption("the number of end-of-sequence ids", model.eos_token_ids.size(), 0,
                     limits::kMaxStopTokens);
}

Core::Core(CoreOptions options, ModelShape model)
    : state_(std::make_unique<State>(std::move(options), std::move(model))) {}
Core::~Core() = default;

Core::State::State(CoreOptions core_options, ModelShape model)
    : context{std::move(core_options), std::move(model), {}, {}},
      journal(&context),
      cluster(&context, &journal),
      migrations(&context, &journal, &cluster),
      draining(&context, &journal, &cluster, &migrations) {
  const absl::Status valid = ValidateOptions(context.options, context.model);
  STRAIT_CHECK(valid.ok(), "ValidateOptions comes first");
}

// ---------------------------------------------------------------- events

void Core::OnWorkerAttached(WorkerId worker, const v1::Hello& hello, uint64_t now_us) {
  now_us = state_->Awake(now_us);
  state_->cluster.OnAttached(worker, hello, now_us);
  state_->WatchPipelines(now_us);
}

void Core::OnWorkerMessage(WorkerId worker, const v1::FromWorker& message, uint64_t now_us) {
  now_us = state_->Awake(now_us);
  state_->cluster.OnMessage(worker, message, now_us);
  state_->migrations.OnMessage(worker, message, now_us);
  state_->draining.OnMessage(worker, message, now_us);
  state_->WatchPipelines(now_us);
}

void Core::OnWorkerLost(WorkerId worker, absl::Status why, uint64_t now_us) {
  now_us = state_->Awake(now_us);
  state_->cluster.OnLost(worker, why, now_us);
  state_->WatchPipelines(now_us);
}

void Core::OnSubmit(RequestId request, RequestSpec spec, uint64_t now_us) {
  now_us = state_->Awake(now_us);
  state_->WatchPipelines(now_us);
  const absl::Status status = state_->CheckSubmit(spec, now_us);
  if (!status.ok()) {
    ++state_->context.stats.requests_refused;
    state_->context.Send(RequestRefused{request, status});
    return;
  }
  state_->Admit(request, std::move(spec), now_us);
}

void Core::OnCancel(RequestId request, std::optional<uint32_t> sequence_index, uint64_t) {
  state_->EndRequest(request, sequence_index, FinishReason::kCancelled,
                     absl::CancelledError("cancelled by the client"));
}

void Core::OnScale(ScaleId id, ScaleSpec spec, uint64_t now_us) {
  if (!state_->migrations.moves().empty()) {
    state_->context.Send(ScaleAnswered{
        id,
        absl::FailedPreconditionError(absl::StrCat(state_->migrations.moves().size(),
                                                   " sequence(s) move; wait for the end of that")),
        {}});
    return;
  }
  if (state_->draining.IsBusy()) {
    state_->context.Send(ScaleAnswered{
        id,
        absl::FailedPreconditionError("a worker is being drained; wait for the end of that"),
        {}});
    return;
  }
  state_->cluster.OnScale(id, spec, state_->Awake(now_us));
}

void Core::OnMigrate(VerbId id, MigrateSpec spec, uint64_t now_us) {
  state_->migrations.OnMigrate(id, spec, state_->Awake(now_us));
}

void Core::OnDrain(VerbId id, DrainSpec spec, uint64_t now_us) {
  state_->draining.OnDrain(id, spec, state_->Awake(now_us));
}

void Core::OnFlush(uint64_t now_us) {
  state_->Awake(now_us);
  for (const auto& [id, pipeline] : state_->cluster.pipelines()) {
    if (pipeline->scheduler.started()) pipeline->scheduler.Flush();
  }
  state_->cluster.FlushReplicas();
}

void Core::OnTick(uint64_t now_us) {
  State& state = *state_;
  now_us = state.Awake(now_us);
  state.cluster.OnTick(now_us);
  state.WatchPipelines(now_us);
  while (Request* request = state.journal.Expired(now_us)) {
    state.EndRequest(request->id, std::nullopt, FinishReason::kError,
                     absl::DeadlineExceededError("the request's time is over"));
  }
  if (!state.GraceIsOver(now_us)) return;
  const std::map<SequenceId, Sequence*> waiting = state.journal.waiting();
  for (const auto& [id, sequence] : waiting) {
    state.journal.End(sequence, FinishReason::kError, std::nullopt, state.NoPipeline());
  }
}

std::vector<CoreMessage> Core::Take(uint64_t now_us) {
  State& state = *state_;
  now_us = state.Awake(now_us);
  state.cluster.Advance(now_us);
  if (state.draining.Advance(now_us)) state.cluster.Advance(now_us);
  // A step that closes sequences makes room, so placing and forming take turns until neither does
  // more. A move may go on when a plan is out.
  bool moved = state.migrations.Advance(now_us);
  for (bool formed = state.cluster.num_active() > 0; formed || moved;) {
    state.PlaceWaiting(now_us);
    formed = false;
    for (const auto& [id, pipeline] : state.cluster.pipelines()) {
      while (const std::optional<v1::StepPlan> plan = pipeline->scheduler.Form(now_us)) {
        state.cluster.SendStep(*pipeline, *plan);
        formed = true;
      }
    }
    moved = state.migrations.Advance(now_us);
  }
  state.cluster.AdvanceReplicas();
  return std::exchange(state.context.out, {});
}

// ---------------------------------------------------------------- what they do

uint64_t Core::State::AwakeAt(uint64_t now_us) const {
  const uint64_t gap_us = now_us - std::min(now_us, last_call_us);
  return awake_us + std::min({gap_us, kCallGapUs, context.options.heartbeat_timeout_us / 2});
}

uint64_t Core::State::Awake(uint64_t now_us) {
  awake_us = AwakeAt(now_us);
  last_call_us = std::max(last_call_us, now_us);
  return awake_us;
}

void Core::State::WatchPipelines(uint64_t now_us) {
  if (cluster.num_active() > 0) {
    no_pipeline_since_us.reset();
  } else if (!no_pipeline_since_us) {
    no_pipeline_since_us = now_us;
  }
}

bool Core::State::GraceIsOver(uint64_t now_us) const {
  return no_pipeline_since_us &&
         now_us >= *no_pipeline_since_us + context.options.no_pipeline_grace_us;
}

absl::Status Core::State::NoPipeline() const {
  return absl::UnavailableError(absl::StrCat("no pipeline serves: ", cluster.WhyNoPipeline()));
}

absl::Status Core::State::CheckSubmit(const RequestSpec& spec, uint64_t now_us) const {
  STRAIT_RETURN_IF_ERROR(CheckRequest(spec, context.model));
  if (spec.sequences.size() > context.options.max_waiting) {
    return absl::InvalidArgumentError(absl::StrCat(
        "the request has ", spec.sequences.size(),
        " sequences (prompts times n), this server takes at most ", context.options.max_waiting));
  }
  if (cluster.num_active() == 0 && (cluster.pipelines().empty() || GraceIsOver(now_us))) {
    return NoPipeline();
  }
  STRAIT_RETURN_IF_ERROR(CheckFits(spec, cluster.capacity_rows()));
  const size_t waiting = journal.waiting().size();
  if (waiting + spec.sequences.size() > context.options.max_waiting) {
    return absl::ResourceExhaustedError(
        absl::StrCat(waiting, " sequences wait and ", spec.sequences.size(),
                     " more were asked for, max_waiting is ", context.options.max_waiting));
  }
  return absl::OkStatus();
}

void Core::State::Admit(RequestId id, RequestSpec spec, uint64_t now_us) {
  const uint64_t timeout_us =
      spec.timeout_us > 0 ? spec.timeout_us : context.options.request_timeout_us;
  const Request* request = journal.Admit(id, std::move(spec), now_us + timeout_us);
  std::vector<Sequence*> nothing_to_do;
  for (const auto& sequence : request->sequences) {
    const bool scores = sequence->spec.score_prompt && sequence->prompt_tokens > 1;
    if (sequence->score_only() && !scores) nothing_to_do.push_back(sequence.get());
  }
  for (Sequence* sequence : nothing_to_do) {
    journal.End(sequence, FinishReason::kLength, std::nullopt, absl::OkStatus());
  }
}

void Core::State::EndRequest(RequestId id, std::optional<uint32_t> sequence_index,
                             FinishReason reason, const absl::Status& status) {
  const Request* request = journal.Find(id);
  if (request == nullptr) return;
  std::vector<Sequence*> ending;
  for (const auto& sequence : request->sequences) {
    if (sequence == nullptr) continue;
    if (sequence_index && sequence->index != *sequence_index) continue;
    ending.push_back(sequence.get());
  }
  for (Sequence* sequence : ending) {
    Scheduler::DropEverywhere(sequence);
    journal.End(sequence, reason, std::nullopt, status);
  }
}

void Core::State::PlaceWaiting(uint64_t now_us) {
  std::vector<Pipeline*> active;
  for (const auto& [id, pipeline] : cluster.pipelines()) {
    if (pipeline->scheduler.started()) active.push_back(pipeline.get());
  }
  std::vector<RouteCandidate> candidates(active.size());
  std::vector<Scheduler::Prospect> prospects(active.size());
  const auto& waiting = journal.waiting();
  for (auto it = waiting.begin(); it != waiting.end();) {
    Sequence* sequence = it->second;
    ++it;
    // Preempted with a token under way: it is next, a moment later.
    if (sequence->home() != nullptr) return;
    if (cluster.BeginsWithCopies(sequence, now_us)) continue;
    if (sequence->awaits &&
        std::any_of(active.begin(), active.end(), [sequence](Pipeline* pipeline) {
          return pipeline->scheduler.Await(*sequence->awaits);
        })) {
      continue;
    }
    sequence->awaits.reset();
    bool held_by_any = false;
    // Who drains gets nobody, unless there is no other.
    const bool held_by_open =
        std::any_of(active.begin(), active.end(), [&](const Pipeline* pipeline) {
          return !cluster.IsClosed(*pipeline) && pipeline->scheduler.CanEverHold(*sequence);
        });
    for (size_t i = 0; i < active.size(); ++i) {
      Scheduler& scheduler = active[i]->scheduler;
      held_by_any = held_by_any || scheduler.CanEverHold(*sequence);
      prospects[i] = scheduler.Look(sequence);
      const uint32_t known =
          prospects[i].cached_rows + prospects[i].host_rows + prospects[i].promised_rows;
      const bool is_open = !held_by_open || !cluster.IsClosed(*active[i]);
      candidates[i] = {is_open && scheduler.HasRoom(sequence, prospects[i]),
                       scheduler.load() + (sequence->rows_wanted() - known), scheduler.free_rows()};
    }
    if (const std::optional<size_t> choice = ChoosePipeline(candidates)) {
      if (prospects[*choice].promised_rows > 0) {
        sequence->awaits = prospects[*choice].promised;
        active[*choice]->scheduler.Await(*sequence->awaits);
        continue;  // others may pass
      }
      active[*choice]->scheduler.Place(sequence);
    } else if (held_by_any) {
      return;  // first come, first served
    } else if (cluster.pipelines().size() == context.options.num_pipelines &&
               sequence->rows_max() > cluster.capacity_rows()) {
      journal.End(sequence, FinishReason::kError, std::nullopt,
                  absl::ResourceExhaustedError(absl::StrCat(
                      "the sequence may grow to ", sequence->rows_max(),
                      " rows; since its pipeline was put together anew, the roomiest has ",
                      cluster.capacity_rows())));
    }
    // Else a pipeline that does not serve now can hold it: others may pass.
  }
}

// ---------------------------------------------------------------- what others may ask

std::optional<ChangeUnderWay> Core::Change() const { return state_->cluster.Change(); }

bool Core::Ready() const { return state_->cluster.num_active() > 0; }

CoreStats Core::Stats() const {
  CoreStats stats = state_->context.stats;
  stats.waiting = static_cast<uint32_t>(state_->journal.waiting().size());
  stats.pipelines_active = state_->cluster.num_active();
  for (const auto& [id, pipeline] : state_->cluster.pipelines()) {
    const Scheduler& scheduler = pipeline->scheduler;
    stats.running += scheduler.num_residents();
    stats.cache_bytes_free_prefixes += scheduler.prefix_bytes(scheduler.num_unheld_prefix_blocks());
    stats.host_bytes_used += scheduler.prefix_bytes(scheduler.num_prefix_blocks_on_host());
    stats.host_bytes_total += scheduler.prefix_bytes(scheduler.host_blocks());
    for (const StageCache& stage : scheduler.stages()) {
      stats.cache_bytes_used += stage.held_bytes;
      stats.cache_bytes_total += stage.capacity_bytes;
    }
  }
  return stats;
}

absl::Status Core::CheckIntegrity() const {
  STRAIT_RETURN_IF_ERROR(state_->journal.CheckIntegrity());
  STRAIT_RETURN_IF_ERROR(state_->cluster.CheckIntegrity());
  STRAIT_RETURN_IF_ERROR(state_->migrations.CheckIntegrity());
  STRAIT_RETURN_IF_ERROR(state_->draining.CheckIntegrity());
  const CoreStats stats = Stats();
  if (stats.running + stats.waiting != state_->journal.num_sequences()) {
    return absl::InternalError(absl::StrCat(stats.running, " sequences run and ", stats.waiting,
                                            " wait, of ", state_->journal.num_sequences()));
  }
  return absl::OkStatus();
}

}  // namespace strait
