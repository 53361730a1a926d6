/* Hooks for Unicorn: one counts executed instructions, block by block, exactly; one finds accesses that are not aligned. */
#include <stdint.h>

#define SLOTS (1u << 14)

typedef struct {
    uint32_t address, bytes, instructions;
} block_t;

static block_t blocks[SLOTS];
static uint64_t total;
static const uint8_t *code;
static uint32_t origin, size, unaligned;

void count_reset(const uint8_t *flash, uint32_t flash_origin, uint32_t flash_size) {
    for (uint32_t i = 0; i < SLOTS; i++)
        blocks[i] = (block_t){0, 0, 0};
    total = unaligned = 0;
    code = flash;
    origin = flash_origin;
    size = flash_size;
}

/* A Thumb instruction has 4 bytes if its first halfword begins with 11101, 11110 or 11111, else 2. */
static uint32_t count_instructions(uint32_t address, uint32_t bytes) {
    uint32_t n = 0, at = address - origin;
    if (at >= size)
        return 0;
    for (uint32_t end = at + bytes; at < end; n++)
        at += (code[at + 1] >> 3) >= 0x1d ? 4 : 2;
    return n;
}

void count_block(void *engine, uint64_t address, uint32_t bytes, void *user) {
    (void)engine;
    (void)user;
    const uint32_t a = (uint32_t)address;
    uint32_t slot = (a * 2654435761u ^ bytes * 40503u) >> 18;
    while (blocks[slot].bytes != bytes || blocks[slot].address != a) {
        if (blocks[slot].bytes == 0) {
            blocks[slot] = (block_t){a, bytes, count_instructions(a, bytes)};
            break;
        }
        slot = (slot + 1) % SLOTS;
    }
    total += blocks[slot].instructions;
}

/* stop: uc_emu_stop, which is called with the engine. */
void check_access(void *engine, int type, uint64_t address, int bytes, int64_t value, void *stop) {
    (void)type;
    (void)value;
    if (address & (uint64_t)(bytes - 1)) {
        unaligned = (uint32_t)address;
        ((int (*)(void *))stop)(engine);
    }
}

/* The address of such an access, or 0. */
uint32_t find_unaligned(void) {
    return unaligned;
}

uint64_t count_total(void) {
    return total;
}
