// group_norm, with an optional shift before it and SiLU after it. A block holds its slice of x in registers.
//
// one_pass_kernel: a cluster of blocks holds a whole group, so x is read once. Where a group is too large for that:
// moments_kernel (of each slice), combine_kernel (of the slices of a group, in a fixed order), apply_kernel.
#pragma once

#include "group_norm_moments.cuh"

namespace catimage_accel {

template <typename T>
struct Tensors {
  const T* x;       // (batch, channels, pixels), or with ChannelsLastSlice (batch, pixels, channels)
  const T* shift;   // (batch, channels), added to x; or null
  const T* weight;  // (channels,) or null for ones
  const T* bias;    // (channels,) or null for zeros
  T* y;             // as x
};

constexpr int kCombineThreads = 128;

template <typename T, int kPacks>
__device__ void add_shift(const T* shift, const Plan& plan, const ContiguousSlice<T>& slice,
                          float (&x)[kPacks][Pack<T>::kSize]) {
  shift += slice.row() * plan.group_channels;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    slice.for_channels(plan, k, [&](int i, int channel) { x[k][i] += to_float(shift[channel]); });
  }
}

template <typename T, int kPacks>
__device__ void add_shift(const T* shift, const Plan& plan, const ChannelsLastSlice<T>& slice,
                          float (&x)[kPacks][Pack<T>::kSize]) {
  shift += slice.image() * plan.channels;
#pragma unroll
  for (int i = 0; i < Pack<T>::kSize; ++i) {
    const float value = to_float(shift[slice.channel(i)]);
#pragma unroll
    for (int k = 0; k < kPacks; ++k) x[k][i] += value;
  }
}

// Reads a thread's packs, all of them before any is used: so they are under way together.
template <typename T, typename Slice, int kPacks>
__device__ void load_slice(const Tensors<T>& tensors, const Plan& plan, const Slice& slice,
                           float (&x)[kPacks][Pack<T>::kSize]) {
  if (plan.aligned) {
    uint4 packs[kPacks];
#pragma unroll
    for (int k = 0; k < kPacks; ++k) {
      packs[k] = {0u, 0u, 0u, 0u};
      if (slice.valid(k) > 0) packs[k] = *reinterpret_cast<const uint4*>(tensors.x + slice.offset(k));
    }
#pragma unroll
    for (int k = 0; k < kPacks; ++k) unpack<T>(packs[k], x[k]);
  } else {
#pragma unroll
    for (int k = 0; k < kPacks; ++k) load_singly(tensors.x + slice.offset(k), slice.valid(k), x[k]);
  }
  if (tensors.shift != nullptr) add_shift(tensors.shift, plan, slice, x);
}

template <typename T>
__device__ float scale_of(const Tensors<T>& tensors, int channel, const Statistics& group) {
  return tensors.weight == nullptr ? group.inverse_std : group.inverse_std * to_float(tensors.weight[channel]);
}

template <typename T>
__device__ float bias_of(const Tensors<T>& tensors, int channel) {
  return tensors.bias == nullptr ? 0.f : to_float(tensors.bias[channel]);
}

__device__ inline float normalise_value(float x, const Statistics& group, float scale, float bias) {
  return fmaf((x - group.mean) - group.low, scale, bias);
}

// `statistics`: of the window's groups.
template <typename T, int kPacks>
__device__ void normalise(const Tensors<T>& tensors, const Plan& plan, const ContiguousSlice<T>& slice,
                          const Statistics* statistics, float (&x)[kPacks][Pack<T>::kSize]) {
  const Statistics group = statistics[0];
  const int first = static_cast<int>(slice.row() % plan.groups) * plan.group_channels;
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    slice.for_channels(plan, k, [&](int i, int channel) {
      const float scale = scale_of(tensors, first + channel, group);
      x[k][i] = normalise_value(x[k][i], group, scale, bias_of(tensors, first + channel));
    });
  }
}

template <typename T, int kPacks>
__device__ void normalise(const Tensors<T>& tensors, const Plan&, const ChannelsLastSlice<T>& slice,
                          const Statistics* statistics, float (&x)[kPacks][Pack<T>::kSize]) {
#pragma unroll
  for (int i = 0; i < Pack<T>::kSize; ++i) {
    const Statistics group = statistics[slice.group(i)];
    const float scale = scale_of(tensors, slice.channel(i), group);
    const float bias = bias_of(tensors, slice.channel(i));
#pragma unroll
    for (int k = 0; k < kPacks; ++k) x[k][i] = normalise_value(x[k][i], group, scale, bias);
  }
}

// y * sigmoid(y). The fast division is accurate to 2 units in the last place: too few for float results.
template <typename T>
__device__ float silu_of(float y) {
  const float divisor = 1.f + __expf(-y);
  if constexpr (sizeof(T) == sizeof(float)) return y / divisor;
  return __fdividef(y, divisor);
}

template <typename T, typename Slice, int kPacks>
__device__ void store_slice(const Tensors<T>& tensors, const Plan& plan, const Slice& slice, bool silu,
                            float (&x)[kPacks][Pack<T>::kSize]) {
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int valid = slice.valid(k);
    if (valid == 0) continue;
    if (silu) {
#pragma unroll
      for (int i = 0; i < Pack<T>::kSize; ++i) x[k][i] = silu_of<T>(x[k][i]);
    }
    store(x[k], valid, plan.aligned, tensors.y + slice.offset(k));
  }
}

