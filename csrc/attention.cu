// The op attention: what it accepts, its memory, its launch.
#include "attention.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include "attention_kernels.cuh"
#include "launch.cuh"

namespace catimage_accel {
namespace {

using torch::headeronly::ScalarType;

// Whether rows are dense and begin on 16 bytes, of which a value of 2 bytes takes one eighth.
bool has_aligned_rows(const Tensor& x) {
  bool aligned = x.stride(3) == 1 && reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  for (int64_t dim = 0; dim < 3; ++dim) aligned = aligned && (x.size(dim) == 1 || x.stride(dim) % 8 == 0);
  return aligned;
}

Tensor with_aligned_rows(const Tensor& x) {
  if (has_aligned_rows(x)) return x;
  return x.is_contiguous() ? torch::stable::clone(x) : torch::stable::contiguous(x);
}

Strides strides_of(const Tensor& x) { return {x.stride(0), x.stride(1), x.stride(2)}; }

}  // namespace

Tensor attention(const Tensor& any_q, const Tensor& any_k, const Tensor& any_v, double scale) {
  STD_TORCH_CHECK(any_q.is_cuda() && any_q.dim() == 4, "q must be a CUDA tensor of (batch, queries, heads, head_dim)");
  const int64_t batch = any_q.size(0);
  const int64_t queries = any_q.size(1);
  const int64_t heads = any_q.size(2);
  const int64_t head_dim = any_q.size(3);
  const int64_t keys = any_k.dim() == 4 ? any_k.size(1) : 0;
  for (const Tensor* other : {&any_k, &any_v}) {
    STD_TORCH_CHECK(other->dim() == 4 && other->size(0) == batch && other->size(1) == keys &&
                        other->size(2) == heads && other->size(3) == head_dim &&
                        other->scalar_type() == any_q.scalar_type() && other->is_cuda() &&
                        other->get_device_index() == any_q.get_device_index(),
                    "k and v must be (batch, keys, heads, head_dim), and have q's dtype and device");
  }
  STD_TORCH_CHECK(scale > 0, "scale is ", scale, "; it must be above 0");
  STD_TORCH_CHECK(queries <= INT32_MAX / 2 && keys <= INT32_MAX / 2 && heads <= INT32_MAX, "q or k is too long");
  Tensor out = torch::stable::new_empty(any_q, {batch, queries, heads, head_dim});
  if (out.numel() == 0) return out;
  if (keys == 0) return torch::stable::zero_(out);

  const int device = any_q.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  const Tensor q = with_aligned_rows(any_q);
  const Tensor k = with_aligned_rows(any_k);
  const Tensor v = with_aligned_rows(any_v);
  const auto run = [&]<typename T>() {
    const AttentionTensors<T> tensors = {
        .q = static_cast<const T*>(q.const_data_ptr()),
        .k = static_cast<const T*>(k.const_data_ptr()),
        .v = static_cast<const T*>(v.const_data_ptr()),
        .out = static_cast<T*>(out.mutable_data_ptr()),
        .q_strides = strides_of(q),
        .k_strides = strides_of(k),
        .v_strides = strides_of(v),
        .heads = static_cast<int>(heads),
        .queries = static_cast<int>(queries),
        .keys = static_cast<int>(keys),
        .scale = static_cast<float>(scale) * kLog2E,
    };
    const auto launch_here = [stream = current_stream(device)](auto... arguments) { launch(stream, arguments...); };
    STD_TORCH_CHECK(run_attention(tensors, batch, static_cast<int>(head_dim), launch_here), "q has head_dim ", head_dim,
                    "; accepted: 40, 64, 80 or 160");
  };
  switch (any_q.scalar_type()) {
    case ScalarType::Half: run.operator()<__half>(); break;
    case ScalarType::BFloat16: run.operator()<__nv_bfloat16>(); break;
    default: STD_TORCH_CHECK(false, "q must be float16 or bfloat16");
  }
  return out;
}

}  // namespace catimage_accel
