#define FREEMERGE_ISA avx2
#define FREEMERGE_VECTOR_BYTES 32
#include "cpu/kernels.inl"
