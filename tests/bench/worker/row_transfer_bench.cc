// SPDX-License-Identifier: Apache-2.0
//
// How fast the rows of a sequence go from one worker to another, through memory that both have and over gRPC and
// loopback, and how fast gRPC alone carries messages of that size.
//
//   row_transfer_bench [--smoke] [--rows N] [--layers N] [--repeats N] [--frame-bytes N]
//
// move: two worker cores, each with a loop and a thread that copies rows; from FetchRows to the last
// RowsFetched, of V3's bf16 rows (1,152 bytes). Rows are read from one cache, summed, sent or left in shared memory, summed
// again and written into the other. gRPC alone: a stream whose server answers each request with the same memory, and
// whose client drops what comes, with as many requests under way. All take turns; medians are printed, also of
// the time of CPUs of both ends, which says more where others use the machine.
#include <sys/resource.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <future>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "grpcpp/generic/generic_stub.h"
#include "proto/base/check.h"
#include "proto/rpc/channel.h"
#include "proto/rpc/clock.h"
#include "proto/rpc/queue.h"
#include "proto/rpc/stream.h"
#include "proto/wire/epoch_wire.h"
#include "strait/v1/transfer.grpc.pb.h"
#include "worker/core/worker_core.h"
#include "worker/model/host_cache.h"
#include "worker/model/host_copies.h"
#include "worker/transfer/grpc_row_transfer.h"
#include "worker/transfer/row_pieces.h"

namespace strait {
namespace {

constexpr RowShape kShape = {RowFormat::kBf16, 512, 64};
constexpr uint64_t kBlockRows = limits::kBlockTokens;
constexpr uint64_t kStage = 1;
constexpr uint64_t kSequence = 7;
constexpr uint64_t kSecret = 5;

template <class Epoch>
void SetEpoch(Epoch* epoch) {
  epoch->set_counter(1);
}

struct Sizes {
  uint32_t rows = 16'384;
  uint32_t layers = 8;
  int repeats = 7;
  uint64_t frame_bytes = WorkerCoreOptions().transfer_frame_bytes;
};

// Of all threads of this process.
double CpuSeconds() {
  rusage usage;
  STRAIT_CHECK(getrusage(RUSAGE_SELF, &usage) == 0);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + static_cast<double>(t.tv_usec) / 1e6;
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

double Seconds(std::chrono::steady_clock::time_point since) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - since).count();
}

// Has rows, and computes nothing.
class NoModel final : public StageModel {
 public:
  NoModel(const StageSpec& spec, const HostCache* cache)
      : spec_(spec), copies_(spec.layers.size(), cache, kShape.row_bytes()) {}
  absl::Status Begin(const StageBatch&, HiddenIn, HiddenOut) override { return absl::OkStatus(); }
  bool TakesAhead(uint32_t, uint32_t) const override { return false; }
  bool Done() const override { return true; }
  absl::Status Finish(std::vector<LogitsResult>*) override { return absl::OkStatus(); }
  BlockCopies& copies() override { return copies_; }
  absl::Status SetCapacity(uint32_t) override { return absl::OkStatus(); }
  const StageSpec& spec() const override { return spec_; }
  uint64_t weight_bytes() const override { return 0; }

