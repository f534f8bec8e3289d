// The loops of the CPU's group_norm. They are compiled once for each instruction set; see group_norm.cpp for how one is
// chosen, and for how the work is cut.
#pragma once

#include <cstdint>

namespace catimage_accel::cpu {

// bfloat16 by its bits.
struct BFloat16 {
  uint16_t bits;
};

// What is done to the values of each channel: (x - centre) * scale + bias.
struct Affine {
  const float* centre;
  const float* scale;
  const float* bias;
};

template <typename T>
struct GroupNormKernels {
  // Mean and centred sum of squares of `values` values that lie side by side.
  void (*row_moments)(const T* x, int64_t values, double* mean, float* squares);
  // x and y are (channels, pixels).
  void (*apply_rows)(const T* x, T* y, int64_t channels, int64_t pixels, const Affine& affine, bool silu);
  // Mean and centred sum of squares of each channel over some pixels; x is (pixels, channels).
  void (*pixel_moments)(const T* x, int64_t pixels, int64_t channels, double* mean, float* squares);
  // Merges the moments of chunks, (chunks, channels), into those of each channel (Chan et al. 1983). Each has as many
  // pixels as `chunk`, but the last.
  void (*merge_moments)(const double* means, const float* squares, int64_t pixels, int64_t chunk, int64_t channels,
                        double* mean, double* sum);
  // x and y are (pixels, channels).
  void (*apply_pixels)(const T* x, T* y, int64_t pixels, int64_t channels, const Affine& affine, bool silu);
};

// Each is defined in a file of its own flags: see group_norm_kernels.cpp.
namespace baseline {
template <typename T>
const GroupNormKernels<T>& group_norm_kernels();
}
namespace x86_64_v3 {
template <typename T>
const GroupNormKernels<T>& group_norm_kernels();
}
namespace x86_64_v4 {
template <typename T>
const GroupNormKernels<T>& group_norm_kernels();
}

}  // namespace catimage_accel::cpu
