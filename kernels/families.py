"""The row families as bits: which rows a kernel or an operator is asked for.

The C++ and CUDA code has the same bits in ``csrc/families.h``.
"""

VCL, SOFT_VCL, ICL, SOFT_ICL = 1, 2, 4, 8
#: In the order of the rows everywhere.
EACH = (VCL, SOFT_VCL, ICL, SOFT_ICL)
ALL = VCL | SOFT_VCL | ICL | SOFT_ICL
