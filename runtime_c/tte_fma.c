/* x * y + z, rounded once, to nearest even: for cores that have no instruction for it (ARMv6-M, ARMv7-M, ARMv8-M baseline);
 * C libraries there may round twice. */
#include "tte_build.h"
#include "tte_math.h"

#if TTE_SOFT_FMA
/* Shifts to the right; what falls out leaves a one in the last bit. */
static uint64_t tte_shift_jam(uint64_t v, int by) {
    if (by <= 0)
        return v;
    if (by > 63)
        return v != 0;
    return v >> by | ((v & (((uint64_t)1 << by) - 1)) != 0);
}

/* A finite number other than 0 is m 2^(e - 150), 2^23 <= m < 2^24: returns m, and e. */
static uint32_t tte_mantissa(uint32_t bits, int *e) {
    const uint32_t m = bits & 0x7fffff;
    *e = (int)(bits >> 23 & 0xff);
    if (*e)
        return m | 0x800000;
    const int by = __builtin_clz(m) - 8;
    *e = 1 - by;
    return m << by;
}

/* Both terms as numbers below 2^62 that have the same exponent; bits that this shifts out of the smaller one are so far
 * below the other's that one bit can stand for them. */
float tte_fmaf(float x, float y, float z) {
    const uint32_t a = (uint32_t)tte_to_bits(x), b = (uint32_t)tte_to_bits(y), c = (uint32_t)tte_to_bits(z);
    const uint32_t infinite = 0x7f800000, less = 0x80000000;
    if ((a & infinite) == infinite || (b & infinite) == infinite || a << 1 == 0 || b << 1 == 0)
        return x * y + z;
    if ((c & infinite) == infinite)
        return z;
    if (c << 1 == 0)
        return x * y;
    int e, other;
    uint64_t product = tte_mantissa(a, &e);
    product = product * tte_mantissa(b, &other) << 14;
    e += other - 164;
    uint64_t term = (uint64_t)tte_mantissa(c, &other) << 38;
    other -= 38;
    product = tte_shift_jam(product, other - e);
    term = tte_shift_jam(term, e - other);
    e = e > other ? e : other;
    uint32_t sign = (a ^ b) & less;
    uint64_t sum = product + term;
    if (sign != (c & less)) {
        if (product == term)
            return 0.0f;
        sum = product > term ? product - term : term - product;
        sign = product > term ? sign : sign ^ less;
    }
    /* sum 2^(e - 150), first bit of the sum at 62: 1.f 2^(e - 88) */
    const int by = __builtin_clzll(sum) - 1;
    sum <<= by;
    e += 39 - by;
    if (e >= 0xff)
        return tte_from_bits((int32_t)(sign | infinite));
    if (e < 1) { /* a subnormal number has the exponent of the smallest normal one */
        sum = tte_shift_jam(sum, 1 - e);
        e = 1;
    }
    const uint64_t half = (uint64_t)1 << 38, rest = sum & (2 * half - 1);
    const uint32_t m = (uint32_t)(sum >> 39), up = rest > half || (rest == half && (m & 1));
    return tte_from_bits((int32_t)(sign | (((uint32_t)(e - 1) << 23) + m + up)));
}
#endif
