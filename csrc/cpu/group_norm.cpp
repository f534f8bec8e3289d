// The op group_norm on the CPU: what it accepts, its memory, and how its work is cut.
//
// The cuts follow from the shape of one image, never from the batch or the number of threads: so an image's result is the
// same in every batch and on any number of threads.
#include "group_norm.h"

#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "group_norm_kernels.h"

namespace catimage_accel::cpu {
namespace {

using torch::headeronly::ScalarType;

constexpr int64_t kRun = 4096;  // values that are read twice in turn, so that they stay in the first-level cache
constexpr int64_t kLeastPixels = 32;  // of a chunk: moments of fewer would be as much to write as x is to read
constexpr int64_t kMostPixels = 64;  // more would round a float32 sum of them too much
constexpr int64_t kVectors = 64;  // channels that fill the vectors of every instruction set, and a tile
constexpr int64_t kValuesAThread = 16384;  // what is worth waking a thread for

// The widest instructions that the library was built for and the processor has.
template <typename T>
const GroupNormKernels<T>& kernels() {
#ifdef CATIMAGE_ACCEL_X86_64
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return x86_64_v4::group_norm_kernels<T>();
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2")) {
    return x86_64_v3::group_norm_kernels<T>();
  }
#endif
  return baseline::group_norm_kernels<T>();
}

int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

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

float widened(float x) { return x; }

float widened(BFloat16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); }

// A parameter in float32; empty where there is none.
template <typename T>
std::vector<float> floats(const char* name, const std::optional<Tensor>& tensor, const Tensor& x, int64_t values) {
  if (!tensor) return {};
  STD_TORCH_CHECK(tensor->numel() == values && tensor->scalar_type() == x.scalar_type() && tensor->is_cpu(), name,
                  " must have ", values, " values, and x's dtype and device");
  const Tensor dense = torch::stable::contiguous(*tensor);
  const T* data = static_cast<const T*>(dense.const_data_ptr());
  std::vector<float> converted(values);
  for (int64_t i = 0; i < values; ++i) converted[i] = widened(data[i]);
  return converted;
}

struct Parameters {
  int64_t groups;
  std::vector<float> weight, bias, shift;  // each may be empty
  double eps;
  bool silu;

  double shift_of(int64_t image, int64_t channels, int64_t channel) const {
    return shift.empty() ? 0.0 : shift[image * channels + channel];
  }
};

// Moments of values whose number is given, merged one part after the other (Chan et al. 1983).
struct Moments {
  double count = 0.0, mean = 0.0, squares = 0.0;

  void merge(double added, double other_mean, double other_squares) {
    const double delta = other_mean - mean, share = added / (count + added);
    mean += delta * share;
    squares += other_squares + delta * delta * count * share;
    count += added;
  }
};

// What is done to the channels of an image, or of one group of it.
struct Affines {
  std::vector<float> centre, scale, bias;

  explicit Affines(int64_t channels) : centre(channels), scale(channels), bias(channels) {}

  // For one channel of a group whose moments, shift included, are given.
  void set(int64_t at, const Parameters& parameters, const Moments& moments, double shift, int64_t channel) {
    const double weight = parameters.weight.empty() ? 1.0 : parameters.weight[channel];
    const double mean = moments.mean - shift;
    centre[at] = static_cast<float>(mean);
    scale[at] = static_cast<float>(weight / std::sqrt(moments.squares / moments.count + parameters.eps));
    const double given = parameters.bias.empty() ? 0.0 : parameters.bias[channel];
    bias[at] = static_cast<float>(given + (centre[at] - mean) * scale[at]);  // with what the centre was rounded by
  }

  Affine from(int64_t at) const { return {&centre[at], &scale[at], &bias[at]}; }
};

// NC... memory: a group of an image lies side by side, and one thread has it whole.
template <typename T>
void normalise_contiguous(const T* x, T* y, int64_t batch, int64_t channels, int64_t pixels,
                          const Parameters& parameters) {
  const auto& run = kernels<T>();
  const int64_t width = channels / parameters.groups;
  const int64_t grain = std::max<int64_t>(1, kValuesAThread / (width * pixels));
  torch::stable::parallel_for(0, batch * parameters.groups, grain, [&](int64_t first, int64_t last) {
    Affines affines(width);
    for (int64_t group = first; group < last; ++group) {
      const int64_t image = group / parameters.groups, first_channel = group % parameters.groups * width;
      const T* from = x + group * width * pixels;
      Moments moments;
      const auto add = [&](int64_t begin, int64_t end, double shift) {
        for (int64_t at = begin; at < end; at += kRun) {
          const int64_t values = std::min(kRun, end - at);
          double mean;
          float squares;
          run.row_moments(from + at, values, &mean, &squares);
          moments.merge(static_cast<double>(values), mean + shift, squares);
        }
      };
      if (parameters.shift.empty()) {
        add(0, width * pixels, 0.0);
      } else {
        for (int64_t c = 0; c < width; ++c) {
          add(c * pixels, (c + 1) * pixels, parameters.shift_of(image, channels, first_channel + c));
        }
      }
      for (int64_t c = 0; c < width; ++c) {
        const int64_t channel = first_channel + c;
        affines.set(c, parameters, moments, parameters.shift_of(image, channels, channel), channel);
      }
      run.apply_rows(from, y + group * width * pixels, width, pixels, affines.from(0), parameters.silu);
    }
  });
}

