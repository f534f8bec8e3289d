// attention's CUDA kernel on the CPU, as a C function.
#include "tensor_core_emulator.h"  // before the kernel, which it takes the place of CUDA for

#include "attention_kernels.cuh"

namespace {

using namespace catimage_accel;

template <typename T>
void run(const void* q, const void* k, const void* v, void* out, const Strides (&strides)[3], std::int64_t batch,
         int heads, int queries, int keys, int head_dim, float scale, int order) {
  const AttentionTensors<T> tensors = {
      .q = static_cast<const T*>(q), .k = static_cast<const T*>(k), .v = static_cast<const T*>(v),
      .out = static_cast<T*>(out), .q_strides = strides[0], .k_strides = strides[1], .v_strides = strides[2],
      .heads = heads, .queries = queries, .keys = keys, .scale = scale * kLog2E,
  };
  const auto launch = [order](auto... arguments) { emulator::launch(order, arguments...); };
  if (!run_attention(tensors, batch, head_dim, launch)) throw std::runtime_error("no kernel for this head_dim");
}

}  // namespace

// dtype: 0 float16, 1 bfloat16; strides: of q, k and v, each of (batch, sequence, heads). Returns why it failed, if so.
extern "C" const char* emulate_attention(int dtype, const void* q, const void* k, const void* v, void* out,
                                         const std::int64_t* strides, std::int64_t batch, int heads, int queries,
                                         int keys, int head_dim, float scale, int order) {
  static std::string failure;
  Strides of[3];
  for (int i = 0; i < 3; ++i) of[i] = {strides[3 * i], strides[3 * i + 1], strides[3 * i + 2]};
  try {
    const auto call = dtype == 0 ? run<__half> : run<__nv_bfloat16>;
    call(q, k, v, out, of, batch, heads, queries, keys, head_dim, scale, order);
  } catch (const std::exception& error) {
    failure = error.what();
    return failure.c_str();
  }
  return nullptr;
}
