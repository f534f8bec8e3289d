// What csrc/tensor_core.cuh has of a warp, on the CPU. A copy reaches shared memory when its thread waits for it, not
// before.
#pragma once

#include "cuda_emulator.h"
#include "pack.cuh"

namespace catimage_accel {

inline bool is_on_16_bytes(const void* pointer) { return reinterpret_cast<std::uintptr_t>(pointer) % 16 == 0; }

inline void copy_or_zero(void* shared, const void* global, bool copied) {
  emulator::require(is_on_16_bytes(shared) && is_on_16_bytes(global), "a copy that is not of 16 aligned bytes");
  emulator::machine.running->copies.push_back({shared, copied ? global : nullptr});
}

inline void wait_for_copies() {
  for (const emulator::Copy& copy : emulator::machine.running->copies) {
    if (copy.from == nullptr) {
      std::memset(copy.to, 0, 16);
    } else {
      std::memcpy(copy.to, copy.from, 16);
    }
  }
  emulator::machine.running->copies.clear();
}

template <bool kTransposed, int kMatrices>
void load_matrices(const void* row, std::uint32_t (&to)[kMatrices]) {
  const auto rows = emulator::exchange(row);
  const int along = emulator::lane() / 4, pair = emulator::lane() % 4 * 2;
  for (int matrix = 0; matrix < kMatrices; ++matrix) {
    std::uint16_t values[2];
    for (int i = 0; i < 2; ++i) {
      const void* const from = rows[matrix * 8 + (kTransposed ? pair + i : along)];
      emulator::require(is_on_16_bytes(from), "a row of a matrix that is not on 16 bytes");
      values[i] = static_cast<const std::uint16_t*>(from)[kTransposed ? along : pair + i];
    }
    std::memcpy(&to[matrix], values, sizeof(values));
  }
}

template <typename T>
float value_of(std::uint32_t pair, int i) {
  T values[2];
  std::memcpy(values, &pair, sizeof(values));
  return to_float(values[i]);
}

// What a lane brings to a product: kColumns / 8 columns of matrices of a, as many rows of b.
template <int kColumns>
struct Factors {
  std::uint32_t a[kColumns / 4];
  std::uint32_t b[kColumns / 8];
};

template <typename T, int kColumns>
void multiply_add(const Factors<kColumns>& own, float (&c)[4]) {
  const auto lanes = emulator::exchange(own);
  for (int i = 0; i < 4; ++i) {
    const int row = emulator::lane() / 4, column = emulator::lane() % 4 * 2 + i % 2;
    for (int k = 0; k < kColumns; ++k) {
      const std::uint32_t a = lanes[row * 4 + k % 8 / 2].a[k / 8 * 2 + i / 2];
      const std::uint32_t b = lanes[column * 4 + k % 8 / 2].b[k / 8];
      c[i] += value_of<T>(a, k % 2) * value_of<T>(b, k % 2);
    }
  }
}

template <typename T>
void multiply_add(const std::uint32_t (&a)[4], const std::uint32_t (&b)[2], float (&c)[4]) {
  multiply_add<T, 16>({{a[0], a[1], a[2], a[3]}, {b[0], b[1]}}, c);
}

template <typename T>
void multiply_add(const std::uint32_t (&a)[2], std::uint32_t b, float (&c)[4]) {
  multiply_add<T, 8>({{a[0], a[1]}, {b}}, c);
}

}  // namespace catimage_accel
