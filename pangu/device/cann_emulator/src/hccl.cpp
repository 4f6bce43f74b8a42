// The HCCL interface: every collective is one or two exchanges of byte spans between the ranks of a communicator,
// followed by a reduction in rank order, so that all ranks get the same bits.
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>

#include "communicator.h"
#include "reduction.h"

using emulator::Communicator;
using emulator::fail;
using emulator::kSuccess;
using emulator::size_of;
using emulator::Span;
using emulator::Status;
using emulator::Transfers;
using Task = std::function<Status()>;

namespace {

constexpr Status kHcclNotSupported = 5;
constexpr std::size_t kRootInfoBytes = 4108;

Communicator* as_communicator(void* handle) { return static_cast<Communicator*>(handle); }

char* offset_by(const void* base, std::size_t offset) { return static_cast<char*>(const_cast<void*>(base)) + offset; }

Status launch(const char* name, void* stream, Task task) {
  emulator::record_call("hccl", name);
  return emulator::enqueue(stream, std::move(task));
}

// An exchange, and what is to be done with the spans that stay on this rank and with those that have arrived.
Task exchange(const char* name, std::uint32_t dtype, Communicator* communicator, const std::vector<Span>& outgoing,
              const std::vector<Span>& incoming, std::function<void()> finish = nullptr) {
  auto transfers = std::make_shared<Transfers>(communicator->plan_exchange(name, dtype, outgoing, incoming));
  const Span from = outgoing[communicator->rank], to = incoming[communicator->rank];
  return [=] {
    if (to.data != nullptr && to.data != from.data) std::memmove(to.data, from.data, from.bytes);
    Status status = communicator->run(name, *transfers);
    if (status == kSuccess && finish) finish();
    return status;
  };
}

struct Sizes {
  std::vector<std::size_t> counts;
  std::vector<std::size_t> offsets;

  Sizes(const std::uint64_t* counts_, const std::uint64_t* offsets_, std::uint32_t ranks)
      : counts(counts_, counts_ + ranks), offsets(offsets_, offsets_ + ranks) {}

  // `count` elements for every rank, one rank's after the other's.
  Sizes(std::size_t count, std::uint32_t ranks) : counts(ranks, count), offsets(ranks) {
    for (std::uint32_t rank = 0; rank < ranks; rank++) offsets[rank] = rank * count;
  }

  std::vector<Span> spans(const void* base, std::uint32_t dtype) const {
    std::vector<Span> result;
    for (std::size_t rank = 0; rank < counts.size(); rank++) {
      result.push_back({offset_by(base, offsets[rank] * size_of(dtype)), counts[rank] * size_of(dtype)});
    }
    return result;
  }
};

// Every rank's `sizes.counts[rank]` elements of the input are reduced over all ranks into that rank's result.
Task reduce_scatter(const char* name, const void* input, const Sizes& sizes, void* result, std::uint32_t dtype,
                    std::uint32_t op, Communicator* communicator) {
  if (!emulator::can_reduce(dtype)) {
    return [=] { return fail(kHcclNotSupported, std::string(name) + " cannot reduce dtype " + std::to_string(dtype)); };
  }
  const std::size_t count = sizes.counts[communicator->rank];
  auto arrived = std::make_shared<std::vector<char>>(communicator->size * count * size_of(dtype));
  std::vector<Span> incoming = Sizes(count, communicator->size).spans(arrived->data(), dtype);
  auto finish = [=, keep_alive = arrived] {
    std::vector<const char*> parts;
    for (const Span& span : incoming) parts.push_back(static_cast<const char*>(span.data));
    emulator::reduce(result, parts, count, dtype, op);
  };
  return exchange(name, dtype, communicator, sizes.spans(input, dtype), incoming, finish);
}

Task all_gather(const char* name, const void* input, void* result, const Sizes& sizes, std::uint32_t dtype,
                Communicator* communicator) {
  const Span own{offset_by(input, 0), sizes.counts[communicator->rank] * size_of(dtype)};
  return exchange(name, dtype, communicator, std::vector<Span>(communicator->size, own), sizes.spans(result, dtype));
}

std::map<std::string, Communicator*>& named_communicators() {
  static auto* all = new std::map<std::string, Communicator*>;
  return *all;
}

std::mutex named_mutex;

Communicator* find_communicator(const std::string& name) {
  std::lock_guard<std::mutex> lock(named_mutex);
  auto found = named_communicators().find(name);
  return found == named_communicators().end() ? nullptr : found->second;
}

Status open_communicator(std::uint32_t size, std::uint32_t rank, const std::string& id, const char* config,
                         void** handle) {
  // HcclCommConfig, as documented: 24 bytes of information, buffer size, determinism, then the name.
  constexpr std::size_t kNameOffset = 32;
  Communicator* communicator = nullptr;
  Status status = Communicator::open(size, rank, id, config != nullptr ? config + kNameOffset : "", &communicator);
  if (status != kSuccess) return status;
  std::lock_guard<std::mutex> lock(named_mutex);
  named_communicators()[communicator->name] = communicator;
  *handle = communicator;
  return kSuccess;
}

}  // namespace

