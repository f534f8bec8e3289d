// Values as memory holds them, 16 bytes at a time, and as float, in which everything is computed.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstring>

namespace catimage_accel {

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

__device__ inline void from_float(float value, float& to) { to = value; }
__device__ inline void from_float(float value, __half& to) { to = __float2half_rn(value); }
__device__ inline void from_float(float value, __nv_bfloat16& to) { to = __float2bfloat16_rn(value); }

template <typename T>
struct alignas(16) Pack {
  static constexpr int kSize = 16 / sizeof(T);
  T values[kSize];
};

// Calls f(0), f(1), ... for the first `valid` values of a pack. Nearly always that is all of them: a branch a pack then
// saves a comparison a value.
template <int kSize, typename F>
__device__ inline void for_valid(int valid, F f) {
  if (valid == kSize) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) f(i);
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      if (i < valid) f(i);
    }
  }
}

template <typename T>
__device__ inline void unpack(const uint4& memory, float (&to)[Pack<T>::kSize]) {
  Pack<T> pack;
  memcpy(&pack, &memory, sizeof(pack));
#pragma unroll
  for (int i = 0; i < Pack<T>::kSize; ++i) to[i] = to_float(pack.values[i]);
}

// The first `valid` values at `from`, one by one: what is left where no 16 bytes are aligned. The others are 0.
template <typename T>
__device__ inline void load_singly(const T* from, int valid, float (&to)[Pack<T>::kSize]) {
#pragma unroll
  for (int i = 0; i < Pack<T>::kSize; ++i) to[i] = i < valid ? to_float(from[i]) : 0.f;
}

// Writes the first `valid` values; `aligned`: `to` is on a 16-byte boundary, and `valid` is none or all.
template <typename T>
__device__ inline void store(const float (&from)[Pack<T>::kSize], int valid, bool aligned, T* to) {
  constexpr int kSize = Pack<T>::kSize;
  Pack<T> pack;
#pragma unroll
  for (int i = 0; i < kSize; ++i) from_float(from[i], pack.values[i]);
  if (!aligned) {
    for_valid<kSize>(valid, [&](int i) { to[i] = pack.values[i]; });
  } else if (valid > 0) {
    *reinterpret_cast<Pack<T>*>(to) = pack;
  }
}

}  // namespace catimage_accel