 private:
  const StageSpec spec_;
  HostCopies copies_;
};

class NoTransport final : public Transport {
 public:
  void Connect(const Edge&) override {}
  absl::Status Send(uint64_t, HiddenStep) override { return absl::OkStatus(); }
  absl::Status SendSampled(uint64_t, SampledStep) override { return absl::OkStatus(); }
  void Probe(uint64_t) override {}
  void Disconnect(uint64_t) override {}
  void Expect(const Edge&) override {}
  void Forget(uint64_t) override {}
  void Consumed(uint64_t, PipelineEpoch, StepId) override {}
};

// A worker with one stage, as worker/service runs it.
class Worker final : private WorkerPorts {
 public:
  Worker(const Sizes& sizes, bool shares_memory) : sizes_(sizes) {
    const uint64_t block_bytes = kBlockRows * kShape.row_bytes();
    const uint32_t blocks = BlocksOfSequence(sizes.rows, sizes.layers);
    auto cache =
        HostCache::Create(std::make_shared<MemoryBudget>(2 * blocks * block_bytes), block_bytes);
    STRAIT_CHECK(cache.ok());
    cache_ = std::move(*cache);
    RowTransferEvents events;
    events.on_rows = [this](AskId id, absl::StatusOr<RowsFrame> frame) {
      Post([this, id, frame = std::make_shared<absl::StatusOr<RowsFrame>>(std::move(frame))] {
        core_->OnRows(id, std::move(*frame), MonotonicMicros());
      });
    };
    events.on_ask = [this](PeerAskId id, RowsAsk ask) {
      Post([this, id, ask] { core_->OnAsk(id, ask, MonotonicMicros()); });
    };
    events.on_served = [this](PeerAskId id, std::vector<BlockHeader> pieces) {
      Post([this, id, pieces = std::move(pieces)] {
        core_->OnServed(id, pieces, MonotonicMicros());
      });
    };
    rows_ = std::make_unique<GrpcRowTransfer>(
        GrpcRowTransferOptions{.shares_memory = shares_memory}, std::move(events));
    grpc::ServerBuilder builder;
    rpc::ConfigureServer(builder, "127.0.0.1:0", rpc::Traffic::kData, &port_);
    builder.RegisterService(rows_->service());
    server_ = builder.BuildAndStart();
    STRAIT_CHECK(server_ != nullptr && port_ != 0);
    core_.emplace(WorkerCoreOptions{.transfer_frame_bytes = sizes.frame_bytes},
                  StageTraits{.num_layers = sizes.layers,
                              .hidden_row_bytes = 4,
                              .vocab_size = 1000,
                              .max_positions = limits::kMaxPositionEmbeddings,
                              .block_bytes = block_bytes,
                              .row_shape = kShape},
                  cache_.get(), &transport_, static_cast<WorkerPorts*>(this), rows_.get());
    loop_ = std::thread([this] { Run(); });
    Post([this] { core_->OnWelcome({}); });
    v1::ToWorker message;
    message.mutable_load_stage()->set_stage_id(kStage);
    message.mutable_load_stage()->set_layer_end(sizes.layers);
    message.mutable_load_stage()->set_cache_bytes(blocks * block_bytes);
    Say(message);
    STRAIT_CHECK(Next().stage_state().state() == v1::StageState::LOADED);
    message.mutable_activate_stage()->set_stage_id(kStage);
    SetEpoch(message.mutable_activate_stage()->mutable_epoch());
    message.mutable_activate_stage()->set_num_stages(1);
    Say(message);
    STRAIT_CHECK(Next().stage_state().state() == v1::StageState::ACTIVE);
    std::memset(cache_->blocks(), port_ % 200 + 1, blocks * block_bytes);
  }
  ~Worker() override {
    Post([this] { stop_ = true; });
    loop_.join();
    core_->DropStages();
    rows_->Stop();
    server_->Shutdown(std::chrono::system_clock::now());
    server_->Wait();
  }

  void Say(v1::ToWorker message) {
    Post([this, message = std::move(message)] { core_->OnMessage(message, MonotonicMicros()); });
  }
  // Runs a plan of one operation, and rows of kSequence.
  void Plan(const v1::CacheOp& op, uint32_t first = 0, uint32_t rows = 0) {
    v1::ToWorker message;
    v1::StepPlan& plan = *message.mutable_step();
    plan.set_stage_id(kStage);
    SetEpoch(plan.mutable_epoch());
    plan.set_step_id(++step_);
    if (op.op_case() != v1::CacheOp::OP_NOT_SET) *plan.add_cache_ops() = op;
    if (rows > 0) {
      v1::SequenceStep* step = plan.add_sequences();
      step->set_sequence_id(kSequence);
      step->set_first_position(first);
      step->mutable_literals()->mutable_ids()->Resize(static_cast<int>(rows), 1);
    }
    Say(std::move(message));
    v1::FromWorker told = Next();
    while (!told.has_report()) told = Next();
    STRAIT_CHECK(told.report().error_code() == 0);
  }
  v1::FromWorker Next() {
    if (ready_.empty()) ready_ = told_.PopAll(std::chrono::seconds(60));
    STRAIT_CHECK(!ready_.empty(), "a worker says nothing");
    v1::FromWorker message = std::move(ready_.front());
    ready_.pop_front();
    return message;
  }
  std::string address() const { return "127.0.0.1:" + std::to_string(port_); }
  RowTransferBytes moved() const { return rows_->bytes(); }

