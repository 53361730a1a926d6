/* Start-up for any Cortex-M, for emulators: vectors, memory, stack paint, main. */
#include "emu_semihosting.h"

extern uint32_t emu_data_load[], emu_data_start[], emu_data_end[], emu_bss_start[], emu_bss_end[];
extern uint32_t emu_stack_start[], emu_stack_end[];
int main(void);
void emu_reset(void);

#define REGISTER(address) (*(volatile uint32_t *)(address))
#define PAINT 0xc5c5c5c5u

static void fault(void) {
    emu_print("fault\n");
    emu_exit(99);
}

__attribute__((used, section(".vectors"))) const void *const emu_vectors[16] = {
    emu_stack_end, (const void *)emu_reset, (const void *)fault, (const void *)fault, (const void *)fault,
    (const void *)fault, (const void *)fault, 0, 0, 0, 0, (const void *)fault, (const void *)fault, 0,
    (const void *)fault, (const void *)fault};

__attribute__((noreturn)) void emu_reset(void) {
#if defined(__ARM_FP) || defined(__ARM_FEATURE_MVE)
    REGISTER(0xe000ed88) |= 0xfu << 20; /* CPACR: FPU and vector unit are on */
    __asm__ volatile("dsb\n isb" ::: "memory");
#endif
    for (uint32_t *to = emu_data_start, *from = emu_data_load; to < emu_data_end;)
        *to++ = *from++;
    for (uint32_t *to = emu_bss_start; to < emu_bss_end;)
        *to++ = 0;
    uint32_t *top = __builtin_frame_address(0);
    for (uint32_t *to = emu_stack_start; to < top - 16;)
        *to++ = PAINT;
    emu_exit(main());
    __builtin_unreachable();
}

/* Bytes of stack that were ever used. */
size_t emu_stack_high_water(void) {
    const uint32_t *at = emu_stack_start;
    while (at < emu_stack_end && *at == PAINT)
        at++;
    return (size_t)(emu_stack_end - at) * 4;
}
