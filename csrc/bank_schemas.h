// Schemas of the memory-bank operators, which every device registers in a namespace of its own.
// Text only: the files that register them include torch.
#pragma once

namespace mclfast {

inline constexpr const char* kBankSchemas[] = {
    "bank_mcl_forward(Tensor nodes, Tensor banks, Tensor pos_idx, Tensor neg_idx, "
    "int[] networks, float temperature, float kl_temperature, int families) -> "
    "(Tensor vcl, Tensor soft_vcl, Tensor icl, Tensor soft_icl, Tensor lse, Tensor kl_lse)",
    "bank_mcl_backward(Tensor g_vcl, Tensor g_soft_vcl, Tensor g_icl, Tensor g_soft_icl, "
    "Tensor nodes, Tensor banks, Tensor pos_idx, Tensor neg_idx, int[] networks, Tensor lse, "
    "Tensor kl_lse, float temperature, float kl_temperature, int families) -> "
    "Tensor grad_nodes",
    "bank_mcl_fused(Tensor g_vcl, Tensor g_soft_vcl, Tensor g_icl, Tensor g_soft_icl, "
    "Tensor nodes, Tensor banks, Tensor pos_idx, Tensor neg_idx, int[] networks, "
    "float temperature, float kl_temperature, int families) -> "
    "(Tensor vcl, Tensor soft_vcl, Tensor icl, Tensor soft_icl, Tensor lse, Tensor kl_lse, "
    "Tensor grad_nodes)",
    "bank_mcl_double_backward(Tensor v_nodes, Tensor g_vcl, Tensor g_soft_vcl, Tensor g_icl, "
    "Tensor g_soft_icl, Tensor nodes, Tensor banks, Tensor pos_idx, Tensor neg_idx, "
    "int[] networks, Tensor lse, Tensor kl_lse, float temperature, float kl_temperature, "
    "int families) -> "
    "(Tensor h_nodes, Tensor h_vcl, Tensor h_soft_vcl, Tensor h_icl, Tensor h_soft_icl)",
    "bank_nce_lse(Tensor nodes, Tensor banks, Tensor pos_idx, Tensor neg_idx, "
    "float temperature) -> Tensor lse",
    "bank_nce_fused(Tensor nodes, Tensor banks, Tensor pos_idx, Tensor neg_idx, "
    "Tensor log_normalizer, float temperature, float eps) -> (Tensor rows, Tensor grad_nodes)",
    "bank_nce_double_backward(Tensor v_nodes, Tensor nodes, Tensor banks, Tensor pos_idx, "
    "Tensor neg_idx, Tensor log_normalizer, float temperature, float eps) -> Tensor h_nodes",
    "bank_update_(Tensor(a!) banks, Tensor index, Tensor embeddings, float momentum) -> ()",
    "sample_contrast(Tensor index, Tensor order, Tensor position, Tensor labels, "
    "Tensor starts, int num_positives, int num_negatives, int seed, int step) -> "
    "(Tensor pos_idx, Tensor neg_idx)",
};

}  // namespace mclfast
