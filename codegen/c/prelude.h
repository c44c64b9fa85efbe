/* What every generated kernel starts with: conversions in registers, and functions that a compiler can vectorise.
 *
 * The float32 functions have no branches and no calls. They are good to about 1 to 2 units in the last place, keep NaN,
 * infinities, subnormal numbers and the sign of zero. Their polynomials are minimax fits (Remez) of the usual reductions;
 * see Muller, Elementary Functions. float64 uses the C library's.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline, unused))

/* Loops that look for a maximum or a minimum: clang begins with the largest finite number, and does not vectorise them. */
#if defined(__clang__)
#define EXTREMES(pragma)
#else
#define EXTREMES(pragma) _Pragma(pragma)
#endif

INLINE float as_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t as_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* --- bfloat16 and float16, rounded to nearest even */

INLINE float from_bfloat16(uint16_t half) { return as_float((uint32_t)half << 16); }

/* A bfloat16 in the high half; the low one is left over. */
INLINE uint32_t rounded_bfloat16(float value) {
    uint32_t bits = as_bits(value);
    uint32_t rounded = bits + 0x7fffu + (bits >> 16 & 1u);
    return value == value ? rounded : 0x7fc00000u;
}

INLINE uint16_t to_bfloat16(float value) { return (uint16_t)(rounded_bfloat16(value) >> 16); }

/* Two bfloat16 that are neighbours in memory, in the lanes of one float32. */
typedef uint32_t pair __attribute__((aligned(2), may_alias));

INLINE uint32_t pair_at(const uint16_t *from, int64_t i) { return ((const pair *)from)[i]; }

INLINE float from_pair(uint32_t both, int64_t side) { return as_float(side ? both & 0xffff0000u : both << 16); }

INLINE float from_float16(uint16_t half) {
    float magnitude = as_float((uint32_t)(half & 0x7fffu) << 13) * 0x1p112f;
    uint32_t bits = as_bits(magnitude) | (magnitude >= 65536.0f ? 0x7f800000u : 0u);
    return as_float(bits | (uint32_t)(half & 0x8000u) << 16);
}

INLINE uint16_t to_float16(float value) {
    uint32_t bits = as_bits(value), sign = bits >> 16 & 0x8000u;
    float magnitude = fabsf(value);
    /* Adding the power of two whose unit in the last place is the half's rounds a number that is subnormal there. */
    uint32_t small = as_bits(magnitude + 0.5f) - 0x3f000000u;
    uint32_t large = ((bits & 0x7fffffffu) - 0x38000000u + 0xfffu + (bits >> 13 & 1u)) >> 13;
    uint32_t half = magnitude < 0x1p-14f ? small : magnitude < 65520.0f ? large : 0x7c00u;
    return (uint16_t)(sign | (value != value ? 0x7e00u : half));
}

/* --- float32 */

/* a * b + c, rounded once where that is one instruction. Kernels whose own products must not run into their sums, for torch
 * rounds between them, are compiled without contraction. */
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define FUSED(a, b, c) __builtin_fmaf(a, b, c)
#else
#define FUSED(a, b, c) ((a) * (b) + (c))
#endif
#if defined(__clang__)
#define APART
#else
#define APART __attribute__((optimize("fp-contract=off")))
#endif

/* scale * e^x = p * 2^n; n is at most 130, and n + bias is in the low bits of `power`. Where x is far below what float32
 * can hold of e^x, p and n mean nothing. The bound is one of integers: gcc makes branches of those of floats, and copies
 * what follows into each. */
INLINE float exp_parts(float x, int bias, float scale, uint32_t *power) {
    float shift = 12582912.0f + (float)bias; /* adding it rounds to an integer, in the low bits */
    int32_t most = (int32_t)as_bits(shift + 130.0f), bits = (int32_t)as_bits(FUSED(x, 1.44269504f, shift));
    *power = (uint32_t)(bits < most ? bits : most);
    float n = as_float(*power) - shift;
    float r = FUSED(n, -1.42860677e-6f, FUSED(n, -0.693145752f, x));
    float p = scale * 0.0013814609f;
    p = FUSED(p, r, scale * 0.00836871f);
    p = FUSED(p, r, scale * 0.04166839f);
    p = FUSED(p, r, scale * 0.16666521f);
    p = FUSED(p, r, scale * 0.49999994f);
    p = FUSED(p, r, scale);
    return FUSED(p, r, scale);
}

