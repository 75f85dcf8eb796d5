/* A hook for per-kernel times. */
#ifndef PROFILE_H
#define PROFILE_H

/* Called after every kernel with the number of its call, unless NULL. */
extern void (*profile_after_call)(int call);

#endif
