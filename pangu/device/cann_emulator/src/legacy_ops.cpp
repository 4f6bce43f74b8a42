// The older operator interface (aclop*), which op-plugin still uses where there is no aclnn function. Its descriptors
// carry nothing that the emulator needs, except what torch_npu reads back.
#include <vector>

#include "emulator.h"

using emulator::kSuccess;
using emulator::Status;

namespace {

struct TensorDescriptor {
  std::int32_t dtype;
  std::vector<std::int64_t> sizes;
  std::int32_t format;
};

struct Opaque {};

}  // namespace

CANN_API TensorDescriptor* aclCreateTensorDesc(std::int32_t dtype, int dims, const std::int64_t* sizes,
                                               std::int32_t format) {
  return new TensorDescriptor{dtype, {sizes, sizes + dims}, format};
}

CANN_API void aclDestroyTensorDesc(const TensorDescriptor* descriptor) { delete descriptor; }
CANN_API std::int32_t aclGetTensorDescType(const TensorDescriptor* descriptor) { return descriptor->dtype; }
CANN_API std::int32_t aclGetTensorDescFormat(const TensorDescriptor* descriptor) { return descriptor->format; }
CANN_API std::size_t aclGetTensorDescNumDims(const TensorDescriptor* descriptor) { return descriptor->sizes.size(); }

CANN_API Status aclGetTensorDescDimV2(const TensorDescriptor* descriptor, std::size_t index, std::int64_t* size) {
  *size = descriptor->sizes.at(index);
  return kSuccess;
}

CANN_API void aclSetTensorDescName(TensorDescriptor* /*descriptor*/, const char* /*name*/) {}
CANN_API Status aclSetTensorFormat(TensorDescriptor* /*descriptor*/, std::int32_t /*format*/) { return kSuccess; }
CANN_API Status aclSetTensorPlaceMent(TensorDescriptor* /*descriptor*/, std::int32_t /*kind*/) { return kSuccess; }
CANN_API Status aclSetTensorShape(TensorDescriptor* /*descriptor*/, int /*dims*/, const std::int64_t* /*sizes*/) {
  return kSuccess;
}

CANN_API Opaque* aclCreateDataBuffer(void* /*data*/, std::size_t /*bytes*/) { return new Opaque; }
CANN_API Status aclDestroyDataBuffer(const Opaque* buffer) {
  delete buffer;
  return kSuccess;
}

CANN_API Opaque* aclopCreateAttr() { return new Opaque; }
CANN_API void aclopDestroyAttr(const Opaque* attributes) { delete attributes; }
CANN_API Status aclopSetAttrBool(...) { return kSuccess; }
CANN_API Status aclopSetAttrDataType(...) { return kSuccess; }
CANN_API Status aclopSetAttrFloat(...) { return kSuccess; }
CANN_API Status aclopSetAttrInt(...) { return kSuccess; }
CANN_API Status aclopSetAttrListBool(...) { return kSuccess; }
CANN_API Status aclopSetAttrListFloat(...) { return kSuccess; }
CANN_API Status aclopSetAttrListInt(...) { return kSuccess; }
CANN_API Status aclopSetAttrListListInt(...) { return kSuccess; }
CANN_API Status aclopSetAttrString(...) { return kSuccess; }

CANN_API Status aclopCompileAndExecute(const char* name, ...) {
  emulator::record_call("aclop", name);
  return emulator::without_numerics(name);
}

CANN_API Status aclopCompileAndExecuteV2(const char* name, ...) {
  emulator::record_call("aclop", name);
  return emulator::without_numerics(name);
}
