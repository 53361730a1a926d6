/* Hooks for Unicorn. One counts executed instructions, block by block: exact, and fast enough not to matter. The other finds
 * accesses that are not aligned.
 *
 * The counts are kept in a calling context tree: one node for a function per place that calls it in its caller's node.
 * Who calls is seen from the blocks alone. One that begins where a function begins is a call, from where the block
 * before it ends; one in the midst of another function than the current is a return to it. */
#include <stdint.h>
#include <stdlib.h>

#define SLOT_BITS 17 /* many more slots than a program has blocks */
#define SLOTS (1u << SLOT_BITS)
#define NODES (1u << 14)

typedef struct {
    uint32_t begin, end;
} function_t;

/* weight: see count_weigh. executed: since count_blocks was called. */
typedef struct {
    uint32_t address, bytes, instructions, weight;
    int32_t function;
    uint64_t executed;
} block_t;

/* function: its index, -1 for code that is in none. Nodes are numbered as they are first entered. Counts are of
 * instructions, and of weights. */
typedef struct {
    int32_t parent, child, sibling, function;
    uint32_t from;
    uint64_t counted[2], read[2];
} node_t;

typedef struct {
    block_t blocks[SLOTS];
    node_t nodes[NODES];
    int32_t used, current;
    uint32_t last_end;
    uint64_t total;
    const uint8_t *code;
    uint32_t origin, size;
    const function_t *functions;
    int32_t function_count;
    uint32_t unaligned;
    int (*stop)(void *engine);
} counter_t;

/* For a program in flash, with its functions in the order of their addresses. Both stay the caller's. stop: uc_emu_stop. */
counter_t *count_open(const uint8_t *flash, uint32_t origin, uint32_t size, const function_t *functions, int32_t n,
                      int (*stop)(void *)) {
    counter_t *c = calloc(1, sizeof *c);
    if (!c)
        return c;
    c->nodes[0] = (node_t){-1, -1, -1, -1, 0, {0}, {0}};
    c->used = 1;
    c->code = flash;
    c->origin = origin;
    c->size = size;
    c->functions = functions;
    c->function_count = n;
    c->stop = stop;
    return c;
}

void count_close(counter_t *c) {
    free(c);
}

/* A Thumb instruction has 4 bytes if its first halfword begins with 11101, 11110 or 11111, else 2. */
static uint32_t count_instructions(const counter_t *c, uint32_t address, uint32_t bytes) {
    uint32_t n = 0, at = address - c->origin;
    if (at >= c->size)
        return 0;
    for (uint32_t end = at + bytes; at < end; n++)
        at += (c->code[at + 1] >> 3) >= 0x1d ? 4 : 2;
    return n;
}

static int32_t find_function(const counter_t *c, uint32_t address) {
    int32_t low = 0, high = c->function_count;
    while (low < high) {
        const int32_t middle = (low + high) / 2;
        if (c->functions[middle].end <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low < c->function_count && c->functions[low].begin <= address ? low : -1;
}

/* The node of a call from the current one. Where the table is full, calls count as their caller's. */
static int32_t call(counter_t *c, int32_t function) {
    int32_t *link = &c->nodes[c->current].child;
    for (; *link >= 0; link = &c->nodes[*link].sibling)
        if (c->nodes[*link].function == function && c->nodes[*link].from == c->last_end)
            return *link;
    if (c->used == NODES)
        return c->current;
    c->nodes[c->used] = (node_t){c->current, -1, -1, function, c->last_end, {0}, {0}};
    return *link = c->used++;
}

/* The node in which a block runs that is not in the current node's function. */
static int32_t follow(counter_t *c, const block_t *block) {
    if (c->functions[block->function].begin != block->address)
        for (int32_t node = c->nodes[c->current].parent; node >= 0; node = c->nodes[node].parent)
            if (c->nodes[node].function == block->function)
                return node;
    return call(c, block->function);
}

static block_t *find_block(counter_t *c, uint32_t address, uint32_t bytes) {
    uint32_t slot = (address * 2654435761u ^ bytes * 40503u) >> (32 - SLOT_BITS);
    block_t *block = &c->blocks[slot];
    while (block->bytes != bytes || block->address != address) {
        if (block->bytes == 0) {
            *block = (block_t){address, bytes, count_instructions(c, address, bytes), 0, find_function(c, address), 0};
            break;
        }
        slot = (slot + 1) % SLOTS;
        block = &c->blocks[slot];
    }
    return block;
}

/* user: the counter */
void count_block(void *engine, uint64_t address, uint32_t bytes, void *user) {
    (void)engine;
    counter_t *const c = user;
    const uint32_t a = (uint32_t)address;
    block_t *const block = find_block(c, a, bytes);
    block->executed++;
    if (block->function >= 0 && block->function != c->nodes[c->current].function)
        c->current = follow(c, block);
    c->nodes[c->current].counted[0] += block->instructions;
    c->nodes[c->current].counted[1] += block->weight;
    c->total += block->instructions;
    c->last_end = a + bytes;
}

/* Stops the engine at an access that is not aligned. */
void check_access(void *engine, int type, uint64_t address, int bytes, int64_t value, void *counter) {
    counter_t *const c = counter;
    (void)type;
    (void)value;
    if (address & (uint64_t)(bytes - 1)) {
        c->unaligned = (uint32_t)address;
        c->stop(engine);
    }
}

/* The address of such an access, or 0. */
uint32_t count_unaligned(const counter_t *c) {
    return c->unaligned;
}

/* What an execution of this block adds to the second count, from now on; without, it adds nothing. */
void count_weigh(counter_t *c, uint32_t address, uint32_t bytes, uint32_t weight) {
    find_block(c, address, bytes)->weight = weight;
}

/* Which blocks were executed since the last call: as many as there are, of which to has the first room. */
int32_t count_blocks(counter_t *c, block_t *to, int32_t room) {
    int32_t n = 0;
    for (uint32_t i = 0; i < SLOTS; i++)
        if (c->blocks[i].executed) {
            if (n < room)
                to[n] = c->blocks[i];
            n++;
            c->blocks[i].executed = 0;
        }
    return n;
}

/* The total. Each node's "read" becomes what was counted in it since the last call. */
uint64_t count_read(counter_t *c) {
    for (int32_t i = 0; i < c->used; i++)
        for (int k = 0; k < 2; k++) {
            c->nodes[i].read[k] = c->nodes[i].counted[k];
            c->nodes[i].counted[k] = 0;
        }
    return c->total;
}

const node_t *count_nodes(const counter_t *c, int32_t *n) {
    *n = c->used;
    return c->nodes;
}