// Grid: batch * windows clusters of plan.slices blocks.
template <typename T, typename Slice>
__global__ void __launch_bounds__(Slice::kLimits.threads, 1)
    one_pass_kernel(const Tensors<T> tensors, const Plan plan, float eps, bool silu) {
  const Slice slice(plan);
  const Workspace shared(plan, Slice::kSums);
  float x[Slice::kLimits.packs][Pack<T>::kSize];
  load_slice(tensors, plan, slice, x);
  slice_moments(plan, slice, x, shared, [&](int group, const Moments& moments) { shared.moments[group] = moments; });
  cluster_sync();
  for (int group = threadIdx.x; group < plan.bundle; group += blockDim.x) {
    Moments moments = {0.f, 0.f, 0.f, 0.f};
    for (int rank = 0; rank < plan.slices; ++rank) moments = merge(moments, cluster_peer(shared.moments, rank)[group]);
    shared.statistics[group] = finish(moments, eps);
  }
  cluster_sync();  // the statistics are there, and no block ends while another reads its moments
  normalise(tensors, plan, slice, shared.statistics, x);
  store_slice(tensors, plan, slice, silu, x);
}

// Grid: batch * windows * plan.slices blocks.
template <typename T, typename Slice>
__global__ void __launch_bounds__(Slice::kLimits.threads, 1)
    moments_kernel(const Tensors<T> tensors, const Plan plan,
                   Moments* partials) {  // (batch * groups, pieces * slices)
  const Slice slice(plan);
  const Workspace shared(plan, Slice::kSums);
  float x[kStreamPacks][Pack<T>::kSize];
  load_slice(tensors, plan, slice, x);
  slice_moments(plan, slice, x, shared,
                [&](int group, const Moments& moments) { partials[slice.partial(plan, group)] = moments; });
}

// Grid: batch * groups blocks. A template only so that its definition may stand in a header.
template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    combine_kernel(const Moments* partials,  // (batch * groups, count)
                   int count, float eps,
                   Statistics* statistics) {  // (batch * groups,)
  Moments* warps = reinterpret_cast<Moments*>(shared_memory());
  partials += static_cast<int64_t>(blockIdx.x) * count;
  Moments moments = {0.f, 0.f, 0.f, 0.f};
  for (int i = threadIdx.x; i < count; i += kThreads) moments = merge(moments, partials[i]);
  moments = merge_warp(moments);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = moments;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 1; i < kThreads / 32; ++i) moments = merge(moments, warps[i]);
    statistics[blockIdx.x] = finish(moments, eps);
  }
}

// Grid: batch * windows * plan.slices blocks.
template <typename T, typename Slice>
__global__ void __launch_bounds__(Slice::kLimits.threads, 1)
    apply_kernel(const Tensors<T> tensors, const Plan plan,
                 const Statistics* statistics,  // (batch * groups,)
                 bool silu) {
  const Slice slice(plan);
  float x[kStreamPacks][Pack<T>::kSize];
  load_slice(tensors, plan, slice, x);
  normalise(tensors, plan, slice, statistics + slice.row(), x);
  store_slice(tensors, plan, slice, silu, x);
}

// Bytes of device memory that a group_norm needs beside its tensors: partial moments, then statistics.
inline int64_t partials_bytes(const Plan& plan, int64_t batch) {
  return plan.one_pass ? 0 : batch * plan.groups * plan.pieces * plan.slices * static_cast<int64_t>(sizeof(Moments));
}

inline int64_t scratch_bytes(const Plan& plan, int64_t batch) {
  const int64_t statistics_bytes = batch * plan.groups * static_cast<int64_t>(sizeof(Statistics));
  return plan.one_pass ? 0 : partials_bytes(plan, batch) + statistics_bytes;
}

// Runs the kernels through launch(kernel, blocks, threads, shared_bytes, cluster, arguments...).
template <typename T, typename Slice, typename Launch>
void run_group_norm(const Tensors<T>& tensors, const Plan& plan, int64_t batch, float eps, bool silu, void* scratch,
                    Launch launch) {
  const int64_t blocks = batch * plan.windows * plan.slices;
  const int shared_bytes = Workspace::bytes(plan, Slice::kSums);
  if (plan.one_pass) {
    launch(one_pass_kernel<T, Slice>, blocks, plan.threads, shared_bytes, plan.slices, tensors, plan, eps, silu);
    return;
  }
  auto* partials = static_cast<Moments*>(scratch);
  auto* statistics = reinterpret_cast<Statistics*>(static_cast<char*>(scratch) + partials_bytes(plan, batch));
  launch(moments_kernel<T, Slice>, blocks, plan.threads, shared_bytes, 1, tensors, plan, partials);
  launch(combine_kernel<kCombineThreads>, batch * plan.groups, kCombineThreads,
         static_cast<int>(kCombineThreads / 32 * sizeof(Moments)), 1, static_cast<const Moments*>(partials),
         plan.pieces * plan.slices, eps, statistics);
  launch(apply_kernel<T, Slice>, blocks, plan.threads, 0, 1, tensors, plan, static_cast<const Statistics*>(statistics),
         silu);
}

}  // namespace catimage_accel
