#include "reduction.h"

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>

namespace emulator {

namespace {

// T is the element's type, Sum the type that partial results are kept in.
template <typename T, typename Sum = T>
void reduce_as(void* result, const std::vector<const char*>& parts, std::size_t count, std::uint32_t op) {
  for (std::size_t i = 0; i < count; i++) {
    Sum total = static_cast<Sum>(reinterpret_cast<const T*>(parts[0])[i]);
    for (std::size_t part = 1; part < parts.size(); part++) {
      Sum value = static_cast<Sum>(reinterpret_cast<const T*>(parts[part])[i]);
      switch (op) {
        case kSum: total += value; break;
        case kProduct: total *= value; break;
        case kMaximum: total = std::max(total, value); break;
        default: total = std::min(total, value); break;
      }
    }
    static_cast<T*>(result)[i] = static_cast<T>(total);
  }
}

}  // namespace

std::size_t size_of(std::uint32_t dtype) {
  switch (dtype) {
    case kInt16: case kFloat16: case kUInt16: case kBFloat16: return 2;
    case kInt32: case kFloat32: case kUInt32: return 4;
    case kInt64: case kUInt64: case kFloat64: return 8;
    case kInt128: return 16;
    default: return 1;  // 8-bit integers and floats
  }
}

bool can_reduce(std::uint32_t dtype) { return dtype <= kBFloat16; }

void reduce(void* result, const std::vector<const char*>& parts, std::size_t count, std::uint32_t dtype,
            std::uint32_t op) {
  switch (dtype) {
    case kInt8: return reduce_as<std::int8_t>(result, parts, count, op);
    case kInt16: return reduce_as<std::int16_t>(result, parts, count, op);
    case kInt32: return reduce_as<std::int32_t>(result, parts, count, op);
    case kInt64: return reduce_as<std::int64_t>(result, parts, count, op);
    case kUInt8: return reduce_as<std::uint8_t>(result, parts, count, op);
    case kUInt16: return reduce_as<std::uint16_t>(result, parts, count, op);
    case kUInt32: return reduce_as<std::uint32_t>(result, parts, count, op);
    case kUInt64: return reduce_as<std::uint64_t>(result, parts, count, op);
    case kFloat32: return reduce_as<float>(result, parts, count, op);
    case kFloat64: return reduce_as<double>(result, parts, count, op);
    case kFloat16: return reduce_as<c10::Half, float>(result, parts, count, op);
    case kBFloat16: return reduce_as<c10::BFloat16, float>(result, parts, count, op);
  }
}

}  // namespace emulator
