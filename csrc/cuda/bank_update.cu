// Momentum update of bank entries: one warp per sample and network.
#include "device.cuh"
#include "launch.cuh"

namespace mclfast::cuda {
namespace {

__global__ void __launch_bounds__(kThreads) update_kernel(const __grid_constant__ Update u) {
  const int64_t unit = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int lane = threadIdx.x & 31;
  if (unit >= static_cast<int64_t>(u.network_count) * u.batch) return;
  const int r = static_cast<int>(unit % u.batch), m = static_cast<int>(unit / u.batch);
  const int64_t key = u.index[r];

  // The last of several samples with one index writes; the others leave.
  bool later = false;
  for (int i = r + 1 + lane; i < u.batch; i += 32) later |= u.index[i] == key;
  if (__any_sync(kAllLanes, later)) return;

  const int64_t to = (m * u.samples + key) * u.width;
  const int64_t from = (static_cast<int64_t>(m) * u.batch + r) * u.width;
  const auto mixed = [&](int d) {
    return u.momentum * load_element(u.banks, to + d, u.bank_type) +
           (1.0f - u.momentum) * load_element(u.embeddings, from + d, u.embedding_type);
  };
  float squares = 0;
  for (int d = lane; d < u.width; d += 32) squares = fmaf(mixed(d), mixed(d), squares);
  const float length = sqrtf(warp_sum(squares));
  const float norm = length < 1e-6f ? 1e-6f : length;  // NaN stays, fmaxf would drop it
  for (int d = lane; d < u.width; d += 32)
    store_element(u.banks, to + d, u.bank_type, mixed(d) / norm);
}

}  // namespace

cudaError_t bank_update(const Update& u, cudaStream_t stream) {
  const int64_t units = static_cast<int64_t>(u.network_count) * u.batch;
  return launch(update_kernel, (units + kWarps - 1) / kWarps, kThreads, 0, stream, u);
}

}  // namespace mclfast::cuda
