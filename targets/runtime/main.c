#include <errno.h>
#include <getopt.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "commands.h"
#include "model.h"

static const char USAGE[] =
    "usage: model COMMAND [OPTION...]\n"
    "\n"
    "commands:\n"
    "  --info         describe the model and whether this machine can run it\n"
    "  --selftest     check the files that SHA256SUMS lists, where there is one, and compare the\n"
    "                 answers to golden/N.in with golden/N.out\n"
    "  --bench        measure the time of single inferences; where the board was disturbed,\n"
    "                 measure again, three times at most, or refuse the figures\n"
    "  --profile      measure the time of every kernel\n"
    "  --run IN OUT   answer samples: the raw little-endian bytes of all inputs, one sample\n"
    "                 behind the other; OUT gets the outputs likewise; - is stdin or stdout\n"
    "  --help         print this text\n"
    "\n"
    "options:\n"
    "  --weights PATH      weights file, weights.epw beside the executable by default\n"
    "  --cache PATH        keep coded weights decoded in this file, for later starts\n"
    "  --threads N         threads, by default as many as the target has cores\n"
    "  --cores LIST        run on these cores, one thread each: big, little, or 0,2-3\n"
    "  --runs N            measure at least N runs (100)\n"
    "  --seconds S         measure at least S seconds (1)\n"
    "  --warmup S          warm up until times are steady, S seconds at most (3)\n"
    "  --anyway            measure once, and print the figures whatever disturbed them\n"
    "  --sustained MINUTES afterwards run so long without a pause, and print the curve\n"
    "  --mlperf            measure by the single-stream rule of MLPerf, too: ten minutes\n"
    "\n"
    "exit codes: 0 right, 1 failed, 2 wrong use, file or memory, 3 the wrong CPU or GPU\n";

int complain(const char *format, ...)
{
    va_list arguments;
    fputs("model: ", stderr);
    va_start(arguments, format);
    vfprintf(stderr, format, arguments);
    va_end(arguments);
    fputc('\n', stderr);
    return MODEL_UNUSABLE;
}

int open_model(const struct options *options)
{
    int code = MODEL_OK;
    if (options->threads > 0)
        code = model_set_threads(options->threads);
    if (code == MODEL_OK && options->cores != NULL)
        code = model_set_cores(options->cores);
    if (code == MODEL_OK)
        code = model_set_cache(options->cache);
    if (code == MODEL_OK)
        code = model_open(options->weights);
    if (code != MODEL_OK || model_last_error()[0] != '\0')
        complain("%s", model_last_error());
    return code;
}

/* Parse a number of an option. 0, or -1 with a message printed. */
static int parse_number(const char *option, const char *text, double low, double high,
                        double *number)
{
    char *end;
    errno = 0;
    *number = strtod(text, &end);
    if (errno == 0 && end != text && *end == '\0' && *number >= low && *number <= high)
        return 0;
    complain("--%s must be a number from %g to %g, not '%s'", option, low, high, text);
    return -1;
}

static int parse_count(const char *option, const char *text, long high, long *count)
{
    char *end;
    errno = 0;
    *count = strtol(text, &end, 10);
    if (errno == 0 && end != text && *end == '\0' && *count >= 1 && *count <= high)
        return 0;
    complain("--%s must be a whole number from 1 to %ld, not '%s'", option, high, text);
    return -1;
}

/* Parse the options; `command` gets the letter of the command. 0, or -1 with a message printed. */
static int parse(int count, char **arguments, struct options *options, int *command)
{
    static const struct option LONG[] = {
        {"info", no_argument, NULL, 'i'},
        {"selftest", no_argument, NULL, 's'},
        {"bench", no_argument, NULL, 'b'},
        {"profile", no_argument, NULL, 'p'},
        {"run", no_argument, NULL, 'r'},
        {"help", no_argument, NULL, 'h'},
        {"weights", required_argument, NULL, 'W'},
        {"cache", required_argument, NULL, 'D'},
        {"threads", required_argument, NULL, 'T'},
        {"cores", required_argument, NULL, 'C'},
        {"runs", required_argument, NULL, 'R'},
        {"seconds", required_argument, NULL, 'S'},
        {"warmup", required_argument, NULL, 'U'},
        {"anyway", no_argument, NULL, 'A'},
        {"mlperf", no_argument, NULL, 'M'},
        {"sustained", required_argument, NULL, 'L'},
        {NULL, 0, NULL, 0},
    };
    int letter;
    int failed = 0;
    long threads = 0;
    *command = 0;
    while (!failed && (letter = getopt_long(count, arguments, "", LONG, NULL)) != -1) {
        switch (letter) {
        case 'W': options->weights = optarg; break;
        case 'D': options->cache = optarg; break;
        case 'T': failed = parse_count("threads", optarg, MODEL_MAX_THREADS, &threads); break;
        case 'C': options->cores = optarg; break;
        case 'R': failed = parse_count("runs", optarg, LONG_MAX, &options->runs); break;
        case 'S': failed = parse_number("seconds", optarg, 0, 1e6, &options->seconds); break;
        case 'U': failed = parse_number("warmup", optarg, 0, 1e6, &options->warmup_seconds); break;
        case 'A': options->anyway = 1; break;
        case 'M': options->mlperf = 1; break;
        case 'L':
            failed = parse_number("sustained", optarg, 0.01, 1e4, &options->sustained_minutes);
            break;
        case '?': failed = -1; break;
        default:
            if (*command != 0) {
                complain("%s", "give one command, not two");
                failed = -1;
            }
            *command = letter;
        }
    }
    options->threads = (int)threads;
    return failed;
}

int main(int count, char **arguments)
{
    struct options options = {.seconds = 1, .runs = 100, .warmup_seconds = 3};
    int command;
    if (parse(count, arguments, &options, &command) != 0)
        return MODEL_UNUSABLE;
    int files = count - optind;
    if (command == 0)
        return complain("%s", "give a command, for example --info; --help lists them all");
    if (files != (command == 'r' ? 2 : 0))
        return complain("%s", command == 'r' ? "--run needs two files: IN OUT"
                                             : "files are for --run only");
    int code = MODEL_OK;
    switch (command) {
    case 'i': code = info_command(&options); break;
    case 's': code = selftest_command(&options); break;
    case 'b': code = bench_command(&options); break;
    case 'p': code = profile_command(&options); break;
    case 'r': code = run_command(&options, arguments[optind], arguments[optind + 1]); break;
    default: fputs(USAGE, stdout);
    }
    model_close();
    if (command != 'r' && (fflush(stdout) != 0 || ferror(stdout)))
        return complain("stdout: %s", strerror(errno));
    return code;
}
