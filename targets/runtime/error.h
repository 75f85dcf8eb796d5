/* The text of the latest error on the calling thread. */
#ifndef ERROR_H
#define ERROR_H

#define ERROR_TEXT_BYTES 512

/* Replace the text; longer texts are cut. */
__attribute__((format(printf, 1, 2))) void error_set(const char *format, ...);

const char *error_text(void);

#endif
