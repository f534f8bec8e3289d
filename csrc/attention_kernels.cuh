// softmax(scale * q @ k.T) @ v in one pass over the keys with a running softmax (FlashAttention-2, arXiv 2307.08691).
//
// A block has some rows of q of one head, each of its warps 16 or 32 of them in registers. Keys and values pass through
// two stages of shared memory, one being filled while the other is read. No head_dim is padded: products are over 16
// columns, and over 8 at the end of a head_dim that is odd in them.
#pragma once

#include <cmath>

#include "attention_tile.cuh"
#include "ceil_div.h"

namespace catimage_accel {

template <typename Tile>
using Scores = float[Tile::kMTiles][Tile::kKeys / 8][4];

// scores = q @ k.T
template <typename Tile, typename T>
__device__ void multiply_keys(const Queries<Tile>& q, const T* keys, Scores<Tile>& scores) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int column = 0; column < Tile::kKeys / 8; column += 2) {
#pragma unroll
    for (int tile = 0; tile < Tile::kMTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) scores[tile][column][i] = scores[tile][column + 1][i] = 0.f;
    }
#pragma unroll
    for (int chunk = 0; chunk < Tile::kChunks; chunk += 2) {
      if (chunk + 1 < Tile::kChunks) {
        uint32_t k[4];  // (keys 0 to 7, both chunks), (keys 8 to 15, both chunks)
        load_matrices<false>(keys + (column * 8 + lane / 16 * 8 + lane % 8) * Tile::kPitch + (chunk + lane / 8 % 2) * 8,
                             k);
#pragma unroll
        for (int tile = 0; tile < Tile::kMTiles; ++tile) {
          const uint32_t left[4] = {q[tile][chunk][0], q[tile][chunk][1], q[tile][chunk + 1][0], q[tile][chunk + 1][1]};
          multiply_add<T>(left, {k[0], k[1]}, scores[tile][column]);
          multiply_add<T>(left, {k[2], k[3]}, scores[tile][column + 1]);
        }
      } else {
        uint32_t k[2];
        load_matrices<false>(keys + (column * 8 + lane % 16) * Tile::kPitch + chunk * 8, k);
#pragma unroll
        for (int tile = 0; tile < Tile::kMTiles; ++tile) {
          multiply_add<T>(q[tile][chunk], k[0], scores[tile][column]);
          multiply_add<T>(q[tile][chunk], k[1], scores[tile][column + 1]);
        }
      }
    }
  }
}

// Turns the scores into weights, and fades what was summed up under a smaller maximum.
template <typename Tile>
__device__ void weigh(float scale, int valid, Scores<Tile>& scores, Softmax<Tile>& state, Result<Tile>& result) {
  if (valid < Tile::kKeys) {
    const int first = threadIdx.x % 4 * 2;
#pragma unroll
    for (int column = 0; column < Tile::kKeys / 8; ++column) {
#pragma unroll
      for (int tile = 0; tile < Tile::kMTiles; ++tile) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (column * 8 + first + i % 2 >= valid) scores[tile][column][i] = -INFINITY;
        }
      }
    }
  }
#pragma unroll
  for (int tile = 0; tile < Tile::kMTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float top = state.top[tile][half];
#pragma unroll
      for (int column = 0; column < Tile::kKeys / 8; ++column) {
        top = fmaxf(top, fmaxf(scores[tile][column][2 * half], scores[tile][column][2 * half + 1]));
      }
      // The four lanes that share the rows.
      top = fmaxf(top, shuffle_xor(top, 1));
      top = fmaxf(top, shuffle_xor(top, 2));
      // A row whose scores are all -inf so far must not turn into -inf - -inf.
      const float shift = top == -INFINITY ? 0.f : top * scale;
      const float fade = fast_exp2(fmaf(state.top[tile][half], scale, -shift));
      state.top[tile][half] = top;
      float total = 0.f;
#pragma unroll
      for (int column = 0; column < Tile::kKeys / 8; ++column) {
#pragma unroll
        for (int i = 2 * half; i < 2 * half + 2; ++i) {
          scores[tile][column][i] = fast_exp2(fmaf(scores[tile][column][i], scale, -shift));
          total += scores[tile][column][i];
        }
      }
      state.total[tile][half] = fmaf(state.total[tile][half], fade, total);
#pragma unroll
      for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
        result[tile][chunk][2 * half] *= fade;
        result[tile][chunk][2 * half + 1] *= fade;
      }
    }
  }
}

// result += weights @ v
template <typename Tile, typename T>
__device__ void multiply_values(const Scores<Tile>& weights, const T* values, Result<Tile>& result) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int column = 0; column < Tile::kKeys / 8; column += 2) {
    uint32_t left[Tile::kMTiles][4];
#pragma unroll
    for (int tile = 0; tile < Tile::kMTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float(&pair)[4] = weights[tile][column + i / 2];
        left[tile][i] = pack_pair<T>(pair[i % 2 * 2], pair[i % 2 * 2 + 1]);
      }
    }
    const T* const row = values + (column * 8 + lane % 16) * Tile::kPitch;
