#pragma once

#include <torch/csrc/stable/tensor.h>

namespace catimage_accel {

using torch::stable::Tensor;

Tensor attention(const Tensor& q,  // (batch, queries, heads, head_dim), float16 or bfloat16
                 const Tensor& k,  // (batch, keys, heads, head_dim)
                 const Tensor& v,  // (batch, keys, heads, head_dim)
                 double scale);    // above 0

}  // namespace catimage_accel
