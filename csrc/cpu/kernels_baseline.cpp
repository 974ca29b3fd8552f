#define FREEMERGE_ISA baseline
#define FREEMERGE_VECTOR_BYTES 16
#include "cpu/kernels.inl"
