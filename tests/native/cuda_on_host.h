/* Lets a C++ compiler take folds.cu for the host: each kernel is a function, which `launch` calls for every thread. */
#define CUDA_ON_HOST 1
#include <cstddef>
#include <cstdint>
#include <immintrin.h>

#define __device__
#define __global__

struct uint4 {
    uint32_t x, y, z, w;
};

struct Place {
    unsigned x;
};

static Place gridDim, blockDim, blockIdx, threadIdx;

static inline float float_of_half(uint16_t half) { return _cvtsh_ss(half); }
static inline uint16_t half_of_float(float number) { return _cvtss_sh(number, _MM_FROUND_TO_NEAREST_INT); }