INLINE float exp_float(float x) {
    uint32_t power;
    float p = exp_parts(x, 254, 1.0f, &power);
    /* 2^n may lie beyond normal numbers on either side: two factors. Shifting drops what is above the exponent. */
    uint32_t half = power >> 1;
    float result = p * as_float(half << 23) * as_float((power - half) << 23);
    return x < -104.0f ? 0.0f : result;
}

/* 1 + e^x: what e^x is below normal numbers does not matter, and one factor will do. */
INLINE float one_plus_exp_float(float x) {
    uint32_t power;
    float p = exp_parts(x, 124, 8.0f, &power);
    float result = FUSED(p, as_float(power << 23), 1.0f);
    return x < -80.0f ? 1.0f : result;
}

/* The same to 2^-17, a part of what a result is rounded off by as float16 or bfloat16. */
INLINE float one_plus_exp_half(float x) {
    float y = (x < -80.0f ? -80.0f : x) * 1.44269504f, shift = 12582912.0f + 124.0f;
    int32_t most = (int32_t)as_bits(shift + 130.0f), bits = (int32_t)as_bits(y + shift);
    uint32_t power = (uint32_t)(bits < most ? bits : most);
    float r = y - (as_float(power) - shift);
    float p = 8.0f * 0.009570102f;
    p = FUSED(p, r, 8.0f * 0.05591786f);
    p = FUSED(p, r, 8.0f * 0.24024744f);
    p = FUSED(p, r, 8.0f * 0.6931218f);
    p = FUSED(p, r, 8.0f * 0.9999993f);
    return FUSED(p, as_float(power << 23), 1.0f);
}

INLINE float log_float(float x) {
    int subnormal = x < 0x1p-126f;
    float normal = subnormal ? x * 0x1p24f : x;
    uint32_t bits = as_bits(normal) - 0x3f3504f3u; /* of sqrt(1/2): the mantissa comes to lie around 1 */
    float e = (float)((int32_t)bits >> 23) - (subnormal ? 24.0f : 0.0f);
    float f = as_float((bits & 0x7fffffu) + 0x3f3504f3u) - 1.0f;
    float p = 0.06746663f;
    p = p * f - 0.1167564f;
    p = p * f + 0.11888145f;
    p = p * f - 0.12405589f;
    p = p * f + 0.14219555f;
    p = p * f - 0.16667996f;
    p = p * f + 0.20002119f;
    p = p * f - 0.2500001f;
    p = p * f + 0.33333313f;
    float square = f * f;
    float tail = p * f * square - 0.5f * square + e * 1.42860677e-6f;
    float result = e * 0.693145752f + (f + tail);
    result = x == 0.0f ? -INFINITY : x < 0.0f ? NAN : result;
    return x == INFINITY || x != x ? x : result;
}

/* log(1 + x) without the rounding of 1 + x (Kahan; in Goldberg, 1991, theorem 4). */
INLINE float log1p_float(float x) {
    float rounded = 1.0f + x;
    float exact = log_float(rounded) * (x / (rounded - 1.0f));
    return rounded == 1.0f || rounded == INFINITY ? x : exact;
}

INLINE float tanh_float(float x) {
    float magnitude = fabsf(x), square = x * x;
    float p = -0.006274231f;
    p = p * square + 0.021071672f;
    p = p * square - 0.05385231f;
    p = p * square + 0.13332586f;
    p = p * square - 0.33333316f;
    float near = p * square * magnitude + magnitude;
    float far = 1.0f - 2.0f / one_plus_exp_float(2.0f * magnitude);
    return copysignf(magnitude < 0.55f ? near : far, x);
}

