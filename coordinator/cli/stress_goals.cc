// SPDX-License-Identifier: Apache-2.0
#include "coordinator/cli/stress_goals.h"

#include <cmath>

#include "absl/strings/str_cat.h"
#include "coordinator/cli/status_json.h"

namespace strait::cli {
namespace {

// Down, so that what is told as reached is.
std::string PercentText(double share) { return absl::StrCat(std::floor(share * 1000) / 10, " %"); }

}  // namespace

std::vector<std::string> Missed(const json::Object& report, const StressGoals& goals) {
  std::vector<std::string> missed;
  const auto at_least = [&](const char* key, double wanted) {
    const double got = Number(report, key);
    if (got < wanted) missed.push_back(absl::StrCat(key, ": ", got, ", at least ", wanted));
  };
  const auto share = [&](const std::string& what, double got, double wanted) {
    if (!(got >= wanted)) {
      missed.push_back(
          absl::StrCat(what, ": ", PercentText(got), ", at least ", PercentText(wanted)));
    }
  };
  at_least("seconds", goals.seconds);
  at_least("migrations", static_cast<double>(goals.migrations));
  const double migrations = std::max(1.0, Number(report, "migrations"));
  share("migrations of 1,000 rows and more", Number(report, "migrations_of_1000_rows") / migrations,
        goals.share_of_1000_rows);
  share("migrations of 4,000 rows and more", Number(report, "migrations_of_4000_rows") / migrations,
        goals.share_of_4000_rows);
  at_least("worker_deaths", static_cast<double>(goals.worker_deaths));
  at_least("reshapes", static_cast<double>(goals.reshapes));
  // None is told where no copies are made.
  share("protected_share", Number(report, "protected_share"), goals.protected_share);
  if (const double violations = Number(report, "violations"); violations > 0) {
    missed.push_back(absl::StrCat("violations: ", violations, ", none is allowed"));
  }
  if (const json::Value* skipped = json::Find(report, "skipped_faults");
      skipped != nullptr && skipped->is_array()) {
    for (const json::Value& kind : skipped->get_array()) {
      missed.push_back(absl::StrCat("skipped: ", std::string(json::View(kind.as_string()))));
    }
  }
  return missed;
}

}  // namespace strait::cli
