#pragma once

#include <optional>
#include <torch/csrc/stable/tensor.h>

namespace catimage_accel::cpu {

using torch::stable::Tensor;

Tensor group_norm(const Tensor& x,                     // (batch, channels, ...), bfloat16 or float32
                  int64_t num_groups, const std::optional<Tensor>& weight,  // (channels,)
                  const std::optional<Tensor>& bias,   // (channels,)
                  double eps, bool silu,
                  const std::optional<Tensor>& shift);  // (batch, channels)

}  // namespace catimage_accel::cpu
