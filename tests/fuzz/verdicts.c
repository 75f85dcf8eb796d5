/* Opens the weights files that stdin names: the CRC-32 of every tensor, or why it is refused. */
#include <stdbool.h>
#include <stdio.h>
#include <string.h>

#include "crc32.h"
#include "error.h"
#include "weights.h"

int main(void)
{
    char path[512];
    while (fgets(path, sizeof path, stdin) != NULL) {
        path[strcspn(path, "\n")] = '\0';
        struct weights weights;
        bool is_open = weights_open(&weights, path) == 0;
        if (!is_open || weights_decode(&weights, NULL) != 0) {
            puts(error_text());
        } else {
            for (uint32_t i = 0; i < weights.count; i++) {
                const struct weight *tensor = &weights.tensors[i];
                printf("%08x ", (unsigned)crc32_update(0, tensor->data, (size_t)tensor->bytes));
            }
            puts("accepted");
        }
        if (is_open)
            weights_close(&weights);
    }
    return 0;
}
