/* What the generated driver.c tells the runtime about kernels on a GPU, beside description.h. */
#ifndef LAUNCHES_H
#define LAUNCHES_H

#include <stdint.h>

/* Where an argument lies. */
enum place_kind { PLACE_ARENA, PLACE_WEIGHT, PLACE_INPUT, PLACE_OUTPUT };

struct place {
    enum place_kind kind;
    uint64_t at; /* bytes into the arena, or the number of the weight, input or output */
};

struct launch {
    const char *kernel;  /* NULL: copy `copied_bytes` from the second argument to the first */
    unsigned grid[3];    /* blocks */
    unsigned block[3];   /* threads */
    unsigned shared_bytes; /* dynamic shared memory of a block */
    unsigned counters;     /* uint32 that are 0 before and after; not 0: the last argument */
    unsigned overlaps; /* not 0: it may start before the kernel before it ends, and waits itself */
    int first_place, place_count;
    uint64_t copied_bytes;
};

/* `description.call_count` of them. */
extern const struct launch launches[];

extern const struct place places[];

/* Machine code for `kernel_architecture`, such as "sm_90": cubins which hold every kernel once. */
struct kernel_image {
    const void *data;
    uint64_t bytes;
};
extern const struct kernel_image kernel_images[];
extern const int kernel_image_count;
extern const char kernel_architecture[];
extern const char kernel_compiler[]; /* such as "nvrtc 12.6.85" */

#endif
