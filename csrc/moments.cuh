// Mean and variance of many values out of those of their parts, without ever subtracting two large sums.
#pragma once

#include "device.cuh"

namespace catimage_accel {

// A mean is a float and the rounding that it lost: where the mean is many standard deviations, its last bit is what the
// result's error comes from.
struct alignas(16) Moments {
  float count;    // exact in parts of up to 2^24 values
  float mean;
  float low;      // the mean is mean + low
  float squares;  // sum of the squared distances from the mean
};

// What normalises a group.
struct Statistics {
  float mean;
  float low;
  float inverse_std;
};

// Of values whose mean is near `rough`; `sum` and `squares` are over their distances from it (the corrected two-pass
// algorithm of Chan, Golub and LeVeque 1983): the correction is a rounding's square, so nothing cancels.
__device__ inline Moments moments_about(float rough, float count, float sum, float squares) {
  if (count == 0.f) return {0.f, 0.f, 0.f, 0.f};
  const float low = sum / count;
  // Squares that overflow stay infinite, as infinity minus infinity would not; nor is this fmaxf, which hides a NaN.
  const float centred = squares == INFINITY ? squares : squares - sum * low;
  return {count, rough, low, centred < 0.f ? 0.f : centred};
}

// Of two disjoint sets of values (Chan, Golub and LeVeque 1983).
__device__ inline Moments merge(const Moments& a, const Moments& b) {
  if (a.count == 0.f) return b;
  if (b.count == 0.f) return a;
  const float count = a.count + b.count;
  const float delta = (b.mean - a.mean) + (b.low - a.low);
  const float share = b.count / count;
  const float step = delta * share + a.low;
  // Knuth's two-sum: mean + low is a.mean + step without rounding.
  const float mean = a.mean + step;
  const float moved = mean - a.mean;
  const float low = (a.mean - (mean - moved)) + (step - moved);
  return {count, mean, low, (a.squares + b.squares) + delta * delta * (a.count * share)};
}

__device__ inline Statistics finish(const Moments& moments, float eps) {
  return {moments.mean, moments.low, 1.f / sqrtf(moments.squares / moments.count + eps)};
}

// Lane 0 gets the merged moments of a warp's 32 lanes.
__device__ inline Moments merge_warp(Moments moments) {
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    moments = merge(moments, {shuffle_down(moments.count, lanes), shuffle_down(moments.mean, lanes),
                              shuffle_down(moments.low, lanes), shuffle_down(moments.squares, lanes)});
  }
  return moments;
}

}  // namespace catimage_accel
