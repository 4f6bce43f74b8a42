// Streams and events. A stream is a first-in-first-out queue of host functions: run at once, or on a thread of its own.
#include <chrono>
#include <condition_variable>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "emulator.h"

using emulator::config;
using emulator::Status;
using Clock = std::chrono::steady_clock;

namespace {

class Stream {
 public:
  explicit Stream(std::int32_t id) : id(id) {}

  Status run(std::function<Status()> task) {
    if (!config().asynchronous) return task();
    {
      std::lock_guard<std::mutex> lock(mutex_);
      if (!worker_.joinable()) worker_ = std::thread([this] { work(); });
      queue_.push_back(std::move(task));
    }
    changed_.notify_all();
    return emulator::kSuccess;
  }

  // Waits until the queue is empty; returns and clears the first failure since the last call.
  Status synchronize(std::chrono::milliseconds timeout) {
    std::unique_lock<std::mutex> lock(mutex_);
    auto is_idle = [this] { return queue_.empty() && !running_; };
    if (timeout.count() < 0) {
      changed_.wait(lock, is_idle);
    } else if (!changed_.wait_for(lock, timeout, is_idle)) {
      return emulator::fail(emulator::kStreamTimeout, "timed out while waiting for a stream");
    }
    return std::exchange(error_, emulator::kSuccess);
  }

  bool idle() {
    std::lock_guard<std::mutex> lock(mutex_);
    return queue_.empty() && !running_;
  }

  void stop() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    changed_.notify_all();
    if (worker_.joinable()) worker_.join();
  }

  const std::int32_t id;

