// What a block of threads has: its shared memory and, from sm_90 on, the other blocks of its cluster.
//
// A host compiler sees none of this: whoever compiles the kernels with one brings these functions.
#pragma once

#ifdef __CUDACC__

#include <cooperative_groups.h>

namespace catimage_accel {

__device__ inline char* shared_memory() {
  extern __shared__ __align__(16) char bytes[];
  return bytes;
}

// Waits for every thread of the cluster; in a launch without clusters, of the block.
__device__ inline void cluster_sync() {
#if __CUDA_ARCH__ >= 900
  cooperative_groups::this_cluster().sync();
#else
  __syncthreads();
#endif
}

// The block `rank` of the cluster's own copy of `shared`. It must not have ended: a cluster_sync() comes after the
// last look at it.
template <typename T>
__device__ inline const T* cluster_peer(T* shared, int rank) {
#if __CUDA_ARCH__ >= 900
  return cooperative_groups::this_cluster().map_shared_rank(shared, rank);
#else
  return shared;
#endif
}

template <typename T>
__device__ inline T shuffle_down(T value, int lanes) {
  return __shfl_down_sync(0xffffffffu, value, lanes);
}

// Of the lane whose number differs in these bits.
__device__ inline float shuffle_xor(float value, int bits) { return __shfl_xor_sync(0xffffffffu, value, bits); }

// 2^x to 2 units in the last place; 0 for results below the smallest normal number.
__device__ inline float fast_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

}  // namespace catimage_accel

#endif
