/* What compilers call where a program has no library. */
#include <stddef.h>

void *memcpy(void *to, const void *from, size_t n) {
    for (size_t i = 0; i < n; i++)
        ((volatile unsigned char *)to)[i] = ((const unsigned char *)from)[i];
    return to;
}

void *memset(void *to, int value, size_t n) {
    for (size_t i = 0; i < n; i++)
        ((volatile unsigned char *)to)[i] = (unsigned char)value;
    return to;
}
