// The aten operators of an emulated NPU: torch_npu's kernels are replaced by one that runs the CPU kernel on tensors
// over the same memory. torch_npu's own allocations, views and copies to and from the host stay as they are.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/as_strided.h>
#include <ATen/ops/empty_strided.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <memory>
#include <optional>
#include <string>
#include <unordered_set>
#include <vector>

// From libascendcl.so.
extern "C" int emulator_is_recording();
extern "C" int emulator_in_host_code();
extern "C" void emulator_enter_host_code();
extern "C" void emulator_leave_host_code();

namespace {

constexpr auto kNpu = c10::DispatchKey::PrivateUse1;

// Operators that stay torch_npu's, beside its views: they allocate, move between devices, read back, or (the last)
// choose a fused operator that has numerics in fused_ops.py.
const std::unordered_set<std::string> kGenuine = {
    "aten::_copy_from_and_resize", "aten::_lazy_clone", "aten::_local_scalar_dense", "aten::_pin_memory",
    "aten::_to_copy", "aten::as_strided_", "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::is_pinned",
    "aten::is_set_to", "aten::new_empty_strided", "aten::record_stream", "aten::resize_", "aten::resize_as_",
    "aten::set_", "aten::scaled_dot_product_attention",
};

bool is_npu(const at::Tensor& tensor) { return tensor.defined() && tensor.device().is_privateuseone(); }

// A CPU tensor over the memory of an NPU tensor, which it keeps alive.
at::Tensor alias_on_cpu(const at::Tensor& tensor) {
  auto* owner = new c10::Storage(tensor.storage());
  at::DataPtr data(owner->mutable_data(), owner, [](void* storage) { delete static_cast<c10::Storage*>(storage); },
                   c10::kCPU);
  c10::Storage storage(c10::Storage::use_byte_size_t(), owner->nbytes(), std::move(data),
                       c10::GetAllocator(c10::kCPU), /*resizable=*/true);
  auto alias = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                        tensor.dtype());
  alias.unsafeGetTensorImpl()->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return alias;
}

at::Tensor copy_to_npu(const at::Tensor& tensor, c10::Device device) {
  auto copied = at::empty_strided(tensor.sizes(), tensor.strides(), tensor.options().device(device));
  if (tensor.numel() > 0) alias_on_cpu(copied).copy_(tensor);
  return copied;
}

// Waits for what the current stream still has to do; only for that one, so that missing events show.
void synchronize_current_stream(c10::Device device) {
  c10::impl::VirtualGuardImpl guard(c10::DeviceType::PrivateUse1);
  guard.synchronizeStream(guard.getStream(device));
}

// One call's tensors on both sides.
class AliasedCall {
 public:
  explicit AliasedCall(c10::Device device) : device_(device) {}

  c10::IValue to_cpu(const c10::IValue& value) {
    if (value.isTensor()) return to_cpu(value.toTensor());
    if (value.isTensorList()) {
      auto tensors = value.toTensorVector();
      for (auto& tensor : tensors) tensor = to_cpu(tensor);
      return c10::List<at::Tensor>(tensors);
    }
    if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> tensors;
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList()) {
        tensors.push_back(tensor ? std::optional<at::Tensor>(to_cpu(*tensor)) : std::nullopt);
      }
      return tensors;
    }
    if (value.isDevice() && value.toDevice().is_privateuseone()) return c10::Device(c10::kCPU);
    return value;
  }

  c10::IValue to_npu(const c10::IValue& value) {
    if (value.isTensor()) return to_npu(value.toTensor());
    if (!value.isTensorList()) return value;
    auto tensors = value.toTensorVector();
    for (auto& tensor : tensors) tensor = to_npu(tensor);
    return c10::List<at::Tensor>(tensors);
  }

  // An out= tensor that the CPU kernel has resized holds new memory, which its NPU tensor has to follow.
  void follow_resized_outputs() {
    for (auto& pair : pairs_) {
      if (pair.cpu.sizes() == pair.npu.sizes() && pair.cpu.storage().data() == pair.npu.storage().data()) continue;
      auto copied = copy_to_npu(pair.cpu, device_);
      pair.npu.set_(copied.storage(), 0, copied.sizes(), copied.strides());
    }
  }

 private:
  struct Pair {
    at::Tensor npu;
    at::Tensor cpu;
  };

  at::Tensor to_cpu(const at::Tensor& tensor) {
    if (!is_npu(tensor)) return tensor;
    for (auto& pair : pairs_) {
      if (pair.npu.is_same(tensor)) return pair.cpu;
    }
    pairs_.push_back({tensor, alias_on_cpu(tensor)});
    return pairs_.back().cpu;
  }

  at::Tensor to_npu(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.device().is_cpu()) return tensor;
    for (auto& pair : pairs_) {
      if (pair.cpu.is_same(tensor)) return pair.npu;
      if (tensor.is_alias_of(pair.cpu)) {
        return at::as_strided(pair.npu, tensor.sizes(), tensor.strides(), tensor.storage_offset());
      }
    }
    return copy_to_npu(tensor, device_);
  }

  c10::Device device_;
  std::vector<Pair> pairs_;
};

