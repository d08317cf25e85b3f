// A device that computes on the host and behaves as an accelerator does towards it: see __init__.py.

#include <ATen/EmptyTensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_as_complex_native.h>
#include <ATen/ops/view_as_real_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/core/impl/alloc_cpu.h>
#include <torch/extension.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <deque>
#include <limits>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

namespace {

constexpr auto TYPE = c10::DeviceType::PrivateUse1;
const c10::Device DEVICE(TYPE, 0);

// What happened, for the tests. Counted unless an operation of the device itself is at work.
std::mutex mutex;
std::vector<std::string> waits, launches;
std::atomic<int64_t> allocated{0};
bool capturing = false;
thread_local int inside = 0;
thread_local c10::StreamId current = 0;

struct Inside {
  Inside() { ++inside; }
  ~Inside() { --inside; }
};

void waited(const std::string& what) {
  if (inside) return;
  TORCH_CHECK(!capturing, "standin: ", what, " waits for the device while a graph is captured");
  std::lock_guard<std::mutex> lock(mutex);
  waits.push_back(what);
}

void launched(const std::string& what) {
  if (inside) return;
  std::lock_guard<std::mutex> lock(mutex);
  launches.push_back(what);
}

// What each stream has done, and which of it others, and the host, may rely on: what is read has to be known to be there.
using Count = std::unordered_map<c10::StreamId, int64_t>;
std::unordered_map<const void*, std::pair<c10::StreamId, int64_t>> made;  // by the memory: where, as the how manieth
Count done, seen_by_host;
std::unordered_map<c10::StreamId, Count> seen_by;

void reads(const at::Tensor& tensor) {
  if (inside || !tensor.defined() || tensor.is_cpu() || !tensor.has_storage()) return;
  std::lock_guard<std::mutex> lock(mutex);
  auto found = made.find(tensor.storage().data());
  if (found == made.end()) return;
  auto [stream, number] = found->second;
  const bool known = stream == current || seen_by[current][stream] >= number || seen_by_host[stream] >= number;
  TORCH_CHECK(known, "standin: stream ", current, " reads what stream ", stream, " need not have made yet");
}

void writes(const at::Tensor& tensor) {
  if (inside || !tensor.defined() || tensor.is_cpu() || !tensor.has_storage()) return;
  std::lock_guard<std::mutex> lock(mutex);
  made[tensor.storage().data()] = {current, ++done[current]};
}

void host_sees(c10::StreamId stream) {
  std::lock_guard<std::mutex> lock(mutex);
  seen_by_host[stream] = done[stream];
}

// Copies to pinned memory that nobody has waited for yet: the host sees them once an event behind them is waited for.
struct Late {
  int64_t number;
  at::Tensor source, target;
};
std::deque<Late> late;
int64_t issued = 0;

void arrive(int64_t number) {
  Inside guard;
  std::vector<Late> due;
  {
    std::lock_guard<std::mutex> lock(mutex);
    while (!late.empty() && late.front().number <= number) {
      due.push_back(late.front());
      late.pop_front();
    }
  }
  for (auto& copy : due) copy.target.copy_(copy.source);
}

template <bool PINNED>
struct Memory final : c10::Allocator {
  static std::unordered_map<void*, size_t>& sizes() {
    static auto* known = new std::unordered_map<void*, size_t>();
    return *known;
  }
  static void free(void* data) {
    if (data == nullptr) return;
    std::lock_guard<std::mutex> lock(mutex);
    auto found = sizes().find(data);
    if (!PINNED) allocated -= found->second;
    if (!PINNED) made.erase(data);
    sizes().erase(found);
    c10::free_cpu(data);
  }
  c10::DataPtr allocate(size_t size) override {
    void* data = c10::alloc_cpu(size);
    if (data != nullptr) {
      std::lock_guard<std::mutex> lock(mutex);
      sizes()[data] = size;
      if (!PINNED) allocated += size;
    }
    return {data, data, &free, PINNED ? c10::Device(c10::kCPU) : DEVICE};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &free; }
  void copy_data(void* to, const void* from, size_t size) const override { std::memcpy(to, from, size); }
};
Memory<false> memory;
Memory<true> pinned;

bool is_pinned(const void* data) {
  std::lock_guard<std::mutex> lock(mutex);
  for (auto& [begin, size] : Memory<true>::sizes())
    if (data >= begin && data < static_cast<char*>(begin) + size) return true;
  return false;
}

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned; }
  at::Device getDeviceFromPtr(void*) const override { return DEVICE; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
};

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return TYPE; }
  c10::Device exchangeDevice(c10::Device) const override { return DEVICE; }
  c10::Device getDevice() const override { return DEVICE; }
  void setDevice(c10::Device) const override {}
  void uncheckedSetDevice(c10::Device) const noexcept override {}
  c10::DeviceIndex deviceCount() const noexcept override { return 1; }
  c10::Stream getStream(c10::Device) const override { return c10::Stream(c10::Stream::UNSAFE, DEVICE, current); }
  c10::Stream getDefaultStream(c10::Device) const override { return c10::Stream(c10::Stream::DEFAULT, DEVICE); }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool) const override { return getNewStream(device, 0); }
  c10::Stream getNewStream(c10::Device, int) const override {
    static std::atomic<c10::StreamId> number{0};
    return c10::Stream(c10::Stream::UNSAFE, DEVICE, ++number);
  }
  c10::Stream exchangeStream(c10::Stream stream) const override {
    auto before = getStream(DEVICE);
    current = stream.id();
    return before;
  }
  struct Event {
    int64_t copies;
    c10::StreamId stream;
    Count seen;  // by the stream, itself included
  };
  void record(void** event, const c10::Stream& stream, const c10::DeviceIndex, const c10::EventFlag) const override {
    if (*event == nullptr) *event = new Event;
    std::lock_guard<std::mutex> lock(mutex);
    auto seen = seen_by[stream.id()];
    seen[stream.id()] = done[stream.id()];
    *static_cast<Event*>(*event) = {issued, stream.id(), std::move(seen)};
  }
  void block(void* event, const c10::Stream& stream) const override {
    launched("wait for a stream");
    std::lock_guard<std::mutex> lock(mutex);
    sees(seen_by[stream.id()], *static_cast<Event*>(event));
  }
  static void sees(Count& known, const Event& event) {
    for (auto& [stream, number] : event.seen) known[stream] = std::max(known[stream], number);
  }
  bool queryEvent(void*) const override { return true; }
  void destroyEvent(void* event, const c10::DeviceIndex) const noexcept override { delete static_cast<Event*>(event); }
  void synchronizeEvent(void* event) const override {
    waited("an event");
    arrive(static_cast<Event*>(event)->copies);
    std::lock_guard<std::mutex> lock(mutex);
    sees(seen_by_host, *static_cast<Event*>(event));
  }
  void synchronizeStream(const c10::Stream& stream) const override {
    waited("a stream");
    arrive(issued);
    host_sees(stream.id());
  }
  void synchronizeDevice(const c10::DeviceIndex) const override {
    waited("the device");
    arrive(issued);
    std::lock_guard<std::mutex> lock(mutex);
    seen_by_host = done;
  }
  bool queryStream(const c10::Stream&) const override { return true; }
};