// ---- for operators that communicate by themselves and know their communicator by its name (called from Python)

CANN_API std::uint32_t emulator_communicator_size(const char* name) {
  Communicator* communicator = find_communicator(name);
  return communicator == nullptr ? 0 : communicator->size;
}

CANN_API std::uint32_t emulator_communicator_rank(const char* name) {
  Communicator* communicator = find_communicator(name);
  return communicator == nullptr ? 0 : communicator->rank;
}

CANN_API Status emulator_all_gather(const char* name, const void* input, void* result, std::uint64_t bytes,
                                    void* stream) {
  Communicator* communicator = find_communicator(name);
  Sizes shares(bytes, communicator->size);
  return emulator::enqueue(stream, all_gather("operator", input, result, shares, emulator::kUInt8, communicator));
}

// ---- communicators

CANN_API Status HcclGetRootInfo(char* root_info) {
  std::random_device random;
  std::memset(root_info, 0, kRootInfoBytes);
  std::snprintf(root_info, kRootInfoBytes, "%d.%08x%08x", getpid(), random(), random());
  return kSuccess;
}

CANN_API Status HcclCommInitRootInfo(std::uint32_t size, const char* root_info, std::uint32_t rank, void** handle) {
  return open_communicator(size, rank, root_info, nullptr, handle);
}

CANN_API Status HcclCommInitRootInfoConfig(std::uint32_t size, const char* root_info, std::uint32_t rank,
                                           const char* config, void** handle) {
  return open_communicator(size, rank, root_info, config, handle);
}

CANN_API Status HcclCreateSubCommConfig(void** parent, std::uint32_t size, const std::uint32_t* parent_ranks,
                                        std::uint64_t sub_id, std::uint32_t rank, const char* config, void** handle) {
  std::string members = std::to_string(sub_id);
  for (std::uint32_t i = 0; i < size; i++) members += "," + std::to_string(parent_ranks[i]);
  // Hashed, because file names are limited in length.
  std::string id = as_communicator(*parent)->id + "-" + std::to_string(std::hash<std::string>{}(members));
  return open_communicator(size, rank, id, config, handle);
}

CANN_API Status HcclCommDestroy(void* handle) {
  Communicator* communicator = as_communicator(handle);
  {
    std::lock_guard<std::mutex> lock(named_mutex);
    named_communicators().erase(communicator->name);
  }
  delete communicator;
  return kSuccess;
}

// A bit for each optional field of HcclCommConfig that is understood: the low four, which includes the name.
CANN_API std::uint32_t HcclGetCommConfigCapability() { return 12; }

CANN_API Status HcclGetCommName(void* handle, char* name) {
  std::strcpy(name, as_communicator(handle)->name.c_str());
  return kSuccess;
}

CANN_API Status HcclGetRankSize(void* handle, std::uint32_t* size) {
  *size = as_communicator(handle)->size;
  return kSuccess;
}

CANN_API Status HcclGetRankId(void* handle, std::uint32_t* rank) {
  *rank = as_communicator(handle)->rank;
  return kSuccess;
}

// torch_npu's watchdog ends the process on such an error; with synchronous streams the caller has had it already.
CANN_API Status HcclGetCommAsyncError(void* handle, Status* status) {
  *status = emulator::config().asynchronous ? as_communicator(handle)->status() : kSuccess;
  return kSuccess;
}

CANN_API const char* HcclGetErrorString(Status status) {
  return status == kSuccess ? "no error" : "an error of the CANN emulator";
}

CANN_API Status HcclSetConfig(std::int32_t /*option*/, std::int64_t /*value*/) { return kSuccess; }
CANN_API Status HcclCommSuspend(void* /*handle*/) { return kSuccess; }
CANN_API Status HcclCommResume(void* /*handle*/) { return kSuccess; }
CANN_API Status HcclGroupStart() { return kSuccess; }
CANN_API Status HcclGroupEnd() { return kSuccess; }

// ---- collectives

