// Interface between the torch-facing files (ops/*.cpp) and the numeric kernels.
//
// The kernels are compiled once per instruction set, so they see raw pointers only: an inline
// function of a torch or standard container header compiled for AVX-512 could be the copy that the
// linker keeps for the whole library, which then crashes on a processor without AVX-512.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mclfast::cpu {

enum class Mode { kForward, kBackward, kFused, kDoubleBackward };

// The samples of the batch grouped by class, ascending inside a class.
struct Classes {
  int64_t count;
  const int64_t* offsets;   // [count + 1], into members
  const int64_t* members;   // [B]
  const int64_t* positives; // [B], other samples of the same class
};

// Arguments of the mcl_rows family. N nodes, B samples, D features, R = row_count anchors.
template <class T> struct MclRows {
  int64_t nodes_count, batch, width, row_start, row_count;
  double temperature, kl_temperature;
  unsigned families; // bits of families.h
  const int64_t* networks; // [N]
  Classes classes;

  const T* nodes;    // [N, B, D]
  const T* tangents; // [N, B, D], v_nodes of the double backward, else nullptr

  const T* g_vcl;      // [N, R], nullptr in the forward, and so are the next three
  const T* g_soft_vcl; // [N, N, R]
  const T* g_icl;      // [N, N, R]
  const T* g_soft_icl; // [N, N, R]

  // Rows (forward, fused) or the gradients of the cotangents (double backward); zeroed by the
  // caller; nullptr in the backward.
  T* vcl;      // [N, R]
  T* soft_vcl; // [N, N, R]
  T* icl;      // [N, N, R]
  T* soft_icl; // [N, N, R]

  T* lse;    // [N, N, R], written by the forward (zeroed by the caller), read by the others
  T* kl_lse; // [N, N, R], the same

  T* grad_nodes; // [N, B, D], written whole; nullptr in the forward
};

// Arguments of the info_nce family.
template <class T> struct InfoNce {
  int64_t batch, width;
  double temperature;
  const T* a;         // [B, D]
  const T* b;         // [B, D]
  const T* tangent_a; // [B, D], double backward only, and tangent_b
  const T* tangent_b; // [B, D]
  const T* g_row;     // [B], nullptr in the forward, and g_col, g_diag
  const T* g_col;     // [B]
  const T* g_diag;    // [B]
  T* row_lse;         // [B], written by the forward, read by the others
  T* col_lse;         // [B]
  T* row;             // [B], double backward: gradients of g_row, g_col, g_diag;
  T* col;             // [B]
  T* diag;            // [B], also the diagonal written by the forward
  T* grad_a;          // [B, D], written whole; nullptr in the forward, and grad_b
  T* grad_b;          // [B, D]
};

// Type of the values of a memory bank, which is never copied or converted as a whole.
enum class Element { kFloat, kDouble, kHalf, kBFloat16 };

// Memory banks and the keys of every sample: columns 0 .. positives_count - 1 name the anchor's
// own entry and its positives, the columns after them the negatives.
struct BankKeys {
  const void* banks; // [M, n, D]
  Element element;
  int64_t banks_count, samples, width; // M, n, D
  const int64_t* positives;            // [B, 1 + P], rows positives_stride apart
  int64_t positives_count, positives_stride;
  const int64_t* negatives; // [B, K], rows negatives_stride apart; 0: one set for the batch
  int64_t negatives_count, negatives_stride;
};

// Arguments of the bank_mcl family. N nodes, B samples.
template <class T> struct BankRows {
  BankKeys keys;
  int64_t nodes_count, batch;
  double temperature, kl_temperature;
  unsigned families;
  const int64_t* networks; // [N], ascending
  const int64_t* offsets;  // [M + 1], the nodes of network m are offsets[m] .. offsets[m + 1] - 1

  const T* nodes;    // [N, B, D]
  const T* tangents; // [N, B, D], v_nodes of the double backward, else nullptr

  const T* g_vcl;      // [N, B], nullptr in the forward, and so are the next three
  const T* g_soft_vcl; // [N, N, B]
  const T* g_icl;      // [M, N, B]
  const T* g_soft_icl; // [N, N, B]

  // As in MclRows.
  T* vcl;      // [N, B]
  T* soft_vcl; // [N, N, B]
  T* icl;      // [M, N, B]
  T* soft_icl; // [N, N, B]

  T* lse;    // [M, N, B], written by the forward (zeroed by the caller), read by the others
  T* kl_lse; // [M, N, B], the same

  T* grad_nodes; // [N, B, D], written whole; nullptr in the forward
};

