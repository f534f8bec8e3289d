// What a block of attention works on at a time, and how it comes from and goes to memory.
#pragma once

#include "device.cuh"
#include "pack.cuh"
#include "tensor_core.cuh"

namespace catimage_accel {

constexpr float kLog2E = 1.4426950408889634f;

// Where (batch, sequence, heads, head_dim) memory, head_dim dense, has its parts; in values.
struct Strides {
  int64_t batch;
  int64_t row;
  int64_t head;
};

// Rows of q, k and v begin on 16 bytes.
template <typename T>
struct AttentionTensors {
  const T* q;
  const T* k;
  const T* v;
  T* out;  // (batch, queries, heads, head_dim), contiguous
  Strides q_strides;
  Strides k_strides;
  Strides v_strides;
  int heads;
  int queries;
  int keys;     // at least 1
  float scale;  // of the scores, times log2(e): above 0
};

// What a block works on at a time.
template <int kHeadDimension, int kRowTiles, int kKeyRows>
struct AttentionTile {
  static constexpr int kHeadDim = kHeadDimension;
  static constexpr int kMTiles = kRowTiles;  // tiles of 16 rows of q that a warp has
  static constexpr int kKeys = kKeyRows;     // of a stage
  static constexpr int kWarps = 4;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kWarpRows = 16 * kMTiles;
  static constexpr int kRows = kWarps * kWarpRows;
  static constexpr int kChunks = kHeadDim / 8;  // of 16 bytes, of a row
  static constexpr int kPitch = 8 * (kChunks | 1);  // of shared memory, in values: 8 rows lie in 8 different banks
  static constexpr int kStage = 2 * kKeys * kPitch;
  static constexpr int kSharedBytes = 2 * 2 * kStage;
  static constexpr int kBlocks = kMTiles == 1 && kHeadDim <= 80 ? 3 : 2;  // of a multiprocessor, whose registers they share
  static_assert(kHeadDim % 8 == 0 && kKeys % 16 == 0);
  static_assert(kRows <= 2 * kKeys, "q passes through one stage, the result through both");
};

template <typename T>
__device__ uint32_t pack_pair(float low, float high) {
  T values[2];
  from_float(low, values[0]);
  from_float(high, values[1]);
  uint32_t packed;
  memcpy(&packed, values, sizeof(packed));
  return packed;
}

// Begins to copy kRows rows into shared memory; those from `valid` on are zeros.
template <typename Tile, int kRows, typename T>
__device__ void fetch_rows(const T* from, int64_t stride, int valid, T* shared) {
#pragma unroll 1  // the addresses of several copies at once would take registers from the products
  for (int i = threadIdx.x; i < kRows * Tile::kChunks; i += Tile::kThreads) {
    const int row = i / Tile::kChunks;
    const int column = i % Tile::kChunks * 8;
    const bool copied = row < valid;
    copy_or_zero(shared + row * Tile::kPitch + column, copied ? from + row * stride + column : from, copied);
  }
}

// A warp's rows of q as left factors, [tile][16 bytes of a row][rows 0 to 7, rows 8 to 15].
template <typename Tile>
using Queries = uint32_t[Tile::kMTiles][Tile::kChunks][2];

template <typename Tile, typename T>
__device__ void load_queries(const T* shared, Queries<Tile>& q) {
  const int lane = threadIdx.x % 32;
  const T* const row = shared + (threadIdx.x / 32 * Tile::kWarpRows + lane % 16) * Tile::kPitch;
#pragma unroll
  for (int tile = 0; tile < Tile::kMTiles; ++tile) {
#pragma unroll
    for (int chunk = 0; chunk < Tile::kChunks; chunk += 2) {
      const T* const at = row + tile * 16 * Tile::kPitch + chunk * 8;
      if (chunk + 1 < Tile::kChunks) {
        uint32_t both[4];
        load_matrices<false>(at + lane / 16 * 8, both);
        q[tile][chunk][0] = both[0];
        q[tile][chunk][1] = both[1];
        q[tile][chunk + 1][0] = both[2];
        q[tile][chunk + 1][1] = both[3];
      } else {
        load_matrices<false>(at, q[tile][chunk]);
      }
    }
  }
}

// What a lane keeps of its rows: of each tile, one of rows 0 to 7 and one of rows 8 to 15.
template <typename Tile>
struct Softmax {
  float top[Tile::kMTiles][2];    // the largest score so far
  float total[Tile::kMTiles][2];  // of the lane's own weights
};

template <typename Tile>
using Result = float[Tile::kMTiles][Tile::kChunks][4];

// A warp's rows of the result, through its own part of shared memory, so that 16 bytes are written at a time.
template <typename Tile, typename T>
__device__ void store_result(const Result<Tile>& result, const Softmax<Tile>& state, T* shared, int valid,
                             int64_t stride, T* out) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int tile = 0; tile < Tile::kMTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float total = state.total[tile][half];
      total += shuffle_xor(total, 1);
      total += shuffle_xor(total, 2);
      T* const row = shared + (tile * 16 + half * 8 + lane / 4) * Tile::kPitch + lane % 4 * 2;
#pragma unroll
      for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
        const float(&values)[4] = result[tile][chunk];
        const uint32_t packed = pack_pair<T>(values[2 * half] / total, values[2 * half + 1] / total);
        memcpy(row + chunk * 8, &packed, sizeof(packed));
      }
    }
  }
  __syncwarp();
  for (int i = lane; i < Tile::kWarpRows * Tile::kChunks; i += 32) {
    const int row = i / Tile::kChunks;
    const int column = i % Tile::kChunks * 8;
    if (row < valid) {
      *reinterpret_cast<uint4*>(out + row * stride + column) =
          *reinterpret_cast<const uint4*>(shared + row * Tile::kPitch + column);
    }
  }
}

}  // namespace catimage_accel