at::Tensor empty(c10::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout>,
                 std::optional<at::Device>, std::optional<bool> pin, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin.value_or(false), "Only dense CPU tensors can be pinned");
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_generic(size, &memory, keys, c10::dtype_or_default(dtype), format);
}

at::Tensor empty_strided(c10::IntArrayRef size, c10::IntArrayRef stride, std::optional<at::ScalarType> dtype,
                         std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  constexpr c10::DispatchKeySet keys(c10::DispatchKey::PrivateUse1);
  return at::detail::empty_strided_generic(size, stride, &memory, keys, c10::dtype_or_default(dtype));
}

// The same memory, as a tensor of the host.
at::Tensor on_host(const at::Tensor& tensor) {
  if (tensor.is_cpu()) return tensor;
  auto seen = at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(),
                            [kept = tensor](void*) {}, tensor.options().device(c10::kCPU));
  if (tensor.is_conj()) seen = seen.conj();
  return tensor.is_neg() ? seen._neg_view() : seen;
}

at::Tensor copy_from(const at::Tensor& from, const at::Tensor& to, bool non_blocking) {
  const bool by_host = from.is_cpu() || to.is_cpu();
  reads(from);
  if (by_host && to.is_cpu() && non_blocking && !inside && to.is_pinned()) {
    launched("aten::copy_ to the host");
    Inside guard;
    Late copy{0, on_host(from).clone(), to};
    std::lock_guard<std::mutex> lock(mutex);
    copy.number = ++issued;
    late.push_back(copy);
    return to;
  }
  if (by_host && !(from.is_cpu() && non_blocking && from.is_pinned())) {
    waited(to.is_cpu() ? "a copy to the host" : "a copy from the host");
    if (!inside) arrive(issued);
  }
  launched("aten::copy_");
  writes(to);
  if (by_host && !(from.is_cpu() && non_blocking && from.is_pinned()) && !inside) host_sees(current);
  Inside guard;
  on_host(to).copy_(on_host(from));
  return to;
}

at::Tensor copy_from_and_resize(const at::Tensor& from, const at::Tensor& to) {
  to.resize_(from.sizes());
  return copy_from(from, to, false);
}

at::Scalar item(const at::Tensor& tensor) {
  waited("a number on the host");
  reads(tensor);
  host_sees(current);
  Inside guard;
  return on_host(tensor).item();
}

