// Compiled once for each instruction set, which INSTRUCTION_SET names. Everything but the table of functions is local to
// the file, and no function of a header is called: the linker keeps one of several copies, and it must not be one whose
// instructions the processor lacks.
#include "group_norm_kernels.h"

namespace catimage_accel::cpu::INSTRUCTION_SET {
namespace {

constexpr int kTile = 64;  // channels whose sums are kept in registers

inline float widened(float x) { return x; }

inline float widened(BFloat16 x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x.bits) << 16); }

inline void narrow(float x, float& y) { y = x; }

// To the nearest, ties to even; NaN stays NaN.
inline void narrow(float x, BFloat16& y) {
  const uint32_t bits = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  y.bits = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}

// 2^n for n from -126 to 127.
inline float power_of_two(int32_t n) { return __builtin_bit_cast(float, (n + 127) << 23); }

// e^x: 2^n e^r with |r| <= ln(2) / 2, by the Taylor series to the seventh power. 2^n is multiplied in two halves, so that
// what overflows is infinite and what underflows is denormal or 0.
inline float exponential(float x) {
  constexpr float kLimit = 104.0f, kLog2E = 1.44269504088896341f;
  constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: what is added to it loses its fraction
  x = kLimit < x ? kLimit : x;
  x = -kLimit > x ? -kLimit : x;
  const float shifted = x * kLog2E + kRounder;
  const float whole = shifted - kRounder;
  const int32_t n = __builtin_bit_cast(int32_t, shifted) - __builtin_bit_cast(int32_t, kRounder);
  const float r = (x - whole * kLn2High) - whole * kLn2Low;
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t half = n >> 1;
  return p * power_of_two(half) * power_of_two(n - half);
}

template <bool silu>
inline float finished(float y) {
  return silu ? y / (1.0f + exponential(-y)) : y;
}

// A sum in float32 misses the mean by what it rounds. The sum of the distances from it tells by how much.
inline double exact_mean(float centre, float missed, double values) { return centre + missed / values; }

inline float centred_on_the_mean(float squares, float missed, float values) {
  return squares - missed * (missed / values);
}

template <typename T>
void row_moments(const T* x, int64_t values, double* mean, float* squares) {
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < values; ++i) sum += widened(x[i]);
  const float centre = sum / static_cast<float>(values);
  float missed = 0.0f, centred = 0.0f;
#pragma omp simd reduction(+ : missed, centred)
  for (int64_t i = 0; i < values; ++i) {
    const float delta = widened(x[i]) - centre;
    missed += delta;
    centred += delta * delta;
  }
  *mean = exact_mean(centre, missed, static_cast<double>(values));
  *squares = centred_on_the_mean(centred, missed, static_cast<float>(values));
}

template <bool silu, typename T>
void apply_rows_as(const T* x, T* y, int64_t channels, int64_t pixels, const Affine& affine) {
  for (int64_t c = 0; c < channels; ++c) {
    const float centre = affine.centre[c], scale = affine.scale[c], bias = affine.bias[c];
    const T* __restrict from = x + c * pixels;
    T* __restrict to = y + c * pixels;
#pragma omp simd
    for (int64_t i = 0; i < pixels; ++i) narrow(finished<silu>((widened(from[i]) - centre) * scale + bias), to[i]);
  }
}

template <typename T>
void apply_rows(const T* x, T* y, int64_t channels, int64_t pixels, const Affine& affine, bool silu) {
  (silu ? apply_rows_as<true, T> : apply_rows_as<false, T>)(x, y, channels, pixels, affine);
}

// Of `width` channels that are kept in registers: kTile, known at compile time, or what is left.
template <typename T>
inline void tile_moments(const T* __restrict x, int64_t pixels, int64_t channels, int width, double* __restrict mean,
                         float* __restrict squares) {
  float sums[kTile] = {};
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    const T* row = x + pixel * channels;
#pragma omp simd
    for (int c = 0; c < width; ++c) sums[c] += widened(row[c]);
  }
  const float share = 1.0f / static_cast<float>(pixels);
  float centres[kTile], missed[kTile] = {}, centred[kTile] = {};
  for (int c = 0; c < width; ++c) centres[c] = sums[c] * share;
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    const T* row = x + pixel * channels;
#pragma omp simd
    for (int c = 0; c < width; ++c) {
      const float delta = widened(row[c]) - centres[c];
      missed[c] += delta;
      centred[c] += delta * delta;
    }
  }
  for (int c = 0; c < width; ++c) {
    mean[c] = exact_mean(centres[c], missed[c], static_cast<double>(pixels));
    squares[c] = centred_on_the_mean(centred[c], missed[c], static_cast<float>(pixels));
  }
}

template <typename T>
void pixel_moments(const T* x, int64_t pixels, int64_t channels, double* mean, float* squares) {
  int64_t c = 0;
  for (; c + kTile <= channels; c += kTile) tile_moments(x + c, pixels, channels, kTile, mean + c, squares + c);
  if (c < channels) tile_moments(x + c, pixels, channels, static_cast<int>(channels - c), mean + c, squares + c);
}

void merge_moments(const double* means, const float* squares, int64_t pixels, int64_t chunk, int64_t channels,
                   double* __restrict mean, double* __restrict sum) {
  for (int64_t c = 0; c < channels; ++c) {
    mean[c] = means[c];
    sum[c] = squares[c];
  }
  for (int64_t begin = chunk; begin < pixels; begin += chunk) {
    means += channels;
    squares += channels;
    const double left = static_cast<double>(pixels - begin), full = static_cast<double>(chunk);
    const double added = left < full ? left : full, before = static_cast<double>(begin);
    const double share = added / (before + added), weight = before * share;
    const double* __restrict new_means = means;
    const float* __restrict new_squares = squares;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      const double delta = new_means[c] - mean[c];
      mean[c] += delta * share;
      sum[c] += new_squares[c] + delta * delta * weight;
    }
  }
}

template <bool silu, typename T>
void apply_pixels_as(const T* __restrict x, T* __restrict y, int64_t pixels, int64_t channels, const Affine& affine) {
  const float* __restrict centre = affine.centre;
  const float* __restrict scale = affine.scale;
  const float* __restrict bias = affine.bias;
  for (int64_t pixel = 0; pixel < pixels; ++pixel) {
    const T* __restrict from = x + pixel * channels;
    T* __restrict to = y + pixel * channels;
#pragma omp simd
    for (int64_t c = 0; c < channels; ++c) {
      narrow(finished<silu>((widened(from[c]) - centre[c]) * scale[c] + bias[c]), to[c]);
    }
  }
}

template <typename T>
void apply_pixels(const T* x, T* y, int64_t pixels, int64_t channels, const Affine& affine, bool silu) {
  (silu ? apply_pixels_as<true, T> : apply_pixels_as<false, T>)(x, y, pixels, channels, affine);
}

template <typename T>
constexpr GroupNormKernels<T> kKernels = {row_moments<T>, apply_rows<T>, pixel_moments<T>, merge_moments, apply_pixels<T>};

}  // namespace

template <>
const GroupNormKernels<float>& group_norm_kernels<float>() {
  return kKernels<float>;
}

template <>
const GroupNormKernels<BFloat16>& group_norm_kernels<BFloat16>() {
  return kKernels<BFloat16>;
}

}  // namespace catimage_accel::cpu::INSTRUCTION_SET