INLINE float erf_float(float x) {
    float magnitude = fabsf(x), square = x * x;
    float p = 7.8538396e-05f;
    p = FUSED(p, square, -0.0008010187f);
    p = FUSED(p, square, 0.005188327f);
    p = FUSED(p, square, -0.026853811f);
    p = FUSED(p, square, 0.112835854f);
    p = FUSED(p, square, -0.37612626f);
    p = FUSED(p, square, 0.12837917f);
    float near = FUSED(p, x, x);
    float t = magnitude > 4.0f ? 4.0f : magnitude; /* beyond, it rounds to 1 */
    float q = 1.3962576e-05f;
    q = FUSED(q, t, -0.00035059344f);
    q = FUSED(q, t, 0.003757483f);
    q = FUSED(q, t, -0.024010083f);
    q = FUSED(q, t, 0.10653088f);
    q = FUSED(q, t, 0.63496953f);
    q = FUSED(q, t, 1.1286943f);
    float far = 1.0f - exp_float(-(q * t));
    return magnitude < 1.0f ? near : copysignf(far, x);
}

/* x less a multiple of pi / 2, at most pi / 4 from 0; the multiple comes in `quarters`. From the bits of 1 / (2 pi) that
 * matter for the exponent of x (Payne and Hanek, 1983), which is finite and at least 2^20 in size. */
INLINE double reduced(float x, uint32_t *quarters) {
    static const uint32_t turns[8] = {0x00000000, 0x28be60db, 0x9391054a, 0x7f09d5f4,
                                      0x7d4d3770, 0x36d8a566, 0x4f10e410, 0x7f9458ea};
    uint32_t bits = as_bits(x) & 0x7fffffffu;
    uint64_t mantissa = (bits & 0x7fffffu) | 0x800000u;
    uint32_t skip = (bits >> 23) - 118u; /* bits of whole turns */
    skip = skip > 136u ? 0u : skip;      /* another x, whose result is not used */
    uint32_t word = skip >> 5, shift = skip & 31u;
    uint32_t high = (uint32_t)(((uint64_t)turns[word] << 32 | turns[word + 1]) << shift >> 32);
    uint32_t middle = (uint32_t)(((uint64_t)turns[word + 1] << 32 | turns[word + 2]) << shift >> 32);
    uint32_t low = (uint32_t)(((uint64_t)turns[word + 2] << 32 | turns[word + 3]) << shift >> 32);
    uint64_t fraction = (mantissa * high << 32) + mantissa * middle + (mantissa * low >> 32); /* of a turn, by 2^64 */
    uint64_t nearest = (fraction + 0x2000000000000000u) >> 62;
    double rest = (double)(int64_t)(fraction - (nearest << 62)) * 3.4061215800865545e-19; /* 2 pi / 2^64 */
    *quarters = (uint32_t)(x < 0.0f ? -nearest : nearest);
    return x < 0.0f ? -rest : rest;
}

/* sin(x + quarters * pi / 2) */
INLINE float sine(float x, uint32_t quarters) {
    double shifted = x * 0.6366197723675814 + 6755399441055744.0; /* rounds to an integer, in the low bits */
    double n = shifted - 6755399441055744.0;
    double rest = (x - n * 1.5707963267341256) - n * 6.077100506506192e-11;
    uint64_t low;
    memcpy(&low, &shifted, sizeof low);
    uint32_t far_quarters;
    double far_rest = reduced(x, &far_quarters);
    int near = fabsf(x) < 0x1p20f;
    float r = (float)(near ? rest : far_rest);
    uint32_t quadrant = (near ? (uint32_t)low : far_quarters) + quarters;
    float square = r * r;
    float s = 2.7183116e-06f;
    s = s * square - 0.00019839335f;
    s = s * square + 0.008333329f;
    s = s * square - 0.16666667f;
    s = s * square * r + r;
    float c = 2.479946e-05f;
    c = c * square - 0.0013888883f;
    c = c * square + 0.041666668f;
    c = c * (square * square) - 0.5f * square + 1.0f;
    float found = quadrant & 1u ? c : s;
    found = quadrant & 2u ? -found : found;
    return fabsf(x) < INFINITY ? found : NAN;
}

INLINE float sin_float(float x) { return x == 0.0f ? x : sine(x, 0); }
INLINE float cos_float(float x) { return sine(x, 1); }
INLINE float sqrt_float(float x) { return sqrtf(x); }
INLINE float rsqrt_float(float x) { return 1.0f / sqrtf(x); }
INLINE float floor_float(float x) { return floorf(x); }
INLINE float abs_float(float x) { return fabsf(x); }

/* The base is not negative. In float64, for an exponent magnifies the logarithm's error. */
INLINE float power_float(float base, float exponent) { return (float)exp((double)exponent * log((double)base)); }

/* --- float64 */

