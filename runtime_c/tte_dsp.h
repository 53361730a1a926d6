/* Two operations of 16 bits at a time, and products of floats, on cores with the DSP extension (Cortex-M4, M7, M33, M55):
 * build.h sees to it that they have an FPU. */
#ifndef TTE_DSP_H
#define TTE_DSP_H

#include <stdint.h>

#if defined(__ARM_FEATURE_DSP) && !defined(TTE_PORTABLE)
#define TTE_DSP 1
#else
#define TTE_DSP 0
#endif
/* Vectors of 16 bytes (Cortex-M55). Of floats only what rounds sums, where subnormal numbers round to 0 anyway. */
#if TTE_DSP && defined(__ARM_FEATURE_MVE)
#define TTE_MVE 1
#else
#define TTE_MVE 0
#endif

/* Before a loop that is worth it: other loops are not unrolled. */
#ifdef __OPTIMIZE_SIZE__
#define TTE_UNROLL(n)
#else
#define TTE_PRAGMA(words) _Pragma(#words)
#define TTE_UNROLL(n) TTE_PRAGMA(GCC unroll n)
#endif

#if TTE_DSP
#define TTE_INLINE static inline __attribute__((always_inline, unused))

TTE_INLINE uint32_t tte_load4(const void *from) {
    uint32_t word;
    __builtin_memcpy(&word, from, 4);
    return word;
}

TTE_INLINE void tte_store4(void *to, uint32_t word) {
    __builtin_memcpy(to, &word, 4);
}

/* Where element k of row q (0 or 1) lies in the halfwords that widen makes. */
TTE_INLINE int tte_lane(int k, int q) {
    return (k / 4 * 4 + q * 2 + (k & 1)) * 2 + ((k >> 1) & 1);
}

TTE_INLINE void tte_copy(int8_t *to, const int8_t *from, int n) {
#if TTE_MVE
    __asm__ volatile("wlstp.8 lr, %2, 2f\n"
                     "1:\n"
                     "vldrb.8 q0, [%1], #16\n"
                     "vstrb.8 q0, [%0], #16\n"
                     "letp lr, 1b\n"
                     "2:"
                     : "+r"(to), "+r"(from)
                     : "r"(n)
                     : "lr", "q0", "memory");
#else
    TTE_UNROLL(4)
    for (; n >= 4; n -= 4, to += 4, from += 4)
        tte_store4(to, tte_load4(from));
    TTE_UNROLL(3)
    for (; n > 0; n--)
        *to++ = *from++;
#endif
}

TTE_INLINE void tte_fill(int8_t *to, int value, int n) {
#if TTE_MVE
    __asm__ volatile("vdup.8 q0, %1\n"
                     "wlstp.8 lr, %2, 2f\n"
                     "1:\n"
                     "vstrb.8 q0, [%0], #16\n"
                     "letp lr, 1b\n"
                     "2:"
                     : "+r"(to)
                     : "r"(value), "r"(n)
                     : "lr", "q0", "memory");
#else
    for (; n > 0; n--)
        *to++ = (int8_t)value;
#endif
}

TTE_INLINE void tte_clear(uint32_t *to, int n) {
#pragma GCC unroll 1
    for (; n > 0; n--)
        *to++ = 0;
}

/* Of n elements only those whose bit is set: the others become 0. */
TTE_INLINE void tte_keep(int8_t *y, const uint8_t *bits, int n) {
    for (; n >= 8; n -= 8, y += 8, bits++) {
        const uint32_t low = (*bits & 15u) * 0x204081u & 0x1010101u, high = (*bits >> 4) * 0x204081u & 0x1010101u;
        tte_store4(y, tte_load4(y) & low * 255u);
        tte_store4(y + 4, tte_load4(y + 4) & high * 255u);
    }
    for (int i = 0; i < n; i++)
        y[i] = (int8_t)(*bits >> i & 1 ? y[i] : 0);
}

/* Rows of floats times a panel: see fpu/product. What ends with _next is the distance in bytes to the next row. */
typedef struct {
    const float *a;
    int32_t a_next;
    const float *start; /* what the sums begin with */
    int32_t start_next;
    float *y;
    int32_t y_next;
    const uint8_t *mask; /* which results are kept, or none */
    int32_t mask_next;
    const float *scale; /* of the results by column, or none */
    const float *panel;
    const int32_t *lines; /* by line: bytes from a row's begin, bytes from the panel's begin */
    int32_t count;        /* of lines */
    int32_t k;            /* products of a line */
    int32_t rows;
    int32_t a_step; /* of fpu/depthwise, from product to product: bytes from the end of n elements to the next */
    int32_t panel_step;
} tte_product;
#endif

#endif