const at::Tensor& resize(const at::Tensor& tensor, c10::IntArrayRef size, std::optional<at::MemoryFormat>) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_contiguous(size);
  const size_t needed = (impl->storage_offset() + impl->numel()) * impl->itemsize();
  auto storage = impl->unsafe_storage();
  if (needed > storage.nbytes()) {
    auto grown = memory.allocate(needed);
    std::memcpy(grown.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr(std::move(grown));
    storage.set_nbytes(needed);
  }
  return tensor;
}

at::Tensor& set_storage(at::Tensor& tensor, at::Storage source) {
  const int64_t size = source.nbytes() / tensor.dtype().itemsize();
  return at::native::set_storage_cpu_(tensor, source, 0, {size}, {});
}

at::Tensor& set_empty(at::Tensor& tensor) {
  return set_storage(tensor, c10::Storage(c10::Storage::use_byte_size_t(), 0, memory.allocate(0), &memory, true));
}

at::Tensor convolution(const at::Tensor& input, const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                       at::IntArrayRef stride, at::IntArrayRef padding, at::IntArrayRef dilation, bool transposed,
                       at::IntArrayRef output_padding, int64_t groups) {
  launched("aten::convolution");
  reads(input);
  reads(weight);
  Inside guard;
  std::optional<at::Tensor> added;
  if (bias.has_value() && bias->defined()) added = on_host(*bias);
  return at::convolution(on_host(input), on_host(weight), added, stride, padding, dilation, transposed, output_padding,
                         groups).to(DEVICE);
}

void record_stream(at::Tensor&, c10::Stream) { launched("aten::record_stream"); }

// Every other operation computes on the host; what tells the host a number, or a size, waits.
void fallback(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  const auto name = op.schema().name();
  bool tells = name == "aten::nonzero" || name == "aten::masked_select" || name.rfind("aten::_unique", 0) == 0;
  for (auto& value : op.schema().returns())
    tells |= value.type()->kind() != c10::TypeKind::TensorType && value.type()->kind() != c10::TypeKind::ListType;
  if (tells) waited(name);
  launched(name);
  std::vector<const void*> given;
  for (auto& value : torch::jit::last(*stack, op.schema().arguments().size())) {
    if (value.isTensor() && value.toTensor().defined()) {
      reads(value.toTensor());
      if (value.toTensor().has_storage()) given.push_back(value.toTensor().storage().data());
    } else if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorVector()) reads(tensor);
    }
  }
  {
    Inside guard;
    at::native::cpu_fallback(op, stack);
  }
  if (tells) host_sees(current);
  for (auto& value : torch::jit::last(*stack, op.schema().returns().size())) {
    if (!value.isTensor() || !value.toTensor().defined() || value.toTensor().is_cpu()) continue;
    const at::Tensor& tensor = value.toTensor();
    writes(tensor);
    // What is recorded is not run: new memory holds anything.
    const bool is_new = std::find(given.begin(), given.end(), tensor.storage().data()) == given.end();
    if (capturing && !inside && is_new && tensor.is_floating_point()) {
      Inside guard;
      on_host(tensor).fill_(std::numeric_limits<double>::quiet_NaN());
    }
  }
}

}  // namespace

C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &item);
  m.impl("record_stream", &record_stream);
  m.impl("resize_", &resize);
  m.impl("convolution_overrideable", &convolution);
  m.impl("set_.source_Storage", &set_storage);
  m.impl("set_.source_Storage_storage_offset", &at::native::set_storage_cpu_);
  m.impl("set_", &set_empty);
  m.impl("as_strided", &at::native::as_strided_tensorimpl);
  m.impl("view", &at::native::view);
  m.impl("_reshape_alias", &at::native::_reshape_alias);
  m.impl("unfold", &at::native::unfold);
  m.impl("view_as_real", &at::native::view_as_real);
  m.impl("view_as_complex", &at::native::view_as_complex);
}

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  c10::SetAllocator(TYPE, &memory);
  if (!at::isPrivateUse1HooksRegistered()) at::RegisterPrivateUse1HooksInterface(new Hooks());
  // Tensors that only have shapes may lie on a GPU that is not there, if somebody answers for it.
  auto& cuda = c10::impl::device_guard_impl_registry[static_cast<size_t>(c10::DeviceType::CUDA)];
  if (cuda == nullptr) cuda.store(new c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA>());
  m.def("taken", [] {
    std::lock_guard<std::mutex> lock(mutex);
    auto found = std::make_pair(waits, launches);
    waits.clear();
    launches.clear();
    return found;
  });
  m.def("memory_allocated", [] { return allocated.load(); });
  m.def("is_capturing", [] { return capturing; });
  m.def("capture", [](bool on) { capturing = on; });
}
