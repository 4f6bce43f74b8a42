// What the emulated CANN libraries share: configuration, the last error, the call log and the streams' work queues.
// Everything here lives in libascendcl.so, which the other libraries link against.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

#define EMULATOR_EXPORT __attribute__((visibility("default")))
#define CANN_API extern "C" EMULATOR_EXPORT

namespace emulator {

// aclError and HcclResult are both ints whose zero is success.
using Status = int;
constexpr Status kSuccess = 0;
constexpr Status kInvalidParameter = 107000;
constexpr Status kInvalidDevice = 107001;
constexpr Status kNoContext = 107002;
constexpr Status kNotSupported = 207000;
constexpr Status kOutOfMemory = 207001;
constexpr Status kStreamTimeout = 507046;
constexpr Status kOperatorFailed = 561000;

struct Config {
  std::string soc = "Ascend910B2";
  std::uint32_t devices = 8;
  std::size_t memory_bytes = std::size_t{64} << 30;
  bool asynchronous = false;
  bool strict = true;
};

EMULATOR_EXPORT const Config& config();

// The device that this thread has set, or -1.
EMULATOR_EXPORT std::int32_t current_device();

// Keeps `message` for aclGetRecentErrMsg, which torch_npu appends to the exception it raises, and returns `status`.
EMULATOR_EXPORT Status fail(Status status, const std::string& message);

// Appends "kind:name" to the call log when it is being recorded.
EMULATOR_EXPORT void record_call(const char* kind, const char* name);

// Runs `task` in the order of `stream`: at once when streams are synchronous, else on the stream's own thread, whose
// first failure is returned by the next synchronization.
EMULATOR_EXPORT Status enqueue(void* stream, std::function<Status()> task);

// What an operator function without numerics returns: success, leaving the memory of its outputs as it is, or an error
// in strict mode, unless it is called by host code whose outputs the emulator computes (see cpu_fallback.cpp).
EMULATOR_EXPORT Status without_numerics(const char* name);

}  // namespace emulator
