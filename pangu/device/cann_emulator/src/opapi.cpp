// The operator interface: the objects that host code builds, and the few aclnn functions which torch_npu calls straight
// from C++, where no dispatcher entry can be replaced. All other aclnn names are generated (see libraries.py): they are
// recorded and do nothing.
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstring>
#include <memory>
#include <vector>

#include "emulator.h"

using emulator::kSuccess;
using emulator::Status;

namespace {

enum DataType : std::int32_t {
  kFloat = 0, kFloat16 = 1, kInt8 = 2, kInt32 = 3, kUInt8 = 4, kInt16 = 6, kInt64 = 9, kDouble = 11, kBool = 12,
  kBFloat16 = 27,
};

struct Tensor {
  std::vector<std::int64_t> sizes;
  std::vector<std::int64_t> strides;
  std::int64_t offset;
  std::int32_t dtype;
  char* data;
};

struct Scalar {
  std::int32_t dtype;
  char bytes[16];
};

struct IntArray {
  std::vector<std::int64_t> values;
};

struct Opaque {};

// An element between two types: integers keep all their bits.
struct Number {
  std::int64_t integer;
  double real;
};

template <typename T>
Number load_as(const char* address) {
  T value;
  std::memcpy(&value, address, sizeof(T));
  double real = static_cast<double>(value);
  return {std::is_integral_v<T> ? static_cast<std::int64_t>(value) : static_cast<std::int64_t>(real), real};
}

template <typename T>
bool store_as(char* address, Number number) {
  T value = std::is_integral_v<T> ? static_cast<T>(number.integer) : static_cast<T>(static_cast<float>(number.real));
  if constexpr (std::is_same_v<T, double>) value = number.real;
  if constexpr (std::is_same_v<T, bool>) value = number.real != 0;
  std::memcpy(address, &value, sizeof(T));
  return true;
}

Number load(const char* address, std::int32_t dtype) {
  switch (dtype) {
    case kFloat: return load_as<float>(address);
    case kFloat16: return load_as<c10::Half>(address);
    case kBFloat16: return load_as<c10::BFloat16>(address);
    case kDouble: return load_as<double>(address);
    case kInt8: return load_as<std::int8_t>(address);
    case kInt16: return load_as<std::int16_t>(address);
    case kInt32: return load_as<std::int32_t>(address);
    case kInt64: return load_as<std::int64_t>(address);
    case kBool: return load_as<bool>(address);
    default: return load_as<std::uint8_t>(address);
  }
}

bool store(char* address, std::int32_t dtype, Number number) {
  switch (dtype) {
    case kFloat: return store_as<float>(address, number);
    case kFloat16: return store_as<c10::Half>(address, number);
    case kBFloat16: return store_as<c10::BFloat16>(address, number);
    case kDouble: return store_as<double>(address, number);
    case kInt8: return store_as<std::int8_t>(address, number);
    case kInt16: return store_as<std::int16_t>(address, number);
    case kInt32: return store_as<std::int32_t>(address, number);
    case kInt64: return store_as<std::int64_t>(address, number);
    case kBool: return store_as<bool>(address, number);
    case kUInt8: return store_as<std::uint8_t>(address, number);
    default: return false;
  }
}

std::int64_t bytes_of(std::int32_t dtype) {
  switch (dtype) {
    case kInt8: case kUInt8: case kBool: return 1;
    case kFloat16: case kBFloat16: case kInt16: return 2;
    case kInt64: case kDouble: return 8;
    default: return 4;
  }
}

// Calls visit(address, index) for every element, in row-major order.
template <typename Visit>
void for_each_element(const Tensor& tensor, Visit visit) {
  std::int64_t count = 1;
  for (std::int64_t size : tensor.sizes) count *= size;
  std::vector<std::int64_t> index(tensor.sizes.size(), 0);
  for (std::int64_t i = 0; i < count; i++) {
    std::int64_t position = tensor.offset;
    for (std::size_t dim = 0; dim < index.size(); dim++) position += index[dim] * tensor.strides[dim];
    visit(tensor.data + position * bytes_of(tensor.dtype), index);
    for (std::size_t dim = index.size(); dim-- > 0 && ++index[dim] == tensor.sizes[dim];) index[dim] = 0;
  }
}

// The element of `source` that broadcasting, after a shift, puts at `index`; or null where there is none.
const char* element_at(const Tensor& source, const std::vector<std::int64_t>& index,
                       const std::vector<std::int64_t>& shift) {
  std::size_t skipped = index.size() - source.sizes.size();
  std::int64_t position = source.offset;
  for (std::size_t dim = 0; dim < source.sizes.size(); dim++) {
    std::int64_t i = index[skipped + dim] - (shift.empty() ? 0 : shift[dim]);
    if (shift.empty() && source.sizes[dim] == 1) i = 0;
    if (i < 0 || i >= source.sizes[dim]) return nullptr;
    position += i * source.strides[dim];
  }
  return source.data + position * bytes_of(source.dtype);
}

// target[index] = source[index - shift], or `fill` where the source has no such element.
Status copy(const Tensor& source, const Tensor& target, const std::vector<std::int64_t>& shift, Number fill) {
  bool stored = true;
  for_each_element(target, [&](char* address, const std::vector<std::int64_t>& index) {
    const char* element = element_at(source, index, shift);
    stored &= store(address, target.dtype, element == nullptr ? fill : load(element, source.dtype));
  });
  if (stored) return kSuccess;
  return emulator::fail(emulator::kOperatorFailed, "no copy to dtype " + std::to_string(target.dtype));
}

using Executor = std::function<Status()>;

Status prepare(std::uint64_t* workspace_bytes, Executor** executor, Executor work) {
  *workspace_bytes = 0;
  *executor = new Executor(std::move(work));
  return kSuccess;
}

Status launch(const char* name, Executor* executor, void* stream) {
  emulator::record_call("aclnn", name);
  return emulator::enqueue(stream, [owned = std::shared_ptr<Executor>(executor)] { return (*owned)(); });
}

}  // namespace