std::vector<at::Tensor> tensors_in(const c10::IValue& value) {
  std::vector<at::Tensor> tensors;
  if (value.isTensor()) tensors.push_back(value.toTensor());
  if (value.isTensorList()) tensors = value.toTensorVector();
  if (value.isOptionalTensorList()) {
    for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList()) {
      if (tensor) tensors.push_back(*tensor);
    }
  }
  return tensors;
}

// The device of the first argument that is on one, or the current one.
c10::Device device_of(c10::ArrayRef<c10::IValue> arguments) {
  const c10::Device current = c10::impl::VirtualGuardImpl(c10::DeviceType::PrivateUse1).getDevice();
  for (const auto& argument : arguments) {
    if (argument.isDevice() && argument.toDevice().is_privateuseone()) {
      return argument.toDevice().has_index() ? argument.toDevice() : current;
    }
    for (const auto& tensor : tensors_in(argument)) {
      if (is_npu(tensor)) return tensor.device();
    }
  }
  return current;
}

// A CPU generator at the place that the NPU generator has reached, which moves on. The values are not those of a real
// NPU, but seeds, saved states and their restoration mean what they do there.
at::Generator draw_cpu_generator(at::Generator generator) {
  constexpr std::uint64_t kOffsetStep = 4;  // torch_npu wants multiples of it
  std::lock_guard<std::mutex> lock(generator.mutex());
  const std::uint64_t seed = generator.current_seed(), offset = generator.get_offset();
  generator.set_offset(offset + kOffsetStep);
  return at::detail::createCPUGenerator(seed * 0x9E3779B97F4A7C15u + offset);
}

// Lends the default CPU generator's state to an operator that takes no generator argument.
class BorrowedDefaultGenerator {
 public:
  explicit BorrowedDefaultGenerator(const at::Generator& generator)
      : saved_(at::detail::getDefaultCPUGenerator().get_state()) {
    set_state(generator.get_state());
  }

  ~BorrowedDefaultGenerator() { set_state(saved_); }

 private:
  static void set_state(const at::Tensor& state) {
    at::Generator generator = at::detail::getDefaultCPUGenerator();
    generator.set_state(state);
  }

  at::Tensor saved_;
};

std::optional<std::size_t> generator_argument(const c10::FunctionSchema& schema) {
  for (std::size_t i = 0; i < schema.arguments().size(); i++) {
    if (schema.arguments()[i].type()->isSubtypeOf(c10::OptionalType::create(c10::GeneratorType::get()))) return i;
  }
  return std::nullopt;
}

struct HostCode {
  HostCode() { emulator_enter_host_code(); }
  ~HostCode() { emulator_leave_host_code(); }
};

// Replaces torch_npu's kernel of one operator.
class CpuFallback : public c10::OperatorKernel {
 public:
  CpuFallback(c10::SafeKernelFunction genuine, bool is_copy, bool is_random)
      : genuine_(std::move(genuine)), is_copy_(is_copy), is_random_(is_random) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
    // Host code that calls other operators wants their shapes, and their calls recorded, but no values.
    if (emulator_in_host_code()) return genuine_.callBoxed(op, keys, stack);
    const std::size_t first = stack->size() - op.schema().arguments().size();
    if (is_copy_ && !(is_npu((*stack)[first].toTensor()) && is_npu((*stack)[first + 1].toTensor()))) {
      return genuine_.callBoxed(op, keys, stack);
    }
    const c10::Device device = device_of(torch::jit::last(*stack, op.schema().arguments().size()));
    const c10::DeviceGuard guard(device);
    synchronize_current_stream(device);
    if (emulator_is_recording()) run_host_code(op, keys, torch::jit::Stack(stack->begin() + first, stack->end()), device);
    compute(op, stack, first, device);
  }

 private:
  // Runs torch_npu's kernel for its checks and the calls that it makes. These compute nothing, but it may copy their
  // results into what the operator writes to, which therefore gets its values back.
  void run_host_code(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack arguments,
                     c10::Device device) {
    std::vector<std::pair<at::Tensor, at::Tensor>> written;  // each with its values
    for (std::size_t i = 0; i < arguments.size(); i++) {
      const auto* alias_info = op.schema().arguments()[i].alias_info();
      if (alias_info == nullptr || !alias_info->isWrite()) continue;
      for (const auto& tensor : tensors_in(arguments[i])) {
        if (is_npu(tensor)) written.emplace_back(tensor, alias_on_cpu(tensor).clone());
      }
    }
    {
      HostCode scope;
      genuine_.callBoxed(op, keys, &arguments);
      synchronize_current_stream(device);  // its task queue has to be done within the scope
    }
    for (const auto& [tensor, values] : written) {
      if (tensor.sizes() == values.sizes()) alias_on_cpu(tensor).copy_(values);  // else it is an out= made to fit
    }
  }

  void compute(const c10::OperatorHandle& op, torch::jit::Stack* stack, std::size_t first, c10::Device device) {
    AliasedCall call(device);
    for (std::size_t i = first; i < stack->size(); i++) (*stack)[i] = call.to_cpu((*stack)[i]);
    std::optional<BorrowedDefaultGenerator> borrowed;
    if (is_random_) {
      const auto argument = generator_argument(op.schema());
      const bool is_given = argument && (*stack)[first + *argument].isGenerator();
      at::Generator generator = draw_cpu_generator(is_given ? (*stack)[first + *argument].toGenerator()
                                                            : at::globalContext().defaultGenerator(device));
      if (argument) {
        (*stack)[first + *argument] = generator;
      } else {
        borrowed.emplace(generator);
      }
    }
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
    call.follow_resized_outputs();
    for (std::size_t i = first; i < stack->size(); i++) (*stack)[i] = call.to_npu((*stack)[i]);
  }

  c10::SafeKernelFunction genuine_;
  bool is_copy_;
  bool is_random_;
};

