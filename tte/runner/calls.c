/* Calls functions as the file "commands" says, and writes to the file "results" what each leaves.
 *
 *   command                                                   result
 *   function, 28 arguments, n, n bytes of memory              flags, ticks, n bytes of memory
 *
 * All numbers are 4 bytes, little-endian. Of the arguments those from ``FROM`` on are places in that memory; flags: 1 where
 * registers are lost that a callee restores. */
#include "emu_semihosting.h"

#define COUNTER (*(volatile uint32_t *)EMU_COUNTER)
#define FROM 0x80000000u

#define MOST 28 /* arguments */

extern void *const functions[];

static uint8_t memory[2 << 20] __attribute__((aligned(8)));

/* The function in a[MOST] by the arguments in a[0] and so on; those that it does not take do no harm. */
__attribute__((naked)) static uint32_t call(__attribute__((unused)) const uint32_t *a) {
    __asm__ volatile(
        "push {r4-r11, lr}\n"
        "vpush {d8-d15}\n"
        "sub sp, #100\n"
        "add r1, r0, #16\n"
        "mov r2, sp\n"
        "add r3, r0, #112\n"
        "1: ldr r12, [r1], #4\n"
        "str r12, [r2], #4\n"
        "cmp r1, r3\n"
        "bne 1b\n"
        "ldr r12, [r1]\n"
#define SET(r, s, t) "mov " #r ", #" #s "\n vmov s" #s ", " #r "\n vmov s" #t ", " #r "\n"
        SET(r4, 16, 24) SET(r5, 17, 25) SET(r6, 18, 26) SET(r7, 19, 27)
        SET(r8, 20, 28) SET(r9, 21, 29) SET(r10, 22, 30) SET(r11, 23, 31)
        "ldm r0, {r0-r3}\n"
        "blx r12\n"
        "mov r0, #0\n"
#define GET(r, s, t) \
    "vmov r1, s" #s "\n vmov r2, s" #t "\n eor r1, " #r "\n eor r2, " #r "\n eor " #r ", #" #s "\n" \
    "orr r0, r1\n orr r0, r2\n orr r0, " #r "\n"
        GET(r4, 16, 24) GET(r5, 17, 25) GET(r6, 18, 26) GET(r7, 19, 27)
        GET(r8, 20, 28) GET(r9, 21, 29) GET(r10, 22, 30) GET(r11, 23, 31)
        "add sp, #100\n"
        "vpop {d8-d15}\n"
        "pop {r4-r11, pc}\n");
}

int main(void) {
    const int commands = emu_open("commands", 1), results = emu_open("results", 5);
    for (uint32_t command[MOST + 2]; emu_read(commands, command, sizeof command) == 0;) {
        (void)emu_read(commands, memory, command[MOST + 1]);
        uint32_t a[MOST + 1];
        for (int i = 0; i < MOST; i++)
            a[i] = command[1 + i] >= FROM ? (uint32_t)(uintptr_t)memory + (command[1 + i] - FROM) : command[1 + i];
        a[MOST] = (uint32_t)(uintptr_t)functions[command[0]];
        uint32_t found[2] = {0, COUNTER};
        found[0] = call(a) != 0;
        found[1] = COUNTER - found[1];
        (void)emu_write(results, found, sizeof found);
        (void)emu_write(results, memory, command[MOST + 1]);
    }
    return 0;
}
