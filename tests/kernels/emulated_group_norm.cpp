// group_norm's CUDA kernels on the CPU, as a C function.
#include "cuda_emulator.h"  // before the kernels, which it takes the place of CUDA for

#include "group_norm_kernels.cuh"

namespace {

using namespace catimage_accel;

template <typename T>
void run(const void* x, const void* shift, const void* weight, const void* bias, void* y, std::int64_t batch, float eps,
         bool silu, bool channels_last, const Plan& plan, int order) {
  const Tensors<T> tensors = {static_cast<const T*>(x), static_cast<const T*>(shift), static_cast<const T*>(weight),
                              static_cast<const T*>(bias), static_cast<T*>(y)};
  std::vector<Moments> scratch(scratch_bytes(plan, batch) / sizeof(Moments) + 1, Moments{NAN, NAN, NAN, NAN});
  const auto launch = [order](auto... arguments) { emulator::launch(order, arguments...); };
  if (channels_last) {
    run_group_norm<T, ChannelsLastSlice<T>>(tensors, plan, batch, eps, silu, scratch.data(), launch);
  } else {
    run_group_norm<T, ContiguousSlice<T>>(tensors, plan, batch, eps, silu, scratch.data(), launch);
  }
}

}  // namespace

// dtype: 0 float32, 1 float16, 2 bfloat16. Returns the plan's (one_pass, aligned, slices, pieces) in `chosen`, and why
// it failed, if so.
extern "C" const char* emulate_group_norm(int dtype, const void* x, const void* shift, const void* weight,
                                          const void* bias, void* y, std::int64_t batch, int channels,
                                          std::int64_t pixels, int groups, bool channels_last, float eps, bool silu,
                                          int max_cluster, int order, int* chosen) {
  static std::string failure;
  const auto at = reinterpret_cast<std::uintptr_t>(x) | reinterpret_cast<std::uintptr_t>(y);
  const Plan plan = make_plan({.pixels = pixels, .channels = channels, .groups = groups, .channels_last = channels_last,
                               .itemsize = dtype == 0 ? 4 : 2, .aligned = at % 16 == 0, .max_cluster = max_cluster});
  const int summary[] = {plan.one_pass, plan.aligned, plan.slices, plan.pieces};
  std::copy(std::begin(summary), std::end(summary), chosen);
  try {
    const auto call = dtype == 0 ? run<float> : dtype == 1 ? run<__half> : run<__nv_bfloat16>;
    call(x, shift, weight, bias, y, batch, eps, silu, channels_last, plan, order);
  } catch (const std::exception& error) {
    failure = error.what();
    return failure.c_str();
  }
  return nullptr;
}