// Runs PyTorch's autograd formula, or composite implementation, instead of torch_npu's own one for an aten operator:
// those call op-plugin directly, where no kernel can be replaced.
class UpstreamAutograd : public c10::OperatorKernel {
 public:
  explicit UpstreamAutograd(c10::SafeKernelFunction upstream) : upstream_(std::move(upstream)) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
    upstream_.callBoxed(op, keys, stack);
  }

 private:
  c10::SafeKernelFunction upstream_;
};

bool has_upstream_autograd(const c10::OperatorHandle& op) {
  return op.hasKernelForDispatchKey(c10::DispatchKey::Autograd) ||
         op.hasKernelForDispatchKey(c10::DispatchKey::CompositeImplicitAutograd);
}

bool is_view(const c10::FunctionSchema& schema) {
  const auto& returns = schema.returns();
  return !returns.empty() && returns[0].alias_info() != nullptr && !returns[0].alias_info()->isWrite();
}

bool has_cpu_kernel(const c10::OperatorHandle& op) {
  using c10::DispatchKey;
  for (auto key : {DispatchKey::CPU, DispatchKey::CompositeExplicitAutograd,
                   DispatchKey::CompositeExplicitAutogradNonFunctional, DispatchKey::CompositeImplicitAutograd}) {
    if (op.hasKernelForDispatchKey(key)) return true;
  }
  return false;
}

std::string name_with_overload(const c10::OperatorName& name) {
  return name.overload_name.empty() ? name.name : name.name + "." + name.overload_name;
}

// Returns the names of the operators replaced.
std::vector<std::string> replace_kernels() {
  static auto* kernels = new torch::Library(torch::Library::IMPL, "aten", kNpu, __FILE__, __LINE__);
  static auto* formulas =
      new torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::AutogradPrivateUse1, __FILE__, __LINE__);
  std::vector<std::string> replaced;
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    auto op = c10::Dispatcher::singleton().findOp(name);
    if (name.name.rfind("aten::", 0) != 0 || !op || !op->hasSchema()) continue;
    const std::string full_name = name_with_overload(name);
    if (is_view(op->schema()) || kGenuine.count(name.name) > 0) continue;
    if (op->hasKernelForDispatchKey(c10::DispatchKey::AutogradPrivateUse1) && has_upstream_autograd(*op)) {
      auto upstream = std::make_unique<UpstreamAutograd>(
          op->getComputedKernelForDispatchKey(c10::DispatchKey::AutogradCPU));
      formulas->impl(full_name.c_str(), torch::CppFunction::makeFromBoxedFunctor(std::move(upstream)));
    }
    if (!op->hasKernelForDispatchKey(kNpu) || !has_cpu_kernel(*op)) continue;
    auto fallback = std::make_unique<CpuFallback>(op->getComputedKernelForDispatchKey(kNpu), name.name == "aten::copy_",
                                                  op->hasTag(at::Tag::nondeterministic_seeded));
    kernels->impl(full_name.c_str(), torch::CppFunction::makeFromBoxedFunctor(std::move(fallback)));
    replaced.push_back(full_name);
  }
  return replaced;
}

}  // namespace

TORCH_LIBRARY(cann_emulator, library) {
  library.def("alias_on_cpu(Tensor tensor) -> Tensor");
  library.def("replace_kernels() -> str[]", &replace_kernels);
}

TORCH_LIBRARY_IMPL(cann_emulator, PrivateUse1, library) { library.impl("alias_on_cpu", &alias_on_cpu); }
