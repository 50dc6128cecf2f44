// SPDX-License-Identifier: Apache-2.0
//
// FakeEngine is an engine without workers: it answers with tokens from a script, when it is told
// to (Step) or from a thread of its own (Run).
//
// Thread:  any, synchronized inside; listeners are called outside the lock, one call at a time.
#pragma once

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "coordinator/engine.h"

namespace strait {

class FakeEngine : public Engine {
 public:
  // Constant while requests run.
  std::vector<TokenId> script;  // generated first; then 'a', 'b' … 'z', 'a' …
  std::optional<absl::Status> refusal;
  uint32_t cached = 0;   // tokens of every prompt that it says it had
  bool admit = true;     // false: requests stay in the queue
  bool generate = true;  // false: prefill never ends
  std::optional<std::pair<uint32_t, absl::Status>> failure;  // after so many tokens of a sequence
  bool ready = true;
  uint32_t context = 256;
  uint32_t vocab = 300;
  std::vector<TokenId> eos = {257};

  ~FakeEngine() override { StopThread(); }

  // Steps by itself from now on.
  void Run(std::chrono::microseconds step_time = std::chrono::microseconds(0)) {
    thread_ = std::thread([this, step_time] {
      while (true) {
        {
          std::unique_lock lock(mu_);
          changed_.wait(lock, [this] { return stop_ || !live_.empty(); });
          if (stop_) return;
        }
        Step();
        if (step_time.count() > 0) std::this_thread::sleep_for(step_time);
        // Nothing may move: do not burn the processor.
        if (!generate || !admit) std::this_thread::sleep_for(std::chrono::milliseconds(1));
      }
    });
  }
  void StopThread() {
    {
      std::lock_guard lock(mu_);
      stop_ = true;
      changed_.notify_all();
    }
    if (thread_.joinable()) thread_.join();
  }

  void Submit(RequestSpec request, std::shared_ptr<RequestListener> listener) override {
    std::lock_guard lock(mu_);
    const RequestId id{++last_id_};
    specs_.push_back(request);
    live_[id].spec = std::move(request);
    live_[id].listener = std::move(listener);
    live_[id].sequences.resize(live_[id].spec.sequences.size());
    changed_.notify_all();
  }

  void Cancel(RequestId id, std::optional<uint32_t> index) override {
    std::lock_guard lock(mu_);
    cancelled_.emplace_back(id, index);
    const auto found = live_.find(id);
    if (found == live_.end()) return;
    for (uint32_t i = 0; i < found->second.sequences.size(); ++i) {
      if (!index || *index == i) found->second.sequences[i].cancelled = true;
    }
    changed_.notify_all();
  }

  void Migrate(MigrateSpec spec, std::shared_ptr<VerbListener> listener) override {
    moves.emplace_back(std::move(spec), std::move(listener));
  }
  std::vector<std::pair<MigrateSpec, std::shared_ptr<VerbListener>>> moves;
  void Drain(DrainSpec spec, std::shared_ptr<VerbListener> listener) override {
    drains.emplace_back(std::move(spec), std::move(listener));
  }
  std::vector<std::pair<DrainSpec, std::shared_ptr<VerbListener>>> drains;
  struct AskedScale {
    ScaleSpec spec;
    ScaleProgress progress;
    ScaleDone done;
  };
  void Scale(ScaleSpec spec, ScaleProgress progress, ScaleDone done) override {
    scales.push_back({spec, std::move(progress), std::move(done)});
  }
  std::vector<AskedScale> scales;
  void Flush() override { ++num_flushed; }
  std::atomic<int> num_flushed = 0;

  bool Ready() const override { return ready; }
  uint32_t max_positions() const override { return context; }
  uint32_t vocab_size() const override { return vocab; }
  const std::vector<TokenId>& eos_token_ids() const override { return eos; }
  std::string StatusJson() const override { return "{\"fake\":true}"; }
  std::string MetricsText() const override { return "# HELP fake_up x\nfake_up 1\n"; }

  // One token for every live sequence. False: nothing lives.
  bool Step() {
    std::vector<RequestId> ids;
    {
      std::lock_guard lock(mu_);
      for (const auto& [id, request] : live_) ids.push_back(id);
    }
    for (const RequestId id : ids) StepRequest(id);
    return !ids.empty();
  }
  void StepAll() {
    while (Step()) {
    }
  }

  // What was asked, in order.
  std::vector<RequestSpec> specs() const {
    std::lock_guard lock(mu_);
    return specs_;
  }
  std::vector<std::pair<RequestId, std::optional<uint32_t>>> cancelled() const {
    std::lock_guard lock(mu_);
    return cancelled_;
  }
  size_t num_live() const {
    std::lock_guard lock(mu_);
    return live_.size();
  }

