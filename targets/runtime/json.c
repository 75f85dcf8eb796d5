#include "json.h"

#include <math.h>
#include <stdio.h>

void json_string(const char *text)
{
    if (text == NULL) {
        fputs("null", stdout);
        return;
    }
    putchar('"');
    for (const unsigned char *c = (const unsigned char *)text; *c != '\0'; c++) {
        if (*c == '"' || *c == '\\')
            printf("\\%c", *c);
        else if (*c < 0x20)
            printf("\\u%04x", *c);
        else
            putchar(*c);
    }
    putchar('"');
}

void json_number(double number)
{
    if (isfinite(number))
        printf("%.9g", number);
    else
        fputs("null", stdout);
}
