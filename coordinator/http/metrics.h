// SPDX-License-Identifier: Apache-2.0
//
// HttpMetrics counts what the HTTP side sees: answers by route and status, latencies, tokens.
//
// Thread:  any, synchronized inside.
// Why:     bucket edges are those that vLLM's dashboards and routers expect.
#pragma once

#include <memory>
#include <string>
#include <string_view>

namespace strait {

class HttpMetrics {
 public:
  HttpMetrics();
  ~HttpMetrics();

  // `route` is one of the routes, or "other": never what a client made up.
  void CountAnswer(std::string_view route, int status);
  void ObserveFirstToken(double seconds);
  void ObserveNextToken(double seconds);  // since the token before, of the same choice
  void ObserveRequest(double seconds, size_t prompt_tokens, size_t generated_tokens);
  void AddInFlight(int change);

  // Prometheus text format.
  std::string Text() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace strait
