/* Elementary functions that give the same bits on every platform: IEEE single precision, explicit fused
 * multiply-add, no math.h. Relative error below 2e-7 unless said. */
#ifndef TTE_MATH_H
#define TTE_MATH_H

#include <stdint.h>

static inline float tte_from_bits(int32_t i) {
    union { int32_t i; float f; } u;
    u.i = i;
    return u.f;
}

static inline int32_t tte_to_bits(float f) {
    union { int32_t i; float f; } u;
    u.f = f;
    return u.i;
}

/* x * y + z, rounded once: in one instruction, or in integers (tte_fma.c) on cores that have none. */
#ifndef TTE_SOFT_FMA
#if defined(__arm__) && !defined(__ARM_FEATURE_FMA)
#define TTE_SOFT_FMA 1
#else
#define TTE_SOFT_FMA 0
#endif
#endif
#if !TTE_SOFT_FMA
#define TTE_FMAF __builtin_fmaf
#else
#define TTE_FMAF tte_fmaf
float tte_fmaf(float x, float y, float z);
#endif

/* exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2) / 2; ln 2 in two parts; 2^n in two factors for subnormals. */
static inline float tte_expf(float x) {
    if (!(x > -104.0f))
        return x != x ? x : 0.0f;
    if (x > 89.0f)
        return tte_from_bits(0x7f800000);
    const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    float r = TTE_FMAF(n, -0.693145752f, x);
    r = TTE_FMAF(n, -1.42860677e-6f, r);
    float y = 1.3888889e-3f;
    y = TTE_FMAF(y, r, 8.3333333e-3f);
    y = TTE_FMAF(y, r, 4.1666667e-2f);
    y = TTE_FMAF(y, r, 1.6666667e-1f);
    y = TTE_FMAF(y, r, 0.5f);
    y = TTE_FMAF(y, r, 1.0f);
    y = TTE_FMAF(y, r, 1.0f);
    const int32_t k = (int32_t)n, half = k / 2;
    return y * tte_from_bits((half + 127) * (1 << 23)) * tte_from_bits((k - half + 127) * (1 << 23));
}

/* log(x) = e ln 2 + log(m), sqrt(1/2) <= m < sqrt(2); log(m) = 2 atanh(s), s = (m - 1) / (m + 1). */
static inline float tte_logf(float x) {
    if (!(x > 0.0f))
        return x == 0.0f ? -tte_from_bits(0x7f800000) : tte_from_bits(0x7fc00000);
    if (x > 3.40282347e38f)
        return x;
    int32_t e = 0;
    if (x < 1.17549435e-38f) {
        x *= 8388608.0f;
        e = -23;
    }
    int32_t i = tte_to_bits(x);
    e += (i >> 23) - 127;
    float m = tte_from_bits((i & 0x7fffff) | 0x3f800000);
    if (m > 1.41421356f) {
        m *= 0.5f;
        e += 1;
    }
    const float s = (m - 1.0f) / (m + 1.0f), z = s * s;
    float y = 0.22222222f;
    y = TTE_FMAF(y, z, 0.28571429f);
    y = TTE_FMAF(y, z, 0.4f);
    y = TTE_FMAF(y, z, 0.66666667f);
    y = TTE_FMAF(y * z, s, 2.0f * s);
    return TTE_FMAF((float)e, 0.693145752f, TTE_FMAF((float)e, 1.42860677e-6f, y));
}

/* log(1 + x), 0 <= x: what 1 + x loses is given back to first order. */
static inline float tte_log1pf(float x) {
    const float u = 1.0f + x;
    return tte_logf(u) + (x - (u - 1.0f)) / u;
}

