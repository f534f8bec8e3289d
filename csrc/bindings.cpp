// Registers the CUDA kernels as torch.ops.catimage_accel_cuda.*
#include <torch/csrc/stable/library.h>

#include "attention.h"
#include "group_norm.h"

STABLE_TORCH_LIBRARY(catimage_accel_cuda, library) {
  library.def("attention(Tensor q, Tensor k, Tensor v, float scale) -> Tensor");
  library.def(
      "group_norm(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, bool silu, Tensor? shift) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(catimage_accel_cuda, CUDA, library) {
  library.impl("attention", TORCH_BOX(&catimage_accel::attention));
  library.impl("group_norm", TORCH_BOX(&catimage_accel::group_norm));
}
