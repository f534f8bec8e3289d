// The stream that PyTorch works on, and kernel launches on it.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

namespace catimage_accel {

inline void check(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "CUDA error: ", cudaGetErrorString(error));
}

// The getter is looked up, not linked: it lives in a library that PyTorch for the CPU lacks, and beside that too this
// one is to load.
inline cudaStream_t current_stream(int device) {
  using Getter = AOTITorchError (*)(int32_t, void**);
  static const Getter get = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    STD_TORCH_CHECK(torch_cuda != nullptr, "this PyTorch has no CUDA");
    return reinterpret_cast<Getter>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"));
  }();
  STD_TORCH_CHECK(get != nullptr, "this PyTorch tells no CUDA stream");
  void* stream = nullptr;
  STD_TORCH_CHECK(get(device, &stream) == 0, "PyTorch found no CUDA stream for device ", device);
  return static_cast<cudaStream_t>(stream);
}

// Blocks of a cluster that every device with clusters can run together; 1 where the device has none.
inline int max_cluster(int device) {
  constexpr int kPortable = 8;
  int clusters = 0;
  check(cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device));
  return clusters != 0 ? kPortable : 1;
}

constexpr int kSharedBytesOfAnyKernel = 48 * 1024;  // more must be asked for

template <typename... Parameters, typename... Arguments>
void launch(cudaStream_t stream, void (*kernel)(Parameters...), int64_t blocks, int threads, int shared_bytes,
            int cluster, Arguments... arguments) {
  STD_TORCH_CHECK(blocks <= INT32_MAX, "x is too large: it would take ", blocks, " blocks");
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim.x = cluster;
  attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = cluster > 1 ? 1 : 0;
  if (shared_bytes > kSharedBytesOfAnyKernel) {
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes));
  }
  check(cudaLaunchKernelEx(&config, kernel, arguments...));
}

}  // namespace catimage_accel
