/* Carries out commands that arrive in the file "commands" and writes each result to the file "results".
 * Compiled with -DMODEL_PREFIX=<name>_ -DMODEL_PREFIX_UPPER=<NAME>_ -DMODEL_HEADER="<name>.h": no name is a macro then.
 *
 *   command               result
 *   I                     status                                           init
 *   L rate                -                                                set the learning rate
 *   T target input        status, loss, predicted, confidence, count       training step
 *   E target input        the same                                         evaluation
 *   F input               status, count, output                            inference
 *   S                     size, state, status                              save
 *   D size                status                                           load from the file "state"
 *   R                     status                                           reset
 *   X                     status                                           self-test (with -DEMU_SELFTEST)
 *   W                     stack bytes, arena bytes                         high-water marks
 *   Q                     -                                                quit
 *
 * All numbers are 4 bytes, little-endian. count: instructions, or 0 where the machine has no counter for them. */
#include MODEL_HEADER
#include "emu_semihosting.h"

#define JOIN2(a, b) a##b
#define JOIN(a, b) JOIN2(a, b)
#define API(name) JOIN(MODEL_PREFIX, name)
#define SIZE(name) JOIN(MODEL_PREFIX_UPPER, name)
#define ARENA_PAINT 0xa5

size_t emu_stack_high_water(void);
extern uint8_t emu_arena_start[], emu_arena_end[];

static int commands, results;
#if SIZE(INPUT_ROWS)
#define CALL(name) API(name##_rows)
#define INPUT receive_row, 0
#define INPUT_TYPES API(row_fn), void *
#else
#define CALL(name) API(name)
#define INPUT x
#define INPUT_TYPES const API(input_t) *
#if SIZE(INPUT_IN_ARENA)
#define x API(input)()
#else
static API(input_t) x[SIZE(INPUT_SIZE)];
#endif
#endif
static API(target_t) target[SIZE(TARGET_SIZE) > 0 ? SIZE(TARGET_SIZE) : 1];
static API(output_t) y[SIZE(OUTPUT_SIZE)];
#if SIZE(ARENA_EXTERN)
static uint8_t arena[SIZE(ARENA_BYTES)] __attribute__((aligned(SIZE(ARENA_ALIGN)), section(".bss.emu_arena")));
#define INIT() API(init)(arena, sizeof arena)
#else
#define INIT() API(init)()
#endif

/* A pipe may give less than was asked for; nothing at all means that the other side is gone. */
static void receive(void *data, size_t n) {
    while (n > 0) {
        const size_t left = emu_read(commands, data, n);
        if (left >= n)
            emu_exit(3);
        data = (uint8_t *)data + (n - left);
        n = left;
    }
}

#if SIZE(INPUT_ROWS)
static size_t left; /* bytes of the input that are still to come */

static int receive_row(void *ctx, uint32_t row, API(input_t) * to) {
    (void)ctx;
    (void)row;
    receive(to, sizeof *to * SIZE(ROW_SIZE));
    left -= sizeof *to * SIZE(ROW_SIZE);
    return 0;
}

static void begin_input(void) {
    left = SIZE(INPUT_BYTES);
}

/* A call that was refused has asked for no row. */
static void end_input(void) {
    for (uint8_t skipped; left > 0; left--)
        receive(&skipped, 1);
}
#else
static void begin_input(void) {
    receive(x, SIZE(INPUT_BYTES));
}

static void end_input(void) {
}
#endif

static int send(void *ctx, const void *data, size_t n) {
    (void)ctx;
    return n > 0 && emu_write(results, data, n) != 0;
}

static void send_u32(uint32_t v) {
    (void)send(0, &v, sizeof v);
}

static int read_state(void *ctx, size_t offset, void *data, size_t n) {
    const int handle = *(int *)ctx;
    return emu_seek(handle, offset) != 0 || emu_read(handle, data, n) != 0;
}

/* Where differences give executed instructions, as the runner scales them. */
#define REGISTER(address) (*(volatile uint32_t *)(address))
#if !defined(EMU_COUNTER)
static void start_counter(void) {
}
static uint32_t count(void) {
    return 0;
}
#elif EMU_COUNTER == 0x40008540u /* timer 0 of the nRF51: started with 32 bits at full speed, and captured to be read */
static void start_counter(void) {
    REGISTER(0x40008508u) = 3;
    REGISTER(0x40008510u) = 0;
    REGISTER(0x40008000u) = 1;
}
static uint32_t count(void) {
    REGISTER(0x40008040u) = 1;
    return REGISTER(EMU_COUNTER);
}
#else /* FPGAIO of the MPS boards: runs from the start */
static void start_counter(void) {
}
static uint32_t count(void) {
    return REGISTER(EMU_COUNTER);
}
#endif

static void run_step(int (*step)(INPUT_TYPES, const API(target_t) *, API(result_t) *)) {
    API(result_t) result = {0.0f, -1, 0.0f};
    if (SIZE(TARGET_SIZE) > 0)
        receive(target, sizeof target[0] * SIZE(TARGET_SIZE));
    begin_input();
    const uint32_t before = count();
    const int status = step(INPUT, target, &result);
    const uint32_t ticks = count() - before;
    end_input();
    send_u32((uint32_t)status);
    (void)send(0, &result, sizeof result);
    send_u32(ticks);
}

int main(void) {
    commands = emu_open("commands", 1);
    results = emu_open("results", 5);
    if (commands < 0 || results < 0)
        return 2;
    for (uint8_t *at = emu_arena_start; at < emu_arena_end; at++)
        *at = ARENA_PAINT;
    start_counter();
    for (;;) {
        uint8_t command;
        receive(&command, 1);
        switch (command) {
        case 'I':
            send_u32((uint32_t)INIT());
            break;
        case 'L': {
            float rate;
            receive(&rate, sizeof rate);
            API(set_learning_rate)(rate);
            break;
        }
        case 'T':
            run_step(CALL(train_step));
            break;
        case 'E':
            run_step(CALL(evaluate));
            break;
        case 'F': {
            begin_input();
            const uint32_t before = count();
            const int status = CALL(infer)(INPUT, y);
            const uint32_t ticks = count() - before;
            end_input();
            send_u32((uint32_t)status);
            send_u32(ticks);
            (void)send(0, y, sizeof y);
            break;
        }
        case 'S':
            send_u32((uint32_t)API(state_size)());
            send_u32((uint32_t)API(state_save)(send, 0));
            break;
        case 'D': {
            uint32_t size;
            receive(&size, sizeof size);
            int handle = emu_open("state", 1);
            send_u32((uint32_t)API(state_load)(read_state, &handle, size));
            (void)emu_close(handle);
            break;
        }
        case 'R':
            send_u32((uint32_t)API(state_reset)());
            break;
#ifdef EMU_SELFTEST
        case 'X':
            send_u32((uint32_t)API(selftest)());
            break;
#endif
        case 'W': {
            const uint8_t *top = emu_arena_end;
            while (top > emu_arena_start && top[-1] == ARENA_PAINT)
                top--;
            send_u32((uint32_t)emu_stack_high_water());
            send_u32((uint32_t)(top - emu_arena_start));
            break;
        }
        case 'Q':
            return 0;
        default:
            return 4;
        }
    }
}
