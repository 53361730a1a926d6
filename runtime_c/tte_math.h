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

/* exp(x) = 2^n exp(r), n = round(x / ln 2), |r| <= ln(2) / 2; ln 2 in two parts; 2^n in two factors for subnormals. */
static inline float tte_expf(float x) {
    if (!(x > -104.0f))
        return x != x ? x : 0.0f;
    if (x > 89.0f)
        return tte_from_bits(0x7f800000);
    const float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    float r = __builtin_fmaf(n, -0.693145752f, x);
    r = __builtin_fmaf(n, -1.42860677e-6f, r);
    float y = 1.3888889e-3f;
    y = __builtin_fmaf(y, r, 8.3333333e-3f);
    y = __builtin_fmaf(y, r, 4.1666667e-2f);
    y = __builtin_fmaf(y, r, 1.6666667e-1f);
    y = __builtin_fmaf(y, r, 0.5f);
    y = __builtin_fmaf(y, r, 1.0f);
    y = __builtin_fmaf(y, r, 1.0f);
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
    y = __builtin_fmaf(y, z, 0.28571429f);
    y = __builtin_fmaf(y, z, 0.4f);
    y = __builtin_fmaf(y, z, 0.66666667f);
    y = __builtin_fmaf(y * z, s, 2.0f * s);
    return __builtin_fmaf((float)e, 0.693145752f, __builtin_fmaf((float)e, 1.42860677e-6f, y));
}

#endif
