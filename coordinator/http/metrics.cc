// SPDX-License-Identifier: Apache-2.0
#include "coordinator/http/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

namespace strait {
namespace {

using prometheus::Histogram;
using Buckets = Histogram::BucketBoundaries;

const Buckets& FirstTokenBuckets() {
  static const Buckets edges{0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75,
                             1,     2.5,   5,    7.5,  10,   20,   40,   80,  160,  640, 2560};
  return edges;
}

const Buckets& NextTokenBuckets() {
  static const Buckets edges{0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5,
                             0.75, 1,     2.5,  5,     7.5, 10,   20,  40,  80};
  return edges;
}

const Buckets& RequestBuckets() {
  static const Buckets edges{0.3, 0.5, 0.8, 1,  1.5, 2,   2.5, 5,   10,   15,  20,
                             30,  40,  50,  60, 120, 240, 480, 960, 1920, 7680};
  return edges;
}

prometheus::Counter& MakeCounter(prometheus::Registry& registry, const char* name,
                                 const char* help) {
  return prometheus::BuildCounter().Name(name).Help(help).Register(registry).Add({});
}

Histogram& MakeHistogram(prometheus::Registry& registry, const char* name, const char* help,
                         const Buckets& buckets) {
  return prometheus::BuildHistogram().Name(name).Help(help).Register(registry).Add({}, buckets);
}

}  // namespace

struct HttpMetrics::Impl {
  prometheus::Registry registry;
  prometheus::Family<prometheus::Counter>& answers =
      prometheus::BuildCounter()
          .Name("strait_http_requests_total")
          .Help("Answered HTTP requests by route and status; 499: the client went away.")
          .Register(registry);
  prometheus::Gauge& in_flight = prometheus::BuildGauge()
                                     .Name("strait_http_requests_in_flight")
                                     .Help("Completion requests that are not answered yet.")
                                     .Register(registry)
                                     .Add({});
  prometheus::Counter& prompt_tokens =
      MakeCounter(registry, "strait_http_prompt_tokens_total", "Prompt tokens of ended requests.");
  prometheus::Counter& generated_tokens = MakeCounter(
      registry, "strait_http_generation_tokens_total", "Tokens generated for ended requests.");
  Histogram& first_token =
      MakeHistogram(registry, "strait_time_to_first_token_seconds",
                    "From the request to the first token of a choice.", FirstTokenBuckets());
  Histogram& next_token = MakeHistogram(registry, "strait_time_per_output_token_seconds",
                                        "Between two tokens of a choice.", NextTokenBuckets());
  Histogram& request =
      MakeHistogram(registry, "strait_e2e_request_latency_seconds",
                    "From the request to the end of its answer.", RequestBuckets());
};

HttpMetrics::HttpMetrics() : impl_(std::make_unique<Impl>()) {}
HttpMetrics::~HttpMetrics() = default;

void HttpMetrics::CountAnswer(std::string_view route, int status) {
  impl_->answers.Add({{"route", std::string(route)}, {"code", std::to_string(status)}}).Increment();
}

void HttpMetrics::ObserveFirstToken(double seconds) { impl_->first_token.Observe(seconds); }
void HttpMetrics::ObserveNextToken(double seconds) { impl_->next_token.Observe(seconds); }

void HttpMetrics::ObserveRequest(double seconds, size_t prompt_tokens, size_t generated_tokens) {
  impl_->request.Observe(seconds);
  impl_->prompt_tokens.Increment(static_cast<double>(prompt_tokens));
  impl_->generated_tokens.Increment(static_cast<double>(generated_tokens));
}

void HttpMetrics::AddInFlight(int change) { impl_->in_flight.Increment(change); }

std::string HttpMetrics::Text() const {
  return prometheus::TextSerializer().Serialize(impl_->registry.Collect());
}

}  // namespace strait