 private:
  void Post(std::function<void()> what) { queue_.Push(std::move(what)); }
  void Run() {
    for (bool busy = false; !stop_; busy = DoSteps()) {
      const std::chrono::microseconds wait(busy                  ? 0
                                           : core_->MovesRows()  ? 50
                                           : core_->CopiesRows() ? 1'000
                                                                 : 100'000);
      for (auto& event : queue_.PopAll(wait)) event();
      if (core_->CopiesRows()) core_->PollCopies(MonotonicMicros());
    }
  }
  bool DoSteps() {
    bool any = false;
    if (const auto done = core_->NextDone(&any)) {
      core_->FinishStep(*done, &MonotonicMicros);
      return true;
    }
    const auto ready = core_->NextReady();
    if (ready) core_->BeginStep(*ready, &MonotonicMicros);
    return any || ready;
  }

  void Tell(v1::FromWorker message) override { told_.Push(std::move(message)); }
  void DropCoordinator(absl::Status) override { STRAIT_CHECK(false); }
  void Shutdown() override {}
  void Load(const LoadOrder& order) override {
    Post([this, order] {
      core_->OnLoaded(order, std::make_unique<NoModel>(order.spec, cache_.get()));
    });
  }
  void CancelLoads(uint64_t) override {}
  void RowsDue(uint64_t, PipelineEpoch, StepId, uint32_t) override {}
  void Note(LogLevel, std::string_view, std::initializer_list<LogField>) override {}

  const Sizes sizes_;
  std::unique_ptr<HostCache> cache_;
  NoTransport transport_;
  BoundedQueue<std::function<void()>> queue_{8192};
  BoundedQueue<v1::FromWorker> told_{8192};
  std::deque<v1::FromWorker> ready_;
  std::unique_ptr<GrpcRowTransfer> rows_;
  std::unique_ptr<grpc::Server> server_;
  int port_ = 0;
  std::optional<WorkerCore> core_;
  uint64_t step_ = 0;
  bool stop_ = false;
  std::thread loop_;
};

// Moves the sequence from one to the other; seconds.
class Move {
 public:
  Move(const Sizes& sizes, bool shares_memory)
      : sizes_(sizes), from_(sizes, shares_memory), to_(sizes, shares_memory) {
    v1::CacheOp op;
    op.mutable_open()->set_sequence_id(kSequence);
    op.mutable_open()->set_prompt_tokens(1);
    op.mutable_open()->mutable_sampling()->set_top_p(1);
    op.mutable_open()->mutable_sampling()->set_repetition_penalty(1);
    for (uint32_t at = 0; at < sizes.rows; at += limits::kMaxStepTokens) {
      from_.Plan(op, at, std::min(limits::kMaxStepTokens, sizes.rows - at));
      op.Clear();
    }
  }
  double Once() {
    ++placement_;
    v1::CacheOp op;
    v1::ImportSequence& import = *op.mutable_import();
    import.set_sequence_id(kSequence);
    import.mutable_placement()->set_counter(placement_);
    import.set_rows(sizes_.rows);
    to_.Plan(op);
    v1::ToWorker serve;
    SetMove(serve.mutable_serve_rows());
    serve.mutable_serve_rows()->set_secret(kSecret);
    from_.Say(serve);
    v1::ToWorker fetch;
    SetMove(fetch.mutable_fetch_rows());
    fetch.mutable_fetch_rows()->set_end_row(sizes_.rows);
    fetch.mutable_fetch_rows()->mutable_tokens()->mutable_ids()->Resize(
        static_cast<int>(sizes_.rows), 1);
    v1::RowsSource* source = fetch.mutable_fetch_rows()->add_sources();
    source->set_layer_end(sizes_.layers);
    source->set_stage_id(kStage);
    SetEpoch(source->mutable_epoch());
    source->set_data_address(from_.address());
    source->set_secret(kSecret);
    const auto began = std::chrono::steady_clock::now();
    to_.Say(fetch);
    v1::FromWorker told;
    do {
      told = to_.Next();
      STRAIT_CHECK(told.rows_fetched().error_code() == 0);
    } while (told.rows_fetched().rows() < sizes_.rows);
    const double seconds = Seconds(began);
    op.mutable_close()->set_sequence_id(kSequence);
    to_.Plan(op);
    return seconds;
  }
  RowTransferBytes moved() const { return to_.moved(); }

