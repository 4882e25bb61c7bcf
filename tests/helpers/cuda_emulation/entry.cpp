// The host launchers with C names, for ctypes. Every call gets a workspace of exactly the size asked
// for, filled with NaN and followed by a guard.
#include <vector>

#include "launch.h"
#include "philox.h"

using namespace mclfast::cuda;

namespace {

template <class Call>
int with_workspace(const Bank& bank, Call call) {
  size_t bytes = 0;
  if (const cudaError_t error = bank_workspace(bank, &bytes)) return error;
  constexpr size_t kGuard = 64;
  std::vector<unsigned char> memory(bytes + kGuard + 16, 0xff);
  unsigned char* aligned = memory.data() + 16 - reinterpret_cast<uintptr_t>(memory.data()) % 16;
  const int error = call(aligned);
  for (size_t i = 0; i + 16 < kGuard; ++i)
    if (aligned[bytes + i] != 0xff) return cudaErrorLaunchFailure;
  return error;
}

}  // namespace

extern "C" {

size_t emulated_sizeof(int which) {
  return which == 0 ? sizeof(Bank) : which == 1 ? sizeof(Update) : sizeof(Sample);
}
size_t emulated_workspace(const Bank* b) {
  size_t bytes = 0;
  bank_workspace(*b, &bytes);
  return bytes;
}
int emulated_forward(const Bank* b, const Rows* rows, float* lse, float* kl_lse) {
  return with_workspace(
      *b, [&](void* w) { return bank_mcl_forward(*b, *rows, lse, kl_lse, w, nullptr); });
}
int emulated_backward(const Bank* b, const Cotangents* g, const float* lse, const float* kl_lse,
                      void* grad) {
  return with_workspace(
      *b, [&](void* w) { return bank_mcl_backward(*b, *g, lse, kl_lse, grad, w, nullptr); });
}
int emulated_fused(const Bank* b, const Cotangents* g, const Rows* rows, float* lse, float* kl_lse,
                   void* grad) {
  return with_workspace(
      *b, [&](void* w) { return bank_mcl_fused(*b, *g, *rows, lse, kl_lse, grad, w, nullptr); });
}
int emulated_double(const Bank* b, const void* tangents, const Cotangents* g, const float* lse,
                    const float* kl_lse, void* h_nodes, const Rows* h) {
  return with_workspace(*b, [&](void* w) {
    return bank_mcl_double_backward(*b, tangents, *g, lse, kl_lse, h_nodes, *h, w, nullptr);
  });
}
int emulated_nce_lse(const Bank* b, float* lse) {
  return with_workspace(*b, [&](void* w) { return bank_nce_lse(*b, lse, w, nullptr); });
}
int emulated_nce_fused(const Bank* b, const float* normalizer, float eps, float* rows, void* grad) {
  return with_workspace(
      *b, [&](void* w) { return bank_nce_fused(*b, normalizer, eps, rows, grad, w, nullptr); });
}
int emulated_nce_double(const Bank* b, const void* tangents, const float* normalizer, float eps,
                        void* h_nodes) {
  return with_workspace(*b, [&](void* w) {
    return bank_nce_double_backward(*b, tangents, normalizer, eps, h_nodes, w, nullptr);
  });
}
int emulated_update(const Update* update) { return bank_update(*update, nullptr); }
void emulated_philox(uint32_t* words, uint32_t key0, uint32_t key1) {
  mclfast::PhiloxBlock block{{words[0], words[1], words[2], words[3]}};
  block = mclfast::philox(block, key0, key1);
  for (int i = 0; i < 4; ++i) words[i] = block.w[i];
}
int emulated_sample(const Sample* sample) { return sample_contrast(*sample, nullptr); }

}  // extern "C"
