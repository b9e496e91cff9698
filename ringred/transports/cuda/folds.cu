/* Folds on a device: operands combined from left to right, element by element, as runtime/folds.py describes, and written
 * to all targets in the same pass: to this rank's memory, and into that of its peers.
 *
 * kernels.py appends the kernels that are wanted. Compiled by NVRTC at first use, without a header; on a host by a C++
 * compiler with tests/native/cuda_on_host.h before it.
 * 16-bit floats are combined in 32 bits and rounded once, to the nearest even. A minimum or maximum keeps a NaN. */

#ifndef CUDA_ON_HOST
typedef unsigned char uint8_t;
typedef signed char int8_t;
typedef unsigned short uint16_t;
typedef short int16_t;
typedef unsigned int uint32_t;
typedef int int32_t;
typedef unsigned long long uint64_t;
typedef long long int64_t;
#endif

enum { MOST = 64 }; /* operands, and targets */

struct Fold {
    uint64_t n; /* elements */
    int32_t operands, targets;
    double divisor; /* 0: none */
    const void *in[MOST];
    void *out[MOST];
};

/* ---------------------------------------------------------------- numbers: as they are stored, and as they are added */

template <class T> struct Plain {
    typedef T Stored;
    typedef T Number;
    static __device__ T number(T stored) { return stored; }
    static __device__ T stored(T number) { return number; }
    static __device__ T divided(T number, double divisor) { return number / (T)divisor; }
};

/* Integers are added as unsigned ones, whose overflow wraps, and are not divided. */
template <class T> struct Integer : Plain<T> {
    static __device__ T divided(T number, double) { return number; }
};

struct Half : Plain<float> {
    typedef uint16_t Stored;
    static __device__ float number(uint16_t stored) {
#ifdef CUDA_ON_HOST
        return float_of_half(stored);
#else
        float number;
        asm("cvt.f32.f16 %0, %1;" : "=f"(number) : "h"(stored));
        return number;
#endif
    }
    static __device__ uint16_t stored(float number) {
#ifdef CUDA_ON_HOST
        return half_of_float(number);
#else
        uint16_t stored;
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(stored) : "f"(number));
        return stored;
#endif
    }
};

union Bits {
    float number;
    uint32_t bits;
};

struct BrainHalf : Plain<float> {
    typedef uint16_t Stored;
    static __device__ float number(uint16_t stored) {
        Bits bits;
        bits.bits = (uint32_t)stored << 16;
        return bits.number;
    }
    static __device__ uint16_t stored(float number) {
        Bits bits;
        bits.number = number;
        if ((bits.bits & 0x7fffffff) > 0x7f800000) return 0x7fc0;
        return (uint16_t)((bits.bits + 0x7fff + (bits.bits >> 16 & 1)) >> 16);
    }
};

template <class T> struct Pair {
    T real, imaginary;
};

template <class T> struct Complex : Plain<Pair<T>> {
    static __device__ Pair<T> divided(Pair<T> number, double divisor) {
        Pair<T> result = {number.real / (T)divisor, number.imaginary / (T)divisor};
        return result;
    }
};

/* ---------------------------------------------------------------- operations */

struct Sum {
    template <class T> static __device__ T of(T a, T b) { return a + b; }
    template <class T> static __device__ Pair<T> of(Pair<T> a, Pair<T> b) {
        Pair<T> result = {a.real + b.real, a.imaginary + b.imaginary};
        return result;
    }
};

struct Product {
    template <class T> static __device__ T of(T a, T b) { return a * b; }
    static __device__ uint8_t of(uint8_t a, uint8_t b) { return (uint8_t)(1u * a * b); }
    static __device__ uint16_t of(uint16_t a, uint16_t b) { return (uint16_t)(1u * a * b); }
    template <class T> static __device__ Pair<T> of(Pair<T> a, Pair<T> b) {
        Pair<T> result = {a.real * b.real - a.imaginary * b.imaginary, a.real * b.imaginary + a.imaginary * b.real};
        return result;
    }
};

struct Least {
    template <class T> static __device__ T of(T a, T b) { return a != a || a < b ? a : b; }
};

struct Greatest {
    template <class T> static __device__ T of(T a, T b) { return a != a || a > b ? a : b; }
};

struct And {
    template <class T> static __device__ T of(T a, T b) { return a & b; }
};

struct Or {
    template <class T> static __device__ T of(T a, T b) { return a | b; }
};

struct Xor {
    template <class T> static __device__ T of(T a, T b) { return a ^ b; }
};

/* ---------------------------------------------------------------- the pass over memory */

enum { AT_ONCE = 2 }; /* vectors that a thread has in flight of each operand */

template <class Stored> union Vector {
    uint4 raw;
    Stored each[16 / sizeof(Stored)];
    __device__ Vector() {}
};

template <class Kind, class Op> __device__ typename Kind::Stored folded(const Fold &fold, uint64_t at) {
    typedef typename Kind::Stored Stored;
    typename Kind::Number sum = Kind::number(((const Stored *)fold.in[0])[at]);
    for (int k = 1; k < fold.operands; k++) sum = Op::of(sum, Kind::number(((const Stored *)fold.in[k])[at]));
    if (fold.divisor != 0) sum = Kind::divided(sum, fold.divisor);
    return Kind::stored(sum);
}

template <class Kind, class Op> __device__ void pass(const Fold &fold) {
    typedef typename Kind::Stored Stored;
    const uint64_t stride = (uint64_t)gridDim.x * blockDim.x, own = (uint64_t)blockIdx.x * blockDim.x + threadIdx.x;
    const int each = 16 / sizeof(Stored);
    uint64_t together = 0; /* all addresses */
    for (int k = 0; k < fold.operands; k++) together |= (uint64_t)fold.in[k];
    for (int k = 0; k < fold.targets; k++) together |= (uint64_t)fold.out[k];
    const uint64_t vectors = together % 16 ? 0 : fold.n / each;
    for (uint64_t first = own; first < vectors; first += AT_ONCE * stride) {
        typename Kind::Number sum[AT_ONCE][each];
        for (int k = 0; k < fold.operands; k++) {
            Vector<Stored> next[AT_ONCE];
#pragma unroll
            for (int u = 0; u < AT_ONCE; u++)
                if (first + u * stride < vectors) next[u].raw = ((const uint4 *)fold.in[k])[first + u * stride];
#pragma unroll
            for (int u = 0; u < AT_ONCE; u++)
#pragma unroll
                for (int i = 0; i < each; i++) {
                    typename Kind::Number number = Kind::number(next[u].each[i]);
                    sum[u][i] = k == 0 ? number : Op::of(sum[u][i], number);
                }
        }
#pragma unroll
        for (int u = 0; u < AT_ONCE; u++) {
            if (first + u * stride >= vectors) continue;
            Vector<Stored> result;
#pragma unroll
            for (int i = 0; i < each; i++)
                result.each[i] = Kind::stored(fold.divisor != 0 ? Kind::divided(sum[u][i], fold.divisor) : sum[u][i]);
            for (int k = 0; k < fold.targets; k++) ((uint4 *)fold.out[k])[first + u * stride] = result.raw;
        }
    }
    for (uint64_t at = vectors * each + own; at < fold.n; at += stride) {
        Stored result = folded<Kind, Op>(fold, at);
        for (int k = 0; k < fold.targets; k++) ((Stored *)fold.out[k])[at] = result;
    }
}

#define KERNEL(OP, CLASS, NAME, ...) \
    extern "C" __global__ void OP##_##NAME(Fold fold) { pass<__VA_ARGS__, CLASS>(fold); }
