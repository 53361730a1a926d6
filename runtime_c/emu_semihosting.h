/* Arm semihosting: the debugger's file and console services, which emulators offer too. Emulator builds only. */
#ifndef EMU_SEMIHOSTING_H
#define EMU_SEMIHOSTING_H

#include <stddef.h>
#include <stdint.h>

static inline int emu_call(int operation, void *block) {
    register int r0 __asm__("r0") = operation;
    register void *r1 __asm__("r1") = block;
    __asm__ volatile("bkpt 0xAB" : "+r"(r0) : "r"(r1) : "memory");
    return r0;
}

/* mode 1: read bytes, 5: write bytes; returns a handle or -1 */
static inline int emu_open(const char *path, int mode) {
    uintptr_t block[3] = {(uintptr_t)path, (uintptr_t)mode, 0};
    while (path[block[2]])
        block[2]++;
    return emu_call(0x01, block);
}

static inline int emu_close(int handle) {
    uintptr_t block[1] = {(uintptr_t)handle};
    return emu_call(0x02, block);
}

static inline void emu_print(const char *text) {
    (void)emu_call(0x04, (void *)(uintptr_t)text);
}

/* Both return how many of the n bytes were not transferred. */
static inline size_t emu_write(int handle, const void *data, size_t n) {
    uintptr_t block[3] = {(uintptr_t)handle, (uintptr_t)data, n};
    return (size_t)emu_call(0x05, block);
}

static inline size_t emu_read(int handle, void *data, size_t n) {
    uintptr_t block[3] = {(uintptr_t)handle, (uintptr_t)data, n};
    return (size_t)emu_call(0x06, block);
}

static inline int emu_seek(int handle, size_t position) {
    uintptr_t block[2] = {(uintptr_t)handle, position};
    return emu_call(0x0a, block);
}

static inline void emu_exit(int code) {
    uintptr_t block[2] = {0x20026, (uintptr_t)code};
    for (;;)
        (void)emu_call(0x20, block);
}

#endif
