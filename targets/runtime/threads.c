#define _GNU_SOURCE /* cpu_set_t */

#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "cores.h"
#include "error.h"
#include "model.h"

/* What a kernel hands over: do part `task_id` of `env->num_task` equal parts. */
struct parallel_group {
    void *sync_handle;
    int32_t num_task;
};
typedef int (*parallel_lambda)(int task_id, struct parallel_group *group, void *data);

/* Kernels reach the pool through this pointer, which is weak in their object file. */
extern int (*__TVMBackendParallelLaunch)(parallel_lambda lambda, void *data, int num_task);

/* How often a thread looks before it falls asleep: for work between inferences, some tens of
 * microseconds; for work during one, some milliseconds, since waking up takes longer than most
 * kernels; for the end of the others' parts. At rest every thread sleeps. */
enum { SPINS_AT_REST = 1000, SPINS_IN_A_RUN = 100000, SPINS_FOR_OTHERS = 10000 };

/* More parts than threads: a thread on a slow core, or one that the system took the core from, does
 * fewer of them. */
enum { PARTS_PER_THREAD = 4, PART_BITS = 12, MOST_PARTS = (1 << PART_BITS) - 1 };

static struct {
    pthread_mutex_t lock;
    pthread_cond_t wake;
    pthread_cond_t finished;
    pthread_t threads[MODEL_MAX_THREADS];
    int count;   /* threads wanted, the calling one included */
    int started; /* threads that run, the calling one not included */
    /* The number of the job above PART_BITS, below the parts that nobody took yet. One word, so
     * that a thread that is late never takes a part of a job that it does not know. */
    atomic_uint ticket;
    atomic_int done;     /* parts of the job that are finished */
    atomic_bool running; /* an inference is going on */
    atomic_bool stopping;
    int pinned_count; /* 0: threads run where the system puts them */
    int cores[MODEL_MAX_THREADS];
    parallel_lambda lambda;
    void *data;
    struct parallel_group group;
    int result; /* of a part that failed */
    char failure[ERROR_TEXT_BYTES];
} pool = {
    .lock = PTHREAD_MUTEX_INITIALIZER,
    .wake = PTHREAD_COND_INITIALIZER,
    .finished = PTHREAD_COND_INITIALIZER,
    .count = 1,
};

static _Thread_local int own_index;
static _Thread_local bool inside_job;

/* Look again, a little later. Now and then let others have the core: the thread that is waited for
 * may be one of them. */
static void relax(int spin)
{
    if (spin % 512 == 511)
        sched_yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__) || (defined(__arm__) && __ARM_ARCH >= 7)
    __asm__ volatile("yield");
#endif
}

static unsigned current_job(void)
{
    return atomic_load_explicit(&pool.ticket, memory_order_acquire) >> PART_BITS;
}

/* Take a part of a job. -1 where none is left, or the job is another one by now. */
static int take_part(unsigned job)
{
    unsigned ticket = atomic_load_explicit(&pool.ticket, memory_order_acquire);
    do {
        if (ticket >> PART_BITS != job || (ticket & MOST_PARTS) == 0)
            return -1;
    } while (!atomic_compare_exchange_weak_explicit(
        &pool.ticket, &ticket, ticket - 1, memory_order_acq_rel, memory_order_acquire));
    return pool.group.num_task - (int)(ticket & MOST_PARTS);
}

/* Do parts of a job until none is left. */
static void do_parts(unsigned job)
{
    int part;
    while ((part = take_part(job)) >= 0) {
        int parts = pool.group.num_task;
        inside_job = true;
        int result = pool.lambda(part, &pool.group, pool.data);
        inside_job = false;
        if (result != 0) {
            pthread_mutex_lock(&pool.lock);
            pool.result = result;
            snprintf(pool.failure, sizeof pool.failure, "%s", error_text());
            pthread_mutex_unlock(&pool.lock);
        }
        /* From here on the job may be over, and the next one announced. */
        if (atomic_fetch_add_explicit(&pool.done, 1, memory_order_acq_rel) == parts - 1) {
            pthread_mutex_lock(&pool.lock);
            pthread_cond_signal(&pool.finished);
            pthread_mutex_unlock(&pool.lock);
        }
    }
}

/* Wait until the job is another one than `seen`: first awake, then asleep. */
static void wait_for_job(unsigned seen)
{
    for (bool tired = false;;) {
        for (int i = 0; i < (tired ? 0 : SPINS_IN_A_RUN); i++) {
            if (current_job() != seen)
                return;
            if (i >= SPINS_AT_REST && !atomic_load_explicit(&pool.running, memory_order_relaxed))
                break;
            relax(i);
        }
        tired = atomic_load_explicit(&pool.running, memory_order_relaxed);
        pthread_mutex_lock(&pool.lock);
        while (current_job() == seen &&
               (tired || !atomic_load_explicit(&pool.running, memory_order_relaxed)))
            pthread_cond_wait(&pool.wake, &pool.lock);
        bool found = current_job() != seen;
        pthread_mutex_unlock(&pool.lock);
        if (found)
            return;
    }
}

