// HCCL's data types, as its documentation numbers them, and reductions over them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace emulator {

enum DataType : std::uint32_t {
  kInt8 = 0, kInt16 = 1, kInt32 = 2, kFloat16 = 3, kFloat32 = 4, kInt64 = 5, kUInt64 = 6, kUInt8 = 7, kUInt16 = 8,
  kUInt32 = 9, kFloat64 = 10, kBFloat16 = 11, kInt128 = 12,
};

enum ReduceOp : std::uint32_t { kSum = 0, kProduct = 1, kMaximum = 2, kMinimum = 3 };

std::size_t size_of(std::uint32_t dtype);
bool can_reduce(std::uint32_t dtype);

// result[i] = parts[0][i] op parts[1][i] op ..., in that order; `result` may be one of the parts. 16-bit floats are
// added up in 32 bits and rounded once.
void reduce(void* result, const std::vector<const char*>& parts, std::size_t count, std::uint32_t dtype,
            std::uint32_t op);

}  // namespace emulator
