#include "communicator.h"

#include <fcntl.h>
#include <linux/futex.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <climits>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>

namespace emulator {

// A one-way byte stream. The counters only grow; their difference is what the channel holds.
struct Channel {
  std::atomic<std::uint64_t> written;
  std::atomic<std::uint64_t> read;
  std::uint64_t capacity;
  char data[];

  std::size_t put(const char* source, std::size_t bytes) {
    std::uint64_t position = written.load(std::memory_order_relaxed);
    bytes = std::min<std::size_t>(bytes, capacity - (position - read.load(std::memory_order_acquire)));
    std::size_t offset = position % capacity, first = std::min<std::size_t>(bytes, capacity - offset);
    std::memcpy(data + offset, source, first);
    std::memcpy(data, source + first, bytes - first);
    written.store(position + bytes, std::memory_order_release);
    return bytes;
  }

  std::size_t get(char* destination, std::size_t bytes) {
    std::uint64_t position = read.load(std::memory_order_relaxed);
    bytes = std::min<std::size_t>(bytes, written.load(std::memory_order_acquire) - position);
    std::size_t offset = position % capacity, first = std::min<std::size_t>(bytes, capacity - offset);
    std::memcpy(destination, data + offset, first);
    std::memcpy(destination + first, data, bytes - first);
    read.store(position + bytes, std::memory_order_release);
    return bytes;
  }
};

// `doorbell` counts the events that may let one of the rank's threads go on; those threads sleep on it.
struct RankState {
  std::atomic<std::uint32_t> doorbell;
  std::atomic<std::int32_t> process;
};

// The shared segment: this header, a RankState for each rank, then the channels.
struct Segment {
  std::atomic<std::uint32_t> attached;
  RankState ranks[];

