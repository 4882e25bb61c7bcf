// Interface between the torch-facing file (ops.cpp) and the kernels: plain structs, raw device
// pointers, one host function per operator. No header of torch, so nvcc alone compiles the kernels.
// The formulas are those of README.md in this folder.
#pragma once

#include <cstddef>
#include <cstdint>

#include <cuda_runtime_api.h>

namespace mclfast::cuda {

// Networks of the nodes travel by value with each launch.
constexpr int kMaxNodes = 128;

enum Type : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

// N nodes, M networks (one bank each), B samples, D features, P positives, K negatives.
struct Bank {
  const void* nodes;       // [N, B, D]
  const void* banks;       // [M, samples, D], device memory or mapped host memory
  const int64_t* pos_idx;  // [B, 1 + P], rows pos_stride apart
  const int64_t* neg_idx;  // [B, K], rows neg_stride apart; 0: one row for the whole batch
  int64_t pos_stride, neg_stride;
  int64_t samples;
  int node_count, network_count, batch, width, positives, negatives;
  int node_type, bank_type;  // enum Type
  float temperature, kl_temperature;
  unsigned families;  // bits of ../families.h
  unsigned char networks[kMaxNodes];  // [N]
};

struct Cotangents {
  const float* vcl;       // [N, B]
  const float* soft_vcl;  // [N, N, B]
  const float* icl;       // [M, N, B]
  const float* soft_icl;  // [N, N, B]
};

struct Rows {
  float* vcl;       // [N, B]
  float* soft_vcl;  // [N, N, B]
  float* icl;       // [M, N, B]
  float* soft_icl;  // [N, N, B]
};

// Bytes of workspace that any of the bank_mcl_* and bank_nce_* calls needs for this problem.
cudaError_t bank_workspace(const Bank& bank, size_t* bytes);

// lse, kl_lse [M, N, B]: zero where no family asked for needs them.
cudaError_t bank_mcl_forward(const Bank& bank, const Rows& rows, float* lse, float* kl_lse,
                             void* workspace, cudaStream_t stream);
// grad_nodes [N, B, D] in the type of the nodes, here and below.
cudaError_t bank_mcl_backward(const Bank& bank, const Cotangents& g, const float* lse,
                              const float* kl_lse, void* grad_nodes, void* workspace,
                              cudaStream_t stream);
// Forward and backward with one read of the banks from memory where the device can hold it.
cudaError_t bank_mcl_fused(const Bank& bank, const Cotangents& g, const Rows& rows, float* lse,
                           float* kl_lse, void* grad_nodes, void* workspace, cudaStream_t stream);
// tangents [N, B, D] in the type of the nodes; h: gradients of the four cotangents.
cudaError_t bank_mcl_double_backward(const Bank& bank, const void* tangents, const Cotangents& g,
                                     const float* lse, const float* kl_lse, void* h_nodes,
                                     const Rows& h, void* workspace, cudaStream_t stream);

// Noise-contrastive estimation: one node per network, networks[i] == i, P == 0.
cudaError_t bank_nce_lse(const Bank& bank, float* lse /* [M, M, B] */, void* workspace,
                         cudaStream_t stream);
cudaError_t bank_nce_fused(const Bank& bank, const float* log_normalizer /* [M, M] */, float eps,
                           float* rows /* [M, M, B] */, void* grad_nodes, void* workspace,
                           cudaStream_t stream);
cudaError_t bank_nce_double_backward(const Bank& bank, const void* tangents,
                                     const float* log_normalizer, float eps, void* h_nodes,
                                     void* workspace, cudaStream_t stream);

struct Update {
  void* banks;             // [M, samples, D]
  const int64_t* index;    // [B]
  const void* embeddings;  // [M, B, D]
  int64_t samples;
  int network_count, batch, width;
  int bank_type, embedding_type;
  float momentum;
};
cudaError_t bank_update(const Update& update, cudaStream_t stream);

struct Sample {
  const int64_t* index;                            // [B]
  const int32_t *order, *position, *labels, *starts;  // [n], [n], [n], [C + 1]
  int64_t samples;
  int batch, positives, negatives;
  uint64_t seed;
  uint32_t step;
  int64_t* pos_idx;  // [B, 1 + P]
  int64_t* neg_idx;  // [B, K]
};
cudaError_t sample_contrast(const Sample& sample, cudaStream_t stream);

}  // namespace mclfast::cuda
