// The emulated runtime: configuration, the call log, devices, versions and options.
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <mutex>

#include "emulator.h"

using emulator::config;
using emulator::fail;
using emulator::kSuccess;
using emulator::Status;

namespace {

emulator::Config configuration;
thread_local std::int32_t device_of_thread = -1;

std::mutex state_mutex;
std::string last_error = "no error";
std::string call_log;
std::atomic<bool> recording{false};
thread_local int host_code_depth = 0;
int threads_in_host_code = 0;

}  // namespace

// ---- the emulator's own interface, called from Python

CANN_API void emulator_configure(const char* soc, std::uint32_t devices, std::size_t memory_bytes, int asynchronous,
                                 int strict) {
  configuration = {soc, devices, memory_bytes, asynchronous != 0, strict != 0};
}

CANN_API void emulator_record(int enabled) {
  std::lock_guard<std::mutex> lock(state_mutex);
  recording = enabled != 0;
  call_log.clear();
}

CANN_API int emulator_is_recording() { return recording; }

// The calls recorded so far, one "kind:name" a line.
CANN_API const char* emulator_calls() {
  thread_local std::string copied;
  std::lock_guard<std::mutex> lock(state_mutex);
  copied = call_log;
  return copied.c_str();
}

// Brackets operator host code whose outputs' values the emulator computes itself afterwards.
CANN_API void emulator_enter_host_code() {
  host_code_depth++;
  std::lock_guard<std::mutex> lock(state_mutex);
  threads_in_host_code++;
}

CANN_API void emulator_leave_host_code() {
  host_code_depth--;
  std::lock_guard<std::mutex> lock(state_mutex);
  threads_in_host_code--;
}

// Whether this thread is between the two.
CANN_API int emulator_in_host_code() { return host_code_depth > 0; }

namespace emulator {

const Config& config() { return configuration; }

std::int32_t current_device() { return device_of_thread; }

Status fail(Status status, const std::string& message) {
  std::lock_guard<std::mutex> lock(state_mutex);
  last_error = "CANN emulator: " + message;
  return status;
}

void record_call(const char* kind, const char* name) {
  std::lock_guard<std::mutex> lock(state_mutex);
  if (recording) call_log.append(kind).append(":").append(name).append("\n");
}

Status without_numerics(const char* name) {
  std::lock_guard<std::mutex> lock(state_mutex);
  // Any thread's host code counts, because torch_npu's task queue calls operators from a thread of its own.
  if (!configuration.strict || threads_in_host_code > 0) return kSuccess;
  last_error = std::string("CANN emulator: ") + name + " has no numerics (strict mode)";
  return kOperatorFailed;
}

}  // namespace emulator

// ---- devices

CANN_API Status aclInit(const char* /*config_path*/) { return kSuccess; }
CANN_API Status aclFinalize() { return kSuccess; }
CANN_API const char* aclrtGetSocName() { return config().soc.c_str(); }

CANN_API Status aclrtGetDeviceCount(std::uint32_t* count) {
  *count = config().devices;
  const char* visible = std::getenv("ASCEND_RT_VISIBLE_DEVICES");
  if (visible != nullptr && *visible != '\0') {
    *count = 1;
    for (; *visible != '\0'; visible++) *count += *visible == ',';
  }
  return kSuccess;
}

CANN_API Status aclrtSetDevice(std::int32_t device) {
  std::uint32_t count;
  aclrtGetDeviceCount(&count);
  if (device < 0 || device >= static_cast<std::int32_t>(count)) {
    return fail(emulator::kInvalidDevice, "there is no device " + std::to_string(device) + " among " +
                std::to_string(count) + " emulated ones");
  }
  device_of_thread = device;
  return kSuccess;
}

CANN_API Status aclrtGetDevice(std::int32_t* device) {
  if (device_of_thread < 0) return fail(emulator::kNoContext, "no device is set in this thread");
  *device = device_of_thread;
  return kSuccess;
}

CANN_API Status aclrtResetDevice(std::int32_t /*device*/) { return kSuccess; }

// A context is its device's number plus one, as a pointer that is never followed.
CANN_API Status aclrtGetCurrentContext(void** context) {
  if (device_of_thread < 0) return fail(emulator::kNoContext, "no device is set in this thread");
  *context = reinterpret_cast<void*>(static_cast<std::intptr_t>(device_of_thread) + 1);
  return kSuccess;
}

CANN_API Status aclrtSetCurrentContext(void* context) {
  return aclrtSetDevice(static_cast<std::int32_t>(reinterpret_cast<std::intptr_t>(context)) - 1);
}

CANN_API Status aclrtGetPrimaryCtxState(std::int32_t device, std::uint32_t* flags, std::int32_t* active) {
  if (flags != nullptr) *flags = 0;
  *active = device == device_of_thread;
  return kSuccess;
}

// The chosen chip's number of cube cores (kind 0), of vector cores (1) or bytes of L2 cache (2).
CANN_API Status aclGetDeviceCapability(std::uint32_t /*device*/, std::int32_t kind, std::int64_t* value) {
  const std::int64_t cube_cores = config().soc == "Ascend910B3" ? 20 : 24;
  const std::int64_t values[] = {cube_cores, 2 * cube_cores, std::int64_t{192} << 20};
  *value = kind >= 0 && kind < 3 ? values[kind] : 0;
  return kSuccess;
}

