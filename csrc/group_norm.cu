// The op group_norm: what it accepts, its memory, its launches.
#include "group_norm.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include "group_norm_kernels.cuh"
#include "launch.cuh"

namespace catimage_accel {
namespace {

using torch::headeronly::ScalarType;

// Whether x is dense in N...C order.
bool is_channels_last(const Tensor& x) {
  int64_t expected = 1;
  const auto follows = [&](int64_t dim) {
    const bool fits = x.size(dim) == 1 || x.stride(dim) == expected;
    expected *= x.size(dim);
    return fits;
  };
  bool fits = follows(1);
  for (int64_t dim = x.dim() - 1; dim > 1; --dim) fits = follows(dim) && fits;
  return follows(0) && fits;
}

// A null pointer where there is none.
template <typename T>
const T* data_of(const std::optional<Tensor>& tensor) {
  return tensor ? static_cast<const T*>(tensor->const_data_ptr()) : nullptr;
}

std::optional<Tensor> accepted(const char* name, const std::optional<Tensor>& tensor, const Tensor& x, int64_t values) {
  if (!tensor) return std::nullopt;
  STD_TORCH_CHECK(tensor->numel() == values && tensor->scalar_type() == x.scalar_type() && tensor->is_cuda() &&
                      tensor->get_device_index() == x.get_device_index(),
                  name, " must have ", values, " values, and x's dtype and device");
  return torch::stable::contiguous(*tensor);
}

bool on_16_bytes(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace

Tensor group_norm(const Tensor& any_x, int64_t num_groups, const std::optional<Tensor>& any_weight,
                  const std::optional<Tensor>& any_bias, double eps, bool silu,
                  const std::optional<Tensor>& any_shift) {
  STD_TORCH_CHECK(any_x.is_cuda() && any_x.dim() >= 2, "x must be a CUDA tensor of (batch, channels, ...)");
  const int64_t batch = any_x.size(0);
  const int64_t channels = any_x.size(1);
  STD_TORCH_CHECK(channels <= INT32_MAX && num_groups >= 1 && channels % num_groups == 0, "num_groups is ", num_groups,
                  "; it must divide x's ", channels, " channels");
  const Tensor x = any_x.is_contiguous() || is_channels_last(any_x) ? any_x : torch::stable::contiguous(any_x);
  const auto weight = accepted("weight", any_weight, x, channels);
  const auto bias = accepted("bias", any_bias, x, channels);
  const auto shift = accepted("shift", any_shift, x, batch * channels);
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;

  const int device = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const auto run = [&]<typename T>() {
    const Tensors<T> tensors = {static_cast<const T*>(x.const_data_ptr()), data_of<T>(shift), data_of<T>(weight),
                                data_of<T>(bias), static_cast<T*>(y.mutable_data_ptr())};
    const bool channels_last = !x.is_contiguous();
    const Plan plan = make_plan({
        .pixels = x.numel() / (batch * channels),
        .channels = static_cast<int>(channels),
        .groups = static_cast<int>(num_groups),
        .channels_last = channels_last,
        .itemsize = sizeof(T),
        .aligned = on_16_bytes(tensors.x) && on_16_bytes(tensors.y),
        .max_cluster = max_cluster(device),
    });
    const int64_t bytes = scratch_bytes(plan, batch);
    // From PyTorch's allocator, which hands it out again only to work that comes later on the same stream.
    const std::optional<Tensor> scratch =
        bytes == 0 ? std::nullopt : std::optional(torch::stable::new_empty(x, {bytes}, ScalarType::Byte));
    const auto launch_here = [stream = current_stream(device)](auto... arguments) { launch(stream, arguments...); };
    void* memory = scratch ? scratch->mutable_data_ptr() : nullptr;
    const auto narrow_eps = static_cast<float>(eps);
    if (channels_last) {
      run_group_norm<T, ChannelsLastSlice<T>>(tensors, plan, batch, narrow_eps, silu, memory, launch_here);
    } else {
      run_group_norm<T, ContiguousSlice<T>>(tensors, plan, batch, narrow_eps, silu, memory, launch_here);
    }
  };
  switch (x.scalar_type()) {
    case ScalarType::Half: run.operator()<__half>(); break;
    case ScalarType::BFloat16: run.operator()<__nv_bfloat16>(); break;
    case ScalarType::Float: run.operator()<float>(); break;
    default: STD_TORCH_CHECK(false, "x must be float16, bfloat16 or float32");
  }
  return y;
}

}  // namespace catimage_accel