static inline float tte_sigmoidf(float x) {
    const float e = tte_expf(-__builtin_fabsf(x));
    return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

/* |x| < 0.625: x + x^3 P(x^2), a minimax fit; beyond: (1 - e) / (1 + e), e = exp(-2 |x|). */
static inline float tte_tanhf(float x) {
    const float a = __builtin_fabsf(x), z = x * x;
    if (a < 0.625f) {
        float y = -6.19203822e-3f;
        y = TTE_FMAF(y, z, 2.10889187e-2f);
        y = TTE_FMAF(y, z, -5.38795515e-2f);
        y = TTE_FMAF(y, z, 1.33330868e-1f);
        y = TTE_FMAF(y, z, -3.33333374e-1f);
        return TTE_FMAF(y * z, x, x);
    }
    const float e = tte_expf(-2.0f * a), y = (1.0f - e) / (1.0f + e);
    return x < 0.0f ? -y : y;
}

/* |x| < 1: x P(x^2); beyond: 1 - exp(-x^2) Q(1 / (1 + |x| / 2)); minimax fits. */
static inline float tte_erff(float x) {
    const float a = __builtin_fabsf(x), z = x * x;
    if (a < 1.0f) {
        float y = 7.88912041e-5f;
        y = TTE_FMAF(y, z, -8.02084154e-4f);
        y = TTE_FMAF(y, z, 5.18953537e-3f);
        y = TTE_FMAF(y, z, -2.68544446e-2f);
        y = TTE_FMAF(y, z, 1.12836002e-1f);
        y = TTE_FMAF(y, z, -3.76126271e-1f);
        y = TTE_FMAF(y, z, 1.12837917f);
        return x * y;
    }
    if (a > 4.0f)
        return x < 0.0f ? -1.0f : 1.0f;
    const float t = 1.0f / (1.0f + 0.5f * a);
    float y = 1.19777224e-1f;
    y = TTE_FMAF(y, t, -4.72778138e-1f);
    y = TTE_FMAF(y, t, 5.65720308e-1f);
    y = TTE_FMAF(y, t, -1.05693197e-1f);
    y = TTE_FMAF(y, t, 3.4884577e-1f);
    y = TTE_FMAF(y, t, 2.59379294e-1f);
    y = TTE_FMAF(y, t, 2.84962345e-1f);
    y = TTE_FMAF(y, t, -1.57577068e-4f);
    y = 1.0f - tte_expf(-z) * y;
    return x < 0.0f ? -y : y;
}

static inline float tte_clampf(float x, float c) {
    return x < -c ? -c : (x > c ? c : x);
}

/* max(0, min(1, x / 6 + 1 / 2)) */
static inline float tte_hard_sigmoidf(float x) {
    const float y = x / 6.0f + 0.5f;
    return y < 0.0f ? 0.0f : (y > 1.0f ? 1.0f : y);
}

static inline float tte_hard_swish_gradf(float x) {
    return x <= -3.0f ? 0.0f : (x >= 3.0f ? 1.0f : x / 3.0f + 0.5f);
}

static inline float tte_silu_gradf(float x) {
    const float s = tte_sigmoidf(x);
    return s * (1.0f + x * (1.0f - s));
}

/* x Phi(x), Phi the normal distribution */
static inline float tte_geluf(float x) {
    return 0.5f * x * (1.0f + tte_erff(x * 0.707106781f));
}

static inline float tte_gelu_gradf(float x) {
    return 0.5f * (1.0f + tte_erff(x * 0.707106781f)) + x * 0.398942280f * tte_expf(-0.5f * x * x);
}

/* x / 2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) */
static inline float tte_gelu_tanhf(float x) {
    return 0.5f * x * (1.0f + tte_tanhf(0.797884561f * (x + 0.044715f * x * x * x)));
}

static inline float tte_gelu_tanh_gradf(float x) {
    const float t = tte_tanhf(0.797884561f * (x + 0.044715f * x * x * x));
    const float inner = 0.797884561f * (1.0f + 3.0f * 0.044715f * x * x);
    return 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * inner;
}

/* log(1 + exp(beta x)) / beta, x itself where beta x > threshold */
static inline float tte_softplusf(float x, float beta, float threshold) {
    const float bx = beta * x;
    if (bx > threshold)
        return x;
    return ((bx > 0.0f ? bx : 0.0f) + tte_log1pf(tte_expf(-__builtin_fabsf(bx)))) / beta;
}

static inline float tte_softplus_gradf(float x, float beta, float threshold) {
    const float bx = beta * x;
    return bx > threshold ? 1.0f : tte_sigmoidf(bx);
}

/* d^2 / 2 for |d| < delta, else delta (|d| - delta / 2) */
static inline float tte_huberf(float d, float delta) {
    const float a = __builtin_fabsf(d);
    return a < delta ? 0.5f * d * d : delta * (a - 0.5f * delta);
}

/* The nearest integer, halves to even; beyond 2^20, which is beyond every limit of int8, it stays at 2^20. */
static inline int32_t tte_round(float v) {
    const float limit = 1048576.0f, magic = 12582912.0f;
    v = v > -limit ? (v < limit ? v : limit) : -limit;
    return (int32_t)((v + magic) - magic);
}

/* An accumulator times a real number: in float32 as onnxruntime does ... */
static inline int32_t tte_scale_float(int32_t acc, float multiplier) {
    return tte_round((float)acc * multiplier);
}

/* ... or in integers, multiplier = round(real * 2^(32 - shift)); halves up, or where ``down`` is 1 down. Accumulators that
 * the shift would push out of range are far beyond the limits of int8. */
static inline int32_t tte_scale_fixed(int32_t acc, int32_t multiplier, int shift, int down) {
    const int left = shift > 0 ? shift : 0, bits = 32 + left - shift;
    const int32_t limit = INT32_MAX >> left;
    acc = acc > limit ? limit : acc < -limit ? -limit : acc;
    return (int32_t)(((int64_t)acc * (1 << left) * multiplier + ((int64_t)1 << (bits - 1)) - down) >> bits);
}

/* ... or as CMSIS-NN does: real = multiplier / 2^31 * 2^exponent, rounded halves up, then halves away from zero. */
static inline int32_t tte_scale_tflite(int32_t acc, int32_t multiplier, int32_t exponent) {
    const int left = exponent > 0 ? (int)exponent : 0, right = exponent > 0 ? 0 : (int)-exponent;
    const int32_t limit = INT32_MAX >> left;
    acc = acc > limit ? limit : acc < -limit ? -limit : acc;
    const int32_t high = (int32_t)(((int64_t)acc * (1 << left) * multiplier + ((int64_t)1 << 30)) >> 31);
    const int32_t mask = (int32_t)(((uint32_t)1 << right) - 1);
    return (high >> right) + ((high & mask) > (mask >> 1) + (high < 0));
}

/* floor(d + u) */
static inline int32_t tte_floor(float d, float u) {
    const float limit = 1073741824.0f;
    d += u;
    d = d > -limit ? (d < limit ? d : limit) : -limit;
    const int32_t whole = (int32_t)d;
    return whole - ((float)whole > d);
}

/* A number in [0, 1) from the bits of d: rounding d up with the probability of its fraction needs no generator. */
static inline float tte_fraction(float d) {
    uint32_t h = (uint32_t)tte_to_bits(d) * 0x9e3779b9u;
    h = (h ^ (h >> 15 | (h >> 31 ? 0xfffe0000u : 0u))) * 0x85ebca6bu;
    return (float)(h >> 8) * 5.9604644775390625e-8f;
}

static inline int32_t tte_saturate(int64_t v, int32_t low, int32_t high) {
    return v < low ? low : v > high ? high : (int32_t)v;
}

/* --- floats made and taken apart by integer instructions, with the bits that an FPU gives --- */

/* m * 2^e with the sign of ``sign``, rounded once, halves to even. */
static inline float tte_real(uint64_t m, int32_t e, uint32_t sign) {
    uint32_t bits = 0;
    if (m) {
        const int by = __builtin_clzll(m);
        m <<= by;
        const int32_t field = e - by + 190, lost = 40 + (field > 0 ? 0 : field < -24 ? 25 : 1 - field);
        if (field > 254)
            bits = 0x7f800000u;
        else if (lost < 65) {
            const uint64_t rest = m << (64 - lost), half = (uint64_t)1 << 63;
            bits = lost < 64 ? (uint32_t)(m >> lost) : 0;
            bits += rest > half || (rest == half && (bits & 1));
            bits += field > 0 ? (uint32_t)(field - 1) << 23 : 0;
        }
    }
    return tte_from_bits((int32_t)(bits | (sign & 0x80000000u)));
}

/* f = mantissa * 2^exponent, sign aside; the mantissa has 24 bits but for subnormal numbers. */
static inline uint32_t tte_significand(float f) {
    const uint32_t bits = (uint32_t)tte_to_bits(f);
    return (bits & 0x7fffff) | (uint32_t)((bits & 0x7f800000) != 0) << 23;
}

static inline int32_t tte_exponent(float f) {
    const int32_t field = tte_to_bits(f) >> 23 & 255;
    return field + (field == 0) - 150;
}

/* x * y * 2^e, rounded once. */
static inline float tte_multiply(float x, float y, int32_t e) {
    const uint32_t sign = (uint32_t)(tte_to_bits(x) ^ tte_to_bits(y));
    return tte_real((uint64_t)tte_significand(x) * tte_significand(y), tte_exponent(x) + tte_exponent(y) + e, sign);
}

/* v * scale, |v| <= 2^24 */
static inline float tte_times(int32_t v, float scale) {
#if TTE_SOFT_FMA
    const uint32_t sign = (uint32_t)(v ^ tte_to_bits(scale)), size = v < 0 ? 0u - (uint32_t)v : (uint32_t)v;
    return tte_real((uint64_t)size * tte_significand(scale), tte_exponent(scale), sign);
#else
    return (float)v * scale;
#endif
}

/* exp(-scale * z) in 2^-30: the product of factor[k] = exp(-scale * 2^k) for the bits k of z. */
static inline uint32_t tte_exp_integer(const int32_t *factor, int32_t z) {
    uint32_t e = 1u << 30;
    for (int k = 0; z >> k; k++)
        if (z >> k & 1)
            e = (uint32_t)(((uint64_t)e * (uint32_t)factor[k] + (1u << 29)) >> 30);
    return e;
}

/* The first of the largest. */
static inline int tte_find_largest(const int8_t *q, int n) {
    int best = 0;
    for (int c = 1; c < n; c++)
        best = q[c] > q[best] ? c : best;
    return best;
}

/* sum_c exp(scale * (q[c] - top)) as a number from 2^30 to 2^31 times 2^whole, in 2^-30. */
static inline uint32_t tte_sum_exponentials(const int8_t *q, int n, const int32_t *factor, int32_t top, int32_t *whole) {
    uint64_t sum = 0;
    for (int c = 0; c < n; c++)
        sum += tte_exp_integer(factor, top - q[c]);
    for (*whole = 0; sum >> 31; ++*whole)
        sum >>= 1;
    return (uint32_t)sum;
}

/* 2^61 / v rounded down, bit by bit, 2^30 <= v < 2^31: not every core has a library that divides 64 bits. */
static inline uint32_t tte_inverse(uint32_t v) {
    uint32_t rest = 1u << 30, q = 0;
    for (int bit = 0; bit < 32; bit++) {
        const uint32_t one = rest >= v;
        rest = (rest - (one ? v : 0)) << 1;
        q = q << 1 | one;
    }
    return q;
}

/* --- gradients as integers, see tte/ops/gradients.py --- */

/* g / unit, halves to even, inside of 127; 0 where the unit is. */
static inline int32_t tte_quotient(float g, float unit) {
    const float v = unit > 0.0f ? g / unit : 0.0f;
    return tte_round(v > -127.0f ? (v < 127.0f ? v : 127.0f) : -127.0f);
}

/* The upper half of a product. */
static inline int32_t tte_upper(int32_t x, int32_t y) {
    return (int32_t)(((int64_t)x * y) >> 32);
}

/* f * 2^e, a whole number below 2^24. */
static inline int32_t tte_whole(float f, int32_t e) {
    const int32_t shift = -(tte_exponent(f) + e);
    return shift > 31 ? 0 : (int32_t)(tte_significand(f) >> shift);
}

/* v / whole, halves away from zero; 0 where whole is. |v| <= 127 whole */
static inline int32_t tte_share(int32_t v, int32_t whole) {
    const uint32_t n = (uint32_t)whole, size = v < 0 ? 0u - (uint32_t)v : (uint32_t)v;
    const int32_t q = n ? (int32_t)((size + n / 2) / n) : 0;
    return v < 0 ? -q : q;
}

/* scale = mantissa * 2^(bits - fraction), the fraction 0 to 30: see take_apart. */
static inline int32_t tte_fraction_of(float scale, int32_t bits) {
    const int32_t fraction = bits - tte_exponent(scale) + 7;
    return fraction < 0 ? 0 : fraction > 30 ? 30 : fraction;
}

static inline int32_t tte_mantissa_of(float scale, int32_t bits) {
    const int32_t fraction = bits - tte_exponent(scale) + 7, sign = tte_to_bits(scale) >> 31;
    uint32_t size = tte_significand(scale) << 7; /* without branches, so that compilers take it out of loops */
    size |= (uint32_t)INT32_MAX & (0u - (uint32_t)((fraction < 0) & (size != 0)));
    const int32_t finer = fraction < 30 ? 0 : fraction - 30;
    return ((int32_t)(size ^ (uint32_t)sign) - sign) >> (finer < 31 ? finer : 31);
}

/* -v * rate, of which ``fraction`` bits of the upper half are fraction: to nearest ... */
static inline int32_t tte_step(int32_t v, int32_t rate, int32_t fraction) {
    return (((1 << fraction) >> 1) - tte_upper(v, rate)) >> fraction;
}

/* ... or up with the probability of the fraction, by a hash of the product and of w. */
static inline int32_t tte_step_at_random(int32_t v, int32_t rate, int32_t fraction, int32_t w) {
    const int64_t product = (int64_t)v * rate;
    const int32_t upper = (int32_t)(product >> 32);
    uint32_t h = ((uint32_t)product ^ (uint32_t)upper ^ (uint32_t)w) * 0x9e3779b9u;
    h = (h ^ (uint32_t)((int32_t)h >> 15)) * 0x85ebca6bu;
    return ((int32_t)(h >> 2 >> (30 - fraction)) - upper) >> fraction;
}

/* round(v * multiplier / 2^shift), halves up, shift from 32: what is more is first taken from the multiplier. */
static inline int32_t tte_shift_product(int32_t v, int32_t multiplier, int32_t shift) {
    const int32_t more = shift < 32 ? 0 : shift > 62 ? 30 : shift - 32;
    multiplier = (multiplier + ((1 << more) >> 1)) >> more;
    return (int32_t)(((int64_t)v * multiplier + 0x80000000) >> 32);
}

/* v / 8, halves to even */
static inline int32_t tte_eighths(int32_t v) {
    return (v + 3 + (v >> 3 & 1)) >> 3;
}

/* A range after a step whose largest element was ``peak``, and in which so many of n elements were saturated. */
static inline void tte_follow(int32_t *to, const int32_t *range, int32_t exponent, int32_t peak, int32_t saturated, int32_t n) {
    int32_t next = range[0] - (peak == 0 ? 256 : 7), whole = 0;
    while (peak >> whole > 1)
        whole++;
    if (peak > 0) {
        const int32_t octaves = exponent + whole + (saturated > 0) + (saturated > n / 8);
        const int32_t seen = octaves * 256 + (peak * 256 >> whole) - 256;
        next = seen > next ? seen : next;
    }
    to[1] = range[1] > INT32_MAX - saturated ? INT32_MAX : range[1] + saturated;
    to[0] = next < -15360 ? -15360 : next > 15360 ? 15360 : next;
}

#endif