#pragma unroll
    for (int chunk = 0; chunk < Tile::kChunks; chunk += 2) {
      if (chunk + 1 < Tile::kChunks) {
        uint32_t v[4];  // (keys 0 to 7, keys 8 to 15) of one chunk, then of the next
        load_matrices<true>(row + (chunk + lane / 16) * 8, v);
#pragma unroll
        for (int tile = 0; tile < Tile::kMTiles; ++tile) {
          multiply_add<T>(left[tile], {v[0], v[1]}, result[tile][chunk]);
          multiply_add<T>(left[tile], {v[2], v[3]}, result[tile][chunk + 1]);
        }
      } else {
        uint32_t v[2];
        load_matrices<true>(row + chunk * 8, v);
#pragma unroll
        for (int tile = 0; tile < Tile::kMTiles; ++tile) multiply_add<T>(left[tile], v, result[tile][chunk]);
      }
    }
  }
}

// Grid: batch * heads * ceil_div(queries, Tile::kRows) blocks.
template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, Tile::kBlocks) attention_kernel(const AttentionTensors<T> tensors) {
  const int blocks = (tensors.queries + Tile::kRows - 1) / Tile::kRows;
  const int first_query = static_cast<int>(blockIdx.x % blocks) * Tile::kRows;
  const int64_t head = blockIdx.x / blocks % tensors.heads;
  const int64_t batch = blockIdx.x / blocks / tensors.heads;
  const auto begin = [&](const T* from, const Strides& strides, int64_t row) {
    return from + batch * strides.batch + head * strides.head + row * strides.row;
  };
  T* stage = reinterpret_cast<T*>(shared_memory());  // keys, then values
  T* next_stage = stage + Tile::kStage;
  const auto fetch_stage = [&](int first_key, T* to) {
    const int valid = tensors.keys - first_key;
    fetch_rows<Tile, Tile::kKeys>(begin(tensors.k, tensors.k_strides, first_key), tensors.k_strides.row, valid, to);
    fetch_rows<Tile, Tile::kKeys>(begin(tensors.v, tensors.v_strides, first_key), tensors.v_strides.row, valid,
                                  to + Tile::kKeys * Tile::kPitch);
  };

  fetch_rows<Tile, Tile::kRows>(begin(tensors.q, tensors.q_strides, first_query), tensors.q_strides.row,
                                tensors.queries - first_query, next_stage);
  fetch_stage(0, stage);
  wait_for_copies();
  __syncthreads();
  Queries<Tile> q;
  load_queries<Tile>(next_stage, q);

  Result<Tile> result;
  Softmax<Tile> state;
#pragma unroll
  for (int tile = 0; tile < Tile::kMTiles; ++tile) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      state.top[tile][half] = -INFINITY;
      state.total[tile][half] = 0.f;
    }
#pragma unroll
    for (int chunk = 0; chunk < Tile::kChunks; ++chunk) {
#pragma unroll
      for (int i = 0; i < 4; ++i) result[tile][chunk][i] = 0.f;
    }
  }
  for (int first_key = 0; first_key < tensors.keys; first_key += Tile::kKeys) {
    wait_for_copies();
    __syncthreads();  // this stage is there for all, and none reads the other one any more
    if (first_key + Tile::kKeys < tensors.keys) fetch_stage(first_key + Tile::kKeys, next_stage);
    Scores<Tile> scores;
    multiply_keys<Tile>(q, stage, scores);
    weigh<Tile>(tensors.scale, tensors.keys - first_key, scores, state, result);
    multiply_values<Tile>(scores, stage + Tile::kKeys * Tile::kPitch, result);
    T* const done = stage;
    stage = next_stage;
    next_stage = done;
  }
  __syncthreads();
  const int warp_row = threadIdx.x / 32 * Tile::kWarpRows;
  const int64_t stride = tensors.heads * static_cast<int64_t>(Tile::kHeadDim);
  T* const out = tensors.out + ((batch * tensors.queries + first_query + warp_row) * tensors.heads + head) * Tile::kHeadDim;
  store_result<Tile>(result, state, reinterpret_cast<T*>(shared_memory()) + warp_row * Tile::kPitch,
                     tensors.queries - first_query - warp_row, stride, out);
}

// Calls f with the tile that suits; false where none does. Two sizes of stages: for many keys, and for the 77 of a text
// or several times as many, of which 64 would leave most of the last stage empty.
template <typename F>
bool with_attention_tile(int head_dim, int keys, F f) {
  const bool by_80 = ceil_div(keys, 80) * 80 < ceil_div(keys, 64) * 64;
  switch (head_dim) {
    case 40: by_80 ? f(AttentionTile<40, 1, 80>()) : f(AttentionTile<40, 2, 64>()); return true;
    case 64: by_80 ? f(AttentionTile<64, 1, 80>()) : f(AttentionTile<64, 2, 64>()); return true;
    case 80: by_80 ? f(AttentionTile<80, 1, 80>()) : f(AttentionTile<80, 2, 64>()); return true;
    case 160: f(AttentionTile<160, 1, 32>()); return true;
    default: return false;
  }
}

// Runs the kernel through launch(kernel, blocks, threads, shared_bytes, cluster, arguments...). False where there is
// none for this head_dim.
template <typename T, typename Launch>
bool run_attention(const AttentionTensors<T>& tensors, int64_t batch, int head_dim, Launch launch) {
  return with_attention_tile(head_dim, tensors.keys, [&]<typename Tile>(Tile) {
    launch(attention_kernel<T, Tile>, batch * tensors.heads * ceil_div(tensors.queries, Tile::kRows), Tile::kThreads,
           Tile::kSharedBytes, 1, tensors);
  });
}

}  // namespace catimage_accel
