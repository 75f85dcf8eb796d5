#define _POSIX_C_SOURCE 200809L
#define _FILE_OFFSET_BITS 64

#include "checksums.h"

#include <errno.h>
#include <fcntl.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

#include "beside.h"
#include "commands.h"
#include "model.h"
#include "sha256.h"

#define LIST "SHA256SUMS"
#define HEX_CHARS (2 * SHA256_BYTES)
#define PATH_BYTES 256
#define CHUNK_BYTES 65536
#define DEPLOY_AGAIN "Deploy the bundle again."

static const char PLAIN[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-/";

/* What the list has to name. */
static const char *const NEEDED[] = {"model", "weights.epw"};
enum { NEEDED_COUNT = sizeof NEEDED / sizeof *NEEDED };

/* A relative path of plain characters that stays in its folder. */
static bool is_plain(const char *path)
{
    if (path[strspn(path, PLAIN)] != '\0')
        return false;
    for (const char *part = path;; part++) {
        size_t length = strcspn(part, "/");
        if (length == 0 || (part[0] == '.' && (length == 1 || (length == 2 && part[1] == '.'))))
            return false;
        part += length;
        if (*part == '\0')
            return true;
    }
}

/* Take a line apart: 64 lowercase hex digits, two spaces, a path, a line break. The line becomes
 * the digits. The path, or NULL. */
static const char *split(char *line)
{
    size_t length = strlen(line);
    if (length < HEX_CHARS + 4 || line[length - 1] != '\n')
        return NULL;
    line[length - 1] = '\0';
    if (strspn(line, "0123456789abcdef") != HEX_CHARS || strncmp(line + HEX_CHARS, "  ", 2) != 0)
        return NULL;
    line[HEX_CHARS] = '\0';
    return is_plain(line + HEX_CHARS + 2) ? line + HEX_CHARS + 2 : NULL;
}

static void to_hex(const uint8_t digest[SHA256_BYTES], char hex[HEX_CHARS + 1])
{
    for (int i = 0; i < SHA256_BYTES; i++)
        snprintf(hex + 2 * i, 3, "%02x", (unsigned)digest[i]);
}

/* Hash a plain file. 0, or -1 with errno set; ELOOP where it is a link, EINVAL where it is a folder,
 * a pipe or a device. */
static int hash_file(const char *path, char hex[HEX_CHARS + 1])
{
    static uint8_t bytes[CHUNK_BYTES];
    uint8_t digest[SHA256_BYTES];
    struct sha256 hash;
    struct stat status;
    int file = open(path, O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK);
    if (file < 0)
        return -1;
    if (fstat(file, &status) != 0 || !S_ISREG(status.st_mode)) {
        close(file);
        errno = EINVAL;
        return -1;
    }
    sha256_begin(&hash);
    ssize_t got = 1;
    while (got > 0) {
        got = read(file, bytes, sizeof bytes);
        if (got > 0)
            sha256_update(&hash, bytes, (size_t)got);
    }
    int failure = errno;
    close(file);
    errno = failure;
    if (got < 0)
        return -1;
    sha256_end(&hash, digest);
    to_hex(digest, hex);
    return 0;
}

/* Check one file beside the executable. */
static int check_file(const char *name, const char *wanted)
{
    char path[BESIDE_BYTES], got[HEX_CHARS + 1];
    if (beside_executable(path, name) != 0)
        return complain("the path of %s is too long. " DEPLOY_AGAIN, name);
    if (hash_file(path, got) != 0)
        return complain("%s, which " LIST " lists: %s. " DEPLOY_AGAIN, path,
                        errno == EINVAL || errno == ELOOP ? "not a plain file" : strerror(errno));
    if (strcmp(got, wanted) != 0)
        return complain("%s has other bytes than " LIST " says. " DEPLOY_AGAIN, path);
    return MODEL_OK;
}

/* Check the files of an open list. The order and the needed names see to it that a line which was
 * lost, repeated or moved is noticed. */
static int check_list(FILE *list, const char *list_path, int *count)
{
    char line[HEX_CHARS + 2 + PATH_BYTES + 1], before[PATH_BYTES] = "";
    bool found[NEEDED_COUNT] = {false};
    while (fgets(line, sizeof line, list) != NULL) {
        const char *path = split(line);
        ++*count;
        if (path == NULL)
            return complain("%s: line %d is no SHA-256 with a plain relative path. " DEPLOY_AGAIN,
                            list_path, *count);
        if (strcmp(before, path) >= 0)
            return complain("%s: line %d, %s, is not in order. " DEPLOY_AGAIN, list_path, *count,
                            path);
        strcpy(before, path);
        int code = check_file(path, line);
        if (code != MODEL_OK)
            return code;
        for (int i = 0; i < NEEDED_COUNT; i++)
            found[i] = found[i] || strcmp(path, NEEDED[i]) == 0;
    }
    if (ferror(list))
        return complain("%s: %s. " DEPLOY_AGAIN, list_path, strerror(errno));
    for (int i = 0; i < NEEDED_COUNT; i++)
        if (!found[i])
            return complain("%s does not list %s. " DEPLOY_AGAIN, list_path, NEEDED[i]);
    return MODEL_OK;
}

int checksums_check(int *count)
{
    char path[BESIDE_BYTES];
    *count = 0;
    if (beside_executable(path, LIST) != 0)
        return complain("%s", "the path of the executable is unknown or too long");
    FILE *list = fopen(path, "r");
    if (list == NULL)
        return errno == ENOENT ? MODEL_OK
                               : complain("%s: %s. " DEPLOY_AGAIN, path, strerror(errno));
    int code = check_list(list, path, count);
    fclose(list);
    return code;
}
