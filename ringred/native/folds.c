/* Folds: operands of one dtype combined from left to right, element by element, as torch's kernels do.
 *
 * 16-bit floats are added and multiplied in 32 bits and rounded once, to the nearest even. A minimum or maximum keeps a
 * NaN. All is written for a compiler that vectorises. On x86-64 it is compiled for three levels, of which the highest that
 * the processor has is used: 0, any; 1, AVX2 with F16C; 2, AVX-512 with BF16. */
#include <string.h>

#include "layout.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define HAS_LEVELS 1
#include <cpuid.h>
#endif

/* The result may be an operand, element by element: no later one depends on it. */
#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define INDEPENDENT _Pragma("GCC ivdep")
#endif

enum { BLOCK = 512 }; /* elements that are accumulated at a time, in the first-level cache */

static inline float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return bits;
}

static inline float widened_bf16(uint16_t half) { return float_of_bits((uint32_t)half << 16); }

static inline uint16_t rounded_bf16(float value) {
    uint32_t bits = bits_of_float(value);
    uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (uint16_t)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

#if defined(__aarch64__)
static inline float widened_f16(uint16_t half) {
    __fp16 value;
    memcpy(&value, &half, 2);
    return (float)value;
}

static inline uint16_t rounded_f16(float value) {
    __fp16 rounded = (__fp16)value;
    uint16_t half;
    memcpy(&half, &rounded, 2);
    return half;
}
#else
/* IEEE 754 binary16 without instructions for it. */
static inline float widened_f16(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, rest = half & 0x7fff;
    if (rest >= 0x7c00) /* infinite, or NaN, which becomes a quiet one */
        return float_of_bits(sign | 0x7f800000 | (rest & 0x3ff) << 13 | (rest > 0x7c00 ? 0x400000 : 0));
    if (rest >= 0x400) return float_of_bits(sign | (rest + 0x1c000) << 13);
    return float_of_bits(sign | bits_of_float((float)rest * 0x1p-24f));
}

static inline uint16_t rounded_f16(float value) {
    uint32_t bits = bits_of_float(value), sign = bits >> 16 & 0x8000, rest = bits & 0x7fffffff;
    if (rest > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (rest >> 13 & 0x3ff));
    if (rest >= 0x477ff000) return (uint16_t)(sign | 0x7c00); /* 65520 and more round to infinity */
    if (rest < 0x38800000) /* below the smallest normal number: let an addition round */
        return (uint16_t)(sign | (bits_of_float(float_of_bits(rest) + 0.5f) - 0x3f000000));
    return (uint16_t)(sign | (rest - 0x38000000 + 0xfff + (rest >> 13 & 1)) >> 13);
}
#endif

/* Expressions of each operation. */
#define ADD(a, b) ((a) + (b))
#define MULTIPLY(a, b) ((a) * (b))
#define WRAPPING_MULTIPLY(a, b) (1u * (a) * (b)) /* of uint16_t, which C would multiply as int */
#define LESS(a, b) ((a) < (b) ? (a) : (b))
#define GREATER(a, b) ((a) > (b) ? (a) : (b))
#define LESS_OR_NAN(a, b) ((a) != (a) ? (a) : (a) < (b) ? (a) : (b))
#define GREATER_OR_NAN(a, b) ((a) != (a) ? (a) : (a) > (b) ? (a) : (b))
#define AND(a, b) ((a) & (b))
#define OR(a, b) ((a) | (b))
#define XOR(a, b) ((a) ^ (b))

/* A fold of T in T. Overflow of integers wraps: T is then unsigned, or narrower than int. */
#define NARROW(NAME, TARGET, T, OP, DIVIDES)                                                                    \
    TARGET static void NAME(void *out, const void *const *operands, int64_t count, int64_t n, double divisor) { \
        T *to = out;                                                                                            \
        const T *first = operands[0], *second = operands[1];                                                    \
        if (count == 2) {                                                                                       \
            INDEPENDENT for (int64_t i = 0; i < n; i++) to[i] = (T)OP(first[i], second[i]);            \
        } else {                                                                                                \
            T sum[BLOCK];                                                                                       \
            for (int64_t start = 0; start < n; start += BLOCK) {                                                \
                int64_t m = n - start < BLOCK ? n - start : BLOCK;                                              \
                for (int64_t i = 0; i < m; i++) sum[i] = (T)OP(first[start + i], second[start + i]);            \
                for (int64_t k = 2; k < count; k++) {                                                           \
                    const T *next = (const T *)operands[k] + start;                                             \
                    for (int64_t i = 0; i < m; i++) sum[i] = (T)OP(sum[i], next[i]);                            \
                }                                                                                               \
                memcpy(to + start, sum, (size_t)m * sizeof(T));                                                 \
            }                                                                                                   \
        }                                                                                                       \
        if (DIVIDES && divisor != 0)                                                                            \
            for (int64_t i = 0; i < n; i++) to[i] = (T)(to[i] / (T)divisor);                                    \
    }

/* A fold of 16-bit floats, in 32 bits. */
#define WIDENED(NAME, KIND, OP)                                                                          \
    static void NAME(void *out, const void *const *operands, int64_t count, int64_t n, double divisor) { \
        float sum[BLOCK];                                                                                \
        for (int64_t start = 0; start < n; start += BLOCK) {                                             \
            int64_t m = n - start < BLOCK ? n - start : BLOCK;                                           \
            for (int64_t k = 0; k < count; k++) {                                                        \
                const uint16_t *next = (const uint16_t *)operands[k] + start;                            \
                if (k == 0)                                                                              \
                    for (int64_t i = 0; i < m; i++) sum[i] = widened_##KIND(next[i]);                    \
                else                                                                                     \
                    for (int64_t i = 0; i < m; i++) sum[i] = OP(sum[i], widened_##KIND(next[i]));        \
            }                                                                                            \
            if (divisor != 0)                                                                            \
                for (int64_t i = 0; i < m; i++) sum[i] = sum[i] / (float)divisor;                        \
            for (int64_t i = 0; i < m; i++) ((uint16_t *)out)[start + i] = rounded_##KIND(sum[i]);       \
        }                                                                                                \
    }

#define INTEGERS(ISA, TARGET, KIND, T, U)                    \
    NARROW(sum_##KIND##ISA, TARGET, U, ADD, 0)               \
    NARROW(prod_##KIND##ISA, TARGET, U, WRAPPING_MULTIPLY, 0) \
    NARROW(min_##KIND##ISA, TARGET, T, LESS, 0)              \
    NARROW(max_##KIND##ISA, TARGET, T, GREATER, 0)

#define BITS(ISA, TARGET, BYTES, U)              \
    NARROW(and_##BYTES##ISA, TARGET, U, AND, 0)  \
    NARROW(or_##BYTES##ISA, TARGET, U, OR, 0)    \
    NARROW(xor_##BYTES##ISA, TARGET, U, XOR, 0)

#define FLOATS(ISA, TARGET, KIND, T)                       \
    NARROW(sum_##KIND##ISA, TARGET, T, ADD, 1)             \
    NARROW(prod_##KIND##ISA, TARGET, T, MULTIPLY, 1)       \
    NARROW(min_##KIND##ISA, TARGET, T, LESS_OR_NAN, 0)     \
    NARROW(max_##KIND##ISA, TARGET, T, GREATER_OR_NAN, 0)

#define ALL(ISA, TARGET)                                                                                    \
    INTEGERS(ISA, TARGET, u8, uint8_t, uint8_t)                                                             \
    INTEGERS(ISA, TARGET, i8, int8_t, uint8_t)                                                              \
    INTEGERS(ISA, TARGET, i16, int16_t, uint16_t)                                                           \
    INTEGERS(ISA, TARGET, i32, int32_t, uint32_t)                                                           \
    INTEGERS(ISA, TARGET, i64, int64_t, uint64_t)                                                           \
    BITS(ISA, TARGET, 1, uint8_t)                                                                           \
    BITS(ISA, TARGET, 2, uint16_t)                                                                          \
    BITS(ISA, TARGET, 4, uint32_t)                                                                          \
    BITS(ISA, TARGET, 8, uint64_t)                                                                          \
    FLOATS(ISA, TARGET, f32, float)                                                                         \
    FLOATS(ISA, TARGET, f64, double)                                                                        \
    static const Fold table##ISA[KINDS][OPS] = {                                                            \
        [U8] = {sum_u8##ISA, prod_u8##ISA, min_u8##ISA, max_u8##ISA, and_1##ISA, or_1##ISA, xor_1##ISA},      \
        [I8] = {sum_i8##ISA, prod_i8##ISA, min_i8##ISA, max_i8##ISA, and_1##ISA, or_1##ISA, xor_1##ISA},      \
        [I16] = {sum_i16##ISA, prod_i16##ISA, min_i16##ISA, max_i16##ISA, and_2##ISA, or_2##ISA, xor_2##ISA}, \
        [I32] = {sum_i32##ISA, prod_i32##ISA, min_i32##ISA, max_i32##ISA, and_4##ISA, or_4##ISA, xor_4##ISA}, \
        [I64] = {sum_i64##ISA, prod_i64##ISA, min_i64##ISA, max_i64##ISA, and_8##ISA, or_8##ISA, xor_8##ISA}, \
        [F16] = {sum_f16##ISA, prod_f16##ISA, min_f16##ISA, max_f16##ISA},                                    \
        [BF16] = {sum_bf16##ISA, prod_bf16##ISA, min_bf16##ISA, max_bf16##ISA},                               \
        [F32] = {sum_f32##ISA, prod_f32##ISA, min_f32##ISA, max_f32##ISA},                                    \
        [F64] = {sum_f64##ISA, prod_f64##ISA, min_f64##ISA, max_f64##ISA},                                    \
        [BOOL] = {or_1##ISA, and_1##ISA, and_1##ISA, or_1##ISA, and_1##ISA, or_1##ISA, xor_1##ISA},           \
    };

#define HALVES(KIND)                                   \
    WIDENED(sum_##KIND##_plain, KIND, ADD)             \
    WIDENED(prod_##KIND##_plain, KIND, MULTIPLY)       \
    WIDENED(min_##KIND##_plain, KIND, LESS_OR_NAN)     \
    WIDENED(max_##KIND##_plain, KIND, GREATER_OR_NAN)

HALVES(bf16)
HALVES(f16)
#define NOTHING
ALL(_plain, NOTHING)

#ifdef HAS_LEVELS
#include "halves.h"
ALL(_avx2, AVX2)
ALL(_avx512, AVX512)
#endif

/* Asked of the processor itself: what compilers offer for it is a global that libraries of other compilers replace. */
int level_of_processor(void) {
#ifdef HAS_LEVELS
    enum { AVX512_BF16 = 1 << 5, STATE_256 = 0x06, STATE_512 = 0xe6 };
    const unsigned wide = bit_AVX512F | bit_AVX512BW | bit_AVX512VL | bit_AVX512DQ;
    unsigned a, b, c, d, saved, upper;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE) || !(c & bit_F16C)) return 0;
    __asm__("xgetbv" : "=a"(saved), "=d"(upper) : "c"(0)); /* which registers the system saves */
    if ((saved & STATE_256) != STATE_256 || !__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & bit_AVX2)) return 0;
    if ((saved & STATE_512) != STATE_512 || (b & wide) != wide || a < 1) return 1;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & AVX512_BF16 ? 2 : 1;
#else
    return 0;
#endif
}

Fold fold_of(int kind, int op, int level) {
    if (kind < 0 || kind >= KINDS || op < 0 || op >= OPS) return 0;
#ifdef HAS_LEVELS
    int most = level_of_processor();
    if (level > 1 && most > 1) return table_avx512[kind][op];
    if (level > 0 && most > 0) return table_avx2[kind][op];
#endif
    (void)level;
    return table_plain[kind][op];
}
