// The moments of a slice that a block holds in registers. It is summed up twice: for a mean, then for the distances
// from it. Nothing is added atomically, and the order is the same in every run.
#pragma once

#include "group_norm_slice.cuh"
#include "moments.cuh"

namespace catimage_accel {

// Shared memory of the kernels that sum up a slice.
struct Workspace {
  Moments* moments;        // (bundle,) of the block's slice
  Statistics* statistics;  // (bundle,) of the whole groups
  float2* entries;         // (lanes, pitch): what each thread has summed up
  float2* means;           // (units,): see sum_groups
  float2* distances;       // (units,)

  __host__ __device__ static int units(const Plan& plan) {
    const int warps = plan.threads / 32;
    return plan.bundle > warps ? plan.bundle : warps;
  }

  static int bytes(const Plan& plan, int sums) {
    return plan.bundle * static_cast<int>(sizeof(Moments) + sizeof(Statistics)) +
           (plan.threads * sums + 2 * units(plan)) * static_cast<int>(sizeof(float2));
  }

  __device__ Workspace(const Plan& plan, int sums) {
    moments = reinterpret_cast<Moments*>(shared_memory());
    entries = reinterpret_cast<float2*>(moments + plan.bundle);
    means = entries + plan.threads * sums;
    distances = means + units(plan);
    statistics = reinterpret_cast<Statistics*>(distances + units(plan));
  }
};

// Warps that share the work of summing up one group.
__device__ inline int warps_per_group(int bundle) {
  const int warps = blockDim.x / 32;
  return warps > bundle ? warps / bundle : 1;
}

// Adds up the entries of each group, in an order that the shape alone decides: sums[group * share + i] is what the i-th
// of the group's `share` warps found. Ends with all threads seeing it.
template <typename Slice>
__device__ void sum_groups(const Slice& slice, int bundle, const float2* entries, float2* sums) {
  __syncthreads();
  const int share = warps_per_group(bundle);
  const int lane = threadIdx.x % 32;
  const int count = slice.lanes() * slice.span();
  for (int unit = threadIdx.x / 32; unit < bundle * share; unit += blockDim.x / 32) {
    const int first = unit / share * slice.span();
    float2 sum = {0.f, 0.f};
    for (int i = unit % share * 32 + lane; i < count; i += share * 32) {
      const float2 entry = entries[i / slice.span() * slice.pitch() + first + i % slice.span()];
      sum.x += entry.x;
      sum.y += entry.y;
    }
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      sum.x += shuffle_down(sum.x, lanes);
      sum.y += shuffle_down(sum.y, lanes);
    }
    if (lane == 0) sums[unit] = sum;
  }
  __syncthreads();
}

__device__ inline float2 group_sum(const float2* sums, int bundle, int group) {
  const int share = warps_per_group(bundle);
  float2 sum = {0.f, 0.f};
  for (int i = 0; i < share; ++i) {
    sum.x += sums[group * share + i].x;
    sum.y += sums[group * share + i].y;
  }
  return sum;
}

// The moments of each group's part of the slice: calls write(group, moments) in one thread a group.
template <typename Slice, int kPacks, typename F>
__device__ void slice_moments(const Plan& plan, const Slice& slice, const float (&x)[kPacks][Slice::kSize],
                              const Workspace& shared, F write) {
  constexpr int kSums = Slice::kSums;
  const float count = static_cast<float>(slice.count());
  const float inverse_count = 1.f / count;  // applied to each value: their sum could overflow where the mean does not

  float means[kSums] = {};
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    for_valid<Slice::kSize>(slice.valid(k), [&](int i) {
      float& mean = means[i % kSums];
      mean = fmaf(x[k][i], inverse_count, mean);
    });
  }
  if (slice.active()) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) shared.entries[slice.entry() + i] = {means[i], 0.f};
  }
  sum_groups(slice, plan.bundle, shared.entries, shared.means);

  float2 distances[kSums] = {};
#pragma unroll
  for (int i = 0; i < kSums; ++i) means[i] = group_sum(shared.means, plan.bundle, slice.group(i)).x;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    for_valid<Slice::kSize>(slice.valid(k), [&](int i) {
      const float distance = x[k][i] - means[i % kSums];
      float2& sums = distances[i % kSums];
      sums.x += distance;
      sums.y = fmaf(distance, distance, sums.y);
    });
  }
  if (slice.active()) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) shared.entries[slice.entry() + i] = distances[i];
  }
  sum_groups(slice, plan.bundle, shared.entries, shared.distances);

  for (int group = threadIdx.x; group < plan.bundle; group += blockDim.x) {
    const float2 sums = group_sum(shared.distances, plan.bundle, group);
    write(group, moments_about(group_sum(shared.means, plan.bundle, group).x, count, sums.x, sums.y));
  }
}

}  // namespace catimage_accel