 private:
  template <class Message>
  void SetMove(Message* message) const {
    message->set_stage_id(kStage);
    SetEpoch(message->mutable_epoch());
    message->set_sequence_id(kSequence);
    message->mutable_placement()->set_counter(placement_);
  }

  const Sizes sizes_;
  Worker from_;
  Worker to_;
  uint64_t placement_ = 0;
};

// gRPC alone, over the same kinds of streams and connections.
class Bare final : public v1::RowTransfer::WithRawCallbackMethod_Rows<v1::RowTransfer::Service> {
 public:
  explicit Bare(uint64_t message_bytes) : message_(message_bytes, 'x') {
    grpc::ServerBuilder builder;
    int port = 0;
    rpc::ConfigureServer(builder, "127.0.0.1:0", rpc::Traffic::kData, &port);
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
    STRAIT_CHECK(server_ != nullptr && port != 0);
    channel_ = rpc::MakeChannel("127.0.0.1:" + std::to_string(port), rpc::Traffic::kTransfer);
    stub_ = v1::RowTransfer::NewStub(channel_);
  }
  ~Bare() override {
    server_->Shutdown(std::chrono::system_clock::now());
    server_->Wait();
  }

  grpc::ServerBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>* Rows(
      grpc::CallbackServerContext* context) override {
    auto to = std::make_shared<std::weak_ptr<ServerStream>>();
    auto stream = std::make_shared<ServerStream>(
        context, Options(),
        rpc::StreamEvents<grpc::ByteBuffer>{.on_message =
                                                [this, to](const grpc::ByteBuffer&) {
                                                  const grpc::Slice slice(
                                                      message_.data(), message_.size(),
                                                      grpc::Slice::STATIC_SLICE);
                                                  if (const auto out = to->lock())
                                                    (void)out->Send(grpc::ByteBuffer(&slice, 1));
                                                  return true;
                                                },
                                            .on_end = [](const absl::Status&) {}});
    *to = stream;
    stream->Start();
    return stream.get();
  }

  double Once(uint64_t num_messages, uint64_t under_way) {
    std::atomic<uint64_t> asked = 0;
    std::atomic<uint64_t> came = 0;
    std::promise<void> done;
    BoundedQueue<int> more(num_messages + 1);
    const auto began = std::chrono::steady_clock::now();
    ClientStream stream(
        Options(),
        {.on_message =
             [&](const grpc::ByteBuffer&) {
               if (++came == num_messages) done.set_value();
               more.Push(0);
               return true;
             },
         .on_end = [](const absl::Status&) {}},
        [&](grpc::ClientContext* context, auto* reactor) { Start(context, reactor); });
    for (; asked < std::min(under_way, num_messages); ++asked) (void)stream.Send(Request(asked));
    while (came < num_messages) {
      for (int event : more.PopAll(std::chrono::seconds(1))) {
        if (event == 0 && asked < num_messages) (void)stream.Send(Request(asked++));
      }
    }
    done.get_future().wait();
    return Seconds(began);
  }

 private:
  using ServerStream = rpc::ServerStream<grpc::ByteBuffer, grpc::ByteBuffer>;
  using ClientStream = rpc::ClientStream<grpc::ByteBuffer, v1::RowsRequest>;

  static rpc::StreamOptions Options() {
    return {.max_queued_messages = 1'000,
            .max_queued_bytes = 1u << 30,
            .max_message_bytes = limits::kMaxTransferMessageBytes};
  }
  static v1::RowsRequest Request(uint64_t id) {
    v1::RowsRequest request;
    request.set_request_id(id + 1);
    return request;
  }
  template <class Reactor>
  void Start(grpc::ClientContext* context, Reactor* reactor) {
    grpc::TemplatedGenericStub<v1::RowsRequest, grpc::ByteBuffer> stub(channel_);
    stub.PrepareBidiStreamingCall(context, "/strait.v1.RowTransfer/Rows", grpc::StubOptions(),
                                  reactor);
  }