// ---- objects

CANN_API Tensor* aclCreateTensor(const std::int64_t* sizes, std::uint64_t dims, std::int32_t dtype,
                                 const std::int64_t* strides, std::int64_t offset, std::int32_t /*format*/,
                                 const std::int64_t* /*storage_sizes*/, std::uint64_t /*storage_dims*/, void* data) {
  std::vector<std::int64_t> shape(sizes, sizes + dims), steps;
  if (strides != nullptr) steps.assign(strides, strides + dims);
  return new Tensor{shape, steps, offset, dtype, static_cast<char*>(data)};
}

CANN_API Status aclDestroyTensor(const Tensor* tensor) {
  delete tensor;
  return kSuccess;
}

CANN_API Status aclGetViewShape(const Tensor* tensor, std::int64_t** sizes, std::uint64_t* dims) {
  *dims = tensor->sizes.size();
  *sizes = new std::int64_t[*dims];  // the caller deletes it
  std::copy(tensor->sizes.begin(), tensor->sizes.end(), *sizes);
  return kSuccess;
}

CANN_API Scalar* aclCreateScalar(const void* value, std::int32_t dtype) {
  auto* scalar = new Scalar{dtype, {}};
  std::memcpy(scalar->bytes, value, bytes_of(dtype));
  return scalar;
}

CANN_API Status aclDestroyScalar(const Scalar* scalar) {
  delete scalar;
  return kSuccess;
}

CANN_API IntArray* aclCreateIntArray(const std::int64_t* values, std::uint64_t count) {
  return new IntArray{{values, values + count}};
}

CANN_API Status aclDestroyIntArray(const IntArray* array) {
  delete array;
  return kSuccess;
}

CANN_API Opaque* aclCreateTensorList(const Tensor* const* tensors, std::uint64_t count) {
  for (std::uint64_t i = 0; i < count; i++) delete tensors[i];  // the list owns them, and nothing reads lists
  return new Opaque;
}

CANN_API Status aclDestroyTensorList(const Opaque* list) {
  delete list;
  return kSuccess;
}

CANN_API Opaque* aclCreateBoolArray(const bool* /*values*/, std::uint64_t /*count*/) { return new Opaque; }
CANN_API Opaque* aclCreateFloatArray(const float* /*values*/, std::uint64_t /*count*/) { return new Opaque; }
CANN_API Opaque* aclCreateScalarList(const Scalar* const* /*values*/, std::uint64_t /*count*/) { return new Opaque; }

CANN_API Status aclDestroyBoolArray(const Opaque* array) {
  delete array;
  return kSuccess;
}

CANN_API Status aclDestroyFloatArray(const Opaque* array) {
  delete array;
  return kSuccess;
}

CANN_API Status aclDestroyScalarList(const Opaque* list) {
  delete list;
  return kSuccess;
}

CANN_API Status aclDestroyAclOpExecutor(const Executor* executor) {
  delete executor;
  return kSuccess;
}

// ---- functions with numerics

CANN_API Status aclnnCastGetWorkspaceSize(const Tensor* self, std::int32_t /*dtype*/, const Tensor* out,
                                          std::uint64_t* workspace_bytes, Executor** executor) {
  return prepare(workspace_bytes, executor, [from = *self, to = *out] { return copy(from, to, {}, {}); });
}

CANN_API Status aclnnCast(void* /*workspace*/, std::uint64_t /*bytes*/, Executor* executor, void* stream) {
  return launch("aclnnCast", executor, stream);
}

CANN_API Status aclnnInplaceCopyGetWorkspaceSize(const Tensor* self, const Tensor* source,
                                                 std::uint64_t* workspace_bytes, Executor** executor) {
  return prepare(workspace_bytes, executor, [from = *source, to = *self] { return copy(from, to, {}, {}); });
}

CANN_API Status aclnnInplaceCopy(void* /*workspace*/, std::uint64_t /*bytes*/, Executor* executor, void* stream) {
  return launch("aclnnInplaceCopy", executor, stream);
}

CANN_API Status aclnnConstantPadNdGetWorkspaceSize(const Tensor* self, const IntArray* padding, const Scalar* value,
                                                   const Tensor* out, std::uint64_t* workspace_bytes,
                                                   Executor** executor) {
  std::vector<std::int64_t> shift(self->sizes.size(), 0);  // padding lists (before, after) from the last dimension on
  for (std::size_t i = 0; i < padding->values.size() / 2; i++) shift[shift.size() - 1 - i] = padding->values[2 * i];
  const Number fill = load(value->bytes, value->dtype);
  return prepare(workspace_bytes, executor, [=, from = *self, to = *out] { return copy(from, to, shift, fill); });
}

CANN_API Status aclnnConstantPadNd(void* /*workspace*/, std::uint64_t /*bytes*/, Executor* executor, void* stream) {
  return launch("aclnnConstantPadNd", executor, stream);
}