/* Announce a job of so many parts; returns its number. */
static unsigned announce_job(int parts)
{
    pthread_mutex_lock(&pool.lock);
    unsigned job = (current_job() + 1) & (~0u >> PART_BITS);
    atomic_store_explicit(&pool.ticket, job << PART_BITS | (unsigned)parts, memory_order_release);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
    return job;
}

static void wait_until_done(int parts)
{
    for (int i = 0; i < SPINS_FOR_OTHERS; i++) {
        if (atomic_load_explicit(&pool.done, memory_order_acquire) == parts)
            return;
        relax(i);
    }
    pthread_mutex_lock(&pool.lock);
    while (atomic_load_explicit(&pool.done, memory_order_acquire) != parts)
        pthread_cond_wait(&pool.finished, &pool.lock);
    pthread_mutex_unlock(&pool.lock);
}

static void *work(void *index)
{
    own_index = (int)(intptr_t)index;
    if (pool.pinned_count > 0)
        (void)cores_pin(pool.cores[own_index % pool.pinned_count]); /* worked for thread 0 */
    for (unsigned seen = 0;;) {
        wait_for_job(seen);
        seen = current_job();
        if (pool.stopping)
            return NULL;
        do_parts(seen);
    }
}

/* Start the pool if it does not run yet. 0, or -1 with error_text() set. */
static int start(void)
{
    if (pool.started == pool.count - 1)
        return 0;
    atomic_store(&pool.ticket, 0);
    pool.stopping = false;
    for (int index = 1; index < pool.count; index++) {
        int code = pthread_create(&pool.threads[index], NULL, work, (void *)(intptr_t)index);
        if (code != 0) {
            threads_stop();
            error_set("cannot start thread %d of %d: %s. Use fewer threads.", index + 1,
                      pool.count, strerror(code));
            return -1;
        }
        pool.started = index;
    }
    return 0;
}

/* Run all parts of a kernel's work; `num_task` 0 means as many parts as suit the pool. */
static int launch(parallel_lambda lambda, void *data, int num_task)
{
    if (pool.count == 1 || num_task == 1 || inside_job) {
        struct parallel_group alone = {NULL, 1};
        return lambda(0, &alone, data);
    }
    if (start() != 0)
        return -1;
    int parts = num_task > 0 ? num_task : PARTS_PER_THREAD * pool.count;
    if (parts > MOST_PARTS)
        parts = MOST_PARTS;
    pool.lambda = lambda;
    pool.data = data;
    pool.group = (struct parallel_group){NULL, parts};
    pool.result = 0;
    atomic_store_explicit(&pool.done, 0, memory_order_relaxed);
    do_parts(announce_job(parts));
    wait_until_done(parts);
    if (pool.result != 0)
        error_set("%s", pool.failure);
    return pool.result;
}

int (*__TVMBackendParallelLaunch)(parallel_lambda lambda, void *data, int num_task) = launch;

void threads_set(int count)
{
    threads_stop();
    pool.count = count;
}

int threads_pin(const int *cores, int count)
{
    if (cores_pin(cores[0]) != 0)
        return -1;
    threads_stop();
    memcpy(pool.cores, cores, (size_t)count * sizeof *cores);
    pool.pinned_count = count;
    return 0;
}

void threads_begin_run(void)
{
    if (pool.count == 1)
        return;
    atomic_store(&pool.running, true);
    if (pool.started == 0)
        return;
    pthread_mutex_lock(&pool.lock);
    pthread_cond_broadcast(&pool.wake);
    pthread_mutex_unlock(&pool.lock);
}

void threads_end_run(void)
{
    atomic_store(&pool.running, false);
}

int threads_count(void)
{
    return pool.count;
}

int threads_index(void)
{
    return own_index;
}

int threads_available(void)
{
    return cores_allowed_count();
}

int threads_cores(int *cores, int most)
{
    if (pool.pinned_count == 0)
        return cores_allowed(cores, most);
    cpu_set_t set;
    CPU_ZERO(&set);
    for (int i = 0; i < pool.pinned_count && i < pool.count; i++)
        CPU_SET((size_t)pool.cores[i], &set);
    int count = 0;
    for (int core = 0; core < CPU_SETSIZE && count < most; core++)
        if (CPU_ISSET((size_t)core, &set))
            cores[count++] = core;
    return count;
}

void threads_stop(void)
{
    if (pool.started == 0)
        return;
    pool.stopping = true;
    (void)announce_job(0);
    for (int index = 1; index <= pool.started; index++)
        pthread_join(pool.threads[index], NULL);
    pool.started = 0;
}