CANN_API Status HcclAllReduce(void* input, void* result, std::uint64_t count, std::uint32_t dtype, std::uint32_t op,
                              void* handle, void* stream) {
  Communicator* communicator = as_communicator(handle);
  Sizes shares(0, communicator->size);
  for (std::uint64_t rank = 0; rank < communicator->size; rank++) {
    shares.offsets[rank] = count * rank / communicator->size;
    shares.counts[rank] = count * (rank + 1) / communicator->size - shares.offsets[rank];
  }
  void* own_share = offset_by(result, shares.offsets[communicator->rank] * size_of(dtype));
  Task reduce_shares = reduce_scatter("HcclAllReduce", input, shares, own_share, dtype, op, communicator);
  Task gather_shares = all_gather("HcclAllReduce (gather)", own_share, result, shares, dtype, communicator);
  return launch("HcclAllReduce", stream, [=] {
    Status status = reduce_shares();
    return status == kSuccess ? gather_shares() : status;
  });
}

CANN_API Status HcclReduceScatter(void* input, void* result, std::uint64_t count, std::uint32_t dtype,
                                  std::uint32_t op, void* handle, void* stream) {
  Communicator* communicator = as_communicator(handle);
  Sizes shares(count, communicator->size);
  return launch("HcclReduceScatter", stream,
                reduce_scatter("HcclReduceScatter", input, shares, result, dtype, op, communicator));
}

CANN_API Status HcclReduceScatterV(void* input, const std::uint64_t* counts, const std::uint64_t* offsets, void* result,
                                   std::uint64_t /*count*/, std::uint32_t dtype, std::uint32_t op, void* handle,
                                   void* stream) {
  Communicator* communicator = as_communicator(handle);
  Sizes shares(counts, offsets, communicator->size);
  return launch("HcclReduceScatterV", stream,
                reduce_scatter("HcclReduceScatterV", input, shares, result, dtype, op, communicator));
}

// The root's share is everything, the others' is nothing.
CANN_API Status HcclReduce(void* input, void* result, std::uint64_t count, std::uint32_t dtype, std::uint32_t op,
                           std::uint32_t root, void* handle, void* stream) {
  Communicator* communicator = as_communicator(handle);
  Sizes shares(0, communicator->size);
  shares.counts[root] = count;
  return launch("HcclReduce", stream, reduce_scatter("HcclReduce", input, shares, result, dtype, op, communicator));
}

CANN_API Status HcclAllGather(void* input, void* result, std::uint64_t count, std::uint32_t dtype, void* handle,
                              void* stream) {
  Communicator* communicator = as_communicator(handle);
  Sizes shares(count, communicator->size);
  return launch("HcclAllGather", stream, all_gather("HcclAllGather", input, result, shares, dtype, communicator));
}

CANN_API Status HcclAllGatherV(void* input, std::uint64_t /*count*/, void* result, const std::uint64_t* counts,
                               const std::uint64_t* offsets, std::uint32_t dtype, void* handle, void* stream) {
  Communicator* communicator = as_communicator(handle);
  Sizes shares(counts, offsets, communicator->size);
  return launch("HcclAllGatherV", stream, all_gather("HcclAllGatherV", input, result, shares, dtype, communicator));
}

CANN_API Status HcclBroadcast(void* buffer, std::uint64_t count, std::uint32_t dtype, std::uint32_t root, void* handle,
                              void* stream) {
  Communicator* communicator = as_communicator(handle);
  const Span nothing{nullptr, 0}, all{buffer, count * size_of(dtype)};
  std::vector<Span> outgoing(communicator->size, communicator->rank == root ? all : nothing);
  std::vector<Span> incoming(communicator->size, nothing);
  incoming[root] = all;
  return launch("HcclBroadcast", stream, exchange("HcclBroadcast", dtype, communicator, outgoing, incoming));
}

CANN_API Status HcclScatter(void* input, void* result, std::uint64_t count, std::uint32_t dtype, std::uint32_t root,
                            void* handle, void* stream) {
  Communicator* communicator = as_communicator(handle);
  std::vector<Span> outgoing = Sizes(communicator->rank == root ? count : 0, communicator->size).spans(input, dtype);
  std::vector<Span> incoming(communicator->size, {nullptr, 0});
  incoming[root] = {result, count * size_of(dtype)};
  return launch("HcclScatter", stream, exchange("HcclScatter", dtype, communicator, outgoing, incoming));
}

CANN_API Status HcclBarrier(void* handle, void* stream) {
  Communicator* communicator = as_communicator(handle);
  const std::vector<Span> nothing(communicator->size, {nullptr, 0});  // that a call is made is message enough
  return launch("HcclBarrier", stream, exchange("HcclBarrier", emulator::kInt8, communicator, nothing, nothing));
}

