// SPDX-License-Identifier: Apache-2.0
#include "coordinator/core/fault_policy.h"

#include <algorithm>
#include <set>

namespace strait {
namespace {

// Orders of more workers are not all tried.
constexpr size_t kMaxOrdered = 7;
// A step of few rows reads the weights all the same.
constexpr double kLeastShare = 1.0 / 8;
constexpr uint32_t kFailed = 2;
constexpr uint32_t kFailedBackward = 1;
// Whoever has a neighbour that works is better than who was set aside.
constexpr uint32_t kSetAsideCost = 4;

}  // namespace

uint64_t Doubling(uint64_t first, uint32_t times, uint64_t most) {
  return times >= 32 ? most : std::min(first << times, most);
}

double EstimateStepUs(const StageTimes& times, uint32_t num_rows, uint64_t weight_bytes) {
  if (times.steps > 0) {
    return times.compute_us * std::max(kLeastShare, num_rows / std::max(1.0, times.rows));
  }
  const double reads = std::max(1.0, static_cast<double>(num_rows) / kFirstStepRows);
  return reads * static_cast<double>(weight_bytes) / kFirstStepBytesPerUs;
}

uint64_t StepPatienceUs(const StageTimes& times, uint32_t num_rows, uint64_t weight_bytes,
                        uint64_t least_us) {
  const double us = kStepPatience * EstimateStepUs(times, num_rows, weight_bytes);
  const double most = times.steps > 0 ? 1e15 : kFirstStepMaxUs;
  return std::max(least_us, static_cast<uint64_t>(std::min(us, most)));
}

// ---------------------------------------------------------------- links

void FaultPolicy::OnLinkFailed(WorkerId from, WorkerId to, bool answered, std::string why,
                               uint64_t now_us) {
  Failure& failure = failures_[{from, to}];
  if (now_us >= failure.last_us + kBlameUs) failure = {};
  failure.last_us = now_us;
  failure.why = std::move(why);
  failure.acts = ++failure.times >= kBreaksOfAPair || !answered || failure.acts;
}

void FaultPolicy::OnLinkWorked(WorkerId from, WorkerId to, uint64_t now_us) {
  worked_us_[from].first = now_us;
  worked_us_[to].second = now_us;
}

uint32_t FaultPolicy::CostOfLink(WorkerId from, WorkerId to, uint64_t now_us) const {
  const auto acts = [&](const Pair& pair) {
    const auto it = failures_.find(pair);
    return it != failures_.end() && Acts(it->second, now_us);
  };
  if (acts({from, to})) return kFailed;
  return acts({to, from}) ? kFailedBackward : 0;
}

uint32_t FaultPolicy::CostOf(absl::Span<const WorkerId> workers, bool ring, uint64_t now_us) const {
  if (failures_.empty()) return 0;
  uint32_t cost = 0;
  for (size_t i = 0; i + 1 < workers.size(); ++i) {
    cost += CostOfLink(workers[i], workers[i + 1], now_us);
  }
  if (ring && workers.size() > 1) cost += CostOfLink(workers.back(), workers.front(), now_us);
  for (const WorkerId id : SetAside(now_us)) {
    if (std::find(workers.begin(), workers.end(), id) != workers.end()) cost += kSetAsideCost;
  }
  return cost;
}

std::vector<WorkerId> FaultPolicy::BestOrder(std::vector<WorkerId> workers, bool ring,
                                             uint64_t now_us) const {
  const std::set<WorkerId> distinct(workers.begin(), workers.end());
  uint32_t least = CostOf(workers, ring, now_us);
  if (least == 0 || workers.size() > kMaxOrdered || distinct.size() < workers.size()) {
    return workers;
  }
  std::vector<WorkerId> best = workers;
  std::sort(workers.begin(), workers.end());
  do {
    const uint32_t cost = CostOf(workers, ring, now_us);
    if (cost >= least) continue;
    least = cost;
    best = workers;
  } while (std::next_permutation(workers.begin(), workers.end()));
  return best;
}

std::vector<WorkerId> FaultPolicy::ChooseCrew(std::vector<WorkerId> candidates, size_t size,
                                              bool ring, uint64_t now_us) const {
  const auto ordered = [&](std::vector<WorkerId> crew) {
    std::sort(crew.begin(), crew.end());
    return BestOrder(std::move(crew), ring, now_us);
  };
  std::vector<WorkerId> crew(candidates.begin(), candidates.begin() + size);
  std::vector<WorkerId> best = ordered(crew);
  uint32_t least = CostOf(best, ring, now_us);
  // One exchanged for one, as long as that is better.
  for (bool better = least > 0; std::exchange(better, false);) {
    const std::vector<WorkerId> before = crew;
    for (size_t i = 0; i < size; ++i) {
      for (const WorkerId other : candidates) {
        if (std::find(before.begin(), before.end(), other) != before.end()) continue;
        std::vector<WorkerId> tried = before;
        tried[i] = other;
        std::vector<WorkerId> order = ordered(tried);
        const uint32_t cost = CostOf(order, ring, now_us);
        if (cost >= least) continue;
        least = cost;
        best = std::move(order);
        crew = std::move(tried);
        better = true;
      }
    }
  }
  return best;
}

std::vector<WorkerId> FaultPolicy::SetAside(uint64_t now_us) const {
  std::vector<WorkerId> aside;
  const auto is_aside = [&](WorkerId id) {
    return std::find(aside.begin(), aside.end(), id) != aside.end();
  };
  for (;;) {
    std::map<WorkerId, std::set<WorkerId>> partners;
    for (const auto& [pair, failure] : failures_) {
      const auto& [from, to] = pair;
      if (!Acts(failure, now_us) || is_aside(from) || is_aside(to)) continue;
      if (from == to) {
        // Both ends are its own: so is the fault.
        for (uint32_t i = 0; i < kPartnersOfOneAtFault; ++i) partners[from].insert(WorkerId{i});
        continue;
      }
      partners[from].insert(to);
      partners[to].insert(from);
    }
    const auto most = std::max_element(
        partners.begin(), partners.end(),
        [](const auto& a, const auto& b) { return a.second.size() < b.second.size(); });
    if (most == partners.end() || most->second.size() < kPartnersOfOneAtFault) return aside;
    aside.push_back(most->first);
  }
}

bool FaultPolicy::WorkedSince(WorkerId worker, bool as_sender, uint64_t since_us) const {
  const auto it = worked_us_.find(worker);
  return it != worked_us_.end() && (as_sender ? it->second.first : it->second.second) > since_us;
}

FaultPolicy::Standing FaultPolicy::StandingOf(WorkerId worker, uint64_t now_us) const {
  const std::vector<WorkerId> aside = SetAside(now_us);
  if (std::find(aside.begin(), aside.end(), worker) != aside.end()) return Standing::kSetAside;
  for (const auto& [pair, failure] : failures_) {
    const bool sends = pair.first == worker;
    if ((!sends && pair.second != worker) || !Acts(failure, now_us)) continue;
    const WorkerId partner = sends ? pair.second : pair.first;
    if (WorkedSince(partner, !sends, failure.last_us) &&
        !WorkedSince(worker, sends, failure.last_us)) {
      return Standing::kSuspect;
    }
  }
  return Standing::kGood;
}

std::vector<FaultPolicy::FailedLink> FaultPolicy::FailedLinksOf(WorkerId worker,
                                                                uint64_t now_us) const {
  std::vector<FailedLink> links;
  for (const auto& [pair, failure] : failures_) {
    const uint64_t until_us = failure.last_us + kBlameUs;
    if ((pair.first != worker && pair.second != worker) || now_us >= until_us) continue;
    links.push_back({pair.first, pair.second, until_us, failure.times, failure.why});
  }
  return links;
}

// ---------------------------------------------------------------- stages, sequences, loads

uint32_t FaultPolicy::stage_errors(uint64_t stage_id) const {
  const auto it = stage_errors_.find(stage_id);
  return it == stage_errors_.end() ? 0 : it->second;
}

void FaultPolicy::OnDied(uint64_t instance, std::vector<SequenceId> sequences) {
  if (sequences.empty()) return;
  deaths_.emplace_back(instance, std::move(sequences));
  if (deaths_.size() > kMaxDeaths) deaths_.pop_front();
}

std::vector<SequenceId> FaultPolicy::OnReturned(uint64_t instance) {
  std::vector<SequenceId> sequences;
  std::erase_if(deaths_, [&](auto& death) {
    if (death.first != instance) return false;
    sequences.insert(sequences.end(), death.second.begin(), death.second.end());
    return true;
  });
  return sequences;
}

void FaultPolicy::OnLoadFailed(WorkerId worker, uint64_t now_us) {
  Load& load = loads_[worker];
  load.unfit_until_us = now_us + Doubling(kLoadBackoffUs, load.failures++, kLoadBackoffMaxUs);
}

bool FaultPolicy::IsFit(WorkerId worker, uint64_t now_us) const {
  const auto it = loads_.find(worker);
  return it == loads_.end() || it->second.unfit_until_us <= now_us;
}

void FaultPolicy::Forget(WorkerId worker) {
  std::erase_if(failures_, [&](const auto& entry) {
    return entry.first.first == worker || entry.first.second == worker;
  });
  worked_us_.erase(worker);
  loads_.erase(worker);
}

}  // namespace strait
