// Registers the CPU kernels as torch.ops.catimage_accel_cpu.*
#include <torch/csrc/stable/library.h>

#include "group_norm.h"

STABLE_TORCH_LIBRARY(catimage_accel_cpu, library) {
  library.def(
      "group_norm(Tensor x, int num_groups, Tensor? weight, Tensor? bias, float eps, bool silu, Tensor? shift) "
      "-> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(catimage_accel_cpu, CPU, library) {
  library.impl("group_norm", TORCH_BOX(&catimage_accel::cpu::group_norm));
}