CANN_API Status HcclAlltoAllV(const void* input, const std::uint64_t* input_counts, const std::uint64_t* input_offsets,
                              std::uint32_t input_dtype, void* result, const std::uint64_t* result_counts,
                              const std::uint64_t* result_offsets, std::uint32_t result_dtype, void* handle,
                              void* stream) {
  Communicator* communicator = as_communicator(handle);
  Sizes outgoing(input_counts, input_offsets, communicator->size);
  Sizes incoming(result_counts, result_offsets, communicator->size);
  return launch("HcclAlltoAllV", stream,
                exchange("HcclAlltoAllV", input_dtype, communicator, outgoing.spans(input, input_dtype),
                         incoming.spans(result, result_dtype)));
}

CANN_API Status HcclAlltoAll(const void* input, std::uint64_t input_count, std::uint32_t input_dtype, void* result,
                             std::uint64_t result_count, std::uint32_t result_dtype, void* handle, void* stream) {
  Communicator* communicator = as_communicator(handle);
  Sizes outgoing(input_count, communicator->size), incoming(result_count, communicator->size);
  return launch("HcclAlltoAll", stream,
                exchange("HcclAlltoAll", input_dtype, communicator, outgoing.spans(input, input_dtype),
                         incoming.spans(result, result_dtype)));
}

// `matrix` holds what each rank (row) sends to each rank (column).
CANN_API Status HcclAlltoAllVC(const void* input, const std::uint64_t* matrix, std::uint32_t input_dtype, void* result,
                               std::uint32_t result_dtype, void* handle, void* stream) {
  Communicator* communicator = as_communicator(handle);
  const std::uint32_t size = communicator->size, rank = communicator->rank;
  Sizes outgoing(0, size), incoming(0, size);
  for (std::uint32_t peer = 0; peer < size; peer++) {
    outgoing.counts[peer] = matrix[rank * size + peer];
    incoming.counts[peer] = matrix[peer * size + rank];
    if (peer == 0) continue;
    outgoing.offsets[peer] = outgoing.offsets[peer - 1] + outgoing.counts[peer - 1];
    incoming.offsets[peer] = incoming.offsets[peer - 1] + incoming.counts[peer - 1];
  }
  return launch("HcclAlltoAllVC", stream,
                exchange("HcclAlltoAllVC", input_dtype, communicator, outgoing.spans(input, input_dtype),
                         incoming.spans(result, result_dtype)));
}

// ---- messages from rank to rank

namespace {

struct Message {
  bool sending;
  void* buffer;
  std::uint64_t count;
  std::uint32_t dtype;
  std::uint32_t peer;

  std::size_t bytes() const { return count * size_of(dtype); }
};

// With synchronous streams a send must return before its receive is called, or ranks that send to each other first and
// receive next would wait for ever; it therefore works on a copy, in the background.
Status send_and_receive(const char* name, const std::vector<Message>& messages, Communicator* communicator,
                        void* stream) {
  const bool copy_sends = !emulator::config().asynchronous;
  auto transfers = std::make_shared<Transfers>();
  for (const Message& message : messages) {
    Span span{message.buffer, message.bytes()};
    auto copied = std::make_shared<std::string>();
    if (message.sending && copy_sends) {
      copied->assign(static_cast<const char*>(message.buffer), message.bytes());
      span.data = copied->data();
    }
    auto transfer = communicator->plan_message("message", message.dtype, message.sending, message.peer, span);
    if (message.sending && copy_sends) {
      communicator->run_in_background(name, transfer, copied);
    } else {
      transfers->push_back(transfer);
    }
  }
  return launch(name, stream, [=] { return communicator->run(name, *transfers); });
}

}  // namespace

CANN_API Status HcclSend(void* buffer, std::uint64_t count, std::uint32_t dtype, std::uint32_t peer, void* handle,
                         void* stream) {
  return send_and_receive("HcclSend", {{true, buffer, count, dtype, peer}}, as_communicator(handle), stream);
}

CANN_API Status HcclRecv(void* buffer, std::uint64_t count, std::uint32_t dtype, std::uint32_t peer, void* handle,
                         void* stream) {
  return send_and_receive("HcclRecv", {{false, buffer, count, dtype, peer}}, as_communicator(handle), stream);
}

// HcclSendRecvItem, as documented.
struct SendReceiveItem {
  std::int32_t kind;  // 0 sends, 1 receives
  void* buffer;
  std::uint64_t count;
  std::uint32_t dtype;
  std::uint32_t peer;
};

CANN_API Status HcclBatchSendRecv(const SendReceiveItem* items, std::uint32_t count, void* handle, void* stream) {
  std::vector<Message> messages;
  for (std::uint32_t i = 0; i < count; i++) {
    messages.push_back({items[i].kind == 0, items[i].buffer, items[i].count, items[i].dtype, items[i].peer});
  }
  return send_and_receive("HcclBatchSendRecv", messages, as_communicator(handle), stream);
}
