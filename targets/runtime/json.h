/* Pieces of JSON on stdout. */
#ifndef JSON_H
#define JSON_H

/* A string with quotes and escapes, or null for NULL. The text must be UTF-8. */
void json_string(const char *text);

/* A finite number, else null. */
void json_number(double number);

#endif
