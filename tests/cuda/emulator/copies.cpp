// Copies by cp.async. They write nothing before their thread waits for them, or everything at once:
// by turns, from block to block, so that both a missing wait and a buffer that is filled while
// another thread still reads it come out wrong.
#include <stdlib.h>
#include <string.h>

#include "scheduler.h"

namespace emulator {

static void arrive(const Copy &copy)
{
    if (copy.global)
        memcpy(copy.shared, copy.global, copy.bytes);
    else
        memset(copy.shared, 0, copy.bytes);
}

void copy_later(void *shared, const void *global, unsigned bytes, bool keep)
{
    Fiber &fiber = *(Fiber *)current;
    check_shared(*fiber.worker, shared, bytes, "cp.async");
    if ((uintptr_t)global % bytes)
        fail("cp.async of %u bytes from %p, which is not aligned", bytes, global);
    Copies &copies = fiber.copies;
    Copy copy = {shared, keep ? global : nullptr, bytes, copies.group, !fiber.worker->copies_wait};
    note_copy_started(copy);
    if (copy.arrived)
        arrive(copy);
    if (copies.count == copies.capacity) {
        copies.capacity = copies.capacity ? 2 * copies.capacity : 64;
        copies.list = (Copy *)realloc(copies.list, copies.capacity * sizeof(Copy));
        if (!copies.list)
            fail("out of memory");
    }
    copies.list[copies.count++] = copy;
}

void commit_copies()
{
    ++((Fiber *)current)->copies.group;
}

void wait_for_copies(unsigned groups_left)
{
    Copies &copies = ((Fiber *)current)->copies;
    while (copies.first < copies.count &&
           copies.list[copies.first].group + groups_left < copies.group) {
        const Copy &copy = copies.list[copies.first++];
        if (!copy.arrived)
            arrive(copy);
        note_copy_arrived(copy);
    }
    if (copies.first == copies.count)
        copies.first = copies.count = 0;
}

} // namespace emulator