INLINE double exp_double(double x) { return exp(x); }
INLINE double log_double(double x) { return log(x); }
INLINE float round_bfloat16_float(float x) { return as_float(rounded_bfloat16(x) & 0xffff0000u); }
INLINE float round_float16_float(float x) { return from_float16(to_float16(x)); }
INLINE double round_bfloat16_double(double x) { return round_bfloat16_float((float)x); }
INLINE double round_float16_double(double x) { return round_float16_float((float)x); }
INLINE double round_float32_double(double x) { return (float)x; }
INLINE double log1p_double(double x) { return log1p(x); }
INLINE double tanh_double(double x) { return tanh(x); }
INLINE double erf_double(double x) { return erf(x); }
INLINE double sin_double(double x) { return sin(x); }
INLINE double cos_double(double x) { return cos(x); }
INLINE double sqrt_double(double x) { return sqrt(x); }
INLINE double rsqrt_double(double x) { return 1.0 / sqrt(x); }
INLINE double floor_double(double x) { return floor(x); }
INLINE double abs_double(double x) { return fabs(x); }
INLINE double power_double(double base, double exponent) { return pow(base, exponent); }

/* --- vectors, for sums that several loops share */

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
typedef float lanes __attribute__((vector_size(4 * LANES), may_alias));
typedef uint32_t wide_lanes __attribute__((vector_size(4 * LANES)));
typedef uint16_t half_lanes __attribute__((vector_size(2 * LANES)));

INLINE lanes lanes_float(const float *from) {
    lanes value;
    memcpy(&value, from, sizeof value);
    return value;
}

INLINE wide_lanes lanes_half(const uint16_t *from) {
    half_lanes halves;
    memcpy(&halves, from, sizeof halves);
    return __builtin_convertvector(halves, wide_lanes);
}

INLINE lanes lanes_bfloat16(const uint16_t *from) { return (lanes)(lanes_half(from) << 16); }

INLINE lanes lanes_float16(const uint16_t *from) {
#if defined(__AVX512F__)
    typedef short shorts __attribute__((vector_size(32)));
    shorts halves;
    memcpy(&halves, from, sizeof halves);
    return (lanes)__builtin_ia32_vcvtph2ps512_mask(halves, (lanes){0}, (unsigned short)-1, 4);
#elif defined(__AVX__) && defined(__F16C__)
    typedef short shorts __attribute__((vector_size(16)));
    shorts halves;
    memcpy(&halves, from, sizeof halves);
    return (lanes)__builtin_ia32_vcvtph2ps256(halves);
#else
    wide_lanes bits = lanes_half(from);
    lanes magnitude = (lanes)((bits & 0x7fffu) << 13) * 0x1p112f;
    wide_lanes special = (wide_lanes)(magnitude >= 65536.0f) & 0x7f800000u;
    return (lanes)((wide_lanes)magnitude | special | (bits & 0x8000u) << 16);
#endif
}

