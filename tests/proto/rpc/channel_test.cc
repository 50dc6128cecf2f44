// SPDX-License-Identifier: Apache-2.0
//
// Defends: every server of the project answers health checks and reflection, and an idle client
// that pings is not cut off.
#include "proto/rpc/channel.h"

#include "grpcpp/generic/generic_stub.h"
#include "grpcpp/grpcpp.h"
#include "gtest/gtest.h"
#include "strait/v1/cluster.grpc.pb.h"

namespace strait::rpc {
namespace {

using std::chrono_literals::operator""s;
using GenericStub = grpc::TemplatedGenericStub<grpc::ByteBuffer, grpc::ByteBuffer>;

class ServerTest : public testing::TestWithParam<Traffic> {
 protected:
  void SetUp() override {
    grpc::ServerBuilder builder;
    ConfigureServer(builder, "127.0.0.1:0", GetParam(), &port_);
    builder.RegisterService(&service_);
    server_ = builder.BuildAndStart();
    ASSERT_NE(port_, 0);
    channel_ = MakeChannel("127.0.0.1:" + std::to_string(port_), GetParam());
  }
  void TearDown() override { server_->Shutdown(std::chrono::system_clock::now()); }

  // One message there, one back.
  grpc::Status Ask(const std::string& method, const std::string& request, std::string* reply) {
    grpc::CompletionQueue queue;
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + 20s);
    GenericStub stub(channel_);
    grpc::Slice slice(request);
    grpc::ByteBuffer buffer(&slice, 1);
    auto call = stub.PrepareCall(&context, method, &queue);
    void* tag;
    bool ok;
    call->StartCall(nullptr);
    queue.Next(&tag, &ok);
    call->Write(buffer, nullptr);
    queue.Next(&tag, &ok);
    grpc::ByteBuffer answer;
    call->Read(&answer, nullptr);
    queue.Next(&tag, &ok);
    if (ok) {
      std::vector<grpc::Slice> slices;
      (void)answer.Dump(&slices);
      for (const auto& s : slices) {
        reply->append(reinterpret_cast<const char*>(s.begin()), s.size());
      }
    }
    call->WritesDone(nullptr);
    queue.Next(&tag, &ok);
    grpc::Status status;
    call->Finish(&status, nullptr);
    queue.Next(&tag, &ok);
    return status;
  }

  int port_ = 0;
  v1::Coordinator::Service service_;
  std::unique_ptr<grpc::Server> server_;
  std::shared_ptr<grpc::Channel> channel_;
};

TEST_P(ServerTest, AnswersHealthChecks) {
  std::string reply;
  const grpc::Status status = Ask("/grpc.health.v1.Health/Check", "", &reply);
  EXPECT_TRUE(status.ok()) << status.error_message();
  EXPECT_EQ(reply, "\x08\x01");  // field 1, SERVING
}

TEST_P(ServerTest, AnswersReflection) {
  std::string reply;
  const grpc::Status status = Ask("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
                                  std::string("\x3a\x01*", 3), &reply);  // field 7, list_services
  EXPECT_TRUE(status.ok()) << status.error_message();
  EXPECT_NE(reply.find("strait.v1.Coordinator"), std::string::npos);
}

INSTANTIATE_TEST_SUITE_P(Both, ServerTest, testing::Values(Traffic::kControl, Traffic::kData));

}  // namespace
}  // namespace strait::rpc