CANN_API Status aclrtGetDeviceInfo(std::uint32_t device, std::int32_t attribute, std::int64_t* value) {
  constexpr std::int32_t kVectorCores = 201;  // all others that are asked for count cube cores
  return aclGetDeviceCapability(device, attribute == kVectorCores ? 1 : 0, value);
}

CANN_API Status aclrtDeviceCanAccessPeer(std::int32_t* can_access, std::int32_t /*device*/, std::int32_t /*peer*/) {
  *can_access = 1;
  return kSuccess;
}

CANN_API Status aclrtDeviceEnablePeerAccess(std::int32_t /*peer*/, std::uint32_t /*flags*/) { return kSuccess; }

CANN_API Status aclrtDeviceGetBareTgid(std::int32_t* process) {
  *process = getpid();
  return kSuccess;
}

CANN_API Status aclrtDeviceGetUuid(std::int32_t device, char* uuid) {
  std::memset(uuid, 0, 16);
  uuid[15] = static_cast<char>(device + 1);
  return kSuccess;
}

CANN_API Status aclrtGetLogicDevIdByUserDevId(std::int32_t user, std::int32_t* logic) {
  *logic = user;
  return kSuccess;
}

// ---- versions, attributes and options

CANN_API Status aclsysGetVersionStr(char* /*package*/, char* version) {
  std::strcpy(version, "8.5.0");
  return kSuccess;
}

CANN_API const char* aclGetRecentErrMsg() {
  thread_local std::string copied;
  std::lock_guard<std::mutex> lock(state_mutex);
  copied = last_error;
  return copied.c_str();
}

CANN_API Status aclrtGetLastError(std::int32_t /*level*/) { return kSuccess; }
CANN_API Status aclrtPeekAtLastError(std::int32_t /*level*/) { return kSuccess; }

// The one attribute reported, 0, says that overflow gives inf and nan and does not saturate.
CANN_API Status aclGetCannAttributeList(const std::int32_t** attributes, std::size_t* count) {
  static const std::int32_t kInfNan[] = {0};
  *attributes = kInfNan;
  *count = 1;
  return kSuccess;
}

CANN_API Status aclGetCannAttribute(std::int32_t /*attribute*/, std::int32_t* value) {
  *value = 1;
  return kSuccess;
}

CANN_API Status aclrtGetSysParamOpt(std::int32_t /*option*/, std::int64_t* value) {
  *value = 0;
  return kSuccess;
}

CANN_API Status aclrtSetSysParamOpt(std::int32_t /*option*/, std::int64_t /*value*/) { return kSuccess; }
CANN_API Status aclrtCtxSetSysParamOpt(std::int32_t /*option*/, std::int64_t /*value*/) { return kSuccess; }
CANN_API Status aclSetCompileopt(std::int32_t /*option*/, const char* /*value*/) { return kSuccess; }
CANN_API std::size_t aclGetCompileoptSize(std::int32_t /*option*/) { return 256; }

CANN_API Status aclGetCompileopt(std::int32_t /*option*/, char* value, std::size_t /*size*/) {
  value[0] = '\0';
  return kSuccess;
}

CANN_API Status aclrtSetDeviceSatMode(std::int32_t /*mode*/) { return kSuccess; }
CANN_API Status aclrtSetOpExecuteTimeOut(std::uint32_t /*seconds*/) { return kSuccess; }
CANN_API Status aclrtSetOpWaitTimeout(std::uint32_t /*seconds*/) { return kSuccess; }
CANN_API Status aclrtSetStreamFailureMode(void* /*stream*/, std::uint64_t /*mode*/) { return kSuccess; }
CANN_API Status aclrtSetStreamOverflowSwitch(void* /*stream*/, std::uint32_t /*flag*/) { return kSuccess; }

CANN_API Status aclrtGetStreamOverflowSwitch(void* /*stream*/, std::uint32_t* flag) {
  *flag = 0;
  return kSuccess;
}

CANN_API Status aclrtSubscribeReport(std::uint64_t /*thread*/, void* /*stream*/) { return kSuccess; }
CANN_API Status aclrtUnSubscribeReport(std::uint64_t /*thread*/, void* /*stream*/) { return kSuccess; }

CANN_API Status aclrtProcessReport(std::int32_t milliseconds) {
  usleep(1000 * (milliseconds < 0 ? 1 : milliseconds));  // nothing is ever reported: callbacks run on their stream
  return kSuccess;
}

// No graph is ever being captured.
CANN_API Status aclmdlRICaptureGetInfo(void* /*stream*/, std::int32_t* status, void** model) {
  *status = 0;
  if (model != nullptr) *model = nullptr;
  return kSuccess;
}

CANN_API Status aclmdlInitDump() { return kSuccess; }
CANN_API Status aclmdlSetDump(const char* /*config_path*/) { return kSuccess; }
CANN_API Status aclmdlFinalizeDump() { return kSuccess; }

// ---- logging and profiling: accepted and dropped

CANN_API void aclAppLog(...) {}
CANN_API std::int32_t MsprofRegisterCallback(...) { return 0; }
CANN_API std::int32_t MsprofReportAdditionalInfo(...) { return 0; }
CANN_API std::int32_t MsprofReportApi(...) { return 0; }
CANN_API std::int32_t MsprofReportCompactInfo(...) { return 0; }
CANN_API std::uint64_t MsprofGetHashId(const char* /*text*/, std::size_t /*length*/) { return 0; }

CANN_API std::uint64_t MsprofSysCycleTime() {
  return std::chrono::steady_clock::now().time_since_epoch().count();
}
