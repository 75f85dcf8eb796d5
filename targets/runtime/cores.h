/* Which cores the threads run on. */
#ifndef CORES_H
#define CORES_H

/* Read a choice of cores: "big" or "little" (the fastest or the slowest kind that the system tells
 * apart), or numbers and ranges such as "0,2-3". Writes at most `most` numbers, in the order given;
 * only cores that this process may use are accepted. How many, or -1 with error_text() set. */
int cores_choose(const char *choice, int *cores, int most);

/* The cores that this process may run on, `most` of them at most, in order. Their number; 0 where
 * the system does not say. */
int cores_allowed(int *cores, int most);

/* How many they are; 1 where the system does not say. */
int cores_allowed_count(void);

/* Let the calling thread run on one core only. 0, or -1 with error_text() set. */
int cores_pin(int core);

#endif
