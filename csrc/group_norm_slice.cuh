// Which values of x a block and its threads have, for either memory format.
//
// Both classes tell the same: a thread's packs (where they lie and how many of their values count), and how the sums
// that the threads leave in shared memory, (lanes, pitch), belong to the groups of the window.
#pragma once

#include "group_norm_plan.h"
#include "pack.cuh"

namespace catimage_accel {

// A run of values of one group of (batch, groups, values) memory.
template <typename T>
class ContiguousSlice {
 public:
  static constexpr int kSize = Pack<T>::kSize;
  static constexpr Limits kLimits = kContiguousLimits;
  static constexpr int kSums = 1;  // sums that a thread keeps: all its values are of one group

  __device__ explicit ContiguousSlice(const Plan& plan)
      : row_(blockIdx.x / plan.slices), index_(blockIdx.x % plan.slices) {
    const int64_t values = plan.pixels * plan.group_channels;
    start_ = index_ * plan.slice;
    const int64_t left = values - start_;
    values_ = static_cast<int>(left < 0 ? 0 : left < plan.slice ? left : plan.slice);
    first_ = row_ * values + start_;
  }

  __device__ int64_t row() const { return row_; }  // its first group, counted over the batch
  __device__ int count() const { return values_; }
  __device__ int group(int) const { return 0; }  // counted from the first, of a value
  __device__ int64_t partial(const Plan& plan, int) const { return row_ * plan.slices + index_; }

  __device__ int valid(int pack) const {
    const int left = values_ - position(pack);
    return left < 0 ? 0 : left < kSize ? left : kSize;
  }
  __device__ int64_t offset(int pack) const { return first_ + position(pack); }

  __device__ bool active() const { return true; }
  __device__ int lanes() const { return blockDim.x; }
  __device__ int pitch() const { return 1; }
  __device__ int span() const { return 1; }  // entries of a lane that are of one group
  __device__ int entry() const { return threadIdx.x; }

  // Calls f(i, channel) for every valid value of a pack; `channel` counts from the group's first.
  template <typename F>
  __device__ void for_channels(const Plan& plan, int pack, F f) const {
    const int count = valid(pack);
    if (count == 0) return;
    // Only this one division is of 64 bits: from the end of the channel that the slice begins in, distances are short.
    const int64_t begin = start_ / plan.pixels;
    const int64_t to_next = plan.pixels - start_ % plan.pixels;
    const int period = static_cast<int>(plan.pixels < (1 << 30) ? plan.pixels : (1 << 30));
    int channel = static_cast<int>(begin);
    int64_t next = to_next - position(pack);  // values until the next channel
    if (next <= 0) {
      const int past = static_cast<int>(-next);
      channel += 1 + past / period;
      next = period - past % period;
    }
    if (count == kSize && next >= kSize) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) f(i, channel);
    } else {
      int until = static_cast<int>(next < kSize ? next : kSize);
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (i == until) {
          ++channel;
          until += period < kSize ? period : kSize;
        }
        if (i < count) f(i, channel);
      }
    }
  }

 private:
  __device__ int position(int pack) const { return static_cast<int>(pack * blockDim.x + threadIdx.x) * kSize; }

  int64_t row_;
  int64_t start_;  // in the group
  int64_t first_;  // in x
  int index_;
  int values_;
};

// A run of pixels of a window of channels of (batch, pixels, channels) memory. A thread has the same channels, those of
// its column, of every lanes()-th pixel.
template <typename T>
class ChannelsLastSlice {
 public:
  static constexpr int kSize = Pack<T>::kSize;
  static constexpr Limits kLimits = kChannelsLastLimits;
  static constexpr int kSums = kSize;  // sums that a thread keeps: one a channel

  __device__ explicit ChannelsLastSlice(const Plan& plan) : index_(blockIdx.x % plan.slices) {
    const int unit = blockIdx.x / plan.slices;
    const int64_t image = unit / plan.windows;
    const int window = unit % plan.windows;
    const int group = window / plan.pieces * plan.bundle;
    piece_ = window % plan.pieces;
    row_ = image * plan.groups + group;
    image_ = image;
    channel_ = group * plan.group_channels + piece_ * plan.width;
    const int left = plan.bundle * plan.group_channels - piece_ * plan.width;
    width_ = left < plan.width ? left : plan.width;
    span_ = width_ / plan.bundle;
    columns_ = (plan.width + kSize - 1) / kSize;
    lanes_ = blockDim.x / columns_;
    lane_ = threadIdx.x / columns_;
    column_ = threadIdx.x % columns_;
    const int64_t start = index_ * plan.slice;
    const int64_t pixels = plan.pixels - start;
    pixels_ = static_cast<int>(pixels < 0 ? 0 : pixels < plan.slice ? pixels : plan.slice);
    channels_ = plan.channels;
    first_ = (image * plan.pixels + start) * plan.channels + channel_ + column_ * kSize;
  }

  __device__ int64_t row() const { return row_; }
  __device__ int64_t image() const { return image_; }
  __device__ int count() const { return pixels_ * span_; }  // values of each group
  __device__ int64_t partial(const Plan& plan, int group) const {
    return ((row_ + group) * plan.pieces + piece_) * plan.slices + index_;
  }

  __device__ int valid(int pack) const {
    const int left = width_ - column_ * kSize;
    return active() && pixel(pack) < pixels_ && left > 0 ? (left < kSize ? left : kSize) : 0;
  }
  __device__ int64_t offset(int pack) const { return first_ + static_cast<int64_t>(pixel(pack)) * channels_; }

  __device__ bool active() const { return lane_ < lanes_; }
  __device__ int lanes() const { return lanes_; }
  __device__ int pitch() const { return columns_ * kSize; }
  __device__ int span() const { return span_; }
  __device__ int entry() const { return lane_ * pitch() + column_ * kSize; }

  // The channel and, counted from the window's first, the group of the thread's i-th values. What lies beyond the
  // window is never counted, but is kept inside the arrays.
  __device__ int channel(int i) const {
    const int local = column_ * kSize + i;
    return channel_ + (local < width_ ? local : width_ - 1);
  }
  __device__ int group(int i) const {
    const int local = column_ * kSize + i;
    return (local < width_ ? local : width_ - 1) / span_;
  }

 private:
  __device__ int pixel(int pack) const { return pack * lanes_ + lane_; }

  int64_t row_;
  int64_t image_;
  int64_t first_;  // of the thread's pixels, in x
  int index_;
  int piece_;
  int channel_;    // the window's first
  int width_;
  int span_;
  int columns_;
  int lanes_;
  int lane_;
  int column_;
  int pixels_;
  int channels_;
};

}  // namespace catimage_accel
