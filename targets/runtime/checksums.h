/* SHA256SUMS beside the executable: whether every file is as it was when it was deployed. */
#ifndef CHECKSUMS_H
#define CHECKSUMS_H

/* Check every file that it lists; `count` gets how many those are. Where there is no SHA256SUMS,
 * nothing is checked. MODEL_OK, or MODEL_UNUSABLE with the message printed. */
int checksums_check(int *count);

#endif