  void ring(std::uint32_t rank) {
    ranks[rank].doorbell.fetch_add(1, std::memory_order_release);
    syscall(SYS_futex, &ranks[rank].doorbell, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
  }

  // Sleeps unless the rank's doorbell has rung since `seen` was read; for at most a tenth of a second.
  void sleep(std::uint32_t rank, std::uint32_t seen) {
    timespec tenth{0, 100'000'000};
    syscall(SYS_futex, &ranks[rank].doorbell, FUTEX_WAIT, seen, &tenth, nullptr, 0);
  }
};

namespace {

constexpr std::size_t kSegmentBudget = std::size_t{4} << 20;
constexpr std::size_t kSmallestChannel = std::size_t{8} << 10;

double now() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

double seconds_from(const char* variable, double otherwise) {
  const char* value = std::getenv(variable);
  return value != nullptr && std::atof(value) > 0 ? std::atof(value) : otherwise;
}

// A process that has ended may still be a zombie that nobody has waited for.
bool process_has_ended(std::int32_t process) {
  std::FILE* file = std::fopen(("/proc/" + std::to_string(process) + "/stat").c_str(), "r");
  if (file == nullptr) return true;
  char state = 'R';
  bool parsed = std::fscanf(file, "%*d (%*[^)]) %c", &state) == 1;
  std::fclose(file);
  return parsed && state == 'Z';
}

std::string describe(const Call& call) {
  return std::string(call.name) + " of " + std::to_string(call.bytes) + " bytes (dtype " + std::to_string(call.dtype) +
         ")";
}

Call make_call(const char* name, std::uint32_t dtype, std::uint64_t bytes) {
  Call call{};
  std::strncpy(call.name, name, sizeof(call.name) - 1);
  call.dtype = dtype;
  call.bytes = bytes;
  return call;
}

std::size_t round_up(std::size_t bytes) { return (bytes + 63) / 64 * 64; }

}  // namespace

double connect_timeout() { return seconds_from("HCCL_CONNECT_TIMEOUT", 120); }
double execution_timeout() { return seconds_from("HCCL_EXEC_TIMEOUT", 300); }

Transfer::Transfer(bool sending_, std::uint32_t peer_, ChannelEnd* end, const Call& call, void* data)
    : sending(sending_),
      peer(peer_),
      end_(end),
      ticket_(end->next_ticket++),
      call_(call),
      received_{},
      data_(static_cast<char*>(data)) {}

bool Transfer::step(std::string& mismatch) {
  if (end_->current != ticket_) return false;
  Channel& channel = *end_->channel;
  std::size_t before = done_;
  if (done_ < sizeof(Call)) {
    std::size_t left = sizeof(Call) - done_;
    done_ += sending ? channel.put(reinterpret_cast<char*>(&call_) + done_, left)
                     : channel.get(reinterpret_cast<char*>(&received_) + done_, left);
    if (!sending && done_ == sizeof(Call) && std::memcmp(&received_, &call_, sizeof(Call)) != 0) {
      mismatch = "rank " + std::to_string(peer) + " calls " + describe(received_) + " where this rank expects " +
                 describe(call_);
      return false;
    }
  }
  if (done_ >= sizeof(Call)) {
    std::size_t offset = done_ - sizeof(Call), left = call_.bytes - offset;
    done_ += sending ? channel.put(data_ + offset, left) : channel.get(data_ + offset, left);
  }
  if (finished()) end_->current++;
  return done_ != before;
}

Communicator::Communicator(std::uint32_t size_, std::uint32_t rank_, const std::string& id_, const std::string& name_)
    : size(size_), rank(rank_), id(id_), name(name_), ends_(new ChannelEnd[4 * size_]) {}

Status Communicator::open(std::uint32_t size, std::uint32_t rank, const std::string& id, const std::string& name,
                          Communicator** communicator) {
  auto* opened = new Communicator(size, rank, id, name.empty() ? "group_name_" + id : name);
  if (Status status = opened->attach()) {
    delete opened;
    return status;
  }
  *communicator = opened;
  return kSuccess;
}

Communicator::~Communicator() {
  for (double deadline = now() + execution_timeout(); background_sends_ > 0 && now() < deadline;) usleep(1000);
  if (segment_ != nullptr) munmap(segment_, segment_bytes_);
}

// Rank 0 makes the segment's file and removes it again once every rank has mapped it, so that a crash later on leaves
// nothing behind. Its pid in the name lets a later run remove what a crash in between has left.
Status Communicator::attach() {
  const std::string path = "/dev/shm/pangu-cann-emulator." + id, unfinished = path + ".tmp";
  const std::size_t channels = 2 * std::size_t{size} * size;
  const std::size_t header = round_up(sizeof(Segment) + size * sizeof(RankState));
  const std::size_t channel_bytes = round_up(sizeof(Channel) + std::max(kSegmentBudget / channels, kSmallestChannel));
  const double deadline = now() + connect_timeout();
  segment_bytes_ = header + channels * channel_bytes;
  int file = -1;
  if (rank == 0) {
    file = ::open(unfinished.c_str(), O_CREAT | O_EXCL | O_RDWR, 0600);
    if (file < 0 || posix_fallocate(file, 0, segment_bytes_) != 0 || rename(unfinished.c_str(), path.c_str()) != 0) {
      unlink(unfinished.c_str());
      return fail(kHcclSystemCall, "cannot reserve " + std::to_string(segment_bytes_) + " bytes in /dev/shm: " +
                  std::strerror(errno) + " (a container needs a larger --shm-size)");
    }
  }
  while (file < 0 && now() < deadline) {
    file = ::open(path.c_str(), O_RDWR);
    if (file < 0) usleep(2000);
  }
  void* mapped = file < 0 ? MAP_FAILED : mmap(nullptr, segment_bytes_, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
  if (file >= 0) close(file);
  if (mapped == MAP_FAILED) return fail(kHcclTimeout, "rank 0 of communicator " + name + " did not appear");
  segment_ = static_cast<Segment*>(mapped);
  for (std::uint32_t purpose = 0; purpose < 2; purpose++) {
    for (std::uint32_t peer = 0; peer < size; peer++) {
      for (bool sending : {false, true}) {
        std::uint32_t source = sending ? rank : peer, destination = sending ? peer : rank;
        std::size_t index = (std::size_t{purpose} * size + source) * size + destination;
        auto* channel = reinterpret_cast<Channel*>(static_cast<char*>(mapped) + header + index * channel_bytes);
        channel->capacity = channel_bytes - sizeof(Channel);
        end(static_cast<Purpose>(purpose), sending, peer)->channel = channel;
      }
    }
  }
  segment_->ranks[rank].process = getpid();
  segment_->attached++;
  while (segment_->attached < size && now() < deadline) usleep(200);
  if (rank == 0) unlink(path.c_str());
  if (segment_->attached == size) return kSuccess;
  return fail(kHcclTimeout, "only " + std::to_string(segment_->attached) + " of " + std::to_string(size) +
              " ranks joined communicator " + name + " within " + std::to_string(connect_timeout()) +
              " s (HCCL_CONNECT_TIMEOUT)");
}

ChannelEnd* Communicator::end(Purpose purpose, bool sending, std::uint32_t peer) {
  return &ends_[4 * peer + 2 * (purpose == Purpose::kMessages) + sending];
}

Transfers Communicator::plan_exchange(const char* call_name, std::uint32_t dtype, const std::vector<Span>& outgoing,
                                      const std::vector<Span>& incoming) {
  Transfers transfers;
  for (std::uint32_t peer = 0; peer < size; peer++) {
    if (peer == rank) continue;
    transfers.emplace_back(true, peer, end(Purpose::kCollectives, true, peer),
                           make_call(call_name, dtype, outgoing[peer].bytes), outgoing[peer].data);
    transfers.emplace_back(false, peer, end(Purpose::kCollectives, false, peer),
                           make_call(call_name, dtype, incoming[peer].bytes), incoming[peer].data);
  }
  return transfers;
}

Transfer Communicator::plan_message(const char* call_name, std::uint32_t dtype, bool sending, std::uint32_t peer,
                                    Span span) {
  return {sending, peer, end(Purpose::kMessages, sending, peer), make_call(call_name, dtype, span.bytes), span.data};
}

Status Communicator::run(const char* call_name, Transfers& transfers) {
  const double deadline = now() + execution_timeout();
  while (true) {
    const std::uint32_t seen = segment_->ranks[rank].doorbell.load(std::memory_order_acquire);
    if (broken_) return broken_;
    bool moved = false, finished = true;
    std::string waiting_for, mismatch;
    for (Transfer& transfer : transfers) {
      if (transfer.finished()) continue;
      if (transfer.step(mismatch)) {
        moved = true;
        segment_->ring(transfer.peer);
      }
      if (!mismatch.empty()) return give_up(kHcclMismatch, std::string(call_name) + ": " + mismatch);
      if (transfer.finished()) continue;
      finished = false;
      waiting_for += " " + std::to_string(transfer.peer);
    }
    if (moved) segment_->ring(rank);  // another thread's transfer may be next in line
    if (finished) return kSuccess;
    if (moved) continue;
    segment_->sleep(rank, seen);
    if (segment_->ranks[rank].doorbell != seen) continue;
    for (Transfer& transfer : transfers) {
      if (!transfer.finished() && process_has_ended(segment_->ranks[transfer.peer].process)) {
        std::string ignored;
        if (transfer.step(ignored)) break;  // what it sent before it ended
        return give_up(kHcclRemote, std::string(call_name) + ": the process of rank " + std::to_string(transfer.peer) +
                       " has ended");
      }
    }
    if (now() > deadline) {
      return give_up(kHcclTimeout, std::string(call_name) + ": waited " + std::to_string(execution_timeout()) +
                     " s (HCCL_EXEC_TIMEOUT) for rank" + waiting_for);
    }
  }
}

void Communicator::run_in_background(const char* call_name, Transfer send, std::shared_ptr<std::string> data) {
  std::string mismatch;
  if (send.step(mismatch)) segment_->ring(send.peer);
  if (send.finished()) return;
  background_sends_++;
  std::thread([this, call_name, send, keep_alive = data] {
    Transfers transfers{send};
    run(call_name, transfers);
    background_sends_--;
  }).detach();
}

// Everything this communicator would do afterwards is out of step with its peers, so it fails too.
Status Communicator::give_up(Status status, const std::string& message) {
  Status expected = kSuccess;
  std::string text = "rank " + std::to_string(rank) + " of " + std::to_string(size) + " in " + name + ": " + message;
  fail(status, text);
  if (broken_.compare_exchange_strong(expected, status)) std::fprintf(stderr, "CANN emulator: %s\n", text.c_str());
  segment_->ring(rank);
  return status;
}

}  // namespace emulator