// Arguments of the bank_nce family: one node for each of the M banks.
// Mode::kForward writes lse; kFused rows and grad_nodes; kDoubleBackward grad_nodes.
template <class T> struct BankNce {
  BankKeys keys;
  int64_t batch;
  double temperature;
  double log_noise;        // log(K / n + eps)
  double log_noise_excess; // log((K / n + eps) / (K / n))
  const T* nodes;          // [M, B, D]
  const T* tangents;       // [M, B, D], double backward only
  const T* log_normalizer; // [M, M], nullptr in the forward
  T* lse;                  // [M, M, B], zeroed by the caller
  T* rows;                 // [M, M, B], zeroed by the caller
  T* grad_nodes;           // [M, B, D], written whole
};

// Arguments of bank_update_: places of the bank and the samples that go there, no place twice.
template <class T> struct BankUpdate {
  void* banks; // [M, n, D]
  Element element;
  int64_t banks_count, samples, width;
  int64_t batch, count;
  const int64_t* places;  // [count], in 0 .. n - 1
  const int64_t* sources; // [count], in 0 .. batch - 1
  const T* embeddings;    // [M, B, D]
  double momentum;
};

// Arguments of sample_contrast; the tables group the samples of the data set by class.
struct SampleContrast {
  int64_t batch, samples;
  const int64_t* index;    // [B]
  const int32_t* order;    // [n], samples sorted by class
  const int32_t* position; // [n], place of each sample in order
  const int32_t* labels;   // [n]
  const int32_t* starts;   // [C + 1], first place of each class
  int64_t positives_count, negatives_count;
  uint64_t seed;
  uint32_t step;
  int64_t* positives; // [B, 1 + P]
  int64_t* negatives; // [B, K]
};

// Batch normalisation with a tangent; x, x_t, y and y_t are [outer, channels, inner], the statistics
// [channels]. weight_t, bias_t and also weight and bias may be nullptr: zero, or one for weight.
template <class T> struct DualNorm {
  int64_t outer, channels, inner;
  double eps;
  const T *x, *x_t;
  const T *weight, *weight_t, *bias, *bias_t;
  T *y, *y_t;
  T *mean, *var, *rstd, *mean_t;
  T* q; // mean of (x - mean) rstd x_t
};

template <class T> struct DualNormGrad {
  int64_t outer, channels, inner;
  const T *g, *g_t; // of y, y_t
  const T *x, *x_t, *weight, *weight_t, *mean, *rstd, *mean_t, *q;
  T *g_x, *g_x_t, *g_weight, *g_bias;
};

struct Kernels {
  const char* name;
  void (*mcl_rows_float)(const MclRows<float>&, Mode);
  void (*mcl_rows_double)(const MclRows<double>&, Mode);
  void (*info_nce_float)(const InfoNce<float>&, Mode);
  void (*info_nce_double)(const InfoNce<double>&, Mode);
  void (*bank_rows_float)(const BankRows<float>&, Mode);
  void (*bank_rows_double)(const BankRows<double>&, Mode);
  void (*bank_nce_float)(const BankNce<float>&, Mode);
  void (*bank_nce_double)(const BankNce<double>&, Mode);
  void (*bank_update_float)(const BankUpdate<float>&);
  void (*bank_update_double)(const BankUpdate<double>&);
  void (*sample_contrast)(const SampleContrast&);
  void (*dual_batch_norm_float)(const DualNorm<float>&);
  void (*dual_batch_norm_double)(const DualNorm<double>&);
  void (*dual_batch_norm_backward_float)(const DualNormGrad<float>&);
  void (*dual_batch_norm_backward_double)(const DualNormGrad<double>&);
};

// One per instruction set; nullptr where the compiler or the architecture has none.
const Kernels* kernels_default();
const Kernels* kernels_avx2();
const Kernels* kernels_avx512();

// Services of torch for the kernels, defined in runtime.cpp.
void* allocate(size_t bytes);
void release(void* data) noexcept;
int64_t worker_count();
void run_workers(int64_t count, void (*task)(void* context, int64_t worker), void* context);

} // namespace mclfast::cpu