  static float Logprob(size_t generated) { return -0.1f * static_cast<float>(generated + 1); }
  static float PromptLogprob(size_t position) { return -0.3f * static_cast<float>(position); }

 private:
  struct Sequence {
    size_t generated = 0;
    bool cancelled = false;
    bool ended = false;
  };
  struct Request {
    RequestSpec spec;
    std::shared_ptr<RequestListener> listener;
    std::vector<Sequence> sequences;
    bool admitted = false;
  };

  static TokenInfo Info(size_t position, TokenId id, float logprob, uint32_t num_top) {
    TokenInfo info{static_cast<uint32_t>(position), id, logprob, {}};
    for (uint32_t i = 0; i < num_top; ++i) {
      info.top.emplace_back((id + i) % 256, logprob - static_cast<float>(i));
    }
    return info;
  }

  // Only one thread steps; the lock keeps Submit and Cancel out, and is not held in listeners.
  void StepRequest(RequestId id) {
    Request* request;
    {
      std::lock_guard lock(mu_);
      request = &live_.at(id);
    }
    if (refusal) {
      request->listener->OnRefused(*refusal);
      return Erase(id);
    }
    if (!request->admitted && admit) {
      request->admitted = true;
      request->listener->OnAdmitted(id);
      for (uint32_t i = 0; i < request->spec.sequences.size(); ++i) {
        if (cached > 0) request->listener->OnPromptCached(i, cached);
        Score(*request, i);
      }
    }
    size_t ended = 0;
    for (uint32_t i = 0; i < request->sequences.size(); ++i) {
      StepSequence(*request, i);
      ended += request->sequences[i].ended ? 1 : 0;
    }
    if (ended == request->sequences.size()) Erase(id);
  }

  void Score(Request& request, uint32_t index) {
    const SequenceSpec& spec = request.spec.sequences[index];
    if (!spec.score_prompt) return;
    // In two calls, as chunks come.
    for (size_t part = 0; part < 2; ++part) {
      const size_t middle = std::max<size_t>(1, spec.prompt.size() / 2);
      std::vector<TokenInfo> scores;
      for (size_t i = part ? middle : 1; i < (part ? spec.prompt.size() : middle); ++i) {
        scores.push_back(Info(i, spec.prompt[i], PromptLogprob(i), spec.num_top));
      }
      request.listener->OnPromptScores(index, std::move(scores));
    }
  }

  void StepSequence(Request& request, uint32_t index) {
    const SequenceSpec& spec = request.spec.sequences[index];
    Sequence& sequence = request.sequences[index];
    if (sequence.ended) return;
    bool cancelled;
    {
      std::lock_guard lock(mu_);
      cancelled = sequence.cancelled;
    }
    const auto end = [&](FinishReason reason, std::optional<TokenId> token, absl::Status status) {
      sequence.ended = true;
      request.listener->OnSequenceEnd(index, reason, token, std::move(status));
    };
    if (cancelled) return end(FinishReason::kCancelled, std::nullopt, absl::OkStatus());
    if (!request.admitted || !generate) return;
    if (failure && failure->first == sequence.generated) {
      return end(FinishReason::kError, std::nullopt, failure->second);
    }
    if (spec.max_tokens == 0) return end(FinishReason::kLength, std::nullopt, absl::OkStatus());
    const size_t k = sequence.generated++;
    const TokenId id = k < script.size() ? script[k] : static_cast<TokenId>('a' + k % 26);
    request.listener->OnToken(index, Info(spec.prompt.size() + k, id, Logprob(k), spec.num_top));
    const auto in = [id](const std::vector<TokenId>& ids) {
      return std::find(ids.begin(), ids.end(), id) != ids.end();
    };
    if ((!spec.ignore_eos && in(eos)) || in(spec.stop_token_ids)) {
      return end(FinishReason::kStop, id, absl::OkStatus());
    }
    if (sequence.generated == spec.max_tokens) {
      end(FinishReason::kLength, std::nullopt, absl::OkStatus());
    }
  }

  void Erase(RequestId id) {
    std::shared_ptr<RequestListener> listener;  // dropped outside the lock
    std::lock_guard lock(mu_);
    listener = std::move(live_[id].listener);
    live_.erase(id);
  }

  mutable std::mutex mu_;
  std::condition_variable changed_;
  uint64_t last_id_ = 0;
  std::map<RequestId, Request> live_;
  std::vector<RequestSpec> specs_;
  std::vector<std::pair<RequestId, std::optional<uint32_t>>> cancelled_;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace strait
