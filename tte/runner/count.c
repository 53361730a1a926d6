/* Counts executed instructions, block by block, for a Unicorn hook: exact, and fast enough not to matter.
 *
 * The counts are kept in a calling context tree: one node for a function per place that calls it in its caller's node.
 * Who calls is seen from the blocks alone. One that begins where a function begins is a call, from where the block
 * before it ends; one in the midst of another function than the current is a return to it. */
#include <stdint.h>

#define SLOTS (1u << 14)
#define NODES (1u << 14)

typedef struct {
    uint32_t begin, end;
} function_t;

typedef struct {
    uint32_t address, bytes, instructions;
    int32_t function;
} block_t;

/* function: its index, -1 for code that is in none. Nodes are numbered as they are first entered. */
typedef struct {
    int32_t parent, child, sibling, function;
    uint32_t from;
    uint64_t counted, read;
} node_t;

static block_t blocks[SLOTS];
static node_t nodes[NODES];
static int32_t used, current;
static uint32_t last_end;
static uint64_t total;
static const uint8_t *code;
static uint32_t origin, size;
static const function_t *functions;
static int32_t function_count;

/* The functions in the order of their addresses; they stay where they are. */
void count_reset(const uint8_t *flash, uint32_t flash_origin, uint32_t flash_size, const function_t *table, int32_t n) {
    for (uint32_t i = 0; i < SLOTS; i++)
        blocks[i] = (block_t){0, 0, 0, -1};
    nodes[0] = (node_t){-1, -1, -1, -1, 0, 0, 0};
    used = 1;
    current = 0;
    total = 0;
    code = flash;
    origin = flash_origin;
    size = flash_size;
    functions = table;
    function_count = n;
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

static int32_t find_function(uint32_t address) {
    int32_t low = 0, high = function_count;
    while (low < high) {
        const int32_t middle = (low + high) / 2;
        if (functions[middle].end <= address)
            low = middle + 1;
        else
            high = middle;
    }
    return low < function_count && functions[low].begin <= address ? low : -1;
}

/* The node of a call from the current one. Where the table is full, calls count as their caller's. */
static int32_t call(int32_t function) {
    int32_t *link = &nodes[current].child;
    for (; *link >= 0; link = &nodes[*link].sibling)
        if (nodes[*link].function == function && nodes[*link].from == last_end)
            return *link;
    if (used == NODES)
        return current;
    nodes[used] = (node_t){current, -1, -1, function, last_end, 0, 0};
    return *link = used++;
}

/* The node in which a block runs that is not in the current node's function. */
static int32_t follow(const block_t *block) {
    if (functions[block->function].begin != block->address)
        for (int32_t node = nodes[current].parent; node >= 0; node = nodes[node].parent)
            if (nodes[node].function == block->function)
                return node;
    return call(block->function);
}

void count_block(void *engine, uint64_t address, uint32_t bytes, void *user) {
    (void)engine;
    (void)user;
    const uint32_t a = (uint32_t)address;
    uint32_t slot = (a * 2654435761u ^ bytes * 40503u) >> 18;
    while (blocks[slot].bytes != bytes || blocks[slot].address != a) {
        if (blocks[slot].bytes == 0) {
            blocks[slot] = (block_t){a, bytes, count_instructions(a, bytes), find_function(a)};
            break;
        }
        slot = (slot + 1) % SLOTS;
    }
    if (blocks[slot].function >= 0 && blocks[slot].function != nodes[current].function)
        current = follow(&blocks[slot]);
    nodes[current].counted += blocks[slot].instructions;
    total += blocks[slot].instructions;
    last_end = a + bytes;
}

/* The total. Each node's ``read`` becomes what was counted in it since the last call. */
uint64_t count_read(void) {
    for (int32_t i = 0; i < used; i++) {
        nodes[i].read = nodes[i].counted;
        nodes[i].counted = 0;
    }
    return total;
}

const node_t *count_nodes(int32_t *n) {
    *n = used;
    return nodes;
}
