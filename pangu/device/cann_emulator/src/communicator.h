// A communicator: ranks, each a process of this machine, joined by byte channels in one shared-memory segment.
#pragma once

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "emulator.h"

namespace emulator {

constexpr Status kHcclMismatch = 4;
constexpr Status kHcclSystemCall = 8;
constexpr Status kHcclTimeout = 9;
constexpr Status kHcclRemote = 21;

struct Channel;
struct Segment;

// What both ends of a transfer must agree on; it travels before the bytes.
struct Call {
  char name[24];
  std::uint64_t dtype;
  std::uint64_t bytes;
};

// This process's end of a channel. Transfers over it run in the order of their tickets, which the host draws when it
// issues them, whichever stream's thread gets there first.
struct ChannelEnd {
  Channel* channel = nullptr;
  std::atomic<std::uint64_t> next_ticket{0};
  std::atomic<std::uint64_t> current{0};
};

struct Span {
  void* data;
  std::size_t bytes;
};

// A span of bytes on its way to a peer, or from it.
class Transfer {
 public:
  Transfer(bool sending, std::uint32_t peer, ChannelEnd* end, const Call& call, void* data);

  // Moves what can be moved without waiting. Returns whether anything moved; says so if the peer makes another call.
  bool step(std::string& mismatch);

  bool finished() const { return done_ == sizeof(Call) + call_.bytes; }

  const bool sending;
  const std::uint32_t peer;

 private:
  ChannelEnd* end_;
  std::uint64_t ticket_;
  Call call_;
  Call received_;
  char* data_;
  std::size_t done_ = 0;
};

using Transfers = std::vector<Transfer>;

class Communicator {
 public:
  // Joins the other ranks that open the same id; waits for all of them.
  static Status open(std::uint32_t size, std::uint32_t rank, const std::string& id, const std::string& name,
                     Communicator** communicator);
  ~Communicator();

  // Plans, for every rank r but this one, to send outgoing[r] to it and to receive incoming[r] from it.
  Transfers plan_exchange(const char* name, std::uint32_t dtype, const std::vector<Span>& outgoing,
                          const std::vector<Span>& incoming);
  Transfer plan_message(const char* name, std::uint32_t dtype, bool sending, std::uint32_t peer, Span span);

  // Carries out what was planned. All transfers advance together, so full channels cannot make ranks wait in a circle.
  Status run(const char* name, Transfers& transfers);

  // Carries out a send from a copy of its data, which is kept until then, without waiting for the receiver.
  void run_in_background(const char* name, Transfer send, std::shared_ptr<std::string> data);

  Status status() const { return broken_; }

  const std::uint32_t size;
  const std::uint32_t rank;
  const std::string id;
  const std::string name;

 private:
  enum class Purpose { kCollectives, kMessages };

  Communicator(std::uint32_t size, std::uint32_t rank, const std::string& id, const std::string& name);
  Status attach();
  ChannelEnd* end(Purpose purpose, bool sending, std::uint32_t peer);
  Status give_up(Status status, const std::string& message);

  Segment* segment_ = nullptr;
  std::size_t segment_bytes_ = 0;
  std::unique_ptr<ChannelEnd[]> ends_;
  std::atomic<int> background_sends_{0};
  std::atomic<Status> broken_{kSuccess};
};

// HCCL's own time-outs in seconds, from the variables that HCCL reads.
double connect_timeout();
double execution_timeout();

}  // namespace emulator