 private:
  void work() {
    std::unique_lock<std::mutex> lock(mutex_);
    while (true) {
      changed_.wait(lock, [this] { return stopping_ || !queue_.empty(); });
      if (queue_.empty()) return;
      auto task = std::move(queue_.front());
      queue_.pop_front();
      running_ = true;
      lock.unlock();
      Status status = task();
      task = nullptr;  // releases what the task holds before anybody sees the stream idle
      lock.lock();
      running_ = false;
      if (error_ == emulator::kSuccess) error_ = status;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<Status()>> queue_;
  std::thread worker_;
  bool running_ = false;
  bool stopping_ = false;
  Status error_ = emulator::kSuccess;
};

constexpr std::chrono::milliseconds kForever{-1};

std::mutex streams_mutex;

// Never destroyed: other threads may still use streams while the process exits.
std::map<void*, std::shared_ptr<Stream>>& streams() {
  static auto* all = new std::map<void*, std::shared_ptr<Stream>>;
  return *all;
}

std::shared_ptr<Stream> find_stream(void* handle) {
  std::lock_guard<std::mutex> lock(streams_mutex);
  auto found = streams().find(handle);
  if (found != streams().end()) return found->second;
  if (handle != nullptr) return nullptr;
  return streams()[nullptr] = std::make_shared<Stream>(0);  // the null handle is the default stream
}

Status synchronize(void* handle, std::chrono::milliseconds timeout) {
  auto stream = find_stream(handle);
  return stream ? stream->synchronize(timeout) : emulator::fail(emulator::kInvalidParameter, "unknown stream");
}

struct Event {
  std::mutex mutex;
  std::condition_variable changed;
  std::uint64_t recorded = 0;   // records issued by the host
  std::uint64_t completed = 0;  // records that a stream has reached
  Clock::time_point time;

  bool complete() {
    std::lock_guard<std::mutex> lock(mutex);
    return completed >= recorded;
  }

  void wait(std::uint64_t record) {
    std::unique_lock<std::mutex> lock(mutex);
    changed.wait(lock, [&] { return completed >= record; });
  }

  std::uint64_t last_record() {
    std::lock_guard<std::mutex> lock(mutex);
    return recorded;
  }
};

// An event's handle owns one reference; tasks that are still queued own others, so it may be destroyed early.
using EventHandle = std::shared_ptr<Event>;

EventHandle& event(void* handle) { return *static_cast<EventHandle*>(handle); }

}  // namespace

Status emulator::enqueue(void* handle, std::function<Status()> task) {
  auto stream = find_stream(handle);
  return stream ? stream->run(std::move(task)) : fail(kInvalidParameter, "unknown stream");
}

CANN_API Status aclrtCreateStreamWithConfig(void** handle, std::uint32_t /*priority*/, std::uint32_t /*flags*/) {
  static std::int32_t next_id = 1;
  std::lock_guard<std::mutex> lock(streams_mutex);
  auto stream = std::make_shared<Stream>(next_id++);
  *handle = stream.get();
  streams()[*handle] = std::move(stream);
  return emulator::kSuccess;
}

CANN_API Status aclrtCreateStream(void** handle) { return aclrtCreateStreamWithConfig(handle, 0, 0); }

CANN_API Status aclrtDestroyStream(void* handle) {
  auto stream = find_stream(handle);
  if (!stream) return emulator::fail(emulator::kInvalidParameter, "unknown stream");
  stream->synchronize(kForever);
  stream->stop();
  std::lock_guard<std::mutex> lock(streams_mutex);
  streams().erase(handle);
  return emulator::kSuccess;
}

CANN_API Status aclrtDestroyStreamForce(void* handle) { return aclrtDestroyStream(handle); }

CANN_API Status aclrtSynchronizeStream(void* handle) { return synchronize(handle, kForever); }

CANN_API Status aclrtSynchronizeStreamWithTimeout(void* handle, std::int32_t milliseconds) {
  return synchronize(handle, std::chrono::milliseconds(milliseconds));
}

CANN_API Status aclrtSynchronizeDeviceWithTimeout(std::int32_t milliseconds) {
  std::vector<void*> handles;
  {
    std::lock_guard<std::mutex> lock(streams_mutex);
    for (auto& entry : streams()) handles.push_back(entry.first);
  }
  Status first_failure = emulator::kSuccess;
  for (void* handle : handles) {
    Status status = synchronize(handle, std::chrono::milliseconds(milliseconds));
    if (first_failure == emulator::kSuccess) first_failure = status;
  }
  return first_failure;
}

CANN_API Status aclrtSynchronizeDevice() { return aclrtSynchronizeDeviceWithTimeout(-1); }

CANN_API Status aclrtStreamQuery(void* handle, std::int32_t* status) {
  auto stream = find_stream(handle);
  if (!stream) return emulator::fail(emulator::kInvalidParameter, "unknown stream");
  *status = stream->idle() ? 0 : 1;  // complete, not ready
  return emulator::kSuccess;
}

CANN_API Status aclrtStreamGetId(void* handle, std::int32_t* id) {
  auto stream = find_stream(handle);
  if (!stream) return emulator::fail(emulator::kInvalidParameter, "unknown stream");
  *id = stream->id;
  return emulator::kSuccess;
}

CANN_API Status aclrtLaunchCallback(void (*function)(void*), void* argument, std::int32_t /*block*/, void* stream) {
  return emulator::enqueue(stream, [=] {
    function(argument);
    return emulator::kSuccess;
  });
}

CANN_API Status aclrtLaunchHostFunc(void* stream, void (*function)(void*), void* argument) {
  return aclrtLaunchCallback(function, argument, 0, stream);
}

CANN_API Status aclrtCreateEventWithFlag(void** handle, std::uint32_t /*flags*/) {
  *handle = new EventHandle(std::make_shared<Event>());
  return emulator::kSuccess;
}

CANN_API Status aclrtCreateEventExWithFlag(void** handle, std::uint32_t flags) {
  return aclrtCreateEventWithFlag(handle, flags);
}

CANN_API Status aclrtDestroyEvent(void* handle) {
  delete static_cast<EventHandle*>(handle);
  return emulator::kSuccess;
}

CANN_API Status aclrtRecordEvent(void* handle, void* stream) {
  EventHandle target = event(handle);
  std::uint64_t record;
  {
    std::lock_guard<std::mutex> lock(target->mutex);
    record = ++target->recorded;
  }
  return emulator::enqueue(stream, [=] {
    {
      std::lock_guard<std::mutex> lock(target->mutex);
      target->completed = record;
      target->time = Clock::now();
    }
    target->changed.notify_all();
    return emulator::kSuccess;
  });
}

CANN_API Status aclrtResetEvent(void* /*handle*/, void* /*stream*/) { return emulator::kSuccess; }

CANN_API Status aclrtStreamWaitEvent(void* stream, void* handle) {
  EventHandle target = event(handle);
  std::uint64_t record = target->last_record();  // records issued later do not count
  return emulator::enqueue(stream, [=] {
    target->wait(record);
    return emulator::kSuccess;
  });
}

CANN_API Status aclrtSynchronizeEvent(void* handle) {
  EventHandle target = event(handle);
  target->wait(target->last_record());
  return emulator::kSuccess;
}

CANN_API Status aclrtQueryEventStatus(void* handle, std::int32_t* status) {
  *status = event(handle)->complete() ? 1 : 0;  // complete, not ready
  return emulator::kSuccess;
}

CANN_API Status aclrtQueryEventWaitStatus(void* handle, std::int32_t* status) {
  *status = event(handle)->complete() ? 0 : 1;  // the other way round from aclrtQueryEventStatus
  return emulator::kSuccess;
}

CANN_API Status aclrtEventElapsedTime(float* milliseconds, void* start, void* end) {
  *milliseconds = std::chrono::duration<float, std::milli>(event(end)->time - event(start)->time).count();
  return emulator::kSuccess;
}

CANN_API Status aclrtEventGetTimestamp(void* handle, std::uint64_t* microseconds) {
  auto since_epoch = event(handle)->time.time_since_epoch();
  *microseconds = std::chrono::duration_cast<std::chrono::microseconds>(since_epoch).count();
  return emulator::kSuccess;
}