  const std::string message_;
  std::unique_ptr<grpc::Server> server_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::RowTransfer::Stub> stub_;
};

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

// One of the things that take turns.
struct Way {
  const char* name;
  std::function<double()> once;  // seconds
  uint64_t bytes = 0;
  std::vector<double> seconds = {};
  std::vector<double> cpu_seconds = {};
  double rate() const { return static_cast<double>(bytes) / Median(seconds) / 1e9; }
};

void Run(const Sizes& sizes) {
  const uint64_t bytes = uint64_t{sizes.rows} * sizes.layers * kShape.row_bytes();
  const RowTraits traits = {.layers = {0, sizes.layers}, .shape = kShape, .origin = {}};
  const std::vector<LayerRows> asks =
      CutRange(traits, {{0, sizes.layers}, 0, sizes.rows}, sizes.frame_bytes);
  const uint64_t message_bytes = BytesOf(traits, asks[0]);
  const uint64_t under_way = std::max<uint64_t>(kBulkBytesUnderWay / message_bytes, 1);
  const uint64_t num_messages = (bytes + message_bytes - 1) / message_bytes;
  Move shared(sizes, true);
  Move by_grpc(sizes, false);
  Bare bare(message_bytes);
  Way ways[] = {
      {"gRPC alone", [&] { return bare.Once(num_messages, under_way); },
       num_messages * message_bytes},
      {"move, gRPC", [&] { return by_grpc.Once(); }, bytes},
      {"move, shared", [&] { return shared.Once(); }, bytes},
  };
  for (int i = 0; i <= sizes.repeats; ++i) {
    for (Way& way : ways) {
      const double began = CpuSeconds();
      const double seconds = way.once();
      if (i == 0) continue;  // what is made once
      way.seconds.push_back(seconds);
      way.cpu_seconds.push_back(CpuSeconds() - began);
    }
  }
  STRAIT_CHECK(by_grpc.moved().came_shared == 0);
  STRAIT_CHECK(shared.moved().came_by_grpc == 0, "rows of the shared move came by gRPC");
  std::printf("%u rows x %u layers, %.1f MB in messages of %.2f MB, %llu under way\n", sizes.rows,
              sizes.layers, static_cast<double>(bytes) / 1e6,
              static_cast<double>(message_bytes) / 1e6, static_cast<unsigned long long>(under_way));
  for (const Way& way : ways) {
    std::printf("%-12s  %8.2f ms  %6.3f GB/s  %8.2f ms of CPU  %4.0f %% of gRPC alone\n", way.name,
                Median(way.seconds) * 1e3, way.rate(), Median(way.cpu_seconds) * 1e3,
                100 * way.rate() / ways[0].rate());
  }
}

}  // namespace
}  // namespace strait

int main(int argc, char** argv) {
  strait::Sizes sizes;
  for (int i = 1; i < argc; ++i) {
    const std::string flag = argv[i];
    if (flag == "--smoke") {
      sizes = {.rows = 130, .layers = 2, .repeats = 1};
    } else if (i + 1 < argc && flag == "--rows") {
      sizes.rows = static_cast<uint32_t>(std::atoi(argv[++i]));
    } else if (i + 1 < argc && flag == "--layers") {
      sizes.layers = static_cast<uint32_t>(std::atoi(argv[++i]));
    } else if (i + 1 < argc && flag == "--repeats") {
      sizes.repeats = std::atoi(argv[++i]);
    } else if (i + 1 < argc && flag == "--frame-bytes") {
      sizes.frame_bytes = static_cast<uint64_t>(std::atoll(argv[++i]));
    } else {
      std::fprintf(stderr,
                   "usage: row_transfer_bench [--smoke] [--rows N] [--layers N] [--repeats N] "
                   "[--frame-bytes N]\n");
      return 2;
    }
  }
  strait::Run(sizes);
  return 0;
}
