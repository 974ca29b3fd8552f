#define FREEMERGE_ISA avx512
#define FREEMERGE_VECTOR_BYTES 64
#include "cpu/kernels.inl"
