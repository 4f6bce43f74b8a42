// A communicator: ranks, each a process of this machine, joined by byte channels in one shared-memory segment.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstring>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "emulator.h"

namespace emulator {

constexpr Status kHcclInvalidParameter = 1;
constexpr Status kHcclMismatch = 4;
constexpr Status kHcclSystemCall = 8;
constexpr Status kHcclTimeout = 9;
constexpr Status kHcclRemote = 21;

struct Channel;
struct Segment;

// What both ends of a transfer must agree on; it travels before the bytes.
struct Call {
  char name[24] = {};
  std::uint32_t dtype = 0;
  std::uint64_t sequence = 0;
  std::uint64_t bytes = 0;

  Call() = default;
  Call(const char* name_, std::uint32_t dtype_) : dtype(dtype_) { std::strncpy(name, name_, sizeof(name) - 1); }
};

// A span of bytes on its way to or from one peer.
class Transfer {
 public:
  Transfer(bool sending, std::uint32_t peer, Channel* channel, const Call& call, void* data, std::size_t bytes);

  // Moves what can be moved without waiting. Sets `moved`, and `mismatch` if the peer makes another call.
  void step(bool& moved, std::string& mismatch);

  bool finished() const { return done_ == sizeof(Call) + call_.bytes; }

  const bool sending;
  const std::uint32_t peer;
  Channel* const channel;

 private:
  Call call_;
  Call received_;
  char* data_;
  std::size_t done_ = 0;
};

// Keeps operations in the order in which the host issued them, whichever stream's thread reaches its turn first.
class Turnstile {
 public:
  std::uint64_t issue();
  void wait(std::uint64_t ticket);
  void leave();

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  std::uint64_t issued_ = 0;
  std::uint64_t current_ = 0;
};

struct Message {
  bool sending;
  std::uint32_t peer;
  void* data;
  std::size_t bytes;
  Call call;
};

class Communicator {
 public:
  // Joins the other ranks that open the same id; waits for all of them.
  static Status open(std::uint32_t size, std::uint32_t rank, const std::string& id, const std::string& name,
                     Communicator** communicator);
  ~Communicator();

  // Sends outgoing[r], of outgoing_bytes[r], to every rank r while receiving incoming[r] from it.
  Status exchange(Call call, const std::vector<const char*>& outgoing, const std::vector<std::size_t>& outgoing_bytes,
                  const std::vector<char*>& incoming, const std::vector<std::size_t>& incoming_bytes);

  // Sends and receives, those with the same peer in the given order. With synchronous streams a send returns before
  // its receive is called, as on a device, by keeping a copy.
  Status send_and_receive(const std::vector<Message>& messages);

  Turnstile& collectives() { return collectives_; }
  Turnstile& messages(bool sending, std::uint32_t peer) { return messages_[2 * peer + (sending ? 1 : 0)]; }
  Status status() const { return broken_; }

  const std::uint32_t size;
  const std::uint32_t rank;
  const std::string id;
  const std::string name;

 private:
  Communicator(std::uint32_t size, std::uint32_t rank, std::string id, std::string name);
  Status attach();
  Status wait_for_ranks(double deadline);
  Channel* channel(bool collective, std::uint32_t source, std::uint32_t destination) const;
  Status run(const char* name, std::vector<Transfer>& transfers);
  bool step_all(std::vector<Transfer>& transfers, bool& moved, std::string& mismatch);
  Status break_down(Status status, const std::string& message);
  void send_in_background(const Message& message, std::uint64_t ticket);

  Segment* segment_ = nullptr;
  std::size_t segment_bytes_ = 0;
  std::size_t channel_bytes_ = 0;
  Turnstile collectives_;
  std::unique_ptr<Turnstile[]> messages_;
  std::uint64_t collective_sequence_ = 0;
  std::atomic<int> background_sends_{0};
  std::atomic<Status> broken_{kSuccess};
};

}  // namespace emulator