// How many pixels that lie side by side are taken as one of so many more channels, so that vectors are filled.
int64_t side_by_side(int64_t channels, int64_t pixels) {
  for (int64_t together = 1; together <= 16; together *= 2) {
    if (pixels % together == 0 && channels * together % kVectors == 0) return together;
  }
  return 1;
}

// N...C memory: an image is cut into chunks of pixels. All threads take moments of chunks, then images are merged, then
// all threads normalise chunks.
template <typename T>
void normalise_channels_last(const T* x, T* y, int64_t batch, int64_t own_channels, int64_t own_pixels,
                             const Parameters& parameters) {
  const auto& run = kernels<T>();
  const int64_t width = own_channels / parameters.groups;
  const int64_t together = side_by_side(own_channels, own_pixels);
  const int64_t channels = own_channels * together, pixels = own_pixels / together;
  const int64_t chunk = std::min(pixels, std::clamp(kRun / channels, kLeastPixels, kMostPixels));
  const int64_t chunks = ceil_div(pixels, chunk);
  const int64_t grain = std::max<int64_t>(1, kValuesAThread / (chunk * channels));
  const auto pixels_of = [&](int64_t index) { return std::min(chunk, pixels - index % chunks * chunk); };
  const auto offset_of = [&](int64_t index) {
    return (index / chunks * pixels + index % chunks * chunk) * channels;
  };

  std::vector<double> means(batch * chunks * channels);
  std::vector<float> squares(batch * chunks * channels);
  torch::stable::parallel_for(0, batch * chunks, grain, [&](int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) {
      run.pixel_moments(x + offset_of(index), pixels_of(index), channels, &means[index * channels],
                        &squares[index * channels]);
    }
  });

  Affines affines(batch * channels);
  const int64_t merge_grain = std::max<int64_t>(1, kValuesAThread / (chunks * channels));
  torch::stable::parallel_for(0, batch, merge_grain, [&](int64_t first, int64_t last) {
    std::vector<double> mean(channels), sum(channels);
    for (int64_t image = first; image < last; ++image) {
      const int64_t partial = image * chunks * channels;
      run.merge_moments(&means[partial], &squares[partial], pixels, chunk, channels, mean.data(), sum.data());
      for (int64_t group = 0; group < own_channels; group += width) {
        Moments moments;
        const auto each = [&](const auto& visit) {
          for (int64_t begin = group; begin < channels; begin += own_channels) {
            for (int64_t c = 0; c < width; ++c) {
              visit(begin + c, group + c, parameters.shift_of(image, own_channels, group + c));
            }
          }
        };
        each([&](int64_t at, int64_t, double shift) {
          moments.merge(static_cast<double>(pixels), mean[at] + shift, sum[at]);
        });
        each([&](int64_t at, int64_t channel, double shift) {
          affines.set(image * channels + at, parameters, moments, shift, channel);
        });
      }
    }
  });

  torch::stable::parallel_for(0, batch * chunks, grain, [&](int64_t first, int64_t last) {
    for (int64_t index = first; index < last; ++index) {
      run.apply_pixels(x + offset_of(index), y + offset_of(index), pixels_of(index), channels,
                       affines.from(index / chunks * channels), parameters.silu);
    }
  });
}

template <typename T>
Tensor normalised(const Tensor& x, int64_t num_groups, const std::optional<Tensor>& weight,
                  const std::optional<Tensor>& bias, double eps, bool silu, const std::optional<Tensor>& shift) {
  const int64_t batch = x.size(0), channels = x.size(1);
  const Parameters parameters = {
      num_groups, floats<T>("weight", weight, x, channels), floats<T>("bias", bias, x, channels),
      floats<T>("shift", shift, x, batch * channels), eps, silu,
  };
  Tensor y = torch::stable::empty_like(x);
  if (x.numel() == 0) return y;
  const auto run = x.is_contiguous() ? normalise_contiguous<T> : normalise_channels_last<T>;
  run(static_cast<const T*>(x.const_data_ptr()), static_cast<T*>(y.mutable_data_ptr()), batch, channels,
      x.numel() / (batch * channels), parameters);
  return y;
}

}  // namespace

Tensor group_norm(const Tensor& any_x, int64_t num_groups, const std::optional<Tensor>& weight,
                  const std::optional<Tensor>& bias, double eps, bool silu, const std::optional<Tensor>& shift) {
  STD_TORCH_CHECK(any_x.is_cpu() && any_x.dim() >= 2, "x must be a CPU tensor of (batch, channels, ...)");
  const int64_t channels = any_x.size(1);
  STD_TORCH_CHECK(num_groups >= 1 && channels > 0 && channels % num_groups == 0, "num_groups is ", num_groups,
                  "; it must divide x's ", channels, " channels");
  const Tensor x = any_x.is_contiguous() || is_channels_last(any_x) ? any_x : torch::stable::contiguous(any_x);
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return normalised<float>(x, num_groups, weight, bias, eps, silu, shift);
    case ScalarType::BFloat16:
      return normalised<BFloat16>(x, num_groups, weight, bias, eps, silu, shift);
    default:
      STD_TORCH_CHECK(false, "x must be float32 or bfloat16");
  }
}

}  // namespace catimage_accel::cpu