#define HALVED(sum, of, count)                                                                                         \
    float sum __attribute__((vector_size(4 * (count)))), sum##_high __attribute__((vector_size(4 * (count))));         \
    memcpy(&sum, &of, sizeof sum);                                                                                     \
    memcpy(&sum##_high, (const char *)&of + sizeof sum, sizeof sum);                                                   \
    sum += sum##_high

INLINE float lanes_sum(lanes value) {
#if LANES == 16
    HALVED(eight, value, 8);
    HALVED(four, eight, 4);
#elif LANES == 8
    HALVED(four, value, 4);
#else
    lanes four = value;
#endif
    HALVED(two, four, 2);
    return two[0] + two[1];
}

/* The sum of each of LANES vectors, which are not kept: halves of pairs are added up until one vector is left. */
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLES
#endif
#endif
#if defined(SHUFFLES) && LANES == 16
#define BOTH_8(x, y)                                                                                                   \
    __builtin_shufflevector(x, y, 0, 1, 2, 3, 4, 5, 6, 7, 24, 25, 26, 27, 28, 29, 30, 31) +                            \
        __builtin_shufflevector(x, y, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23)
#define BOTH_4(x, y)                                                                                                   \
    __builtin_shufflevector(x, y, 0, 1, 2, 3, 20, 21, 22, 23, 8, 9, 10, 11, 28, 29, 30, 31) +                          \
        __builtin_shufflevector(x, y, 4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27)
#define BOTH_2(x, y)                                                                                                   \
    __builtin_shufflevector(x, y, 0, 1, 18, 19, 4, 5, 22, 23, 8, 9, 26, 27, 12, 13, 30, 31) +                          \
        __builtin_shufflevector(x, y, 2, 3, 16, 17, 6, 7, 20, 21, 10, 11, 24, 25, 14, 15, 28, 29)
#define BOTH_1(x, y)                                                                                                   \
    __builtin_shufflevector(x, y, 0, 17, 2, 19, 4, 21, 6, 23, 8, 25, 10, 27, 12, 29, 14, 31) +                         \
        __builtin_shufflevector(x, y, 1, 16, 3, 18, 5, 20, 7, 22, 9, 24, 11, 26, 13, 28, 15, 30)
#elif defined(SHUFFLES) && LANES == 8
#define BOTH_4(x, y)                                                                                                   \
    __builtin_shufflevector(x, y, 0, 1, 2, 3, 12, 13, 14, 15) + __builtin_shufflevector(x, y, 4, 5, 6, 7, 8, 9, 10, 11)
#define BOTH_2(x, y)                                                                                                   \
    __builtin_shufflevector(x, y, 0, 1, 10, 11, 4, 5, 14, 15) + __builtin_shufflevector(x, y, 2, 3, 8, 9, 6, 7, 12, 13)
#define BOTH_1(x, y)                                                                                                   \
    __builtin_shufflevector(x, y, 0, 9, 2, 11, 4, 13, 6, 15) + __builtin_shufflevector(x, y, 1, 8, 3, 10, 5, 12, 7, 14)
#elif defined(SHUFFLES)
#define BOTH_2(x, y) __builtin_shufflevector(x, y, 0, 1, 6, 7) + __builtin_shufflevector(x, y, 2, 3, 4, 5)
#define BOTH_1(x, y) __builtin_shufflevector(x, y, 0, 5, 2, 7) + __builtin_shufflevector(x, y, 1, 4, 3, 6)
#endif

INLINE lanes lanes_sums(lanes *of) {
#if defined(SHUFFLES)
#if LANES >= 16
    for (int i = 0; i < 8; i++) of[i] = BOTH_8(of[i], of[i + 8]);
#endif
#if LANES >= 8
    for (int i = 0; i < 4; i++) of[i] = BOTH_4(of[i], of[i + 4]);
#endif
    for (int i = 0; i < 2; i++) of[i] = BOTH_2(of[i], of[i + 2]);
    return BOTH_1(of[0], of[1]);
#else
    lanes sums;
    for (int i = 0; i < LANES; i++) sums[i] = lanes_sum(of[i]);
    return sums;
#endif
}

/* --- integers of packed weights */

typedef int32_t ints __attribute__((vector_size(4 * LANES)));
typedef uint8_t some_bytes __attribute__((vector_size(LANES)));
typedef int8_t some_signed_bytes __attribute__((vector_size(LANES)));

INLINE lanes floats_of(ints value) { return __builtin_convertvector(value, lanes); }

/* Compilers have a vector form of this; gcc only by name. */
#if defined(__AVX512F__) && !defined(__clang__)
typedef char sixteen_bytes __attribute__((vector_size(16)));
#define WIDENED(sign, bytes)                                                                                           \
    (ints) __builtin_ia32_pmov##sign##xbd512_mask((sixteen_bytes)(bytes), (ints){0}, (unsigned short)-1)
#elif defined(__AVX2__) && !defined(__clang__)
typedef char sixteen_bytes __attribute__((vector_size(16)));
typedef long long two_longs __attribute__((vector_size(16)));
#define WIDENED(sign, bytes) (ints) __builtin_ia32_pmov##sign##xbd256((sixteen_bytes)(two_longs){(long long)(bytes), 0})
#else
#define WIDENED(sign, bytes) __builtin_convertvector(bytes, ints)
#endif

INLINE ints bytes_at(const uint8_t *from) {
    some_bytes bytes;
    memcpy(&bytes, from, sizeof bytes);
    return WIDENED(z, bytes);
}

INLINE ints signed_bytes_at(const uint8_t *from) {
    some_signed_bytes bytes;
    memcpy(&bytes, from, sizeof bytes);
    return WIDENED(s, bytes);
}

INLINE ints looked_up(const int32_t *from, ints places) {
    ints value;
    for (int i = 0; i < LANES; i++) value[i] = from[places[i]];
    return value;
}

INLINE ints bytes_from(const uint8_t *from, ints places) {
    ints value;
    for (int i = 0; i < LANES; i++) value[i] = from[places[i]];
    return value;
}

INLINE ints either(ints condition, ints one, ints other) { return (one & condition) | (other & ~condition); }

/* 0, 1, 2, ... */
INLINE ints counted(void) {
    static const int32_t numbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    ints value;
    memcpy(&value, numbers, sizeof value);
    return value;
}

INLINE int32_t int_at(const uint8_t *from) {
    int32_t value;
    memcpy(&value, from, sizeof value);
    return value;
}

/* A float16 in each lane. */
INLINE lanes spread_float16(const uint8_t *from) {
    uint16_t half;
    memcpy(&half, from, sizeof half);
#if defined(__AVX512F__)
    typedef short shorts __attribute__((vector_size(32)));
    return (lanes)__builtin_ia32_vcvtph2ps512_mask((shorts){0} + (short)half, (lanes){0}, (unsigned short)-1, 4);
#elif defined(__AVX__) && defined(__F16C__)
    typedef short shorts __attribute__((vector_size(16)));
    return (lanes)__builtin_ia32_vcvtph2ps256((shorts){0} + (short)half);
#else
    return (lanes){0} + from_float16(half);
#endif
}

/* --- results, from float32 in a buffer that begins at a multiple of 64 bytes; streamed: past the caches, where the machine
 * can and the results lie as well. What is not read before it is displaced need not be read in to be written. */

#if defined(__AVX512F__)
#define STREAM(to, value) __asm__ volatile("vmovntps %1, %0" : "=m"(*(to)) : "v"(value))
#elif defined(__AVX__)
#define STREAM(to, value) __asm__ volatile("vmovntps %1, %0" : "=m"(*(to)) : "x"(value))
#elif defined(__SSE2__)
#define STREAM(to, value) __asm__ volatile("movntps %1, %0" : "=m"(*(to)) : "x"(value))
#else
#define STREAM(to, value) (*(to) = (value))
#endif

/* What was streamed comes before what the thread writes later. */
INLINE void fence(void) {
#if defined(__SSE2__)
    __asm__ volatile("sfence" ::: "memory");
#endif
}

/* Into the second cache; addresses may lie beyond what there is. */
INLINE void fetch_ahead(const void *from, const void *to) {
    for (uintptr_t line = (uintptr_t)from; line < (uintptr_t)to; line += 64) __builtin_prefetch((const void *)line, 0, 2);
}

#define CALLED static __attribute__((noinline, unused)) /* for a piece at a time: copies would take long to compile */

INLINE int aligned(const void *to) { return ((uintptr_t)to & 63u) == 0; }

INLINE void store_lanes(void *to, lanes value, int streamed) {
    if (streamed)
        STREAM((lanes *)to, value);
    else
        memcpy(to, &value, sizeof value);
}

CALLED void store_float(float *to, const float *from, int64_t count, int streamed) {
    int64_t done = 0;
    for (; streamed && aligned(to) && done + LANES <= count; done += LANES)
        store_lanes(to + done, lanes_float(from + done), 1);
    memcpy(to + done, from + done, (size_t)(count - done) * sizeof *to);
}

#if defined(__AVX512BF16__) && defined(__AVX512DQ__)
#define CONVERTS
/* Both vectors as bfloat16, `low` first. The instruction takes subnormal numbers for zero: whether there are any. */
INLINE lanes converted(lanes low, lanes high, unsigned *subnormal) {
    lanes both;
    unsigned short in_low, in_high;
    __asm__("vfpclassps $32, %1, %0" : "=k"(in_low) : "v"(low));
    __asm__("vfpclassps $32, %1, %0" : "=k"(in_high) : "v"(high));
    __asm__("vcvtne2ps2bf16 %1, %2, %0" : "=v"(both) : "v"(low), "v"(high));
    *subnormal |= (unsigned)in_low | in_high;
    return both;
}
#endif

CALLED void store_bfloat16(uint16_t *to, const float *from, int64_t count, int streamed) {
    int64_t done = 0;
    streamed = streamed && aligned(to);
#if defined(CONVERTS)
    unsigned subnormal = 0;
    for (; done + 2 * LANES <= count; done += 2 * LANES)
        store_lanes(to + done, converted(lanes_float(from + done), lanes_float(from + done + LANES), &subnormal), streamed);
    if (subnormal) done = 0;
#endif
#pragma omp simd
    for (int64_t k = done; k < count; k++) to[k] = to_bfloat16(from[k]);
}

#if defined(CONVERTS)
/* The first of each of LANES pairs, and the second of each, as bfloat16. */
INLINE lanes interleaved(lanes firsts, lanes seconds, unsigned *subnormal) {
    static const uint16_t order[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                       8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
    lanes in_turns, both = converted(firsts, seconds, subnormal);
    memcpy(&in_turns, order, sizeof in_turns);
    __asm__("vpermw %1, %2, %0" : "=v"(both) : "v"(both), "v"(in_turns));
    return both;
}
#endif

/* The first of each pair, then the second of each. */
CALLED void store_pairs(uint16_t *to, const float *from, int64_t pairs, int streamed) {
    int64_t done = 0;
    streamed = streamed && aligned(to);
#if defined(CONVERTS)
    unsigned subnormal = 0;
    for (; done + LANES <= pairs; done += LANES)
        store_lanes(to + 2 * done, interleaved(lanes_float(from + done), lanes_float(from + pairs + done), &subnormal),
                    streamed);
    if (subnormal) done = 0;
#endif
#pragma omp simd
    for (int64_t k = done; k < pairs; k++)
        ((pair *)to)[k] = rounded_bfloat16(from[k]) >> 16 | (rounded_bfloat16(from[pairs + k]) & 0xffff0000u);
}

CALLED void store_float16(uint16_t *to, const float *from, int64_t count, int streamed) {
    int64_t done = 0;
#if defined(__AVX512F__)
    typedef float half_of_lanes __attribute__((vector_size(2 * LANES), may_alias));
    streamed = streamed && aligned(to);
    for (; done + LANES <= count; done += LANES) {
        lanes value = lanes_float(from + done);
        half_of_lanes halves;
        __asm__("vcvtps2ph $0, %1, %0" : "=v"(halves) : "v"(value));
        if (streamed)
            STREAM((half_of_lanes *)(to + done), halves);
        else
            memcpy(to + done, &halves, sizeof halves);
    }
#else
    (void)streamed;
#endif
#pragma omp simd
    for (int64_t k = done; k < count; k++) to[k] = to_float16(from[k]);
}

/* --- whole vectors of bfloat16 in registers, where they can be rounded there */

#if defined(CONVERTS)
/* One side of LANES pairs that are neighbours in memory. */
INLINE lanes lanes_of_pairs(const uint16_t *from, int side) {
    wide_lanes both;
    memcpy(&both, from, sizeof both);
    return (lanes)(side ? both & 0xffff0000u : both << 16);
}

CALLED void store_exactly(uint16_t *to, lanes firsts, lanes seconds) {
    for (int k = 0; k < LANES; k++) to[2 * k] = to_bfloat16(firsts[k]), to[2 * k + 1] = to_bfloat16(seconds[k]);
}

INLINE void store_sides(uint16_t *to, const lanes *sides, int streamed) {
    unsigned subnormal = 0;
    lanes both = interleaved(sides[0], sides[1], &subnormal);
    if (__builtin_expect(subnormal != 0, 0))
        store_exactly(to, sides[0], sides[1]);
    else
        store_lanes(to, both, streamed);
}

/* `one_plus_exp_half`, from the integer below x / ln 2; of an infinity nothing is left beyond that. */
INLINE lanes one_plus_exp_lanes(lanes x) {
    lanes y = x * 1.44269504f, r, power;
    __asm__("vreduceps $1, %1, %0" : "=v"(r) : "v"(y));
    lanes p = r * 0.013534168f + 0.05201146f;
    p = p * r + 0.24144275f;
    p = p * r + 0.69300383f;
    p = p * r + 1.0000026f;
    __asm__("vscalefps %2, %1, %0" : "=v"(power) : "v"(p), "v"(y));
    return power + 1.0f;
}
#endif
