// Device memory, which is host memory counted per device so that running out of it is reported, and copies.
#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "emulator.h"

using emulator::config;
using emulator::current_device;
using emulator::fail;
using emulator::kSuccess;
using emulator::Status;

namespace {

struct Block {
  std::size_t bytes;
  std::int32_t device;
};

std::mutex memory_mutex;
std::map<void*, Block> blocks;                   // by address, or by handle for physical memory
std::map<std::int32_t, std::size_t> used_bytes;  // by device
std::map<void*, std::size_t> address_ranges;     // reserved ones
std::map<void*, std::size_t> mapped_ranges;

// Counts `bytes` against the current device's memory, or says that they do not fit. Needs memory_mutex, like release.
Status reserve(std::size_t bytes) {
  std::size_t& used = used_bytes[current_device()];
  std::size_t available = config().memory_bytes - used;
  if (bytes > available) {
    return fail(emulator::kOutOfMemory, "device " + std::to_string(current_device()) + " has " +
                std::to_string(available) + " bytes free, " + std::to_string(bytes) + " were asked for");
  }
  used += bytes;
  return kSuccess;
}

Status release(void* key) {
  auto found = blocks.find(key);
  if (found == blocks.end()) return fail(emulator::kInvalidParameter, "what is freed is not device memory");
  used_bytes[found->second.device] -= found->second.bytes;
  blocks.erase(found);
  return kSuccess;
}

// Removes the entry and returns its size, or 0 if there is none.
std::size_t take(std::map<void*, std::size_t>& ranges, void* address) {
  auto found = ranges.find(address);
  if (found == ranges.end()) return 0;
  std::size_t bytes = found->second;
  ranges.erase(found);
  return bytes;
}

void* allocate_host(std::size_t bytes, std::size_t alignment) {
  void* pointer = nullptr;
  return posix_memalign(&pointer, alignment, bytes == 0 ? alignment : bytes) == 0 ? pointer : nullptr;
}

}  // namespace

CANN_API Status aclrtMalloc(void** pointer, std::size_t bytes, std::int32_t /*policy*/) {
  constexpr std::size_t kAlignment = 512;
  std::lock_guard<std::mutex> lock(memory_mutex);
  if (Status status = reserve(bytes)) return status;
  *pointer = allocate_host(bytes, kAlignment);
  if (*pointer == nullptr) {
    used_bytes[current_device()] -= bytes;
    return fail(emulator::kOutOfMemory, "the host has no memory for " + std::to_string(bytes) + " bytes");
  }
  blocks[*pointer] = {bytes, current_device()};
  return kSuccess;
}

CANN_API Status aclrtMallocAlign32(void** pointer, std::size_t bytes, std::int32_t policy) {
  return aclrtMalloc(pointer, bytes, policy);
}

CANN_API Status aclrtFree(void* pointer) {
  std::lock_guard<std::mutex> lock(memory_mutex);
  if (Status status = release(pointer)) return status;
  std::free(pointer);
  return kSuccess;
}

CANN_API Status aclrtGetMemInfo(std::int32_t /*kind*/, std::size_t* free_bytes, std::size_t* total_bytes) {
  std::lock_guard<std::mutex> lock(memory_mutex);
  *total_bytes = config().memory_bytes;
  *free_bytes = *total_bytes - used_bytes[current_device()];
  return kSuccess;
}

// ---- expandable segments: an address range is reserved first, and physical memory mapped into it piece by piece

CANN_API Status aclrtReserveMemAddress(void** address, std::size_t bytes, std::size_t /*alignment*/, void* wanted,
                                       std::uint64_t /*flags*/) {
  *address = mmap(wanted, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (*address == MAP_FAILED) return fail(emulator::kOutOfMemory, "the host has no address range left");
  std::lock_guard<std::mutex> lock(memory_mutex);
  address_ranges[*address] = bytes;
  return kSuccess;
}

CANN_API Status aclrtReleaseMemAddress(void* address) {
  std::lock_guard<std::mutex> lock(memory_mutex);
  std::size_t bytes = take(address_ranges, address);
  if (bytes == 0) return fail(emulator::kInvalidParameter, "an address range to release was not reserved");
  munmap(address, bytes);
  return kSuccess;
}

CANN_API Status aclrtMallocPhysical(void** handle, std::size_t bytes, const void* /*properties*/,
                                    std::uint64_t /*flags*/) {
  std::lock_guard<std::mutex> lock(memory_mutex);
  if (Status status = reserve(bytes)) return status;
  *handle = new char;  // only its address is used
  blocks[*handle] = {bytes, current_device()};
  return kSuccess;
}

CANN_API Status aclrtFreePhysical(void* handle) {
  std::lock_guard<std::mutex> lock(memory_mutex);
  if (Status status = release(handle)) return status;
  delete static_cast<char*>(handle);
  return kSuccess;
}

CANN_API Status aclrtMapMem(void* address, std::size_t bytes, std::size_t /*offset*/, void* /*handle*/,
                            std::uint64_t /*flags*/) {
  if (mprotect(address, bytes, PROT_READ | PROT_WRITE) != 0) {
    return fail(emulator::kOutOfMemory, "the host cannot map " + std::to_string(bytes) + " bytes");
  }
  std::lock_guard<std::mutex> lock(memory_mutex);
  mapped_ranges[address] = bytes;
  return kSuccess;
}

CANN_API Status aclrtUnmapMem(void* address) {
  std::lock_guard<std::mutex> lock(memory_mutex);
  std::size_t bytes = take(mapped_ranges, address);
  if (bytes == 0) return fail(emulator::kInvalidParameter, "an address to unmap is not mapped");
  madvise(address, bytes, MADV_DONTNEED);
  mprotect(address, bytes, PROT_NONE);
  return kSuccess;
}

// ---- pinned host memory

CANN_API Status aclrtMallocHost(void** pointer, std::size_t bytes) {
  constexpr std::size_t kAlignment = 64;
  *pointer = allocate_host(bytes, kAlignment);
  return *pointer != nullptr ? kSuccess : fail(emulator::kOutOfMemory, "the host has no memory left");
}

CANN_API Status aclrtMallocHostWithCfg(void** pointer, std::uint64_t bytes, void* /*configuration*/) {
  return aclrtMallocHost(pointer, bytes);
}

CANN_API Status aclrtFreeHost(void* pointer) {
  std::free(pointer);
  return kSuccess;
}

// ---- copies

CANN_API Status aclrtMemcpy(void* destination, std::size_t capacity, const void* source, std::size_t count,
                            std::int32_t /*kind*/) {
  if (count > capacity) return fail(emulator::kInvalidParameter, "a copy exceeds its destination");
  std::memmove(destination, source, count);
  return kSuccess;
}

CANN_API Status aclrtMemcpyAsync(void* destination, std::size_t capacity, const void* source, std::size_t count,
                                 std::int32_t kind, void* stream) {
  return emulator::enqueue(stream, [=] { return aclrtMemcpy(destination, capacity, source, count, kind); });
}

CANN_API Status aclrtMemset(void* destination, std::size_t capacity, std::int32_t value, std::size_t count) {
  if (count > capacity) return fail(emulator::kInvalidParameter, "a memset exceeds its destination");
  std::memset(destination, value, count);
  return kSuccess;
}

CANN_API Status aclrtMemsetAsync(void* destination, std::size_t capacity, std::int32_t value, std::size_t count,
                                 void* stream) {
  return emulator::enqueue(stream, [=] { return aclrtMemset(destination, capacity, value, count); });
}
