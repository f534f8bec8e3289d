// How the work of a group_norm is cut over blocks and threads. Everything here follows from the shape of one image and
// from the device, never from the batch: so an image's result is the same in every batch.
#pragma once

#include <algorithm>
#include <cstdint>

#include "ceil_div.h"

namespace catimage_accel {

// What a block can hold in registers: packs are 16 bytes of x. A thread of channels-last memory keeps sums for each of
// its channels, in registers and in shared memory, so there are fewer of them.
struct Limits {
  int threads;  // of a block
  int packs;    // of a thread
};
constexpr Limits kContiguousLimits = {768, 4};
constexpr Limits kChannelsLastLimits = {512, 6};

constexpr int kWantedPacks = 4;      // of a thread, as long as the block can have more threads
constexpr int kBlockPacks = 1024;    // of a block, as long as the cluster can have more blocks
constexpr int kStreamPacks = 4;      // of a thread, where x does not fit into a cluster
constexpr int kStreamThreads = 256;  // of a block, where x does not fit into a cluster
constexpr int kMaxBundle = 256;      // groups that a block sums up at once: bounds its shared memory
constexpr int kRunBytes = 64;        // channels-last memory is read in runs of at least two 32-byte sectors

struct Shape {
  int64_t pixels;
  int channels;
  int groups;
  bool channels_last;
  int itemsize;
  bool aligned;     // x and y begin on a 16-byte boundary
  int max_cluster;  // blocks that can share memory: 1 before sm_90
};

// An image is cut into windows of channels, a window into slices, and a block has one slice. NC... memory: a window is
// a group, a slice a run of its values. N...C memory: a window is a bundle of whole groups, or where a group has more
// channels than a block has threads for, a piece of one; a slice is a run of pixels.
struct Plan {
  int64_t pixels;      // of an image
  int64_t slice;       // values (NC...) or pixels (N...C) of a slice; the last slice of a window may be shorter
  int channels;
  int groups;
  int group_channels;  // channels of a group
  int slices;          // of a window
  int windows;         // of an image
  int bundle;          // groups in a window
  int pieces;          // windows that a group is cut into; 1 unless bundle is 1
  int width;           // channels of a window; the last piece of a group may have fewer
  bool aligned;        // every pack is 16 aligned bytes
  bool one_pass;       // a cluster holds a whole window: x is read once
  int threads;         // of a block
};

inline int whole_warps(int64_t threads) { return static_cast<int>(ceil_div(threads, 32) * 32); }

// The fewest blocks, in powers of two, that a window of so many packs is spread over.
inline int cluster_size(int64_t packs, int max_cluster) {
  int cluster = 1;
  while (cluster < max_cluster && static_cast<int64_t>(cluster) * kBlockPacks < packs) cluster *= 2;
  return cluster;
}

inline Plan plan_contiguous(const Shape& shape, Plan plan) {
  const int size = 16 / shape.itemsize;
  const int64_t values = shape.pixels * plan.group_channels;
  const int64_t packs = ceil_div(values, size);
  plan.windows = shape.groups;
  plan.bundle = plan.pieces = 1;
  plan.width = plan.group_channels;
  plan.aligned = shape.aligned && values % size == 0;
  plan.slices = cluster_size(packs, shape.max_cluster);
  const int64_t block_packs = ceil_div(packs, plan.slices);
  constexpr auto kLimits = kContiguousLimits;
  plan.one_pass = block_packs <= kLimits.threads * kLimits.packs;
  if (plan.one_pass) {
    plan.threads = whole_warps(std::min<int64_t>(ceil_div(block_packs, kWantedPacks), kLimits.threads));
    plan.slice = block_packs * size;
  } else {
    plan.threads = kStreamThreads;
    plan.slice = kStreamThreads * kStreamPacks * size;
    plan.slices = static_cast<int>(ceil_div(values, plan.slice));
  }
  return plan;
}

// Groups to a window: the least that make a run of `least_bytes`, or the most that `most_packs` hold, of whole packs
// where there are such. 0 if no bundle is that narrow.
inline int choose_bundle(const Shape& shape, int group_channels, int least_bytes, int most_packs) {
  const int size = 16 / shape.itemsize;
  const bool whole_packs = shape.aligned && shape.channels % size == 0;
  for (const bool whole : {true, false}) {
    int widest = 0;
    for (int bundle = 1; bundle <= std::min(shape.groups, kMaxBundle); ++bundle) {
      const int64_t width = static_cast<int64_t>(bundle) * group_channels;
      if (ceil_div(width, size) > most_packs) break;
      if (shape.groups % bundle != 0 || (whole && !(whole_packs && width % size == 0))) continue;
      widest = bundle;
      if (width * shape.itemsize >= least_bytes) return bundle;
    }
    if (widest > 0) return widest;
  }
  return 0;
}

inline Plan plan_channels_last(const Shape& shape, Plan plan) {
  constexpr auto kLimits = kChannelsLastLimits;
  const int size = 16 / shape.itemsize;
  const auto set_bundle = [&](int bundle) {
    plan.bundle = bundle;
    plan.pieces = 1;
    plan.width = bundle * plan.group_channels;
    plan.windows = shape.groups / bundle;
    plan.aligned = shape.aligned && shape.channels % size == 0 && plan.width % size == 0;
  };
  if (const int bundle = choose_bundle(shape, plan.group_channels, kRunBytes, kLimits.threads); bundle > 0) {
    set_bundle(bundle);
    const int64_t columns = ceil_div(plan.width, size);
    plan.slices = cluster_size(shape.pixels * columns, shape.max_cluster);
    plan.slice = ceil_div(shape.pixels, plan.slices);
    const int64_t wanted = ceil_div(plan.slice, kWantedPacks) * columns;
    plan.threads = whole_warps(std::clamp<int64_t>(wanted, columns, kLimits.threads));
    plan.one_pass = plan.slice <= plan.threads / columns * kLimits.packs;
    if (plan.one_pass) return plan;
  }
  if (const int bundle = choose_bundle(shape, plan.group_channels, INT32_MAX, kLimits.threads); bundle > 0) {
    set_bundle(bundle);
  } else {
    plan.bundle = 1;
    plan.width = kLimits.threads * size;
    plan.pieces = static_cast<int>(ceil_div(plan.group_channels, plan.width));
    plan.windows = shape.groups * plan.pieces;
    plan.aligned = shape.aligned && plan.group_channels % size == 0;
  }
  const int64_t columns = ceil_div(plan.width, size);
  const int64_t lanes = std::max<int64_t>(1, kStreamThreads / columns);
  plan.one_pass = false;
  plan.threads = whole_warps(lanes * columns);
  plan.slice = plan.threads / columns * kStreamPacks;
  plan.slices = static_cast<int>(ceil_div(shape.pixels, plan.slice));
  return plan;
}

inline Plan make_plan(const Shape& shape) {
  Plan plan{};
  plan.pixels = shape.pixels;
  plan.channels = shape.channels;
  plan.groups = shape.groups;
  plan.group_channels = shape.channels / shape.groups;
  return shape.channels_last ? plan_channels_last(shape, plan) : plan_contiguous(shape, plan);
}

}  // namespace catimage_accel
