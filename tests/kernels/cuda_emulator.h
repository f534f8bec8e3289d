// Runs the source of CUDA kernels on the CPU, so that what they compute is tested without a GPU.
//
// Every CUDA thread of a cluster is a fiber of one thread of the CPU. They take turns at barriers and shuffles only, a
// warp going on until it must wait for others, in an order of warps that the caller chooses: a result that depends on
// the order betrays a missing barrier. What a kernel shares or forgets to write is NaN, and shared memory ends where the
// launch says.
#pragma once

#include <ucontext.h>
#include <vector_types.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#define __launch_bounds__(...)

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim;

inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float x, float y) { return x / y; }

namespace emulator {

constexpr std::size_t kStackBytes = 32 * 1024;
constexpr std::size_t kGuardBytes = 64;
constexpr int kWarp = 32;

struct Barrier {
  int expected = 0;
  int arrived = 0;
  std::uint64_t generation = 0;
};

struct Warp {
  Barrier barrier;
  unsigned char slots[kWarp][32];
};

struct Block {
  Barrier barrier;
  std::vector<char> shared;
  std::vector<Warp> warps;
};

// Of 16 bytes into shared memory, on its way until it is waited for.
struct Copy {
  void* to;
  const void* from;  // or null for zeros
};

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  uint3 thread, block;
  int rank;  // of the block in its cluster
  std::vector<Copy> copies;
  bool done;
};

struct Machine {
  ucontext_t scheduler;
  std::vector<Fiber> fibers;
  std::vector<Block> blocks;
  Barrier cluster;
  std::function<void()> kernel;
  Fiber* running = nullptr;
  const char* failure = nullptr;  // what a thread did that a device would not take
  bool moved = false;  // whether a barrier opened or a fiber ended in this turn of a warp
};

inline Machine machine;

inline void wait(Barrier& barrier) {
  Fiber* const self = machine.running;
  const std::uint64_t generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    machine.moved = true;
  }
  while (barrier.generation == generation) swapcontext(&self->context, &machine.scheduler);
}

inline Block& block() { return machine.blocks[machine.running->rank]; }
inline Warp& warp() { return block().warps[threadIdx.x / kWarp]; }

inline void require(bool holds, const char* failure) {
  if (!holds && machine.failure == nullptr) machine.failure = failure;
}

inline int lane() { return threadIdx.x % kWarp; }

// What the lanes of a warp give, in their order.
template <typename T>
std::array<T, kWarp> exchange(const T& value) {
  static_assert(sizeof(T) <= sizeof(Warp::slots[0]));
  std::memcpy(warp().slots[lane()], &value, sizeof(T));
  wait(warp().barrier);
  std::array<T, kWarp> values;
  for (int i = 0; i < kWarp; ++i) std::memcpy(&values[i], warp().slots[i], sizeof(T));
  wait(warp().barrier);
  return values;
}

inline void run_fiber() {
  machine.kernel();
  require(machine.running->copies.empty(), "a copy is never waited for");
  machine.running->done = machine.moved = true;
  swapcontext(&machine.running->context, &machine.scheduler);
}

// Runs one cluster to its end; `order` is 1 or -1.
inline void run_cluster(unsigned first_block, int cluster, int threads, int shared_bytes, int order) {
  machine.blocks.assign(cluster, Block{});
  for (Block& block : machine.blocks) {
    block.barrier.expected = threads;
    block.shared.assign(shared_bytes + kGuardBytes, static_cast<char>(0xff));
    block.warps.assign(threads / kWarp, Warp{});
    for (Warp& warp : block.warps) warp.barrier.expected = kWarp;
  }
  machine.failure = nullptr;
  machine.cluster = Barrier{.expected = cluster * threads};
  if (machine.fibers.size() < static_cast<std::size_t>(cluster) * threads) machine.fibers.resize(cluster * threads);
  const int count = cluster * threads;
  for (int i = 0; i < count; ++i) {
    Fiber& fiber = machine.fibers[i];
    if (!fiber.stack) fiber.stack = std::make_unique_for_overwrite<char[]>(kStackBytes);
    fiber.rank = i / threads;
    fiber.thread = {static_cast<unsigned>(i % threads), 0, 0};
    fiber.block = {first_block + fiber.rank, 0, 0};
    fiber.copies.clear();
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (int left = count; left > 0;) {
    bool any_moved = false;
    for (int first = 0; first < count; first += kWarp) {
      do {
        machine.moved = false;
        for (int turn = first; turn < first + kWarp; ++turn) {
          Fiber& fiber = machine.fibers[order > 0 ? turn : count - 1 - turn];
          if (fiber.done) continue;
          machine.running = &fiber;
          threadIdx = fiber.thread;
          blockIdx = fiber.block;
          swapcontext(&machine.scheduler, &fiber.context);
          if (fiber.done) --left;
        }
        any_moved = any_moved || machine.moved;
      } while (machine.moved);
    }
    if (machine.failure != nullptr) throw std::runtime_error(machine.failure);
    if (!any_moved) throw std::runtime_error("threads wait for a barrier that others never reach");
  }
  for (const Block& block : machine.blocks) {
    for (std::size_t i = shared_bytes; i < block.shared.size(); ++i) {
      if (block.shared[i] != static_cast<char>(0xff)) throw std::runtime_error("written beyond shared memory");
    }
  }
}

template <typename... Parameters, typename... Arguments>
void launch(int order, void (*kernel)(Parameters...), std::int64_t blocks, int threads, int shared_bytes, int cluster,
            Arguments... arguments) {
  if (threads % kWarp != 0 || blocks % cluster != 0) throw std::runtime_error("not whole warps, or clusters");
  blockDim = dim3(threads);
  machine.kernel = [=] { kernel(arguments...); };
  for (std::int64_t first = 0; first < blocks; first += cluster) {
    const std::int64_t block = order > 0 ? first : blocks - cluster - first;
    run_cluster(static_cast<unsigned>(block), cluster, threads, shared_bytes, order);
  }
}

}  // namespace emulator

inline void __syncthreads() { emulator::wait(emulator::block().barrier); }
inline void __syncwarp() { emulator::wait(emulator::warp().barrier); }

namespace catimage_accel {

inline char* shared_memory() { return emulator::block().shared.data(); }
inline void cluster_sync() { emulator::wait(emulator::machine.cluster); }

template <typename T>
const T* cluster_peer(T* shared, int rank) {
  const auto offset = reinterpret_cast<char*>(shared) - shared_memory();
  return reinterpret_cast<const T*>(emulator::machine.blocks[rank].shared.data() + offset);
}

template <typename T>
T shuffle_down(T value, int lanes) {
  const auto values = emulator::exchange(value);
  const int from = emulator::lane() + lanes;
  return from < emulator::kWarp ? values[from] : value;
}

inline float shuffle_xor(float value, int bits) { return emulator::exchange(value)[emulator::lane() ^ bits]; }

inline float fast_exp2(float x) { return std::exp2(x); }

}  // namespace catimage_accel
